"""Show, Attend and Tell (Xu et al. 2015) as a LightningModule: captions of pictures with one or two things in them.

An encoder that has learnt to name single things gives an annotation for each place of the picture; an LSTM looks at
these places by soft attention before each word, and a penalty has it look at all of them.

Shapes: B pictures, L places, D of an annotation, T words.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, RGB, SHAPES, SIDE, pictures
from intaglio.health import audits
from intaglio.health.lightning import MonitorCallback
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
PAD, START, END, UNKNOWN = range(4)
LONGEST, PLACES, HELD_OUT = 10, 16, 192
PAIRS = ("a {} {} left of a {} {}", "a {} {} and a {} {}", "a {} {} beside a {} {}")


def scenes(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Pictures (N, 3, 16, 16) of two things side by side, or of one alone, and a caption of each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    alone, form, grid = draw(0, 10) < 3, draw(0, len(PAIRS)), torch.arange(SIDE)
    images, kinds = torch.full((count, 3, SIDE, SIDE), 0.05), []
    for k, left in enumerate((3, 11)):
        colour, shape = draw(0, len(COLOURS)), draw(0, len(SHAPES))
        kinds.append([(COLOURS[c], SHAPES[s]) for c, s in zip(colour.tolist(), shape.tolist(), strict=True)])
        x, y = draw(left, left + 2) + alone * draw(0, 9), draw(3, 13)
        dx, dy = (grid - x[:, None])[:, None], (grid - y[:, None])[:, :, None]
        square = (dx.abs() <= 3) & (dy.abs() <= 3)
        drawn = torch.stack([square, dx.square() + dy.square() <= 11, square & ((dx == 0) | (dy == 0))])
        mask = drawn[shape, torch.arange(count)] & ~(alone & (k > 0))[:, None, None]
        images = torch.where(mask[:, None], RGB[colour][:, :, None, None], images)
    images = (images + 0.03 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    told = ["a {} {}" if single else PAIRS[f] for single, f in zip(alone.tolist(), form.tolist(), strict=True)]
    return images, [text.format(*one, *other) for text, one, other in zip(told, *kinds, strict=True)]


def things(caption: str) -> list[str]:
    """The words of a caption that name colours and shapes, in order."""
    return [word for word in caption.split() if word in (*COLOURS, *SHAPES)]


class Tokenizer:
    """Knows the commonest words of some texts."""

    def __init__(self, texts: list[str], most: int):
        counts = Counter(word for text in texts for word in text.split())
        self.words = [*SPECIAL, *(word for word, _ in counts.most_common(most))]
        self.ids = {word: k for k, word in enumerate(self.words)}

    def encode(self, text: str) -> Tensor:
        return torch.tensor([START, *(self.ids.get(word, UNKNOWN) for word in text.split()), END])

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[k] for k in (ids[: ids.index(END)] if END in ids else ids))


def collate(items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """A batch with the longest caption first, as packing asks for."""
    images, captions = torch.stack([image for image, _ in items]), [ids for _, ids in items]
    order = torch.tensor([len(ids) for ids in captions]).argsort(descending=True)
    ids = pad_sequence(captions, batch_first=True, padding_value=PAD)
    return [images[order], ids[order]]


class Encoder(nn.Module):
    """(B, 3, 16, 16) → annotations (B, L, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, dim, 3, 2, 1), nn.BatchNorm2d(dim), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, 1, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        annotations: Tensor = self.net(images).flatten(2).mT
        return annotations


def pretrained(dim: int, seed: int) -> Encoder:
    """An encoder that has been part of a classifier of single things."""
    known = pictures(2048, 20_000 + seed)
    label = known.factors[:, 0] * len(COLOURS) + known.factors[:, 1]
    encoder, head = Encoder(dim), nn.Linear(dim, len(COLOURS) * len(SHAPES))
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=5e-3)
    for _ in range(150):
        rows = torch.randint(len(label), (64,))
        loss = F.cross_entropy(head(encoder(known.images[rows]).mean(1)), label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder


class Attention(nn.Module):
    """Soft attention: how much is looked at each place, and what is seen in all."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.of_places, self.of_state = nn.Linear(dim, dim), nn.Linear(width, dim)
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(self, annotations: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(torch.tanh(self.of_places(annotations) + self.of_state(hidden)[:, None]))
        alpha = scores.softmax(1)
        return (alpha * annotations).sum(1), alpha.squeeze(2)


class Decoder(nn.Module):
    def __init__(self, words: int, dim: int, width: int, dropout: float):
        super().__init__()
        self.places = nn.Parameter(0.3 * torch.randn(PLACES, dim))
        self.embed = nn.Embedding(words, width, padding_idx=PAD)
        self.attention, self.gate = Attention(dim, width), nn.Linear(width, dim)
        self.first, self.cell = nn.Linear(dim, 2 * width), nn.LSTMCell(width + dim, width)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width + dim, words))

    def step(self, word: Tensor, state: tuple[Tensor, Tensor], annotations: Tensor) -> tuple[Tensor, Any, Tensor]:
        context, alpha = self.attention(annotations, state[0])
        context = torch.sigmoid(self.gate(state[0])) * context
        state = self.cell(torch.cat([self.embed(word), context], 1), state)
        return torch.cat([state[0], context], 1), state, alpha

    def forward(self, annotations: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, words): what is guessed of each word from the true ones before it; and attention (B, T, L)."""
        annotations = annotations + self.places
        state, found, alphas = self.first(annotations.mean(1)).tanh().chunk(2, dim=1), [], []
        for word in ids[:, :-1].unbind(1):
            out, state, alpha = self.step(word, state, annotations)
            found.append(out)
            alphas.append(alpha)
        return self.head(torch.stack(found, 1)), torch.stack(alphas, 1)

    @torch.no_grad()
    def write(self, annotations: Tensor) -> Tensor:
        annotations = annotations + self.places
        word, written = torch.full((len(annotations),), START), []
        state = self.first(annotations.mean(1)).tanh().chunk(2, dim=1)
        for _ in range(LONGEST):
            out, state, _ = self.step(word, state, annotations)
            word = self.head(out).argmax(1)
            written.append(word)
        return torch.stack(written, 1)


class ShowAttendTell(L.LightningModule):
    def __init__(
        self, encoder: Encoder, decoder: Decoder, tuned: bool, penalty: float, ramp: int, optimizer: str, rate: float,
        warmup: int, schedule: str,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters(ignore=["encoder", "decoder"])
        self.encoder, self.decoder = encoder.requires_grad_(tuned), decoder

    def train(self, mode: bool = True) -> "ShowAttendTell":
        super().train(mode)
        if not self.hparams["tuned"]:
            self.encoder.eval()
        return self

    def weight(self) -> float:
        ramp = self.hparams["ramp"]
        return float(self.hparams["penalty"] * (min(1.0, self.global_step / ramp) if ramp else 1.0))

    def losses(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The caption's cross-entropy, the doubly stochastic penalty, and the share of words that are right."""
        logits, alphas = self.decoder(self.encoder(images), ids)
        target, real = ids[:, 1:], ids[:, 1:] != PAD
        scores = pack_padded_sequence(logits, real.sum(1), batch_first=True).data
        targets = pack_padded_sequence(target, real.sum(1), batch_first=True).data
        looked = (alphas * real[:, :, None]).sum(1)
        right = (scores.argmax(1) == targets).float().mean()
        return F.cross_entropy(scores, targets), (1 - looked).square().mean(), right

    def training_step(self, batch: list[Tensor]) -> Tensor:
        (caption, penalty, _), weight = self.losses(*batch), self.weight()
        self.terms = {"caption": (caption, 1.0), "doubly_stochastic": (penalty, weight)}
        return caption + weight * penalty

    def validation_step(self, batch: list[Tensor]) -> None:
        caption, penalty, right = self.losses(*batch)
        self.log("val_loss", caption + self.weight() * penalty)
        self.log("val/loss/caption", caption)
        self.log("val/loss/doubly_stochastic", penalty)
        self.log("val/caption/accuracy_as_logged", right)

    def rate_at(self, step: int) -> float:
        warmup, schedule = self.hparams["warmup"], self.hparams["schedule"]
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / (self.trainer.max_steps - warmup))
        if schedule == "restarts":
            progress = 3 * progress % 1
        straight = {"linear": 1 - progress, "constant": 1.0, "staircase": 0.3 ** int(3 * progress)}
        return straight.get(schedule, 0.5 * (1 + math.cos(math.pi * progress)))

    def configure_optimizers(self) -> Any:
        rate, groups = self.hparams["rate"], [{"params": list(self.decoder.parameters())}]
        if self.hparams["tuned"]:
            groups += [{"params": list(self.encoder.parameters()), "lr": 0.25 * rate}]
        of_it = {"momentum": 0.9} if self.hparams["optimizer"] == "SGD" else {}
        optimizer = getattr(torch.optim, self.hparams["optimizer"])(groups, lr=rate, **of_it)
        plan = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


def bigram_nats(held_out: Tensor, train: Tensor, words: int) -> float:
    """Nats a word of held-out captions by counts of pairs of words."""
    pairs, real = torch.full((words, words), 0.01), train[:, 1:] != PAD
    pairs.index_put_((train[:, :-1][real], train[:, 1:][real]), torch.ones(()), accumulate=True)
    chances = (pairs / pairs.sum(1, keepdim=True))[held_out[:, :-1], held_out[:, 1:]]
    return -float(chances[held_out[:, 1:] != PAD].log().mean())


def train(
    folder: Path, seed: int = 0, steps: int = 300, size: int = 48, items: int = 2048, dim: int = 32, width: int = 64,
    dropout: float = 0.2, most: int = 1000, tuned: bool = True, penalty: float = 1.0, ramp: int = 0,
    optimizer: str = "Adam", rate: float = 4e-3, warmup: int = 20, schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    L.seed_everything(seed, verbose=False)
    (images, captions), (unseen, told) = scenes(items, seed), scenes(HELD_OUT, 10_000 + seed)
    tokenizer = Tokenizer(captions, most)
    rows, unseen_rows = [[tokenizer.encode(text) for text in texts] for texts in (captions, told)]
    ids, unseen_ids = [pad_sequence(r, batch_first=True, padding_value=PAD) for r in (rows, unseen_rows)]
    words, real = len(tokenizer.words), unseen_ids[:, 1:] != PAD
    bigram = bigram_nats(unseen_ids, ids, words)
    names = torch.tensor([k for word, k in tokenizer.ids.items() if word in (*COLOURS, *SHAPES)])
    unread = sum(not (ids == k).any() for k in range(len(SPECIAL), words)) / words

    def names_all(model: Any) -> float:
        written = [tokenizer.decode(row) for row in model.decoder.write(model.encoder(unseen)).tolist()]
        return sum(things(mine) == things(due) for mine, due in zip(written, told, strict=True)) / HELD_OUT

    def surprise(model: Any, annotations: Tensor, ids: Tensor) -> tuple[Any, Any]:
        """Nats and number of words of each caption."""
        nats = F.cross_entropy(model.decoder(annotations, ids)[0].mT, ids[:, 1:], ignore_index=PAD, reduction="none")
        return nats.sum(1).double().numpy(), (ids[:, 1:] != PAD).sum(1).double().numpy()

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        annotations = model.encoder(probe)
        nats, tokens = surprise(model, annotations, unseen_ids)
        clean, known = surprise(model, model.encoder(images[:HELD_OUT]), ids[:HELD_OUT])
        right = model.decoder(annotations, unseen_ids)[0].argmax(2) == unseen_ids[:, 1:]
        wrong = (~right & torch.isin(unseen_ids[:, 1:], names)).any(1)
        costs = cost_of_exchange(lambda other: surprise(model, other, unseen_ids), annotations)
        caption: dict[str, Any] = {f"{name}_latent_nats": cost for name, cost in costs.items()} | {
            "nats_per_token": Reading(float(nats.sum() / tokens.sum()), bigram, HELD_OUT),
            "token_accuracy": Reading(float(right[real].float().mean()), None, int(tokens.sum())),
            "object": Reading(names_all(model), 1 / 12, HELD_OUT),
            "object_forced": Reading(1 - float(wrong.float().mean()), None, HELD_OUT),
        }
        unknown = float((unseen_ids[:, 1:][real] == UNKNOWN).float().mean())
        return {
            "val/caption": caption,
            "train/caption": {"nats_per_token": Reading(float(clean.sum() / known.sum()), bigram)},
            "train/text": {"unreachable_share": Reading(unread, 0.0)},
            "val/text": {"unknown_share": Reading(unknown, 0.0)},
        }

    encoder, decoder = pretrained(dim, seed), Decoder(words, dim, width, dropout)
    model = ShowAttendTell(encoder, decoder, tuned, penalty, ramp, optimizer, rate, warmup, schedule)
    watch = MonitorCallback(
        folder, unseen, terms=lambda m: m.terms, taps={"annotations": "encoder"},
        forward=lambda m, x: m.encoder(x), read=read, every=50, log_every=5, nulls={"caption": bigram},
        facts={"leaks": {"the very same picture": audits.leaks(images.numpy(), unseen.numpy())}},
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=[watch], gradient_clip_val=5.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        val_check_interval=50, check_val_every_n_epoch=None,
    )  # fmt: skip
    pairs: list[Any] = [list(zip(*both, strict=True)) for both in ((images, rows), (unseen, unseen_rows))]
    loader = DataLoader(pairs[0], size, shuffle=True, drop_last=True, collate_fn=collate)
    trainer.fit(model, loader, DataLoader(pairs[1], HELD_OUT, collate_fn=collate))
    model.eval()
    with torch.no_grad():
        nats, tokens = surprise(model, model.encoder(unseen), unseen_ids)
    return {
        "captions of held-out pictures that name all that is there": (names_all(model), 1 / 12),
        "nats a word below a bigram model": (bigram - float(nats.sum() / tokens.sum()), 0.0),
    }


FAMILY = Family(
    "showattend",
    "development",
    "captions by soft attention in Lightning: an encoder of places, and an LSTM that looks at them before each word",
    faults=(
        Fault(
            "softmax-over-the-score-itself",
            "Attention's softmax is taken over the axis of the score, which has one entry, and not over the places.",
            ("attention-over-one", "dead-parameters", "term-inert"),
            changes=(Change("scores.softmax(1)", "scores.softmax(2)"),),
        ),
        Fault(
            "penalty-over-the-wrong-axis",
            "The penalty sums attention over places, where it is 1 for every word, and not over words.",
            ("term-inert",),
            changes=(Change("real[:, :, None]).sum(1)", "real[:, :, None]).sum(2)"),),
        ),
        Fault(
            "ramp-that-is-only-logged",
            "The penalty's weight is ramped up in the log, and the loss takes the last one from the start.",
            ("weight-not-applied",),
            changes=(Change("caption + weight * penalty", 'caption + self.hparams["penalty"] * penalty'),),
            options={"ramp": 250},
            case="V weight-not-applied",
        ),
        Fault(
            "captions-sorted-without-their-pictures",
            "Each batch's captions are sorted by length to be packed, and the pictures beside them are not.",
            ("decoder-ignores-latent",),
            changes=(Change("return [images[order], ids[order]]", "return [images, ids[order]]"),),
        ),
        Fault(
            "memory-not-carried-on",
            "Where captions are written, the LSTM's new state is dropped: each word is written from the first one.",
            ("free-running-gap",),
            changes=(Change("out, state, _ = self.step(word, state,", "out, _, _ = self.step(word, state,"),),
        ),
        Fault(
            "padding-is-not-packed-away",
            "Words are not packed by length, and padding, which is soon learnt, counts in loss and accuracy.",
            ("flattering-accuracy",),
            changes=(
                Change("pack_padded_sequence(logits, real.sum(1), batch_first=True).data", "logits.flatten(0, 1)"),
                Change("pack_padded_sequence(target, real.sum(1), batch_first=True).data", "target.flatten()"),
            ),
            case="E flattering-accuracy",
        ),
        Fault(
            "vocabulary-cut-too-short",
            "The vocabulary is limited to six words, left from a first trial, and all others are unknown.",
            ("vocabulary-unreachable",),
            options={"most": 6},
        ),
        Fault(
            "train-without-its-mode",
            "train() is overridden to hold a frozen encoder still, and does not hand on the mode that eval() gives.",
            ("validation-pollutes",),
            changes=(Change("super().train(mode)", "super().train()"),),
            case="J validation-pollutes",
        ),
        Fault(
            "schedule-by-epochs",
            "The scheduler counts steps, and Lightning calls it once an epoch unless it is told otherwise.",
            ("learning-rate-off",),
            changes=(Change(', "interval": "step"}', "}"),),
        ),
        Fault(
            "encoder-without-a-group",
            "The encoder has been thawed to be tuned, and the optimizer still is given the decoder alone.",
            ("not-in-optimizer",),
            changes=(Change('[{"params": list(self.encoder.parameters()), "lr": 0.25 * rate}]', "[]"),),
            case="V not-in-optimizer",
        ),
        Fault(
            "learnt-by-heart",
            "There are eighty pictures to learn from, and nothing holds the decoder back.",
            ("overfitting",),
            options={"items": 80, "size": 40, "dropout": 0.0, "schedule": "constant"},
        ),
    ),
    healthy=(
        Healthy("plain", "How a pair is told cannot be known: the loss has a floor.", seeds=(0, 1, 2, 3)),
        Healthy("ramp", "The total rises.", options={"ramp": 200, "penalty": 4.0, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("frozen-encoder", "It stays as it was, as in the paper.", options={"tuned": False}, seeds=(0, 1)),
        Healthy("momentum", options={"optimizer": "SGD", "rate": 0.3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 2e-3}, seeds=(0, 1)),
        Healthy("adamw", options={"optimizer": "AdamW", "schedule": "linear"}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("staircase", "The rate falls by steps.", options={"schedule": "staircase"}, seeds=(0, 1)),
        Healthy("small-batches", "Losses are noisy.", options={"size": 16, "steps": 450, "rate": 2e-3}, seeds=(0, 1)),
        Healthy("few-items", "A small set, seen often.", options={"items": 640, "dropout": 0.4}, seeds=(0, 1)),
        Healthy("much-dropout", "Training is harder than validation.", options={"dropout": 0.5}, seeds=(0, 1)),
        Healthy("wide", options={"width": 96, "dim": 48, "rate": 2e-3}, seeds=(0, 1)),
    ),
)
