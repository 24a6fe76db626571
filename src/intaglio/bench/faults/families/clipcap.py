"""Captions by a prefix: ClipCap (Mokady et al. 2021), as a LightningModule.

A small GPT has read captions, an eye has learnt by contrast which caption belongs to which picture (Radford et al.
2021); a mapping network turns what the eye sees into a few vectors that the GPT goes on from.

Shapes: B pictures, P vectors of the prefix, T words, d width of the language model, D of the eye.
"""

import math
from collections.abc import Callable, Iterator
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
LONGEST = 11
HELD_OUT = 256
FORMS = (
    "a {size} {colour} {shape} at the {row} {column} .",
    "the {colour} {shape} is {size} .",
    "at the {row} {column} there is a {colour} {shape} .",
)


def told(factors: Tensor, form: Tensor) -> list[str]:
    return [
        FORMS[k].format(shape=SHAPES[s], colour=COLOURS[c], size=SIZES[z], row=ROWS[y], column=COLUMNS[x])
        for (s, c, z, y, x), k in zip(factors.tolist(), form.tolist(), strict=True)
    ]


class Tokenizer:
    def __init__(self, texts: list[str]):
        words = ["<pad>", "<end>", *sorted({word for text in texts for word in text.split()})]
        self.ids = {word: k for k, word in enumerate(words)}

    def encode(self, texts: list[str]) -> Tensor:
        rows = [torch.tensor([*(self.ids[word] for word in text.split()), END]) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def before(ids: Tensor) -> Tensor:
    return F.pad(ids[:, :-1], (1, 0), value=END)


class Block(nn.Module):
    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.causal, self.before, self.between = causal, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        grown: Tensor = x + self.mlp(self.between(x))
        return grown


class GPT(nn.Module):
    """A language model whose head is its table of words; it is given vectors, not ids."""

    def __init__(self, words: int, width: int, layers: int):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(32, width))
        nn.init.normal_(self.words.weight, std=0.1)
        self.blocks = nn.Sequential(*(Block(width, True) for _ in range(layers)), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.blocks(x + self.places[: x.shape[1]]), self.words.weight)

    def surprise(self, ids: Tensor) -> Tensor:
        """Of texts that begin where another has ended, so that the first word is guessed from an end."""
        return F.cross_entropy(self(self.words(before(ids))).mT, ids, ignore_index=PAD)


class Eye(nn.Sequential):
    def __init__(self, out: int):
        super().__init__(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.SiLU(), nn.Flatten(), nn.Linear(512, out),
        )  # fmt: skip


class CLIP(nn.Module):
    def __init__(self, words: int, out: int):
        super().__init__()
        self.eye, self.text = Eye(out), nn.EmbeddingBag(words, out, padding_idx=PAD)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        image, text = F.normalize(self.eye(images), dim=1), F.normalize(self.text(ids), dim=1)
        logits, own = self.log_scale.exp() * image @ text.T, torch.arange(len(ids))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def batches(size: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    while True:
        for rows in torch.randperm(len(tensors[0])).split(size):
            if len(rows) == size:
                yield [t[rows] for t in tensors]


def pretrain(model: nn.Module, loss: Callable[..., Tensor], steps: int, *tensors: Tensor) -> None:
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, batch in zip(range(steps), batches(64, *tensors), strict=False):
        optim.zero_grad()
        loss(*batch).backward()
        optim.step()


def perceptron(out: int, width: int, long: int) -> nn.Module:
    """(B, D) → (B, P, d)"""
    hidden = nn.Sequential(nn.Linear(out, width * long // 2), nn.Tanh(), nn.Dropout(0.1))
    return nn.Sequential(hidden, nn.Linear(width * long // 2, width * long), nn.Unflatten(1, (long, width)))


class Translator(nn.Module):
    """(B, D) → (B, P, d), by constants that attend to what is seen."""

    def __init__(self, out: int, width: int, long: int):
        super().__init__()
        self.seen, self.constants = nn.Linear(out, width), nn.Parameter(torch.randn(long, width))
        self.blocks = nn.Sequential(Block(width, False), Block(width, False))

    def forward(self, embedding: Tensor) -> Tensor:
        constants = self.constants.expand(len(embedding), -1, -1)
        prefix: Tensor = self.blocks(torch.cat([self.seen(embedding)[:, None], constants], 1))[:, 1:]
        return prefix


class ClipCap(L.LightningModule):
    def __init__(
        self, eye: Eye, gpt: GPT, mapper: nn.Module, tuned: bool, thaw: int, noise: float, optimizer: str,
        rate: float, warmup: int, total: int, schedule: str,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters(ignore=["eye", "gpt", "mapper"])
        self.eye, self.mapper = eye.eval().requires_grad_(False), mapper
        self.gpt = gpt.requires_grad_(tuned)

    def prefix(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            embedding = F.normalize(self.eye(images), dim=1)
            if self.training:
                embedding = embedding + self.hparams["noise"] * torch.randn_like(embedding)
        prefix: Tensor = self.mapper(embedding)
        return prefix

    def forward(self, prefix: Tensor, ids: Tensor) -> Tensor:
        """(B, T, words): what is guessed of each word from the prefix and the words before it."""
        logits: Tensor = self.gpt(torch.cat([prefix, self.gpt.words(ids)], 1))
        return logits[:, prefix.shape[1] - 1 : -1]

    @torch.no_grad()
    def write(self, images: Tensor) -> Tensor:
        x, ids = self.prefix(images), []
        for _ in range(LONGEST):
            ids.append(self.gpt(x)[:, -1].argmax(1))
            x = torch.cat([x, self.gpt.words(ids[-1])[:, None]], 1)
        return torch.stack(ids, 1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.hparams["thaw"] and self.global_step == self.hparams["thaw"]:
            self.gpt.requires_grad_(True)

    def surprise(self, images: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(self.prefix(images), ids).mT, ids, ignore_index=PAD)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.surprise(*batch)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, ids = batch
        written = self.write(images[:64])
        logits = self(self.prefix(images), ids)
        self.log("val_ended", (written == END).any(1).float().mean())
        self.log("val_loss", F.cross_entropy(logits.mT, ids, ignore_index=PAD))
        self.log("val/caption/accuracy_as_logged", (logits.argmax(2) == ids)[ids != PAD].float().mean())

    def rate_at(self, step: int) -> float:
        warmup, total, schedule = self.hparams["warmup"], self.hparams["total"], self.hparams["schedule"]
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / (total - warmup))
        if schedule == "restarts":
            progress = 3 * progress % 1
        straight = {"linear": 1 - progress, "constant": 1.0}
        return straight.get(schedule, 0.5 * (1 + math.cos(math.pi * progress)))

    def configure_optimizers(self) -> Any:
        trained = [p for net in (self.mapper, self.gpt) for p in net.parameters()]
        more = {"momentum": 0.9} if self.hparams["optimizer"] == "SGD" else {}
        optimizer = getattr(torch.optim, self.hparams["optimizer"])(trained, lr=self.hparams["rate"], **more)
        plan = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


def bigram_nats(held_out: Tensor, train: Tensor, words: int) -> float:
    """Nats a word of held-out captions by counts of pairs of words."""
    pairs, real = torch.full((words, words), 0.01), train != PAD
    pairs.index_put_((before(train)[real], train[real]), torch.ones(()), accumulate=True)
    chances = (pairs / pairs.sum(1, keepdim=True))[before(held_out), held_out]
    return -float(chances[held_out != PAD].log().mean())


def said(written: Tensor, words: Tensor) -> Tensor:
    """(B, K) → (B, K): whether each of K words is written before the end."""
    ended = (written == END).cumsum(1) > 0
    return ((written[:, None] == words[:, :, None]) & ~ended[:, None]).any(2)


def train(
    folder: Path, seed: int = 0, looks: int = 400, size: int = 64, items: int = 2048, width: int = 48, layers: int = 2,
    out: int = 48, long: int = 4, translator: bool = False, tuned: bool = False, thaw: int = 0, noise: float = 0.0,
    optimizer: str = "AdamW", rate: float = 3e-3, warmup: int = 20, schedule: str = "linear", accumulate: int = 1,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    L.seed_everything(seed, verbose=False)
    drawn, web = pictures(items + HELD_OUT, seed), pictures(2048, 20_000 + seed)
    of = torch.arange(len(drawn.images)).repeat_interleave(2)
    held = of < HELD_OUT
    texts = told(drawn.factors[of], torch.randint(len(FORMS), (len(of),)))
    form = torch.randint(len(FORMS), (len(web.images),))
    first, second = told(web.factors, form), told(web.factors, (form + 1) % len(FORMS))

    tokenizer = Tokenizer(first)
    words = len(tokenizer.ids)
    gpt, clip, eye = GPT(words, width, layers), CLIP(words, out), Eye(out)
    pretrain(gpt, gpt.surprise, 250, tokenizer.encode([f"{a} {b}" for a, b in zip(first, second, strict=True)]))
    pretrain(clip, clip, 200, web.images, tokenizer.encode(first))
    weights = {name.removeprefix("eye."): w for name, w in clip.state_dict().items() if name.startswith("eye.")}
    eye.load_state_dict(weights)

    images, unseen = drawn.images[of[~held]], drawn.images[of[held]]
    known = [texts[k] for k in (~held).nonzero()[:, 0]]
    ids = tokenizer.encode(known)
    unseen_ids = tokenizer.encode([texts[k] for k in held.nonzero()[:, 0]])
    tables = [[tokenizer.ids[word] for word in kind] for kind in (SHAPES, COLOURS, SIZES, ROWS, COLUMNS)]
    true = torch.stack([torch.tensor(t)[f] for t, f in zip(tables, drawn.factors[of[held]].T, strict=True)], 1)
    bigram = bigram_nats(unseen_ids, ids, words)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        target, things, prefix = unseen_ids[::4], true[::4, :2], model.prefix(probe)

        def forced(prefix: Tensor) -> tuple[Any, Any]:
            nats = F.cross_entropy(model(prefix, target).mT, target, ignore_index=PAD, reduction="none")
            return nats.sum(1).double().numpy(), (target != PAD).sum(1).double().numpy()

        nats, tokens = forced(prefix)
        right = model(prefix, target).argmax(2) == target
        wrong = (~right & (target[:, :, None] == things[:, None]).any(2)).any(1)
        free = said(model.write(probe), things).all(1).float()
        clean = float(model.surprise(images[:128], ids[:128]))
        caption = {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(forced, prefix).items()}
        caption |= {
            "nats_per_token": Reading(float(nats.sum() / tokens.sum()), bigram, len(nats)),
            "token_accuracy": Reading(float(right[target != PAD].float().mean()), None, int(tokens.sum())),
            "object": Reading(float(free.mean()), 1 / 12, len(free)),
            "object_forced": Reading(1 - float(wrong.float().mean()), None, len(wrong)),
        }
        return {"val/caption": caption, "train/caption": {"nats_per_token": Reading(clean, bigram)}}

    mapper = (Translator if translator else perceptron)(out, width, long)
    total = looks // accumulate
    shared = audits.leaks(images.numpy(), unseen.numpy())
    model = ClipCap(eye, gpt, mapper, tuned, thaw, noise, optimizer, rate, warmup, total, schedule)
    watch = MonitorCallback(
        folder, unseen[::4], taps={"prefix": "mapper"}, forward=lambda m, x: m.prefix(x), read=read, every=50,
        log_every=5, nulls={"total": bigram},
        facts={"loaded": audits.loaded(eye, weights), "leaks": {"the very same picture": shared}},
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=looks // accumulate, accelerator="cpu", devices=1, callbacks=[watch], gradient_clip_val=1.0,
        accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=50 * accumulate,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(images, ids), size, shuffle=True, drop_last=True)
    trainer.fit(model, loader, DataLoader(TensorDataset(unseen, unseen_ids), 512))
    model.eval()
    with torch.no_grad():
        nats = float(model.surprise(unseen, unseen_ids))
    written, own = model.write(unseen[::2]), true[::2]
    everything = true.unique()[None].expand(len(own), -1)
    right, by_chance, named = (int(said(written, words).sum()) for words in (own, own.roll(1, 0), everything))
    return {
        "right words in captions of held-out pictures": (right / max(1, named), by_chance / max(1, named)),
        "nats a word below a bigram model": (bigram - nats, 0.0),
    }


FAMILY = Family(
    "clipcap",
    "development",
    "captions by a prefix in Lightning: a mapping network between an eye and a language model, both trained before",
    faults=(
        Fault(
            "each-word-guessed-from-itself",
            "The prefix is cut off the logits, but the shift by one is forgotten: each word is guessed from itself.",
            ("free-running-gap", "decoder-ignores-latent"),
            changes=(Change("return logits[:, prefix.shape[1] - 1 : -1]", "return logits[:, prefix.shape[1] :]"),),
            options={"tuned": True},
        ),
        Fault(
            "captions-sorted-by-length",
            "Captions are sorted by their length, to save padding, and the pictures beside them are not.",
            ("decoder-ignores-latent",),
            changes=(Change("tokenizer.encode(known)", "tokenizer.encode(sorted(known, key=len))"),),
        ),
        Fault(
            "mapper-within-no-grad",
            "The frozen eye is called without a gradient, and the mapping network, a line below, has slipped in there.",
            ("dead-parameters",),
            changes=(Change("        prefix: Tensor = self.mapper(", "            prefix: Tensor = self.mapper("),),
            options={"tuned": True},
        ),
        Fault(
            "thawed-outside-the-optimizer",
            "Halfway the language model is thawed, but the optimizer was made of what was trained at the beginning.",
            ("not-in-optimizer",),
            changes=(Change("for p in net.parameters()]", "for p in net.parameters() if p.requires_grad]"),),
            options={"thaw": 200},
            case="V not-in-optimizer",
        ),
        Fault(
            "batches-taken-for-steps",
            "Two batches make a step, and the schedule's length is counted in batches.",
            ("learning-rate-off",),
            changes=(Change("total = looks // accumulate", "total = looks"),),
            options={"accumulate": 2, "looks": 800, "size": 32},
            case="D learning-rate-off",
        ),
        Fault(
            "split-by-captions",
            "A picture has two captions, and it is captions that are split: most held-out pictures are trained on.",
            ("split-leak",),
            changes=(Change("held = of < HELD_OUT", "held = torch.randperm(len(of)) < 2 * HELD_OUT"),),
            case="V split-leak",
        ),
        Fault(
            "eye-under-other-names",
            "The checkpoint's names begin with eye., which nobody took off, and strict=False lets that pass.",
            ("partial-load",),
            changes=(Change('.removeprefix("eye."): w', ": w"), Change("dict(weights)", "dict(weights, strict=False)")),
        ),
        Fault(
            "divided-by-255-once-more",
            "Pictures that are in 0 to 1 already are divided by 255 before the eye: it sees black.",
            ("latent-ignores-input",),
            changes=(Change("F.normalize(self.eye(images), dim=1)\n", "F.normalize(self.eye(images / 255), dim=1)\n"),),
        ),
        Fault(
            "written-from-embeddings-as-they-are",
            "In training the eye's embeddings are brought to length 1, and where captions are written they are not.",
            ("free-running-gap",),
            changes=(Change("x, ids = self.prefix(images), []", "x, ids = self.mapper(self.eye(images)), []"),),
        ),
        Fault(
            "writing-ends-in-training-mode",
            "Captions written in validation leave the model in training mode, so that the eye's statistics move on.",
            ("validation-pollutes",),
            changes=(Change("return torch.stack(ids, 1)", "self.train()\n        return torch.stack(ids, 1)"),),
            case="J validation-pollutes",
        ),
        Fault(
            "learnt-by-heart",
            "The language model is tuned on four dozen pictures, at a rate that never falls.",
            ("overfitting",),
            options={"items": 48, "size": 32, "tuned": True, "schedule": "constant", "rate": 2e-3},
        ),
    ),
    healthy=(
        Healthy("plain", "The language model writes well from the start, but not of the picture.", seeds=(0, 1, 2, 3)),
        Healthy("tuned", "The language model is trained too.", options={"tuned": True}, seeds=(0, 1, 2)),
        Healthy("translator", options={"translator": True}, seeds=(0, 1)),
        Healthy("thawed-midway", "Half of the weights stand still at first.", options={"thaw": 200}, seeds=(0, 1)),
        Healthy("two-batches-a-step", options={"accumulate": 2, "looks": 800, "size": 32}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("noise-in-training", "Training is harder (Nukrai et al. 2022).", options={"noise": 0.05}, seeds=(0, 1)),
        Healthy("few-items", "A small set, seen often.", options={"items": 384}, seeds=(0, 1)),
        Healthy("small-batches", "Losses are noisy.", options={"size": 16, "looks": 600, "rate": 2e-3}, seeds=(0, 1)),
        Healthy("momentum", options={"optimizer": "SGD", "rate": 0.2, "tuned": True, "schedule": "constant"}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "cosine"}),
        Healthy("adam", "Nothing settles at the end.", options={"optimizer": "Adam", "schedule": "constant"}),
        Healthy("long-prefix", options={"long": 8, "width": 64, "out": 64, "rate": 2e-3}),
    ),
)
