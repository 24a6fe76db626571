"""The targets of the autoencoder and of diffusion: ``intaglio bench diffusion``, with ``--data FOLDER`` photos too.

A run of the same name and configuration that has finished is measured rather than trained again. Photos are a folder
of images with labels that ``train`` reads.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intaglio import config as configuration
from intaglio.bench import Result
from intaglio.history.run_folder import RunFolder

RESOLVED = {f"train.{key}" for key in ("device", "precision", "validate_every", "checkpoint_every", "epochs")}
"""What a run's configuration says more exactly than its recipe."""


def measure(photos: str | None = None) -> tuple[list[Result], dict[str, Any]]:
    """Trains the recipes as they stand, one after another, and reads their held-out numbers."""
    facts: dict[str, Any] = {"runs": {}}
    results: list[Result] = []
    trained = _run("autoencoder-small")
    told = _told(trained, facts)
    results.append(_result("autoencoder, 64 px: R² of the round trip", 0.95, told["val/round_trip/r2"]))
    for recipe, name in (("diffusion-small", "pixels, 32 px"), ("diffusion-latent", "latents, 64 px")):
        folder = _run(recipe)
        told = _told(folder, facts)
        for w in (3, 9):
            accuracy = told[f"val/guidance.{w}/class_accuracy"]
            results.append(_result(f"{name}: class accuracy at w = {w}", 0.9, accuracy))
        results.append(Result(f"{name}: lower end of it at w = 3", 0.85, told["val/guidance.3/class_accuracy"]["low"]))
        results.append(
            _result(f"{name}: diversity at w = 9 over that of real images", 0.5, told["val/guidance.9/diversity"])
        )
        results.append(Result(f"{name}: minutes of training", 30, _minutes(folder), better="lower"))
    if photos is not None:
        folder = _run("diffusion-photos", [f"--data.source={photos}"])
        told = _told(folder, facts)
        results.append(_result("photos, 32 px: class accuracy at w = 3", 0.5, told["val/guidance.3/class_accuracy"]))
        results.append(Result("photos: minutes of training", 60, _minutes(folder), better="lower"))
    return results, facts


def _run(recipe: str, words: Sequence[str] = ()) -> RunFolder:
    """The finished run of a recipe under ``runs/``, trained now unless it is there."""
    from intaglio.api import train

    folder = RunFolder(Path("runs") / recipe)
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


def _told(folder: RunFolder, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    readings = json.loads((folder.path / "evaluation.json").read_text(encoding="utf-8"))["readings"]
    findings = json.loads((folder.path / "findings.json").read_text(encoding="utf-8"))
    record = folder.record
    facts["runs"][folder.path.name] = {
        "verdict": findings["verdict"],
        "findings": [f"{f['severity']}: {f['rule']}" for f in findings["findings"]],
        "minutes": round(_minutes(folder), 1),
        "items": record["data"]["items"],
        "versions": record["versions"],
        "readings": {name: r for name, r in readings.items() if name.count(".") < 2},
    }
    return readings


def _minutes(folder: RunFolder) -> float:
    return float(folder.record["train_seconds"]) / 60


def _result(quantity: str, target: float, r: dict[str, Any]) -> Result:
    return Result(quantity, target, r["value"], null=r["null"], n=r["n"], low=r["low"], high=r["high"])
