"""A captioner as tutorials have it: a small GPT (Radford et al. 2019) whose prefix is a picture (Mokady et al. 2021).

Shapes: B pictures, P tokens of the prefix, T words, d width.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import WORDS, pictures, sentences
from intaglio.health import audits
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
PAD, START, END, UNKNOWN = range(4)
LENGTH, PREFIX = 11, 4


def captions(factors: Tensor, seed: int) -> list[str]:
    """``A red disc at the top left.``: half of them leave out the size, and half the place."""
    generator = torch.Generator().manual_seed(seed)
    told = []
    for row, (sized, placed) in zip(sentences(factors), torch.rand(len(factors), 2, generator=generator), strict=True):
        a, size, *thing = [WORDS[k] for k in row[1:5]]
        place = [WORDS[k] for k in row[5:-1]] if placed < 0.5 else []
        told.append(" ".join([a, *([size] if sized < 0.5 else []), *thing, *place]).capitalize() + ".")
    return told


def words_of(caption: str) -> list[str]:
    return caption.lower().replace(".", " .").split()


class Tokenizer:
    def __init__(self, texts: list[str]):
        self.words = [*SPECIAL, *sorted({word for text in texts for word in words_of(text)})]
        self.ids = {word: k for k, word in enumerate(self.words)}

    def encode(self, texts: list[str]) -> Tensor:
        rows = [[START, *(self.ids.get(word, UNKNOWN) for word in words_of(text)), END] for text in texts]
        return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(k.shape[-1])).masked_fill(hidden[:, None], -1e9)
        x = x + self.dropout(self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.between(x)))


class Captioner(nn.Module):
    def __init__(self, words: int, width: int = 64, layers: int = 2, dropout: float = 0.0):
        super().__init__()
        self.eye = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.SiLU(), nn.Flatten(),
            nn.Linear(512, PREFIX * width), nn.Unflatten(1, (PREFIX, width)),
        )  # fmt: skip
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(PREFIX + LENGTH, width))
        self.blocks = nn.ModuleList(Block(width, 4, dropout) for _ in range(layers))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def look(self, images: Tensor) -> Tensor:
        prefix: Tensor = self.eye(images)
        return prefix

    def forward(self, prefix: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat([prefix, self.words(ids)], 1)
        x = x + self.places[: x.shape[1]]
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        unused = torch.cat([torch.zeros(len(ids), PREFIX, dtype=torch.bool), ids == PAD], 1)
        for block in self.blocks:
            x = block(x, later | unused[:, None])
        logits: Tensor = self.head(self.last(x[:, PREFIX:]))
        return logits

    @torch.no_grad()
    def write(self, prefix: Tensor) -> Tensor:
        ids = torch.full((len(prefix), 1), START)
        for _ in range(LENGTH - 1):
            ids = torch.cat([ids, self(prefix, ids)[:, -1:].argmax(-1)], 1)
        return ids


def score(model: Captioner, images: Tensor, ids: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The caption's loss, and the share of words that are right."""
    logits, target = model(model.look(images), ids[:, :-1]), ids[:, 1:]
    counted = target != PAD
    nats = F.cross_entropy(logits.mT, target, reduction="none", label_smoothing=smoothing)
    return nats[counted].mean(), (logits.argmax(-1) == target)[counted].float().mean()


def counts(held_out: Tensor, train: Tensor, words: int) -> tuple[float, float, float]:
    """What word counts know of held-out captions: nats a token of a unigram and a bigram model, its accuracy."""
    pairs = torch.full((words, words), 0.01)
    pairs.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), torch.ones(()), accumulate=True)
    before, target = held_out[:, :-1], held_out[:, 1:]
    real, single = target != PAD, pairs.sum(0) * (torch.arange(words) != PAD)
    chances = pairs / pairs.sum(1, keepdim=True)
    right = (chances.argmax(1)[before] == target)[real].float().mean()
    unigram, bigram = -(single / single.sum())[target].log()[real].mean(), -chances[before, target].log()[real].mean()
    return float(unigram), float(bigram), float(right)


def names_the_thing(written: Tensor, ids: Tensor, things: Tensor) -> Tensor:
    """Whether what is written has the words for colour and shape that the caption has, before its end."""
    ended = (written == END).cumsum(1) > 0
    due = torch.stack([row[torch.isin(row, things)] for row in ids])
    return ((written[:, None] == due[:, :, None]) & ~ended[:, None]).any(2).all(1)


def batches(images: Tensor, ids: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for rows in torch.randperm(len(ids)).split(size):
            if len(rows) == size:
                yield images[rows], ids[rows]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 4096, rate: float = 2e-3,
    width: int = 64, layers: int = 2, dropout: float = 0.0, smoothing: float = 0.0, noise: float = 0.03,
    optimizer: str = "AdamW", warmup: int = 20, schedule: str = "cosine", **of_optimizer: Any,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    drawn = pictures(items + 512, seed, noise)
    texts = captions(drawn.factors, seed)
    held_out_images, images = drawn.images[:512], drawn.images[512:]
    held_out_texts, texts = texts[:512], texts[512:]
    tokenizer = Tokenizer(texts)
    ids, held_out = tokenizer.encode(texts), tokenizer.encode(held_out_texts)
    words, real = len(tokenizer.words), held_out[:, 1:] != PAD
    unigram, bigram, guessed = counts(held_out, ids, words)
    named = [k for word, k in tokenizer.ids.items() if word in WORDS[8:15]]
    things = torch.tensor(named)
    unread = sum(not (ids == k).any() for k in range(len(SPECIAL), words)) / words

    model = Captioner(words, width, layers, dropout)
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **of_optimizer)
    courses = {
        "cosine": lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)),
        "restarts": lambda k: 0.5 * (1 + math.cos(math.pi * (k % 100) / 100)),
        "constant": lambda k: 1.0,
    }
    plan = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: min(1.0, (k + 1) / warmup) * courses[schedule](k))

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        few = slice(0, 128)
        prefix, target, counted = model.look(probe[few]), held_out[few, 1:], real[few]

        def forced(prefix: Tensor) -> tuple[Any, Any]:
            nats = F.cross_entropy(model(prefix, held_out[few, :-1]).mT, target, reduction="none") * counted
            return nats.sum(1).double().numpy(), counted.sum(1).double().numpy()

        right = model(prefix, held_out[few, :-1]).argmax(-1) == target
        nats, tokens = forced(prefix)
        wrong = (~right & torch.isin(target, things)).any(1)
        free = names_the_thing(model.write(prefix), held_out[few], things)
        caption = {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(forced, prefix).items()}
        caption |= {
            "nats_per_token": Reading(float(nats.sum() / tokens.sum()), bigram, len(nats)),
            "token_accuracy": Reading(float(right[counted].float().mean()), guessed, int(counted.sum())),
            "object": Reading(float(free.float().mean()), 1 / 12, len(free)),
            "object_forced": Reading(1 - float(wrong.float().mean()), None, len(wrong)),
        }
        unknown = float((held_out[:, 1:][real] == UNKNOWN).float().mean())
        return {
            "val/caption": caption,
            "val/unigram": {"nats_per_token": Reading(unigram)},
            "train/text": {"unreachable_share": Reading(unread, 0.0)},
            "val/text": {"unknown_share": Reading(unknown, 0.0)},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out_images, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/caption": bigram, "val/loss/caption": bigram, "train/caption/nats_per_token": bigram},
    )  # fmt: skip
    monitor.audit(
        leaks={"the very same picture": audits.leaks([x.numpy() for x in images], [x.numpy() for x in held_out_images])}
    )
    for step, (seen, told) in enumerate(batches(images, ids, size), 1):
        model.train()
        loss, _ = score(model, seen, told, smoothing)
        optim.zero_grad()
        loss.backward()
        monitor.step({"caption": loss}, (seen, told))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                held_out_loss, accuracy = score(model, held_out_images[:256], held_out[:256])
                clean, _ = score(model, images[:256], ids[:256])
            monitor.validated({"val/loss/caption": float(held_out_loss)})
            monitor.validated({"val/caption/accuracy_as_logged": float(accuracy)})
            monitor.log({"train/caption/nats_per_token": float(clean)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    free = names_the_thing(model.write(model.look(held_out_images)), held_out, things)
    return {"held-out pictures whose caption names the thing": (float(free.float().mean()), 1 / 12)}


FAMILY = Family(
    "captioner",
    "development",
    "a transformer that captions pictures, which are its prefix",
    faults=(
        Fault(
            "prefix-hidden-by-its-mask",
            "The prefix's mask is made of ones, which hide it: in another library they mean that it may be seen.",
            ("decoder-ignores-latent", "dead-parameters"),
            changes=(Change("torch.zeros(len(ids), PREFIX,", "torch.ones(len(ids), PREFIX,"),),
            case="E decoder-ignores-latent",
        ),
        Fault(
            "captions-of-other-pictures",
            "Pictures and captions are shuffled apart.",
            ("decoder-ignores-latent", "no-learning"),
            changes=(
                Change("yield images[rows], ids[rows]", "yield images[torch.randperm(len(ids))[:size]], ids[rows]"),
            ),
        ),
        Fault(
            "padding-counted",
            "What is left out of loss and accuracy is -100, padding in another library; here padding is 0.",
            ("flattering-accuracy",),
            changes=(Change("counted = target != PAD", "counted = target != -100"),),
            case="E flattering-accuracy",
        ),
        Fault(
            "capitals-in-the-vocabulary",
            "The vocabulary is built on captions as they stand, and these are then put in lower case and taken apart.",
            ("vocabulary-unreachable",),
            changes=(
                Change("for text in texts for word in words_of(text)", "for text in texts for word in text.split()"),
            ),
            case="E vocabulary-unreachable",
        ),
        Fault(
            "written-from-the-last-word-alone",
            "Captions are written as if a cache kept the words before the last one, and there is none.",
            ("free-running-gap",),
            changes=(Change("self(prefix, ids)[:, -1:]", "self(prefix, ids[:, -1:])[:, -1:]"),),
            minor=True,
        ),
        Fault(
            "causal-mask-forgotten",
            "Every word sees the words behind it, and with them the one that it is to guess.",
            ("free-running-gap", "decoder-ignores-latent"),
            changes=(Change("later | unused[:, None]", "unused[:, None]"),),
        ),
        Fault(
            "held-out-pictures-left-in-training",
            "Held-out pictures are copied out of the training set, and not taken out.",
            ("split-leak",),
            changes=(
                Change("drawn.images[:512], drawn.images[512:]", "drawn.images[:512], drawn.images"),
                Change("texts[:512], texts[512:]", "texts[:512], texts"),
            ),
            case="V split-leak",
        ),
        Fault(
            "learnt-by-heart",
            "There are too few pictures for so many looks at each.",
            ("overfitting",),
            options={"items": 96, "size": 32, "schedule": "constant"},
        ),
        Fault(
            "eye-detached",
            "The picture's network is left without a gradient, as it was when it was a pretrained one.",
            ("dead-parameters",),
            changes=(Change("prefix: Tensor = self.eye(images)", "prefix: Tensor = self.eye(images).detach()"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 96}),
        Healthy("one-layer", options={"layers": 1, "optimizer": "Adam", "schedule": "constant"}),
        Healthy("momentum", options={"optimizer": "SGD", "rate": 0.2, "momentum": 0.9, "schedule": "constant"}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4}),
        Healthy("dropout", "Training's loss stays above the held-out one.", options={"dropout": 0.2}),
        Healthy(
            "smoothed-labels",
            "Training's loss has a floor that the held-out one has not, and a null that nobody worked out.",
            changes=(Change('"train/loss/caption": bigram, ', ""),),
            options={"smoothing": 0.1},
        ),
        Healthy("restarts", "The rate jumps back up every hundred steps.", options={"schedule": "restarts"}),
        Healthy(
            "small-batches", "Losses of single batches are noisy.", options={"size": 16, "rate": 1e-3, "steps": 600}
        ),
        Healthy("noisy-pictures", "Pictures do not tell everything.", options={"noise": 0.3}),
    ),
)
