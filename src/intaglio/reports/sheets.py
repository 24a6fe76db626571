"""Two sheets of pictures, as PNG: the course of a run in nine panels, and its trends with what is correlated.

Equal analyses give equal bytes under one version of matplotlib. Colours are those of Okabe & Ito (2008), which people
who see few colours tell apart. No word of a file reaches matplotlib's own markup.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from intaglio.history.families import Family
from intaglio.history.series import Series
from intaglio.reports.analysis import Analysis
from intaglio.reports.charts import LARGEST, LOG_FROM, smooth
from intaglio.reports.course import pictures
from intaglio.reports.limits import null_of
from intaglio.reports.safe import drawn, wrapped
from intaglio.reports.verdict import VERDICTS
from intaglio.reports.words import bookkeeping, percent, short, titled

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY, PALE = "#6b6b6b", "#9a9a9a"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
TONES = {"healthy": GREEN, "warnings": "#8a5200", "failing": "#b3361b", "cannot tell": "#4a5568"}
DPI = 150
TOPICS = {
    "Learning rate": ("optimizer/rate", "train/optimizer/rate"),
    "Gradient norm": ("optimizer/gradient_norm", "train/optimizer/gradient_norm"),
    "Latent statistics": ("latent/", "val/latent/std and val/latent/norm"),
    "A judged quantity": ("logged/", "what the model is for, as val/logged/accuracy"),
}
"""What a reader looks for: how it is found among the metrics, and what to log where it is not."""


@contextmanager
def plotting() -> Iterator[None]:
    """matplotlib's own defaults, whatever a user's matplotlibrc says, with our sizes."""
    with style.context(
        {
            "font.family": ["DejaVu Sans"],
            "font.size": 9,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e3e3e3",
            "grid.linewidth": 0.7,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "lines.linewidth": 1.2,
            "path.simplify": True,
            "axes.unicode_minus": True,
        },
        after_reset=True,
    ):
        yield


def comprehensive(a: Analysis, path: Path) -> Path:
    """Nine panels: losses, their terms, held out against training, what else was logged, spread, verdict."""
    with plotting():
        figure = Figure(figsize=(14, 11.2), dpi=DPI, layout=layout())
        heading(figure, a, "the course of the run")
        axes = list(figure.subplots(3, 3).flat)
        shown = pictures(a)
        main = _main_loss(shown)
        used = {main}
        _curve(axes[0], a, main, shown[main]) if main else nothing(axes[0], "Total loss", "train/loss/total")
        used |= _terms(axes[1], a, shown, main)
        _gap(axes[2], a, shown)
        for ax, title in zip(axes[3:7], _chosen(a, shown, used), strict=True):
            if title in shown:
                _curve(ax, a, title, shown[title])
            else:
                nothing(ax, title, TOPICS[title][1])
        _spread(axes[7], a)
        _verdict(axes[8], a)
        return saved(figure, path)


def layout() -> ConstrainedLayoutEngine:
    """Room for every word, so that nothing covers anything."""
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12, wspace=0.03, hspace=0.03)


def heading(figure: Figure, a: Analysis, what: str) -> None:
    """Whose sheet it is, and what it shows."""
    figure.suptitle(f"{drawn(a.name, 60)}: {what}", x=0.01, ha="left", size=14, weight="bold", parse_math=False)


def saved(figure: Figure, path: Path) -> Path:
    """Writes the PNG, without the name of the program that drew it, which changes its bytes."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _main_loss(shown: dict[str, tuple[str, ...]]) -> str:
    losses = [title for title in shown if title.startswith("loss/")]
    return "loss/total" if "loss/total" in losses else next(iter(losses), "")


def _chosen(a: Analysis, shown: dict[str, tuple[str, ...]], used: set[str]) -> list[str]:
    """What four panels show: what a reader looks for and is there, then other metrics, then what is missing."""
    rest = [title for title in shown if title not in used and not title.startswith("weight/")]
    there, absent = [], []
    for topic, (pattern, _) in TOPICS.items():
        found = next((title for title in rest if pattern in title), None)
        if found:
            there.append(found)
        else:
            absent.append(topic)
    others = [
        title
        for title in rest
        if title not in there and not bookkeeping(title) and any(_moves(a, name) for name in shown[title])
    ]
    return [*there, *others, *absent, *TOPICS][:4]


def _moves(a: Analysis, name: str) -> bool:
    return name not in a.descriptions or a.descriptions[name].std > 0


def frame(ax: Axes, a: Analysis, title: str, ylabel: str, values: np.ndarray, wide: bool = True) -> bool:
    """Title, axes and ticks; True where the value axis is logarithmic, for a wide range of values where allowed."""
    ax.set_title(drawn(title, 44), parse_math=False, pad=6)
    ax.set_xlabel(drawn(a.axis, 30), parse_math=False)
    ax.set_ylabel(drawn(ylabel, 30), parse_math=False)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(_step))
    shown = values[np.isfinite(values) & (np.abs(values) < LARGEST)]
    logarithmic = bool(wide and len(shown) and shown.min() > 0 and shown.max() > LOG_FROM * shown.min())
    if logarithmic:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(decades(shown))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5))
        if len(shown) and np.ptp(shown) <= 1e-12 * max(abs(shown).max(), 1e-280):
            half = 0.5 * abs(float(shown[0])) or 0.5
            ax.set_ylim(float(shown[0]) - half, float(shown[0]) + half)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    return logarithmic


def decades(values: np.ndarray) -> LogLocator:
    """Ticks of a log axis: at 1 and 3 of each decade where there are few."""
    few = values.max() < 1000 * values.min()
    return LogLocator(subs=(1.0, 3.0) if few else (1.0,), numticks=6)


def _step(value: float, _: object) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}".replace("-", "−")
    return f"{value:,.0f}".replace("-", "−")


def line(ax: Axes, s: Series, label: str, colour: str, width: float, **more: object) -> None:
    """One series, without what cannot be drawn; a lone point is a dot."""
    values = np.where(np.abs(s.values) < LARGEST, s.values, np.nan)
    finite = np.isfinite(values)
    lone = finite & ~np.concatenate([[False], finite[:-1]]) & ~np.concatenate([finite[1:], [False]])
    ax.plot(s.steps, values, color=colour, linewidth=width, label=drawn(label, 30), **more)  # type: ignore[arg-type]
    if lone.any():
        ax.plot(s.steps[lone], values[lone], color=colour, marker="o", markersize=3, linestyle="none")


def legend(ax: Axes, columns: int = 3) -> None:
    """The key, between title and picture, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if not labels:
        return
    rows = -(-len(labels) // columns)
    key = ax.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 0.995), ncols=columns, borderaxespad=0.1,
        handlelength=1.6, columnspacing=1.2, labelspacing=0.25, borderpad=0.1,
    )  # fmt: skip
    for text in key.get_texts():
        text.set_parse_math(False)
    ax.set_title(ax.get_title(loc="left"), parse_math=False, pad=8 + 13 * rows)


def _curve(ax: Axes, a: Analysis, title: str, names: tuple[str, ...]) -> None:
    known = title not in names
    series = {
        ("held out" if n.startswith("val/") else "training" if known else "as logged"): a.series[n] for n in names
    }
    null = next((x for s in series.values() if (x := null_of(s)) is not None), None)
    values = np.concatenate([s.values for s in series.values()])
    frame(ax, a, _capital(titled(title)) if known else title, "value", values, "optimizer/rate" not in title)
    for side, s in series.items():
        if side == "held out":
            line(ax, s, side, BLUE, 2, marker="o" if len(s) <= 40 else "", markersize=3, zorder=3)
            continue
        trend = smooth(s)
        line(ax, s, side, PALE if len(trend) else GREY if known else BLACK, 0.6 if len(trend) else 1.2)
        if len(trend):
            line(ax, trend, "running median", BLACK, 1.4)
    if null is not None and null < LARGEST:
        low, high = ax.get_ylim()
        if low - 2 * (high - low) < null < high + 2 * (high - low) and (ax.get_yscale() == "linear" or null > 0):
            ax.axhline(null, color=VERMILION, linestyle=(0, (5, 3)), linewidth=1.3, label="null")
        else:
            ax.plot([], [], color=VERMILION, linestyle=(0, (5, 3)), label=f"null {short(null)}, out of frame")
    if any("optimizer/rate" in n for n in names) and (d := a.descriptions.get(names[0])) and d.family:
        fit(ax, series[next(iter(series))], d.family)
    legend(ax)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def fit(ax: Axes, s: Series, family: Family) -> None:
    """The law that a series follows, over it."""
    steps = np.linspace(s.steps[0], s.steps[-1], 600)
    values = law(family, steps)
    ax.plot(steps, values, color=VERMILION, linestyle=(0, (2, 2)), linewidth=1.4, label=f"{family.name}, fitted")


def law(family: Family, steps: np.ndarray) -> np.ndarray:
    """The values of a fitted family at steps (n,) from the first row's to the last's, from its parameters."""
    p, begin = family.parameters, family.parameters.get("warmup", float(steps[0]))
    floor, since = p.get("floor", 0.0), np.clip(steps - begin, 0, None)
    name = family.name.split(" after ")[0]
    if name == "constant":
        values = np.full(len(steps), p["value"])
    elif name == "linear":
        values = p["start"] + (p["end"] - p["start"]) * since / max(float(steps[-1]) - begin, 1e-9)
    elif name == "step":
        drops = np.sort([at for key, at in p.items() if key.startswith("at_")])
        values = p["start"] * p["ratio"] ** np.searchsorted(drops, steps, "right")
    else:
        with np.errstate(over="ignore"):
            shape = {
                "exponential": lambda: 0.5 ** (since / p["half_life"]),
                "cosine": lambda: 0.5 * (1 + np.cos(np.pi * np.clip(since / p["over"], 0, 1))),
                "inverse square root": lambda: 1 / np.sqrt(1 + since / p["shift"]),
            }[name]()
        values = floor + (p["start"] - floor) * shape
    if "warmup" in p:
        ramp = (steps - steps[0]) / max(begin - float(steps[0]), 1e-9)
        peak = p.get("start", p.get("value", 0.0))
        values = np.where(steps < begin, p["warmup_from"] + (peak - p["warmup_from"]) * ramp, values)
    return values


def _terms(ax: Axes, a: Analysis, shown: dict[str, tuple[str, ...]], main: str) -> set[str]:
    terms = [title for title in shown if title.startswith("loss/") and title != main][:6]
    if not terms:
        nothing(ax, "Loss terms", "each term of the loss, as train/loss/kl")
        return set()
    chosen = [(title, next((n for n in shown[title] if n.startswith("train/")), shown[title][0])) for title in terms]
    series = [(title, name, smooth(a.series[name])) for title, name in chosen]
    lines = [(title, name, s if len(s) else a.series[name]) for title, name, s in series]
    sides = {name.split("/")[0] for _, name, _ in lines}
    side = {"train": "training", "val": "held out"}.get(next(iter(sides)), "value") if len(sides) == 1 else "value"
    frame(ax, a, "Loss terms", f"{side}, before weights", np.concatenate([s.values for *_, s in lines]))
    for (title, name, s), colour in zip(lines, COLOURS, strict=False):
        own = "" if len(sides) == 1 else " (held out)" if name.startswith("val/") else " (training)"
        line(ax, s, title.removeprefix("loss/").replace("_", " ") + own, colour, 1.4)
    legend(ax)
    return set(terms)


def _gap(ax: Axes, a: Analysis, shown: dict[str, tuple[str, ...]]) -> None:
    """Held-out minus training loss, at the held-out steps; training as the median of the rows around."""
    both = [t for t, names in shown.items() if t.startswith("loss/") and len(names) == 2]
    title = "loss/total" if "loss/total" in both else next(iter(both), "")
    if not title:
        nothing(ax, "Held out minus training", "the same loss on held-out items, as val/loss/total")
        return
    train, val = a.series[f"train/{title}"], a.series[f"val/{title}"]
    good = np.isfinite(train.values)
    steps, values = train.steps[good], train.values[good]
    width = max(1, len(steps) // 40)
    at = np.searchsorted(steps, val.steps)
    around = [values[max(0, k - width) : k + width] for k in at]
    gap = np.array([v - np.median(x) if len(x) else np.nan for v, x in zip(val.values, around, strict=True)])
    frame(ax, a, f"Held out minus training, {titled(title)}", "difference", np.append(gap, -1e-300))
    line(
        ax,
        Series.of(val.steps, gap),
        "held out − median of training",
        BLUE,
        2,
        marker="o" if len(gap) <= 40 else "",
        markersize=3,
    )
    ax.axhline(0, color=GREY, linewidth=1, linestyle=(0, (5, 3)), label="no difference")
    legend(ax, 2)


def _spread(ax: Axes, a: Analysis) -> None:
    """Coefficients of variation, of every row and after the transient."""
    rows = [(n, d) for n, d in a.descriptions.items() if d.finite >= 8 and np.isfinite(d.cv) and d.cv > 0][:10]
    ax.set_title("Spread: CV with and without the transient", parse_math=False)
    if not rows:
        nothing(ax, "Spread", "metrics that move, eight rows or more")
        return
    place = np.arange(len(rows))[::-1]
    settled = [d.settled_cv if d.settled_cv and np.isfinite(d.settled_cv) else np.nan for _, d in rows]
    ax.hlines(place, np.fmin(settled, [d.cv for _, d in rows]), [d.cv for _, d in rows], color="#c9c9c9", linewidth=2)
    ax.plot([d.cv for _, d in rows], place, "o", color="white", markeredgecolor=BLACK, markersize=6, label="every row")
    ax.plot(settled, place, "o", color=BLUE, markersize=5, label="after the transient")
    shown = np.array([x for _, d in rows for x in (d.cv, d.settled_cv) if np.isfinite(x) and x > 0])
    if shown.max() > 20 * shown.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(decades(shown))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_xlim(0, 1.1 * shown.max())
        ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
    ax.set_xlabel("standard deviation / |mean|")
    ax.set(yticks=[], ylim=(-0.6, len(rows) - 0.1))
    for y, (name, _) in zip(place, rows, strict=True):
        where = ax.get_yaxis_transform()
        ax.text(0.01, y + 0.42, drawn(name, 40), size=7, color=GREY, va="center", transform=where, parse_math=False)
    legend(ax)


def nothing(ax: Axes, title: str, log: str) -> None:
    """An empty frame that says that nothing was measured, and what to log."""
    ax.set_title(drawn(title, 44), parse_math=False)
    ax.grid(visible=False)
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(visible=True, color="#bbbbbb", linestyle=(0, (4, 4)))
    words = "\n".join(["not measured", "", *wrapped(f"to have it, log {log}", 40)])
    ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes, color=GREY, parse_math=False)


def _verdict(ax: Axes, a: Analysis) -> None:
    ax.set_axis_off()
    d = a.diagnosis
    word = d.verdict if d.verdict in VERDICTS else "cannot tell"
    ax.set_title("Verdict", parse_math=False)
    ax.text(0, 0.97, word.capitalize(), size=17, weight="bold", color=TONES[word], va="top", transform=ax.transAxes)
    looked = len(d.passed) + len({f.rule for f in d.findings})
    blind = sum("rule" in gap for gap in d.not_measured)
    lines = [f"{looked} rules looked, {len(d.passed)} found nothing;", f"{blind} could not look.", ""]
    for finding in d.findings[:4]:
        lines += wrapped(drawn(f"{finding.severity}: {finding.message}", 260), 58, rest="  ")
    lines += [f"… and {len(d.findings) - 4} findings more"] if len(d.findings) > 4 else []
    if not d.findings:
        lines += wrapped(VERDICTS[word][1], 58)
    ax.text(
        0, 0.83, "\n".join(lines[:19]), size=8.5, va="top", transform=ax.transAxes, linespacing=1.35, parse_math=False
    )
