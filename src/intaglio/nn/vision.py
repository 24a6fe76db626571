"""A small vision Transformer behind a convolutional stem.

Shapes: B images, S side, P places, D width.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from intaglio.nn.transformer import blocks

HALVINGS = 3
"""Of the stem: a place stands for 8 × 8 pixels."""


class VisionEncoder(nn.Module):
    """Convolutions halve the image three times, then places attend to each other (Dosovitskiy et al. 2021; the stem is
    that of Xiao et al. 2021, which trains faster than cut-out patches where images are few)."""

    def __init__(self, image_size: int, width: int, layers: int, heads: int):
        super().__init__()
        self.side = image_size // 2**HALVINGS
        sizes = (3, width // 4, width // 2, width)
        stem: list[nn.Module] = []
        for a, b in pairwise(sizes):
            stem += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(1, b), nn.GELU()]
        self.stem = nn.Sequential(*stem, nn.Conv2d(width, width, 1))
        self.position = nn.Parameter(0.02 * torch.randn(self.side**2, width))
        self.blocks = blocks(layers, width, heads, 4 * width, 0.0, cross=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] → (B, P, D), places row after row."""
        x = self.stem(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
