"""Self-distillation with no labels: DINO (Caron et al. 2021). A student sees small crops of a picture and is to say
what an average of its past weights says of large ones; those answers are centred and sharpened.

Shapes: N pictures, K prototypes, T tokens, W features.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import moments
from intaglio.health.monitor import Monitor
from intaglio.history import Reading


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class ViT(nn.Module):
    """Pictures of any size to the features of a class token; positions are interpolated."""

    def __init__(self, width: int, depth: int, patch: int = 4, side: int = 16):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, side // patch, side // patch))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x)
        z = z + F.interpolate(self.positions, z.shape[-2:], mode="bilinear", align_corners=False)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), z.flatten(2).mT], 1)
        return self.norm(self.blocks(tokens))[:, 0]


class Head(nn.Module):
    """Cosines with prototypes."""

    def __init__(self, width: int, prototypes: int, bottleneck: int = 32):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, bottleneck))
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x), dim=1) @ F.normalize(self.prototypes, dim=1).T


def koleo(z: Tensor) -> Tensor:
    """Minus the log distance of each embedding to its nearest neighbour (Sablayrolles et al. 2019)."""
    z = F.normalize(z, dim=1)
    with torch.no_grad():
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
    distances = (z - z[nearest]).norm(dim=1)
    return -(distances + 1e-6).log().mean()


class DINO(nn.Module):
    centre: Tensor

    def __init__(self, width: int, depth: int, prototypes: int):
        super().__init__()
        self.student = nn.Sequential(ViT(width, depth), Head(width, prototypes))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(prototypes))

    def outputs(self, crops: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The student's of several crops of one size, in one pass."""
        return self.student(torch.cat(list(crops))).chunk(len(crops))

    def sharpened(self, logits: Tensor, temperature: float) -> Tensor:
        return F.softmax((logits - self.centre) / temperature, dim=1)

    def losses(self, large: Sequence[Tensor], small: Sequence[Tensor], temperature: float) -> dict[str, Tensor]:
        with torch.no_grad():
            logits = self.teacher(torch.cat(list(large)))
            targets = self.sharpened(logits, temperature).chunk(len(large))
        parts = self.outputs(small)
        wholes = self.outputs(large)
        if self.training:
            self.step_centre(logits)
        others = [(t, s) for i, t in enumerate(targets) for k, s in enumerate(wholes) if i != k]
        across = [(t, s) for t in targets for s in parts]
        return {
            name: torch.stack([cross_entropy(t, s) for t, s in pairs]).mean()
            for name, pairs in {"large": others, "small": across}.items()
        }

    @torch.no_grad()
    def step_centre(self, logits: Tensor, momentum: float = 0.9) -> None:
        self.centre.lerp_(logits.mean(0), 1 - momentum)

    @torch.no_grad()
    def step_teacher(self, momentum: float) -> None:
        for t, p in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            t.lerp_(p, 1 - momentum)


def cross_entropy(target: Tensor, logits: Tensor, temperature: float = 0.1) -> Tensor:
    return -(target * F.log_softmax(logits / temperature, dim=1)).sum(1).mean()


def resized_crop(x: Tensor, size: int, least: float, most: float) -> Tensor:
    """A random square of each picture, whose side is a share of the picture's, flipped half of the time."""
    side = least + (most - least) * torch.rand(len(x))
    across, down = (1 - side) * (2 * torch.rand(2, len(x)) - 1)
    flip = 1 - 2 * torch.randint(2, (len(x),))
    zero = torch.zeros(len(x))
    theta = torch.stack([side * flip, zero, across, zero, side, down], 1).unflatten(1, (2, 3))
    grid = F.affine_grid(theta, [len(x), 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def jitter(x: Tensor) -> Tensor:
    gains = 0.4 + 1.2 * torch.rand(len(x), 3, 1, 1)
    return (x * gains).clamp(0, 1)


def large_crop(x: Tensor) -> Tensor:
    return jitter(resized_crop(x, 16, 0.75, 1.0))


def small_crop(x: Tensor) -> Tensor:
    return jitter(resized_crop(x, 8, 0.45, 0.75))


def crops(x: Tensor, count: int) -> tuple[list[Tensor], list[Tensor]]:
    return [large_crop(x) for _ in range(2)], [small_crop(x) for _ in range(count)]


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def rate_at(step: int, warmup: int, total: int, schedule: str) -> float:
    warm = min(1.0, (step + 1) / warmup)
    if schedule == "constant":
        return warm
    progress = min(1.0, max(0, step - warmup) / (total - warmup))
    if schedule == "restarts" and progress < 1:
        progress = 2 * progress % 1
    return warm * 0.5 * (1 + math.cos(math.pi * progress))


def momentum_at(step: int, total: int, first: float) -> float:
    """Rises to 1 at the end."""
    return 1 - (1 - first) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay}
    other = {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}
    return [decayed, other]


@torch.no_grad()
def neighbours_right(encoder: nn.Module, x: Tensor, y: Tensor, held_out: Tensor, due: Tensor, k: int = 10) -> float:
    """How often the k nearest of known pictures, by the cosine of features, vote for what is in a held-out one."""
    known, new = (F.normalize(encoder(images), dim=1) for images in (x, held_out))
    similarity, nearest = (new @ known.T).topk(k, dim=1)
    votes = torch.zeros(len(new), int(y.max()) + 1).scatter_add_(1, y[nearest], (similarity / 0.07).exp())
    return float((votes.argmax(1) == due).double().mean())


def train(
    folder: Path, seed: int = 0, steps: int = 300, size: int = 64, items: int = 4096, rate: float = 2e-3,
    width: int = 32, depth: int = 2, prototypes: int = 64, small: int = 2, momentum: float = 0.98, warmup: int = 30,
    temperature: float = 0.04, warm_temperature: int = 0, frozen: int = 0, spread: float = 0.0, begins: int = 0,
    clip: float = 1.0, optimizer: str = "AdamW", schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    everything = pictures(items + 512, seed)
    rows = torch.randperm(len(everything.images))
    (x, y), (held_out, due) = ((everything.images[r], everything.factors[r, 1]) for r in (rows[:items], rows[items:]))
    model = DINO(width, depth, prototypes)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    decay = 0.04 if optimizer == "AdamW" else 1e-4
    optim = getattr(torch.optim, optimizer)(groups(model.student, decay), lr=rate, **more)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, warmup, steps, schedule))
    views = crops(held_out, small)
    start = copy.deepcopy(model.teacher)
    weights = {"large": 1 / (1 + small), "small": small / (1 + small)}

    def weighed(large: list[Tensor], parts: list[Tensor], step: int) -> dict[str, tuple[Tensor, float]]:
        sharp = temperature + 0.03 * min(1.0, step / warm_temperature) if warm_temperature else temperature
        terms = {name: (term, weights[name]) for name, term in model.losses(large, parts, sharp).items()}
        if spread:
            grown = spread * min(1.0, max(0, step - begins) / 100)
            terms["koleo"] = (koleo(model.student[0](large[0])), grown)
        return terms

    def accuracy(encoder: nn.Module) -> float:
        return neighbours_right(encoder, x[:1024], y[:1024], views[0][0], due)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        one, other = views[0]
        said, answer = model.student(one), model.sharpened(model.teacher(other), temperature)
        cost = trials.cost_of_strangers(lambda a, b: cross_entropy(b, a), said, answer)
        averaged, live, first = (parameters_to_vector(m.parameters()) for m in (model.teacher, model.student, start))
        moved = float((averaged - first).norm() / (live - first).norm().clamp_min(1e-12))
        return {
            "val/latent": panel.latents(model.student[0](probe)),
            "val/answer": {"varying_share": moments.varying_share(answer)},
            "val/pair": {"strangers_nats": cost, "distinct_views": trials.distinct_views(one, other)},
            "val/ema": {"moved": Reading(moved, 1.0)},
        }

    uniform = math.log(prototypes)
    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={f"{split}/loss/{name}": uniform for split in ("train", "val") for name in weights},
    )  # fmt: skip
    alone = {"large crop": lambda x: large_crop(x[None])[0], "jitter": lambda x: jitter(x[None])[0]}
    monitor.audit(
        augmentations={name: audits.augmentation(change, x[:64]) for name, change in alone.items()},
        leaks={"the very same picture": audits.leaks(x.numpy(), held_out.numpy())},
    )
    for step, batch in zip(range(1, steps + 1), batches(x, size), strict=False):
        model.train()
        terms = weighed(*crops(batch, small), step)
        loss = torch.stack([weight * term for term, weight in terms.values()]).sum()
        monitor.before_backward(terms)
        optim.zero_grad()
        loss.backward()
        monitor.step({**terms, "total": loss}, batch)
        clip_grad_norm_(model.student.parameters(), clip)
        if step <= frozen:
            model.student[1].prototypes.grad = None
        optim.step()
        scheduler.step()
        model.step_teacher(momentum_at(step, steps, momentum))
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = weighed(*views, step)
            monitor.validated({f"val/loss/{name}": float(term) for name, (term, _) in terms.items()})
            monitor.validated({"accuracy": accuracy(model.teacher[0])})
    monitor.close()
    model.eval()
    majority = float(due.bincount().max()) / len(due)
    right, untrained = accuracy(model.teacher[0]), accuracy(start[0])
    said = "colour in jittered crops of held-out pictures, by nearest neighbours"
    return {said: (right, majority), f"{said}, beside an untrained teacher": (right, untrained)}


FAMILY = Family(
    "dino",
    "development",
    "DINO: a small vision transformer that says of crops what its averaged weights say of the picture",
    faults=(
        Fault(
            "centre-added",
            "The centre is added where it is to be taken off, so that one prototype takes all pictures.",
            ("latent-ignores-input", "rank-collapse", "anisotropic"),
            changes=(Change("(logits - self.centre)", "(logits + self.centre)"),),
        ),
        Fault(
            "never-sharpened",
            "The teacher's temperature is handed on and not used, so its answers are all but even over the prototypes.",
            ("plateau", "no-learning", "latent-ignores-input"),
            changes=(Change("(logits - self.centre) / temperature", "logits - self.centre"),),
        ),
        Fault(
            "momentum-laid-out-over-epochs",
            "The momentum rises to 1 over the number of epochs, but is asked for by step, so the teacher soon stands.",
            ("ema-lag",),
            changes=(
                Change("momentum_at(step, steps, momentum)", "momentum_at(step, steps * size // items, momentum)"),
            ),
            minor=True,
        ),
        Fault(
            "one-crop-twice",
            "A list of one crop is multiplied where a crop was to be made anew, so that all of one size are the same.",
            ("trivial-pair",),
            changes=(
                Change(
                    "[large_crop(x) for _ in range(2)], [small_crop(x) for _ in range(count)]",
                    "[large_crop(x)] * 2, [small_crop(x)] * count",
                ),
            ),
        ),
        Fault(
            "crops-taken-apart-by-picture",
            "Outputs are laid crop after crop and taken apart as if picture after picture, so partners are strangers.",
            ("trivial-pair", "no-learning", "plateau"),
            changes=(
                Change("(list(crops))).chunk(len(crops))", "(list(crops))).unflatten(0, (-1, len(crops))).unbind(1)"),
            ),
        ),
        Fault(
            "small-crops-without-a-graph",
            "The line with the student's small crops slipped into the teacher's no_grad().",
            ("term-inert",),
            changes=(Change("        parts = self.outputs(small)\n", "            parts = self.outputs(small)\n"),),
        ),
        Fault(
            "centre-stepped-by-held-out-pictures",
            "The loss steps the centre wherever it is computed, on held-out pictures too.",
            ("validation-pollutes",),
            changes=(Change("        if self.training:\n            self.step", "        self.step"),),
        ),
        Fault(
            "one-group-forgotten",
            "Biases and norms were to be spared weight decay, and their group was never handed to the optimizer.",
            ("not-in-optimizer",),
            changes=(Change("return [decayed, other]", "return [decayed]"),),
        ),
        Fault(
            "root-of-a-distance-to-itself",
            "KoLeo takes the root of all squared distances, and only then masks the diagonal, where it has no slope.",
            ("non-finite",),
            changes=(
                Change(
                    "    distances = (z - z[nearest]).norm(dim=1)\n",
                    "    squares = 2 - 2 * z @ z.T\n"
                    "    distances = squares.sqrt().masked_fill(torch.eye(len(z)).bool(), math.inf).amin(1)\n",
                ),
            ),
            options={"spread": 0.1},
        ),
        Fault(
            "scheduler-stepped-by-epoch",
            "The schedule was made for steps and is stepped at the end of an epoch, so the warm-up hardly begins.",
            ("learning-rate-off",),
            changes=(
                Change(
                    "        scheduler.step()\n", "        if step * size % items == 0:\n            scheduler.step()\n"
                ),
            ),
        ),
        Fault(
            "split-drawn-with-replacement",
            "The order by which pictures were split was drawn with replacement, so that most stand on both sides.",
            ("split-leak",),
            changes=(
                Change(
                    "torch.randperm(len(everything.images))",
                    "torch.randint(len(everything.images), (len(everything.images),))",
                ),
            ),
        ),
    ),
    healthy=(
        Healthy("plain", "The loss need not fall: the targets move.", seeds=(0, 1, 2)),
        Healthy("sgd", options={"optimizer": "SGD", "rate": 0.1, "temperature": 0.03}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4}, seeds=(0, 1)),
        Healthy("constant-rate", "Nothing settles at the end.", options={"schedule": "constant"}, seeds=(0, 1)),
        Healthy("adam", options={"optimizer": "Adam", "momentum": 0.96}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up in the middle.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy(
            "prototypes-frozen-at-first",
            "Their gradient is thrown away for the first epoch, as the paper does.",
            options={"frozen": 64},
            seeds=(0, 1),
        ),
        Healthy(
            "softening-teacher",
            "Its temperature is warmed up, so that answers grow less sure and the loss rises.",
            options={"warm_temperature": 200},
            seeds=(0, 1),
        ),
        Healthy(
            "koleo-later",
            "A term that spreads the features, whose weight is 0 for half of the run and then rises.",
            options={"spread": 0.1, "begins": 150},
            seeds=(0, 1),
        ),
        Healthy("few-pictures", "A small set, seen forty times.", options={"items": 512}, seeds=(0, 1)),
        Healthy("small-batches", "A noisy loss.", options={"size": 32, "steps": 450}, seeds=(0, 1)),
        Healthy("wide", options={"width": 48, "prototypes": 96}, seeds=(0, 1)),
        Healthy("many-crops", options={"small": 4}),
    ),
)
