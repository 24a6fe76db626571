"""The verdict on a page: the word, why, what to try, and what could not be looked at."""

from collections.abc import Mapping, Sequence
from typing import Any

from intaglio.health.diagnosis import ESSENTIAL
from intaglio.reports.parts import folded, missing, table
from intaglio.reports.safe import html
from intaglio.reports.words import short

VERDICTS = {
    "healthy": ("✓", "No rule found a fault in what was measured."),
    "warnings": ("!", "Look at the findings before you rely on this run."),
    "failing": ("✗", "As it is, this run should not be relied on."),
    "cannot tell": ("?", "Too little was measured to call this run healthy or failing."),
}


def verdict(findings: Mapping[str, Any], why_none: str = "", whose: str = "", linked: bool = False) -> str:
    """A box with the word and the findings; ``findings`` are those of ``findings.json``.

    What was not measured is folded into it, or ``linked`` to where it stands.
    """
    given = str(findings.get("verdict", "cannot tell"))
    word = given if given in VERDICTS else "cannot tell"
    mark, meaning = VERDICTS[word]
    said = f"<p>{meaning}</p>" if not why_none else missing(why_none)
    if given != word:
        said += missing(f"findings.json gives the verdict {given!r}, which this version does not know")
    gaps, found = findings.get("not_measured", []), findings.get("findings", [])
    if not why_none:
        said += f"<p>{html(counted(findings))}" + (
            ' <a href="#unmeasured">What could not be looked at, and what to log</a>.</p>'
            if linked and gaps
            else "</p>"
        )
    if word == "cannot tell" and (blind := [gap for gap in gaps if gap.get("rule") in ESSENTIAL]):
        lines = "".join(f"<li><code>{html(gap['rule'])}</code>: {html(gap['reason'])}</li>" for gap in blind)
        said += f"<p>Before a run can be called healthy, these must have looked:</p><ul>{lines}</ul>"
    heading = f"<h3>{html(whose)}</h3>" if whose else ""
    rest = ""
    if gaps and not linked:
        lines = "".join(f"<li>{html(gap_line(gap))}</li>" for gap in gaps)
        rest = folded(f"Not measured: {len(gaps)}", f"<ul>{lines}</ul>", "unmeasured")
    told = "".join(_finding(f, k == 0 or len(found) < 3) for k, f in enumerate(found))
    big = f'<p class="word"><span aria-hidden="true">{mark}</span> {word.capitalize()}</p>'
    return f'<div class="verdict {word.replace(" ", "-")}">{heading}{big}{said}{told}{rest}</div>'


def counted(findings: Mapping[str, Any]) -> str:
    """How many rules looked, found something, and could not look."""
    accusing = len({f.get("rule") for f in findings.get("findings", [])})
    passed = len(findings.get("passed", []))
    blind = sum("rule" in gap for gap in findings.get("not_measured", []))
    looked = accusing + passed
    return (
        f"{looked} {'rule' if looked == 1 else 'rules'} looked: {accusing} found something, {passed} found nothing. "
        f"{blind} could not look."
    )


def gap_line(gap: Mapping[str, Any]) -> str:
    """What was not measured, and why."""
    return ": ".join(str(x) for x in (gap.get("rule") or gap.get("quantity"), gap.get("reason"), gap.get("log")) if x)


def _finding(finding: Mapping[str, Any], unfolded: bool) -> str:
    severity = str(finding.get("severity", "note"))
    evidence = ", ".join(
        f"{k} {short(v) if isinstance(v, float) else v}" for k, v in (finding.get("evidence") or {}).items()
    )
    remedies = "".join(f"<li>{_remedy(remedy)}</li>" for remedy in finding.get("remedies", []))
    candidates = "".join(f"<li>{html(c)}</li>" for c in finding.get("candidates", []))
    step = finding.get("step")
    seen = f"; first seen at step {step:,}" if isinstance(step, int) else ""
    behind = f"<p><b>What could be behind it</b></p><ul>{candidates}</ul>" if candidates else ""
    tries = f"<p><b>What to try, in this order</b></p><ol>{remedies}</ol>" if remedies else ""
    if not unfolded and (behind or tries):
        what = " · ".join(["What could be behind it"] * bool(behind) + ["What to try"] * bool(tries))
        behind, tries = folded(what, behind + tries), ""
    return (
        f'<div class="finding"><p><b class="{html(severity)}">{html(severity.capitalize())}</b> '
        f"{html(finding['message'])}</p>"
        f"<p><small>rule <code>{html(finding['rule'])}</code>{seen}"
        f"{'; evidence: ' + html(evidence) if evidence else ''}</small></p>{behind}{tries}</div>"
    )


def _remedy(remedy: Mapping[str, Any]) -> str:
    wait = f" (give it {remedy['wait']:,} steps)" if remedy.get("wait") else ""
    if not remedy.get("command"):
        return html(f"{remedy['do']}{wait}")
    return f"{html(remedy['do'].split(': --')[0] + wait)}<br><code>{html(remedy['command'])}</code>"


def unmeasured(gaps: Sequence[Mapping[str, Any]]) -> str:
    """What could not be looked at, why, and what to log: what a verdict of health needs first, the rest folded."""
    if not gaps:
        return "<p>Every rule that concerns this run has looked.</p>"
    first = [gap for gap in gaps if gap.get("rule") in ESSENTIAL or "rule" not in gap]
    rest = [gap for gap in gaps if gap not in first]
    shown = "<p>Nothing is called healthy because nobody looked. Needed before a run can be called healthy:</p>"
    shown = (shown + _gaps(first)) if first else "<p>All that a verdict of health needs was measured.</p>"
    if not rest:
        return shown
    told = f"{len(rest)} {'rule' if len(rest) == 1 else 'rules'} more that could not look"
    return shown + folded(told, _gaps(rest), unfolded=len(rest) <= 6)


def _gaps(gaps: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"<code>{html(g.get('rule') or g.get('quantity') or 'unnamed')}</code>",
            html(g["reason"]),
            html(g.get("log", "–")),
        )
        for g in gaps
    ]
    return table(("Rule or quantity", "Why it could not look", "What to log for it"), rows, "gaps")
