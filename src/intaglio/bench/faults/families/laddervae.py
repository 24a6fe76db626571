"""A ladder VAE (Sønderby et al. 2016): two levels of latents, a learned prior of the lower one given the upper.

The loss is in bits per dimension of the picture; the density of a pixel can be above 1, so bits become negative.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor

PIXELS = 768
BITS = 1 / (PIXELS * math.log(2))
Gaussian = tuple[Tensor, Tensor]


def mlp(inside: int, width: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, width), nn.BatchNorm1d(width), nn.LeakyReLU(), nn.Linear(width, outside))


def split(parameters: Tensor) -> Gaussian:
    mean, log_variance = parameters.chunk(2, dim=1)
    return mean, log_variance.clamp(-7, 5)


def draw(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def divergence(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) in nats, summed over dimensions, mean over the batch."""
    (m, v), (n, w) = q, p
    return 0.5 * ((m - n).square() / w.exp() + (v - w).exp() - 1 - v + w).sum(1).mean()


def merged(a: Gaussian, b: Gaussian) -> Gaussian:
    """The precision-weighted product of two Gaussians."""
    precision = (-a[1]).exp() + (-b[1]).exp()
    mean = (a[0] * (-a[1]).exp() + b[0] * (-b[1]).exp()) / precision
    return mean, -precision.log()


class Ladder(nn.Module):
    def __init__(self, width: int, lower: int, upper: int):
        super().__init__()
        self.up1, self.up2 = mlp(PIXELS, width, width), mlp(width, width // 2, width // 2)
        self.lower, self.upper = nn.Linear(width, 2 * lower), nn.Linear(width // 2, 2 * upper)
        self.prior = mlp(upper, width // 2, 2 * lower)
        self.decoder = nn.Sequential(mlp(lower, width, PIXELS), nn.Sigmoid())
        self.log_scale = nn.Parameter(torch.zeros(()))

    def infer(self, x: Tensor) -> tuple[Tensor, Tensor, Gaussian, Gaussian, Gaussian]:
        d1 = self.up1(x)
        q2 = split(self.upper(self.up2(d1)))
        z2 = draw(*q2)
        p1 = split(self.prior(z2))
        q1 = merged(split(self.lower(d1)), p1)
        z1 = draw(*q1)
        return z1, z2, q1, q2, p1

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z1, _, q1, q2, p1 = self.infer(x)
        error = (self.decoder(z1) - x) / self.log_scale.exp()
        nll = (0.5 * error.square() + self.log_scale + 0.5 * math.log(2 * math.pi)).sum(1).mean()
        standard = torch.zeros_like(q2[0]), torch.zeros_like(q2[0])
        return {"nll": nll, "kl_z1": divergence(q1, p1), "kl_z2": divergence(q2, standard)}


def in_bits(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bits per dimension, and both divergences as one."""
    return {"nll": BITS * terms["nll"], "kl": BITS * (terms["kl_z1"] + terms["kl_z2"])}


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def train(
    folder: Path, seed: int = 0, steps: int = 500, size: int = 128, items: int = 4096, rate: float = 4e-3,
    width: int = 192, lower: int = 16, upper: int = 6, warmup: int = 200, optimizer: str = "Adamax",
    decay: float = 1.0, clip: float = 0.0, bits: bool = False,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    x, held_out = pictures(items, seed).images.flatten(1), pictures(512, 10_000 + seed).images.flatten(1)
    model = Ladder(width, lower, upper)
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optim, decay)
    spread = float((held_out - x.mean(0)).square().sum(1).mean())
    null = PIXELS * BITS * (0.5 * math.log(2 * math.pi * math.e * spread / PIXELS))

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        _, z2, q1, q2, _ = model.infer(probe)
        ratios = {"noise_ratio": bottleneck.noise_ratio(z2, *q2)}
        return {"val/lower": panel.latents(q1[0]), "val/upper": {**panel.latents(*q2), **ratios}}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/total": null, "val/loss/total": null},
    )  # fmt: skip
    for step, batch in enumerate(batches(x, size), 1):
        beta = min(1.0, step / warmup) if warmup else 1.0
        model.train()
        terms = in_bits(model(batch)) if bits else model(batch)
        unit = 1.0 if bits else BITS
        weights = {"nll": unit, **{name: beta * unit for name in terms if name != "nll"}}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        weighted = {name: (term, weights[name]) for name, term in terms.items()}
        monitor.before_backward(weighted)
        optim.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        monitor.step({**weighted, "total": loss}, batch, clipped=clip > 0)
        optim.step()
        schedule.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = in_bits(model(held_out)) if bits else model(held_out)
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
            monitor.validated({"val/loss/total": unit * float(sum(terms.values()))})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        terms = model(held_out)
        _, z2, q1, _, p1 = model.infer(held_out)
        cost = divergence(q1, split(model.prior(z2.roll(1, 0)))) - divergence(q1, p1)
    return {
        "bits per dimension that are saved on held-out pictures": (null - BITS * float(sum(terms.values())), 0.0),
        "nats that the upper latent of another picture costs": (float(cost), 0.0),
    }


FAMILY = Family(
    "laddervae",
    "development",
    "a ladder VAE of pictures: two levels of latents, of which the upper is the lower's prior, in bits per dimension",
    faults=(
        Fault(
            "upper-latent-of-noise",
            "The upper latent is drawn from N(0, I) in training, as for samples, and not from its posterior.",
            ("posterior-collapse", "temperature-misstates-rate"),
            changes=(Change("z2 = draw(*q2)", "z2 = torch.randn_like(q2[0])"),),
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out pictures change the normalisation's statistics.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
        ),
        Fault(
            "prior-not-in-the-optimizer",
            "Parameters were listed by hand, and the network of the learned prior was forgotten.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "(model.parameters(), lr=rate)",
                    '([p for n, p in model.named_parameters() if not n.startswith("prior")], lr=rate)',
                ),
            ),
        ),
        Fault(
            "divergences-per-picture",
            "The pictures' part is divided by the number of pixels, and the divergences are not.",
            ("posterior-collapse", "term-dominates"),
            changes=(Change("name: beta * unit for", "name: beta for"),),
        ),
        Fault(
            "warm-up-only-logged",
            "The weights of the divergences rise in the log, and the loss takes all of them from the first step on.",
            ("weight-not-applied",),
            changes=(
                Change(
                    "torch.stack([weights[name] * term for name, term in terms.items()])",
                    "BITS * torch.stack([term for term in terms.values()])",
                ),
            ),
        ),
        Fault(
            "drawn-at-the-variance",
            "The 0.5 before the log-variance is missing, so latents are drawn at their variance.",
            ("temperature-misstates-rate",),
            changes=(Change("(0.5 * log_variance).exp()", "log_variance.exp()"),),
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", "Bits per dimension fall below 0, and the weight of the divergences rises.", seeds=(0, 1, 2)),
        Healthy("at-once", "All of the divergences from the first step on.", options={"warmup": 0}),
        Healthy("adam-with-clipping", options={"optimizer": "Adam", "rate": 5e-3, "clip": 0.5}),
        Healthy("falling-rate", options={"decay": 0.997, "rate": 8e-3, "steps": 600}),
        Healthy("one-number-above", "The upper latent is one-dimensional.", options={"upper": 1}),
        Healthy("wide", options={"width": 320, "lower": 32, "upper": 12, "size": 96}),
        Healthy(
            "in-bits", "All terms in bits per dimension, and one divergence of both levels.", options={"bits": True}
        ),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 1024, "size": 64}),
    ),
)
