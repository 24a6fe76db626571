"""Charts as inline SVG: a bar against its null, and a loss curve. Colours come from the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean

from intaglio.history import Reading
from intaglio.reports.words import beats_null, written

Points = Sequence[tuple[int, float]]
"""(optimizer step, value) in the order of steps; a value may be NaN or infinite and leaves a gap."""

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 320, 190, 46, 10, 10, 34
MOST_POINTS = 240
LOG_FROM = 30
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""


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


def curve(name: str, unit: str, train: Points, val: Points, null: float | None) -> str:
    """A loss over optimizer steps: training thin, held out thick with dots, null dashed; log axis for wide ranges."""
    points = [(s, v) for s, v in (*train, *val) if math.isfinite(v)]
    if not points:
        return ""
    values = [v for _, v in points] + ([null] if null is not None else [])
    last_step = max(s for s, _ in points)
    logarithmic = min(values) > 0 and max(values) > LOG_FROM * min(values)
    y, ticks = _axis(min(values), max(values), logarithmic)

    def x(step: float) -> float:
        return LEFT + (WIDE - LEFT - RIGHT) * step / last_step

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y(t) + 3.5:.1f}" text-anchor="end">{_tick(t)}</text>'
        for t in ticks
    ]
    foot = HIGH - BOTTOM + 14
    parts += [
        f'<text x="{x(t):.1f}" y="{foot}" text-anchor="{"end" if t == last_step else "middle"}">{t:,.0f}</text>'
        for t in _step_ticks(last_step)
    ]
    parts += [f'<text class="unit" x="{(WIDE + LEFT) / 2}" y="{HIGH - 4}" text-anchor="middle">optimizer step</text>']
    if null is not None:
        parts += [f'<line class="null" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y(null):.1f}" y2="{y(null):.1f}"/>']
    parts += [_line("train", _thinned(train), x, y), _line("val", _thinned(val), x, y)]
    dots = val if len(val) <= 40 else val[-1:]
    parts += [f'<circle class="val" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.4"/>' for s, v in dots if math.isfinite(v)]
    told = "; ".join(filter(None, (_told("training", train), _told("held out", val))))
    scale = "logarithmic axis" if logarithmic else "linear axis"
    label = escape(f"{name}, {unit}, {scale}: {told}" + (f"; null {written(null)}" if null is not None else ""))
    return f'<svg class="curve" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axis(low: float, high: float, logarithmic: bool) -> tuple[Callable[[float], float], list[float]]:
    """Value → height in the picture, and where the ticks are."""
    room = HIGH - TOP - BOTTOM
    if logarithmic:
        a, b = math.log10(low) - 0.05, math.log10(high) + 0.05
        candidates = [m * 10.0**k for k in range(math.floor(a), math.ceil(b)) for m in (1, 3)]
        ticks = [tick for tick in candidates if a <= math.log10(tick) <= b]
        return lambda v: TOP + room * (b - math.log10(v)) / (b - a), ticks
    pad = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    bottom, top = (0.0 if 0 <= low < 0.4 * high else low - pad), high + pad
    step = _nice((top - bottom) / 4)
    first = math.ceil(bottom / step)
    ticks = [round(k * step, 12) for k in range(first, math.floor(top / step) + 1)]
    return lambda v: TOP + room * (top - v) / (top - bottom), ticks


def _tick(value: float) -> str:
    return f"{value:.4g}".replace("-", "−") if abs(value) < 1e5 else f"{value:.0e}"


def _nice(rough: float) -> float:
    """The smallest of 1, 2, 5 × 10ᵏ that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _step_ticks(last: int) -> list[float]:
    step = max(1.0, _nice(last / 3))
    return [*(k * step for k in range(math.ceil(last * 0.85 / step))), last]


def _thinned(points: Points) -> Points:
    """At most ``MOST_POINTS``, each the mean of its neighbours; what is not finite stays a gap."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[k : k + size] for k in range(0, len(points), size)] if points else []
    return [(group[-1][0], fmean(v for _, v in group)) for group in groups]


def _line(kind: str, points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    path, down = [], False
    for step, value in points:
        if math.isfinite(value):
            path.append(f"{'L' if down else 'M'}{x(step):.1f} {y(value):.1f}")
        down = math.isfinite(value)
    return f'<path class="{kind}" d="{"".join(path)}"/>' if path else ""


def _told(side: str, points: Points) -> str:
    if not points:
        return f"{side} not measured"
    (first, start), (last, end) = points[0], points[-1]
    return f"{side} {written(start)} at step {first}, {written(end)} at step {last}"
