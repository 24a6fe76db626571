"""Tables too large for one piece of text: read in blocks by polars, and thinned where they are very large."""

import codecs
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from intaglio.history.formats.cells import Reading, joined, table_of
from intaglio.history.formats.numbers import unwrap
from intaglio.history.formats.tables import Column, Table, Text, listed

if TYPE_CHECKING:
    import polars as pl

_BLOCK = 8 << 20
_LONGEST_LINE = 1 << 28
_WHOLE = 1_500_000_000
_ROWS = 1_000_000


def in_blocks(path: Path, encoding: str, start: int, table_of: Callable[[bytes], Table]) -> tuple[Table, list[str]]:
    """The table in a large file of lines, from byte ``start`` on, by that of each block; and what was left out.

    Up to 1.5 GB every row is read; of a larger file, what ``thinned`` keeps.

    Raises:
        ValueError: the file has no lines.
    """
    size, tables, row, step = path.stat().st_size, [], 0, 1
    for block in _blocks(path, encoding, start):
        table = table_of(block)
        if size > _WHOLE and not row:
            step = max(1, round(size / len(block) * table.length / _ROWS))
        tables.append(thinned(table, row, step) if step > 1 else table)
        row += table.length
    table = joined(tables)
    return table, [_sparse(row, step, table.length)] if step > 1 else []


def _sparse(rows: int, step: int, kept: int) -> str:
    return (
        f"The file is large: of its {rows:,} rows every {step:,}th was read, with the lowest and the highest of each "
        f"column between them: {kept:,} in all."
    )


def thinned(table: Table, before: int, step: int) -> Table:
    """Every ``step``-th row of a table with ``before`` rows above it, its first and last, those with the lowest and
    the highest value of each column and with its first that is not finite, and all rows of a column that has few."""
    keep = np.zeros(table.length, bool)
    keep[-before % step :: step] = True
    keep[:1] = keep[-1:] = True
    for column in table.columns.values():
        rows, finite = column.where(table.length), np.isfinite(column.values)
        if len(rows) < 0.05 * table.length:
            keep[rows] = True
        if finite.any():
            keep[rows[np.argmin(np.where(finite, column.values, np.inf))]] = True
            keep[rows[np.argmax(np.where(finite, column.values, -np.inf))]] = True
        if not finite.all():
            keep[rows[np.argmin(finite)]] = True
    kept = np.flatnonzero(keep)
    small = table.at(kept)
    return Table(len(kept), small.columns, small.texts, small.lists, kept + before)


def _blocks(path: Path, encoding: str, start: int) -> Iterator[bytes]:
    """The lines of a file in UTF-8, in blocks; a last line without an end comes alone."""
    decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)("replace")
    rest = b""
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(_BLOCK):
            if decoder:
                data = decoder.decode(data).encode()
            if b"\n" not in data:
                data = data.replace(b"\r", b"\n")
            rest += data
            if end := _end(rest):
                yield rest[:end]
                rest = rest[end:]
            elif len(rest) > _LONGEST_LINE:
                raise ValueError(f"{path} has a line longer than 256 MiB: it is no table")
    if rest:
        yield rest


def _end(data: bytes) -> int:
    """Where the last line ends that is whole and in which no quote is open; 0 if there is none."""
    end = data.rfind(b"\n") + 1
    if b'"' in data:
        for _ in range(100):
            if data.count(b'"', 0, end) % 2 == 0 or not end:
                return end
            end = data.rfind(b"\n", 0, end - 1) + 1
        return data.rfind(b"\n") + 1
    return end


def table_by_polars(block: bytes, reading: Reading) -> Table:
    """The table of a block of text, by polars if its columns hold what they held before, else cell by cell."""
    import polars as pl

    if b"(" in block and (b"ensor(" in block or b"rray(" in block or b"float" in block):
        block = unwrap(block.decode("utf-8", "replace")).encode()
    kinds = {reading.kinds.get(name, "number") for name in reading.names}
    if block.endswith(b"\n") and reading.delimiter is not None and "list" not in kinds:
        schema = {k: pl.Float64 if reading.kinds.get(k, "number") == "number" else pl.String for k in reading.names}
        try:
            frame = pl.read_csv(
                block,
                has_header=False,
                schema=schema,
                separator=reading.delimiter,
                decimal_comma=reading.comma,
                null_values=["", "NA", "N/A", "null", "None"],
            )
        except pl.exceptions.PolarsError:
            pass
        else:
            # Words that are ever new, as times are, tell no runs apart.
            for name, kind in reading.kinds.items():
                if kind == "text" and frame[name].n_unique() > max(1000, frame.height / 4):
                    reading.kinds[name] = "prose"
            table = table_of_frame(frame.drop([k for k in reading.names if reading.kinds.get(k) == "prose"]))
            reading.kinds.update({name: "number" for name in table.columns})
            return table
    text = block.decode("utf-8", "replace").replace("\0", "")
    return table_of(text, reading, last=not block.endswith(b"\n"))


def table_of_frame(frame: "pl.DataFrame") -> Table:
    """A table with the numbers, truths and words of a frame, without rows that are blank throughout."""
    import polars as pl

    if frame.width and all(frame[name].null_count() for name in frame.columns):
        frame = frame.filter(pl.any_horizontal(pl.all().is_not_null()))
    columns, texts, lists = {}, {}, {}
    for name in frame.columns:
        values = frame[name]
        if values.dtype == pl.String:
            known = values.unique(maintain_order=True).drop_nulls().to_list()
            codes = values.cast(pl.Enum(known)).to_physical().cast(pl.Int64).fill_null(-1)
            texts[name] = Text(codes.to_numpy(), tuple(known))
        elif isinstance(values.dtype, pl.List | pl.Array) and values.dtype.inner is not None:
            inner = values.dtype.inner
            if getattr(inner, "is_numeric", lambda: False)():
                cells = enumerate(values.to_list())
                lists[name] = {k: Column(np.array(cell, float)) for k, cell in cells if cell}
        elif values.dtype.is_numeric() or values.dtype == pl.Boolean:
            if values.dtype != pl.Float64:
                values = values.cast(pl.Float64)
            if not values.null_count():
                columns[name] = Column(values.to_numpy())
            elif values.null_count() < len(values):
                rows = values.is_not_null().arg_true().cast(pl.Int64).to_numpy()
                columns[name] = Column(values.drop_nulls().to_numpy(), rows)
    return Table(frame.height, columns, texts, lists)


def parquet(path: Path) -> Table:
    """The table in a Parquet file; of one with very many rows, what ``thinned`` keeps.

    Raises:
        ValueError: the file is damaged, or no Parquet.
    """
    import polars as pl

    try:
        with _hushed():
            return _parquet(pl.scan_parquet(path))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read as Parquet: {reason}") from None


def _parquet(lazy: "pl.LazyFrame") -> Table:
    import polars as pl

    rows, width = int(lazy.select(pl.len()).collect().item()), len(lazy.collect_schema())
    if rows * width * 8 <= _WHOLE:
        frame = lazy.collect()
        table = table_of_frame(frame)
        left = [name for name in frame.columns if name not in {**table.columns, **table.texts, **table.lists}]
        return table.noting(f"{listed(left)}: no numbers, left out.") if left else table
    step, size = max(1, round(rows / _ROWS)), max(1000, _BLOCK // width)
    table = joined(
        [thinned(table_of_frame(lazy.slice(start, size).collect()), start, step) for start in range(0, rows, size)]
    )
    return table.noting(_sparse(rows, step, table.length))


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what Rust prints when a damaged Parquet file makes polars panic; the exception says it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
