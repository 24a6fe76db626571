"""False alarms of visual question answering: thirty small runs, all of them healthy, and what the rules say of each:
``intaglio bench healthy-vqa``.

Bottlenecks of all three kinds, several widths and weights of the KL, free bits, stages, rates of parts, the
preference, two optimizers, a constant rate, two sets of data, two seeds; kept in ``runs/bench-healthy-vqa``: what was
trained before is only judged again. A run counts as able where it is exactly right more often than the question alone
would have it, with its whole interval.
"""

import json
from pathlib import Path
from typing import Any

from intaglio.bench import Result
from intaglio.bench.healthy import counted, one
from intaglio.bench.shapes import ask_shapes

COMMON = [
    "--train.steps=500", "--train.batch_size=16", "--data.together=4", "--train.validate_items=192",
    "--health.probe=192", "--optim.warmup=50", "--data.image_size=32", "--model.width=48", "--model.heads=2",
    "--model.vision_layers=1", "--model.question_layers=1", "--model.fusion_layers=1", "--model.reasoning_layers=1",
    "--model.answer_layers=1", "--model.latents=3", "--model.dims=8", "--loss.ramp=150",
]  # fmt: skip
FREEZE = '--stages=[{"until": 0.25, "without": ["kl"]}, {"until": 0.4, "freeze": ["question"]}]'
VARIANTS: dict[str, list[str]] = {
    "vib": [],
    "vib-narrow": ["--model.width=32", "--model.latents=2"],
    "vib-wide": ["--model.width=64", "--model.latents=6", "--model.dims=16"],
    "vib-strong": ["--loss.kl=0.2"],
    "vib-floor": ["--loss.floor=2"],
    "vib-orthogonal": ["--loss.orthogonality=0.05"],
    "vib-preference": ["--loss.preference=0.1"],
    "vib-rates": ["--rates.vision=0.5", "--rates.answer=0.5"],
    "vib-freeze": [FREEZE],
    "vib-adamw": ["--optim.kind=adamw", "--optim.rate=1e-3"],
    "vib-constant": ["--optim.schedule=constant", "--optim.rate=1e-3"],
    "deterministic": ["--model.bottleneck=deterministic"],
    "none": ["--model.bottleneck=none"],
    "none-adamw": ["--model.bottleneck=none", "--optim.kind=adamw", "--optim.rate=1e-3"],
    "engravings": ["--data.source=engravings", "--data.items=1500", "--data.together=8"],
}
SEEDS = (0, 1)


def measure() -> tuple[list[Result], dict[str, Any]]:
    """How many of the runs were accused of something, and of what."""
    place = Path("runs") / "bench-healthy-vqa"
    shapes = ["--data.items=null", f"--data.source={ask_shapes(place / 'shapes', 1200)}"]
    runs: list[dict[str, Any]] = []
    for variant, words in VARIANTS.items():
        for seed in SEEDS:
            name = f"{variant}-{seed}"
            found = one("vqa-small", place, name, [*COMMON, *shapes, *words, f"--seed={seed}"], ["val/answer/accuracy"])
            runs.append({"name": name} | found)
            print(json.dumps(runs[-1]), flush=True)
    return counted(runs)
