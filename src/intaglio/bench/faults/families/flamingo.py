"""Captions among pictures: Flamingo (Alayrac et al. 2022), as a LightningModule.

A small GPT has read captions, an eye has learnt by contrast which caption belongs to which picture; both are frozen. A
resampler makes a few latents of each picture, and gated layers between the blocks of the GPT look at those of the last
picture before a word. The gates begin at 0, where the GPT is what it was. It learns from pages with two pictures.

Shapes: B rows, M pictures in a row, P places of a picture, Q queries, T words, W width, D channels of the eye.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, pictures
from intaglio.health import audits
from intaglio.health.lightning import MonitorCallback
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

PAD, END = 0, 1
CONTEXT, PLACES, CHANNELS, LONGEST, HELD_OUT = 24, 16, 32, 11, 128
KINDS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "row": ROWS, "column": COLUMNS}
FORMS = (
    "a {size} {colour} {shape} at the {row} {column}", "this {colour} {shape}",
    "at the {row} {column} there is a {colour} {shape}",
)  # fmt: skip


def told(factors: Tensor, form: Tensor) -> list[str]:
    return [
        FORMS[k].format(**{kind: words[f] for (kind, words), f in zip(KINDS.items(), row, strict=True)})
        for row, k in zip(factors.tolist(), form.tolist(), strict=True)
    ]


def encode(texts: list[str], known: dict[str, int]) -> Tensor:
    rows = [torch.tensor([END, *(known[word] for word in text.split())]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)[:, :CONTEXT]


class Attention(nn.Module):
    """What x (B, T, W) finds in y (B, S, W), where ``seen`` (B, T, S) lets it look; who may look nowhere finds 0."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.keys, self.out = (nn.Linear(width, k * width, bias=False) for k in (1, 2, 1))

    def forward(self, x: Tensor, y: Tensor, seen: Tensor) -> Tensor:
        q = self.query(x).unflatten(2, (4, -1)).transpose(1, 2)
        k, v = self.keys(y).unflatten(2, (2, 4, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen[:, None], -1e9)
        found = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(found.masked_fill(~seen.any(2, keepdim=True), 0.0))


def feedforward(width: int) -> nn.Sequential:
    narrow, wide = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), narrow, nn.GELU(), wide)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.attention, self.thought = nn.LayerNorm(width), Attention(width), feedforward(width)

    def forward(self, x: Tensor, *_: Tensor) -> Any:
        asked, past = self.norm(x), torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool).tril()
        x = x + self.attention(asked, asked, past)
        return x + self.thought(x)


class GPT(nn.Module):
    def __init__(self, words: int, width: int, layers: int):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        nn.init.normal_(self.words.weight, std=0.1)
        self.blocks, self.norm = nn.ModuleList(Block(width) for _ in range(layers)), nn.LayerNorm(width)

    def forward(self, x: Tensor, *seen: Tensor) -> Tensor:
        x = x + self.places[: x.shape[1]]
        for block in self.blocks:
            x = block(x, *seen)
        return F.linear(self.norm(x), self.words.weight)

    def surprise(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(self.words(ids[:, :-1])).mT, ids[:, 1:], ignore_index=PAD)


def convolutions() -> nn.Sequential:
    """(B, 3, S, S) → (B, D, P)"""
    layers: list[nn.Module] = []
    for given, made, stride in ((3, 16, 2), (16, CHANNELS, 2), (CHANNELS, CHANNELS, 1)):
        layers += [nn.Conv2d(given, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(2))


class CLIP(nn.Module):
    def __init__(self, words: int, width: int):
        super().__init__()
        self.eye, self.text = convolutions(), nn.EmbeddingBag(words, width, padding_idx=PAD)
        self.seen = nn.Sequential(self.eye, nn.Flatten(), nn.Linear(PLACES * CHANNELS, width))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        logits = 10 * F.normalize(self.seen(images), dim=1) @ F.normalize(self.text(ids), dim=1).T
        own = torch.arange(len(ids))
        return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


def pretrain(model: nn.Module, loss: Callable[..., Tensor], steps: int, *tensors: Tensor) -> None:
    optim = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        rows = torch.randint(len(tensors[0]), (32,))
        optim.zero_grad()
        loss(*(t[rows] for t in tensors)).backward()
        optim.step()


class Resampler(nn.Module):
    """(B, D, P) → (B, Q, W), by learnt queries that look at a picture and at each other."""

    def __init__(self, width: int, queries: int):
        super().__init__()
        self.queries, self.places = nn.Parameter(torch.randn(queries, width)), nn.Parameter(torch.randn(PLACES, width))
        self.into, self.norm, self.after = nn.Linear(CHANNELS, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.look, self.think = Attention(width), feedforward(width)

    def forward(self, seen: Tensor) -> Any:
        x = self.queries.expand(len(seen), -1, -1)
        seen, asked = self.into(seen.mT) + 0.3 * self.places, self.norm(x)
        found = torch.cat([seen, asked], 1)
        x = x + self.look(asked, found, torch.ones(1, x.shape[1], found.shape[1], dtype=torch.bool))
        return self.after(x + self.think(x))


class Gated(nn.Module):
    """A block of the language model, behind a layer that looks at pictures."""

    def __init__(self, block: nn.Module, width: int, opened: float):
        super().__init__()
        self.norm, self.look, self.think, self.block = nn.LayerNorm(width), Attention(width), feedforward(width), block
        self.gate, self.think_gate = (nn.Parameter(torch.tensor(opened)) for _ in range(2))

    def forward(self, x: Tensor, latents: Tensor, seen: Tensor) -> Any:
        x = x + self.gate.tanh() * self.look(self.norm(x), latents, seen)
        return self.block(x + self.think_gate.tanh() * self.think(x))


class Flamingo(L.LightningModule):
    def __init__(
        self, eye: nn.Module, gpt: GPT, image: int, width: int, queries: int = 4, spacing: int = 1, opened: float = 0.0,
        optimizer: str = "AdamW", rate: float = 4e-3, warmup: int = 20, schedule: str = "cosine",
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters(ignore=["eye", "gpt"])
        self.eye, self.gpt = eye.requires_grad_(False), gpt.requires_grad_(False)
        self.resampler, self.mark = Resampler(width, queries), nn.Parameter(0.1 * torch.randn(width))
        for k in range(0, len(gpt.blocks), spacing):
            gpt.blocks[k] = Gated(gpt.blocks[k], width, opened)

    def look(self, images: Tensor) -> Any:
        """(B, M, 3, S, S) → (B, M, Q, W)"""
        self.eye.eval()
        with torch.no_grad():
            seen = self.eye(images.flatten(0, 1))
        return self.resampler(seen).unflatten(0, images.shape[:2])

    def forward(self, latents: Tensor, ids: Tensor) -> Any:
        """Logits (B, T, words) of the word after each of ``ids`` (B, T)."""
        marks = ids == self.hparams["image"]
        number = torch.arange(1, latents.shape[1] + 1).repeat_interleave(latents.shape[2])
        seen = marks.cumsum(1)[:, :, None] == number
        words = self.gpt.words(ids.masked_fill(marks, PAD))
        return self.gpt(torch.where(marks[:, :, None], self.mark, words), latents.flatten(1, 2), seen)

    def due(self, ids: Tensor) -> Tensor:
        """The words to be guessed, and padding."""
        return ids[:, 1:].masked_fill(ids[:, 1:] == self.hparams["image"], PAD)

    def nats(self, latents: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(self(latents, ids[:, :-1]).mT, self.due(ids), ignore_index=PAD, reduction=reduction)

    @torch.no_grad()
    def write(self, images: Tensor) -> Tensor:
        """A caption (B, T) of each picture (B, 1, 3, S, S), word by word."""
        latents, ids = self.look(images), torch.tensor([[END, self.hparams["image"]]]).expand(len(images), -1)
        for _ in range(LONGEST):
            ids = torch.cat([ids, self(latents, ids)[:, -1:].argmax(2)], 1)
        return ids[:, -LONGEST:]

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.nats(self.look(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        images, pages, captions = batch
        latents, target = self.look(images), self.due(captions)
        right, words = self(latents[:, :1], captions[:, :-1]).argmax(2) == target, target != PAD
        self.log("val_loss", self.nats(latents, pages))
        self.log("val/caption/accuracy_as_logged", right[words].float().mean())

    def rate_at(self, step: int, total: float) -> float:
        warmup, schedule = self.hparams["warmup"], self.hparams["schedule"]
        progress = min(1.0, max(0, step - warmup) / max(1.0, total - warmup))
        turned = 3 * progress % 1 if schedule == "restarts" else progress
        falls = {"linear": 1 - progress, "constant": 1.0}.get(schedule, 0.5 * (1 + math.cos(math.pi * turned)))
        return min(1.0, (step + 1) / warmup) * falls

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
        decay = 1e-3 if self.hparams["optimizer"] == "AdamW" else 0.0
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": decay}, {"params": vectors}]
        kind = getattr(torch.optim, self.hparams["optimizer"])
        optimizer = kind(groups, lr=self.hparams["rate"], weight_decay=0.0)
        total = self.trainer.estimated_stepping_batches
        plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate_at(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


def bigram_nats(held_out: Tensor, train: Tensor, words: int) -> float:
    """Nats a word of held-out texts by counts of pairs of words."""
    pairs, real = torch.full((words, words), 0.01), train[:, 1:] != PAD
    pairs.index_put_((train[:, :-1][real], train[:, 1:][real]), torch.ones(()), accumulate=True)
    chances = (pairs / pairs.sum(1, keepdim=True))[held_out[:, :-1], held_out[:, 1:]]
    return -float(chances[(held_out[:, 1:] != PAD) & (held_out[:, 1:] != words - 1)].log().mean())


def said(written: Tensor, words: Tensor) -> Tensor:
    """(B, K) → (B, K): whether each of K words is written before the end."""
    ended = (written == END).cumsum(1) > 0
    return ((written[:, None] == words[:, :, None]) & ~ended[:, None]).any(2)


def train(
    folder: Path, seed: int = 0, steps: int = 300, size: int = 20, items: int = 2048, width: int = 48, layers: int = 2,
    accumulate: int = 1, **options: Any,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    L.seed_everything(seed, verbose=False)
    web, form = pictures(2048, 20_000 + seed), torch.randint(len(FORMS), (2048,))
    texts = told(web.factors, form)
    corpus = [f"{a} <end> {b} <end>" for a, b in zip(texts, told(web.factors.roll(1, 0), form), strict=True)]
    words = sorted({word for text in texts for word in text.split()})
    ids, image = {word: k for k, word in enumerate(["<pad>", "<end>", *words, "<image>"])}, len(words) + 2
    language, clip = GPT(image, width, layers), CLIP(image, width)
    pretrain(language, language.surprise, 200, encode(corpus, ids))
    pretrain(clip, clip, 200, web.images, encode(texts, ids))
    state = nn.ModuleDict({"eye": clip.eye, "gpt": language}).state_dict()

    images, factors = (x.unflatten(0, (-1, 2)) for x in pictures(2 * (items + HELD_OUT), seed))
    form = torch.randint(len(FORMS), (len(images),))
    first, second = (told(factors[:, k], form) for k in range(2))
    pages = encode([f"<image> {a} <end> <image> {b} <end>" for a, b in zip(first, second, strict=True)], ids)
    known, unseen, known_pages, unseen_pages = images[HELD_OUT:], images[:HELD_OUT], pages[HELD_OUT:], pages[:HELD_OUT]
    alone, captions = unseen[:, :1], encode([f"<image> {a} <end>" for a in first[:HELD_OUT]], ids)
    tables = [torch.tensor([ids[word] for word in kind]) for kind in KINDS.values()]
    true = torch.stack([table[f] for table, f in zip(tables, factors[:HELD_OUT, 0].T, strict=True)], 1)
    bigram, bigram_of_captions = (bigram_nats(x, known_pages, len(ids)) for x in (unseen_pages, captions))

    eye, gpt = convolutions(), GPT(image, width, layers)
    both = nn.ModuleDict({"eye": eye, "gpt": gpt})
    keys = both.load_state_dict(state)
    model = Flamingo(eye, gpt, image, width, **options)
    loaded = {"missing": keys.missing_keys, "unexpected": keys.unexpected_keys, "reshaped": []}

    def read(model: Any, probe: Tensor) -> Mapping[str, Any]:
        latents, target, things = model.look(probe), model.due(captions), true[:, :2]

        def forced(latents: Tensor) -> tuple[Any, Any]:
            nats = model.nats(latents, captions, "none")
            return nats.sum(1).double().numpy(), (target != PAD).sum(1).double().numpy()

        (nats, tokens), guessed = forced(latents), model(latents, captions[:, :-1]).argmax(2)
        named, right, counted = said(model.write(probe), things).all(1), guessed == target, target != PAD
        wrong = (~right & torch.isin(target, torch.cat(tables[:2]))).any(1)
        caption = {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(forced, latents).items()}
        caption |= {
            "nats_per_token": Reading(float(nats.sum() / tokens.sum()), bigram_of_captions, len(nats)),
            "token_accuracy": Reading(float(right[counted].float().mean()), None, int(counted.sum())),
            "accuracy": Reading(float(named.float().mean()), 1 / 12, len(named)),
            "accuracy_forced": Reading(1 - float(wrong.float().mean()), 1 / 12, len(wrong)),
        }
        return {"val/caption": caption}

    shared = audits.leaks(known.flatten(0, 1).numpy(), unseen.flatten(0, 1).numpy())
    watch = MonitorCallback(
        folder, alone, taps={"latent": "resampler"}, forward=lambda m, x: m.look(x), read=read, every=50, log_every=5,
        nulls={"total": bigram}, facts={"loaded": loaded, "leaks": {"the very same picture": shared}},
    )  # fmt: skip
    parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    off: dict[str, Any] = dict.fromkeys(parts, False)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=[watch], gradient_clip_val=1.0, num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate, val_check_interval=50 * accumulate, check_val_every_n_epoch=None, **off,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(known, known_pages), size, shuffle=True, drop_last=True)
    trainer.fit(model, loader, DataLoader(TensorDataset(unseen, unseen_pages, captions), HELD_OUT))
    model.eval()
    with torch.no_grad():
        latents = model.look(alone)
        own, swapped = (float(model.nats(z, captions)) for z in (latents, latents.roll(1, 0)))
    written, everything = model.write(alone), torch.cat(tables).expand(HELD_OUT, -1)
    right, by_chance, named = (int(said(written, words).sum()) for words in (true, true.roll(1, 0), everything))
    return {
        "attributes named right in captions of held-out pictures": (right / max(1, named), by_chance / max(1, named)),
        "nats a word that another picture costs": (swapped - own, 0.0),
    }


FAMILY = Family(
    "flamingo",
    "development",
    "captions among pictures in Lightning: gated layers between the blocks of a frozen language model",
    faults=(
        Fault(
            "gates-through-a-relu",
            "Gates were to be no less than 0, so tanh became ReLU, whose slope at 0 is 0: they stay shut.",
            ("dead-parameters", "decoder-ignores-latent"),
            changes=(Change("self.gate.tanh()", "self.gate.relu()"), Change("think_gate.tanh()", "think_gate.relu()")),
        ),
        Fault(
            "gates-frozen-with-the-blocks",
            "The language model is frozen when the gated layers stand in it already, so they are frozen with it.",
            ("decoder-ignores-latent", "dead-parameters"),
            changes=(Change("width, opened)\n\n", "width, opened)\n        gpt.requires_grad_(False)\n\n"),),
        ),
        Fault(
            "gates-in-no-group",
            "Parameters were parted into matrices and vectors; a gate has no dimension, is neither, and stays shut.",
            ("not-in-optimizer",),
            changes=(Change("if p.ndim < 2]", "if p.ndim == 1]"),),
        ),
        Fault(
            "warm-up-of-the-paper",
            "The warm-up is the paper's 5,000 steps, in a run of 300.",
            ("learning-rate-off",),
            options={"warmup": 5000},
        ),
        Fault(
            "loaded-behind-the-gates",
            "Weights are loaded when the blocks are wrapped and have other names, and strict=False lets that pass.",
            ("partial-load",),
            changes=(
                Change("    keys = both.load_state_dict(state)\n", ""),
                Change("    loaded = {", "    keys = both.load_state_dict(state, strict=False)\n    loaded = {"),
            ),
        ),
        Fault(
            "prompt-without-the-mark",
            "Captions are written from the bare start: no mark of a picture stands before a word, so none is seen.",
            ("free-running-gap",),
            changes=(Change('torch.tensor([[END, self.hparams["image"]]])', "torch.tensor([[END]])"),),
        ),
        Fault(
            "padding-taken-for-right",
            "What is not said counts as right in the accuracy that is logged, where it was to be left out.",
            ("flattering-accuracy",),
            changes=(Change("right[words].float().mean()", "(right | ~words).float().mean()"),),
        ),
        Fault(
            "queries-look-at-themselves",
            "Queries stand in both halves of what is looked at, where the picture was to be one of them.",
            ("latent-ignores-input", "dead-parameters"),
            changes=(Change("torch.cat([seen, asked], 1)", "torch.cat([asked, asked], 1)"),),
        ),
        Fault(
            "hidden-by-minus-infinity",
            "What is hidden gets -inf, and the word before the first picture may look nowhere: its softmax is 0/0.",
            ("non-finite",),
            changes=(Change("-1e9)", "-torch.inf)"),),
        ),
        Fault(
            "frozen-eye-in-training-mode",
            "The frozen eye is put in training mode at each look, held-out ones too, as losses seemed better with it.",
            ("validation-pollutes",),
            changes=(Change("self.eye.eval()", "self.eye.train()"),),
            case="J validation-pollutes",
        ),
    ),
    healthy=(
        Healthy("plain", "Nothing of the picture passes the gates at first.", seeds=(0, 1, 2, 3)),
        Healthy("wide", options={"width": 64, "rate": 3e-3}, seeds=(0, 1)),
        Healthy("every-second-block", options={"layers": 4, "spacing": 2, "steps": 250}, seeds=(0, 1)),
        Healthy("two-queries", "Two latents a picture.", options={"queries": 2}, seeds=(0, 1)),
        Healthy("half-open", "The language model is disturbed at first.", options={"opened": 0.5}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 2e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("constant", options={"optimizer": "Adam", "rate": 3e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-pages", "A small set, seen often.", options={"items": 512}, seeds=(0, 1)),
        Healthy("small-batches", "Losses are noisy.", options={"size": 8, "steps": 400, "rate": 3e-3}, seeds=(0, 1)),
        Healthy("two-batches-a-step", options={"accumulate": 2, "size": 10}, seeds=(0, 1)),
    ),
)
