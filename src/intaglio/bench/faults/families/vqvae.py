"""A VQ-VAE of pictures whose codes are moving averages: van den Oord et al. 2017, revived as Dhariwal et al. 2020."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import panel
from intaglio.health.instruments import codebook
from intaglio.health.monitor import Monitor

TOKENS = 16


class Codebook(nn.Module):
    """Each code is the moving average of the latents that chose it; codes that few choose start again on a latent."""

    codes: Tensor
    counts: Tensor
    sums: Tensor
    last_used: Tensor

    def __init__(self, size: int, width: int, tokens: int, decay: float, revive: int, start: str):
        super().__init__()
        self.decay, self.revive, self.start, self.updates = decay, revive, start, 0
        self.even = tokens / size
        self.threshold = 0.1 * tokens / size
        self.register_buffer("codes", torch.randn(size, width))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, width))
        self.register_buffer("last_used", torch.full((size,), -1))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        flat = z.detach().flatten(0, -2)
        if self.training and not self.updates:
            self.begin(flat)
        chosen = torch.cdist(flat, self.codes).argmin(1)
        q = self.codes[chosen].view_as(z)
        if self.training:
            self.update(flat, chosen)
        return q, chosen

    @torch.no_grad()
    def begin(self, flat: Tensor) -> None:
        if self.start == "data":
            self.codes.copy_(flat[torch.randperm(len(flat))[: len(self.codes)]])
        self.counts.fill_(self.even)
        self.sums.copy_(self.codes * self.even)

    @torch.no_grad()
    def update(self, flat: Tensor, chosen: Tensor) -> None:
        members = nn.functional.one_hot(chosen, len(self.codes)).float()
        self.counts.lerp_(members.sum(0), 1 - self.decay)
        self.sums.lerp_(members.T @ flat, 1 - self.decay)
        self.codes.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])
        self.last_used[chosen] = self.updates
        self.updates += 1
        if self.revive and self.updates % self.revive == 0:
            self.restart(flat)

    def restart(self, flat: Tensor) -> None:
        dead = self.counts < self.threshold
        self.codes[dead] = flat[torch.randint(len(flat), (int(dead.sum()),))]
        total = self.counts.sum()
        self.counts[dead] = self.even
        self.sums[dead] = self.codes[dead] * self.even
        share = total / self.counts.sum()
        self.counts *= share
        self.sums *= share


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class VQVAE(nn.Module):
    def __init__(self, width: int, latent: int, codes: Codebook):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 4, 4), Residual(width), nn.Conv2d(width, latent, 1))
        self.codebook = codes
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, width, 3, 1, 1), Residual(width), nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 4)
        )

    def encode(self, x: Tensor) -> Tensor:
        """(B, 16, D): a latent for each patch."""
        return self.encoder(x).flatten(2).transpose(1, 2)

    def decode(self, q: Tensor) -> Tensor:
        return self.decoder(q.transpose(1, 2).unflatten(2, (4, 4)))

    def losses(self, x: Tensor, variance: float, quantised: bool = True) -> dict[str, Tensor]:
        z = self.encode(x)
        if not quantised:
            return {"reconstruction": (self.decode(z) - x).square().mean() / variance, "commitment": z.new_zeros(())}
        q, _ = self.codebook(z)
        commitment = (z - q.detach()).square().mean()
        rebuilt = self.decode(z + (q - z).detach())
        reconstruction = (rebuilt - x).square().mean() / variance
        return {"reconstruction": reconstruction, "commitment": commitment}


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 32, items: int = 4096, rate: float = 4e-3,
    width: int = 64, latent: int = 16, codes: int = 64, decay: float = 0.95, revive: int = 10, start: str = "data",
    beta: float = 0.25, fade: float = 1.0, after: int = 0, optimizer: str = "Adam", momentum: float = 0.0,
    restart: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    x, held_out = pictures(items, seed).images, pictures(512, 10_000 + seed).images
    variance = float((held_out - x.mean(0)).square().mean())
    model = VQVAE(width, latent, Codebook(codes, latent, TOKENS * size, decay, revive, start))
    more = {"momentum": momentum} if momentum else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        z, book = model.encode(probe), model.codebook
        if not book.updates:
            return {"val/latent": panel.latents(z.flatten(0, 1))}
        used = codebook.code_counts(book(z)[1], codes)
        of_codes = {
            "perplexity": codebook.perplexity(used),
            "usage": codebook.usage(used),
            "norm_ratio": codebook.norm_ratio(book.codes, z.flatten(0, 1)),
            "mass_ratio": codebook.mass_ratio(book.counts, TOKENS * size),
            "dead_share": codebook.dead_share(book.last_used, book.updates - 1, TOKENS * size),
            "revival_threshold": codebook.revival_threshold(book.threshold, codes, TOKENS * size),
        }
        return {"val/codes": of_codes, "val/latent": panel.latents(z.flatten(0, 1))}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/reconstruction": 1.0, "val/loss/reconstruction": 1.0},
    )  # fmt: skip
    for step, batch in enumerate(batches(x, size), 1):
        if restart:
            optim.param_groups[0]["lr"] = rate * 0.98 ** ((step - 1) % restart)
        model.train()
        terms = model.losses(batch, variance, step > after)
        weights = {"reconstruction": 1.0, "commitment": beta * fade**step if step > after else 0.0}
        weighted = {name: (term, weights[name]) for name, term in terms.items()}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        optim.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = model.losses(held_out, variance, step > after)
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        error = model.losses(held_out, variance)["reconstruction"]
    return {"explained variance of held-out pictures": (1 - float(error), 0.0)}


FAMILY = Family(
    "vqvae",
    "development",
    "an autoencoder of pictures whose codes are moving averages",
    faults=(
        Fault(
            "codes-start-as-bytes",
            "Codes start as numbers from 0 to 255, as the pictures once were; dead ones are never revived.",
            ("codebook-collapse", "codes-dead", "codes-displaced"),
            changes=(Change("torch.randn(size, width)", "255 * torch.rand(size, width)"),),
            options={"start": "random", "revive": 0},
        ),
        Fault(
            "revived-and-overwritten",
            "A revived code gets its place and its count, but the sum behind it, which the next update divides, stays.",
            ("codes-dead",),
            changes=(Change("        self.sums[dead] = self.codes[dead] * self.even\n", ""),),
            options={"start": "random"},
            minor=True,
        ),
        Fault(
            "counts-from-zero",
            "The codes' sums start at the codes, and their counts at zero.",
            ("codes-displaced", "codes-dead"),
            changes=(
                Change("        self.counts.fill_(self.even)\n", ""),
                Change("self.sums.copy_(self.codes * self.even)", "self.sums.copy_(self.codes)"),
            ),
            options={"revive": 0, "decay": 0.99},
            case="J codes-displaced",
        ),
        Fault(
            "commitment-grows",
            "The factor that was to lower the commitment's weight is above 1: latents shrink onto slow codes.",
            ("codes-shrink", "codebook-collapse", "term-dominates"),
            options={"fade": 1.02, "start": "random", "revive": 0, "decay": 0.999},
            minor=True,
        ),
        Fault(
            "codes-follow-held-out-pictures",
            "The codebook is updated in evaluation mode as well.",
            ("codes-polluted", "validation-pollutes"),
            changes=(
                Change(
                    "        if self.training:\n            self.update", "        if True:\n            self.update"
                ),
            ),
            case="J codes-polluted",
        ),
        Fault(
            "threshold-without-the-codes",
            "A code is dead below a twentieth of all uses, however many codes share them.",
            ("revival-threshold",),
            changes=(Change("self.threshold = 0.1 * tokens / size", "self.threshold = 0.05 * tokens"),),
            case="J revival-threshold",
        ),
        Fault(
            "commitment-forgotten",
            "The commitment is computed and never handed on.",
            ("quantiser-loss-missing",),
            changes=(
                Change(
                    'return {"reconstruction": reconstruction, "commitment": commitment}',
                    'return {"reconstruction": reconstruction}',
                ),
            ),
            case="J quantiser-loss-missing",
        ),
        Fault(
            "commitment-detached",
            "The latent is detached in the commitment, as in the codebook's loss that stood there before.",
            ("term-inert",),
            changes=(Change("(z - q.detach()).square().mean()", "(q - z.detach()).square().mean()"),),
            case="J term-inert",
        ),
        Fault(
            "fading-only-logged",
            "The commitment's weight is said to fall, and the total takes it as it was at first.",
            ("weight-not-applied",),
            changes=(
                Change(
                    "torch.stack([weights[name] * term for",
                    'torch.stack([(beta if name == "commitment" else 1.0) * term for',
                ),
            ),
            options={"fade": 0.99},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("random-start", "Most codes are dead at first, and are revived.", options={"start": "random"}),
        Healthy("adamw", options={"optimizer": "AdamW", "rate": 3e-3}),
        Healthy("momentum", options={"optimizer": "SGD", "rate": 0.05, "momentum": 0.9}),
        Healthy("warm-restarts", "The rate jumps back up every hundred steps.", options={"restart": 100}),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 512}),
        Healthy("many-codes", options={"codes": 128, "size": 64, "steps": 300}),
        Healthy("few-codes", options={"codes": 24}),
        Healthy("late-codes", "The loss jumps where codes come between encoder and decoder.", options={"after": 120}),
        Healthy("fading-commitment", "The commitment's weight falls all along.", options={"fade": 0.995}),
    ),
)
