"""Runs that a benchmark measures: trained once, and measured as they stand from then on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intaglio import config as configuration
from intaglio.bench import Result
from intaglio.history.run_folder import RunFolder

RESOLVED = {f"train.{key}" for key in ("device", "precision", "validate_every", "checkpoint_every", "epochs")}
RESOLVED |= {"data.question_length", "data.answer_length"}
"""What a run's configuration says more exactly than its recipe."""

Readings = dict[str, dict[str, Any]]


def finished(recipe: str, words: Sequence[str] = (), name: str = "") -> RunFolder:
    """The finished run of a recipe under ``runs/``, trained now unless it is there.

    Raises:
        ValueError: what is there is unfinished, or of another configuration.
    """
    from intaglio.api import train

    name = name or recipe
    folder, words = RunFolder(Path("runs") / name), [*words, f"--name={name}"]
    if folder.path.is_dir() and not (folder.path / "evaluation.json").is_file():
        raise ValueError(f"{folder.path} is unfinished: intaglio train --resume {folder.path}, or remove it.")
    if folder.path.is_dir():
        wanted, there = configuration.load(recipe, words), folder.config()
        apart = sorted(configuration.diff(wanted, there).keys() - RESOLVED)
        if not apart:
            return folder
        raise ValueError(f"{folder.path} is of another configuration than {recipe} ({', '.join(apart)}); move it away.")
    trained = train(recipe, words)
    assert trained is not None
    return trained


def told(folder: RunFolder, facts: dict[str, Any]) -> Readings:
    """What was measured of a run; ``facts["runs"]`` gains its verdict and circumstances."""
    readings: Readings = json.loads((folder.path / "evaluation.json").read_text(encoding="utf-8"))["readings"]
    findings = json.loads((folder.path / "findings.json").read_text(encoding="utf-8"))
    record = folder.record
    facts.setdefault("runs", {})[folder.path.name] = {
        "verdict": findings["verdict"],
        "findings": [f"{f['severity']}: {f['rule']}" for f in findings["findings"]],
        "minutes": round(minutes(folder), 1),
        "items": record["data"]["items"],
        "versions": record["versions"],
        "readings": {name: r for name, r in readings.items() if name.count(".") < 2},
    }
    return readings


def minutes(folder: RunFolder) -> float:
    """How long it trained."""
    return float(folder.record["train_seconds"]) / 60


def result(quantity: str, target: float, r: dict[str, Any]) -> Result:
    """A reading against its target."""
    return Result(quantity, target, r["value"], null=r["null"], n=r["n"], low=r["low"], high=r["high"])
