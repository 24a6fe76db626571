"""Reader of tables as text: CSV of any kind, wide or long, of W&B, Lightning, Keras or by hand; and of Parquet.

The delimiter, the encoding, the decimal sign and the header are found from the first lines.
"""

import codecs
from pathlib import Path

from intaglio.history.foreign import History
from intaglio.history.formats import assembly, numbers
from intaglio.history.formats.cells import DELIMITERS, Reading, rows_of, table_of
from intaglio.history.formats.clock import rank
from intaglio.history.formats.tables import Table, count, listed

SUFFIXES = frozenset((".csv", ".tsv", ".tab", ".psv", ".dat", ".txt", ".log", ".parquet", ".pq"))
_HEAD = 1 << 18
_AT_ONCE = 4 << 20
_CONTROL = bytes(set(range(1, 32)) - set(b"\t\n\r\f\x1b"))
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def claims(path: Path) -> bool:
    """Whether ``path`` looks like a table of text, or Parquet."""
    if not path.is_file():
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        head = file.read(4096)
    return head[:4] == b"PAR1" or (b"\0" not in head and any(mark in head for mark in (b",", b"\t", b";")))


def read(path: Path) -> list[History]:
    """The histories in a table.

    Raises:
        ValueError: the file holds no table, or none that can be read; says why.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head[:4] == b"PAR1" or path.suffix.lower() in (".parquet", ".pq"):
        from intaglio.history.formats import blocks

        return assembly.histories(blocks.parquet(path), path, "Parquet", label(path))
    encoding, start = encoding_of(head, path)
    text = head[start:].decode(encoding, "replace")
    whole = path.stat().st_size <= len(head)
    reading, skipped = sniffed(text if whole else text[: text.rfind("\n") + 1] or text, path)
    if path.stat().st_size <= _AT_ONCE:
        text = path.read_bytes()[start:].decode(encoding, "replace")
        table = table_of(_after(_cleaned(text, reading), skipped), reading, last=True)
    else:
        table = _in_blocks(path, encoding, start, skipped, reading)
    table = table.noting(*(reading.said() if table.length else reading.notices))
    kind = _kind(table, path, reading)
    return assembly.histories(table, path, kind, label(path))


def _in_blocks(path: Path, encoding: str, start: int, skipped: int, reading: Reading) -> Table:
    """The table of a large file; its first lines show what the columns hold."""
    from intaglio.history.formats import blocks

    lines = skipped

    def table(block: bytes) -> Table:
        nonlocal lines
        if lines:
            block, lines = block.split(b"\n", lines)[-1], 0
            sample = b"\n".join(block.split(b"\n", 1000)[:1000]).decode("utf-8", "replace")
            table_of(sample, Reading(reading.names, reading.delimiter, reading.comma, reading.kinds))
        return blocks.table_by_polars(block, reading)

    whole, said = blocks.in_blocks(path, encoding, start, table)
    reading.notices += said
    return whole.without(*(name for name, kind in reading.kinds.items() if kind == "prose"))


def label(path: Path) -> str:
    """A name for the run in a file: the file's own, or its folder's where the file's says nothing."""
    dull = {"metrics", "history", "log", "logs", "trainer_state", "training_log", "results", "progress", "data"}
    return path.parent.name if path.stem.lower() in dull and path.parent.name else path.stem


def encoding_of(head: bytes, path: Path) -> tuple[str, int]:
    """The encoding that a file's first bytes show, and how many of them are its mark.

    Raises:
        ValueError: the file is empty, or no text.
    """
    if not head.strip(b"\0 \t\r\n"):
        raise ValueError(f"{path} is empty: nothing was logged to it")
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return encoding, len(mark)
    sample = head.rstrip(b"\0\n\r")
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if max(even, odd) > 0.15 * len(sample) > 10 * min(even, odd):
        return ("utf-16-be", 0) if even > odd else ("utf-16-le", 0)
    encoding = "utf-8"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        # Bytes that are letters elsewhere are another code page; any others are damage.
        high = bytes(byte for byte in head if byte > 127).decode("cp1252", "replace")
        encoding = "cp1252" if high.isalpha() else encoding
    if len(head) - len(head.translate(None, _CONTROL)) > 0.02 * len(head):
        raise ValueError(f"{path} is binary, no table of text: give a CSV, JSON, Parquet, TensorBoard or W&B history")
    return encoding, 0


def _cleaned(text: str, reading: Reading) -> str:
    """Without zero bytes, and with what could not be decoded counted."""
    if zeros := text.count("\0"):
        reading.notices.append(f"{count(zeros, 'zero byte')} left out: the file is damaged, as after a crash.")
        text = text.replace("\0", "")
    if bad := text.count("\ufffd"):
        reading.notices.append(f"{count(bad, 'character')} could not be decoded.")
    return text


def _after(text: str, lines: int) -> str:
    """What comes after the first lines."""
    for _ in range(lines):
        ends = [k for k in (text.find("\n"), text.find("\r")) if k >= 0]
        if not ends:
            return ""
        end = min(ends)
        text = text[end + 1 + (text[end : end + 2] == "\r\n") :]
    return text


def sniffed(text: str, path: Path) -> tuple[Reading, int]:
    """What the first lines show of the table, and how many of them stand before its rows.

    Raises:
        ValueError: they are no table.
    """
    lines = text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n").split("\n")[:200]
    held = [k for k, line in enumerate(lines) if line.strip()]
    if not held:
        raise ValueError(f"{path} is empty: it has blank lines only")
    plain = [k for k in held if not lines[k].lstrip().startswith(("#", "//"))] or held[-1:]
    body = [numbers.unwrap(lines[k]) for k in plain[:50]]
    delimiter, first = _delimiter(body, path)
    top = plain[first]
    cells = [cell.strip() for cell in rows_of(body[first], delimiter)[0]]
    following = rows_of("\n".join(body[first + 1 :]), delimiter) if len(body) > first + 1 else []
    comma = numbers.decimal_commas(cell for row in following for cell in row) and delimiter != ","
    notices = [f"{count(first, 'line')} before the table left out."] if first else []
    before = [k for k in held if k < top]
    numeric = [_numeric(cell, comma) for cell in cells]
    if delimiter is None and any(numeric) and not all(numeric) and cells[0].strip('"'):
        raise ValueError(f"{path} is a log in words, no table: give the metrics as CSV, JSON or JSON lines")
    # A header has a word above numbers, or nothing above the index and the names 0, 1, 2 … of unnamed columns.
    below = [next((row[k] for row in following if k < len(row) and row[k].strip()), "") for k in range(len(cells))]
    headed = any(
        cell and not own and (_numeric(under, comma) or not under)
        for cell, own, under in zip(cells, numeric, below, strict=True)
    )
    indexed = not cells[0] and cells[1:] == [str(k) for k in range(len(cells) - 1)]
    if not headed and not indexed and any(numeric):
        above = lines[before[-1]].lstrip("#/ \t") if before else ""
        names = [cell.strip() for cell in rows_of(above, delimiter)[0]] if above else []
        if len(names) != len(cells):
            names = [f"column {k}" for k in range(1, len(cells) + 1)]
            notices.append("There is no header: the columns were numbered.")
        skipped = top
    else:
        names, skipped = cells, top + 1
        width = max((len(row) for row in following), default=0)
        if width == len(names) + 1 and all(len(row) == width and row[-1].strip() for row in following if len(row) > 1):
            names = ["", *names]
    return Reading(tuple(_unique(names, notices)), delimiter, comma, notices=notices), skipped


def _numeric(cell: str, comma: bool) -> bool:
    try:
        return numbers.number(cell, comma) is not None
    except ValueError:
        return False


def _unique(names: list[str], notices: list[str]) -> list[str]:
    """The names of columns; blank ones as pandas writes them, repeated ones numbered."""
    known: dict[str, int] = {}
    unique, twice = [], []
    for k, name in enumerate(names):
        name = name or f"Unnamed: {k}"
        if name in known:
            twice.append(name)
        while name in known:
            known[name] += 1
            name = f"{name} ({known[name]})"
        known[name] = 1
        unique.append(name)
    if twice:
        notices.append(
            f"{listed(dict.fromkeys(twice))}: more than one column of that name; the later ones are numbered."
        )
    return unique


def _delimiter(lines: list[str], path: Path) -> tuple[str | None, int]:
    """What parts the cells, and the index of the line where the table begins."""
    best: tuple[float, int, str | None, int] = (0.0, 0, ",", 0)
    for delimiter in (*DELIMITERS, None):
        counts = [len(rows_of(line, delimiter)[0]) for line in lines]
        first = next((k for k, width in enumerate(counts) if width > 1), 0)
        rest = counts[first + 1 :] or counts[first:]
        share = sum(0 <= n - counts[first] <= 1 for n in rest) / len(rest) - 0.02 * first
        # White space may stand in cells, too, and other marks in words.
        if counts[first] > 1 and share > best[0] + (0.2 if delimiter is None else 0.0):
            best = (share, counts[first], delimiter, first)
    if best[1] and best[0] < 0.3:
        raise ValueError(f"{path} is no table: its lines have different numbers of cells")
    return best[2], best[3]


def _kind(table: Table, path: Path, reading: Reading) -> str:
    """The format, for people."""
    names = set(reading.names)
    if (
        any(name.endswith("__MIN") for name in names)
        or {"_step", "_runtime"} <= names
        or {"_step", "_timestamp"} <= names
    ):
        return "W&B CSV"
    if {"Wall time", "Step", "Value"} <= names:
        return "TensorBoard CSV"
    if path.name.endswith("metrics.csv") and "created_at" in names:
        return "test-tube CSV"
    if path.name.endswith("metrics.csv") and {"epoch", "step"} <= names:
        return "Lightning CSV"
    if "loss" in names and any(f"val_{name}" in names for name in names):
        return "Keras CSV"
    plain = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "table with bars", None: "table of text"}
    return plain[reading.delimiter] + (" of curves" if table.lists and not any(map(rank, table.columns)) else "")
