"""What a person sees while a run goes on: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from intaglio.training.loop import AfterStep


class ProgressReport(L.Callback):
    """Rate, time left, the main held-out value and the verdict so far; where there is no bar, a line at each look."""

    def __init__(self, after: AfterStep, batch_items: int, monitor: str, quiet: bool, console: Console):
        self.after, self.batch_items, self.monitor, self.console = after, batch_items, monitor, console
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.quiet, self.wants_bar = quiet, console.is_terminal and not quiet
        self.begun, self.first, self.shown = 0.0, 0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun, self.first = time.monotonic(), trainer.global_step
        if self.wants_bar and trainer.is_global_zero:
            self.bar = Progress(
                "step",
                BarColumn(bar_width=30),
                TextColumn("{task.completed}/{task.total}  {task.fields[rate]:.0f} items/s"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[held_out]}"),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=trainer.max_steps, completed=self.first, rate=0.0, held_out="")
            self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        rate = (step - self.first) * self.batch_items / max(time.monotonic() - self.begun, 1e-9)
        value = self.after.latest.get(self.monitor)
        held_out = "" if value is None else f"held out {self.monitor.removeprefix('val/')} {value:.4f}"
        if self.after.verdict:
            held_out += f"  {self.after.verdict}"
        if self.bar:
            self.bar.update(self.task, completed=step, rate=rate, held_out=held_out)
        elif trainer.is_global_zero and not self.quiet and self.after.looks > self.shown:
            self.shown = self.after.looks
            left = (trainer.max_steps - step) * self.batch_items / max(rate, 1e-9)
            line = f"step {step}/{trainer.max_steps}  {rate:.0f} items/s  {left / 60:.1f} min left  {held_out}"
            print(line, file=sys.stderr, flush=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
