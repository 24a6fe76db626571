"""The decoded pixels of many files, made once: in memory, or memory-mapped from a cache that survives the process."""

import hashlib
import io
import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from intaglio.data import duplicates, pixels
from intaglio.data.corpus import Intake, Progress

# Near-duplicates are looked for at one size, so that runs at 64 and at 256 px split the same folder alike.
COMPARED_AT = 64

Stats = dict[str, tuple[int, int]]  # file, relative to the folder → (bytes, mtime in ns)


@dataclass(frozen=True)
class Decoded:
    """The squares of those files that could be read."""

    pixels: np.ndarray  # (K, size, size, 3) uint8
    kept: list[int]  # (K,) their positions among the files that were asked for
    content: str  # digest of the pixels
    clusters: list[int]  # (K,) near-duplicates; empty where size is not COMPARED_AT
    intake: Intake


@dataclass(frozen=True)
class Store:
    """Decodes files once; with a cache, ``KEY.npy`` holds the pixels and ``KEY.json``, written last, all the rest."""

    root: Path
    files: Stats
    cache: Path | None
    workers: int

    def load(self, size: int, progress: Progress | None) -> Decoded:
        """All files at one size, from the cache where it has them.

        Raises:
            OSError: the cache cannot be written.
        """
        if self.cache is None:
            buffer = io.BytesIO()
            decoded = self._decode(size, buffer, progress)
            squares = np.frombuffer(buffer.getbuffer().toreadonly(), np.uint8).reshape(len(decoded.kept), size, size, 3)
            return _compared(decoded, squares)
        decided_by = json.dumps([pixels.VERSION, duplicates.VERSION, COMPARED_AT, size, list(self.files.items())])
        path = self.cache / f"{hashlib.blake2b(decided_by.encode(), digest_size=16).hexdigest()}.npy"
        return _known(path) or self._build(path, size, progress)

    def _build(self, path: Path, size: int, progress: Progress | None) -> Decoded:
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                start = _write_header(file, (len(self.files), size, size, 3))
                decoded = self._decode(size, file, progress)
                file.seek(0)
                end = _write_header(file, (len(decoded.kept), size, size, 3))
                assert end == start, "a .npy header leaves room for its first axis to change"
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            decoded = _compared(decoded, np.load(path, mmap_mode="r"))
            facts = {"kept": decoded.kept, "content": decoded.content, "clusters": decoded.clusters}
            part.write_text(json.dumps(facts | decoded.intake.as_dict()))
            os.replace(part, path.with_suffix(".json"))
        except OSError as error:
            needed = len(self.files) * size * size * 3 // 2**20 + 1
            raise OSError(
                f"cannot write the pixel cache {path} ({error.strerror}); "
                f"make {needed} MiB free or choose another place with --data.cache"
            ) from error
        finally:
            if part.exists():
                part.unlink()
        return decoded

    def _decode(self, size: int, sink: BinaryIO, progress: Progress | None) -> Decoded:
        """Write every square to ``sink``; the pixels of the result are still to be opened."""
        intake, kept, content = Intake(), [], hashlib.blake2b(digest_size=16)
        paths = [self.root / file for file in self.files]
        for i, (file, result) in enumerate(zip(self.files, pixels.read_images(paths, size, self.workers), strict=True)):
            if isinstance(result, pixels.UnreadableImage):
                intake.note("unreadable", str(result))
            else:
                square, notes = result
                kept.append(i)
                content.update(square.tobytes())
                sink.write(square.tobytes())
                for note in notes:
                    intake.note(note.partition(":")[0], f"{file}: {note}")
            if progress is not None:
                progress(i + 1, len(paths))
        return Decoded(np.zeros((0, size, size, 3), np.uint8), kept, content.hexdigest(), [], intake)


def _known(path: Path) -> Decoded | None:
    """What the cache holds, or None where it is absent or damaged."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        intake = Intake(Counter(facts["counts"]), facts["examples"])
        squares = np.load(path, mmap_mode="r")
        return Decoded(squares, facts["kept"], facts["content"], facts["clusters"], intake)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _compared(decoded: Decoded, squares: np.ndarray) -> Decoded:
    clusters = duplicates.near_duplicates(squares).tolist() if squares.shape[1] == COMPARED_AT else []
    return replace(decoded, pixels=squares, clusters=clusters)
