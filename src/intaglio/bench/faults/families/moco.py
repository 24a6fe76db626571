"""Momentum contrast (He et al. 2020): a query finds its key among those of a queue, which a slow encoder has made."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, trials
from intaglio.health.instruments import contrastive
from intaglio.health.monitor import Monitor
from intaglio.history import Reading


def augment(x: Tensor) -> Tensor:
    down, right = torch.randint(0, 5, (2, len(x)))
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    rows, columns = down[:, None] + torch.arange(16), right[:, None] + torch.arange(16)
    x = padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
    grey = x.mean(1, keepdim=True).expand_as(x)
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.3, grey, x)
    gain = 1 + 1.2 * (torch.rand(len(x), 3, 1, 1) - 0.5)
    return (gain * x + 0.05 * torch.randn_like(x)).clamp(0, 1)


def encoder(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 2 * width),
        nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, dim),
    )  # fmt: skip


class MoCo(nn.Module):
    queue: Tensor

    def __init__(self, width: int, dim: int, K: int, m: float, T: float):
        super().__init__()
        self.K, self.m, self.T = K, m, T
        self.encoder_q = encoder(width, dim)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        for p in self.encoder_k.parameters():
            p.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.queue_ptr = 0

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data = k.data * self.m + q.data * (1.0 - self.m)

    @torch.no_grad()
    def dequeue_and_enqueue(self, keys: Tensor) -> None:
        ptr = self.queue_ptr
        self.queue[:, ptr : ptr + len(keys)] = keys.T
        self.queue_ptr = (ptr + len(keys)) % self.K

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            if self.training:
                self.update_key_encoder()
            k = F.normalize(self.encoder_k(im_k), dim=1)
        l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([l_pos, l_neg], dim=1) / self.T
        if self.training:
            self.dequeue_and_enqueue(k)
        return logits, torch.zeros(len(logits), dtype=torch.long)


def accuracy(output: Tensor) -> float:
    return float((output.argmax(1) == 0).float().mean())


@torch.no_grad()
def probed(model: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    model.eval()
    bank, z = (F.pad(model[:-3](part).double(), (0, 1), value=1.0) for part in (x, x_test))
    weights = torch.linalg.solve(bank.T @ bank + 1e-3 * torch.eye(bank.shape[1]), bank.T @ F.one_hot(y).double())
    return float(((z @ weights).argmax(1) == y_test).float().mean())


def loader(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for idx in torch.randperm(len(x)).split(size):
            if len(idx) == size:
                yield x[idx]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 4096, lr: float = 0.12,
    width: int = 24, dim: int = 32, K: int = 1024, m: float = 0.99, T: float = 0.1, cos: bool = True,
    optimizer: str = "SGD", wd: float = 1e-4,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    data, test = pictures(items, seed), pictures(512, 10_000 + seed)
    model = MoCo(width, dim, K, m, T)
    start = copy.deepcopy(model.encoder_q)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=lr, weight_decay=wd, **more)
    views = test_q, test_k = augment(test.images[: 4 * size]), augment(test.images[: 4 * size])
    recent: list[Tensor] = []

    def way(net: nn.Module) -> float:
        both = zip(net.parameters(), start.parameters(), strict=True)
        return sum(float((p - q).detach().square().sum()) for p, q in both) ** 0.5

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        images = torch.cat(recent[-(K // size) :])
        ptr = model.queue_ptr
        queued = torch.cat([model.queue[:, ptr:], model.queue[:, :ptr]], 1).T[-len(images) :]
        now = F.normalize(model.encoder_k(images), dim=1)
        moved = way(model.encoder_k) / max(way(model.encoder_q), 1e-12)
        return {
            "train/queue": {"queue_agreement": contrastive.queue_agreement(queued, now)},
            "val/pair": {"distinct_views": trials.distinct_views(*views)},
            "val/ema": {"moved": Reading(moved, 1.0)},
        }

    monitor = Monitor(
        model, opt, folder=folder, probe=test.images, forward=lambda net, x: net.get_submodule("encoder_q")(x),
        taps={"projection": "encoder_q"}, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/nce": math.log(K + 1), "val/loss/nce": math.log(K + 1), "val/moco/acc1": 1 / (K + 1)},
    )  # fmt: skip
    monitor.audit(augmentations={"augment": audits.augmentation(lambda im: augment(im[None])[0], data.images[:64])})
    for step, images in enumerate(loader(data.images, size), 1):
        if cos:
            for group in opt.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        model.train()
        im_q, im_k = augment(images), augment(images)
        views = im_q, im_k
        output, target = model(im_q, im_k)
        recent = [*recent, im_k][-(K // size) :]
        loss = F.cross_entropy(output, target)
        opt.zero_grad()
        loss.backward()
        monitor.step({"nce": loss}, images)
        opt.step()
        monitor.log({"train/moco/acc1": accuracy(output)})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                parts = [model(q, k)[0] for q, k in zip(test_q.split(size), test_k.split(size), strict=True)]
                output = torch.cat(parts)
                loss = F.cross_entropy(output, torch.zeros(len(output), dtype=torch.long))
            monitor.validated({"val/loss/nce": float(loss), "val/moco/acc1": accuracy(output)})
        if step == steps:
            break
    monitor.close()
    labels = data.factors[:, 0], test.factors[:, 0]
    right, before = (
        probed(net, data.images[:2048], labels[0][:2048], test.images, labels[1]) for net in (model.encoder_q, start)
    )
    said = "shape of held-out pictures, by a linear probe"
    return {said: (right, 1 / 3), f"{said}, beside a random encoder": (right, before)}


FAMILY = Family(
    "moco",
    "development",
    "momentum contrast with a queue of keys, by SGD with momentum",
    faults=(
        Fault(
            "one-view-twice",
            "Query and key are made from one and the same view of the picture.",
            ("trivial-pair",),
            changes=(Change("im_q, im_k = augment(images), augment(images)", "im_q = im_k = augment(images)"),),
        ),
        Fault(
            "key-encoder-never-moves",
            "The call that lets the key encoder follow was lost, so keys stay those of a random network.",
            ("ema-lag",),
            changes=(Change("            if self.training:\n                self.update_key_encoder()\n", ""),),
        ),
        Fault(
            "pointer-stays",
            "The queue's pointer is never moved on, so all places but the first few hold what they held at the start.",
            ("queue-stale",),
            changes=(Change("        self.queue_ptr = (ptr + len(keys)) % self.K\n", ""),),
            minor=True,
        ),
        Fault(
            "times-the-temperature",
            "Similarities are multiplied by the temperature and not divided by it: nothing can be told apart.",
            ("no-learning", "plateau", "near-chance"),
            changes=(Change("dim=1) / self.T", "dim=1) * self.T"),),
        ),
        Fault(
            "the-other-encoder-in-the-optimizer",
            "The optimizer was given the key encoder, which has no gradient.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=lr,", "(model.encoder_k.parameters(), lr=lr,"),),
        ),
        Fault(
            "tested-in-training-mode",
            "model.eval() is missing: held-out keys enter the queue, and statistics and key encoder move.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
        ),
    ),
    healthy=(
        Healthy("plain", "While the queue is full of noise the loss is at its lowest.", seeds=(0, 1, 2)),
        Healthy("quick-keys", "Keys follow fast.", options={"m": 0.98, "T": 0.2, "cos": False}),
        Healthy("adam", options={"optimizer": "AdamW", "lr": 2e-3, "wd": 1e-2}),
        Healthy("longer", options={"steps": 600}),
        Healthy("long-queue", options={"K": 2048, "steps": 500}),
        Healthy("short-queue", options={"K": 288, "width": 32, "size": 96}),
    ),
)
