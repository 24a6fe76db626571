"""Reader of JSON and JSON lines: rows, columns, W&B's history, Hugging Face's trainer state, Keras and skorch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from intaglio.history.aliases import SPLITS
from intaglio.history.foreign import History
from intaglio.history.formats import assembly
from intaglio.history.formats.damaged import repaired
from intaglio.history.formats.delimited import encoding_of, label
from intaglio.history.formats.rows import column_of, table_of_lists, table_of_rows
from intaglio.history.formats.skorch import is_skorch, table_of_epochs
from intaglio.history.formats.tables import Table, count

SUFFIXES = frozenset((".json", ".jsonl", ".ndjson"))
_AT_ONCE = 4 << 20
_LARGEST = 1_500_000_000
_Found = tuple[str, str, Table, str]  # format, the run's name or "", table, status


def claims(path: Path) -> bool:
    """Whether ``path`` looks like JSON or JSON lines."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(512)
    start = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")[:1]
    return path.suffix.lower() in SUFFIXES or start in (b"{", b"[")


def read(path: Path) -> list[History]:
    """The histories in a JSON file.

    Raises:
        ValueError: it is no JSON, or holds no history; says why.
    """
    with path.open("rb") as file:
        head = file.read(1 << 18)
    encoding, start = encoding_of(head, path)
    try:
        if path.stat().st_size > _AT_ONCE and _has_lines(head[start:].decode(encoding, "replace")):
            found, notices = _in_blocks(path, encoding, start)
        elif path.stat().st_size > _LARGEST:
            raise ValueError(f"{path} is too large for JSON that is no JSON lines: convert it to those, or to CSV")
        else:
            text = path.read_bytes()[start:].decode(encoding, "replace").replace("\0", "")
            value, format, notices = _parsed(text, path)
            found = list(_tables(value, format))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for a history") from None
    found = [one for one in found if one[2].columns or one[2].lists]
    if not found:
        raise ValueError(f"{path} holds JSON, but no history: neither rows of numbers nor lists of them by name")
    return [
        replace(history, status=status)
        for kind, name, table, status in found
        for history in assembly.histories(table.noting(*notices), path, kind, name or label(path))
    ]


def _has_lines(text: str) -> bool:
    """Whether the first line is a value of its own, and another follows."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except ValueError:
        return False


def _in_blocks(path: Path, encoding: str, start: int) -> tuple[list[_Found], list[str]]:
    """The history in a large file of JSON lines."""
    from intaglio.history.formats import blocks

    first: list[Any] = []
    bad = [0, 0]

    def table(block: bytes) -> Table:
        lines = [line for line in block.decode("utf-8", "replace").replace("\0", "").split("\n") if line.strip()]
        rows, broken = _values(lines)
        first.extend(rows[: 1 - len(first)])
        bad[0], bad[1] = bad[0] + len(broken), bad[1] + len(lines)
        return table_of_rows(row for row in rows if isinstance(row, dict))

    whole, said = blocks.in_blocks(path, encoding, start, table)
    ((kind, name, _, status),) = _of_list(first, "JSON lines")
    if bad[0]:
        said.append(f"{count(bad[0], 'damaged line')} of {bad[1]:,} left out.")
    return [(kind, name, whole, status)], said


def _parsed(text: str, path: Path) -> tuple[Any, str, list[str]]:
    """What is written, whether as "JSON" or "JSON lines", and what was damaged."""
    lines = [line for line in text.split("\n") if line.strip()]
    if _has_lines(text) or (len(lines) > 1 and all(line.strip()[0] + line.strip()[-1] == "[]" for line in lines[:2])):
        rows, bad = _values(lines)
        where = "the last" if bad == [len(lines)] else f"the first in line {bad[0]:,}" if bad else ""
        said = f"{count(len(bad), 'damaged line')} of {len(lines):,} left out, {where}."
        return rows, "JSON lines", [said] if bad else []
    try:
        return json.loads(text), "JSON", []
    except json.JSONDecodeError as error:
        value, end = repaired(text, error.pos)
        if value is None:
            raise ValueError(f"{path} is no JSON: {error}") from None
        return value, "JSON", [f"The file is damaged or cut off: read up to character {end:,} of {len(text):,}."]
    except ValueError as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from None


def _values(lines: list[str]) -> tuple[list[Any], list[int]]:
    """The values of JSON lines, and the numbers of those that are damaged."""
    try:
        return json.loads(f"[{','.join(lines)}]"), []
    except ValueError:
        rows, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            bad.append(number)
    return rows, bad


def _tables(value: Any, format: str, depth: int = 0) -> Iterator[_Found]:
    """Each history in a JSON value."""
    if isinstance(value, list):
        yield from _of_list(value, format)
    elif not isinstance(value, dict):
        return
    elif isinstance(value.get("log_history"), list):
        table = table_of_rows([row for row in value["log_history"] if isinstance(row, dict)])
        config = {name: setting for name, setting in value.items() if isinstance(setting, str | int | float)}
        ended = value.get("max_steps") == value.get("global_step") and value.get("global_step")
        yield "HF trainer state", "", replace(table, config=config), "finished" if ended else ""
    elif isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        names = [str(name) for name in value["columns"]]
        rows = [dict(zip(names, row, strict=False)) for row in value["data"] if isinstance(row, list)]
        yield format, "", table_of_rows(rows), ""
    elif isinstance(value.get("history"), dict | list) and depth < 4:
        config = {name: setting for name, setting in value.items() if isinstance(setting, str | int | float)}
        for kind, name, table, status in _tables(value["history"], format, depth + 1):
            yield kind, name, replace(table, config={**config, **table.config}), status
    else:
        yield from _of_dict(value, format, depth)


def _of_list(rows: list[Any], format: str) -> Iterator[_Found]:
    if is_skorch(rows):
        yield "skorch history", "", table_of_epochs(rows), ""
    elif dicts := [row for row in rows if isinstance(row, dict)]:
        names = set(dicts[0]) | set(dicts[-1])
        kind = f"W&B {format}" if {"_step", "_runtime"} <= names or {"_step", "_timestamp"} <= names else format
        yield kind, "", table_of_rows(dicts), ""
    elif rows and all(isinstance(row, list) and len(row) == 3 and column_of(row) is not None for row in rows):
        named = [dict(zip(("Wall time", "Step", "Value"), row, strict=True)) for row in rows]
        yield "TensorBoard JSON", "", table_of_rows(named), ""
    elif (column := column_of(rows)) is not None:
        yield format, "", Table(len(rows), {"value": column}), ""


def _of_dict(value: Mapping[str, Any], format: str, depth: int) -> Iterator[_Found]:
    """Lists by name, rows by number, columns of cells by number, or any of those by run or split."""
    lists = {name: cells for name, cells in value.items() if isinstance(cells, list)}
    inner = {name: cells for name, cells in value.items() if isinstance(cells, dict) and cells}
    numbered = [name for name, cells in inner.items() if all(map(_is_number, cells))]
    if inner and all(map(_is_number, inner)):
        rows = [{"index": int(name), **cells} for name, cells in inner.items()]
        yield format, "", table_of_rows(sorted(rows, key=lambda row: row["index"])), ""
    elif inner and len(numbered) == len(inner):
        by_row: dict[int, dict[str, Any]] = {}
        for name, cells in inner.items():
            for k, cell in cells.items():
                by_row.setdefault(int(k), {})[name] = cell
        yield format, "", table_of_rows([by_row[k] for k in sorted(by_row)]), ""
    elif lists and any(column_of(cells) is not None for cells in lists.values()):
        keras = "loss" in lists and any(name.startswith("val_") for name in lists)
        config = {name: setting for name, setting in value.items() if isinstance(setting, str | int | float)}
        yield "Keras history" if keras else format, "", replace(table_of_lists(lists), config=config), ""
    elif inner and all(name.lower() in SPLITS for name in inner):
        merged = {f"{split}/{name}": cells for split, columns in inner.items() for name, cells in columns.items()}
        yield from _of_dict(merged, format, depth + 1)
    elif depth < 4 and (several := [(name, cells) for name, cells in value.items() if isinstance(cells, dict | list)]):
        for name, inside in several:
            for kind, below, table, status in _tables(inside, format, depth + 1):
                yield kind, ", ".join(filter(None, (name, below))), table, status
    else:
        yield format, "", table_of_rows([value]), ""


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 16
