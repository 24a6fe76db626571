"""Pictures found, matched and told by sentences: BLIP (Li et al. 2022), with the slow towers of ALBEF (Li et al. 2021).

One text network has three uses, which share all but the words' attention to each other.
Shapes: B pairs, P patches, L words of a caption, d width, D dimensions of an embedding.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import contrastive
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange, cost_of_strangers
from intaglio.history import Reading

SPECIAL = ("<pad>", "<class>", "<match>", "<tell>", "<end>", "<unknown>")
PAD, CLASS, MATCH, TELL, END, UNKNOWN = range(6)
LONGEST, COOLEST = 10, 0.01


def captions(factors: Tensor, seed: int) -> list[str]:
    """``A small red disc at the top left.``, or ``At the top left, a small red disc.``"""
    generator = torch.Generator().manual_seed(seed)
    told = []
    firsts = torch.rand(len(factors), generator=generator) < 0.5
    for (shape, colour, size, y, x), first in zip(factors.tolist(), firsts, strict=True):
        thing = f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"
        place = "in the middle" if y == x == 1 else f"at the {ROWS[y]} {COLUMNS[x]}"
        told.append((f"{place}, {thing}" if first else f"{thing} {place}").capitalize() + ".")
    return told


def cleaned(caption: str) -> str:
    return caption.lower().replace(",", "").replace(".", "")


class Tokenizer:
    def __init__(self, texts: list[str]):
        self.words = [*SPECIAL, *sorted({word for text in texts for word in text.split()})]
        self.ids = {word: k for k, word in enumerate(self.words)}

    def encode(self, texts: list[str]) -> Tensor:
        rows = [[CLASS, *(self.ids.get(word, UNKNOWN) for word in text.split()), END] for text in texts]
        return torch.tensor([row + [PAD] * (LONGEST - len(row)) for row in rows])


class Eye(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1))
        self.first, self.places = (nn.Parameter(0.02 * torch.randn(count, width)) for count in (1, 17))
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)
        self.last = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).mT
        return self.last(self.block(torch.cat([self.first.expand(len(x), 1, -1), x], 1) + self.places))


class Layer(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.reads, self.writes, self.looks = (nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, unused: Tensor, patches: Tensor | None, causal: bool) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
        attention = self.writes if causal else self.reads
        own = self.norms[0](x)
        x = x + self.dropout(attention(own, own, own, unused, need_weights=False, attn_mask=later)[0])
        if patches is not None:
            x = x + self.dropout(self.looks(self.norms[1](x), patches, patches, need_weights=False)[0])
        return x + self.dropout(self.mlp(self.norms[2](x)))


class Text(nn.Module):
    def __init__(self, words: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(0.1 * torch.randn(words, width), freeze=False)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        self.layers, self.last = nn.ModuleList(Layer(width, dropout) for _ in range(layers)), nn.LayerNorm(width)

    def forward(self, use: int, ids: Tensor, patches: Tensor | None = None, causal: bool = False) -> Tensor:
        """(B, L, d); the first token says what for."""
        told = torch.cat([torch.full_like(ids[:, :1], use), ids[:, 1:]], 1)
        x = self.words(told) + self.places[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, ids == PAD, patches, causal)
        return self.last(x)


class Towers(nn.Module):
    def __init__(self, words: int, width: int, dropout: float, layers: int = 2, out: int = 32):
        super().__init__()
        self.eye, self.text = Eye(width, dropout), Text(words, width, layers, dropout)
        self.of_image, self.of_text = nn.Linear(width, out), nn.Linear(width, out)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches = self.eye(images)
        image, text = self.of_image(patches[:, 0]), self.of_text(self.text(CLASS, ids)[:, 0])
        return patches, F.normalize(image, dim=1), F.normalize(text, dim=1)


def harder(logits: Tensor, same: Tensor) -> Tensor:
    """For each row another one's partner, the likelier the more it is alike."""
    return torch.multinomial((logits.softmax(1) + 1e-4).masked_fill(same, 0.0), 1)[:, 0]


class BLIP(nn.Module):
    def __init__(self, words: int, width: int, dropout: float, alpha: float):
        super().__init__()
        self.towers = Towers(words, width, dropout)
        self.alpha, self.slow = alpha, copy.deepcopy(self.towers).requires_grad_(False) if alpha else None
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        self.matches, self.head = nn.Linear(width, 2), nn.Linear(width, words)
        self.head.weight = self.towers.text.words.weight

    def scale(self) -> Tensor:
        return 1 / self.log_temperature.exp().clamp(min=COOLEST)

    def contrast(self, logits: Tensor, images: Tensor, ids: Tensor, same: Tensor) -> Tensor:
        """Cross entropy both ways; of ``alpha`` of it the slow towers say what is due."""
        due = [same / same.sum(1, keepdim=True)] * 2
        if self.slow is not None:
            with torch.no_grad():
                _, image, text = self.slow(images, ids)
                alike = self.scale() * image @ text.T
            due = [(1 - self.alpha) * a + self.alpha * b.softmax(1) for a, b in zip(due, (alike, alike.T), strict=True)]
        return (F.cross_entropy(logits, due[0]) + F.cross_entropy(logits.T, due[1])) / 2

    def match(self, patches: Tensor, ids: Tensor) -> Tensor:
        return self.matches(self.towers.text(MATCH, ids, patches)[:, 0])

    def tell(self, patches: Tensor, ids: Tensor) -> Tensor:
        return self.head(self.towers.text(TELL, ids, patches, causal=True))

    def surprise(self, patches: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
        logits, target = self.tell(patches, ids[:, :-1]), ids[:, 1:]
        return F.cross_entropy(logits.mT, target, ignore_index=PAD, reduction=reduction)

    def forward(self, images: Tensor, ids: Tensor, items: Tensor) -> dict[str, Tensor]:
        """The three losses; pictures of the same number show the same thing."""
        patches, image, text = self.towers(images, ids)
        logits, same = self.scale() * image @ text.T, items[:, None] == items
        with torch.no_grad():
            captions_of, pictures_of = harder(logits, same), harder(logits.T, same.T)
            told = torch.cat([ids, ids[captions_of], ids])
        matched = self.match(torch.cat([patches, patches, patches[pictures_of]]), told)
        return {
            "infonce": self.contrast(logits, images, ids, same),
            "matching": F.cross_entropy(matched, (torch.arange(len(matched)) < len(ids)).long()),
            "caption": self.surprise(patches, ids),
        }

    @torch.no_grad()
    def write(self, patches: Tensor) -> Tensor:
        ids = torch.full((len(patches), 1), CLASS)
        for _ in range(LONGEST - 1):
            ids = torch.cat([ids, self.tell(patches, ids)[:, -1:].argmax(-1)], 1)
        return ids

    @torch.no_grad()
    def follow(self, slowness: float) -> None:
        assert self.slow is not None
        for mine, theirs in zip(self.slow.parameters(), self.towers.parameters(), strict=True):
            mine.lerp_(theirs, 1 - slowness)


def bigram_nats(held_out: Tensor, train: Tensor, words: int) -> float:
    pairs = torch.full((words, words), 0.01)
    pairs.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), torch.ones(()), accumulate=True)
    chances = (pairs / pairs.sum(1, keepdim=True))[held_out[:, :-1], held_out[:, 1:]]
    return -float(chances[held_out[:, 1:] != PAD].log().mean())


def names_the_thing(written: Tensor, things: Tensor) -> Tensor:
    """Whether the right colour and shape (B, 2) are written, one behind the other, before the end."""
    ended = (written == END).cumsum(1) > 0
    return ((written[:, :-1] == things[:, :1]) & (written[:, 1:] == things[:, 1:]) & ~ended[:, 1:]).any(1)


def course(schedule: str, step: int, steps: int) -> float:
    done = {"cosine": step / steps, "linear": step / steps, "restarts": step % 100 / 100, "constant": 0.0}[schedule]
    return min(1.0, (step + 1) / 20) * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def train(
    folder: Path, seed: int = 0, steps: int = 300, size: int = 20, items: int = 4096, rate: float = 2e-3,
    width: int = 48, dropout: float = 0.0, alpha: float = 0.0, slowness: float = 0.98, ramp: int = 1, later: int = 0,
    optimizer: str = "AdamW", schedule: str = "cosine", **of_optimizer: Any,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unseen = pictures(items, seed), pictures(192, 10_000 + seed)
    images, numbers = known.images, known.factors @ torch.tensor([72, 18, 9, 3, 1])
    texts = [cleaned(text) for text in captions(known.factors, seed)]
    tokenizer = Tokenizer(texts)
    ids, words = tokenizer.encode(texts), len(tokenizer.words)
    shown = torch.tensor(list({tuple(found): row for row, found in enumerate(unseen.factors.tolist())}.values()))
    held_images, factors, everyone = unseen.images[shown], unseen.factors[shown], torch.arange(len(shown))
    raw = captions(factors, 10_000 + seed)
    held_out = tokenizer.encode([cleaned(text) for text in raw])
    bigram = bigram_nats(held_out, ids, words)
    unknown = float((held_out == UNKNOWN).sum() / ((held_out != PAD) & (held_out != CLASS)).sum())
    unused = 1 - len(ids[ids > UNKNOWN].unique()) / (words - len(SPECIAL))
    things = torch.tensor([[tokenizer.ids[word] for word in (COLOURS[f[1]], SHAPES[f[0]])] for f in factors.tolist()])

    model = BLIP(words, width, dropout, alpha)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optim = getattr(torch.optim, optimizer)(groups, lr=rate, **of_optimizer)
    plan = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: course(schedule, k, steps))
    start = parameters_to_vector(model.towers.parameters()).detach()

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        (patches, image, text), target = model.towers(probe, held_out), held_out[:, 1:]

        def forced(patches: Tensor) -> tuple[Any, Any]:
            nats = model.surprise(patches, held_out, "none").sum(1)
            return nats.double().numpy(), (target != PAD).sum(1).double().numpy()

        nats, spoken = forced(patches)
        right = model.tell(patches, held_out[:, :-1]).argmax(-1) == target
        free = names_the_thing(model.write(patches), things)
        wrong = (~right & torch.isin(target, things)).any(1)
        caption = {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(forced, patches).items()}
        caption |= {
            "nats_per_token": Reading(float(nats.sum() / spoken.sum()), bigram, len(nats)),
            "object": Reading(float(free.float().mean()), 1 / 12, len(free)),
            "object_forced": Reading(1 - float(wrong.float().mean()), None, len(wrong)),
        }
        pair = panel.pairs(image, text, model.scale().log())
        refusal = cost_of_strangers(lambda a, b: -model.match(a, b).log_softmax(1)[:, 1].mean(), patches, held_out)
        found = {
            "val/image": panel.latents(image),
            "val/sentence": panel.latents(text),
            "val/text": {"unknown_share": Reading(unknown, 0.0)},
            "train/text": {"unreachable_share": Reading(unused, 0.0)},
            "val/pair": pair | {"temperature": contrastive.temperature(-model.log_temperature, COOLEST)},
            "val/match": {"strangers_nats": refusal},
            "val/caption": caption,
        }
        if model.slow is not None:
            gone = [parameters_to_vector(towers.parameters()) - start for towers in (model.slow, model.towers)]
            _, *slow = model.slow(probe, held_out)
            theirs, own = (F.cross_entropy(model.scale() * a @ b.T, everyone) for a, b in (slow, (image, text)))
            moved = Reading(float(gone[0].norm() / gone[1].norm()))
            found["val/ema"] = {"moved": moved, "loss": Reading(float(theirs), float(own))}
        return found

    guess = math.log(3) - 2 / 3 * math.log(2)
    nulls = {"infonce": math.log(size), "matching": guess, "caption": bigram, "train/caption/nats_per_token": bigram}
    monitor = Monitor(
        model, optim, folder=folder, probe=held_images, read=read, every=50, log_every=5, steps=steps, nulls=nulls
    )
    monitor.audit(leaks={"the very same picture": audits.leaks(images.numpy(), held_images.numpy())})
    for step in range(1, steps + 1):
        model.train()
        rows = torch.randperm(items)[:size]
        match_weight, tell_weight = float(step > later), min(1.0, step / ramp)
        terms = model(images[rows], ids[rows], numbers[rows])
        total = terms["infonce"] + match_weight * terms["matching"] + tell_weight * terms["caption"]
        weights = {"infonce": 1.0, "matching": match_weight, "caption": tell_weight}
        weighted = {name: (value, weights[name]) for name, value in terms.items()}
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, (images[rows], ids[rows]))
        optim.step()
        plan.step()
        if alpha:
            model.follow(slowness)
        if step % 50 == 0:
            model.eval()
            parts = [part for part in everyone.split(size) if len(part) == size]
            with monitor.validation(), torch.no_grad():
                seen = [model(held_images[part], held_out[part], part) for part in parts]
                clean = model.surprise(model.towers.eye(images[:256]), ids[:256])
            monitor.validated({f"val/loss/{n}": sum(float(part[n]) for part in seen) / len(seen) for n in terms})
            monitor.log({"train/caption/nats_per_token": float(clean)})
    monitor.close()
    model.eval()
    with torch.no_grad():
        patches, image, text = model.towers(held_images, held_out)
        found = (image @ text.T).argmax(1) == everyone
        own, strange = (model.match(patches, ids).diff()[:, 0] for ids in (held_out, held_out.roll(1, 0)))
        named = names_the_thing(model.write(patches), things)
        nats = float(model.surprise(patches, held_out))
    return {
        "sentence of a picture": (float(found.float().mean()), 1 / len(everyone)),
        "own sentence above another's, by matching": (float((own > strange).float().mean()), 0.5),
        "pictures whose thing is named": (float(named.float().mean()), 1 / 12),
        "nats a word below a bigram model": (bigram - nats, 0.0),
    }


FAMILY = Family(
    "blip",
    "development",
    "a picture's and a sentence's network with a contrast, a matching of hard negatives and captions",
    faults=(
        Fault(
            "decoder-without-its-picture",
            "The patches are not handed on to the text network when it writes, so that it skips looking at them.",
            ("decoder-ignores-latent",),
            changes=(Change("(TELL, ids, patches, causal=True)", "(TELL, ids, causal=True)"),),
            case="E decoder-ignores-latent",
        ),
        Fault(
            "matching-with-the-causal-mask",
            "Matching is as causal as the writing that it was copied from: the first token, read for it, sees no word.",
            ("trivial-pair",),
            changes=(Change("text(MATCH, ids, patches)", "text(MATCH, ids, patches, causal=True)"),),
        ),
        Fault(
            "matching-without-a-gradient",
            "The pass that matches is indented under the no_grad in which its negatives are drawn.",
            ("term-inert", "dead-parameters"),
            changes=(Change("        matched = self.match", "            matched = self.match"),),
        ),
        Fault(
            "times-the-temperature",
            "Similarities are multiplied by the temperature, and not divided.",
            ("near-chance", "no-learning", "plateau"),
            changes=(Change("return 1 / self.log", "return self.log"),),
        ),
        Fault(
            "temperature-in-no-group",
            "Matrices decay and vectors do not; the temperature, which is neither, is in no group of the optimizer.",
            ("not-in-optimizer", "temperature-stuck"),
            changes=(Change("if p.ndim < 2]", "if p.ndim == 1]"),),
        ),
        Fault(
            "schedule-stepped-at-validation",
            "A schedule made for steps is stepped where held-out pairs are looked at, and never ends its warm-up.",
            ("learning-rate-off",),
            changes=(Change("        plan.step()\n", "        if step % 50 == 0:\n            plan.step()\n"),),
        ),
        Fault(
            "slow-towers-never-follow",
            "The slow towers' update is never called, so that what they say is due is that of random weights.",
            ("ema-lag",),
            changes=(Change("        if alpha:\n            model.follow(slowness)\n", ""),),
            options={"alpha": 0.4},
        ),
        Fault(
            "writing-without-the-mask",
            "The mask of later words is forgotten, so that each word sees the one that it is to guess.",
            ("free-running-gap",),
            changes=(Change(", attn_mask=later", ""),),
        ),
        Fault(
            "held-out-captions-not-cleaned",
            "Held-out captions keep their capitals and full stops, which training's have lost.",
            ("vocabulary-unreachable",),
            changes=(Change("[cleaned(text) for text in raw]", "raw"),),
        ),
        Fault(
            "matching-left-out-of-the-sum",
            "The sum that is minimised was written before the matching was, which is computed and logged alone.",
            ("weight-not-applied", "dead-parameters"),
            changes=(Change(' + match_weight * terms["matching"]', ""),),
        ),
        Fault(
            "words-frozen-before-training",
            "The words' embeddings are frozen as if a BERT had been loaded, and with them the head that shares them.",
            ("tied-and-frozen",),
            changes=(Change("    trained =", "    model.towers.text.words.requires_grad_(False)\n    trained ="),),
            case="V tied-and-frozen",
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("slow-towers", "Soft labels keep its loss high.", options={"alpha": 0.4}, seeds=(0, 1)),
        Healthy("captions-by-a-ramp", "The total rises with it.", options={"ramp": 100, "steps": 400}, seeds=(0, 1)),
        Healthy("matching-later", "Its weight is 0 at first.", options={"later": 75, "steps": 400}, seeds=(0, 1)),
        Healthy("nadam", options={"optimizer": "NAdam", "rate": 1e-3, "schedule": "linear", "steps": 400}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4, "schedule": "constant", "steps": 400}),
        Healthy("adam", options={"optimizer": "Adam", "schedule": "constant", "rate": 1e-3}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps up thrice.", options={"schedule": "restarts", "steps": 400}, seeds=(0, 1)),
        Healthy("small-batches", "Noisy losses.", options={"size": 12, "steps": 400, "rate": 1.5e-3}, seeds=(0, 1)),
        Healthy("few-pairs", "A small set, seen often.", options={"items": 1024, "steps": 450}, seeds=(0, 1)),
        Healthy("dropout", "Its loss is higher in training.", options={"dropout": 0.05, "steps": 600}, seeds=(0, 1)),
        Healthy("wide", options={"width": 64, "rate": 1.5e-3}, seeds=(0, 1)),
    ),
)
