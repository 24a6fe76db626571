"""The page of a run: one HTML file that needs nothing else, from the run folder or a history alone. No torch here.

What was not measured stands on the page as "not measured", with the reason. Every text is escaped, and the page forbids
itself (Content-Security-Policy) to load anything, and to run anything but the one script that stands in it.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from intaglio.health.diagnosis import Diagnosis
from intaglio.history.run_folder import RunFolder, write_atomically
from intaglio.reports import course, run_parts
from intaglio.reports.analysis import Analysis, measured
from intaglio.reports.parts import listed, missing, pairs, table
from intaglio.reports.run_parts import Part, read_part
from intaglio.reports.safe import html
from intaglio.reports.verdict import VERDICTS, unmeasured, verdict
from intaglio.reports.words import unit

Sections = Mapping[str, tuple[str, str]]
"""Anchor → heading and content."""
GRAVEST = ("failing", "warnings", "cannot tell", "healthy")


def write_page(folder: RunFolder) -> Path:
    """Writes ``report/index.html`` from what the run folder holds, its verdict among it, and returns its path."""
    folder.report.mkdir(exist_ok=True)
    path = folder.report / "index.html"
    known = measured(folder, Diagnosis("cannot tell", (), (), ()))
    write_atomically(path, run_page(known, read_part(folder.path / "findings.json")))
    return path


def run_page(a: Analysis, findings: Part) -> str:
    """The page of a run folder of ours; ``findings`` are as ``findings.json`` has them."""
    folder = a.folder
    assert folder is not None
    record, config = folder.record, read_part(folder.path / "config.yaml")
    gaps = (findings.content or {}).get("not_measured", [])
    sections = {
        "verdict": ("Verdict", run_parts.verdicts(folder, record, findings)),
        "numbers": ("Key numbers, beside their nulls", run_parts.numbers(read_part(folder.path / "evaluation.json"))),
        "proofs": ("Proofs", run_parts.proofs(folder)),
        **_course(a),
        "unmeasured": ("Not measured, and what to log", unmeasured(gaps)),
        "data": ("Data", run_parts.data(record)),
        "notices": ("Notices", run_parts.notices(record)),
        "use": ("How to use this model", run_parts.use(folder, record)),
        "setting": ("Configuration and versions", run_parts.setting(config, record)),
    }
    lead = html(run_parts.sentence(record, config.content or {}))
    stopped = run_parts.unfinished(folder, record)
    foot = f"Run {record.get('id', 'without id')}, started {record.get('started', 'unknown')}."
    return document(a.name, "a training run", f'<p class="lead">{lead}</p>{stopped}', sections, foot)


def history_page(a: Analysis) -> str:
    """The page of a history of somebody else's."""
    findings = a.diagnosis.as_dict()
    sections = {
        "verdict": ("Verdict", f'<div class="verdicts">{verdict(findings, linked=True)}</div>'),
        **_course(a),
        "unmeasured": ("Not measured, and what to log", unmeasured(findings["not_measured"])),
        "notices": ("How it was read", _reading(a)),
        "setting": ("Configuration", _configuration(a)),
    }
    return document(a.name, "a history", f'<p class="lead">{html(sentence(a))}</p>', sections, f"Read from {a.source}.")


def sentence(a: Analysis) -> str:
    """What was read, how long it is, and from where."""
    first, last = a.span
    count = len(a.metrics)
    state = f" Its status is “{a.status}”." if a.status else ""
    return (
        f"{count:,} {'metric' if count == 1 else 'metrics'} over {unit(a.axis)} {first:,} to {last:,} "
        f"({a.rows:,} {'row' if a.rows == 1 else 'rows'}){'' if a.folder else f', read as {a.format}'}.{state}"
    )


def overview(title: str, analyses: Sequence[Analysis], links: Mapping[int, str], notes: Sequence[str]) -> str:
    """The page of a file that holds many runs: a row for each, the gravest first, linked to its own page."""
    order = sorted(range(len(analyses)), key=lambda k: GRAVEST.index(_word(analyses[k])))
    rows = []
    for k in order:
        a = analyses[k]
        name = f'<a href="{html(links[k])}">{html(a.name)}</a>' if k in links else html(a.name)
        mark = VERDICTS[_word(a)][0]
        first = a.diagnosis.findings[0].message if a.diagnosis.findings else "–"
        word = f'<b class="{_word(a).replace(" ", "-")}"><span aria-hidden="true">{mark}</span> {_word(a)}</b>'
        rows.append((name, word, html(first), html(sentence(a))))
    counts = {word: sum(_word(a) == word for a in analyses) for word in VERDICTS}
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    body = table(("Run", "Verdict", "Gravest finding", "What was read"), rows, "runs")
    sections = {"runs": ("Runs", f"{listed(notes) if notes else ''}{body}")}
    lead = f'<p class="lead">{len(analyses)} runs: {told}.</p>'
    return document(title, "histories", lead, sections, f"Read from {analyses[0].source}.")


def _word(a: Analysis) -> str:
    return a.diagnosis.verdict if a.diagnosis.verdict in VERDICTS else "cannot tell"


def _course(a: Analysis) -> dict[str, tuple[str, str]]:
    return {
        "curves": ("Curves", course.curves(a)),
        "phases": ("Phases and learning rate", course.phases(a)),
        "meanings": ("What the numbers mean together", course.meanings(a)),
        "statistics": ("Each metric in numbers", course.statistics(a)),
    }


def _reading(a: Analysis) -> str:
    facts = pairs([("format", a.format), ("axis", a.axis), ("rows", f"{a.rows:,}"), ("metrics", f"{len(a.metrics):,}")])
    told = listed(a.notices) if a.notices else "<p>Nothing was damaged, repeated, out of order or left out.</p>"
    return f"{told}{facts}<h3>Names</h3>{course.names(a)}"


def _configuration(a: Analysis) -> str:
    if not a.config:
        return missing("no configuration stands beside the history", "Not recorded")
    plain = json.loads(json.dumps(a.config, default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return (
        f'<pre tabindex="0" aria-label="configuration"><code>{"<br>".join(map(html, text.splitlines()))}</code></pre>'
    )


def document(title: str, kind: str, lead: str, sections: Sections, foot: str) -> str:
    """A whole page; ``lead`` and the contents of sections are HTML, the rest text."""
    style, script = _own("page.css"), _own("curves.js")
    scripted = 'figure class="plot"' in "".join(content for _, content in sections.values())
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(style)}'; base-uri 'none'; form-action 'none'"
    )
    policy += f"; script-src 'sha256-{_digest(script)}'" if scripted else ""
    links = "".join(f'<li><a href="#{key}">{html(heading)}</a></li>' for key, (heading, _) in sections.items())
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{html(heading)}</h2>{content}</section>'
        for key, (heading, content) in sections.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{html(title)} – intaglio</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#{next(iter(sections))}">Skip to the {html(next(iter(sections.values()))[0].lower())}</a>
<header>
<p class="kind">intaglio · {html(kind)}</p>
<h1>{html(title)}</h1>
{lead}
<nav aria-label="On this page"><ul>{links}</ul></nav>
</header>
<main>{body}</main>
<footer>{html(foot)} Page written {datetime.now(UTC).isoformat(timespec="seconds")}.</footer>
{f"<script>{script}</script>" if scripted else ""}
</body>
</html>
"""


@cache
def _own(name: str) -> str:
    return (files("intaglio.reports") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
