"""Questions about images: an item is one question, its right answers, and the number of the image that it is about."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from intaglio.data.corpus import Corpus, Intake

YES_NO = (frozenset({"yes", "no"}), frozenset({"có", "không"}))
"""Answers of questions that can be answered by nothing else: in English, in Vietnamese."""

RARE = 0.005
"""Share of the questions below which a kind that was read off their first words counts as ``other``."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about image number ``image``, and its right answers; the first stands for it on held-out items."""

    image: int
    question: str
    answers: tuple[str, ...]
    kind: str = ""


class QuestionCorpus(Corpus):
    """The questions about the images of another corpus. Questions about one image never stand on both sides of a split.

    Kinds of questions that the source does not name are told by their answers (yes or no) and else their first words.
    """

    def __init__(self, images: Corpus, asked: Sequence[Asked], intake: Intake, form: str = ""):
        self.images, self.asked, self.intake, self.name = images, _with_kinds(asked), intake, images.name
        self._form = form and f"; {form}"

    def __len__(self) -> int:
        return len(self.asked)

    def image(self, i: int, size: int) -> np.ndarray:
        return self.images.image(self.asked[i].image, size)

    def captions(self, i: int) -> tuple[str, ...]:
        return (self.asked[i].question,)

    def id(self, i: int) -> str:
        return f"{self.images.id(self.asked[i].image)}: {self.asked[i].question}"

    def group(self, i: int) -> str:
        return self.images.group(self.asked[i].image)

    def declared_split(self, i: int) -> Literal["train", "val", "test"] | None:
        return self.images.declared_split(self.asked[i].image)

    def describe(self) -> str:
        return f"{self.name}: {len(self):,} questions about {len({a.image for a in self.asked}):,} images{self._form}"

    def fingerprint(self) -> str:
        facts = json.dumps([[a.image, a.question, a.answers, a.kind] for a in self.asked])
        return hashlib.sha256(f"{self.images.fingerprint()}{facts}".encode()).hexdigest()


def normal(answer: str) -> str:
    """An answer as it is compared: NFC, one case, no space around it and no full stop behind it."""
    text = unicodedata.normalize("NFC", " ".join(answer.split())).casefold()
    return text.rstrip(".!?。 ") or text


def right(given: str, asked: Asked) -> bool:
    """Whether it is one of the answers, exactly."""
    return normal(given) in map(normal, asked.answers)


def token_f1(given: str, truth: str) -> float:
    """Of the words that two texts share, regardless of order (Rajpurkar et al. 2016, section 6.1)."""
    a, b = Counter(normal(given).split()), Counter(normal(truth).split())
    common = sum((a & b).values())
    return 2 * common / (a.total() + b.total()) if common else 0.0


def _with_kinds(asked: Sequence[Asked]) -> tuple[Asked, ...]:
    guessed = [a.kind or _kind(a) for a in asked]
    counts = Counter(guessed)
    kept = {kind for kind, count in counts.items() if count >= RARE * len(asked)} | {a.kind for a in asked}
    return tuple(
        Asked(a.image, a.question, a.answers, kind if kind in kept else "other")
        for a, kind in zip(asked, guessed, strict=True)
    )


def _kind(a: Asked) -> str:
    if any(set(map(normal, a.answers)) <= both for both in YES_NO):
        return "yes or no"
    return " ".join(normal(a.question).split()[:2]) or "other"
