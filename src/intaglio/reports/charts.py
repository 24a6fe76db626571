"""Charts as inline SVG: a bar against its null, and a curve. Colours come from the page's style sheet.

A curve is whole without a script. Its paths carry their steps and values, from which ``curves.js`` reads them out and
draws them anew, enlarged or on another axis.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from intaglio.history import Reading
from intaglio.history.series import Series
from intaglio.reports.safe import html
from intaglio.reports.words import beats_null, short, unit

Points = Sequence[tuple[int, float]]
"""(step, value) in the order of steps; a value may be NaN or infinite and leaves a gap."""

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 320, 190, 46, 10, 10, 34
LOG_FROM = 30
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""
LARGEST = 1e300
"""What is not below it is drawn as a gap, like what is not finite."""


@dataclass(frozen=True)
class Band:
    """Where the values are in which a rule has nothing to say: not below ``low``, not above ``high``."""

    low: float | None
    high: float | None
    rule: str


@dataclass(frozen=True)
class Curve:
    """One quantity over steps; ``better`` is +1 where more is better, −1 where less is, 0 where unknown.

    ``trend`` is a smooth line through the training points, ``bounds`` the ends of the held-out interval, ``sides`` what
    training and held-out points are called; without a held-out side the first may be anything. ``wide`` allows a
    logarithmic axis.
    """

    name: str
    unit: str
    train: Points = ()
    val: Points = ()
    null: float | None = None
    band: Band | None = None
    better: int = 0
    axis: str = "optimizer step"
    trend: Points = ()
    bounds: tuple[Points, Points] = ((), ())
    sides: tuple[str, str] = ("training", "held out")
    wide: bool = True


def bar(reading: Reading, better: int, unit: str) -> str:
    """A bar from 0 to the value, its interval as a whisker, its null as an upright line."""
    marks = [m for m in (reading.value, reading.null, reading.low, reading.high) if m is not None and math.isfinite(m)]
    if not math.isfinite(reading.value):
        return ""
    low = min(0.0, *marks)
    high = 1.0 if unit in ("%", "R²") else max(*marks, low + 1e-12) * 1.06

    def x(value: float) -> str:
        return f"{2 + 156 * (value - low) / (high - low):.1f}"

    beats = beats_null(reading, better)
    kind = {True: "good", False: "bad", None: "plain"}[beats]
    left, right = sorted((0.0, reading.value))
    parts = [f'<line class="base" x1="{x(0)}" x2="{x(0)}" y1="2" y2="22"/>']
    parts += [f'<rect class="{kind}" x="{x(left)}" y="7" width="{float(x(right)) - float(x(left)):.1f}" height="10"/>']
    if reading.low is not None and reading.high is not None:
        parts += [f'<line class="whisker" x1="{x(reading.low)}" x2="{x(reading.high)}" y1="12" y2="12"/>']
    if reading.null is not None and math.isfinite(reading.null):
        parts += [f'<line class="null" x1="{x(reading.null)}" x2="{x(reading.null)}" y1="1" y2="23"/>']
    told = {True: "better than its null", False: "not better than its null", None: "no null to compare with"}[beats]
    frame = 'class="bar" viewBox="0 0 160 24" preserveAspectRatio="xMinYMid" role="img"'
    return f'<svg {frame} aria-label="{told}">{"".join(parts)}</svg>'


def curve(c: Curve) -> str:
    """Training thin, held out thick with dots, null dashed and what is worse shaded; a log axis for wide ranges."""
    points = [(s, v) for s, v in (*c.train, *c.val) if abs(v) < LARGEST]
    if not points:
        return ""
    values = [v for _, v in (*points, *c.bounds[0], *c.bounds[1]) if abs(v) < LARGEST]
    low, high = min(values), max(values)
    null = c.null if c.null is not None and _near(c.null, low, high) else None
    limits = [x for x in (c.band.low, c.band.high) if x is not None and _near(x, low, high)] if c.band else []
    framed = [low, high, *limits, *([] if null is None else [null])]
    first, last = min(s for s, _ in points), max(s for s, _ in points)
    first = 0 if 0 <= first < 0.1 * last else first
    logarithmic = c.wide and min(framed) > 0 and max(framed) > LOG_FROM * min(framed)
    y, ticks = _axis(min(framed), max(framed), logarithmic)

    def x(step: float) -> float:
        return LEFT + (WIDE - LEFT - RIGHT) * (step - first) / max(last - first, 1e-9)

    parts = [_shade("band", y, c.band.low, c.band.high)] if c.band else []
    if null is not None and c.better:
        parts += [_shade("worse", y, None, null) if c.better > 0 else _shade("worse", y, null, None)]
    grid = (
        f'<line x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y(t) + 3.5:.1f}" text-anchor="end">{_tick(t)}</text>'
        for t in ticks
    )
    foot = HIGH - BOTTOM + 14
    steps = (
        f'<text x="{x(t):.1f}" y="{foot}" text-anchor="{"end" if t == last else "middle"}">{t:,.0f}</text>'
        for t in _step_ticks(first, last)
    )
    parts += [f'<g class="grid">{"".join(grid)}{"".join(steps)}</g>']
    parts += [f'<text class="axis" x="{(WIDE + LEFT) / 2}" y="{HIGH - 4}" text-anchor="middle">{html(c.axis)}</text>']
    if null is not None:
        ends = f'x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y(null):.1f}" y2="{y(null):.1f}"'
        parts += [f'<line class="null" {ends} data-v="{null:.4g}"/>']
    thin = "train" if c.sides[0] == "training" else "only"
    lines = ((thin, c.sides[0], c.train), ("trend", "median around", c.trend), ("val", c.sides[1], c.val))
    parts += [_line("bound", "", bound, x, y) for bound in c.bounds]
    parts += [_line(kind, side, line, x, y) for kind, side, line in lines]
    for kind, line in ((thin, c.train), ("val", c.val)):
        dots = line if len(line) <= 40 and kind != "train" else line[-1:]
        parts += [
            f'<circle class="{kind}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.4"/>' for s, v in dots if abs(v) < LARGEST
        ]
    scale = "logarithmic axis" if logarithmic else "linear axis"
    told = "; ".join(_told(side, line, c.axis) for side, line in zip(c.sides, (c.train, c.val), strict=True) if line)
    label = html(f"{c.name}, {c.unit}, {scale}: {told}" + (f"; null {short(c.null)}" if c.null is not None else ""))
    frame = f'class="curve" viewBox="0 0 {WIDE} {HIGH}" data-first="{first}" data-last="{last}"'
    return f'<svg {frame} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def thinned(s: Series, most: int) -> Series:
    """At most ``most`` rows: of each stretch its least and its greatest value, and one that is not finite, if any.

    First and last row stay.
    """
    n = len(s)
    if n <= most:
        return s
    bad = ~np.isfinite(s.values)
    stretches = max(1, (most - 2) // (3 if bad.any() else 2))
    width = math.ceil(n / stretches)
    filler = np.full(stretches * width - n, np.nan)
    framed = np.concatenate([s.values.astype(float), filler]).reshape(stretches, width)
    start = np.arange(stretches) * width
    finite = np.isfinite(framed)
    some = finite.any(1)
    low = (start + np.where(finite, framed, np.inf).argmin(1))[some]
    high = (start + np.where(finite, framed, -np.inf).argmax(1))[some]
    gaps = np.concatenate([bad, np.zeros(len(filler), bool)]).reshape(stretches, width)
    gap = (start + gaps.argmax(1))[gaps.any(1)]
    return s.at(np.unique(np.concatenate([[0, n - 1], low, high, gap])))


def smooth(s: Series, most: int = 60) -> Series:
    """The median of each of at most ``most`` stretches, at the step in its middle; empty for short or gapless noise."""
    finite = s.at(np.isfinite(s.values))
    width = len(finite) // most
    if width < 3:
        return s.at(np.zeros(0, int))
    rows = width * (len(finite) // width)
    middle = np.median(finite.values[:rows].reshape(-1, width), axis=1)
    return Series.of(finite.steps[width // 2 : rows : width], middle)


def points(s: Series) -> Points:
    """Its rows as pairs."""
    return list(zip(s.steps.tolist(), s.values.tolist(), strict=True))


def _near(mark: float, low: float, high: float) -> bool:
    """Whether a mark can be shown without making the curve flat: the frame grows fourfold at most."""
    room = 3 * (high - low) or abs(high) or 1.0
    by_size = low > 0 and mark > 0 and low / 30 <= mark <= 30 * high
    return math.isfinite(mark) and (low - room <= mark <= high + room or by_size)


def _shade(css: str, y: Callable[[float], float], low: float | None, high: float | None) -> str:
    """The part of the frame between two values; None is the frame's edge."""

    def edge(value: float | None, otherwise: float) -> float:
        if value is None:
            return otherwise
        try:
            return min(max(y(value), TOP), HIGH - BOTTOM)
        except ValueError:  # no logarithm
            return HIGH - BOTTOM

    top, bottom = edge(high, TOP), edge(low, HIGH - BOTTOM)
    limits = "".join(f' data-{k}="{v:.4g}"' for k, v in (("low", low), ("high", high)) if v is not None)
    size = f'width="{WIDE - LEFT - RIGHT}" height="{max(bottom - top, 0):.1f}"'
    return f'<rect class="{css}" x="{LEFT}" y="{top:.1f}" {size}{limits}/>'


def _axis(low: float, high: float, logarithmic: bool) -> tuple[Callable[[float], float], list[float]]:
    """Value → height in the picture, and where the ticks are."""
    room = HIGH - TOP - BOTTOM
    if logarithmic:
        a, b = math.log10(low) - 0.05, math.log10(high) + 0.05
        decades = max(1, round((b - a) / 5))
        marks = (1, 3) if decades == 1 and b - a < 3 else (1,)
        candidates = [m * 10.0**k for k in range(math.floor(a), math.ceil(b), decades) for m in marks]
        ticks = [tick for tick in candidates if a <= math.log10(tick) <= b]
        return lambda v: TOP + room * (b - math.log10(v)) / (b - a), ticks
    pad = 0.05 * (high - low) if high - low > 1e-12 * max(abs(high), abs(low), 1e-280) else 0.5 * abs(high) or 0.5
    bottom, top = (0.0 if 0 <= low < 0.4 * high else low - pad), high + pad
    step = _nice((top - bottom) / 4)
    first = math.ceil(bottom / step)
    ticks = [float(f"{k * step:.12g}") for k in range(first, math.floor(top / step) + 1)]
    return lambda v: TOP + room * (top - v) / (top - bottom), ticks


def _tick(value: float) -> str:
    return f"{value:.4g}".replace("-", "−") if abs(value) < 1e5 else f"{value:.0e}".replace("e+0", "e")


def _nice(rough: float) -> float:
    """The smallest of 1, 2, 5 × 10ᵏ that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _step_ticks(first: int, last: int) -> list[float]:
    span = last - first
    step = max(1.0, _nice(max(span, 1) / 3))
    below = (k * step for k in range(math.ceil(first / step), math.ceil((first + span * 0.85) / step)))
    return [*below, last]


def _line(kind: str, side: str, points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    path, down = [], False
    for step, value in points:
        there = abs(value) < LARGEST
        if there:
            path.append(f"{'L' if down else 'M'}{x(step):.1f} {y(value):.1f}")
        down = there
    if not path:
        return ""
    name = f' data-side="{html(side)}"' if side else ""
    return f'<path class="{kind}" d="{"".join(path)}"{name}{_data(points)}/>'


def _data(points: Points) -> str:
    """Steps as differences, a repeated one counted, and values with five digits: what a script draws anew from."""
    steps, before, runs = [s for s, _ in points], 0, list[list[int]]()
    for step in steps:
        if runs and runs[-1][0] == step - before:
            runs[-1][1] += 1
        else:
            runs.append([step - before, 1])
        before = step
    told = " ".join(f"{d}" if n == 1 else f"{d}*{n}" for d, n in runs)
    return f' data-s="{told}" data-v="{" ".join(f"{v:.5g}" for _, v in points)}"'


def _told(side: str, points: Points, axis: str) -> str:
    (first, start), (last, end) = points[0], points[-1]
    one = unit(axis, many=False)
    return f"{side} {short(start)} at {one} {first:,}, {short(end)} at {one} {last:,}"
