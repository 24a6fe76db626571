"""An exponential moving average of the parameters, saved and restored with the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn


class EMA(L.Callback):
    """θ̄ ← d·θ̄ + (1 − d)·θ after every optimizer step, d = min(decay, (1 + t)/(10 + t)) (warm-up as in TensorFlow's).

    Parameters only: buffers (priors, codebooks, schedules) are not averaged but taken as they are.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.step = 0
        self.average: dict[str, Tensor] = {}
        self.origin: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.average:
            self.average = {n: p.detach().clone() for n, p in _trained(pl_module)}
            self.origin = {n: _few(p).clone() for n, p in _trained(pl_module)}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = {n: x.to(pl_module.device) for n, x in self.average.items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """One step of the average."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        live: list[Tensor] = [p for _, p in self._averaged(module)]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module's parameters are the averaged ones; afterwards the live ones, bit for bit."""
        parameters = dict(self._averaged(module))
        live = {n: p.data for n, p in parameters.items()}
        try:
            for n, p in parameters.items():
                p.data = self.average[n]
            yield
        finally:
            for n, p in parameters.items():
                p.data = live[n]

    @torch.no_grad()
    def moved(self, module: nn.Module) -> float:
        """‖average − start‖ / ‖live − start‖, of up to 1,000 numbers of each tensor: near 1 where it keeps up."""
        ends = dict(self._averaged(module))
        ours, theirs = (
            torch.stack([(_few(end).cpu() - self.origin[n].cpu()).norm() for n, end in found.items()]).norm()
            for found in (self.average, ends)
        )
        return float(ours / theirs) if theirs > 0 else 1.0

    @torch.no_grad()
    def apply_for_good(self, module: nn.Module) -> None:
        """The module's parameters become the averaged ones."""
        for n, p in self._averaged(module):
            p.copy_(self.average[n])

    def _averaged(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Those that are trained, although a stage may have frozen some for now."""
        return [(n, p) for n, p in module.named_parameters() if n in self.average]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "average": self.average, "origin": self.origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.average, self.origin = (state_dict[name] for name in ("step", "average", "origin"))


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad]


def _few(tensor: Tensor) -> Tensor:
    """Up to 1,000 numbers of a tensor, spread over it."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // 1000)][:1000]
