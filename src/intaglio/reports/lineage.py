"""The runs of a folder: which came from which, the verdict on each, its best held-out value; and queries. No torch."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from intaglio.reports.arms import read_config, read_json
from intaglio.reports.query import query
from intaglio.reports.safe import columns, plain
from intaglio.reports.scales import direction
from intaglio.reports.words import short

DEPTH = 3
HEAD = ("run", "system", "verdict", "best held-out value", "step", "status", "seed", "started")


@dataclass(frozen=True)
class Entry:
    """One run: what its folder says of it. ``parent`` is the id of the run that it was fine-tuned from."""

    name: str
    path: Path
    id: str
    parent: str | None = None
    system: str | None = None
    status: str = "unknown"
    verdict: str = "not judged"
    seed: int | None = None
    step: int | None = None
    monitor: str = "val/loss/total"
    best: float | None = None
    best_step: int | None = None
    seconds: float | None = None
    started: str = ""
    findings: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the configuration."""
        told = {k: v for k, v in vars(self).items() if k != "config"}
        return told | {"path": str(self.path), "findings": list(self.findings)}


@dataclass(frozen=True)
class Lineage:
    """Runs in the order in which they were started, and what could not be read."""

    root: Path
    runs: tuple[Entry, ...]
    unreadable: tuple[str, ...] = ()
    everyone: Mapping[str, str] = field(default_factory=dict)
    """Ids of all runs that were found, those that a query left out as well, with their names."""

    def as_dict(self) -> dict[str, Any]:
        """The answer of ``--json``: ``runs[]``, with ``parent_name`` where the parent is here, and ``unreadable[]``."""
        runs = [r.as_dict() | {"parent_name": self.everyone.get(r.parent or "")} for r in self.runs]
        return {"root": str(self.root), "runs": runs, "unreadable": list(self.unreadable)}

    def where(self, expression: str) -> "Lineage":
        """The runs for which an expression holds, as ``verdict == 'failing' and optim.rate > 1e-3``.

        Names are those of ``FIELDS`` and dotted keys of the configuration; there are comparisons, ``in``, ``and``,
        ``or``, ``not``, texts, numbers and lists of them, and nothing else. What a run does not have fits no order.

        Raises:
            ValueError: anything else, or a name that no run has, with the nearest.
        """
        rows = [_fields(r, self.everyone) for r in self.runs]
        fits = query(expression, {name for row in rows for name in row} | set(FIELDS), FIELDS)
        kept = tuple(r for r, row in zip(self.runs, rows, strict=True) if fits(row))
        return replace(self, runs=kept)


FIELDS = (
    "name", "id", "parent", "system", "status", "verdict", "seed", "step", "best", "best_step", "seconds", "started",
    "findings",
)  # fmt: skip


def read_lineage(root: str | Path = "runs") -> Lineage:
    """All runs below a folder, up to three levels deep.

    Raises:
        ValueError: there is no such folder, or no run in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder: give the one that holds the run folders (runs, unless you chose another)."
        )
    if (root / "run.json").is_file():
        raise ValueError(f"{root} is a run itself: give the folder that holds it, {root.resolve().parent.name}.")
    runs, unreadable = list[Entry](), list[str]()
    for folder in run_folders(root):
        try:
            runs.append(_entry(folder, root))
        except (ValueError, OSError, AttributeError, TypeError) as error:
            unreadable.append(f"{folder} cannot be read: {' '.join(str(error).split())}")
    if not (runs or unreadable):
        raise ValueError(
            f"there are no runs under {root} yet: a training makes one, as intaglio train multimodal-small."
        )
    runs.sort(key=lambda r: (r.started, r.name))
    return Lineage(root, tuple(runs), tuple(unreadable), {r.id: r.name for r in runs})


def run_folders(root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Folders with a ``run.json`` below ``root``; nothing is looked for inside of one."""
    for path in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if (path / "run.json").is_file():
            yield path
        elif depth > 1:
            yield from run_folders(path, depth - 1)


def best_value(folder: Path, name: str) -> tuple[float, int] | None:
    """The best value of a held-out metric and its step: the highest where more is better, else the lowest."""
    file, sign = folder / "metrics.jsonl", 1 if direction(name) > 0 else -1
    if not file.is_file():
        return None
    needle = json.dumps(name).encode()
    found = list[tuple[float, int]]()
    with file.open("rb") as lines:
        for line in lines:
            if needle in line:
                try:
                    row = json.loads(line)
                    if row["name"] == name and math.isfinite(float(row["value"])):
                        found.append((float(row["value"]), int(row["step"])))
                except (ValueError, KeyError, TypeError):  # the torn end of a live or killed run
                    continue
    return max(found, key=lambda pair: sign * pair[0]) if found else None


def tree_lines(lineage: Lineage) -> list[str]:
    """A table for a terminal: children below the run that they came from."""
    by_id = {r.id: r for r in lineage.runs}
    children: dict[str, list[Entry]] = {}
    for run in lineage.runs:
        children.setdefault(run.parent if run.parent in by_id and run.parent else "", []).append(run)
    rows: list[tuple[str, ...]] = [HEAD]
    seen = set[Path]()

    def add(run: Entry, before: str, below: str) -> None:
        if run.path in seen:
            return
        seen.add(run.path)
        rows.append((before + plain(run.name, 48) + _origin(run, lineage, by_id), *_cells(run)))
        inner = children.get(run.id, [])
        for k, child in enumerate(inner):
            last = k == len(inner) - 1
            add(child, f"{below}{'└─ ' if last else '├─ '}", f"{below}{'   ' if last else '│  '}")

    for run in [*children.get("", []), *lineage.runs]:  # the rest: runs whose parents form a circle
        add(run, "", "")
    widths = [max(columns(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c + " " * (w - columns(c)) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if not lineage.runs:
        lines = [f"none of the {len(lineage.everyone)} runs fits"]
    return [*lines, *(f"! {plain(what)}" for what in lineage.unreadable)]


def _origin(run: Entry, lineage: Lineage, shown: Mapping[str, Entry]) -> str:
    if not run.parent or run.parent in shown:
        return ""
    known = lineage.everyone.get(run.parent)
    return f" (from {plain(known, 32)})" if known else f" (its parent {plain(run.parent, 14)} is not here)"


def _cells(run: Entry) -> tuple[str, ...]:
    best = "not measured" if run.best is None else f"{plain(run.monitor, 32)} {short(run.best)} at {run.best_step:,}"
    step = "–" if run.step is None else f"{run.step:,}"
    seed = "–" if run.seed is None else plain(run.seed, 12)
    system, day = plain(run.system or "–", 20), plain(run.started[:16]).replace("T", " ")
    return system, plain(run.verdict, 16), best, step, plain(run.status, 16), seed, day or "–"


def _entry(folder: Path, root: Path) -> Entry:
    record, findings, config = read_json(folder / "run.json"), read_json(folder / "findings.json"), read_config(folder)
    monitor = str(config.get("train.monitor") or "val/loss/total")
    best = best_value(folder, monitor)
    step, seconds, seed = (record.get(k) for k in ("step", "train_seconds", "seed"))
    return Entry(
        name=str(folder.relative_to(root)),
        path=folder,
        id=str(record.get("id") or folder),
        parent=None if record.get("parent") is None else str(record["parent"]),
        system=record.get("system"),
        status=str(record.get("status", "unknown")),
        verdict=str(findings.get("verdict", "not judged")),
        seed=seed,
        step=int(step) if isinstance(step, int | float) else None,
        monitor=monitor,
        best=best[0] if best else None,
        best_step=best[1] if best else None,
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        started=str(record.get("started") or ""),
        findings=tuple(str(f["rule"]) for f in findings.get("findings", [])),
        config=config,
    )


def _fields(run: Entry, names: Mapping[str, str]) -> dict[str, Any]:
    """What a query may ask of a run: its fields, then its settings."""
    own = {name: getattr(run, name) for name in FIELDS}
    own["parent"] = names.get(run.parent or "", run.parent)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in run.config.items()} | own
