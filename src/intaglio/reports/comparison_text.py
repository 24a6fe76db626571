"""A comparison in words: lines for a terminal, and a Markdown document with its tables. Names are a stranger's."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from intaglio.history.run_folder import write_atomically
from intaglio.reports.comparison import Comparison
from intaglio.reports.differences import BETTER, DIFFERS, EQUIVALENT, UNSHARED, UNSURE, WORSE, Metric, confidence
from intaglio.reports.matched import relative
from intaglio.reports.safe import columns, markdown, plain, wrapped
from intaglio.reports.weighing import gap, number
from intaglio.reports.words import change

MARKS = {BETTER: "✓", WORSE: "✗", EQUIVALENT: "=", DIFFERS: "≠", UNSURE: "?", UNSHARED: "–"}
ROWS = 14
"""Metrics that a terminal shows, and whose course a document shows."""
WIDTH = 110


def terminal_lines(c: Comparison) -> list[str]:
    """The verdict, what was changed, the metrics that matter most, and what may mislead."""
    a, b = heads(c)
    lines = wrapped(f"{c.verdict.upper()}: {plain(c.reason)}", WIDTH, rest="  ")
    lines += wrapped(c.recommendation, WIDTH, rest="  ")
    lines += ["", *aligned(("setting", a, b), [(plain(k, 40), *cells) for k, *cells in _settings(c, plain)])]
    if not c.changed:
        lines[-1:] = ["no setting is known to differ"]
    chosen = c.metrics[:ROWS]
    rows = [(plain(m.name, 40), *cells(m), f"{MARKS[m.verdict]} {m.verdict}") for m in chosen]
    lines += ["", *aligned(("metric", a, b, "change", f"{confidence(c.level)} interval of B − A", ""), rows)]
    if len(c.metrics) > ROWS:
        lines.append(f"… and {len(c.metrics) - ROWS} metrics more: --json, or --out FILE.md or FILE.html")
    lines += [
        "",
        f"Values at the end of the common {c.axis}s; {counts(c)}; {c.margin}; corrected for the number of claims.",
    ]
    lines += [line for what in (*c.confounds, *c.notices) for line in wrapped(plain(what), WIDTH, "! ", "  ")]
    for name, why in list(c.left_out.items())[:4]:
        lines += wrapped(f"{plain(name, 60)}: {plain(why)}", WIDTH, "left out: ", "  ")
    return lines


def markdown_document(c: Comparison) -> str:
    """The comparison as a document that a repository shows: verdict, tables of metrics and of their course, notes."""
    a, b = (markdown(h) for h in heads(c))
    metrics = [
        (markdown(m.name), *map(markdown, cells(m)), f"{MARKS[m.verdict]} {markdown(assessment(m))}") for m in c.metrics
    ]
    parts = [
        f"# {a} against {b}",
        f"**Verdict: {c.verdict}.** {_sentence(c.reason)}",
        f"**Recommendation:** {markdown(c.recommendation)}",
        "## What was changed",
        markdown_table(("Setting", a, b), [(markdown(k), *rest) for k, *rest in _settings(c, markdown)])
        if c.changed
        else "No setting is known to differ.",
        "## Metrics",
        f"Values at the end of the steps that both arms have; {counts(c)}; {markdown(c.margin)}. "
        "Assessments are of B against A; those beside the verdict’s are corrected for their number (Holm).",
        markdown_table(("Metric", a, b, "Change", f"{confidence(c.level)} interval of B − A", "Assessment"), metrics),
        "## Step by step",
        f"Between two rows of an arm its value at a {c.axis} is interpolated.",
        *([_steps(m, c, (a, b)) for m in followed(c)] or ["Nothing was measured at more than one step."]),
        "## From first to last",
        f"At the {c.axis}s that both arms have, means over the runs of an arm.",
        markdown_table(
            ("Metric", "Arm", "First", "Lowest", "Highest", "Last", "Change"),
            [row for m in followed(c) for row in _course(m)],
        ),
        "## Cost",
        markdown_table(("", a, b, "B / A"), cost_rows(c)),
        "## What may mislead",
        _list(c.confounds, "Nothing was found besides the change itself."),
        "## Notes",
        _list([*c.notices, *(f"{name} was left out: {why}" for name, why in c.left_out.items())], "None."),
        "## Runs",
        markdown_table(
            ("Arm", "Run", "Seed", "Read as", "From"),
            [
                (
                    arm,
                    markdown(r.name),
                    markdown("–" if r.seed is None else r.seed),
                    markdown(r.format),
                    markdown(r.source),
                )
                for arm, runs in zip("AB", (c.a, c.b), strict=True)
                for r in runs
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def write(c: Comparison, path: str | Path) -> Path:
    """Writes ``.md``, ``.html`` or ``.json``, atomically.

    Raises:
        ValueError: another ending.
    """
    import json

    path = Path(path)
    if path.suffix == ".html":
        from intaglio.reports.comparison_page import page

        text = page(c)
    elif path.suffix == ".md":
        text = markdown_document(c)
    elif path.suffix == ".json":
        text = json.dumps(c.as_dict(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    else:
        raise ValueError(f"{path}: a comparison is written as .md, .html or .json.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def heads(c: Comparison) -> tuple[str, str]:
    """What the columns of the arms are called."""
    a, b = (arm if name == arm else f"{arm}: {plain(name, 32)}" for arm, name in zip("AB", c.names, strict=True))
    return a, b


def counts(c: Comparison) -> str:
    """How many runs each arm has."""
    one = len(c.a) == len(c.b) == 1
    return "one run each" if one else f"{len(c.a)} runs in A, {len(c.b)} in B"


def cells(m: Metric) -> tuple[str, str, str, str]:
    """A, B, change and interval, as text."""
    old, new = float(m.a.mean()), float(m.b.mean())
    interval = "–" if m.low is None or m.high is None else f"{gap(m, m.low)} to {gap(m, m.high)}"
    return number(m, old), number(m, new), moved(m, old, m.difference), interval


def moved(m: Metric, old: float, difference: float) -> str:
    """A difference in the metric's unit, and as a share of the old value where it is one."""
    size = f"{'+' if difference > 0 else ''}{gap(m, difference)}{' points' if m.share else ''}"
    share = relative(old, old + difference)
    return size if share is None else f"{size} ({change(share)})"


def assessment(m: Metric) -> str:
    """The verdict on a metric with what is to be known about it."""
    return f"{m.verdict}: {m.why}" if m.why and m.why != f"one run each: {m.verdict}" else m.why or m.verdict


def cost_rows(c: Comparison) -> list[tuple[str, ...]]:
    """Parameters, training time and steps of both arms."""
    rows = list[tuple[str, ...]]()
    for key, (x, y) in c.cost.items():
        title = {"parameters": "Parameters", "seconds": "Training time, s", "steps": "Steps"}[key]
        times = f"{y / x:.3g}" if x and y else "–"
        rows.append((title, *("not recorded" if v is None else f"{v:,.0f}" for v in (x, y)), times))
    return rows


def shown(value: Any) -> str:
    """A setting's value as it stands in a configuration."""
    return "–" if value is None else "true" if value is True else "false" if value is False else str(value)


def sentence(text: str) -> str:
    """With a capital letter, unless it begins with a name."""
    name = any(mark in text.split(" ", 1)[0] for mark in "/_.:")
    return text if name else f"{text[:1].upper()}{text[1:]}"


def followed(c: Comparison) -> list[Metric]:
    """Metrics whose course is shown: the first ones that were measured at more than one step."""
    return [m for m in c.metrics if len(m.matched.steps) > 1][:ROWS]


def span(first: int, last: int, axis: str) -> str:
    """``step 200``, or ``steps 200–862``."""
    return f"{axis} {first:,}" if first == last else f"{axis}s {first:,}–{last:,}"


def _settings(c: Comparison, safe: Callable[[object], str]) -> list[tuple[str, str, str]]:
    return [(key, safe(shown(x)), safe(shown(y))) for key, (x, y) in c.changed.items()]


def _steps(m: Metric, c: Comparison, arms: tuple[str, str]) -> str:
    """A table of both arms over equal windows."""
    rows = [
        (span(w.first, w.last, c.axis), number(m, w.a), number(m, w.b), moved(m, w.a, w.b - w.a)) for w in m.windows
    ]
    points = all(w.first == w.last for w in m.windows)
    how = "" if points else " (means over windows of equal length)"
    return f"### {markdown(m.name)}{how}\n\n{markdown_table((c.axis.capitalize(), *arms, 'Change'), rows)}"


def _course(m: Metric) -> list[tuple[str, ...]]:
    rows = list[tuple[str, ...]]()
    for arm, course in zip("AB", m.courses, strict=True):
        share = "–" if course.change is None else change(course.change)
        rows.append(
            (
                markdown(m.name), arm, f"{number(m, course.first)} ({m.matched.first:,})",
                f"{number(m, course.low)} ({course.low_step:,})", f"{number(m, course.high)} ({course.high_step:,})",
                f"{number(m, course.last)} ({m.matched.last:,})", share,
            )
        )  # fmt: skip
    return rows


def _sentence(text: str) -> str:
    return f"{markdown(sentence(text))}."


def _list(items: Iterable[str], otherwise: str) -> str:
    return "\n".join(f"- {_sentence(item.rstrip('.'))}" for item in items) or otherwise


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first and the last to the left."""
    widths = [max(columns(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    last = len(head) - 1

    def line(row: Sequence[str]) -> str:
        padded = (
            cell + " " * (w - columns(cell)) if k in (0, last) else " " * (w - columns(cell)) + cell
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return [line(row) for row in (head, *rows)]
