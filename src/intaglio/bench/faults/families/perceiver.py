"""Questions about scenes through a latent array (Perceiver IO, Jaegle et al. 2021): patches of a picture and words of a
question are read into a few latents, which attend to each other. The question asks them for its answer, and each place
for its patch.

Shapes: N scenes, S pixels a side, P places, D numbers of a patch, L words, M latents, W width.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, RGB
from intaglio.health import audits, panel
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

SHAPES = ("square", "cross", "bar")
STAMPS = torch.tensor([[7, 7, 7], [5, 2, 5], [0, 7, 0]])[:, :, None].bitwise_and(torch.tensor([4, 2, 1])) > 0
ROWS, NUMBERS = ("upper", "lower"), ("one", "two")
ASKED = {
    "colour": "what colour is the {shape}",
    "shape": "what shape is the {colour} one",
    "row": "in which row is the {shape}",
    "count": "how many things are there",
}
ANSWERS = (*COLOURS, *SHAPES, *ROWS, *NUMBERS)
SPOKEN = [word for text in ASKED.values() for word in text.split() if "{" not in word]
WORDS = tuple(dict.fromkeys(["<pad>", *SPOKEN, *COLOURS, *SHAPES]))
SIDE, CELL, PLACES, PATCH = 8, 4, 4, 48
CHANCES, LENGTH = 18, 6


class Items(NamedTuple):
    """``images`` (N, 3, S, S) in [0, 1], ``words`` (N, L) of the question, its ``kind`` and ``answer`` (N,)."""

    images: Tensor
    words: Tensor
    kind: Tensor
    answer: Tensor

    def at(self, rows: Tensor) -> "Items":
        return Items(*(part[rows] for part in self))


def encoded(texts: list[str]) -> tuple[Tensor, int]:
    """Words by number, (N, L), and how many texts were too long."""
    known = {word: k for k, word in enumerate(WORDS)}
    numbers = [[known[word] for word in text.split()] for text in texts]
    return torch.tensor([(row + [0] * LENGTH)[:LENGTH] for row in numbers]), sum(len(row) > LENGTH for row in numbers)


def asked(count: int, seed: int) -> tuple[Items, int]:
    """A question about each of so many scenes of one or two things, and how many questions were cut."""
    drawn = torch.rand(count, CHANCES + 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(seed))
    chance, noise = drawn.split([CHANCES, 3 * SIDE * SIDE], 1)
    shapes, colours, cells = (part.argsort(1)[:, :2] for part in chance[:, :11].split([3, 4, 4], 1))
    corner = CELL * torch.stack([cells // 2, cells % 2], 2) + (2 * chance[:, 11:15]).long().unflatten(1, (2, 2))
    many, kind = (2 * chance[:, 15]).long() + 1, (len(ASKED) * chance[:, 16]).long()
    which = (many * chance[:, 17]).long()
    images = torch.full((count, 3, SIDE, SIDE), 0.05)
    for k in range(2):
        y, x = torch.arange(SIDE) - corner[:, k].T[:, :, None]
        stamp = STAMPS[shapes[:, k, None, None], y.clamp(0, 2)[:, :, None], x.clamp(0, 2)[:, None]]
        inside = ((y == y.clamp(0, 2))[:, :, None] & (x == x.clamp(0, 2))[:, None]) & (many > k)[:, None, None]
        images = torch.where((stamp & inside)[:, None], RGB[colours[:, k]][:, :, None, None], images)
    images = (images + 0.1 * (noise.unflatten(1, (3, SIDE, SIDE)) - 0.5)).clamp(0, 1)
    texts, answers = [], []
    shape_N, colour_N, row_N = (x.gather(1, which[:, None])[:, 0] for x in (shapes, colours, cells // 2))
    for shape, colour, row, number, asks in torch.stack([shape_N, colour_N, row_N, many, kind], 1).tolist():
        texts.append(list(ASKED.values())[asks].format(shape=SHAPES[shape], colour=COLOURS[colour]))
        right = (COLOURS[colour], SHAPES[shape], ROWS[row], NUMBERS[number - 1])
        answers.append(ANSWERS.index(right[asks]))
    words, cut = encoded(texts)
    return Items(images, words, kind, torch.tensor(answers)), cut


def patches(images: Tensor) -> Tensor:
    """(N, 3, S, S) → (N, P, D)"""
    cut = images.unflatten(3, (2, CELL)).unflatten(2, (2, CELL))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)


def flipped(images: Tensor) -> Tensor:
    """Half of the pictures with left for right, which no answer depends on."""
    coin = torch.rand(*images.shape[:-3], 1, 1, 1) < 0.5
    return torch.where(coin, images.flip(-1), images)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.orthogonal_(self.query.weight, 1.5)
        nn.init.orthogonal_(self.key.weight, 1.5)

    def forward(self, x: Tensor, context: Tensor, known: Tensor | None = None) -> Tensor:
        given = (self.query(x), self.key(context), self.value(context))
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in given)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if known is not None:
            scores = scores.masked_fill(~known[:, None, None], -math.inf)
        found: Tensor = self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return found


class Block(nn.Module):
    """Attention to a context, or to itself, and a perceptron."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.before, self.given, self.between = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.drop = Attention(width, heads), nn.Dropout(dropout)
        self.think = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, context: Tensor, known: Tensor | None = None) -> Tensor:
        x = x + self.drop(self.attend(self.before(x), self.given(context), known))
        return x + self.drop(self.think(self.between(x)))


class Perceiver(nn.Module):
    def __init__(self, width: int = 48, latents: int = 8, depth: int = 2, heads: int = 4, dropout: float = 0.0):
        super().__init__()
        self.patch = nn.Sequential(nn.Linear(PATCH, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
        self.words = nn.Embedding(len(WORDS), width)
        self.places = nn.Parameter(0.5 * torch.randn(PLACES, width))
        self.order = nn.Parameter(0.5 * torch.randn(LENGTH, width))
        self.latents = nn.Parameter(0.5 * torch.randn(latents, width))
        self.asks = nn.Parameter(0.3 * torch.randn(width))
        self.look, self.read, self.draw = (Block(width, heads, dropout) for _ in range(3))
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(ANSWERS)))
        self.paint = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, PATCH), nn.Sigmoid())

    def encode(self, images: Tensor, words: Tensor) -> Tensor:
        """The latents, (N, M, W)."""
        seen, read = self.patch(patches(images)) + self.places, self.words(words) + self.order
        known = torch.cat([torch.ones(seen.shape[:2], dtype=torch.bool), words > 0], 1)
        latents = self.latents.expand(len(images), -1, -1)
        x: Tensor = self.look(latents, torch.cat([seen, read], 1), known)
        for block in self.blocks:
            x = block(x, x)
        return x

    def answer(self, latents: Tensor, words: Tensor) -> Tensor:
        """Logits of the answers, (N, A)."""
        known = (words > 0)[..., None]
        query = self.asks + (self.words(words) * known).sum(1, keepdim=True) / known.sum(1, keepdim=True)
        found = self.read(query, latents)
        logits: Tensor = self.head(found[:, 0])
        return logits

    def rebuild(self, latents: Tensor) -> Tensor:
        """The picture's patches, (N, P, D)."""
        rebuilt: Tensor = self.paint(self.draw(self.places.expand(len(latents), -1, -1), latents))
        return rebuilt

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        return self.answer(self.encode(images, words), words)


def losses(model: Perceiver, items: Items) -> dict[str, Tensor]:
    """Nats of an answer, and the squared error of a picture."""
    latents = model.encode(items.images, items.words)
    error = model.rebuild(latents) - patches(items.images)
    answer = F.cross_entropy(model.answer(latents, items.words), items.answer)
    return {"answer": answer, "picture": error.square().sum((1, 2)).mean()}


def batches(items: Items, size: int) -> Iterator[Items]:
    while True:
        for rows in torch.randperm(len(items.answer)).split(size):
            if len(rows) == size:
                yield items.at(rows)


def unseeing(known: Items, items: Items) -> tuple[Tensor, float]:
    """Of one who knows the answers to each kind of question: is the commonest right, (N,); the nats of an answer."""
    table = torch.full((len(ASKED), len(ANSWERS)), 1e-3)
    table.index_put_((known.kind, known.answer), torch.ones(()), accumulate=True)
    nats = -(table / table.sum(1, keepdim=True)).log()[items.kind, items.answer].mean()
    return table.argmax(1)[items.kind] == items.answer, float(nats)


def by_kind(model: Perceiver, items: Items, known: Items) -> dict[str, Reading]:
    """The share of right answers to each kind of question, beside that of the commonest answer in training."""
    right, common = model(items.images, items.words).argmax(1) == items.answer, unseeing(known, items)[0]
    found = {}
    for k, name in enumerate(ASKED):
        own, guess = (share[items.kind == k].double().mean() for share in (right, common))
        found[name] = Reading(float(own), float(guess), int((items.kind == k).sum()))
    return found


def factor(schedule: str, steps: int, warmup: int) -> Callable[[int], float]:
    """What the rate is multiplied by at each step."""

    def of(step: int) -> float:
        progress = min(1.0, max(0, step - warmup) / (steps - warmup))
        if schedule == "restarts" and progress < 1:
            progress = 3 * progress % 1
        fall = {"constant": 1.0, "linear": 1 - progress}.get(schedule, 0.5 * (1 + math.cos(math.pi * progress)))
        return min(1.0, (step + 1) / warmup) * fall

    return of


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, count: int = 6144, rate: float = 3e-3,
    width: int = 48, latents: int = 8, depth: int = 2, dropout: float = 0.0, optimizer: str = "AdamW",
    decay: float = 0.01, schedule: str = "cosine", warmup: int = 40, paint: float = 0.1, hold: int = 0, ramp: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    training, cut = asked(count, seed)
    held_out, test = asked(512, 10_000 + seed)[0], asked(1024, 20_000 + seed)[0]
    model = Perceiver(width, latents, depth, dropout=dropout)
    groups = [
        {"params": [p for name, p in model.named_parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for name, p in model.named_parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(groups, lr=rate, **more)
    plan = torch.optim.lr_scheduler.LambdaLR(optim, factor(schedule, steps, warmup))
    mean = training.images.mean(0)
    spread = float((held_out.images - mean).square().sum((1, 2, 3)).mean())

    def read(model: Any, probe: Items) -> dict[str, Any]:
        found = model.encode(probe.images, probe.words)

        def cost(latents: Tensor) -> Any:
            logits = model.answer(latents, probe.words)
            nats = F.cross_entropy(logits, probe.answer, reduction="none").double().numpy()
            return nats, 0 * nats + 1

        exchanged = {f"{name}_latent_nats": x for name, x in cost_of_exchange(cost, found).items()}
        own = F.cross_entropy(model.answer(found, probe.words), probe.answer)
        other = F.cross_entropy(model(probe.images.roll(1, 0), probe.words), probe.answer)
        swapped = Reading(float(other - own), 0.0, len(probe.answer))
        kinds = {f"val/answer.{name}": {"accuracy": x} for name, x in by_kind(model, probe, training).items()}
        latent = panel.latents(found.mean(1)) | exchanged
        return {"val/latent": latent, "val/answer": {"shuffled_image_nats": swapped}, **kinds}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"answer": unseeing(training, held_out)[1], "picture": spread},
    )  # fmt: skip
    monitor.audit(
        augmentations={"flip": audits.augmentation(flipped, training.images[:64])},
        intake={"items": count, "lost": {"question cut": cut}},
        leaks={"picture": audits.leaks(training.images.numpy(), held_out.images.numpy())},
        ranges={"picture": audits.ranges(training.images, 0.0, 1.0)},
    )
    for step, batch in enumerate(batches(training, size), 1):
        weight = paint * (min(1.0, max(0, step - hold) / ramp) if ramp else 1.0)
        model.train()
        terms = losses(model, batch._replace(images=flipped(batch.images)))
        total = terms["answer"] + weight * terms["picture"]
        weighted = {"answer": (terms["answer"], 1.0), "picture": (terms["picture"], weight)}
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                seen = losses(model, held_out)
                right = model(held_out.images, held_out.words).argmax(1) == held_out.answer
            monitor.validated({f"val/loss/{name}": float(value) for name, value in seen.items()})
            monitor.validated({"accuracy": float(right.double().mean())})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        answered = by_kind(model, test, training)
        whole = float((test.images - mean).square().sum((1, 2, 3)).mean())
        explained = 1 - float(losses(model, test)["picture"]) / whole
    able = {f"{name} questions of new scenes": (x.value, x.null or 0.0) for name, x in answered.items()}
    return able | {"explained variance of new scenes": (explained, 0.0)}


FAMILY = Family(
    "perceiver",
    "development",
    "answers to questions about scenes from a latent array that reads patches and words",
    faults=(
        Fault(
            "answer-from-the-query-itself",
            "The head is given the question's query, and not what it has found in the latents.",
            ("question-only", "decoder-ignores-latent", "dead-parameters"),
            changes=(Change("self.head(found[:, 0])", "self.head(query[:, 0])"),),
        ),
        Fault(
            "each-block-begins-anew",
            "The loop over blocks is given the learnt latents each time, so what they have read is thrown away.",
            ("latent-ignores-input", "dead-parameters"),
            changes=(Change("x = block(x, x)", "x = block(latents, latents)"),),
        ),
        Fault(
            "latents-averaged-before-the-answer",
            "The latents are averaged before the question attends to them: a softmax over one is 1, whatever it asks.",
            ("attention-over-one", "dead-parameters"),
            changes=(Change("self.read(query, latents)", "self.read(query, latents.mean(1, keepdim=True))"),),
        ),
        Fault(
            "groups-by-the-ends-of-names",
            "Groups are made of names that end in weight or bias, and latents, places, order and query end otherwise.",
            ("not-in-optimizer",),
            changes=(
                Change("if p.ndim > 1]", 'if name.endswith("weight")]'),
                Change("if p.ndim <= 1]", 'if name.endswith("bias")]'),
            ),
        ),
        Fault(
            "scheduler-stepped-each-epoch",
            "The schedule is in steps and is stepped once an epoch, so the run ends early in the warm-up.",
            ("learning-rate-off",),
            changes=(
                Change(
                    "        plan.step()\n",
                    "        if step % (len(training.answer) // size) == 0:\n            plan.step()\n",
                ),
            ),
        ),
        Fault(
            "both-sides-of-one-seed",
            "Held-out scenes are drawn with the seed of the training scenes, and are the first of these.",
            ("split-leak",),
            changes=(Change("asked(512, 10_000 + seed)", "asked(512, seed)"),),
        ),
        Fault(
            "a-hundred-scenes",
            "Two batches of scenes are all there is to train on, and their answers are learnt by heart.",
            ("overfitting",),
            options={"count": 128},
        ),
        Fault(
            "questions-cut-at-five-words",
            "Questions are cut at five words, and the sixth is the shape whose row is asked for.",
            ("data-replaced",),
            changes=(Change("LENGTH = 18, 6\n", "LENGTH = 18, 5\n"),),
        ),
        Fault(
            "momentum-as-for-a-convnet",
            "The optimizer is SGD with momentum at 0.1, as for convolutional networks, and attention never gets going.",
            ("no-learning", "plateau"),
            options={"optimizer": "SGD", "rate": 0.1, "steps": 500},
        ),
        Fault(
            "standardised-as-for-a-classifier",
            "Pictures are standardised as for a classifier, and what draws them still ends in a sigmoid.",
            ("range-mismatch",),
            changes=(Change("- 0.5)).clamp(0, 1)", "- 0.5)).clamp(0, 1).sub(0.5).div(0.25)"),),
        ),
        Fault(
            "gradients-emptied-once-an-epoch",
            "The line that empties the gradients slipped out of the loop over batches.",
            ("gradients-add-up",),
            changes=(
                Change(
                    "        optim.zero_grad()\n",
                    "        if step % (len(training.answer) // size) == 1:\n            optim.zero_grad()\n",
                ),
            ),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 64, "latents": 12, "rate": 2e-3}, seeds=(0, 1, 2)),
        Healthy("many-latents", "There are more latents than things to read.", options={"latents": 16}, seeds=(0, 1)),
        Healthy(
            "rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "decay": 0, "schedule": "linear"}, seeds=(0, 1)
        ),
        Healthy("constant", "Nothing settles.", options={"schedule": "constant", "rate": 1.5e-3}, seeds=(0, 1, 2)),
        Healthy(
            "warm-restarts",
            "The rate jumps back up twice.",
            options={"schedule": "restarts", "steps": 500},
            seeds=(0, 1),
        ),
        Healthy("pictures-later", "A term weighs 0 for long.", options={"hold": 150, "ramp": 150}, seeds=(0, 1)),
        Healthy(
            "small-batches", "Losses of single batches are noisy.", options={"size": 32, "steps": 600}, seeds=(0, 1)
        ),
        Healthy("dropout", "Training's loss is above the held-out one.", options={"dropout": 0.1}, seeds=(0, 1)),
        Healthy("few-scenes", "A small set, seen often.", options={"count": 2560, "dropout": 0.1}, seeds=(0, 1, 2)),
    ),
)
