"""Data2vec (Baevski et al. 2022) on chromagrams of gliding tones: a student hears one with spans of frames masked, and
says of these what a teacher, the average of its past weights, makes of the whole: the mean of the top blocks' outputs,
each normalised over time.

Shapes: N sounds, T frames, P pitches, K frames that are heard, d width.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel, trials
from intaglio.health.monitor import Monitor
from intaglio.history import Reading

FRAMES, PITCHES, SPAN = 16, 12, 2
GLIDES = torch.tensor([0.6, 1.2, -0.6, -1.2])


def sounds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Loudness by pitch of the scale (N, T, P) of a tone that glides round and round, and which way it goes (N,)."""
    generator = torch.Generator().manual_seed(seed)
    way = torch.randint(len(GLIDES), (count,), generator=generator)
    first, faster, loud = torch.rand(3, count, 1, generator=generator)
    pitch = PITCHES * first + GLIDES[way][:, None] * (0.85 + 0.3 * faster) * torch.arange(FRAMES)
    angle = 2 * torch.pi / PITCHES * (pitch[:, :, None] - torch.arange(PITCHES))
    power = (0.7 + 0.6 * loud)[:, :, None] * (3 * (angle.cos() - 1)).exp()
    return (power + 0.1 * torch.randn(power.shape, generator=generator) - 0.25) / 0.35, way


def transposed(x: Tensor) -> Tensor:
    """A batch of sounds, all higher by some of the scale."""
    return x.roll(int(torch.randint(PITCHES, ())), 2)


def draw_hidden(count: int, share: float) -> Tensor:
    """(N, T), true in as many spans of each sound, anywhere."""
    order = torch.rand(count, FRAMES // SPAN).argsort(1)
    return (order < round(share * FRAMES / SPAN)).repeat_interleave(SPAN, 1)


def sines(width: int) -> Tensor:
    """(T, d), of the place in time."""
    angles = torch.arange(FRAMES)[:, None] * torch.pi / 2 ** torch.linspace(0, 5, width // 2)
    return 0.5 * torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    """Returns beside its output what its MLP adds to it, which is what a teacher is asked for."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.before_attention(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        made = self.mlp(self.before_mlp(x))
        return x + made, made


class Encoder(nn.Module):
    places: Tensor

    def __init__(self, width: int, depth: int, dropout: float):
        super().__init__()
        self.embed = nn.Linear(PITCHES, width)
        self.mask = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("places", sines(width))

    def tokens(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(N, T, P) → (N, T, d), the hidden ones masked."""
        x = self.embed(x)
        if hidden is not None:
            x = torch.where(hidden[:, :, None], self.mask, x)
        return x + self.places

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Features (N, T, d), and what each block adds to them."""
        x = self.tokens(x, hidden)
        outputs = []
        for block in self.blocks:
            x, made = block(x)
            outputs.append(made)
        return self.norm(x), outputs


class Data2Vec(nn.Module):
    def __init__(self, width: int, depth: int, top: int, beta: float, dropout: float):
        super().__init__()
        self.top, self.beta, self.momentum = top, beta, 1.0
        self.student = Encoder(width, depth, dropout)
        self.head = nn.Linear(width, width)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """The teacher drops nothing."""
        super().train(mode)
        self.teacher.eval()
        return self

    def predicted(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.head(self.student(x, hidden)[0])

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        """Of whole sounds (N, T, P) → (N, T, d), of mean 0 and variance 1 over time."""
        outputs = [F.instance_norm(made.mT) for made in self.teacher(x)[1][-self.top :]]
        return F.instance_norm(torch.stack(outputs).mean(0)).mT

    def error(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(predicted, targets, beta=self.beta)

    def loss(self, x: Tensor, hidden: Tensor) -> Tensor:
        if self.training:
            self.step_teacher()
        return self.error(self.predicted(x, hidden)[hidden], self.targets(x)[hidden])

    @torch.no_grad()
    def step_teacher(self) -> None:
        for t, p in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            t.lerp_(p, 1 - self.momentum)


def described(encoder: Encoder, x: Tensor) -> Tensor:
    """(N, T, P) → (N, d), the mean over time."""
    return encoder(x)[0].mean(1)


def probe_accuracy(train: Tensor, labels: Tensor, held_out: Tensor, answers: Tensor) -> float:
    """Of a linear classifier by least squares on features (N, d) whose dimensions are standardised."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, y = (F.pad((z - mean) / std, (0, 1), value=1.0).double() for z in (train, held_out))
    wanted = F.one_hot(labels).double()
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T @ wanted)
    return float(((y @ weights).argmax(1) == answers).double().mean())


def rate_at(step: int, warmup: int, total: int, schedule: str) -> float:
    """The share of the full rate."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / (total - warmup))
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - progress
    if schedule == "three stages":
        return 1.0 if progress < 0.6 else 0.02 ** ((progress - 0.6) / 0.4)
    if schedule == "restarts" and progress < 1:
        progress = 2 * progress % 1
    return 0.5 * (1 + math.cos(math.pi * progress))


def momentum_at(step: int, ramp: int, first: float, last: float = 0.9999) -> float:
    """Rises in a line, and stays."""
    return first + (last - first) * min(1.0, step / ramp)


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay}
    other = {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}
    return [decayed, other]


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((x.detach() - y.detach()).square().sum()) for x, y in zip(a, b, strict=True)))


def train(
    folder: Path, seed: int = 0, steps: int = 350, size: int = 48, items: int = 4096, rate: float = 3e-3,
    width: int = 48, depth: int = 2, top: int = 2, hidden: float = 0.5, grows: int = 0, beta: float = 2.0,
    dropout: float = 0.05, momentum: float = 0.98, fixed_embedding: bool = False, decay: float = 0.02,
    optimizer: str = "AdamW", warmup: int = 40, schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    drawn, ways = sounds(512 + items, seed)
    shown, held_out, answers = drawn[512:], drawn[:512], ways[:512]
    known, labels = drawn[512:1024], ways[512:1024]
    model = Data2Vec(width, depth, top, beta, dropout)
    model.student.embed.requires_grad_(not fixed_embedding)
    judged = Encoder(width, depth, dropout).eval()
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(groups(model, decay), lr=rate, **more)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, warmup, steps, schedule))
    masked, alike = draw_hidden(len(held_out), hidden), draw_hidden(1, hidden)
    start = [p.clone() for p in model.teacher.parameters()]

    @torch.no_grad()
    def accuracy() -> float:
        judged.load_state_dict(model.student.state_dict())
        return probe_accuracy(described(judged, known), labels, described(judged, held_out), answers)

    @torch.no_grad()
    def validated() -> dict[str, Reading]:
        error, targets = float(model.loss(held_out, masked)), model.targets(held_out)
        mean = model.targets(known).mean(0).expand_as(targets)
        null = float(model.error(mean[masked], targets[masked]))
        return {"val_loss": Reading(error, null), "accuracy": Reading(accuracy(), untrained)}

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        places, targets = alike.expand(len(probe), -1), model.targets(probe)

        def errors(context: Tensor) -> Any:
            shown = torch.zeros_like(probe)
            shown[:, ~alike[0]] = context
            off = F.smooth_l1_loss(model.predicted(shown, places), targets, beta=model.beta, reduction="none")
            return off[:, alike[0]].flatten(1).mean(1).double().numpy()

        said, due = ((x[:, alike[0]]).flatten(1) for x in (model.predicted(probe, places), targets))
        views = (model.student.tokens(probe, mask)[:, alike[0]] for mask in (places, None))
        averaged, live = list(model.teacher.parameters()), list(model.student.parameters())
        moved = distance(averaged, start) / max(distance(live, start), 1e-12)
        costs = trials.cost_of_context(errors, probe[:, ~alike[0]])
        return {
            "val/latent": panel.latents(model.student(probe)[0].mean(1)),
            "val/target": panel.latents(targets[:, FRAMES // 2]),
            "val/context": {f"context_{name}": cost for name, cost in costs.items()},
            "val/pair": {
                "strangers_nats": trials.cost_of_strangers(model.error, said, due),
                "distinct_views": trials.distinct_views(*views),
            },
            "val/ema": {"moved": Reading(moved, 1.0)},
        }

    model.eval()
    untrained, targets = accuracy(), model.targets(held_out)
    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:192], read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/total": float(model.error(torch.zeros_like(targets), targets))},
    )  # fmt: skip
    monitor.audit(
        augmentations={"pitch": audits.augmentation(lambda x: transposed(x[None])[0], shown[:64])},
        loaded=audits.loaded(judged, model.student.state_dict()),
        leaks={"the very same sound": audits.leaks(shown.numpy(), held_out.numpy())},
    )
    for step, batch in zip(range(1, steps + 1), batches(shown, size), strict=False):
        model.train()
        model.momentum = momentum_at(step, steps, momentum)
        share = 0.25 + (hidden - 0.25) * min(1.0, step / grows) if grows else hidden
        loss = model.loss(transposed(batch), draw_hidden(size, share))
        optim.zero_grad()
        loss.backward()
        monitor.step(loss, batch)
        optim.step()
        scheduler.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation():
                seen = validated()
            monitor.validated(seen)
    monitor.close()
    model.eval()
    told = validated()
    error, right = told["val_loss"], told["accuracy"]
    return {
        "way and speed of held-out sounds, by a linear probe, beside an untrained student's": (right.value, untrained),
        "gain over the mean target of each frame, held out": (1 - error.value / max(error.null or 0.0, 1e-12), 0.0),
    }


FAMILY = Family(
    "data2vec",
    "development",
    "data2vec on sounds: a student with masked frames predicts what an averaged teacher makes of the whole sound",
    faults=(
        Fault(
            "mask-without-effect",
            "What torch.where returns, the tokens with the mask in them, is not kept: the student hears every frame.",
            ("trivial-pair", "dead-parameters"),
            changes=(Change("            x = torch.where(", "            torch.where("),),
        ),
        Fault(
            "attention-over-the-batch",
            "Without batch_first each frame attends to the same moment of other sounds, and never to its own sound.",
            ("context-order-inert", "trivial-pair"),
            changes=(Change("(width, 4, batch_first=True)", "(width, 4)"),),
        ),
        Fault(
            "teacher-that-is-the-student",
            "The teacher is the learning student itself, with a gradient, so that to make all targets alike is to win.",
            ("latent-ignores-input", "rank-collapse", "anisotropic"),
            changes=(
                Change("copy.deepcopy(self.student).requires_grad_(False)", "self.student"),
                Change("    @torch.no_grad()\n    def targets", "    def targets"),
            ),
        ),
        Fault(
            "momentum-ramp-in-epochs",
            "The length of the momentum's ramp was given in epochs and is counted in steps: soon the teacher stands.",
            ("ema-lag",),
            changes=(Change("momentum_at(step, steps,", "momentum_at(step, steps * size // items,"),),
            minor=True,
        ),
        Fault(
            "schedule-stepped-once-an-epoch",
            "The schedule counts steps and is stepped where an epoch ends, so that its warm-up takes the whole run.",
            ("learning-rate-off",),
            changes=(Change("        scheduler.step()", "        if step % (items // size) == 0: scheduler.step()"),),
        ),
        Fault(
            "head-not-in-the-optimizer",
            "The optimizer was given the student's parameters, and the head that predicts is not in the student.",
            ("not-in-optimizer",),
            changes=(Change("(groups(model, decay), lr=rate", "(groups(model.student, decay), lr=rate"),),
        ),
        Fault(
            "no-grad-over-the-embedding",
            "The decorator that was meant for the targets stands over the embedding, which the student needs as well.",
            ("dead-parameters",),
            changes=(
                Change("    def tokens(", "    @torch.no_grad()\n    def tokens("),
                Change("    @torch.no_grad()\n    def targets", "    def targets"),
            ),
        ),
        Fault(
            "gradients-not-emptied",
            "A slip in tidying up: the line that empties the gradients is gone, and each step takes the sum of all.",
            ("gradients-add-up",),
            changes=(Change("        optim.zero_grad()\n", ""),),
        ),
        Fault(
            "probe-of-a-deeper-network",
            "The network for the probe is built with a block too many, and what fails to load is told not to matter.",
            ("partial-load",),
            changes=(
                Change("judged = Encoder(width, depth, dropout)", "judged = Encoder(width, depth + 1, dropout)"),
                Change(
                    "judged.load_state_dict(model.student.state_dict())",
                    "judged.load_state_dict(model.student.state_dict(), strict=False)",
                ),
            ),
        ),
        Fault(
            "pretrained-on-all-sounds",
            "As no labels are needed it learns from every sound there is, those that the probe is judged on as well.",
            ("split-leak",),
            changes=(Change("answers = drawn[512:],", "answers = drawn,"),),
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so each look at held-out sounds drops features and steps the teacher.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
            case="J validation-pollutes",
        ),
    ),
    healthy=(
        Healthy("plain", "The loss need not fall: the targets move.", seeds=(0, 1, 2, 3)),
        Healthy("sgd", "With momentum.", options={"optimizer": "SGD", "rate": 0.3, "decay": 1e-4}, seeds=(0, 1)),
        Healthy(
            "rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "decay": 1e-5, "schedule": "linear"}, seeds=(0, 1)
        ),
        Healthy(
            "constant-rate",
            "Nothing settles at the end.",
            options={"optimizer": "Adam", "rate": 2e-3, "decay": 0.0, "schedule": "constant"},
            seeds=(0, 1),
        ),
        Healthy("warm-restart", "The rate jumps up in the middle.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("three-stages", options={"schedule": "three stages", "rate": 2e-3}, seeds=(0, 1)),
        Healthy("few-items", "A small set of sounds, heard often.", options={"items": 1024}, seeds=(0, 1)),
        Healthy("small-batches", "The loss is noisy.", options={"size": 24, "rate": 2e-3, "steps": 500}, seeds=(0, 1)),
        Healthy("wider", options={"width": 64, "rate": 2e-3}, seeds=(0, 1)),
        Healthy("masks-that-grow", "The task gets harder.", options={"hidden": 0.7, "grows": 250}, seeds=(0, 1)),
        Healthy("close-teacher", "The targets move fast.", options={"momentum": 0.95, "beta": 0.5}),
        Healthy("long-warm-up", "The rate rises for long.", options={"warmup": 120, "momentum": 0.99}),
        Healthy(
            "fixed-embedding",
            "The embedding of frames is frozen as it was drawn, which makes training steady (Chen et al. 2021).",
            options={"fixed_embedding": True},
            seeds=(0, 1),
        ),
    ),
)
