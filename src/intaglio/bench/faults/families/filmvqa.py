"""Questions about what is in a picture, answered by FiLM (Perez et al. 2018): a question scales and shifts what a
small conv net sees, and a Gaussian bottleneck with free bits (Kingma et al. 2016, eq. 15) stands before the answer.

Shapes: N pictures, P questions about each, B = N · P questions, L words, C channels, G groups of the latent.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

KINDS = ("shape", "colour", "row", "column", "doubt")
QUESTIONS = [f"can you tell me its {kind}" for kind in KINDS[:4]]
QUESTIONS += [f"is the thing you see a {shape}" for shape in SHAPES]
KIND = torch.arange(len(QUESTIONS)).clamp(max=4)
SAID = (SHAPES, COLOURS, ROWS, COLUMNS, ("no", "yes"))
ANSWERS = tuple(word for words in SAID for word in words)
FIRST = torch.tensor([sum(map(len, SAID[:k])) for k in range(len(SAID))])
VOCABULARY = ("<pad>", *sorted({word for question in QUESTIONS for word in question.split()}))
LENGTH = 7
HELD_OUT = 256


class Items(NamedTuple):
    """``images`` (N, 3, S, S), each with several of ``question`` (N, P) and ``answer`` (N, P); or, flat, one of each:
    (B, 3, S, S) and (B,)."""

    images: Tensor
    question: Tensor
    answer: Tensor

    def at(self, rows: Tensor) -> "Items":
        return Items(*(part[rows] for part in self))

    def flat(self) -> "Items":
        """Every question with its picture."""
        each = self.question.shape[1]
        return Items(self.images.repeat_interleave(each, 0), self.question.flatten(), self.answer.flatten())


def tokens() -> tuple[Tensor, Tensor]:
    """The words of all questions (Q, L), and how many words each has in full (Q,)."""
    words = torch.zeros(len(QUESTIONS), LENGTH, dtype=torch.int64)
    for row, question in zip(words, QUESTIONS, strict=True):
        said = torch.tensor([VOCABULARY.index(word) for word in question.split()][:LENGTH])
        row[: len(said)] = said
    return words, torch.tensor([len(question.split()) for question in QUESTIONS])


def right_answers(factors: Tensor) -> Tensor:
    """To all questions about each picture (N, 5), (N, Q)."""
    doubts = [factors[:, 0] == shape for shape in range(len(SHAPES))]
    return torch.cat([FIRST[:4] + factors[:, [0, 1, 3, 4]], FIRST[4] + torch.stack(doubts, 1).long()], 1)


def asked(count: int, seed: int, each: int = 2) -> Items:
    """Different questions about each of so many pictures."""
    images, factors = pictures(count, seed)
    draw = torch.Generator().manual_seed(seed)
    question = torch.rand(count, len(QUESTIONS), generator=draw).topk(each, 1).indices
    return Items(images, question, right_answers(factors).gather(1, question))


def placed(x: Tensor) -> Tensor:
    """With two channels that tell where a place is."""
    line = torch.linspace(-1, 1, x.shape[-1]).expand(len(x), 1, x.shape[-1], x.shape[-1])
    return torch.cat([x, line, line.mT], 1)


class Block(nn.Module):
    """A residual block whose normalised features are scaled and shifted (Perez et al. 2018, fig. 3)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels + 2, channels, 1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = F.relu(self.first(placed(x)))
        made = self.norm(self.second(x))
        return x + F.relu((1 + scale)[:, :, None, None] * made + shift[:, :, None, None])


class Answerer(nn.Module):
    def __init__(self, channels: int = 32, hidden: int = 64, latent: int = 16, blocks: int = 2):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        )  # fmt: skip
        self.embedding = nn.Embedding(len(VOCABULARY), 32, padding_idx=0)
        self.gru, self.even = nn.GRU(32, hidden, batch_first=True), nn.LayerNorm(hidden)
        self.modulation = nn.Linear(hidden, 2 * blocks * channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(blocks))
        self.last = nn.Sequential(nn.Conv2d(channels + 2, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        inner, outer = nn.Linear(128, 128), nn.Linear(128, 2 * latent)
        nn.init.constant_(outer.bias[latent:], -4.0)  # little noise at first
        self.posterior = nn.Sequential(inner, nn.ReLU(), outer)
        self.answer = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, len(ANSWERS)))

    def encode(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent."""
        ends = (words > 0).sum(1) - 1
        question = self.even(self.gru(self.embedding(words))[0][torch.arange(len(words)), ends])
        seen = self.stem(images)
        modulated = self.modulation(question).chunk(len(self.blocks), 1)
        for block, by in zip(self.blocks, modulated, strict=True):
            seen = block(seen, *by.chunk(2, 1))
        mean, log_variance = self.posterior(self.last(placed(seen)).amax((2, 3))).chunk(2, 1)
        return mean, log_variance.clamp(-8, 4)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        logits: Tensor = self.answer(self.encode(images, words)[0])
        return logits


def drawn(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def losses(model: Answerer, batch: Items, words: Tensor, groups: int, floor: float, smooth: float) -> dict[str, Tensor]:
    """Nats a question; ``floor`` are the free bits of a group."""
    mean, log_variance = model.encode(batch.images, words[batch.question])
    logits = model.answer(drawn(mean, log_variance))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(0)
    kl_G = kl.unflatten(0, (groups, -1)).sum(1)
    answer = F.cross_entropy(logits, batch.answer, label_smoothing=smooth)
    return {"answer": answer, "kl": kl_G.clamp(min=floor).sum()}


def brighter(images: Tensor) -> Tensor:
    """Or darker: each in its own light."""
    return images * (0.8 + 0.4 * torch.rand(len(images), 1, 1, 1))


def batches(items: Items, size: int) -> Iterator[Items]:
    while True:
        for rows in torch.randperm(len(items.images)).split(size):
            if len(rows) == size:
                yield items.at(rows)


def by_question(known: Items) -> Tensor:
    """How frequent each answer is to each question, (Q, A), without a look at any picture."""
    table = torch.full((len(QUESTIONS), len(ANSWERS)), 1e-3)
    table.index_put_((known.question, known.answer), torch.ones(()), accumulate=True)
    return table / table.sum(1, keepdim=True)


def guessed(table: Tensor, batch: Items, smooth: float) -> float:
    """Nats of the answers by how frequent they are."""
    table = (1 - smooth) * table + smooth / len(ANSWERS)
    return float(F.cross_entropy(table[batch.question].log(), batch.answer, label_smoothing=smooth))


def by_kind(model: Answerer, batch: Items, words: Tensor, table: Tensor) -> dict[str, Reading]:
    """The share of right answers to each kind of question and to all, beside that of the commonest answers."""
    right = model(batch.images, words[batch.question]).argmax(1) == batch.answer
    common = table.argmax(1)[batch.question] == batch.answer
    kinds = {name: KIND[batch.question] == k for k, name in enumerate(KINDS)} | {"all": torch.ones_like(right)}
    return {
        name: Reading(float(right[rows].double().mean()), float(common[rows].double().mean()), int(rows.sum()))
        for name, rows in kinds.items()
        if rows.any()
    }


def swapped(model: Answerer, batch: Items, words: Tensor) -> Reading:
    """Nats that the answers cost more when the pictures are those of other questions."""
    other = batch.images.roll(2, 0)
    cost = [F.cross_entropy(model(x, words[batch.question]), batch.answer) for x in (other, batch.images)]
    return Reading(float(cost[0] - cost[1]), 0.0, len(batch.answer))


def planned(optim: torch.optim.Optimizer, schedule: str, steps: int, warm: int) -> Any:
    plans = torch.optim.lr_scheduler
    if schedule == "linear":
        return plans.LinearLR(optim, 1.0, 0.05, total_iters=steps)
    if schedule == "cosine":
        return plans.OneCycleLR(optim, optim.param_groups[0]["lr"], steps + 1, pct_start=warm / steps)
    if schedule == "restarts":
        return plans.CosineAnnealingWarmRestarts(optim, steps // 3)
    return plans.ConstantLR(optim, 1.0)


def train(
    folder: Path, seed: int = 0, epochs: int = 4, size: int = 32, count: int = 4096, rate: float = 2.5e-3,
    channels: int = 32, hidden: int = 64, groups: int = 4, each: int = 4, beta: float = 0.04, hold: int = 220,
    ramp: int = 150, free: float = 0.4, smooth: float = 0.0, optimizer: str = "Adam", momentum: float = 0.0,
    decay: float = 0.0, schedule: str = "linear", warm: int = 40, augment: bool = True,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    items = asked(count, seed)
    order = torch.randperm(count)
    training, held_out = items.at(order[HELD_OUT:]), items.at(order[:HELD_OUT])
    known, probe, test = training.flat(), held_out.flat(), asked(512, 10_000 + seed).flat()
    words, lengths = tokens()
    table, floor = by_question(known), free / groups
    steps = epochs * (len(training.images) // size)
    model = Answerer(channels, hidden, groups * each)
    more = {"momentum": momentum} if momentum else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, weight_decay=decay, **more)
    plan = planned(optim, schedule, steps, warm)

    def read(model: Any, probe: Items) -> dict[str, Any]:
        mean, log_variance = model.encode(probe.images, words[probe.question])

        def cost(z: Tensor) -> Any:
            nats = F.cross_entropy(model.answer(z), probe.answer, reduction="none").double().numpy()
            return nats, 0 * nats + 1

        found = panel.latents(mean, log_variance)
        found["noise_ratio"] = bottleneck.noise_ratio(drawn(mean, log_variance), mean, log_variance)
        found["target_entropy"] = bottleneck.entropy_nats(probe.answer)
        found |= {f"{name}_latent_nats": value for name, value in cost_of_exchange(cost, mean).items()}
        if floor:
            found["kl_charged"] = bottleneck.kl_charged(mean, log_variance, floor, groups)
            found["groups_above_floor"] = bottleneck.groups_above_floor(mean, log_variance, floor, groups)
        kinds = by_kind(model, probe, words, table)
        answers = {"shuffled_image_nats": swapped(model, probe, words), "accuracy": kinds.pop("all")}
        return {"val/latent": found, "val/answer": answers} | {
            f"val/answer.{name}": {"accuracy": value} for name, value in kinds.items()
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=probe, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/answer": guessed(table, known, smooth), "val/loss/answer": guessed(table, probe, smooth)},
    )  # fmt: skip
    monitor.audit(
        intake={"items": len(known.answer), "lost": {"words cut off": int((lengths > LENGTH)[known.question].sum())}},
        leaks={"picture": audits.leaks(training.images.numpy(), held_out.images.numpy())},
    )
    if augment:
        light = audits.augmentation(lambda x: brighter(x[None])[0], training.images[:64])
        monitor.audit(augmentations={"light": light})
    for step, chosen in enumerate(batches(training, size), 1):
        batch = chosen.flat()
        if augment:
            batch = batch._replace(images=brighter(batch.images))
        weight = beta * min(1.0, max(0, step - hold) / ramp)
        model.train()
        terms = losses(model, batch, words, groups, floor, smooth)
        total = terms["answer"] + weight * terms["kl"]
        weighted = {"answer": (terms["answer"], 1.0), "kl": (terms["kl"], weight)}
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        optim.step()
        plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                seen = losses(model, probe, words, groups, floor, smooth)
            monitor.validated({f"val/loss/{name}": float(value) for name, value in seen.items()})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        answered, cost = by_kind(model, test, words, table), swapped(model, test, words)
    told = {f"{name} questions about new pictures": (x.value, x.null or 0.0) for name, x in answered.items()}
    return {"nats that swapped pictures cost": (cost.value, 0.0), **told}


FAMILY = Family(
    "filmvqa",
    "development",
    "answers to questions about a picture, by a conv net that the question modulates and a bottleneck in groups",
    faults=(
        Fault(
            "pictures-tiled-and-not-repeated",
            "Pictures are tiled where each was to be repeated for its questions, so a question has another's picture.",
            ("question-only",),
            changes=(Change("self.images.repeat_interleave(each, 0)", "self.images.repeat(each, 1, 1, 1)"),),
        ),
        Fault(
            "second-question-held-out",
            "The second question about each picture is held out, so all held-out pictures are trained on.",
            ("split-leak",),
            changes=(
                Change(
                    "training, held_out = items.at(order[HELD_OUT:]), items.at(order[:HELD_OUT])",
                    "training = Items(items.images, items.question[:, :1], items.answer[:, :1])\n"
                    "    held_out = Items(items.images, items.question[:, 1:], items.answer[:, 1:]).at(order[:512])",
                ),
            ),
            options={"size": 64, "epochs": 8},
            case="V split-leak",
        ),
        Fault(
            "questions-cut-after-four-words",
            "Questions are cut after four words, as was good for other data, and with that lose what they ask of.",
            ("data-replaced",),
            changes=(Change("LENGTH = 7", "LENGTH = 4"),),
        ),
        Fault(
            "what-blocks-make-thrown-away",
            "What the modulated blocks make is assigned to nothing, and the stem's features go on to the bottleneck.",
            ("dead-parameters",),
            changes=(Change("seen = block(seen, *by.chunk(2, 1))", "block(seen, *by.chunk(2, 1))"),),
        ),
        Fault(
            "gradients-never-emptied",
            "zero_grad() is missing, so every update is made with the sum of all batches so far.",
            ("gradients-add-up",),
            changes=(Change("        optim.zero_grad()\n", ""),),
        ),
        Fault(
            "beta-of-another-paper",
            "β is 4, as in a paper on disentangling, where it stands beside the sum over a whole picture's pixels.",
            ("posterior-collapse", "decoder-ignores-latent", "term-dominates"),
            options={"beta": 4.0, "free": 0.0},
        ),
        Fault(
            "free-bits-of-an-autoencoder",
            "Free bits are a hundred nats, as for pictures that are rebuilt: no group ever has to pay.",
            ("kl-free", "rate-too-high", "term-inert"),
            options={"free": 100.0},
            minor=True,
        ),
        Fault(
            "variance-for-a-deviation",
            "The noise is multiplied with the variance, where the standard deviation belongs.",
            ("temperature-misstates-rate",),
            changes=(Change("(0.5 * log_variance).exp()", "log_variance.exp()"),),
            minor=True,
        ),
        Fault(
            "ramp-in-the-log-alone",
            "The ramp of the KL's weight is logged, and the loss takes the whole weight from the first step on.",
            ("weight-not-applied",),
            changes=(Change('weight * terms["kl"]', 'beta * terms["kl"]'),),
            case="V weight-not-applied",
        ),
        Fault(
            "schedule-of-epochs-stepped-by-batches",
            "The schedule was made for as many steps as there are epochs, and is stepped after each batch.",
            ("learning-rate-off",),
            changes=(Change("planned(optim, schedule, steps, warm)", "planned(optim, schedule, epochs, warm)"),),
            minor=True,
        ),
        Fault(
            "learnt-by-heart",
            "Sixty-four pictures are all there is to train on, and nothing keeps them from being learnt by heart.",
            ("overfitting",),
            options={"count": HELD_OUT + 64, "epochs": 200, "beta": 0.0, "augment": False},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("wide", options={"channels": 40, "hidden": 96, "groups": 8, "each": 3}, seeds=(0, 1)),
        Healthy(
            "narrow", "Four numbers are all that reaches the answer.", options={"groups": 2, "each": 2}, seeds=(0, 1)
        ),
        Healthy(
            "momentum",
            "The KL's weight rises for half of the run.",
            options={"optimizer": "SGD", "momentum": 0.9, "rate": 0.03, "ramp": 300, "epochs": 5},
            seeds=(0, 1),
        ),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3}, seeds=(0, 1)),
        Healthy("warmed-up-cosine", options={"optimizer": "AdamW", "decay": 0.02, "schedule": "cosine"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy(
            "small-batches",
            "Losses of single batches are noisy.",
            options={"size": 16, "epochs": 2, "rate": 1e-3, "schedule": "constant"},
            seeds=(0, 1),
        ),
        Healthy("parked", "Free bits hold the KL where it is.", options={"free": 8.0, "beta": 0.5}, seeds=(0, 1)),
        Healthy("heavy", "The loss rises with the KL's weight.", options={"beta": 0.15, "free": 0.0}, seeds=(0, 1)),
        Healthy("smoothed-labels", "The loss cannot come near 0.", options={"smooth": 0.1}, seeds=(0, 1)),
        Healthy("few-pictures", "Not many, and seen often.", options={"count": 1024, "epochs": 20}),
    ),
)
