"""A variational recurrent network (Chung et al. 2015) of handwriting, letter by letter, with a learned prior.

A writer has a hand (slant and height), and a language says which letters may follow which; the model has to keep
the one in mind and to draw the other. Asked for is what it writes after the first letters of a line.

Shapes: B lines, T letters of P numbers (offsets of the pen, x and y), d latent dimensions, w the width of the state.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_context, cost_of_exchange
from intaglio.history import Measured, Reading

POINTS, LETTERS, LENGTH, SHOWN = 8, 6, 8, 3
SLANTS, HEIGHTS, WIDTH = torch.tensor([-0.6, 0.0, 0.6]), torch.tensor([7.0, 12.0, 20.0]), 12.0
NOISE = 0.3
"""Of each offset, in pixels."""
FOLLOWERS = torch.tensor([[1, 2], [3, 4], [4, 5], [0, 2], [5, 0], [1, 3]])
"""The two letters that may follow each."""


def alphabet() -> Tensor:
    """Offsets (LETTERS, POINTS, 2) of letters of height and width 1."""
    t = torch.linspace(0, 1, POINTS + 1)
    turn = 2 * math.pi * t
    curves = [
        (t, turn.sin()), (t, (turn / 2).sin()), (t, -(turn / 2).sin()), (t, (2 * turn).sin() / 2),
        (t + 0.4 * turn.sin(), (1 - turn.cos()) / 2), (t, 1 - (4 * t % 2 - 1).abs()),
    ]  # fmt: skip
    return torch.stack([torch.stack(curve, 1) for curve in curves]).diff(dim=1)


def written_by(letter: Tensor, hand: Tensor) -> Tensor:
    """Letters (…) by a hand (…, 2) as offsets in pixels, (…, P)."""
    x, y = alphabet()[letter].unbind(-1)
    slant, height = SLANTS[hand[..., :1]], HEIGHTS[hand[..., 1:]]
    return torch.cat([WIDTH * x + slant * height * y, height * y], -1)


def corpus(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lines (count, T, P) in pixels, their letters (count, T) and hands (count, 2); few hands are large."""
    dice = torch.Generator().manual_seed(seed)
    slant = torch.randint(len(SLANTS), (count,), generator=dice)
    height = torch.multinomial(torch.tensor([0.45, 0.45, 0.1]), count, replacement=True, generator=dice)
    hand = torch.stack([slant, height], 1)
    said = [torch.randint(LETTERS, (count,), generator=dice)]
    for _ in range(LENGTH - 1):
        said.append(FOLLOWERS[said[-1], torch.randint(2, (count,), generator=dice)])
    letters = torch.stack(said, 1)
    lines = written_by(letters, hand[:, None].expand(-1, LENGTH, -1))
    return lines + NOISE * torch.randn(lines.shape, generator=dice), letters, hand


def deciphered(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The letter and the hand, (…) and (…, 2), that come nearest to what is written."""
    sizes = (LETTERS, len(SLANTS), len(HEIGHTS))
    all_of_them = torch.cartesian_prod(*(torch.arange(n) for n in sizes))
    shapes = written_by(all_of_them[:, 0], all_of_them[:, 1:])
    found = all_of_them[torch.cdist(pixels.flatten(0, -2), shapes).argmin(1)].unflatten(0, pixels.shape[:-1])
    return found[..., 0], found[..., 1:]


def allowed(pixels: Tensor, before: Tensor, hand: Tensor) -> float:
    """The share of letters (B, T, P) that may follow those before them, (B, T), and are in the line's hand, (B, 2)."""
    letter, by = deciphered(pixels)
    return float(((FOLLOWERS[before] == letter[..., None]).any(-1) & (by == hand[:, None]).all(-1)).double().mean())


def balanced(rows: Tensor, group: Tensor) -> Tensor:
    """The rows, those of smaller groups several times, so that each group is as frequent."""
    parts = [rows[group[rows] == k] for k in group.unique()]
    most = max(map(len, parts))
    each = torch.cat([part.repeat(round(most / len(part))) for part in parts])
    return each[torch.randperm(len(each))]


def gaussian(numbers: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = numbers.chunk(2, dim=-1)
    return mean, log_variance.clamp(-8, 6)


def draw(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def mlp(inside: int, width: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, width), nn.SiLU(), nn.Linear(width, outside))


class VRNN(nn.Module):
    def __init__(self, scale: float, width: int, latent: int):
        super().__init__()
        self.scale = scale
        self.start = nn.Parameter(torch.zeros(width))
        self.see = nn.Sequential(mlp(2 * POINTS, width, width), nn.SiLU())
        self.take = nn.Sequential(nn.Linear(latent, width), nn.SiLU())
        self.prior = mlp(width, width, 2 * latent)
        self.posterior = mlp(2 * width, width, 2 * latent)
        self.decoder = mlp(2 * width, 2 * width, 2 * POINTS)
        self.log_deviation = nn.Parameter(torch.zeros(2 * POINTS))
        self.cell = nn.GRUCell(2 * width, width)

    def decode(self, state: Tensor, z: Tensor) -> Tensor:
        """The mean of a letter."""
        letter: Tensor = self.decoder(torch.cat([self.take(z), state], -1))
        return letter

    def advance(self, seen: Tensor, z: Tensor, state: Tensor) -> Tensor:
        after: Tensor = self.cell(torch.cat([seen, self.take(z)], -1), state)
        return after

    def observe(self, lines: Tensor) -> tuple[Tensor, ...]:
        """Of each letter the state before it, its latent, mean and log-variance of posterior and prior; the last state.

        All but the last are (B, T, …).
        """
        seen, state = self.see(lines), self.start.expand(len(lines), -1)
        found = []
        for t in range(lines.shape[1]):
            posterior = gaussian(self.posterior(torch.cat([seen[:, t], state], -1)))
            z = draw(*posterior)
            found.append((state, z, *posterior))
            state = self.advance(seen[:, t], z, state)
        states, *rest = (torch.stack(each, 1) for each in zip(*found, strict=True))
        return states, *rest, *gaussian(self.prior(states)), state

    def nll(self, lines: Tensor, state: Tensor, z: Tensor) -> Tensor:
        """Nats of each letter, (…)."""
        off = (lines - self.decode(state, z)) / self.log_deviation.exp()
        return (0.5 * off.square() + self.log_deviation + 0.5 * math.log(2 * math.pi)).sum(-1)

    @torch.no_grad()
    def write(self, lines: Tensor, more: int) -> Tensor:
        """What comes after these letters, (B, more, P) in pixels, each from those that were written before it."""
        state, made = self.observe(lines)[-1], []
        for _ in range(more):
            z = draw(*gaussian(self.prior(state)))
            letter = self.decode(state, z)
            made.append(letter * self.scale)
            state = self.advance(self.see(letter), z, state)
        return torch.stack(made, 1)

    @torch.no_grad()
    def expect(self, lines: Tensor) -> Tensor:
        """Each letter as the prior has it after the true letters before it, (B, T, P) in pixels."""
        state, *_, mean, log_variance, _ = self.observe(lines)
        return self.decode(state, draw(mean, log_variance)) * self.scale


def divergence(mean: Tensor, log_variance: Tensor, other: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL of one Gaussian from another, summed over dimensions."""
    ratio = (log_variance - other_log_variance).exp()
    off = (mean - other).square() / other_log_variance.exp()
    return 0.5 * (ratio + off - 1 - log_variance + other_log_variance).sum(-1)


def losses(model: VRNN, lines: Tensor, free: float) -> dict[str, Tensor]:
    """Nats a letter; ``free`` are the free nats of each."""
    state, z, mean, log_variance, *prior, _ = model.observe(lines)
    kl = divergence(mean, log_variance, *prior).mean()
    return {"nll": model.nll(lines, state, z).mean(), "kl": kl.clamp_min(free) if free else kl}


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    rise = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    if schedule == "restarts":
        return rise * (0.55 + 0.45 * math.cos(math.pi * (4 * step / steps % 1)))
    return rise


def train(
    folder: Path, seed: int = 0, steps: int = 500, size: int = 48, count: int = 3072, rate: float = 0.01,
    width: int = 64, latent: int = 8, beta: float = 1.0, hold: int = 0, ramp: int = 150, free: float = 0.0,
    clip: float = 5.0, odd: int = 0, optimizer: str = "Adam", schedule: str = "cosine",
    warmup: int = 1,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    pixels, letters, hands = corpus(count, seed)
    rows = torch.randperm(len(pixels))
    held, kept = rows[: count // 8], rows[count // 8 :]
    kept = balanced(kept, hands[:, 1])
    scale = float(pixels[kept].std())
    x, held_out, letters, hands = pixels[kept] / scale, pixels[held] / scale, letters[held], hands[held]
    mean, deviation = x.mean((0, 1)), x.std((0, 1))
    null = -float(torch.distributions.Normal(mean, deviation).log_prob(held_out).sum(-1).mean())
    known = [bottleneck.entropy_nats(column) for column in (letters[:, 0], *hands.T)]
    entropy = (sum(m.value for m in known if isinstance(m, Reading)) + (LENGTH - 1) * math.log(2)) / LENGTH

    model = VRNN(scale, width, latent)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    plan: Any = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))
    if schedule == "exponential":
        plan = torch.optim.lr_scheduler.ExponentialLR(optim, 0.85)

    def handwriting(model: Any, lines: Tensor) -> dict[str, Measured]:
        """How much of what is written can be read as that language in that hand; null: that of other lines."""
        said, by, n = letters[: len(lines)], hands[: len(lines)], len(lines)
        made = model.write(lines[:, :SHOWN], LENGTH - SHOWN)
        before = torch.cat([said[:, SHOWN - 1 : SHOWN], deciphered(made)[0][:, :-1]], 1)
        strangers = allowed(lines[:, SHOWN:].roll(1, 0) * scale, said[:, SHOWN - 1 : -1], by)
        forced = allowed(model.expect(lines)[:, SHOWN:], said[:, SHOWN - 1 : -1], by)
        return {
            "accuracy": Reading(allowed(made, before, by), strangers, n),
            "accuracy_forced": Reading(forced, strangers, n),
        }

    def read(model: Any, probe: Tensor) -> dict[str, dict[str, Measured]]:
        state, z, mean, log_variance, other, width_of_other = (x.flatten(0, 1) for x in model.observe(probe)[:-1])
        in_units = (mean - other) * (-0.5 * width_of_other).exp(), log_variance - width_of_other

        def of_latent(other: Tensor) -> tuple[Any, Any]:
            each = model.nll(probe.flatten(0, 1), state, other)
            return each.double().numpy(), torch.ones(len(each)).double().numpy()

        def of_context(context: Tensor) -> Any:
            lines = torch.cat([context, probe[:, SHOWN:]], 1)
            state, z, mean, log_variance, *prior, _ = model.observe(lines)
            bound = model.nll(lines, state, z) + divergence(mean, log_variance, *prior)
            return bound[:, SHOWN:].mean(1).double().numpy()

        letter = panel.latents(*in_units)
        letter["prior_nats"] = bottleneck.aggregate_nats(*in_units)
        letter["target_entropy"] = Reading(entropy, None, len(held_out))
        letter |= {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(of_latent, z).items()}
        if free:
            letter["kl_charged"] = bottleneck.kl_charged(*in_units, free, 1)
            letter["groups_above_floor"] = bottleneck.groups_above_floor(*in_units, free, 1)
        costs = cost_of_context(of_context, probe[:, :SHOWN])
        written = handwriting(model, probe) | {f"context_{change}": cost for change, cost in costs.items()}
        return {"val/letter": letter, "val/written": written}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:64], read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/nll": null, "val/loss/nll": null},
    )  # fmt: skip
    monitor.audit(leaks={"the very same line": audits.leaks([k.numpy() for k in x], [k.numpy() for k in held_out])})
    lines_of: Any = x
    loader = DataLoader(lines_of, size, shuffle=True, drop_last=True, collate_fn=torch.stack)
    turn = len(loader) if schedule == "exponential" else 1
    step = 0
    while step < steps:
        for batch in loader:
            step += 1
            lines = -2 * batch if step == odd else batch
            weight = beta * min(1.0, max(0, step - hold) / ramp) if ramp else beta
            terms = losses(model, lines, free)
            weighted = {"nll": (terms["nll"], 1.0), "kl": (terms["kl"], weight)}
            monitor.before_backward(weighted)
            total = terms["nll"] + weight * terms["kl"]
            optim.zero_grad()
            total.backward()
            monitor.step({**weighted, "total": total}, lines)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optim.step()
            if step % turn == 0:
                plan.step()
            if step % 50 == 0:
                with torch.no_grad():
                    z, mean, log_variance = (each.flatten(0, 1) for each in model.observe(lines)[1:4])
                noise = bottleneck.noise_ratio(z, mean, log_variance)
                monitor.log({"train/letter/noise_ratio": noise} if isinstance(noise, Reading) else {})
                model.eval()
                with monitor.validation(), torch.no_grad():
                    seen = losses(model, held_out, free)
                monitor.validated({f"val/loss/{name}": float(value) for name, value in seen.items()})
                model.train()
            if step == steps:
                break
    monitor.close()
    model.eval()
    with torch.no_grad():
        seen = losses(model, held_out, 0.0)
        able = [(m.value, m.null or 0.0) for m in handwriting(model, held_out).values() if isinstance(m, Reading)]
    return {
        "nats of a held-out letter that the bound saves": (null - float(seen["nll"] + seen["kl"]), 0.0),
        "letters written on that language and hand allow": able[0],
        "letters after true ones that language and hand allow": able[1],
    }


FAMILY = Family(
    "vrnn",
    "development",
    "a variational recurrent network of handwriting, with a learnt prior",
    faults=(
        Fault(
            "kl-to-a-standard-normal",
            "The KL was copied from a VAE, so it is that from N(0, I), and the prior that is sampled never learns.",
            ("dead-parameters",),
            changes=(Change("variance, *prior).mean()", "variance, torch.zeros(()), torch.zeros(())).mean()"),),
        ),
        Fault(
            "pixels-fed-back",
            "What was written is scaled to pixels to be shown, and in pixels it is given back to the network.",
            ("free-running-gap",),
            changes=(
                Change("letter = self.decode(state, z)\n", "letter = self.decode(state, z) * self.scale\n"),
                Change("made.append(letter * self.scale)", "made.append(letter)"),
            ),
        ),
        Fault(
            "posterior-of-the-state-alone",
            "The posterior is given the state twice, where it was meant to be given the letter and the state.",
            ("posterior-collapse", "latent-ignores-input"),
            changes=(Change("[seen[:, t], state]", "[state, state]"),),
        ),
        Fault(
            "means-in-training",
            "Latents are the posterior's means in training too, as they were while the code was tried out.",
            ("temperature-misstates-rate",),
            changes=(Change("z = draw(*posterior)", "z = posterior[0]"),),
        ),
        Fault(
            "kl-averaged-over-dimensions",
            "The KL is averaged over the latent's dimensions and not summed, so that its weight is an eighth of β.",
            ("kl-units",),
            changes=(Change("+ other_log_variance).sum(-1)", "+ other_log_variance).mean(-1)"),),
            minor=True,
        ),
        Fault(
            "free-nats-upside-down",
            "The KL is kept below its free nats and not above them, so that whatever exceeds them costs nothing.",
            ("term-inert",),
            changes=(Change("kl.clamp_min(free)", "kl.clamp_max(free)"),),
            options={"free": 0.5},
        ),
        Fault(
            "time-first-batches",
            "The loader stacks time first, as nn.GRU has it, and the model goes through the batch as if it were time.",
            ("context-order-inert",),
            changes=(Change("collate_fn=torch.stack)", "collate_fn=lambda k: torch.stack(k, 1))"),),
            options={"size": 16},
        ),
        Fault(
            "gradients-emptied-once-an-epoch",
            "zero_grad stands in the loop over epochs, so gradients of all batches of an epoch add up.",
            ("gradients-add-up",),
            changes=(
                Change("            optim.zero_grad()\n", ""),
                Change("    while step < steps:\n", "    while step < steps:\n        optim.zero_grad()\n"),
            ),
        ),
        Fault(
            "decay-for-each-batch",
            "The rate's decay is meant for each epoch, and the scheduler is stepped after each batch.",
            ("learning-rate-off",),
            changes=(Change('len(loader) if schedule == "exponential" else 1', "1"),),
            options={"schedule": "exponential"},
        ),
        Fault(
            "balanced-before-the-split",
            "Lines of large hands were repeated before the split, so that copies of one line lie on both sides.",
            ("split-leak",),
            changes=(
                Change("rows = torch.randperm(len(pixels))", "rows = balanced(torch.arange(count), hands[:, 1])"),
                Change("    kept = balanced(kept, hands[:, 1])\n", ""),
            ),
        ),
        Fault(
            "biases-in-no-group",
            "Weight decay was to be for matrices alone, and the group of all else, the deviation too, was forgotten.",
            ("not-in-optimizer",),
            changes=(
                Change("(model.parameters(), lr=rate", "([p for p in model.parameters() if p.ndim > 1], lr=rate"),
            ),
            options={"optimizer": "AdamW"},
        ),
    ),
    healthy=(
        Healthy("plain", "The likelihood's loss becomes negative, and the KL's weight rises.", seeds=(0, 1, 2, 3)),
        Healthy("held-then-ramped", "The KL has no weight at first.", options={"hold": 80}, seeds=(0, 1)),
        Healthy("adamw-without-a-ramp", options={"optimizer": "AdamW", "rate": 6e-3, "ramp": 0}, seeds=(0, 1)),
        Healthy(
            "momentum", options={"optimizer": "SGD", "rate": 0.1, "clip": 5.0, "steps": 600, "ramp": 0}, seeds=(0, 1)
        ),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-3}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("free-nats", "The KL is parked at its free nats.", options={"free": 3.0}, seeds=(0, 1)),
        Healthy("few-lines", "A small set of lines, seen often.", options={"count": 640, "width": 48}, seeds=(0, 1)),
        Healthy("wide", options={"width": 96, "latent": 16, "rate": 6e-3}, seeds=(0, 1)),
        Healthy("constant", options={"schedule": "constant", "rate": 6e-3}),
        Healthy("slow-start", "Hardly anything is learnt while the rate rises.", options={"warmup": 150}, seeds=(0, 1)),
        Healthy("decay", "The rate falls after each epoch.", options={"schedule": "exponential"}),
        Healthy("odd-batch", "A batch of negatives, from which the run recovers.", options={"odd": 240}),
    ),
)
