"""The page of a comparison: one HTML file that needs nothing else, with curves of both arms on the same steps."""

import re
from collections.abc import Iterable

import numpy as np

from intaglio.reports import charts
from intaglio.reports.arms import Run
from intaglio.reports.comparison import Comparison
from intaglio.reports.comparison_text import (
    MARKS,
    assessment,
    cells,
    cost_rows,
    counts,
    followed,
    heads,
    moved,
    sentence,
    shown,
    span,
)
from intaglio.reports.differences import BETTER, EQUIVALENT, UNSURE, WORSE, Metric, confidence, over_steps
from intaglio.reports.page import document
from intaglio.reports.parts import folded, listed, missing, table
from intaglio.reports.safe import html, plain
from intaglio.reports.weighing import number
from intaglio.reports.words import change

WORDS = {
    BETTER: ("healthy", "B is better"), WORSE: ("failing", "B is worse"), UNSURE: ("cannot-tell", "Cannot tell"),
    EQUIVALENT: ("healthy", "Equivalent within δ"),
}  # fmt: skip
FIRST = 30
"""Metrics above the fold of the table."""
LINE = '<svg viewBox="0 0 32 10" aria-hidden="true"><line class="{}" x2="32" y1="5" y2="5"/></svg>'


def page(c: Comparison) -> str:
    """The whole page."""
    names = (c.names[0] if c.names[0] != "A" else "Arm A", c.names[1] if c.names[1] != "B" else "arm B")
    title = f"{plain(names[0], 60)} against {plain(names[1], 60)}"
    lead = f'<p class="lead">{html(sentence(counts(c)))}; {len(c.metrics)} metrics on common {html(c.axis)}s.</p>'
    return document(title, "a comparison", lead, sections(c), f"{len(c.a) + len(c.b)} runs were read.")


def sections(c: Comparison) -> dict[str, tuple[str, str]]:
    """The parts of the page: anchor → heading and content."""
    cost = table(("", *heads(c), "B / A"), [[html(x) for x in row] for row in cost_rows(c)])
    notes = [*c.notices, *(f"{n} was left out: {why}" for n, why in c.left_out.items())]
    return {
        "verdict": ("Verdict", _verdict(c)),
        "changed": ("What was changed", _changed(c)),
        "metrics": ("Metrics", _metrics(c)),
        "curves": ("On the same steps", _curves(c)),
        "course": ("From first to last", _course(c)),
        "misleading": ("What may mislead", _list(c.confounds, "Nothing was found besides the change itself.")),
        "cost": ("Cost", cost),
        "notes": ("Notes", _list(notes, "None.")),
        "runs": ("Runs", _runs(c)),
    }


def _verdict(c: Comparison) -> str:
    tone, word = WORDS[c.verdict]
    return (
        f'<div class="verdicts"><div class="verdict {tone}"><p class="word"><span aria-hidden="true">{MARKS[c.verdict]}'
        f"</span> {word}</p><p>{html(sentence(c.reason))}.</p><p><b>{html(c.recommendation)}</b></p></div></div>"
    )


def _changed(c: Comparison) -> str:
    if not c.changed:
        return missing("no setting is known to differ", "Nothing")
    rows = [(html(k), html(shown(x)), html(shown(y))) for k, (x, y) in c.changed.items()]
    return table(("Setting", *heads(c)), rows)


def _metrics(c: Comparison) -> str:
    top = ("Metric", *heads(c), "Change", f"{confidence(c.level)} interval of B − A", "Assessment of B")

    def rows(metrics: Iterable[Metric]) -> str:
        return table(top, [_row(m) for m in metrics])

    rest = c.metrics[FIRST:]
    more = folded(f"{len(rest)} metrics more", rows(rest)) if rest else ""
    return (
        f"<p>Values at the end of the {html(c.axis)}s that both arms have; {html(c.margin)}. Claims that the verdict "
        f"does not rest on are corrected for their number (Holm).</p>{rows(c.metrics[:FIRST])}{more}"
    )


def _row(m: Metric) -> list[str]:
    bold = f"<b>{_name(m.name)}</b><small>the verdict rests on it</small>" if m.main else _name(m.name)
    mark = f'<span aria-hidden="true">{MARKS[m.verdict]}</span> {html(assessment(m))}'
    old, new, apart, interval = (html(cell).replace(" %", "&nbsp;%") for cell in cells(m))
    numbers = (f'<span class="whole">{old}</span>', f'<span class="whole">{new}</span>', apart, interval)
    return [f"{bold}<small>{html(m.matched.at)}</small>", *numbers, mark]


def _curves(c: Comparison) -> str:
    figures = "".join(_figure(m, c) for m in followed(c))
    if not figures:
        return missing("no metric was measured at more than one step by both arms")
    a, b = (html(h) for h in heads(c))
    key = f"<li>{LINE.format('only')}{a}</li><li>{LINE.format('val')}{b}, or B − A</li>"
    if min(len(c.a), len(c.b)) > 1:
        key += f"<li>{LINE.format('bound')}{confidence(c.level)} interval of B − A</li>"
        key += f"<li>{LINE.format('null')}no difference</li>"
    told = f"<p>Between two rows of an arm its value at a {html(c.axis)} is interpolated.</p>"
    return f'{told}<ul class="key">{key}</ul><div class="curves">{figures}</div>'


def _figure(m: Metric, c: Comparison) -> str:
    """Both arms, and where there are seeds, their difference with its interval."""
    steps, (a, b) = m.matched.steps, heads(c)
    axis = "optimizer step" if c.axis == "step" and all(r.ours for r in (*c.a, *c.b)) else c.axis
    drawn = charts.curve(
        charts.Curve(
            m.name, "mean over runs", _points(steps, m.matched.a.mean(0)), _points(steps, m.matched.b.mean(0)),
            axis=axis, sides=(a, b),
        )
    )  # fmt: skip
    told = "; ".join(
        f"{span(w.first, w.last, c.axis)}: {number(m, w.a)} and {number(m, w.b)}, {moved(m, w.a, w.b - w.a)}"
        for w in m.windows
    )
    words = folded("The same in words", f"<p>{html(told)}.</p>")
    apart, difference = over_steps(m), ""
    if apart is not None:
        room = 2 * max(float(np.abs(apart[0]).max()), 1e-12)
        cut = [np.clip(x, -room, room) for x in apart]
        middle, low, high = (_points(steps, x) for x in cut)
        difference = charts.curve(
            charts.Curve(
                f"{m.name}, B − A", "mean difference", val=middle, bounds=(low, high), null=0.0, axis=axis,
                sides=("", "B − A"),
            )
        )  # fmt: skip
        edge = "; cut at the frame" if any((x != y).any() for x, y in zip(apart, cut, strict=True)) else ""
        difference = f"<small>B − A, with its {confidence(c.level)} interval{edge}</small>{difference}"
    return f"<figure><figcaption><b>{_name(m.name)}</b></figcaption>{drawn}{difference}{words}</figure>"


def _name(name: str) -> str:
    """A metric's name that may be broken between its words."""
    return re.sub(r"([/_])(?=\w)", r"\1<wbr>", html(name))


def _points(steps: np.ndarray, values: np.ndarray) -> list[tuple[int, float]]:
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def _course(c: Comparison) -> str:
    rows = [
        (
            f"{_name(m.name)}<small>{html(arm)}</small>",
            *(
                f'<span class="whole">{html(number(m, value))}</span><small>{html(c.axis)} {step:,}</small>'
                for value, step in (
                    (o.first, m.matched.first), (o.low, o.low_step), (o.high, o.high_step), (o.last, m.matched.last),
                )
            ),
            "–" if o.change is None else html(change(o.change)),
        )
        for m in followed(c)
        for arm, o in zip(heads(c), m.courses, strict=True)
    ]  # fmt: skip
    if not rows:
        return missing("no metric was measured at more than one step by both arms")
    return table(("Metric and arm", "First", "Lowest", "Highest", "Last", "Change from first to last"), rows)


def _runs(c: Comparison) -> str:
    def cells(arm: str, r: Run) -> list[str]:
        seed = "–" if r.seed is None else r.seed
        return [f"{_name(r.name)}<small>{arm}</small>", *map(html, (seed, r.format, r.source))]

    rows = [cells(arm, r) for arm, runs in zip("AB", (c.a, c.b), strict=True) for r in runs]
    return table(("Run and arm", "Seed", "Read as", "From"), rows)


def _list(items: Iterable[str], otherwise: str) -> str:
    said = [f"{sentence(item.rstrip('.'))}." for item in items]
    return listed(said) if said else f"<p>{otherwise}</p>"
