"""The verb ``sweep``. No torch: the runs are processes of their own."""

import argparse
import re
from collections.abc import Callable

from intaglio.cli.analysing import print_json

Arguments = argparse.Namespace


def sweep(a: Arguments) -> int:
    """Trains what is left, and says what the arms show; 1 where a run failed, 3 where nothing can be told."""
    from intaglio.reports.sweep import TOLD
    from intaglio.reports.sweep_text import terminal_lines
    from intaglio.training.sweep import sweep as swept

    seeds = None if a.seeds is None else [_seed(word) for word in _listed(a.seeds)]
    found = swept(
        a.file, a.overrides, runs=a.runs, jobs=a.jobs, seeds=seeds, only=_listed(a.only or ""), quiet=a.quiet or a.json
    )
    if a.json:
        print_json(found.as_dict())
    else:
        print("\n".join(terminal_lines(found)))
    if found.failed:
        return 1
    return 0 if any(arm.told(*TOLD) for arm in found.arms) else 3


VERBS = {"sweep": sweep}


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb and its options to the command line."""
    overriding = "Any key of the recipe can be set for all runs: --train.steps 500."
    p = verb("sweep", "train arms of a recipe with several seeds each, and compare them in one report", overriding)
    p.allow_abbrev = False  # --seed would be --seeds
    p.add_argument("file", help="YAML file of a sweep, or the name of one that comes with intaglio: jepa-ablation")
    p.add_argument("--runs", default="runs", metavar="DIR", help="where the sweep's folder goes (runs)")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (1)")
    p.add_argument("--seeds", metavar="0,1,2", help="instead of the file's")
    p.add_argument("--only", metavar="ARM,…", help="train these arms and the baseline")
    p.add_argument("--quiet", action="store_true", help="say only what must be said")


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _seed(word: str) -> int:
    if not re.fullmatch(r"\d+", word):
        raise ValueError(f"--seeds: {word} is no seed; give numbers with commas between: --seeds 0,1,2.")
    return int(word)
