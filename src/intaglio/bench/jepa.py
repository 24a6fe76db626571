"""The targets of the JEPA: ``intaglio bench jepa --data FOLDER``, ARC's tasks, three seeds.

Each run learns from the folder's training tasks and from generated ones, and is measured on tasks that it never saw:
the folder's evaluation tasks, and generated ones; its codes on both in equal shares. A run that has finished is
measured rather than trained again. A row is the mean over seeds, its interval the widest of theirs: the lowest lower
end and the highest upper one.
"""

from typing import Any

from intaglio.bench import Result
from intaglio.bench.runs import Readings, finished, minutes, told

SEEDS = (0, 1, 2)


def measure(data: str | None = None) -> tuple[list[Result], dict[str, Any]]:
    """Trains ``jepa-small`` with each seed and reads its held-out numbers."""
    if data is None:
        raise ValueError("bench jepa needs ARC's tasks: --data FOLDER, with the folders training and evaluation in it.")
    facts: dict[str, Any] = {}
    folders = [finished("jepa-small", [f"--data.source={data}", f"--seed={s}"], f"jepa-small-{s}") for s in SEEDS]
    runs = [told(folder, facts) for folder in folders]
    results = [
        _over_seeds("InfoNCE over chance among 8,704, evaluation tasks, nats", 5.0, runs, "val/real/over_chance"),
        _over_seeds("the same, generated tasks", 5.0, runs, "val/generated/over_chance"),
        _over_seeds("the output among 512 of its shape, generated tasks", 0.5, runs, "val/generated/top1"),
        _over_seeds("the output among 512 of its shape, evaluation tasks", 0.3, runs, "val/real/top1"),
        _above("without the question among them, over a copy by its embedding", runs, "val/real/copied"),
        _above("without the question among them, over a copy by equal cells", runs, "val/real/copied_cells"),
        _over_null("effective rank of contexts over its null", 0.5, runs, "val/generated/context_rank"),
        _over_null("effective rank of targets over its null", 0.5, runs, "val/generated/target_rank"),
        _over_null(
            "perplexity of the codes over its null, altered as in training", 0.8, runs, "val/altered/perplexity"
        ),
        _over_null("the same, tasks as they are", 0.8, runs, "val/both/perplexity"),
        _over_seeds("which of ten primitives, by a linear probe", 0.9, runs, "val/generated/primitive"),
        Result("minutes of training, the longest", 60, max(map(minutes, folders)), better="lower"),
    ]
    return results, facts


def _over_seeds(quantity: str, target: float, runs: list[Readings], name: str) -> Result:
    read = [run[name] for run in runs]
    mean = sum(r["value"] for r in read) / len(read)
    low, high = min(r["low"] for r in read), max(r["high"] for r in read)
    return Result(quantity, target, mean, null=read[0]["null"], n=read[0]["n"], low=low, high=high)


def _over_null(quantity: str, target: float, runs: list[Readings], name: str) -> Result:
    shares = [run[name]["value"] / run[name]["null"] for run in runs]
    return Result(quantity, target, sum(shares) / len(shares), n=runs[0][name]["n"], low=min(shares), high=max(shares))


def _above(quantity: str, runs: list[Readings], copied: str) -> Result:
    """How much more often the prediction finds the output than a copy of the question does; both on the same tasks."""
    apart = [run["val/real/top1_apart"]["value"] - run[copied]["value"] for run in runs]
    null = sum(run[copied]["value"] for run in runs) / len(runs)
    return Result(f"{quantity} ({null:.3f})", 0.0, sum(apart) / len(apart), low=min(apart), high=max(apart))
