"""What the foreign programs train on: pictures of shapes with what is in them, and sentences about these.

Shapes: N pictures, S = 16 pixels a side, L words.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 16
SHAPES = ("square", "disc", "cross")
COLOURS = ("red", "green", "blue", "yellow")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
RGB = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.2, 0.3, 0.9], [0.9, 0.8, 0.2]])
WORDS = ("<pad>", "<start>", "<end>", "a", "at", "the", *SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS)
PAD, START, END = 0, 1, 2
LENGTH = 10


class Pictures(NamedTuple):
    """``images`` (N, 3, S, S) in [0, 1] with a little noise; shape, colour, size, row and column (N, 5) int64."""

    images: Tensor
    factors: Tensor


def pictures(count: int, seed: int, noise: float = 0.03) -> Pictures:
    """Random pictures; another seed gives others."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.stack([torch.randint(n, (count,), generator=generator) for n in (3, 4, 2, 3, 3)], 1)
    shape, colour, size, row, column = factors.T
    moved = torch.randint(-1, 2, (2, count), generator=generator)
    y = (torch.arange(SIDE)[None, :] - (4 + 4 * row + moved[0])[:, None]).float()[:, :, None]
    x = (torch.arange(SIDE)[None, :] - (4 + 4 * column + moved[1])[:, None]).float()[:, None, :]
    half = (2 + size).float()[:, None, None]
    square = (y.abs() <= half) & (x.abs() <= half)
    disc = y.square() + x.square() <= (half + 0.3).square()
    cross = square & ((y.abs() <= 0.5) | (x.abs() <= 0.5))
    mask = torch.stack([square, disc, cross])[shape, torch.arange(count)]
    images = torch.where(mask[:, None], RGB[colour][:, :, None, None], torch.tensor(0.05))
    images = images + noise * torch.randn(images.shape, generator=generator)
    return Pictures(images.clamp(0, 1), factors)


def sentences(factors: Tensor) -> Tensor:
    """(N, 5) → (N, L) int64: ``<start> a large red disc at the top left <end>``."""
    word = {w: k for k, w in enumerate(WORDS)}
    tables = [torch.tensor([word[w] for w in words]) for words in (SHAPES, COLOURS, SIZES, ROWS, COLUMNS)]
    shape, colour, size, row, column = (table[f] for table, f in zip(tables, factors.T, strict=True))
    fixed = {w: torch.full_like(shape, word[w]) for w in ("<start>", "a", "at", "the", "<end>")}
    said = [fixed["<start>"], fixed["a"], size, colour, shape, fixed["at"], fixed["the"], row, column, fixed["<end>"]]
    return torch.stack(said, 1)
