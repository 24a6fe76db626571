"""MaskGIT (Chang et al. 2022): a small VQ autoencoder is made first; then a bidirectional transformer learns to fill in
its codes where they are masked, given the class, and pictures are made by unmasking the surest codes first.

Only the transformer is watched. B pictures, T codes each, K codes in the book; the id K is the mask's.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits
from intaglio.health.monitor import Monitor
from intaglio.history.reading import ratio

K, T, CLASSES = 48, 16, 12


class VQ(nn.Module):
    def __init__(self, dim: int = 8):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 48, 4, 4), nn.BatchNorm2d(48), nn.SiLU(), nn.Conv2d(48, dim, 1))
        self.book = nn.Embedding(K, dim)
        self.up = nn.Sequential(nn.Conv2d(dim, 48, 3, 1, 1), nn.SiLU(), nn.ConvTranspose2d(48, 3, 4, 4))

    def encode(self, x: Tensor) -> Tensor:
        return self.down(x).flatten(2).mT

    def ids(self, x: Tensor) -> Tensor:
        return torch.cdist(self.encode(x), self.book.weight[None]).argmin(2)

    def decode(self, q: Tensor) -> Tensor:
        return self.up(q.mT.unflatten(2, (4, 4)))


def tokenizer(x: Tensor, steps: int = 150) -> VQ:
    """The first stage, by the two losses of van den Oord et al. 2017."""
    vq = VQ()
    with torch.no_grad():
        vq.book.weight.copy_(vq.encode(x[:256]).flatten(0, 1)[torch.randperm(256 * T)[:K]])
    optim = torch.optim.Adam(vq.parameters(), lr=4e-3)
    for step in range(steps):
        batch = x[torch.randint(len(x), (32,))]
        z = vq.encode(batch)
        if step % 25 == 0 and step < 100:  # codes that nothing chose start again
            unused = torch.bincount(vq.ids(x[:256]).flatten(), minlength=K) == 0
            with torch.no_grad():
                vq.book.weight[unused] = z.flatten(0, 1)[torch.randint(32 * T, (int(unused.sum()),))]
        q = vq.book(torch.cdist(z, vq.book.weight[None]).argmin(2))
        loss = 10 * F.mse_loss(vq.decode(z + (q - z).detach()), batch) + F.mse_loss(q, z.detach())
        loss = loss + 0.25 * F.mse_loss(z, q.detach())
        optim.zero_grad()
        loss.backward()
        optim.step()
    return vq.eval().requires_grad_(False)


class Bidirectional(nn.Module):
    def __init__(self, width: int, layers: int, dropout: float):
        super().__init__()
        self.tokens, self.classes = nn.Embedding(K + 1, width), nn.Embedding(CLASSES + 1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(T, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.trunk = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, K))

    def forward(self, ids: Tensor, label: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions
        h = h + self.classes(label)[:, None]
        return self.head(self.trunk(h))


def cosine_mask(ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """True where masked: of each picture a share cos(πu/2), at least one code."""
    share = (torch.rand(len(ids), 1, generator=generator) * math.pi / 2).cos()
    order = torch.rand(ids.shape, generator=generator).argsort(1)
    return order < (share * T).ceil().clamp(min=1)


def masked_nats(model: nn.Module, ids: Tensor, label: Tensor, mask: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each masked code."""
    logits = model(ids.masked_fill(mask, K), label)
    return F.cross_entropy(logits[mask], ids[mask], label_smoothing=smoothing, reduction="none")


@torch.no_grad()
def generate(model: nn.Module, label: Tensor, rounds: int = 6) -> Tensor:
    ids = torch.full((len(label), T), K)
    for k in range(1, rounds + 1):
        p = model(ids, label).softmax(2)
        drawn = torch.distributions.Categorical(p).sample()
        sure = p.gather(2, drawn[..., None])[..., 0].masked_fill(ids != K, 2.0)
        keep = T - int(T * math.cos(math.pi / 2 * k / rounds))
        chosen = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, sure.topk(keep, 1).indices, True)
        ids = torch.where(chosen & (ids == K), drawn, ids)
    return ids


def train(
    folder: Path, seed: int = 0, steps: int = 300, size: int = 48, items: int = 4096, rate: float = 3e-3,
    width: int = 48, layers: int = 2, dropout: float = 0.1, smoothing: float = 0.1, drop: float = 0.1,
    optimizer: str = "AdamW", warmup: int = 30,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    seen = pictures(items, seed)
    unseen = pictures(512, 10_000 + seed)
    vq = tokenizer(seen.images)
    with torch.no_grad():
        ids, held_out = vq.ids(seen.images), vq.ids(unseen.images)
    label, held_label = (f[:, 1] * 3 + f[:, 3] for f in (seen.factors, unseen.factors))  # its colour and its row
    fixed = cosine_mask(held_out, torch.Generator().manual_seed(1))
    counts = torch.bincount(ids.flatten(), minlength=K) + 1.0
    unigram = -float((counts / counts.sum()).log()[held_out[fixed]].mean())
    model = Bidirectional(width, layers, dropout)
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optim, 1 / warmup, 1.0, warmup)

    def read(model: Any, probe: Any) -> dict[str, Any]:
        own = masked_nats(model, held_out, held_label, fixed)
        other = masked_nats(model, held_out, held_label.roll(1), fixed)
        cost = ratio((other - own).double().numpy(), own.double().numpy(), 0.0)
        return {"val/condition": {"permuted_loss": cost}}

    monitor = Monitor(
        model, optim, folder=folder, probe=(held_out.masked_fill(fixed, K), held_label), read=read,
        forward=lambda model, probe: model(*probe), taps={"trunk": "trunk"}, every=50, log_every=5, steps=steps,
        nulls={"train/loss/total": unigram, "val/loss/total": unigram},
    )  # fmt: skip
    monitor.audit(leaks={"the very same picture": audits.leaks(seen.images.numpy(), unseen.images.numpy())})
    for step in range(1, steps + 1):
        model.train()
        rows = torch.randint(len(ids), (size,))
        batch, given = ids[rows], label[rows]
        given = torch.where(torch.rand(size) < drop, CLASSES, given)
        mask = cosine_mask(batch)
        loss = masked_nats(model, batch, given, mask, smoothing).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step(loss, (batch, given))
        optim.step()
        schedule.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                nats = masked_nats(model, held_out, held_label, fixed)
                guess = model(held_out.masked_fill(fixed, K), held_label).argmax(2)
            right = (guess == held_out)[fixed].float().mean()
            monitor.validated({"val_loss": float(nats.mean()), "masked_accuracy": float(right)})
    monitor.close()
    model.eval()
    drawn = vq.decode(vq.book(generate(model, held_label)))
    body = drawn.flatten(2).topk(9, 2).values.mean(2)
    truth = unseen.images.flatten(2).topk(9, 2).values.mean(2)
    colour = (body[:, None] - torch.stack([truth[unseen.factors[:, 1] == c].mean(0) for c in range(4)])).norm(dim=2)
    said = float((colour.argmin(1) == unseen.factors[:, 1]).float().mean())
    with torch.no_grad():
        nats = masked_nats(model, held_out, held_label, fixed)
    return {
        "nats saved of a masked code of held-out pictures": (unigram - float(nats.mean()), 0.0),
        "generated pictures that have the colour that was asked for": (said, 0.25),
    }


FAMILY = Family(
    "maskgit",
    "development",
    "MaskGIT: a transformer that fills in masked codes of a picture, given its class",
    faults=(
        Fault(
            "class-not-added",
            "The embedding of the class is made, and what it is added to is thrown away.",
            ("condition-ignored", "dead-parameters"),
            changes=(
                Change(
                    "        h = h + self.classes(label)[:, None]\n", "        _ = h + self.classes(label)[:, None]\n"
                ),
            ),
        ),
        Fault(
            "classes-of-other-pictures",
            "Codes and classes are drawn by two lots, so that they belong to different pictures.",
            ("condition-ignored",),
            changes=(Change("label[rows]", "label[torch.randint(len(ids), (size,))]"),),
        ),
        Fault(
            "dropout-in-validation",
            "model.eval() was forgotten, so that dropout is on where held-out pictures are looked at.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
            options={"dropout": 0.4},
            minor=True,
        ),
        Fault(
            "rate-of-another-optimizer",
            "AdamW has the rate that was meant for gradient descent.",
            ("diverged", "no-learning", "plateau", "non-finite"),
            options={"rate": 0.5},
        ),
        Fault(
            "held-out-pictures-of-the-same-seed",
            "Held-out pictures are made by the seed of those that are trained on.",
            ("split-leak",),
            changes=(Change("pictures(512, 10_000 + seed)", "type(seen)(*(part[:512] for part in seen))"),),
        ),
    ),
    healthy=(
        Healthy("plain", "Smoothed labels, dropout, and losses that jump with the share of masks.", seeds=(0, 1, 2)),
        Healthy("unsmoothed", options={"smoothing": 0.0, "dropout": 0.0, "drop": 0.0}),
        Healthy(
            "strong-dropout", "Training's loss is far above the held-out one.", options={"dropout": 0.4, "steps": 400}
        ),
        Healthy("radam", options={"optimizer": "RAdam", "rate": 4e-3, "warmup": 1}),
        Healthy("few-items", "A small set, seen often.", options={"items": 1024}, seeds=(0, 1)),
    ),
)
