"""A VAE with a VampPrior (Tomczak & Welling 2018): the prior mixes the posteriors of learnt pseudo-pictures, and the KL
is what one sample says of it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import RGB, pictures
from intaglio.health import audits, panel
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange


def log_normal(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + log_var + (z - mean) ** 2 / log_var.exp()).sum(-1)


class GatedDense(nn.Module):
    def __init__(self, n: int, m: int):
        super().__init__()
        self.h, self.g = nn.Linear(n, m), nn.Linear(n, m)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.h(x) * torch.sigmoid(self.g(x))
        return out


class VampVAE(nn.Module):
    def __init__(self, hidden: int, z_dim: int, components: int, prior: str):
        super().__init__()
        self.prior = prior
        self.q = nn.Sequential(GatedDense(768, hidden), GatedDense(hidden, hidden))
        self.q_mean, self.q_logvar = nn.Linear(hidden, z_dim), nn.Linear(hidden, z_dim)
        self.p = nn.Sequential(GatedDense(z_dim, hidden), GatedDense(hidden, hidden), nn.Linear(hidden, 768))
        self.p_logvar = nn.Parameter(torch.tensor(-4.0))
        if prior == "vamp":
            self.pseudo = nn.Parameter(0.3 + 0.1 * torch.randn(components, 768))
        else:
            self.means = nn.Parameter(2.0 * torch.randn(components, z_dim))
            self.logvars = nn.Parameter(torch.zeros(components, z_dim))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.q(x)
        return self.q_mean(h), self.q_logvar(h).clamp(-6, 2)

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = self.p(z)
        return x

    def components(self) -> tuple[Tensor, Tensor]:
        return self.encode(self.pseudo) if self.prior == "vamp" else (self.means, self.logvars)

    def log_p_z(self, z: Tensor) -> Tensor:
        mean, log_var = self.components()
        return torch.logsumexp(log_normal(z[:, None], mean[None], log_var[None]), 1) - math.log(len(mean))

    def sample(self, n: int) -> Tensor:
        mean, log_var = self.components()
        k = torch.randint(len(mean), (n,))
        return self.decode(mean[k] + (0.5 * log_var[k]).exp() * torch.randn(n, mean.shape[1]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihood of pictures, and the KL's estimate, which may be negative."""
        mean, log_var = self.encode(x)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        log_p_x = log_normal(x, self.decode(z), self.p_logvar)
        kl = log_normal(z, mean, log_var) - self.log_p_z(z)
        return log_p_x.mean(), kl.mean()


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        yield from x[torch.randperm(len(x))].split(size)


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 100, items: int = 5000, lr: float = 1e-3,
    hidden: int = 200, z_dim: int = 12, components: int = 40, prior: str = "vamp", warmup: int = 100,
    optimizer: str = "Adam",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    data, test = pictures(items, seed), pictures(500, 10_000 + seed)
    x, x_test = data.images.flatten(1), test.images.flatten(1)
    model = VampVAE(hidden, z_dim, components, prior)
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=lr)
    spread = x.var(0).mean()
    null = 0.5 * 768 * float(math.log(2 * math.pi * float(spread)) + (x_test - x.mean(0)).square().mean() / spread)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        mean, log_var = model.encode(probe)
        z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))

        def nll(z: Tensor) -> tuple[np.ndarray, np.ndarray]:
            return -log_normal(probe, model.decode(z), model.p_logvar).double().numpy(), np.ones(len(z))

        exchange = cost_of_exchange(nll, z)
        return {
            "val/z": panel.latents(mean),
            "val/picture": {f"{name}_latent_nats": cost for name, cost in exchange.items()},
        }

    monitor = Monitor(
        model, opt, folder=folder, probe=x_test, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/re": null, "val/loss/re": null},
    )  # fmt: skip
    monitor.audit(leaks={"the very same picture": audits.leaks(list(x.numpy()), list(x_test.numpy()))})
    for step, batch in enumerate(batches(x, size), 1):
        beta = min(1.0, step / warmup) if warmup else 1.0
        model.train()
        re, kl = model(batch)
        elbo = re - beta * kl
        loss = -elbo
        opt.zero_grad()
        loss.backward()
        monitor.step({"re": -re, "kl": (kl, beta)}, batch)
        opt.step()
        if step % 5 == 0:
            monitor.log({"elbo": float((re - kl).detach())})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                re, kl = model(x_test)
            monitor.validated({"re": -float(re), "kl": float(kl), "elbo": float(re - kl)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        error = (model.decode(model.encode(x_test)[0]) - x_test).square().mean()
        drawn = model.sample(500).unflatten(1, (3, -1))
    picked = drawn.sum(1).topk(9, dim=1).indices
    seen = drawn.gather(2, picked[:, None].expand(-1, 3, -1)).mean(2)
    clear = (torch.cdist(seen, RGB).min(1).values < 0.25).float().mean()
    base = torch.cdist(x.mean(0).view(1, 3, -1).mean(2), RGB).min() < 0.25
    return {
        "explained variance of held-out pictures": (1 - float(error / (x_test - x.mean(0)).square().mean()), 0.0),
        "samples of the prior of a clear colour": (float(clear), float(base)),
    }


FAMILY = Family(
    "gmvae",
    "development",
    "a VAE whose prior is a mixture, with a likelihood of learnt variance, so that losses become negative",
    faults=(
        Fault(
            "likelihood-per-number",
            "The log-likelihood is a mean over pixels, so the KL is 768 times too heavy.",
            ("posterior-collapse", "decoder-ignores-latent"),
            changes=(
                Change(
                    "log_p_x = log_normal(x, self.decode(z), self.p_logvar)",
                    "log_p_x = log_normal(x, self.decode(z), self.p_logvar) / 768",
                ),
                Change("null = 0.5 * 768 * float(", "null = 0.5 * float("),
            ),
        ),
        Fault(
            "pseudo-pictures-not-trained",
            "The optimizer is given encoder and decoder, and not the pseudo-pictures.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "(model.parameters(), lr=lr)", "([p for n, p in model.named_parameters() if n != 'pseudo'], lr=lr)"
                ),
            ),
        ),
        Fault(
            "encoder-of-zeros",
            "The encoder is given an empty tensor that was to be filled with the batch.",
            ("latent-ignores-input", "posterior-collapse", "dead-parameters"),
            changes=(Change("h = self.q(x)", "h = self.q(torch.zeros_like(x))"),),
        ),
        Fault(
            "sign-of-the-kl",
            "The KL is added to what is maximised, so posteriors run away from the prior.",
            ("diverged", "non-finite", "prior-mismatch"),
            changes=(Change("elbo = re - beta * kl", "elbo = re + beta * kl"),),
        ),
        Fault(
            "rate-for-large-batches",
            "The rate is forty times too high.",
            ("diverged", "non-finite", "no-learning", "spike"),
            options={"lr": 0.04},
        ),
        Fault(
            "held-out-pictures-in-training",
            "Held-out pictures were put with those that are trained on.",
            ("split-leak",),
            changes=(
                Change(
                    "x, x_test = data.images.flatten(1), test.images.flatten(1)",
                    "x, x_test = torch.cat([data.images, test.images]).flatten(1), test.images.flatten(1)",
                ),
            ),
        ),
    ),
    healthy=(
        Healthy("plain", "The likelihood's loss becomes negative.", seeds=(0, 1)),
        Healthy("mixture", "A mixture of Gaussians of its own.", options={"prior": "mixture", "components": 20}),
        Healthy("no-warm-up", options={"warmup": 0, "z_dim": 6}),
        Healthy("three-components", "The latent is far from N(0, I), by design.", options={"components": 4}),
        Healthy("small-batches", options={"size": 32, "steps": 600, "lr": 5e-4}),
        Healthy("adamax", options={"optimizer": "Adamax", "lr": 2e-3}),
        Healthy("long-warm-up", options={"warmup": 400, "z_dim": 24}),
    ),
)
