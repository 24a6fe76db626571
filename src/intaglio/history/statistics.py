"""What the course of a metric is: its transient apart, trend, spikes, gaps, level changes, law; and phases of a run."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.polynomial.legendre import legvander

from intaglio.history.changes import Phase, change_points, phases
from intaglio.history.curves import Curve, thin
from intaglio.history.families import Family, fit_curve
from intaglio.history.series import Series

__all__ = ["Description", "Phase", "describe", "phases", "transient", "trend"]

FEWEST = 8
"""Finite rows below which no transient is looked for."""
LATEST = 1 / 5
"""Share of the rows by which a transient must have ended to be one."""
AWAY = 4.0
"""Settled standard deviations that some row of a transient is away from what follows; its median half of them."""
LEVEL, SHARE_OF_NOISE = 0.01, 0.1
"""Change over the settled part below which it is flat: a share of the level, and of the noise of a row."""
EXPLAINED, IN_ORDER, IN_ORDER_BY_LAW = 0.9, 0.85, 0.35
"""R² of a law that says which way a bent curve goes; Kendall's tau that says so alone, and beside such a law."""
MOST_GAPS = 100


@dataclass(frozen=True)
class Description:
    """The course of one metric; all numbers are NaN where too few rows are finite to tell them.

    ``low`` and ``high`` are its least and greatest value. ``transient`` is the step at which the start that differs
    from the rest has ended, None where there is none, and ``settled_*`` hold from there on. ``change`` is (last level −
    first) / |first|, a level being the median of a 200th of the rows (the first row alone where a transient starts
    with it), and ``change_in_transient`` the share of it before ``transient``. ``slope`` is per step, of the settled
    part, with the ends of its 95 % interval; ``rises`` says by it, and by its size, which way it goes. ``noise`` is
    the robust standard deviation of a settled row around its level. ``spikes`` are steps, ``gaps`` first and last
    steps of what is not finite, ``change_points`` steps from which another level holds.
    """

    rows: int
    finite: int
    first: float
    last: float
    mean: float
    std: float
    low: float
    high: float
    low_step: int
    high_step: int
    cv: float
    transient: int | None
    settled_mean: float
    settled_std: float
    settled_cv: float
    change: float
    change_in_transient: float
    slope: float
    slope_low: float
    slope_high: float
    rises: Literal["rising", "falling", "flat", "unclear"]
    noise: float
    spikes: tuple[int, ...]
    gaps: tuple[tuple[int, int], ...]
    change_points: tuple[int, ...]
    family: Family | None


def describe(series: Series) -> Description:
    """Everything of ``Description``, of any series; 1,000,000 rows take some 40 ms."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is left of numbers near the largest is inf
        return _described(series, Curve.of(series))


def _described(series: Series, curve: Curve) -> Description:
    gaps = _gaps(series)
    if not len(curve):
        nothing = dict.fromkeys(_NUMBERS, math.nan)
        return Description(
            len(series), 0, low_step=0, high_step=0, transient=None, rises="unclear", spikes=(), gaps=gaps,
            change_points=(), family=None, **nothing,
        )  # fmt: skip
    x, unit = curve.values, curve.unit
    start = transient(curve)
    settled = x[start:]
    mean, std = float(x.mean()), float(x.std())
    level, spread = (mean, std) if start == 0 else (float(settled.mean()), float(settled.std()))
    change, before = _change(curve, start)
    slope, low, high = trend(curve, start)
    noise, family = curve.noise(start), fit_curve(curve)
    lowest, highest = int(x.argmin()), int(x.argmax())
    return Description(
        rows=len(series),
        finite=len(curve),
        first=float(x[0]) * unit,
        last=float(x[-1]) * unit,
        mean=mean * unit,
        std=std * unit,
        low=float(x[lowest]) * unit,
        high=float(x[highest]) * unit,
        low_step=int(curve.steps[lowest]),
        high_step=int(curve.steps[highest]),
        cv=_ratio(std, mean),
        transient=int(curve.steps[start]) if start else None,
        settled_mean=level * unit,
        settled_std=spread * unit,
        settled_cv=_ratio(spread, level),
        change=change,
        change_in_transient=before,
        slope=slope * unit,
        slope_low=low * unit,
        slope_high=high * unit,
        rises=_direction(curve, start, slope, low, high, noise, family),
        noise=noise * unit,
        spikes=tuple(int(s) for s in curve.steps[curve.spikes]),
        gaps=gaps,
        change_points=tuple(int(curve.steps[row]) for row in change_points(curve, start)),
        family=family,
    )


_NUMBERS = (
    "first", "last", "mean", "std", "low", "high", "cv", "settled_mean", "settled_std", "settled_cv", "change",
    "change_in_transient", "slope", "slope_low", "slope_high", "noise",
)  # fmt: skip


def _ratio(spread: float, level: float) -> float:
    return spread / abs(level) if level else math.nan


def _gaps(series: Series) -> tuple[tuple[int, int], ...]:
    """First and last steps of stretches that are not finite, the longest hundred of them."""
    bad = ~np.isfinite(np.asarray(series.values, np.float64))
    if not bad.any():
        return ()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], bad.view(np.int8), [0]]))).reshape(-1, 2)
    longest = np.sort(np.argsort(edges[:, 0] - edges[:, 1], kind="stable")[:MOST_GAPS])
    return tuple((int(series.steps[a]), int(series.steps[b - 1])) for a, b in edges[longest])


def transient(curve: Curve) -> int:
    """The first row after the start that differs from the rest; 0 if there is none.

    White 1997 (MSER): the rows to cut are those whose loss makes the standard error of the mean of the rest least, Σ (y
    − ȳ)² / m² for m rows left. That is none where the least lies beyond a fifth of the rows: then the curve goes on
    changing, and a slow decay is no transient. Nor is it one whose rows are not far (AWAY) from what follows.
    """
    points = curve.points
    if len(points) < FEWEST:
        return 0
    noise = curve.noise() if len(curve) > len(points) else 0.0
    y, c = points.values - points.values[-1], points.counts
    left = np.cumsum(c[::-1])[::-1]
    mean = np.cumsum((c * y)[::-1])[::-1] / left
    power = np.maximum(np.cumsum((c * y * y)[::-1])[::-1] / left - mean**2, 0)
    variance = np.where(power > 1e-12 * power.max(), power, 0) + noise**2  # what is smaller is rounding
    error = np.where(left >= max(4, 0.05 * left[0]), variance / left, np.inf)
    cut = int(np.argmax(error <= error.min() * (1 + 1e-9)))
    if not cut or points.rows[cut] > LATEST * len(curve):
        return 0
    away = np.abs(y[:cut] - mean[cut])
    far = AWAY * math.sqrt(float(variance[cut])) + 1e-9 * float(np.abs(points.values).max())
    return int(points.rows[cut]) if away.max() > far and np.median(away) > far / 2 else 0


def _change(curve: Curve, start: int) -> tuple[float, float]:
    """Relative change from the first to the last level, and the share of it before row ``start``, both as described."""
    x, few = curve.values, max(1, min(101, len(curve) // 200))
    first = float(x[0]) if start else float(np.median(x[:few]))
    last = float(np.median(x[-few:]))
    if len(curve) < 2:
        return math.nan, math.nan
    before = math.nan
    if start and last != first:
        before = min(1.0, max(0.0, (float(np.median(x[start : start + few])) - first) / (last - first)))
    return ((last - first) / abs(first) if first else math.nan), before


def trend(curve: Curve, start: int = 0) -> tuple[float, float, float]:
    """Slope per step of the least-squares line from row ``start`` on, and its 95 % interval; NaN where unknown.

    The interval allows for autocorrelation without a model of it: the errors' variance at low frequencies is the mean
    square of their b projections on the orthonormal polynomials of degree 3, 4, …, and (estimate − slope) / error has
    Student's t with b degrees of freedom (Phillips 2005; Lazarus et al. 2018, eq. 10, with cosines). Degree 2 is left
    out, so that a bend is no noise. b = .4 n^⅔ (Lazarus et al.), less where neighbours correlate: their frequencies
    stay below a fifth of that at which an AR(1) process of that correlation has lost half of its power.
    """
    points = curve.even(start)
    t, y = points.steps, points.values
    n = len(points)
    if n < 2 or t[-1] <= t[0]:
        return math.nan, math.nan, math.nan
    centre, half = (t[-1] + t[0]) / 2, (t[-1] - t[0]) / 2
    u = (t - centre) / half
    most = min(int(0.4 * n ** (2 / 3)), n - 4)
    basis, r = np.linalg.qr(legvander(u, max(1, most + 2 if most > 0 else 1)))
    p = basis.T @ y
    slope = float(p[1] / r[1, 1]) / half
    if most < 1:
        return slope, math.nan, math.nan
    e = y - basis[:, :3] @ p[:3]
    power = float(e @ e)
    phi = float(e[1:] @ e[:-1]) / power if power > 0 else 0.0
    phi = min(0.99, max(0.0, phi + (3 + 5 * phi) / n))
    b = int(np.clip(0.2 * n * (1 - phi) / math.pi, 1, most))
    error = math.sqrt(float(np.mean(p[3 : 3 + b] ** 2))) / abs(float(r[1, 1])) / half
    return slope, slope - student(b) * error, slope + student(b) * error


def student(degrees: int) -> float:
    """The 97.5 % point of Student's t (Abramowitz & Stegun 1964, 26.7.5, and their table 26.10 up to 3)."""
    if degrees <= 3:
        return (12.7062, 4.3027, 3.1824)[degrees - 1]
    z, v = 1.959964, float(degrees)
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / v + g2 / v**2 + g3 / v**3 + g4 / v**4


def _in_order(y: np.ndarray) -> float:
    """Kendall's tau (1938) of the medians of the eighths of a curve, in −1 … 1; 0 below 6 points."""
    if len(y) < 6:
        return 0.0
    medians = np.array([np.median(part) for part in np.array_split(y, min(8, len(y)))])
    pairs = len(medians) * (len(medians) - 1) / 2
    return float(np.triu(np.sign(medians[None, :] - medians[:, None])).sum()) / pairs


def _direction(
    curve: Curve, start: int, slope: float, low: float, high: float, noise: float, family: Family | None
) -> Literal["rising", "falling", "flat", "unclear"]:
    """Which way, if the interval excludes 0 and the change counts; flat if even its ends do not, else unclear.

    A bent curve goes one way though no line shows it, if its eighths are in order: tau above IN_ORDER, or above
    IN_ORDER_BY_LAW where a law of that direction explains nine tenths of it.
    """
    if not math.isfinite(low):
        return "unclear"
    span = float(curve.steps[-1] - curve.steps[start])
    level, noise = abs(float(np.median(thin(curve.values[start:])))), 0.0 if math.isnan(noise) else noise
    if low > 0 or high < 0:
        if abs(slope) * span < max(LEVEL * level, SHARE_OF_NOISE * noise):
            return "flat"
        return "rising" if slope > 0 else "falling"
    order = _in_order(curve.even(start).values)
    law = family.parameters if family is not None and family.r2 > EXPLAINED and start == 0 else {}
    by_law = order * (law.get("end", 0) - law.get("start", 0)) > 0
    if abs(order) > (IN_ORDER_BY_LAW if by_law else IN_ORDER):
        return "rising" if order > 0 else "falling"
    return "flat" if max(-low, high) * span <= max(2 * LEVEL * level, noise) else "unclear"
