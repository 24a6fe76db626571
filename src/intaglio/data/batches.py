"""Captioned images as typed batches of tensors, in an order that can be sought.

Shapes: B batch, S image side, T text positions.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from intaglio.data import order
from intaglio.data.tokenizer import PAD


class Batch(NamedTuple):
    """``images`` uint8 (B, 3, S, S); ``ids`` int64 (B, T), START … END, padded to the longest of the batch."""

    images: Tensor
    ids: Tensor


@dataclass(frozen=True)
class CaptionedImages:
    """Items ready to be batched.

    ``images`` (N, S, S, 3) uint8; ``ids`` (M, L) int32, the captions of item i in rows ``first[i]:first[i + 1]``.
    """

    images: np.ndarray
    ids: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, items: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """The row of ``ids`` that each item's ``draw`` chooses."""
        return self.first[items] + draw % (self.first[items + 1] - self.first[items])

    def batch(self, items: np.ndarray, draw: np.ndarray) -> Batch:
        """The given items, each with the caption that its ``draw`` (any non-negative integer) chooses."""
        ids = self.ids[self.rows(items, draw)]
        used = int((ids != PAD).any(0).nonzero()[0].max()) + 1
        images = np.ascontiguousarray(self.images[items].transpose(0, 3, 1, 2))
        return Batch(torch.from_numpy(images), torch.from_numpy(ids[:, :used].astype(np.int64)))


class TrainingBatches:
    """Endless batches of the training items from batch ``start`` on; rank r of w gets the r-th part of each.

    ``waited`` sums the seconds spent making batches: the share of the run in which training waits for data.
    """

    def __init__(
        self, data: CaptionedImages, items: np.ndarray, seed: int, batch_size: int, start: int, rank: int, world: int
    ):
        if batch_size > len(items):
            raise ValueError(
                f"train.batch_size is {batch_size}, but only {len(items)} items are left for training. Use "
                f"--train.batch_size {2 ** int(np.log2(max(1, len(items))))} or less, or give more images."
            )
        self.data, self.items, self.seed, self.batch_size, self.start = data, items, seed, batch_size, start
        self.part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        position = self.start * self.batch_size
        while True:
            begun = time.perf_counter()
            where = np.arange(position, position + self.batch_size)
            chosen = order.indices(len(self.items), self.seed, position, self.batch_size)
            batch = self.data.batch(self.items[chosen][self.part], order.draws(where, self.seed)[self.part])
            self.waited += time.perf_counter() - begun
            yield batch
            position += self.batch_size


def fixed_batches(data: CaptionedImages, items: Sequence[int] | np.ndarray, batch_size: int) -> Iterator[Batch]:
    """The given items once, in their order, each always with the same caption."""
    items = np.asarray(items)
    for i in range(0, len(items), batch_size):
        part = items[i : i + batch_size]
        yield data.batch(part, order.draws(part, seed=0))
