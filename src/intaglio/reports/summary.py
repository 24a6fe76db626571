"""The end of a run in the terminal: each number beside its null, then the verdict with its findings."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from intaglio.health.diagnosis import ESSENTIAL, Diagnosis
from intaglio.health.finding import Finding
from intaglio.history import Reading
from intaglio.reports.safe import plain
from intaglio.reports.words import beats_null, detail, interval, paired, quantity, written

if TYPE_CHECKING:
    from intaglio.health.foreign import Judged

MARKS = {True: "✓", False: "✗", None: " "}
HEAD = ("", "quantity", "training", "held out", "95 % interval", "null", "the null is")


def summary_lines(readings: Mapping[str, Reading], diagnosis: Diagnosis) -> list[str]:
    """Lines for a terminal. ✓ stands before what beats its null with its whole interval, ✗ before what does not."""
    rows = [_row(name, *sides) for name, sides in paired(dict(readings)).items() if not detail(name)]
    if not rows:
        return ["nothing was measured", *verdict_lines(diagnosis)]
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    table = [_line(row, widths) for row in (HEAD, *rows)]
    return [*table, "", *verdict_lines(diagnosis)]


def _row(name: str, train: Reading | None, val: Reading | None) -> tuple[str, ...]:
    what, shown = quantity(name), val or train
    assert shown is not None
    title = f"{what.title} ({what.unit})" if what.unit not in ("", "%") else what.title
    numbers = [written(r.value, what.unit) if r else "–" for r in (train, val)]
    null = "unknown" if shown.null is None else written(shown.null, what.unit)
    return (MARKS[beats_null(shown, what.better)], title, *numbers, interval(shown, what.unit), null, what.null)


def _line(row: Iterable[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    aligned = (f"{cell:{'>' if 2 <= k <= 5 else '<'}{w}}" for k, (cell, w) in enumerate(zip(row, widths, strict=True)))
    return "  ".join(aligned).rstrip()


def verdict_lines(diagnosis: Diagnosis) -> list[str]:
    """The verdict, each finding with what to try in order, and which rules could not look, and why."""
    gaps = [gap for gap in diagnosis.not_measured if "rule" in gap]
    looked = len(diagnosis.passed) + len({f.rule for f in diagnosis.findings})
    counted = f"{looked} rules looked, {len(diagnosis.passed)} of them found nothing; {len(gaps)} could not look."
    lines = [f"{diagnosis.verdict.upper()}: {counted}", *chain.from_iterable(map(_finding, diagnosis.findings))]
    for gap in gaps:
        if gap["rule"] in ESSENTIAL or "log" not in gap:
            log = f"; log {gap['log']}" if "log" in gap else ""
            lines += _wrapped(f"not measured: {gap['rule']}, since {gap['reason'].replace('needs', 'it needs')}{log}")
    unread = Counter(gap["family"] for gap in gaps if "log" in gap and gap["rule"] not in ESSENTIAL)
    if unread:
        told = ", ".join(f"{family} {count}" for family, count in unread.items())
        lines += _wrapped(f"nothing to read for {unread.total()} rules ({told}): --json says what to log for each")
    return lines


def history_lines(judged: "Sequence[Judged]") -> list[str]:
    """Lines for a terminal on each run of a foreign history: how it was read, then its verdict; many in a line each."""
    if len(judged) > 1:
        width = min(40, max(len(plain(x.history.name)) for x in judged))
        lines = [f"{judged[0].history.format}: {len(judged)} runs; --run NAME for the whole of one"]
        for x in judged:
            said = ", ".join(dict.fromkeys(f.rule for f in x.diagnosis.findings if f.severity != "note"))
            lines.append(f"  {plain(x.history.name):<{width}}  {x.diagnosis.verdict.upper():<11}  {said}".rstrip())
        return lines
    (x,) = judged
    h = x.history
    rows = max((len(s) for s in h.given.values()), default=0)
    names = ", ".join(f"{theirs} as {ours}" for theirs, ours in x.renamed.items() if theirs != ours)
    lines = [f"{plain(h.name)}: {h.format}, {len(h.given):,} metrics, {rows:,} rows, by {plain(h.axis)}"]
    lines += _wrapped(f"read: {plain(names)}") if names else []
    if h.given and not any(name.count("/") == 2 for name in x.series):
        few = ", ".join([*map(plain, islice(h.given, 3)), *["…"][: len(h.given) > 3]])
        lines += _wrapped(
            f"note: none of its names is known here ({few}): --map NAME=train/loss/total says what is what"
        )
    lines += chain.from_iterable(_wrapped(f"note: {plain(notice)}") for notice in h.notices)
    return [*lines, *map(plain, verdict_lines(x.diagnosis))]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, subsequent_indent="  ")


def _finding(finding: Finding) -> list[str]:
    said = _wrapped(f"{finding.severity}: {finding.message} [{finding.rule}]")
    said += [f"  or: {candidate}" for candidate in finding.candidates]
    for number, remedy in enumerate(finding.remedies, 1):
        wait = f" (give it {remedy.wait:,} steps)" if remedy.wait else ""
        said.append(f"  try {number}: {remedy}{wait}")
        said += [f"         {remedy.command}"] * bool(remedy.command)
    return said
