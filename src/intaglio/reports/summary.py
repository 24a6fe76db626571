"""The end of a run in the terminal: each number beside its null, then the verdict with its findings."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from intaglio.health.diagnosis import Diagnosis
from intaglio.health.finding import Finding
from intaglio.history import Reading
from intaglio.reports.words import beats_null, interval, paired, quantity, written

MARKS = {True: "✓", False: "✗", None: " "}
HEAD = ("", "quantity", "training", "held out", "95 % interval", "null", "the null is")


def summary_lines(readings: Mapping[str, Reading], diagnosis: Diagnosis) -> list[str]:
    """Lines for a terminal. ✓ stands before what beats its null with its whole interval, ✗ before what does not."""
    rows = [_row(name, *sides) for name, sides in paired(dict(readings)).items()]
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
    """The verdict, each finding with what to try in order, and how many rules passed or could not look."""
    counted = f"{len(diagnosis.passed)} rules passed, {len(diagnosis.not_measured)} quantities were not measured"
    lines = [f"{diagnosis.verdict.upper()}: {counted}.", *chain.from_iterable(map(_finding, diagnosis.findings))]
    names = [gap.get("rule") or gap["quantity"] for gap in diagnosis.not_measured]
    if names:
        lines += textwrap.wrap(
            f"not measured: {', '.join(names)} (--json says what to log)", 100, subsequent_indent="  "
        )
    return lines


def _finding(finding: Finding) -> list[str]:
    said = textwrap.wrap(f"{finding.severity}: {finding.message} [{finding.rule}]", 100, subsequent_indent="  ")
    said += [f"  or: {candidate}" for candidate in finding.candidates]
    for number, remedy in enumerate(finding.remedies, 1):
        wait = f" (give it {remedy.wait:,} steps)" if remedy.wait else ""
        said.append(f"  try {number}: {remedy}{wait}")
    return said
