"""What the fault benchmark found, as a page: ``python -m intaglio.bench.faults.page docs/faults-results.md``.

Reads ``benchmarks/faults.json``, which ``intaglio bench faults`` wrote.
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
        "## Judged families",
        "No limit of a rule was set on them: they were written without sight of what the rules say of them; [how "
        "blind](faults.md) that is.",
        markdown([_result(r) for r in found["results"]]),
        "## Development families",
        markdown([_result(r) for r in found["development"]]),
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
        "On judged families, where the first finding was not the cause.",
        _table(found["confusion"], {"due": "due", "said": "said first", "times": "times"}),
        "## The same logs, read by others",
        "Judged families; every program is given the same file, a line of JSON for each step.",
        _table([o for o in found["others"] if o["version"]], others),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


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
    found = json.loads(Path("benchmarks/faults.json").read_text(encoding="utf-8"))
    Path(sys.argv[1]).write_text(page(found), encoding="utf-8")
