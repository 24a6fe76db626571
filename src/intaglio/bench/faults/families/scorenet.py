"""A noise-conditional score network (Song & Ermon 2019): denoising score matching at a ladder of noise levels, and
annealed Langevin dynamics from the highest. Pictures are flat; the loss is a sum over pixels, weighed by σ²."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits
from intaglio.health.monitor import Monitor
from intaglio.history import Reading

SPREAD = 0.33
"""Of pixels in [-1, 1]."""


class ScoreNet(nn.Module):
    def __init__(self, width: int, blocks: int, classes: int):
        super().__init__()
        self.first = nn.Linear(768, width)
        self.noise, self.shape = nn.Linear(33, width), nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.last = nn.Linear(width, 768)

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """The score, ∇ log p(x; σ): from x towards the denoised picture."""
        s = sigma[:, None]
        wave = s.log() * torch.arange(1, 17) / 2
        told = F.silu(self.noise(torch.cat([s.log(), wave.sin(), wave.cos()], 1))) + self.shape(y)
        total = (s**2 + SPREAD**2).sqrt()
        h = self.first(x / total) + told
        for block in self.blocks:
            h = h + block(h + told)
        clean: Tensor = SPREAD**2 / total**2 * x + s * SPREAD / total * self.last(F.silu(h))
        return (clean - x) / s**2


def weight(sigma: Tensor) -> Tensor:
    return sigma**2


def anneal_dsm_loss(model: nn.Module, x: Tensor, y: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """½ λ(σ) ‖s(x + σε, σ) + ε/σ‖² of each picture."""
    s = sigma[:, None]
    target = -eps / s
    score: Tensor = model(x + s * eps, sigma, y)
    each: Tensor = 0.5 * weight(sigma) * (score - target).square().sum(1)
    return each


def loader(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for idx in torch.randperm(len(x)).split(size):
            yield x[idx], y[idx]


@torch.no_grad()
def langevin(model: nn.Module, sigmas: Tensor, y: Tensor, steps: int = 10, rate: float = 0.1) -> Tensor:
    x = sigmas[0] * torch.randn(len(y), 768)
    for sigma in sigmas:
        alpha = rate * sigma**2
        for _ in range(steps):
            x = x + alpha * model(x, sigma.expand(len(y)), y) + (2 * alpha).sqrt() * torch.randn_like(x)
    return x + sigmas[-1] ** 2 * model(x, sigmas[-1].expand(len(y)), y)


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 128, items: int = 6000, lr: float = 1e-3,
    width: int = 256, blocks: int = 2, levels: int = 10, high: float = 10.0, low: float = 0.05,
    optimizer: str = "Adam", mean: bool = False, decay: float = 0.99,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    data, test = pictures(items, seed), pictures(500, 10_000 + seed)
    x, x_test = 2 * data.images.flatten(1) - 1, 2 * test.images.flatten(1) - 1
    y, y_test = data.factors[:, 1], test.factors[:, 1]
    center, variance = x.mean(0), float((x - x.mean(0)).square().mean())
    sigmas = torch.logspace(math.log10(high), math.log10(low), levels)
    model = ScoreNet(width, blocks, 4)
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=lr)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
    eps_test = torch.randn(x_test.shape, generator=torch.Generator().manual_seed(1))
    sigma_test = sigmas[torch.arange(len(x_test)) % levels]
    shares = weight(sigmas) / sigmas**2 / (weight(sigmas) / sigmas**2).sum()
    per = 768 if mean else 1
    guess = 384 * (weight(sigma_test) / sigma_test**2 * variance / (variance + sigma_test**2)).mean() / per

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {}
        each = anneal_dsm_loss(model, probe, y_test, sigma_test, eps_test) / weight(sigma_test)
        for k, sigma in enumerate(sigmas.tolist()):
            site = f"log_snr.{math.log(variance / sigma**2):.2f}"
            own, null = float(each[k::levels].mean()), 384 / sigma**2 * variance / (variance + sigma**2)
            found[f"train/{site}"] = {"weight": Reading(float(shares[k]), 1 / levels)}
            found[f"val/{site}"] = {"loss": Reading(own, null, len(each[k::levels]))}
        score, other = (model(probe + sigma_test[:, None] * eps_test, sigma_test, c) for c in (y_test, y_test.roll(1)))
        found["val/condition"] = {"velocity_change": Reading(float((other - score).norm() / score.norm()), 0.0)}
        average = anneal_dsm_loss(ema.module, probe, y_test, sigma_test, eps_test).mean() / per
        live = anneal_dsm_loss(model, probe, y_test, sigma_test, eps_test).mean() / per
        found["val/ema"] = {"loss": Reading(float(average), float(live))}
        found["train/noise"] = {"terminal_snr": Reading(variance / float(sigmas[0]) ** 2, 0.0)}
        return found

    monitor = Monitor(
        model, opt, folder=folder, probe=x_test, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/dsm": float(guess), "val/loss/dsm": float(guess)},
    )  # fmt: skip
    monitor.audit(leaks={"the very same picture": audits.leaks(list(x.numpy()), list(x_test.numpy()))})
    for step, (batch, label) in enumerate(loader(x, y, size), 1):
        model.train()
        sigma = sigmas[torch.randint(levels, (len(batch),))]
        loss = anneal_dsm_loss(model, batch, label, sigma, torch.randn_like(batch)).mean() / per
        opt.zero_grad()
        loss.backward()
        monitor.step({"dsm": loss}, batch)
        opt.step()
        ema.update_parameters(model)
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                loss = anneal_dsm_loss(model, x_test, y_test, sigma_test, eps_test).mean() / per
            monitor.validated({"dsm": float(loss)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    half = torch.full((len(x_test),), 0.5)
    noisy = x_test + 0.5 * eps_test
    linear = center + (noisy - center) * variance / (variance + 0.25)
    with torch.no_grad():
        clean = noisy + 0.25 * ema.module(noisy, half, y_test)
        drawn = langevin(ema.module, sigmas, y_test[:200]).unflatten(1, (3, -1))
    error, beside = ((guess_ - x_test).square().mean() for guess_ in (clean, linear))
    shown = x_test[:200].unflatten(1, (3, -1))
    kinds = torch.stack([shown[y_test[:200] == k].mean(0).mean(1) for k in range(4)])
    kinds, seen = (part - part.mean(0) for part in (kinds, drawn.mean(2)))
    right = (F.normalize(seen, dim=1) @ F.normalize(kinds, dim=1).T).argmax(1) == y_test[:200]
    return {
        "variance that denoising explains beyond a linear guess": (1 - float(error / beside), 0.0),
        "samples of the colour that was asked for": (float(right.float().mean()), 0.25),
    }


FAMILY = Family(
    "scorenet",
    "development",
    "denoising score matching at a ladder of noise levels",
    faults=(
        Fault(
            "weight-forgotten",
            "Levels are not weighed, so that the least noise makes nearly all of the loss.",
            ("high-noise-starved",),
            changes=(Change("return sigma**2", "return torch.ones_like(sigma)"),),
        ),
        Fault(
            "label-not-passed",
            "The network is given the class 0 for every picture.",
            ("condition-ignored",),
            changes=(Change("self.shape(y)", "self.shape(0 * y)"),),
        ),
        Fault(
            "average-never-updated",
            "The average of the weights is never updated.",
            ("ema-lag",),
            changes=(Change("        ema.update_parameters(model)\n", ""),),
        ),
        Fault(
            "ends-alone-in-the-optimizer",
            "The optimizer was made of first and last layer alone.",
            ("not-in-optimizer",),
            changes=(
                Change("(model.parameters(), lr=lr)", "([*model.first.parameters(), *model.last.parameters()], lr=lr)"),
            ),
        ),
        Fault(
            "noise-drawn-twice",
            "The noise in the target is not the noise that was added.",
            ("no-learning", "plateau"),
            changes=(Change("model(x + s * eps, sigma, y)", "model(x + s * torch.randn_like(eps), sigma, y)"),),
        ),
        Fault(
            "learnt-by-heart",
            "There are too few pictures for so many looks at each.",
            ("overfitting",),
            options={"items": 16, "size": 16, "width": 384, "steps": 800, "lr": 2e-3},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1)),
        Healthy("means", "The loss is a mean over pixels.", options={"mean": True}),
        Healthy("twenty-levels", options={"levels": 20, "high": 20.0, "blocks": 3}),
        Healthy("little-noise", "The highest level is that of the data's distances.", options={"high": 3.0}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "lr": 3e-4}),
        Healthy("small-batches", options={"size": 32, "steps": 600, "lr": 5e-4}),
        Healthy("wide", options={"width": 384, "optimizer": "AdamW", "decay": 0.98}),
    ),
)
