"""A KL-regularised image autoencoder whose latents are standardised per channel (Rombach et al. 2022, §3.1).

Shapes: B batch, S image side, K latent channels, s = S / factor side of the grid of latents.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from intaglio.models.nulls import mean_image_errors
from intaglio.nn.autoencoder import CompactNetwork, KLNetwork, kl_layout, renamed, strict_load

LOG_VARIANCE = (-30.0, 20.0)
"""Bounds of log σ²: exp(20) keeps the KL and its gradient finite in float32 after a bad step, and below −30 the noise
is less than a float32's last digit. They are those that pretrained autoencoders were trained with."""


class Posterior(NamedTuple):
    """N(mean, exp(log_variance)) for each number of the latent, both (B, K, s, s), before standardising."""

    mean: Tensor
    log_variance: Tensor


class Autoencoder(nn.Module, PyTorchModelHubMixin, library_name="intaglio", license="apache-2.0"):
    """Images uint8 ↔ latents of mean 0 and std 1 per channel over the data that ``fit_statistics`` saw.

    ``channels`` has an entry for each halving: two give f = 4, three give f = 8. ``pretrained`` holds the arguments of
    `KLNetwork` instead, for an autoencoder that `open_autoencoder` read. ``save_pretrained(folder)`` writes
    ``model.safetensors``, statistics included, and ``config.json``; ``from_pretrained(folder)`` reads them.

    Raises:
        ValueError: the factor does not divide the image size.
    """

    latent_mean: Tensor  # (K,)
    latent_std: Tensor  # (K,)

    def __init__(
        self,
        image_size: int,
        channels: Sequence[int] = (64, 128),
        latent: int = 4,
        pretrained: dict[str, Any] | None = None,
    ):
        super().__init__()
        factor = 2 ** (len(pretrained["channels"]) - 1 if pretrained else len(channels))
        if (factor < 4 and not pretrained) or image_size < factor or image_size % factor:
            fitting = max(1, round(image_size / factor)) * factor
            raise ValueError(
                f"An autoencoder of factor {factor} cannot read images of {image_size} pixels: the factor must be 4 or "
                f"more and divide the size. Set data.image_size={fitting}, or give model.channels another number of "
                "entries (two give factor 4, three 8)."
            )
        self.image_size = image_size
        self.arguments = {"image_size": image_size, "channels": [*channels], "latent": latent, "pretrained": pretrained}
        self.network: CompactNetwork | KLNetwork = (
            KLNetwork(**pretrained) if pretrained else CompactNetwork(image_size, channels, latent)
        )
        self.register_buffer("latent_mean", torch.zeros(self.network.latent))
        self.register_buffer("latent_std", torch.zeros(self.network.latent))  # 0: not fitted

    @property
    def factor(self) -> int:
        """f: how many pixels a latent spans on each side."""
        return self.network.factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(K, s, s) of one image."""
        side = self.image_size // self.factor
        return self.network.latent, side, side

    @property
    def fitted(self) -> bool:
        """Whether the statistics are there that ``encode`` and ``decode`` need."""
        return bool((self.latent_std > 0).all())

    @property
    def device(self) -> torch.device:
        return self.latent_mean.device

    # What training uses: no statistics yet, images as floats in [−1, 1].

    def to_range(self, images: np.ndarray) -> Tensor:
        """uint8 (B, S, S, 3) → float (B, 3, S, S) in [−1, 1], on the model's device.

        Raises:
            ValueError: images of another type or size.
        """
        if images.shape[1:] != (self.image_size, self.image_size, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"Images are {images.dtype} {images.shape}; this autoencoder reads uint8 "
                f"(N, {self.image_size}, {self.image_size}, 3). Set data.image_size={self.image_size}."
            )
        return torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1

    def posterior(self, x_BCHW: Tensor) -> Posterior:
        """q(z | x) of images in [−1, 1]."""
        mean, log_variance = self.network.moments(x_BCHW).float().chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE))

    def image(self, raw_BKHW: Tensor) -> Tensor:
        """Latents as the posterior gives them → images around [−1, 1], nothing clamped."""
        return self.network.image(raw_BKHW).float()

    # What everybody else uses: standardised latents.

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[np.ndarray]) -> None:
        """Mean and std of every channel over all posterior means, exact to float64 and in one pass.

        ``batches`` are uint8 (B, S, S, 3); they are merged by Chan et al. 1983, eq. 2.1.

        Raises:
            ValueError: no image, a latent that is not finite, or a channel that is the same everywhere.
        """
        count, mean, squares = 0, np.zeros(self.network.latent), np.zeros(self.network.latent)
        for images in batches:
            z = self.posterior(self.to_range(images)).mean.transpose(0, 1).flatten(1).cpu().numpy().astype(np.float64)
            n, own = z.shape[1], z.mean(1)
            count, apart = count + n, own - mean
            squares += np.square(z - own[:, None]).sum(1) + np.square(apart) * n * (count - n) / count
            mean += apart * n / count
        if count == 0:
            raise ValueError("There is no image to fit the latents' mean and std to; give the training images.")
        std = np.sqrt(squares / count)
        if not np.isfinite(std).all():
            raise ValueError(
                "The autoencoder gives latents that are not finite: its weights are broken; train it anew."
            )
        if dead := [k for k, (m, s) in enumerate(zip(mean, std, strict=True)) if s <= 1e-6 * max(1.0, abs(m))]:
            raise ValueError(
                f"Channels {dead} of {len(std)} are the same for every image (a posterior collapse), so it cannot be "
                "standardised. Train with a smaller weight of the KL, or with fewer latent channels."
            )
        self.latent_mean.copy_(torch.from_numpy(mean))
        self.latent_std.copy_(torch.from_numpy(std))

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Tensor:
        """uint8 (B, S, S, 3) → the posterior's means, standardised per channel: (B, K, s, s)."""
        mean_K11, std_K11 = self._statistics()
        return (self.posterior(self.to_range(images)).mean - mean_K11) / std_K11

    def latents(self, images: np.ndarray) -> np.ndarray:
        """``encode`` as float32 numbers in main memory: what a latent cache calls."""
        return self.encode(images).cpu().numpy()

    def decode(self, z_BKHW: Tensor) -> Tensor:
        """Standardised latents → images (B, 3, S, S) around [−1, 1]; nothing is clamped and gradients pass."""
        mean_K11, std_K11 = self._statistics()
        return self.image(z_BKHW.to(self.device).float() * std_K11 + mean_K11)

    @torch.no_grad()
    def decode_images(self, z_BKHW: Tensor) -> np.ndarray:
        """Standardised latents → uint8 (B, S, S, 3), as a file can hold them."""
        x = ((self.decode(z_BKHW) + 1) * 127.5).round().clamp(0, 255)
        return x.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def fingerprint(self) -> str:
        """Hex digest of layout, weights and statistics: whatever changes a latent changes it."""
        layout = json.dumps(self.arguments, sort_keys=True)
        digest = hashlib.blake2b(layout.encode(), digest_size=16)
        for name, value in sorted(self.state_dict().items()):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        if not self.fitted:
            raise ValueError(
                "This autoencoder has no statistics of its latents yet: call fit_statistics with the training images."
            )
        return self.latent_mean[:, None, None], self.latent_std[:, None, None]

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> "Autoencoder":
        return super()._from_pretrained(**{**kwargs, "strict": True}).eval()


def open_autoencoder(folder: Path, image_size: int | None = None) -> Autoencoder:
    """The autoencoder in a folder: one of ours, or an ``AutoencoderKL`` (or a pipeline with ``vae/``) of `diffusers`.

    ``image_size`` is needed for the latter, which still wants its ``fit_statistics``.

    Raises:
        ValueError: a file of it is missing, damaged, or of another model; or ``image_size`` is not the model's.
    """
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "_class_name" in config:
            return _from_diffusers(folder, config, image_size or config.get("sample_size", 256))
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints, and stdout may be JSON for a script
            model = Autoencoder.from_pretrained(folder)
    except Exception as error:  # safetensors, torch and json raise unrelated types
        raise ValueError(f"The autoencoder in {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if image_size not in (None, model.image_size):
        raise ValueError(
            f"The autoencoder in {folder} is of images of {model.image_size} pixels, the data of {image_size}. "
            f"Set data.image_size={model.image_size}."
        )
    return model


def _from_diffusers(folder: Path, config: dict[str, Any], image_size: int) -> Autoencoder:
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"{weights.name} is missing. A .bin file is a pickle, which can run code, and is not read: save the model "
            "again with save_pretrained(folder, safe_serialization=True)"
        )
    model = Autoencoder(image_size, pretrained=kl_layout(config))
    strict_load(model.network, renamed(load_file(weights)))
    return model.eval()


@dataclass(frozen=True)
class RoundTrip:
    """decode(encode(image)) against the image, as 8-bit pixels in [0, 1]; the null answers with the mean image.

    ``errors`` and ``null_errors`` are the mean squared errors of each image, for intervals; PSNR is of their mean, in
    decibels, and R² = 1 − Σ errors / Σ null_errors (nan where the null is exact too).
    """

    errors: np.ndarray
    null_errors: np.ndarray

    @property
    def r2(self) -> float:
        total = self.null_errors.sum()
        return float(1 - self.errors.sum() / total) if total > 0 else float("nan")

    @property
    def psnr(self) -> float:
        return _psnr(self.errors)

    @property
    def null_psnr(self) -> float:
        return _psnr(self.null_errors)


def round_trip(
    model: Autoencoder, images: np.ndarray, train: np.ndarray, test: np.ndarray, batch: int = 64
) -> RoundTrip:
    """How well the items ``test`` of ``images`` uint8 (N, S, S, 3) survive, against the mean of the items ``train``."""
    errors = []
    for start in range(0, len(test), batch):
        real = images[test[start : start + batch]]
        apart = model.decode_images(model.encode(real)).astype(np.float64) - real
        errors.append(np.square(apart / 255).mean((1, 2, 3)))
    return RoundTrip(np.concatenate(errors), mean_image_errors(images, train, test))


def _psnr(errors: np.ndarray) -> float:
    mean = errors.mean()
    return float(-10 * np.log10(mean)) if mean > 0 else float("inf")
