"""A latent world model, a variational recurrent network (Chung et al. 2015): films of a shape that moves and bounces.

The prior is learnt, the KL balanced and given free nats as Hafner et al. 2021 do, and the model is asked for what comes
after the first frames of a film that it has not seen.

Shapes: B clips, T frames of H × W pixels, d latent dimensions, w the width of the state.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_context, cost_of_exchange, distinct_views
from intaglio.history import Measured, Reading

SIDE, LENGTH, SHOWN = 12, 12, 4
ROWS = SIDE - 1
"""The shape moves above the lowest row, which is a lamp that blinks by chance."""


def films(count: int, frames: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, frames, H, W) in {0, 1}, and of each what it begins with, (count, 4): row, column, direction, shape."""
    dice = torch.Generator().manual_seed(seed)
    sizes = (ROWS - 4, SIDE - 4, 4, 3)
    begins = torch.stack([torch.randint(n, (count,), generator=dice) for n in sizes], 1)
    ways = torch.tensor([(-1, -1), (-1, 1), (1, -1), (1, 1)])
    at, way, last = 2 + begins[:, :2], ways[begins[:, 2]], torch.tensor([ROWS - 3, SIDE - 3])
    lamp = torch.rand(count, frames, generator=dice) < 0.5
    shown = []
    for t in range(frames):
        y = torch.arange(SIDE)[None, :, None] - at[:, :1, None]
        x = torch.arange(SIDE)[None, None, :] - at[:, 1:, None]
        square, diamond = (y.abs() <= 2) & (x.abs() <= 2), y.abs() + x.abs() <= 2
        cross = square & ((y == 0) | (x == 0))
        picture = torch.stack([square, diamond, cross])[begins[:, 3], torch.arange(count)]
        picture[:, -1] = lamp[:, t, None]
        shown.append(picture)
        way = torch.where((at + way < 2) | (at + way > last), -way, way)
        at = at + way
    return torch.stack(shown, 1).float(), begins


def windows(whole: Tensor, skip: int, hop: int = 6) -> tuple[Tensor, Tensor]:
    """Clips (N, T, H, W) of every ``skip``-th frame, and the film that each is from, (N,)."""
    starts = torch.arange(0, whole.shape[1] - skip * (LENGTH - 1), hop)
    index = starts[:, None] + skip * torch.arange(LENGTH)
    return whole[:, index].flatten(0, 1), torch.arange(len(whole)).repeat_interleave(len(starts))


def place(frames: Tensor) -> Tensor:
    """Where the shape is: the square of five pixels a side with the most light."""
    return F.avg_pool2d(frames[..., :ROWS, :].flatten(0, 1)[:, None], 5, 1).flatten(1).argmax(1)


def gaussian(numbers: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = numbers.chunk(2, dim=-1)
    return mean, log_variance.clamp(-8, 4)


def draw(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


class WorldModel(nn.Module):
    def __init__(self, width: int = 96, latent: int = 8):
        super().__init__()
        self.width = width
        self.eye = nn.Sequential(nn.Linear(SIDE**2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.prior = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * latent))
        self.posterior = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 2 * latent))
        self.cell = nn.GRUCell(width + latent, width)
        self.decoder = nn.Sequential(nn.Linear(width + latent, 2 * width), nn.SiLU(), nn.Linear(2 * width, SIDE**2))

    def decode(self, state: Tensor, z: Tensor) -> Tensor:
        """Logits (…, H, W) from what was known before a frame and its latent."""
        return self.decoder(torch.cat([state, z], -1)).unflatten(-1, (SIDE, SIDE))

    def advance(self, seen: Tensor, z: Tensor, state: Tensor) -> Tensor:
        return self.cell(torch.cat([seen, z], -1), state)

    def observe(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Of each frame the state before it, its latent, mean and log-variance of posterior and prior; the last state.

        All but the last are (B, T, …).
        """
        seen, state = self.eye(frames.flatten(2)), torch.zeros(len(frames), self.width)
        found = []
        for t in range(frames.shape[1]):
            posterior = gaussian(self.posterior(torch.cat([seen[:, t], state], -1)))
            z = draw(*posterior)
            found.append((state, z, *posterior))
            state = self.advance(seen[:, t], z, state)
        states, *rest = (torch.stack(each, 1) for each in zip(*found, strict=True))
        return states, *rest, *gaussian(self.prior(states)), state

    @torch.no_grad()
    def imagine(self, frames: Tensor, more: int) -> Tensor:
        """What comes after these frames, (B, more, H, W), each frame from those that were imagined before it."""
        state, made = self.observe(frames)[-1], []
        for _ in range(more):
            z = gaussian(self.prior(state))[0]
            made.append(self.decode(state, z).sigmoid())
            state = self.advance(self.eye(made[-1].flatten(1)), z, state)
        return torch.stack(made, 1)

    @torch.no_grad()
    def foresee(self, frames: Tensor) -> Tensor:
        """Each frame as it is expected from the true frames before it, (B, T, H, W)."""
        state, *_, prior, _, _ = self.observe(frames)
        return self.decode(state, prior).sigmoid()


def divergence(mean: Tensor, log_variance: Tensor, other: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL of one Gaussian from another, summed over dimensions."""
    ratio = (log_variance - other_log_variance).exp()
    off = (mean - other).square() / other_log_variance.exp()
    return 0.5 * (ratio + off - 1 - log_variance + other_log_variance).sum(-1)


def nats(logits: Tensor, frames: Tensor) -> Tensor:
    """Of each frame, (…)."""
    return F.binary_cross_entropy_with_logits(logits, frames, reduction="none").sum((-2, -1))


def losses(model: WorldModel, frames: Tensor, balance: float, floor: float) -> dict[str, Tensor]:
    """Nats a frame; ``balance`` is the share of the KL's gradient that the prior gets, 0 for a KL as it stands."""
    state, z, mean, log_variance, other, other_log_variance, _ = model.observe(frames)
    kl = divergence(mean, log_variance, other, other_log_variance)
    if balance:
        to_prior = divergence(mean.detach(), log_variance.detach(), other, other_log_variance)
        to_posterior = divergence(mean, log_variance, other.detach(), other_log_variance.detach())
        kl = balance * to_prior + (1 - balance) * to_posterior
    return {"reconstruction": nats(model.decode(state, z), frames).mean(), "kl": kl.mean().clamp_min(floor)}


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    rise = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    if schedule == "restarts":
        return rise * (0.55 + 0.45 * math.cos(math.pi * (4 * step / steps % 1)))
    return rise * (1 - step / steps if schedule == "linear" else 1.0)


def batches(clips: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(clips)).split(size):
            if len(rows) == size:
                yield clips[rows]


def rollouts(model: WorldModel, clips: Tensor, average: Tensor) -> dict[str, Measured]:
    """What is imagined after the first frames of held-out clips, and what these frames are needed for."""
    context, future = clips[:, :SHOWN], clips[:, SHOWN:]
    right, n = place(future), len(future)

    def share(frames: Tensor) -> float:
        return float((place(frames) == right).double().mean())

    def errors(frames: Tensor) -> Any:
        made = model.imagine(frames, future.shape[1])
        return (made - future).square().sum((2, 3)).mean(1).double().numpy()

    copied = share(context[:, -1:].expand_as(future))
    unmoved = float((average - future).square().sum((2, 3)).mean())
    found: dict[str, Measured] = {
        "accuracy": Reading(share(model.imagine(context, future.shape[1])), copied, n),
        "accuracy_forced": Reading(share(model.foresee(clips)[:, SHOWN:]), copied, n),
        "error": Reading(float(errors(context).mean()), unmoved, n),
        "context_distinct": distinct_views(context[:, 0], context[:, -1]),
    }
    return found | {f"context_{change}": cost for change, cost in cost_of_context(errors, context).items()}


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 32, count: int = 640, rate: float = 6e-3,
    width: int = 96, latent: int = 8, beta: float = 2.0, hold: int = 0, ramp: int = 0, balance: float = 0.0,
    free: float = 0.0, skip: int = 1, clip: float = 5.0, optimizer: str = "AdamW", schedule: str = "constant",
    warmup: int = 20,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    whole, begins = films(count, 30, seed)
    clips, film = windows(whole, skip)
    held = film % 8 == 0
    x, held_out = clips[~held], clips[held][:256]
    average = x.mean((0, 1))
    null = float(nats(average.clamp(1e-3, 1 - 1e-3).logit().expand_as(held_out), held_out).mean())
    floor = free / LENGTH
    known = [m.value for m in map(bottleneck.entropy_nats, begins.T) if isinstance(m, Reading)]
    entropy = sum(known) / LENGTH + math.log(2)

    model = WorldModel(width, latent)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    def read(model: Any, probe: Tensor) -> dict[str, dict[str, Measured]]:
        state, z, mean, log_variance, prior, prior_log_variance, _ = (
            each.flatten(0, 1) if each.ndim == 3 else each for each in model.observe(probe)
        )

        def loss(other: Tensor) -> tuple[Any, Any]:
            each = nats(model.decode(state, other), probe.flatten(0, 1))
            return each.double().numpy(), torch.ones(len(each)).double().numpy()

        found = panel.latents(mean, log_variance)
        in_units = (mean - prior) * (-0.5 * prior_log_variance).exp(), log_variance - prior_log_variance
        found["kl_nats"] = bottleneck.kl_nats(*in_units)
        found["prior_nats"] = bottleneck.aggregate_nats(*in_units)
        found["noise_ratio"] = bottleneck.noise_ratio(z, mean, log_variance)
        found["target_entropy"] = Reading(entropy, None, count)
        found |= {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(loss, z).items()}
        if floor:
            found["kl_charged"] = bottleneck.kl_charged(*in_units, floor, 1)
            found["groups_above_floor"] = bottleneck.groups_above_floor(*in_units, floor, 1)
        return {"val/state": found, "val/rollout": rollouts(model, probe, average)}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:96], read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/reconstruction": null, "val/loss/reconstruction": null},
    )  # fmt: skip
    names = [[str(k).encode() for k in film[side].tolist()] for side in (~held, held)]
    monitor.audit(
        leaks={"a clip of the same film": audits.leaks(*names)}, ranges={"pixels": audits.ranges(x, 0.0, 1.0)}
    )
    for step, batch in enumerate(batches(x, size), 1):
        weight = beta * min(1.0, max(0, step - hold) / ramp) if ramp else beta
        terms = losses(model, batch, balance, floor)
        weighted = {"reconstruction": (terms["reconstruction"], 1.0), "kl": (terms["kl"], weight)}
        monitor.before_backward(weighted)
        total = terms["reconstruction"] + weight * terms["kl"]
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optim.step()
        rates.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                seen = losses(model, held_out, balance, floor)
            monitor.validated({f"val/loss/{name}": float(value) for name, value in seen.items()})
            model.train()
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        rebuilt = float(losses(model, held_out, balance, floor)["reconstruction"])
        found = rollouts(model, held_out, average)
    told = {name: m for name, m in found.items() if isinstance(m, Reading) and m.null is not None}
    error, accuracy = told["error"], told["accuracy"]
    return {
        "share of the mean frame's nats that a held-out frame lacks": (1 - rebuilt / null, 0.0),
        "share of the mean frame's error that open-loop frames lack": (1 - error.value / (error.null or 1.0), 0.0),
        "open-loop frames with the shape in its place, beside copies": (accuracy.value, accuracy.null or 0.0),
    }


FAMILY = Family(
    "worldmodel",
    "development",
    "a latent world model of films, a variational recurrent network with a learnt prior",
    faults=(
        Fault(
            "frame-skip-of-zero",
            "The frame skip is set to 0, which was meant as none, so a clip is one frame twelve times.",
            ("context-order-inert",),
            options={"skip": 0},
            case="J context-order-inert",
        ),
        Fault(
            "imagined-from-a-standard-normal",
            "Rollouts draw their latents from N(0, I), as a VAE would, and not from the prior that was learnt.",
            ("free-running-gap", "prior-mismatch"),
            changes=(Change("z = gaussian(self.prior(state))[0]", "z = torch.randn(len(state), 8)"),),
        ),
        Fault(
            "hold-counted-in-epochs",
            "The KL's weight is held at 0 for sixty epochs where steps were meant, so the prior never learns.",
            ("prior-mismatch", "rate-too-high", "dead-parameters"),
            changes=(Change("max(0, step - hold) / ramp", "max(0, step * size // len(x) - hold) / ramp"),),
            options={"hold": 60, "ramp": 120},
        ),
        Fault(
            "state-not-carried",
            "The cell is called without the state, so each frame begins with an empty memory.",
            ("dead-parameters",),
            changes=(Change("self.cell(torch.cat([seen, z], -1), state)", "self.cell(torch.cat([seen, z], -1))"),),
        ),
        Fault(
            "decoded-from-the-state-after-the-frame",
            "The state is advanced before it is kept, so the decoder has the frame's features beside the latent.",
            ("posterior-collapse",),
            changes=(
                Change(
                    "            found.append((state, z, *posterior))\n"
                    "            state = self.advance(seen[:, t], z, state)\n",
                    "            state = self.advance(seen[:, t], z, state)\n"
                    "            found.append((state, z, *posterior))\n",
                ),
            ),
        ),
        Fault(
            "drawn-at-the-variance",
            "The half before the log-variance was forgotten, so latents are drawn at σ² and charged for σ.",
            ("temperature-misstates-rate",),
            changes=(Change("* (0.5 * log_variance).exp()\n\n\nclass", "* log_variance.exp()\n\n\nclass"),),
            minor=True,
        ),
        Fault(
            "free-nats-of-a-clip-for-each-frame",
            "Free nats that were meant for a whole clip are given to each of its frames.",
            ("kl-free", "dead-parameters"),
            changes=(Change("floor = free / LENGTH", "floor = free"),),
            options={"free": 24.0},
            case="V kl-free",
        ),
        Fault(
            "kl-of-a-clip-beside-the-loss-of-a-frame",
            "The KL is summed over the frames of a clip, and the loss averaged, so it weighs twelve times as much.",
            ("kl-units", "posterior-collapse"),
            changes=(Change("kl.mean().clamp_min(floor)", "kl.sum(1).mean().clamp_min(floor)"),),
        ),
        Fault(
            "warm-up-without-end",
            "The min(1, …) of the warm-up is missing, so the rate goes on rising to twenty times what it should be.",
            ("diverged", "learning-rate-off", "non-finite"),
            changes=(Change("rise = min(1.0, (step + 1) / warmup)", "rise = (step + 1) / warmup"),),
        ),
        Fault(
            "clips-dealt-to-the-splits",
            "Clips and not films are dealt to the splits, and clips of one film overlap.",
            ("split-leak",),
            changes=(Change("held = film % 8 == 0", "held = torch.rand(len(film)) < 1 / 8"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("free-nats", "The KL lies below its free nats at first.", options={"free": 12.0}, seeds=(0, 1)),
        Healthy("held-then-ramped", "The KL has no weight at first.", options={"hold": 60, "ramp": 120}),
        Healthy(
            "balanced-with-restarts",
            "The rate jumps back up four times.",
            options={"balance": 0.6, "beta": 4.0, "schedule": "restarts"},
        ),
        Healthy("sgd", "Momentum alone needs another rate.", options={"optimizer": "SGD", "rate": 0.02}),
        Healthy("rmsprop-cosine", options={"optimizer": "RMSprop", "rate": 3e-3, "schedule": "cosine", "steps": 500}),
        Healthy("slow-start", "The rate rises for a third of the run.", options={"warmup": 130, "optimizer": "Adam"}),
        Healthy("few-films", "A small set of films, seen often.", options={"count": 200, "size": 24}),
    ),
)
