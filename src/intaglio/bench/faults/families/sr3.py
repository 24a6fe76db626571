"""Super-resolution by diffusion as tutorials have it: SR3 (Saharia et al. 2021), of small pictures of shapes.

A small U-Net is given the noisy picture beside the small one, which is enlarged by bicubic interpolation. It predicts
the velocity (Salimans & Ho 2022) at the levels of Nichol & Dhariwal 2021; a second term asks that what it guesses,
made small again, is the small picture. Samples are drawn by an average of the weights.

Shapes: B batch, N items, T noise levels, S = 16 pixels a side, s = S / factor.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, SIDE, Pictures, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import samples
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

HELD_OUT = 256
STEPS = 10
"""In which a picture is drawn."""
EDGES = torch.tensor([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
"""Of bins of log-SNR, whose centres are −7, −5, …, 7."""


def enlarged(small: Tensor) -> Tensor:
    """(B, 3, s, s) → (B, 3, S, S)."""
    return F.interpolate(small, (SIDE, SIDE), mode="bicubic")


def mirrored(large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """A picture and its small one with left and right exchanged, or as they are."""
    coin = torch.rand(len(large), 1, 1, 1) < 0.5
    return torch.where(coin, large.flip(-1), large), torch.where(coin, small.flip(-1), small)


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
        """Levels to train on."""
        return torch.randint(self.count, (size,))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, told: int, dropout: float):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.told = nn.Linear(told, 2 * outputs)
        self.norm = nn.GroupNorm(4, outputs)
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told)[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.second(self.norm(self.first(x)) * (1 + scale) + shift)


class UNet(nn.Module):
    """16 → 8 by patches, 8 → 4, and back; what it is given is also mixed into the answer, by weights for each level."""

    wave: Tensor

    def __init__(self, width: int = 32, dropout: float = 0.0, told: int = 48):
        super().__init__()
        self.register_buffer("wave", torch.exp(torch.linspace(0, math.log(100), 16)))
        self.level = nn.Sequential(nn.Linear(32, told), nn.SiLU(), nn.Linear(told, told), nn.SiLU())
        self.mix = nn.Linear(told, 6)
        self.enter = nn.Conv2d(12, width, 3, padding=1)
        self.high = Block(width, width, told, dropout)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.low = Block(2 * width, 2 * width, told, dropout)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, 3, padding=1))
        self.last = Block(2 * width, width, told, dropout)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 12, 1), nn.PixelShuffle(2))

    def see_two(self) -> None:
        """The first layer is made anew for two pictures, one upon the other."""
        self.enter = nn.Conv2d(24, self.enter.out_channels, 3, padding=1)

    def forward(self, x: Tensor, small: Tensor, time_B: Tensor) -> Tensor:
        angle = time_B[:, None] * self.wave
        told = self.level(torch.cat([angle.sin(), angle.cos()], 1))
        both = torch.cat([x, enlarged(small)], 1)
        high = self.high(self.enter(F.pixel_unshuffle(both, 2)), told)
        low = self.low(self.down(high), told)
        mixed = (self.mix(told)[:, :, None, None] * both).unflatten(1, (2, 3)).sum(1)
        return mixed + self.leave(self.last(torch.cat([high, self.up(low)], 1), told))


def errors(model: nn.Module, levels: Noise, large: Tensor, small: Tensor, t_B: Tensor,
           noise: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each item's mean squared error of the velocity, and of the guess made small, (B,) each."""
    a, s = levels.at(t_B)
    noisy = a * large + s * noise
    velocity = model(noisy, small, t_B / levels.count)
    guess = a * noisy - s * velocity
    again = F.adaptive_avg_pool2d(guess, small.shape[-1])
    wrong = (velocity - (a * noise - s * large)).square().flatten(1).mean(1)
    return wrong, (again - small).square().flatten(1).mean(1)


@torch.no_grad()
def sample(model: nn.Module, levels: Noise, small: Tensor) -> Tensor:
    """Large pictures of small ones, (B, 3, S, S) in [0, 1], by deterministic steps (Song et al. 2021)."""
    x = torch.randn(len(small), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(levels.count - 1, 0, STEPS).round().long()
    for k in range(STEPS):
        now = t[k].expand(len(x))
        a, s = levels.at(now)
        velocity = model(x, small, now / levels.count)
        clean, noise = (a * x - s * velocity).clamp(-1, 1), s * x + a * velocity
        if k < STEPS - 1:
            a, s = levels.at(t[k + 1].expand(len(x)))
            x = a * clean + s * noise
    return (clean + 1) / 2


class Judge(nn.Module):
    """A classifier of real pictures in [0, 1], for all that is in them; its features describe a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(768, 96), nn.SiLU(), nn.Linear(96, 64), nn.SiLU())
        self.heads = nn.ModuleList([nn.Linear(64, n) for n in (3, len(COLOURS), 2, 3, 3)])

    def colour(self, x: Tensor) -> Tensor:
        return self.heads[1](self.features(x)).argmax(1)

    @classmethod
    def trained(cls, known: Pictures, steps: int = 150) -> "Judge":
        judge = cls()
        optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
        for _ in range(steps):
            rows = torch.randint(len(known.images), (128,))
            features = judge.features(known.images[rows])
            said = zip(judge.heads, known.factors[rows].T, strict=True)
            loss = torch.stack([F.cross_entropy(head(features), right) for head, right in said]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return judge.eval()


@torch.no_grad()
def judged(judge: Judge, made: Tensor, real: Tensor, colour: Tensor, train: Tensor) -> panel.Panel:
    """What is drawn from small held-out pictures beside the large ones that these were made of, all in [0, 1]."""
    found = panel.Panel({}, {})
    seen, drawn = judge.features(real), judge.features(made)
    right = [int((judge.colour(x) == colour).sum()) for x in (real, made)]
    clipped = [float(((x < 2 / 255) | (x > 253 / 255)).float().mean()) for x in (made, real)]
    varied = [samples.diversity(seen[colour == k], drawn[colour == k]) for k in range(len(COLOURS))]
    each = [m.value for m in varied if isinstance(m, Reading)]
    found.add("val/judge", {"accuracy": share(right[0], len(real), 1 / len(COLOURS))})
    found.add("val/guidance", {"used": Reading(1.0)})
    found.add("val/guidance.1", {
        "class_accuracy": share(right[1], len(made), 1 / len(COLOURS)),
        "clipped_share": Reading(clipped[0], clipped[1], len(made)),
        "contrast_ratio": Reading(float(made.std((1, 2, 3)).mean() / real.std((1, 2, 3)).mean()), 1.0, len(made)),
        "diversity": Reading(sum(each) / max(1, len(each)), 1.0, len(made)),
    })  # fmt: skip
    found.add("val/samples", {"copied_share": samples.copied_share(judge.features(train), seen, drawn)})
    return found


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(items)[: items // size * size].split(size)


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    if schedule == "plateau":
        return 1.0
    done, up = step / steps, min(1.0, (step + 1) / warmup)
    if schedule == "restarts":
        return up * (0.55 + 0.45 * math.cos(math.pi * (4 * done % 1)))
    return up * {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done}.get(schedule, 1.0)


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 32, items: int = 2048, rate: float = 4e-3,
    width: int = 32, dropout: float = 0.0, decay: float = 0.98, optimizer: str = "AdamW", schedule: str = "cosine",
    warmup: int = 20, count: int = 1000, factor: int = 4, consistency: float = 1.0, ramp: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    whole = pictures(items + HELD_OUT, seed, 0.01)
    scaled, order = whole.images * 2 - 1, torch.randperm(len(whole.images))
    known, unknown = order[HELD_OUT:], order[:HELD_OUT]
    large, held_large = scaled[known], scaled[unknown]
    small, held_small = F.avg_pool2d(large, factor), F.avg_pool2d(held_large, factor)
    truth, colour = whole.images[unknown], whole.factors[unknown, 1]
    judge = Judge.trained(pictures(4096, 20_000 + seed, 0.01))

    levels = Noise(count)
    model = UNet(width, dropout)
    model.see_two()
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))
    patient = torch.optim.lr_scheduler.ReduceLROnPlateau(optim, mode="min", factor=0.2, patience=2)

    fixed = torch.Generator().manual_seed(0)
    fixed_t = torch.linspace(0, count - 1, HELD_OUT).round().long()[torch.randperm(HELD_OUT, generator=fixed)]
    fixed_noise = torch.randn(held_large.shape, generator=fixed)
    fixed_bin = levels.bin[fixed_t]
    bins = fixed_bin.unique().tolist()
    variance = large.var(0)
    squares = zip(levels.signal**2, levels.noise**2, strict=True)
    null_T = torch.stack([(variance / (a * variance + s)).mean() for a, s in squares])
    often = levels.bin[levels.drawn(20_000)]

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, dict[str, Measured]]:
        picture, own = probe
        t, eps = fixed_t[: len(picture)], fixed_noise[: len(picture)]

        def loss(given: Tensor) -> tuple[Any, Any]:
            each = errors(model, levels, picture, given.float(), t, eps)[0].double().numpy()
            return each, each

        a, s = levels.at(t)
        noisy = a * picture + s * eps
        mine, other = (model(noisy, given, t / count).flatten(1) for given in (own, own.roll(1, 0)))
        change = float(((mine - other).norm(dim=1) / mine.norm(dim=1).clamp(min=1e-12)).mean())
        cost = trials.cost_of_exchange(loss, own.double())["shuffled"]
        live, slow = (float(errors(m, levels, picture, own, t, eps)[0].mean()) for m in (model, averaged))
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

    spread = float((small - small.mean(0)).square().mean())
    nulls = {"train/loss/velocity": float(null_T.mean()), "val/loss/velocity": float(null_T[fixed_t].mean())}
    nulls |= {"train/loss/consistency": spread, "val/loss/consistency": spread}
    nulls |= {f"val/log_snr.{2 * k - 7}/loss": float(null_T[fixed_t][fixed_bin == k].mean()) for k in bins}
    monitor = Monitor(
        model, optim, folder=folder, probe=(held_large[:48], held_small[:48]), read=read, every=50, log_every=5,
        steps=steps, nulls=nulls,
    )  # fmt: skip
    monitor.audit(
        augmentations={"mirror": audits.augmentation(lambda x: mirrored(x[None], x[None])[0][0], large[:64])},
        ranges={"pixels": audits.ranges(large, -1.0, 1.0)},
        leaks={"pictures": audits.leaks(large.numpy(), held_large.numpy())},
    )
    for step, rows in zip(range(1, steps + 1), batches(len(large), size), strict=False):
        model.train()
        picture, given = mirrored(large[rows], small[rows])
        t = levels.drawn(size)
        velocity, again = errors(model, levels, picture, given, t, torch.randn(picture.shape))
        weight = consistency * min(1.0, max(0.0, step / ramp - 0.5)) if ramp else consistency
        weighted = {"velocity": (velocity.mean(), 1.0)}
        if consistency:
            weighted["consistency"] = (again.mean(), weight)
        total = torch.stack([w * term for term, w in weighted.values()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, (picture, given))
        optim.step()
        if schedule != "plateau":
            rates.step()
        averaged.update_parameters(model)
        if step % 25 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                wrong, apart = errors(model, levels, held_large, held_small, fixed_t, fixed_noise)
            held = {"velocity": float(wrong.mean())} | ({"consistency": float(apart.mean())} if consistency else {})
            monitor.validated({f"val/loss/{name}": value for name, value in held.items()})
            monitor.validated({f"val/log_snr.{2 * k - 7}/loss": float(wrong[fixed_bin == k].mean()) for k in bins})
            if schedule == "plateau":
                patient.step(held["velocity"])
    made = sample(averaged, levels, held_small)
    found = judged(judge, made, truth, colour, whole.images[known])
    by_hand = (enlarged(F.avg_pool2d(truth, factor)) - truth).square().mean()
    gained = 10 * float((by_hand / (made - truth).square().mean()).log10())
    monitor.validated(found.readings)
    monitor.validated({"val/samples/decibels_over_bicubic": Reading(gained, 0.0, len(made))})
    monitor.close()
    with torch.no_grad():
        error = float(errors(averaged, levels, held_large, held_small, fixed_t, fixed_noise)[0].mean())
    return {
        "decibels by which samples are nearer to the pictures than bicubic enlargements": (gained, 0.0),
        "share of the held-out error that the best linear guess makes, less": (1 - error / float(null_T.mean()), 0.0),
        "samples of the right colour": (found.readings["val/guidance.1/class_accuracy"].value, 1 / len(COLOURS)),
    }


FAMILY = Family(
    "sr3", "development", "super-resolution by diffusion: a small U-Net gets the small picture beside the noisy one",
    faults=(
        Fault("noisy-picture-twice",
              "Upon the noisy picture lies the noisy picture once more, and the small one is given to no layer.",
              ("condition-ignored",), changes=(Change("torch.cat([x, enlarged(small)], 1)", "torch.cat([x, x], 1)"),)),
        Fault("two-loaders-that-shuffle",
              "Large and small pictures come from a loader each, and each shuffles for itself, so no pair is one.",
              ("condition-ignored",), options={"consistency": 0.0},
              changes=(Change("(large[rows], small[rows])", "(large[rows], small[torch.randperm(items)[:size]])"),)),
        Fault("levels-of-the-samplers-steps",
              "Levels to train on are drawn up to the number of the sampler's steps, 10, and not up to all thousand.",
              ("high-noise-starved", "schedule-mismatch"),
              changes=(Change("torch.randint(self.count, (size,))", "torch.randint(STEPS, (size,))"),)),
        Fault("average-over-ten-thousand-steps",
              "The decay of the average is that of a paper with a million steps, and the run has four hundred.",
              ("ema-lag",), minor=True, options={"decay": 0.9999}),
        Fault("plateau-of-a-loss-in-mode-max",
              "The scheduler that waits for a plateau is told that more is better, so the rate falls as the loss does.",
              ("learning-rate-off",), options={"schedule": "plateau"}, changes=(Change('mode="min"', 'mode="max"'),)),
        Fault("first-layer-made-after-the-optimizer",
              "The first layer is made anew for two pictures when the optimizer has taken the old one's weights.",
              ("not-in-optimizer",),
              changes=(Change("    model.see_two()\n", ""),
                       Change("lr=rate, **more)\n", "lr=rate, **more)\n    model.see_two()\n"))),
        Fault("copies-made-before-the-split",
              "Each picture is put on the list four times, to be mirrored anew each time, and then the list is split.",
              ("split-leak",),
              changes=(Change("pictures(items + HELD_OUT, seed, 0.01)",
                              "pictures((items + HELD_OUT) // 4, seed, 0.01)\n"
                              "    whole = Pictures(whole.images.repeat(4, 1, 1, 1), whole.factors.repeat(4, 1))"),)),
        Fault("true-picture-made-small",
              "The second term makes the true picture small, and not the guess, so that it is always 0.",
              ("term-inert",), changes=(Change("avg_pool2d(guess, ", "avg_pool2d(large, "),)),
        Fault("pictures-from-0-to-2",
              "Pictures are doubled and the one that is to be taken off is forgotten, and the sampler clips at 1.",
              ("range-mismatch",), changes=(Change("whole.images * 2 - 1", "whole.images * 2"),)),
        Fault("seed-in-the-augmentation",
              "The mirror sets the seed at each call, so coins, levels and noise are the same in every step.",
              ("augmentation-inert",), minor=True,
              changes=(Change("    coin = ", "    torch.manual_seed(0)\n    coin = "),)),
        Fault("blue-before-red",
              "Small pictures to enlarge are read by a library that puts blue first, and those of training by another.",
              ("unfaithful",),
              changes=(Change("(averaged, levels, held_small)", "(averaged, levels, held_small.flip(1))"),)),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("narrow", options={"width": 16}, seeds=(0, 1)),
        Healthy("radam", options={"optimizer": "RAdam", "rate": 4e-3}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 2e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("adam", options={"optimizer": "Adam", "rate": 2e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("plateau", "The rate falls where the loss stands.", options={"schedule": "plateau"}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 512}, seeds=(0, 1)),
        Healthy("ramp", "The second term's weight is 0 at first.", options={"ramp": 160}, seeds=(0, 1, 2)),
        Healthy("one-term", options={"consistency": 0.0}, seeds=(0, 1)),
        Healthy("dropout", "Held-out losses lie below training's.", options={"dropout": 0.1}, seeds=(0, 1)),
    ),
)  # fmt: skip
