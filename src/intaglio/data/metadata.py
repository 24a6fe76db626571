"""The tables that may lie beside images, read into rows: CSV, TSV, JSON Lines and JSON lists.

Columns are found by name: ``file_name`` and its usual aliases, ``caption``, ``label``, ``split``, ``group``, ``id``;
others are mapped by ``columns={"caption": "title"}``. What was taken as what is kept, to be printed.
"""

import csv
import difflib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Side = Literal["train", "val", "test"]

ROLES: dict[str, tuple[str, ...]] = {
    "file": ("file_name", "filename", "file", "image", "path"),
    "caption": ("caption", "captions", "text"),
    "label": ("label", "class", "category"),
    "split": ("split",),
    "group": ("group",),
    "id": ("id",),
}
_FORMS = ("csv", "tsv", "jsonl", "json")
NAMES = tuple(f"{stem}.{form}" for stem in ("metadata", "captions", "labels") for form in _FORMS)
_SIDES: dict[str, Side] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    """One line about one file, texts cleaned; ``where`` names the line for messages."""

    where: str
    file: str
    captions: tuple[str, ...] = ()
    label: str | None = None
    split: str | None = None
    group: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Table:
    """All rows of one file, which column was taken for which role, and the columns nobody uses."""

    path: Path
    rows: list[Row]
    taken: dict[str, str]
    unused: tuple[str, ...]


def side(name: str) -> Side | None:
    """``train``, ``val`` or ``test`` for the usual names of them, else None."""
    return _SIDES.get(name.lower())


def clean(text: Any) -> str:
    """NFC, every run of white space one space, half a surrogate pair U+FFFD; empty for None."""
    if text is None:
        return ""
    return " ".join(unicodedata.normalize("NFC", _HALF.sub("\ufffd", str(text))).split())


def find_table(root: Path, named: str | Path | None) -> Path | None:
    """The table named by the user (relative to ``root`` or absolute), or the one in ``root`` with a usual name.

    Raises:
        ValueError: the named one does not exist, or several have usual names.
    """
    if named:
        path = root / named
        if not path.is_file():
            raise ValueError(f"metadata {path} is not a file; name one in {root} or leave --data.metadata out")
        return path
    found = [name for name in NAMES if (root / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{root} holds {' and '.join(found)}; choose one, for example --data.metadata {found[0]}")
    return root / found[0] if found else None


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> Table:
    """Read a table; ``columns`` maps roles to column names where the usual names don't fit.

    Raises:
        ValueError: a broken line, an unknown role or column, no column with file names, or neither captions nor labels.
    """
    records = list(read_records(path))
    if not records:
        raise ValueError(f"{path} has no rows; write one for each image, with its file_name and its caption or label")
    present = list(dict.fromkeys(str(key) for _, record in records for key in record))
    taken = _assign(path, present, columns or {})
    rows = [_row(where, record, taken) for where, record in records]
    return Table(path, rows, taken, tuple(name for name in present if name not in taken.values()))


def _assign(path: Path, present: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Role → column name."""
    for role, column in columns.items():
        if role not in ROLES:
            raise ValueError(f"--data.columns: {role!r} is not a role; {_nearest(role, ROLES)}")
        if column not in present:
            known = _nearest(column, present)
            raise ValueError(f"--data.columns.{role}: {path.name} has no column {column!r}; {known}")
    # A column that the user gave one role is not also taken for another.
    usual = {name.strip().lower(): name for name in reversed(present) if name not in columns.values()}
    guessed = {role: usual[a] for role, aliases in ROLES.items() for a in reversed(aliases) if a in usual}
    taken = {role: (guessed | dict(columns))[role] for role in ROLES if role in guessed or role in columns}
    if "file" not in taken:
        raise ValueError(
            f"{path} has no column with file names; call it file_name, or name it by --data.columns.file; "
            f"it has {', '.join(present)}"
        )
    if not {"caption", "label"} & set(taken):
        raise ValueError(
            f"{path} has neither captions nor labels; call the column caption or label, or name it by "
            f"--data.columns.caption; it has {', '.join(present)}"
        )
    return taken


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, 1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"it knows {', '.join(known)}"


def _row(where: str, record: Mapping[str, Any], taken: Mapping[str, str]) -> Row:
    values = {role: record.get(column) for role, column in taken.items()}
    captions = values.pop("caption", None)
    several = captions if isinstance(captions, list) else [captions]
    for role, value in [*values.items(), *(("caption", text) for text in several)]:
        if isinstance(value, dict | list):
            raise ValueError(f"{where}: {taken[role]!r} is no text but {type(value).__name__}; write it as text")
    texts = [clean(text) for text in several]
    file = str(values.pop("file") or "").strip()
    facts = {role: clean(value) or None for role, value in values.items()}
    return Row(where, file, tuple(filter(None, texts)), **facts)


def read_records(path: Path, lists: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, cells) of every row, whatever the format.

    With ``lists``, an entry of JSON or JSON Lines may also be a list of as many values, which have these names.

    Raises:
        ValueError: an unknown format, not UTF-8, or a broken row.
    """
    lines, whole = _json_lines(lists), _json(lists)
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": lines, ".ndjson": lines, ".json": whole}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is not a known form of metadata; write it as {', '.join(readers)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return readers[path.suffix.lower()](path, text)


def _csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    header = text.split("\n", 1)[0]
    limit = csv.field_size_limit(1 << 30)  # a very long caption is kept
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            raise ValueError(f"{path.name} has two columns of one name: {', '.join(names)}; rename one")
        for record in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in record:
                raise ValueError(
                    f"{where} has more cells than the header; put quotes around a text that contains the separator"
                )
            yield where, record
    except csv.Error as error:
        raise ValueError(f"{path.name} line {reader.line_num}: {error}; correct the quotes") from None
    finally:
        csv.field_size_limit(limit)


_Reader = Callable[[Path, str], Iterator[tuple[str, dict[str, Any]]]]


def _json_lines(lists: Sequence[str]) -> _Reader:
    def read(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path.name} line {number}"
                yield where, _object(where, _parse(where, line), lists)

    return read


def _json(lists: Sequence[str]) -> _Reader:
    def read(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        entries = _parse(path.name, text)
        if not isinstance(entries, list):
            raise ValueError(f"{path} is not a list; write [{_like(lists)}, …]")
        for number, entry in enumerate(entries, 1):
            where = f"{path.name} entry {number}"
            yield where, _object(where, entry, lists)

    return read


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is no JSONDecodeError
        raise ValueError(f"{where} is not JSON ({error}); correct or remove it") from None


def _object(where: str, entry: Any, lists: Sequence[str]) -> dict[str, Any]:
    if lists and isinstance(entry, list) and len(entry) == len(lists):
        return dict(zip(lists, entry, strict=True))
    if not isinstance(entry, dict):
        other = f" or [{', '.join(lists)}]" if lists else ""
        raise ValueError(f"{where} is not an object like {_like(lists)}{other}; correct or remove it")
    return entry


def _like(lists: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{name}": …' for name in lists or ("file_name", "caption")) + "}"
