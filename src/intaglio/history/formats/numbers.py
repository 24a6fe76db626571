"""Numbers as programs and people write them: 0.12, tensor(0.12), 1,234.5, 0,12, 85 %, True, nan."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

BLANK = frozenset(("", "na", "n/a", "#n/a", "<na>", "null", "none", "nil", "?"))

_WORDS = {
    "true": 1.0,
    "false": 0.0,
    "1.#inf": np.inf,
    "-1.#inf": -np.inf,
    "1.#qnan": np.nan,
    "-1.#ind": np.nan,
    "1.#ind": np.nan,
}
_WRAPPED = re.compile(
    r"\b(?:(?:tf|torch|np|numpy|jnp)\.)?(?:[Tt]ensor|Array|array|b?float(?:16|32|64))"
    r"\((?:\[([^,()\[\]]{1,64})\]|([^,()\[\]]{1,64}))(?:,[^()\[\]]{0,200})?\)"
)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?(?:e[+-]?\d+)?")
_DOTTED = re.compile(r"[+-]?\d{1,3}(?:\.\d{3})+,\d+")
_DECIMAL = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class Parsed:
    """The numbers of some cells: ``values`` (m,) at the indices ``rows`` (m,), or at all if that is None.

    ``unreadable`` are the cells that are neither blank nor a number; ``percent`` says that some were per cent.
    """

    values: np.ndarray
    rows: np.ndarray | None
    unreadable: tuple[str, ...] = ()
    percent: bool = False


def unwrap(text: str) -> str:
    """Without the tensors and arrays around single numbers: ``tensor(0.12, device='cuda:0')`` is ``0.12``."""
    return _WRAPPED.sub(lambda match: match[1] or match[2], text) if "(" in text else text


def decimal_commas(cells: Iterable[str]) -> bool:
    """Whether a comma stands for a decimal point: some cell has one where it can't part thousands."""
    return any(
        _DOTTED.fullmatch(cell) or (_DECIMAL.fullmatch(cell) and (cell[0] in "0," or not _THOUSANDS.fullmatch(cell)))
        for cell in (cell.strip().lstrip("+-") for cell in cells if "," in cell)
    )


def number(cell: str, comma: bool = False) -> float | None:
    """The number in a cell, None if it is blank; ``comma`` is the decimal sign where true.

    Raises:
        ValueError: the cell is something else.
    """
    try:
        return float(cell)
    except ValueError:
        word = unwrap(cell).strip().strip("\"'").lower().replace("−", "-")
    if word in BLANK or not word.strip("-:"):
        return None
    if word in _WORDS:
        return _WORDS[word]
    scale = 0.01 if word.endswith("%") else 1.0
    word = word.removesuffix("%").replace("\xa0", "").replace("\u202f", "").rstrip()
    if "," in word:
        if comma and word.count(",") == 1:
            word = word.replace(".", "").replace(",", ".")
        elif _THOUSANDS.fullmatch(word):
            word = word.replace(",", "")
    return float(word) * scale


def parse(cells: Sequence[str], comma: bool = False) -> Parsed:
    """The numbers of a column of cells."""
    try:
        return Parsed(np.fromiter(map(float, cells), float, len(cells)), None)
    except ValueError:
        filled = [k for k, cell in enumerate(cells) if cell]
    try:
        values = np.fromiter((float(cells[k]) for k in filled), float, len(filled))
        return Parsed(values, np.array(filled, np.int64))
    except ValueError:
        return _parse_slowly(cells, filled, comma)


def _parse_slowly(cells: Sequence[str], filled: list[int], comma: bool) -> Parsed:
    rows, values, unreadable, percent = [], [], [], False
    for k in filled:
        try:
            value = number(cells[k], comma)
        except ValueError:
            unreadable.append(cells[k])
            continue
        if value is not None:
            rows.append(k)
            values.append(value)
            percent = percent or cells[k].rstrip().endswith("%")
    return Parsed(np.array(values, float), np.array(rows, np.int64), tuple(unreadable), percent)


def curve(cell: str) -> Parsed | None:
    """The numbers of a cell such as ``[0.3, 0.2, nan]`` or ``array([0.3 0.2])``, or None if it holds no such list."""
    start, end = cell.find("["), cell.rfind("]")
    if start < 0:
        start, end = cell.find("("), cell.rfind(")")
    if start < 0 or start > 16 or cell.count("[") > 1:
        return None
    inside = unwrap(cell[start + 1 : end if end > start else None])
    parsed = parse([part for part in re.split(r"[,;\s]+", inside) if part and part != "..."])
    return None if parsed.unreadable or not len(parsed.values) else parsed
