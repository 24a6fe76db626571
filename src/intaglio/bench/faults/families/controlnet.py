"""A control branch for a frozen diffusion model as tutorials have it: ControlNet (Zhang et al. 2023).

A small U-Net learns to predict the velocity (Salimans & Ho 2022) at the levels of Nichol & Dhariwal 2021, without
conditions, and is frozen. A trainable copy of its encoder is given the edges of the picture as well; what comes out is
added to what the frozen decoder is given, through convolutions that begin at zero. An average of the weights draws.

Shapes: B batch, N items, T noise levels, S = 16 pixels a side, D width.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLUMNS, SIDE, Pictures, pictures
from intaglio.health import audits, trials
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

HELD_OUT = 256
STEPS = 10
"""In which a picture is drawn."""
CONTRAST = 0.3
"""From which a pixel of 0 to 1 is on an edge."""
EDGES = torch.tensor([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
"""Of bins of log-SNR, whose centres are −7, −5, …, 7."""


def hints_of(images: Tensor, filled: bool) -> Tensor:
    """Where brightness changes, or where something is: (N, 3, S, S) in [0, 1] → (N, 1, S, S) of 0 and 1."""
    light = images.amax(1, keepdim=True)
    contrast = light if filled else F.max_pool2d(light, 3, 1, 1) + F.max_pool2d(-light, 3, 1, 1)
    return (contrast > CONTRAST).float()


def mirrored(picture: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
    """A picture and its hint with left and right exchanged, or as they are."""
    coin = torch.rand(len(picture), 1, 1, 1) < 0.5
    return torch.where(coin, picture.flip(-1), picture), torch.where(coin, hint.flip(-1), hint)


class Noise:
    """The noise levels: ``signal`` and ``noise`` (T,), their squares adding up to 1."""

    def __init__(self, count: int):
        t = torch.arange(count + 1, dtype=torch.float64) / count
        left = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        kept = (left[1:] / left[:-1]).clamp(min=0.001).cumprod(0)
        self.count, self.snr = count, (kept / (1 - kept)).float()
        self.signal, self.noise = kept.sqrt().float(), (1 - kept).sqrt().float()
        self.bin = torch.bucketize(self.snr.log(), EDGES)

    def at(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.signal[t_B].view(-1, 1, 1, 1), self.noise[t_B].view(-1, 1, 1, 1)

    def drawn(self, size: int) -> Tensor:
        """Levels to train the branch on."""
        return torch.randint(self.count, (size,))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, told: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.told = nn.Linear(told, 2 * outputs)
        self.norm = nn.GroupNorm(4, outputs)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told)[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.second(self.norm(self.first(x)) * (1 + scale) + shift)


class Encoder(nn.Module):
    """16 → 8 by patches, and 8 → 4: features (B, D, 8, 8) and (B, 2D, 4, 4), and the level as it is told."""

    wave: Tensor

    def __init__(self, width: int, told: int):
        super().__init__()
        self.register_buffer("wave", torch.exp(torch.linspace(0, math.log(100), 16)))
        self.level = nn.Sequential(nn.Linear(32, told), nn.SiLU(), nn.Linear(told, told), nn.SiLU())
        self.enter = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1))
        self.high = Block(width, width, told)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.low = Block(2 * width, 2 * width, told)

    def forward(self, x: Tensor, time_B: Tensor, hint: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        angle = time_B[:, None] * self.wave
        told = self.level(torch.cat([angle.sin(), angle.cos()], 1))
        entered = self.enter(x) if hint is None else self.enter(x) + hint
        high = self.high(entered, told)
        return high, self.low(self.down(high), told), told


class UNet(nn.Module):
    def __init__(self, width: int, told: int = 48):
        super().__init__()
        self.encoder = Encoder(width, told)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, 3, padding=1))
        self.last = Block(2 * width, width, told)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 12, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor, time_B: Tensor, added: tuple[Tensor, Tensor] | None = None) -> Tensor:
        high, low, told = self.encoder(x, time_B)
        if added is not None:
            high, low = high + added[0], low + added[1]
        return self.leave(self.last(torch.cat([high, self.up(low)], 1), told))


def zeroed(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Control(nn.Module):
    """A copy of the encoder that is told a hint (B, 1, S, S), and what is to be added to the encoder's features."""

    def __init__(self, base: UNet, width: int):
        super().__init__()
        self.encoder = copy.deepcopy(base.encoder)
        first, second = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, width, 3, padding=1)
        self.hint = nn.Sequential(nn.PixelUnshuffle(2), first, nn.SiLU(), second)
        zeroed(self.hint[-1])
        self.to_high, self.to_low = zeroed(nn.Conv2d(width, width, 1)), zeroed(nn.Conv2d(2 * width, 2 * width, 1))

    def forward(self, x: Tensor, hint: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        high, low, _ = self.encoder(x, time_B, self.hint(hint))
        return self.to_high(high), self.to_low(low)


class Controlled(nn.Module):
    """A frozen model and its control branch."""

    def __init__(self, base: UNet, width: int):
        super().__init__()
        self.base, self.control = base, Control(base, width)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor, time_B: Tensor, hint: Tensor) -> Tensor:
        return self.base(x, time_B, self.control(x, hint, time_B))


def errors(model: nn.Module, levels: Noise, x: Tensor, t_B: Tensor, noise: Tensor, *hint: Tensor) -> Tensor:
    """Each item's mean squared error of the velocity, (B,)."""
    a, s = levels.at(t_B)
    velocity = model(a * x + s * noise, t_B / levels.count, *hint)
    return (velocity - (a * noise - s * x)).square().flatten(1).mean(1)


def pretrained(known: Tensor, levels: Noise, width: int, steps: int, size: int = 32) -> dict[str, Tensor]:
    """The checkpoint of a model without conditions."""
    unet = UNet(width)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=4e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: rate_at(k, steps, "cosine", 20))
    for _, rows in zip(range(steps), batches(len(known), size), strict=False):
        t = torch.randint(levels.count, (size,))
        loss = errors(unet, levels, known[rows], t, torch.randn(known[rows].shape)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return unet.state_dict()


@torch.no_grad()
def sample(model: nn.Module, levels: Noise, hint: Tensor) -> Tensor:
    """Pictures to hints, (B, 3, S, S) in [0, 1], by deterministic steps (Song et al. 2021)."""
    x = torch.randn(len(hint), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(levels.count - 1, 0, STEPS).round().long()
    for k in range(STEPS):
        now = t[k].expand(len(x))
        a, s = levels.at(now)
        velocity = model(x, now / levels.count, hint)
        clean, noise = (a * x - s * velocity).clamp(-1, 1), s * x + a * velocity
        if k < STEPS - 1:
            a, s = levels.at(t[k + 1].expand(len(x)))
            x = a * clean + s * noise
    return (clean + 1) / 2


def judge_of(known: Pictures, steps: int = 150) -> nn.Module:
    """A classifier of real pictures in [0, 1] by the column that the shape stands in."""
    judge = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.SiLU(), nn.Linear(64, len(COLUMNS)))
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(known.images), (128,))
        loss = F.cross_entropy(judge(known.images[rows]), known.factors[rows, 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def in_column(judge: nn.Module, images: Tensor, column: Tensor) -> Reading:
    """The share of pictures whose shape stands in this column."""
    return share(int((judge(images).argmax(1) == column).sum()), len(images), 1 / len(COLUMNS))


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(items)[: items // size * size].split(size)


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    done, up = step / steps, min(1.0, (step + 1) / warmup)
    if schedule == "restarts":
        return up * (0.55 + 0.45 * math.cos(math.pi * (4 * done % 1)))
    return up * {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done}.get(schedule, 1.0)


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 32, items: int = 2048, rate: float = 4e-3,
    width: int = 24, decay: float = 0.98, optimizer: str = "AdamW", schedule: str = "cosine", warmup: int = 30,
    count: int = 200, drop: float = 0.0, filled: bool = False, base_steps: int = 240,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    judge = judge_of(pictures(4096, 20_000 + seed, 0.01))
    levels = Noise(count)
    state = pretrained(pictures(2048, 30_000 + seed, 0.01).images * 2 - 1, levels, width, base_steps)

    whole = pictures(items + HELD_OUT, seed, 0.01)
    scaled, hints = whole.images * 2 - 1, hints_of(whole.images, filled)
    order = torch.randperm(len(scaled))
    known, unknown = order[HELD_OUT:], order[:HELD_OUT]
    x, hint, held_x, held_hint = scaled[known], hints[known], scaled[unknown], hints[unknown]

    base = UNet(width)
    base.load_state_dict(state, strict=False)
    model = Controlled(base, width)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.control.parameters(), lr=rate, **more)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    fixed = torch.Generator().manual_seed(0)
    fixed_t = torch.linspace(0, count - 1, HELD_OUT).round().long()[torch.randperm(HELD_OUT, generator=fixed)]
    fixed_noise = torch.randn(held_x.shape, generator=fixed)
    fixed_bin = levels.bin[fixed_t]
    bins = fixed_bin.unique().tolist()
    often = levels.bin[levels.drawn(20_000)]
    with torch.no_grad():
        alone = errors(base, levels, held_x, fixed_t, fixed_noise)
        alone_in_training = errors(base, levels, x[:512], levels.drawn(512), torch.randn(512, 3, SIDE, SIDE))

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, dict[str, Measured]]:
        picture, own = probe
        t, eps = fixed_t[: len(picture)], fixed_noise[: len(picture)]

        def loss(given: Tensor) -> tuple[Any, Any]:
            each = errors(model, levels, picture, t, eps, given.float()).double().numpy()
            return each, each

        a, s = levels.at(t)
        noisy = a * picture + s * eps
        mine, other = (model(noisy, t / count, given).flatten(1) for given in (own, own.roll(1, 0)))
        change = float(((mine - other).norm(dim=1) / mine.norm(dim=1).clamp(min=1e-12)).mean())
        cost = trials.cost_of_exchange(loss, own.double())["shuffled"]
        live, slow = (float(errors(m, levels, picture, t, eps, own).mean()) for m in (model, averaged))
        gone = [float((nn.utils.parameters_to_vector(m.parameters()) - start).norm()) for m in (averaged, model)]
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {"velocity_change": Reading(change, 0.0, len(picture)), "permuted_loss": cost},
            "val/ema": {
                "loss": Reading(slow, live, len(picture)),
                "moved": Reading(gone[0] / max(gone[1], 1e-12), 1.0),
                "averaged_buffers": Reading(0.0, 0.0),
            },
            "train/noise": {"terminal_snr": Reading(float(levels.snr[-1]), 0.0)},
        }
        for k in bins:
            part = float((often == k).float().mean())
            found[f"train/log_snr.{2 * k - 7}"] = {"weight": Reading(part, 1 / len(bins))}
        return found

    nulls = {"train/loss/velocity": float(alone_in_training.mean()), "val/loss/velocity": float(alone.mean())}
    nulls |= {f"val/log_snr.{2 * k - 7}/loss": float(alone[fixed_bin == k].mean()) for k in bins}
    monitor = Monitor(
        model, optim, folder=folder, probe=(held_x[:64], held_hint[:64]), read=read, every=50, log_every=5,
        steps=steps, nulls=nulls,
    )  # fmt: skip
    monitor.audit(
        augmentations={"mirror": audits.augmentation(lambda x: mirrored(x[None], x[None])[0][0], x[:64])},
        ranges={"pixels": audits.ranges(x, -1.0, 1.0)},
        leaks={"pictures": audits.leaks(x.numpy(), held_x.numpy())},
        loaded=audits.loaded(base, state),
    )
    for step, rows in zip(range(1, steps + 1), batches(len(x), size), strict=False):
        model.train()
        picture, given = mirrored(x[rows], hint[rows])
        dropped = torch.rand(size, 1, 1, 1) < drop
        given = torch.where(dropped, torch.zeros_like(given), given)
        loss = errors(model, levels, picture, levels.drawn(size), torch.randn(picture.shape), given).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step({"velocity": loss}, (picture, given))
        optim.step()
        rates.step()
        averaged.update_parameters(model)
        if step % 5 == 0:
            monitor.log({"train/condition/dropped_share": float(dropped.float().mean())})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                wrong = errors(model, levels, held_x, fixed_t, fixed_noise, held_hint)
            monitor.validated({"val/loss/velocity": float(wrong.mean())})
            monitor.validated({f"val/log_snr.{2 * k - 7}/loss": float(wrong[fixed_bin == k].mean()) for k in bins})
    made = sample(averaged, levels, held_hint)
    column = whole.factors[unknown, 4]
    right = in_column(judge, made, column)
    monitor.validated({
        "val/guidance/used": Reading(1.0),
        "val/guidance.1/class_accuracy": right,
        "val/judge/accuracy": in_column(judge, whole.images[unknown], column),
    })  # fmt: skip
    monitor.close()
    with torch.no_grad():
        both = (held_hint, held_hint.roll(1, 0))
        own, other = (float(errors(averaged, levels, held_x, fixed_t, fixed_noise, h).mean()) for h in both)
    return {
        "share of the held-out loss with another picture's hint that its own one saves": (1 - own / other, 0.0),
        "share of the frozen model's held-out loss that the branch saves": (1 - own / float(alone.mean()), 0.0),
        "samples in the column of their hint": (right.value, 1 / len(COLUMNS)),
    }


FAMILY = Family(
    "controlnet", "judged", "a control branch that tells a frozen diffusion model where the edges of a picture are",
    faults=(
        Fault("optimizer-of-the-copy-alone",
              "The optimizer is given the copy alone, so what begins at zero stays there, and nothing ever comes out.",
              ("not-in-optimizer",),
              changes=(Change("(model.control.parameters(), lr", "(model.control.encoder.parameters(), lr"),)),
        Fault("hint-network-zeroed-as-a-whole",
              "All of the hint's network begins at zero, and not its last layer alone, so no weight of it ever moves.",
              ("dead-parameters",), changes=(Change("self.hint[-1]", "self.hint"),)),
        Fault("threshold-for-pixels-up-to-255",
              "Edges are where contrast is above 100, for pixels up to 255, and these go up to 1: all hints are empty.",
              ("condition-ignored", "dead-parameters"), changes=(Change("CONTRAST = 0.3", "CONTRAST = 100.0"),)),
        Fault("black-lines-on-white",
              "Hints to draw from are black lines on white, as people draw them, and those of training white on black.",
              ("unfaithful",),
              changes=(Change("sample(averaged, levels, held_hint)", "sample(averaged, levels, 1 - held_hint)"),)),
        Fault("average-of-itself",
              "The average is updated with its own weights and not with the model's, so samples know of no hint.",
              ("ema-lag",),
              changes=(Change("averaged.update_parameters(model)", "averaged.update_parameters(averaged.module)"),)),
        Fault("checkpoint-of-a-wrapped-model",
              "All keys of the checkpoint begin with “module.”, strict=False is silent, and what is frozen is random.",
              ("partial-load",),
              changes=(Change("return unet.state_dict()",
                              'return {f"module.{k}": v for k, v in unet.state_dict().items()}'),)),
        Fault("encoder-not-copied",
              "The branch holds the frozen model's encoder itself and not a copy, so it is frozen with it.",
              ("tied-and-frozen",), minor=True, changes=(Change("copy.deepcopy(base.encoder)", "base.encoder"),)),
        Fault("schedule-stepped-at-each-look",
              "The schedule is stepped at each look at held-out pictures and not at each step: it never gets warm.",
              ("learning-rate-off",),
              changes=(Change("        rates.step()\n        averaged",
                              "        if step % 50 == 0:\n            rates.step()\n        averaged"),)),
        Fault("levels-of-the-samplers-steps",
              "Levels to train on are drawn up to the number of the sampler's steps, 10, and not up to all of them.",
              ("high-noise-starved", "schedule-mismatch"),
              changes=(Change("torch.randint(self.count, (size,))", "torch.randint(STEPS, (size,))"),)),
        Fault("held-out-pictures-not-taken-out",
              "The held-out pictures are the first of the list, and training goes through all of the list.",
              ("split-leak",), options={"items": 768},
              changes=(Change("known, unknown = order[HELD_OUT:]", "known, unknown = order"),)),
        Fault("gradients-of-the-frozen-model-emptied",
              "Gradients of the frozen model are set to zero, which has none, and those of the branch add up.",
              ("gradients-add-up",), changes=(Change("optim.zero_grad()", "model.base.zero_grad()"),)),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("narrow", options={"width": 16}, seeds=(0, 1)),
        Healthy("adam", options={"optimizer": "Adam", "rate": 3e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 2e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("sgd", "Momentum alone needs another rate.", options={"optimizer": "SGD", "rate": 0.4}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 512}, seeds=(0, 1)),
        Healthy("small-batches", "The loss is of few pictures and jumps.", options={"size": 16}, seeds=(0, 1)),
        Healthy("thousand-levels", options={"count": 1000}, seeds=(0, 1)),
        Healthy("layout", "Hints are filled, and no lines.", options={"filled": True}, seeds=(0, 1)),
        Healthy("late", "Its rate is warmed up for long, so that it leaves the frozen model's loss late.",
                options={"warmup": 120, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("some-hints-dropped", options={"drop": 0.15}, seeds=(0, 1)),
    ),
)  # fmt: skip
