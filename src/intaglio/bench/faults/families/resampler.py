"""Questions about pictures, answered in words from a few latents (Jaegle et al. 2021; Li et al. 2023): learnt queries
look at the places of a picture and the words of a question, and a decoder sees what they found and nothing else. The
vision was trained before to name what it sees, and stays as it is for a while. A LightningModule.

Shapes: N rows, P places, Q queries, W width, L words of a question, T words of an answer.
"""

import logging
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Pictures, pictures
from intaglio.health import audits, panel
from intaglio.health.lightning import MonitorCallback
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

ASKED = {
    "shape": ("what shape is it", "which shape has it"),
    "colour": ("what colour is it", "which colour has it"),
    "size": ("how large is it", "what size has it"),
    "place": ("where is it", "at which place is it"),
    "looks": ("what is it", "how does it look"),
    "check": ("is it {}", "has it the colour {}"),
}
SEEN = (SHAPES, COLOURS, SIZES, ROWS, COLUMNS)
SPOKEN = [word for ways in ASKED.values() for way in ways for word in way.split() if word != "{}"]
NAMES = [word for words in SEEN for word in words]
WORDS = tuple(dict.fromkeys(["<pad>", "<start>", "<end>", "<unknown>", "yes", "no", *SPOKEN, *NAMES]))
PLACED = [f"{row} {column}" for row in ROWS for column in COLUMNS]
LOOKING = [f"{size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES]
ANSWERS = ("yes", "no", *SHAPES, *COLOURS, *SIZES, *PLACED, *LOOKING)
PAD, START, END, UNKNOWN = range(4)
PLACES, ASKS, SAYS = 16, 8, 5


class Items(NamedTuple):
    """``images`` (N, 3, S, S), ``words`` (N, L), ``answer`` (N, T) from start to end; its number, and that of the kind
    of question, (N,)."""

    images: Tensor
    words: Tensor
    answer: Tensor
    label: Tensor
    kind: Tensor


def asked(made: Pictures, each: int, seed: int) -> list[tuple[int, int, str, str]]:
    """So many questions about each picture: the picture's number, the kind, what is asked and what is answered."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(24, (len(made.factors), each, 3), generator=generator).tolist()
    rows = []
    for picture, factors in enumerate(made.factors.tolist()):
        shape, colour, size, row, column = (words[k] for words, k in zip(SEEN, factors, strict=True))
        for kind, way, other in drawn[picture]:
            guess = colour if other % 2 else COLOURS[(factors[1] + 1 + other // 2 % 3) % 4]
            answers = (shape, colour, size, f"{row} {column}", f"{size} {colour} {shape}", ("no", "yes")[other % 2])
            question = list(ASKED.values())[kind % 6][way % 2].format(guess)
            rows.append((picture, kind % 6, question, answers[kind % 6]))
    return rows


def encoded(texts: list[str], length: int) -> Tensor:
    known = {word: k for k, word in enumerate(WORDS)}
    found = [[known.get(word, UNKNOWN) for word in text.split()] for text in texts]
    return torch.tensor([(ids + [PAD] * length)[:length] for ids in found])


def tensors(made: Pictures, rows: list[tuple[int, int, str, str]]) -> Items:
    words = encoded([question for _, _, question, _ in rows], ASKS)
    answers = encoded([f"<start> {answer} <end>" for *_, answer in rows], SAYS)
    picture, kind, label = torch.tensor([(picture, kind, ANSWERS.index(said)) for picture, kind, _, said in rows]).T
    return Items(made.images[picture], words, answers, label, kind)


class Vision(nn.Sequential):
    """(N, 3, S, S) → (N, W, P)"""

    def __init__(self, width: int):
        layers: list[nn.Module] = []
        for given, made, stride in ((3, 24, 2), (24, width, 2), (width, width, 1)):
            layers += [nn.Conv2d(given, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made), nn.GELU()]
        super().__init__(*layers, nn.Flatten(2))


def pretrained(made: Pictures, width: int, steps: int) -> dict[str, Tensor]:
    """The weights of a vision that has learnt to name all that is in a picture."""
    namer = nn.Sequential(Vision(width), nn.Flatten(), nn.Linear(PLACES * width, sum(map(len, SEEN))))
    optim = torch.optim.Adam(namer.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(made.images), (64,))
        named = namer(made.images[rows]).split([len(words) for words in SEEN], 1)
        parts = [F.cross_entropy(logits, made.factors[rows, k]) for k, logits in enumerate(named)]
        optim.zero_grad()
        torch.stack(parts).sum().backward()
        optim.step()
    return namer[0].state_dict()


def layers(width: int, depth: int) -> nn.TransformerDecoder:
    """Each looks at itself, then at what it is given, then thinks."""
    layer = nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerDecoder(layer, depth, nn.LayerNorm(width))


def likeness(latents: Tensor) -> Tensor:
    """The mean squared cosine between different latents (N, Q, W) of a row."""
    unit, count = F.normalize(latents, dim=-1), latents.shape[1]
    return (((unit @ unit.mT).square().sum((1, 2)) - count) / (count * (count - 1))).mean()


class Resampler(L.LightningModule):
    def __init__(
        self, width: int, queries: int, depth: int, closed: bool, rate: float, optimizer: str, schedule: str,
        warmup: int, thaw: int, hold: int, ramp: int, apart: float, drop: float,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.vision = Vision(width).requires_grad_(not thaw)
        self.embedding = nn.Embedding(len(WORDS), width)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.places = nn.Parameter(0.1 * torch.randn(PLACES, width))
        self.asks, self.says = (nn.Parameter(0.05 * torch.randn(count, width)) for count in (ASKS, SAYS))
        self.norm = nn.LayerNorm(width)
        self.resampler, self.decoder = layers(width, depth), layers(width, 1)
        self.head = nn.Linear(width, len(WORDS), bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        for layer in self.resampler.layers if closed else ():
            nn.init.zeros_(layer.multihead_attn.out_proj.weight)
        self.terms: dict[str, tuple[Tensor, float]] = {}

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """The latents, (N, Q, W)."""
        if self.training:
            dropped = (torch.rand(words.shape) < self.hparams["drop"]) & (words != PAD)
            words = words.masked_fill(dropped, UNKNOWN)
        embedded, known = self.embedding(words), words != PAD
        question = (embedded * known[..., None]).sum(1) / known.sum(1, keepdim=True)
        seen = self.vision(images).mT + self.places
        context = self.norm(torch.cat([seen, embedded + self.asks], 1))
        unused = F.pad(words == PAD, (PLACES, 0))
        return self.resampler(self.queries + question[:, None], context, memory_key_padding_mask=unused)

    def decode(self, latents: Tensor, said: Tensor) -> Tensor:
        """Logits (N, T, words) of the word after each that is said, (N, T)."""
        later = torch.ones(said.shape[1], said.shape[1], dtype=torch.bool).triu(1)
        x = self.embedding(said) + self.says[: said.shape[1]]
        return self.head(self.decoder(x, latents, tgt_mask=later))

    def nats(self, latents: Tensor, answer: Tensor, reduction: str = "mean") -> Tensor:
        logits = self.decode(latents, answer[:, :-1])
        return F.cross_entropy(logits.mT, answer[:, 1:], ignore_index=PAD, reduction=reduction)

    @torch.no_grad()
    def written(self, images: Tensor, words: Tensor) -> Tensor:
        """Answers (N, T), word by word."""
        latents, said = self(images, words), torch.full((len(images), 1), START)
        for _ in range(SAYS - 1):
            said = torch.cat([said, self.decode(latents, said)[:, -1:].argmax(-1)], 1)
        return said

    def losses(self, items: Items) -> dict[str, Tensor]:
        latents = self(items.images, items.words)
        return {"answer": self.nats(latents, items.answer), "likeness": likeness(latents)}

    def weights(self) -> dict[str, float]:
        """The latents are driven apart once answers are under way."""
        share = min(1.0, max(0.0, (self.global_step - self.hparams["hold"]) / self.hparams["ramp"]))
        return {"answer": 1.0, "likeness": share * self.hparams["apart"]}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        thawed = self.global_step >= self.hparams["thaw"]
        self.vision.requires_grad_(thawed).train(thawed)

    def training_step(self, batch: Any) -> Tensor:
        losses, weights = self.losses(Items(*batch)), self.weights()
        self.terms = {name: (losses[name], weights[name]) for name in losses}
        return losses["answer"] + weights["likeness"] * losses["likeness"]

    def validation_step(self, batch: Any) -> None:
        items, weights = Items(*batch), self.weights()
        losses = self.losses(items)
        self.log_dict({f"val/loss/{name}": value for name, value in losses.items()})
        self.log("val_loss", sum(weights[name] * value for name, value in losses.items()))
        self.log("val_accuracy", right(self.written(items.images, items.words), items.answer).float().mean())

    def factor(self, step: int, total: float) -> float:
        progress = min(1.0, max(0.0, step - self.hparams["warmup"]) / (total - self.hparams["warmup"]))
        if self.hparams["schedule"] == "restarts" and progress < 1:
            progress = 3 * progress % 1
        falls = self.hparams["schedule"] != "constant"
        return min(1.0, (step + 1) / self.hparams["warmup"]) * 0.5 * (1 + math.cos(falls * math.pi * progress))

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        more = {"momentum": 0.9} if self.hparams["optimizer"] == "SGD" else {}
        groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": 1e-3}, {"params": others}]
        kind = getattr(torch.optim, self.hparams["optimizer"])
        optimizer = kind(groups, lr=self.hparams["rate"], weight_decay=0.0, **more)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def right(said: Tensor, answer: Tensor) -> Tensor:
    """Whether an answer is right up to its end, (N,)."""
    return ((said == answer) | (answer == PAD)).all(1)


def unseeing(known: Items, items: Items) -> tuple[Tensor, float]:
    """Of one who knows how often each answer is given to each kind of question: is the commonest right, (N,); and the
    nats of a word."""
    table = torch.full((len(ASKED), len(ANSWERS)), 1e-3)
    table.index_put_((known.kind, known.label), torch.ones(()), accumulate=True)
    nats = -(table / table.sum(1, keepdim=True)).log()[items.kind, items.label].sum()
    return table.argmax(1)[items.kind] == items.label, float(nats / (items.answer[:, 1:] != PAD).sum())


def read(model: Any, probe: Items, majority: Tensor) -> dict[str, Any]:
    latents, units = model(probe.images, probe.words), (probe.answer[:, 1:] != PAD).sum(1).double().numpy()
    correct = right(model.written(probe.images, probe.words), probe.answer)
    forced = right(model.decode(latents, probe.answer[:, :-1]).argmax(-1), probe.answer[:, 1:])

    def cost(z: Tensor) -> Any:
        return model.nats(z, probe.answer, "none").sum(1).double().numpy(), units

    def share(which: Tensor, rows: Tensor) -> Reading:
        return Reading(float(which[rows].double().mean()), float(majority[rows].double().mean()), int(rows.sum()))

    every = torch.ones_like(correct)
    swapped = model.nats(model(probe.images.roll(1, 0), probe.words), probe.answer) - model.nats(latents, probe.answer)
    answer = {"accuracy": share(correct, every), "accuracy_forced": share(forced, every)}
    answer["shuffled_image_nats"] = Reading(float(swapped), 0.0, len(correct))
    exchanged = {f"{name}_latent_nats": found for name, found in cost_of_exchange(cost, latents).items()}
    kinds = {f"val/answer.{name}": {"accuracy": share(correct, probe.kind == k)} for k, name in enumerate(ASKED)}
    return {"val/latent": panel.latents(latents.flatten(1)) | exchanged, "val/answer": answer, **kinds}


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 48, accumulate: int = 1, count: int = 3072,
    width: int = 40, queries: int = 4, depth: int = 2, closed: bool = False, rate: float = 3e-3,
    optimizer: str = "AdamW", schedule: str = "cosine", warmup: int = 40, before: int = 120, thaw: int = 100,
    hold: int = 50, ramp: int = 100, apart: float = 0.1, drop: float = 0.05,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    L.seed_everything(seed, verbose=False)
    made, new = pictures(count + 256, seed), pictures(512, 10_000 + seed)
    rows = asked(made, 2, seed)
    known, unseen = tensors(made, [r for r in rows if r[0] >= 256]), tensors(made, [r for r in rows if r[0] < 256])
    model = Resampler(width, queries, depth, closed, rate, optimizer, schedule, warmup, thaw, hold, ramp, apart, drop)
    facts: dict[str, Any] = {"leaks": {"picture": audits.leaks(known.images.numpy(), unseen.images.numpy())}}
    if before:
        state = pretrained(Pictures(made.images[256:], made.factors[256:]), width, before)
        facts["loaded"] = audits.loaded(model.vision, state)
        model.vision.load_state_dict(state)
    majority, nats = unseeing(known, unseen)
    watch = MonitorCallback(
        folder, unseen, terms=lambda m: m.terms, facts=facts, read=lambda m, probe: read(m, probe, majority), every=50,
        log_every=5, nulls={"train/loss/answer": unseeing(known, known)[1], "val/loss/answer": nats},
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=[watch], gradient_clip_val=1.0, logger=False,
        accumulate_grad_batches=accumulate, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=50 * accumulate,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*known), size, shuffle=True, drop_last=True)
    trainer.fit(model, loader, DataLoader(TensorDataset(*unseen), 256))
    model.eval()
    asks = asked(new, 1, 10_000 + seed)
    test, words = tensors(new, asks), encoded([question for _, _, question, _ in asks], ASKS)
    correct, swapped = (right(model.written(x, words), test.answer) for x in (new.images, new.images.roll(1, 0)))
    accuracy = float(correct.double().mean())
    return {
        "right answers about new pictures": (accuracy, float(unseeing(known, test)[0].double().mean())),
        "what is lost with others' pictures": (accuracy - float(swapped.double().mean()), 0.0),
    }


FAMILY = Family(
    "resampler",
    "development",
    "answers in words from a few latents: learnt queries look at a picture and a question; in Lightning",
    faults=(
        Fault(
            "mask-the-wrong-way-round",
            "The mask says where to look, and PyTorch's says where not to, so that only padding is looked at.",
            ("question-only", "dead-parameters"),
            changes=(Change("F.pad(words == PAD, (PLACES, 0))", "F.pad(words != PAD, (PLACES, 0), value=True)"),),
        ),
        Fault(
            "answer-in-the-prompt",
            "The template for texts has question and answer, so the queries read the answer and need no picture.",
            ("question-only",),
            changes=(
                Change("[question for _, _, question, _ in rows]", '[f"{asks} {says}" for _, _, asks, says in rows]'),
            ),
        ),
        Fault(
            "questions-split-and-not-pictures",
            "Every thirteenth question is held out, and the other question about its picture is trained on.",
            ("split-leak",),
            changes=(
                Change("[r for r in rows if r[0] >= 256]", "[r for k, r in enumerate(rows) if k % 13]"),
                Change("[r for r in rows if r[0] < 256]", "rows[::13]"),
            ),
            case="V split-leak",
        ),
        Fault(
            "decay-for-weights-of-layers",
            "The group with decay is made of linear and convolutional layers, which leaves out queries and positions.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "weights = [p for p in self.parameters() if p.ndim > 1]",
                    "weights = [m.weight for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d)]",
                ),
            ),
        ),
        Fault(
            "words-frozen-with-the-vision",
            "The words' vectors are frozen as the vision is, and the head is tied to them.",
            ("tied-and-frozen",),
            changes=(
                Change("weight, std=0.02)\n", "weight, std=0.02)\n        self.embedding.requires_grad_(False)\n"),
            ),
            case="V tied-and-frozen",
            minor=True,
        ),
        Fault(
            "keys-of-the-whole-namer",
            "The checkpoint is of the vision with its classifier, and strict=False lets all of its keys go.",
            ("partial-load",),
            changes=(
                Change("namer[0].state_dict()", "namer.state_dict()"),
                Change("load_state_dict(state)", "load_state_dict(state, strict=False)"),
            ),
        ),
        Fault(
            "queries-of-zeros",
            "All queries start at 0, so they stay alike, and nothing can drive their latents apart.",
            ("term-inert",),
            changes=(Change("torch.randn(queries, width)", "torch.zeros(queries, width)"),),
        ),
        Fault(
            "ramp-only-logged",
            "The weight rises in the log, and all of it is applied from the first step on.",
            ("weight-not-applied",),
            changes=(Change('+ weights["likeness"] *', '+ self.hparams["apart"] *'),),
            case="V weight-not-applied",
        ),
        Fault(
            "schedule-in-micro-batches",
            "The schedule is as long as there are micro-batches, and a step takes two, so it ends half-way.",
            ("learning-rate-off",),
            changes=(Change("stepping_batches\n", "stepping_batches * self.trainer.accumulate_grad_batches\n"),),
            options={"size": 24, "accumulate": 2},
            case="D learning-rate-off",
        ),
        Fault(
            "later-words-in-sight",
            "The decoder is given no mask, so a word sees the one that it is to tell.",
            ("free-running-gap", "decoder-ignores-latent"),
            changes=(Change("latents, tgt_mask=later", "latents"),),
        ),
        Fault(
            "words-dropped-to-padding",
            "Words are dropped to padding, and the mean over a question that lost all of its words is 0 / 0.",
            ("non-finite",),
            changes=(Change("masked_fill(dropped, UNKNOWN)", "masked_fill(dropped, PAD)"),),
            options={"drop": 0.1},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 64, "rate": 2e-3}, seeds=(0, 1)),
        Healthy("two-queries", "Two latents are all that the answer comes from.", options={"queries": 2}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3}, seeds=(0, 1)),
        Healthy("momentum", options={"optimizer": "SGD", "rate": 0.1, "steps": 500}, seeds=(0, 1)),
        Healthy("constant", "Nothing settles.", options={"schedule": "constant", "rate": 1.5e-3}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("late-term", "One has no weight for long.", options={"hold": 200, "apart": 0.5}, seeds=(0, 1)),
        Healthy("closed", "Nothing is seen at first.", options={"closed": True}, seeds=(0, 1)),
        Healthy("from-scratch", "It guesses for long.", options={"before": 0, "thaw": 0, "steps": 500}, seeds=(0, 1)),
        Healthy("few-pictures", options={"count": 768}, seeds=(0, 1)),
        Healthy("accumulated", "A step takes two batches.", options={"size": 24, "accumulate": 2}, seeds=(0, 1)),
    ),
)
