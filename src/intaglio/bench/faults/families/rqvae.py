"""A residual-quantised autoencoder (Zeghidour et al. 2021; Lee et al. 2022): each codebook quantises what the ones
before it left over. Codes are moving averages; the pictures' part of the loss is half a squared error, summed.

Shapes: T latents, K codes, D dimensions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health.instruments import codebook
from intaglio.health.monitor import Monitor

PLACES = 16


class EMACodebook(nn.Module):
    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    def __init__(self, size: int, dim: int, decay: float):
        super().__init__()
        self.size, self.decay = size, decay
        self.register_buffer("embed", torch.randn(size, dim))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed_avg", torch.zeros(size, dim))
        self.register_buffer("initted", torch.tensor(False))

    def init_from(self, flat: Tensor, rounds: int = 5) -> None:
        """k-means on the first batch."""
        self.embed.copy_(flat[torch.randint(len(flat), (self.size,))])
        for _ in range(rounds):
            hot = F.one_hot(torch.cdist(flat, self.embed).argmin(1), self.size).float()
            count = hot.sum(0)
            self.embed.copy_(torch.where(count[:, None] > 0, hot.T @ flat / count.clamp(min=1)[:, None], self.embed))
        self.cluster_size.fill_(len(flat) / self.size)
        self.embed_avg.copy_(self.embed * len(flat) / self.size)
        self.initted.fill_(True)

    @torch.no_grad()
    def forward(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and not self.initted:
            self.init_from(flat)
        ids = torch.cdist(flat, self.embed).argmin(1)
        quantized = self.embed[ids]
        if self.training:
            hot = F.one_hot(ids, self.size).float()
            self.cluster_size.mul_(self.decay).add_(hot.sum(0), alpha=1 - self.decay)
            self.embed_avg.mul_(self.decay).add_(hot.T @ flat, alpha=1 - self.decay)
            n = self.cluster_size.sum()
            smoothed = (self.cluster_size + 1e-5) / (n + self.size * 1e-5) * n
            self.embed.copy_(self.embed_avg / smoothed[:, None])
            expired = self.cluster_size < 0.05 * len(flat) / self.size
            self.replace(expired, flat)
        return quantized, ids

    def replace(self, expired: Tensor, flat: Tensor) -> None:
        count = int(expired.sum())
        self.embed[expired] = flat[torch.randint(len(flat), (count,))]
        self.cluster_size[expired] = 0.5 * len(flat) / self.size
        self.embed_avg[expired] = self.embed[expired] * self.cluster_size[expired][:, None]


class RQVAE(nn.Module):
    def __init__(self, width: int, dim: int, sizes: tuple[int, ...], decay: float, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.enc = nn.Sequential(
            nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width), nn.GELU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.GELU(), nn.Conv2d(width, dim, 1),
        )  # fmt: skip
        self.levels = nn.ModuleList([EMACodebook(size, dim, decay) for size in sizes])
        self.dec = nn.Sequential(
            nn.Conv2d(dim, width, 3, 1, 1), nn.BatchNorm2d(width), nn.GELU(), nn.ConvTranspose2d(width, 3, 4, 4)
        )

    def quantize(self, z: Tensor, depth: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """The sum of the first ``depth`` levels' codes, the commitment, and each level's ids and what it was given."""
        residual, total, commit = z, torch.zeros_like(z), z.new_zeros(())
        ids, given = [], []
        for level in list(self.levels)[:depth]:
            given.append(residual.detach())
            quantized, chosen = level(residual.detach())
            commit = commit + (residual - quantized).square().mean()
            residual = residual - quantized
            total = total + quantized
            ids.append(chosen)
        return z + (total - z).detach(), commit, ids, given

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.enc(x)
        depth = len(self.levels)
        if self.training and float(torch.rand(())) < self.dropout:
            depth = int(torch.randint(1, depth + 1, ()))
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        q, commit, _, _ = self.quantize(flat, depth)
        return self.dec(q.view(len(x), 4, 4, -1).permute(0, 3, 1, 2)), commit


def loader(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        yield from (x[rows] for rows in torch.randperm(len(x))[: len(x) // size * size].split(size))


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 32, items: int = 4096, rate: float = 4e-3,
    width: int = 48, dim: int = 8, sizes: tuple[int, ...] = (32, 32, 32), decay: float = 0.95, dropout: float = 0.0,
    beta: float = 2.0, optimizer: str = "Adam",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    x, held_out = pictures(items, seed).images, pictures(256, 10_000 + seed).images
    model = RQVAE(width, dim, sizes, decay, dropout)
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    null = 0.5 * float((held_out - x.mean(0)).square().flatten(1).sum(1).mean())

    def losses(batch: Tensor) -> dict[str, tuple[Tensor, float]]:
        rebuilt, commit = model(batch)
        return {"nll": (0.5 * (rebuilt - batch).square().flatten(1).sum(1).mean(), 1.0), "commit": (commit, beta)}

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        z = model.enc(probe).permute(0, 2, 3, 1).flatten(0, 2)
        _, _, ids, given = model.quantize(z, len(model.levels))
        found = {}
        for k, (level, chosen, residual) in enumerate(zip(model.levels, ids, given, strict=True)):
            used = codebook.code_counts(chosen, level.size)
            found["val/codes" if not k else f"val/codes{k + 1}"] = {
                "perplexity": codebook.perplexity(used),
                "usage": codebook.usage(used),
                "norm_ratio": codebook.norm_ratio(level.embed, residual),
                "mass_ratio": codebook.mass_ratio(level.cluster_size, PLACES * size),
            }
        return found

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, taps={"z": "enc"}, every=50, log_every=5, steps=steps,
        nulls={"train/loss/nll": null, "val/loss/nll": null},
    )  # fmt: skip
    for step, batch in enumerate(loader(x, size), 1):
        model.train()
        terms = losses(batch)
        loss = torch.stack([weight * term for term, weight in terms.values()]).sum()
        monitor.before_backward(terms)
        optim.zero_grad()
        loss.backward()
        monitor.step({**terms, "total": loss}, batch)
        optim.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = losses(held_out)
            monitor.validated({f"val/loss/{name}": float(term) for name, (term, _) in terms.items()})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        error = float(losses(held_out)["nll"][0])
    return {"variance of held-out pictures explained": (1 - error / null, 0.0)}


FAMILY = Family(
    "rqvae",
    "development",
    "an autoencoder of pictures whose latents are quantised in levels, each the rest of the one before",
    faults=(
        Fault(
            "codes-follow-held-out-pictures",
            "The moving averages are updated whether the model is in training mode or not.",
            ("codes-polluted", "validation-pollutes"),
            changes=(
                Change("        if self.training:\n            hot", "        if self.initted:\n            hot"),
            ),
        ),
        Fault(
            "commitment-detached",
            "The latents are detached before the levels and not inside, so the commitment has no gradient.",
            ("term-inert",),
            changes=(Change("residual, total, commit = z,", "residual, total, commit = z.detach(),"),),
        ),
        Fault(
            "no-straight-through",
            "The decoder is given the codes themselves, so that no gradient of the pictures comes to the encoder.",
            ("latent-ignores-input", "codebook-collapse", "no-learning", "rank-collapse", "codes-shrink"),
            changes=(Change("return z + (total - z).detach(), commit", "return total.detach(), commit"),),
        ),
        Fault(
            "commitment-left-out-of-the-sum",
            "The commitment is logged, and the sum takes the pictures' error alone.",
            ("weight-not-applied", "quantiser-loss-missing"),
            changes=(
                Change(
                    "loss = torch.stack([weight * term for term, weight in terms.values()]).sum()",
                    'loss = terms["nll"][0]',
                ),
            ),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("two-levels", options={"sizes": (64, 64), "optimizer": "AdamW"}),
        Healthy(
            "dropped-levels", "Half of the batches see fewer levels, held-out pictures all.", options={"dropout": 0.5}
        ),
        Healthy("coarse-to-fine", "The first codebook is small, the last large.", options={"sizes": (8, 32, 128)}),
        Healthy("slow-codes", options={"decay": 0.99, "rate": 1e-3, "steps": 500}),
        Healthy("narrow-latents", "Latents have two dimensions.", options={"dim": 2, "beta": 1.0}),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 512}),
    ),
)
