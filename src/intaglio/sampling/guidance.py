"""Classifier-free guidance: one batched call for both branches, an interval, and a rescaling."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from ..objectives.diffusion import NoiseSchedule
from .diffusion import Denoiser

Conditions = tuple[Tensor, ...]
"""What the network is told, each (B, …): labels, or tokens and their mask."""

Network = Callable[..., Tensor]
"""``network(x (B, C, H, W), t (B,), *conditions) -> prediction (B, C, H, W)``."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """ŷ = y_u + w (y_c − y_u), ``weight`` w (Ho & Salimans 2022, eq. 6, whose w is ours − 1): 1 is no guidance, 0 no
    condition.

    Outside ``interval``, both ends in it, the network is asked with the condition alone (Kynkäänniemi et al. 2024),
    at half the cost; it is in log-SNR or, with ``interval_in`` "t", in times of training. ``rescale`` φ draws the
    standard deviation of each image's ŷ back to that of y_c (Lin et al. 2023, eq. 14–16; they take .7).

    Raises:
        ValueError: a value is out of range, or guidance options at a weight that they cannot change.
    """

    weight: float = 1.0
    interval: tuple[float, float] | None = None
    interval_in: Literal["log-snr", "t"] = "log-snr"
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"guidance.weight is {self.weight}; it must be at least 0 (1 is no guidance)")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale is {self.rescale}; it must be between 0 (off) and 1")
        if self.interval_in not in ("log-snr", "t"):
            raise ValueError(f"guidance.interval_in is {self.interval_in!r}; choose log-snr or t")
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            raise ValueError(f"guidance.interval is {self.interval}; its first end must be the lower one")
        if self.weight == 1 and (self.interval is not None or self.rescale):
            raise ValueError("guidance.interval and guidance.rescale have no effect at weight 1; remove them")

    def weight_at(self, t: int, schedule: NoiseSchedule) -> float:
        """w at ``t``: 1 outside the interval."""
        if self.interval is None:
            return self.weight
        place = t if self.interval_in == "t" else schedule.log_snr()[t].item()
        return self.weight if self.interval[0] <= place <= self.interval[1] else 1.0


def guided(
    network: Network, condition: Conditions, null: Conditions, guidance: Guidance, schedule: NoiseSchedule
) -> Denoiser:
    """The denoiser of ``network`` under ``guidance``; ``null`` is what it was trained on in place of a condition.

    It takes the B images of ``condition``, all at the same t. Every linear prediction (v, ε, x₀, flow) is guided alike.
    """

    def denoise(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        weight = guidance.weight_at(int(t_B[0]), schedule)
        if weight in (0, 1):
            return network(x_BCHW, t_B, *(condition if weight else null))
        both = (torch.cat(pair) for pair in zip(condition, null, strict=True))
        with_condition, without = network(torch.cat([x_BCHW] * 2), torch.cat([t_B] * 2), *both).float().chunk(2)
        return rescaled(without + weight * (with_condition - without), with_condition, guidance.rescale)

    return denoise


def rescaled(guided_BCHW: Tensor, conditional_BCHW: Tensor, share: float) -> Tensor:
    """φ ŷ σ_c/σ_ŷ + (1 − φ) ŷ with each image's standard deviations (Lin et al. 2023, eq. 14–16)."""
    if share == 0:
        return guided_BCHW
    std_c, std_g = (y.std((1, 2, 3), keepdim=True) for y in (conditional_BCHW, guided_BCHW))
    return guided_BCHW * (share * std_c / std_g + 1 - share)
