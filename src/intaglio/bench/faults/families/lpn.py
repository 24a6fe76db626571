"""A latent program network (Bonnet & Macfarlane 2024): grid puzzles whose rule is to be found from a few pairs.

Each pair of input and output is encoded to a Gaussian latent. The mean over the pairs that are shown is the program,
and the decoder makes the output of another input from it. In training each pair is left out in turn and decoded from
the program of the others.

Shapes: N puzzles, P pairs of a puzzle, the last of which is asked for when it is solved, S cells a side, d latent
dimensions, w the width.
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
from intaglio.history.reading import ratio

SIDE, COLOURS = 5, 4
MOVEMENTS = 6
HELD_OUT = 320


def painted(grids: Tensor, step: int | Tensor) -> Tensor:
    """Every colour becomes the one ``step`` further on; the ground, 0, stays."""
    return torch.where(grids > 0, (grids - 1 + step) % COLOURS + 1, grids)


def puzzles(count: int, seed: int, pairs: int) -> Tensor:
    """(N, P, 2, S, S) int64: inputs and outputs of one rule.

    It shifts what is on the grid by a cell or mirrors the grid, and in half of the puzzles paints it in a new colour.
    """
    dice = torch.Generator().manual_seed(seed)
    shape = torch.rand(count, pairs, SIDE - 2, SIDE - 2, generator=dice) < 0.5
    shape[..., 1, 1] = True
    colour = torch.randint(1, COLOURS + 1, (count, pairs, 1, 1), generator=dice)
    grids = F.pad(colour * shape, (1, 1, 1, 1))
    moved = [*(grids.roll(by, axis) for axis in (2, 3) for by in (-1, 1)), grids.flip(2), grids.flip(3)]
    which = torch.randint(0, MOVEMENTS, (count,), generator=dice)
    paint = torch.randint(1 - COLOURS, COLOURS + 1, (count, 1, 1, 1), generator=dice)
    made = torch.stack(moved, 1)[torch.arange(count), which]
    return torch.stack([grids, torch.where((made > 0) & (paint > 0), paint, made)], 2)


def on_canvas(task: Tensor, side: int) -> tuple[Tensor, int]:
    """Grids as large as the model's canvas, and of how many puzzles something is cut off."""
    kept = task[..., :side, :side]
    return kept, int(((kept > 0).flatten(1).sum(1) < (task > 0).flatten(1).sum(1)).sum())


def turned(task: Tensor) -> Tensor:
    """All grids of a puzzle with the same step of colours, which leaves its rule as it is."""
    return painted(task, torch.randint(0, COLOURS, (len(task), 1, 1, 1, 1)))


def colourless(task: Tensor) -> Tensor:
    """A puzzle as it is when the first colour in it is 1: equal for all that differ in their colours alone."""
    first = task[:, 0, 0].flatten(1).amax(1)
    return painted(task, (1 - first).view(-1, 1, 1, 1, 1))


class Encoder(nn.Module):
    def __init__(self, side: int, width: int, latent: int):
        super().__init__()
        self.cell = nn.Embedding((COLOURS + 1) ** 2, 8)
        self.body = nn.Sequential(
            nn.Linear(8 * side**2, 8 * width), nn.SiLU(), nn.Linear(8 * width, 8 * width), nn.SiLU()
        )
        self.head = nn.Linear(8 * width, 2 * latent)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (…, d) of inputs and outputs (…, S, S), whose cells are embedded two by two."""
        cells = self.cell((COLOURS + 1) * x + y).flatten(-3)
        mean, log_variance = self.head(self.body(cells)).chunk(2, dim=-1)
        return mean, log_variance.clamp(-8, 4)


class Decoder(nn.Module):
    """A cell of the output looks at those cells of the input that the program names, once for each head."""

    def __init__(self, side: int, width: int, latent: int, layers: int, heads: int = 2):
        super().__init__()
        self.shape = (heads, side**2, side**2)
        self.colour = nn.Embedding(COLOURS + 1, width)
        self.program = nn.Sequential(nn.Linear(latent, 4 * width), nn.SiLU())
        self.look = nn.Linear(4 * width, heads * side**4)
        self.join, self.tell = nn.Linear(heads * width, 2 * width), nn.Linear(4 * width, 4 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, 2 * width), nn.SiLU()) for _ in range(layers)
        )
        self.head = nn.Linear(2 * width, COLOURS + 1)

    def forward(self, x: Tensor, program: Tensor) -> Tensor:
        """Logits of colours (N, S², colours) from inputs (N, S, S) and programs (N, d)."""
        seen, known = self.colour(x.flatten(1)), self.program(program)
        weights = self.look(known).unflatten(1, self.shape).softmax(-1)
        found = (weights @ seen[:, None]).transpose(1, 2).flatten(2)
        scale, shift = self.tell(known)[:, None].chunk(2, dim=-1)
        cells = (1 + scale) * self.join(found) + shift
        for block in self.blocks:
            cells = cells + block(cells)
        return self.head(cells)


class LPN(nn.Module):
    def __init__(self, side: int = SIDE, width: int = 16, latent: int = 16, layers: int = 2):
        super().__init__()
        self.encoder, self.decoder = Encoder(side, width, latent), Decoder(side, width, latent, layers)

    def encode(self, task: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (N, P, d) of pairs (N, P, 2, S, S)."""
        x, y = task.unbind(2)
        return self.encoder(x, y)

    def solve(self, shown: Tensor, question: Tensor) -> Tensor:
        """Logits (N, S², colours) of the answers, from the means of the pairs that are shown."""
        return self.decoder(question, self.encode(shown)[0].mean(1))


def drawn(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL from N(0, I), nats of each latent."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def nats(logits: Tensor, grids: Tensor) -> Tensor:
    """Of each grid, (N,)."""
    return F.cross_entropy(logits.mT, grids.flatten(1), reduction="none").sum(1)


def losses(model: LPN, task: Tensor, free: float) -> dict[str, Tensor]:
    """Nats of a grid, each pair from the program of all others; KL of a pair's latent."""
    mean, log_variance = model.encode(task)
    others = 1 - torch.eye(task.shape[1])
    programs = others @ drawn(mean, log_variance) / others.sum(1, keepdim=True)
    x, y = task.flatten(0, 1).unbind(1)
    nll = nats(model.decoder(x, programs.flatten(0, 1)), y).mean()
    return {"nll": nll, "kl": divergence(mean, log_variance).mean().clamp_min(free)}


def parts(task: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is shown (N, P - 1, 2, S, S), the question and its answer (N, S, S)."""
    return task[:, :-1], task[:, -1, 0], task[:, -1, 1]


@torch.no_grad()
def held_out_losses(model: LPN, task: Tensor, free: float) -> dict[str, float]:
    """Those of training, of the puzzles' last pairs."""
    shown, question, answer = parts(task)
    mean, log_variance = model.encode(shown)
    nll = nats(model.decoder(question, drawn(mean, log_variance).mean(1)), answer).mean()
    return {"nll": float(nll), "kl": float(divergence(mean, log_variance).mean().clamp_min(free))}


@torch.no_grad()
def solved(model: LPN, task: Tensor, blind: bool = False) -> float:
    """The share of answers with every cell right; ``blind`` from the pairs of other puzzles."""
    shown, question, answer = parts(task)
    said = model.solve(shown.roll(1, 0) if blind else shown, question).argmax(-1)
    return float((said == answer.flatten(1)).all(1).double().mean())


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    rise = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    if schedule == "restarts":
        return rise * (0.55 + 0.45 * math.cos(math.pi * (4 * step / steps % 1)))
    return rise * (1 - step / steps if schedule == "linear" else 1.0)


def batches(task: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(task)).split(size):
            if len(rows) == size:
                yield task[rows]


def train(
    folder: Path, seed: int = 0, steps: int = 450, size: int = 32, items: int = 4000, pairs: int = 4, side: int = SIDE,
    rate: float = 4e-3, width: int = 16, latent: int = 16, layers: int = 2, beta: float = 0.1, ramp: int = 0,
    free: float = 0.0, clip: float = 10.0, optimizer: str = "AdamW", schedule: str = "cosine", warmup: int = 20,
    glitch: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    pool = puzzles(items + HELD_OUT, seed, pairs)
    whole, cut = on_canvas(pool, side)
    x, held_out = whole[HELD_OUT:], whole[:HELD_OUT]
    outputs = F.one_hot(x[:, :, 1].flatten(2), COLOURS + 1).double().mean((0, 1))
    outputs[:, 1:] = outputs[:, 1:].mean(1, keepdim=True)
    answers = held_out[:, -1, 1]
    null = float(nats(outputs.clamp_min(1e-4).log().expand(len(answers), -1, -1), answers).mean())

    model = LPN(side, width, latent, layers)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    def read(model: Any, probe: Tensor) -> dict[str, dict[str, Measured]]:
        shown, question, answer = parts(probe)
        each = model.encode(shown)
        mean, log_variance = (part.flatten(0, 1) for part in each)

        def cost(question: Tensor, program: Tensor) -> Any:
            return nats(model.decoder(question, program), answer).double().numpy()

        found = panel.latents(mean, log_variance)
        found["noise_ratio"] = bottleneck.noise_ratio(drawn(mean, log_variance), mean, log_variance)
        found["target_entropy"] = Reading(math.log(MOVEMENTS * COLOURS), None)
        if free:
            found["kl_charged"] = bottleneck.kl_charged(mean, log_variance, free, 1)
            found["groups_above_floor"] = bottleneck.groups_above_floor(mean, log_variance, free, 1)
        program = each[0].mean(1)
        own = cost(question, program)
        exchanged = cost_of_exchange(lambda other: (cost(question, other), torch.ones(len(other)).numpy()), program)
        contexts = cost_of_context(lambda other: cost(question, model.encode(other)[0].mean(1)), shown)
        return {
            "val/latent": found,
            "val/grid": {f"{name}_latent_nats": m for name, m in exchanged.items()},
            "val/condition": {"permuted_loss": ratio(cost(question.roll(1, 0), program) - own, own, 0.0)},
            "val/demonstrations": {f"context_{name}": m for name, m in contexts.items()}
            | {"context_distinct": distinct_views(shown[:, 0], shown[:, -1])},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:128], read=read, every=50, log_every=5, steps=steps,
        nulls={"nll": null},
    )  # fmt: skip
    monitor.audit(
        augmentations={"turned colours": audits.augmentation(lambda task: turned(task[None])[0], x[:64])},
        leaks={"the same puzzle in some colours": audits.leaks(colourless(x).numpy(), colourless(held_out).numpy())},
        intake={"items": len(pool), "lost": {"cells beyond the canvas": cut}},
        built_for={"cells a side": {"built_for": side, "data": pool.shape[-1]}},
    )
    for step, batch in enumerate(batches(x, size), 1):
        task = turned(batch)
        if step == glitch:
            task[:, :, 1] = task[:, :, 1].flip(0)
        weight = beta * min(1.0, (step - 1) / ramp) if ramp else beta
        model.train()
        terms = losses(model, task, free)
        weighted = {"nll": (terms["nll"], 1.0), "kl": (terms["kl"], weight)}
        total = terms["nll"] + weight * terms["kl"]
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, task)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optim.step()
        rates.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation():
                found = held_out_losses(model, held_out, free)
            monitor.validated({f"val/loss/{name}": value for name, value in found.items()})
            monitor.validated({"solved": solved(model, held_out)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        shown, question, answer = parts(held_out)
        nll = float(nats(model.solve(shown, question), answer).mean())
    beside = solved(model, held_out, blind=True)
    return {
        "share of the mean grid's nats that a held-out answer lacks": (1 - nll / null, 0.0),
        "held-out puzzles solved, beside those from pairs of others": (solved(model, held_out), beside),
    }


FAMILY = Family(
    "lpn",
    "development",
    "a latent program network: rules of grid puzzles from pairs, each left out in turn",
    faults=(
        Fault(
            "each-pair-in-its-own-program",
            "The mask of the leave-one-out is the wrong way round: a pair is decoded from its own latent alone.",
            ("overfitting", "context-order-inert"),
            changes=(Change("others = 1 - torch.eye(", "others = torch.eye("),),
        ),
        Fault(
            "outputs-of-pairs-not-read",
            "The encoder is given each cell of the input beside itself, so the rule is nowhere to be seen.",
            ("context-order-inert", "decoder-ignores-latent", "posterior-collapse", "latent-ignores-input"),
            changes=(Change("(COLOURS + 1) * x + y)", "(COLOURS + 1) * x + x)"),),
        ),
        Fault(
            "empty-canvas-for-the-decoder",
            "The decoder looks at an empty canvas that was to be filled with the input, and never was.",
            ("condition-ignored",),
            changes=(Change("self.colour(x.flatten(1))", "self.colour(torch.zeros_like(x).flatten(1))"),),
        ),
        Fault(
            "nats-averaged-over-cells",
            "The loss is a mean over cells, and beside it the KL has the weight of 1 that it should have beside a sum.",
            ("posterior-collapse", "decoder-ignores-latent", "term-dominates"), options={"beta": 1.0},
            changes=(Change('reduction="none").sum(1)', 'reduction="none").mean(1)'),),
        ),
        Fault(
            "kl-of-all-pairs",
            "The KL is summed over the pairs of a puzzle, and the loss averaged, so it weighs four times as much.",
            ("kl-units", "validation-missing"), minor=True,
            changes=(Change("divergence(mean, log_variance).mean().clamp_min(free)}",
                            "divergence(mean, log_variance).sum(1).mean().clamp_min(free)}"),),
        ),
        Fault(
            "uniform-noise",
            "Latents are drawn with rand where randn was meant: from one side of the mean, and with too little spread.",
            ("temperature-misstates-rate",), minor=True,
            changes=(Change("torch.randn_like(mean)", "torch.rand_like(mean)"),),
        ),
        Fault(
            "kl-of-detached-moments",
            "Mean and log-variance were detached to be logged, and the KL is made of these.",
            ("term-inert",),
            changes=(Change("divergence(mean, log_variance).mean().clamp_min(free)}",
                            "divergence(mean.detach(), log_variance.detach()).mean().clamp_min(free)}"),),
        ),
        Fault(
            "ramp-in-the-log-alone",
            "The KL is logged with a weight that rises, and added with the whole of it from the first step.",
            ("weight-not-applied",), options={"ramp": 200}, case="V weight-not-applied",
            changes=(Change("+ weight * terms[", "+ beta * terms["),),
        ),
        Fault(
            "split-after-all-colours",
            "Each puzzle is written out in all colours before the split, so held-out ones are trained on in others.",
            ("split-leak",),
            changes=(Change("pool = puzzles(items + HELD_OUT, seed, pairs)",
                            "once = puzzles((items + HELD_OUT) // COLOURS, seed, pairs)\n"
                            "    pool = torch.cat([painted(once, k) for k in range(COLOURS)])\n"
                            "    pool = pool[torch.randperm(len(pool))]"),),
        ),
        Fault(
            "last-block-alone",
            "Each block is given what the first was given, so that of all of them only the last one's work is used.",
            ("dead-parameters",), minor=True,
            changes=(Change("            cells = cells + block(cells)\n        return self.head(cells)",
                            "            made = cells + block(cells)\n        return self.head(made)"),),
        ),
        Fault(
            "canvas-of-four-cells",
            "The model's canvas was made for the smaller grids of another set, and what lies beyond it is cut off.",
            ("data-replaced", "conditioned-too-late"), options={"side": 4},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy(
            "sgd", "Momentum alone needs another rate, and more steps.",
            options={"optimizer": "SGD", "rate": 0.02, "steps": 600}, seeds=(0, 1),
        ),
        Healthy("rmsprop-linear", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy(
            "adam-with-restarts", "The rate jumps back up four times.",
            options={"optimizer": "Adam", "schedule": "restarts", "rate": 3e-3}, seeds=(0, 1),
        ),
        Healthy(
            "constant-rate", "Nothing settles at the end.", options={"schedule": "constant", "rate": 3e-3}, seeds=(0, 1)
        ),
        Healthy("ramp", "The KL has no weight at first.", options={"ramp": 250}),
        Healthy("free-nats", "The KL is parked at its free nats.", options={"free": 8.0, "beta": 0.4}, seeds=(0, 1)),
        Healthy(
            "slow-start", "The rate rises for a third of the run, so that learning begins late.",
            options={"warmup": 150}, seeds=(0, 1),
        ),
        Healthy(
            "many-pairs", "Three of the five that are shown would be enough.",
            options={"pairs": 6, "size": 22}, seeds=(0, 1),
        ),
        Healthy("small-batches", "A noisy loss.", options={"size": 16, "steps": 600, "rate": 2e-3}, seeds=(0, 1)),
        Healthy("six-numbers", "The latent has six dimensions.", options={"latent": 6}, seeds=(0, 1)),
        Healthy(
            "few-puzzles", "A small set, seen often in other colours, by a narrow model.",
            options={"items": 800, "width": 12}, seeds=(0, 1),
        ),
        Healthy("spike", "The outputs of one batch are those of other puzzles.", options={"glitch": 200}, seeds=(0, 1)),
    ),
)  # fmt: skip
