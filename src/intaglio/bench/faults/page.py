"""What the fault benchmark found, as a page: ``python -m intaglio.bench.faults.page docs/faults-results.md``.

Reads ``benchmarks/faults.json``, which ``intaglio bench faults`` wrote, or the file that is named behind the page.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from intaglio.bench import Result, markdown

LONGEST = 200
"""Characters of a cell."""


def page(found: dict[str, Any]) -> str:
    """Markdown of what ``bench faults`` wrote."""
    families = {
        "family": "family",
        "split": "split",
        "faults": "faults",
        "found": "found",
        "named_first": "named first",
    }
    families |= {"healthy": "healthy", "not_able": "of them not able", "accused": "accused", "warned": "warned"}
    rules = {"rule": "rule", "due": "faults", "named": "named", "families": "families"}
    rules |= {"healthy_warned": "healthy runs warned", "healthy_failed": "failed"}
    others = {"program": "program", "version": "version", "faulty": "faulty", "failed": "failed", "warned": "warned"}
    others |= {"healthy": "healthy", "accused": "accused", "healthy_warned": "healthy warned"}
    cases = {key: key for key in ("case", "rule", "training", "named", "step", "evidence")}
    parts = [
        "# The fault benchmark: results",
        f"{found['trainings']} trainings, made by `intaglio bench faults`"
        + (f"; {found['left']} of its catalogue are still to be run" if found["left"] else "")
        + ". How it works, and what it does not cover, stands in [the fault benchmark](faults.md).",
        *_scores(found),
        "## By family",
        _table(found["families"], families),
        "## The real defects",
        "What was wrong in the projects that intaglio comes from, rebuilt: E engravings, D diffusion, V questions, J "
        "grids.",
        _table(found["cases"], cases),
        "## What was missed, and why",
        _table(found["misses"], {key: key for key in ("training", "what", "due", "said", "why")}),
        "## By rule",
        _table(found["rules"], rules),
        "## What was said instead",
        "Where the first finding was not the cause.",
        _table(found["confusion"], {"due": "due", "said": "said first", "times": "times"}),
    ]
    if told := [o for o in found["others"] if o["version"]]:
        parts += [
            "## The same logs, read by others",
            "Judged families; every program is given the same file, a line of JSON for each step.",
            _table(told, others),
        ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _scores(found: dict[str, Any]) -> list[str]:
    """Those of judged families and of the others; or of all of them where none is judged any more."""
    results, development = (markdown([_result(r) for r in found[key]]) for key in ("results", "development"))
    if not _judged(found):
        return [
            "## All families",
            "All are development by now: rules learnt from them, so this says how well they know what they have seen. "
            "How well they do on programs that they had not seen, [each round](faults.md) told.",
            results,
        ]
    judged = [
        "## Judged families",
        "No limit of a rule was set on them: they were written without sight of what the rules say of them; [how "
        "blind](faults.md) that is.",
        results,
    ]
    return judged + (["## Development families", development] if len(found["families"]) > len(_judged(found)) else [])


def _judged(found: dict[str, Any]) -> list[Any]:
    return [row for row in found["families"] if row["split"] == "judged"]


def _result(row: dict[str, Any]) -> Result:
    return Result(**{k: v for k, v in row.items() if k != "met"})


def _table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[_cell(key, row[key]) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else "Nothing."


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "rule":
        return f"[{value}](rules/{value}.md)"
    if column == "step" and value == 0:
        return "before training"
    if column == "named" and value == "":
        return "**no**"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text if len(text) < LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " …"
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    source = Path(sys.argv[2] if len(sys.argv) > 2 else "benchmarks/faults.json")
    found = json.loads(source.read_text(encoding="utf-8"))
    Path(sys.argv[1]).write_text(page(found), encoding="utf-8")
