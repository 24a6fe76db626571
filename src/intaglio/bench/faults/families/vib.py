"""Questions about pictures through a variational information bottleneck (Alemi et al. 2017, eqs. 16 and 17): a question
attends to places of its picture, and all that reaches the answer is a latent, which is held near what a prior expects
of the question.

Shapes: N items, P places of a picture, W width, d latent dimensions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

KINDS = ("shape", "colour", "size", "row", "column")
SAID = (SHAPES, COLOURS, SIZES, ROWS, COLUMNS)
ANSWERS = tuple(word for words in SAID for word in words)
FIRST = torch.tensor([sum(map(len, SAID[:k])) for k in range(len(SAID))])
OPENINGS = ("what", "which", "tell")
OFTEN = torch.tensor([0.25, 0.3, 0.2, 0.15, 0.1])
"""How often people ask for each of the kinds."""


class Items(NamedTuple):
    """``images`` (N, 3, S, S), ``words`` (N, 2) of the question, its ``kind`` (N,) and ``answer`` (N,)."""

    images: Tensor
    words: Tensor
    kind: Tensor
    answer: Tensor

    def at(self, rows: Tensor) -> "Items":
        return Items(*(part[rows] for part in self))


class Gaussian(NamedTuple):
    """``mean`` and ``log_variance`` (N, d)."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> "Gaussian":
        mean, log_variance = numbers.chunk(2, 1)
        return cls(mean, log_variance.clamp(-8, 4))

    def draw(self) -> Tensor:
        return self.mean + torch.randn_like(self.mean) * (0.5 * self.log_variance).exp()


def kl_by_dimension(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of each item and dimension, (N, d)."""
    apart = (q.mean - p.mean).square() + q.log_variance.exp()
    return 0.5 * (p.log_variance - q.log_variance + apart / p.log_variance.exp() - 1)


class Attention(nn.Module):
    """From one query an item to several places."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query_NW: Tensor, places_NPW: Tensor) -> Tensor:
        given = (self.query(query_NW)[:, None], self.key(places_NPW), self.value(places_NPW))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in given)
        found: Tensor = self.out(F.scaled_dot_product_attention(query, key, value).flatten(1))
        return found


class Answerer(nn.Module):
    def __init__(self, width: int = 64, latent: int = 8, heads: int = 4):
        super().__init__()
        layers: list[nn.Module] = []
        for given, made, stride in ((3, 32, 2), (32, width, 2), (width, width, 1)):
            conv = nn.Conv2d(given, made, 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(made), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        self.places = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.words = nn.Embedding(len(OPENINGS) + len(KINDS), width)
        self.attend = Attention(width, heads)
        self.posterior = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * latent)
        )
        self.prior = nn.Linear(width, 2 * latent)
        self.answer = nn.Sequential(nn.Linear(latent, width), nn.GELU(), nn.Linear(width, len(ANSWERS)))

    def encode(self, images: Tensor, words: Tensor) -> tuple[Gaussian, Gaussian]:
        """What the latent is of picture and question, and what the question alone lets expect of it."""
        question = self.words(words).sum(1)
        seen = self.stem(images).flatten(2).mT + self.places
        found = self.attend(question, seen)
        return Gaussian.of(self.posterior(question + found)), Gaussian.of(self.prior(question))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        logits: Tensor = self.answer(self.encode(images, words)[0].mean)
        return logits


def losses(model: Answerer, items: Items, floor: float) -> dict[str, Tensor]:
    """Nats an item; ``floor`` are the free bits of a dimension."""
    q, p = model.encode(items.images, items.words)
    kl_d = kl_by_dimension(q, p).mean(0)
    return {"answer": F.cross_entropy(model.answer(q.draw()), items.answer), "kl": kl_d.clamp(min=floor).sum()}


def asked(count: int, seed: int) -> Items:
    """A question about each of so many pictures."""
    made = pictures(count, seed)
    generator = torch.Generator().manual_seed(seed)
    kind = torch.multinomial(OFTEN, count, replacement=True, generator=generator)
    opening = torch.randint(len(OPENINGS), (count,), generator=generator)
    answer = FIRST[kind] + made.factors.gather(1, kind[:, None])[:, 0]
    return Items(made.images, torch.stack([opening, len(OPENINGS) + kind], 1), kind, answer)


def of_the_commonest(items: Items, most: int) -> tuple[Items, int]:
    """Items whose answer is among the commonest, as is usual; and how many others there were."""
    kept = torch.isin(items.answer, items.answer.bincount(minlength=len(ANSWERS)).topk(most).indices)
    return items.at(kept.nonzero()[:, 0]), int((~kept).sum())


def evened(answer: Tensor) -> Tensor:
    """Rows in which every answer is about as frequent as the commonest: those of the rare ones are repeated."""
    counts = answer.bincount(minlength=len(ANSWERS))
    times = (counts.max() / counts.clamp(min=1))[answer].round().long()
    return torch.arange(len(answer)).repeat_interleave(times)


def guessed(known: Items, items: Items) -> float:
    """Nats of an answer by how frequent it is among those that are known of its kind."""
    table = torch.full((len(KINDS), len(ANSWERS)), 1e-3)
    table.index_put_((known.kind, known.answer), torch.ones(()), accumulate=True)
    return -float((table / table.sum(1, keepdim=True))[items.kind, items.answer].log().mean())


def batches(items: Items, size: int) -> Iterator[Items]:
    while True:
        for rows in torch.randperm(len(items.answer)).split(size):
            if len(rows) == size:
                yield items.at(rows)


def by_kind(model: Answerer, items: Items, known: Items) -> dict[str, Reading]:
    """The share of right answers to each kind of question, beside that of the commonest answer in training."""
    right = (model(items.images, items.words).argmax(1) == items.answer).double()
    found = {}
    for k, name in enumerate(KINDS):
        rows, of_kind = items.kind == k, known.answer[known.kind == k]
        if not rows.any():
            continue
        commonest = of_kind.mode().values if len(of_kind) else FIRST[k]
        majority = float((items.answer[rows] == commonest).double().mean())
        found[name] = Reading(float(right[rows].mean()), majority, int(rows.sum()))
    return found


def planned(optim: torch.optim.Optimizer, schedule: str, steps: int, decayed: float) -> Any:
    plans = torch.optim.lr_scheduler
    if schedule == "exponential":
        return plans.ExponentialLR(optim, decayed)
    if schedule == "cosine":
        return plans.CosineAnnealingLR(optim, steps)
    if schedule == "restarts":
        return plans.CosineAnnealingWarmRestarts(optim, steps // 3)
    return plans.ConstantLR(optim, 1.0)


def train(
    folder: Path, seed: int = 0, steps: int = 450, size: int = 64, count: int = 6144, most: int = len(ANSWERS),
    rate: float = 1e-3, width: int = 64, latent: int = 8, beta: float = 0.03, hold: int = 0, ramp: int = 150,
    free: float = 0.8, optimizer: str = "AdamW", momentum: float = 0.0, decay: float = 0.1,
    schedule: str = "exponential", decayed: float = 0.8,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    items, lost = of_the_commonest(asked(count, seed), most)
    order = torch.randperm(len(items.answer))
    held_out, training = items.at(order[:512]), items.at(order[512:])
    training = training.at(evened(training.answer))
    test = asked(1024, 10_000 + seed)
    model, floor = Answerer(width, latent), free / latent
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    more = {"momentum": momentum} if momentum else {}
    optim = getattr(torch.optim, optimizer)(groups, lr=rate, **more)
    plan = planned(optim, schedule, steps, decayed)
    epoch = len(training.answer) // size

    def read(model: Any, probe: Items) -> dict[str, Any]:
        q, p = model.encode(probe.images, probe.words)
        beside = (q.mean - p.mean) * (-0.5 * p.log_variance).exp(), q.log_variance - p.log_variance

        def cost(z: Tensor) -> Any:
            nats = F.cross_entropy(model.answer(z), probe.answer, reduction="none").double().numpy()
            return nats, 0 * nats + 1

        found = panel.latents(q.mean, q.log_variance)
        found["kl_nats"], found["prior_nats"] = bottleneck.kl_nats(*beside), bottleneck.aggregate_nats(*beside)
        found["noise_ratio"] = bottleneck.noise_ratio(q.draw(), q.mean, q.log_variance)
        found["target_entropy"] = bottleneck.entropy_nats(probe.answer)
        found |= {f"{name}_latent_nats": value for name, value in cost_of_exchange(cost, q.mean).items()}
        if floor:
            found["kl_charged"] = bottleneck.kl_charged(*beside, floor, latent)
            found["groups_above_floor"] = bottleneck.groups_above_floor(*beside, floor, latent)
        own = F.cross_entropy(model.answer(q.mean), probe.answer)
        other = F.cross_entropy(model(probe.images.roll(1, 0), probe.words), probe.answer)
        swapped = Reading(float(other - own), 0.0, len(probe.answer))
        kinds = {f"val/answer.{name}": {"accuracy": x} for name, x in by_kind(model, probe, training).items()}
        return {"val/latent": found, "val/answer": {"shuffled_image_nats": swapped}} | kinds

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/answer": guessed(training, training), "val/loss/answer": guessed(training, held_out)},
    )  # fmt: skip
    monitor.audit(
        intake={"items": len(items.answer), "lost": {"answer not in the vocabulary": lost}},
        leaks={"picture": audits.leaks(training.images.numpy(), held_out.images.numpy())},
    )
    for step, batch in enumerate(batches(training, size), 1):
        weight = beta * min(1.0, max(0, step - hold) / ramp)
        model.train()
        terms = losses(model, batch, floor)
        total = terms["answer"] + weight * terms["kl"]
        weighted = {"answer": (terms["answer"], 1.0), "kl": (terms["kl"], weight)}
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        optim.step()
        if schedule != "exponential" or step % epoch == 0:
            plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                seen = losses(model, held_out, floor)
                right = model(held_out.images, held_out.words).argmax(1) == held_out.answer
            monitor.validated({f"val/loss/{name}": float(value) for name, value in seen.items()})
            monitor.validated({"accuracy": float(right.double().mean())})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        answered = by_kind(model, test, training)
    return {f"{name} questions of new pictures": (x.value, x.null or 0.0) for name, x in answered.items()}


FAMILY = Family(
    "vib",
    "development",
    "answers to questions about pictures from a latent alone, held near a prior that knows the question",
    faults=(
        Fault(
            "first-place-for-a-class-token",
            "Only the first place is attended to, as if it were a class token: a softmax over one place is 1.",
            ("attention-over-one", "dead-parameters"),
            changes=(Change("self.attend(question, seen)", "self.attend(question, seen[:, :1])"),),
        ),
        Fault(
            "question-attends-to-itself",
            "Keys and values are the question's own words, as in self-attention, and never the picture.",
            ("question-only", "dead-parameters"),
            changes=(Change("self.attend(question, seen)", "self.attend(question, self.words(words))"),),
        ),
        Fault(
            "prior-variance-not-divided-by",
            "In the KL of two Gaussians the division by the prior's variance was left out.",
            ("prior-mismatch",),
            changes=(Change("apart / p.log_variance.exp() - 1", "apart - 1"),),
            minor=True,
        ),
        Fault(
            "free-bits-for-a-ceiling",
            "Free bits are clamped at the wrong end: what exceeds them has no gradient.",
            ("term-inert", "rate-too-high"),
            changes=(Change("kl_d.clamp(min=floor)", "kl_d.clamp(max=floor)"),),
            minor=True,
        ),
        Fault(
            "groups-of-matrices-and-vectors",
            "Groups are made of tensors with two axes and with one, and convolutions and places have three or four.",
            ("not-in-optimizer",),
            changes=(Change("if p.ndim > 1]", "if p.ndim == 2]"),),
        ),
        Fault(
            "repeated-before-the-split",
            "Items with rare answers are repeated before the split, so copies of them stand on both sides.",
            ("split-leak",),
            changes=(
                Change("order = torch", "items = items.at(evened(items.answer))\n    order = torch"),
                Change("    training = training.at(evened(training.answer))\n", ""),
            ),
        ),
        Fault(
            "decay-of-adamw-in-adam",
            "The weight decay was meant for AdamW; Adam adds it to the gradient, and normalises it with that.",
            ("no-learning", "plateau"),
            options={"optimizer": "Adam"},
        ),
        Fault(
            "vocabulary-of-another-data-set",
            "Items whose answer is not among the eight commonest are left out, which is half of all answers.",
            ("data-replaced",),
            options={"most": 8},
        ),
        Fault(
            "momentum-at-the-rate-of-plain-descent",
            "Momentum was added at the rate that was good without it, so that a step goes ten times as far.",
            ("diverged",),
            options={"optimizer": "SGD", "momentum": 0.9, "rate": 0.2, "decay": 0.0, "schedule": "constant"},
        ),
        Fault(
            "looked-at-in-every-fifth-epoch",
            "Held-out items are looked at in every fifth epoch, as in a run ten times as long.",
            ("validation-missing",),
            changes=(Change("if step % 50 == 0:", "if step % (5 * epoch) == 0:"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 96, "latent": 16}),
        Healthy("small-batches", "Losses of single batches are noisy.", options={"size": 32}),
        Healthy(
            "momentum",
            "It stands near chance for a while.",
            options={
                "optimizer": "SGD",
                "momentum": 0.9,
                "rate": 0.05,
                "decay": 0.0,
                "schedule": "constant",
                "steps": 600,
            },
        ),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4, "decay": 0.0, "schedule": "constant"}),
        Healthy(
            "warm-restarts",
            "The rate jumps back up twice.",
            options={"schedule": "restarts", "rate": 1.5e-3},
            seeds=(0, 1),
        ),
        Healthy("parked", "Free bits hold the KL where it is.", options={"free": 6.0, "beta": 1.0, "rate": 2e-3}),
        Healthy(
            "held-then-ramped",
            "The KL, and with it the prior, has no weight at first, and much later on.",
            options={"hold": 100, "ramp": 200, "beta": 0.2, "schedule": "cosine"},
        ),
        Healthy("few-items", "A small set of pictures.", options={"count": 2560, "schedule": "cosine"}),
    ),
)
