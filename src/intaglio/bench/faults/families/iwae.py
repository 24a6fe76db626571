"""An importance weighted autoencoder (Burda et al. 2016) of small pictures in black and white, drawn from their greys.

The bound is log 1/K Σ p(x, zₖ)/q(zₖ|x). Its gradient is that of log p − log q, averaged by the normalised weights of
the K samples (their eq. 14); the doubly reparameterised one (Tucker et al. 2019) squares these for the encoder
once the KL has its full weight.

Shapes: K samples, B pictures of D pixels, d latent dimensions. Nats a picture.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal
from torch.optim import Optimizer, lr_scheduler

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange

PIXELS = 256


class Shades(NamedTuple):
    """``grey`` (N, D) in [0, 1]; what is to be seen on each: shape, size, row and column (N, 4)."""

    grey: Tensor
    factors: Tensor


def shades(count: int, seed: int) -> Shades:
    made = pictures(count, seed)
    grey = ((made.images.amax(1) - 0.1) / 0.8).clamp(0, 1)
    return Shades(grey.flatten(1), made.factors[:, [0, 2, 3, 4]])


def binarised(grey: Tensor) -> Tensor:
    """Drawn anew each time that a picture is shown."""
    return torch.bernoulli(grey)


class IWAE(nn.Module):
    def __init__(self, width: int, latent: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.to_mean, self.to_log_variance = nn.Linear(width, latent), nn.Linear(width, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), nn.Tanh(),
            nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, PIXELS),
        )  # fmt: skip

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(2 * x - 1)
        return self.to_mean(h), self.to_log_variance(h).clamp(-8, 4)

    def draw(self, mean: Tensor, log_variance: Tensor, samples: int) -> Tensor:
        """(K, B, d)."""
        return mean + (0.5 * log_variance).exp() * torch.randn(samples, *mean.shape)


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """−log p(x|z) of each sample (K, B)."""
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def log_normal(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + log_variance + (z - mean).square() * (-log_variance).exp()).sum(-1)


class Bound(NamedTuple):
    """The terms whose gradient is the bound's, the bound itself below 0, and how many of the samples count."""

    terms: dict[str, Tensor]
    nll: Tensor
    effective: Tensor


def importance(model: IWAE, x: Tensor, samples: int, beta: float = 1.0, doubly: bool = False) -> Bound:
    mean, log_variance = model.encode(x)
    z = model.draw(mean, log_variance, samples)
    nats = bernoulli(model.decoder(z), x)
    posterior = (mean.detach(), log_variance.detach()) if doubly else (mean, log_variance)
    log_q = log_normal(z, *posterior)
    log_p = log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
    kl = log_q - log_p
    with torch.no_grad():
        log_weights = -nats - beta * kl
        share = log_weights.softmax(0)
        nll = math.log(samples) - torch.logsumexp(-nats - kl, 0).mean()
        effective = (1 / share.square().sum(0)).mean()
    if doubly and z.requires_grad:
        z.register_hook(lambda gradient: (1 - beta + beta * share)[..., None] * gradient)
    terms = {"reconstruction": (share * nats).sum(0).mean(), "kl": (share * kl).sum(0).mean()}
    return Bound(terms, nll, effective)


SCHEDULES: dict[str, Callable[[Optimizer, int], lr_scheduler.LRScheduler]] = {
    "constant": lambda optim, epochs: lr_scheduler.ExponentialLR(optim, 1.0),
    "exponential": lambda optim, epochs: lr_scheduler.ExponentialLR(optim, 0.9),
    "linear": lambda optim, epochs: lr_scheduler.LinearLR(optim, 1.0, 0.1, epochs),
    "cosine": lambda optim, epochs: lr_scheduler.CosineAnnealingLR(optim, epochs),
    "restarts": lambda optim, epochs: lr_scheduler.CosineAnnealingWarmRestarts(optim, epochs // 3),
}


def batches(grey: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(grey)).split(size):
            if len(rows) == size:
                yield binarised(grey[rows])


@torch.no_grad()
def bits_per_pixel(model: IWAE, x: Tensor, samples: int = 128) -> float:
    """Of the bound, with many samples."""
    mean, log_variance = model.encode(x)
    posterior, prior = Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)
    each = []
    for _ in range(samples // 16):
        z = posterior.sample(torch.Size([16]))
        seen = Bernoulli(logits=model.decoder(z)).log_prob(x).sum(-1)
        each.append(seen + prior.log_prob(z).sum(-1) - posterior.log_prob(z).sum(-1))
    bound = torch.logsumexp(torch.cat(each), 0) - math.log(samples)
    return float(-bound.mean()) / PIXELS / math.log(2)


@torch.no_grad()
def probed(model: IWAE, data: Shades, x: Tensor, factors: Tensor) -> tuple[float, float]:
    """How often shape, size, row and column are read rightly from held-out means, by a linear map; and by guessing."""
    a, b = [F.pad(model.encode(y)[0], (0, 1), value=1.0) for y in (binarised(data.grey), x)]
    right, guessed = [], []
    for own, due in zip(data.factors.T, factors.T, strict=True):
        classes = F.one_hot(own).float()
        told = (b @ torch.linalg.lstsq(a, classes).solution).argmax(1)
        right.append(float((told == due).float().mean()))
        guessed.append(float((classes.mean(0).argmax() == due).float().mean()))
    return float(np.mean(right)), float(np.mean(guessed))


def train(
    folder: Path, seed: int = 0, steps: int = 450, size: int = 64, items: int = 2048, rate: float = 3e-3,
    width: int = 128, latent: int = 12, samples: int = 8, doubly: bool = False, wait: int = 0, ramp: int = 0,
    optimizer: str = "Adam", schedule: str = "exponential", clip: float = 0.0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    data, test = shades(items, seed), shades(256, 10_000 + seed)
    held_out = binarised(test.grey)
    model = IWAE(width, latent)
    start = torch.logit(data.grey.mean(0), 0.01)
    [*model.decoder.parameters()][-1].data.copy_(start)  # at first, the mean picture
    settings = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **settings)
    epoch = items // size
    scheduler = SCHEDULES[schedule](optim, steps // epoch)
    null = float(-Bernoulli(logits=start).log_prob(held_out).sum(1).mean())

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        mean, log_variance = model.encode(probe)
        z = model.draw(mean, log_variance, 1)[0]

        def cost(z: Tensor) -> tuple[np.ndarray, np.ndarray]:
            return bernoulli(model.decoder(z), probe).double().numpy(), np.ones(len(z))

        return {
            "val/latent": panel.latents(mean, log_variance)
            | {
                "noise_ratio": bottleneck.noise_ratio(z, mean, log_variance),
                "prior_nats": bottleneck.aggregate_nats(mean, log_variance),
            },
            "val/picture": {f"{name}_latent_nats": rise for name, rise in cost_of_exchange(cost, z).items()},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"reconstruction": null, "nll": null},
    )  # fmt: skip
    monitor.audit(
        augmentations={"drawn as black or white": audits.augmentation(binarised, data.grey[:64])},
        ranges={"pixels": audits.ranges(held_out, 0.0, 1.0)},
        leaks={"the very same picture": audits.leaks(list(data.grey.numpy()), list(test.grey.numpy()))},
    )
    for step, batch in enumerate(batches(data.grey, size), 1):
        beta = min(1.0, max(0, step - wait) / ramp) if ramp else 1.0
        bound = importance(model, batch, samples, beta, doubly)
        loss = bound.terms["reconstruction"] + beta * bound.terms["kl"]
        weighted = {"reconstruction": (bound.terms["reconstruction"], 1.0), "kl": (bound.terms["kl"], beta)}
        monitor.before_backward(weighted)
        optim.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        monitor.step({**weighted, "total": loss}, batch, clipped=clip > 0)
        optim.step()
        if step % 5 == 0:
            monitor.log({"train/loss/nll": float(bound.nll), "effective_samples": float(bound.effective)})
        if step % epoch == 0:
            scheduler.step()
        if step % 50 == 0:
            with monitor.validation(), torch.no_grad():
                same, tight = importance(model, held_out, samples, beta), importance(model, held_out, 32)
            reconstruction, kl = float(same.terms["reconstruction"]), float(same.terms["kl"])
            monitor.validated({"reconstruction": reconstruction, "kl": kl, "total": reconstruction + beta * kl})
            monitor.validated({"val/loss/nll": float(same.nll), "bound_of_32_samples": -float(tight.nll)})
            monitor.validated({"effective_samples": float(same.effective)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    spared = null / PIXELS / math.log(2) - bits_per_pixel(model, held_out)
    return {
        "bits per pixel below those of the mean picture, held out": (spared, 0.0),
        "shape, size, row and column read linearly from the means": probed(model, data, held_out, test.factors),
    }


FAMILY = Family(
    "iwae",
    "development",
    "an importance weighted autoencoder of pictures in black and white, also doubly reparameterised",
    faults=(
        Fault(
            "likelihood-per-pixel",
            "The log-likelihood is a mean over the pixels, so beside it the KL is 256 times too heavy.",
            ("posterior-collapse", "decoder-ignores-latent", "term-dominates"),
            changes=(Change('reduction="none").sum(-1)', 'reduction="none").mean(-1)'),),
        ),
        Fault(
            "weights-out-of-the-logarithm",
            "The importance weights are normalised after exp() and not in the logarithm, where all K of them are 0 in "
            "float32: 0/0.",
            ("non-finite",),
            changes=(Change("share = log_weights.softmax(0)", "share = log_weights.exp() / log_weights.exp().sum(0)"),),
        ),
        Fault(
            "warm-up-not-in-the-loss",
            "The KL's warm-up is in the importance weights and in the log, and was forgotten where the loss is summed.",
            ("weight-not-applied",),
            changes=(Change('+ beta * bound.terms["kl"]', '+ bound.terms["kl"]'),),
            options={"ramp": 250},
        ),
        Fault(
            "ratio-without-a-graph",
            "log q − log p slipped into the no_grad block of the importance weights, so that nothing holds the "
            "posterior to the prior.",
            ("term-inert",),
            changes=(
                Change(
                    "    kl = log_q - log_p\n    with torch.no_grad():\n",
                    "    with torch.no_grad():\n        kl = log_q - log_p\n",
                ),
            ),
        ),
        Fault(
            "densities-exchanged",
            "Prior and posterior are exchanged in the importance weight, so latents are driven away from the prior.",
            ("prior-mismatch", "diverged", "non-finite", "term-dominates"),
            changes=(Change("    kl = log_q - log_p\n", "    kl = log_p - log_q\n"),),
        ),
        Fault(
            "variance-for-deviation",
            "The half before the log-variance is missing where samples are drawn, so they are not of the q in the "
            "weights.",
            ("temperature-misstates-rate",),
            changes=(Change("mean + (0.5 * log_variance).exp()", "mean + log_variance.exp()"),),
            minor=True,
        ),
        Fault(
            "encoder-of-zeros",
            "The encoder is given a buffer that was made for the batch and never filled.",
            ("latent-ignores-input", "posterior-collapse", "dead-parameters"),
            changes=(Change("self.encoder(2 * x - 1)", "self.encoder(torch.zeros_like(x))"),),
            case="E latent-ignores-input",
        ),
        Fault(
            "recognition-not-in-the-optimizer",
            "When two optimizers, of the generative model and of the recognition network, were made one, it was given "
            "the former alone.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=rate, **settings)", "(model.decoder.parameters(), lr=rate)"),),
        ),
        Fault(
            "sigmoid-twice",
            "The decoder ends in a sigmoid, and the loss takes what comes out for logits: no pixel can be black.",
            ("range-mismatch", "no-learning", "plateau"),
            changes=(Change("nn.Linear(width, PIXELS),\n", "nn.Linear(width, PIXELS), nn.Sigmoid(),\n"),),
        ),
        Fault(
            "decay-at-every-batch",
            "The scheduler is meant to be called once an epoch, and is called after each batch.",
            ("learning-rate-off",),
            changes=(
                Change(
                    "        if step % epoch == 0:\n            scheduler.step()",
                    "        scheduler.step()",
                ),
            ),
        ),
        Fault(
            "binarised-by-a-threshold",
            "Pixels are set by a threshold where they are to be drawn, so a picture is always the same one, and the "
            "nats are none that can be compared with those of others.",
            ("augmentation-inert",),
            changes=(Change("torch.bernoulli(grey)", "(grey > 0.5).float()"),),
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("doubly-reparameterised", options={"doubly": True}, seeds=(0, 1, 2)),
        Healthy("warm-up", "The loss rises while the KL's weight does.", options={"ramp": 250}, seeds=(0, 1)),
        Healthy(
            "warm-up-later",
            "The KL has no weight for 75 steps, and then little at first.",
            options={"wait": 75, "ramp": 200, "doubly": True},
            seeds=(0, 1),
        ),
        Healthy("one-sample", "A variational autoencoder: all weights are 1.", options={"samples": 1}, seeds=(0, 1)),
        Healthy(
            "many-samples",
            "Most of the samples hardly count.",
            options={"samples": 20, "size": 32, "doubly": True, "rate": 2e-3, "steps": 400},
            seeds=(0, 1),
        ),
        Healthy(
            "momentum",
            "Flat for a while, then learns.",
            options={"optimizer": "SGD", "rate": 3e-3, "clip": 20.0, "schedule": "linear"},
            seeds=(0, 1),
        ),
        Healthy("adamw-by-cosine", options={"optimizer": "AdamW", "rate": 4e-3, "schedule": "cosine"}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy(
            "more-numbers-than-factors",
            "More latents than there is anything to say with.",
            options={"latent": 24},
            seeds=(0, 1),
        ),
        Healthy(
            "few-items",
            "A small set of pictures, seen often and drawn anew each time.",
            options={"items": 512, "size": 32, "steps": 400, "width": 96},
            seeds=(0,),
        ),
    ),
)
