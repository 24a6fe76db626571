"""Contrastive learning of pictures by two views: SimCLR (Chen et al. 2020), with a queue MoCo (He et al. 2020).

Shapes: B pictures, D dimensions of an embedding, Q keys of a queue.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import contrastive
from intaglio.health.monitor import Monitor

FACTORS = ("shape", "colour", "size")


class SimCLR(nn.Module):
    def __init__(self, width: int = 24, out: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 2 * width),
        )  # fmt: skip
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Queue:
    """The last Q keys, and the views that they are of."""

    def __init__(self, keys: Tensor, views: Tensor):
        self.keys, self.views, self.pointer = keys, views, 0

    def add(self, keys: Tensor, views: Tensor) -> None:
        rows = slice(self.pointer, self.pointer + len(keys))
        self.keys[rows], self.views[rows] = keys, views
        self.pointer = (self.pointer + len(keys)) % len(self.keys)


def crop(x: Tensor, pad: int = 3) -> Tensor:
    size = x.shape[-1]
    padded = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    rows, columns = torch.randint(2 * pad + 1, (2, len(x), 1)) + torch.arange(size)
    return padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


def jitter(x: Tensor, strength: float = 0.4) -> Tensor:
    gain = 1 + strength * (2 * torch.rand(len(x), 3, 1, 1) - 1)
    return (x * gain).clamp(0, 1)


def of_one(change: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda item: change(item[None])[0]


def augment(x: Tensor) -> Tensor:
    return jitter(flip(crop(x)))


def views(x: Tensor) -> tuple[Tensor, Tensor]:
    return augment(x), augment(x)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


def against_queue(a: Tensor, b: Tensor, queue: Tensor, temperature: float) -> Tensor:
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    logits = torch.cat([(a * b).sum(1, keepdim=True), a @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.long))


def sigreg(z: Tensor, slices: int = 64) -> Tensor:
    """Balestriero & LeCun 2025: how far random projections of z are from N(0, 1), by characteristic functions."""
    directions = F.normalize(torch.randn(z.shape[1], slices), dim=0)
    t = torch.linspace(-5, 5, 17)
    angles = (z @ directions)[..., None] * t
    gauss = (-0.5 * t.square()).exp()
    error = (angles.cos().mean(0) - gauss).square() + angles.sin().mean(0).square()
    return len(z) * torch.trapezoid(error * gauss, t, dim=1).mean()


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def unreadable(files: Tensor, share: float) -> Tensor:
    """Files of which a share was cut off while they were copied: what is missing is NaN."""
    cut = torch.randperm(len(files))[: int(share * len(files))]
    files[cut, :, 8:] = torch.nan
    return files


def loaded(files: Tensor) -> tuple[Tensor, int]:
    """Pictures, white where a file could not be read, and how many those are."""
    bad = files.isnan().flatten(1).any(1)
    return torch.where(bad[:, None, None, None], torch.ones(()), files), int(bad.sum())


def probes(model: SimCLR, x: Tensor, y: Tensor, held_out: Tensor, due: Tensor) -> dict[str, tuple[float, float]]:
    """Accuracy of a linear map of the features, fitted by least squares, beside that of the commonest answer."""
    model.eval()
    with torch.no_grad():
        known, new = (F.pad(model.encoder(images), (0, 1), value=1.0).double() for images in (x, held_out))
    found = {}
    for k, name in enumerate(FACTORS):
        one_hot = F.one_hot(y[:, k]).double()
        weight = torch.linalg.solve(known.T @ known + 1e-2 * torch.eye(known.shape[1]), known.T @ one_hot)
        right = ((new @ weight).argmax(1) == due[:, k]).double().mean()
        found[name] = (float(right), float((due[:, k] == y[:, k].mode().values).double().mean()))
    return found


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 128, items: int = 4096, rate: float = 1e-3,
    width: int = 24, out: int = 32, temperature: float = 0.2, weight: float = 0.0, begins: int = 0, queue: int = 0,
    momentum: float = 0.99, optimizer: str = "Adam", schedule: str = "constant", cut: float = 0.0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unseen = pictures(items, seed), pictures(512, 10_000 + seed)
    x, lost = loaded(unreadable(known.images, cut))
    held_out = unseen.images
    model = SimCLR(width, out)
    slow = copy.deepcopy(model).requires_grad_(False)
    extra = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **extra)
    keys = None
    if queue:
        first = augment(x[torch.randint(len(x), (queue,))])
        keys = Queue(F.normalize(slow(first), dim=1), first)
    probe = torch.stack(views(held_out))

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        first, second = probe
        projected = model(first)
        a, b = F.normalize(projected, dim=1), F.normalize(model(second), dim=1)
        cost = trials.cost_of_strangers(lambda a, b: nt_xent(a, b, temperature), a, b)
        found: dict[str, Any] = {
            "val/features": panel.latents(model.encoder(first)),
            "val/projection": panel.latents(projected),
            "val/pair": panel.pairs(a, b, -math.log(temperature)) | {"strangers_nats": cost},
        }
        if weight:
            found["val/projection"] |= panel.gaussianity(projected)
        if keys is not None:
            found["train/queue"] = {"queue_agreement": contrastive.queue_agreement(keys.keys, slow(keys.views))}
        return found

    chance = math.log(1 + queue if queue else 2 * size - 1)
    monitor = Monitor(
        model, optim, folder=folder, probe=probe, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/infonce": chance, "val/loss/infonce": math.log(2 * len(held_out) - 1)},
    )  # fmt: skip
    monitor.audit(
        augmentations={
            name: audits.augmentation(of_one(change), x[:64])
            for name, change in {"crop": crop, "flip": flip, "jitter": jitter}.items()
        },
        leaks={"the very same picture": audits.leaks(x.numpy(), held_out.numpy())},
        intake={"items": len(x) - lost, "lost": {"unreadable": lost}},
    )
    for step, batch in enumerate(batches(x, size), 1):
        if schedule == "cosine":
            optim.param_groups[0]["lr"] = rate * min(1.0, step / 40) * (1 + math.cos(math.pi * step / steps)) / 2
        elif schedule == "restarts":
            optim.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * (step % 100) / 100)) / 2
        model.train()
        one, other = views(batch)
        a = model(one)
        if keys is None:
            b = model(other)
            terms = {"infonce": nt_xent(a, b, temperature)}
        else:
            with torch.no_grad():
                b = slow(other)
            terms = {"infonce": against_queue(a, b, keys.keys.clone(), temperature)}
        weighted = {"infonce": (terms["infonce"], 1.0)}
        if weight:
            weighted["sigreg"] = (sigreg(a), weight if step > begins else 0.0)
        monitor.before_backward(weighted)
        optim.zero_grad()
        torch.stack([w * term for term, w in weighted.values()]).sum().backward()
        monitor.step(weighted, batch)
        optim.step()
        if keys is not None:
            keys.add(F.normalize(b, dim=1), other)
            with torch.no_grad():
                for mine, theirs in zip(slow.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs, 1 - momentum)
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                loss = nt_xent(model(probe[0]), model(probe[1]), temperature)
            monitor.validated({"val/loss/infonce": float(loss)})
        if step == steps:
            break
    monitor.close()
    found = probes(model, x, known.factors, held_out, unseen.factors)
    with torch.no_grad():
        a, b = (F.normalize(model(view), dim=1) for view in probe)
    partner = float(((a @ b.T).argmax(1) == torch.arange(len(a))).double().mean())
    return found | {"other view found": (partner, 1 / len(a))}


FAMILY = Family(
    "simclr",
    "development",
    "two views of a picture told from those of others, convolutional; with a queue MoCo",
    faults=(
        Fault(
            "views-of-strangers",
            "The second view comes from a loader of its own, which shuffles differently.",
            ("near-chance",),
            changes=(
                Change(
                    "one, other = views(batch)",
                    "one, other = augment(batch), augment(batch[torch.randperm(len(batch))])",
                ),
            ),
        ),
        Fault(
            "one-view-twice",
            "The augmentation is drawn once and its result used for both views.",
            ("trivial-pair",),
            changes=(Change("return augment(x), augment(x)", "view = augment(x)\n    return view, view"),),
        ),
        Fault(
            "negatives-forgotten",
            "The loss draws the two views together and nothing pushes others apart, so all pictures end in one place.",
            ("rank-collapse", "latent-ignores-input", "anisotropic"),
            changes=(
                Change(
                    "return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))",
                    "return -logits[torch.arange(len(z)), torch.arange(len(z)).roll(len(a))].mean()",
                ),
            ),
        ),
        Fault(
            "softmax-by-hand",
            "The softmax is written out without taking off the largest logit, and overflows at a low temperature.",
            ("non-finite",),
            changes=(
                Change(
                    "return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))",
                    "p = logits.exp() / logits.exp().sum(1, keepdim=True)\n"
                    "    return -p[torch.arange(len(z)), torch.arange(len(z)).roll(len(a))].log().mean()",
                ),
            ),
            options={"temperature": 0.01},
        ),
        Fault(
            "crop-of-the-whole",
            "The padding was left at 0, so that a random crop of sixteen pixels in sixteen has one place to be.",
            ("augmentation-inert",),
            changes=(Change("pad: int = 3", "pad: int = 0"),),
            minor=True,
        ),
        Fault(
            "pointer-stands-still",
            "The queue's pointer is never moved, so all but its first keys are those of the untrained encoder.",
            ("queue-stale",),
            changes=(Change("        self.pointer = (self.pointer + len(keys)) % len(self.keys)\n", ""),),
            options={"queue": 1024},
            minor=True,
        ),
        Fault(
            "regulariser-after-the-normalisation",
            "The model's output is normalised already where SIGReg is to make it Gaussian.",
            ("sigreg-blind",),
            changes=(
                Change("return self.head(self.encoder(x))", "return F.normalize(self.head(self.encoder(x)), dim=1)"),
            ),
            options={"weight": 0.05},
            case="J sigreg-blind",
        ),
        Fault(
            "regulariser-detached",
            "SIGReg is given embeddings without a graph, so it is logged and never applied.",
            ("term-inert",),
            changes=(Change("(sigreg(a), weight", "(sigreg(a.detach()), weight"),),
            options={"weight": 0.05},
        ),
        Fault(
            "white-pictures",
            "Three pictures in ten could not be read, and the loader put white ones in their place.",
            ("data-replaced",),
            options={"cut": 0.3},
            case="V data-replaced",
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy(
            "queue", "MoCo: keys of a slow encoder, whose loss rises while the queue fills.", options={"queue": 1024}
        ),
        Healthy("sigreg", "A second term that makes the projections Gaussian.", options={"weight": 0.05}),
        Healthy("sigreg-later", "Its weight is 0 for the first half.", options={"weight": 0.05, "begins": 200}),
        Healthy(
            "sgd",
            "A warm-up and a cosine.",
            options={"optimizer": "SGD", "rate": 0.1, "schedule": "cosine"},
            seeds=(0, 1),
        ),
        Healthy("restarts", "The rate jumps back up every hundred steps.", options={"schedule": "restarts"}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4, "width": 16}),
        Healthy("small-batches", "Few negatives, and a noisy loss.", options={"size": 48, "steps": 600}),
        Healthy(
            "few-pictures-some-unreadable",
            "A small set, seen often, of which one in two hundred is lost.",
            options={"items": 768, "size": 64, "optimizer": "AdamW", "cut": 0.005},
        ),
    ),
)
