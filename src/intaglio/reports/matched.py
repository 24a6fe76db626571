"""Series of several runs brought to the same steps: windows of equal length, and one grid. W windows, G grid steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from intaglio.history import Series

FEW = 8
"""Rows up to which runs are compared at the steps of the coarsest, and not over windows."""
DRAWN = 200


@dataclass(frozen=True)
class Course:
    """How one arm went over the common steps: its mean at each step of the grid, summed up."""

    first: float
    low: float
    low_step: int
    high: float
    high_step: int
    last: float

    @property
    def change(self) -> float | None:
        """(last − first) / |first|, or None from 0."""
        return relative(self.first, self.last)


@dataclass(frozen=True)
class Window:
    """Both arms' means from step ``first`` to step ``last``; a single step where the two are one."""

    first: int
    last: int
    a: float
    b: float


class Line:
    """A series as a broken line through its finite values; of a repeated step the last row counts."""

    def __init__(self, s: Series) -> None:
        kept = np.isfinite(s.values)
        steps, values = np.asarray(s.steps)[kept], np.asarray(s.values, float)[kept]
        last = np.append(np.diff(steps) > 0, True)[: len(steps)]
        self.x, self.y = steps[last].astype(float), values[last]
        self.broken = bool(len(s)) and not math.isfinite(float(s.values[-1]))
        area = np.diff(self.x) * (self.y[1:] + self.y[:-1]) / 2
        self._area = np.concatenate([[0.0], np.cumsum(area)])

    def __len__(self) -> int:
        return len(self.x)

    def at(self, steps: np.ndarray | float) -> np.ndarray:
        """Values at steps between its first and its last."""
        return np.interp(steps, self.x, self.y)

    def mean(self, first: np.ndarray | float, last: np.ndarray | float) -> np.ndarray:
        """Its mean from step ``first`` to step ``last``, as the area below the line."""
        first, last = np.broadcast_arrays(np.asarray(first, float), np.asarray(last, float))
        width = np.where(last > first, last - first, 1.0)
        return np.where(last > first, (self._until(last) - self._until(first)) / width, self.at(last))

    def _until(self, q: np.ndarray) -> np.ndarray:
        if len(self.x) == 1:
            return np.zeros_like(q)
        k = np.clip(np.searchsorted(self.x, q, "right") - 1, 0, len(self.x) - 2)
        return self._area[k] + (q - self.x[k]) * (self.y[k] + self.at(q)) / 2

    def spacing(self) -> float:
        """How far apart its rows are where they are closest, but for a tenth of them; NaN with one row."""
        return float(np.quantile(np.diff(self.x), 0.1, method="lower")) if len(self.x) > 1 else math.nan


@dataclass(frozen=True)
class Matched:
    """Both arms on common steps: ``steps`` (G,), ``a`` (runs of A, G), ``b`` (runs of B, G), and where they end.

    ``ends`` are one value a run, taken at ``at``: the last common step, or the mean of the last window.
    """

    first: int
    last: int
    steps: np.ndarray
    a: np.ndarray
    b: np.ndarray
    windows: tuple[Window, ...]
    ends: tuple[np.ndarray, np.ndarray]
    at: str
    notes: tuple[str, ...]

    def course(self, arm: np.ndarray) -> Course:
        """Of ``a`` or ``b``, its mean over runs."""
        line = arm.mean(0)
        low, high = int(line.argmin()), int(line.argmax())
        steps = self.steps
        return Course(
            float(line[0]), float(line[low]), int(steps[low]), float(line[high]), int(steps[high]), float(line[-1])
        )


def match(a: Sequence[Line], b: Sequence[Line], windows: int, smooth: bool, axis: str) -> Matched | str:
    """Brings the lines to their common steps, or says why there are none.

    ``smooth`` takes the mean of the last window for the end of a line, as noise of single batches asks for.
    """
    lines = [*a, *b]
    first, last = float(max(ln.x[0] for ln in lines)), float(min(ln.x[-1] for ln in lines))
    if first > last:
        of = [f"{min(ln.x[0] for ln in arm):,.0f} to {max(ln.x[-1] for ln in arm):,.0f}" for arm in (a, b)]
        return f"no common steps: A has {axis}s {of[0]}, B {of[1]}"
    inside = [ln.x[(ln.x >= first) & (ln.x <= last)] for ln in lines]
    coarse = np.union1d(min(inside, key=len), [first, last])
    edges = np.unique(np.round(np.linspace(first, last, windows + 1)))
    points = len(coarse) <= FEW
    spans = [(s, s) for s in coarse] if points else list(pairwise(edges))
    if len(coarse) <= DRAWN:
        grid = coarse
        drawn = [[ln.at(grid) for ln in arm] for arm in (a, b)]
    else:
        cells = np.unique(np.round(np.linspace(first, last, DRAWN // 2 + 1)))
        grid = np.concatenate([[first], (cells[:-1] + cells[1:]) // 2, [last]])
        lows, highs = np.concatenate([[first], cells[:-1], [last]]), np.concatenate([[first], cells[1:], [last]])
        drawn = [[ln.mean(lows, highs) for ln in arm] for arm in (a, b)]
    low, high = spans[-1] if smooth and not points else (last, last)
    at = f"{axis} {last:,.0f}" if low == high else f"mean of {axis}s {low:,.0f} to {high:,.0f}"
    means = [
        Window(int(s), int(e), *(float(np.mean([ln.mean(s, e) for ln in arm])) for arm in (a, b))) for s, e in spans
    ]
    ends = tuple(np.array([float(ln.mean(low, high)) for ln in arm]) for arm in (a, b))
    return Matched(
        int(first), int(last), grid.astype(np.int64), np.array(drawn[0]), np.array(drawn[1]), tuple(means),
        (ends[0], ends[1]), at, tuple(_notes(a, b, first, last, axis)),
    )  # fmt: skip


def _notes(a: Sequence[Line], b: Sequence[Line], first: float, last: float, axis: str) -> list[str]:
    """What was cut, and rows that lie closer in one arm."""
    said = []
    for name, arm in (("A", a), ("B", b)):
        outer = [ln for ln in arm if ln.x[0] < first or ln.x[-1] > last]
        if outer:
            low, high = float(min(ln.x[0] for ln in outer)), float(max(ln.x[-1] for ln in outer))
            ends = [f"before {axis} {first:,.0f}"] * (low < first) + [f"after {axis} {last:,.0f}"] * (high > last)
            common = f"cut to {axis}s {first:,.0f} to {last:,.0f}, which all runs have"
            common = f"only {axis} {first:,.0f} is in all runs" if first == last else common
            said.append(f"{common}: {name} also has rows {' and '.join(ends)} ({low:,.0f} to {high:,.0f})")
    gaps = [min(ln.spacing() for ln in arm) for arm in (a, b)]
    if all(g > 0 for g in gaps) and max(gaps) > 1.5 * min(gaps):
        said.append(
            f"A has rows {gaps[0]:,.0f} {axis}s apart, B {gaps[1]:,.0f}: what is gathered from one row to the next, as "
            f"a usage, has another window in each; lows and highs are those at the {axis}s of the coarser"
        )
    return said


def relative(old: float, new: float) -> float | None:
    """(new − old) / |old|; None from 0, from nothing finite, and across 0, where it says nothing."""
    if not (math.isfinite(old) and math.isfinite(new)) or old == 0 or old * new < 0:
        return None
    return (new - old) / abs(old)
