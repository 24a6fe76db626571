"""The monitor as a Lightning callback, for anybody's LightningModule:

    Trainer(callbacks=[MonitorCallback("runs/mine", taps={"latent": "encoder"}, probe=held_out_images)])

Losses are what ``training_step`` returns and logs; held-out numbers what validation logs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from intaglio.health.diagnosis import Diagnosis
from intaglio.health.finding import Finding
from intaglio.health.monitor import Monitor
from intaglio.history import Measured


class MonitorCallback(L.Callback):
    """Watches a ``Trainer.fit``; arguments as of ``Monitor``. ``diagnosis`` is the verdict when training has ended.

    Works with automatic optimization and one optimizer; of several the first is watched. On several processes the first
    one watches.
    """

    def __init__(
        self,
        folder: str | Path,
        taps: Mapping[str, str] | None = None,
        probe: Any = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        read: Callable[[nn.Module, Any], Mapping[str, Mapping[str, Measured]]] | None = None,
        every: int = 100,
        log_every: int = 10,
        profile: str | Path = "default",
        nulls: Mapping[str, float] | None = None,
        on_finding: Callable[[Finding], None] | None = None,
        stop: bool = False,
    ):
        self.folder, self.probe = folder, probe
        self.options: dict[str, Any] = {
            "taps": taps,
            "forward": forward,
            "read": read,
            "every": every,
            "log_every": log_every,
            "profile": profile,
            "nulls": nulls,
            "on_finding": on_finding,
            "stop": stop,
        }
        self.monitor: Monitor | None = None
        self.diagnosis: Diagnosis | None = None
        self._loss: Tensor | float = float("nan")
        self._batch: Any = None
        self._validation: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        steps = trainer.estimated_stepping_batches
        probe = pl_module.transfer_batch_to_device(self.probe, pl_module.device, 0) if self.probe is not None else None
        self.monitor = Monitor(
            pl_module,
            trainer.optimizers[0],
            folder=self.folder,
            probe=probe,
            steps=int(steps) if steps not in (-1, float("inf")) else None,
            **self.options,
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach() * trainer.accumulate_grad_batches

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.monitor and optimizer is self.monitor.optimizer:
            self.monitor.step(self._loss, self._batch)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor and self.monitor.count:
            self._validation = self.monitor.validation()
            self._validation.__enter__()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._validation is None or self.monitor is None:
            return
        self._validation.__exit__(None, None, None)
        self._validation = None
        held_out = {n: float(v) for n, v in trainer.callback_metrics.items() if "val" in n.lower()}
        self.monitor.validated({"total" if "loss" in n else _plain(n): v for n, v in held_out.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor:
            self.diagnosis = self.monitor.close()


def _plain(name: str) -> str:
    """A logged name as ``val/<site>/<quantity>``: ``val_acc`` is ``val/logged/val_acc``."""
    return "val/logged/" + "".join(c if c.isalnum() or c in "_.-" else "_" for c in name)
