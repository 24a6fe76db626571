"""CycleGAN (Zhu et al. 2017) in small: pictures of night become pictures of day and back, without pairs to learn from.

Shapes: N pictures, S = 16 pixels a side.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, pictures
from intaglio.health import audits
from intaglio.health.monitor import Monitor

HELD_OUT = 256


class Scenes(NamedTuple):
    """Each scene by night, with bright shapes on dark ground, and by day, with dull ones on light ground: twice
    (N, 3, S, S) in [-1, 1]. Only the test knows that they belong together."""

    night: Tensor
    day: Tensor
    colours: Tensor


def scenes(count: int, seed: int) -> Scenes:
    shown = pictures(count, seed, 0.01)
    night = shown.images
    shape = night.amax(1, keepdim=True) > 0.4
    day = torch.where(shape, 0.8 * night, 0.9 - night)
    return Scenes(2 * night - 1, 2 * day - 1, shown.factors[:, 1])


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.InstanceNorm2d(width, affine=True), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Generator(nn.Module):
    """16 → 8, residual blocks, and back."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.enter = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), nn.ReLU())
        self.trunk = nn.Sequential(*[Residual(width) for _ in range(blocks)])
        self.leave = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.trunk(self.enter(x)))


class Translators(nn.Module):
    def __init__(self, width: int = 32, blocks: int = 1):
        super().__init__()
        self.to_day = Generator(width, blocks)
        self.to_night = Generator(width, blocks)

    def forward(self, night: Tensor, day: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_day(night), self.to_night(day)


class Pool:
    """Made pictures of before: half of those that come are exchanged for an older one (Shrivastava et al. 2017)."""

    def __init__(self, size: int):
        self.size = size
        self.kept: list[Tensor] = []

    def exchanged(self, made: Tensor) -> Tensor:
        given = []
        for picture in made.detach():
            if len(self.kept) < self.size:
                self.kept.append(picture)
            elif self.size and torch.rand(()) < 0.5:
                k = int(torch.randint(self.size, ()))
                self.kept[k], picture = picture, self.kept[k]
            given.append(picture)
        return torch.stack(given)


class Critic(nn.Module):
    """A discriminator of patches (Isola et al. 2017), with the pool that it is shown made pictures from."""

    def __init__(self, pool: int, width: int = 16):
        super().__init__()
        self.pool = Pool(pool)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def noisy(x: Tensor, blur: float) -> Tensor:
    return x + blur * torch.randn_like(x)


def fooling(critic: Critic, made: Tensor, blur: float) -> Tensor:
    return (critic(noisy(made, blur)) - 1).square().mean()


def telling_apart(critic: Critic, real: Tensor, made: Tensor, blur: float) -> Tensor:
    of_real, of_made = critic(noisy(real, blur)), critic(noisy(critic.pool.exchanged(made), blur))
    return 0.5 * ((of_real - 1).square().mean() + of_made.square().mean())


def losses(
    model: Translators, of_night: Critic, of_day: Critic, night: Tensor, day: Tensor, blur: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The generators' terms, and the pictures of night and day that were made."""
    made_day, same_day = model.to_day(torch.cat([night, day])).chunk(2)
    made_night, same_night = model.to_night(torch.cat([day, night])).chunk(2)
    terms = {
        "generator": fooling(of_day, made_day, blur) + fooling(of_night, made_night, blur),
        "cycle": F.l1_loss(model.to_night(made_day), night) + F.l1_loss(model.to_day(made_night), day),
        "identity": F.l1_loss(same_day, day) + F.l1_loss(same_night, night),
    }
    return terms, made_night, made_day


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def flipped(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


def rate_at(step: int, steps: int, schedule: str) -> float:
    """The share of the rate: as in the paper it is kept for half of the run, and then falls to 0 on a line."""
    done = min(1.0, step / steps)
    if schedule == "constant":
        return 1.0
    if schedule == "restarts":
        done = 3 * done % 1 if done < 1 else 1.0
    return min(1.0, 2 - 2 * done) if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


def explained(made: Tensor, partner: Tensor, mean: Tensor) -> float:
    """The share of the mean picture's error that the made one does not make; 0 for the mean picture itself."""
    return 1 - float((made - partner).square().mean() / (mean - partner).square().mean())


def tint(x: Tensor) -> Tensor:
    """The direction (N, 3) in which a picture's colour is off its ground's."""
    ground = x.flatten(2).median(2).values[:, :, None, None]
    return F.normalize((x - ground).mean((2, 3)), dim=1)


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 8, items: int = 1024, rate: float = 3e-3,
    critic_rate: float = 1e-3, width: int = 32, blocks: int = 1, cycle: float = 10.0, identity: float = 5.0,
    ramp: int = 0, late: int = 0, early: int = 0, pool: int = 50, blur: float = 0.1, optimizer: str = "Adam",
    schedule: str = "linear",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    whole, others = scenes(items + HELD_OUT, seed), scenes(items, 5_000 + seed)
    order = torch.randperm(items + HELD_OUT)
    known, unknown = order[HELD_OUT:], order[:HELD_OUT]
    nights, days = whole.night[known], others.day
    held_night, held_day, colours = whole.night[unknown], whole.day[unknown], whole.colours[unknown]

    model, of_night, of_day = Translators(width, blocks), Critic(pool), Critic(pool)
    settings = {"betas": (0.5, 0.999)} if "Adam" in optimizer else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **settings)
    critics = [*of_night.parameters(), *of_day.parameters()]
    critic_optim = getattr(torch.optim, optimizer)(critics, lr=critic_rate, **settings)
    rates = [torch.optim.lr_scheduler.LambdaLR(o, lambda k: rate_at(k, steps, schedule)) for o in (optim, critic_optim)]
    spread = sum(
        float((held - x.median(0).values).abs().mean()) for held, x in ((held_night, nights), (held_day, days))
    )

    monitor = Monitor(
        model, optim, folder=folder, taps={"to_day": "to_day.trunk", "to_night": "to_night.trunk"},
        probe=(held_night, held_day), forward=lambda m, probe: m(*probe), every=50, log_every=5, steps=steps,
        nulls={"cycle": spread, "identity": spread},
    )  # fmt: skip
    monitor.audit(
        augmentations={"flip": audits.augmentation(lambda x: flipped(x[None])[0], nights[:64])},
        ranges={"night": audits.ranges(nights, -1.0, 1.0), "day": audits.ranges(days, -1.0, 1.0)},
        leaks={
            "night": audits.leaks(nights.numpy(), held_night.numpy()),
            "day": audits.leaks(days.numpy(), held_day.numpy()),
        },
    )
    for step, (night, day) in enumerate(zip(batches(nights, size), batches(days, size), strict=False), 1):
        model.train()
        night, day = flipped(night), flipped(day)
        weights = {"generator": 1.0, "cycle": cycle, "identity": identity}
        if ramp:
            weights["cycle"] = cycle * min(1.0, step / ramp)
        if early:
            weights["identity"] = identity * max(0.0, 1 - step / early)
        elif step <= late:
            weights["identity"] = 0.0
        terms, made_night, made_day = losses(model, of_night, of_day, night, day, blur)
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        weighted = {name: (term, weights[name]) for name, term in terms.items()}
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, (night, day))
        optim.step()

        apart = telling_apart(of_night, night, made_night, blur) + telling_apart(of_day, day, made_day, blur)
        critic_optim.zero_grad()
        apart.backward()
        critic_optim.step()
        for each in rates:
            each.step()
        if step % 5 == 0:
            monitor.log({"train/loss/discriminator": 0.5 * apart.item()})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms, _, made_day = losses(model, of_night, of_day, held_night, held_day, blur)
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
            monitor.validated({"val/loss/total": sum(weights[name] * float(term) for name, term in terms.items())})
            monitor.validated({"partner_explained": explained(made_day, held_day, days.mean(0))})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        made_day, made_night = model(held_night, held_day)
    tints = torch.stack([tint(days[others.colours == k]).mean(0) for k in range(len(COLOURS))])
    kept = float(((tint(made_day) @ tints.T).argmax(1) == colours).float().mean())
    mean_day, mean_night = days.mean(0), nights.mean(0)
    return {
        "by day, explained beyond the mean picture, beside the untranslated one": (
            explained(made_day, held_day, mean_day), max(0.0, explained(held_night, held_day, mean_day)),
        ),
        "by night, the same": (
            explained(made_night, held_night, mean_night), max(0.0, explained(held_day, held_night, mean_night)),
        ),
        "shapes of night that keep their colour by day": (kept, 1 / len(COLOURS)),
    }  # fmt: skip


FAMILY = Family(
    "cyclegan",
    "development",
    "translation without pairs, by two generators, two discriminators and the way there and back",
    faults=(
        Fault(
            "generators-judged-by-the-pool",
            "Generators too are judged by pictures from the pool, which carry no graph, and learn nothing from it.",
            ("term-inert",),
            changes=(Change("critic(noisy(made, blur)) - 1", "critic(noisy(critic.pool.exchanged(made), blur)) - 1"),),
        ),
        Fault(
            "one-way-not-in-the-optimizer",
            "The optimizer is given the generator of day alone; the one of the way back stays as it was made.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=rate", "(model.to_day.parameters(), lr=rate"),),
        ),
        Fault(
            "schedule-of-epochs",
            "The schedule counts epochs and is stepped after each batch, so that the rate is 0 after three of them.",
            ("learning-rate-off",),
            changes=(Change("rate_at(k, steps, schedule)", "rate_at(k, steps * size // items, schedule)"),),
        ),
        Fault(
            "real-pictures-in-another-range",
            "Discriminators get real pictures in [0, 1] and made ones in [-1, 1]: they need not look further.",
            ("adversary-won", "range-mismatch"),
            changes=(Change("critic(noisy(real, blur))", "critic(noisy((real + 1) / 2, blur))"),),
        ),
        Fault(
            "cycle-weight-forgotten-in-the-sum",
            "The weights are in the log; the loss is the plain sum of the terms.",
            ("weight-not-applied",),
            changes=(
                Change(
                    "torch.stack([weights[name] * term for name, term in terms.items()])",
                    "torch.stack(list(terms.values()))",
                ),
            ),
        ),
        Fault(
            "gradients-never-emptied",
            "The generators' gradients are not emptied; only the discriminators' are.",
            ("gradients-add-up",),
            changes=(Change("        optim.zero_grad()\n", ""),),
        ),
        Fault(
            "sigmoid-for-pictures-from-minus-1",
            "Generators end in a sigmoid, and pictures are scaled to [-1, 1]: no night can be painted.",
            ("range-mismatch",),
            changes=(
                Change("nn.Tanh()", "nn.Sigmoid()"),
                Change("audits.ranges(nights, -1.0, 1.0)", "audits.ranges(nights, 0.0, 1.0)"),
                Change("audits.ranges(days, -1.0, 1.0)", "audits.ranges(days, 0.0, 1.0)"),
            ),
        ),
        Fault(
            "residual-blocks-never-called",
            "The residual blocks are built, and the way through a generator goes past them.",
            ("dead-parameters",),
            changes=(Change("self.leave(self.trunk(self.enter(x)))", "self.leave(self.enter(x))"),),
        ),
        Fault(
            "identity-far-too-heavy",
            "The identity term has a hundred times its weight: each generator is bent on giving back what it gets.",
            ("term-dominates",),
            options={"identity": 500.0},
            minor=True,
        ),
        Fault(
            "held-out-nights-in-training",
            "All nights are trained on; those that were held out are never taken from among them.",
            ("split-leak",),
            changes=(Change("order[HELD_OUT:], order[:HELD_OUT]", "order, order[:HELD_OUT]"),),
        ),
        Fault(
            "rate-a-thousand-times-too-high",
            "The rate is 3 and was to be 3e-3: generators saturate at once and paint one colour for ever.",
            ("no-learning", "diverged", "plateau"),
            options={"rate": 3.0},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("adamw", options={"optimizer": "AdamW"}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1.5e-3, "critic_rate": 5e-4}, seeds=(0, 1)),
        Healthy("cosine", options={"schedule": "cosine"}, seeds=(0, 1)),
        Healthy("constant-rate", "Nothing settles at the end.", options={"schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("cycle-ramp", "The cycle's weight rises, and the total with it.", options={"ramp": 80}, seeds=(0, 1)),
        Healthy(
            "late-identity", "The identity term has weight 0 for the first steps.", options={"late": 30}, seeds=(0, 1)
        ),
        Healthy(
            "identity-fades",
            "Its weight falls to 0 by the middle, and the term may rise again.",
            options={"early": 200},
            seeds=(0, 1),
        ),
        Healthy("no-pool", "Discriminators see the newest pictures alone.", options={"pool": 0}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 160}, seeds=(0, 1)),
        Healthy("large-batch", options={"size": 16, "steps": 300, "width": 24}, seeds=(0, 1)),
    ),
)
