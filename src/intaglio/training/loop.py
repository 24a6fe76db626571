"""What happens after an optimizer step, in this order and nowhere else: EMA, history, validation, checkpoint, stop.

One callback does it so that the order cannot change: a checkpoint holds everything that its step did, and a resumed run
repeats nothing and skips nothing.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from intaglio.config import Config
from intaglio.data.batches import TrainingBatches
from intaglio.history import HistoryWriter, Reading
from intaglio.objectives.distributed import alone, mean_over_processes, processes
from intaglio.systems.base import System
from intaglio.training import checkpoint
from intaglio.training.device import resident_bytes
from intaglio.training.ema import EMA
from intaglio.training.health import LOOKED, Health

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class AfterStep(L.Callback):
    """Everything that follows an optimizer step.

    ``held_out`` yields the fixed validation batches of this process; ``prove`` makes the pictures of a step.
    """

    def __init__(
        self,
        config: Config,
        history: HistoryWriter | None,
        folder: Path,
        batches: TrainingBatches,
        items: int,
        held_out: Callable[[], Iterator[Any]],
        ema: EMA | None,
        prove: Callable[[System, int], None] | None,
        identity: dict[str, Any],
        health: Health | None = None,
    ):
        self.config, self.history, self.folder, self.batches, self.items = config, history, folder, batches, items
        self.held_out, self.ema, self.prove, self.identity = held_out, ema, prove, identity
        self.health, self.verdict = health, ""
        self.best, self.best_tie, self.best_step, self.looks_since_best = float("inf"), float("inf"), 0, 0
        self.latest: dict[str, float] = {}
        self.looks = 0
        self.kept: list[int] = []
        self.keep = False
        self.stopped_by: str | None = None
        self.stopped_early: str | None = None
        self.done = 0
        self._clock = (0.0, 0, 0.0)
        self._handlers: dict[int, Any] = {}

    # state that a resumed run needs

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "best_tie", "best_step", "looks_since_best", "stopped_early", "kept")
        return {name: self.__dict__[name] for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)

    # hooks

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._refuse_unmeasured_monitor(pl_module)
        self.done = trainer.global_step
        self._clock = (time.perf_counter(), self.done, self.batches.waited)
        if not self._out_of_patience():  # a longer patience takes an early stop back
            self.stopped_early = None
        if self.stopped_early:
            self.stopped_by, trainer.should_stop = self.stopped_early, True
        if self.health:
            self.health.start(pl_module, trainer.optimizers[0], self.done)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._ask_to_stop) for s in STOP_SIGNALS}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if self.health and self.health.auditing(self.done):
            self.health.before_update(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.done:  # gradients were only accumulated
            return
        self.done = step
        train = self.config.train
        if self.ema:
            self.ema.update(pl_module)
        last = step == trainer.max_steps
        if self.health:
            self.health.after_update(pl_module, trainer.optimizers[0], step)
        if step % train.log_every == 0 or last:
            self._log_training(trainer, pl_module, step)
        if step % train.validate_every == 0 or last:
            self._validate(trainer, pl_module, step)
        elif self.health and step in self.health.early:
            begun = time.perf_counter()
            self._look_at_health(trainer, pl_module, step)
            self._clock = (self._clock[0] + time.perf_counter() - begun, *self._clock[1:])
        best = self.best_step == step
        stop, keep = self._everyone_agrees(pl_module.device)
        if keep:
            self.kept, self.keep = [*self.kept, step], False
        if step % train.checkpoint_every == 0 or best or last or stop or keep:
            self._checkpoint(trainer, step)
        if stop:
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._give_signals_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._give_signals_back()  # Lightning calls no teardown then

    # the parts

    def _give_signals_back(self) -> None:
        for which, handler in self._handlers.items():
            signal.signal(which, handler)
        self._handlers = {}

    def _log_training(self, trainer: L.Trainer, system: System, step: int) -> None:
        now, waited = time.perf_counter(), self.batches.waited
        begun, first, waited_before = self._clock
        self._clock = (now, step, waited)
        elapsed = max(now - begun, 1e-9)
        values = mean_over_processes(torch.stack([*(t.value.float() for t in system.terms.values()), system.total]))
        rows = dict(
            zip([*(f"train/loss/{name}" for name in system.terms), "train/loss/total"], values.tolist(), strict=True)
        )
        rows |= {f"train/weight/{name}": float(t.weight) for name, t in system.terms.items()}
        rows |= {f"train/{site}/rate": rate for site, rate in system.rates.items()}
        rows["train/optimizer/gradient_norm"] = float(system.gradient_norm)
        micro = (step - first) * self.config.train.accumulate
        rows["train/speed/items_per_second"] = micro * self.config.train.batch_size / elapsed
        rows["train/speed/wait_share"] = (waited - waited_before) / elapsed
        if resident := resident_bytes():
            rows["train/speed/resident_bytes"] = resident
        self._write(trainer, step, {k: Reading(v) for k, v in rows.items()})

    def _validate(self, trainer: L.Trainer, system: System, step: int) -> None:
        begun = time.perf_counter()
        with self.health.validation(system) if self.health else nullcontext():
            readings = measure(system, self.held_out(), self.ema)
        self._write(trainer, step, readings)
        self._look_at_health(trainer, system, step)
        self.latest = {name: r.value for name, r in readings.items()}
        self.looks += 1
        monitored = (self.latest[self.config.train.monitor], self.latest[system.tie_break])
        if monitored < (self.best, self.best_tie):
            (self.best, self.best_tie), self.best_step, self.looks_since_best = monitored, step, 0
        elif step > system.patient_from:
            self.looks_since_best += 1
        if self._out_of_patience():
            self.stopped_early = (
                f"early stop: {self.looks_since_best} looks without a better {self.config.train.monitor}"
            )
            self.stopped_by = self.stopped_by or self.stopped_early
        if self.prove and trainer.is_global_zero:
            with alone(), self.ema.applied(system) if self.ema else nullcontext():
                self.prove(system, step)
        self._clock = (self._clock[0] + time.perf_counter() - begun, *self._clock[1:])

    def _look_at_health(self, trainer: L.Trainer, system: System, step: int) -> None:
        if not self.health:
            return
        begun = time.perf_counter()
        self.health.audit(system, trainer.optimizers[0])
        self._write(trainer, step, self.health.look(system, self.ema))
        diagnosis = self.health.judge()
        self.verdict = diagnosis.verdict
        if diagnosis.verdict == "failing" and self.config.health.stop:
            self.stopped_by = self.stopped_by or f"health: {diagnosis.findings[0].rule}"
        asked = self.health.act(step)
        self.stopped_by, self.keep = self.stopped_by or asked.stop, asked.checkpoint
        self._write(trainer, step, {LOOKED: Reading(time.perf_counter() - begun)})

    def _out_of_patience(self) -> bool:
        return 0 < self.config.train.patience <= self.looks_since_best

    def take_best(self, system: System) -> tuple[int, str]:
        """Gives the system the weights, averaged and live, of the look with the best monitored value.

        Returns the step that its weights are of now, and a sentence that says so.
        """
        monitor, file = self.config.train.monitor, self.folder / checkpoint.name(self.best_step)
        if not file.is_file():  # no look gave a number, or an earlier checkpoint than this one was resumed from
            why = f"the model has the last weights: of the best {monitor} (step {self.best_step}) none are kept"
            return self.done, why
        content = checkpoint.read(file)
        system.load_state_dict(content["state_dict"])
        if self.ema:
            self.ema.load_state_dict(content["callbacks"][self.ema.state_key])
        return self.best_step, f"the model has the weights of step {self.best_step}, the best {monitor}"

    def _refuse_unmeasured_monitor(self, system: System) -> None:
        """Finds out before the first step, from one batch, whether ``train.monitor`` is measured at all."""
        measured = measure(system, islice(self.held_out(), 1), None)
        if self.config.train.monitor not in measured:
            raise ValueError(
                f"train.monitor is {self.config.train.monitor!r}, which is not measured. Measured on held-out items: "
                f"{', '.join(sorted(measured))}."
            )

    def _checkpoint(self, trainer: L.Trainer, step: int) -> None:
        trainer.save_checkpoint(self.folder / checkpoint.name(step))
        if trainer.is_global_zero:
            whole = sorted(self.folder.glob("step-*.ckpt"))
            kept = {p.name for p in whole[-self.config.train.keep :]}
            kept |= {checkpoint.name(step) for step in (self.best_step, *self.kept)}
            for path in whole:
                if path.name not in kept:
                    path.unlink()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, content: dict[str, Any]) -> None:
        content["intaglio"] = {**self.identity, "position": trainer.global_step * self.config.train.accumulate}

    def _write(self, trainer: L.Trainer, step: int, readings: dict[str, Reading]) -> None:
        if self.history:
            epoch = step * self.config.train.accumulate * self.config.train.batch_size / self.items
            self.history.write(step, round(epoch, 4), readings)
            self.history.flush()
        for logger in trainer.loggers:
            logger.log_metrics({name: r.value for name, r in readings.items()}, step=step)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by and number == signal.SIGINT:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.stopped_by = f"signal {signal.Signals(number).name}"

    def _everyone_agrees(self, device: torch.device) -> tuple[bool, bool]:
        """Whether to stop and to keep the weights: what one process has a reason for becomes every process's."""
        if processes() == 1:
            return self.stopped_by is not None, self.keep
        flags = torch.tensor([float(self.stopped_by is not None), float(self.keep)], device=device)
        dist.all_reduce(flags)
        if flags[0] > 0:
            reasons: list[Any] = [None] * processes()
            dist.all_gather_object(reasons, self.stopped_by)
            self.stopped_by = next(filter(None, reasons))
        return bool(flags[0] > 0), bool(flags[1] > 0)


@torch.no_grad()
def measure(system: System, batches: Iterator[Any], ema: EMA | None) -> dict[str, Reading]:
    """Held-out readings with their nulls, in eval mode with averaged weights; the training state comes back as it was.

    The total weighs the terms as training does. Each process measures its own batches, as if it were alone; the sums
    and counts are added over the processes.
    """
    sums: dict[str, Tensor] = {}
    training = [m for m in system.modules() if m.training]
    state = torch.get_rng_state()
    system.eval()
    try:
        with alone(), ema.applied(system) if ema else nullcontext():
            _add_up(system, batches, sums)
    finally:
        for module in training:
            module.training = True
        torch.set_rng_state(state)
    if processes() > 1:
        sums = _over_processes(sums)
    nulls = system.nulls()
    readings = {
        f"val/{name}": Reading(float(total / count), nulls.get(name), int(count))
        for name, (total, count) in sums.items()
    }
    weighted = [weight * readings[f"val/loss/{name}"].value for name, weight in system.weights.items()]
    return readings | {"val/loss/total": Reading(sum(weighted), nulls.get("loss/total"))}


def _over_processes(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the same name added up, in the order of the ranks; a process without batches has none."""
    everyone: list[Any] = [None] * processes()
    dist.all_gather_object(everyone, sums)
    names = dict.fromkeys(name for theirs in everyone for name in theirs)
    return {name: sum(theirs[name] for theirs in everyone if name in theirs) for name in names}


def _add_up(system: System, batches: Iterator[Any], sums: dict[str, Tensor]) -> None:
    for batch in batches:
        batch = system.transfer_batch_to_device(batch, system.device, 0)
        with torch.autocast(system.device.type, torch.bfloat16, enabled=system.bf16):
            measured = system.measure(batch)
        for name, (total, count) in measured.items():
            pair = torch.stack([total.detach().double().cpu(), count.detach().double().cpu()])
            sums[name] = sums[name] + pair if name in sums else pair
