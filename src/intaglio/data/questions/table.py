"""Questions as batches of tensors. Shapes: B questions, U different images of a batch, S side, T positions."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from intaglio.data.tokenizer import PAD


class QuestionBatch(NamedTuple):
    """``images`` uint8 (U, 3, S, S), each once; ``which`` int64 (B,), the image of each question; ``questions`` and
    ``answers`` int64 (B, T), START … END, padded to the longest of the batch.

    Images come in the order of their first question, so that the first n of each are a batch of n questions.
    """

    images: Tensor
    which: Tensor
    questions: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Questions:
    """Items ready to be batched.

    ``images`` (I, S, S, 3) uint8; ``image`` (N,), that of each question; ``questions`` (N, Lq) int32; ``answers`` (M,
    La) int32, those of question i in rows ``first[i]:first[i + 1]``. In training each item brings up to ``together`` −
    1 other questions about its image, which is encoded once for all of them.
    """

    images: np.ndarray
    image: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    first: np.ndarray
    together: int = 1

    def __len__(self) -> int:
        return len(self.image)

    def batch(self, items: np.ndarray, draw: np.ndarray) -> QuestionBatch:
        """The given questions, each with its first answer."""
        return self._batch(items, self.first[items])

    def training_batch(self, items: np.ndarray, draw: np.ndarray) -> QuestionBatch:
        """The given questions and others about their images, each with one of its answers: which, the ``draw`` (any
        non-negative integer) decides."""
        if self.together > 1:
            several = [self._with_others(int(item), int(d)) for item, d in zip(items, draw, strict=True)]
            draw = np.repeat(draw, [len(some) for some in several]) + np.concatenate(
                [np.arange(len(s)) for s in several]
            )
            items = np.concatenate(several)
        return self._batch(items, self.first[items] + draw % (self.first[items + 1] - self.first[items]))

    def _with_others(self, item: int, draw: int) -> np.ndarray:
        """The item, and others about its image."""
        order, first = self._of_image
        others = order[first[self.image[item]] : first[self.image[item] + 1]]
        others = others[others != item]
        chosen = np.random.default_rng(draw).permutation(len(others))[: self.together - 1]
        return np.concatenate([[item], others[np.sort(chosen)]])

    @cached_property
    def _of_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Questions in the order of their images, and where each image's begin."""
        counts = np.bincount(self.image, minlength=len(self.images))
        return np.argsort(self.image, kind="stable"), np.concatenate([[0], np.cumsum(counts)])

    def _batch(self, items: np.ndarray, rows: np.ndarray) -> QuestionBatch:
        images, first, which = np.unique(self.image[items], return_index=True, return_inverse=True)
        by_question = np.argsort(first)
        pixels = np.ascontiguousarray(self.images[images[by_question]].transpose(0, 3, 1, 2))
        return QuestionBatch(
            torch.from_numpy(pixels),
            torch.from_numpy(np.argsort(by_question)[which]),
            _used(self.questions[items]),
            _used(self.answers[rows]),
        )


def _used(ids: np.ndarray) -> Tensor:
    """Without the columns that are nothing but padding."""
    most = int((ids != PAD).any(0).nonzero()[0].max()) + 1
    return torch.from_numpy(ids[:, :most].astype(np.int64))
