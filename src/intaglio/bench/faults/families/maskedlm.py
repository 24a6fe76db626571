"""BERT (Devlin et al. 2019), small: hidden words of short texts are said by what stands around them, and a summary says
in which section a text was filed.

Texts are made by a grammar, and some are posted again and again. N texts, T words, D width.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_context, distinct_views
from intaglio.history import Reading
from intaglio.history.reading import share as share_of

WOMEN = ("Anna", "Berta", "Clara", "Dora", "Emma", "Frida", "Greta", "Hanna", "Ida", "Julia", "Klara", "Lena")
MEN = ("Adam", "Bruno", "Carl", "David", "Emil", "Felix", "Georg", "Hugo", "Ivan", "Jakob", "Karl", "Leo")
SECTIONS = (
    ("cook baker butcher waiter", "bakes cuts stirs serves", "bread soup cake knife oven"),
    ("sailor fisher captain diver", "ties hauls mends paints", "boat net rope anchor sail"),
    ("farmer shepherd milker herder", "feeds shears milks drives", "cow barn wool hay plough"),
    ("teacher pupil tutor clerk", "reads copies learns explains", "book chalk map desk pen"),
    ("actor singer dancer drummer", "plays rehearses sings sews", "song mask curtain drum costume"),
    ("smith joiner potter glazier", "forges planes glazes fires", "hammer table jar saw window"),
)
LIKE = ("old", "new", "heavy", "small", "bright", "broken")
WHEN = ("noon", "night", "dawn", "dusk")
SPECIAL = ("[pad]", "[unk]", "[cls]", "[sep]", "[mask]")
PAD, UNK, CLS, SEP, MASK = range(5)
IGNORE = -100
HELD_OUT = 256


class Text(NamedTuple):
    words: str
    section: int


def written(chance: random.Random) -> Text:
    """Now and then a word is another section's, and a text is filed in the wrong one."""
    section = chance.randrange(len(SECTIONS))

    def word(kind: int) -> str:
        of = chance.randrange(len(SECTIONS)) if chance.random() < 0.05 else section
        return chance.choice(SECTIONS[of][kind].split())

    woman = chance.random() < 0.5
    name, pronoun = (chance.choice(WOMEN), "she") if woman else (chance.choice(MEN), "he")
    like = f" {chance.choice(LIKE)}" if chance.random() < 0.7 else ""
    thing = word(2)
    said = f"{name} the {word(0)} {word(1)} the{like} {thing}. Then {pronoun} {word(1)} the {thing}"
    said += f" and the {word(2)}." if chance.random() < 0.5 else "."
    said += f" At {chance.choice(WHEN)} {pronoun} rests." if chance.random() < 0.5 else ""
    return Text(said, chance.randrange(len(SECTIONS)) if chance.random() < 0.06 else section)


def posts(count: int, seed: int) -> list[Text]:
    """Every fourth was posted before."""
    chance = random.Random(seed)
    made: list[Text] = []
    while len(made) < count:
        made.append(chance.choice(made) if len(made) % 4 == 3 else written(chance))
    chance.shuffle(made)
    return made


def tokens(text: str) -> list[str]:
    return text.lower().replace(".", " .").split()


def vocabulary(texts: Sequence[Text]) -> dict[str, int]:
    """Words that stand there twice, by number."""
    counts = Counter(word for text in texts for word in tokens(text.words))
    return {word: k for k, word in enumerate((*SPECIAL, *sorted(w for w in counts if counts[w] > 1)))}


def encoded(texts: Sequence[Text], numbers: dict[str, int], length: int) -> tuple[Tensor, int]:
    """(N, T) int64, and how many texts were cut."""
    rows = [[CLS, *(numbers.get(word, UNK) for word in tokens(text.words)), SEP] for text in texts]
    ids = torch.full((len(rows), length), PAD)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row[:length])
    return ids, sum(len(row) > length for row in rows)


def hide(ids: Tensor, share: float, count: int, chance: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """What the model is given, and what it must say: of the words chosen 80 % are hidden, 10 % others, 10 % kept."""
    chosen = (torch.rand(ids.shape, generator=chance) < share) & (ids >= len(SPECIAL))
    lot = torch.rand(ids.shape, generator=chance)
    given = ids.masked_fill(chosen & (lot < 0.8), MASK)
    others = torch.randint(len(SPECIAL), count, ids.shape, generator=chance)
    given = torch.where(chosen & (lot >= 0.9), others, given)
    return given, ids.masked_fill(~chosen, IGNORE)


class Block(nn.Module):
    def __init__(self, width: int, drop: float, heads: int = 4):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(drop)
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(mixed))
        return x + self.drop(self.mlp(self.norm_2(x)))


class Bert(nn.Module):
    def __init__(self, count: int, length: int, width: int, depth: int, drop: float):
        super().__init__()
        self.words, self.places = nn.Embedding(count, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(Block(width, drop) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pooler = nn.Linear(width, width)
        self.section = nn.Linear(width, len(SECTIONS))
        self.transform, self.norm_said = nn.Linear(width, width), nn.LayerNorm(width)
        self.decoder = nn.Linear(width, count)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.1)
        self.decoder.weight = self.words.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features of each word, (N, T, D), and a summary, (N, D)."""
        embedded = self.drop(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        x, seen = embedded, (ids != PAD)[:, None, None]
        for block in self.blocks:
            x = block(x, seen)
        x = self.norm(x)
        return x, torch.tanh(self.pooler(x[:, 0]))

    def said(self, features: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.norm_said(F.gelu(self.transform(features))))
        return logits


def losses(model: Bert, given: Tensor, labels: Tensor, sections: Tensor) -> dict[str, Tensor]:
    features, summary = model(given)
    at = labels != IGNORE
    masked = F.cross_entropy(model.said(features[at]), labels[at])
    section = F.cross_entropy(model.section(summary), sections)
    return {"masked": masked, "section": section}


def bigram(known: Tensor, held_out: Tensor, at: Tensor, count: int) -> tuple[float, float]:
    """Nats a word where ``at`` of a table of pairs, and how often the commonest word of all is right there."""
    pairs = torch.full((count, count), 0.02)
    pairs.index_put_((known[:, :-1].flatten(), known[:, 1:].flatten()), torch.ones(()), accumulate=True)
    chances = (pairs / pairs.sum(1, keepdim=True)).log()
    nats = -chances[held_out[:, :-1], held_out[:, 1:]][at[:, 1:]].mean()
    commonest = known[known >= len(SPECIAL)].mode().values
    return float(nats), float((held_out[at] == commonest).double().mean())


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and norms do not."""
    spared = ("bias", "norm")
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if not any(s in name for s in spared)], "weight_decay": decay},
        {"params": [p for name, p in named if any(s in name for s in spared)], "weight_decay": 0.0},
    ]


def course(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the full rate."""
    if step <= warmup:
        return step / warmup
    done = (step - 1 - warmup) / (steps - warmup)
    if schedule == "restarts":
        done = 3 * done % 1
    return {"constant": 1.0, "linear": 1 - done}.get(schedule, 0.5 * (1 + math.cos(math.pi * done)))


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from (rows for rows in torch.randperm(items).split(size) if len(rows) == size)


def train(
    folder: Path, seed: int = 0, steps: int = 320, size: int = 32, items: int = 2400, rate: float = 3e-3,
    length: int = 26, width: int = 48, depth: int = 2, share: float = 0.15, grow: int = 0, weight: float = 0.5,
    hold: int = 0, ramp: int = 1, drop: float = 0.05, decay: float = 0.01, optimizer: str = "AdamW",
    warmup: int = 40, schedule: str = "linear",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    texts = list({text.words: text for text in posts(2 * (items + HELD_OUT), seed)}.values())
    apart, texts = texts[:HELD_OUT], texts[HELD_OUT : HELD_OUT + items]
    numbers = vocabulary(texts)
    count = len(numbers)
    (ids, cut), (held_out, _) = encoded(texts, numbers, length), encoded(apart, numbers, length)
    sections, due = (torch.tensor([text.section for text in some]) for some in (texts, apart))
    model = Bert(count, length, width, depth, drop)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(groups(model, decay), lr=rate, **more)
    plan = torch.optim.lr_scheduler.LambdaLR(optim, lambda done: course(done + 1, steps, warmup, schedule))

    given, labels = hide(held_out, share, count, torch.Generator().manual_seed(1))
    null, commonest = bigram(ids, held_out, labels != IGNORE, count)
    filed = sections.bincount(minlength=len(SECTIONS)) / len(sections)
    guess = float((due == filed.argmax()).double().mean())
    nulls = {"masked": null, "section": -float(filed.log()[due].mean())}
    alike = torch.zeros(length, dtype=torch.bool).index_fill_(0, torch.tensor([3, 4, 7, 11]), True)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        shown, wanted = hide(probe, share, count, torch.Generator().manual_seed(2))
        context, at = probe[:, ~alike], wanted != IGNORE

        def errors(context: Tensor) -> Any:
            whole = torch.full_like(probe, MASK).masked_scatter(~alike, context)
            logits = model.said(model(whole)[0][:, alike])
            return F.cross_entropy(logits.mT, probe[:, alike], reduction="none").mean(1).double().numpy()

        trials = cost_of_context(errors, context) | {"distinct": distinct_views(context[:, 0], context[:, 1])}
        return {
            "val/summary": panel.latents(model(probe)[1]),
            "val/context": {f"context_{name}": cost for name, cost in trials.items()},
            "val/words": {"distinct_views": distinct_views(shown[at], probe[at])},
        }

    @torch.no_grad()
    def validated() -> dict[str, float | Reading]:
        features, summary = model(given)
        at = labels != IGNORE
        right = model.said(features[at]).argmax(1) == labels[at]
        found = model.section(summary).argmax(1) == due
        terms = losses(model, given, labels, due)
        return {
            "val/loss/masked": float(terms["masked"]),
            "val/loss/section": float(terms["section"]),
            "val/words/token_accuracy": share_of(int(right.sum()), len(right), commonest),
            "val/section/accuracy": share_of(int(found.sum()), len(found), guess),
            "val/text/unknown_share": float((held_out == UNK).sum() / (held_out != PAD).sum()),
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:128], read=read, every=50, log_every=5, steps=steps, nulls=nulls
    )
    monitor.audit(
        augmentations={"hidden words": audits.augmentation(lambda x: hide(x[None], share, count)[0][0], ids[:64])},
        leaks={
            "the very same text": audits.leaks([t.words.encode() for t in texts], [t.words.encode() for t in apart])
        },
        intake={"items": len(texts), "lost": {"cut at the end": cut}},
    )
    never = 1 - len(set(ids.flatten().tolist()) - set(range(len(SPECIAL)))) / (count - len(SPECIAL))
    monitor.log({"train/text/unreachable_share": never})
    for step, rows in enumerate(batches(len(ids), size), 1):
        now = weight * min(1.0, max(0, step - hold) / ramp)
        hidden = share * (0.3 + 0.7 * min(1.0, step / grow)) if grow else share
        model.train()
        terms = losses(model, *hide(ids[rows], hidden, count), sections[rows])
        weighted = {"masked": (terms["masked"], 1.0), "section": (terms["section"], now)}
        monitor.before_backward(weighted)
        optim.zero_grad()
        total = terms["masked"] + now * terms["section"]
        total.backward()
        monitor.step({**weighted, "total": total}, ids[rows])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation():
                told = validated()
            monitor.validated(told)
        if step == steps:
            break
    monitor.close()
    model.eval()
    blank = (torch.rand(held_out.shape, generator=torch.Generator().manual_seed(3)) < 0.15) & (held_out > MASK)
    known, usual = bigram(ids, held_out, blank, count)
    with torch.no_grad():
        logits = model.said(model(held_out.masked_fill(blank, MASK))[0][blank])
        named = float((model.section(model(held_out)[1]).argmax(1) == due).double().mean())
    right = float((logits.argmax(1) == held_out[blank]).double().mean())
    return {
        "nats a hidden word better than a bigram model": (known - float(F.cross_entropy(logits, held_out[blank])), 0.0),
        "hidden words that are right, beside the commonest": (right, usual),
        "sections named by the summary, beside the commonest": (named, guess),
    }


FAMILY = Family(
    "maskedlm",
    "development",
    "BERT: a transformer that says hidden words of short texts, and from a summary the section of each",
    faults=(
        Fault(
            "mask-thrown-away",
            "masked_fill returns a new tensor, which is thrown away: the words to be said stand there to be read.",
            ("trivial-pair", "augmentation-inert"),
            changes=(Change("given = ids.masked_fill(chosen", "(given := ids.clone()).masked_fill(chosen"),),
        ),
        Fault(
            "every-word-a-label",
            "The labels are a copy of the text, in which nobody set those that were not chosen to be ignored.",
            ("trivial-pair", "flattering-accuracy"),
            changes=(Change("return given, ids.masked_fill(~chosen, IGNORE)", "return given, ids.clone()"),),
        ),
        Fault(
            "every-place-the-first",
            "The tensor of places is made as zeros, and never filled: each word is told that it stands first.",
            ("context-order-inert",),
            changes=(Change("self.places(torch.arange(ids.shape[1]))", "self.places(torch.zeros_like(ids))"),),
            minor=True,
        ),
        Fault(
            "summary-of-the-embedding",
            "The pooler reads the first word as it was embedded, before any block, and that is [cls] in each text.",
            ("latent-ignores-input",),
            changes=(Change("self.pooler(x[:, 0])", "self.pooler(embedded[:, 0])"),),
        ),
        Fault(
            "section-detached",
            "The section's loss was detached to be logged, and the detached one is what is added to the sum.",
            ("term-inert", "dead-parameters"),
            changes=(Change("(model.section(summary), sections)", "(model.section(summary), sections).detach()"),),
        ),
        Fault(
            "ramp-only-logged",
            "The section's weight is to rise over half of the run; what rises is logged, and the full one multiplies.",
            ("weight-not-applied",),
            changes=(Change('terms["masked"] + now * terms', 'terms["masked"] + weight * terms'),),
            options={"ramp": 160},
            case="V weight-not-applied",
        ),
        Fault(
            "spared-in-no-group",
            "The group without decay takes names with all words of its list, not any, so norms and biases are in none.",
            ("not-in-optimizer",),
            changes=(Change("for name, p in named if any(s in", "for name, p in named if all(s in"),),
        ),
        Fault(
            "warm-up-in-texts",
            "The warm-up is given in texts to a schedule that counts steps, so that the run ends before it does.",
            ("learning-rate-off",),
            changes=(Change("course(done + 1, steps, warmup,", "course(done + 1, steps, warmup * size,"),),
        ),
        Fault(
            "vocabulary-of-raw-words",
            "The vocabulary is split at spaces; the tokenizer, which makes the ids, also lowers and parts full stops.",
            ("vocabulary-unreachable",),
            changes=(Change("texts for word in tokens(text.words)", "texts for word in text.words.split()"),),
        ),
        Fault(
            "reposts-in-both-splits",
            "Texts that were posted again are not taken out before the split, so many are held out and trained on.",
            ("split-leak",),
            changes=(
                Change(
                    "list({text.words: text for text in posts(2 * (items + HELD_OUT), seed)}.values())",
                    "posts(items + HELD_OUT, seed)",
                ),
            ),
        ),
        Fault(
            "cut-at-sixteen",
            "The longest length stayed at what it was for headlines, and most texts lose their end without a word.",
            ("data-replaced",),
            options={"length": 16},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3, 4)),
        Healthy("wide", options={"width": 72, "rate": 2e-3}, seeds=(0, 1)),
        Healthy("deep", options={"depth": 3, "width": 32}, seeds=(0, 1)),
        Healthy("constant-rate", options={"optimizer": "Adam", "rate": 2e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 2e-3, "steps": 420}, seeds=(0, 1)),
        Healthy("nadam", options={"optimizer": "NAdam", "rate": 3e-3, "schedule": "cosine"}),
        Healthy("warm-restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("small-batches", "The loss jumps.", options={"size": 16, "rate": 2e-3, "steps": 420}, seeds=(0, 1)),
        Healthy("few-texts", "A small set, seen often.", options={"items": 960, "drop": 0.15}, seeds=(0, 1)),
        Healthy("more-hidden", "Much cannot be told from the rest.", options={"share": 0.35}, seeds=(0, 1)),
        Healthy("ever-more-hidden", "Its task becomes harder.", options={"share": 0.4, "grow": 200}, seeds=(0, 1)),
        Healthy("sections-later", "A term has the weight 0 at first.", options={"hold": 60, "ramp": 100}, seeds=(0, 1)),
    ),
)
