"""Decoded images in one memory-mapped file, made once and found again by fingerprint."""

import os
import uuid
from pathlib import Path

import numpy as np

from intaglio.data.corpus import Corpus, Progress


def cache_folder(configured: str = "") -> Path:
    """The folder that the configuration names, else ``$INTAGLIO_CACHE``, else ``~/.cache/intaglio``."""
    return Path(configured or os.environ.get("INTAGLIO_CACHE") or Path.home() / ".cache" / "intaglio")


def image_table(corpus: Corpus, size: int, folder: Path, progress: Progress | None = None) -> np.ndarray:
    """All images of a corpus, uint8 (N, size, size, 3), memory-mapped and read-only.

    The file appears under its name only when it is whole, so a cache cut short by a crash is made anew.

    Raises:
        OSError: the folder cannot be written, with how to name another.
    """
    path = folder / f"{corpus.name}-{corpus.fingerprint()[:16]}-{size}.npy"
    if not path.is_file():
        unfinished = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}.npy")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:  # in sequence: a sparse map would end in SIGBUS on a full disk
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(corpus), size, size, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                for i in range(len(corpus)):
                    file.write(corpus.image(i, size).tobytes())
                    if progress is not None:
                        progress(i + 1, len(corpus))
            os.replace(unfinished, path)
        except OSError as error:
            raise OSError(
                f"Cannot write the image cache {path}: {error}. Free some space (it needs "
                f"{len(corpus) * size * size * 3 / 1e6:.0f} MB) or name another folder with --data.cache."
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")
