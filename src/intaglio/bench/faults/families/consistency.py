"""A consistency model of small pictures that is told a class: Song et al. 2023, with and without a teacher.

Neighbouring levels of noise are to lead to the same picture; the target network is an average of the weights, and the
levels become more as training goes on. The distance is pseudo-Huber's (Song & Dhariwal 2024). Samples take a step or
two. A teacher, if there is one, is a denoiser of Karras et al. 2022, whose scaling of inputs and outputs is used, too.

Shapes: B batch, N items; pictures are (3, 8, 8); a class is 1 to 4, and 0 stands for none; x = y + σ·ε.
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
from intaglio.bench.faults.data import COLOURS, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import samples
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

MEAN, STD, SIGMA_DATA = 0.094, 0.146, 0.5
"""Of pictures in [0, 1]; the deviation of scaled ones."""
BLACK, WHITE = -MEAN / STD * SIGMA_DATA, (1 - MEAN) / STD * SIGMA_DATA
LOWEST, HIGHEST, MIDDLE = 0.002, 80.0, 0.8
"""Noise levels between which the model is trained, and that of the second step of a sample."""
FIRST, LAST = 4, 32
"""Pairs of neighbouring levels at the beginning and at the end."""
CLASSES = len(COLOURS)
WAVE = torch.exp(torch.linspace(0, math.log(60), 16))
EDGES = torch.tensor([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
"""Of bins of log-SNR, whose centres are −7, −5, …, 7."""


def scaled(pixels: Tensor) -> Tensor:
    return (pixels - MEAN) / STD * SIGMA_DATA


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.told = nn.Linear(width, 2 * width)
        self.body = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told).chunk(2, dim=1)
        return h + self.body(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)


class Net(nn.Module):
    """What stands behind the scaling, of pictures whose variance is 1; a gate lets some of its input through."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.level = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.kind = nn.Embedding(CLASSES + 1, width)
        self.enter = nn.Linear(192, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.gate = nn.Linear(width, 192)
        self.leave = nn.Linear(width, 192)

    def forward(self, x: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        angle = sigma_B.log()[:, None] / 4 * WAVE
        told = self.level(torch.cat([angle.sin(), angle.cos()], 1))
        told = told + self.kind(label_B)
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, F.silu(told))
        h = self.leave(F.layer_norm(h, h.shape[-1:])) + self.gate(F.silu(told)) * x.flatten(1)
        return h.view_as(x)


def clean(model: nn.Module, x: Tensor, sigma_B: Tensor, label_B: Tensor, lowest: float = LOWEST) -> Tensor:
    """The picture that x leads to: at the lowest level x itself. A denoiser's guess has 0 for that level."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    whole = (sigma**2 + SIGMA_DATA**2).sqrt()
    c_skip = SIGMA_DATA**2 / ((sigma - lowest) ** 2 + SIGMA_DATA**2)
    c_out = SIGMA_DATA * (sigma - lowest) / whole
    return c_skip * x + c_out * model(x / whole, sigma_B, label_B)


def errors(model: nn.Module, y: Tensor, label_B: Tensor, sigma_B: Tensor, noise: Tensor) -> Tensor:
    """Each item's mean squared error of what one step makes of a noisy picture, (B,)."""
    return (clean(model, y + sigma_B.view(-1, 1, 1, 1) * noise, sigma_B, label_B) - y).square().mean((1, 2, 3))


def ladder(pairs: int, rho: float = 7.0) -> Tensor:
    """Noise levels from the lowest to the highest, (pairs + 1,)."""
    low, high = LOWEST ** (1 / rho), HIGHEST ** (1 / rho)
    return (low + torch.linspace(0, 1, pairs + 1) * (high - low)) ** rho


def pairs_at(step: int, steps: int) -> int:
    doublings = int(math.log2(LAST / FIRST)) + 1
    return min(FIRST * 2 ** (doublings * (step - 1) // steps), LAST)


def chosen(uniform_B: Tensor, pairs: int, kind: str) -> tuple[Tensor, Tensor]:
    """Neighbouring levels, (B,) each, the lower first; all alike, or more of those around 0.3."""
    levels = ladder(pairs)
    index = (uniform_B * pairs).long()
    if kind == "lognormal":
        below = torch.erf((levels.log() + 1.1) / (2.0 * math.sqrt(2)))
        index = torch.searchsorted((below[1:] - below[0]) / (below[-1] - below[0]), uniform_B).clamp(max=pairs - 1)
    return levels[index], levels[index + 1]


def distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    square = (a - b).flatten(1).square().sum(1)
    c = 0.00054 * math.sqrt(192)
    return (square + c**2).sqrt() - c if metric == "huber" else square


def consistency(model: nn.Module, target: nn.Module, teacher: nn.Module | None, y: Tensor, label_B: Tensor,
                lower_B: Tensor, upper_B: Tensor, noise: Tensor, metric: str) -> Tensor:  # fmt: skip
    """How far apart the pictures are that two neighbouring points of a path lead to, (B,)."""
    lower, upper = lower_B.view(-1, 1, 1, 1), upper_B.view(-1, 1, 1, 1)
    x = y + upper * noise
    with torch.no_grad():
        before = y + lower * noise
        if teacher is not None:
            before = x + (lower - upper) / upper * (x - clean(teacher, x, upper_B, label_B, 0.0))
        right = clean(target, before, lower_B, label_B)
    return distance(clean(model, x, upper_B, label_B), right, metric)


def taught(y: Tensor, label: Tensor, width: int, blocks: int, steps: int) -> Net:
    """A denoiser, trained for some steps, and frozen."""
    model = Net(width, blocks)
    optim = torch.optim.Adam(model.parameters(), lr=2e-3)
    for rows in (torch.randint(len(y), (128,)) for _ in range(steps)):
        sigma_B = (-0.8 + 1.4 * torch.randn(128)).exp()
        sigma = sigma_B.view(-1, 1, 1, 1)
        guess = clean(model, y[rows] + sigma * torch.randn_like(y[rows]), sigma_B, label[rows], 0.0)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        loss = (weight * (guess - y[rows]).square()).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def sample(model: nn.Module, label_B: Tensor, hops: int) -> Tensor:
    """Pictures of these classes in [0, 1], (B, 3, 8, 8), by one step or two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(len(label_B), 3, 8, 8)
    for level in (HIGHEST, MIDDLE)[:hops]:
        noise = torch.randn(x.shape, generator=generator)
        x = clean(model, x + math.sqrt(level**2 - LOWEST**2) * noise, torch.full((len(x),), level), label_B)
        x = x.clamp(BLACK, WHITE)
    return x / SIGMA_DATA * STD + MEAN


class Judge(nn.Module):
    """A classifier of real pictures, for shape, colour, size and place; its features describe a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
        self.heads = nn.ModuleList([nn.Linear(64, n) for n in (3, CLASSES, 2, 3, 3)])

    def classes(self, pixels: Tensor) -> Tensor:
        return self.heads[1](self.features(pixels)).argmax(1) + 1

    @classmethod
    def trained(cls, seed: int, steps: int = 150) -> "Judge":
        judge, known = cls(), pictures(3072, seed)
        x, optimizer = F.avg_pool2d(known.images, 2), torch.optim.Adam(judge.parameters(), lr=3e-3)
        for _ in range(steps):
            rows = torch.randint(len(x), (128,))
            features = judge.features(x[rows])
            heads = zip(judge.heads, known.factors[rows].T, strict=True)
            loss = torch.stack([F.cross_entropy(head(features), right) for head, right in heads]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return judge.eval()


@torch.no_grad()
def judged(judge: Judge, model: nn.Module, pixels: Tensor, held_out: Tensor, label: Tensor) -> panel.Panel:
    """Samples of one step and of two, of each class, beside held-out pictures."""
    asked = torch.arange(1, CLASSES + 1).repeat_interleave(60)
    real = judge.features(held_out)
    known = share(int((judge.classes(held_out) == label).sum()), len(label), 1 / CLASSES)
    one, made = (sample(model, asked, hops) for hops in (1, 2))
    right = [share(int((judge.classes(some) == asked).sum()), len(asked), 1 / CLASSES) for some in (one, made)]
    features = judge.features(made)
    clipped = [float(((some < 2 / 255) | (some > 253 / 255)).float().mean()) for some in (made, held_out)]
    contrast = [float(some.std((1, 2, 3)).mean()) for some in (made, held_out)]
    varied = [samples.diversity(real[label == k], features[asked == k]) for k in range(1, CLASSES + 1)]
    each = [m.value for m in varied if isinstance(m, Reading)]
    sites = {"val/judge": {"accuracy": known}, "val/one_step": {"class_accuracy": right[0]}}
    found = panel.Panel({}, {})
    for site, measured in (sites | {"val/guidance": {"used": Reading(1.0)}}).items():
        found.add(site, measured)
    found.add("val/guidance.1", {
        "class_accuracy": right[1],
        "clipped_share": Reading(clipped[0], clipped[1], len(made)),
        "contrast_ratio": Reading(contrast[0] / contrast[1], 1.0, len(made)),
        "diversity": Reading(sum(each) / max(1, len(each)), 1.0, len(made)),
    })  # fmt: skip
    found.add("val/samples", {
        "frechet_distance": samples.frechet_distance(real, features),
        "copied_share": samples.copied_share(judge.features(pixels), real, features),
    })  # fmt: skip
    return found


@torch.no_grad()
def follow(target: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(items)[: items // size * size].split(size)


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 96, items: int = 3072, rate: float = 3e-3,
    width: int = 128, blocks: int = 3, kind: str = "lognormal", metric: str = "huber", decay: float = 0.8,
    drop: float = 0.1, teacher: int = 0, optimizer: str = "Adam", schedule: str = "cosine", warmup: int = 20,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unknown = pictures(items, seed), pictures(512, 10_000 + seed)
    pixels, held_out = F.avg_pool2d(known.images, 2), F.avg_pool2d(unknown.images, 2)
    y, held_y = scaled(pixels), scaled(held_out)
    label, held_label = known.factors[:, 1] + 1, unknown.factors[:, 1] + 1
    judge = Judge.trained(20_000 + seed)
    tutor = taught(y, label, width, blocks, teacher) if teacher else None
    model = Net(width, blocks)
    if tutor is not None:
        model.load_state_dict(tutor.state_dict())
    target = copy.deepcopy(model).requires_grad_(False)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    course = {
        "constant": lambda k: 1.0,
        "linear": lambda k: 1 - k / steps,
        "cosine": lambda k: 0.5 + 0.5 * math.cos(math.pi * k / steps),
        "restarts": lambda k: 0.55 + 0.45 * math.cos(math.pi * (4 * k / steps % 1)),
    }
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: course[schedule](k) * min((k + 1) / warmup, 1.0))

    pairs = pairs_at(1, steps)
    many, held_uniform = torch.rand(20_000), torch.rand(len(held_y))
    noise, count = torch.randn(held_y.shape), 8 * 48
    even = SIGMA_DATA * torch.linspace(-4, 4, count + 1)[1:].sub(4 / count).exp()[torch.randperm(count)]
    even_bin = torch.bucketize(2 * (SIGMA_DATA / even).log(), EDGES)
    middle = (even_bin >= 3) & (even_bin <= 5)
    variance = y.var(0).flatten()
    guess = (1 / (1 / variance + 1 / even[:, None] ** 2)).mean(1)

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, dict[str, Measured]]:
        y, right = probe

        def loss(told: Tensor) -> tuple[Any, Any]:
            each = errors(model, y, told.long(), even, noise[:count]).double().numpy()
            return each, each

        x = (y + even.view(-1, 1, 1, 1) * noise[:count]) / (SIGMA_DATA**2 + even.view(-1, 1, 1, 1) ** 2).sqrt()
        own, other = (model(x, even, told).flatten(1) for told in (right, right.roll(1, 0)))
        change = float(((own - other).norm(dim=1) / own.norm(dim=1).clamp(min=1e-12)).mean())
        live, slow = (float(errors(m, y, right, even, noise[:count])[middle].mean()) for m in (model, target))
        gone = [float((nn.utils.parameters_to_vector(m.parameters()) - start).norm()) for m in (target, model)]
        cost = trials.cost_of_exchange(loss, right.double())["shuffled"]
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {"velocity_change": Reading(change, 0.0, count), "permuted_loss": cost},
            "val/ema": {"loss": Reading(slow, live, count), "moved": Reading(gone[0] / max(gone[1], 1e-12), 1.0)},
            "train/noise": {"terminal_snr": Reading(float(SIGMA_DATA / ladder(pairs)[-1]) ** 2, 0.0)},
        }
        for name, deviation in zip(("red", "green", "blue"), held_y.std((0, 2, 3)), strict=True):
            found[f"val/pixels.{name}"] = {"scaled_std": Reading(float(deviation) / SIGMA_DATA, 1.0)}
        upper = chosen(many, pairs, kind)[1]
        parts = torch.bincount(torch.bucketize(2 * (SIGMA_DATA / upper).log(), EDGES), minlength=8) / len(many)
        return found | {f"train/log_snr.{2 * k - 7}": {"weight": Reading(float(p), 1 / 8)} for k, p in enumerate(parts)}

    null = float(guess[middle].mean())
    nulls = {f"val/log_snr.{2 * k - 7}/loss": float(guess[even_bin == k].mean()) for k in range(8)}
    nulls["denoising"] = null
    monitor = Monitor(
        model, optim, folder=folder, probe=(held_y[:count], held_label[:count]), read=read, every=50, log_every=5,
        steps=steps, nulls=nulls,
    )  # fmt: skip
    monitor.audit(
        ranges={"pictures": audits.ranges(y, BLACK, WHITE)},
        leaks={"pictures": audits.leaks(pixels.numpy(), held_out.numpy())},
    )
    for step, rows in zip(range(1, steps + 1), batches(items, size), strict=False):
        model.train()
        pairs = pairs_at(step, steps)
        told = torch.where(torch.rand(size) < drop, 0, label[rows])
        lower, upper = chosen(torch.rand(size), pairs, kind)
        eps = torch.randn(size, 3, 8, 8)
        loss = consistency(model, target, tutor, y[rows], told, lower, upper, eps, metric).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step({"consistency": loss}, (y[rows], told))
        if step % 5 == 0:
            monitor.log({"train/condition/dropped_share": float((told == 0).float().mean())})
        optim.step()
        rates.step()
        follow(target, model, decay ** (FIRST / pairs))
        if step % 50 == 0:
            model.eval()
            lower, upper = chosen(held_uniform, pairs, kind)
            some = torch.arange(count) % items
            with monitor.validation(), torch.no_grad():
                apart = consistency(model, target, tutor, held_y, held_label, lower, upper, noise, metric).mean()
                each = errors(model, held_y[:count], held_label[:count], even, noise[:count])
                seen = errors(model, y[some], label[some], even, noise[:count])
            monitor.log({"train/loss/denoising": float(seen[middle].mean())})
            monitor.validated({"val/loss/consistency": float(apart), "val/loss/denoising": float(each[middle].mean())})
            monitor.validated({f"val/log_snr.{2 * k - 7}/loss": float(each[even_bin == k].mean()) for k in range(8)})
    torch.save({"target": target.state_dict(), "step": steps}, folder / "last.pt")
    state = torch.load(folder / "last.pt")["target"]
    artist = Net(width, blocks).eval()
    artist.load_state_dict(state)
    monitor.audit(loaded=audits.loaded(artist, state))
    found = judged(judge, artist, pixels, held_out, held_label)
    monitor.validated(found.readings)
    monitor.close()
    with torch.no_grad():
        error = float(errors(artist, held_y[:count], held_label[:count], even, noise[:count])[middle].mean())
    one, two = (found.readings[f"val/{name}/class_accuracy"].value for name in ("one_step", "guidance.1"))
    return {
        "share of the held-out error that the best linear guess makes, less": (1 - error / null, 0.0),
        "samples of one step that show the colour asked for": (one, 1 / CLASSES),
        "samples of two steps that show it": (two, 1 / CLASSES),
    }


FAMILY = Family(
    "consistency", "development", "a consistency model of pictures that is told a class, without a teacher or by one",
    faults=(
        Fault("boundary-condition-missing",
              "The network's answer is taken as it is, without c_skip and c_out, so that the same for all is perfect.",
              ("no-learning", "plateau"),
              changes=(Change("return c_skip * x + c_out * model(", "return model("),)),
        Fault("target-never-stepped",
              "The call that moves the target network is missing, so it stays what it was, and samples are of it.",
              ("ema-lag",), changes=(Change("        follow(target, model, decay ** (FIRST / pairs))\n", ""),)),
        Fault("pairs-of-the-beginning",
              "Levels become more, but the index is clamped to their number at the beginning: the lowest levels alone.",
              ("high-noise-starved", "schedule-mismatch"),
              changes=(Change("clamp(max=pairs - 1)", "clamp(max=FIRST - 1)"),)),
        Fault("gradients-never-emptied",
              "The line that empties the gradients is missing, so each update is made with the sum of all so far.",
              ("gradients-add-up",),
              changes=(Change("eps, metric).mean()\n        optim.zero_grad()\n", "eps, metric).mean()\n"),)),
        Fault("classes-from-zero",
              "Classes are numbered from 1 in training, as 0 stands for none, and from 0 when samples are asked for.",
              ("unfaithful",), changes=(Change("(sample(model, asked, hops)", "(sample(model, asked - 1, hops)"),)),
        Fault("class-added-to-nothing",
              "The class is added to the embedding of the level, and the sum is never assigned.",
              ("dead-parameters", "condition-ignored"), changes=(Change("told = told + self", "told + self"),)),
        Fault("pictures-never-scaled",
              "Pictures are left in [0, 1], although σ_data and the way back from samples are those of scaled ones.",
              ("range-mismatch", "latent-scale"), changes=(Change("(pixels - MEAN) / STD * SIGMA_DATA", "pixels"),)),
        Fault("lowest-level-zero",
              "The lowest level of noise is 0, of which the network takes the logarithm.",
              ("non-finite",), changes=(Change("MIDDLE = 0.002, 80.0", "MIDDLE = 0.0, 80.0"),)),
        Fault("held-out-from-training",
              "The pictures that are held out are the first of those that are trained on.",
              ("split-leak",),
              changes=(Change("pictures(512, 10_000 + seed)\n",
                              "pictures(items, seed)\n    unknown = type(known)(*(part[:512] for part in known))\n"),)),
        Fault("checkpoint-not-opened",
              "The whole checkpoint is loaded and not the entry with the weights, and not strictly: none fits.",
              ("partial-load",),
              changes=(Change('torch.load(folder / "last.pt")["target"]', 'torch.load(folder / "last.pt")'),
                       Change("artist.load_state_dict(state)", "artist.load_state_dict(state, strict=False)"))),
        Fault("learnt-by-heart",
              "Two dozen pictures are all that there is to train on.",
              ("memorised", "overfitting"), options={"items": 24, "size": 24, "steps": 800, "width": 160}),
    ),
    healthy=(
        Healthy("plain", "The loss falls by steps, as levels become more.", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 192, "blocks": 2}, seeds=(0, 1)),
        Healthy("adamw", options={"optimizer": "AdamW", "schedule": "linear"}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 640}, seeds=(0, 1)),
        Healthy("small-batches", options={"size": 48, "steps": 600, "rate": 1e-3}, seeds=(0, 1)),
        Healthy("distilled", "It begins as its teacher.", options={"teacher": 250}, seeds=(0, 1, 2)),
        Healthy("target-is-the-network", "There is no average.", options={"decay": 0.0}, seeds=(0, 1)),
        Healthy("squared", "Squares in the place of lengths.", options={"metric": "squared"}, seeds=(0, 1)),
        Healthy("uniform-levels", "All are chosen alike.", options={"kind": "uniform"}, seeds=(0, 1)),
    ),
)  # fmt: skip
