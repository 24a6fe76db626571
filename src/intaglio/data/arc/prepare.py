"""From a configuration to tasks ready to be batched."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.config import GridDataConfig
from intaglio.data.arc.generate import generate
from intaglio.data.arc.read import read_tasks
from intaglio.data.arc.survey import seen_in_training, survey
from intaglio.data.arc.table import Tasks
from intaglio.data.arc.tasks import TaskCorpus
from intaglio.data.prepare import Prepared, fingerprint
from intaglio.data.splits import split


@dataclass(frozen=True)
class Puzzles(Prepared):
    """Tasks of grids."""

    corpus: TaskCorpus
    data: Tasks


BUILT_IN_TASKS = 20_000

REAL_SHARE = 0.5
"""Of a training batch, where tasks of a folder and generated ones are learnt from together."""


def open_tasks(config: GridDataConfig, seed: int) -> TaskCorpus:
    """The tasks that the configuration names, those of a folder before generated ones.

    Raises:
        ValueError: the source cannot be read, or a task of it stands on both sides.
    """
    if config.source == "generated":
        return generate(config.items or BUILT_IN_TASKS, seed, config.pairs)
    tasks = read_tasks(config.source, bad_limit=config.bad_limit)
    return tasks.joined(generate(config.items, seed, config.pairs)) if config.items else tasks


def split_tasks(corpus: TaskCorpus, held_out: float, seed: int) -> tuple[dict[str, np.ndarray], int]:
    """Tasks to learn from and held-out ones, of a folder and of the generator alike; and how many groups of equal tasks
    a random split would have torn apart. What a source declares as test is held out."""
    real = np.array([not program for program in corpus.programs])
    sides: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    torn = 0
    for kind in (np.flatnonzero(real), np.flatnonzero(~real)):
        if len(kind):
            parts, leaks = split(corpus.part(kind), {"train": 1 - held_out, "val": held_out}, seed)
            torn += leaks
            for side, items in parts.items():
                sides["train" if side == "train" else "val"].append(kind[items])
    return {side: np.sort(np.concatenate(items)) for side, items in sides.items()}, torn


def prepare_tasks(config: GridDataConfig, seed: int) -> Puzzles:
    """Reads, draws and splits, by task. Tasks of a folder stand in ``splits["train"]`` often enough to be
    ``REAL_SHARE`` of it where there are generated ones too."""
    corpus = open_tasks(config, seed)
    sides, leaks = split_tasks(corpus, config.held_out, seed)
    record: dict[str, Any] = {
        "source": config.source,
        "items": {side: len(items) for side, items in sides.items()},
        "intake": corpus.intake.as_dict(),
        "near-duplicate groups kept on one side": leaks,
        "pairs": int(corpus.first[-1]),
        "held-out tasks seen in training": seen_in_training(corpus, sides["train"], sides["val"]),
    }
    real = np.array([not program for program in corpus.programs])
    given, drawn = (sides["train"][real[sides["train"]] == kind] for kind in (True, False))
    if len(given) and len(drawn):
        times = max(1, round(REAL_SHARE / (1 - REAL_SHARE) * len(drawn) / len(given)))
        sides["train"] = np.concatenate([np.tile(given, times), drawn])
        record["repeats of given tasks"] = times
    data = Tasks(corpus, config.pairs, config.augment)
    if config.augment:
        drawn = survey(data, sides["train"])
        record["augmentations"] = {"of tasks": {"changed": drawn.changed, "variety": drawn.variety}}
    return Puzzles(corpus, data, sides, fingerprint(corpus, sides, "tasks"), record)
