"""Barlow Twins (Zbontar et al. 2021) by SGD: the cross-correlation of two views' projections shall be the identity."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import Pictures, pictures
from intaglio.health import audits, trials
from intaglio.health.monitor import Monitor


def crop(x: Tensor) -> Tensor:
    """Each picture is moved by up to three pixels; what comes in at the border is its neighbour."""
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    down, right = torch.randint(0, 7, (2, len(x))).tolist()
    return torch.stack([p[:, i : i + 16, j : j + 16] for p, i, j in zip(padded, down, right, strict=True)])


def jitter(x: Tensor) -> Tensor:
    brightness = 0.6 + 0.8 * torch.rand(len(x), 3, 1, 1)
    return (x * brightness).clamp(0, 1)


def flip(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


def transform(x: Tensor) -> Tensor:
    return jitter(flip(crop(x)))


class BarlowTwins(nn.Module):
    def __init__(self, width: int, features: int, out: int, lambd: float):
        super().__init__()
        self.lambd = lambd
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * width, features),
        )  # fmt: skip
        self.projector = nn.Sequential(
            nn.BatchNorm1d(features), nn.ReLU(), nn.Linear(features, 2 * out, bias=False),
            nn.BatchNorm1d(2 * out), nn.ReLU(), nn.Linear(2 * out, out, bias=False),
        )  # fmt: skip
        self.bn = nn.BatchNorm1d(out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.projector(self.backbone(x)))

    def loss(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of the loss, summed over the matrix."""
        z1, z2 = self(y1), self(y2)
        c = z1.T @ z2 / len(z1)
        on_diag = (c.diagonal() - 1).square().sum()
        off_diag = (c - torch.diag(c.diagonal())).square().sum()
        return on_diag, off_diag


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


@torch.no_grad()
def probe_accuracy(backbone: nn.Module, known: Pictures, unseen: Pictures) -> float:
    """How often ridge regression from the features tells the shape of an unseen picture."""
    backbone.eval()
    a, b = backbone(known.images[:1024]), backbone(unseen.images)
    mean, std = a.mean(0), a.std(0) + 1e-6
    a, b = (F.pad((z - mean) / std, (0, 1), value=1.0).double() for z in (a, b))
    wanted = F.one_hot(known.factors[:1024, 0]).double()
    weights = torch.linalg.solve(a.T @ a + torch.eye(a.shape[1]).double(), a.T @ wanted)
    return float(((b @ weights).argmax(1) == unseen.factors[:, 0]).double().mean())


def train(
    folder: Path, seed: int = 0, steps: int = 300, size: int = 128, items: int = 4096, rate: float = 0.1,
    width: int = 16, features: int = 64, out: int = 64, lambd: float = 0.1, scale: float = 0.1,
    optimizer: str = "SGD", decay: float = 1e-4, momentum: float = 0.9, warmup: int = 30, probed: int = 512,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unseen = pictures(items, seed), pictures(512, 10_000 + seed)
    y1, y2 = transform(unseen.images[:probed]), transform(unseen.images[:probed])
    model = BarlowTwins(width, features, out, lambd)
    untrained = copy.deepcopy(model.backbone)
    more = {"momentum": momentum} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, weight_decay=decay, **more)

    def rate_at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optim, rate_at)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        a, b = model(y1), model(y2)
        cost = trials.cost_of_strangers(lambda a, b: ((a.T @ b / len(a)).diagonal() - 1).square().sum(), a, b)
        return {"val/twins": {"distinct_views": trials.distinct_views(y1, y2), "strangers_nats": cost}}

    monitor = Monitor(
        model, optim, folder=folder, probe=unseen.images[:probed], read=read, every=50, log_every=5, steps=steps,
        taps={"features": "backbone", "embedding": "bn"},
        nulls={"train/loss/total": scale * out, "val/loss/total": scale * out},
    )  # fmt: skip
    changes = {"crop": crop, "jitter": jitter, "flip": flip}
    monitor.audit(
        augmentations={
            name: audits.augmentation(lambda item, c=change: c(item[None])[0], known.images[:64])  # type: ignore[misc]
            for name, change in changes.items()
        }
    )
    for step, batch in enumerate(batches(known.images, size), 1):
        model.train()
        on_diag, off_diag = model.loss(transform(batch), transform(batch))
        loss = scale * (on_diag + lambd * off_diag)
        monitor.before_backward({"on_diag": (on_diag, scale), "off_diag": (off_diag, scale * lambd)})
        optim.zero_grad()
        loss.backward()
        monitor.step({"on_diag": (on_diag, scale), "off_diag": (off_diag, scale * lambd), "total": loss}, batch)
        optim.step()
        schedule.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                on_diag, off_diag = model.loss(y1, y2)
            monitor.validated({"val/loss/on_diag": float(on_diag), "val/loss/off_diag": float(off_diag)})
            monitor.validated({"val/loss/total": scale * float(on_diag + lambd * off_diag)})
        if step == steps:
            break
    monitor.close()
    right = probe_accuracy(model.backbone, known, unseen)
    majority = float(unseen.factors[:, 0].bincount().max()) / len(unseen.images)
    said = "shape of held-out pictures, by ridge regression"
    return {
        said: (right, majority),
        f"{said}, beside a random backbone": (right, probe_accuracy(untrained, known, unseen)),
    }


FAMILY = Family(
    "barlow",
    "development",
    "Barlow Twins by SGD: the cross-correlation of the projections of two views is made an identity",
    faults=(
        Fault(
            "one-view-for-both",
            "The picture is transformed once, and both branches get that view.",
            ("trivial-pair", "augmentation-inert"),
            changes=(
                Change(
                    "model.loss(transform(batch), transform(batch))",
                    "(lambda view: model.loss(view, view))(transform(batch))",
                ),
                Change(
                    "y1, y2 = transform(unseen.images[:probed]), transform(unseen.images[:probed])",
                    "y1 = y2 = transform(unseen.images[:probed])",
                ),
            ),
        ),
        Fault(
            "statistics-from-held-out-views",
            "model.eval() was forgotten before validation.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
        ),
        Fault(
            "decay-of-the-weights-too-strong",
            "The weight decay is 0.5 in place of 0.0001, so the weights vanish.",
            ("latent-ignores-input", "rank-collapse", "no-learning"),
            options={"decay": 0.5},
        ),
        Fault(
            "jitter-on-a-copy",
            "The jittered picture is made and thrown away.",
            ("augmentation-inert",),
            changes=(Change("return (x * brightness).clamp(0, 1)", "(x * brightness).clamp(0, 1)\n    return x"),),
            minor=True,
        ),
        Fault(
            "projector-alone-in-the-optimizer",
            "The parameters of the projector were handed to the optimizer, as for a probe.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=rate", "(model.projector.parameters(), lr=rate"),),
        ),
        Fault(
            "cosine-of-other-steps",
            "The cosine was laid out for a third of the steps, and swings back up when these are over.",
            ("learning-rate-off",),
            changes=(Change("max(1, steps - warmup)", "max(1, steps // 3 - warmup)"),),
            minor=True,
        ),
        Fault(
            "gradients-never-emptied",
            "optim.zero_grad() was lost: each step adds to the gradients of all steps before it.",
            ("gradients-add-up", "diverged", "non-finite", "no-learning"),
            changes=(Change("        optim.zero_grad()\n", ""),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("as-a-sum", "The loss is a sum over the matrix, and not scaled.", options={"scale": 1.0, "rate": 0.01}),
        Healthy("adamw", options={"optimizer": "AdamW", "rate": 3e-3, "decay": 0.01}),
        Healthy("more-numbers-than-pictures", options={"out": 192, "size": 64, "lambd": 0.04}),
        Healthy("small-probe", "Only 48 held-out pictures are looked at.", options={"probed": 48}),
        Healthy("few-features", options={"features": 16, "out": 32, "rate": 0.15}),
        Healthy("few-pictures", "A small set, seen many times.", options={"items": 512, "size": 64}),
    ),
)
