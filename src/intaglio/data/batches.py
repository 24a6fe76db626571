"""Captioned images as typed batches of tensors, in an order that can be sought.

Shapes: B batch, S image side, T text positions.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from intaglio.data import order
from intaglio.data.latents import LatentTable
from intaglio.data.tokenizer import PAD


class Data(Protocol):
    """Items that batches, named tuples of tensors, are made of; each number of ``draw`` decides what is random of one.

    ``training_batch`` may alter the items, as ``batch`` never does.
    """

    def __len__(self) -> int: ...

    def batch(self, items: np.ndarray, draw: np.ndarray) -> Any: ...

    def training_batch(self, items: np.ndarray, draw: np.ndarray) -> Any: ...


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

    training_batch = batch


class PictureBatch(NamedTuple):
    """``x`` uint8 (B, 3, S, S), or latents (B, K, s, s); ``labels`` int64 (B,), −1 for none; ``prompts`` int64 (B, T)
    or (B,), what a text condition is made from, (B, 0) where there is none."""

    x: Tensor
    labels: Tensor
    prompts: Tensor


@dataclass(frozen=True)
class Pictures:
    """Images, or their latents, with what they may be conditioned on.

    ``images`` (N, S, S, 3) uint8; ``labels`` (N,); ``prompts`` (M, T), those of item i in rows ``first[i]:first[i +
    1]``; ``flips`` mirrors half of a training batch; ``latents`` take the images' place in batches.
    """

    images: np.ndarray
    labels: np.ndarray
    prompts: np.ndarray
    first: np.ndarray
    flips: bool = True
    latents: LatentTable | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, items: np.ndarray, draw: np.ndarray) -> PictureBatch:
        """The given items as they are, each with the prompt that its ``draw`` chooses."""
        return self._batch(items, draw, np.zeros(len(items), bool))

    def training_batch(self, items: np.ndarray, draw: np.ndarray) -> PictureBatch:
        """The same, half of them mirrored where ``flips`` says so: which, the ``draw`` decides."""
        mirrored = draw // 2**30 % 2 == 1 if self.flips else np.zeros(len(items), bool)
        return self._batch(items, draw, mirrored)

    def _batch(self, items: np.ndarray, draw: np.ndarray, mirrored: np.ndarray) -> PictureBatch:
        rows = self.first[items] + draw % (self.first[items + 1] - self.first[items])
        prompts = self.prompts[rows].astype(np.int64)
        return PictureBatch(
            torch.from_numpy(self._x(items, mirrored)),
            torch.from_numpy(self.labels[items].astype(np.int64)),
            torch.from_numpy(prompts),
        )

    def _x(self, items: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        if self.latents is not None:
            entries = items.copy()
            entries[mirrored] = self.latents.mirrored(items[mirrored]) if mirrored.any() else []
            return self.latents.rows(entries)
        images = self.images[items]
        images[mirrored] = images[mirrored][:, :, ::-1]
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


class TrainingBatches:
    """Endless batches of the training items from batch ``start`` on; rank r of w gets the r-th part of each.

    ``waited`` sums the seconds spent making batches: the share of the run in which training waits for data.
    """

    def __init__(self, data: Data, items: np.ndarray, seed: int, batch_size: int, start: int, rank: int, world: int):
        if batch_size > len(items):
            raise ValueError(
                f"train.batch_size is {batch_size}, but only {len(items)} items are left for training. Use "
                f"--train.batch_size {2 ** int(np.log2(max(1, len(items))))} or less, or give more images."
            )
        self.data, self.items, self.seed, self.batch_size, self.start = data, items, seed, batch_size, start
        self.part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        position = self.start * self.batch_size
        while True:
            begun = time.perf_counter()
            where = np.arange(position, position + self.batch_size)
            chosen = order.indices(len(self.items), self.seed, position, self.batch_size)
            batch = self.data.training_batch(self.items[chosen][self.part], order.draws(where, self.seed)[self.part])
            self.waited += time.perf_counter() - begun
            yield batch
            position += self.batch_size


def fixed_batches(data: Data, items: Sequence[int] | np.ndarray, batch_size: int) -> Iterator[Any]:
    """The given items once, in their order, each always with the same caption."""
    items = np.asarray(items)
    for i in range(0, len(items), batch_size):
        part = items[i : i + batch_size]
        yield data.batch(part, order.draws(part, seed=0))
