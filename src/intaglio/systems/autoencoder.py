"""An image, a smaller latent, the image: how the KL autoencoder is trained (Rombach et al. 2022, §3.1, without
discriminator).

Shapes: B batch, S image side, K × s × s the latent.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.config import AutoencoderConfig, to_dict
from intaglio.data.batches import PictureBatch
from intaglio.data.prepare import Pictured
from intaglio.health import audits, panel
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Measured
from intaglio.models import nulls
from intaglio.models.autoencoder import Autoencoder
from intaglio.nn.convolution import channels_last
from intaglio.objectives import Term
from intaglio.objectives.gaussian import kl_to_standard, sample
from intaglio.objectives.image import l1_plus_mse
from intaglio.systems.base import System

PAINTED = 64
"""Items of the probe whose latents are exchanged."""


class AutoencoderSystem(System):
    """L1 + MSE of the image, and a small KL to N(0, I) that keeps the latents' scale."""

    config: AutoencoderConfig
    model: Autoencoder

    def __init__(self, config: AutoencoderConfig, steps: int, model: Autoencoder, nulls: Mapping[str, float]):
        super().__init__(config, steps)
        self.model, self._nulls = model, dict(nulls)

    def loss_terms(self, batch: PictureBatch) -> dict[str, Term]:
        weights, x = self.config.loss, self.standard(batch.x)
        q = self.model.posterior(x)
        z = sample(q.mean, q.log_variance, self.noise_like(q.mean)) if self.training else q.mean
        nats_B = kl_to_standard(q.mean.flatten(1), q.log_variance.flatten(1))
        return {
            "reconstruction": Term(l1_plus_mse(self.model.image(z), x), weights.reconstruction),
            "kl": Term(nats_B.mean(), weights.kl),
        }

    def standard(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) → [−1, 1], channels last in memory."""
        return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def measure(self, batch: PictureBatch) -> dict[str, tuple[Tensor, Tensor]]:
        x, items = self.standard(batch.x), torch.tensor(float(len(batch.x)))
        made = self.model.image(self.model.posterior(x).mean)
        sums = {"image/mse": (self._errors(made, x).sum(), items)}
        for name, term in self.loss_terms(batch).items():
            sums[f"loss/{name}"] = (term.value * items.to(term.value), items)
        return sums

    def read(self, batch: PictureBatch) -> dict[str, Mapping[str, Measured]]:
        x = self.standard(batch.x)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            parts = [self.model.posterior(some) for some in x.split(128)]
            mean, log_variance = (torch.cat(p).float().flatten(1) for p in zip(*parts, strict=True))
            few = slice(0, PAINTED)
            blurs = cost_of_exchange(lambda z: self._image_errors(z, x[few]), mean[few])
        return {
            "val/image": {f"{other}_latent_error": m for other, m in blurs.items()},
            "val/latent": panel.latents(mean, log_variance),
        }

    def _image_errors(self, z_BZ: Tensor, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Each image's mean squared error in [0, 1], (B,), decoded from the given latents."""
        made = self.model.image(z_BZ.reshape(-1, *self.model.latent_shape))
        return self._errors(made, x).double().cpu().numpy(), np.ones(len(x))

    def _errors(self, made: Tensor, x: Tensor) -> Tensor:
        return ((made.float().clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))

    def ranges(self, batch: PictureBatch) -> dict[str, dict[str, float]]:
        return {"image": audits.ranges(self.standard(batch.x), -1.0, 1.0)}

    def taps(self) -> dict[str, nn.Module]:
        return {"network": self.model.network}

    def nulls(self) -> Mapping[str, float]:
        return self._nulls


def null_readings(config: AutoencoderConfig, prepared: Pictured) -> dict[str, float]:
    """What held-out quantities would be if each image were answered with the mean training image."""
    images, val = prepared.data.images, prepared.some("val", config.train.validate_items)
    train = prepared.some("train", 4096)
    mean, mse = images[train].mean(0, dtype=np.float64), float(nulls.mean_image_errors(images, train, val).mean())
    l1 = float(np.mean([np.abs(images[i] - mean).mean() for i in val])) / 127.5
    return {"image/mse": mse, "loss/reconstruction": l1 + 4 * mse}  # in [−1, 1], where squares are four times as large


def build(config: AutoencoderConfig, prepared: Pictured, model: Autoencoder | None = None) -> AutoencoderSystem:
    """The system with fresh weights from the seed, or around a trained ``model``."""
    if model is None:
        torch.manual_seed(config.seed)
        model = Autoencoder(config.data.image_size, **to_dict(config)["model"])
    assert config.train.steps is not None, "steps are resolved before a system is built"
    channels_last(model.network)
    model.train()
    return AutoencoderSystem(config, config.train.steps, model, null_readings(config, prepared))
