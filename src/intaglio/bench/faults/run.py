"""The trainings of the fault benchmark: each in a process of its own, kept, and not run again while nothing changed."""

import hashlib
import importlib.util
import json
import multiprocessing as mp
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from intaglio.bench.faults import families as ours
from intaglio.bench.faults.case import Case, Family, Made, cases
from intaglio.bench.faults.change import change_ours, program, source_of

SECONDS = 900.0
"""The longest that one training may take."""

ABLE = (
    "val/caption/token_accuracy", "val/image/r2_over_mean_image", "val/caption/shuffled_latent_nats",
    "val/guidance.3/class_accuracy", "val/answer/accuracy", "val/real/top1",
)  # fmt: skip
"""What our systems are trained for, held out."""

RECORD = "bench.json"
"""What a training leaves in its folder beside what it was watched by: how it ended, and what it is able to do."""


def modules(more: Path | None = None) -> dict[str, ModuleType]:
    """The families' modules by name: the package's, and the Python files of a folder.

    Raises:
        ValueError: a file without a family of its name, or two of one name.
    """
    files = _files(more)
    twice = [file for file in (sorted(more.glob("*.py")) if more else ()) if files[file.stem] != file]
    if twice:
        raise ValueError(f"{twice[0]}: intaglio has a family {twice[0].stem!r}; give the file another name.")
    return {name: module(name, more) for name in files}


def module(name: str, more: Path | None = None) -> ModuleType:
    """The module of a family."""
    file = _files(more)[name]
    spec = importlib.util.spec_from_file_location(f"{ours.__name__}.{name}", file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    family = getattr(found, "FAMILY", None)
    if not isinstance(family, Family) or family.name != name:
        raise ValueError(f"{file} has no FAMILY = Family({name!r}, …); see docs/faults.md.")
    return found


def _files(more: Path | None) -> dict[str, Path]:
    files = [*(sorted(more.glob("*.py")) if more else ()), *sorted(Path(ours.__path__[0]).glob("[a-z]*.py"))]
    return {file.stem: file for file in files}


def run_all(
    wanted: Sequence[Case],
    place: Path,
    jobs: int,
    more: Path | None,
    say: Callable[[str], None],
    minutes: float | None = None,
) -> int:
    """Runs every case that has not been run as it stands, ``jobs`` at once; after ``minutes`` it begins no other one.

    Returns how many are left. What is seen before training goes first.
    """
    known = {name: module(name, more) for name in {case.family.name for case in wanted}}
    left = [case for case in wanted if not is_there(case, place, known[case.family.name])]
    left.sort(key=lambda case: not getattr(case.kind, "static", False))
    if len(left) < len(wanted):
        say(f"{len(wanted) - len(left)} of {len(wanted)} trainings are there already")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "polars", "lightning"])
    begun, done = time.monotonic(), 0

    def one(case: Case) -> None:
        nonlocal done
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            return
        folder = place / case.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=_child, args=(case.family.name, case.kind.name, case.seed, str(folder), more))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        if not (folder / RECORD).is_file():
            ended = f"took more than {SECONDS:g} s" if process.exitcode == -9 else f"ended with {process.exitcode}"
            _write(folder, {"status": "crashed", "error": f"the process {ended}"})
        record = _read(folder) | {"digest": digest(case, known[case.family.name])}
        _write(folder, record)
        done += 1
        rest = (time.monotonic() - begun) / done * (len(left) - done) / 60
        took = f"{record['status']}, {record.get('seconds', 0):.0f} s"
        say(f"{done}/{len(left)} {case.name}: {took}; {rest:.0f} min left")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, left))
    return len(left) - done


def is_there(case: Case, place: Path, family: ModuleType) -> bool:
    """Whether a training was run of this very text and options."""
    return _read(place / case.name).get("digest") == digest(case, family)


def digest(case: Case, family: ModuleType) -> str:
    """Of all that decides on a training but the versions of libraries, and our own systems' text."""
    text = "" if case.family.recipe else source_of(family)
    kind = {k: v for k, v in asdict(case.kind).items() if k in ("changes", "options", "static")}
    told = [text, case.family.recipe, kind, case.options, case.seed]
    said = json.dumps(told, sort_keys=True, default=lambda x: x.of if isinstance(x, Made) else x.__name__)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _child(family: str, kind: str, seed: int, folder: str, more: Path | None) -> None:
    """Trains one case in this process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    log = Path(folder).with_suffix(".log")
    with log.open("w", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        found = module(family, more)
        catalogue: Family = found.FAMILY
        case = next(c for c in cases({family: catalogue}, "full") if (c.kind.name, c.seed) == (kind, seed))
        record = _ours(case, Path(folder)) if catalogue.recipe else _foreign(case, found, Path(folder))
        _write(Path(folder), record)


def _foreign(case: Case, family: ModuleType, folder: Path) -> dict[str, Any]:
    """Runs a foreign program, with a clock on its monitor."""
    from intaglio.health.monitor import Stopped

    names = program(family, case.kind.changes)
    watched = _Clock()
    begun = time.perf_counter()
    able: Mapping[str, Any] = {}
    status, error = "finished", ""
    try:
        able = names["train"](folder, case.seed, **case.options)
    except Stopped as stopped:
        status, error = "stopped", str(stopped)
    except Exception:  # whatever a program with a fault raises is its outcome, told with its last lines
        status, error = "crashed", traceback.format_exc(limit=-4)
    seconds = time.perf_counter() - begun
    told = {name: list(map(float, pair)) for name, pair in able.items()}
    return {"status": status, "error": error, "seconds": seconds, "monitor_seconds": watched.seconds, "able": told}


class _Clock:
    """The seconds that are spent in the monitor, from outside."""

    def __init__(self) -> None:
        from intaglio.health.monitor import Monitor

        self.seconds, self.inside = 0.0, 0
        for name in ("__init__", "step", "before_backward", "look", "log", "validated", "audit", "close"):
            setattr(Monitor, name, self._timed(getattr(Monitor, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inside += 1
            begun = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.inside -= 1
                if not self.inside:
                    self.seconds += time.perf_counter() - begun

        return timed


def _ours(case: Case, folder: Path) -> dict[str, Any]:
    """Checks a recipe of ours, and trains it unless its fault must be seen before."""
    change_ours(case.kind.changes)
    words = [f"--{key}={word(value)}" for key, value in (case.options | {"seed": case.seed}).items()]
    begun = time.perf_counter()
    record: dict[str, Any] = {"status": "finished", "error": "", "able": {}}
    try:
        from intaglio import api

        record["static"] = _seen_before(case, words)
        if not getattr(case.kind, "static", False):
            api.train(case.family.recipe, [*words, f"--runs={folder.parent}", f"--name={folder.name}"], quiet=True)
            record["able"] = _able(folder)
    except (Exception, SystemExit) as error:
        record |= {"status": "crashed", "error": f"{type(error).__name__}: {error}"}
        if type(error).__name__ in ("NonFiniteStep", "Stopped"):
            record["status"] = "stopped"
    return record | {"seconds": time.perf_counter() - begun}


def _seen_before(case: Case, words: Sequence[str]) -> list[dict[str, str]]:
    """What ``intaglio check`` says; nothing where the fault is such that no step can be tried without data."""
    from intaglio import api

    try:
        found = api.check(case.family.recipe, words).findings
    except Exception as error:
        if getattr(case.kind, "static", False):
            raise
        print(f"check: {type(error).__name__}: {error}", flush=True)
        return []
    return [{"rule": f.rule, "severity": f.severity, "message": f.message} for f in found]


def _able(folder: Path) -> dict[str, list[float]]:
    """What the model is trained for, the low end of its interval where it has one, beside its null."""
    file = folder / "evaluation.json"
    readings = json.loads(file.read_text(encoding="utf-8"))["readings"] if file.is_file() else {}
    return {
        name: [r["value"] if r.get("low") is None else r["low"], r["null"]]
        for name, r in readings.items()
        if name in ABLE and r.get("null") is not None
    }


def word(value: Any) -> str:
    """A value of an option as the command line takes it."""
    if isinstance(value, Made):
        return value.by(*value.of)
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def records(wanted: Sequence[Case], place: Path) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case that was run, with its record."""
    for case in wanted:
        if record := _read(place / case.name):
            yield case, record
