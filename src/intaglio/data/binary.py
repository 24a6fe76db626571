"""Published data sets of fixed-size records as a corpus: memory-mapped images and class numbers."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from intaglio.data import duplicates
from intaglio.data.corpus import Corpus, Intake
from intaglio.data.metadata import Side, clean


@dataclass(frozen=True)
class Part:
    """One published file of images.

    ``stored`` (N,) is the memory map of its records, ``images`` (N, H, W, 3) a view of it, uint8; ``classes`` (N,)
    count from 0, and are None where there are no labels.
    """

    name: str
    stored: np.ndarray
    images: np.ndarray
    classes: np.ndarray | None
    split: Side


class BinaryCorpus(Corpus):
    """The parts of a data set, one after another.

    An item without a label has the empty caption, the prompt of an unconditional item. Near-duplicates, looked for on
    first demand and kept in the folder ``cache``, form one group, so that a training image that stands in the test
    split too is held out with it.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        names: Sequence[str],
        caption_template: str,
        intake: Intake,
        cache: Path | None,
    ) -> None:
        if "{label}" not in caption_template:
            raise ValueError(f"--data.caption_template {caption_template!r} has no {{label}}; write where it goes")
        self.name, self.parts, self.intake = name, tuple(parts), intake
        self._names, self._template, self._cache = tuple(names), caption_template, cache
        self._ends = np.cumsum([len(part.images) for part in parts])
        if len(self) < 2:
            raise ValueError(f"{name} gives {len(self)} images; at least two are needed, one of them held out")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def image(self, i: int, size: int) -> np.ndarray:
        part, k = self._find(i)
        pixels = np.ascontiguousarray(part.images[k])
        if pixels.shape[:2] == (size, size):
            return pixels
        return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))

    def captions(self, i: int) -> tuple[str, ...]:
        label = self.label(i)
        return ("" if label is None else self._template.replace("{label}", label.replace("_", " ")),)

    def id(self, i: int) -> str:
        part, k = self._find(i)
        return f"{part.name}#{k}"

    def label(self, i: int) -> str | None:
        part, k = self._find(i)
        return None if part.classes is None else self._names[part.classes[k]]

    def labels(self) -> tuple[str, ...]:
        present = [np.unique(part.classes) for part in self.parts if part.classes is not None]
        return tuple(sorted({self._names[k] for classes in present for k in classes}))

    def label_in(self, text: str) -> str | None:
        spoken = clean(text).replace("_", " ")
        named = {name.replace("_", " ").casefold(): name for name in self.labels()}
        longest_first = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))
        match = re.search(rf"(?<![\w-])(?:{longest_first})(?![\w-])", spoken, re.IGNORECASE) if named else None
        return named[match.group().casefold()] if match else None

    def group(self, i: int) -> str:
        """The first item that this one is a near-duplicate of; the first call takes 0.3 s for each 1,000 of 96 px."""
        return self.id(int(self._clusters[i]))

    def declared_split(self, i: int) -> Side:
        return self._find(i)[0].split

    def fingerprint(self) -> str:
        """Digest of names, splits, captions, labels and pixels; read once, at 0.5 GB/s."""
        return self._digest

    def describe(self) -> str:
        held = ", ".join(f"{len(part.images):,} {part.name} ({part.split})" for part in self.parts)
        return f"{super().describe()}; {held}; {len(self.labels())} labels: {', '.join(self.labels()[:12])}"

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(repr((self.name, self._names, self._template)).encode(), digest_size=16)
        for part in self.parts:
            digest.update(repr((part.name, part.split, part.images.shape)).encode())
            digest.update(b"" if part.classes is None else part.classes.tobytes())
            digest.update(part.stored.data)
        return digest.hexdigest()

    @cached_property
    def _clusters(self) -> np.ndarray:
        path = self._cache and self._cache / f"{self.name}-{self._digest[:16]}-groups-{duplicates.VERSION}.npy"
        if path and path.is_file():
            clusters = np.load(path)
        else:
            clusters = duplicates.near_duplicates(_Slices(self))  # type: ignore[arg-type]  # it reads slices
            if path:
                _save(path, clusters)
        for i in np.flatnonzero(clusters != np.arange(len(self))):
            head = int(clusters[i])
            self.intake.note("near-duplicate", f"{self.id(int(i))} looks like {self.id(head)}; both stay on one side")
        return clusters

    def _find(self, i: int) -> tuple[Part, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: item {i} of {len(self)}")
        p = int(np.searchsorted(self._ends, i, side="right"))
        return self.parts[p], int(i - self._ends[p] + len(self.parts[p].images))


def _save(path: Path, array: np.ndarray) -> None:
    """Under its name only when it is whole."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.save(file, array)
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"Cannot write the cache {path}: {error}. Name another folder with --data.cache.") from error
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Slices:
    """All images of a corpus like one array, of which only slices can be read."""

    corpus: BinaryCorpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, window: slice) -> np.ndarray:
        found = (self.corpus._find(i) for i in range(*window.indices(len(self))))
        return np.stack([part.images[k] for part, k in found])


def records(path: Path, form: np.dtype, published: int, intake: Intake) -> np.ndarray:
    """A file of records as a memory map (N,) of ``form``; ``published`` is how many it should have.

    Raises:
        ValueError: absent, empty, or no whole number of records, with the size that is due.
    """
    due = f"the published file has {published * form.itemsize:,} bytes, {published:,} records of {form.itemsize:,}"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {due}: unpack the archive again")
    size = path.stat().st_size
    count, rest = divmod(size, form.itemsize)
    if rest or not count:
        raise ValueError(f"{path} has {size:,} bytes and is truncated or of another form; {due}: unpack it again")
    if count != published:
        intake.note("not of the published size", f"{path.name} has {count:,} records of {published:,}; all are used")
    return np.memmap(path, form, "r")


def class_names(path: Path, count: int) -> list[str]:
    """The names of ``count`` classes, a line for each.

    Raises:
        ValueError: absent, or another number of lines.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it names the {count} classes, a line for each: unpack it again")
    names = [clean(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    if len(set(names)) != count or len(names) != count:
        raise ValueError(f"{path} has {len(set(names))} different names; {count} are expected, a line for each")
    return names


def checked(path: Path, classes: np.ndarray, count: int) -> np.ndarray:
    """``classes`` (N,), if they are all below ``count``.

    Raises:
        ValueError: they are not, with the first that is wrong.
    """
    wrong = np.flatnonzero(classes >= count)
    if len(wrong):
        k = int(wrong[0])
        raise ValueError(f"{path}: record {k} has a class beyond the {count} that are named; the file is damaged")
    return classes
