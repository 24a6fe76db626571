"""The monitor as a Lightning callback, for anybody's LightningModule:

    Trainer(callbacks=[MonitorCallback("runs/mine", taps={"latent": "encoder"}, probe=held_out_images)])

Losses are what ``training_step`` returns; held-out numbers are what validation logs under a name with ``val`` in it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from intaglio.health.diagnosis import Diagnosis
from intaglio.health.monitor import Loss, Monitor, options


class MonitorCallback(L.Callback):
    """Watches a ``Trainer.fit``; ``diagnosis`` is the verdict at its end.

    Args:
        folder: gets what the monitor writes; must be new or empty.
        probe: a fixed held-out batch.
        terms: the terms of the loss that ``training_step`` just gave, of the module, as ``lambda m: m.terms``: a value
            with its weight by name. With them their gradients are measured, and the weights that were applied.
        facts: what audits found before training, as ``{"leaks": {"the same picture": 12}}``.
        more: other arguments of ``Monitor``, but for ``steps``, ``start`` and ``scaled``, which the trainer knows.

    Works with automatic optimization; of several optimizers the first is watched, and on several processes the first
    process watches.
    """

    def __init__(
        self,
        folder: str | Path,
        probe: Any = None,
        *,
        terms: Callable[[Any], Mapping[str, Loss]] | None = None,
        facts: Mapping[str, Any] | None = None,
        **more: Any,
    ):
        self.terms, self.facts = terms, dict(facts or {})
        self.probe, self.options = probe, options(folder=folder, **more)
        self.monitor: Monitor | None = None
        self.diagnosis: Diagnosis | None = None
        self._loss: dict[str, Loss] = {}
        self._batch: Any = None
        self._validation: Any = None
        self._last = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        steps = trainer.estimated_stepping_batches
        probe = pl_module.transfer_batch_to_device(self.probe, pl_module.device, 0) if self.probe is not None else None
        self.monitor = Monitor(
            pl_module,
            trainer.optimizers[0],
            probe=probe,
            steps=int(steps) if steps not in (-1, float("inf")) else None,
            start=trainer.global_step,
            scaled=trainer.precision == "16-mixed",
            **self.options,
        )
        if self.facts:
            self.monitor.audit(**self.facts)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch, self._last = batch, (batch_idx + 1) % trainer.accumulate_grad_batches == 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        terms = self.terms(pl_module) if self.terms else {}
        if terms and self.monitor and self._last:
            self.monitor.before_backward(terms)
        self._loss = {"total": loss.detach() * trainer.accumulate_grad_batches, **terms}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.monitor and optimizer is self.monitor.optimizer:
            self.monitor.step(self._loss, self._batch)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor:
            self._validation = self.monitor.validation()
            self._validation.__enter__()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor and self._validation:
            self._validation.__exit__(None, None, None)
            self._validation = None
            logged = {name: float(v) for name, v in trainer.callback_metrics.items() if "val" in name.lower()}
            self.monitor.validated(logged)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor:
            self.diagnosis = self.monitor.close()
