"""What our rules say of the benchmark's trainings, at each step at which a monitor would have judged. No torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intaglio.bench.faults.case import Case, Fault
from intaglio.health.diagnosis import diagnose_run, record_of
from intaglio.health.finding import SEVERITIES
from intaglio.health.replay import first_said
from intaglio.history.run_folder import RunFolder


@dataclass(frozen=True)
class Said:
    """A finding: its rule and severity, what it rests on, and the step at which it was first said, 0 before any."""

    rule: str
    severity: str
    step: int
    message: str = ""
    evidence: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a training, and what was said of it.

    ``due`` are the rules that name its fault, empty for a healthy one. ``said`` is in the order of the verdict: the
    gravest first. ``able`` is whether it does what it is trained for, None where that was not measured.
    """

    name: str
    family: str
    split: str
    seed: int
    faulty: bool
    minor: bool
    due: tuple[str, ...]
    case: str
    what: str
    status: str
    error: str
    steps: int
    seconds: float
    monitor_seconds: float
    able: bool | None
    said: tuple[Said, ...]

    def detected_at(self) -> int | None:
        """The first step at which it fails, or warns if its fault is a minor one; None if never."""
        grave = ("fail", "warning") if self.minor else ("fail",)
        return min((s.step for s in self.said if s.severity in grave), default=None)

    def place_of_cause(self) -> int | None:
        """The place among its findings, from 1, of the first that names the cause; None if none does."""
        loud = [s for s in self.said if s.severity != "note"]
        return next((k for k, s in enumerate(loud, 1) if s.rule in self.due), None)

    def named_at(self) -> int | None:
        """The step at which the cause was first named."""
        return min((s.step for s in self.said if s.rule in self.due and s.severity != "note"), default=None)

    @property
    def accused(self) -> tuple[str, ...]:
        """Rules that fail it."""
        return tuple(dict.fromkeys(s.rule for s in self.said if s.severity == "fail"))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judged(case: Case, record: dict[str, Any], folder: Path) -> Outcome:
    """The outcome of a training that ``run`` kept."""
    kind = case.kind
    fault = kind if isinstance(kind, Fault) else None
    said = [Said(s["rule"], s["severity"], 0, s["message"]) for s in record.get("static", [])]
    steps = 0
    if (folder / "run.json").is_file() and record["status"] != "crashed":
        history = record_of(RunFolder(folder))
        first, steps = first_said(history), history.last_step
        said += [
            Said(f.rule, f.severity, first.get((f.rule, f.severity), steps), f.message, dict(f.evidence))
            for f in diagnose_run(folder).findings
        ]
    said.sort(key=lambda s: SEVERITIES.index(s.severity))
    able = {name: value > null for name, (value, null) in record.get("able", {}).items()}
    return Outcome(
        case.name, case.family.name, case.family.split, case.seed, fault is not None, bool(fault and fault.minor),
        fault.rules if fault else (), kind.case, kind.what, record["status"], record["error"], steps,
        round(record.get("seconds", 0.0), 2), round(record.get("monitor_seconds", 0.0), 3),
        all(able.values()) if able else None, tuple(said),
    )  # fmt: skip


def write(outcomes: Sequence[Outcome], file: Path) -> None:
    """One row for each training, as Parquet; what was said is JSON in a column."""
    import polars as pl

    rows = [o.as_dict() | {"due": list(o.due), "said": json.dumps([asdict(s) for s in o.said])} for o in outcomes]
    file.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(file)


def loud(outcome: Outcome) -> Iterator[Said]:
    """What was said but notes."""
    yield from (s for s in outcome.said if s.severity != "note")
