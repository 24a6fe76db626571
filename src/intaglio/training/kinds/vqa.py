"""Visual question answering in training: questions about images, a tokenizer learnt from them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intaglio.config import VqaConfig
from intaglio.data.corpus import Progress
from intaglio.data.questions.prepare import Questioned, prepare_questions
from intaglio.data.tokenizer import CaptionTokenizer
from intaglio.health.record import Record
from intaglio.history.reading import Evaluation
from intaglio.history.run_folder import RunFolder
from intaglio.models.classifier import Judge
from intaglio.models.vqa import VqaModel
from intaglio.reports.proofs.pull import UNMEASURED, WHILE_TRAINING
from intaglio.reports.proofs.vqa import make_proofs
from intaglio.systems import vqa
from intaglio.systems.vqa_evaluation import evaluate
from intaglio.training.kinds.base import Kind, Say


@dataclass
class VqaKind(Kind):
    """An answer from an image and a question."""

    config: VqaConfig

    def prepare(
        self, saved: Mapping[str, Any] | None, model: VqaModel | None, progress: Progress | None, say: Say
    ) -> Questioned:
        tokenizer, lengths = None, None
        if saved is not None:
            tokenizer, lengths = CaptionTokenizer.from_json(saved["tokenizer"]), tuple(saved["lengths"])
        elif model is not None:
            tokenizer, lengths = model.tokenizer, model.lengths
        vocabulary = self.config.model.vocabulary
        return prepare_questions(self.config.data, self.config.seed, vocabulary, tokenizer, lengths, progress)

    def describe(self, prepared: Questioned) -> str:
        return f"{len(prepared.tokenizer):,} tokens, {prepared.record['different answers']:,} different answers"

    def resolve(self, prepared: Questioned) -> VqaConfig:
        asked, answered = prepared.lengths
        return replace(self.config, data=replace(self.config.data, question_length=asked, answer_length=answered))

    def saved(self, prepared: Questioned) -> dict[str, Any]:
        return {"tokenizer": prepared.tokenizer.to_json(), "lengths": list(prepared.lengths)}

    def build(self, prepared: Questioned, model: VqaModel | None = None) -> vqa.VqaSystem:
        return vqa.build(self.config, prepared, model)

    def refuse_other_shape(self, model: VqaModel, source: RunFolder) -> None:
        if model.config != self.config.model or model.image_size != self.config.data.image_size:
            raise ValueError(
                f"The model of {source.path} has another shape than this recipe (model.* or data.image_size differ). "
                f"Fine-tune with its own recipe: intaglio train --from {source.path} --data.source FOLDER"
            )

    def evaluate(self, model: VqaModel, prepared: Questioned, judge: Judge | str) -> Evaluation:
        return evaluate(model, prepared, self.config.seed)

    def prove(
        self,
        model: VqaModel,
        prepared: Questioned,
        folder: Path,
        quick: bool,
        judge: Judge | str = WHILE_TRAINING,
        record: Record = UNMEASURED,
    ) -> list[Path]:
        return make_proofs(model, prepared, folder, quick)
