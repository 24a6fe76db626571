"""The sheet of trends: each metric with its fitted family, and what is correlated, with identities marked."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from intaglio.reports.analysis import Analysis
from intaglio.reports.charts import smooth
from intaglio.reports.safe import drawn, wrapped
from intaglio.reports.sheets import (
    BLACK,
    DPI,
    ORANGE,
    PALE,
    PURPLE,
    VERMILION,
    fit,
    frame,
    heading,
    layout,
    line,
    nothing,
    plotting,
    saved,
)
from intaglio.reports.words import change


def trend_panels(axes: Sequence[Axes], a: Analysis, names: Sequence[str]) -> None:
    """For each metric its rows, fitted family, transient (shaded), changes of level (dotted), and trend in words."""
    for ax, name in zip(axes, names, strict=False):
        s, d = a.series[name], a.descriptions[name]
        frame(ax, a, name, "value", s.values, "optimizer/rate" not in name)
        trend = smooth(s)
        line(ax, s, "", PALE if len(trend) else BLACK, 0.6 if len(trend) else 1.1)
        if len(trend):
            line(ax, trend, "", BLACK, 1.4)
        if d.family:
            fit(ax, s, d.family)
        if d.transient is not None:
            ax.axvspan(float(s.steps[0]), d.transient, color=ORANGE, alpha=0.15, linewidth=0)
        for step in d.change_points:
            ax.axvline(step, color=PURPLE, linestyle=":", linewidth=1.3)
        family = d.family.name if d.family else "no family fits"
        told = f"{d.rises}, level {change(d.change)}" if np.isfinite(d.change) else d.rises
        ax.set_xlabel(f"{drawn(a.axis, 40)}\n{drawn(f'{told}; {family}', 64)}", parse_math=False)


KEY = (
    Line2D([], [], color=PALE, linewidth=0.8, label="rows"),
    Line2D([], [], color=BLACK, linewidth=1.4, label="running median"),
    Line2D([], [], color=VERMILION, linewidth=1.4, linestyle=(0, (2, 2)), label="fitted family"),
    Patch(color=ORANGE, alpha=0.3, linewidth=0, label="transient"),
    Line2D([], [], color=PURPLE, linewidth=1.3, linestyle=":", label="change of level"),
)


def trends(a: Analysis, path: Path) -> Path:
    """Trends with their fitted families, and correlations with identities marked."""
    names = [n for n in a.main(9) if a.descriptions[n].finite > 1]
    columns = min(3, max(1, len(names)))
    rows = -(-len(names) // columns)
    tied = a.correlations is not None and len(a.correlations.names) > 1
    high, low = 3.9 * rows, 7.2 if tied else 3.4
    with plotting():
        figure = Figure(figsize=(14, high + low), dpi=DPI, layout=layout())
        heading(figure, a, "trends and correlations")
        below: FigureBase = figure
        if rows:
            parts = figure.subfigures(2, 1, height_ratios=[high, low])
            assert isinstance(parts, np.ndarray)
            above, below = parts
            axes = list(above.subplots(rows, columns, squeeze=False).flat)
            trend_panels(axes, a, names)
            above.legend(handles=KEY, loc="outside upper right", ncols=len(KEY))
            for ax in axes[len(names) :]:
                ax.set_axis_off()
        left, right = below.subplots(1, 2, width_ratios=[1.5, 1])
        _correlations(figure, left, a)
        _identities(right, a)
        return saved(figure, path)


def _correlations(figure: Figure, ax: Axes, a: Analysis) -> None:
    found = a.correlations
    if found is None or len(found.names) < 2:
        nothing(ax, "Correlations", "two metrics that move, on common steps, eight rows or more")
        return
    n = len(found.names)
    matrix = np.where(np.tri(n, k=-1, dtype=bool), found.levels, found.changes)
    np.fill_diagonal(matrix, np.nan)
    shown = ax.imshow(matrix, cmap=colormaps["PuOr"].with_extremes(bad="#eeeeee"), vmin=-1, vmax=1, aspect="auto")
    labels = [drawn(name, 28) for name in found.names]
    ax.set_xticks(range(n), labels, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
    ax.set_yticks(range(n), labels, parse_math=False)
    ax.grid(visible=False)
    pinned = {frozenset(r.names) for r in a.relations if len(r.names) == 2}
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            same = frozenset((found.names[i], found.names[j])) in pinned
            value = matrix[i, j]
            text = "≡" if same else _written(value)
            dark = not np.isnan(value) and abs(value) > 0.65
            ax.text(
                j, i, text, ha="center", va="center", color="white" if dark else BLACK,
                size=12 if same else 8 if n <= 12 else 6.5, weight="bold" if same else "normal",
            )  # fmt: skip
    ax.set_title(
        "Pearson’s r after the transient: below the diagonal of values,\nabove it of changes from row to row",
        parse_math=False,
    )
    bar = figure.colorbar(shown, ax=ax, shrink=0.6, label="r")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("-", "−")))


def _written(r: float) -> str:
    """With two digits and no zero before the point; – where it is unknown."""
    if np.isnan(r):
        return "–"
    return f"{abs(r):.2f}".replace("0.", ".") if abs(r) < 0.005 or r > 0 else f"−{-r:.2f}".replace("0.", ".")


def _identities(ax: Axes, a: Analysis) -> None:
    ax.set_axis_off()
    ax.set_title("≡ identities: one piece of evidence each", parse_math=False)
    lines = [line for r in a.relations[:10] for line in (*wrapped(drawn(r.said, 200), 52, "• ", "  "), "")]
    lines += [f"… and {len(a.relations) - 10} more"] if len(a.relations) > 10 else []
    lines = lines or wrapped("None found among the metrics that were logged on common steps.", 52)
    words = (
        "Trends correlate by themselves: two metrics that both fall have r near 1 without any tie. What moves together "
        "from row to row is tied."
    )
    ax.text(
        0, 0.97, "\n".join([*lines[:34], "", *wrapped(words, 52)]), va="top", size=8.5, transform=ax.transAxes,
        linespacing=1.35, parse_math=False,
    )  # fmt: skip
