"""The runs of a sweep: begun, gone on with, watched, and ended with everything saved. No torch here."""

import difflib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from intaglio import config as configuration
from intaglio.config import Config
from intaglio.config.sweep import Sweep
from intaglio.history.run_folder import write_atomically
from intaglio.reports.arms import read_json, read_runs
from intaglio.reports.safe import plain
from intaglio.reports.sweep import unmeasured
from intaglio.reports.words import duration

POLL, TOLD_EVERY = 0.2, 300.0
"""Seconds between two looks at the processes, and between two lines where there is no bar."""

Say = Callable[[str], None]


@dataclass
class Task:
    """One run of a sweep; ``status`` is that of ``Trained``, or ``waiting``, ``running``, ``interrupted``."""

    arm: str
    seed: int
    config: Config
    folder: Path
    status: str = "waiting"
    error: str = ""
    process: subprocess.Popen[bytes] | None = None
    begun: float = 0.0

    @property
    def place(self) -> Path:
        """The sweep's folder."""
        return self.folder.parent

    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        if self.status not in ("waiting", "running"):
            return 1.0
        steps = self.config.train.steps or read_yaml(self.folder / "config.yaml").get("train", {}).get("steps")
        return min(1.0, _last_step(self.folder / "metrics.jsonl") / steps) if steps else 0.0


def state_of(folder: Path) -> str:
    """``new``, ``finished``, ``stopped`` (by health or a plan), ``begun`` (to go on with), ``dead`` (nothing saved)."""
    if not (folder / "run.json").is_file():
        return "dead" if folder.exists() else "new"
    status = read_json(folder / "run.json").get("status")
    if status == "finished" and (folder / "evaluation.json").is_file():
        return "finished"
    if status == "stopped":
        return "stopped"
    return "begun" if any((folder / "checkpoints").glob("step-*.ckpt")) else "dead"


def stopped_by(folder: Path) -> str:
    """What ended a run before its last step."""
    return f"stopped by {read_json(folder / 'run.json').get('stopped_by')}"


def train_all(
    plan: Sweep, tasks: Sequence[Task], machine: Mapping[str, Any], jobs: int, held: int, say: Say, bar: Console | None
) -> None:
    """Trains what is left; whatever ends this ends the processes first, which save what they have."""
    waiting = deque(t for t in tasks if t.status == "waiting")
    running: list[Task] = []
    done = [t for t in tasks if t.status == "finished"]
    if done:
        say(f"{len(done)} of {len(tasks)} runs are finished already")
    with _ended_by_signals(), _Shown(tasks, bar, say) as shown:
        try:
            for task in done:
                _refuse_unmeasured(plan, task)
            while waiting or running:
                while waiting and len(running) < jobs:
                    task = waiting.popleft()
                    _start(task, jobs, held)
                    running.append(task)
                    _record(plan, tasks, machine, "running")
                time.sleep(POLL)
                shown.update()
                for task in [t for t in running if t.process is not None and t.process.poll() is not None]:
                    running.remove(task)
                    _conclude(task)
                    _record(plan, tasks, machine, "running")
                    shown.ended(task)
                    _refuse_unmeasured(plan, task)
        except BaseException as error:
            _end(running, say)
            _record(plan, tasks, machine, "interrupted")
            if isinstance(error, KeyboardInterrupt | SystemExit):
                done = [t for t in tasks if t.status == "finished"]
                say(f"{len(done)} of {len(tasks)} runs are finished; the same command goes on")
            raise


def _start(task: Task, jobs: int, held: int) -> None:
    """Begins the run, or goes on with it, in a session of its own: Ctrl-C reaches this process alone."""
    asked = task.place / "configs" / f"{task.folder.name}.yaml"
    if not asked.is_file():
        write_atomically(asked, configuration.dump(task.config))
    begun = state_of(task.folder) == "begun"
    words = ["--resume", str(task.folder)] if begun else [str(asked)]
    environment = dict(os.environ)
    if jobs > 1:  # else each would take all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with (task.place / "logs" / f"{task.folder.name}.log").open("ab") as log:
        task.process = subprocess.Popen(
            [sys.executable, "-m", "intaglio", "train", *words],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            pass_fds=(held,) if held >= 0 else (),
        )  # fmt: skip
    task.status, task.begun = "running", time.monotonic()


def _conclude(task: Task) -> None:
    """How a process ended, from what it left behind."""
    assert task.process is not None
    state, code = state_of(task.folder), task.process.returncode
    task.process = None
    if state in ("finished", "stopped"):
        task.status, task.error = state, stopped_by(task.folder) if state == "stopped" else ""
        return
    record = read_json(task.folder / "run.json")
    log = (task.place / "logs" / f"{task.folder.name}.log").read_text(encoding="utf-8", errors="replace")
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")
    if record.get("status") == "failed" and record.get("error"):
        why = str(record["error"])
    elif code < 0:
        killed = signal.Signals(-code).name
        why = f"ended by {killed}" + (", perhaps for want of memory" if killed == "SIGKILL" else "")
    else:
        why = last.removeprefix("intaglio train: ") or f"ended with exit code {code}"
    task.status, task.error = "failed", plain(why, 400)


def _end(running: Sequence[Task], say: Say) -> None:
    """Lets the processes save what they have; a second signal ends them at once."""
    processes = [t.process for t in running if t.process is not None and t.process.poll() is None]
    if processes:
        say(f"stopping; {len(processes)} {'run saves' if len(processes) == 1 else 'runs save'} first")
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise
    finally:
        for task in running:
            if task.status == "running":
                task.status, task.process = "interrupted", None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end this process as an exception does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {kind: signal.signal(kind, end) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _refuse_unmeasured(plan: Sweep, task: Task) -> None:
    """Metrics that a finished run of the baseline does not have, and does not say why."""
    if task.arm != plan.baseline or task.status != "finished":
        return
    evaluation = read_json(task.folder / "evaluation.json")
    readings = list(evaluation.get("readings", {}))
    known = dict.fromkeys([*readings, *read_runs(task.folder)[0].outcomes()])
    for name in plan.metrics:
        if name not in known and not unmeasured(name, evaluation):
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{plan.source}: metrics: {name} is not measured by {task.folder}.{hint} Measured: "
                f"{', '.join(readings)}. Put it right and call again: what is trained is kept."
            )


def _record(plan: Sweep, tasks: Sequence[Task], machine: Mapping[str, Any], status: str) -> None:
    """Writes how far the sweep is."""
    rows = [
        {"arm": t.arm, "seed": t.seed, "folder": str(t.folder), "status": t.status, "error": t.error}
        | ({"pid": t.process.pid} if t.process is not None else {})
        for t in tasks
    ]
    content = {"status": status, "name": plan.name, "source": plan.source, "machine": dict(machine), "runs": rows}
    write_atomically(tasks[0].place / "sweep.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file, or nothing where it is not there or not whole yet."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _last_step(metrics: Path) -> int:
    """The step of the last whole row of a history that is being written."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            rows = file.read().splitlines()[:-1]
        return int(json.loads(rows[-1])["step"]) if rows else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


class _Shown:
    """What a person sees while a sweep goes on: a bar in a terminal; elsewhere a line as runs end, and now and then."""

    def __init__(self, tasks: Sequence[Task], console: Console | None, say: Say):
        self.tasks, self.say = tasks, say
        self.bar: Progress | None = None
        if console is not None and console.is_terminal:
            columns = (TextColumn("sweep"), BarColumn(bar_width=24), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=console)
            self.line = self.bar.add_task("", total=len(tasks))
        self.begun = self.told = time.monotonic()
        self.first = self._done()

    def __enter__(self) -> "_Shown":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def _done(self) -> float:
        return sum(t.share() for t in self.tasks)

    def left(self) -> str:
        """Runs that are done, those that are being trained, and the time that is left."""
        done = self._done()
        ended = sum(t.status not in ("waiting", "running") for t in self.tasks)
        now = ", ".join(f"{t.folder.name} {100 * t.share():.0f} %" for t in self.tasks if t.status == "running")
        took = time.monotonic() - self.begun
        rest = (len(self.tasks) - done) * took / (done - self.first) if done > self.first else None
        time_left = f"about {duration(rest)} left" if rest is not None and ended < len(self.tasks) else ""
        return " · ".join(filter(None, (f"{ended} of {len(self.tasks)} runs", now, time_left)))

    def update(self) -> None:
        """Shows how far it is."""
        now = time.monotonic()
        if self.bar and now - self.told > 1:
            self.bar.update(self.line, completed=self._done(), description=plain(self.left(), 90))
            self.told = now
        elif not self.bar and now - self.told > TOLD_EVERY:
            self.say(self.left())
            self.told = now

    def ended(self, task: Task) -> None:
        """Says how a run ended, and what is left."""
        took = duration(time.monotonic() - task.begun)
        what = f"{task.folder.name}: {task.status} after {took}" + (f" ({task.error})" if task.error else "")
        self.say(f"{what} · {self.left()}")
