"""False alarms of the image systems: an autoencoder, a text encoder and twenty diffusion runs, all of them healthy, and
what the rules say of each: ``intaglio bench healthy-diffusion``.

Pixels and latents, classes, texts and no condition, several sizes, objectives and optimizers, two seeds; kept in
``runs/bench-healthy-diffusion``: what was trained before is only judged again. A diffusion run counts as able where a
classifier sees the class that was asked for more often than chance, with its whole interval.
"""

import json
from pathlib import Path
from typing import Any

from intaglio.bench import Result
from intaglio.bench.healthy import counted, one
from intaglio.bench.shapes import write_shapes

COMMON = [
    "--train.batch_size=32", "--train.validate_items=96", "--health.probe=96", "--optim.warmup=60", "--train.ema=0.99",
    "--data.image_size=16", "--model.blocks=1", "--sampling.steps=12", "--sampling.each=20",
]  # fmt: skip
PIXELS = [*COMMON, "--model.patch=1", "--model.widths=[24,32]"]
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "pixels": ("diffusion-small", PIXELS),
    "pixels-wide": ("diffusion-small", [*PIXELS, "--model.widths=[32,48]"]),
    "pixels-patches": ("diffusion-small", [*PIXELS, "--model.patch=2", "--model.widths=[48,64]"]),
    "pixels-adamw": ("diffusion-small", [*PIXELS, "--optim.kind=adamw", "--optim.rate=1e-3"]),
    "pixels-x0": ("diffusion-small", [*PIXELS, "--loss.prediction=x0"]),
    "pixels-flow": ("diffusion-small", [*PIXELS, "--loss.prediction=flow", "--noise.kind=straight"]),
    "pixels-log-snr": ("diffusion-small", [*PIXELS, "--loss.weighting=log-snr"]),
    "latents": ("diffusion-latent", [*COMMON, "--data.image_size=32", "--model.widths=[24,32]"]),
    "texts": ("diffusion-text", PIXELS),
    "no-condition": ("diffusion-small", [*PIXELS, "--condition.by=none", "--sampling.guidance=1"]),
}
SEEDS = (0, 1)
STEPS = 1500
ACCURACY = "val/guidance.3/class_accuracy"


def measure() -> tuple[list[Result], dict[str, Any]]:
    """How many of the runs were accused of something, and of what."""
    place = Path("runs") / "bench-healthy-diffusion"
    data = [f"--data.source={write_shapes(place / 'shapes', 1200)}", "--data.items=null"]
    small = [*data, "--data.image_size=32", "--model.channels=[16,32]", "--train.batch_size=32", "--optim.warmup=60"]
    runs: list[dict[str, Any]] = []

    def add(name: str, recipe: str, words: list[str], able_by: list[str]) -> None:
        runs.append({"name": name} | one(recipe, place, name, words, able_by))
        print(json.dumps(runs[-1]), flush=True)

    add("autoencoder", "autoencoder-small", [*small, "--train.steps=800"], ["val/round_trip/r2"])
    reader = [*data, "--data.image_size=32", "--model.channels=[16,24,32]", "--model.latent=32"]
    reader += ["--prior.steps=300", "--prior.width=96"]  # as `healthy`: without one it could draw nothing
    add(
        "reader",
        "multimodal-small",
        [*reader, "--train.steps=400", "--optim.warmup=60"],
        ["val/image/r2_over_mean_image"],
    )
    for variant, (recipe, words) in VARIANTS.items():
        made_before = {
            "latents": [f"--model.autoencoder={place / 'autoencoder'}"],
            "texts": [f"--condition.encoder={place / 'reader'}"],
        }.get(variant, [])
        for seed in SEEDS:
            able_by = [] if variant == "no-condition" else [ACCURACY]
            chosen = [*data, f"--train.steps={STEPS}", *words, *made_before, f"--seed={seed}"]
            add(f"{variant}-{seed}", recipe, chosen, able_by)
    return counted(runs)
