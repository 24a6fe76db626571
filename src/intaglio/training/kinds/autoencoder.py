"""The image autoencoder in training: statistics of its latents fitted at the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.config import AutoencoderConfig, to_dict
from intaglio.data.corpus import Progress
from intaglio.data.prepare import Pictured, prepare_pictures
from intaglio.history.reading import Evaluation
from intaglio.history.run_folder import RunFolder
from intaglio.models.autoencoder import Autoencoder
from intaglio.models.classifier import Judge
from intaglio.reports.proofs.autoencoder import make_proofs
from intaglio.systems import autoencoder
from intaglio.systems.autoencoder_evaluation import evaluate
from intaglio.training.kinds.base import Kind, Say


@dataclass
class AutoencoderKind(Kind):
    """An image, a smaller latent, the image."""

    config: AutoencoderConfig

    def prepare(
        self, saved: Mapping[str, Any] | None, model: Autoencoder | None, progress: Progress | None, say: Say
    ) -> Pictured:
        return prepare_pictures(self.config.data, self.config.seed, progress)

    def describe(self, prepared: Pictured) -> str:
        size = self.config.data.image_size
        return f"{size} × {size} pixels"

    def build(self, prepared: Pictured, model: Autoencoder | None = None) -> autoencoder.AutoencoderSystem:
        return autoencoder.build(self.config, prepared, model)

    def refuse_other_shape(self, model: Autoencoder, source: RunFolder) -> None:
        ours = {"image_size": self.config.data.image_size, **to_dict(self.config)["model"], "pretrained": None}
        if model.arguments != ours:
            raise ValueError(
                f"The autoencoder of {source.path} has another shape than this recipe (model.* or data.image_size "
                f"differ). Fine-tune with its own recipe: intaglio train --from {source.path} --data.source FOLDER"
            )

    def complete(self, model: Autoencoder, prepared: Pictured, say: Say) -> None:
        say("fitting mean and standard deviation of each latent channel to the training images")
        train, images = prepared.splits["train"], prepared.data.images
        model.fit_statistics(images[train[at : at + 64]] for at in range(0, len(train), 64))

    def evaluate(self, model: Autoencoder, prepared: Pictured, judge: Judge | str) -> Evaluation:
        return evaluate(model, prepared, judge)

    def prove(self, model: Autoencoder, prepared: Pictured, folder: Path, quick: bool, *measured: Any) -> list[Path]:
        return make_proofs(model, prepared, folder)
