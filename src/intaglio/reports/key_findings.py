"""The report in words: KEY_FINDINGS.txt on a page of 80 columns, ANALYSIS_REPORT.md for a repository."""

import json
from collections.abc import Iterable, Sequence

import numpy as np
import yaml

from intaglio.history.statistics import Description
from intaglio.reports import advice
from intaglio.reports.analysis import Analysis, evidence_groups
from intaglio.reports.course import rate_lines, slope_lines, spread_lines
from intaglio.reports.limits import null_of
from intaglio.reports.page import sentence
from intaglio.reports.safe import code, columns, markdown, plain, wrapped
from intaglio.reports.verdict import VERDICTS
from intaglio.reports.words import change, percent, short, unit

WIDTH = 80
FILES = {
    "index.html": "the page: verdict, curves to read out, statistics, what was not measured",
    "comprehensive_analysis.png": "nine panels of the course",
    "trend_analysis.png": "trends with fitted families, correlations, identities",
    "ANALYSIS_REPORT.md": "everything in words and tables",
    "KEY_FINDINGS.txt": "this page",
    "findings.json": "verdict and findings for programs; findings.sarif, junit.xml for CI",
}
MARKS = {"fail": "✗", "warning": "!", "note": "·"}


def key_findings(a: Analysis) -> str:
    """One page of at most 80 columns, in the form of the original document."""
    word = a.diagnosis.verdict if a.diagnosis.verdict in VERDICTS else "cannot tell"
    lines = _head("KEY FINDINGS", plain(a.name, WIDTH - 6))
    lines += _section("SUMMARY")
    lines += [f"{VERDICTS[word][0]} {word.upper()}", *_said(advice.verdict_sentence(a)), "", *_said(sentence(a))]
    lines += _findings(a)
    lines += _section("TRAINING DYNAMICS")
    for number, name in enumerate(a.main(6), 1):
        lines += _dynamics(a, number, name)
    lines += _section("STATISTICS", "CV = deviation / mean, of every row, and settled: after the transient (= none)")
    lines += _table(a, 12)
    lines += _section("HEALTH LIST", "✓ a rule found nothing   ✗ fails   ! warning   ? could not look")
    lines += _health(a)
    lines += _section("WHAT HAPPENED DURING TRAINING", "phases as found, not set beforehand")
    lines += [x for p in a.phases[:8] for x in _said(p.what, f"{_range(p.first, p.last)}: ")] or _said(
        "No common change of course was found."
    )
    if a.relations or a.derived:
        lines += _section("WHAT THE NUMBERS MEAN")
        lines += [x for r in a.relations[:6] for x in _said(r.said, "≡ ", "  ")]
        lines += [
            x
            for d in a.derived[:8]
            for x in _said(f"{d.name} {short(d.value)} {d.unit}".strip() + f": {d.said}", "→ ", "  ")
        ]
    lines += _section("WHAT TO KEEP", "what no rule accuses; that is no proof that it is best")
    lines += [x for k in advice.keep(a) for x in _said(k, "- ", "  ")] or _said("Nothing was found sound.")
    lines += _section("WHAT TO CHANGE")
    changes = [(f, r) for f in a.diagnosis.findings for r in f.remedies[:2]]
    lines += [x for f, r in changes[:8] for x in _said(f"{r.do} ({f.rule})", "- ", "  ")] or _said(
        "Nothing that a finding asks for."
    )
    lines += _section("NEXT OPTIONS")
    for number, o in enumerate(advice.options(a), 1):
        lines += _said(f"{o.what}: {o.why}.", f"{number}. ", "   ")
        lines += _said(f"cost: {o.cost}", "   ") + (_said(o.command, "   $ ", "     ") if o.command else [])
    lines += _section("VALIDATION CHECKLIST", "what was not measured stands first")
    lines += [x for check in advice.checks(a) for x in _said(check, "[ ] ", "    ")]
    lines += _section("FILES")
    lines += [x for file, what in FILES.items() for x in _said(what, f"{file:<27} ", " " * 28)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _head(title: str, name: str) -> list[str]:
    inner = WIDTH - 2

    def centred(text: str) -> str:
        room = inner - columns(text)
        return f"║{' ' * (room // 2)}{text}{' ' * (room - room // 2)}║"

    return [f"╔{'═' * inner}╗", centred(title), centred(name), f"╚{'═' * inner}╝"]


def _section(title: str, note: str = "") -> list[str]:
    return ["", "", title, "─" * WIDTH, *(_said(note) if note else []), *([""] if note else [])]


def _said(text: str, first: str = "", rest: str | None = None) -> list[str]:
    return wrapped(plain(text), WIDTH, first, rest)


def _findings(a: Analysis) -> list[str]:
    found = a.diagnosis.findings
    lines = [x for f in found[:6] for x in _said(f"{f.message} [{f.rule}]", f"{MARKS[f.severity]} ", "  ")]
    more = [f"  and {len(found) - 6} findings more in ANALYSIS_REPORT.md"] if len(found) > 6 else []
    return ["", *lines, *more] if lines else []


def _dynamics(a: Analysis, number: int, name: str) -> list[str]:
    d = a.descriptions[name]
    said = d.rises if d.finite > 2 else f"{d.finite} finite {'value' if d.finite == 1 else 'values'}"
    title = f"{number}. {plain(name, 58)}"
    lines = ["", f"{title}{' ' * max(2, WIDTH - columns(title) - columns(said))}{said}"]
    told = []
    if d.finite:
        moved = f" (level {change(d.change)})" if d.finite > 1 and np.isfinite(d.change) else ""
        told.append(f"first {short(d.first)}, last {short(d.last)}{moved}")
    if d.transient is not None and np.isfinite(d.change_in_transient) and d.change:
        end = f"{unit(a.axis, many=False)} {d.transient:,}"
        told.append(f"{percent(d.change_in_transient)} of the change lies in the transient, before {end}")
    told += [f"trend when settled: {', '.join(slope_lines(a, d))}"] if slope_lines(a, d) else []
    told += [d.family.said] if d.family else []
    null = null_of(a.series[name])
    told.append(f"null {short(null)}" if null is not None else "null unknown")
    told += [f"{d.rows - d.finite:,} of {d.rows:,} rows not finite"] if d.finite < d.rows else []
    for k, line in enumerate(told):
        last = k == len(told) - 1
        lines += _said(line, "   └─ " if last else "   ├─ ", "      " if last else "   │  ")
    return lines


def _table(a: Analysis, most: int) -> list[str]:
    rows: list[tuple[str, ...]] = [("metric", "first", "last", "mean", "CV", "settled")]
    named = a.main(most)
    for name in named:
        d = a.descriptions[name]
        spread = [percent(d.cv), percent(d.settled_cv) if d.transient is not None else "="]
        rows.append((plain(name, 24), *(_narrow(x) for x in (d.first, d.last, d.mean)), *spread))
    lines = [
        f"{head}{' ' * (25 - columns(head))}" + "".join(f"{cell.replace(' times', '×'):>11}" for cell in cells)
        for head, *cells in rows
    ]
    left = len([n for n in a.metrics if n in a.descriptions]) - len(named)
    return [*lines, *([f"and {left:,} more in ANALYSIS_REPORT.md"] if left else [])]


def _narrow(value: float) -> str:
    """At most ten columns."""
    return text if len(text := short(value)) <= 10 else f"{value:.2g}".replace("-", "−")


def _health(a: Analysis) -> list[str]:
    found = {f.rule: f for f in reversed(a.diagnosis.findings)}
    lines = [x for f in reversed(found.values()) for x in _said(f"{f.rule}", f"[{MARKS[f.severity]}] ", "    ")]
    lines += [
        x for f, rules in advice.passed_by_family(a).items() for x in _said(f"{f}: {', '.join(rules)}", "[✓] ", "    ")
    ]
    families: dict[str, list[str]] = {}
    for gap in a.diagnosis.not_measured:
        families.setdefault(gap.get("family", "quantities"), []).append(gap.get("rule") or gap.get("quantity") or "")
    return lines + [x for f, rules in families.items() for x in _said(f"{f}: {', '.join(rules)}", "[?] ", "    ")]


def _range(first: int, last: int) -> str:
    return f"{first:,} to {last:,}"


# Markdown


def report(a: Analysis) -> str:
    """The whole report, as a repository renders it; its pictures lie beside it."""
    word = a.diagnosis.verdict if a.diagnosis.verdict in VERDICTS else "cannot tell"
    parts = [
        f"# Analysis of {markdown(a.name)}",
        f"**{VERDICTS[word][0]} {word.capitalize()}.** {markdown(advice.verdict_sentence(a))}",
        markdown(sentence(a)) + f" Source: {code(a.source)}.",
        "![Nine panels: losses, their terms, held out against training, other metrics, spread, verdict]"
        "(comprehensive_analysis.png)",
        "## Findings",
        *(_markdown_findings(a) or ["None."]),
        "## Each metric",
        _rows(
            (
                "Metric",
                "Rows",
                "First",
                "Last",
                "Change of level",
                "in the transient",
                "Mean ± deviation",
                "Spread",
                "Trend",
                "Family",
            ),
            (_markdown_row(a, n, d) for n, d in a.descriptions.items()),
        ),
        "![Trends with fitted families; correlations with identities marked](trend_analysis.png)",
        "## Phases",
        "Found from changes of course that metrics have in common, not set beforehand.",
        _bullets(f"{_range(p.first, p.last)}: {p.what}" for p in a.phases) or "None was found.",
        "## Learning rate",
        _bullets(rate_lines(a)) or "Not measured: log it as `train/optimizer/rate`.",
        "## What the numbers mean together",
        _bullets(r.said for r in a.relations) or "No metric was found to be fixed by another one.",
        *[f"One piece of evidence: {', '.join(map(code, group))}." for group in evidence_groups(a.relations)],
        _rows(
            ("Quantity", "Value", "Null", "How, and what it means"),
            (
                (
                    markdown(d.name),
                    markdown(f"{short(d.value)} {d.unit}".strip()),
                    short(d.null) if d.null is not None else "unknown",
                    markdown(d.said),
                )
                for d in a.derived
            ),
        ),
        "## What to keep",
        "What rules looked at and none accuses. That is no proof that it is best.",
        _bullets(advice.keep(a)) or "Nothing was found sound.",
        "## Next options",
        _rows(
            ("Option", "Why", "Cost", "Command"),
            (
                (markdown(o.what), markdown(o.why), markdown(o.cost), code(o.command) if o.command else "–")
                for o in advice.options(a)
            ),
        ),
        "## Not measured",
        _rows(
            ("Rule or quantity", "Why it could not look", "What to log"),
            (
                (
                    code(g.get("rule") or g.get("quantity") or "unnamed"),
                    markdown(g["reason"]),
                    markdown(g.get("log") or "–"),
                )
                for g in a.diagnosis.not_measured
            ),
        )
        or "Every rule that concerns this run has looked.",
        "## Before it is relied on",
        "\n".join(f"- [ ] {markdown(check)}" for check in advice.checks(a)),
        "## How it was read",
        _bullets([f"format: {a.format}", f"axis: {a.axis}", *a.notices]),
        _rows(("Their name", "Ours"), ((code(t), code(o)) for t, o in a.renamed.items() if t != o)),
        *_fenced(a),
        "## Files",
        "\n".join(f"- [{name}]({name}): {what}" for name, what in FILES.items() if name != "ANALYSIS_REPORT.md"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_findings(a: Analysis) -> list[str]:
    told = []
    for f in a.diagnosis.findings:
        evidence = ", ".join(f"{k} {short(v)}" for k, v in f.evidence.items())
        step = f"; first seen at {f.step:,}" if f.step is not None else ""
        lines = [f"### {MARKS[f.severity]} {f.rule}", markdown(f.message)]
        lines += [f"Evidence: {markdown(evidence)}{step}."] if evidence else []
        lines += ["What could be behind it:", _bullets(f.candidates)] if f.candidates else []
        remedies = [
            f"{k}. {markdown(r.do)}{f' (give it {r.wait:,} steps)' if r.wait else ''}"
            + (f": {code(r.command)}" if r.command else "")
            for k, r in enumerate(f.remedies, 1)
        ]
        lines += ["What to try, in this order:", "\n".join(remedies)] if remedies else []
        told += lines
    return told


def _markdown_row(a: Analysis, name: str, d: Description) -> Sequence[str]:
    if not d.finite:
        return (code(name), f"{d.rows:,}", "no finite value", *["–"] * 7)
    transient = d.transient is not None and np.isfinite(d.change_in_transient)
    return (
        code(name),
        f"{d.rows:,}" + (f", {d.rows - d.finite:,} not finite" if d.finite < d.rows else ""),
        short(d.first),
        short(d.last),
        change(d.change) if d.finite > 1 and np.isfinite(d.change) else "–",
        f"{percent(d.change_in_transient)}, before {d.transient:,}" if transient else "no transient",
        f"{short(d.mean)} ± {short(d.std)}",
        "; ".join(spread_lines(a, d)) or "–",
        f"{d.rises}: {', '.join(slope_lines(a, d))}" if slope_lines(a, d) else d.rises,
        d.family.name if d.family else "–",
    )


def _rows(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, or nothing where it would be empty."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *body]) if body else ""


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {markdown(item)}" for item in items)


def _fenced(a: Analysis) -> list[str]:
    if not a.config:
        return ["## Configuration", "None stands beside the history."]
    text = yaml.safe_dump(json.loads(json.dumps(a.config, default=str)), sort_keys=False, allow_unicode=True)
    lines = [plain(line) for line in text.splitlines()]
    longest = max((len(line) - len(line.lstrip("`")) for line in map(str.strip, lines)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["## Configuration", "\n".join([f"{fence}yaml", *lines, fence])]
