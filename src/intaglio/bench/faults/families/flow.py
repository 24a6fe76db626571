"""A rectified flow in the latents of an autoencoder of patches, as tutorials have it, told colour and row of a shape.

Liu et al. 2023 and Lipman et al. 2023 in the manner of Rombach et al. 2022: first the autoencoder, then the flow.

Shapes: B batch, N items, P patches, C channels, D = P·C latent dimensions; z = (1 − t)·x + t·ε, so that t = 1 is noise.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, ROWS, Pictures, pictures
from intaglio.health import panel, trials
from intaglio.health.instruments import moments, samples
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

TOLD = [f"{colour}, {row}" for colour in COLOURS for row in ROWS]
EDGES = torch.tensor([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
"""Of bins of log-SNR, whose centres are −7, −5, …, 7."""


def classes_of(known: Pictures) -> Tensor:
    return known.factors[:, 1] * len(ROWS) + known.factors[:, 3]


def pooled(known: Pictures) -> Tensor:
    """(N, 192): of 8 pixels a side."""
    return F.avg_pool2d(known.images, 2).flatten(1)


class Autoencoder(nn.Module):
    """Pictures (N, 192) to C standardised channels of each of P = 4 patches, (N, D = P·C), and back."""

    def __init__(self, channels: int, width: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(48, width), nn.SiLU(), nn.Linear(width, channels))
        self.decoder = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, 48))
        self.centre, self.spread = torch.zeros(channels), torch.ones(channels)

    def raw(self, x: Tensor) -> Tensor:
        return self.encoder(x.view(-1, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))

    def encode(self, x: Tensor) -> Tensor:
        return ((self.raw(x) - self.centre) / self.spread).flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        made = self.decoder(z.unflatten(1, (4, -1)) * self.spread + self.centre)
        return made.view(-1, 2, 2, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).flatten(1)

    @classmethod
    def trained(cls, x: Tensor, channels: int, steps: int, size: int = 64) -> "Autoencoder":
        autoencoder = cls(channels)
        optimizer = torch.optim.Adam(autoencoder.parameters(), lr=4e-3)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-5)
        for _ in range(steps):
            batch = x[torch.randint(len(x), (size,))]
            loss = (autoencoder.decode(autoencoder.encode(batch)) - batch).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
        autoencoder.requires_grad_(False)
        raw = autoencoder.raw(x)
        autoencoder.centre, autoencoder.spread = raw.mean((0, 1)), raw.std((0, 1))
        return autoencoder.eval()


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        return h + self.layers(self.norm(h) + told)


class Flow(nn.Module):
    """The velocity ε − x at z and t. A class below 0 is none."""

    wave: Tensor

    def __init__(self, classes: int, latent: int, width: int = 192, blocks: int = 3):
        super().__init__()
        self.register_buffer("wave", torch.exp(torch.linspace(0, math.log(100), 16)))
        self.label = nn.Embedding(classes, width) if classes else None
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Linear(latent, width)
        self.body = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, latent))

    def forward(self, z: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        angle = t_B[:, None] * self.wave
        told = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        if self.label is not None:
            told = told + self.label(label_B.clamp(min=0)) * (label_B >= 0)[:, None]
        h = self.enter(z)
        for block in self.body:
            h = block(h, told)
        return self.leave(h)


def times(count: int, kind: str) -> Tensor:
    """In (0, 1): uniform, each with its mirror image, or logit-normal (Esser et al. 2024)."""
    if kind == "logit-normal":
        return torch.randn(count).sigmoid()
    half = torch.rand(count // 2) / 2
    return torch.cat([half, 1 - half])


def errors(model: nn.Module, x: Tensor, label_B: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
    """Each item's mean squared error of the velocity, (B,)."""
    t = t_B[:, None]
    return (model((1 - t) * x + t * noise, t_B, label_B) - (noise - x)).square().mean(1)


@torch.no_grad()
def sample(model: nn.Module, label_B: Tensor, latent: int, guidance: float, steps: int = 20) -> Tensor:
    """Latents of these classes, (B, D), by Euler's method from noise on."""
    x = torch.randn(len(label_B), latent, generator=torch.Generator().manual_seed(0))
    for k in range(steps):
        t = torch.full((len(x),), 1 - k / steps)
        v = model(x, t, label_B)
        if guidance != 1:
            without = model(x, t, torch.full_like(label_B, -1))
            v = without + guidance * (v - without)
        x = x - v / steps
    return x


class Judge(nn.Module):
    """A classifier of real pictures, for all that is in them; its features describe a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(192, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
        self.heads = nn.ModuleList([nn.Linear(64, n) for n in (3, len(COLOURS), 2, len(ROWS), 3)])

    def classes(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.heads[1](features).argmax(1) * len(ROWS) + self.heads[3](features).argmax(1)

    @classmethod
    def trained(cls, known: Pictures, steps: int = 200) -> "Judge":
        judge, x = cls(), pooled(known)
        optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
        for _ in range(steps):
            rows = torch.randint(len(x), (128,))
            features = judge.features(x[rows])
            said = zip(judge.heads, known.factors[rows].T, strict=True)
            loss = torch.stack([F.cross_entropy(head(features), right) for head, right in said]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return judge.eval()


@torch.no_grad()
def judged(judge: Judge, draw: Callable[[Tensor, float], Tensor], back: Tensor, known: Tensor, held_out: Tensor,
           label: Tensor, classes: int, guidance: float) -> panel.Panel:  # fmt: skip
    """Pictures that are drawn at several guidance weights, and given back, beside held-out ones."""
    asked = torch.arange(classes).repeat(50)
    real = judge.features(held_out)
    spread = (held_out - known.mean(0)).square().sum()
    found = panel.Panel({}, {})
    right = int((judge.classes(held_out) == label).sum())
    found.add("val/judge", {"accuracy": share(right, len(label), 1 / classes)})
    found.add("val/guidance", {"used": Reading(guidance)})
    found.add("val/round_trip", {
        "r2": Reading(1 - float((back - held_out).square().sum() / spread), 0.0, len(back)),
        "frechet_distance": samples.frechet_distance(real, judge.features(back), paired=True),
    })  # fmt: skip
    for weight in sorted({1.0, 3.0, guidance}):
        made = draw(asked, weight)
        drawn = judge.features(made)
        clipped = [float(((x < 2 / 255) | (x > 253 / 255)).float().mean()) for x in (made, held_out)]
        contrast = [float(x.std(1).mean()) for x in (made, held_out)]
        varied = [samples.diversity(real[label == k], drawn[asked == k]) for k in range(classes)]
        each = [m.value for m in varied if isinstance(m, Reading)]
        found.add(f"val/guidance.{weight:g}", {
            "class_accuracy": share(int((judge.classes(made) == asked).sum()), len(made), 1 / classes),
            "clipped_share": Reading(clipped[0], clipped[1], len(made)),
            "contrast_ratio": Reading(contrast[0] / contrast[1], 1.0, len(made)),
            "diversity": Reading(float(np.mean(each)), 1.0, len(made)),
        })  # fmt: skip
        if weight == guidance:
            found.add("val/samples", {
                "frechet_distance": samples.frechet_distance(real, drawn),
                "copied_share": samples.copied_share(judge.features(known), real, drawn),
            })  # fmt: skip
    return found


@torch.no_grad()
def follow(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(averaged.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(items).split(size):
            if len(rows) == size:
                yield rows


def train(
    folder: Path, seed: int = 0, steps: int = 500, size: int = 128, items: int = 4096, rate: float = 2e-3,
    channels: int = 20, width: int = 192, blocks: int = 3, drop: float = 0.15, guidance: float = 1.5,
    decay: float = 0.98, optimizer: str = "AdamW", schedule: str = "cosine", kind: str = "uniform", first: int = 800,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unknown = pictures(items, seed), pictures(768, 10_000 + seed)
    pixels, held_out = pooled(known), pooled(unknown)
    label, held_label = classes_of(known), classes_of(unknown)
    judge = Judge.trained(pictures(4096, 20_000 + seed))
    autoencoder = Autoencoder.trained(pixels, channels, first)
    x, held_x = autoencoder.encode(pixels), autoencoder.encode(held_out)
    latent = x.shape[1]
    names: list[str] = []
    names += TOLD
    model = Flow(len(names), latent, width, blocks)
    averaged = copy.deepcopy(model).requires_grad_(False)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    course = {
        "cosine": lambda k: 0.5 + 0.5 * math.cos(math.pi * k / steps),
        "restarts": lambda k: 0.55 + 0.45 * math.cos(math.pi * (4 * k / steps % 1)),
        "constant": lambda k: 1.0,
    }
    rates = torch.optim.lr_scheduler.LambdaLR(optim, course[schedule])

    fixed = torch.Generator().manual_seed(0)
    fixed_t = (torch.arange(len(held_x)) + 0.5)[torch.randperm(len(held_x), generator=fixed)] / len(held_x)
    fixed_noise = torch.randn(held_x.shape, generator=fixed)
    fixed_bin = torch.bucketize(2 * (1 / fixed_t - 1).log(), EDGES)
    guess_N = (x.var(0) / ((1 - fixed_t[:, None]).square() * x.var(0) + fixed_t[:, None].square())).mean(1)
    drawn_bin = torch.bucketize(2 * (1 / times(20_000, kind) - 1).log(), EDGES)

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, dict[str, Measured]]:
        z, right = probe
        t, eps = fixed_t[: len(z)], fixed_noise[: len(z)]

        def loss(told: Tensor) -> tuple[np.ndarray, np.ndarray]:
            each = errors(model, z, told.long(), t, eps).double().numpy()
            return each, each

        noisy = (1 - t[:, None]) * z + t[:, None] * eps
        own, other = (model(noisy, t, k) for k in (right, (right + 1) % (int(label.max()) + 1)))
        change = float(((own - other).norm(dim=1) / own.norm(dim=1)).mean())
        cost = trials.cost_of_exchange(loss, right.double())["shuffled"]
        here, there = (float(errors(m, z, right, t, eps).mean()) for m in (model, averaged))
        gone = [float((nn.utils.parameters_to_vector(m.parameters()) - start).norm()) for m in (averaged, model)]
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {"velocity_change": Reading(change, 0.0, len(z)), "permuted_loss": cost},
            "val/ema": {"loss": Reading(there, here, len(z)), "moved": Reading(gone[0] / max(gone[1], 1e-12), 1.0)},
            "val/latent": {"clamped_share": moments.cut_share(held_x.unflatten(1, (4, -1)).flatten(0, 1).T)},
            "train/noise": {"terminal_snr": Reading(0.0, 0.0)},
        }
        std_C = held_x.unflatten(1, (4, -1)).std((0, 1))
        found |= {f"val/latent.{k}": {"scaled_std": Reading(float(s), 1.0)} for k, s in enumerate(std_C)}
        for k in range(8):
            part = float((drawn_bin == k).float().mean())
            found[f"train/log_snr.{2 * k - 7}"] = {"weight": Reading(part, 1 / 8)}
        return found

    nulls = {"train/loss/velocity": float(guess_N.mean()), "val/loss/velocity": float(guess_N.mean())}
    nulls |= {f"val/log_snr.{2 * k - 7}/loss": float(guess_N[fixed_bin == k].mean()) for k in range(8)}
    monitor = Monitor(
        model, optim, folder=folder, probe=(held_x[:384], held_label[:384]), read=read, every=50, log_every=5,
        steps=steps, nulls=nulls,
    )  # fmt: skip
    built_for = model.label.num_embeddings if model.label is not None else 0
    monitor.audit(built_for={"classes": {"built_for": built_for, "data": len(names)}})
    for step, rows in enumerate(batches(items, size), 1):
        model.train()
        told = torch.where(torch.rand(size) < drop, -1, label[rows])
        loss = errors(model, x[rows], told, times(size, kind), torch.randn(size, latent)).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step({"velocity": loss}, (x[rows], told))
        optim.step()
        rates.step()
        follow(averaged, model, min(decay, (1 + step) / (10 + step)))
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                each = errors(model, held_x, held_label, fixed_t, fixed_noise)
            by_bin = {f"val/log_snr.{2 * k - 7}/loss": float(each[fixed_bin == k].mean()) for k in range(8)}
            monitor.validated({"val/loss/velocity": float(each.mean()), **by_bin})
        if step == steps:
            break

    def draw(asked: Tensor, weight: float) -> Tensor:
        return autoencoder.decode(sample(averaged.eval(), asked, latent, weight))

    back = autoencoder.decode(held_x)
    found = judged(judge, draw, back, pixels, held_out, held_label, len(names), guidance)
    monitor.validated(found.readings)
    monitor.close()
    with torch.no_grad():
        error = float(errors(averaged, held_x, held_label, fixed_t, fixed_noise).mean())
    return {
        "share of the held-out error that the best linear guess makes, less": (1 - error / float(guess_N.mean()), 0.0),
        "samples that show colour and row": (found.readings[f"val/guidance.{guidance:g}/class_accuracy"].value, 1 / 12),
        "variance that the autoencoder gives back": (found.readings["val/round_trip/r2"].value, 0.0),
    }


FAMILY = Family(
    "flow",
    "development",
    "a rectified flow in the latents of an autoencoder, told colour and row",
    faults=(
        Fault(
            "scale-factor-of-another-autoencoder",
            "The latents are multiplied by the constant of another autoencoder, .18215, and not standardised.",
            ("latent-scale",),
            changes=(Change("raw.mean((0, 1)), raw.std((0, 1))", "autoencoder.centre, autoencoder.spread / 0.18215"),),
        ),
        Fault(
            "latents-clamped",
            "Standardised latents are clamped to −1 to 1, as pictures are.",
            ("latent-scale",),
            changes=(Change("/ self.spread).flatten(1)", "/ self.spread).flatten(1).clamp(-1, 1)"),),
            case="D latent-scale",
        ),
        Fault(
            "autoencoder-stopped-too-early",
            "The autoencoder was trained for thirty steps, for a try, and is used for good.",
            ("round-trip-ceiling",),
            options={"first": 30},
        ),
        Fault(
            "built-before-the-classes-are-read",
            "The flow is built while the list of classes is still empty, so that it is told none.",
            ("conditioned-too-late", "condition-ignored"),
            changes=(
                Change(
                    "    names += TOLD\n    model = Flow(len(names), latent, width, blocks)\n",
                    "    model = Flow(len(names), latent, width, blocks)\n    names += TOLD\n",
                ),
            ),
            case="D conditioned-too-late",
        ),
        Fault(
            "average-too-long",
            "The average of the weights has the decay of a training of a million steps, and no warm-up.",
            ("ema-lag",),
            changes=(Change("min(decay, (1 + step) / (10 + step))", "0.9999"),),
            minor=True,
        ),
        Fault(
            "body-alone-in-the-optimizer",
            "The optimizer holds the blocks, and neither the embeddings nor the first and last layer.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=rate, **more)", "(model.body.parameters(), lr=rate, **more)"),),
        ),
        Fault(
            "classes-of-other-pictures",
            "Latents and classes are shuffled apart.",
            ("condition-ignored",),
            changes=(Change("label[rows])", "label[torch.randperm(items)[:size]])"),),
        ),
        Fault(
            "times-not-mirrored",
            "The second half of the times was to be the mirror image of the first, and is the first again.",
            ("high-noise-starved",),
            changes=(Change("torch.cat([half, 1 - half])", "torch.cat([half, half])"),),
        ),
        Fault(
            "sampled-the-wrong-way",
            "The sampler adds the velocity that it should subtract, and so walks away from the pictures.",
            ("unfaithful",),
            changes=(Change("x = x - v / steps", "x = x + v / steps"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 320, "blocks": 2}),
        Healthy("sgd", "Momentum alone needs another rate.", options={"optimizer": "SGD", "rate": 0.1}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4}),
        Healthy("warm-restarts", "The rate jumps back up four times.", options={"schedule": "restarts"}),
        Healthy("constant-rate", options={"schedule": "constant", "rate": 1e-3, "optimizer": "Adam"}),
        Healthy("logit-normal", "Times in the middle are drawn more often.", options={"kind": "logit-normal"}),
        Healthy("never-dropped", "No class is dropped, and none is guided.", options={"drop": 0.0, "guidance": 1.0}),
        Healthy("small-batches", options={"size": 48, "rate": 1e-3, "steps": 600}),
    ),
)
