"""Swapped assignments between views: SwAV (Caron et al. 2020). Sinkhorn-Knopp shares the crops of a batch out evenly
among prototypes, and the share of one crop is predicted from the other crops of the same picture.

Shapes: B crops, K prototypes, L embeddings of a queue, D dimensions of an embedding.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import codebook, contrastive
from intaglio.health.monitor import Monitor


class SwAV(nn.Module):
    queue: Tensor

    def __init__(self, width: int, dim: int, prototypes: int, length: int):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 2 * width),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, dim)
        )
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(2, length, dim))
        self.normalise_prototypes()

    @torch.no_grad()
    def normalise_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def embed(self, large: Sequence[Tensor], small: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Unit vectors of each crop; those of one size go through the encoder together."""
        features = torch.cat([self.encoder(torch.cat(list(crops))) for crops in (large, small) if crops])
        return F.normalize(self.head(features), dim=1).split(len(large[0]))

    def losses(
        self, large: Sequence[Tensor], small: Sequence[Tensor], epsilon: float, queued: bool = False
    ) -> dict[str, Tensor]:
        z = self.embed(large, small)
        scores = [self.prototypes(each) for each in z]
        still = [each.detach() for each in scores]
        codes = [self.assign(k, z[k].detach(), still[k], epsilon, queued) for k in range(2)]
        terms = {"swapped": swapped(codes, scores[:2])}
        if small:
            terms["local"] = torch.stack([cross_entropy(q, s) for q in codes for s in scores[2:]]).mean()
        return terms

    @torch.no_grad()
    def assign(self, view: int, z: Tensor, scores: Tensor, epsilon: float, queued: bool) -> Tensor:
        """Codes of a batch, which earlier batches help to share out where there is a queue."""
        if queued:
            scores = torch.cat([self.prototypes(self.queue[view]), scores])
        if self.training:
            self.queue[view] = torch.cat([z, self.queue[view]])[: self.queue.shape[1]]
        return sinkhorn(scores, epsilon)[-len(z) :]


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    q = (scores / epsilon).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True) * q.shape[0]
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def cross_entropy(code: Tensor, scores: Tensor, temperature: float = 0.1) -> Tensor:
    return -(code * F.log_softmax(scores / temperature, dim=1)).sum(1).mean()


def swapped(codes: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """The code of one view is predicted from the other."""
    pairs = [(q, s) for i, q in enumerate(codes) for k, s in enumerate(scores) if i != k]
    return torch.stack([cross_entropy(q, s) for q, s in pairs]).mean()


def resized_crop(x: Tensor, size: int, least: float, most: float) -> Tensor:
    """A random square of each picture, whose side is a share of the picture's, flipped half of the time."""
    side = least + (most - least) * torch.rand(len(x))
    across, down = (1 - side) * (2 * torch.rand(2, len(x)) - 1)
    flip = 1 - 2 * torch.randint(2, (len(x),))
    zero = torch.zeros(len(x))
    theta = torch.stack([side * flip, zero, across, zero, side, down], 1).unflatten(1, (2, 3))
    grid = F.affine_grid(theta, [len(x), 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def moved(x: Tensor, pad: int = 3) -> Tensor:
    """Each picture shifted by itself, and flipped half of the time."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
    padded = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    rows, columns = torch.randint(2 * pad + 1, (2, len(x), 1)) + torch.arange(x.shape[-1])
    return padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def distort(x: Tensor) -> Tensor:
    """Colours are scaled, and two pictures in five are grey."""
    x = (x * (0.4 + 1.2 * torch.rand(len(x), 3, 1, 1))).clamp(0, 1)
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.4, x.mean(1, keepdim=True), x)


def large_crop(x: Tensor) -> Tensor:
    return distort(moved(x))


def small_crop(x: Tensor) -> Tensor:
    return distort(resized_crop(x, 8, 0.6, 0.9))


def multicrop(x: Tensor, small: int) -> tuple[list[Tensor], list[Tensor]]:
    return [large_crop(x) for _ in range(2)], [small_crop(x) for _ in range(small)]


def of_one(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda item: change(item[None])[0]


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def rates(peak: float, warmup: int, steps: int, schedule: str) -> list[float]:
    """That of every step of the run."""
    found = []
    for step in range(steps):
        progress = max(0, step - warmup) / (steps - warmup)
        if schedule == "restarts":
            progress = 2 * progress % 1
        share = {"constant": 1.0, "linear": 1 - progress}.get(schedule, (1 + math.cos(math.pi * progress)) / 2)
        found.append(peak * share * min(1.0, (step + 1) / warmup))
    return found


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and norms do not."""
    decayed = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay}
    other = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    return [decayed, other]


@torch.no_grad()
def probed(encoder: nn.Module, x: Tensor, y: Tensor, held_out: Tensor, due: Tensor) -> float:
    """How often a linear map of the features, by least squares, tells what is in a picture that it has not seen."""
    known, new = encoder(x), encoder(held_out)
    mean, std = known.mean(0), known.std(0) + 1e-6
    a, b = (F.pad((z - mean) / std, (0, 1), value=1.0).double() for z in (known, new))
    weights = torch.linalg.solve(a.T @ a + torch.eye(a.shape[1]).double(), a.T @ F.one_hot(y).double())
    return float(((b @ weights).argmax(1) == due).double().mean())


def train(
    folder: Path, seed: int = 0, steps: int = 320, size: int = 64, items: int = 4096, rate: float = 0.3,
    width: int = 16, dim: int = 32, prototypes: int = 48, small: int = 1, epsilon: float = 0.05, softer: float = 0.0,
    queue: int = 0, begins: int = 0, frozen: int = 0, ramp: int = 0, warmup: int = 30, optimizer: str = "SGD",
    schedule: str = "cosine", decay: float = 1e-5,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    everything = pictures(items + 512, seed)
    rows = torch.randperm(len(everything.images))
    kinds = 2 * everything.factors[:, 0] + everything.factors[:, 2]
    (x, y), (held_out, due) = ((everything.images[r], kinds[r]) for r in (rows[:items], rows[items:]))
    model = SwAV(width, dim, prototypes, queue)
    start = copy.deepcopy(model.encoder).eval()
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(groups(model, decay), lr=rate, **more)
    plan = rates(rate, warmup, steps, schedule)
    views = multicrop(held_out, small)
    recent: list[Tensor] = []

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        a, b = (model.prototypes(z) for z in model.embed(views[0], []))
        cost = trials.cost_of_strangers(
            lambda a, b: swapped([sinkhorn(a, epsilon), sinkhorn(b, epsilon)], [a, b]), a, b
        )
        features = model.encoder(probe)
        counts = codebook.code_counts(a.argmax(1), prototypes)
        found = {
            "val/features": panel.latents(features),
            "val/projection": panel.latents(model.head(features)),
            "val/codes": {"perplexity": codebook.perplexity(counts), "usage": codebook.usage(counts)},
            "val/pair": {"strangers_nats": cost, "distinct_views": trials.distinct_views(*views[0])},
        }
        if queue and recent:
            now = model.embed([torch.cat(recent)], [])[0]
            queued = model.queue[0][: len(now)]
            found["train/queue"] = {"queue_agreement": contrastive.queue_agreement(queued, now)}
        return found

    even = math.log(prototypes)
    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"swapped": even, "local": even},
    )  # fmt: skip
    alone = {"shift and flip": moved, "colours": distort}
    monitor.audit(
        augmentations={name: audits.augmentation(of_one(change), x[:64]) for name, change in alone.items()},
        leaks={"the very same picture": audits.leaks(x.numpy(), held_out.numpy())},
    )
    for step, batch in zip(range(1, steps + 1), batches(x, size), strict=False):
        for group in optim.param_groups:
            group["lr"] = plan[step - 1]
        model.train()
        large, parts = multicrop(batch, small)
        recent = [large[0], *recent][: queue // size]
        hard = epsilon + softer * step / steps
        terms = model.losses(large, parts, hard, queued=queue > 0 and step > begins)
        grown = min(1.0, step / ramp) if ramp else 1.0
        weights = {"swapped": 1 / (1 + small), "local": grown * small / (1 + small)}
        weighted = {name: (term, weights[name]) for name, term in terms.items()}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        loss.backward()
        monitor.step({**weighted, "total": loss}, batch)
        if step <= frozen:
            model.prototypes.weight.grad = None
        optim.step()
        model.normalise_prototypes()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = model.losses(*views, hard)
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
            monitor.validated({"accuracy": probed(model.encoder, x[:1024], y[:1024], held_out, due)})
    monitor.close()
    model.eval()
    majority = float(due.bincount().max()) / len(due)
    right, untrained = (probed(net, x[:1024], y[:1024], held_out, due) for net in (model.encoder, start))
    said = "shape and size in held-out pictures, by a linear probe"
    return {said: (right, majority), f"{said}, beside an untrained encoder": (right, untrained)}


FAMILY = Family(
    "swav",
    "development",
    "SwAV: codes of crops, shared out evenly among prototypes, predicted from other crops of the same picture",
    faults=(
        Fault(
            "both-sums-along-one-axis",
            "Both of Sinkhorn's sums run over prototypes, so nothing shares pictures out and one prototype takes them.",
            ("codebook-collapse", "latent-ignores-input"),
            changes=(Change("q.sum(dim=1, keepdim=True) * q.shape[0]", "q.sum(dim=0, keepdim=True) * q.shape[0]"),),
        ),
        Fault(
            "times-epsilon",
            "Scores are multiplied by epsilon and not divided by it, so every code is even over the prototypes.",
            ("plateau", "no-learning", "trivial-pair"),
            changes=(Change("(scores / epsilon).exp()", "(scores * epsilon).exp()"),),
        ),
        Fault(
            "not-swapped",
            "The comparison is the wrong way round: each view predicts its own code, and the other is in no pair.",
            ("trivial-pair",),
            changes=(Change("if i != k]", "if i == k]"),),
            options={"small": 0},
        ),
        Fault(
            "embeddings-not-normalised",
            "Embeddings keep their length, so scores are no cosines: they grow until Sinkhorn's exponential overflows.",
            ("non-finite",),
            changes=(Change("F.normalize(self.head(features), dim=1)", "self.head(features)"),),
        ),
        Fault(
            "encoder-not-in-the-optimizer",
            "The groups of the optimizer were made of head and prototypes alone, as of a model that is fine-tuned.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "(groups(model, decay), lr", "(groups(nn.ModuleList([model.head, model.prototypes]), decay), lr"
                ),
            ),
        ),
        Fault(
            "rate-by-the-batch-of-the-epoch",
            "The rate is looked up by the batch's number in its epoch, so each epoch begins with the warm-up again.",
            ("learning-rate-off",),
            changes=(Change("plan[step - 1]", "plan[(step - 1) % (items // size)]"),),
        ),
        Fault(
            "local-scores-detached",
            "Small crops are scored by the copies without a graph, which are there for the codes.",
            ("term-inert",),
            changes=(Change("for s in scores[2:]]", "for s in still[2:]]"),),
            case="E term-inert",
        ),
        Fault(
            "ramp-only-logged",
            "The weight of small crops was to rise from 0, and rises in the log alone.",
            ("weight-not-applied",),
            changes=(
                Change(
                    "torch.stack([weights[name] * term for name, term in terms.items()]).sum()",
                    '(terms["swapped"] + small * terms["local"]) / (1 + small)',
                ),
            ),
            options={"ramp": 160},
            case="V weight-not-applied",
        ),
        Fault(
            "held-out-pictures-in-the-queue",
            "Codes put their embeddings into the queue wherever they are computed, on held-out pictures too.",
            ("validation-pollutes",),
            changes=(
                Change(
                    "        if self.training:\n            self.queue[view] =",
                    "        if len(self.queue[view]):\n            self.queue[view] =",
                ),
            ),
            options={"queue": 256, "begins": 50},
        ),
        Fault(
            "queue-filled-until-it-is-used",
            "An elif for an if: the queue is filled while it waits, and never renewed once it is used.",
            ("queue-stale",),
            changes=(Change("        if self.training:\n", "        elif self.training:\n"),),
            options={"queue": 256, "begins": 50},
        ),
        Fault(
            "gradients-never-emptied",
            "The line with zero_grad() was lost, so each step is made with the sum of all gradients so far.",
            ("gradients-add-up",),
            changes=(Change("        optim.zero_grad()\n", ""),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("adamw", options={"optimizer": "AdamW", "rate": 6e-3, "decay": 0.01}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 3e-3}, seeds=(0, 1)),
        Healthy("constant-rate", "Nothing settles at the end.", options={"schedule": "constant"}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up in the middle.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy(
            "two-views", "No small crops: a single term.", options={"small": 0, "schedule": "linear"}, seeds=(0, 1)
        ),
        Healthy(
            "queue-later",
            "A small batch, which a queue helps from the hundredth step on.",
            options={"queue": 256, "begins": 100, "size": 32, "steps": 400},
            seeds=(0, 1),
        ),
        Healthy(
            "prototypes-frozen-at-first",
            "Their gradient is thrown away for the first epoch, as the paper does.",
            options={"frozen": 64},
            seeds=(0, 1),
        ),
        Healthy(
            "softening-codes",
            "Epsilon doubles, so that codes grow less sure, and the loss falls little and rises at the end.",
            options={"softer": 0.05},
            seeds=(0, 1),
        ),
        Healthy(
            "ramp",
            "The weight of small crops rises from 0, and the loss with it.",
            options={"ramp": 160},
            seeds=(0, 1),
        ),
        Healthy("few-pictures", "A small set, seen forty times.", options={"items": 512}, seeds=(0, 1)),
        Healthy("many-prototypes", options={"prototypes": 72, "size": 96, "rate": 0.4}),
        Healthy("wide-and-many-crops", options={"width": 24, "small": 3, "steps": 300}),
    ),
)
