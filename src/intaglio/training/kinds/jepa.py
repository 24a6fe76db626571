"""The JEPA system in training: tasks of grids, read or drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.config import JepaConfig, to_dict
from intaglio.data.arc.prepare import Puzzles, prepare_tasks
from intaglio.data.corpus import Progress
from intaglio.health.record import Record
from intaglio.history.reading import Evaluation
from intaglio.history.run_folder import RunFolder
from intaglio.models.classifier import Judge
from intaglio.models.jepa import JepaModel
from intaglio.reports.proofs.jepa import make_proofs
from intaglio.reports.proofs.pull import UNMEASURED, WHILE_TRAINING
from intaglio.systems import jepa
from intaglio.systems.jepa_evaluation import evaluate
from intaglio.training.kinds.base import Kind, Say


@dataclass
class JepaKind(Kind):
    """The embedding of an answer from demonstrations and a question."""

    config: JepaConfig

    def prepare(
        self, saved: Mapping[str, Any] | None, model: JepaModel | None, progress: Progress | None, say: Say
    ) -> Puzzles:
        prepared = prepare_tasks(self.config.data, self.config.seed)
        self._refuse_small(prepared)
        return prepared

    def _refuse_small(self, prepared: Puzzles) -> None:
        """More negatives than there are answers, or more codes than tokens: neither could ever be filled."""
        config, train = self.config, np.unique(prepared.splits["train"])
        pairs = int((prepared.corpus.first[train + 1] - prepared.corpus.first[train]).sum())
        if config.train.batch_size < 2 and config.loss.objective == "infonce" and not config.loss.queue:
            raise ValueError(
                "train.batch_size is 1 and loss.queue 0: the answers of one task alone teach no difference between "
                "tasks. Use --train.batch_size 32, or --loss.queue 4096 with --model.target 0.99."
            )
        if config.loss.objective == "infonce" and config.loss.queue > pairs:
            raise ValueError(
                f"loss.queue is {config.loss.queue}, but the training tasks have {pairs} answers, so the queue would "
                f"hold each several times: set --loss.queue {2 ** int(np.log2(max(2, pairs // 2)))} or less, or give "
                "more tasks (--data.items adds generated ones)."
            )
        tokens = 2 * pairs * config.model.slots
        if config.model.quantiser == "vq" and config.model.codes > tokens:
            raise ValueError(
                f"model.codes is {config.model.codes}, but an epoch has {tokens} slots, so most codes could never be "
                f"used: set --model.codes {2 ** int(np.log2(max(2, tokens // 16)))} or less, or give more tasks."
            )

    def describe(self, prepared: Puzzles) -> str:
        generated = sum(bool(program) for program in prepared.corpus.programs)
        return f"{generated:,} of the tasks generated"

    def build(self, prepared: Puzzles, model: JepaModel | None = None) -> jepa.JepaSystem:
        return jepa.build(self.config, prepared, model)

    def refuse_other_shape(self, model: JepaModel, source: RunFolder) -> None:
        theirs, ours = to_dict(source.config()), to_dict(self.config)
        apart = [key for key in ("model", "data.pairs") if _at(theirs, key) != _at(ours, key)]
        if apart:
            raise ValueError(
                f"{source.path} was trained with another {' and '.join(apart)} than this recipe has, so its weights "
                f"don't fit. Fine-tune with its own recipe: intaglio train --from {source.path} --data.source FOLDER"
            )

    def evaluate(self, model: JepaModel, prepared: Puzzles, judge: Judge | str) -> Evaluation:
        return evaluate(model, prepared, self.config)

    def prove(
        self,
        model: JepaModel,
        prepared: Puzzles,
        folder: Path,
        quick: bool,
        judge: Judge | str = WHILE_TRAINING,
        record: Record = UNMEASURED,
    ) -> list[Path]:
        return make_proofs(model, prepared, folder, quick)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
