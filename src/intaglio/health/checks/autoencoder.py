"""The image autoencoder before it is trained."""

from dataclasses import dataclass

import torch

from intaglio.config import AutoencoderConfig, to_dict
from intaglio.data.batches import PictureBatch
from intaglio.health.checks.base import Subject
from intaglio.models.autoencoder import Autoencoder
from intaglio.systems.autoencoder import AutoencoderSystem


@dataclass
class AutoencoderSubject(Subject):
    """An image, a smaller latent, the image."""

    config: AutoencoderConfig
    of_the_data = "pixels"

    def system(self) -> AutoencoderSystem:
        with torch.device("meta"):
            model = Autoencoder(self.config.data.image_size, **to_dict(self.config)["model"])
            return AutoencoderSystem(self.config, self.config.train.steps or 1, model, {})

    def batch(self, system: AutoencoderSystem) -> PictureBatch:
        n, size = self.items, system.model.image_size
        labels, prompts = torch.zeros(n, dtype=torch.long), torch.zeros(n, 0, dtype=torch.long)
        return PictureBatch(torch.zeros(n, 3, size, size, dtype=torch.uint8), labels, prompts)
