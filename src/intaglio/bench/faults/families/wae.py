"""A Wasserstein autoencoder (Tolstikhin et al. 2018): latents without noise, whose cloud is drawn to the prior by a
maximum mean discrepancy. The unbiased estimate of that discrepancy is as often below 0 as above where the two agree.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor


def imq_mmd(z: Tensor, p: Tensor) -> Tensor:
    """Unbiased, by inverse multiquadratics of several widths."""
    n, d = z.shape
    zz, pp, zp = (torch.cdist(a, b).square() for a, b in ((z, z), (p, p), (z, p)))
    off = 1 - torch.eye(n)
    total = z.new_zeros(())
    for scale in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        c = 2 * d * scale
        within = (c / (c + zz) * off).sum() + (c / (c + pp) * off).sum()
        total = total + within / (n * (n - 1)) - 2 * (c / (c + zp)).mean()
    return total


def gaussian(n: int, d: int) -> Tensor:
    return torch.randn(n, d)


def cube(n: int, d: int) -> Tensor:
    return 2 * torch.rand(n, d) - 1


PRIORS: dict[str, Callable[[int, int], Tensor]] = {"gaussian": gaussian, "cube": cube}


class WAE(nn.Module):
    def __init__(self, hidden: int, latent: int):
        super().__init__()
        self.Q = nn.Sequential(
            nn.Linear(768, hidden), nn.ReLU(), nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, latent)
        )
        self.P = nn.Sequential(
            nn.Linear(latent, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, hidden), nn.ReLU(), nn.Linear(hidden, 768)
        )
        self.squash = nn.Sigmoid()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.Q(x)
        return self.squash(self.P(z)), z


def train(
    folder: Path, seed: int = 0, steps: int = 500, size: int = 128, items: int = 4096, rate: float = 1e-3,
    hidden: int = 256, latent: int = 8, lam: float = 100.0, prior: str = "gaussian",
    optimizer: str = "Adam", halve: int = 0, watched: int = 512,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    x, held_out = pictures(items, seed).images.flatten(1), pictures(512, 10_000 + seed).images.flatten(1)
    sample = PRIORS[prior]
    model = WAE(hidden, latent)
    settings = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **settings)
    schedule = torch.optim.lr_scheduler.StepLR(optim, halve or steps, 0.5)
    spread = float((held_out - x.mean(0)).square().sum(1).mean())

    def losses(batch: Tensor) -> tuple[Tensor, Tensor]:
        rebuilt, z = model(batch)
        rec = (rebuilt - batch).square().sum(1).mean()
        return rec, imq_mmd(z, sample(len(z), latent))

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        z = model.Q(probe)
        found = panel.latents(z)
        if prior == "gaussian":
            found["prior_nats"] = bottleneck.aggregate_nats(z, torch.full_like(z, -20.0))
        return {"val/z": found}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:watched], read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/rec": spread, "val/loss/rec": spread},
    )  # fmt: skip
    monitor.audit(ranges={"pictures": audits.ranges(x, 0.0, 1.0)})
    for step in range(1, steps + 1):
        batch = x[torch.randperm(len(x))[:size]]
        rec, gap = losses(batch)
        loss = rec + lam * gap
        monitor.before_backward({"rec": rec, "mmd": (gap, lam)})
        optim.zero_grad()
        loss.backward()
        monitor.step({"rec": rec, "mmd": (gap, lam), "total": loss}, batch)
        optim.step()
        schedule.step()
        if step % 50 == 0:
            with monitor.validation(), torch.no_grad():
                rec, gap = losses(held_out)
            monitor.validated({"val/loss/rec": float(rec), "val/loss/mmd": float(gap)})
            monitor.validated({"val/loss/total": float(rec + lam * gap)})
    monitor.close()
    with torch.no_grad():
        rec, gap = losses(held_out)
        away = imq_mmd(torch.zeros(512, latent), sample(512, latent))
        painted = model.squash(model.P(sample(512, latent)))
        nearest = float(torch.cdist(painted, x).square().amin(1).mean())
    return {
        "variance of held-out pictures explained": (1 - float(rec) / spread, 0.0),
        "discrepancy below that of latents at 0": (float(away - gap) / float(away), 0.5),
        "samples nearer to a picture than the mean picture is": (1 - nearest / spread, 0.0),
    }


FAMILY = Family(
    "wae",
    "development",
    "a Wasserstein autoencoder of pictures: a maximum mean discrepancy draws latents to the prior",
    faults=(
        Fault(
            "discrepancy-subtracted",
            "The sign is wrong: latents are driven away from the prior.",
            ("prior-mismatch", "diverged", "latent-drift", "term-dominates"),
            changes=(
                Change("loss = rec + lam * gap", "loss = rec - lam * gap"),
                Change('monitor.step({"rec": rec, "mmd": (gap, lam)', 'monitor.step({"rec": rec, "mmd": (gap, -lam)'),
            ),
        ),
        Fault(
            "discrepancy-of-detached-latents",
            "The latents are detached before the discrepancy is taken.",
            ("term-inert",),
            changes=(Change("imq_mmd(z, sample(", "imq_mmd(z.detach(), sample("),),
        ),
        Fault(
            "encoder-without-gradient",
            "Latents are computed without a graph, as when the decoder alone is trained.",
            ("dead-parameters", "term-inert"),
            changes=(Change("        z = self.Q(x)\n", "        with torch.no_grad():\n            z = self.Q(x)\n"),),
        ),
        Fault(
            "weight-of-another-scale",
            "λ is a thousand times too high: latents are spread by lot, whatever the picture.",
            ("term-dominates", "no-learning"),
            options={"lam": 1e5},
            minor=True,
        ),
        Fault(
            "tanh-for-pictures-in-0-1",
            "Half of what the decoder can say is outside the pictures' range.",
            ("range-mismatch",),
            changes=(Change("nn.Sigmoid()", "nn.Tanh()"), Change("ranges(x, 0.0, 1.0)", "ranges(x, -1.0, 1.0)")),
            minor=True,
        ),
        Fault(
            "learnt-by-heart",
            "Forty-eight pictures are all there is to train on.",
            ("overfitting",),
            options={"items": 48, "size": 32, "steps": 800, "hidden": 384, "lam": 1.0, "latent": 16},
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", "The discrepancy falls to nearly 0.", seeds=(0, 1, 2)),
        Healthy("light", "A small weight of the discrepancy.", options={"lam": 30.0}),
        Healthy("two-numbers", "Latents have two dimensions.", options={"latent": 2}),
        Healthy("one-number", "Latents have one dimension.", options={"latent": 1, "lam": 30.0}),
        Healthy("uniform-prior", "The prior is a cube.", options={"prior": "cube"}),
        Healthy("halved-rates", options={"halve": 120, "rate": 2e-3, "optimizer": "NAdam", "watched": 40}),
        Healthy("momentum", options={"optimizer": "SGD", "rate": 1e-3, "lam": 30.0, "steps": 600}),
    ),
)
