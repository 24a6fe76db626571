"""A hyperspherical VAE (Davidson et al. 2018) as a LightningModule: latents on the unit sphere, whose prior is uniform.

The posterior is the power spherical distribution (De Cao & Aziz 2020), which is drawn from without rejection.

Shapes: B pictures of 768 numbers, d dimensions of the space that the sphere lies in.
"""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta
from torch.utils.data import DataLoader

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import Pictures, pictures
from intaglio.health import audits, panel
from intaglio.health.lightning import MonitorCallback
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

HELD_OUT = 512


class PowerSpherical:
    """Directions (B, d) around ``mean`` (B, d), the closer the higher the ``concentration`` (B,)."""

    def __init__(self, mean: Tensor, concentration: Tensor):
        self.mean, self.concentration = mean, concentration
        self.dimensions = mean.shape[1]
        self.beta = torch.full_like(concentration, (self.dimensions - 1) / 2)
        self.alpha = self.beta + concentration

    def rsample(self) -> Tensor:
        cosine = 2 * Beta(self.alpha, self.beta).rsample()[:, None] - 1
        sideways = F.normalize(torch.randn(len(self.mean), self.dimensions - 1), dim=1)
        around_pole = torch.cat([cosine, (1 - cosine.square()).clamp_min(1e-6).sqrt() * sideways], 1)
        pole = F.one_hot(torch.zeros(len(self.mean), dtype=torch.long), self.dimensions)
        mirror = F.normalize(pole - self.mean, dim=1)
        return around_pole - 2 * mirror * (mirror * around_pole).sum(1, keepdim=True)

    def distance(self) -> Tensor:
        """(B,): the mean square of ‖z − mean‖."""
        return 4 * self.beta / (self.alpha + self.beta)

    def entropy(self) -> Tensor:
        both = self.alpha + self.beta
        log_normaliser = -(
            both * math.log(2) + self.alpha.lgamma() - both.lgamma() + self.beta * math.log(math.pi)
        )  # fmt: skip
        return -log_normaliser - self.concentration * (math.log(2) + self.alpha.digamma() - both.digamma())

    def kl_from_uniform(self) -> Tensor:
        half = self.dimensions / 2
        return math.log(2) + half * math.log(math.pi) - math.lgamma(half) - self.entropy()


class SVAE(L.LightningModule):
    def __init__(
        self, width: int, latent: int, sigma: float, beta: float, ramp: int, optimizer: str, rate: float,
        schedule: str, warmup: int,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Linear(768, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width // 2), nn.ReLU()
        )
        self.direction = nn.Sequential(nn.Linear(width // 2, latent, bias=False), nn.BatchNorm1d(latent))
        self.concentration = nn.Linear(width // 2, 1)
        nn.init.constant_(self.concentration.bias, 10.0)
        self.decoder = nn.Sequential(
            nn.Linear(latent, width // 2), nn.ReLU(), nn.Linear(width // 2, width), nn.ReLU(), nn.Linear(width, 768),
            nn.Sigmoid(),
        )  # fmt: skip
        self.terms: dict[str, tuple[Tensor, float]] = {}

    def posterior(self, x: Tensor) -> PowerSpherical:
        h = self.encoder(x)
        return PowerSpherical(F.normalize(self.direction(h), dim=1), F.softplus(self.concentration(h))[:, 0] + 1)

    def draw(self, q: PowerSpherical) -> Tensor:
        return q.rsample()

    def surprise(self, x: Tensor, z: Tensor) -> Tensor:
        """(B,): nats of a normal distribution around what is decoded, less a constant."""
        return (self.decoder(z) - x).square().sum(1) / (2 * self.hparams["sigma"] ** 2)

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, float]]:
        q = self.posterior(x)
        reconstruction = self.surprise(x, self.draw(q)).mean()
        kl = q.kl_from_uniform().mean()
        return {"reconstruction": (reconstruction, 1.0), "kl": (kl, self.weight())}

    def weight(self) -> float:
        ramp, beta = self.hparams["ramp"], self.hparams["beta"]
        return float(beta * min(1.0, self.global_step / ramp) if ramp else beta)

    def training_step(self, x: Tensor) -> Tensor:
        self.terms = self(x)
        (reconstruction, _), (kl, weight) = self.terms["reconstruction"], self.terms["kl"]
        return reconstruction + weight * kl

    def validation_step(self, x: Tensor) -> None:
        terms = self(x)
        (reconstruction, _), (kl, weight) = terms["reconstruction"], terms["kl"]
        self.log("val/loss/reconstruction", reconstruction)
        self.log("val/loss/kl", kl)
        self.log("val_loss", reconstruction + weight * kl)
        self.log("val_elbo", -(reconstruction + kl))

    def configure_optimizers(self) -> Any:
        more = {"momentum": 0.9} if self.hparams["optimizer"] == "SGD" else {}
        optimizer = getattr(torch.optim, self.hparams["optimizer"])(self.parameters(), lr=self.hparams["rate"], **more)
        total, warmup = self.trainer.estimated_stepping_batches, self.hparams["warmup"]

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / (total - warmup))
            if self.hparams["schedule"] == "restarts":
                progress = 3 * progress % 1
            straight = {"linear": 1 - progress, "constant": 1.0}
            return straight.get(self.hparams["schedule"], 0.5 * (1 + math.cos(math.pi * progress)))

        plan = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


def flat(of: Pictures) -> Tensor:
    return of.images.flatten(1)


def read(model: Any, probe: Tensor) -> dict[str, Any]:
    q = model.posterior(probe)
    z = model.draw(q)
    spread = float(((z - q.mean).square().sum(1) / q.distance()).mean().sqrt())

    def nats(latents: Tensor) -> tuple[Any, Any]:
        return model.surprise(probe, latents).double().numpy(), np.ones(len(probe))

    sphere = panel.latents(q.mean) | {
        "kl_nats": Reading(float(q.kl_from_uniform().mean()), 0.0, len(probe)),
        "concentration": Reading(float(q.concentration.mean()), None, len(probe)),
    }
    exchange = cost_of_exchange(nats, z)
    return {
        "val/sphere": sphere,
        "train/sphere": {"noise_ratio": Reading(spread, 1.0, len(probe))},
        "val/picture": {f"{other}_latent_nats": cost for other, cost in exchange.items()},
    }


def neighbours_colour(model: SVAE, known: Pictures, unseen: Pictures) -> float:
    """How often a held-out picture has the colour of the training picture whose direction is nearest."""
    theirs, own = (model.posterior(flat(of)).mean for of in (known, unseen))
    nearest = (own @ theirs.T).argmax(1)
    return float((known.factors[nearest, 1] == unseen.factors[:, 1]).double().mean())


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 128, accumulate: int = 1, items: int = 4096,
    width: int = 256, latent: int = 8, sigma: float = 0.1, beta: float = 1.0, ramp: int = 0, optimizer: str = "Adam",
    rate: float = 2e-3, schedule: str = "cosine", warmup: int = 20, clip: float = 0.0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    L.seed_everything(seed, verbose=False)
    drawn = pictures(items + HELD_OUT, seed)
    known, unseen = (Pictures(*(part[rows] for part in drawn)) for rows in (slice(HELD_OUT, None), slice(HELD_OUT)))
    x, held_out = flat(known), flat(unseen)
    null = float((held_out - x.mean(0)).square().sum(1).mean()) / (2 * sigma**2)
    model = SVAE(width, latent, sigma, beta, ramp, optimizer, rate, schedule, warmup)
    watch = MonitorCallback(
        folder, held_out, read=read, terms=lambda m: m.terms, every=50, log_every=5,
        nulls={"reconstruction": null, "total": null},
        facts={
            "leaks": {"the very same picture": audits.leaks(x.numpy(), held_out.numpy())},
            "ranges": {"pictures": audits.ranges(x, 0.0, 1.0)},
        },
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=[watch], accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None, val_check_interval=50 * accumulate, check_val_every_n_epoch=None, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    batches: Any = DataLoader(x, size, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    trainer.fit(model, batches, DataLoader(held_out, HELD_OUT))  # type: ignore[arg-type]
    model.eval()
    with torch.no_grad():
        q = model.posterior(held_out)
        wrong = (model.decoder(q.rsample()) - held_out).square().sum(1).mean() / (2 * sigma**2)
        bound = -float(wrong + q.kl_from_uniform().mean())
        right = neighbours_colour(model, known, unseen)
    commonest = float(unseen.factors[:, 1].bincount().max()) / HELD_OUT
    return {
        "ELBO of a held-out picture, beside the mean picture's": (bound, -null),
        "colour of held-out pictures by the nearest direction": (right, commonest),
    }


FAMILY = Family(
    "svae",
    "judged",
    "a hyperspherical VAE in Lightning: power spherical posteriors, a uniform prior on the unit sphere",
    faults=(
        Fault(
            "likelihood-averaged-over-pixels",
            "The squared error is a mean over pixels beside a KL that is a picture's, so the latent is given up.",
            ("posterior-collapse", "term-dominates", "decoder-ignores-latent"),
            changes=(Change("(self.decoder(z) - x).square().sum(1) /", "(self.decoder(z) - x).square().mean(1) /"),),
        ),
        Fault(
            "kl-divided-by-pixels",
            "The KL is divided by the pixels, as of a likelihood for each pixel, but the likelihood is the picture's.",
            ("kl-units",),
            changes=(Change("kl = q.kl_from_uniform().mean()", "kl = q.kl_from_uniform().mean() / x.shape[1]"),),
            minor=True,
        ),
        Fault(
            "sharpened-where-drawn",
            "For crisper pictures latents are drawn at four times the concentration that the KL is charged for.",
            ("temperature-misstates-rate",),
            changes=(Change("return q.rsample()", "return PowerSpherical(q.mean, 4 * q.concentration).rsample()"),),
            minor=True,
        ),
        Fault(
            "ramp-only-logged",
            "The KL's weight rises in the log, while the loss has all of it from the first step on.",
            ("weight-not-applied",),
            changes=(
                Change("return reconstruction + weight * kl", 'return reconstruction + self.hparams["beta"] * kl'),
            ),
            options={"ramp": 200, "beta": 4.0},
            case="V weight-not-applied",
        ),
        Fault(
            "concentration-not-in-the-optimizer",
            "The optimizer is given the parts by name, and the concentration's head is not among them.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    '(self.parameters(), lr=self.hparams["rate"], **more)',
                    "([p for part in (self.encoder, self.direction, self.decoder) for p in part.parameters()], "
                    'lr=self.hparams["rate"], **more)',
                ),
            ),
        ),
        Fault(
            "validated-in-training-mode",
            "So that latents are drawn in validation too, it sets training mode, and held-out statistics are kept.",
            ("validation-pollutes",),
            changes=(Change("        terms = self(x)\n", "        self.train()\n        terms = self(x)\n"),),
            case="J validation-pollutes",
        ),
        Fault(
            "drawn-without-gradient",
            "Latents are drawn within no_grad, as by sample() where rsample() is due, so directions learn nothing.",
            ("dead-parameters",),
            changes=(
                Change("        return q.rsample()", "        with torch.no_grad():\n            return q.rsample()"),
            ),
            minor=True,
        ),
        Fault(
            "kl-of-a-detached-posterior",
            "The KL is taken of a detached posterior, for the log, and that is what is added to the loss.",
            ("term-inert",),
            changes=(Change("kl = q.kl_from_uniform().mean()", "kl = q.kl_from_uniform().mean().detach()"),),
        ),
        Fault(
            "pictures-from-minus-one-to-one",
            "Pictures were brought to −1 to 1, and the decoder still ends with a sigmoid.",
            ("range-mismatch",),
            changes=(Change("return of.images.flatten(1)", "return of.images.flatten(1) * 2 - 1"),),
            case="E range-mismatch",
        ),
        Fault(
            "held-out-pictures-trained-on",
            "The first pictures are held out, and training's slice begins with them.",
            ("split-leak",),
            changes=(Change("(slice(HELD_OUT, None), slice(HELD_OUT))", "(slice(None), slice(HELD_OUT))"),),
            case="V split-leak",
        ),
        Fault(
            "schedule-stepped-by-epochs",
            "The schedule is laid out in steps, and Lightning steps it by epochs, so that its warm-up never ends.",
            ("learning-rate-off",),
            changes=(Change('"interval": "step"', '"interval": "epoch"'),),
            case="D learning-rate-off",
        ),
    ),
    healthy=(
        Healthy("plain", "Latents have length 1 by design; a bound that is maximised is logged.", seeds=(0, 1, 2, 3)),
        Healthy(
            "ramp",
            "The KL's weight begins at 0, and the loss rises with it.",
            options={"ramp": 200, "beta": 4.0},
            seeds=(0, 1, 2),
        ),
        Healthy(
            "momentum",
            "Gradients are clipped in every step.",
            options={"optimizer": "SGD", "rate": 1e-2, "clip": 5.0, "steps": 500},
            seeds=(0, 1),
        ),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 7e-4, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("adamw", "Nothing settles.", options={"optimizer": "AdamW", "schedule": "constant"}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("globe", "The sphere is an ordinary one.", options={"latent": 3}, seeds=(0, 1)),
        Healthy(
            "few-pictures",
            "A small set, seen often.",
            options={"items": 768, "size": 64, "beta": 2.0, "steps": 300},
            seeds=(0, 1),
        ),
        Healthy("small-batches", "Losses are noisy.", options={"size": 32, "rate": 1e-3, "steps": 600}, seeds=(0, 1)),
        Healthy("two-batches-a-step", options={"accumulate": 2, "size": 64}, seeds=(0, 1)),
        Healthy("wide", options={"width": 384, "latent": 16, "rate": 1e-3}),
        Healthy("heavy", "The KL weighs eight times as much.", options={"beta": 8.0}),
    ),
)
