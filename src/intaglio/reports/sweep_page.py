"""The page of a sweep: one HTML file that needs nothing else; every arm's whole comparison is folded into it."""

import math
from collections.abc import Iterable

from intaglio.history import Reading
from intaglio.reports import comparison_page
from intaglio.reports.comparison_text import MARKS, assessment, moved, sentence, shown
from intaglio.reports.differences import UNSURE, confidence
from intaglio.reports.page import document
from intaglio.reports.parts import breakable, folded, listed, missing, pairs, table
from intaglio.reports.run_parts import picture
from intaglio.reports.safe import html
from intaglio.reports.sweep import TOLD, Arm, Study, apart, headline, spread, written
from intaglio.reports.sweep_text import UNTOLD, absent, command, counts, heading, made, runs, uncounted, why_none
from intaglio.reports.words import titled

PARTS = ("changed", "metrics", "curves", "misleading", "cost", "notes")
"""Parts of a comparison's page that stand on this one."""


def page(s: Study) -> str:
    """The whole page."""
    sections = {
        "verdict": ("Verdict", _verdict(s)),
        "arms": ("Arms", _arms(s)),
        "table": ("Arms × metrics", _table(s)),
        **({"trade": ("One metric against another", _trade(s))} if s.sweep.trade else {}),
        "metrics": ("Each metric, beside its null", _metrics(s)),
        "can": ("What can be concluded", _told(s.can, "Nothing.")),
        "cannot": ("What cannot be concluded", _told(s.cannot, "Nothing.")),
        "comparisons": ("Each arm against the baseline", _comparisons(s)),
        "runs": ("Runs", _runs(s)),
        "made": ("How it was made", f"{pairs(made(s))}<pre><code>{html(command(s))}</code></pre>"),
    }
    arms, seeds = len(s.arms), len(s.sweep.seeds)
    question = f"{html(s.sweep.question)} " if s.sweep.question else ""
    size = f"{arms} arms of {html(s.sweep.recipe)}, {seeds} {'seed' if seeds == 1 else 'seeds'} each."
    lead = f'<p class="lead">{question}{size}</p>'
    lost = len(s.failed)
    counted = f"{lost} {'run' if lost == 1 else 'runs'} did not finish"
    stop = f'<p class="stop"><b>{counted}.</b> What is said rests on the others.</p>' if lost else ""
    return document(s.sweep.name, "a sweep", lead + stop, sections, f"{arms * seeds} runs were asked for.")


def _verdict(s: Study) -> str:
    told = [arm for arm in s.arms[1:] if arm.told(*TOLD)]
    tone, mark = ("healthy", "✓") if told else ("cannot-tell", "?")
    word = f"Claims about {len(told)} of {len(s.arms) - 1} arms" if told else "Cannot tell"
    advice = listed(f"{a.name}: {_advice(s, a)}" for a in s.arms[1:] if a.comparison)
    return (
        f'<div class="verdicts"><div class="verdict {tone}"><p class="word"><span aria-hidden="true">{mark}</span> '
        f"{word}</p><p>{html(headline(s) or 'Nothing was compared.')}</p><p>{html(sentence(s.correction))}.</p>"
        f"{folded('What to do of each arm', advice) if advice != listed([]) else ''}</div></div>"
    )


def _advice(s: Study, arm: Arm) -> str:
    assert arm.comparison is not None
    return f"{sentence(arm.comparison.reason)}. {arm.comparison.recommendation}"


def _arms(s: Study) -> str:
    rows = []
    for arm in s.arms:
        changed = "".join(
            f"<small>{html(key)}: {html(shown(x))} → {html(shown(y))}</small>" for key, (x, y) in arm.changed.items()
        )
        verdict = "baseline" if arm is s.arms[0] else arm.verdict
        mark = MARKS.get(verdict, "")
        rows.append(
            (f"<b>{html(arm.name)}</b>", changed or "the baseline", counts(arm), f"{mark} {html(verdict)}".strip())
        )
    return table(("Arm", "What it changes", "Runs that finished", "Against the baseline"), rows)


def _table(s: Study) -> str:
    rows = [[f'<span class="whole">{html(arm.name)}</span>', *(_cell(arm, n) for n in s.metrics)] for arm in s.arms]
    told = (
        "Means over seeds with their 95 % intervals. ✓ is better than the baseline, ✗ worse, = equivalent, ? cannot be "
        "told; an arrow says which way is better. An arm as a whole is better where every metric is better or "
        "equivalent."
    )
    return f"<p>{told}</p>{table(('Arm', *(titled(heading(s, n)) for n in s.metrics)), rows)}"


def _cell(arm: Arm, name: str) -> str:
    r, m = arm.cells[name].reading, arm.metrics.get(name)
    if r is None:
        return f'<span class="faint">{absent(arm)}</span>'
    barred = arm.comparison is not None and arm.comparison.barred
    mark = "" if m is None else f' <span aria-hidden="true">{"?" if barred else MARKS[m.verdict]}</span>'
    mark += f'<span class="unseen">{UNSURE if barred else m.verdict}</span>' if m is not None else ""
    null = "" if r.null is None else f"<small>null {html(written(name, r.null))}</small>"
    return f'<b class="whole">{html(written(name, r.value))}{mark}</b><small>{html(spread(name, r))}</small>{null}'


def _trade(s: Study) -> str:
    across, up = s.sweep.trade
    words = f"{up} of each arm against its {across}; the numbers stand in the tables"
    return picture(s.folder / "trade.png", {"title": "One metric against another", "look_for": words})


def _metrics(s: Study) -> str:
    told = (
        "In a picture the dot is the mean, its line the 95 % interval over seeds, the thin upright line the baseline’s "
    )
    told += "mean and the dashed one the null; all arms have one scale."
    return f"<p>{told}</p>{''.join(_metric(s, name) for name in s.metrics)}"


def _metric(s: Study, name: str) -> str:
    way = s.metrics[name]
    readings = [r for arm in s.arms if (r := arm.cells[name].reading) is not None]
    marks = [m for r in readings for m in (r.value, r.low, r.high, r.null) if m is not None and math.isfinite(m)]
    rows = [_row(s, arm, name, (min(marks, default=0.0), max(marks, default=1.0))) for arm in s.arms]
    side = {1: "more is better", -1: "less is better", 0: "which way is better is not known"}[way]
    heads = ("Arm", "Mean over seeds", "Each seed", "Difference", f"{confidence(s.level)} interval", "Assessment", "")
    return f"<h3>{breakable(name)}</h3><p><small>{side}</small></p>{table(heads, rows)}"


def _row(s: Study, arm: Arm, name: str, scale: tuple[float, float]) -> list[str]:
    cell, m = arm.cells[name], arm.metrics.get(name)
    shown_name = f'<span class="whole">{html(arm.name)}</span>'
    if cell.reading is None:
        return [shown_name, f'<span class="faint">not measured: {html(cell.why)}</span>', *[UNTOLD] * 4, ""]
    r = cell.reading
    seeds = "".join(f'<small class="whole">{k}: {html(written(name, v))}</small>' for k, v in cell.values.items())
    null = "null unknown" if r.null is None else f"null {html(written(name, r.null))}"
    mean = f'<b class="whole">{html(written(name, r.value))}</b>'
    mean += f'<small class="whole">{html(spread(name, r))}</small><small class="whole">{null}</small>'
    drawn = _drawn(r, s.arms[0].cells[name].reading, scale)
    if arm is s.arms[0]:
        compared = [UNTOLD, UNTOLD, "the baseline"]
    elif m is None:
        compared = [UNTOLD, UNTOLD, html(why_none(arm, name))]
    elif arm.comparison is not None and arm.comparison.barred:
        compared = [UNTOLD, UNTOLD, f"? {html(arm.comparison.barred)}"]
    else:
        told = f'<span aria-hidden="true">{MARKS[m.verdict]}</span> {html(assessment(m))}'
        told += f"<small>{html(uncounted(s, m))}</small>" if uncounted(s, m) else ""
        change = html(moved(m, float(m.a.mean()), m.difference)).replace(" %", "&nbsp;%")
        compared = [change, html(apart(m) or UNTOLD), told]
    return [shown_name, mean, seeds, *compared, drawn]


def _drawn(r: Reading, base: Reading | None, scale: tuple[float, float]) -> str:
    """The mean as a dot with its interval, the null and the baseline's mean as upright lines."""
    low, high = scale

    def x(value: float) -> str:
        return f"{4 + 152 * (value - low) / (high - low or 1.0):.1f}"

    def upright(kind: str, value: float) -> str:
        return f'<line class="{kind}" x1="{x(value)}" x2="{x(value)}" y1="1" y2="23"/>'

    parts = [upright("base", base.value)] if base is not None and math.isfinite(base.value) else []
    if r.null is not None and math.isfinite(r.null):
        parts.append(upright("null", r.null))
    if r.low is not None and r.high is not None:
        parts.append(f'<line class="whisker" x1="{x(r.low)}" x2="{x(r.high)}" y1="12" y2="12"/>')
    if math.isfinite(r.value):
        parts.append(f'<circle class="plain" cx="{x(r.value)}" cy="12" r="4"/>')
    frame = 'class="bar" viewBox="0 0 160 24" preserveAspectRatio="xMinYMid" role="img"'
    return f'<svg {frame} aria-label="the same as a picture">{"".join(parts)}</svg>'


def _told(items: Iterable[str], otherwise: str) -> str:
    said = [f"{item.rstrip('.')}." for item in items]
    return listed(said) if said else f"<p>{otherwise}</p>"


def _comparisons(s: Study) -> str:
    parts = []
    for arm in s.arms[1:]:
        if arm.comparison is None:
            parts.append(missing(f"{arm.name}: {arm.why}", "Not compared"))
            continue
        own = comparison_page.sections(arm.comparison)
        body = "".join(f"<h3>{html(own[key][0])}</h3>{own[key][1]}" for key in PARTS)
        parts.append(folded(f"{arm.name}: {arm.verdict}", body, "group"))
    lead = f"<p>A is the baseline, {html(s.sweep.baseline)}; B is the arm.</p>"
    return lead + "".join(parts)


def _runs(s: Study) -> str:
    rows = []
    for name, arm, seed, status, verdict, steps, took in runs(s):
        word = f'<b class="{html(verdict.replace(" ", "-"))}">{html(verdict)}</b>'
        rows.append((html(name), html(arm), seed, html(status), word, steps, html(took)))
    heads = ("Run", "Arm", "Seed", "Status", "Its own verdict", "Steps", "Time")
    return table(heads, rows, "runs")
