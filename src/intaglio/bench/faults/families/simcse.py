"""Sentence embeddings by contrast: SimCSE (Gao et al. 2021), whose positive is the same sentence under other dropout.

With ``kind="pairs"`` the positive is a paraphrase, with ``"hard"`` a contradiction stands among the negatives too.

Shapes: B sentences, L tokens, D the width, H heads.
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
from intaglio.health.instruments import contrastive
from intaglio.health.monitor import Monitor
from intaglio.history import Reading

NOUNS = "boy/lad girl/lass dog/hound cat/kitten doctor/medic thief/robber horse/pony king/ruler cook/chef bird/sparrow"
VERBS = "followed/pursued helped/aided watched/observed pushed/shoved called/summoned thanked/praised hurt/injured"
ADJECTIVES = "small/tiny big/huge happy/cheerful angry/furious old/elderly fast/quick"
PLACES = "park/garden house/home river/stream forest/woods road/street shop/store ship/boat hill/mound"
PAD, CLS, UNKNOWN, MASK = range(4)
LONGEST = 12
VIEWS = {"dropout": (0, 0), "pairs": (0, 1), "hard": (0, 1, 2)}


class Meaning(NamedTuple):
    how: str
    who: str
    did: str
    whom: str
    where: str


def draw(count: int, rng: random.Random) -> list[Meaning]:
    drawn = []
    for _ in range(count):
        who, whom = rng.sample(NOUNS.split(), 2)
        how, did, where = (rng.choice(words.split()) for words in (ADJECTIVES, VERBS, PLACES))
        drawn.append(Meaning(how, who, did, whom, where))
    return list(dict.fromkeys(drawn))


def say(meaning: Meaning, rng: random.Random) -> str:
    how, who, did, whom, where = (words.split("/")[rng.random() > 0.7] for words in meaning)
    return rng.choice([
        f"The {how} {who} {did} the {whom} at the {where}",
        f"At the {where} the {how} {who} {did} the {whom}",
        f"The {whom} was {did} by the {how} {who} at the {where}",
    ])  # fmt: skip


def contradiction(meaning: Meaning) -> Meaning:
    return meaning._replace(who=meaning.whom, whom=meaning.who)


def written(meanings: Sequence[Meaning], rng: random.Random) -> list[list[str]]:
    """Of each meaning a sentence, a paraphrase of it, and a contradiction to it."""
    anchors = [say(m, rng) for m in meanings]
    paraphrases = [say(m, rng) for m in meanings]
    return [anchors, paraphrases, [say(contradiction(m), rng) for m in meanings]]


class Tokenizer:
    def __init__(self, texts: Sequence[str], limit: int):
        counts = Counter(word for text in texts for word in text.lower().split())
        self.ids = {word: MASK + 1 + k for k, (word, _) in enumerate(counts.most_common(limit))}
        self.size = MASK + 1 + len(self.ids)
        self.cut = 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = torch.full((len(texts), LONGEST), PAD)
        for row, text in zip(rows, texts, strict=True):
            tokens = [CLS, *(self.ids.get(word, UNKNOWN) for word in text.lower().split())]
            self.cut += len(tokens) > LONGEST
            row[: len(tokens)] = torch.tensor(tokens[:LONGEST])
        return rows


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor, drop: float) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], dropout_p=drop)
        x = x + F.dropout(self.out(read.transpose(1, 2).flatten(2)), drop)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), drop)


class Encoder(nn.Module):
    """A small BERT. Its dropout is what makes two views of a sentence, so that it is asked for, and no mode."""

    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float, pool: str = "cls"):
        super().__init__()
        self.dropout, self.pool = dropout, pool
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(LONGEST, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.first, self.last = nn.LayerNorm(width), nn.LayerNorm(width)

    def noise(self, x: Tensor, noisy: bool) -> Tensor:
        return F.dropout(x, self.dropout, noisy)

    def states(self, tokens: Tensor, noisy: bool) -> list[Tensor]:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        states = [self.noise(self.first(x), noisy)]
        for block in self.blocks:
            states.append(block(states[-1], tokens != PAD, self.dropout if noisy else 0.0))
        return states

    def forward(self, tokens: Tensor, noisy: bool = False) -> Tensor:
        x = self.last(self.states(tokens, noisy)[-1])
        if self.pool == "cls":
            return x[:, 0]
        real = (tokens != PAD)[..., None]
        return (x * real).sum(1) / real.sum(1)


class SimCSE(nn.Module):
    def __init__(self, encoder: Encoder, width: int, decoder: nn.Linear | None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor, noisy: bool = False) -> Tensor:
        return self.head(self.encoder(tokens, noisy))


def infonce(a: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(a, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(a)))


def masked_words(encoder: Encoder, decoder: nn.Module, tokens: Tensor) -> Tensor:
    hidden = (tokens > MASK) & (torch.rand(tokens.shape) < 0.15)
    states = encoder.last(encoder.states(tokens.masked_fill(hidden, MASK), True)[-1])
    return F.cross_entropy(decoder(states[hidden]), tokens[hidden])


def losses(model: SimCSE, views: Sequence[Tensor], temperature: float) -> dict[str, Tensor]:
    first, *others = model(torch.cat(list(views)), noisy=True).chunk(len(views))
    found = {"infonce": infonce(first, torch.cat(others), temperature)}
    if model.decoder is not None:
        found["mlm"] = masked_words(model.encoder, model.decoder, views[0])
    return found


def pretrained(encoder: Encoder, decoder: nn.Linear, tokens: Tensor, steps: int) -> dict[str, Tensor]:
    """The checkpoint of a network that has learnt to guess masked words."""
    bert = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    optim = torch.optim.AdamW(bert.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = masked_words(encoder, decoder, tokens[torch.randint(len(tokens), (64,))])
        optim.zero_grad()
        loss.backward()
        optim.step()
    return bert.state_dict()


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    trained = list(model.parameters())
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def factor(step: int, steps: int, warm: int, schedule: str) -> float:
    rise = min(1.0, (step + 1) / warm)
    if schedule == "linear":
        return rise * max(0.0, 1 - step / steps)
    if schedule == "cosine":
        return rise * (1 + math.cos(math.pi * step / steps)) / 2
    return rise * (1 + math.cos(math.pi * (step % 100) / 100)) / 2 if schedule == "restarts" else rise


def batches(count: int, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(count).split(size):
            if len(rows) == size:
                yield rows


def train(
    folder: Path, seed: int = 0, steps: int = 300, size: int = 64, items: int = 4096, rate: float = 1e-3,
    width: int = 64, layers: int = 2, dropout: float = 0.1, pool: str = "mean", kind: str = "dropout",
    temperature: float = 0.05, mlm: float = 0.0, begins: int = 0, pretrain: int = 0, limit: int = 1000,
    optimizer: str = "AdamW", schedule: str = "linear", warm: int = 40, odd: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    rng = random.Random(seed)
    meanings = draw(items + 256, rng)
    known, new = meanings[:-256], meanings[-256:]
    known_texts, new_texts = written(known, rng), written(new, rng)
    tokenizer = Tokenizer(known_texts[0] + known_texts[1], limit)
    texts, held_out = [tokenizer(part) for part in known_texts], [tokenizer(part) for part in new_texts]
    views, unseen = ([part[k] for k in VIEWS[kind]] for part in (texts, held_out))
    encoder = Encoder(tokenizer.size, width, layers, dropout, pool)
    model = SimCSE(encoder, width, nn.Linear(width, tokenizer.size) if mlm else None)
    if pretrain:
        bert = Encoder(tokenizer.size, width, layers, dropout, pool)
        saved = pretrained(bert, nn.Linear(width, tokenizer.size), texts[0], pretrain)
        state = {name.removeprefix("encoder."): value for name, value in saved.items() if name.startswith("encoder.")}
        encoder.load_state_dict(state, strict=False)
    extra: dict[str, Any] = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(groups(model, 0.01 if optimizer == "AdamW" else 0.0), lr=rate, **extra)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: factor(step, steps, warm, schedule))
    used = torch.bincount(torch.cat(texts[:2]).flatten(), minlength=tokenizer.size)[MASK + 1 :]
    unknown = float((held_out[0] == UNKNOWN).sum() / (held_out[0] > CLS).sum())

    def read(model: Any, probe: list[Tensor]) -> dict[str, Any]:
        a, b = (F.normalize(model(view, noisy=True), dim=1) for view in unseen[:2])
        features = [model.encoder(tokens) for tokens in probe[:2]]
        one, other = (F.normalize(part, dim=1) for part in features)
        return {
            "val/sentence": panel.latents(features[0]),
            "val/projection": panel.latents(model(probe[0])),
            "val/pair": panel.pairs(a, b, -math.log(temperature)),
            "val/paraphrase": {"top1": contrastive.top1(one @ other.T)},
            "train/text": {"unreachable_share": Reading(float((used == 0).double().mean()), 0.0)},
            "val/text": {"unknown_share": Reading(unknown, 0.0)},
        }

    chance = math.log(size * (len(views) - 1))
    unigram = float(torch.distributions.Categorical(used.float()).entropy())
    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"infonce": chance} | ({"mlm": unigram} if mlm else {}),
    )  # fmt: skip
    vectors = encoder.words(texts[0][:64]).detach()
    monitor.audit(
        augmentations={"dropout": audits.augmentation(lambda x: encoder.noise(x, True), vectors)},
        leaks={"the very same meaning": audits.leaks([str(m).encode() for m in known], [str(m).encode() for m in new])},
        intake={"items": 3 * len(meanings) - tokenizer.cut, "lost": {"cut off": tokenizer.cut}},
    )
    if pretrain:
        monitor.audit(loaded=audits.loaded(encoder, state))
    for step, rows in enumerate(batches(len(known), size), 1):
        if step == odd:
            rows = rows[:2].repeat(size // 2)
        batch = [view[rows] for view in views]
        model.train()
        terms = losses(model, batch, temperature)
        weights = {"infonce": 1.0, "mlm": mlm if step > begins else 0.0}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        weighted = {name: (term, weights[name]) for name, term in terms.items()}
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step(weighted | {"total": total}, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        scheduler.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                parts = [part for part in zip(*(view.split(size) for view in unseen), strict=True)]
                found = [losses(model, part, temperature) for part in parts if len(part[0]) == size]
            for name in found[0]:
                monitor.validated({f"val/loss/{name}": sum(float(part[name]) for part in found) / len(found)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        anchor, paraphrase, against = (F.normalize(encoder(tokens), dim=1) for tokens in held_out)
    right = (anchor @ paraphrase.T).argmax(1) == torch.arange(len(anchor))
    able = {"paraphrase of a held-out sentence": (float(right.double().mean()), 1 / len(anchor))}
    if kind == "hard":
        nearer = (anchor * paraphrase).sum(1) > (anchor * against).sum(1)
        able["paraphrase nearer than the contradiction"] = (float(nearer.double().mean()), 0.5)
    return able


FAMILY = Family(
    "simcse",
    "development",
    "sentences told apart under dropout, or found by their paraphrases, by a small transformer",
    faults=(
        Fault(
            "dropout-of-zero",
            "The encoder was built without dropout, so that the two views of a sentence are one and the same vector.",
            ("trivial-pair", "augmentation-inert"),
            options={"dropout": 0.0},
            case="E trivial-pair",
        ),
        Fault(
            "paraphrases-sorted",
            "The paraphrases were sorted before they were written, so line k of the one file is not that of the other.",
            ("near-chance", "no-learning", "plateau"),
            changes=(
                Change(
                    "paraphrases = [say(m, rng) for m in meanings]",
                    "paraphrases = sorted(say(m, rng) for m in meanings)",
                ),
            ),
            options={"kind": "pairs", "pool": "cls"},
        ),
        Fault(
            "first-hidden-state-for-the-last",
            "CLS is taken from the first of the hidden states, where it has not seen a word of the sentence.",
            ("dead-parameters", "latent-ignores-input"),
            changes=(Change("self.states(tokens, noisy)[-1]", "self.states(tokens, noisy)[0]"),),
            options={"pool": "cls"},
        ),
        Fault(
            "negatives-forgotten",
            "The loss is the similarity of paraphrases alone, and nothing pushes other sentences away.",
            ("latent-ignores-input", "rank-collapse", "anisotropic"),
            changes=(Change("F.cross_entropy(logits, torch.arange(len(a)))", "-logits.diagonal().mean()"),),
            options={"kind": "pairs", "pool": "cls"},
        ),
        Fault(
            "scheduler-stepped-once-an-epoch",
            "The schedule counts optimizer steps and is stepped once an epoch, so the warm-up never ends.",
            ("learning-rate-off",),
            changes=(
                Change(
                    "    scheduler.step()", "    if step % (len(known) // size) == 0:\n            scheduler.step()"
                ),
            ),
        ),
        Fault(
            "group-without-decay-lost",
            "Biases and norms were to have a group without weight decay; it was never added, and nothing trains them.",
            ("not-in-optimizer",),
            changes=(Change('        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},\n', ""),),
        ),
        Fault(
            "checkpoint-under-a-prefix",
            "The checkpoint's keys begin with “encoder.”, and strict=False lets the load pass without a single match.",
            ("partial-load",),
            changes=(Change('name.removeprefix("encoder."): value', "name: value"),),
            options={"pretrain": 120},
        ),
        Fault(
            "weight-of-the-masked-words-only-logged",
            "The weight of the masked-word loss is in the log, and the sum that is minimised is written without it.",
            ("weight-not-applied",),
            changes=(Change("[weights[name] * term for name, term in terms.items()]", "[*terms.values()]"),),
            options={"mlm": 0.1},
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out sentences move the statistics of the head's normalisation.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
            case="J validation-pollutes",
        ),
        Fault(
            "split-before-duplicates-were-taken-out",
            "A meaning that was drawn twice stays in twice, and the split puts one on each side.",
            ("split-leak",),
            changes=(Change("return list(dict.fromkeys(drawn))", "return drawn"),),
            case="V split-leak",
        ),
        Fault(
            "vocabulary-of-two-dozen",
            "The vocabulary was limited to 24 words in a trial and stayed so: most nouns and verbs are unknown.",
            ("vocabulary-unreachable",),
            options={"limit": 24},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("contradictions", options={"kind": "hard", "pool": "cls", "rate": 2e-3}, seeds=(0, 1, 2, 3)),
        Healthy("paraphrases", options={"kind": "pairs", "pool": "cls", "temperature": 0.1}, seeds=(0, 1)),
        Healthy("masked-words", "A second term at a tenth.", options={"mlm": 0.1}, seeds=(0, 1)),
        Healthy("masked-words-later", "Its weight is 0 at first.", options={"mlm": 0.1, "begins": 100}, seeds=(0, 1)),
        Healthy("pretrained", options={"pretrain": 120, "schedule": "cosine"}, seeds=(0, 1)),
        Healthy("sgd", options={"optimizer": "SGD", "rate": 0.05, "schedule": "cosine"}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up every hundred steps.", options={"schedule": "restarts"}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("small-batches", "Few negatives, and a noisy loss.", options={"size": 24, "steps": 450}),
        Healthy("wide", options={"width": 96, "layers": 1}),
        Healthy("few-sentences", "A small set, seen often.", options={"items": 384, "size": 32, "dropout": 0.2}),
        Healthy(
            "odd-batch",
            "One batch repeats two sentences, and the loss jumps for a step.",
            options={"odd": 150, "optimizer": "Adam", "kind": "pairs", "pool": "cls"},
        ),
    ),
)
