"""False alarms: thirty healthy multimodal runs, and what the rules say of each: ``intaglio bench healthy``.

Three sets of data, five pairs of size and optimizer, two seeds; an hour and a half on one core, kept in
``runs/bench-healthy``: what was trained before is only judged again. A run counts as healthy by what its model can do,
which no rule decides: captions beat a bigram model, images the mean image, and exchanging latents costs something, each
with its whole interval. Warnings are counted, and not held against a target: five hundred steps leave some models weak.
"""

import json
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from intaglio.bench import Result
from intaglio.bench.shapes import write_shapes
from intaglio.health.diagnosis import diagnose_run
from intaglio.history.run_folder import RunFolder
from intaglio.training.run import train

SMALL = [
    "--train.steps=500", "--train.batch_size=32", "--train.validate_items=128", "--optim.warmup=60",
    "--prior.steps=300", "--prior.width=96", "--data.image_size=32", "--model.encoder_layers=2",
    "--model.decoder_layers=2", "--model.heads=4",
]  # fmt: skip
SIZES = {
    "narrow": ["--model.channels=[16,24,32]", "--model.latent=32", "--model.width=64", "--model.feed_forward=128"],
    "middle": ["--model.channels=[24,32,48]", "--model.latent=64", "--model.width=96", "--model.feed_forward=192"],
    "wide": ["--model.channels=[32,48,64]", "--model.latent=128", "--model.width=128", "--model.feed_forward=256"],
}
OPTIMIZERS = {
    "muon": [],
    "muon, constant rate": ["--optim.schedule=constant", "--optim.rate=1e-3"],
    "adamw": ["--optim.kind=adamw", "--optim.rate=1e-3"],
}
VARIANTS = (
    ("narrow", "muon"), ("middle", "muon"), ("middle", "muon, constant rate"), ("middle", "adamw"), ("wide", "adamw"),
)  # fmt: skip
SEEDS = (0, 1)
ABLE = ("val/caption/token_accuracy", "val/image/r2_over_mean_image", "val/caption/shuffled_latent_nats")


def measure() -> tuple[list[Result], dict[str, Any]]:
    """How many of the runs were accused of something, and of what."""
    place = Path("runs") / "bench-healthy"
    sources = {
        "shapes": [f"--data.source={write_shapes(place / 'shapes', 1200)}", "--data.items=null"],
        "engravings": ["--data.items=4000"],
        "few engravings": ["--data.items=1500", "--train.batch_size=48"],
    }
    runs: list[dict[str, Any]] = []
    for data, (size, optimizer), seed in product(sources, VARIANTS, SEEDS):
        words = [*SMALL, *SIZES[size], *OPTIMIZERS[optimizer], *sources[data], f"--seed={seed}"]
        name = "-".join([data, size, optimizer, str(seed)]).replace(", ", "-").replace(" ", "-")
        runs.append(
            {"data": data, "size": size, "optimizer": optimizer, "seed": seed}
            | one("multimodal-small", place, name, words, ABLE)
        )
        print(json.dumps(runs[-1]), flush=True)
    return counted(runs)


def counted(runs: list[dict[str, Any]]) -> tuple[list[Result], dict[str, Any]]:
    """The results of all runs that ``one`` gave."""
    count, able = len(runs), [r["able"] for r in runs if r["able"] is not None]
    results = [
        Result("runs whose model does what it was trained for", len(able), sum(able), n=len(able)),
        Result("runs with a failing finding", 0, sum(bool(r["fail"]) for r in runs), better="lower", n=count),
    ]
    return results, {"warned": sum(bool(r["warning"]) for r in runs), "runs": runs}


def one(recipe: str, place: Path, name: str, words: list[str], able_by: Sequence[str]) -> dict[str, Any]:
    """Trains a run, unless it is there, and judges it; able is whether ``able_by`` beat their nulls."""
    trained = (place / name / "evaluation.json").is_file()
    folder = RunFolder(place / name) if trained else train(recipe, [*words, *_called(place, name)], quiet=True)
    assert folder is not None
    found = diagnose_run(folder.path)
    readings = json.loads((folder.path / "evaluation.json").read_text(encoding="utf-8"))["readings"]
    accused = {s: sorted({f.rule for f in found.findings if f.severity == s}) for s in ("fail", "warning")}
    able = all(_lower(readings[name]) > readings[name]["null"] for name in able_by) if able_by else None
    measured = {name: round(readings[name]["value"], 4) for name in able_by}
    seconds = round(folder.record["train_seconds"], 1)
    return {"verdict": found.verdict, **accused, "able": able, **measured, "train_seconds": seconds}


def _called(place: Path, name: str) -> list[str]:
    """Options for the name; what a killed benchmark left half-trained under it goes."""
    shutil.rmtree(place / name, ignore_errors=True)
    return [f"--runs={place}", f"--name={name}"]


def _lower(reading: dict[str, float]) -> float:
    low = reading.get("low")
    return reading["value"] if low is None else low
