"""The multimodal system in training: captions, a tokenizer learnt from them, a prior fitted at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from intaglio.config import MultimodalConfig
from intaglio.data.corpus import Progress
from intaglio.data.prepare import Captioned, prepare
from intaglio.data.tokenizer import CaptionTokenizer
from intaglio.history.reading import Evaluation
from intaglio.history.run_folder import RunFolder
from intaglio.models.classifier import Judge
from intaglio.models.multimodal import MultimodalModel
from intaglio.reports.proofs.multimodal import make_proofs
from intaglio.systems import multimodal, prior
from intaglio.systems.multimodal_evaluation import evaluate
from intaglio.training.kinds.base import Kind, Say


@dataclass
class MultimodalKind(Kind):
    """One latent, an image and a caption."""

    config: MultimodalConfig
    kept: ClassVar[Mapping[str, str]] = {"val/caption/token_accuracy": "val/caption/accuracy_as_logged"}

    def prepare(
        self, saved: Mapping[str, Any] | None, model: MultimodalModel | None, progress: Progress | None, say: Say
    ) -> Captioned:
        tokenizer, length = None, 0
        if saved is not None:
            tokenizer, length = CaptionTokenizer.from_json(saved["tokenizer"]), saved["text_length"]
        elif model is not None:
            tokenizer, length = model.tokenizer, model.text_length
        vocabulary = self.config.model.vocabulary
        return prepare(self.config.data, self.config.seed, vocabulary, tokenizer, length, progress)

    def describe(self, prepared: Captioned) -> str:
        return f"{len(prepared.tokenizer):,} tokens"

    def resolve(self, prepared: Captioned) -> MultimodalConfig:
        return replace(self.config, data=replace(self.config.data, text_length=prepared.text_length))

    def saved(self, prepared: Captioned) -> dict[str, Any]:
        return {"tokenizer": prepared.tokenizer.to_json(), "text_length": prepared.text_length}

    def build(self, prepared: Captioned, model: MultimodalModel | None = None) -> multimodal.MultimodalSystem:
        return multimodal.build(self.config, prepared, model)

    def refuse_other_shape(self, model: MultimodalModel, source: RunFolder) -> None:
        if model.config != self.config.model or model.image_size != self.config.data.image_size:
            raise ValueError(
                f"The model of {source.path} has another shape than this recipe (model.* or data.image_size differ). "
                f"Fine-tune with its own recipe: intaglio train --from {source.path} --data.source FOLDER"
            )

    def complete(self, model: MultimodalModel, prepared: Captioned, say: Say) -> None:
        say("fitting the prior to the latents of the training items")
        bf16 = self.config.train.precision == "bf16"
        prior.fit(model, prepared, self.config.prior, self.config.seed, bf16, say)

    def evaluate(self, model: MultimodalModel, prepared: Captioned, judge: Judge | str) -> Evaluation:
        return evaluate(model, prepared, judge)

    def prove(
        self, model: MultimodalModel, prepared: Captioned, folder: Path, quick: bool, *measured: Any
    ) -> list[Path]:
        return make_proofs(model, prepared, folder, quick)
