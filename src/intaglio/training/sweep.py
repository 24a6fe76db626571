"""``intaglio sweep``: every arm of a sweep with every seed, each a process of its own, and one comparison at the end.

    runs/<sweep>/  sweep.json  REPORT.md  index.html  configs/<arm>-<seed>.yaml  logs/<arm>-<seed>.log  <arm>-<seed>/ …

What a run was asked for stands under ``configs/``: by it a run is found again, so that a killed sweep goes on where it
was, and a run of the same configuration is never trained twice. No torch here: the processes have it.
"""

import difflib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console

from intaglio import config as configuration
from intaglio.config import Config
from intaglio.config.sweep import Sweep, read, slug
from intaglio.reports import scales
from intaglio.reports.arms import bookkeeping, read_json
from intaglio.reports.sweep import Study, Trained, study
from intaglio.reports.sweep_text import write
from intaglio.training.sweep_runs import Say, Task, read_yaml, state_of, stopped_by, train_all

CHOOSE = """
import json, sys
from intaglio.config import TrainConfig
from intaglio.training.device import choose
try:
    print(json.dumps(choose(TrainConfig(steps=1, **json.loads(sys.argv[1])))))
except ValueError as error:
    sys.exit(str(error))
"""
"""Timed in a process like those that train, once for all runs: arms in other precisions would differ by them."""


def sweep(
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    runs: str | Path = "runs",
    jobs: int = 1,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    quiet: bool = False,
) -> Study:
    """Trains what is left of a sweep, compares its arms with the baseline, and writes the report.

    Args:
        file: path of a sweep, or the name of one that comes with the package.
        overrides: ``--key.sub value`` words for all arms.
        runs: where the sweep's folder goes.
        jobs: how many runs are trained at once.
        seeds: instead of the file's.
        only: arms to train, besides the baseline, which is always among them.
        quiet: says only what must be said.

    Raises:
        ValueError: whatever can be found out before the first step; a metric that the first run has not measured.
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least 1 run at once.")
    plan = read(file, overrides, seeds)
    _refuse_unclear(plan)
    arms = _chosen(plan, only)
    place = Path(runs) / plan.name
    if (place / "run.json").is_file():
        raise ValueError(f"{place} is a run, so the sweep cannot lie there: give it another name in {file}.")
    console = Console(highlight=False, stderr=True)

    def say(text: str) -> None:
        if not quiet:
            console.print(text, markup=False, soft_wrap=True)

    (place / "configs").mkdir(parents=True, exist_ok=True)
    (place / "logs").mkdir(exist_ok=True)
    with _alone(place, say) as held:
        machine = _machine(plan, arms, place)
        tasks = _tasks(plan, arms, place, machine["chosen"], say)
        if len(plan.seeds) < 2:
            say("note: one seed: whatever comes out, nothing can be concluded from it")
        train_all(plan, tasks, machine, jobs, held, say, None if quiet else console)
        trained = [Trained(t.arm, t.seed, t.folder if t.folder.is_dir() else None, t.status, t.error) for t in tasks]
        left = [Trained(arm, seed, None, "not trained") for seed in plan.seeds for arm in plan.arms if arm not in arms]
        found = study(plan, [*trained, *left], place, machine)
        write(found)
    return found


def _refuse_unclear(plan: Sweep) -> None:
    """Arms that change no weight, and metrics of which nobody said which way is better."""
    configs = {arm: plan.config(arm, plan.seeds[0]) for arm in plan.arms}
    base = configs[plan.baseline]
    for arm, config in configs.items():
        changed = list(configuration.diff(base, config))
        if changed and all(map(bookkeeping, changed)):
            raise ValueError(
                f"{plan.source}: the arm {arm} differs from the baseline in {', '.join(changed)} alone, which changes "
                "no weight: it is the same arm."
            )
    for name, way in plan.metrics.items():
        if not way and not scales.direction(name):
            raise ValueError(
                f"{plan.source}: metrics: the name {name} does not tell which way is better: write {name}: higher, or "
                "lower."
            )


def _chosen(plan: Sweep, only: Sequence[str]) -> list[str]:
    """The arms to train: all, or the baseline and those that are named."""
    for name in only:
        if name not in plan.arms:
            near = difflib.get_close_matches(name, plan.arms, 1, 0.4)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"--only {name}: no such arm.{hint} Arms of {plan.source}: {', '.join(plan.arms)}.")
    return [arm for arm in plan.arms if not only or arm in only or arm == plan.baseline]


def _machine(plan: Sweep, arms: Sequence[str], place: Path) -> dict[str, Any]:
    """Device and precision for each ``auto`` among the arms: those that this sweep has begun with, or timed now."""
    chosen: dict[str, list[str]] = read_json(place / "sweep.json").get("machine", {}).get("chosen", {})
    for arm in arms:
        key = _key(plan.config(arm, plan.seeds[0]))
        if key not in chosen and json.loads(key)["precision"] == "auto":
            found = subprocess.run([sys.executable, "-c", CHOOSE, key], capture_output=True, text=True, check=False)
            if found.returncode:
                raise ValueError(found.stderr.strip().splitlines()[-1])
            chosen[key] = json.loads(found.stdout.strip().splitlines()[-1])
    told = dict.fromkeys(f"{device} ({why}), {precision} ({how})" for device, precision, why, how in chosen.values())
    return {"chosen": chosen, "reason": "; ".join(told)}


def _key(config: Config) -> str:
    train = config.train
    return json.dumps({"device": train.device, "precision": train.precision, "devices": train.devices})


def _tasks(plan: Sweep, arms: Sequence[str], place: Path, chosen: Mapping[str, Any], say: Say) -> list[Task]:
    """A task for each run, one seed after the other, with the folder that it has or gets."""
    tasks: list[Task] = []
    for arm in arms:
        config = plan.config(arm, plan.seeds[0])
        device, precision, *_ = chosen.get(_key(config), (config.train.device, config.train.precision))
        train = replace(config.train, device=device, precision=precision)
        config = replace(config, train=train, runs=str(place))
        for seed in plan.seeds:
            taken = {task.folder.name for task in tasks}
            tasks.append(_task(arm, seed, replace(config, seed=seed), place, taken, say))
    return sorted(tasks, key=lambda t: plan.seeds.index(t.seed))


def _task(arm: str, seed: int, config: Config, place: Path, taken: set[str], say: Say) -> Task:
    """The run that was asked for with this very configuration, or the next free name."""
    stem, other = f"{slug(arm)}-{seed}", ""
    for number in count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        asked, folder = place / "configs" / f"{name}.yaml", place / name
        if asked.is_file():
            apart = _differences(asked, config)
            if not apart and state_of(folder) != "dead":
                break
            other = f"{name} was trained with another configuration ({apart})" if apart else f"{name} had saved nothing"
        elif not folder.exists() and name not in taken:
            break
    if other and not asked.is_file():
        say(f"{other}, so it is trained anew as {name}")
    state = state_of(folder)
    task = Task(arm, seed, replace(config, name=name), folder, state if state in ("finished", "stopped") else "waiting")
    task.error = stopped_by(folder) if state == "stopped" else ""
    return task


def _differences(asked: Path, config: Config) -> str:
    """What a run was asked for otherwise, in words; nothing where it is the same."""
    tree, ours = read_yaml(asked), configuration.to_dict(config)
    if {**tree, "name": "", "runs": ""} == {**ours, "name": "", "runs": ""}:
        return ""
    try:
        theirs = configuration.load(asked)  # a key that is newer than the file has its default there
    except ValueError as error:
        return str(error)
    found = {k: pair for k, pair in configuration.diff(theirs, config).items() if k not in ("name", "runs")}
    told = [f"{key}: {a} → {b}" for key, (a, b) in found.items()]
    return ", ".join(told[:4]) + (f" and {len(told) - 4} more" if len(told) > 4 else "")


@contextmanager
def _alone(place: Path, say: Say) -> Iterator[int]:
    """No other sweep works in the folder, and no run that a killed one left is still training there.

    Yields a lock that the processes hold, too, and keep when this one is killed.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield -1
        return
    with ExitStack() as stack:
        files = [stack.enter_context((place / f".{name}.lock").open("a")) for name in ("sweep", "runs")]
        try:
            fcntl.flock(files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another sweep is at work in {place}: wait for it, or use another --runs.") from None
        told = False
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(files[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not told:
                left = [r for r in read_json(place / "sweep.json").get("runs", []) if r.get("pid")]
                names = ", ".join(f"{Path(r['folder']).name} (process {r['pid']})" for r in left)
                say(f"waiting for what a killed sweep left training: {names}")
            told = True
            time.sleep(1)
        yield files[1].fileno()
