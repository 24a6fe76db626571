"""A class-conditional diffusion model as tutorials have it, of small pictures of shapes by their colour.

Ho et al. 2020 with the cosine schedule of Nichol & Dhariwal 2021, the velocity of Salimans & Ho 2022, classifier-free
guidance (Ho & Salimans 2022) and an average of the weights.

Shapes: B batch, N items, T noise levels, S = 16 pixels a side.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, Pictures, pictures
from intaglio.health import panel, trials
from intaglio.health.instruments import samples
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

CLASSES = len(COLOURS)
EDGES = torch.tensor([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
"""Of bins of log-SNR, whose centres are −7, −5, …, 7."""


def cosine(steps: int) -> Tensor:
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    left = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - left[1:] / left[:-1]).clamp(max=0.999)


def linear(steps: int) -> Tensor:
    return torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)


class Noise:
    """The noise levels: ``signal`` and ``noise`` (T,), their squares adding up to 1."""

    def __init__(self, beta_T: Tensor):
        kept = (1 - beta_T).cumprod(0)
        self.steps = len(beta_T)
        self.snr = (kept / (1 - kept)).float()
        self.signal, self.noise = kept.sqrt().float(), (1 - kept).sqrt().float()
        self.bin = torch.bucketize(self.snr.log(), EDGES)

    def at(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.signal[t_B].view(-1, 1, 1, 1), self.noise[t_B].view(-1, 1, 1, 1)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, told: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.told = nn.Linear(told, 2 * outputs)
        self.norm = nn.GroupNorm(4, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(F.silu(h))


class UNet(nn.Module):
    """16 → 8 by patches, 8 → 4, and back. The last class is that of no class."""

    wave: Tensor

    def __init__(self, width: int = 32, told: int = 64):
        super().__init__()
        self.register_buffer("wave", torch.exp(torch.linspace(0, math.log(100), 16)))
        self.time = nn.Sequential(nn.Linear(32, told), nn.SiLU(), nn.Linear(told, told))
        self.label = nn.Embedding(CLASSES + 1, told)
        self.enter = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1))
        self.high = Block(width, width, told)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.low = Block(2 * width, 2 * width, told)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, 3, padding=1))
        self.last = Block(2 * width, width, told)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 12, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor, time_B: Tensor, label_B: Tensor) -> Tensor:
        angle = time_B[:, None] * self.wave
        told = self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(label_B)
        high = self.high(self.enter(x), told)
        low = self.low(self.down(high), told)
        return self.leave(self.last(torch.cat([high, self.up(low)], 1), told))


def errors(model: nn.Module, levels: Noise, x: Tensor, label_B: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
    """Each item's mean squared error of the velocity, (B,)."""
    a, s = levels.at(t_B)
    guess = model(a * x + s * noise, t_B / levels.steps, label_B)
    return (guess - (a * noise - s * x)).square().flatten(1).mean(1)


@torch.no_grad()
def sample(model: nn.Module, levels: Noise, label_B: Tensor, guidance: float, steps: int = 10) -> Tensor:
    """Pictures of these classes, (B, 3, S, S), by deterministic steps (Song et al. 2021)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(label_B), 3, 16, 16, generator=generator)
    t = torch.linspace(levels.steps - 1, 0, steps).round().long()
    for k in range(steps):
        now = t[k].expand(len(x))
        v = model(x, now / levels.steps, label_B)
        if guidance != 1:
            without = model(x, now / levels.steps, torch.full_like(label_B, CLASSES))
            v = without + guidance * (v - without)
        a, s = levels.at(now)
        clean, noise = (a * x - s * v).clamp(-1, 1), s * x + a * v
        if k == steps - 1:
            return clean
        a, s = levels.at(t[k + 1].expand(len(x)))
        x = a * clean + s * noise
    return x


class Judge(nn.Module):
    """A classifier of real pictures, for all that is in them; its features describe a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(768, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
        self.heads = nn.ModuleList([nn.Linear(64, n) for n in (3, CLASSES, 2, 3, 3)])

    def colour(self, x: Tensor) -> Tensor:
        return self.heads[1](self.features(x)).argmax(1)

    @classmethod
    def trained(cls, known: Pictures, steps: int = 150) -> "Judge":
        judge = cls()
        optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
        for _ in range(steps):
            rows = torch.randint(len(known.images), (128,))
            features = judge.features(known.images[rows] * 2 - 1)
            said = zip(judge.heads, known.factors[rows].T, strict=True)
            loss = torch.stack([F.cross_entropy(head(features), right) for head, right in said]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return judge.eval()


@torch.no_grad()
def judged(judge: Judge, model: nn.Module, levels: Noise, train: Tensor, held_out: Tensor, label: Tensor,
           guidance: float) -> panel.Panel:  # fmt: skip
    """What is drawn at several guidance weights, beside held-out pictures."""
    asked = torch.arange(CLASSES).repeat(50)
    real = judge.features(held_out)
    found = panel.Panel({}, {})
    right = int((judge.colour(held_out) == label).sum())
    found.add("val/judge", {"accuracy": share(right, len(label), 1 / CLASSES)})
    found.add("val/guidance", {"used": Reading(guidance)})
    for weight in sorted({1.0, 3.0, guidance}):
        made = sample(model, levels, asked, weight)
        drawn = judge.features(made)
        clipped = [float((x.abs() > 1 - 4 / 255).float().mean()) for x in (made, held_out)]
        contrast = [float(x.std((1, 2, 3)).mean()) for x in (made, held_out)]
        varied = [samples.diversity(real[label == k], drawn[asked == k]) for k in range(CLASSES)]
        each = [m.value for m in varied if isinstance(m, Reading)]
        found.add(f"val/guidance.{weight:g}", {
            "class_accuracy": share(int((judge.colour(made) == asked).sum()), len(made), 1 / CLASSES),
            "clipped_share": Reading(clipped[0], clipped[1], len(made)),
            "contrast_ratio": Reading(contrast[0] / contrast[1], 1.0, len(made)),
            "diversity": Reading(sum(each) / len(each), 1.0, len(made)),
        })  # fmt: skip
        if weight == guidance:
            known = judge.features(train)
            found.add("val/samples", {
                "frechet_distance": samples.frechet_distance(real, drawn),
                "copied_share": samples.copied_share(known, real, drawn),
                "neighbour_ratio": samples.neighbour_ratio(known, real, drawn),
            })  # fmt: skip
    return found


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(items).split(size):
            if len(rows) == size:
                yield rows


@torch.no_grad()
def follow(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(averaged.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * done)
    if schedule == "restarts":
        return 0.55 + 0.45 * math.cos(math.pi * (done * 4 % 1))
    return max(0.0, 1 - done) if schedule == "linear" else 1.0


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 32, items: int = 2048, rate: float = 3e-3,
    width: int = 32, drop: float = 0.15, guidance: float = 2.0, decay: float = 0.98, optimizer: str = "AdamW",
    schedule: str = "cosine", warmup: int = 20, levels: int = 200, average: bool = True,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unknown = pictures(items, seed), pictures(384, 10_000 + seed)
    x, label = known.images * 2 - 1, known.factors[:, 1]
    held_out, held_label = unknown.images * 2 - 1, unknown.factors[:, 1]
    judge = Judge.trained(pictures(4096, 20_000 + seed))
    noise = Noise(cosine(levels))
    weight = torch.ones(noise.steps)
    model = UNet(width)
    averaged = copy.deepcopy(model).requires_grad_(False)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    fixed = torch.Generator().manual_seed(0)
    fixed_t = torch.randint(noise.steps, (len(held_out),), generator=fixed)
    fixed_noise = torch.randn(held_out.shape, generator=fixed)
    variance = x.var(0)
    null_T = torch.stack([(variance / (a**2 * variance + s**2)).mean()
                          for a, s in zip(noise.signal, noise.noise, strict=True)])  # fmt: skip

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, dict[str, Measured]]:
        image, right = probe
        t, eps = fixed_t[: len(image)], fixed_noise[: len(image)]

        def loss(told: Tensor) -> tuple[Any, Any]:
            each = errors(model, noise, image, told.long(), t, eps).double().numpy()
            return each, each

        a, s = noise.at(t)
        own, other = (model(a * image + s * eps, t / noise.steps, k) for k in (right, (right + 1) % CLASSES))
        change = float(((own - other).flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1)).mean())
        cost = trials.cost_of_exchange(loss, right.double())["shuffled"]
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {"velocity_change": Reading(change, 0.0, len(image)), "permuted_loss": cost},
            "train/noise": {"terminal_snr": Reading(float(noise.snr[-1]), 0.0)},
        }
        even = 1 / len(noise.bin.unique())
        for k in noise.bin.unique().tolist():
            part = float(weight[noise.bin == k].sum() / weight.sum())
            found[f"train/log_snr.{2 * k - 7}"] = {"weight": Reading(part, even)}
        if average:
            here, there = (float(errors(m, noise, image, right, t, eps).mean()) for m in (model, averaged))
            ends = (nn.utils.parameters_to_vector(m.parameters()) for m in (averaged, model))
            gone = [float((end - start).norm()) for end in ends]
            found["val/ema"] = {
                "loss": Reading(there, here, len(image)),
                "moved": Reading(gone[0] / max(gone[1], 1e-12), 1.0),
                "averaged_buffers": Reading(0.0, 0.0),
            }
        return found

    null = float((null_T * weight).mean())
    nulls = {"train/loss/velocity": null, "val/loss/velocity": null}
    nulls |= {f"val/log_snr.{2 * k - 7}/loss": float(null_T[noise.bin == k].mean()) for k in noise.bin.unique()}
    monitor = Monitor(
        model, optim, folder=folder, probe=(held_out[:96], held_label[:96]), read=read, every=50, log_every=5,
        steps=steps, nulls=nulls,
    )  # fmt: skip
    for step, rows in enumerate(batches(items, size), 1):
        model.train()
        t = torch.randint(noise.steps, (size,))
        told = torch.where(torch.rand(size) < drop, CLASSES, label[rows])
        loss = (weight[t] * errors(model, noise, x[rows], told, t, torch.randn(size, 3, 16, 16))).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step({"velocity": loss}, (x[rows], told))
        if step % 5 == 0:
            monitor.log({"train/condition/dropped_share": float((told == CLASSES).float().mean())})
        optim.step()
        rates.step()
        if average:
            follow(averaged, model, min(decay, (1 + step) / (10 + step)))
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                each = errors(model, noise, held_out, held_label, fixed_t, fixed_noise)
            monitor.validated({"val/loss/velocity": float((weight[fixed_t] * each).mean())})
            here = noise.bin[fixed_t]
            monitor.validated({f"val/log_snr.{2 * k - 7}/loss": float(each[here == k].mean()) for k in here.unique()})
        if step == steps:
            break
    used = (averaged if average else model).eval()
    found = judged(judge, used, noise, x, held_out, held_label, guidance)
    monitor.validated(found.readings)
    monitor.close()
    with torch.no_grad():
        error = float(errors(used, noise, held_out, held_label, fixed_t, fixed_noise).mean())
    accuracy = found.readings[f"val/guidance.{guidance:g}/class_accuracy"].value
    guess = float(null_T[fixed_t].mean())
    return {
        "share of the held-out error that the best linear guess makes, less": (1 - error / guess, 0.0),
        "samples that show the colour asked for": (accuracy, 1 / CLASSES),
    }


FAMILY = Family(
    "ddpm",
    "development",
    "a class-conditional diffusion model of pictures, a small U-Net",
    faults=(
        Fault(
            "guided-and-never-dropped",
            "Samples are guided, and the network was never trained without a class.",
            ("null-mismatch",),
            options={"drop": 0.0},
        ),
        Fault(
            "class-not-added",
            "The class is embedded in the model, and its embedding is not added to that of the time.",
            ("condition-ignored", "dead-parameters"),
            changes=(Change(" + self.label(label_B)\n", "\n"),),
        ),
        Fault(
            "betas-of-a-thousand-levels",
            "The betas that are meant for a thousand levels are used with two hundred, so the last is far from noise.",
            ("schedule-mismatch",),
            changes=(Change("Noise(cosine(levels))", "Noise(linear(levels))"),),
            case="D schedule-mismatch",
            minor=True,
        ),
        Fault(
            "weights-of-another-target",
            "The min-SNR weights for a network that predicts the picture multiply the loss of the velocity.",
            ("high-noise-starved",),
            changes=(Change("weight = torch.ones(noise.steps)", "weight = noise.snr.clamp(max=5.0)"),),
            case="D high-noise-starved",
        ),
        Fault(
            "guidance-of-large-models",
            "The guidance weight of a large text-to-image model is taken for a small one of four classes.",
            ("over-stylised",),
            options={"guidance": 9.0},
            case="D over-stylised",
        ),
        Fault(
            "classes-counted-from-one",
            "The sampler is asked for classes as if the first were that of no class.",
            ("unfaithful",),
            changes=(Change("sample(model, levels, asked, weight)", "sample(model, levels, asked + 1, weight)"),),
        ),
        Fault(
            "learnt-by-heart",
            "Two dozen pictures are all there is to train on, and each is seen eight hundred times.",
            ("memorised", "overfitting"),
            options={"items": 24, "size": 24, "steps": 800, "guidance": 1.0},
            case="D memorised",
        ),
        Fault(
            "average-never-stepped",
            "Samples are drawn with the average of the weights, and the line that steps it is missing.",
            ("ema-lag",),
            changes=(Change("follow(averaged, model, min(decay, (1 + step) / (10 + step)))", "pass"),),
        ),
        Fault(
            "schedule-stepped-twice",
            "The schedule is stepped twice a step, so that the rate is 0 from the middle of the run on.",
            ("learning-rate-off",),
            changes=(Change("        rates.step()\n", "        rates.step()\n        rates.step()\n"),),
            options={"schedule": "linear"},
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 40}),
        Healthy("sgd", "Momentum alone needs another rate.", options={"optimizer": "SGD", "rate": 0.2}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear"}),
        Healthy("warm-restarts", "The rate jumps back up four times.", options={"schedule": "restarts"}),
        Healthy("constant-rate", "No schedule and no average.", options={"schedule": "constant", "average": False}),
        Healthy("never-dropped", "No class is dropped, and none is guided.", options={"drop": 0.0, "guidance": 1.0}),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 512}),
        Healthy("thousand-levels", options={"levels": 1000}),
    ),
)
