"""Bootstrap your own latent (Grill et al. 2020): one view's projection predicts that of the other by averaged weights.

Shapes: N pictures, d dimensions.
"""

import copy
import io
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel, trials
from intaglio.health.monitor import Monitor
from intaglio.history import Reading


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, outputs)
    )


def convolutions(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width // 2), (width // 2, width), (width, width)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, 64))


class BYOL(nn.Module):
    def __init__(self, width: int, decay: float):
        super().__init__()
        self.decay = decay
        self.online = nn.Sequential(convolutions(width), mlp(64, 128, 32))
        self.predictor = mlp(32, 64, 32)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        return self.online[0](x)

    def errors(self, a: Tensor, b: Tensor) -> Tensor:
        predicted = [F.normalize(self.predictor(self.online(x)), dim=1) for x in (a, b)]
        targets = [F.normalize(self.target(x), dim=1) for x in (b, a)]
        cosines = [(p * t.detach()).sum(1) for p, t in zip(predicted, targets, strict=True)]
        return 2 - cosines[0] - cosines[1]

    @torch.no_grad()
    def step_target(self) -> None:
        for t, p in zip(self.target.parameters(), self.online.parameters(), strict=True):
            t.lerp_(p, 1 - self.decay)


def shifted(x: Tensor) -> Tensor:
    padded = F.pad(x, (2, 2, 2, 2), value=0.05)
    down, right = torch.randint(0, 5, (2, len(x)))
    rows, columns = ((start[:, None] + torch.arange(16)) for start in (down, right))
    return padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def jittered(x: Tensor) -> Tensor:
    gains = 0.7 + 0.6 * torch.rand(len(x), 3, 1, 1)
    return (x * gains).clamp(0, 1)


def view(x: Tensor) -> Tensor:
    return jittered(shifted(x))


def packed(x: Tensor) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, image=x.mul(255).byte().numpy())
    return file.getvalue()


def unpacked(file: bytes) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(file))["image"]).float() / 255


def batches(files: Sequence[bytes], size: int) -> Iterator[Tensor]:
    images = torch.stack([unpacked(file) for file in files])
    while True:
        for rows in torch.randperm(len(files)).split(size):
            if len(rows) == size:
                yield images[rows]


def rate_at(step: int, warmup: int, total: int, schedule: str) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    turns = 2 if schedule == "restarts" else 1
    progress = min(1.0, (step - warmup) / (total - warmup))
    return 0.5 * (1 + math.cos(math.pi * (turns * progress % 1.0 if progress < 1 else 1.0)))


def probe_accuracy(train: Tensor, labels: Tensor, held_out: Tensor, answers: Tensor) -> float:
    """Of a linear classifier by least squares on embeddings (N, d) whose dimensions are standardised."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, y = (F.pad((z - mean) / std, (0, 1), value=1.0).double() for z in (train, held_out))
    wanted = F.one_hot(labels).double()
    weights = torch.linalg.solve(x.T @ x + 1.0 * torch.eye(x.shape[1]).double(), x.T @ wanted)
    return float(((y @ weights).argmax(1) == answers).double().mean())


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((x.detach() - y.detach()).square().sum()) for x, y in zip(a, b, strict=True)))


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 4096, rate: float = 2e-3,
    width: int = 32, decay: float = 0.98, clip: float = 0.1, optimizer: str = "AdamW", schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    shown, unseen = pictures(items, seed), pictures(512, 10_000 + seed)
    files = [packed(x) for x in shown.images]
    held_out = unseen.images
    model = BYOL(width, decay)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, weight_decay=1e-4, **more)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, 30, steps, schedule))
    views = view(held_out), view(held_out)
    start = [p.clone() for p in model.target.parameters()]

    def accuracy() -> float:
        with torch.no_grad():
            few, other = model.encode(shown.images[:1024]), model.encode(held_out)
        return probe_accuracy(few, shown.factors[:1024, 0], other, unseen.factors[:, 0])

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        a, b = model.predictor(model.online(views[0])), model.target(views[1])
        cost = trials.cost_of_strangers(lambda a, b: (2 - 2 * F.cosine_similarity(a, b)).mean(), a, b)
        averaged, online = list(model.target.parameters()), list(model.online.parameters())
        moved = distance(averaged, start) / max(distance(online, start), 1e-12)
        return {
            "val/latent": panel.latents(model.encode(probe)),
            "val/projection": panel.latents(model.online(probe)),
            "val/pair": {"strangers_nats": cost, "distinct_views": trials.distinct_views(*views)},
            "val/ema": {"moved": Reading(moved, 1.0)},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/total": 2.0, "val/loss/total": 2.0},
    )  # fmt: skip
    alone = {"shift": lambda x: shifted(x[None])[0], "jitter": lambda x: jittered(x[None])[0]}
    monitor.audit(augmentations={name: audits.augmentation(change, held_out[:64]) for name, change in alone.items()})
    source, waited, since = batches(files, size), 0.0, time.perf_counter()
    first = next(source)
    for step in range(1, steps + 1):
        asked = time.perf_counter()
        batch = first if step == 1 else next(source)
        waited += time.perf_counter() - asked
        model.train()
        loss = model.errors(view(batch), view(batch)).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step(loss, batch)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optim.step()
        scheduler.step()
        model.step_target()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                held_out_loss = float(model.errors(*views).mean())
            monitor.validated({"val_loss": held_out_loss, "accuracy": accuracy()})
            monitor.log({"train/speed/wait_share": waited / (time.perf_counter() - since)})
            waited, since = 0.0, time.perf_counter()
    monitor.close()
    model.eval()
    majority = float(unseen.factors[:, 0].bincount().max()) / len(held_out)
    return {"shape of held-out pictures, by a linear probe": (accuracy(), majority)}


FAMILY = Family(
    "byol",
    "development",
    "BYOL: two views of a picture, a predictor, and targets by averaged weights",
    faults=(
        Fault(
            "one-network-for-both-views",
            "The targets come from the online network itself, and the gradient is not stopped there.",
            ("rank-collapse", "latent-ignores-input", "anisotropic"),
            changes=(
                Change("copy.deepcopy(self.online).requires_grad_(False)", "self.online"),
                Change("(p * t.detach())", "(p * t)"),
                Change("        model.step_target()\n", ""),
            ),
        ),
        Fault(
            "target-never-stepped",
            "The line that steps the average is not in the loop, so the target stays as it was drawn.",
            ("ema-lag",),
            changes=(Change("        model.step_target()\n", ""),),
        ),
        Fault(
            "target-stepped-in-the-loss",
            "The average is stepped where the loss is computed, so that held-out pictures step it as well.",
            ("validation-pollutes",),
            changes=(
                Change("        predicted = [", "        self.step_target()\n        predicted = ["),
                Change("        model.step_target()\n", ""),
            ),
        ),
        Fault(
            "jitter-without-effect",
            "The jittered pictures are computed, and the pictures as they were are returned.",
            ("augmentation-inert",),
            changes=(Change("    return (x * gains).clamp(0, 1)", "    (x * gains).clamp(0, 1)\n    return x"),),
            minor=True,
        ),
        Fault(
            "norm-read-after-clipping",
            "The gradient is clipped before it is looked at, so its logged norm is the clip.",
            ("log-distorted",),
            changes=(
                Change("        nn.utils.clip_grad_norm_(model.parameters(), clip)\n", ""),
                Change(
                    "        monitor.step(loss, batch)\n",
                    "        nn.utils.clip_grad_norm_(model.parameters(), clip)\n        monitor.step(loss, batch)\n",
                ),
            ),
            case="J log-distorted",
            minor=True,
        ),
        Fault(
            "unpacked-for-each-batch",
            "Every picture is unpacked from its file again for each batch, in the process that trains.",
            ("input-starved",),
            changes=(
                Change("    images = torch.stack([unpacked(file) for file in files])\n", ""),
                Change("yield images[rows]", "yield torch.stack([unpacked(files[k]) for k in rows.tolist()])"),
            ),
            minor=True,
        ),
        Fault(
            "no-seed",
            "Nobody set a seed, so that the run cannot be made again.",
            ("not-reproducible",),
            changes=(Change("    torch.manual_seed(seed)\n", ""),),
            case="J not-reproducible",
            minor=True,
        ),
        Fault(
            "watched-after-normalisation",
            "What is watched as the latent was scaled to length 1, so that its norm tells of no collapse.",
            ("norm-pinned",),
            changes=(Change("panel.latents(model.encode(probe))", "panel.latents(F.normalize(model.encode(probe)))"),),
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", "The loss need not fall: the targets move.", seeds=(0, 1, 2)),
        Healthy(
            "sgd",
            "With a momentum, and a gradient that is clipped in every step.",
            options={"optimizer": "SGD", "rate": 1.0},
        ),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3}),
        Healthy("wide", options={"width": 48, "steps": 300}),
        Healthy("few-items", "A small set of pictures, each seen fifty times.", options={"items": 512}),
        Healthy("constant-rate", "Nothing settles at the end.", options={"schedule": "constant"}),
        Healthy(
            "warm-restart", "The rate jumps back up in the middle.", options={"schedule": "restarts"}, seeds=(0, 1)
        ),
        Healthy("close-target", "The average follows at twenty steps.", options={"decay": 0.95}),
    ),
)
