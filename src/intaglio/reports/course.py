"""The course of a run on a page: curves, statistics, phases, what is one piece of evidence, what numbers mean."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from intaglio.health.diagnosis import load_profile
from intaglio.health.rule import Limits
from intaglio.history.series import Series
from intaglio.history.statistics import Description
from intaglio.reports.analysis import Analysis, evidence_groups
from intaglio.reports.charts import Curve, curve, points, smooth, thinned
from intaglio.reports.limits import band, null_of
from intaglio.reports.parts import breakable, folded, listed, missing, pairs, table
from intaglio.reports.safe import html, plain
from intaglio.reports.words import LOSS_UNITS, better, change, percent, quantity, short, titled, unit

POINTS, FEWEST, MOST = 24_000, 60, 400
"""Points of all curves of a page together, and of one line at least and at most."""
CHARTS, ROWS = 120, 500
"""Curves and rows of statistics on a page; it says what is left out."""
UNFOLDED = 16
"""Rows of statistics that are seen at once."""
GROUPS = {
    "Losses": ("loss",),
    "Judged quantities": ("logged", "caption", "image", "pair", "retrieval", "prior", "judge", "unigram"),
    "Latent space and codes": ("latent", "codes", "vq", "text"),
    "Optimizer": ("optimizer", "weight", "speed"),
}
REST = "Other metrics"


def curves(a: Analysis) -> str:
    """All curves, losses first, with their key and the tools that work where scripts do."""
    if not a.metrics:
        gone = a.folder is not None and not a.folder.metrics.is_file()
        return missing("metrics.jsonl is not in the run folder" if gone else "no metric was logged yet")
    charts = pictures(a)
    if not charts:
        return missing("no metric has two finite values, so there is no curve to draw")
    most = int(np.clip(POINTS // max(1, len(charts)), FEWEST, MOST))
    limits = load_profile(a.profile)
    shown = dict(list(charts.items())[:CHARTS])
    groups: dict[str, list[str]] = {}
    for title, sides in shown.items():
        groups.setdefault(_group(sides[0]), []).append(_figure(a, title, sides, most, limits))
    blocks = ""
    few = len(shown) <= 36
    for title in sorted(groups, key=[*GROUPS, REST].index):
        grid = f'<div class="curves">{"".join(groups[title])}</div>'
        blocks += (
            f"<h3>{title}</h3>{grid}"
            if title == "Losses" or len(groups) == 1
            else folded(f"{title} ({len(groups[title])})", grid, "group", unfolded=few)
        )
    single = len(a.metrics) - sum(map(len, charts.values()))
    notes = [f"{single} with fewer than two finite values stand in the table of numbers alone."] if single else []
    if len(charts) > len(shown):
        notes.append(
            f"{len(charts) - len(shown):,} of {len(charts):,} curves are not drawn; the table has their numbers."
        )
    if a.rows > most:
        notes.append(f"Of each line at most {most} points are drawn, with the least and the greatest value kept.")
    told = f"<p><small>{' '.join(notes)}</small></p>" if notes else ""
    return f"{_key(blocks)}{_tools(a.axis)}{blocks}{told}"


def pictures(a: Analysis) -> dict[str, tuple[str, ...]]:
    """What stands in one picture: the splits of one quantity, or a metric of an own name; with two values at least."""
    found: dict[str, tuple[str, ...]] = {}
    for name in a.metrics:
        split, _, rest = name.partition("/")
        title = rest if split in ("train", "val") and "/" in rest else name
        found[title] = (*found.get(title, ()), name)
    return {
        title: names for title, names in found.items() if any(np.isfinite(a.series[n].values).sum() > 1 for n in names)
    }


def _group(name: str) -> str:
    site = name.split("/")[1] if name.count("/") >= 2 else ""
    return next((title for title, sites in GROUPS.items() if site.partition(".")[0] in sites), REST)


def _figure(a: Analysis, title: str, names: tuple[str, ...], most: int, limits: Mapping[str, Limits]) -> str:
    sides = {("val" if name.startswith("val/") else "train"): a.series[name] for name in names}
    train, val = sides.get("train"), sides.get("val")
    known = title not in names
    main = next(name for name in names if val is None or name.startswith("val/"))
    null = next((x for s in (val, train) if s is not None and (x := null_of(s)) is not None), None)
    term = title.removeprefix("loss/")
    of = LOSS_UNITS.get(term, "") if a.folder and title.startswith("loss/") else quantity(title).unit
    weight = a.series.get(f"train/weight/{term}") if title.startswith("loss/") else None
    bounds = [
        points(thinned(a.series[f"{main}{end}"], most)) for end in ("_low", "_high") if f"{main}{end}" in a.series
    ]
    picture = curve(
        Curve(
            title,
            of or "value",
            points(thinned(train, most)) if train is not None else (),
            points(thinned(val, most)) if val is not None else (),
            null,
            next((b for n in names if (b := band(n, a.series[n], limits))), None),
            better(title),
            a.axis,
            points(smooth(train)) if train is not None and len(train) > 150 else (),
            (bounds[0], bounds[1]) if len(bounds) == 2 else ((), ()),
            ("training" if known else "value", "held out"),
            not title.startswith("optimizer/rate"),
        )
    )
    picture = picture or missing("no value here can be drawn", "Not drawn")
    told = [of] if of else []
    told += [
        f"{side} {short(_last(s))}" for side, s in (("training", train), ("held out", val)) if known and s is not None
    ]
    if title.startswith("loss/") and val is None:
        told.append("held out not measured")
    told += [f"last {short(_last(train))}"] if train is not None and not known else []
    told += [f"null {short(null)}"] if null is not None else []
    bad = sum(d.rows - d.finite for n in names if (d := a.descriptions.get(n)))
    told += [f"{bad:,} not finite, left out"] if bad else []
    shown = title.removeprefix("loss/").replace("_", " ") if title.startswith("loss/") else title
    shown = titled(title) if known and not title.startswith("loss/") else shown
    times = f" × {short(_last(weight))}" if weight is not None else ""
    return (
        f'<figure class="plot"><figcaption><b>{html(plain(shown, 60))}</b>{times} '
        f"<small>{html('; '.join(told))}</small></figcaption>{picture}</figure>"
    )


def _last(s: Series) -> float:
    return float(s.values[-1])


def _key(drawn: str) -> str:
    """What the lines mean, of those that occur."""
    samples = {
        "train": "training",
        "only": "as logged",
        "trend": "running median",
        "val": "held out",
        "bound": "95 % interval",
        "null": "null, where one is known",
        "worse": "no better than the null",
        "band": "where a rule finds nothing wrong",
    }
    line = '<svg viewBox="0 0 32 10" aria-hidden="true"><line class="{}" x2="32" y1="5" y2="5"/></svg>'
    area = '<svg viewBox="0 0 32 10" aria-hidden="true"><rect class="{}" width="32" height="10"/></svg>'
    items = "".join(
        f"<li>{(area if css in ('worse', 'band') else line).format(css)}{text}</li>"
        for css, text in samples.items()
        if f'class="{css}"' in drawn
    )
    return f'<ul class="key">{items}</ul>'


def _tools(axis: str) -> str:
    choices = "".join(
        f'<label><input type="radio" name="scale" value="{value}"{checked}> {label}</label>'
        for value, label, checked in (
            ("drawn", "as drawn", " checked"),
            ("linear", "linear", ""),
            ("log", "logarithmic", ""),
        )
    )
    ends = "".join(f'<label>{end} <input type="number" name="{end}" step="any"></label>' for end in ("from", "to"))
    return (
        f'<div id="tools" hidden><fieldset><legend>Value axis</legend>{choices}</fieldset>'
        f"<fieldset><legend>Range of {html(axis)}</legend>{ends}"
        '<button type="button" disabled>Whole run</button></fieldset>'
        "<p><small>Point at a curve, or focus it and use the arrow keys, to read its values; drag across it to enlarge "
        "all curves there, double-click or press Escape for the whole run.</small></p></div>"
    )


# the numbers of each metric

HEADS = (
    "Metric",
    "First → last",
    "Least … greatest",
    "Mean ± deviation",
    "Trend when settled",
    "Family",
    "Level changes",
)


def statistics(a: Analysis) -> str:
    """Every metric: first, last, extremes, spread with the transient apart, trend, family, change points."""
    if not a.descriptions:
        return missing("no metric was logged yet")
    rows = [_statistics_row(a, name, d) for name, d in list(a.descriptions.items())[:ROWS]]
    note = (
        "<p>A <i>transient</i> is the start, before a metric settles: a change that lies in it says how the run began, "
        "not how it went. CV is the standard deviation over the mean. The trend’s 95 % interval allows for the "
        "likeness of neighbouring rows.</p>"
    )
    first, rest = (rows, []) if len(rows) <= UNFOLDED + 4 else (rows[:UNFOLDED], rows[UNFOLDED:])
    shown = table(HEADS, first, "metrics") + (
        folded(f"{len(rest)} more", table(HEADS, rest, "metrics")) if rest else ""
    )
    left = len(a.descriptions) - len(rows)
    return note + shown + (missing(f"{left:,} metrics more than fit on this page", "Not shown") if left else "")


def _statistics_row(a: Analysis, name: str, d: Description) -> tuple[str, ...]:
    theirs = next((t for t, o in a.renamed.items() if o == name and t != name), "")
    small = [f"{d.rows:,} {'row' if d.rows == 1 else 'rows'}"]
    small += [f"{d.rows - d.finite:,} not finite"] if d.finite < d.rows else []
    small += [f"their name: {theirs}"] if theirs else []
    head = f"{breakable(plain(name, 70))}<small>{html(', '.join(small))}</small>"
    if not d.finite:
        return (head, "no finite value", *["–"] * 5)
    return (
        head,
        _cell(f"{short(d.first)} → {short(d.last)}", *_changed(d)),
        _cell(f"{short(d.low)} … {short(d.high)}", f"at {d.low_step:,} and {d.high_step:,}"),
        _cell(f"{short(d.mean)} ± {short(d.std)}", *spread_lines(a, d)),
        _cell(d.rises if d.finite > 2 else "–", *slope_lines(a, d)),
        _cell(d.family.name, f"off by {percent(d.family.error)}") if d.family else "–",
        _cell(", ".join(f"{s:,}" for s in d.change_points[:6]) or "none", *_marks(d)),
    )


def _cell(main: str, *small: str) -> str:
    return html(main) + "".join(f"<small>{html(line)}</small>" for line in small if line)


def _changed(d: Description) -> tuple[str, ...]:
    if d.finite < 2 or not np.isfinite(d.change):
        return ()
    told = f"level {change(d.change)}"
    if d.transient is not None and np.isfinite(d.change_in_transient) and d.change:
        told += f", {percent(d.change_in_transient)} of it in the transient"
    return (told,)


def spread_lines(a: Analysis, d: Description) -> tuple[str, ...]:
    """CV, with the transient and without."""
    if d.finite < 2 or not np.isfinite(d.cv):
        return ()
    if d.transient is None:
        return (f"CV {percent(d.cv)}, no transient",)
    settled = f"{short(d.settled_mean)} ± {short(d.settled_std)}"
    return (
        f"CV {percent(d.cv)} with the transient",
        f"{percent(d.settled_cv)} after {unit(a.axis, many=False)} {d.transient:,}: {settled}",
    )


def slope_lines(a: Analysis, d: Description) -> tuple[str, ...]:
    """The settled trend per as many steps as fit the run, and its interval."""
    if d.finite < 3 or not np.isfinite(d.slope):
        return ()
    first, last = a.span
    per = 10 ** int(np.log10(max(last - first, 1))) if unit(a.axis) != "epochs" else 1
    low, middle, high = (short(x * per) for x in (d.slope_low, d.slope, d.slope_high))
    times = f"{per:,} {unit(a.axis)}" if per > 1 else unit(a.axis, many=False)
    return (f"{middle} per {times}", f"{low} to {high}")


def _marks(d: Description) -> tuple[str, ...]:
    spikes = f"spikes at {', '.join(f'{s:,}' for s in d.spikes[:4])}{' …' * (len(d.spikes) > 4)}" if d.spikes else ""
    gaps = ", ".join(f"{x:,}–{y:,}" if x != y else f"{x:,}" for x, y in d.gaps[:3])
    return (spikes, f"not finite at {gaps}{' …' * (len(d.gaps) > 3)}" if gaps else "")


# what the numbers say together


def phases(a: Analysis) -> str:
    """Phases as they were found, and the family of the learning rate."""
    rows = [(f"{p.first:,} to {p.last:,}", html(p.what)) for p in a.phases]
    told = (
        table((unit(a.axis).capitalize(), "What went on"), rows, "phases")
        if rows
        else "<p>No phases: the metrics show no common change of course.</p>"
    )
    how = "<p>Found from changes of course that metrics have in common, not set beforehand.</p>"
    return f"{how}{told}<h3>Learning rate</h3>{rate(a)}"


def rate(a: Analysis) -> str:
    """What family the learning rate follows."""
    lines = rate_lines(a)
    return (
        listed(lines) if lines else missing("no learning rate was logged; log the optimizer’s as train/optimizer/rate")
    )


def rate_lines(a: Analysis) -> list[str]:
    """A sentence for each learning rate that was logged."""
    rates = {n: d.family for n, d in a.descriptions.items() if fnmatchcase(n, "*/optimizer*/rate*")}
    return [f"{name}: {family.said if family else 'follows no known family'}" for name, family in rates.items()]


def meanings(a: Analysis) -> str:
    """Identities, which count once, and derived quantities beside their nulls."""
    groups = evidence_groups(a.relations)
    told = "<p>No metric is fixed by another one, as far as these were logged on common steps.</p>"
    if a.relations:
        told = "<p>What is fixed by another number is no evidence of its own.</p>" + listed(r.said for r in a.relations)
    if groups:
        told += "<p>So each of these counts as <b>one</b> piece of evidence:</p>" + listed(map(", ".join, groups))
    rows = [
        (
            breakable(d.name),
            _cell(f"{short(d.value)} {d.unit}".strip()),
            _cell(f"{short(d.null)} {d.unit}".strip()) if d.null is not None else "unknown",
            html(d.said),
        )
        for d in a.derived
    ]
    follows = (
        table(("Quantity", "Value", "Null", "How, and what it means"), rows, "derived")
        if rows
        else "<p>Nothing more follows from the quantities that were logged.</p>"
    )
    return f"{told}<h3>What follows from them</h3>{follows}"


def names(a: Analysis) -> str:
    """How their names were mapped onto ours."""
    mapped = {theirs: our for theirs, our in a.renamed.items() if theirs != our}
    if not mapped:
        return "<p>Every metric stands under its own name. <code>--map theirs=ours</code> maps more.</p>"
    kept = len([n for n in a.metrics if n not in mapped.values()])
    rows = pairs(mapped.items())
    return f"<p>{len(mapped)} mapped, {kept} kept as they are; <code>--map theirs=ours</code> maps more.</p>" + (
        rows if len(mapped) <= 30 else folded(f"{len(mapped)} names", rows)
    )
