"""What can be had without looking: the models that a trained one must beat.

Shapes: M captions, L positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from intaglio.data.tokenizer import PAD


@dataclass(frozen=True)
class TextNull:
    """Cross-entropy in nats per token and share of tokens right, START and padding not counted."""

    nats: float
    accuracy: float


def unigram(train_ML: np.ndarray, test_ML: np.ndarray, vocabulary: int) -> TextNull:
    """Each token from how often it occurs, one occurrence added to each."""
    counts = np.bincount(_targets(train_ML), minlength=vocabulary) + 1.0
    targets = _targets(test_ML)
    return TextNull(float(-np.log(counts / counts.sum())[targets].mean()), float((targets == counts.argmax()).mean()))


def bigram(train_ML: np.ndarray, test_ML: np.ndarray, vocabulary: int) -> TextNull:
    """Each token from the one before it, with one part in ten of the unigram (Jelinek & Mercer 1980)."""
    pairs = np.zeros((vocabulary, vocabulary))
    np.add.at(pairs, _pairs(train_ML), 1.0)
    single = pairs.sum(0) + 1.0
    single /= single.sum()
    after = 0.9 * pairs / np.maximum(pairs.sum(1, keepdims=True), 1.0) + 0.1 * single
    previous, targets = _pairs(test_ML)
    probability = after[previous, targets] / after.sum(1)[previous]
    return TextNull(float(-np.log(probability).mean()), float((after.argmax(1)[previous] == targets).mean()))


def majority(train_labels: list[str | None], test_labels: list[str | None]) -> float:
    """Share of the test items that have the commonest training label."""
    names, counts = np.unique([x for x in train_labels if x is not None], return_counts=True)
    return float(np.mean([x == names[counts.argmax()] for x in test_labels]))


@dataclass(frozen=True)
class AnswerNull:
    """Cross-entropy in nats per answer and share of answers right, without an image."""

    nats: float
    accuracy: float


def answers_by_kind(
    train_kinds: Sequence[str], train: Sequence[str], test_kinds: Sequence[str], test: Sequence[str]
) -> AnswerNull:
    """The answers of each kind of question as often as training has them, one added to each answer that there is."""
    known = sorted(set(train))
    number = {answer: k for k, answer in enumerate(known)}
    kinds = {kind: k for k, kind in enumerate(sorted(set(train_kinds)))}
    counts = np.zeros((len(kinds), len(known) + 1))  # the last for answers that training does not have
    np.add.at(counts, ([kinds[k] for k in train_kinds], [number[a] for a in train]), 1.0)
    everything = counts.sum(0)
    nats, hits = [], []
    for kind, answer in zip(test_kinds, test, strict=True):
        row = counts[kinds[kind]] if kind in kinds else everything
        at = number.get(answer, len(known))
        nats.append(-np.log((row[at] + 1) / (row.sum() + len(row))))
        hits.append(row.argmax() == at)
    return AnswerNull(float(np.mean(nats)), float(np.mean(hits)))


def mean_image_errors(images: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Squared error of answering with the mean of the items ``train``, for each of the items ``test``: (len(test),).

    Images are uint8 (N, S, S, 3); errors are means over pixels in [0, 1].
    """
    total = np.zeros(images.shape[1:])
    for start in range(0, len(train), 512):
        total += images[train[start : start + 512]].sum(0, dtype=np.float64)
    mean = total / len(train)
    return np.array([np.square(images[k] - mean).mean() for k in test]) / 255**2


def _pairs(ids_ML: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real = ids_ML[:, 1:] != PAD
    return ids_ML[:, :-1][real], ids_ML[:, 1:][real]


def _targets(ids_ML: np.ndarray) -> np.ndarray:
    return _pairs(ids_ML)[1]
