"""The JEPA on grids before it is trained."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from intaglio.config import JepaConfig, to_dict
from intaglio.data.arc.prepare import open_tasks, split_tasks
from intaglio.data.arc.read import Leak
from intaglio.data.arc.survey import SAMPLE, seen_in_training, survey
from intaglio.data.arc.table import TaskBatch, Tasks
from intaglio.data.arc.tasks import TaskCorpus
from intaglio.health.checks.base import Subject
from intaglio.health.finding import Finding, remedies
from intaglio.health.rules.static import DataFacts, GridFacts
from intaglio.models.cost import parameter_counts
from intaglio.models.jepa import JepaModel
from intaglio.nn.objects import dropped
from intaglio.systems.jepa import JepaSystem

SIDE = 14
"""Of the grids of unknown data."""


@dataclass
class JepaSubject(Subject):
    """The embedding of an answer from demonstrations and a question."""

    config: JepaConfig
    of_the_data = "sizes of grids"
    side: int = SIDE

    def look(self) -> list[Finding]:
        data = self.config.data
        try:
            corpus = open_tasks(data, self.config.seed)
            sides, _ = split_tasks(corpus, data.held_out, self.config.seed)
        except Leak as leak:
            return [Finding("split-leak", "fail", str(leak), {}, remedies("take one edition of ARC, or its own split"))]
        except ValueError as error:
            return [Finding("data-unusable", "fail", str(error), {}, remedies("name the folder: --data.source FOLDER"))]
        patches = np.ceil(corpus.sizes / self.config.model.patch).prod(-1).mean()
        self.side = self.config.model.patch * math.ceil(math.sqrt(patches))
        train, held_out = sides["train"], sides["val"]
        self.data = DataFacts(len(train), len(held_out), 0, 255, len(corpus), grids=self._grids(corpus, train))
        if leaked := seen_in_training(corpus, train, held_out):
            message = f"{leaked} of {len(held_out)} held-out tasks are among the training tasks."
            return [Finding("split-leak", "fail", message, {"items": leaked}, remedies("split by task"))]
        return []

    def _grids(self, corpus: TaskCorpus, train: np.ndarray) -> GridFacts:
        answers = int((corpus.first[train + 1] - corpus.first[train]).sum())
        lost = None
        if self.config.model.tokens == "objects":
            some = train[np.linspace(0, len(train) - 1, min(SAMPLE, len(train))).astype(int)]
            lost, _ = dropped(torch.from_numpy(corpus.part(some).grids.reshape(-1, *corpus.grids.shape[2:])))
        found = survey(Tasks(corpus, self.config.data.pairs, self.config.data.augment), train)
        return GridFacts(answers, found.same, found.repeated, lost, found.changed, found.variety)

    def system(self) -> JepaSystem:
        with torch.device("meta"):
            model = JepaModel(to_dict(self.config)["model"], self.config.data.pairs)
            return JepaSystem(self.config, self.config.train.steps or 1, model, {})

    def batch(self, system: JepaSystem) -> TaskBatch:
        n, pairs = self.items, self.config.data.pairs
        grids = torch.zeros(n, pairs, 2, self.side, self.side, dtype=torch.uint8)
        return TaskBatch(grids, torch.ones(n, pairs, dtype=torch.bool), torch.arange(n))

    def modules(self, system: JepaSystem) -> dict[str, int]:
        target = (
            {} if system.model.target is None else {"target": sum(p.numel() for p in system.model.target.parameters())}
        )
        temperature = {"temperature": 1} if self.config.loss.objective == "infonce" else {}
        return parameter_counts(system.model.network) | target | temperature
