"""Where a curve changes its level, and into which phases the curves of a run fall."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from intaglio.history.curves import POINTS, Curve
from intaglio.history.series import Series

FEWEST = 8
"""Finite rows below which neither change points nor phases are looked for."""
SEGMENTED, MOST_CUTS, JUMP = 256, 8, 0.1
"""Points that are cut into pieces, most cuts, and the share of the level or range that a change makes at least."""
STANDS_OUT = 5.0
"""Times that lines beside a change of level miss each other by, of what they do elsewhere."""
PHASED, MOST_PHASES = 128, 5
"""Points of the common axis on which phases are looked for, and most phases."""


@dataclass(frozen=True)
class Phase:
    """Steps ``first`` to ``last`` in which the metrics of a run keep one course, and which."""

    first: int
    last: int
    what: str


def change_points(curve: Curve, start: int = 0) -> list[int]:
    """Rows after row ``start`` from which another level holds, few.

    At most SEGMENTED points are cut where lines fit best (``pieces``; lines, so that a slope is no staircase). Kept are
    the cuts where lines through h points before and after miss each other by a tenth of the level or the range, by
    half of what each line moves, and by STANDS_OUT times what they miss each other by elsewhere: slow noise wanders,
    but nowhere so much more than it does everywhere. The row is then found where two means fit the rows around best.
    """
    points = curve.even(start)
    y, rows = points.values, points.rows
    if len(y) > SEGMENTED:
        y, rows = y[: len(y) // 2 * 2].reshape(-1, 2).mean(1), rows[: len(y) // 2 * 2 : 2]
    k = len(y)
    if k < 2 * FEWEST:
        return []
    shortest = max(4, k // 32)
    scale = float(np.ptp(np.quantile(y, [0.02, 0.98])))
    noise = max(_noise(y), 0.01 * scale)
    cuts = _few(y[None] / (noise or 1.0), shortest, MOST_CUTS)
    seen = []
    for before, cut, after in zip([0, *cuts][: len(cuts)], cuts, [*cuts, k][1:], strict=True):
        h = min(cut - before, after - cut, max(4, k // 8))
        misses = np.abs(_misses(y, h))
        cut += int(np.nanargmax(misses[cut - h // 2 : cut + h // 2 + 1])) - h // 2
        seen.append((float(misses[cut]), cut, h, misses))
    found: list[int] = []
    for missed, cut, h, misses in sorted(seen, key=lambda one: -one[0]):
        elsewhere = misses.copy()
        for other in (cut, *found):
            elsewhere[max(0, other - h + 1) : other + h] = np.nan
        usual = max(_usual(elsewhere[max(0, cut - 5 * h) : cut + 5 * h]), _usual(elsewhere))
        moved = max(abs(_line_end(part) - _line_end(part[::-1])) for part in (y[cut - h : cut], y[cut : cut + h]))
        least = max(STANDS_OUT * usual, moved / 2, 3 * noise, JUMP * min(scale, abs(float(y[cut]))))
        if missed > least and all(abs(other - cut) >= shortest for other in found):
            found.append(cut)
    found.sort()
    if len(curve) <= POINTS:
        return [int(rows[cut]) for cut in found]
    edges = np.append(rows, len(curve))
    return [_split(curve.values, int(edges[max(0, cut - 2)]), int(edges[min(k, cut + 2)])) for cut in found]


def phases(series: Mapping[str, Series]) -> tuple[Phase, ...]:
    """The course of a run in a few stretches, found by all its losses together, or all metrics where there is no loss.

    Each curve that lasts at least half as long as the longest is put on PHASED common points and divided by its noise;
    the best division into lines (``pieces``) is common to all. A stretch is named by how fast the metrics go: the
    median, over metrics, of the change in it over their whole range, per share of the run. Neighbours of one name are
    one phase.
    """
    chosen = {n: s for n, s in series.items() if _is_loss(n)} or series
    curves = [c for s in chosen.values() if len(c := Curve.of(s)) >= 2 * FEWEST and c.steps[-1] > c.steps[0]]
    if not curves:
        return ()
    longest = max(float(np.ptp(c.steps)) for c in curves)
    curves = [c for c in curves if np.ptp(c.steps) > 0.5 * longest]
    first, last = max(float(c.steps[0]) for c in curves), min(float(c.steps[-1]) for c in curves)
    if last <= first:
        return ()
    k = min(PHASED, max(len(c) for c in curves))
    t = np.linspace(first, last, k)
    y = np.stack([np.interp(t, c.points.steps, c.points.values) for c in curves])
    scale = np.ptp(y, axis=1)
    y, scale = y[scale > 0], scale[scale > 0]
    shortest = max(3, k // 32)
    noise = np.array([max(_noise(row), 0.02 * size) for row, size in zip(y, scale, strict=True)])
    if not len(y):
        return (Phase(int(first), int(last), "flat"),)
    cuts = _few(y / noise[:, None], shortest, MOST_PHASES - 1)
    told: list[tuple[int, str]] = []
    for a, b in pairwise([0, *cuts, k]):
        moved = np.array([_line_end(row[a:b]) - _line_end(row[a:b][::-1]) for row in y])
        errors = noise * 4 / math.sqrt(b - a)
        moved = np.where(np.abs(moved) > errors, moved, 0) / scale
        what = _course(float(np.median(moved)), (b - a) / k, falls=chosen is not series)
        if not told or told[-1][1] != what:
            told.append((a, what))
    edges = [int(t[a]) for a, _ in told] + [int(last)]
    return tuple(Phase(a, b, what) for (a, b), (_, what) in zip(pairwise(edges), told, strict=True))


def pieces(y: np.ndarray, penalty: float, shortest: int, order: int) -> list[int]:
    """Where to cut curves y (m, k) of one axis so that a constant (order 0) or line (1) for each piece fits best.

    The least Σ squared errors + penalty · number of pieces over all divisions into pieces of at least ``shortest``
    points: optimal partitioning (Jackson et al. 2005, eq. 4), whose optimum PELT (Killick et al. 2012) finds with
    pruning; k ≤ some 300 needs none. Returns the first points of all pieces but the first.
    """
    k = y.shape[1]
    if k < 2 * shortest:
        return []
    cost = _costs(y, order)
    best, cut = np.full(k + 1, np.inf), np.zeros(k + 1, int)
    best[0] = -penalty
    for end in range(shortest, k + 1):
        total = best[: end - shortest + 1] + cost[: end - shortest + 1, end]
        cut[end] = int(total.argmin())
        best[end] = total[cut[end]] + penalty
    cuts, end = [], k
    while cut[end]:
        end = int(cut[end])
        cuts.append(end)
    return cuts[::-1]


def _costs(y: np.ndarray, order: int) -> np.ndarray:
    """Squared error of the best constant or line through points i … j − 1, summed over curves: (k + 1, k + 1)."""
    k = y.shape[1]
    y = y - y.mean(1, keepdims=True)

    def between(x: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(x)])
        return total[None, :] - total[:, None]

    u = np.linspace(-1, 1, k)
    n, su = np.maximum(between(np.ones(k)), 1), between(u)
    spread = np.maximum(between(u * u) - su**2 / n, 1e-12)
    cost = np.zeros((k + 1, k + 1))
    for row in y:
        sy = between(row)
        line = (between(u * row) - su * sy / n) ** 2 / spread if order else 0.0
        cost += np.maximum(between(row * row) - sy**2 / n - line, 0)
    return cost


def _few(y: np.ndarray, shortest: int, most: int) -> list[int]:
    """``pieces`` of curves (m, k) of unit noise, at a price per piece that leaves at most so many cuts."""
    penalty = (2 + 2 * len(y)) * math.log(y.shape[1])
    while len(cuts := pieces(y, penalty, shortest, 1)) > most:
        penalty *= 2
    return cuts


def _noise(y: np.ndarray) -> float:
    """Standard deviation of a point around the curve, from second differences (Gasser et al. 1986, eq. 1), robust."""
    return 0.6053 * float(np.median(np.abs(np.diff(y, 2)))) if len(y) > 4 else 0.0


def _misses(y: np.ndarray, h: int) -> np.ndarray:
    """By how much lines through the h points before each point and the h from it on miss each other midway: (k,).

    NaN for the first h and the last h − 1 points.
    """
    u = np.arange(h) - (h - 1) / 2
    after = 1 / h - u * (h / 2) / (u @ u)  # the line's value half a step before its first point
    missed = np.full(len(y), np.nan)
    missed[h : len(y) - h + 1] = np.correlate(y, np.concatenate([-after[::-1], after]), "valid")
    return missed


def _usual(misses: np.ndarray) -> float:
    """Robust standard deviation of those that are known, 0 if fewer than four are."""
    known = misses[np.isfinite(misses)]
    return 1.4826 * float(np.median(known)) if len(known) > 3 else 0.0


def _line_end(y: np.ndarray) -> float:
    """Value at the last point of the line that fits best."""
    u = np.arange(len(y)) - (len(y) - 1) / 2
    return float(y.mean() + (u @ y) / (u @ u) * u[-1])


def _split(x: np.ndarray, first: int, last: int) -> int:
    """The row within x[first:last] from which a second mean makes two means fit best."""
    part = x[first:last]
    n = np.arange(1, len(part))
    sums = np.cumsum(part - part.mean())[:-1]
    return first + 1 + int(np.argmax(sums**2 / (n * (len(part) - n))))


def _is_loss(name: str) -> bool:
    return "loss" in name.lower() and "weight" not in name.lower()


def _course(moved: float, share: float, falls: bool) -> str:
    """Words for a change, as a share of the range, in a share of the run."""
    speed = abs(moved) / share
    if speed < 0.1:
        return "flat"
    way = "moving" if not falls else "falling" if moved < 0 else "rising"
    return f"{way} fast" if speed > 2 else f"{way} slowly" if speed < 0.5 else way
