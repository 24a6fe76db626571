"""A captioner tuned by adapters of low rank, LoRA (Hu et al. 2022). It has learnt to describe bright pictures in whole
phrases; then its weights stand still, thin matrices beside its linear layers and its head learn to describe pictures in
fog by keywords. What it said of the old pictures is kept by a term beside (Li & Hoiem 2016), and it is merged for use.

Shapes: B pictures, P vectors of a picture, T words.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, pictures
from intaglio.health import audits, panel
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

PAD, END, UNKNOWN = range(3)
LONGEST, SEEN, HELD_OUT = 10, 4, 256
LAYERS = "look qkv out wide narrow"


def phrases(factors: Tensor) -> list[str]:
    every = factors.tolist()
    return [f"a {SIZES[z]} {COLOURS[c]} {SHAPES[s]} at the {ROWS[y]} {COLUMNS[x]}" for s, c, z, y, x in every]


def keywords(factors: Tensor) -> list[str]:
    """What is in the middle needs no word for it."""
    sizes, rows, columns = ("tiny", "big"), ("at upper", "", "at lower"), ("on left", "", "on right")
    every = factors.tolist()
    return [f"{SHAPES[s]} {COLOURS[c]} {sizes[z]} {rows[y]} {columns[x]}" for s, c, z, y, x in every]


class Vocabulary:
    def __init__(self, texts: list[str]):
        words = ["<pad>", "<end>", "<unknown>", *sorted({word for text in texts for word in text.split()})]
        self.ids = {word: k for k, word in enumerate(words)}

    def encode(self, texts: list[str]) -> Tensor:
        rows = [[*(self.ids.get(word, UNKNOWN) for word in text.split()), END] for text in texts]
        return torch.tensor([row + [PAD] * (LONGEST - len(row)) for row in rows])


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        grown: Tensor = x + self.narrow(F.gelu(self.wide(self.between(x))))
        return grown


class Captioner(nn.Module):
    def __init__(self, words: int, width: int, layers: int, tied: bool):
        super().__init__()
        first, second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.eye = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Flatten())
        self.look, self.words = nn.Linear(512, SEEN * width), nn.Embedding(words, width)
        self.places = nn.Parameter(0.02 * torch.randn(SEEN + LONGEST, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        nn.init.normal_(self.words.weight, std=0.1)
        if tied:
            self.head.weight = self.words.weight

    def seen(self, images: Tensor) -> Tensor:
        return self.look(self.eye(images)).unflatten(1, (SEEN, -1))

    def told(self, seen: Tensor, ids: Tensor) -> Tensor:
        """(B, T, words): what is guessed of each word from the picture and the words before it."""
        x = torch.cat([seen, self.words(ids[:, :-1])], 1)
        x = x + self.places[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits[:, SEEN - 1 :]

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        return self.told(self.seen(images), ids)

    @torch.no_grad()
    def write(self, images: Tensor) -> Tensor:
        seen, ids = self.seen(images), torch.full((len(images), LONGEST), PAD)
        for t in range(LONGEST):
            ids[:, t] = self.told(seen, ids[:, : t + 1])[:, -1].argmax(1)
        return ids


class LoRA(nn.Module):
    """A layer that stays as it is, and beside it a product of two thin matrices, which is 0 at first."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + self.scale * (self.dropout(x) @ self.down.T @ self.up.T)
        return adapted

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.base.weight += self.scale * (self.up @ self.down)
        return self.base


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def adapt(model: Captioner, tied: bool, where: str, rank: int, alpha: float, dropout: float, fixed: bool) -> None:
    """Freezes all but the head, and puts adapters around the layers of these names; with ``fixed`` only their second
    factors are trained (Zhang et al. 2023)."""
    model.requires_grad_(False)
    model.head.requires_grad_(not tied)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in where.split():
            adapter = LoRA(layer, rank, alpha, dropout)
            adapter.down.requires_grad_(not fixed)
            put(model, name, adapter)


def merged(model: Captioner) -> Captioner:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRA):
            put(model, name, layer.merged())
    return model.eval()


def groups(model: nn.Module, rate: float, faster: float) -> list[dict[str, Any]]:
    """The second factors may learn faster (Hayou et al. 2024)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ups = [p for name, p in trained if name.endswith(".up")]
    return [{"params": [p for name, p in trained if not name.endswith(".up")]}, {"params": ups, "lr": faster * rate}]


def graded(ids: Tensor) -> Tensor:
    return ids != PAD


def surprise(model: Captioner, images: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(images, ids)[graded(ids)], ids[graded(ids)])


def drift(model: Captioner, base: Captioner, images: Tensor, ids: Tensor) -> Tensor:
    """Nats a word between what was said of old pictures and what is."""
    with torch.no_grad():
        before = base(images, ids)[ids != PAD].log_softmax(1)
    now = model(images, ids)[ids != PAD].log_softmax(1)
    return F.kl_div(now, before, reduction="batchmean", log_target=True)


def batches(size: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    while True:
        for rows in torch.randperm(len(tensors[0])).split(size):
            if len(rows) == size:
                yield [t[rows] for t in tensors]


def pretrained(model: Captioner, steps: int, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
    optim = torch.optim.AdamW(model.parameters())
    plan = torch.optim.lr_scheduler.OneCycleLR(optim, 4e-3, total_steps=steps + 1)
    for _, batch in zip(range(steps), batches(32, images, ids), strict=False):
        optim.zero_grad()
        surprise(model, *batch).backward()
        optim.step()
        plan.step()
    return model.state_dict()


def factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / (steps - warmup))
    if schedule == "restarts":
        progress = 3 * progress % 1
    return {"linear": 1 - progress, "constant": 1.0}.get(schedule, 0.5 * (1 + math.cos(math.pi * progress)))


def bigrams(known: Tensor, unseen: Tensor, words: int) -> tuple[float, float]:
    """Nats a word and accuracy of counts of pairs of words; each caption follows the end of another."""
    pairs, real = torch.full((words, words), 0.1), known != PAD
    before, last = (F.pad(ids[:, :-1], (1, 0), value=END) for ids in (known, unseen))
    pairs.index_put_((before[real], known[real]), torch.ones(()), accumulate=True)
    real = unseen != PAD
    nats = -(pairs / pairs.sum(1, keepdim=True))[last, unseen][real].log().mean()
    return float(nats), float((pairs.argmax(1)[last] == unseen)[real].float().mean())


def whole(written: Tensor, ids: Tensor) -> Tensor:
    """Whether captions are right to their ends, (B,)."""
    return ((written == ids) | (ids == PAD)).all(1)


def train(
    folder: Path, seed: int = 0, steps: int = 300, size: int = 32, before: int = 220, items: int = 2048,
    width: int = 48, layers: int = 2, tied: bool = False, rank: int = 4, alpha: float = 16.0, dropout: float = 0.0,
    where: str = LAYERS, fixed: bool = False, keep: float = 0.3, hold: int = 0, ramp: int = 0,
    optimizer: str = "AdamW", rate: float = 4e-3, faster: float = 1.0, warmup: int = 20, schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    old, drawn = pictures(2048 + HELD_OUT, 20_000 + seed), pictures(2048 + HELD_OUT, seed)
    fog = 0.35 + 0.5 * drawn.images
    vocabulary = Vocabulary(phrases(old.factors) + keywords(drawn.factors[HELD_OUT:]))
    said, ids = vocabulary.encode(phrases(old.factors)), vocabulary.encode(keywords(drawn.factors))
    words = len(vocabulary.ids)
    unseen, unseen_ids, old_unseen, unseen_said = fog[:HELD_OUT], ids[:HELD_OUT], old.images[:64], said[:64]
    chance, guessed = bigrams(ids[HELD_OUT:], unseen_ids, words)
    unknown = float((unseen_ids == UNKNOWN).sum() / (unseen_ids != PAD).sum())
    images, ids = fog[HELD_OUT : HELD_OUT + items], ids[HELD_OUT : HELD_OUT + items]
    replayed = batches(size // 2, old.images[HELD_OUT:], said[HELD_OUT:])

    state = pretrained(Captioner(words, width, layers, tied), before, old.images[HELD_OUT:], said[HELD_OUT:])
    model = Captioner(words, width, layers, tied)
    loaded = audits.loaded(model, state)
    model.load_state_dict(state)
    base = copy.deepcopy(model).requires_grad_(False)
    frozen = float(surprise(base, unseen, unseen_ids))
    shape: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "fixed": fixed}
    adapt(model, tied, where, **shape)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(groups(model, rate, faster), lr=rate, **more)
    plan = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: factor(step, steps, warmup, schedule))

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        def forced(seen: Tensor) -> tuple[Any, Any]:
            nats = F.cross_entropy(model.told(seen, unseen_ids).mT, unseen_ids, ignore_index=PAD, reduction="none")
            return nats.sum(1).double().numpy(), (unseen_ids != PAD).sum(1).double().numpy()

        seen, real = model.seen(probe), unseen_ids != PAD
        nats, tokens = forced(seen)
        right = (model.told(seen, unseen_ids).argmax(2) == unseen_ids)[real]
        known = {"nats_per_token": Reading(float(surprise(model, images[:128], ids[:128])), chance)}
        caption = {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(forced, seen).items()}
        caption["nats_per_token"] = Reading(float(nats.sum() / tokens.sum()), chance, len(nats))
        caption["token_accuracy"] = Reading(float(right.float().mean()), guessed, len(right))
        return {"val/caption": caption, "train/caption": known, "val/seen": panel.latents(seen.flatten(1))}

    monitor = Monitor(
        model, optim, folder=folder, probe=unseen, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/caption": chance, "val/loss/caption": chance},
    )  # fmt: skip
    monitor.audit(loaded=loaded, leaks={"picture": audits.leaks(images.numpy(), unseen.numpy())})
    for step, batch in zip(range(1, steps + 1), batches(size, images, ids), strict=False):
        weight = keep * min(1.0, max(0.0, step - hold) / ramp) if ramp else keep
        model.train()
        terms: dict[str, Any] = {"caption": (surprise(model, *batch), 1.0)}
        loss = terms["caption"][0]
        if keep:
            terms["keep"] = (drift(model, base, *next(replayed)), weight)
            loss = loss + weight * terms["keep"][0]
        monitor.before_backward(terms)
        optim.zero_grad()
        loss.backward()
        monitor.step({**terms, "total": loss}, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                nats, kept = surprise(model, unseen, unseen_ids), drift(model, base, old_unseen, unseen_said)
                guesses = model(unseen, unseen_ids).argmax(2)
                written = merged(copy.deepcopy(model)).write(unseen[::2])
            monitor.validated({"val/loss/caption": float(nats), "val/text/unknown_share": unknown})
            if keep:
                monitor.validated({"val/loss/keep": float(kept)})
            logged = float((guesses == unseen_ids)[graded(unseen_ids)].float().mean())
            free, forced = (float(whole(x, unseen_ids[::2]).float().mean()) for x in (written, guesses[::2]))
            shares = {"accuracy": free, "accuracy_forced": forced, "accuracy_as_logged": logged}
            monitor.validated({f"val/caption/{name}": share for name, share in shares.items()})
    monitor.close()
    model, real = merged(model).requires_grad_(False), unseen_ids != PAD
    final = float(F.cross_entropy(model(unseen, unseen_ids)[real], unseen_ids[real]))
    true = unseen_ids.masked_fill(unseen_ids == UNKNOWN, -1)
    right = (model(unseen, unseen_ids).argmax(2) == true)[real]
    captions, others = (float(whole(model.write(x), true).float().mean()) for x in (unseen, unseen.roll(1, 0)))
    return {
        "captions of held-out pictures that are right": (captions, others),
        "their words that are right": (float(right.float().mean()), guessed),
        "nats a word below a bigram model": (chance - final, 0.0),
        "nats a word below the frozen model": (frozen - final, 0.0),
    }


FAMILY = Family(
    "lora",
    "development",
    "a captioner that is frozen and tuned by adapters of low rank on pictures and captions of another kind",
    faults=(
        Fault(
            "both-factors-of-zeros",
            "Both factors of an adapter start at 0, so that neither ever gets a gradient.",
            ("dead-parameters",),
            changes=(Change("nn.init.kaiming_uniform_(self.down, math.sqrt(5))", "nn.init.zeros_(self.down)"),),
        ),
        Fault(
            "optimizer-before-the-adapters",
            "The optimizer was made of the model's weights before the adapters were put in, so it holds none of them.",
            ("not-in-optimizer",),
            changes=(
                Change("    adapt(model, tied, where, **shape)\n    more", "    more"),
                Change("lr=rate, **more)\n", "lr=rate, **more)\n    adapt(model, tied, where, **shape)\n"),
            ),
        ),
        Fault(
            "weights-loaded-after-the-adapters",
            "Adapters are put in first, so a layer's weight has another name, and strict=False lets the file's go.",
            ("partial-load",),
            changes=(
                Change("    adapt(model, tied, where, **shape)\n    more", "    more"),
                Change("    loaded =", "    adapt(model, tied, where, rank, alpha, dropout, fixed)\n    loaded ="),
                Change("load_state_dict(state)", "load_state_dict(state, strict=False)"),
            ),
        ),
        Fault(
            "reference-is-the-model-itself",
            "What was said before is asked of the model that is tuned, and not of a copy, so nothing is kept.",
            ("term-inert",),
            changes=(Change("base = copy.deepcopy(model).", "base = model."),),
        ),
        Fault(
            "merged-in-place-to-write",
            "To write captions in validation the adapters are merged into the model and not into a copy of it.",
            ("validation-pollutes",),
            changes=(Change("merged(copy.deepcopy(model)).write", "merged(model).write"),),
        ),
        Fault(
            "merged-without-the-scale",
            "When adapters are merged, their product is not multiplied by alpha / r as in training.",
            ("free-running-gap",),
            changes=(Change("self.scale * (self.up @ self.down)", "self.up @ self.down"),),
        ),
        Fault(
            "padding-is-graded",
            "Padding is not masked, in the loss nor in the accuracy: it is learnt at once, and a third of all.",
            ("flattering-accuracy",),
            changes=(Change("return ids != PAD\n", "return torch.ones_like(ids, dtype=torch.bool)\n"),),
            case="E flattering-accuracy",
        ),
        Fault(
            "words-of-the-old-captions-alone",
            "The vocabulary is that of pretraining, and was not extended by the words of the new captions.",
            ("vocabulary-unreachable", "conditioned-too-late"),
            changes=(Change(" + keywords(drawn.factors[HELD_OUT:]))", ")"),),
        ),
        Fault(
            "schedule-counts-pretraining",
            "The schedule's length has the steps of pretraining in it, so tuning ends amid the rate's fall.",
            ("learning-rate-off",),
            changes=(Change("factor(step, steps,", "factor(step, before + steps,"),),
            case="D learning-rate-off",
        ),
        Fault(
            "ramp-only-logged",
            "The weight of what is kept rises in the log, and all of it is applied from the first step on.",
            ("weight-not-applied",),
            changes=(Change("loss + weight * terms", "loss + keep * terms"),),
            options={"ramp": 200, "keep": 1.0},
            case="V weight-not-applied",
        ),
        Fault(
            "learnt-by-heart",
            "Adapters of high rank on three dozen pictures, at a rate that never falls.",
            ("overfitting",),
            options={"items": 36, "size": 18, "rank": 16, "keep": 0.0, "schedule": "constant"},
        ),
    ),
    healthy=(
        Healthy("plain", "What is kept costs nothing at first, and rises.", seeds=(0, 1, 2)),
        Healthy("rank-one", "An adapter is a product of two vectors.", options={"rank": 1, "alpha": 4.0}, seeds=(0, 1)),
        Healthy("high-rank", options={"rank": 16, "alpha": 32.0, "rate": 2e-3}, seeds=(0, 1)),
        Healthy("attention-alone", "As in the paper.", options={"where": "qkv out", "rank": 8}, seeds=(0, 1)),
        Healthy("first-factors-fixed", "They stay as they were drawn.", options={"fixed": True}, seeds=(0, 1)),
        Healthy("faster-second-factors", options={"faster": 4.0, "rate": 2e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("tied", "As in GPT-2.", options={"tied": True, "rank": 16, "rate": 1e-2, "steps": 400}, seeds=(0, 1)),
        Healthy("captions-alone", "Nothing of old is kept.", options={"keep": 0.0, "dropout": 0.1}, seeds=(0, 1)),
        Healthy("late-term", "One has no weight for long.", options={"hold": 100, "ramp": 100}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-items", "A small set, seen often.", options={"items": 512, "dropout": 0.1}, seeds=(0, 1)),
        Healthy("momentum", options={"optimizer": "SGD", "rate": 0.1, "schedule": "constant"}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "size": 48}),
    ),
)
