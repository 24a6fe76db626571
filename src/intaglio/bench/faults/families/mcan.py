"""Questions about scenes, answered by deep modular co-attention (Yu et al. 2019): the words of a question attend to one
another, regions of the picture to one another and to the words, and the answer is one of a list.

Shapes: N pictures, Q questions about each, B = N · Q, R regions, F features of a region, L words, W width.
"""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits
from intaglio.health.monitor import Monitor
from intaglio.history import Reading

THINGS = ("square", "disc", "cross", "star", "ring", "arrow")
COLOURS = ("red", "green", "blue", "yellow")
MOST, REGIONS, FEATURES = len(THINGS), 6, 27
KINDS = ("colour", "size", "place", "doubt", "most")
ASKED = (
    [f"What colour is the {thing}?" for thing in THINGS],
    [f"How large is the {thing}?" for thing in THINGS],
    [f"In which corner is the {thing}?" for thing in THINGS],
    [f"Do you see a large {thing}?" for thing in THINGS],
    [f"Which thing is the {most}?" for most in ("largest", "smallest", "highest", "lowest")],
)
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SAID = (COLOURS, ("small", "large"), CORNERS, ("no", "yes"), THINGS)
QUESTIONS = [question for kind in ASKED for question in kind]
ANSWERS = [answer for kind in SAID for answer in kind]
KIND = torch.arange(len(KINDS)).repeat_interleave(torch.tensor([len(kind) for kind in ASKED]))
PAD, UNKNOWN = 0, 1
HELD_OUT = 256


class Items(NamedTuple):
    """Of pictures, ``regions`` (N, R, F), which of them are ``present`` (N, R) and the picture's number (N,), each with
    several of ``question`` and ``answer`` (N, Q) and the regions ``meant`` (N, Q, R); or, flat, with one of each."""

    regions: Tensor
    present: Tensor
    picture: Tensor
    question: Tensor
    answer: Tensor
    meant: Tensor

    def at(self, rows: Tensor) -> "Items":
        return Items(*(part[rows] for part in self))

    def flat(self) -> "Items":
        """Every question with its picture."""
        each = self.question.shape[1]
        seen = (part.repeat_interleave(each, 0) for part in self[:3])
        return Items(*seen, *(part.flatten(0, 1) for part in self[3:]))


def scenes(count: int, seed: int, each: int = 2) -> tuple[Items, int, int]:
    """Pictures of up to six things, as a detector finds them, the largest first, and questions about each; how many
    things there are, and how many of them found no place among the regions. In few pictures nothing is found."""
    draw = torch.Generator().manual_seed(seed)
    number = torch.randint(2, MOST + 1, (count,), generator=draw)
    number[torch.rand(count, generator=draw) < 0.0015] = 0
    thing = torch.rand(count, MOST, generator=draw).argsort(1)
    colour = torch.randint(4, (count, MOST), generator=draw)
    large = torch.randint(2, (count, MOST), generator=draw)
    side = 0.15 + 0.15 * large + 0.1 * torch.rand(count, MOST, generator=draw)
    place = torch.rand(count, MOST, 2, generator=draw)
    there = torch.arange(MOST) < number[:, None]

    look = 0.6 * torch.rand(12, FEATURES - 3, generator=torch.Generator().manual_seed(7)) - 0.3
    features = torch.cat([look[thing] + look[6 + colour] + look[10 + large], place, side[..., None]], 2)
    features = features + 0.02 * torch.randn(features.shape, generator=draw)
    order = (side * there).argsort(1, descending=True)[:, :REGIONS]
    present = there.gather(1, order)
    padded = np.zeros((count, REGIONS, FEATURES))
    padded[present.numpy()] = features.take_along_dim(order[..., None], 1)[present].numpy()

    kind, which = (torch.randint(n, (count, each), generator=draw) for n in (len(KINDS), 4))
    kind[number == 0] = KINDS.index("doubt")
    by = torch.stack([side, -side, -place[..., 1], place[..., 1]], 1).masked_fill(~there[:, None], -9.0)
    some = (torch.rand(count, each, generator=draw) * number[:, None]).long()
    subject = torch.where(kind == KINDS.index("most"), by.argmax(2).gather(1, which), some)
    corner = 2 * (place[..., 1] > 0.5) + (place[..., 0] > 0.5)
    of, *told = (part.gather(1, subject) for part in (thing, colour, large, corner, large * there))
    question = torch.stack([of, 6 + of, 12 + of, 18 + of, 24 + which], 2)
    answer = torch.stack([*told, of], 2) + torch.tensor([0, 4, 6, 10, 12])
    asked, right = (x.gather(2, kind[..., None])[..., 0] for x in (question, answer))
    meant = (F.one_hot(subject, MOST).bool() & there[:, None]).take_along_dim(order[:, None], 2)
    items = Items(torch.from_numpy(padded).float(), present, torch.arange(count), asked, right, meant)
    return items, int(there.sum()), int(there.sum() - present.sum())


def split_up(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def vocabulary(texts: Sequence[str]) -> dict[str, int]:
    return {word: 2 + k for k, word in enumerate(sorted({word for text in texts for word in split_up(text)}))}


def tokens(texts: Sequence[str], known: dict[str, int]) -> Tensor:
    """(Q, L), with padding at the end."""
    rows = [[known.get(word, UNKNOWN) for word in split_up(text)] for text in texts]
    return torch.tensor([row + [PAD] * (max(map(len, rows)) - len(row)) for row in rows])


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -1e9)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.merge = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, to: Tensor, mask: Tensor) -> Tensor:
        """Queries of ``x`` (B, ·, W) to what of ``to`` (B, K, W) the mask (B, K) shows."""
        told = ((self.query, x), (self.key, to), (self.value, to))
        q, k, v = (layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, y in told)
        weights = masked(q @ k.mT / math.sqrt(q.shape[-1]), mask[:, None, None]).softmax(-1)
        merged: Tensor = self.merge((weights @ v).transpose(1, 2).flatten(2))
        return merged


class Layer(nn.Module):
    """Self-attention, with ``guided`` also attention to the words, and a perceptron, each normalised after its sum."""

    def __init__(self, width: int, heads: int, dropout: float, guided: bool):
        super().__init__()
        self.own = Attention(width, heads)
        self.guide = Attention(width, heads) if guided else None
        inner, outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.feed = nn.Sequential(inner, nn.ReLU(), outer)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 + guided))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, said: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        x = self.norms[0](x + self.dropout(self.own(x, x, mask)))
        if self.guide is not None:
            x = self.norms[1](x + self.dropout(self.guide(x, said, known)))
        made: Tensor = self.norms[-1](x + self.dropout(self.feed(x)))
        return made


class Glance(nn.Module):
    """One vector of many, by weights that a perceptron gives them; and the logarithms of these (B, ·)."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.out = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weights = masked(self.score(x)[..., 0], mask).log_softmax(1)
        return self.out((weights.exp()[..., None] * x).sum(1)), weights


class MCAN(nn.Module):
    def __init__(self, words: int, width: int = 64, heads: int = 4, layers: int = 2, dropout: float = 0.1):
        super().__init__()
        self.embedding = nn.Embedding(words, 48, padding_idx=PAD)
        self.lstm = nn.LSTM(48, width, batch_first=True)
        self.seen = nn.Linear(FEATURES, width)
        self.encoder = Layer(width, heads, dropout, False)
        self.decoder = nn.ModuleList(Layer(width, heads, dropout, True) for _ in range(layers))
        self.hear, self.look = Glance(width), Glance(width)
        self.fusion = nn.LayerNorm(2 * width)
        self.answer = nn.Linear(2 * width, len(ANSWERS))

    def read(self, words: Tensor) -> Tensor:
        """(B, L, W): the words in their order, the longest questions first, as packing wants them."""
        lengths, order = (words != PAD).sum(1).sort(descending=True)
        packed = pack_padded_sequence(self.embedding(words)[order], lengths, batch_first=True)
        made, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=words.shape[1])
        return made[order.argsort()]

    def forward(self, regions: Tensor, present: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the answers, and the logarithms of the regions' weights."""
        known, seen = words != PAD, self.seen(regions)
        said = self.encoder(self.read(words), known)
        for layer in self.decoder:
            seen = layer(seen, present, said, known)
        (question, _), (picture, where) = self.hear(said, known), self.look(seen, present)
        return self.answer(self.fusion(question + picture)), where


def losses(model: MCAN, batch: Items, words: Tensor, smooth: float = 0.0) -> dict[str, Tensor]:
    """Nats of the answers, and of where to look, for questions about things that are among the regions."""
    logits, where = model(batch.regions, batch.present, words[batch.question])
    nats = -where.masked_fill(~batch.meant, 0.0).sum(1) / batch.meant.sum(1).clamp(min=1)
    point = nats.sum() / batch.meant.any(1).sum().clamp(min=1)
    return {"answer": F.cross_entropy(logits, batch.answer, label_smoothing=smooth), "point": point}


def batches(items: Items, size: int) -> Iterator[Items]:
    while True:
        for rows in torch.randperm(len(items.answer)).split(size):
            if len(rows) == size:
                yield items.at(rows)


def by_question(known: Items) -> Tensor:
    """How frequent each answer is to each question, (questions, answers), without a look at any picture."""
    table = torch.full((len(QUESTIONS), len(ANSWERS)), 1e-3)
    table.index_put_((known.question, known.answer), torch.ones(()), accumulate=True)
    return table / table.sum(1, keepdim=True)


def guessed(table: Tensor, items: Items, smooth: float) -> dict[str, float]:
    """The losses of one who answers by how frequent an answer is, and looks everywhere alike."""
    table = (1 - smooth) * table + smooth / len(ANSWERS)
    answer = F.cross_entropy(table[items.question].log(), items.answer, label_smoothing=smooth)
    return {"answer": float(answer), "point": float(items.present.sum(1)[items.meant.any(1)].log().mean())}


def by_kind(model: MCAN, items: Items, words: Tensor, table: Tensor) -> dict[str, Reading]:
    """The share of right answers to each kind of question, beside that of the commonest answers."""
    right = model(items.regions, items.present, words[items.question])[0].argmax(1) == items.answer
    common = table.argmax(1)[items.question] == items.answer
    rows = {name: KIND[items.question] == k for k, name in enumerate(KINDS)} | {"all": torch.ones_like(right)}
    return {
        name: Reading(float(right[of].double().mean()), float(common[of].double().mean()), int(of.sum()))
        for name, of in rows.items()
    }


def swapped(model: MCAN, items: Items, words: Tensor) -> Reading:
    """Nats that the answers cost more when the pictures are those of other questions."""
    asked = words[items.question]
    own, other = (
        F.cross_entropy(model(items.regions.roll(by, 0), items.present.roll(by, 0), asked)[0], items.answer)
        for by in (0, 2)
    )
    return Reading(float(other - own), 0.0, len(items.answer))


def planned(step: int, schedule: str, steps: int, warm: int) -> float:
    """The factor of the rate."""
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / (steps - warm)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if schedule == "linear":
        return max(0.02, 1 - done)
    if schedule == "restarts":
        return 0.5 * (1 + math.cos(math.pi * (3 * done % 1)))
    if schedule == "constant":
        return 1.0
    return 0.2 ** ((done > 0.7) + (done > 0.85))


def train(
    folder: Path, seed: int = 0, epochs: int = 4, size: int = 64, count: int = 3456, rate: float = 2e-3,
    width: int = 64, heads: int = 4, layers: int = 2, dropout: float = 0.1, point: float = 0.5, hold: int = 0,
    ramp: int = 0, smooth: float = 0.0, optimizer: str = "Adam", decay: float = 0.0,
    schedule: str = "steps", warm: int = 40,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    made, things, cut = scenes(count, seed)
    order = torch.randperm(count)
    training, held_out = made.at(order[HELD_OUT:]).flat(), made.at(order[:HELD_OUT]).flat()
    test = scenes(512, 10_000 + seed)[0].flat()
    known, table = vocabulary([QUESTIONS[k] for k in training.question.unique()]), by_question(training)
    words = tokens(QUESTIONS, known)
    model = MCAN(2 + len(known), width, heads, layers, dropout)
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, weight_decay=decay)
    steps = epochs * (len(training.answer) // size)
    plan = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: planned(step, schedule, steps, warm))

    def read(model: Any, probe: Items) -> dict[str, Any]:
        kinds = by_kind(model, probe, words, table)
        found = {"shuffled_image_nats": swapped(model, probe, words), "accuracy": kinds.pop("all")}
        return {"val/answer": found} | {f"val/answer.{name}": {"accuracy": x} for name, x in kinds.items()}

    monitor = Monitor(
        model, optim, folder=folder, taps={"picture": "seen", "fused": "fusion"}, probe=held_out, read=read,
        forward=lambda model, probe: model(probe.regions, probe.present, words[probe.question]),
        every=50, log_every=5, steps=steps, nulls=guessed(table, held_out, smooth),
    )  # fmt: skip
    monitor.audit(
        intake={"items": things, "lost": {"things beyond the largest": cut}},
        leaks={"picture": audits.leaks(training.picture[:, None].numpy(), held_out.picture[:, None].numpy())},
    )
    asked, used = words[held_out.question], words[training.question].unique()
    monitor.log({
        "train/text/unreachable_share": 1 - int((used > UNKNOWN).sum()) / len(known),
        "val/text/unknown_share": float((asked == UNKNOWN).sum() / (asked != PAD).sum()),
    })  # fmt: skip
    for step, batch in enumerate(batches(training, size), 1):
        weight = point * min(1.0, max(0, step - hold) / ramp) if ramp else point
        model.train()
        terms = losses(model, batch, words, smooth)
        total = terms["answer"] + weight * terms["point"]
        weighted = {"answer": (terms["answer"], 1.0), "point": (terms["point"], weight)}
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, tuple(batch))
        optim.step()
        plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                found = losses(model, held_out, words, smooth)
            monitor.validated({name: float(value) for name, value in found.items()})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        answered, cost = by_kind(model, test, words, table), swapped(model, test, words)
    told = {f"{name} questions about new pictures": (x.value, x.null or 0.0) for name, x in answered.items()}
    return {"nats that swapped pictures cost": (cost.value, 0.0), **told}


FAMILY = Family(
    "mcan", "development", "answers to questions about the things in a picture, by co-attention of words and regions",
    faults=(
        Fault("questions-left-in-the-order-of-their-length",
              "Questions are sorted by length for packing and never put back, so pictures meet others' questions.",
              ("no-learning", "question-only"), changes=(Change("return made[order.argsort()]", "return made"),)),
        Fault("every-layer-given-the-first-regions",
              "Each guided layer is given the regions as they came in, so that of all layers only the last one counts.",
              ("dead-parameters",),
              changes=(Change("seen = layer(seen,", "seen = layer(self.seen(regions),"),)),
        Fault("features-in-an-array-of-integers",
              "The array that regions are padded into is one of integers, so features between -1 and 1 become 0.",
              ("latent-ignores-input", "question-only", "dead-parameters"),
              changes=(Change("np.zeros((count, REGIONS, FEATURES))", "np.zeros((count, REGIONS, FEATURES), int)"),)),
        Fault("head-made-anew-after-the-optimizer",
              "The last layer is made anew for this list of answers when the optimizer is there already.",
              ("not-in-optimizer",),
              changes=(Change("    steps = epochs *",
                              "    model.answer = nn.Linear(2 * width, len(ANSWERS))\n    steps = epochs *"),)),
        Fault("vocabulary-of-words-with-their-marks",
              "The vocabulary is built from words with their capitals and question marks, and looked up without.",
              ("vocabulary-unreachable",), case="E vocabulary-unreachable",
              changes=(Change("for text in texts for word in split_up(text)",
                              "for text in texts for word in text.split()"),)),
        Fault("two-regions-of-six", "Of each picture the two largest regions are kept, and the others are dropped.",
              ("data-replaced",), case="J data-replaced",
              changes=(Change("len(THINGS), 6, 27", "len(THINGS), 2, 27"),)),
        Fault("split-by-question", "Questions are split and not pictures, so most held-out pictures are trained on.",
              ("split-leak",), case="V split-leak",
              changes=(Change("order = torch.randperm(count)", "order = torch.randperm(2 * count)"),
                       Change("made.at(order[HELD_OUT:]).flat(), made.at(order[:HELD_OUT]).flat()",
                              "made.flat().at(order[2 * HELD_OUT :]), made.flat().at(order[: 2 * HELD_OUT])"))),
        Fault("minus-infinity-where-masked",
              "What is masked gets minus infinity, and in a few pictures no region was found, so that all is masked.",
              ("non-finite",), changes=(Change("masked_fill(~mask, -1e9)", 'masked_fill(~mask, float("-inf"))'),)),
        Fault("weights-detached-for-drawing",
              "The regions' weights are detached, as they were for drawing them, and the loss on them teaches nothing.",
              ("term-inert",), changes=(Change("* x).sum(1)), weights", "* x).sum(1)), weights.detach()"),)),
        Fault("cosine-of-one-epoch", "The cosine was made for the steps of one epoch, and stays at 0 after the first.",
              ("learning-rate-off",), options={"schedule": "cosine"},
              changes=(Change("schedule, steps, warm))", "schedule, steps // epochs, warm))"),)),
        Fault("learnt-by-heart", "Sixty-four pictures are all there is to learn from, and they are learnt by heart.",
              ("overfitting",), options={"count": HELD_OUT + 64, "epochs": 240, "dropout": 0.0, "point": 0.0}),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("wide", options={"width": 96, "heads": 6, "rate": 1.5e-3}, seeds=(0, 1)),
        Healthy("one-layer", options={"layers": 1}, seeds=(0, 1)),
        Healthy("constant", "The rate stays as it is.",
                options={"optimizer": "RAdam", "schedule": "constant", "warm": 1, "epochs": 5}),
        Healthy("adamw-cosine", options={"optimizer": "AdamW", "decay": 0.02, "schedule": "cosine"}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("small-batches", "Losses of single batches are noisy.",
                options={"size": 24, "epochs": 2, "rate": 1e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("without-pointing", "Where to look is left to the answers, so they stay at their guesses for a while.",
                options={"point": 0.0}, seeds=(0, 1)),
        Healthy("late-pointing", "The loss on the weights is muted at first, and the total rises with its ramp.",
                options={"point": 1.0, "hold": 120, "ramp": 120}, seeds=(0, 1)),
        Healthy("smoothed-labels", "The loss cannot come near 0.", options={"smooth": 0.1}, seeds=(0, 1)),
        Healthy("few-pictures", "Not many, and seen often.", options={"count": 1536, "epochs": 12, "dropout": 0.2},
                seeds=(0, 1)),
    ),
)  # fmt: skip
