"""The corpus that needs no files: engravings drawn from numbers."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from intaglio.data.corpus import Corpus, Intake, Question
from intaglio.data.engravings import grammar
from intaglio.data.engravings.draw import render
from intaglio.data.engravings.questions import ask
from intaglio.data.engravings.scene import KINDS, Scene, sample_scene


class Engravings(Corpus):
    """``size_of_corpus`` engravings of the endless series ``seed``, from number ``start`` on.

    The label is the kind of the largest thing. Two corpora of one seed whose numbers do not overlap share no item.
    """

    name = "engravings"

    def __init__(self, size_of_corpus: int, seed: int = 0, start: int = 0) -> None:
        if size_of_corpus < 1 or start < 0:
            raise ValueError(
                f"engravings: size_of_corpus must be at least 1 and start at least 0, got {size_of_corpus} and {start}"
            )
        self.size_of_corpus, self.seed, self.start = size_of_corpus, seed, start
        self.intake = Intake()

    def __len__(self) -> int:
        return self.size_of_corpus

    def scene(self, i: int) -> Scene:
        """The factors that item i is drawn from."""
        if not 0 <= i < self.size_of_corpus:
            raise IndexError(f"engravings: item {i} of {self.size_of_corpus}")
        return sample_scene(self.seed, self.start + i)

    def image(self, i: int, size: int) -> np.ndarray:
        if size < 16:
            raise ValueError(f"engravings: an image of {size} pixels shows nothing; ask for a size of 16 or more")
        return render(self.scene(i), size)

    def captions(self, i: int) -> tuple[str, ...]:
        return grammar.captions(self.scene(i), self.id(i))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{edition()}/{self.seed}/{self.start}/{self.size_of_corpus}".encode()).hexdigest()

    def id(self, i: int) -> str:
        return f"{self.seed}-{self.start + i}"

    def label(self, i: int) -> str:
        return self.scene(i).things[0].kind

    def labels(self) -> tuple[str, ...]:
        return tuple(sorted(KINDS))

    def label_in(self, text: str) -> str | None:
        return grammar.label_in(text)

    def factors(self, i: int) -> Mapping[str, Any]:
        return self.scene(i).factors()

    def questions(self, i: int) -> Sequence[Question]:
        return ask(self.scene(i))


@lru_cache(maxsize=1)
def edition() -> str:
    """Digest of a sample of scenes, images, captions and questions: it changes when the drawing or wording does."""
    digest = hashlib.sha256()
    for index in range(64):
        scene = sample_scene(0, index)
        digest.update(render(scene, 64).tobytes())
        digest.update(repr((scene, [t(scene) for t in grammar.TEMPLATES], ask(scene))).encode())
    return digest.hexdigest()
