"""A table as a file gives it, before anybody knows which column counts the steps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Column:
    """The numbers of one column: ``values`` (m,) stand in the rows ``rows`` (m,), ascending, or in all if None."""

    values: np.ndarray
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def where(self, length: int) -> np.ndarray:
        """The indices (m,) of its rows in a table of ``length`` rows."""
        return np.arange(length) if self.rows is None else self.rows

    def dense(self, length: int) -> np.ndarray:
        """(length,): NaN where the column has no cell."""
        if self.rows is None:
            return self.values
        full = np.full(length, np.nan)
        full[self.rows] = self.values
        return full

    def part(self, start: int, stop: int) -> "Column":
        """The rows from ``start`` to before ``stop``."""
        if self.rows is None:
            return Column(self.values[start:stop])
        a, b = np.searchsorted(self.rows, (start, stop))
        return Column(self.values[a:b], self.rows[a:b] - start)

    def at(self, index: np.ndarray, length: int) -> "Column":
        """The rows of ``index`` in that order, out of a table of ``length`` rows."""
        if self.rows is None:
            return Column(self.values[index])
        place = np.full(length, -1)
        place[self.rows] = np.arange(len(self.rows))
        found = place[index]
        return Column(self.values[found[found >= 0]], np.flatnonzero(found >= 0))


@dataclass(frozen=True)
class Text:
    """A column that is no number: row k holds ``texts[codes[k]]``, or is blank where its code is -1."""

    codes: np.ndarray
    texts: Sequence[str]

    @classmethod
    def of(cls, cells: Iterable[str]) -> "Text":
        """Each different cell once, in order of appearance; white space alone is blank."""
        known: dict[str, int] = {}
        codes = [known.setdefault(cell, len(known)) if cell and not cell.isspace() else -1 for cell in cells]
        return cls(np.array(codes, np.int64), tuple(known))

    def cell(self, row: int) -> str:
        return self.texts[self.codes[row]] if self.codes[row] >= 0 else ""


@dataclass(frozen=True)
class Table:
    """Columns over the same ``length`` rows.

    ``lists`` are columns whose cells are curves or vectors; ``numbers`` (length,) are the rows' numbers in the file,
    where rows between them were left out.
    """

    length: int
    columns: Mapping[str, Column]
    texts: Mapping[str, Text] = field(default_factory=dict)
    lists: Mapping[str, Mapping[int, Column]] = field(default_factory=dict)
    numbers: np.ndarray | None = None
    notices: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def noting(self, *said: str) -> "Table":
        return replace(self, notices=(*self.notices, *said))

    def dense(self, name: str) -> np.ndarray:
        return self.columns[name].dense(self.length)

    def part(self, start: int, stop: int) -> "Table":
        """The rows from ``start`` to before ``stop``."""
        return replace(
            self,
            length=stop - start,
            columns={name: column.part(start, stop) for name, column in self.columns.items()},
            texts={name: Text(text.codes[start:stop], text.texts) for name, text in self.texts.items()},
            lists={
                name: {row - start: column for row, column in cells.items() if start <= row < stop}
                for name, cells in self.lists.items()
            },
            numbers=None if self.numbers is None else self.numbers[start:stop],
        )

    def at(self, index: np.ndarray) -> "Table":
        """The rows of ``index`` in that order."""
        place = dict(zip(index.tolist(), range(len(index)), strict=True)) if self.lists else {}
        return replace(
            self,
            length=len(index),
            columns={name: column.at(index, self.length) for name, column in self.columns.items()},
            texts={name: Text(text.codes[index], text.texts) for name, text in self.texts.items()},
            lists={
                name: {place[row]: column for row, column in cells.items() if row in place}
                for name, cells in self.lists.items()
            },
            numbers=None if self.numbers is None else self.numbers[index],
        )

    def without(self, *names: str) -> "Table":
        """Less the columns of these names."""
        return replace(
            self,
            columns={name: column for name, column in self.columns.items() if name not in names},
            texts={name: text for name, text in self.texts.items() if name not in names},
            lists={name: cells for name, cells in self.lists.items() if name not in names},
        )


def shown(name: str) -> str:
    """A name from a file, fit to be printed: quoted, control characters visible, at most 80 characters."""
    return repr(name if len(name) <= 80 else name[:79] + "…")


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first names, quoted, and how many more there are."""
    known = list(names)
    rest = f" and {len(known) - most:,} more" if len(known) > most else ""
    return ", ".join(shown(name) for name in known[:most]) + rest


def count(number: int, one: str, many: str = "") -> str:
    """``1 row``, ``1,234 rows``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
