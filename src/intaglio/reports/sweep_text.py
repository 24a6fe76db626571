"""A sweep in words: lines for a terminal, and a Markdown document with its tables."""

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from intaglio.history.run_folder import write_atomically
from intaglio.reports.comparison_text import MARKS, WIDTH, aligned, assessment, markdown_table, moved, sentence, shown
from intaglio.reports.differences import Metric, confidence
from intaglio.reports.safe import markdown, plain, wrapped
from intaglio.reports.sweep import Arm, Study, Trained, apart, excludes_none, headline, spread, written
from intaglio.reports.words import duration

UNTOLD = "–"


def terminal_lines(s: Study) -> list[str]:
    """Which arm is better, the table of arms and metrics, what can and cannot be concluded, and where it all is."""
    lines = wrapped(headline(s) or "Nothing was compared.", WIDTH, rest="  ")
    heads = ("arm", *(plain(short_name(name), 24) for name in s.metrics), "")
    rows = [(plain(a.name, 40), *(_value(a, n, plain) for n in s.metrics), _against(s, a)) for a in s.arms]
    lines += ["", *aligned(heads, rows), "", *wrapped(f"Means over seeds; {s.correction}.", WIDTH)]
    for title, said in (("can be concluded", s.can), ("cannot be concluded", s.cannot)):
        lines += ["", f"What {title}:"]
        lines += [x for what in said for x in wrapped(plain(what), WIDTH, "- ", "  ")] or ["- nothing"]
    return [*lines, "", str(s.folder / "index.html")]


def markdown_document(s: Study) -> str:
    """The same as a document that a repository shows."""
    parts = [
        f"# {markdown(s.sweep.name)}",
        *([f"*{markdown(s.sweep.question)}*"] if s.sweep.question else []),
        f"**{markdown(headline(s) or 'Nothing was compared.')}**",
        "## Arms",
        markdown_table(("Arm", "What it changes", "Runs", "Against the baseline"), [_arm(s, a) for a in s.arms]),
        "## Arms × metrics",
        "Means over seeds with their 95 % intervals, the null after |; ✓ better than the baseline, ✗ worse, = "
        "equivalent, ? cannot tell. An arm as a whole is better where every metric is better or equivalent.",
        markdown_table(
            ("Arm", *(markdown(heading(s, n)) for n in s.metrics)),
            [(markdown(a.name), *(_cell(a, n) for n in s.metrics)) for a in s.arms],
        ),
        "## Differences from the baseline",
        f"{sentence(s.correction)}.",
        *(_differences(s, name) for name in s.metrics),
        "## What can be concluded",
        _listed(s.can),
        "## What cannot be concluded",
        _listed(s.cannot),
        "## Runs",
        markdown_table(
            ("Run", "Arm", "Seed", "Status", "Own verdict", "Steps", "Time"),
            [tuple(map(markdown, row)) for row in runs(s)],
        ),
        "## How it was made",
        "\n".join(f"- {markdown(what)}: {markdown(told)}" for what, told in made(s)),
        f"```sh\n{command(s)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def write(s: Study) -> Path:
    """Writes ``index.html``, ``REPORT.md``, ``sweep.json`` and, of a ``trade``, ``trade.png`` into the sweep's folder;
    the path of the page."""
    from intaglio.reports.sweep_page import page
    from intaglio.reports.sweep_sheet import trade

    if s.sweep.trade:
        trade(s, s.folder / "trade.png")

    content = {"status": "finished", **s.as_dict()}
    write_atomically(s.folder / "sweep.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(s.folder / "REPORT.md", markdown_document(s))
    write_atomically(s.folder / "index.html", page(s))
    return s.folder / "index.html"


def short_name(metric: str) -> str:
    """A held-out metric's name without what all of them have."""
    return metric.removeprefix("val/")


def heading(s: Study, metric: str) -> str:
    """A metric with its better side."""
    return f"{short_name(metric)} {({1: '↑', -1: '↓', 0: ''})[s.metrics[metric]]}".strip()


def changes(arm: Arm, safe: Callable[[object], str] = plain) -> str:
    """What an arm sets otherwise than the baseline."""
    told = ", ".join(f"{safe(key)} {safe(shown(x))} → {safe(shown(y))}" for key, (x, y) in arm.changed.items())
    return told or "the baseline"


def absent(arm: Arm) -> str:
    """What stands where an arm has no value."""
    return "not measured" if any(run.status == "finished" for run in arm.runs) else UNTOLD


def counts(arm: Arm) -> str:
    """How many of an arm's runs have finished."""
    done = sum(run.status == "finished" for run in arm.runs)
    return f"{done} of {len(arm.runs)}"


def runs(s: Study) -> list[tuple[str, ...]]:
    """A row for each run: name, arm, seed, how it ended, its own verdict, steps, time."""

    def row(r: Trained) -> tuple[str, ...]:
        record = r.record
        seconds, step = record.get("train_seconds"), record.get("step")
        status = f"{r.status}: {r.error}" if r.error else r.status
        name = r.folder.name if r.folder is not None else UNTOLD
        took = UNTOLD if seconds is None else duration(seconds)
        steps = UNTOLD if step is None else f"{step:,}"
        return name, r.arm, str(r.seed), status, str(record.get("verdict") or "not judged"), steps, took

    return [row(run) for arm in s.arms for run in arm.runs]


def made(s: Study) -> list[tuple[str, str]]:
    """Recipe, what all arms have in common, seeds, machine, and how claims are corrected."""
    common = ", ".join(f"{key} {value}" for key, value in s.sweep.common.items())
    return [
        ("Recipe", s.sweep.recipe), ("For all arms", common or "as the recipe has it"),
        ("Seeds", ", ".join(map(str, s.sweep.seeds))), ("Machine", s.machine.get("reason") or "as configured"),
        ("Claims", f"{s.correction}; within an arm, metrics are corrected for their number (Holm)"),
    ]  # fmt: skip


def command(s: Study) -> str:
    """What trains the sweep again, or goes on with it."""
    words = ["intaglio", "sweep", s.sweep.source, "--runs", str(s.folder.parent)]
    return shlex.join(
        [*words, "--seeds", ",".join(map(str, s.sweep.seeds)), *(f"--{k}={v}" for k, v in s.sweep.given.items())]
    )


def _arm(s: Study, arm: Arm) -> tuple[str, ...]:
    return markdown(arm.name), changes(arm, markdown), counts(arm), markdown(_against(s, arm))


def _against(s: Study, arm: Arm) -> str:
    return "baseline" if arm is s.arms[0] else arm.verdict


def _value(arm: Arm, name: str, safe: Callable[[object], str]) -> str:
    """A mean with the mark of its comparison."""
    cell, m = arm.cells[name], arm.metrics.get(name)
    if cell.reading is None:
        return absent(arm)
    barred = arm.comparison is not None and arm.comparison.barred
    mark = "" if m is None else f" {'?' if barred else MARKS[m.verdict]}"
    return safe(written(name, cell.reading.value)) + mark


def _cell(arm: Arm, name: str) -> str:
    r = arm.cells[name].reading
    if r is None:
        return absent(arm)
    interval = f" ({markdown(spread(name, r))})" if r.low is not None else ""
    null = "unknown" if r.null is None else markdown(written(name, r.null))
    return f"{_value(arm, name, markdown)}{interval} \\| {null}"


def _differences(s: Study, name: str) -> str:
    rows = list[tuple[str, ...]]()
    for arm in s.arms[1:]:
        m = arm.metrics.get(name)
        if m is None:
            rows.append((markdown(arm.name), UNTOLD, UNTOLD, markdown(why_none(arm, name))))
        else:
            more = uncounted(s, m)
            told = f"{MARKS[m.verdict]} {assessment(m)}" + (f" ({more})" if more else "")
            rows.append(
                (
                    markdown(arm.name),
                    *map(markdown, (moved(m, float(m.a.mean()), m.difference), apart(m) or UNTOLD, told)),
                )
            )
    head = ("Arm", "Difference", f"{confidence(s.level)} interval", "Assessment")
    return f"### {markdown(heading(s, name))}\n\n{markdown_table(head, rows)}"


def uncounted(s: Study, m: Metric) -> str:
    """Why one cannot tell though the interval of this one metric excludes 0; nothing where it does not."""
    return f"its interval excludes 0, but {len(s.metrics)} metrics were asked (Holm)" if excludes_none(m) else ""


def why_none(arm: Arm, name: str) -> str:
    """Why a metric of an arm was not compared."""
    left_out = arm.comparison.left_out.get(name) if arm.comparison else None
    return left_out or arm.why or arm.cells[name].why or "the baseline has not measured it"


def _listed(items: Sequence[str] | Iterable[str]) -> str:
    return "\n".join(f"- {markdown(item.rstrip('.'))}." for item in items) or "Nothing."
