"""What a data source must offer: numbered items with an image, captions and, where known, a label and facts."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Progress = Callable[[int, int], None]
"""Called with how many images are decoded, and of how many."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one image with its true answer."""

    kind: Literal["object", "count", "shading", "place"]
    question: str
    answer: str


@dataclass
class Intake:
    """What happened to the raw items while a source was read; goes into ``run.json`` so that nothing is lost silently.

    ``counts`` maps a reason (``"unreadable"``, ``"grey converted"``, …) to how many items it met; ``examples`` keeps
    up to five messages for each reason, naming the file and what was done about it.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, reason: str, message: str) -> None:
        """Count one item under ``reason`` and keep ``message`` if it is among the first five."""
        self.counts[reason] += 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < 5:
            kept.append(message)

    def as_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "examples": {k: list(v) for k, v in self.examples.items()}}


class Corpus(ABC):
    """Items numbered 0 … len − 1. Reading item i is a pure function of i: no state, no random numbers."""

    name: str
    intake: Intake

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, i: int, size: int) -> np.ndarray:
        """Item i as uint8 (size, size, 3), RGB, rows from the top."""

    @abstractmethod
    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of item i, NFC-normalised, at least one."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of everything that decides the content: a cache or a checkpoint of other data is refused by it."""

    def describe(self) -> str:
        """What was read as what, and which columns were not used, in one line."""
        return f"{self.name}: {len(self):,} images"

    def id(self, i: int) -> str:
        """A name of item i that a person can find it by."""
        return str(i)

    def label(self, i: int) -> str | None:
        """Class of item i (the main object), or None where the source has none."""
        return None

    def labels(self) -> tuple[str, ...]:
        """All classes, sorted; empty where the source has none."""
        return ()

    def label_in(self, text: str) -> str | None:
        """The first class that ``text`` names, or None: tells whether a caption names the right object."""
        return None

    def group(self, i: int) -> str:
        """Items of one group never stand on both sides of a split."""
        return self.id(i)

    def declared_split(self, i: int) -> Literal["train", "val", "test"] | None:
        """The side that the source itself declares for item i, or None."""
        return None

    def factors(self, i: int) -> Mapping[str, Any]:
        """The facts that item i was made from; empty where unknown."""
        return {}

    def questions(self, i: int) -> Sequence[Question]:
        """True question/answer pairs about item i; empty where unknown."""
        return ()
