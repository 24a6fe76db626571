"""What every system is: a LightningModule whose loss terms are summed here and nowhere else."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from intaglio.config import Config
from intaglio.history import Measured
from intaglio.objectives import Term
from intaglio.objectives.distributed import processes, rank
from intaglio.systems.optimizers import applied_rates, configure, parameter_groups


class NonFiniteStep(RuntimeError):
    """A gradient or loss was not finite; the optimizer step that it belonged to was not taken. ``run`` is where."""

    run: Path | None = None


class System(L.LightningModule):
    """A model and how it is trained.

    A subclass gives ``loss_terms``, ``taps`` and ``nulls``. ``training_step`` reads: terms, their weighted sum, its
    gradient. The weight that is logged is the number that multiplied.
    """

    model: nn.Module
    tie_break = "val/loss/total"
    """Which of two looks is better that are equal in ``train.monitor``."""

    def __init__(self, config: Config, steps: int):
        super().__init__()
        self.config, self.steps = config, steps
        self.built_for: dict[str, dict[str, int]] = {}  # sizes of the model beside those of its data, for the audits
        self.terms: dict[str, Term] = {}
        self.weights: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        self._settings: list[dict[str, Any]] = []
        self.total = torch.tensor(torch.nan)
        self.gradient_norm = torch.tensor(torch.nan)

    @abstractmethod
    def loss_terms(self, batch: Any) -> dict[str, Term]:
        """The parts of the loss on one batch, each a scalar with its weight."""

    @abstractmethod
    def taps(self) -> Mapping[str, nn.Module]:
        """Modules whose outputs are worth watching, by the site name that they have in the history."""

    @abstractmethod
    def nulls(self) -> Mapping[str, float]:
        """What each loss term would be if nothing had been learnt, where that is known."""

    def weigh(self, terms: Mapping[str, Term]) -> Tensor:
        """Σ weight · value, in the order of the terms; keeps the weights that it used."""
        self.weights = {name: float(weight) for name, (_, weight) in terms.items()}
        return torch.stack([weight * value.float() for value, weight in terms.values()]).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.manual_seed(self.noise_seed(batch_idx))
        terms = self.loss_terms(batch)
        total = self.weigh(terms)
        self._remember(terms, total.detach())
        return total

    def _remember(self, terms: Mapping[str, Term], total: Tensor) -> None:
        """Terms and total of an optimizer step: their means over the forward passes that it accumulates."""
        before = self._pass  # passes of this step so far
        old = self.terms if before else {}

        def mean(name: str, value: Tensor) -> Tensor:
            return value if not before else (old[name].value * before + value) / (before + 1)

        self.terms = {name: Term(mean(name, value.detach()), weight) for name, (value, weight) in terms.items()}
        self.total = total if not before else (self.total * before + total) / (before + 1)

    def noise_seed(self, micro_step: int) -> int:
        """Seed of everything random in one forward pass: a function of (seed, rank, step) and no other state."""
        return _key(self._drawn_by, 0, rank(), micro_step)

    def noise_like(self, x: Tensor, stream: int = 1) -> Tensor:
        """N(0, 1) of the shape of ``x``, cut from one draw for the global batch: the same items get the same noise
        however many processes share them. Each ``stream`` is a draw of its own."""
        whole = torch.randn((len(x) * processes(), *x.shape[1:]), generator=self._generator(stream))
        return whole[self._part(len(x))].to(x)

    def uniform(self, items: int, stream: int) -> Tensor:
        """U(0, 1), (items,), on the CPU, cut from one draw for the global batch as in ``noise_like``."""
        return torch.rand(items * processes(), generator=self._generator(stream))[self._part(items)]

    def even(self, items: int, stream: int) -> Tensor:
        """U(0, 1) each, (items,), on the CPU; together those of the global batch lie evenly, a step of 1/B apart."""
        count = items * processes()
        offset = torch.rand(1, generator=self._generator(stream))
        return ((torch.arange(count) / count + offset) % 1)[self._part(items)]

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(_key(self._drawn_by, stream, self.micro_step))

    @property
    def _drawn_by(self) -> int:
        return self.config.train.drawn_by(self.config.seed)

    @staticmethod
    def _part(items: int) -> slice:
        """This process's rows of the global batch."""
        return slice(rank() * items, (rank() + 1) * items)

    @property
    def bf16(self) -> bool:
        return self.config.train.precision == "bf16"

    @property
    def micro_step(self) -> int:
        """Forward passes so far, over all epochs and resumptions."""
        return self.global_step * self.config.train.accumulate + self._pass

    _pass = 0

    @property
    def freezes(self) -> bool:
        """Whether parts of the model stand still for a while."""
        return False

    @property
    def patient_from(self) -> int:
        """The step behind which looks without progress count towards an early stop."""
        return 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._pass = batch_idx % self.config.train.accumulate

    def configure_optimizers(self) -> Any:
        made = configure(self.groups(), self.config.optim, self.steps, self.bf16)
        self._settings = [
            {name: group[name] for name in ("initial_lr", "weight_decay", "betas")}
            for group in made["optimizer"].param_groups
        ]
        return made

    def groups(self) -> list[dict[str, Any]]:
        """Parameters by what the optimizer does with them."""
        return parameter_groups(self, self.config.optim.decay)

    def on_train_start(self) -> None:
        """A resumed optimizer brings rate, decay and betas of its old configuration; the present one decides."""
        schedule: Any = self.lr_schedulers()
        groups = schedule.optimizer.param_groups
        if self.global_step:
            schedule.base_lrs = [ours["initial_lr"] for ours in self._settings]
            for group, ours in zip(groups, self._settings, strict=True):
                group.update(ours)
        for group, base, share in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * share(schedule.last_epoch)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips to ``optim.clip`` and stops before a non-finite gradient reaches the weights."""
        self.rates = applied_rates(optimizer.param_groups)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(self.gradient_norm):
            terms = ", ".join(f"{name} {float(t.value):.4g}" for name, t in self.terms.items())
            raise NonFiniteStep(
                f"Step {self.global_step + 1}: the gradient norm is {float(self.gradient_norm)} (loss terms: {terms}). "
                "The step was not taken. Train anew with a lower --optim.rate, a longer --optim.warmup, or with "
                "--train.precision fp32."
            )
        if self.config.optim.clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, self.gradient_norm)

    @abstractmethod
    def read(self, batch: Any) -> dict[str, Mapping[str, Measured]]:
        """Instruments and trials on a fixed held-out batch, by ``<split>/<site>`` and quantity; in eval mode."""

    @abstractmethod
    def ranges(self, batch: Any) -> dict[str, dict[str, float]]:
        """By site, the range of the targets beside what the output's activation reaches."""

    @abstractmethod
    def measure(self, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Held-out quantities of one batch as (sum, count), to be added up over batches and processes."""


def _key(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
