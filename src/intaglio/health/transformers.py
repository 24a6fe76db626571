"""The monitor as a callback of the Hugging Face ``Trainer``; needs the extra ``hf``:

    Trainer(model, args, callbacks=[MonitorCallback("runs/mine", taps={"latent": "encoder"}, probe=held_out_batch)])

Losses, rate and gradient norm (before clipping) are what the ``Trainer`` logs, held-out numbers what it evaluates.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.health.diagnosis import Diagnosis
from intaglio.health.monitor import Monitor, options

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("The callback for transformers needs the extra hf: pip install 'intaglio[hf]'.") from error

NAMES = {
    "loss": "train/loss/total",
    "grad_norm": "train/optimizer/gradient_norm",
    "learning_rate": "train/optimizer/rate",
}


class MonitorCallback(TrainerCallback):
    """Watches a ``Trainer.train``; ``more`` are arguments of ``Monitor``. ``diagnosis`` is the verdict at its end.

    ``probe`` is a batch as the collator makes them, a mapping; on several processes the first process watches.
    """

    def __init__(self, folder: str | Path, probe: Any = None, **more: Any):
        self.probe, self.options = probe, {"forward": _call, **options(folder=folder, **more)}
        self.monitor: Monitor | None = None
        self.diagnosis: Diagnosis | None = None
        self._batch: Any = None
        self._hook: Any = None
        self._validation: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        model: nn.Module = given["model"]
        device = next(model.parameters()).device
        self.monitor = Monitor(
            model,
            given["optimizer"],
            probe=_on(device, self.probe),
            steps=state.max_steps,
            start=state.global_step,
            scaled=args.fp16,
            **self.options,
        )
        self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if self.monitor:
            self.monitor.step({}, self._batch, clipped=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        if self.monitor:
            self.monitor.log({NAMES[name]: float(v) for name, v in (logs or {}).items() if name in NAMES})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._before_evaluation(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._before_evaluation(control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        if self.monitor and self._validation:
            self._validation.__exit__(None, None, None)
            self._validation = None
            numbers = {n: float(v) for n, v in (metrics or {}).items() if isinstance(v, int | float) and n != "epoch"}
            self.monitor.validated(numbers)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.monitor:
            self._hook.remove()
            self.diagnosis = self.monitor.close()

    def _before_evaluation(self, control: TrainerControl) -> None:
        if self.monitor and control.should_evaluate and self._validation is None:
            self._validation = self.monitor.validation()
            self._validation.__enter__()

    def _keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            self._batch = kwargs or args


def _call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _on(device: torch.device, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: _on(device, part) for name, part in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
