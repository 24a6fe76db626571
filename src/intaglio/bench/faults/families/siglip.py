"""Pictures and captions in one space by a sigmoid for every pair: SigLIP (Zhai et al. 2023), in Lightning.

With a locked tower that has learnt from labels before, it is a LiT (Zhai et al. 2022); with two views of each picture
beside the captions, as in SLIP (Mu et al. 2022).

Shapes: N pairs, L words of a caption, D dimensions of an embedding, d width.
"""

import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import contrastive
from intaglio.health.lightning import MonitorCallback
from intaglio.history import Reading

EACH = 2
LONGEST = 10
PAD, UNKNOWN, END = range(3)
FACTORS = (SHAPES, COLOURS, SIZES, ROWS, COLUMNS)


def caption(factors: list[int], style: int = 0) -> str:
    shape, colour, size, row, column = (names[k] for names, k in zip(FACTORS, factors, strict=True))
    return (
        f"a {size} {colour} {shape} at the {row} {column}",
        f"the {row} {column} shows a {size} {colour} {shape}",
        f"{size} {colour} {shape} {row} {column}",
    )[style]


class Tokenizer:
    def __init__(self, texts: list[str]):
        self.words = ["<pad>", "<unknown>", "<end>", *sorted({word for text in texts for word in text.split()})]
        self.ids = {word: k for k, word in enumerate(self.words)}

    def encode(self, texts: list[str]) -> Tensor:
        rows = [[*(self.ids.get(word, UNKNOWN) for word in text.split()), END] for text in texts]
        return torch.tensor([row + [PAD] * (LONGEST - len(row)) for row in rows])


def view(x: Tensor) -> Tensor:
    """Shifted by a pixel at most, and a little darker or brighter."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows, columns = torch.randint(3, (2, len(x), 1)) + torch.arange(x.shape[-1])
    moved = padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return (moved * (0.8 + 0.4 * torch.rand(len(x), 1, 1, 1))).clamp(0, 1)


def layer(width: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)


class ImageTower(nn.Module):
    """A vision transformer on a convolutional stem, read by a learnt query."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1), nn.BatchNorm2d(width // 2), nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(layer(width) for _ in range(depth)), nn.LayerNorm(width))
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.pool = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.stem(images).flatten(2).mT + self.places)
        query = self.query.expand(len(x), -1, -1)
        pooled = self.pool(query, x, x, need_weights=False)[0][:, 0]
        return pooled + self.mlp(pooled)


class TextTower(nn.Module):
    def __init__(self, words: int, width: int):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        self.block, self.last = layer(width), nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == PAD
        x = self.last(self.block(self.words(ids) + self.places, src_key_padding_mask=padding))
        return x.masked_fill(padding[..., None], 0.0).sum(1) / (~padding).sum(1, keepdim=True)


class SigLIP(L.LightningModule):
    def __init__(
        self, words: int, width: int, depth: int, out: int, bias: float, views: float, begins: int, ramp: int,
        locked: bool, optimizer: str, rate: float, schedule: str, warmup: int,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.image, self.text = ImageTower(width, depth), TextTower(words, width)
        self.image_out, self.text_out = nn.Linear(width, out), nn.Linear(width, out)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.bias = nn.Parameter(torch.tensor(bias))
        self.terms: dict[str, tuple[Tensor, float]] = {}

    def train(self, mode: bool = True) -> "SigLIP":
        """A locked tower stays as it is used, its normalisation too."""
        super().train(mode)
        if self.hparams["locked"]:
            self.image.eval()
        return self

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image_out(self.image(images)), dim=1)

    def encode_text(self, ids: Tensor) -> Tensor:
        return F.normalize(self.text_out(self.text(ids)), dim=1)

    def pairwise(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean over a of the nats of all its pairs with b."""
        logits = self.log_scale.exp() * a @ b.T + self.bias
        labels = 2 * torch.eye(len(a)) - 1
        return -F.logsigmoid(labels * logits).sum() / len(a)

    def weight(self) -> float:
        """That of the views, which may come later and by a ramp."""
        share = min(1.0, max(0, self.global_step - self.hparams["begins"]) / self.hparams["ramp"])
        return float(self.hparams["views"] * share)

    def weighed(self, images: Tensor, others: Tensor, ids: Tensor) -> dict[str, tuple[Tensor, float]]:
        image = self.encode_image(images)
        terms = {"sigmoid": (self.pairwise(image, self.encode_text(ids)), 1.0)}
        if self.hparams["views"]:
            terms["views"] = self.pairwise(image, self.encode_image(others)), self.weight()
        return terms

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, ids = batch
        self.terms = self.weighed(view(images), view(images), ids)
        return torch.stack([weight * term for term, weight in self.terms.values()]).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, ids = batch
        terms = self.weighed(images, (0.9 * images).roll(1, -1), ids)
        for name, (term, _) in terms.items():
            self.log(f"val/loss/{name}", term)
        self.log("val/loss/total", sum(weight * term for term, weight in terms.values()))
        alike = self.encode_image(images) @ self.encode_text(ids).T
        self.log("val_recall_at_1", (alike.argmax(1) == torch.arange(len(ids))).float().mean())

    def factor(self, step: int) -> float:
        warmup, total, schedule = self.hparams["warmup"], self.trainer.max_steps, self.hparams["schedule"]
        if step < warmup:
            return float((step + 1) / warmup)
        progress = min(1.0, (step - warmup) / (total - warmup))
        if schedule == "restarts" and progress < 1:
            progress = 3 * progress % 1
        return {"constant": 1.0, "linear": 1 - progress}.get(schedule, (1 + math.cos(math.pi * progress)) / 2)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 1e-4},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        kind = self.hparams["optimizer"]
        more = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = getattr(torch.optim, kind)(groups, lr=self.hparams["rate"], **more)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def labelled(images: Tensor, factors: Tensor, width: int, depth: int, steps: int = 200) -> dict[str, Tensor]:
    """The state of a tower that has learnt to tell the factors of pictures, with its heads."""
    sizes = [len(names) for names in FACTORS]
    model = nn.ModuleDict({"tower": ImageTower(width, depth), "head": nn.Linear(width, sum(sizes))})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        logits = model["head"](model["tower"](view(images[rows]))).split(sizes, dim=1)
        loss = torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, factors[rows].T, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def classes(model: SigLIP, tokenizer: Tokenizer) -> Tensor:
    """(12, D): an embedding for each shape and colour, the mean of what is said of it in all sizes and places."""
    everything = torch.cartesian_prod(*(torch.arange(len(names)) for names in FACTORS)).tolist()
    text = model.encode_text(tokenizer.encode([caption(factors) for factors in everything]))
    return F.normalize(text.unflatten(0, (len(SHAPES) * len(COLOURS), -1)).mean(1), dim=1)


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 4096, rate: float = 2e-3,
    width: int = 48, depth: int = 1, out: int = 32, bias: float = -10.0, views: float = 0.0, begins: int = 0,
    ramp: int = 1, lit: bool = False, missing: float = 0.0, optimizer: str = "AdamW", schedule: str = "cosine",
    warmup: int = 40, clip: float = 1.0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    L.seed_everything(seed, verbose=False)
    images, factors = pictures(items + 512, seed)
    of_picture = torch.arange(EACH * len(images)) // EACH
    said = factors.repeat_interleave(EACH, 0).tolist()
    texts = [caption(f, style) for f, style in zip(said, torch.randint(3, (len(said),)).tolist(), strict=True)]
    unseen = torch.isin(of_picture, torch.randperm(len(images))[:512])
    known, held = (~unseen).nonzero()[:, 0], unseen.nonzero()[:, 0]
    lost = int(missing * len(known))
    for row in known[torch.randperm(len(known))[:lost]].tolist():
        texts[row] = ""

    known_texts = [texts[row] for row in known.tolist()]
    tokenizer = Tokenizer(known_texts)
    ids = tokenizer.encode(texts)
    first = {tuple(factors[of_picture[row]].tolist()): row for row in reversed(held.tolist())}
    shown = torch.tensor(sorted(first.values()))
    held_images, held_ids, wanted = images[of_picture[shown]], ids[shown], factors[of_picture[shown]]
    seen = of_picture[known].unique()

    model = SigLIP(
        len(tokenizer.words), width, depth, out, bias, views, begins, ramp, lit, optimizer, rate, schedule, warmup
    )
    facts: dict[str, Any] = {}
    if lit:
        state = labelled(images[seen], factors[seen], width, depth)
        state = {n.removeprefix("tower."): value for n, value in state.items() if n.startswith("tower.")}
        model.image.load_state_dict(state, strict=False)
        model.image.requires_grad_(False)
        facts["loaded"] = audits.loaded(model.image, state)
    facts["augmentations"] = {"view": audits.augmentation(lambda x: view(x[None])[0], images[seen[:64]])}
    facts["leaks"] = {"the very same picture": audits.leaks(images[seen].numpy(), held_images.numpy())}
    facts["intake"] = {"items": len(known) - lost, "lost": {"no caption": lost}}
    unknown = float((held_ids == UNKNOWN).sum() / (held_ids > PAD).sum())
    heard = ids[known].unique()
    unread = 1 - len(heard[heard > END]) / (len(tokenizer.words) - 3)

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
        images, ids = probe
        image, text = model.encode_image(images), model.encode_text(ids)
        cost = trials.cost_of_strangers(model.pairwise, image, text)
        pair = panel.pairs(image, text, model.log_scale) | {"strangers_nats": cost}
        return {
            "val/image": panel.latents(model.image_out(model.image(images))),
            "val/text": panel.latents(model.text_out(model.text(ids))) | {"unknown_share": Reading(unknown, 0.0)},
            "val/contrastive": pair | {"temperature": contrastive.temperature(model.log_scale)},
            "train/text": {"unreachable_share": Reading(unread, 0.0)},
        }

    def prior(count: int) -> float:
        """The loss of who knows nothing but that one pair in ``count`` is right."""
        return math.log(count) + (count - 1) * math.log(count / (count - 1))

    nulls = {f"train/loss/{name}": prior(size) for name in ("sigmoid", "views")}
    nulls |= {f"val/loss/{name}": prior(len(shown)) for name in ("sigmoid", "views")}
    watch = MonitorCallback(
        folder, (held_images, held_ids), terms=lambda m: m.terms, facts=facts, read=read, every=50, log_every=5,
        nulls=nulls,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=[watch], gradient_clip_val=clip or None,
        val_check_interval=50, check_val_every_n_epoch=None, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    pairs = TensorDataset(images[of_picture[known]], ids[known])
    trainer.fit(
        model, DataLoader(pairs, size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(held_images, held_ids), len(shown)),
    )  # fmt: skip

    model.eval()
    own, due = torch.arange(len(shown)), len(COLOURS) * wanted[:, 0] + wanted[:, 1]
    with torch.no_grad():
        image, text = model.encode_image(held_images), model.encode_text(held_ids)
        told = (image @ classes(model, tokenizer).T).argmax(1)
    right = {
        "caption of a picture": ((image @ text.T).argmax(1) == own, 1 / len(own)),
        "picture of a caption": ((text @ image.T).argmax(1) == own, 1 / len(own)),
        "shape and colour, zero-shot": (told == due, float(due.bincount().max()) / len(due)),
    }
    return {name: (float(hits.float().mean()), null) for name, (hits, null) in right.items()}


FAMILY = Family(
    "siglip",
    "development",
    "SigLIP in Lightning: a sigmoid for every pair of picture and caption, with a temperature and a bias; and a LiT",
    faults=(
        Fault(
            "pictures-counted-in-rounds",
            "The captions of a picture stand one behind the other, and were taken for a round through all pictures.",
            ("near-chance", "no-learning", "plateau", "trivial-pair"),
            changes=(Change("(EACH * len(images)) // EACH", "(EACH * len(images)) % len(images)"),),
        ),
        Fault(
            "labels-of-0-and-minus-1",
            "The labels were to be 2 · 1 − 1 on the diagonal; the 2 was forgotten, so nothing draws a pair together.",
            ("trivial-pair", "modality-gap"),
            changes=(Change("labels = 2 * torch.eye(len(a)) - 1", "labels = torch.eye(len(a)) - 1"),),
        ),
        Fault(
            "scalars-in-no-group",
            "Parameters were parted into matrices and vectors; temperature and bias have no dimension and are neither.",
            ("not-in-optimizer", "temperature-stuck"),
            changes=(Change("if p.ndim < 2]", "if p.ndim == 1]"),),
        ),
        Fault(
            "schedule-once-an-epoch",
            "Lightning steps a schedule once an epoch unless told otherwise; this one counts in steps.",
            ("learning-rate-off",),
            changes=(Change('{"scheduler": schedule, "interval": "step"}', '{"scheduler": schedule}'),),
        ),
        Fault(
            "prefix-in-the-checkpoint",
            "The tower's names begin with that of the model that it was trained in, and strict=False says nothing.",
            ("partial-load",),
            changes=(Change('n.removeprefix("tower.")', "n"),),
            options={"lit": True},
        ),
        Fault(
            "split-by-caption",
            "Rows were split at random, and a picture has two captions, so that most held-out pictures are trained on.",
            ("split-leak",),
            changes=(
                Change("isin(of_picture, torch.randperm(len(images))[:512])", "randperm(len(of_picture)) < 1024"),
            ),
            case="V split-leak",
        ),
        Fault(
            "mean-over-no-words",
            "A mean was thought to need no END, but without it a missing caption has no token, and its mean is 0/0.",
            ("non-finite",),
            changes=(Change("for word in text.split()), END]", "for word in text.split())]"),),
            options={"missing": 0.005},
        ),
        Fault(
            "vocabulary-of-four-captions",
            "A slice for a quick try was left in, so that the tokenizer knows the words of four captions alone.",
            ("vocabulary-unreachable",),
            changes=(Change("Tokenizer(known_texts)", "Tokenizer(known_texts[:4])"),),
        ),
        Fault(
            "mode-not-passed-on",
            "train() was overridden for the locked tower and drops its argument, so that eval() turns training on.",
            ("validation-pollutes",),
            changes=(Change("super().train(mode)", "super().train()"),),
            case="J validation-pollutes",
        ),
        Fault(
            "query-in-the-place-of-the-patches",
            "The pooling's arguments are exchanged: patches ask, and the learnt query is all that they can look at.",
            ("attention-over-one", "latent-ignores-input", "dead-parameters"),
            changes=(Change("self.pool(query, x, x, ", "self.pool(x, query, query, "),),
        ),
        Fault(
            "captions-without-a-gradient",
            "The decorator was copied from the evaluation with the method, so the text tower is never trained.",
            ("dead-parameters",),
            changes=(Change("    def encode_text(", "    @torch.no_grad()\n    def encode_text("),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("wide", options={"width": 64, "depth": 2, "out": 48, "steps": 300, "rate": 1e-3}, seeds=(0, 1)),
        Healthy(
            "narrow-rmsprop",
            options={"width": 32, "out": 16, "optimizer": "RMSprop", "rate": 1e-3, "schedule": "constant"},
            seeds=(0, 1),
        ),
        Healthy("sgd", "Slow at first.", options={"optimizer": "SGD", "rate": 0.05}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("linear-adam", options={"schedule": "linear", "optimizer": "Adam"}, seeds=(0, 1)),
        Healthy("small-batches", "Few negatives, and a noisy loss.", options={"size": 24, "steps": 600}, seeds=(0, 1)),
        Healthy("few-pictures", "A small set, seen often.", options={"items": 768, "rate": 1e-3}, seeds=(0, 1)),
        Healthy("bias-of-nought", "The loss begins far above its null.", options={"bias": 0.0}),
        Healthy("lit", "A tower is locked, and has no gradient.", options={"lit": True}, seeds=(0, 1, 2)),
        Healthy(
            "views-by-a-ramp",
            "A second term, whose weight rises from 0 on, and the total with it.",
            options={"views": 1.0, "ramp": 200, "steps": 300},
            seeds=(0, 1),
        ),
        Healthy(
            "views-later",
            "The weight of the second term is 0 for the first half.",
            options={"views": 0.5, "begins": 150, "steps": 300},
        ),
        Healthy("a-few-captions-missing", "One in two hundred.", options={"missing": 0.005}),
    ),
)
