"""Cells of text to columns: which hold numbers, which curves, which words, and what no one can read."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from intaglio.history.formats import numbers
from intaglio.history.formats.tables import Column, Table, Text, count, listed, shown

DELIMITERS = (";", "\t", "|", ",")


@dataclass
class Reading:
    """What is known of a text table, and what was found amiss in it so far.

    ``delimiter`` is None where white space parts the cells. ``kinds`` says of each column that was not blank so far
    whether it holds "number", "list", "text", or "prose", which is text that hardly repeats and is left out.
    """

    names: tuple[str, ...]
    delimiter: str | None
    comma: bool = False
    kinds: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    unreadable: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    percent: set[str] = field(default_factory=set)
    amiss: Counter[str] = field(default_factory=Counter)

    def said(self) -> list[str]:
        """The notices, whole sentences."""
        said = list(self.notices)
        for name, number in self.unreadable.most_common(4):
            said.append(f"{shown(name)}: {count(number, 'cell')} that is no number, as {shown(self.examples[name])}.")
        if len(self.unreadable) > 4:
            said.append(f"Cells that are no numbers in {len(self.unreadable) - 4:,} more columns.")
        if self.percent:
            said.append(f"{listed(sorted(self.percent))}: written in per cent, read as shares.")
        said += [f"{count(number, 'row')} {what}." for what, number in self.amiss.items()]
        if prose := [name for name, kind in self.kinds.items() if kind == "prose"]:
            said.append(f"{listed(prose)}: text, left out.")
        if blank := [name for name in self.names if name not in self.kinds and not name.startswith("Unnamed")]:
            said.append(f"{listed(blank)}: blank throughout.")
        return said


def rows_of(text: str, delimiter: str | None) -> list[list[str]]:
    """The cells of each line; a quote that is never closed quotes nothing."""
    if delimiter is None or '"' not in text:
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        rows = [line.split(delimiter) for line in lines]
        return [[cell.strip('"') for cell in row] for row in rows] if '"' in text else rows
    before = csv.field_size_limit(max(len(text), 131_072))
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True))
        if text.count('"') % 2 and rows and sum(cell.count("\n") for cell in rows[-1]) > 1:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE))
        return rows
    except csv.Error as error:
        raise ValueError(f"its lines can't be parted into cells: {error}") from None
    finally:
        csv.field_size_limit(before)


def table_of(text: str, reading: Reading, last: bool = False) -> Table:
    """The table of some lines of text; ``last``: nothing comes after them in the file."""
    rows = _tidy(rows_of(numbers.unwrap(text), reading.delimiter), reading, last and not text.endswith(("\n", "\r")))
    columns: dict[str, Column] = {}
    texts: dict[str, Text] = {}
    lists: dict[str, dict[int, Column]] = {}
    for name, cells in zip(reading.names, zip(*rows, strict=True), strict=False):
        kind = add(name, cells, reading, columns)
        if kind == "text":
            texts[name] = Text.of(cells)
        elif kind == "list":
            found = {k: curve for k, cell in enumerate(cells) if cell and (curve := numbers.curve(cell))}
            lists[name] = {k: Column(curve.values, curve.rows) for k, curve in found.items()}
            _unread(
                name, [c for k, c in enumerate(cells) if k not in found and c.lower() not in numbers.BLANK], reading
            )
    return Table(len(rows), columns, texts, lists)


def add(name: str, cells: Sequence[str], reading: Reading, columns: dict[str, Column]) -> str:
    """Puts the cells among ``columns`` if they are numbers; the kind of the column, "" while it is blank."""
    if reading.kinds.get(name, "number") != "number":
        return reading.kinds[name]
    if name not in reading.kinds:
        first = list(islice((cell for cell in cells if cell and not cell.isspace()), 64))
        parsed = numbers.parse(first, reading.comma)
        if not len(parsed.values) and not parsed.unreadable:
            return ""
        words = parsed.unreadable[:16]
        lists = sum(numbers.curve(cell) is not None for cell in words)
        kind = (
            "number" if len(parsed.unreadable) <= len(parsed.values) else "list" if 2 * lists >= len(words) else "text"
        )
        reading.kinds[name] = kind
        if kind != "number":
            return kind
    parsed = numbers.parse(cells, reading.comma)
    columns[name] = Column(parsed.values, parsed.rows)
    _unread(name, parsed.unreadable, reading)
    if parsed.percent:
        reading.percent.add(name)
    return "number"


def _unread(name: str, cells: Sequence[str], reading: Reading) -> None:
    if found := [cell for cell in cells if cell and not cell.isspace()]:
        reading.unreadable[name] += len(found)
        reading.examples.setdefault(name, found[0])


def _tidy(rows: list[list[str]], reading: Reading, cut: bool) -> list[list[str]]:
    """Rows of equal width, without blank ones and repeated headers; what was done is counted."""
    width, head = len(reading.names), list(reading.names)
    rows = [row for row in rows if any(row) and (len(row) > 1 or row[0].strip())]
    if cut and rows and len(rows[-1]) < width:
        rows.pop()
        reading.amiss["was cut off at the end of the file and left out"] += 1
    tidy = []
    for row in rows:
        if len(row) != width:
            row = _fitted(row, width, reading)
        if row[0].startswith("#") or (row[0].strip() == head[0] and [cell.strip() for cell in row] == head):
            reading.amiss["repeats the header or is a comment, left out"] += 1
        else:
            tidy.append(row)
    return tidy


def _fitted(row: list[str], width: int, reading: Reading) -> list[str]:
    """A row of another width, brought to this one."""
    for other in DELIMITERS:
        if other != reading.delimiter and len(row) == 1 and row[0].count(other) == width - 1:
            reading.amiss[f"is parted by {other!r}"] += 1
            return row[0].split(other)
    if len(row) > width and not any(cell.strip() for cell in row[width:]):
        return row[:width]
    reading.amiss["has too few cells" if len(row) < width else "has too many cells, which were left out"] += 1
    return row[:width] + [""] * (width - len(row))


def joined(tables: Sequence[Table]) -> Table:
    """One table under the other."""
    if len(tables) == 1:
        return tables[0]
    starts = np.concatenate([[0], np.cumsum([table.length for table in tables])])
    length = int(starts[-1])
    columns, texts, lists = {}, {}, {}
    for name in dict.fromkeys(name for table in tables for name in table.columns):
        parts = [
            (table.columns[name], table.length, start)
            for table, start in zip(tables, starts[:-1], strict=True)
            if name in table.columns
        ]
        columns[name] = _under(parts, length)
    for name in dict.fromkeys(name for table in tables for name in table.texts):
        known: dict[str, int] = {}
        codes = [np.full(length, -1)[:0]]
        for table in tables:
            if (text := table.texts.get(name)) is None:
                codes.append(np.full(table.length, -1))
                continue
            new = np.array([known.setdefault(cell, len(known)) for cell in text.texts] + [-1], np.int64)
            codes.append(new[text.codes])
        texts[name] = Text(np.concatenate(codes), tuple(known))
    for name in dict.fromkeys(name for table in tables for name in table.lists):
        lists[name] = {
            int(start) + row: column
            for table, start in zip(tables, starts[:-1], strict=True)
            for row, column in table.lists.get(name, {}).items()
        }
    numbers_ = [table.numbers for table in tables if table.numbers is not None]
    return Table(length, columns, texts, lists, np.concatenate(numbers_) if numbers_ else None)


def _under(parts: list[tuple[Column, int, int]], length: int) -> Column:
    values = np.concatenate([column.values for column, _, _ in parts])
    if len(values) == length and all(column.rows is None for column, _, _ in parts):
        return Column(values)
    return Column(values, np.concatenate([column.where(own) + start for column, own, start in parts]))
