"""Pictures found by sentences and told in them: CoCa (Yu et al. 2022), with a queue as in MoCo (He et al. 2020).

The text encoder is causal, the decoder goes on from it, and looks at the picture through a gate as Flamingo's.

Shapes: B pairs, P patches, L words of a caption, d width, D dimensions of an embedding, Q keys of a queue.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import contrastive
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
PAD, START, END, UNKNOWN = range(4)
LONGEST = 10
later = nn.Transformer.generate_square_subsequent_mask


def captions(factors: Tensor, seed: int) -> list[str]:
    """``a red disc at the top left``, or ``in the middle a red disc``: the place comes first in one of two."""
    generator = torch.Generator().manual_seed(seed)
    said = []
    firsts = torch.rand(len(factors), generator=generator) < 0.5
    for (shape, colour, size, y, x), first in zip(factors.tolist(), firsts, strict=True):
        thing = f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"
        place = "in the middle" if y == x == 1 else f"at the {ROWS[y]} {COLUMNS[x]}"
        said.append(f"{place} {thing}" if first else f"{thing} {place}")
    return said


class Tokenizer:
    """The commonest words, ``most`` ids in all."""

    def __init__(self, texts: list[str], most: int):
        counted = Counter(word for text in texts for word in text.split())
        self.words = [*SPECIAL, *(word for word, _ in counted.most_common(most - len(SPECIAL)))]
        self.ids = {word: k for k, word in enumerate(self.words)}

    def encode(self, texts: list[str]) -> Tensor:
        rows = [[START, *(self.ids.get(word, UNKNOWN) for word in text.split()), END] for text in texts]
        return torch.tensor([row + [PAD] * (LONGEST - len(row)) for row in rows])


def layer(width: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)


class ImageEncoder(nn.Module):
    def __init__(self, width: int, layers: int, out: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(layer(width) for _ in range(layers)), nn.LayerNorm(width))
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.pool = nn.MultiheadAttention(width, 4, batch_first=True)
        self.out = nn.Linear(width, out, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, d) for the decoder and (B, D) for the contrast."""
        x = self.blocks(self.patches(images).flatten(2).mT + self.places)
        pooled, _ = self.pool(self.query.expand(len(x), -1, -1), x, x, need_weights=False)
        return x, self.out(pooled[:, 0])


class TextEncoder(nn.Module):
    def __init__(self, words: int, width: int, layers: int, out: int):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        self.blocks = nn.ModuleList(layer(width) for _ in range(layers))
        self.last, self.out = nn.LayerNorm(width), nn.Linear(width, out, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, d) for the decoder, and (B, D) for the contrast, read where a caption ends."""
        x = self.words(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, src_mask=later(ids.shape[1]))
        ends = (ids == END).int().argmax(1)
        return x, self.out(self.last(x[torch.arange(len(x)), ends]))


class Telling(nn.Module):
    """The decoder, which looks at the picture as far as its gate is open."""

    def __init__(self, width: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))
        self.before, self.look = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.block = layer(width)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        seen, _ = self.look(self.before(x), patches, patches, need_weights=False)
        told: Tensor = self.block(x + self.gate.tanh() * seen, src_mask=later(x.shape[1]))
        return told


class CoCa(nn.Module):
    queue: Tensor
    held: Tensor
    pointer: Tensor

    def __init__(self, words: int, width: int = 48, layers: int = 2, out: int = 32, queue: int = 0):
        super().__init__()
        image, text = ImageEncoder(width, layers, out), TextEncoder(words, width, 1, out)
        self.towers = nn.ModuleDict({"image": image, "text": text})
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.decoder = Telling(width)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, words))
        self.slow = copy.deepcopy(self.towers).requires_grad_(False) if queue else None
        self.register_buffer("queue", F.normalize(torch.randn(2, queue, out), dim=2))
        self.register_buffer("held", torch.full((queue,), -1))
        self.register_buffer("pointer", torch.tensor(0))

    def scale(self) -> Tensor:
        return self.log_scale.clamp(max=math.log(100)).exp()

    @torch.no_grad()
    def keys(self, images: Tensor, ids: Tensor) -> Tensor:
        """(2, B, D): of pictures and of captions, by the slow towers."""
        assert self.slow is not None
        return F.normalize(torch.stack([self.slow["image"](images)[1], self.slow["text"](ids)[1]]), dim=2)

    def enqueue(self, keys: Tensor, items: Tensor) -> None:
        rows = (self.pointer + torch.arange(len(items))) % len(self.held)
        self.queue[:, rows] = keys
        self.held[rows] = items
        self.pointer.add_(len(items))

    def contrast(self, image: Tensor, text: Tensor, images: Tensor, ids: Tensor, items: Tensor) -> Tensor:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        others = [image, text]
        if self.slow is not None:
            keys = self.keys(images, ids)
            others = [torch.cat([now, before]) for now, before in zip(keys, self.queue, strict=True)]
            if self.training:
                self.enqueue(keys, items)
        pairs = (image, others[1]), (text, others[0])
        own, scale = torch.arange(len(image)), self.scale()
        return torch.stack([F.cross_entropy(scale * a @ b.T, own) for a, b in pairs]).mean()

    def tell(self, patches: Tensor, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.decoder(hidden, patches))
        return logits

    @torch.no_grad()
    def write(self, patches: Tensor) -> Tensor:
        ids = torch.full((len(patches), 1), START)
        for _ in range(LONGEST - 1):
            ids = torch.cat([ids, self.tell(patches, self.towers["text"](ids)[0])[:, -1:].argmax(-1)], 1)
        return ids

    @torch.no_grad()
    def follow(self, slowness: float) -> None:
        assert self.slow is not None
        for mine, theirs in zip(self.slow.parameters(), self.towers.parameters(), strict=True):
            mine.lerp_(theirs, 1 - slowness)


def due(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the words that they are to name."""
    return logits[:, :-1], ids[:, 1:]


def surprise(model: CoCa, patches: Tensor, hidden: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    logits, target = due(model.tell(patches, hidden), ids)
    return F.cross_entropy(logits.mT, target, ignore_index=PAD, reduction=reduction)


def losses(model: CoCa, images: Tensor, ids: Tensor, items: Tensor) -> dict[str, Tensor]:
    (patches, image), (hidden, text) = model.towers["image"](images), model.towers["text"](ids)
    contrast = model.contrast(image, text, images, ids, items)
    return {"infonce": contrast, "caption": surprise(model, patches, hidden, ids)}


def bigram_nats(held_out: Tensor, train: Tensor, words: int) -> float:
    """Nats a word of held-out captions by counts of pairs of words."""
    pairs = torch.full((words, words), 0.01)
    pairs.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), torch.ones(()), accumulate=True)
    chances = (pairs / pairs.sum(1, keepdim=True))[held_out[:, :-1], held_out[:, 1:]]
    return -float(chances[held_out[:, 1:] != PAD].log().mean())


def names_the_thing(written: Tensor, wanted: Tensor) -> Tensor:
    """Whether the right colour and shape (B, 2) are written, one behind the other, before the end."""
    ended = (written == END).cumsum(1) > 0
    return ((written[:, :-1] == wanted[:, :1]) & (written[:, 1:] == wanted[:, 1:]) & ~ended[:, 1:]).any(1)


def batches(count: int, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(count).split(size):
            if len(rows) == size:
                yield rows


def train(
    folder: Path, seed: int = 0, steps: int = 350, size: int = 64, items: int = 4096, rate: float = 2e-3,
    width: int = 48, layers: int = 2, out: int = 32, queue: int = 0, slowness: float = 0.98, most: int = 1000,
    weight: float = 2.0, ramp: int = 1, optimizer: str = "AdamW", schedule: str = "cosine", **of_optimizer: Any,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unseen = pictures(items, seed), pictures(512, 10_000 + seed)
    texts, images = captions(known.factors, seed), known.images
    tokenizer = Tokenizer(texts, most)
    ids, words = tokenizer.encode(texts), len(tokenizer.words)
    shown = torch.tensor(list({tuple(found): row for row, found in enumerate(unseen.factors.tolist())}.values()))
    held_images = unseen.images[shown]
    held_out = tokenizer.encode(captions(unseen.factors[shown], 10_000 + seed))
    bigram, everyone = bigram_nats(held_out, ids, words), torch.arange(len(shown))
    unknown = float((held_out == UNKNOWN).sum() / (held_out > START).sum())
    unread = 1 - len(ids[ids > UNKNOWN].unique()) / (words - len(SPECIAL))
    told = unseen.factors[shown].tolist()
    things = torch.tensor([[tokenizer.ids.get(w, -1) for w in (COLOURS[f[1]], SHAPES[f[0]])] for f in told])

    model = CoCa(words, width, layers, out, queue)
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **of_optimizer)
    turn = {"cosine": steps, "restarts": 100, "constant": math.inf}[schedule]
    plan = torch.optim.lr_scheduler.LambdaLR(
        optim, lambda k: min(1.0, (k + 1) / 20) * (1 + math.cos(math.pi * (k % turn) / turn)) / 2
    )

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        (patches, image), (hidden, text) = model.towers["image"](probe), model.towers["text"](held_out)
        scale = model.scale().log()

        def forced(patches: Tensor) -> tuple[Any, Any]:
            nats = surprise(model, patches, hidden, held_out, "none").sum(1)
            return nats.double().numpy(), (due(hidden, held_out)[1] != PAD).sum(1).double().numpy()

        nats, spoken = forced(patches)
        logits, target = due(model.tell(patches, hidden), held_out)
        wrong = ((logits.argmax(-1) != target) & torch.isin(target, things)).any(1)
        free = names_the_thing(model.write(patches), things)
        caption = {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(forced, patches).items()}
        caption |= {
            "nats_per_token": Reading(float(nats.sum() / spoken.sum()), bigram, len(nats)),
            "object": Reading(float(free.float().mean()), 1 / 12, len(free)),
            "object_forced": Reading(1 - float(wrong.float().mean()), None, len(wrong)),
        }
        pair = panel.pairs(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)
        found = {
            "val/image": panel.latents(image),
            "val/sentence": panel.latents(text),
            "val/text": {"unknown_share": Reading(unknown, 0.0)},
            "train/text": {"unreachable_share": Reading(unread, 0.0)},
            "val/pair": pair | {"temperature": contrastive.temperature(scale, 0.01)},
            "val/caption": caption,
        }  # fmt: skip
        filled = model.held >= 0
        if filled.any():
            rows = model.held[filled]
            now = model.keys(images[rows], ids[rows])
            for name, old, new in zip(("pictures", "captions"), model.queue[:, filled], now, strict=True):
                found[f"train/queue.{name}"] = {"queue_agreement": contrastive.queue_agreement(old, new)}
        return found

    nulls = {"train/loss/infonce": math.log(size + queue), "val/loss/infonce": math.log(len(shown) + queue)}
    nulls |= dict.fromkeys(("train/loss/caption", "val/loss/caption", "train/caption/nats_per_token"), bigram)
    monitor = Monitor(
        model, optim, folder=folder, probe=held_images, read=read, every=50, log_every=5, steps=steps, nulls=nulls
    )
    monitor.audit(leaks={"the very same picture": audits.leaks(images.numpy(), held_images.numpy())})
    for step, rows in enumerate(batches(items, size), 1):
        model.train()
        weights = {"infonce": 1.0, "caption": weight * min(1.0, step / ramp)}
        terms = losses(model, images[rows], ids[rows], rows)
        weighted = {name: (value, weights[name]) for name, value in terms.items()}
        total = torch.stack([w * value for value, w in weighted.values()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, (images[rows], ids[rows]))
        optim.step()
        plan.step()
        if queue:
            model.follow(slowness)
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                seen = losses(model, held_images, held_out, -torch.ones_like(everyone))
            monitor.validated({f"val/loss/{name}": float(value) for name, value in seen.items()})
            with torch.no_grad():
                (patches, _), (hidden, _) = model.towers["image"](images[:256]), model.towers["text"](ids[:256])
                clean = surprise(model, patches, hidden, ids[:256])
            monitor.log({"train/caption/nats_per_token": float(clean)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        (patches, image), (hidden, text) = model.towers["image"](held_images), model.towers["text"](held_out)
        alike = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        nats = float(surprise(model, patches, hidden, held_out))
        named = names_the_thing(model.write(patches), things)
    return {
        "sentence of a picture": (float((alike.argmax(1) == everyone).float().mean()), 1 / len(everyone)),
        "picture of a sentence": (float((alike.argmax(0) == everyone).float().mean()), 1 / len(everyone)),
        "nats a word below a bigram model": (bigram - nats, 0.0),
        "pictures whose thing is named": (float(named.float().mean()), 1 / 12),
    }


FAMILY = Family(
    "coca",
    "development",
    "pictures and sentences in one space, and a decoder that captions, transformers all; with a queue of negatives",
    faults=(
        Fault(
            "caption-read-at-its-start",
            "The sentence is read at its first word, as BERT's are, where a causal encoder has not read any other.",
            ("latent-ignores-input",),
            changes=(Change("x[torch.arange(len(x)), ends]", "x[:, 0]"),),
        ),
        Fault(
            "gate-that-is-no-parameter",
            "The gate through which the decoder looks is a tensor of 0 and no parameter, so that it never opens.",
            ("decoder-ignores-latent", "dead-parameters"),
            changes=(Change("self.gate = nn.Parameter(torch.zeros(()))", "self.gate = torch.zeros(())"),),
            case="E decoder-ignores-latent",
        ),
        Fault(
            "labels-not-shifted",
            "The loss was to shift the labels, as in another library, and does not: a word is guessed from itself.",
            ("free-running-gap", "decoder-ignores-latent"),
            changes=(Change("return logits[:, :-1], ids[:, 1:]", "return logits, ids"),),
        ),
        Fault(
            "contrast-without-a-gradient",
            "The decorator of the method above was copied with it, so that the contrast is computed without a graph.",
            ("term-inert", "dead-parameters"),
            changes=(Change("    def contrast(", "    @torch.no_grad()\n    def contrast("),),
        ),
        Fault(
            "queue-before-the-batch",
            "Old keys stand before those of the batch, and the labels still count from the first column.",
            ("near-chance",),
            changes=(Change("torch.cat([now, before])", "torch.cat([before, now])"),),
            options={"queue": 256},
        ),
        Fault(
            "keys-copied-into-a-copy",
            "Rows taken by a tensor of numbers are a copy, and the new keys are copied into that, not into the queue.",
            ("queue-stale",),
            changes=(Change("self.queue[:, rows] = keys", "self.queue[:, rows].copy_(keys)"),),
            options={"queue": 256},
            minor=True,
        ),
        Fault(
            "held-out-keys-in-the-queue",
            "Nobody asks for the mode before keys are added, so that held-out pairs become negatives in training.",
            ("validation-pollutes",),
            changes=(Change("            if self.training:\n    ", ""),),
            options={"queue": 256},
        ),
        Fault(
            "temperature-by-its-data",
            "The temperature is taken by .data, to which no gradient goes, so it stays what it was.",
            ("temperature-stuck", "dead-parameters"),
            changes=(Change("self.log_scale.clamp", "self.log_scale.data.clamp"),),
            minor=True,
        ),
        Fault(
            "vocabulary-of-a-smaller-set",
            "The vocabulary is as large as an earlier set asked for; the rarest words, colours too, have no id.",
            ("vocabulary-unreachable",),
            options={"most": 16},
        ),
        Fault(
            "gradients-never-cleared",
            "The line that clears the gradients is missing, so that each step takes the sum of all before it.",
            ("gradients-add-up", "plateau", "no-learning", "near-chance"),
            changes=(Change("        optim.zero_grad()\n", ""),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("queue", "Keys that say the same keep its loss high.", options={"queue": 256}, seeds=(0, 1)),
        Healthy("captions-by-a-ramp", "The total rises with the weight of the captions.", options={"ramp": 150}),
        Healthy("sgd", "Slow at first.", options={"optimizer": "SGD", "rate": 0.01, "momentum": 0.9}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 3e-4, "schedule": "constant"}),
        Healthy("restarts", "The rate jumps back up every hundred steps.", options={"schedule": "restarts"}),
        Healthy("small-batches", "Few negatives, and noisy losses.", options={"size": 24, "steps": 600, "rate": 1e-3}),
        Healthy("few-pairs", "A small set, seen often.", options={"items": 768, "optimizer": "Adam"}),
        Healthy("wide", options={"width": 64, "layers": 3, "out": 48, "steps": 300, "rate": 1e-3}),
    ),
)
