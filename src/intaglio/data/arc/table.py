"""Tasks as batches of tensors.

Shapes: B batch, P pairs of a task, S side.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from intaglio.data.arc.augment import chosen_pairs, colour_maps, elements, turned_cells
from intaglio.data.arc.tasks import COLOURS, OUTSIDE, TaskCorpus


class TaskBatch(NamedTuple):
    """``grids`` uint8 (B, P, 2, S, S): inputs at [:, :, 0], outputs at [:, :, 1], in the upper left corner, ``OUTSIDE``
    around them; ``real`` bool (B, P), padding in front, so that the last pair is always real; ``items`` int64 (B,)."""

    grids: Tensor
    real: Tensor
    items: Tensor


@dataclass(frozen=True)
class Tasks:
    """A corpus of tasks ready to be batched, at most ``pairs`` of each; ``augment`` draws all that keeps the rule."""

    corpus: TaskCorpus
    pairs: int = 4
    augment: bool = True

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise ValueError(f"{self.pairs} pairs hold no rule; use 2 or more, a demonstration and a question")

    def __len__(self) -> int:
        return len(self.corpus)

    def batch(self, items: np.ndarray, draw: np.ndarray) -> TaskBatch:
        """The given tasks as they are: demonstrations, and last the first test.

        Of more demonstrations than fit, each task's ``draw`` (any non-negative integer below 2³¹) chooses.
        """
        first, demonstrations = self.corpus.first[items], np.diff(self.corpus.first)[items] - self.corpus.tests[items]
        taken, real = chosen_pairs(demonstrations, draw, self.pairs - 1, shuffled=False)
        rows = first[:, None] + np.concatenate([taken, demonstrations[:, None]], axis=1)
        real = np.concatenate([real, np.ones((len(items), 1), bool)], axis=1)
        return _batch(items, self._cells(rows, real, np.zeros(len(items), np.int64)), real)

    def training_batch(self, items: np.ndarray, draw: np.ndarray) -> TaskBatch:
        """The given tasks, their rule kept and all else drawn: pairs and their order, names of colours, way held."""
        first, counts = self.corpus.first[items], np.diff(self.corpus.first)[items]
        taken, real = chosen_pairs(counts, draw, self.pairs, shuffled=True)
        if not self.augment:
            return _batch(items, self._cells(first[:, None] + taken, real, np.zeros(len(items), np.int64)), real)
        cells = self._cells(first[:, None] + taken, real, elements(draw))
        maps = colour_maps(draw, COLOURS)
        for task, colours in zip(cells, maps, strict=True):
            task[...] = np.frombuffer(task.tobytes().translate(colours.tobytes()), np.uint8).reshape(task.shape)
        return _batch(items, cells, real)

    def _cells(self, rows: np.ndarray, real: np.ndarray, element: np.ndarray) -> np.ndarray:
        """The grids of pairs ``rows`` (B, P), each task's turned by its ``element`` (B,), (B, P, 2, S, S)."""
        grids, stride = self.corpus.grids, self.corpus.grids.shape[-1]
        sizes = self.corpus.sizes[rows]
        side = int(sizes[real].max()) + 1 & ~1
        inside = turned_cells(sizes.reshape(-1, 2), np.repeat(element, 2 * rows.shape[1]), side, stride)
        start = (2 * rows[..., None] + np.arange(2)).reshape(-1) * stride**2
        inside += start[:, None, None]
        cells = grids.reshape(-1).take(inside).reshape(*rows.shape, 2, side, side)
        cells[~real] = OUTSIDE
        return cells


def _batch(items: np.ndarray, cells: np.ndarray, real: np.ndarray) -> TaskBatch:
    return TaskBatch(torch.from_numpy(cells), torch.from_numpy(real), torch.from_numpy(items.astype(np.int64)))
