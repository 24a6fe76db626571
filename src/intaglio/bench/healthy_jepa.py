"""False alarms of the JEPA: thirty small runs, all of them healthy, and what the rules say of each: ``intaglio bench
healthy-jepa``.

Codes and none, both objectives, with and without an averaged target, two optimizers, several sizes, two seeds, on
generated tasks; kept in ``runs/bench-healthy-jepa``: what was trained before is only judged again. A run counts as able
where it finds the answer among 512 outputs of its shape more often than chance, with its whole interval.
"""

import json
from pathlib import Path
from typing import Any

from intaglio.bench import Result
from intaglio.bench.healthy import counted, one

COMMON = [
    "--data.items=2000", "--train.steps=400", "--train.batch_size=16", "--train.validate_items=96",
    "--health.probe=192", "--optim.warmup=50", "--train.ema=0.99", "--model.width=64", "--model.heads=2",
    "--model.layers=2", "--model.predictor_layers=1", "--model.slots=4", "--model.embedding=64", "--model.codes=64",
    "--model.codes_after=150",
]  # fmt: skip
LEJEPA = ["--loss.objective=lejepa", "--loss.sigreg=0.05"]
TARGET = ["--model.target=0.99", "--loss.queue=1024"]
PLAIN = ["--model.quantiser=none", "--loss.commitment=0"]
VARIANTS: dict[str, list[str]] = {
    "codes": [],
    "codes-narrow": ["--model.width=48"],
    "codes-wide": ["--model.width=96", "--model.heads=3"],
    "codes-many": ["--model.codes=128", "--model.slots=9"],
    "codes-target": TARGET,
    "codes-sigreg": ["--loss.sigreg=0.02"],
    "codes-lejepa": LEJEPA,
    "fsq": ["--model.quantiser=fsq", "--model.levels=[5,5,5]"],
    "plain": PLAIN,
    "plain-target": [*PLAIN, *TARGET],
    "plain-adamw": [*PLAIN, "--optim.kind=adamw", "--optim.rate=1e-3"],
    "plain-constant": [*PLAIN, "--optim.schedule=constant", "--optim.rate=1e-3"],
    "plain-lejepa": [*LEJEPA, *PLAIN],
    "plain-relational": [*PLAIN, "--loss.relational=0.05"],
    "mean-context": [*PLAIN, "--model.context=mean"],
}  # fmt: skip
SEEDS = (0, 1)


def measure() -> tuple[list[Result], dict[str, Any]]:
    """How many of the runs were accused of something, and of what."""
    place = Path("runs") / "bench-healthy-jepa"
    runs: list[dict[str, Any]] = []
    for variant, words in VARIANTS.items():
        for seed in SEEDS:
            name = f"{variant}-{seed}"
            found = one("jepa-small", place, name, [*COMMON, *words, f"--seed={seed}"], ["val/generated/top1"])
            runs.append({"name": name} | found)
            print(json.dumps(runs[-1]), flush=True)
    return counted(runs)
