"""Images from noise: how the denoiser is trained (Ho et al. 2020; Salimans & Ho 2022; Ho & Salimans 2022).

Shapes: B batch, C × H × W of what is denoised, T noise levels, K bins of log-SNR.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.config import DiffusionConfig
from intaglio.data.batches import PictureBatch
from intaglio.data.prepare import Pictured
from intaglio.health import audits
from intaglio.health.instruments import moments
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.history.reading import ratio
from intaglio.models.autoencoder import Autoencoder
from intaglio.models.diffusion import DiffusionModel
from intaglio.models.prompts import Prompts
from intaglio.nn.condition import Condition, only_real
from intaglio.objectives import Term
from intaglio.objectives.diffusion import (
    LOG_SNR_EDGES,
    diffusion_loss,
    error_factor,
    linear_null,
    log_snr_bins,
    log_snr_weights,
    min_snr_weights,
    target,
)
from intaglio.systems.base import System

CENTRES = (-7, *(int(edge) + 1 for edge in LOG_SNR_EDGES[:-1]), 7)
"""Names of the bins of log-SNR; the outer two are open."""

SAMPLED = ("guidance", "method", "steps")
"""Settings of sampling that the model keeps as its defaults."""

TRIED = 256
"""Items of the probe whose conditions are exchanged."""


class DiffusionSystem(System):
    """The squared error of a prediction at a uniformly drawn noise level, with some conditions dropped."""

    config: DiffusionConfig
    model: DiffusionModel

    def __init__(self, config: DiffusionConfig, steps: int, model: DiffusionModel, variance: Tensor):
        super().__init__(config, steps)
        self.model = model
        self.model.bf16 = self.bf16
        self.weight_T = weights(config, model).float()
        self.null_T = linear_null(model.schedule, model.prediction, variance)
        self.bin_T = log_snr_bins(model.schedule)

    def loss_terms(self, batch: PictureBatch) -> dict[str, Term]:
        x0 = self.model.standard(batch.x)
        t_B = self.levels(len(x0))
        condition = self.condition(batch)
        if condition is not None and self.training:
            condition = condition.drop(self.uniform(len(x0), stream=3).to(x0.device) < self.config.condition.drop)
        loss_B = self.losses(x0, self.noise_like(x0), t_B, condition)
        return {self.model.prediction: Term((loss_B * self.weight_T.to(x0)[t_B]).mean(), 1.0)}

    def losses(self, x0: Tensor, noise: Tensor, t_B: Tensor, condition: Condition | None) -> Tensor:
        """Each item's mean squared error of the prediction, (B,)."""
        model, told = self.model, condition or Condition()
        return diffusion_loss(lambda x, t: model.predict(x, t, told), x0, noise, t_B, model.schedule, model.prediction)

    def condition(self, batch: PictureBatch) -> Condition | None:
        """What the network is told of a batch, nothing dropped."""
        if self.model.prompts is not None:
            return self.model.prompts(batch.prompts)
        return Condition(labels_B=batch.labels) if self.model.classes else None

    def levels(self, items: int) -> Tensor:
        """t of each item, (B,): uniform each, and together evenly spread (Kingma et al. 2021, appendix I.1)."""
        if not self.training:
            return self.fixed(items)
        steps = self.model.schedule.steps
        return (self.even(items, stream=2) * steps).long().clamp_max(steps - 1).to(self.device)

    def fixed(self, items: int) -> Tensor:
        """The levels at which held-out items are measured, the same each time: spread evenly, mixed."""
        steps = self.model.schedule.steps
        t = ((torch.arange(items) + 0.5) / items * steps).long()
        return t[torch.randperm(items, generator=torch.Generator().manual_seed(0))].to(self.device)

    def _fixed_noise(self, x0: Tensor) -> Tensor:
        return torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)

    def measure(self, batch: PictureBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Held-out error at fixed levels with fixed noise: in all, and by bin of log-SNR."""
        x0 = self.model.standard(batch.x)
        t_B = self.fixed(len(x0))
        loss_B = self.losses(x0, self._fixed_noise(x0), t_B, self.condition(batch)).double().cpu()
        t_B = t_B.cpu()
        weighted_B, bin_B = loss_B * self.weight_T[t_B], self.bin_T[t_B]
        sums = {f"loss/{self.model.prediction}": (weighted_B.sum(), torch.tensor(float(len(x0))))}
        for k in bin_B.unique().tolist():
            here = bin_B == k
            sums[f"log_snr.{CENTRES[k]}/loss"] = (loss_B[here].sum(), here.sum().float())
        return sums

    def read(self, batch: PictureBatch) -> dict[str, Mapping[str, Measured]]:
        found: dict[str, Mapping[str, Measured]] = {**self.decided()}
        if self.model.autoencoder is not None:
            x0 = self.model.standard(batch.x)
            std_K = x0.std((0, 2, 3), correction=0)
            found |= {f"val/latent.{k}": {"scaled_std": Reading(float(s), 1.0)} for k, s in enumerate(std_K)}
            found["val/latent"] = {"clamped_share": moments.cut_share(x0.transpose(0, 1).flatten(1))}
        count = len(batch.labels)
        spread = torch.arange(min(TRIED, count), device=batch.labels.device) * count // min(TRIED, count)
        few = type(batch)(*(part[spread] for part in batch))  # of all the probe: items may lie in order of their class
        condition = self.condition(few)
        if condition is None:
            return found | {"val/condition": {"permuted_loss": NotMeasured("nothing is told to the network")}}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return found | {"val/condition": self._obedience(few, condition)}

    def _obedience(self, batch: PictureBatch, condition: Condition) -> dict[str, Measured]:
        """What another item's condition changes of the prediction, and costs, at the same noise."""
        apart = self._others(batch)[1]
        if not apart.any():
            return {"permuted_loss": NotMeasured("all held-out items that were tried are told the same")}
        batch, condition = type(batch)(*(part[apart] for part in batch)), condition.rows(apart)
        x0 = self.model.standard(batch.x)
        t_B, noise, other = self.fixed(len(x0)), self._fixed_noise(x0), self._others(batch)[0]
        a, s = self.model.schedule.at(t_B, x0)
        own, strange = (
            torch.cat([self.model.predict(x, t, told.rows(i)).float() for x, t, i in _parts(a * x0 + s * noise, t_B)])
            for told in (condition, condition.rows(other))
        )
        goal = target(self.model.prediction, x0, noise, a, s)
        costs = [(y - goal).square().flatten(1).mean(1).double().cpu().numpy() for y in (own, strange)]
        change = (own - strange).flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1).clamp_min(1e-12)
        return {
            "velocity_change": Reading(float(change.mean()), 0.0, len(x0)),
            "permuted_loss": ratio(costs[1] - costs[0], costs[0], 0.0),
        }

    def _others(self, batch: PictureBatch) -> tuple[Tensor, Tensor]:
        """For each item the next one that is told something else, (B,), and whether there is one, (B,)."""
        texts = self.model.prompts is not None
        told = batch.prompts.reshape(len(batch.labels), -1) if texts else batch.labels[:, None]
        apart = (told[:, None] != told[None]).any(2)
        places = torch.arange(len(told), device=told.device)
        ahead = (places[None] - places[:, None]) % len(told)
        return torch.where(apart, ahead, len(told)).argmin(1), apart.any(1)

    def decided(self) -> dict[str, Mapping[str, Reading]]:
        """What the configuration alone decides: each bin's share in the loss, and what the last level's SNR is."""
        shares = {
            f"train/log_snr.{CENTRES[k]}": {"weight": Reading(float(share), float(even))}
            for k, (share, even) in enumerate(zip(*self.bin_shares(), strict=True))
            if even > 0
        }
        return {**shares, "train/noise": {"terminal_snr": Reading(self.model.schedule.terminal_snr(), 0.0)}}

    def bin_shares(self) -> tuple[Tensor, Tensor]:
        """Each bin's share of weight times frequency in the loss as an error of v, and an even share: (K,) each."""
        schedule, prediction = self.model.schedule, self.model.prediction
        as_v_T = self.weight_T.double() * error_factor(schedule, prediction) / error_factor(schedule, "v")
        share_K = self.bin_T.bincount(as_v_T.nan_to_num(), minlength=len(CENTRES))
        there_K = (self.bin_T.bincount(minlength=len(CENTRES)) > 0).double()
        return share_K / share_K.sum(), there_K / there_K.sum()

    def ranges(self, batch: PictureBatch) -> dict[str, dict[str, float]]:
        if self.model.autoencoder is not None:  # latents have no bounds
            return {}
        return {"image": audits.ranges(self.model.standard(batch.x), -1.0, 1.0)}

    def taps(self) -> dict[str, nn.Module]:
        return {"network": self.model.network}

    def nulls(self) -> Mapping[str, float]:
        null = {f"loss/{self.model.prediction}": float((self.null_T * self.weight_T).mean())}
        for k in self.bin_T.unique().tolist():
            null[f"log_snr.{CENTRES[k]}/loss"] = float(self.null_T[self.bin_T == k].mean())
        return null


def weights(config: DiffusionConfig, model: DiffusionModel) -> Tensor:
    """The weight of every t in the loss, (T,), float64."""
    if config.loss.weighting == "min-snr":
        return min_snr_weights(model.schedule, model.prediction, config.loss.gamma)
    if config.loss.weighting == "log-snr":
        return log_snr_weights(model.schedule)
    return torch.ones(model.schedule.steps, dtype=torch.float64)


def _parts(x: Tensor, t_B: Tensor, size: int = 64) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """A batch in parts that fit: x, t, and which rows they are."""
    for at in range(0, len(x), size):
        part = slice(at, at + size)
        yield x[part], t_B[part], part


def build(config: DiffusionConfig, prepared: Pictured, model: DiffusionModel) -> DiffusionSystem:
    """The system around a model, fresh (`new_model`) or trained."""
    assert config.train.steps is not None, "steps are resolved before a system is built"
    model.train()
    model.sampling = _sampling(config)
    if model.autoencoder is not None:
        model.autoencoder.eval()
    if model.prompts is not None:
        model.prompts.eval()
    return DiffusionSystem(config, config.train.steps, model, variance(model, prepared))


def new_model(
    config: DiffusionConfig, classes: Sequence[str], autoencoder: Autoencoder | None, prompts: Prompts | None
) -> DiffusionModel:
    """A model with fresh weights from the seed; autoencoder and text encoder are those that are given."""
    torch.manual_seed(config.seed)
    shape = autoencoder.arguments if autoencoder is not None else None
    model = DiffusionModel(**arguments(config, classes, shape, prompts))
    model.take(autoencoder, prompts)
    return model


def arguments(
    config: DiffusionConfig, classes: Sequence[str], autoencoder: dict[str, Any] | None, prompts: Prompts | None
) -> dict[str, Any]:
    """What the model is built with."""
    m, c = config.model, config.condition
    network: dict[str, Any] = {"documented": True, "base": m.widths[0], "dropout": m.dropout}
    if m.network == "standard":
        network = {k: getattr(m, k) for k in ("patch", "blocks", "dropout")}
        network |= {"widths": [*m.widths], "attention": [*m.attention]}
        if prompts is not None:
            network |= {"pooled": prompts.pooled, "tokens": prompts.tokens if c.tokens else 0}
    return {
        "image_size": config.data.image_size,
        "network": network,
        "noise": asdict(config.noise),
        "prediction": config.loss.prediction,
        "classes": classes if c.by == "class" else (),
        "dropped": c.drop if c.by != "none" else 0.0,
        "autoencoder": autoencoder,
        "prompts": {"config": prompts.config(), "empty": len(only_real(prompts.empty()))} if prompts else None,
        "sampling": _sampling(config),
    }


def _sampling(config: DiffusionConfig) -> dict[str, Any]:
    return {k: getattr(config.sampling, k) for k in SAMPLED}


def variance(model: DiffusionModel, prepared: Pictured, items: int = 1024) -> Tensor:
    """σ² of each number of x₀ over training items, (C, H, W): what the null of the loss rests on."""
    some = prepared.some("train", items)
    batch = prepared.data.batch(some, np.zeros(len(some), np.int64))
    return model.standard(batch.x.to(model.device)).double().var(0, correction=0).cpu()
