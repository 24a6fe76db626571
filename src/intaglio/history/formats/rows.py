"""Rows and lists of plain values, as JSON has them, to a table."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from intaglio.history.formats import numbers
from intaglio.history.formats.tables import Column, Table, Text, count, listed, shown

_DEEPEST = 8


def flat(row: Mapping[str, Any], before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The leaves of a row, with the names above them parted by slashes; W&B's histograms and media are none."""
    if "_type" in row and before:
        return
    for name, value in row.items():
        if isinstance(value, dict) and depth < _DEEPEST:
            yield from flat(value, f"{before}{name}/", depth + 1)
        else:
            yield f"{before}{name}", value


def table_of_rows(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A table with a column for each name in any of the rows."""
    given: dict[str, tuple[array, array]] = {}
    words: dict[str, dict[int, str]] = {}
    lists: dict[str, dict[int, Column]] = {}
    left: Counter[str] = Counter()
    length = 0
    for k, row in enumerate(rows):
        length = k + 1
        for name, value in flat(row):
            if isinstance(value, int | float):
                places, values = given.get(name) or given.setdefault(name, (array("q"), array("d")))
                places.append(k)
                values.append(real(value))
            elif isinstance(value, str):
                words.setdefault(name, {})[k] = value
            elif isinstance(value, list) and (column := column_of(value)) is not None:
                lists.setdefault(name, {})[k] = column
            elif value is not None:
                left[name] += 1
    columns, texts, said = {}, {}, []
    for name in dict.fromkeys((*given, *words)):
        places, values = given.get(name, (array("q"), array("d")))
        cells = words.get(name, {})
        parsed = numbers.parse([numbers.unwrap(cell) for cell in cells.values()])
        if len(parsed.unreadable) > len(parsed.values) + len(values):
            codes = np.full(length, -1)
            text = Text.of(cells.values())
            codes[list(cells)] = text.codes
            texts[name] = Text(codes, text.texts)
            continue
        if parsed.unreadable:
            said.append(
                f"{shown(name)}: {count(len(parsed.unreadable), 'value')} no number, as {shown(parsed.unreadable[0])}."
            )
        spelled = np.fromiter(cells, np.int64, len(cells))
        spelled = spelled if parsed.rows is None else spelled[parsed.rows]
        at = np.concatenate([np.frombuffer(places, np.int64), spelled])
        order = np.argsort(at, kind="stable")
        found = np.concatenate([np.frombuffer(values), parsed.values])[order]
        if len(found):
            columns[name] = Column(found, None if len(found) == length else at[order])
    if left:
        said.append(f"{listed(left)}: no numbers, left out.")
    return Table(length, columns, texts, lists, notices=tuple(said))


def table_of_lists(lists: Mapping[str, Sequence[Any]]) -> Table:
    """A table whose columns are these lists; they may differ in length."""
    length = max(map(len, lists.values()), default=0)
    columns, texts = {}, {}
    for name, cells in lists.items():
        if (column := column_of(cells)) is not None:
            columns[name] = (
                Column(column.values)
                if len(column) == length
                else Column(column.values, column.where(length)[: len(column)])
            )
        elif all(isinstance(cell, str) for cell in cells):
            texts[name] = Text.of([*cells, *[""] * (length - len(cells))])
    left = [name for name in lists if name not in columns and name not in texts and lists[name]]
    return Table(length, columns, texts, notices=(f"{listed(left)}: no numbers, left out.",) if left else ())


def column_of(cells: Sequence[Any]) -> Column | None:
    """The numbers in a list, None if it holds anything else; a list of one number counts as that number."""
    cells = [cell[0] if isinstance(cell, list) and len(cell) == 1 else cell for cell in cells]
    if not cells or not all(cell is None or isinstance(cell, int | float | str) for cell in cells):
        return None
    try:
        found = [(k, value) for k, cell in enumerate(cells) if (value := real(cell)) is not None]
    except ValueError:
        return None
    values = np.array([value for _, value in found], float)
    return (
        Column(values, None if len(found) == len(cells) else np.array([k for k, _ in found], np.int64))
        if found
        else None
    )


def real(value: Any) -> Any:
    """A number, a truth or a number in words as a float, None for a blank.

    Raises:
        ValueError: the word is no number.
    """
    if isinstance(value, str):
        return numbers.number(value)
    try:
        return None if value is None else float(value)
    except OverflowError:
        return np.inf if value > 0 else -np.inf
