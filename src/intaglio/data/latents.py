"""The latents of a whole data set, encoded once into memory-mapped shards and found again by fingerprint.

Entry i < N is image i, entry N + i the same image mirrored, encoded from mirrored pixels since no encoder is exactly
symmetric. Shapes: N images of side S; E = N or 2N entries; each latent (K, s, s).
"""

import io
import json
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from intaglio.data.corpus import Progress

Encoder = Callable[[np.ndarray], np.ndarray]
"""Images uint8 (B, S, S, 3) → latents (B, K, s, s)."""

PROGRESS = "latents.json"
_STALE = 3600  # seconds after which another process's unfinished shard counts as abandoned


@dataclass(frozen=True)
class Source:
    """What decides every number of a cache: fingerprints of the data and of the autoencoder, and how it is kept.

    The size of the images is part of the autoencoder's fingerprint.
    """

    data: str
    autoencoder: str
    items: int
    flips: bool = True
    dtype: Literal["float16", "float32"] = "float16"

    @property
    def entries(self) -> int:
        """E: the images, and the mirrored ones if they are kept."""
        return self.items * (2 if self.flips else 1)


@dataclass
class _Record:
    """The progress file: replaced as a whole after each shard, so that it never names one that is not there."""

    source: Source
    rows: int
    shape: tuple[int, ...] = ()
    checksums: list[int] = field(default_factory=list)  # CRC-32 of each shard's numbers, in order

    @property
    def shards(self) -> int:
        return -(-self.source.entries // self.rows)

    def span(self, shard: int) -> tuple[int, int]:
        """The entries start … end − 1 of a shard."""
        return shard * self.rows, min(self.source.entries, (shard + 1) * self.rows)

    def save(self, folder: Path) -> None:
        _replace(folder / PROGRESS, json.dumps(asdict(self), indent=1).encode())


class LatentTable:
    """A whole cache, read through the memory map: nothing is loaded but the rows that are asked for.

    ``len`` counts entries: ``items`` images, then the mirrored ones if ``flips``. Opened by `open_latents` or made by
    `cache_latents`.
    """

    def __init__(self, folder: Path, record: _Record):
        self.folder, self.source, self.shape = folder, record.source, tuple(record.shape)
        self.items, self.flips = record.source.items, record.source.flips
        self.dtype = np.dtype(record.source.dtype)
        self._rows = record.rows
        self._shards = [np.load(_shard(folder, k), mmap_mode="r") for k in range(record.shards)]

    def __len__(self) -> int:
        return self.source.entries

    def rows(self, entries: np.ndarray) -> np.ndarray:
        """The latents of entries (B,) in that order: (B, K, s, s) in the cache's dtype.

        Raises:
            IndexError: an entry that the cache does not have.
        """
        entries = np.asarray(entries, dtype=np.int64)
        if entries.size and not 0 <= entries.min() <= entries.max() < len(self):
            raise IndexError(f"{self.folder}: entries {entries.min()} … {entries.max()} of {len(self)}")
        out = np.empty((len(entries), *self.shape), self.dtype)
        shards, offsets = entries // self._rows, entries % self._rows
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._shards[shard][offsets[here]]
        return out

    def mirrored(self, items: np.ndarray) -> np.ndarray:
        """The entries of the same images mirrored."""
        if not self.flips:
            raise ValueError(f"The latent cache {self.folder} was made without flips; make one with them.")
        return np.asarray(items) + self.items


def cache_latents(
    folder: Path,
    images: np.ndarray,
    encode: Encoder,
    source: Source,
    batch: int = 64,
    shard_rows: int = 2048,
    progress: Progress | None = None,
) -> LatentTable:
    """Encodes ``images`` uint8 (N, S, S, 3), or goes on where a process that was killed left off, or finds them whole.

    In memory stands one batch at a time. A shard appears under its name when it is whole, and a resumed cache has the
    bytes of one that nothing interrupted. A cache that exists keeps its own ``shard_rows``.

    Raises:
        ValueError: the cache is of other data or of another autoencoder, or damaged; a latent is not finite.
        OSError: the folder cannot be written.
    """
    if source.items != len(images) or source.items == 0:
        raise ValueError(f"The latent cache {folder} is to hold {source.items} images, but {len(images)} were given.")
    record = _opened(folder, source) or _Record(source, shard_rows)
    missing = [k for k in range(record.shards) if k >= len(record.checksums) or not _shard(folder, k).is_file()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        for shard in missing:
            checksum = _write(folder, record, shard, images, encode, batch, progress)
            record.checksums[shard : shard + 1] = [checksum]
            record.save(folder)
    except OSError as error:
        needed = source.entries * prod(record.shape or (0,)) * np.dtype(source.dtype).itemsize
        raise OSError(
            f"Cannot write the latent cache {folder} ({error.strerror or error}). Free {needed / 1e6:.0f} MB or name "
            "another folder with --data.cache; what is written is kept."
        ) from error
    return LatentTable(folder, record)


def open_latents(folder: Path, source: Source) -> LatentTable:
    """A cache that is whole, without an encoder.

    Raises:
        ValueError: there is none, it is half-written, damaged, or of another source.
    """
    record = _opened(folder, source)
    done = len(record.checksums) if record else 0
    if record is None or done < record.shards or not all(_shard(folder, k).is_file() for k in range(done)):
        total = f" of {record.shards}" if record else ""
        raise ValueError(
            f"The latent cache {folder} is not whole ({done}{total} shards); encode the rest into it first."
        )
    return LatentTable(folder, record)


def _opened(folder: Path, source: Source) -> _Record | None:
    """The record of a cache of ``source`` whose shards are as they were written, or None where nothing was begun.

    Every number is read once for its checksum, which is less than the first epoch reads.
    """
    path = folder / PROGRESS
    if not path.is_file():
        return None
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        record = _Record(Source(**raw["source"]), raw["rows"], tuple(raw["shape"]), raw["checksums"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete the folder {folder} to encode it anew.") from error
    if source != record.source:
        raise ValueError(f"The latent cache {folder} {_differences(record.source, source)}.")
    for shard, checksum in enumerate(record.checksums):
        part = _shard(folder, shard)
        if part.is_file() and _checksum(part, record, shard) != checksum:
            raise ValueError(
                f"The latent cache is damaged: {part} is not as it was written (cut short or changed). Delete this "
                "file and run the command again: it alone is encoded anew."
            )
    return record


def _differences(there: Source, here: Source) -> str:
    kept, wanted = asdict(there), asdict(here)
    apart = [f"{k} {str(kept[k])[:16]} there, {str(wanted[k])[:16]} here" for k in kept if kept[k] != wanted[k]]
    return (
        f"was made of something else ({'; '.join(apart)}), so its latents would be wrong. "
        "Name another folder for these, or delete that folder to encode anew"
    )


def _write(
    folder: Path,
    record: _Record,
    shard: int,
    images: np.ndarray,
    encode: Encoder,
    batch: int,
    progress: Progress | None,
) -> int:
    """Encodes one shard batch by batch into a file that gets its name at the end; its checksum."""
    path, checksum, (start, end) = _shard(folder, shard), 0, record.span(shard)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            for at in range(start, end, batch):
                raw = _encoded(record, images, np.arange(at, min(at + batch, end)), encode)
                file.write(_header(record, shard) + raw if at == start else raw)
                checksum = zlib.crc32(raw, checksum)
                if progress is not None:
                    progress(min(at + batch, end), record.source.entries)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return checksum


def _encoded(record: _Record, images: np.ndarray, entries: np.ndarray, encode: Encoder) -> bytes:
    """The latents of some entries as they stand in a shard."""
    with np.errstate(over="ignore"):  # told below, with what to do
        latents = np.asarray(encode(_images(images, entries))).astype(record.source.dtype)
    record.shape = record.shape or latents.shape[1:]
    if latents.shape != (len(entries), *record.shape):
        raise ValueError(f"The encoder gave {latents.shape} for {len(entries)} images of {record.shape}.")
    if not np.isfinite(latents).all():
        raise ValueError(
            f"Latents of the entries {entries[0]} … {entries[-1]} are not finite in {record.source.dtype}: "
            "standardise them, or look for NaN in the autoencoder's weights."
        )
    return latents.tobytes()


def _images(images: np.ndarray, entries: np.ndarray) -> np.ndarray:
    items, mirrored = entries % len(images), entries >= len(images)
    taken = images[items]
    taken[mirrored] = taken[mirrored][:, :, ::-1]
    return taken


def _header(record: _Record, shard: int) -> bytes:
    start, end = record.span(shard)
    buffer, descr = io.BytesIO(), np.lib.format.dtype_to_descr(np.dtype(record.source.dtype))
    shape = (end - start, *record.shape)
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _checksum(path: Path, record: _Record, shard: int) -> int | None:
    """CRC-32 of a shard's numbers, read in pieces; None where its header or length is not what it should be."""
    header, checksum, (start, end) = _header(record, shard), 0, record.span(shard)
    length = (end - start) * prod(record.shape) * np.dtype(record.source.dtype).itemsize
    if path.stat().st_size != len(header) + length:
        return None
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return None
        while piece := file.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _shard(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.npy"


def _sweep(folder: Path) -> None:
    """Removes what killed processes left unfinished; one that still writes touches its file all the time."""
    for part in folder.glob("*.part"):
        if time.time() - part.stat().st_mtime > _STALE:
            part.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
