"""An independent judge of images: a small classifier trained on real images only.

It shares nothing with the models that it judges. Its own held-out accuracy is part of every answer that rests on it.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

VERSION = 2
"""Part of every cache key: raise it when the same images would give another classifier."""


@dataclass
class Judge:
    """A trained classifier: ``labels`` in the order of its outputs, ``accuracy`` on ``n`` held-out real images."""

    network: nn.Sequential
    labels: tuple[str, ...]
    accuracy: float
    n: int

    def __call__(self, images: np.ndarray) -> list[str]:
        """The most probable label of each image, uint8 (B, S, S, 3)."""
        return [self.labels[int(k)] for k in self.probabilities(images).argmax(1)]

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray) -> Tensor:
        """Of each label, (B, K)."""
        return torch.cat([self.network(_tensor(images[i : i + 128])).softmax(1) for i in range(0, len(images), 128)])

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> Tensor:
        """What its last layer reads, averaged over the grid, (B, 128): for distances between sets of images."""
        grid = self.network[:-4]
        return torch.cat([grid(_tensor(images[i : i + 128])).mean((2, 3)) for i in range(0, len(images), 128)])


def judge(
    images: np.ndarray, train: np.ndarray, train_labels: list[str], val: np.ndarray, val_labels: list[str], cache: Path
) -> Judge:
    """Trains a classifier on the items ``train`` of ``images`` (N, S, S, 3), or finds the same one in the cache.

    Accuracy is measured on the items ``val``. At most 40,000 image views of 64 px are used, or 100,000 smaller ones: a
    minute or two on two cores.
    """
    labels = tuple(sorted(set(train_labels)))
    key = hashlib.sha256(
        repr((VERSION, images.shape, labels, train_labels)).encode() + np.ascontiguousarray(train).tobytes()
    )
    key.update(np.ascontiguousarray(images[train[:: max(1, len(train) // 64)]]).tobytes())
    path = cache / f"judge-{key.hexdigest()[:20]}.safetensors"
    with torch.random.fork_rng(devices=[]):
        network = _network(len(labels), images.shape[1])
    if path.is_file():
        with safe_open(path, "pt") as file:
            network.load_state_dict({k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118 - not a mapping
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = _network(len(labels), images.shape[1])
            _fit(network, images, train, torch.tensor([labels.index(x) for x in train_labels]))
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file(network.state_dict(), part)
        os.replace(part, path)
    found = Judge(network.eval(), labels, 0.0, len(val))
    found.accuracy = float(np.mean([a == b for a, b in zip(found(images[val]), val_labels, strict=True)]))
    return found


def _network(classes: int, size: int) -> nn.Sequential:
    """Four convolutions to a grid of 4 × 4: of small images the first ones keep the size."""
    layers: list[nn.Module] = []
    for k, (a, b) in enumerate(((3, 32), (32, 64), (64, 128), (128, 128))):
        stride = 2 if size >> (4 - k) >= 4 else 1
        layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(2048, classes))


def _fit(network: nn.Module, images: np.ndarray, items: np.ndarray, targets: Tensor) -> None:
    """One-cycle AdamW on shifted views."""
    views = min(100_000, 40_000 * 64**2 // images.shape[1] ** 2)
    steps = max(100, min(views, 30 * len(items)) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    random = np.random.default_rng(0)
    order = np.concatenate([random.permutation(len(items)) for _ in range(steps * 64 // len(items) + 1)])
    network.train()
    for step in range(steps):
        chosen = order[step * 64 : (step + 1) * 64]
        x = _tensor(images[items[chosen]])
        shift = random.integers(-2, 3, size=2)
        x = torch.roll(x, (int(shift[0]), int(shift[1])), dims=(2, 3))
        loss = F.cross_entropy(network(x), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
