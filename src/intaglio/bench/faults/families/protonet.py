"""Prototypical networks (Snell et al. 2017): drawings of classes never seen before are told apart by how near they lie
to the mean of a few examples of each. As in TADAM (Oreshkin et al. 2018), distances have a scale that is learnt, and a
side head names the known classes.

Shapes: C classes, M drawings of each, S = 16 pixels a side; E episodes of W classes with K shown and Q asked drawings,
D numbers of an embedding.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel
from intaglio.health.instruments import contrastive
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_context, distinct_views
from intaglio.history.reading import share

SIDE = 16
FEWEST, MOST = 12, 24
KEPT_BACK = 3
UNSEEN, NEW = 32, 32
EPOCH = 25
COOLEST = 0.01


class Glyphs(NamedTuple):
    """``images`` (C, M, 1, S, S) in [0, 1], of which the first ``drawn`` (C,) are there; a ``name`` (C, 1) of each."""

    images: Tensor
    drawn: Tensor
    name: Tensor

    def at(self, rows: Tensor) -> "Glyphs":
        return Glyphs(*(part[rows] for part in self))


class Episodes(NamedTuple):
    """``support`` (E, W, K, 1, S, S), ``query`` (E, W, Q, 1, S, S), and which ``classes`` (E, W) they are of."""

    support: Tensor
    query: Tensor
    classes: Tensor


def glyphs(classes: int, seed: int) -> Glyphs:
    """Letters of an alphabet nobody knows: three strokes from point to point, a little different in each drawing."""
    draw = torch.Generator().manual_seed(seed)
    points = 1.6 * torch.rand(classes, 1, 4, 2, generator=draw) - 0.8
    size = 1 + 0.12 * torch.randn(classes, MOST, 1, 2, generator=draw)
    place = 0.12 * torch.randn(classes, MOST, 1, 2, generator=draw)
    points = size * points + place + 0.11 * torch.randn(classes, MOST, 4, 2, generator=draw)
    begin, stroke = points[:, :, :-1], points.diff(dim=2)
    axis = torch.linspace(-1.1, 1.1, SIDE)
    ink = torch.zeros(classes, MOST, SIDE, SIDE)
    for k in range(stroke.shape[2]):
        y, x = (axis - begin[:, :, k, None, n] for n in (0, 1))
        dy, dx = (stroke[:, :, k, None, n] for n in (0, 1))
        y, x, dy, dx = y[..., :, None], x[..., None, :], dy[..., None], dx[..., None]
        along = ((y * dy + x * dx) / (dy.square() + dx.square() + 1e-6)).clamp(0, 1)
        far = (y - along * dy).square() + (x - along * dx).square()
        ink = torch.maximum(ink, (-far / 0.02).exp())
    ink = (ink + 0.05 * torch.randn(ink.shape, generator=draw)).clamp(0, 1)
    count = torch.randint(FEWEST, MOST + 1, (classes,), generator=draw)
    return Glyphs(ink[:, :, None], count, torch.arange(classes)[:, None])


def episodes(of: Glyphs, number: int, ways: int, shots: int, queries: int) -> Episodes:
    """Random ones: some classes, and of each some drawings to learn from and others to be asked about."""
    made = []
    for _ in range(number):
        classes = torch.randperm(len(of.drawn))[:ways]
        rows = torch.stack([torch.randperm(count)[: shots + queries] for count in of.drawn[classes].tolist()])
        drawings = of.images[classes[:, None], rows]
        made.append(Episodes(drawings[:, :shots], drawings[:, shots:], classes))
    return Episodes(*(torch.stack(part) for part in zip(*made, strict=True)))


def inked(images: Tensor) -> Tensor:
    """Each drawing with a paler or a darker pen."""
    strength = torch.empty(*images.shape[:-3], 1, 1, 1).uniform_(0.6, 1.4)
    return images * strength


def block(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2))


class ProtoNet(nn.Module):
    def __init__(self, classes: int, width: int, out: int, temperature: float, unit: bool, named: bool):
        super().__init__()
        self.unit = unit
        self.layers = nn.Sequential(block(1, width), block(width, width), block(width, width), nn.Flatten())
        self.head = nn.Linear(4 * width, out)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.classifier = nn.Linear(out, classes) if named else None

    def scale(self) -> Tensor:
        return self.log_scale.clamp(max=-math.log(COOLEST)).exp()

    def embed(self, images: Tensor) -> Tensor:
        """(…, 1, S, S) → (…, D)."""
        z = self.head(self.layers(images.flatten(0, -4))).unflatten(0, images.shape[:-3])
        return F.normalize(z, dim=-1) if self.unit else z

    def compare(self, support: Tensor, query: Tensor) -> Tensor:
        """(E, W, K, D) and (E, W, Q, D) → logits (E, W, Q, W)."""
        prototypes = support.mean(2)
        distances = (query[:, :, :, None] - prototypes[:, None, None]).square().sum(-1)
        return -self.scale() * distances

    def forward(self, batch: Episodes) -> tuple[Tensor, Tensor]:
        """The logits, and the embeddings (E, W, K + Q, D) of all drawings."""
        z = self.embed(torch.cat([batch.support, batch.query], 2))
        shots = batch.support.shape[2]
        return self.compare(z[:, :, :shots], z[:, :, shots:]), z


def labels(logits: Tensor) -> Tensor:
    """Which of its episode's classes each query is of, (E · W · Q,)."""
    number, ways, queries, _ = logits.shape
    return torch.arange(ways).repeat_interleave(queries).repeat(number)


def episode_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 2), labels(logits))


def hits(logits: Tensor) -> Tensor:
    return logits.flatten(0, 2).argmax(1) == labels(logits)


def class_loss(classifier: nn.Module, z: Tensor, classes: Tensor) -> Tensor:
    """Of embeddings (…, n, D) of n drawings of each class."""
    return F.cross_entropy(classifier(z).flatten(0, -2), classes.flatten().repeat_interleave(z.shape[-2]))


def factor(schedule: str, epoch: int, epochs: int) -> float:
    """What the first rate is multiplied with in an epoch of episodes."""
    done = min(1.0, epoch / epochs)
    if schedule == "restarts" and done < 1:
        done = 2 * done % 1
    falls = {"constant": 1.0, "linear": 1 - done, "halved": 0.5 ** (epoch // 4)}
    return falls.get(schedule, 0.5 * (1 + math.cos(math.pi * done)))


def read(model: Any, probe: Episodes) -> dict[str, Any]:
    shots, (number, ways) = probe.support.shape[2], probe.classes.shape
    logits, z = model(probe)

    def cost(support: Tensor) -> Any:
        other = model.compare(support.unflatten(0, (number, ways)), z[:, :, shots:])
        nats = F.cross_entropy(other.flatten(0, 2), labels(other), reduction="none")
        return nats.view(number * ways, -1).mean(1).double().numpy()

    support, drawn = z[:, :, :shots].flatten(0, 1), probe.support.flatten(0, 1)
    context = {f"context_{name}": found for name, found in cost_of_context(cost, support).items()}
    if shots > 1:
        context["context_distinct"] = distinct_views(drawn[:, 0], drawn[:, -1])
    right = hits(logits)
    return {
        "val/embedding": panel.latents(z.flatten(0, 2)),
        "val/support": context,
        "val/episode": {
            "accuracy": share(int(right.sum()), len(right), 1 / ways),
            "distinct_views": distinct_views(drawn[:, 0], probe.query.flatten(0, 1)[:, 0]),
            "temperature": contrastive.temperature(model.scale().log(), COOLEST),
        },
    }


def train(
    folder: Path, seed: int = 0, steps: int = 400, classes: int = 128, ways: int = 10, shots: int = 2, queries: int = 4,
    width: int = 24, out: int = 32, temperature: float = 1.0, unit: bool = False, rate: float = 2e-3,
    optimizer: str = "Adam", schedule: str = "halved", decay: float = 0.0, aux: float = 0.3, fade: int = 0,
    hold: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    everything, order = glyphs(classes + UNSEEN + NEW, seed), torch.randperm(classes + UNSEEN + NEW)
    known, unseen, new = (everything.at(rows) for rows in order.split([classes, UNSEEN, NEW]))
    leaks = {
        "class": audits.leaks(known.name.numpy(), unseen.name.numpy()),
        "drawing": audits.leaks(known.images.flatten(0, 1).numpy(), unseen.images.flatten(0, 1).numpy()),
    }
    enough = known.drawn - KEPT_BACK >= shots + queries
    known, unseen = known.at(enough), unseen.at(unseen.drawn >= shots + queries)
    kept_back, everyone = known.images[:, :KEPT_BACK], torch.arange(len(known.drawn))
    known = Glyphs(known.images[:, KEPT_BACK:], known.drawn - KEPT_BACK, known.name)
    held_out = episodes(unseen, 12, ways, shots, queries)
    model = ProtoNet(len(everyone), width, out, temperature, unit, aux > 0)
    extra: dict[str, Any] = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, weight_decay=decay, **extra)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda epoch: factor(schedule, epoch, steps // EPOCH))
    nulls = {"episode": math.log(ways)} | ({"classes": math.log(len(everyone))} if aux else {})
    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps, nulls=nulls
    )
    monitor.audit(
        leaks=leaks,
        intake={"items": len(enough), "lost": {"class with too few drawings": int((~enough).sum())}},
        augmentations={"ink": audits.augmentation(inked, known.images[:64, 0])},
    )
    for step in range(1, steps + 1):
        model.train()
        batch = episodes(known, 1, ways, shots, queries)
        batch = batch._replace(support=inked(batch.support), query=inked(batch.query))
        logits, z = model(batch)
        terms = {"episode": (episode_loss(logits), 1.0)}
        if model.classifier is not None:
            weight = aux * (max(0.0, 1 - step / fade) if fade else min(1.0, max(0, step - hold) / 100) if hold else 1.0)
            terms["classes"] = (class_loss(model.classifier, z, batch.classes), weight)
        loss = torch.stack([weight * term for term, weight in terms.values()]).sum()
        monitor.before_backward(terms)
        optim.zero_grad()
        loss.backward()
        monitor.step({**terms, "total": loss}, batch)
        optim.step()
        if step % EPOCH == 0:
            scheduler.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                found = {"val/loss/episode": float(episode_loss(model(held_out)[0]))}
                if model.classifier is not None:
                    found["val/loss/classes"] = float(class_loss(model.classifier, model.embed(kept_back), everyone))
            monitor.validated(found)
    monitor.close()
    model.eval()
    told = {}
    with torch.no_grad():
        for few in (1, 5):
            right = hits(model(episodes(new, 50, 5, few, 4))[0])
            told[f"new classes, 5 ways and {few} shots"] = (float(right.double().mean()), 0.2)
    return told


FAMILY = Family(
    "protonet",
    "judged",
    "a prototypical network, which tells drawings of new classes apart by a few examples of each",
    faults=(
        Fault(
            "labels-tiled",
            "Queries lie class by class, and their labels were made with repeat where repeat_interleave was due.",
            ("no-learning", "plateau"),
            changes=(Change("arange(ways).repeat_interleave(queries)", "arange(ways).repeat(queries)"),),
        ),
        Fault(
            "queries-from-the-support",
            "The slice of the queries starts at the first drawing, so those of the support are asked about again.",
            ("trivial-pair",),
            changes=(Change("drawings[:, shots:], classes", "drawings[:, :queries], classes"),),
        ),
        Fault(
            "one-drawing-for-all-shots",
            "The list of shots is made by multiplying a list of one, so that all of them are the same drawing.",
            ("context-order-inert",),
            changes=(Change("Episodes(drawings[:, :shots],", "Episodes(torch.cat([drawings[:, :1]] * shots, 1),"),),
            options={"shots": 5, "ways": 5},
            case="J context-order-inert",
        ),
        Fault(
            "gradients-never-emptied",
            "optim.zero_grad() was lost when the loop was rewritten for episodes.",
            ("gradients-add-up",),
            changes=(Change("        optim.zero_grad()\n", ""),),
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out episodes change the normalisation's statistics.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
            case="J validation-pollutes",
        ),
        Fault(
            "each-split-shuffled-anew",
            "Each split takes the first classes of a shuffle of its own, so that most held-out ones are trained on.",
            ("split-leak",),
            changes=(
                Change(
                    "(everything.at(rows) for rows in order.split([classes, UNSEEN, NEW]))",
                    "(everything.at(torch.randperm(len(order))[:count]) for count in (classes, UNSEEN, NEW))",
                ),
            ),
            case="V split-leak",
        ),
        Fault(
            "terms-added-up-without-weights",
            "The terms are kept with their weights for the log, and added up without them.",
            ("weight-not-applied",),
            changes=(
                Change("[weight * term for term, weight in terms.values()]", "[term for term, _ in terms.values()]"),
            ),
            options={"aux": 0.05},
            case="V weight-not-applied",
        ),
        Fault(
            "schedule-stepped-at-each-episode",
            "The schedule counts epochs and is stepped at each episode, so the rate is halved every four of them.",
            ("learning-rate-off",),
            changes=(
                Change("        if step % EPOCH == 0:\n            scheduler.step()", "        scheduler.step()"),
            ),
        ),
        Fault(
            "classes-with-few-drawings-dropped",
            "Episodes take so many drawings of a class that more than half of the classes have too few, and are left "
            "out.",
            ("data-replaced",),
            options={"ways": 5, "shots": 8, "queries": 8},
        ),
        Fault(
            "a-generator-in-the-augmentation",
            "To make runs the same, a generator with a fixed seed is made within the augmentation, at every call.",
            ("augmentation-inert",),
            changes=(Change("uniform_(0.6, 1.4)", "uniform_(0.6, 1.4, generator=torch.Generator().manual_seed(0))"),),
            minor=True,
        ),
        Fault(
            "head-starts-at-zero",
            "The last layer starts with zeros, as that of a residual branch may; here all distances are 0 for ever.",
            ("latent-ignores-input", "dead-parameters", "term-inert"),
            changes=(
                Change(
                    "        self.log_scale = nn",
                    "        nn.init.zeros_(self.head.weight)\n        self.log_scale = nn",
                ),
            ),
            options={"aux": 0.0},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy(
            "episodes-alone",
            "As in the paper, without a head for the known classes.",
            options={"aux": 0.0},
            seeds=(0, 1),
        ),
        Healthy("one-shot", "A prototype is one drawing.", options={"shots": 1, "queries": 5}, seeds=(0, 1)),
        Healthy("five-ways-five-shots", options={"ways": 5, "shots": 5}, seeds=(0, 1)),
        Healthy("wide", options={"width": 32, "out": 48, "steps": 300}, seeds=(0, 1)),
        Healthy(
            "sgd",
            "With momentum and a cosine.",
            options={"optimizer": "SGD", "rate": 0.02, "schedule": "cosine"},
            seeds=(0, 1),
        ),
        Healthy(
            "adamw-constant",
            "Nothing settles.",
            options={"optimizer": "AdamW", "schedule": "constant", "rate": 1e-3, "decay": 0.01},
            seeds=(0, 1),
        ),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy(
            "warm-restarts", "The rate jumps back up in the middle.", options={"schedule": "restarts"}, seeds=(0, 1)
        ),
        Healthy("fewer-classes", options={"classes": 96, "rate": 1e-3, "steps": 300}, seeds=(0, 1)),
        Healthy(
            "fading-term", "The weight of the known classes falls to 0 half-way.", options={"fade": 200}, seeds=(0, 1)
        ),
        Healthy(
            "late-term",
            "The known classes have no weight for a while, and then the loss rises with it.",
            options={"hold": 100, "aux": 0.5},
            seeds=(0, 1),
        ),
        Healthy(
            "unit-length",
            "Embeddings are held at length 1, and the scale makes up for it.",
            options={"unit": True, "temperature": 0.1},
        ),
    ),
)
