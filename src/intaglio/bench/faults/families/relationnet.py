"""A relation network (Santoro et al. 2017): a small conv net makes an object of each place of a scene, one network
looks at every pair of objects with the question, and another answers from the sum. A side head names what is at each
place. A LightningModule.

Shapes: N questions, P places, C channels, Q numbers of a question.
"""

import logging
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import RGB
from intaglio.health import audits, panel
from intaglio.health.lightning import MonitorCallback
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

THINGS, HIGH, WIDE, CELL = 3, 2, 2, 6
PLACES = HIGH * WIDE
SHAPES, COLUMNS = ("square", "disc", "cross"), ("left", "right")
KINDS = ("shape", "column", "left", "count")
ASKED = torch.tensor([0, 1, 2, 2, 3])
WORDS = (*SHAPES, *COLUMNS, "no", "yes", "one", "two", "three")
NAMES = 4


class Scenes(NamedTuple):
    """``images`` (S, 3, 12, 12) with a red, a green and a blue thing at different places; the ``place`` and the
    ``shape`` of each (S, 3)."""

    images: Tensor
    place: Tensor
    shape: Tensor

    def at(self, rows: Tensor) -> "Scenes":
        return Scenes(*(part[rows] for part in self))


class Batch(NamedTuple):
    """``question`` (N, Q), the ``kind`` and the ``answer`` (N,), the scene's image and the ``names`` (N, P, 2) of
    colour and shape at its places."""

    images: Tensor
    names: Tensor
    question: Tensor
    kind: Tensor
    answer: Tensor


def scenes(count: int, seed: int) -> Scenes:
    draw = torch.Generator().manual_seed(seed)
    place = torch.rand(count, PLACES, generator=draw).topk(THINGS, 1).indices
    shape = torch.randint(len(SHAPES), (count, THINGS), generator=draw)
    moved = torch.randint(2, (2, count, THINGS), generator=draw)
    images = torch.full((count, 3, HIGH * CELL, WIDE * CELL), 0.05)
    rows, columns = torch.arange(HIGH * CELL), torch.arange(WIDE * CELL)
    for k in range(THINGS):
        y = (rows - (place[:, k] // WIDE * CELL + 2 + moved[0, :, k])[:, None])[:, :, None]
        x = (columns - (place[:, k] % WIDE * CELL + 2 + moved[1, :, k])[:, None])[:, None, :]
        square = (y.abs() <= 2) & (x.abs() <= 2)
        drawn = torch.stack([square, y.square() + x.square() <= 5, square & ((y == 0) | (x == 0))])
        seen = drawn[shape[:, k], torch.arange(count)][:, None]
        images = torch.where(seen, RGB[k][:, None, None], images)
    images = images + 0.03 * torch.randn(images.shape, generator=draw)
    return Scenes(images.clamp(0, 1), place, shape)


def answers(made: Scenes, kind: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The word that answers a question of each scene about one thing, or about one and another."""

    def of(what: Tensor, thing: Tensor) -> Tensor:
        return what.gather(1, thing[:, None])[:, 0]

    shape = of(made.shape, one)
    column = of(made.place, one) % WIDE
    left = column < of(made.place, other) % WIDE
    count = (made.shape == shape[:, None]).sum(1) - 1
    return torch.stack([shape, 3 + column, 5 + left.long(), 7 + count]).gather(0, kind[None])[0]


class Questions(Dataset[Batch]):
    """So many questions about each scene, of those whose answer is among the words that are kept."""

    def __init__(self, made: Scenes, each: int, seed: int, kept: Tensor):
        draw, count = torch.Generator().manual_seed(seed), len(made.images) * each
        scene = torch.arange(len(made.images)).repeat_interleave(each)
        drawn, one, step = (torch.randint(n, (count,), generator=draw) for n in (len(ASKED), THINGS, THINGS - 1))
        kind, other = ASKED[drawn], (one + 1 + step) % THINGS
        about = F.one_hot(other, THINGS) * (kind == 2)[:, None]
        question = torch.cat([F.one_hot(kind, len(KINDS)), F.one_hot(one, THINGS), about], 1).float()
        word = answers(made.at(torch.arange(count) // each), kind, one, other)
        is_kept = torch.isin(word, kept)
        self.lost = int((~is_kept).sum())
        answer = (word[:, None] == kept).long().argmax(1)
        self.parts = [part[is_kept] for part in (scene, question, kind, answer)]
        names = torch.stack([torch.arange(THINGS).expand_as(made.shape), made.shape], 2) + 1
        nothing = torch.zeros(len(made.images), PLACES, 2, dtype=torch.int64)
        self.images, self.names = made.images, nothing.scatter(1, made.place[..., None].expand_as(names), names)

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, k: Any) -> Batch:
        scene, question, kind, answer = (part[k] for part in self.parts)
        return Batch(self.images[scene], self.names[scene], question, kind, answer)


def brighter(images: Tensor) -> Tensor:
    """Or darker: each in its own light."""
    return images * (0.8 + 0.4 * torch.rand(len(images), 1, 1, 1))


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)))


class RelationNetwork(L.LightningModule):
    places: Tensor

    def __init__(
        self, words: int, channels: int, width: int, dropout: float, smooth: float, rate: float, optimizer: str,
        schedule: str, warmup: int, naming: float, fade: int, hold: int,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, channels, 3, 3), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 2, 2), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten(2),
        )  # fmt: skip
        self.namer = nn.Linear(channels, 2 * NAMES)
        self.g = mlp(2 * (channels + 2) + len(KINDS) + 2 * THINGS, width, width, width)
        self.f = nn.Sequential(mlp(width, width), nn.Dropout(dropout), nn.Linear(width, words))
        place = torch.arange(PLACES)
        coordinates = torch.stack([place // WIDE / (HIGH - 1), place % WIDE / (WIDE - 1)], 1)
        self.register_buffer("places", 6 * coordinates - 3)
        self.terms: dict[str, tuple[Tensor, float]] = {}

    def relations(self, seen: Tensor, question: Tensor) -> Tensor:
        """The sum over all pairs of what is seen, (N, P, C) → (N, width)."""
        objects = torch.cat([seen, self.places.expand(len(seen), -1, -1)], 2)
        first, second = objects.repeat_interleave(PLACES, 1), objects.repeat(1, PLACES, 1)
        asked = question.repeat_interleave(PLACES**2, 0).view(len(question), PLACES**2, -1)
        return self.g(torch.cat([first, second, asked], 2)).sum(1)

    def forward(self, images: Tensor, question: Tensor) -> Tensor:
        logits: Tensor = self.f(self.relations(self.cnn(images).mT, question))
        return logits

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """And which answers are right."""
        seen = self.cnn(batch.images).mT
        named = self.namer(seen)
        logits = self.f(self.relations(seen, batch.question))
        answer = F.cross_entropy(logits, batch.answer, label_smoothing=self.hparams["smooth"])
        naming = F.cross_entropy(named.unflatten(-1, (2, NAMES)).flatten(0, 2), batch.names.flatten())
        return {"answer": answer, "naming": naming}, logits.argmax(1) == batch.answer

    def weights(self) -> dict[str, float]:
        """Naming may fade, or be held back at first."""
        step, fade, hold = self.global_step, self.hparams["fade"], self.hparams["hold"]
        share = max(0.0, 1 - step / fade) if fade else min(1.0, max(0.0, step - hold) / 100) if hold else 1.0
        return {"answer": 1.0, "naming": share * self.hparams["naming"]}

    def training_step(self, batch: Any) -> Tensor:
        batch = Batch(*batch)
        losses, _ = self.losses(batch._replace(images=brighter(batch.images)))
        weights = self.weights()
        self.terms = {name: (loss, weights[name]) for name, loss in losses.items()}
        return torch.stack([weight * loss for loss, weight in self.terms.values()]).sum()

    def validation_step(self, batch: Any) -> None:
        (losses, right), weights = self.losses(Batch(*batch)), self.weights()
        self.log_dict({f"val/loss/{name}": loss for name, loss in losses.items()})
        self.log("val_loss", torch.stack([weights[name] * loss for name, loss in losses.items()]).sum())
        self.log("val_accuracy", right.float().mean())

    def factor(self, step: int, total: float) -> float:
        warmup = self.hparams["warmup"]
        progress = min(1.0, max(0.0, step - warmup) / (total - warmup))
        if self.hparams["schedule"] == "restarts" and progress < 1:
            progress = 2 * progress % 1
        falls = {"constant": 1.0, "linear": 1 - progress}
        fall = falls.get(self.hparams["schedule"], 0.5 * (1 + math.cos(math.pi * progress)))
        return min(1.0, (step + 1) / warmup) * fall

    def configure_optimizers(self) -> Any:
        eyes, mind = [*self.cnn.parameters(), *self.namer.parameters()], [*self.g.parameters(), *self.f.parameters()]
        more = {"momentum": 0.9} if self.hparams["optimizer"] == "RMSprop" else {}
        groups: list[dict[str, Any]] = [{"params": eyes, "weight_decay": 0.0}, {"params": mind, "weight_decay": 1e-3}]
        optimizer = getattr(torch.optim, self.hparams["optimizer"])(groups, lr=self.hparams["rate"], **more)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def frequencies(known: Batch, words: int) -> Tensor:
    """Of each answer to each kind of question, (kinds, words)."""
    table = torch.full((len(KINDS), words), 1e-3)
    table.index_put_((known.kind, known.answer), torch.ones(()), accumulate=True)
    return table / table.sum(1, keepdim=True)


def guessed(table: Tensor, batch: Batch, smooth: float) -> float:
    """The nats of answers by how frequent they are."""
    table = (1 - smooth) * table + smooth / table.shape[1]
    return float(F.cross_entropy(table.log()[batch.kind], batch.answer, label_smoothing=smooth))


def by_kind(model: Any, batch: Batch, table: Tensor) -> dict[str, Reading]:
    """The share of right answers to each kind of question and to all, beside that of the commonest answers."""
    right = model(batch.images, batch.question).argmax(1) == batch.answer
    common = table.argmax(1)[batch.kind] == batch.answer
    kinds = {name: batch.kind == k for k, name in enumerate(KINDS)} | {"all": torch.ones_like(right)}
    return {
        name: Reading(float(right[rows].double().mean()), float(common[rows].double().mean()), int(rows.sum()))
        for name, rows in kinds.items()
        if rows.any()
    }


def swapped(model: Any, batch: Batch, each: int) -> Reading:
    """The nats that answers cost more with the pictures of other scenes."""
    cost = [F.cross_entropy(model(x, batch.question), batch.answer) for x in (batch.images.roll(each, 0), batch.images)]
    return Reading(float(cost[0] - cost[1]), 0.0, len(batch.answer))


def read(model: Any, probe: Batch, table: Tensor, each: int) -> dict[str, Any]:
    relations = model.relations(model.cnn(probe.images).mT, probe.question)

    def cost(z: Tensor) -> Any:
        nats = F.cross_entropy(model.f(z), probe.answer, reduction="none").double().numpy()
        return nats, 0 * nats + 1

    exchanged = {f"{name}_latent_nats": found for name, found in cost_of_exchange(cost, relations).items()}
    kinds = by_kind(model, probe, table)
    answer = {"shuffled_image_nats": swapped(model, probe, each), "accuracy": kinds.pop("all")}
    return {"val/relations": panel.latents(relations) | exchanged, "val/answer": answer} | {
        f"val/answer.{name}": {"accuracy": value} for name, value in kinds.items()
    }


def train(
    folder: Path, seed: int = 0, steps: int = 500, size: int = 128, accumulate: int = 1, count: int = 3072,
    each: int = 4, kept: int = 10, channels: int = 24, width: int = 96, dropout: float = 0.1, smooth: float = 0.0,
    rate: float = 1e-2, optimizer: str = "AdamW", schedule: str = "cosine", warmup: int = 30, naming: float = 0.5,
    fade: int = 0, hold: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    L.seed_everything(seed, verbose=False)
    made, everything = scenes(count + 128, seed), torch.arange(len(WORDS))
    said = Questions(made, each, seed, everything).parts[-1].bincount(minlength=len(WORDS))
    words = said.topk(kept).indices
    known = Questions(made.at(torch.arange(128, count + 128)), each, seed, words)
    unseen = Questions(made.at(torch.arange(128)), each, seed + 1, words)
    new = Questions(scenes(512, 10_000 + seed), 2, seed + 2, words)
    table, probe = frequencies(known[:], kept), unseen[:]
    model = RelationNetwork(
        kept, channels, width, dropout, smooth, rate, optimizer, schedule, warmup, naming, fade, hold
    )
    shares = [names.bincount() / names.numel() for names in known.names.flatten(0, 1).T]
    named = float(torch.stack([torch.special.entr(share).sum() for share in shares]).mean())
    facts = {
        "leaks": {"picture": audits.leaks(known.images.numpy(), unseen.images.numpy())},
        "intake": {"items": len(known) + known.lost, "lost": {"answer not among the commonest": known.lost}},
        "augmentations": {"light": audits.augmentation(lambda x: brighter(x[None])[0], known.images[:64])},
    }
    watch = MonitorCallback(
        folder, probe, terms=lambda m: m.terms, facts=facts, read=lambda m, probe: read(m, probe, table, each),
        every=50, log_every=5, nulls={
            "train/loss/answer": guessed(table, known[:], smooth), "val/loss/answer": guessed(table, probe, smooth),
            "train/loss/naming": named, "val/loss/naming": named,
        },
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=[watch], gradient_clip_val=1.0, logger=False,
        accumulate_grad_batches=accumulate, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=50 * accumulate,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(model, DataLoader(known, size, shuffle=True, drop_last=True), DataLoader(unseen, 256))
    model.eval()
    with torch.no_grad():
        answered, cost = by_kind(model, new[:], table), swapped(model, new[:], 2)
    told = {f"{name} questions about new scenes": (x.value, x.null or 0.0) for name, x in answered.items()}
    return {**told, "nats that swapped pictures cost": (cost.value, 0.0)}


FAMILY = Family(
    "relationnet",
    "development",
    "answers to questions about things of a scene and how they relate, by a relation network; in Lightning",
    faults=(
        Fault(
            "scenes-repeated-in-the-wrong-order",
            "The list of scenes is repeated as a whole, so most questions stand beside the picture of another scene.",
            ("question-only", "no-learning", "plateau"),
            changes=(Change("(len(made.images)).repeat_interleave(each)", "(len(made.images)).repeat(each)"),),
            case="V question-only",
        ),
        Fault(
            "questions-tiled-over-pairs",
            "Questions are tiled where each was to be repeated for its pairs, so a pair gets that of another scene.",
            ("no-learning", "question-only", "plateau"),
            changes=(Change("question.repeat_interleave(PLACES**2, 0)", "question.repeat(PLACES**2, 1)"),),
        ),
        Fault(
            "row-for-both-coordinates",
            "Both coordinates of a place are its row, so that nothing tells one column from another.",
            ("question-only",),
            changes=(Change("place % WIDE / (WIDE - 1)", "place // WIDE / (HIGH - 1)"),),
            minor=True,
        ),
        Fault(
            "validated-on-what-is-trained-on",
            "The loader for validation was copied from that for training, and has its questions still.",
            ("split-leak", "validation-missing", "flattering-accuracy"),
            changes=(Change("DataLoader(unseen, 256))", "DataLoader(known, 256))"),),
            options={"count": 512},
        ),
        Fault(
            "schedule-stepped-by-epochs",
            "The interval was left out, so Lightning steps the schedule, which counts steps, once an epoch.",
            ("learning-rate-off",),
            changes=(Change(', "interval": "step"', ""),),
        ),
        Fault(
            "terms-added-up-without-weights",
            "The terms are kept with their weights for the log, and added up without them.",
            ("weight-not-applied",),
            changes=(Change("[weight * loss for loss, weight in self", "[loss for loss, _ in self"),),
            options={"naming": 0.1},
            case="V weight-not-applied",
        ),
        Fault(
            "naming-under-no-grad",
            "Names were read off for a look at first; they are in the loss now, and still under no_grad.",
            ("term-inert", "dead-parameters"),
            changes=(Change("        named = self", "        with torch.no_grad():\n            named = self"),),
        ),
        Fault(
            "pairs-in-no-group",
            "When groups with their own decay were made, the network that looks at pairs was put into none.",
            ("not-in-optimizer",),
            changes=(Change("[*self.g.parameters(), *self.f.parameters()]", "[*self.f.parameters()]"),),
        ),
        Fault(
            "hook-of-eval-mode-emptied",
            "Accuracy was better in training mode, so Lightning's hook that calls eval() was overridden with nothing.",
            ("validation-pollutes",),
            changes=(Change("    def val", "    def on_validation_model_eval(self) -> None: ...\n\n    def val"),),
            case="J validation-pollutes",
        ),
        Fault(
            "five-commonest-answers",
            "Answers but for the five commonest are thrown away, as is done where there are thousands.",
            ("data-replaced",),
            options={"kept": 5},
        ),
        Fault(
            "learnt-by-heart",
            "Sixty-four scenes are all there is to train on, and nothing is dropped.",
            ("overfitting",),
            options={"count": 64, "each": 8, "dropout": 0.0},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"channels": 32, "width": 128, "rate": 8e-3}, seeds=(0, 1)),
        Healthy("rmsprop", "With a momentum.", options={"optimizer": "RMSprop", "rate": 1e-3}, seeds=(0, 1)),
        Healthy("nadam", options={"optimizer": "NAdam", "rate": 8e-3}, seeds=(0, 1)),
        Healthy("constant", "Nothing settles.", options={"schedule": "constant", "rate": 6e-3}, seeds=(0, 1)),
        Healthy("linear", options={"optimizer": "Adam", "schedule": "linear"}, seeds=(0, 1)),
        Healthy(
            "warm-restarts", "The rate jumps back up in the middle.", options={"schedule": "restarts"}, seeds=(0, 1)
        ),
        Healthy("fading-term", "The weight of naming falls to 0 half-way.", options={"fade": 250}, seeds=(0, 1)),
        Healthy(
            "late-term",
            "Naming has no weight for a while, and then the loss rises with it.",
            options={"hold": 100, "naming": 1.0},
            seeds=(0, 1),
        ),
        Healthy("accumulated", "A step takes two batches.", options={"size": 64, "accumulate": 2}, seeds=(0, 1)),
        Healthy("few-scenes", "Not many, and each is asked about more often.", options={"count": 1024, "each": 8}),
        Healthy("smoothed-labels", "The loss cannot come near 0.", options={"smooth": 0.1}, seeds=(0, 1)),
        Healthy("more-dropped", "Training's loss is above the held-out one.", options={"dropout": 0.25}, seeds=(0, 1)),
    ),
)
