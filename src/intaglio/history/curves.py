"""A curve of any length as a few hundred points, its noise and its spikes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from intaglio.history.series import Series

POINTS = 500
"""Medians of neighbouring rows that stand for a longer curve."""
ROWWISE = 20_000
"""Rows up to which each has a running median of its own; beyond them the medians of POINTS bins are its level."""
NEIGHBOURS = 11
"""Width of the running median, in rows."""
LONGEST_SPIKE = 3
"""Rows that an isolated spike may last."""
FEWEST_FOR_SPIKES = 10


@dataclass(frozen=True)
class Points:
    """Medians of rows that lie together: arrays (k,) of the middle step, the median, the rows in it and its first row.

    Where a point stands for many rows, those of the first one are divided again, into 1, 1, 2, 2, 4, 4, … rows.
    """

    steps: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def at(self, chosen: np.ndarray) -> "Points":
        return Points(self.steps[chosen], self.values[chosen], self.counts[chosen], self.rows[chosen])


class Curve:
    """The finite rows of a series: ``steps`` and ``values`` (n,), both float64, ``values`` divided by ``unit``.

    ``unit`` is 1 but for numbers so large or small that their squares are no numbers.
    """

    def __init__(self, steps: np.ndarray, values: np.ndarray, unit: float = 1.0) -> None:
        self.steps, self.values, self.unit = steps, values, unit

    @classmethod
    def of(cls, series: Series) -> "Curve":
        values = np.asarray(series.values, np.float64)
        steps = np.asarray(series.steps, np.float64)
        good = np.isfinite(values)
        if not good.all():
            steps, values = steps[good], values[good]
        if len(steps) > 1 and (np.diff(steps) < 0).any():
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
        size = float(max(-values.min(), values.max())) if len(values) else 0.0
        if 0 < size < 1e-100 or size > 1e100:
            unit = float(np.ldexp(1.0, min(1022, max(-1021, int(np.frexp(size)[1])))))
            return cls(steps, values / unit, unit)
        return cls(steps, values)

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def bins(self) -> Points:
        """At most POINTS medians of equally many rows, each row its own where there are no more."""
        n = len(self)
        if n <= POINTS:
            return Points(self.steps, self.values, np.ones(n), np.arange(n))
        x = self.values
        if n <= ROWWISE and len(self.spikes):  # in bins of so few rows a median would follow them
            x = x.copy()
            x[self.spikes] -= self.residuals[self.spikes]
        counts = np.concatenate([np.full(len(block), block.shape[1]) for _, block in blocks(x, POINTS)])
        medians = np.concatenate([_medians(block) for _, block in blocks(x, POINTS)])
        return self._points(counts, medians)

    @cached_property
    def points(self) -> Points:
        """The bins without spikes, the first of them divided, so that the start of a long curve is seen."""
        bins = self.bins
        if len(self) <= POINTS:
            return bins.at(np.setdiff1d(bins.rows, self.spikes)) if len(self.spikes) else bins
        whole, sizes = int(bins.counts[0]), [1]
        while sum(sizes) < whole:
            sizes.append(min(1 << len(sizes) // 2, whole - sum(sizes)))
        ends = np.cumsum(sizes)
        head = [float(np.median(self.values[end - size : end])) for size, end in zip(sizes, ends, strict=True)]
        counts = np.concatenate([sizes, bins.counts[1:]]).astype(int)
        return self._points(counts, np.concatenate([head, bins.values[1:]]))

    def even(self, first_row: int = 0) -> Points:
        """From ``first_row`` on: the bins, or the rows without spikes where there are no more."""
        points = self.points if len(self) <= POINTS else self.bins
        return points.at(points.rows >= first_row)

    def _points(self, counts: np.ndarray, medians: np.ndarray) -> Points:
        first = np.cumsum(counts) - counts
        middles = (self.steps[first + (counts - 1) // 2] + self.steps[first + counts // 2]) / 2
        return Points(middles, medians, counts.astype(float), first)

    @cached_property
    def residuals(self) -> np.ndarray:
        """Each row less the level around it (n,)."""
        if len(self) <= ROWWISE:
            return self.values - running_median(self.values, NEIGHBOURS)
        level = self.bins.values
        return np.concatenate([(b - level[part, None]).ravel() for part, b in blocks(self.values, POINTS)])

    def noise(self, first_row: int = 0) -> float:
        """Robust standard deviation of the rows from ``first_row`` on around their level; NaN below 5 rows."""
        rest = self.residuals[first_row:]
        return float(1.4826 * np.median(np.abs(thin(rest)))) if len(rest) >= 5 else float("nan")

    @cached_property
    def spikes(self) -> np.ndarray:
        """Rows that stand far out of their neighbours on both sides, at most LONGEST_SPIKE together, in order.

        Far is eight robust standard deviations of that part of the curve (Hampel 1974), or more where its noise has
        heavy tails: times ((90 % quantile / median of the deviations) / 2.439)³, 2.439 being a Gaussian's ratio. The
        start of a curve is none, nor its last row, of which nobody knows yet whether it comes back.
        """
        n = len(self)
        if n < FEWEST_FOR_SPIKES:
            return np.zeros(0, int)
        away = np.abs(self.residuals)
        parts = int(np.clip(n // 50, 1, POINTS))
        least = 1e-6 * float(np.abs(thin(self.values)).max()) + 1e-300
        scales = np.concatenate([np.maximum(_scales(block), least) for _, block in blocks(away, parts)])
        some = [(b[:, :: 1 + b.shape[1] // 100] / scales[part, None]).ravel() for part, b in blocks(away, parts)]
        middle, most = np.quantile(np.concatenate(some), [0.5, 0.9])
        scales *= 8 * max(1.0, min(1e3, most / max(middle, 1e-3)) / 2.439) ** 3
        rows, limits, start = [], [], 0
        for part, block in blocks(away, parts):
            i, j = np.nonzero(block > scales[part, None])
            rows.append(start + i * block.shape[1] + j)
            limits.append(scales[part][i])
            start += block.size
        return self._isolated(np.concatenate(rows)[:ROWWISE], np.concatenate(limits)[:ROWWISE])

    def _isolated(self, rows: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Those of the rows that are far from the median of their ten neighbours, and from all but one on each side."""
        n = len(self)
        if not len(rows):
            return rows
        half = NEIGHBOURS // 2
        offsets = np.concatenate([np.arange(-half, 0), np.arange(1, half + 1)])
        centres = np.clip(rows, half, n - 1 - half)
        around = centres[:, None] + offsets
        around = np.where(around == rows[:, None], centres[:, None], around)  # near an end the centre is a neighbour
        near = np.sort(self.values[around], axis=1)
        middle, spread = (near[:, half - 1] + near[:, half]) / 2, near[:, -2] - near[:, 1]
        far = np.abs(self.values[rows] - middle) > np.maximum(limits, 3 * spread)
        groups = np.split(rows[far], np.flatnonzero(np.diff(rows[far]) > 1) + 1)
        alone = [g for g in groups if 0 < len(g) <= LONGEST_SPIKE and g[0] >= LONGEST_SPIKE and g[-1] < n - 1]
        return np.concatenate(alone) if alone else rows[:0]


def thin(x: np.ndarray, most: int = 20_000) -> np.ndarray:
    """At most ``most`` or so of the rows, in equal distances."""
    return x[:: max(1, len(x) // most)]


def running_median(x: np.ndarray, width: int) -> np.ndarray:
    """Median of the ``width`` (odd) values around each, of as many on both sides at the ends; the length of ``x``."""
    half = min(width // 2, (len(x) - 1) // 2)
    if half < 1:
        return x.copy()
    body = np.partition(sliding_window_view(x, 2 * half + 1), half, axis=1)[:, half]
    start = [float(np.median(x[: 2 * k + 1])) for k in range(half)]
    return np.concatenate([start, body, [float(np.median(x[len(x) - 2 * k - 1 :])) for k in range(half - 1, -1, -1)]])


def blocks(x: np.ndarray, parts: int) -> Iterator[tuple[slice, np.ndarray]]:
    """``x`` (n,) in equal ``parts``, as views (parts, rows): those with one row more, then the others; and which."""
    more, each = len(x) % parts, len(x) // parts
    cut = more * (each + 1)
    if more:
        yield slice(0, more), x[:cut].reshape(more, each + 1)
    yield slice(more, parts), x[cut:].reshape(parts - more, each)


def _medians(block: np.ndarray) -> np.ndarray:
    low, high = (block.shape[1] - 1) // 2, block.shape[1] // 2
    ordered = np.partition(block, (low, high) if low < high else low, axis=1)
    return (ordered[:, low] + ordered[:, high]) / 2


def _scales(away: np.ndarray) -> np.ndarray:
    """Robust standard deviation of each row of deviations (parts, rows), from a hundred or so of them."""
    some = away[:, :: max(1, away.shape[1] // 100)]
    scale = 1.4826 * np.median(some, axis=1)
    return np.where(scale > 0, scale, 1.2533 * some.mean(1))
