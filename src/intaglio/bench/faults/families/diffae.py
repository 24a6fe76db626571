"""A diffusion autoencoder: Preechakul et al. 2022, of small pictures of shapes.

An encoder says in a few numbers what is in a picture; a small U-Net, which is told them, takes noise away. It predicts
the velocity of Salimans & Ho 2022 on the cosine schedule of Nichol & Dhariwal 2021, and adds to a linear guess (Karras
et al. 2022); pictures are rebuilt from noise by deterministic steps (Song et al. 2021), with an average of the weights.

Shapes: B batch, N items, T noise levels, S = 8 pixels a side, Z latent.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, trials
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

SIDE = 8
SPREAD = 0.3
"""Of a pixel's values, from -1 to 1."""
LOW, HIGH = -1.0, 1.0
KINDS = (3, 4, 2, 3, 3)
"""How many shapes, colours, sizes, rows and columns there are."""
EDGES = torch.tensor([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
"""Of bins of log-SNR, whose centres are −7, −5, …, 7."""


def cosine(count: int) -> Tensor:
    t = torch.arange(count + 1, dtype=torch.float64) / count
    kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)


def linear(count: int) -> Tensor:
    return torch.linspace(0.1 / count, 20 / count, count, dtype=torch.float64)


class Levels:
    """The noise levels: ``signal`` and ``noise`` (T,), whose squares add up to 1."""

    def __init__(self, beta_T: Tensor):
        kept = (1 - beta_T).cumprod(0)
        self.count = len(beta_T)
        self.snr = (kept / (1 - kept)).float()
        self.signal, self.noise = kept.sqrt().float(), (1 - kept).sqrt().float()
        self.guess = self.signal * self.noise * (1 - SPREAD**2) / ((self.signal * SPREAD) ** 2 + self.noise**2)
        self.bin = torch.bucketize(self.snr.log(), EDGES)

    def at(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.signal[t_B].view(-1, 1, 1, 1), self.noise[t_B].view(-1, 1, 1, 1)


class Encoder(nn.Sequential):
    """(B, 3, S, S) → (B, Z)."""

    def __init__(self, width: int, latent: int):
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.SiLU(),
            nn.Flatten(), nn.Linear(32 * width, 128), nn.GroupNorm(8, 128), nn.SiLU(), nn.Linear(128, latent),
            nn.BatchNorm1d(latent, affine=False),
        )  # fmt: skip


class Block(nn.Module):
    """Two convolutions; between them time and latent scale and shift, one after the other."""

    def __init__(self, width: int, told: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.GroupNorm(4, width)
        self.of_time = nn.Linear(told, 2 * width)
        self.of_latent = nn.Linear(told, 2 * width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, latent: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        for told in (self.of_time(time), self.of_latent(latent)):
            scale, shift = told[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.second(F.silu(h))


class UNet(nn.Module):
    """8 → 4 and back; it knows each place, since the latent is the same at all of them."""

    wave: Tensor

    def __init__(self, width: int, latent: int, told: int = 64):
        super().__init__()
        self.register_buffer("wave", torch.exp(torch.linspace(0, math.log(100), 16)))
        self.time = nn.Sequential(nn.Linear(32, told), nn.SiLU(), nn.Linear(told, told), nn.SiLU())
        self.latent = nn.Sequential(nn.Linear(latent, told), nn.SiLU())
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.place = nn.Parameter(0.5 * torch.randn(width, SIDE, SIDE))
        self.high = Block(width, told)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.low_place = nn.Parameter(0.5 * torch.randn(2 * width, SIDE // 2, SIDE // 2))
        self.low = nn.ModuleList([Block(2 * width, told) for _ in range(2)])
        self.up = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 1), nn.PixelShuffle(2))
        self.last = Block(width, told)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, time_B: Tensor, z: Tensor) -> Tensor:
        angle = time_B[:, None] * self.wave
        time, latent = self.time(torch.cat([angle.sin(), angle.cos()], 1)), self.latent(z)
        high = self.high(self.enter(x) + self.place, time, latent)
        low = self.down(high) + self.low_place
        for block in self.low:
            low = block(low, time, latent)
        return self.leave(self.last(high + self.up(low), time, latent))


class DiffusionAutoencoder(nn.Module):
    def __init__(self, width: int, latent: int, gated: bool = False):
        super().__init__()
        self.encoder = Encoder(width, latent)
        self.denoiser = UNet(width, latent)
        if gated:
            for block in (b for b in self.modules() if isinstance(b, Block)):
                nn.init.zeros_(block.of_latent.weight)
                nn.init.zeros_(block.of_latent.bias)

    def velocity(self, levels: Levels, noised: Tensor, t_B: Tensor, z: Tensor) -> Tensor:
        return levels.guess[t_B].view(-1, 1, 1, 1) * noised + self.denoiser(noised, t_B / levels.count, z)

    def errors(self, levels: Levels, x: Tensor, z: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
        """Each item's mean squared error of the velocity, (B,)."""
        a, s = levels.at(t_B)
        guess = self.velocity(levels, a * x + s * noise, t_B, z)
        return (guess - (a * noise - s * x)).square().flatten(1).mean(1)

    @torch.no_grad()
    def rebuilt(self, levels: Levels, z: Tensor, strides: int = 10) -> Tensor:
        """Pictures (B, 3, S, S) from noise, as the latents say."""
        x = torch.randn(len(z), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        path = torch.linspace(levels.count - 1, 0, strides).round().long()
        clean = x
        for k, t in enumerate(path):
            now = t.expand(len(z))
            a, s = levels.at(now)
            v = self.velocity(levels, x, now, z)
            clean, noise = (a * x - s * v).clamp(LOW, HIGH), s * x + a * v
            if k + 1 < strides:
                a, s = levels.at(path[k + 1].expand(len(z)))
                x = a * clean + s * noise
        return clean


@torch.no_grad()
def follow(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(averaged.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
    for old, new in zip(averaged.buffers(), model.buffers(), strict=True):
        old.copy_(new)


@torch.no_grad()
def probed(encoder: nn.Module, x: Tensor, factors: Tensor, held_out: Tensor, held_factors: Tensor) -> tuple[int, int]:
    """How many attributes of held-out pictures a linear map of their latents says right, and how many there are."""
    z, held_z = encoder(x), encoder(held_out)
    centre, scale = z.mean(0), z.std(0).clamp_min(1e-6)
    z, held_z = (F.pad((k - centre) / scale, (0, 1), value=1.0).double() for k in (z, held_z))
    inverse = torch.linalg.inv(z.T @ z + torch.eye(z.shape[1], dtype=z.dtype))
    right = 0
    for number, known, truth in zip(KINDS, factors.T, held_factors.T, strict=True):
        readout = inverse @ z.T @ F.one_hot(known, number).double()
        right += int(((held_z @ readout).argmax(1) == truth).sum())
    return right, held_factors.numel()


def flipped(x: Tensor) -> Tensor:
    return x.flip(-1) if torch.randint(2, ()) == 1 else x


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(items)[: items // size * size].split(size)


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    up, done = min(1.0, (step + 1) / warmup), min(1.0, step / steps)
    if schedule == "restarts":
        return up * (0.55 + 0.45 * math.cos(math.pi * (4 * done % 1)))
    return up * {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "constant": 1.0}[schedule]


def train(
    folder: Path, seed: int = 0, steps: int = 350, size: int = 32, items: int = 2048, rate: float = 3e-3,
    width: int = 20, latent: int = 16, gated: bool = False, decay: float = 0.98, optimizer: str = "AdamW",
    schedule: str = "cosine", warmup: int = 20, betas: str = "cosine", count: int = 200, bad: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    everything = pictures(items + 384, seed)
    rows = torch.randperm(len(everything.images))
    images, factors = 2 * F.avg_pool2d(everything.images[rows], 2) - 1, everything.factors[rows]
    (x, held_out), (known, held_known) = images.split([items, 384]), factors.split([items, 384])
    levels = Levels({"cosine": cosine, "linear": linear}[betas](count))
    weight = torch.ones(levels.count)

    model = DiffusionAutoencoder(width, latent, gated)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    more = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.01}}.get(optimizer, {})
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    fixed = torch.Generator().manual_seed(0)
    fixed_t = torch.randint(levels.count, (len(held_out),), generator=fixed)
    fixed_noise = torch.randn(held_out.shape, generator=fixed)
    fixed_bin, bins = levels.bin[fixed_t], levels.bin.unique().tolist()
    variance = x.var(0)
    squares = zip(levels.signal**2, levels.noise**2, strict=True)
    linear_T = torch.stack([(variance / (a * variance + s)).mean() for a, s in squares])

    def by_bin(each_N: Tensor) -> dict[str, float]:
        return {f"val/log_snr.{2 * k - 7}/loss": float(each_N[fixed_bin == k].mean()) for k in bins}

    def read(model: Any, probe: Tensor) -> dict[str, dict[str, Measured]]:
        t, eps = fixed_t[: len(probe)], fixed_noise[: len(probe)]
        z = model.encoder(probe)

        def loss(told: Tensor) -> tuple[np.ndarray, np.ndarray]:
            each = model.errors(levels, probe, told, t, eps).double().numpy()
            return each, each

        a, s = levels.at(t)
        own, other = (model.velocity(levels, a * probe + s * eps, t, k).flatten(1) for k in (z, z.roll(1, 0)))
        change = float(((own - other).norm(dim=1) / own.norm(dim=1).clamp_min(1e-12)).mean())
        live, slow = (float(m.errors(levels, probe, m.encoder(probe), t, eps).mean()) for m in (model, averaged))
        gone = [float((nn.utils.parameters_to_vector(m.parameters()) - start).norm()) for m in (averaged, model)]
        costs = trials.cost_of_exchange(loss, z)
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {
                "velocity_change": Reading(change, 0.0, len(probe)),
                "permuted_loss": costs["shuffled"],
            },
            "val/picture": {f"{name}_latent_nats": cost for name, cost in costs.items()},
            "val/ema": {"loss": Reading(slow, live, len(probe)), "moved": Reading(gone[0] / max(gone[1], 1e-12), 1.0)},
            "train/noise": {"terminal_snr": Reading(float(levels.snr[-1]), 0.0)},
        }
        for k in bins:
            part = float(weight[levels.bin == k].sum() / weight.sum())
            found[f"train/log_snr.{2 * k - 7}"] = {"weight": Reading(part, 1 / len(bins))}
        return found

    nulls = {
        "train/loss/velocity": float((weight * linear_T).mean()),
        "val/loss/velocity": float((weight * linear_T)[fixed_t].mean()),
    }
    monitor = Monitor(
        model, optim, folder=folder, taps={"latent": "encoder"}, forward=lambda _, probe: model.encoder(probe),
        probe=held_out[:128], read=read, every=50, log_every=5, steps=steps, nulls=nulls | by_bin(linear_T[fixed_t]),
    )  # fmt: skip
    monitor.audit(
        augmentations={"flip": audits.augmentation(flipped, x[:64])},
        ranges={"pictures": audits.ranges(x, LOW, HIGH)},
        leaks={"pictures": audits.leaks(x.numpy(), held_out.numpy())},
    )
    for step, chosen in zip(range(1, steps + 1), batches(items, size), strict=False):
        model.train()
        batch = flipped(x[chosen]) * (6 if step == bad else 1)
        t = torch.randint(levels.count, (size,))
        z = model.encoder(batch)
        loss = (weight[t] * model.errors(levels, batch, z, t, torch.randn_like(batch))).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step({"velocity": loss}, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        rates.step()
        follow(averaged, model, min(decay, (1 + step) / (10 + step)))
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                each = model.errors(levels, held_out, model.encoder(held_out), fixed_t, fixed_noise)
            monitor.validated({"val/loss/velocity": float((weight[fixed_t] * each).mean())} | by_bin(each))

    with torch.no_grad():
        back = averaged.rebuilt(levels, averaged.encoder(held_out))
    r2 = 1 - float((back - held_out).square().sum() / (held_out - x.mean(0)).square().sum())
    right, asked = probed(averaged.encoder, x[:1024], known[:1024], held_out, held_known)
    chance = sum(1 / number for number in KINDS) / len(KINDS)
    monitor.validated({"val/rebuilt/r2": Reading(r2, 0.0, len(back))})
    monitor.validated({"val/probe/accuracy": share(right, asked, chance)})
    monitor.close()
    return {
        "explained variance of held-out pictures, rebuilt": (r2, 0.0),
        "attributes that a linear probe reads from the latent": (right / asked, chance),
    }


FAMILY = Family(
    "diffae", "development", "a diffusion autoencoder of pictures: an encoder, and a U-Net that is told its latent",
    faults=(
        Fault("time-told-twice",
              "The U-Net's blocks are handed the time in the latent's place as well, which has the same size.",
              ("condition-ignored", "decoder-ignores-latent", "dead-parameters"),
              changes=(Change("time, latent = self.time(torch.cat([angle.sin(), angle.cos()], 1)), self.latent(z)",
                              "time = latent = self.time(torch.cat([angle.sin(), angle.cos()], 1))"),)),
        Fault("group-of-each-feature",
              "The encoder's group norm has as many groups as features, so that each number is normalised by itself.",
              ("latent-ignores-input", "dead-parameters"),
              changes=(Change("nn.GroupNorm(8, 128)", "nn.GroupNorm(128, 128)"),)),
        Fault("encoder-not-in-the-optimizer",
              "The optimizer is that of a plain diffusion model, and holds the U-Net alone.",
              ("not-in-optimizer",),
              changes=(Change("(model.parameters(), lr=rate, **more)",
                              "(model.denoiser.parameters(), lr=rate, **more)"),)),
        Fault("noise-drawn-twice",
              "The noise that is asked for is another draw than the one that was added to the picture.",
              ("no-learning",),
              changes=(Change("(levels, a * x + s * noise, t_B, z)",
                              "(levels, a * x + s * torch.randn_like(x), t_B, z)"),)),
        Fault("average-without-buffers",
              "The average has the parameters alone; the batch norms' running statistics in it are those of the start.",
              ("ema-lag",), minor=True,
              changes=(Change("        old.copy_(new)\n", "        pass\n"),)),
        Fault("clamped-as-for-the-screen",
              "The sampler clamps to [0, 1], as pictures are shown, and they are trained on in [-1, 1].",
              ("range-mismatch",),
              changes=(Change("LOW, HIGH = -1.0, 1.0", "LOW, HIGH = 0.0, 1.0"),)),
        Fault("split-with-replacement",
              "Rows are drawn with replacement before the split, so that many pictures are on both sides of it.",
              ("split-leak",),
              changes=(Change("torch.randperm(len(everything.images))",
                              "torch.randint(len(everything.images), (len(everything.images),))"),)),
        Fault("validated-in-training-mode",
              "model.eval() was forgotten, so held-out pictures change the batch norms' statistics.",
              ("validation-pollutes",), case="J validation-pollutes",
              changes=(Change("            model.eval()\n", ""),)),
        Fault("betas-cut-as-the-linear-ones",
              "The cosine schedule's betas are cut at 0.02, the largest of the linear one, and the end is not noise.",
              ("schedule-mismatch",), minor=True,
              changes=(Change("clamp(max=0.999)", "clamp(max=0.02)"),)),
        Fault("snr-weights-of-another-target",
              "The truncated SNR weights are those of a loss of the picture, and are put on that of the velocity.",
              ("high-noise-starved",),
              changes=(Change("weight = torch.ones(levels.count)", "weight = levels.snr.clamp(min=1.0)"),)),
        Fault("gradients-of-the-u-net-emptied",
              "zero_grad() is called on the U-Net alone, so that those of the encoder are summed up for ever.",
              ("gradients-add-up",),
              changes=(Change("        optim.zero_grad()\n", "        model.denoiser.zero_grad()\n"),)),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 28}),
        Healthy("large-latent", "More directions than pictures have factors.", options={"latent": 48}, seeds=(0, 1)),
        Healthy("gate-begins-at-0", "The encoder has no gradient at first.", options={"gated": True}, seeds=(0, 1)),
        Healthy("sgd", "Momentum alone needs another rate.",
                options={"optimizer": "SGD", "rate": 0.4, "steps": 500}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("adam", options={"optimizer": "Adam", "rate": 2e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 768}, seeds=(0, 1)),
        Healthy("small-batches", options={"size": 16, "rate": 2e-3, "steps": 500}, seeds=(0, 1)),
        Healthy("thousand-levels", "A linear schedule, with most levels nearly pure noise.",
                options={"betas": "linear", "count": 1000}, seeds=(0, 1)),
        Healthy("one-bad-batch", "Its pictures are six times too bright.", options={"bad": 225}, seeds=(0, 1)),
    ),
)  # fmt: skip
