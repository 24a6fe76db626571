"""Glow as tutorials have it: a normalizing flow of small pictures, trained by their exact likelihood.

Kingma & Dhariwal 2018: actnorm that starts from the first batch, invertible 1x1 convolutions, affine couplings, and two
scales as in Dinh et al. 2017. Uniform noise makes the levels of a pixel continuous (Theis et al. 2016).

Shapes: B batch, N items, C channels; pictures are (3, 8, 8), D = 192 numbers.
"""

import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading

DIMS = 192
BITS = 1 / (DIMS * math.log(2))
"""Nats a picture to bits per dimension."""
LOW, HIGH = -0.5, 0.5
"""The range of the pixels that the flow is given."""


def levels_of(count: int, seed: int, colours: int) -> Tensor:
    """Pictures (N, 3, 8, 8) whose pixels are whole numbers from 0 to colours − 1."""
    images = F.avg_pool2d(pictures(count, seed).images, 2)
    return (images * colours).floor().clamp(max=colours - 1)


def dequantised(levels: Tensor, colours: int) -> Tensor:
    return (levels + torch.rand_like(levels)) / colours - 0.5


class ActNorm(nn.Module):
    """A scale and a bias for each channel, which give the first batch mean 0 and deviation 1."""

    ready: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("ready", torch.tensor(False))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        self.bias.copy_(-x.mean((0, 2, 3), keepdim=True))
        self.log_scale.copy_(-(x.std((0, 2, 3), keepdim=True) + 1e-6).log())
        self.ready.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and not self.ready:
            self.start(x)
        return (x + self.bias) * self.log_scale.exp(), self.log_scale.sum() * x[0, 0].numel()

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp() - self.bias


class Mixing(nn.Module):
    """An invertible 1x1 convolution that starts as a rotation, or a permutation that stays."""

    def __init__(self, channels: int, fixed: bool):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        start = torch.eye(channels)[torch.randperm(channels)] if fixed else rotation
        self.weight = nn.Parameter(start, requires_grad=not fixed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.linalg.slogdet(self.weight)[1] * x[0, 0].numel()
        return F.conv2d(x, self.weight[:, :, None, None]), log_det

    def inverse(self, y: Tensor) -> Tensor:
        return F.conv2d(y, torch.linalg.inv(self.weight)[:, :, None, None])


class Coupling(nn.Module):
    """One half of the channels shifts and scales the other; an additive one only shifts it."""

    def __init__(self, channels: int, width: int, additive: bool):
        super().__init__()
        self.additive = additive
        last = nn.Conv2d(width, channels // 2 if additive else channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), last
        )

    def told(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and logarithm of the scale."""
        h = self.net(a)
        if self.additive:
            return h, torch.zeros_like(h)
        shift, raw = h.chunk(2, 1)
        return shift, 2 * torch.tanh(raw / 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        shift, log_scale = self.told(a)
        return torch.cat([a, (b + shift) * log_scale.exp()], 1), log_scale.sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, 1)
        shift, log_scale = self.told(a)
        return torch.cat([a, b * (-log_scale).exp() - shift], 1)


class Split(nn.Module):
    """Half of the channels leaves, standardised by what the other half says of its mean and scale."""

    def __init__(self, channels: int):
        super().__init__()
        self.prior = nn.Conv2d(channels // 2, channels, 3, padding=1)
        nn.init.zeros_(self.prior.weight)
        nn.init.zeros_(self.prior.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, left = x.chunk(2, 1)
        mean, log_scale = self.prior(kept).chunk(2, 1)
        return kept, (left - mean) * (-log_scale).exp(), -log_scale.sum((1, 2, 3))

    def inverse(self, kept: Tensor, left: Tensor) -> Tensor:
        mean, log_scale = self.prior(kept).chunk(2, 1)
        return torch.cat([kept, left * log_scale.exp() + mean], 1)


class Glow(nn.Module):
    """Pictures to as many numbers, which are to be N(0, I), and the logarithm of the determinant, (B,)."""

    def __init__(self, depth: int, width: int, additive: bool = False, fixed: bool = False):
        super().__init__()
        self.levels = nn.ModuleList()
        for channels in (12, 24):
            level = nn.ModuleList()
            for _ in range(depth):
                level += [ActNorm(channels), Mixing(channels, fixed), Coupling(channels, width, additive)]
            self.levels.append(level)
        self.splits = nn.ModuleList([Split(12)])
        self.shapes = [(6, 4, 4), (24, 2, 2)]

    def stages(self) -> list[tuple[Any, Any]]:
        """Each level with the split that follows it; none follows the last."""
        return list(zip_longest(self.levels, self.splits))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts, log_det = list[Tensor](), x.new_zeros(len(x))
        for level, split in self.stages():
            x = F.pixel_unshuffle(x, 2)
            for layer in level:
                x, change = layer(x)
                log_det = log_det + change
            if split is not None:
                x, left, change = split(x)
                log_det = log_det + change
                parts.append(left.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        stages = self.stages()
        shapes = [shape for shape, (_, split) in zip(self.shapes, stages, strict=False) if split is not None]
        shapes.append(self.shapes[len(stages) - 1])
        parts = [p.unflatten(1, s) for p, s in zip(z.split([math.prod(s) for s in shapes], 1), shapes, strict=True)]
        x = parts.pop()
        for level, split in reversed(stages):
            if split is not None:
                x = split.inverse(x, parts.pop())
            for layer in reversed(level):
                x = layer.inverse(x)
            x = F.pixel_shuffle(x, 2)
        return x

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        z = torch.randn(count, DIMS, generator=torch.Generator().manual_seed(0))
        return self.inverse(z).clamp(LOW, HIGH)


def losses(model: nn.Module, x: Tensor, colours: int) -> dict[str, Tensor]:
    """Nats a picture, whose sum is the negative log-likelihood of its levels."""
    z, log_det = model(x)
    prior = 0.5 * (z.square() + math.log(2 * math.pi)).sum(1).mean()
    return {"prior": prior, "log_det": DIMS * math.log(colours) - log_det.mean()}


def gaussian(count: int, seed: int, colours: int) -> torch.distributions.MultivariateNormal:
    """A Gaussian with all covariances, fitted to other pictures and the noise on their levels."""
    known = levels_of(count, seed, colours).flatten(1) + 0.5
    covariance = torch.cov(known.T) + torch.eye(DIMS) / 12
    return torch.distributions.MultivariateNormal(known.mean(0), covariance)


def histogram(light: Tensor) -> Tensor:
    """The share of pixels in each of 32 ranges between 0 and 1."""
    return torch.histc(light.clamp(0, 1), 32, 0, 1) / light.numel()


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(items).split(size):
            if len(rows) == size:
                yield rows


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / (steps - warmup))
    if schedule == "restarts":
        return 0.55 + 0.45 * math.cos(math.pi * (3 * done % 1))
    return {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "constant": 1.0}[schedule]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 3072, colours: int = 32,
    depth: int = 3, width: int = 40, additive: bool = False, fixed: bool = False, rate: float = 3e-3,
    optimizer: str = "Adam", schedule: str = "cosine", warmup: int = 20,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unknown = levels_of(items, seed, colours), levels_of(512, 10_000 + seed, colours)
    held_out = dequantised(unknown, colours)
    model = Glow(depth, width, additive, fixed)
    with torch.no_grad():
        model(dequantised(known[:256], colours))
    trained = [p for p in model.parameters() if p.requires_grad]
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(trained, lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))
    fit = gaussian(3072, 20_000 + seed, colours)
    null = float(-fit.log_prob(unknown.flatten(1) + torch.rand(len(unknown), DIMS)).mean()) * BITS

    def read(model: Any, probe: Tensor) -> dict[str, dict[str, Measured]]:
        z, _ = model(probe)
        lost = (model.inverse(z) - probe).square().sum() / (probe - probe.mean(0)).square().sum()
        nats = bottleneck.aggregate_nats(z, torch.full_like(z, -30.0))
        return {
            "val/latent": panel.latents(z) | {"prior_nats": nats},
            "val/round_trip": {"r2": Reading(1 - float(lost), 0.0, len(probe))},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:400], read=read, every=50, log_every=5, steps=steps,
        nulls={"total": null},
    )  # fmt: skip
    monitor.audit(
        augmentations={"noise within a level": audits.augmentation(lambda x: dequantised(x, colours), known[:64])},
        ranges={"pixels": audits.ranges(dequantised(known, colours), LOW, HIGH)},
        leaks={"the very same picture": audits.leaks(known.numpy(), unknown.numpy())},
    )
    for step, rows in zip(range(1, steps + 1), batches(items, size), strict=False):
        model.train()
        batch = dequantised(known[rows], colours)
        terms = {name: term * BITS for name, term in losses(model, batch, colours).items()}
        loss = terms["prior"] + terms["log_det"]
        monitor.before_backward({name: (term, 1.0) for name, term in terms.items()})
        optim.zero_grad()
        loss.backward()
        monitor.step({**{name: (term, 1.0) for name, term in terms.items()}, "total": loss}, batch)
        nn.utils.clip_grad_norm_(trained, 5.0)
        optim.step()
        rates.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                found = {name: float(term) * BITS for name, term in losses(model, held_out, colours).items()}
            monitor.validated({**found, "total": sum(found.values())})
    monitor.close()
    model.eval()
    with torch.no_grad():
        bits = float(sum(losses(model, held_out, colours).values())) * BITS
    right = histogram((unknown + 0.5) / colours)
    drawn = histogram(model.sample(512) - LOW)
    blurred = histogram(fit.sample((512,)) / colours)
    nearer = 1 - float((drawn - right).abs().sum() / (blurred - right).abs().sum())
    return {
        "bits per dimension below a Gaussian's, held out": (null - bits, 0.0),
        "how much nearer the brightness of samples is than a Gaussian's": (nearer, 0.0),
    }


FAMILY = Family(
    "glow",
    "judged",
    "a normalizing flow of pictures, trained by their exact likelihood",
    faults=(
        Fault(
            "log-determinant-detached",
            "The log-determinant is still detached, as when it was only logged, so nothing keeps the flow from "
            "squeezing all pictures into one point.",
            ("term-inert",),
            changes=(Change("- log_det.mean()", "- log_det.detach().mean()"),),
        ),
        Fault(
            "log-determinant-with-the-wrong-sign",
            "The log-determinant is added to the loss where it is to be subtracted, so the loss falls for ever as the "
            "flow squeezes all pictures into one point.",
            ("prior-mismatch", "latent-ignores-input"),
            changes=(Change("- log_det.mean()", "+ log_det.mean()"),),
        ),
        Fault(
            "no-noise-on-the-levels",
            "Each level is given its middle and no noise, so the density is of single points, may grow without bound, "
            "and its bits bound nothing.",
            ("augmentation-inert",),
            changes=(Change("levels + torch.rand_like(levels)", "levels + 0.5"),),
            minor=True,
        ),
        Fault(
            "pixels-not-centred",
            "The half that is to be taken from the pixels is forgotten, and samples are clamped to ±.5 all the same.",
            ("range-mismatch",),
            changes=(
                Change(
                    "(levels + torch.rand_like(levels)) / colours - 0.5", "(levels + torch.rand_like(levels)) / colours"
                ),
            ),
        ),
        Fault(
            "inverse-in-the-wrong-order",
            "The inverse of the coupling takes the shift off before the scale, which the coupling applied last, so "
            "samples are no pictures.",
            ("round-trip-ceiling",),
            changes=(Change("b * (-log_scale).exp() - shift", "(b - shift) * (-log_scale).exp()"),),
        ),
        Fault(
            "actnorm-starts-again-at-validation",
            "The brackets are in the wrong place, so in evaluation mode actnorm starts again from each batch that it "
            "is given, and training goes on with the scales of held-out pictures.",
            ("validation-pollutes",),
            changes=(Change("if self.training and not self.ready:", "if not (self.training and self.ready):"),),
        ),
        Fault(
            "last-level-without-a-split",
            "Levels and splits are zipped, and as no split follows the last level, that is never called.",
            ("dead-parameters",),
            changes=(
                Change(
                    "list(zip_longest(self.levels, self.splits))", "list(zip(self.levels, self.splits, strict=False))"
                ),
            ),
        ),
        Fault(
            "schedule-of-one-epoch",
            "The schedule is told the batches of an epoch for those of the training, so after the first the rate is 0.",
            ("learning-rate-off",),
            changes=(Change("rate_at(k, steps, schedule", "rate_at(k, items // size, schedule"),),
        ),
        Fault(
            "pictures-of-a-first-try",
            "The sixty-four pictures of a first try are still all that there is to train on.",
            ("overfitting",),
            options={"items": 64, "size": 32},
        ),
        Fault(
            "rate-of-plain-descent",
            "Adam is given a rate of .5, as one would give plain gradient descent.",
            ("non-finite", "diverged"),
            options={"rate": 0.5},
        ),
        Fault(
            "held-out-in-nats",
            "Training is logged in bits per dimension, and held-out pictures in nats a picture, under the same name.",
            ("validation-missing",),
            changes=(Change("float(term) * BITS", "float(term)"),),
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("deep", options={"depth": 4, "width": 24}, seeds=(0, 1)),
        Healthy("additive", "Couplings have a determinant of 1.", options={"additive": True}, seeds=(0, 1)),
        Healthy("permutations", "What mixes the channels is not trained.", options={"fixed": True}, seeds=(0, 1)),
        Healthy("eight-bits", options={"colours": 256}, seeds=(0, 1)),
        Healthy(
            "momentum",
            "Slow, and not smooth.",
            options={"optimizer": "SGD", "rate": 0.03, "warmup": 60, "schedule": "linear", "steps": 500},
            seeds=(0, 1),
        ),
        Healthy("adamax", "As in the paper.", options={"optimizer": "Adamax", "rate": 6e-3}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("adamw", options={"optimizer": "AdamW", "rate": 2e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("small-batches", options={"size": 24, "rate": 2e-3, "steps": 500}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 1024}, seeds=(0, 1)),
    ),
)
