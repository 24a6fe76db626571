"""Visual question answering in training: questions about images, a tokenizer learnt from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from intaglio.models.pretrained import Encoders, QuestionTokenizer, open_encoders
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
    encoders: Encoders = field(default_factory=Encoders, init=False)

    def prepare(
        self, saved: Mapping[str, Any] | None, model: VqaModel | None, progress: Progress | None, say: Say
    ) -> Questioned:
        """Questions, and the encoders of folders; those that a checkpoint or a model has are read from nowhere else."""
        c, tokenizer, lengths = self.config, None, None
        if saved is not None:
            tokenizer, lengths = CaptionTokenizer.from_json(saved["tokenizer"]), tuple(saved["lengths"])
            files = saved.get("question_tokenizer")
            self.encoders = Encoders(saved.get("encoders", {}), {}, QuestionTokenizer(files) if files else None)
        elif model is not None:
            tokenizer, lengths = model.tokenizer, model.lengths
            self.encoders = Encoders(model.encoders, {}, model.reader)
        else:
            self.encoders = open_encoders(c.model, c.data.image_size, c.data.question_length)
        reader = self.encoders.reader
        return prepare_questions(c.data, c.seed, c.model.vocabulary, tokenizer, lengths, progress, reader)

    def describe(self, prepared: Questioned) -> str:
        return f"{len(prepared.tokenizer):,} tokens, {prepared.record['different answers']:,} different answers"

    def resolve(self, prepared: Questioned) -> VqaConfig:
        asked, answered = prepared.lengths
        return replace(self.config, data=replace(self.config.data, question_length=asked, answer_length=answered))

    def saved(self, prepared: Questioned) -> dict[str, Any]:
        told: dict[str, Any] = {"tokenizer": prepared.tokenizer.to_json(), "lengths": list(prepared.lengths)}
        if self.encoders.described:
            told["encoders"] = self.encoders.described
        if self.encoders.reader is not None:
            told["question_tokenizer"] = self.encoders.reader.files
        return told

    def build(self, prepared: Questioned, model: VqaModel | None = None) -> vqa.VqaSystem:
        return vqa.build(self.config, prepared, model, self.encoders)

    def refuse_other_shape(self, model: VqaModel, source: RunFolder) -> None:
        ours = self.config.model
        theirs = replace(model.config, train_vision=ours.train_vision, train_question=ours.train_question)
        if theirs != ours or model.image_size != self.config.data.image_size:
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
