"""A variational autoencoder as tutorials have it: Kingma & Welling 2014, on small pictures of shapes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel
from intaglio.health.monitor import Monitor


class VAE(nn.Module):
    def __init__(self, width: int = 256, latent: int = 16):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(768, width), nn.BatchNorm1d(width), nn.SiLU(), nn.Linear(width, 2 * latent)
        )
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, 768), nn.Sigmoid())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance


def losses(model: VAE, x: Tensor) -> dict[str, Tensor]:
    rebuilt, mean, log_variance = model(x)
    reconstruction = (rebuilt - x).square().sum(1).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return {"reconstruction": reconstruction, "kl": kl}


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def flipped(x: Tensor) -> Tensor:
    return x.unflatten(-1, (3, 16, 16)).flip(-1).flatten(-3) if torch.rand(()) < 0.5 else x


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 128, items: int = 4096, rate: float = 2e-3,
    width: int = 256, latent: int = 16, beta: float = 0.05, ramp: int = 0, optimizer: str = "Adam", restart: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    x, held_out = pictures(items, seed).images.flatten(1), pictures(512, 10_000 + seed).images.flatten(1)
    model = VAE(width, latent)
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    spread = float((held_out - x.mean(0)).square().sum(1).mean())

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        mean, log_variance = model.encode(probe)
        return {"val/latent": panel.latents(mean, log_variance)}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/reconstruction": spread, "val/loss/reconstruction": spread},
    )  # fmt: skip
    monitor.audit(
        augmentations={"flip": audits.augmentation(flipped, x[:64])},
        ranges={"pixels": audits.ranges(x, 0.0, 1.0)},
    )
    for step, batch in enumerate(batches(x, size), 1):
        if restart and step % restart == 1:
            optim.param_groups[0]["lr"] = rate
        elif restart:
            optim.param_groups[0]["lr"] *= 0.985
        weight = beta * min(1.0, step / ramp) if ramp else beta
        model.train()
        terms = losses(model, flipped(batch))
        weighted = {"reconstruction": (terms["reconstruction"], 1.0), "kl": (terms["kl"], weight)}
        monitor.before_backward(weighted)
        optim.zero_grad()
        (terms["reconstruction"] + weight * terms["kl"]).backward()
        monitor.step(weighted, batch)
        optim.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = losses(model, held_out)
            monitor.validated({"val/loss/reconstruction": float(terms["reconstruction"])})
            monitor.validated({"val/loss/kl": float(terms["kl"])})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        error = (model.decoder(model.encode(held_out)[0]) - held_out).square().sum(1).mean()
    return {"explained variance of held-out pictures": (1 - float(error) / spread, 0.0)}


FAMILY = Family(
    "vae",
    "development",
    "a variational autoencoder of pictures, fully connected",
    faults=(
        Fault(
            "encoder-of-zeros",
            "The encoder is given an empty tensor that was meant to be filled with the batch.",
            ("latent-ignores-input", "posterior-collapse", "dead-parameters"),
            changes=(
                Change(
                    "mean, log_variance = self.encoder(x)", "mean, log_variance = self.encoder(torch.zeros_like(x))"
                ),
            ),
            case="E latent-ignores-input",
        ),
        Fault(
            "rate-far-too-high",
            "Plain gradient descent takes the rate that was meant for Adam, and leaves.",
            ("non-finite", "diverged"),
            options={"optimizer": "SGD", "rate": 5.0},
        ),
        Fault(
            "kl-too-heavy",
            "β is two hundred times too high, so the decoder works without the latent.",
            ("posterior-collapse",),
            options={"beta": 10.0},
        ),
        Fault(
            "decoder-not-in-the-optimizer",
            "The optimizer holds the encoder alone.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=rate)", "(model.encoder.parameters(), lr=rate)"),),
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out pictures change the normalisation's statistics.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
            case="J validation-pollutes",
        ),
        Fault(
            "flip-of-every-picture",
            "The coin of the flip is missing: every picture is flipped, each time.",
            ("augmentation-inert",),
            changes=(Change(" if torch.rand(()) < 0.5 else x", ""),),
            case="D augmentation-inert",
            minor=True,
        ),
        Fault(
            "tanh-for-pictures-in-0-1",
            "Half of what the decoder can say is outside the pictures' range.",
            ("range-mismatch",),
            changes=(Change("nn.Sigmoid()", "nn.Tanh()"), Change("ranges(x, 0.0, 1.0)", "ranges(x, -1.0, 1.0)")),
            case="E range-mismatch",
            minor=True,
        ),
        Fault(
            "learnt-by-heart",
            "Three dozen pictures are all there is to train on.",
            ("overfitting",),
            options={"items": 48, "size": 24, "steps": 800, "width": 512, "beta": 0.0},
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 512, "latent": 32}),
        Healthy("narrow", options={"width": 96, "latent": 8}),
        Healthy("adamw", options={"optimizer": "AdamW", "rate": 1e-3}),
        Healthy("ramp", "The loss rises while the KL's weight does.", options={"ramp": 200, "beta": 0.3}),
        Healthy("warm-restarts", "The rate jumps back up every hundred steps.", options={"restart": 100}),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 768, "size": 64, "beta": 0.2}),
    ),
)
