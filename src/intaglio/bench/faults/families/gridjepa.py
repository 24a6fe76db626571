"""Rules of small coloured grids from demonstrations, as ARC has them: a joint-embedding predictor (LeCun 2022).

From two pairs of grids and a question the predictor says the embedding of the answer. Targets come from averaged
weights, embeddings are kept apart as VICReg does (Bardes et al. 2022), and the answer is sought among the answers of
the batch and what other rules make of the question.

Shapes: N tasks, G grids of a task, S = 4 cells a side, P demonstrations, C choices, the right one first, D dimensions.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import contrastive
from intaglio.health.monitor import Monitor
from intaglio.history import Reading

SIDE, COLOURS = 4, 4
CHOICES, HELD_OUT = 5, 480
COOLEST = 0.02


def painted(grids: Tensor, step: int | Tensor, colours: int = COLOURS) -> Tensor:
    """Every colour becomes that ``step`` further on; the ground, 0, stays."""
    return torch.where(grids > 0, (grids - 1 + step) % colours + 1, grids)


def outcomes(grids: Tensor) -> Tensor:
    """What every rule makes of grids: (N, S, S) → (N, rules, S, S).

    A rule is a movement (a step to one side and across the edge, a mirror, transposed, turned) and a step of colours.
    """
    steps = [grids.roll(by, axis) for axis in (1, 2) for by in (-1, 1)]
    moved = [*steps, grids.flip(1), grids.flip(2), grids.mT, grids.flip(1, 2)]
    return torch.stack([painted(x, step) for x in moved for step in range(COLOURS)], 1)


def tasks(count: int, seed: int, shown: int = 2) -> Tensor:
    """(N, 2P + 1 + C, S, S) int64: demonstrations as input, output, input, …; the question; its choices."""
    dice = torch.Generator().manual_seed(seed)
    grids = torch.zeros(count * (shown + 1), SIDE, SIDE, dtype=torch.int64)
    here, full = torch.arange(len(grids)), torch.rand(len(grids), 2, 3, generator=dice) < 0.6
    full[:, 0, 0] = True
    colour = torch.randint(1, COLOURS + 1, (len(grids),), generator=dice)
    row, column = (torch.randint(0, SIDE - n + 1, (len(grids),), generator=dice) for n in (2, 3))
    for y in range(2):
        for x in range(3):
            grids[here, row + y, column + x] = colour * full[:, y, x]
    possible = outcomes(grids).unflatten(0, (count, shown + 1))
    grids = grids.unflatten(0, (count, shown + 1))
    rule = torch.randint(0, possible.shape[2], (count,), generator=dice)
    made = possible[torch.arange(count), :, rule]
    answer, others = made[:, -1], possible[:, -1]
    lots = torch.rand(count, others.shape[1], generator=dice)
    lots[(others == answer[:, None]).flatten(2).all(2)] = -1.0
    wrong = others[torch.arange(count)[:, None], lots.topk(CHOICES - 1).indices]
    pairs = [torch.stack([grids[:, k], made[:, k]], 1) for k in range(shown)]
    return torch.cat([*pairs, grids[:, -1:], answer[:, None], wrong], 1)


def parts(task: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Demonstrations (N, P, 2, S, S), questions (N, S, S), choices (N, C, S, S)."""
    before = task.shape[1] - CHOICES
    return task[:, : before - 1].unflatten(1, (-1, 2)), task[:, before - 1], task[:, before:]


def known(task: Tensor, colours: int) -> tuple[Tensor, int]:
    """A colour beyond those that the model knows is read as the last of them; and in how many tasks there is one."""
    return task.clamp(max=colours), int((task > colours).flatten(1).any(1).sum())


def recoloured(task: Tensor, colours: int) -> Tensor:
    """All grids of a task with the same step of colours, which leaves its rule as it is."""
    return painted(task, torch.randint(0, colours, (len(task), 1, 1, 1)), colours)


class Encoder(nn.Module):
    """Tokens of cells, with a colour and a place, and their embedding."""

    def __init__(self, colours: int, width: int, out: int):
        super().__init__()
        self.colour = nn.Embedding(colours + 1, width)
        self.place = nn.Parameter(0.5 * torch.randn(SIDE**2, width))
        self.cell = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.head = nn.Sequential(nn.Linear(SIDE**2 * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, out))

    def forward(self, grids: Tensor) -> Tensor:
        """(…, S, S) → (…, D)."""
        cells = self.colour(grids.flatten(-2)) + self.place
        return self.head(self.cell(cells).flatten(-2))


class Predictor(nn.Module):
    def __init__(self, width: int, out: int, layers: int):
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(2 * out, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.question = nn.Linear(out, width)
        self.answer = nn.Parameter(0.5 * torch.randn(width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out))

    def forward(self, shown: Tensor, question: Tensor) -> Tensor:
        """From demonstrations (N, P, 2, D) and questions (N, D) the answers' embeddings (N, D)."""
        pairs = self.pair(torch.cat([shown[:, :, 0], shown[:, :, 1]], -1))
        asked = self.question(question)
        x = torch.cat([(self.answer + asked)[:, None], asked[:, None], pairs], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class GridJEPA(nn.Module):
    def __init__(
        self, colours: int = COLOURS, width: int = 32, out: int = 32, layers: int = 2, decay: float = 0.98,
        temperature: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.decay = decay
        self.encoder = Encoder(colours, width, out)
        self.predictor = Predictor(2 * width, out, layers)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def scale(self) -> Tensor:
        return self.log_scale.clamp(max=-math.log(COOLEST)).exp()

    def forward(self, shown: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """The answers' embeddings as they are predicted (N, D), and those of all grids that were read, (N, G, D)."""
        seen = self.encoder(torch.cat([shown.flatten(1, 2), question[:, None]], 1))
        return self.predictor(seen[:, :-1].unflatten(1, (-1, 2)), seen[:, -1]), seen

    @torch.no_grad()
    def targets(self, choices: Tensor) -> Tensor:
        return self.target(choices)

    @torch.no_grad()
    def step_target(self) -> None:
        for t, p in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
            t.lerp_(p, 1 - self.decay)


def errors(predicted: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE of each task: its answer among the answers of the batch and its own wrong choices."""
    p, t = F.normalize(predicted, dim=-1), F.normalize(targets, dim=-1)
    logits = scale * torch.cat([p @ t[:, 0].T, torch.einsum("nd,ncd->nc", p, t[:, 1:])], 1)
    return F.cross_entropy(logits, torch.arange(len(p)), reduction="none")


def spread(x: Tensor) -> dict[str, Tensor]:
    """What keeps embeddings (…, D) apart: each dimension's deviation is to reach 1, and no two are to agree."""
    x = x.flatten(0, -2) - x.flatten(0, -2).mean(0)
    covariance = x.T @ x / (len(x) - 1)
    deviation = (covariance.diagonal() + 1e-4).sqrt()
    apart = (covariance - covariance.diagonal().diag()).square().sum() / x.shape[1]
    return {"variance": F.relu(1 - deviation).mean(), "covariance": apart}


def losses(model: GridJEPA, task: Tensor) -> dict[str, Tensor]:
    shown, question, choices = parts(task)
    predicted, seen = model(shown, question)
    targets = model.targets(choices)
    return {"infonce": errors(predicted, targets, model.scale()).mean(), **spread(seen)}


@torch.no_grad()
def accuracy(model: GridJEPA, task: Tensor, blind: bool = False) -> float:
    """How often the right choice is the nearest; ``blind`` to the demonstrations, which are those of other tasks."""
    shown, question, choices = parts(task)
    predicted, _ = model(shown.roll(1, 0) if blind else shown, question)
    near = F.cosine_similarity(predicted[:, None], model.targets(choices), dim=-1)
    return float((near[:, 0] > near[:, 1:].amax(1)).double().mean())


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


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((x.detach() - y.detach()).square().sum()) for x, y in zip(a, b, strict=True)))


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 48, items: int = 6000, shown: int = 2,
    rate: float = 3e-3, width: int = 32, out: int = 32, layers: int = 2, colours: int = COLOURS,
    temperature: float = 0.1, variance: float = 0.5, covariance: float = 0.02, ramp: int = 0, decay: float = 0.98,
    clip: float = 5.0, optimizer: str = "AdamW", schedule: str = "cosine", warmup: int = 30,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    pool = tasks(items + HELD_OUT, seed, shown)
    readable, lost = known(pool, colours)
    x, held_out = readable[HELD_OUT:], readable[:HELD_OUT]
    model = GridJEPA(colours, width, out, layers, decay, temperature)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))
    weights = {"infonce": 1.0, "variance": variance, "covariance": covariance}
    start = [p.clone() for p in model.target.parameters()]

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        context, question, choices = parts(probe)
        predicted, seen = model(context, question)
        targets, scale = model.targets(choices), model.scale().log()
        costs = trials.cost_of_context(
            lambda c: errors(model(c, question)[0], targets, model.scale()).double().numpy(), context
        )
        asked = {f"context_{change}": cost for change, cost in costs.items()}
        pair = panel.pairs(F.normalize(predicted, dim=1), F.normalize(targets[:, 0], dim=1), scale)
        averaged, live = list(model.target.parameters()), list(model.encoder.parameters())
        moved = distance(averaged, start) / max(distance(live, start), 1e-12)
        return {
            "val/latent": panel.latents(seen[:, -1]),
            "val/predicted": panel.latents(predicted),
            "val/pair": pair
            | {
                "distinct_views": trials.distinct_views(question, choices[:, 0]),
                "temperature": contrastive.temperature(scale, COOLEST),
            },
            "val/demonstrations": asked | {"context_distinct": trials.distinct_views(context[:, 0], context[:, -1])},
            "val/ema": {"moved": Reading(moved, 1.0)},
        }

    chance = math.log(size + CHOICES - 1)
    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:120], read=read, every=50, log_every=5, steps=steps,
        nulls={"infonce": chance},
    )  # fmt: skip
    monitor.audit(
        augmentations={"recoloured": audits.augmentation(lambda task: recoloured(task[None], colours)[0], x[:64])},
        leaks={"the very same task": audits.leaks(x.numpy(), held_out.numpy())},
        intake={"items": len(pool), "lost": {"colour read as another": lost}},
        built_for={"colours": {"built_for": colours + 1, "data": int(pool.max()) + 1}},
    )
    for step, batch in enumerate(batches(x, size), 1):
        model.train()
        risen = min(1.0, step / ramp) if ramp else 1.0
        terms = losses(model, recoloured(batch, colours))
        weighted = {n: (term, weights[n] * (1.0 if n == "infonce" else risen)) for n, term in terms.items()}
        total = torch.stack([weight * term for term, weight in weighted.values()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optim.step()
        rates.step()
        model.step_target()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                found = [losses(model, some) for some in held_out.split(size) if len(some) == size]
            means = {n: float(torch.stack([f[n] for f in found]).mean()) for n in weights}
            monitor.validated({f"val/loss/{n}": value for n, value in means.items()})
            monitor.validated({"accuracy": accuracy(model, held_out)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    right = accuracy(model, held_out)
    return {
        f"answer of a held-out task among {CHOICES} choices": (right, 1 / CHOICES),
        "the same, beside demonstrations of other tasks": (right, accuracy(model, held_out, blind=True)),
    }


FAMILY = Family(
    "gridjepa",
    "development",
    "a joint-embedding predictor of grids: the answer's embedding from demonstrations of a rule and a question",
    faults=(
        Fault(
            "one-demonstration-twice",
            "The index of the demonstrations was left at 0, so that a task shows one pair twice.",
            ("context-order-inert",), case="J context-order-inert",
            changes=(Change("torch.stack([grids[:, k], made[:, k]], 1)", "torch.stack([grids[:, 0], made[:, 0]], 1)"),),
        ),
        Fault(
            "outputs-of-demonstrations-not-read",
            "A copied index: a demonstration is its input beside its input, so the rule is nowhere to be seen.",
            ("context-order-inert",),
            changes=(Change("shown[:, :, 0], shown[:, :, 1]", "shown[:, :, 0], shown[:, :, 0]"),),
        ),
        Fault(
            "answers-one-row-off",
            "The header of the answers' file was read as the first of them, so each task has those of the one before.",
            ("near-chance", "no-learning", "plateau"), case="J near-chance",
            changes=(
                Change("grids[:, -1:], answer[:, None], wrong]", "grids[:, -1:], *(y.roll(1, 0) for y in asked)]"),
                Change("    pairs = [", "    asked = answer[:, None], wrong\n    pairs = ["),
            ),
        ),
        Fault(
            "question-in-place-of-the-answer",
            "The right choice is taken from the inputs and not from what the rule made of them, so to copy is enough.",
            ("trivial-pair",), case="J trivial-pair",
            changes=(Change("answer, others = made[:, -1], possible", "answer, others = grids[:, -1], possible"),),
        ),
        Fault(
            "target-never-stepped",
            "The line that steps the average is not in the loop, so the target stays as it was drawn.",
            ("ema-lag",), changes=(Change("        model.step_target()\n", ""),),
        ),
        Fault(
            "spread-of-the-targets",
            "Variance and covariance are those of the target encoder's embeddings, which have no gradient.",
            ("term-inert",), changes=(Change("**spread(seen)", "**spread(targets)"),),
        ),
        Fault(
            "ramp-in-the-log-alone",
            "The terms that spread embeddings are logged with a weight that rises, and summed with the whole of it.",
            ("weight-not-applied",), options={"ramp": 250}, case="V weight-not-applied",
            changes=(Change("weight * term for term, weight in weighted.values()",
                            "weights[n] * term for n, term in terms.items()"),),
        ),
        Fault(
            "decay-of-a-pass-in-every-step",
            "The rate is to lose a twentieth in each pass over the data, and loses it in every step.",
            ("learning-rate-off",), minor=True,
            changes=(Change("LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))",
                            "ExponentialLR(optim, 0.95)"),),
        ),
        Fault(
            "minus-in-the-wrong-slice",
            "Training leaves out the last tasks of the pool, and the first are held out.",
            ("split-leak",), options={"items": 1200},
            changes=(Change("readable[HELD_OUT:]", "readable[:-HELD_OUT]"),),
        ),
        Fault(
            "temperature-floor-without-its-logarithm",
            "The logarithm of the scale is held below the coolest temperature itself, and so the temperature near 1.",
            ("temperature-stuck", "dead-parameters"), case="J temperature-stuck", minor=True,
            changes=(Change("clamp(max=-math.log(COOLEST))", "clamp(max=COOLEST)"),),
        ),
        Fault(
            "built-for-two-colours",
            "The model was built for the two colours of another set, and all others are read as the second.",
            ("conditioned-too-late", "data-replaced"), options={"colours": 2},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy(
            "sgd", "Momentum alone needs another rate, and more steps.",
            options={"optimizer": "SGD", "rate": 0.1, "steps": 600}, seeds=(0, 1),
        ),
        Healthy("rmsprop-linear", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy(
            "restarts", "The rate jumps back up four times.", options={"schedule": "restarts", "optimizer": "Adam"},
            seeds=(0, 1),
        ),
        Healthy(
            "constant-rate", "Nothing settles at the end.", options={"schedule": "constant", "rate": 2e-3}, seeds=(0, 1)
        ),
        Healthy(
            "small-batches", "Few candidates, and a noisy loss.", options={"size": 24, "steps": 600, "rate": 2e-3},
            seeds=(0, 1),
        ),
        Healthy(
            "slow-start", "The rate rises for a third of the run.",
            options={"warmup": 130}, seeds=(0, 1),
        ),
        Healthy(
            "ramped", "What keeps embeddings apart has no weight at first.", options={"ramp": 200}, seeds=(0, 1)
        ),
        Healthy(
            "large-batches", "More candidates, and the temperature starts high.",
            options={"size": 80, "steps": 320, "temperature": 0.2}, seeds=(0, 1),
        ),
        Healthy(
            "three-demonstrations", "Two of them would be enough.", options={"shown": 3, "size": 40}, seeds=(0, 1)
        ),
        Healthy(
            "few-tasks", "A small set, seen often in other colours, by a narrow model.",
            options={"items": 2400, "width": 24, "out": 24}, seeds=(0, 1),
        ),
    ),
)  # fmt: skip
