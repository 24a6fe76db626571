"""The history table of a run: one row a number, as JSON lines while the run goes on, as Parquet afterwards."""

import json
import math
import os
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.history.reading import Reading

if TYPE_CHECKING:
    import polars as pl

COLUMNS = ("step", "epoch", "time", "name", "value", "null", "n")

_NAME = re.compile(r"[a-z]+(/[A-Za-z0-9_][A-Za-z0-9_.-]*){2}")


class DamagedHistory(UserWarning):
    """A history file was read up to a damaged line; the message says where and how much was left unread."""


class HistoryWriter:
    """Appends readings to a ``metrics.jsonl``: rows reach the file at ``flush``, and the disk at ``close``.

    A file that exists is continued. If a killed process left its last line half-written, that line is cut off with a
    ``DamagedHistory`` warning. NaN and infinities are stored as the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``,
    since JSON has no numbers for them. Equal runs write equal files, but for the column ``time``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not _ends_whole(path):
            self.truncate_after(None)

    def write(self, step: int, epoch: float, readings: Mapping[str, Reading | float]) -> None:
        """Buffer one row for each ``<split>/<site>/<quantity>`` of optimizer step ``step``.

        A reading with an interval adds the rows ``<name>_low`` and ``<name>_high``.

        Raises:
            ValueError: a name of another form; nothing of ``readings`` is then written.
        """
        for name in readings:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"metric name {name!r} at step {step} is not <split>/<site>/<quantity>, as val/loss/caption: the "
                    "split of small letters, the others of letters, digits, '_', '.' and '-'"
                )
        now = round(time.time(), 3)
        for name, given in readings.items():
            reading = given if isinstance(given, Reading) else Reading(float(given))
            parts = {"": reading.value, "_low": reading.low, "_high": reading.high}
            for suffix, value in parts.items():
                if value is not None:
                    null = reading.null if suffix == "" else None
                    row = (step, epoch, now, name + suffix, portable(value), portable(null), reading.n)
                    self._lines.append(json.dumps(dict(zip(COLUMNS, row, strict=True)), allow_nan=False) + "\n")

    def flush(self) -> None:
        """Hand the buffered rows to the operating system: from here on they survive the death of this process."""
        if self._lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._lines))
            self._lines.clear()

    def close(self) -> None:
        """Flush, and force the file onto the disk."""
        self.flush()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def truncate_after(self, step: int | None) -> int:
        """Keep the rows up to ``step`` (None: all whole rows), as a resume does; return how many rows were dropped.

        The file is replaced atomically. Rows from a damaged line on are dropped with a ``DamagedHistory`` warning.
        """
        self.flush()
        if not self.path.exists():
            return 0
        rows = _rows(self.path)
        kept = [row for row in rows if step is None or row["step"] <= step]
        part = self.path.with_name(self.path.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)
        return len(rows) - len(kept)

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_history(path: Path) -> "pl.DataFrame":
    """The table of a ``metrics.jsonl`` or ``metrics.parquet``: step, epoch, time (s, Unix), name, value, null, n.

    A JSON-lines file is read up to the first damaged line, with a ``DamagedHistory`` warning.

    Raises:
        ValueError: the file is of another kind.
    """
    import polars as pl

    schema = dict(
        zip(COLUMNS, (pl.Int64, pl.Float64, pl.Float64, pl.String, pl.Float64, pl.Float64, pl.Int64), strict=True)
    )
    if path.suffix == ".parquet":
        table = pl.read_parquet(path)
        if dict(table.schema) != schema:
            raise ValueError(f"{path} has the columns {table.columns}, not those of a history: {list(COLUMNS)}")
        return table
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} is not a history: give a metrics.jsonl or metrics.parquet")
    rows = _rows(path)
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    for name in ("epoch", "value", "null"):
        columns[name] = [None if number is None else float(number) for number in columns[name]]
    return pl.DataFrame(columns, schema=schema)


def to_parquet(path: Path) -> Path:
    """Write the table of ``metrics.jsonl`` beside it as ``metrics.parquet``, atomically, and return that path."""
    target = path.with_suffix(".parquet")
    part = target.with_name(target.name + ".part")
    read_history(path).write_parquet(part)
    part.replace(target)
    return target


def portable(value: float | None) -> float | str | None:
    """A number as JSON can hold it: NaN and infinities as their names."""
    if value is None or math.isfinite(value):
        return None if value is None else float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return file.read() in (b"", b"\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows up to the first damaged line, which is warned of."""
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                last = rows[-1].get("step") if rows else None
                warnings.warn(
                    f"{path}, line {number} of {len(lines)} is damaged (a process was killed, or the disk filled up): "
                    f"read up to step {last}, {len(lines) - number + 1} line(s) left out",
                    DamagedHistory,
                    stacklevel=3,
                )
                break
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or tuple(row) != COLUMNS:
            raise ValueError(f"{path}, line {number} is not a history row: it needs the keys {', '.join(COLUMNS)}")
    return rows
