"""What was changed from run to run, from the configurations themselves: only what differs from the parent. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from intaglio.history.run_folder import find
from intaglio.reports.arms import read_config, read_json
from intaglio.reports.comparison_text import shown
from intaglio.reports.differences import plain_values
from intaglio.reports.lineage import best_value, run_folders
from intaglio.reports.safe import code, markdown, plain
from intaglio.reports.words import short

NAMES = ("name", "runs")


@dataclass(frozen=True)
class Change:
    """What a run has that its parent had not: ``changed`` old → new, ``added``, ``removed``.

    ``remarks`` are whole sentences about what is no setting: data, code, resumption, a parent that is gone. ``notes``
    are those of ``notes.md``.
    """

    run: str
    id: str
    date: str
    parent: str | None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    added: Mapping[str, Any] = field(default_factory=dict)
    removed: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    notes: str = ""


@dataclass(frozen=True)
class Changelog:
    """The changes of a run and of all runs that it came from, the newest first."""

    run: str
    entries: tuple[Change, ...]

    def as_dict(self) -> dict[str, Any]:
        """The answer of ``--json``: ``run`` and ``entries[]``, each with ``changed`` as {key: [old, new]}."""
        return {"run": self.run, "entries": [plain_values(asdict(e)) for e in self.entries]}


def changelog(run: str | Path) -> Changelog:
    """The changes of a run and of its ancestors; these are looked for beside it and under ``runs/``.

    Raises:
        ValueError: no run folder, or one whose files are damaged.
    """
    path = find(run).path
    known = dict[str, Path]()
    for root in {path.resolve().parent, Path("runs").resolve()}:
        for folder in run_folders(root) if root.is_dir() else ():
            try:
                known.setdefault(str(read_json(folder / "run.json").get("id")), folder)
            except ValueError:  # a damaged run that may have nothing to do with this one
                continue
    entries, seen = list[Change](), set[str]()
    at: Path | None = path
    while at is not None:
        record = _record(at)
        seen.add(str(record.get("id")))
        parent_id = record.get("parent")
        parent = known.get(str(parent_id)) if parent_id else None
        if parent is not None and str(parent_id) in seen:
            raise ValueError(f"{path}: its run.json and those of its parents name each other in a circle.")
        entries.append(_change(at, record, parent))
        at = parent
    return Changelog(path.name, tuple(entries))


def markdown_document(log: Changelog) -> str:
    """The changelog as a document, an entry a run."""
    parts = [f"# Changelog of {markdown(log.run)}"]
    for e in log.entries:
        parent = f", from {markdown(e.parent)}" if e.parent else ""
        parts.append(f"## {markdown(e.date or 'undated')} · {markdown(e.run)}{parent}")
        lines = [f"- changed: {code(k)} {code(shown(x))} → {code(shown(y))}" for k, (x, y) in e.changed.items()]
        lines += [f"- added: {code(k)} {code(shown(v))}" for k, v in e.added.items()]
        lines += [f"- removed: {code(k)}, was {code(shown(v))}" for k, v in e.removed.items()]
        lines += [f"- {markdown(remark)}" for remark in e.remarks]
        parts.append("\n".join(lines) or "- nothing was changed")
        if e.notes:
            parts.append("\n".join(f"> {markdown(line)}".rstrip() for line in e.notes.splitlines()))
    return "\n\n".join(parts) + "\n"


def _record(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "run.json")
    except ValueError as error:
        raise ValueError(f"{folder}: run.json cannot be read ({' '.join(str(error).split())}).") from None


def _change(folder: Path, record: Mapping[str, Any], parent: Path | None) -> Change:
    try:
        new = read_config(folder)
        old = read_config(parent) if parent is not None else {}
    except ValueError as error:
        raise ValueError(f"{folder} or its parent: {error}.") from None
    remarks = list[str]()
    changed: dict[str, tuple[Any, Any]] = {}
    added: dict[str, Any] = {}
    removed: dict[str, Any] = {}
    if parent is not None:
        before = _record(parent)
        keys = [k for k in (old | new) if k not in NAMES]
        changed = {k: (old[k], new[k]) for k in keys if k in old and k in new and old[k] != new[k]}
        added = {k: new[k] for k in keys if k not in old}
        removed = {k: old[k] for k in keys if k not in new}
        remarks += _apart(before, record)
    elif record.get("parent"):
        told = ", ".join(map(str, record.get("changed_from_parent") or [])) or "none"
        remarks.append(
            f"Its parent {record['parent']} is no longer here, so old values are not known; keys that run.json says "
            f"were changed: {told}."
        )
    else:
        system, seed = record.get("system") or "a training of your own", record.get("seed")
        remarks.append(f"The line begins here: {system}, seed {seed}, {len(new)} settings in config.yaml.")
    for resumed in record.get("resumed") or []:
        where = resumed.get("from", "a checkpoint") if isinstance(resumed, dict) else "a checkpoint"
        remarks.append(f"Went on from {where}.")
    if record.get("autopilot"):
        remarks.append(str(record["autopilot"]))
    remarks.append(_outcome(folder, record, str(new.get("train.monitor") or "val/loss/total")))
    name = parent.name if parent is not None else None
    gone = str(record["parent"]) if record.get("parent") and parent is None else name
    date = str(record.get("started") or "")[:10]
    return Change(
        folder.name, str(record.get("id")), date, gone, changed, added, removed, tuple(remarks), _notes(folder)
    )


def _apart(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is no setting, and differs."""
    said = []
    if old.get("fingerprint") != new.get("fingerprint"):
        said.append("The data, its split or its tokenizer is another one (their fingerprint differs).")
    commits = [(r.get("git_commit") or {}).get("commit") for r in (old, new)]
    if all(commits) and commits[0] != commits[1]:
        said.append(f"The code is another one: commit {plain(commits[0])[:10]} → {plain(commits[1])[:10]}.")
    versions = [r.get("versions") or {} for r in (old, new)]
    for package in sorted(versions[0].keys() & versions[1].keys()):
        if versions[0][package] != versions[1][package]:
            said.append(f"{package} {versions[0][package]} → {versions[1][package]}.")
    return said


def _outcome(folder: Path, record: Mapping[str, Any], monitor: str) -> str:
    """How it ended."""
    try:
        verdict = read_json(folder / "findings.json").get("verdict", "not judged")
    except ValueError:
        verdict = "cannot be read"
    best = best_value(folder, monitor)
    value = f"best {monitor} {short(best[0])} at step {best[1]:,}" if best else f"no {monitor} was measured"
    return f"Status {record.get('status', 'unknown')}; verdict {verdict}; {value}."


def _notes(folder: Path) -> str:
    """``notes.md`` without its heading."""
    file = folder / "notes.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    lines = text.strip().splitlines()
    return "\n".join(lines[1:] if lines[:1] and lines[0].startswith("# ") else lines).strip()
