"""The same runs' logs before other programs that judge logs: trainproof, runmedic, runwise; and before ours.

Each is given what a training loop usually writes, a line of JSON for each step: losses, held-out losses, gradient
norm, learning rate, and every other number under its own name. What audits found is not in it, so that our own row says
what a log alone can tell. A run counts as found where the gravest word of a program falls: FAIL, critical,
failing; what merely warns is counted beside it.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from intaglio.bench.faults.judge import Outcome
from intaglio.health.diagnosis import record_of
from intaglio.history import Series
from intaglio.history.run_folder import RunFolder

USUAL = {
    "train/loss/total": "loss",
    "val/loss/total": "eval_loss",
    "train/optimizer/gradient_norm": "grad_norm",
    "train/optimizer/rate": "learning_rate",
}
"""Our names, as logs usually have them."""

Word = str
"""``fail``, ``warning`` or ``pass``."""


def compared(outcomes: Sequence[Outcome], place: Path) -> list[dict[str, Any]]:
    """Of each program: of how many faulty and healthy runs it read the log, how many it failed and how many warned."""
    rows: list[dict[str, Any]] = []
    logs = {o.name: log for o in outcomes if (log := written(place / o.name)) is not None}
    for name, judge in JUDGES.items():
        if find_spec(name) is None:
            rows.append({"program": name, "version": None, "why": "not installed: pip install 'intaglio[judges]'"})
            continue
        said = {o.name: judge(logs[o.name]) for o in outcomes if o.name in logs}
        faulty = [said[o.name] for o in outcomes if o.faulty and o.name in said]
        healthy = [said[o.name] for o in outcomes if not o.faulty and o.name in said]
        rows.append(
            {
                "program": name + (", from the log alone" if name == "intaglio" else ""),
                "version": _version(name),
                "faulty": len(faulty),
                "failed": faulty.count("fail"),
                "warned": faulty.count("warning"),
                "healthy": len(healthy),
                "accused": healthy.count("fail"),
                "healthy_warned": healthy.count("warning"),
            }
        )
    return rows


def written(folder: Path) -> Path | None:
    """The log of a run as JSON lines, which is written beside what it comes from; None where it has no history."""
    if not (folder / "metrics.jsonl").is_file():
        return None
    record = record_of(RunFolder(folder))
    rows: dict[int, dict[str, float]] = {}
    for name, s in (_with_total(record.series)).items():
        if name.startswith("train/term."):
            continue
        for step, value in zip(s.steps.tolist(), s.values.tolist(), strict=True):
            rows.setdefault(step, {"step": step})[USUAL.get(name, name.replace("/", "_"))] = value
    file = folder / "log.jsonl"
    file.write_text("".join(json.dumps(rows[step]) + "\n" for step in sorted(rows)), encoding="utf-8")
    return file


def _with_total(series: Mapping[str, Series]) -> dict[str, Series]:
    """With the held-out total where only its terms were logged, weighed as training weighs them at last."""
    found = dict(series)
    terms = {n: s for n, s in series.items() if n.startswith("val/loss/")}
    if terms and "val/loss/total" not in terms and len({len(s) for s in terms.values()}) == 1:
        weights = {n: series.get(n.replace("val/loss", "train/weight")) for n in terms}
        first = next(iter(terms.values()))
        total = sum(s.values * (w.value if (w := weights[n]) else 1.0) for n, s in terms.items())
        found["val/loss/total"] = Series.of(first.steps, total)  # type: ignore[arg-type]  # an array: there are terms
    return found


def _trainproof(log: Path) -> Word:
    told = _answer("trainproof", "epoch", str(log), "--format", "jsonl", "--json")
    return {"FAIL": "fail", "WARN": "warning"}.get(str(told.get("worst_verdict")), "pass")


def _runmedic(log: Path) -> Word:
    told = json.dumps(_answer("runmedic", "diagnose", str(log), "--json"))
    return "fail" if '"critical"' in told else "warning" if '"warning"' in told else "pass"


def _runwise(log: Path) -> Word:
    from runwise import detect_anomalies

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    found = {a.severity for a in detect_anomalies(rows, val_loss_key="eval_loss")}
    return "fail" if "critical" in found else "warning" if found else "pass"


def _ours(log: Path) -> Word:
    from intaglio.analysis import judge

    found = {f.severity for judged in judge(str(log)) for f in judged.diagnosis.findings}
    return "fail" if "fail" in found else "warning" if "warning" in found else "pass"


JUDGES: dict[str, Callable[[Path], Word]] = {
    "intaglio": _ours,
    "trainproof": _trainproof,
    "runmedic": _runmedic,
    "runwise": _runwise,
}


def _answer(program: str, *words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", program, *words], capture_output=True, text=True, check=False)
    try:
        told = json.loads(done.stdout)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {"runs": told}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
