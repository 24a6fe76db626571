"""Visual question answering before it is trained."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intaglio.config import VqaConfig, to_dict
from intaglio.data.questions.prepare import BUILT_IN_IMAGES, open_questions, split_questions
from intaglio.data.questions.table import QuestionBatch
from intaglio.data.tokenizer import CaptionTokenizer
from intaglio.health.checks.base import SAMPLE_IMAGES, Subject
from intaglio.health.finding import Finding, remedies
from intaglio.health.rules.static import DataFacts, QuestionFacts
from intaglio.models.cost import parameter_counts
from intaglio.models.pretrained import QuestionTokenizer
from intaglio.models.vqa import VqaModel
from intaglio.systems.vqa import VqaSystem


class Blank(VqaSystem):
    """Knows no texts: the answers that it draws are blank, and as long as any can be."""

    def candidates(self, z_BKZ: Tensor) -> Tensor:
        return torch.ones(len(z_BKZ) * self.config.loss.candidates, self.model.lengths[1], dtype=torch.long)

    def scores(self, given_BT: Tensor, truth_BT: Tensor) -> Tensor:
        return torch.zeros(len(given_BT))


SAMPLE = 500
"""Built-in images whose questions are read; all of a folder are."""


@dataclass
class VqaSubject(Subject):
    """An answer from an image and a question."""

    config: VqaConfig
    of_the_data = "real vocabulary, lengths of questions and answers"

    def look(self) -> list[Finding]:
        data, scale = self.config.data, 1.0
        if data.source == "engravings":
            images = data.items or BUILT_IN_IMAGES
            data = replace(data, items=min(images, SAMPLE))
            scale = images / min(images, SAMPLE)
        try:
            corpus = open_questions(data, self.config.seed)
            sides, _ = split_questions(corpus, data.held_out, self.config.seed)
        except ValueError as error:
            return [Finding("data-unusable", "fail", str(error), {}, remedies("name the folder: --data.source FOLDER"))]
        folder, learnt = self.config.model.question, [corpus.asked[i] for i in sides["train"]]
        reader = QuestionTokenizer.of(Path(folder)) if folder else None
        tokenizer = CaptionTokenizer.train(
            (t for a in learnt for t in (a.question, *a.answers)[bool(reader) :]), self.config.model.vocabulary
        )
        questions = (reader or tokenizer).encode([a.question for a in corpus.asked], data.question_length)
        answers = tokenizer.encode([a.answers[0] for a in corpus.asked], data.answer_length)
        _, counts = np.unique([a.answers[0] for a in learnt], return_counts=True)
        share = counts / counts.sum()
        facts = QuestionFacts(
            len(tokenizer),
            (questions.ids.shape[1], answers.ids.shape[1]),
            questions.truncated + answers.truncated,
            float(-(share * np.log(share)).sum()),
        )
        some = [corpus.image(int(i), 64) for i in sides["train"][:: max(1, len(learnt) // SAMPLE_IMAGES)]]
        low, high = min(int(x.min()) for x in some), max(int(x.max()) for x in some)
        self.data = DataFacts(
            round(scale * len(learnt)), round(scale * len(sides["val"])), low, high, len(corpus), questions=facts
        )
        image = np.array([a.image for a in corpus.asked])
        sets = [set(image[sides[side]].tolist()) for side in ("train", "val")]
        if shared := len(sets[0] & sets[1]):
            message = f"{shared} images are asked about on both sides."
            return [Finding("split-leak", "fail", message, {"images": shared}, remedies("split by image"))]
        return []

    def system(self) -> VqaSystem:
        d = self.config.data
        return self._of((d.question_length, d.answer_length), self.config.model.vocabulary)

    def trained(self) -> VqaSystem:
        told = self.data and self.data.questions
        return self._of(told.longest, told.vocabulary) if told else self.system()

    def _of(self, lengths: tuple[int, int], vocabulary: int) -> VqaSystem:
        config = replace(self.config, stages=())  # behind the last one nothing is held back
        with torch.device("meta"):
            model = VqaModel(to_dict(config)["model"], config.data.image_size, lengths, vocabulary)
            return Blank(config, config.train.steps or 1, model, {})

    def batch(self, system: VqaSystem) -> QuestionBatch:
        images, size, (asked, answered) = self.items, system.model.image_size, system.model.lengths
        n = images * self.config.data.together
        return QuestionBatch(
            torch.zeros(images, 3, size, size, dtype=torch.uint8),
            torch.arange(n) % images,
            torch.ones(n, asked, dtype=torch.long),
            torch.ones(n, answered, dtype=torch.long),
        )

    def modules(self, system: VqaSystem) -> dict[str, int]:
        return parameter_counts(system.model.network)

    def measured(self, system: VqaSystem) -> set[str]:
        return {f"loss/{name}" for name in (*system.loss_terms(self.batch(system)), "wrong")}
