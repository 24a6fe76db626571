"""The picture of a sweep: what one metric costs in another."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from intaglio.reports.safe import drawn
from intaglio.reports.sheets import BLUE, COLOURS, GREY, PALE, layout, plotting, saved
from intaglio.reports.sweep import Arm, Study
from intaglio.reports.sweep_text import heading, short_name

NEAR = 0.03
"""Share of the picture within which points have one label."""


def trade(s: Study, path: Path) -> Path:
    """Each arm a point of the two metrics that the sweep's ``trade`` names, means over seeds with their intervals; arms
    that lack the first one are lines."""
    across, up = s.sweep.trade
    with plotting():
        figure = Figure(figsize=(8, 5), dpi=150, layout=layout())
        ax = figure.subplots()
        here = sorted((arm for arm in s.arms if _at(arm, across, up)), key=lambda arm: _at(arm, across, up)[0])
        points = np.array([_at(arm, across, up)[:2] for arm in here]).reshape(-1, 2)
        ax.plot(*points.T, color=PALE, linewidth=1, zorder=1)
        for arm, (x, y) in zip(here, points, strict=True):
            (xs, ys) = ([arm.cells[name].reading] for name in (across, up))
            for r, horizontal in ((xs[0], True), (ys[0], False)):
                if r is not None and r.low is not None and r.high is not None:
                    ends = (r.low, r.high)
                    ax.plot(ends if horizontal else (x, x), (y, y) if horizontal else ends, color=BLUE, linewidth=2)
            ax.plot(x, y, "o", color=BLUE, markersize=7, zorder=3)
        for names, (x, y), left in _labels([arm.name for arm in here], points):
            told = drawn(", ".join(names), 60)
            side, offset = ("right", (-6, 9)) if left else ("left", (6, 9))
            ax.annotate(told, (x, y), offset, ha=side, textcoords="offset points", fontsize=9, parse_math=False)
        lines = [arm for arm in s.arms if arm not in here and arm.cells[up].reading is not None]
        for arm, colour in zip(lines, COLOURS[1:], strict=False):
            r = arm.cells[up].reading
            assert r is not None
            ax.axhline(
                r.value,
                color=colour,
                linestyle="--",
                linewidth=1.2,
                label=f"{drawn(arm.name, 30)}, without {short_name(across)}",
            )
        nulls = [r.null for arm in s.arms if (r := arm.cells[up].reading) is not None and r.null is not None]
        if nulls:
            ax.axhline(float(np.mean(nulls)), color=GREY, linestyle=":", linewidth=1.5, label="null")
        ax.set_xlabel(heading(s, across), parse_math=False)
        ax.set_ylabel(heading(s, up), parse_math=False)
        if lines or nulls:
            ax.legend(loc="best")
        told = f"{drawn(s.sweep.name, 40)}: what {short_name(up)} costs in {short_name(across)}"
        figure.suptitle(told, x=0.01, ha="left", size=13, weight="bold", parse_math=False)
        return saved(figure, path)


def _labels(names: Sequence[str], points: np.ndarray) -> Iterator[tuple[list[str], np.ndarray, bool]]:
    """The names of points that all but coincide, where they stand, and whether there is more room to their left."""
    span = np.ptp(points, axis=0) if len(points) else np.ones(2)
    near = NEAR * np.where(span > 0, span, 1)
    left = list(range(len(names)))
    while left:
        first = points[left[0]]
        group = [k for k in left if (np.abs(points[k] - first) <= near).all()]
        left = [k for k in left if k not in group]
        yield [names[k] for k in group], first, bool(first[0] - points[:, 0].min() > 0.8 * span[0])


def _at(arm: Arm, across: str, up: str) -> tuple[float, ...]:
    """Its means of both, or nothing."""
    x, y = arm.cells[across].reading, arm.cells[up].reading
    return () if x is None or y is None else (x.value, y.value)
