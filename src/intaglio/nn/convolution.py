"""Convolutional image encoder and decoder between a square image and a grid of latent cells.

Shapes: B batch, S side of the image, s = S / 2^n side of the grid after n halvings, C channels, K numbers in a cell.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def channels_last(module: nn.Module) -> None:
    """Lays kernels out with channels last in memory, the faster way for inputs that lie so."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it


def norm(channels: int) -> nn.Module:
    """GroupNorm over at most 8 groups: independent of the batch, so the same alone and among others."""
    return nn.GroupNorm(min(8, channels), channels)


class Residual(nn.Module):
    """x + two 3×3 convolutions (He et al. 2016, pre-activation); the identity at the start."""

    def __init__(self, channels: int):
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, 1, 1)
        nn.init.zeros_(last.weight)
        self.branch = nn.Sequential(
            *(norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, 1, 1)), norm(channels), nn.SiLU(), last
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ImageEncoder(nn.Module):
    """(B, 3, S, S) → (B, K, s, s): a stride-2 convolution for each entry of ``channels``.

    Residual blocks follow from a quarter of the image's resolution down.
    """

    def __init__(self, channels: Sequence[int], out: int):
        super().__init__()
        layers: list[nn.Module] = []
        for depth, (a, b) in enumerate(pairwise((3, *channels))):
            layers += [nn.Conv2d(a, b, 4, 2, 1), *([Residual(b)] if depth > 0 else [norm(b), nn.SiLU()])]
        self.layers = nn.Sequential(*layers, norm(channels[-1]), nn.SiLU(), nn.Conv2d(channels[-1], out, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class ImageDecoder(nn.Module):
    """(B, K, s, s) → (B, 3, S, S) before the output activation: the encoder's mirror.

    Each cell learns where it stands, since convolutions alone cannot know; the last doubling is a sub-pixel convolution
    (Shi et al. 2016), so that no layer works at full resolution.
    """

    def __init__(self, side: int, channels: Sequence[int], latent: int):
        super().__init__()
        deep = channels[-1]
        widths = (*reversed(channels[1:]), max(48, channels[0]))
        self.enter = nn.Conv2d(latent, deep, 1)
        self.position = nn.Parameter(0.5 * torch.randn(deep, side, side))
        layers: list[nn.Module] = [Residual(deep), Residual(deep)]
        for a, b in pairwise(widths):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1), Residual(b)]
        last = nn.Conv2d(widths[-1], 12, 3, 1, 1)
        self.layers = nn.Sequential(*layers, norm(widths[-1]), nn.SiLU(), last, nn.PixelShuffle(2))

    def forward(self, cells: Tensor) -> Tensor:
        return self.layers(self.enter(cells) + self.position)
