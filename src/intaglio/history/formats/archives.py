"""Zip and gzip, unpacked for as long as they are read."""

import gzip
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BYTES = 4 << 30
_FILES = 20_000


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The one file or folder in an archive, or the folder of all that is in it; gone afterwards.

    Raises:
        ValueError: it is damaged, locked, too large, or would write outside of its folder.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / (path.stem or "archive")
        folder.mkdir()
        try:
            (_unzip if zipfile.is_zipfile(path) else _gunzip)(path, folder)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            NotImplementedError,
            LookupError,
            OSError,
        ) as error:
            raise ValueError(f"{path} can't be unpacked ({error}): unpack it, and give the history in it") from None
        inside = [entry for entry in folder.iterdir() if entry.name != "__MACOSX"]
        yield inside[0] if len(inside) == 1 else folder


def _unzip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        size = sum(member.file_size for member in members)
        if any(member.filename == "xl/workbook.xml" for member in members):
            raise ValueError(f"{path} is a workbook of Excel: save the sheet with the history as CSV")
        if size > _BYTES or len(members) > _FILES:
            raise ValueError(f"{path} holds {size:,} bytes in {len(members):,} files: unpack it, and give one of them")
        for member in members:
            target = (folder / member.filename).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise ValueError(f"{path} holds {member.filename!r}, which leads out of the folder it is unpacked to")
            target.parent.mkdir(parents=True, exist_ok=True)
            # A member never gives more than it declares.
            with archive.open(member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _gunzip(path: Path, folder: Path) -> None:
    left = _BYTES
    with gzip.open(path) as source, (folder / (path.stem or "file")).open("wb") as copy:
        while data := source.read(1 << 20):
            if (left := left - len(data)) < 0:
                raise ValueError(f"{path} holds more than {_BYTES:,} bytes: unpack it, and give the history in it")
            copy.write(data)
