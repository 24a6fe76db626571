"""What law a curve follows: constant, linear, exponential, cosine, step, inverse square root, each after a warm-up.

Shapes: k points of a curve, u their steps as a share of its span, y their values, w their weights (they sum to 1).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.history.changes import pieces
from intaglio.history.curves import Curve
from intaglio.history.series import Series

FEWEST = 8
"""Finite rows below which no law is looked for."""
ROUNDING = 1e-6
"""Relative error that a number in a log has anyway: six digits, or float32."""
SYSTEMATIC, MISSES, CLOSE = 0.7, 8.0, 0.03
"""Misses that correlate so much over a 25th of the curve, or are so many times what neighbours differ by, may be that
share of its range or size at most."""
NOISY = 0.01
"""Share of the range that the noise of a curve may be for a warm-up to be looked for."""
CUTS, SAME_RATIO = 20, 0.02
"""Most drops of a step law, and the relative error within which their ratios are equal."""
TIE = 2.0
"""Difference of two scores up to which the simpler law is taken (Kass & Raftery 1995: not worth a mention)."""
IN_ITS_UNIT = ("value", "start", "end", "floor", "warmup_from")
"""Parameters in the unit of the curve; the others are steps, or a ratio."""
WARMED = " after a linear warm-up"


@dataclass(frozen=True)
class Family:
    """The law that fits a curve best.

    ``parameters`` are by name, in steps and in the unit of the curve. ``r2`` is the share of the variance explained (1
    for an exact constant), ``error`` the root mean square of what is left over that of the curve. ``next_best`` is the
    law of another name that comes next, and ``said`` a sentence for people.
    """

    name: str
    parameters: Mapping[str, float]
    r2: float
    error: float
    next_best: str
    next_error: float
    said: str


@dataclass(frozen=True)
class _Law:
    """One law fitted: its value at each point (k,), how many numbers were free, and what it is in words."""

    name: str
    fitted: np.ndarray
    free: int
    parameters: dict[str, float]
    said: str

    @property
    def base(self) -> str:
        return self.name.removesuffix(WARMED)


@dataclass(frozen=True)
class _Shape:
    """A law y = floor + size · phi(u, theta, u₀), with theta searched over ``grid`` (g,); phi gives (g, k).

    With a floor, theta is worth at least so many ``rows``: else it tells of one or two alone.
    """

    name: str
    phi: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    grid: np.ndarray
    floored: tuple[bool, ...]
    rows: float


def _exponential(u: np.ndarray, theta: np.ndarray, begin: float) -> np.ndarray:
    return np.exp(-u / theta[:, None] - np.maximum(0, -1 / theta[:, None]))


def _cosine(u: np.ndarray, theta: np.ndarray, begin: float) -> np.ndarray:
    """Loshchilov & Hutter 2017, eq. 5: half a period, then the floor."""
    return 0.5 * (1 + np.cos(np.pi * np.clip((u - begin) / theta[:, None], 0, 1)))


def _inverse_root(u: np.ndarray, theta: np.ndarray, begin: float) -> np.ndarray:
    """Vaswani et al. 2017, eq. 3, after its warm-up, shifted."""
    return 1 / np.sqrt(1 + (u - begin).clip(0) / theta[:, None])


_DECAYS = np.geomspace(1e-3, 20, 30)
SHAPES = (
    _Shape("exponential", _exponential, np.concatenate([-_DECAYS[10:][::-1], _DECAYS]), (False, True), 1.5),
    _Shape("cosine", _cosine, np.geomspace(0.2, 8, 24), (True,), 5.0),
    _Shape("inverse square root", _inverse_root, np.geomspace(1e-6, 100, 40), (False, True), 0.2),
)


def fit(series: Series) -> Family | None:
    """The law of a series, or None where none fits, or fewer than 8 rows are finite; of two that tie, the simpler.

    Each is fitted by weighted least squares, its one parameter that is not linear by variable projection (Golub &
    Pereyra 1973). They compete by n ln(SSE / n) + k (ln n + 1), Bozdogan's stricter form (1987) of Schwarz's
    criterion, with n the number of independent errors: n (1 − r) / (1 + r) where those of the closest law have the
    lag-1 correlation r (Bayley & Hammersley 1946).
    """
    return fit_curve(Curve.of(series))


def fit_curve(curve: Curve) -> Family | None:
    """As ``fit``, of a curve that is at hand."""
    points = curve.points
    if len(points) < FEWEST or points.steps[-1] <= points.steps[0]:
        return None
    y, w = points.values, points.counts / points.counts.sum()
    laws = list(_laws(curve, w))
    size, spread = float(np.sqrt(w @ y**2)) or 1.0, float(np.ptp(y))
    errors = np.sqrt([w @ (y - law.fitted) ** 2 for law in laws])
    free = np.array([law.free for law in laws])
    r = _correlation(y - laws[int(errors.argmin())].fitted, w, 1)
    r = min(0.95, r + (1 + 3 * r) / len(y))  # it is found too small by so much: Marriott & Pope 1954
    n = max(4.0, len(y) * (1 - r) / (1 + r))
    score = 2 * n * np.log(np.maximum(errors, ROUNDING * size)) + (np.log(n) + 1) * free
    order = np.argsort(score, kind="stable")
    best = int(np.lexsort((score, np.arange(len(laws)), free, score > score[order[0]] + TIE))[0])
    law, error = laws[best], float(errors[best])
    far = _correlation(y - law.fitted, w, max(1, len(y) // 25)) > SYSTEMATIC
    noise = 1.0484 * float(np.median(np.abs(np.diff(y))))
    if error > CLOSE * max(spread, size) and (far or error > MISSES * noise):
        return None
    second = int(next(k for k in order if laws[k].base != law.base))
    total = float(np.sqrt(w @ (y - w @ y) ** 2))
    return Family(
        law.name,
        {k: v * curve.unit if k in IN_ITS_UNIT else v for k, v in law.parameters.items()},
        1 - (error / total) ** 2 if total > ROUNDING * size else 1.0,
        error / size,
        laws[second].name,
        float(errors[second]) / size,
        _said(law, error / size, laws[second].name, float(errors[second]) / size, points.steps, y, w, curve.unit),
    )


def _laws(curve: Curve, w: np.ndarray) -> Iterator[_Law]:
    t, y = curve.points.steps, curve.points.values
    begin, span = float(t[0]), float(t[-1] - t[0])
    u = (t - begin) / span
    # A schedule starts at step 0 or at the row before the first, if the first row is not its start.
    starts = {0.0, -float(u[1])} | ({-begin / span} if 0 < begin <= 0.05 * span else set())
    plain = list(_plain(curve, u, y, w, sorted(starts)))
    yield from plain
    bends = np.abs(np.diff(y, 2))
    if any(_exact(law, y, w) for law in plain) or 0.6053 * float(np.median(bends)) > NOISY * float(np.ptp(y)):
        return
    highest = int(np.argmax(y >= y.max() - 1e-6 * np.ptp(y)))
    for peak in dict.fromkeys((highest, highest + 1, int(np.argmax(y >= y.max() - 0.02 * np.ptp(y))))):
        if 1 <= peak <= len(y) - 5 and y[peak] - y[0] > 0.05 * np.ptp(y):
            warmed = list(_warmed(curve, u, y, w, peak))
            yield from warmed
            if any(_exact(law, y, w) for law in warmed):
                return


def _plain(curve: Curve, u: np.ndarray, y: np.ndarray, w: np.ndarray, starts: list[float]) -> Iterator[_Law]:
    """All laws without a warm-up, of the points from which a curve follows them; ``starts`` are tried as u₀."""
    w = w / w.sum()
    span = float(np.ptp(curve.points.steps))
    level = float(w @ y)
    yield _Law("constant", np.full(len(y), level), 1, {"value": level}, f"constant at {_n(level * curve.unit)}")
    slope = float(w @ ((u - w @ u) * y) / (w @ (u - w @ u) ** 2))
    line = level + slope * (u - w @ u)
    yield _Law("linear", line, 2, {"start": float(line[0]), "end": float(line[-1])}, "")
    for shape in SHAPES:
        for floored in shape.floored:
            tries = (_searched(shape, floored, s, u, y, w) for s in (starts if shape.name == "cosine" else starts[-1:]))
            _, theta, floor, fitted = min(tries, key=lambda found: found[0])
            if floored and abs(theta) < shape.rows * (u[1] - u[0]):
                continue
            more = {"floor": floor} if floored else {}
            scale = {"exponential": "half_life", "cosine": "over", "inverse square root": "shift"}[shape.name]
            length = theta * span * (math.log(2) if shape.name == "exponential" else 1)
            ends = {"start": float(fitted[0]), "end": float(fitted[-1])}
            yield _Law(shape.name, fitted, 2 + floored, ends | {scale: length} | more, "")
    if (steps := _stepped(curve, y, w)) is not None:
        yield steps


def _searched(
    shape: _Shape, floored: bool, begin: float, u: np.ndarray, y: np.ndarray, w: np.ndarray
) -> tuple[float, float, float, np.ndarray]:
    """Squared error, theta, floor and fitted values of the best law of a shape: grid, two zooms, Gauss–Newton."""

    def solved(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        phi = shape.phi(u, theta, begin)
        mean = (phi @ w if floored else np.zeros(len(theta)))[:, None]
        level = float(w @ y) if floored else 0.0
        centred = phi - mean
        size = centred @ (w * (y - level)) / np.maximum(centred**2 @ w, 1e-300)
        fitted = level + size[:, None] * centred
        return (y - fitted) ** 2 @ w, size, level - size * mean[:, 0], fitted

    grid = shape.grid[np.abs(shape.grid) * len(u) > 1] if shape.name == "exponential" else shape.grid
    for _ in range(3):
        errors, sizes, floors, fits = solved(grid)
        best = int(errors.argmin())
        low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
        found = float(errors[best]), float(grid[best]), float(floors[best]), fits[best]
        size = float(sizes[best])
        grid = np.geomspace(low, high, 12) if low * high > 0 else grid[best : best + 1]
    root = np.sqrt(w)
    for _ in range(6):
        error, theta, _, fitted = found
        phi = shape.phi(u, theta * np.array([1 - 1e-5, 1, 1 + 1e-5]), begin)
        columns = [phi[1], size * (phi[2] - phi[0]) / 2e-5, *([np.ones(len(u))] if floored else [])]
        jacobian = np.stack(columns, 1) * root[:, None]
        if not np.isfinite(jacobian).all():
            break
        move = np.linalg.lstsq(jacobian, root * (y - fitted), rcond=None)[0][1]
        errors, sizes, floors, fits = solved(np.array([theta * np.exp(np.clip(move, -0.3, 0.3))]))
        if not errors[0] < error * (1 - 1e-9):
            break
        found = float(errors[0]), theta * float(np.exp(np.clip(move, -0.3, 0.3))), float(floors[0]), fits[0]
        size = float(sizes[0])
    return found


def _stepped(curve: Curve, y: np.ndarray, w: np.ndarray) -> _Law | None:
    """Levels that follow each other by one ratio; None where there are none.

    Cut where constants fit the logarithm best, and if they show no such levels there, the values, whose noise may be
    the same at all levels.
    """
    for scaled in ([np.log(y)] if y.min() > 0 else []) + [y]:
        jumps = np.abs(np.diff(scaled))
        noise = max(1.0484 * float(np.median(jumps)), 1e-4 * float(np.ptp(scaled)))
        far = jumps > 5 * noise
        between = np.append(far, False) & np.insert(far, 0, False)  # a point with rows of both sides of a drop
        kept = np.flatnonzero(~between & (w > 0.3 * w.max()))
        if not 1 <= far.sum() <= 2 * CUTS or len(kept) < FEWEST:
            continue
        penalty = 5 * np.log(len(kept)) * noise**2
        cuts = [int(kept[c]) for c in pieces(scaled[None, kept], penalty, 2 if len(kept) < 60 else 4, 0)]
        if 1 <= len(cuts) <= CUTS and (law := _levels(curve, y, w, cuts)):
            return law
    return None


def _levels(curve: Curve, y: np.ndarray, w: np.ndarray, cuts: list[int]) -> _Law | None:
    """The step law with drops at points ``cuts``, or None where their ratios are not equal within their errors."""
    parts = np.split(y, cuts)
    means = np.array([np.median(part) for part in parts])
    errors = np.array([1.2533 * np.std(part) / np.sqrt(len(part)) for part in parts])
    if means.min() <= 0 or means[:-1] @ means[:-1] == 0:
        return None
    ratio = float(means[1:] @ means[:-1] / (means[:-1] @ means[:-1]))
    misses = np.abs(means[1:] - ratio * means[:-1])
    if (misses > SAME_RATIO * means[1:] + 3 * np.hypot(errors[1:], ratio * errors[:-1])).any() or abs(ratio - 1) < 0.02:
        return None
    powers = ratio ** np.arange(len(means))
    start = float(means @ powers / (powers @ powers))
    fitted = start * powers[np.searchsorted(cuts, np.arange(len(y)), "right")]
    if len(curve) > len(curve.bins):
        beside = np.array([*cuts, *(cut - 1 for cut in cuts)])  # their rows may lie on both sides of a drop
        fitted[beside] = y[beside]
    offset = len(curve.points) - len(y)
    at = [_crossing(curve, offset + cut, start * float(ratio**k * np.sqrt(ratio))) for k, cut in enumerate(cuts)]
    given = {"start": start, "end": start * float(powers[-1]), "ratio": ratio}
    told = f"step from {_n(start * curve.unit)} to {_n(start * powers[-1] * curve.unit)}, times {ratio:.4g} at "
    told += ("steps " if len(at) > 1 else "step ") + ", ".join(f"{step:,.0f}" for step in at)
    return _Law("step", fitted, 2 + len(cuts), given | {f"at_{k}": step for k, step in enumerate(at, 1)}, told)


def _crossing(curve: Curve, point: int, value: float) -> float:
    """The step of the first row that is on the other side of ``value`` than the point before ``point``."""
    points = curve.points
    before = max(0, point - 2)
    first, last = int(points.rows[before]), int(points.rows[point] + points.counts[point])
    part = curve.values[first:last] > value
    return float(curve.steps[first + int(np.argmax(part != (points.values[before] > value)))])


def _warmed(curve: Curve, u: np.ndarray, y: np.ndarray, w: np.ndarray, peak: int) -> Iterator[_Law]:
    """A line up to about point ``peak``, where it meets the law that all the rest follows."""
    single = len(curve) <= len(curve.bins)
    ramp = slice(0, peak if single or peak < 3 else peak - 1)
    rest = slice(peak if single else peak + 1, len(y))
    x, v = (u[: peak + 1], y[: peak + 1]) if peak == 1 else (u[ramp], y[ramp])
    if x[0] == x[-1] or u[rest][0] == u[rest][1]:
        return
    slope = float(((x - x.mean()) @ (v - v.mean())) / ((x - x.mean()) @ (x - x.mean())))
    rise, missed = y[peak] - y[0], np.abs(v - v.mean() - slope * (x - x.mean())).max()
    if missed > 0.02 * rise or slope * (u[peak] - u[0]) < 0.5 * rise:
        return
    first, span = float(curve.points.steps[0]), float(np.ptp(curve.points.steps))
    line = v.mean() + slope * (u - x.mean())
    low, high = float(u[max(0, peak - 2)]), float(u[peak])
    meet = float(np.clip((y[rest].max() - v.mean()) / slope + x.mean(), low, high))
    begin = float(line[0]) if abs(line[0]) > 1e-9 * y[peak] else 0.0
    for law in _plain(curve, u[rest], y[rest], w[rest], sorted({meet, high})):
        fitted = np.concatenate([line[: rest.start], law.fitted])
        if peak == 1 and (law.base == "constant" or np.abs(y - fitted).max() > 0.01 * y[peak]):
            continue  # one row that differs is no ramp
        if not single:
            fitted[peak - 1 : peak + 1] = y[peak - 1 : peak + 1]  # their rows lie on both sides of the bend
        falls = (law.fitted[1] - law.fitted[0]) / (u[rest][1] - u[rest][0])
        over = v.mean() + slope * (u[rest][0] - x.mean()) - law.fitted[0]
        end = first + span * float(np.clip(u[rest][0] - over / (slope - falls), low, high))
        more = {"warmup": end, "warmup_from": begin}
        yield _Law(law.name + WARMED, fitted, law.free + 2, law.parameters | more, law.said)


def _exact(law: _Law, y: np.ndarray, w: np.ndarray) -> bool:
    return bool(w @ (y - law.fitted) ** 2 <= ROUNDING**2 * (w @ y**2))


def _correlation(errors: np.ndarray, w: np.ndarray, lag: int) -> float:
    """Of each error with the one ``lag`` points on, within 0 and .95."""
    e = np.sqrt(w) * errors
    power = float(e @ e)
    return float(np.clip(e[lag:] @ e[:-lag] / power, 0, 0.95)) if power > 0 else 0.0


def _n(x: float) -> str:
    return f"{x:.4g}"


def _said(
    law: _Law, error: float, other: str, other_error: float, t: np.ndarray, y: np.ndarray, w: np.ndarray, unit: float
) -> str:
    """One sentence: the law in numbers, how far off it is, and what the next best one would have been."""
    p = law.parameters
    after = t >= p.get("warmup", t[0])
    t, y, w = t[after], y[after] * unit, w[after] / w[after].sum()
    said = law.said or f"{law.base} from {_n(y[0])} to {_n(y[-1])} over {t[-1] - t[0]:,.0f} steps"
    if law.base == "exponential":
        near, floor = p["half_life"] > 0, _n(p.get("floor", 0.0) * unit)
        said += f", its distance from {floor} {'halved' if near else 'doubled'} every {abs(p['half_life']):,.3g} steps"
    if law.base == "cosine" and abs(p["over"] - (t[-1] - t[0])) > 0.002 * p["over"]:
        said += f" (of the {p['over']:,.0f} of half a period)"
    if "warmup" in p:
        said += f", after a linear warm-up from {_n(p['warmup_from'] * unit)} until step {p['warmup']:,.0f}"
    said += f"; off by {_percent(error)}" if error > 1e-5 else ", exactly"
    ends = sorted((float(y[0]), float(y[-1])))
    if law.base in ("cosine", "linear") and 0 < 3 * ends[0] < ends[1] and t[0] < t[-1] and error < 0.02:
        rival = float(w @ (y[0] * (y[-1] / y[0]) ** ((t - t[0]) / (t[-1] - t[0]))))
        return f"{said} (an exponential would have the mean {rival:.3g}, this has {w @ y:.3g})"
    return said if law.base == "constant" else f"{said} (next best: {other}, off by {_percent(other_error)})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:,.0f} %"
