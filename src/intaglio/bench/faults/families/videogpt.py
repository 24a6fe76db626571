"""VideoGPT (Yan et al. 2021), tiny: a VQ-VAE of clips with moving shapes, whose codes are moving averages, and beside
or after it a causal transformer over its codes that is told in which direction the shape moves.

Shapes: B clips, T tokens of a clip, D dimensions of a code; a clip is (B, 1, 8, 12, 12), its tokens 4 × 3 × 3.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import codebook
from intaglio.health.monitor import Monitor
from intaglio.history import Reading
from intaglio.history.reading import share

SIDE, FRAMES, LONG, PATCH = 12, 8, 12, (2, 4, 4)
GRID, AROUND = (4, 3, 3), (0, 1, 1)
PLACES, TOKENS, GIVEN = 9, 36, 18
MOVES = ((-2, 0), (0, 2), (2, 0), (0, -2))


def films(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A square, a disc or a cross that moves and comes back at the other side, and its direction."""
    generator = torch.Generator().manual_seed(seed)
    shape, half, way = (torch.randint(n, (count,), generator=generator) for n in (3, 2, len(MOVES)))
    start = 2 * torch.randint(SIDE // 2, (count, 2, 1), generator=generator)
    place = (start + torch.tensor(MOVES)[way][:, :, None] * torch.arange(LONG)) % SIDE
    off = (torch.arange(SIDE)[:, None, None, None] - place + SIDE // 2) % SIDE - SIDE // 2
    y, x = off.permute(2, 1, 3, 0).float()[:, :, :, :, None].unbind(0)
    x, size = x.mT, (2 + half).float()[:, None, None, None]
    square = (y.abs() <= size) & (x.abs() <= size)
    disc = y.square() + x.square() <= (size + 0.3).square()
    cross = square & ((y == 0) | (x == 0))
    mask = torch.stack([square, disc, cross])[shape, torch.arange(count)]
    bright = 0.6 + 0.4 * torch.rand(count, generator=generator)
    return torch.where(mask, bright[:, None, None, None], torch.tensor(0.1)), way


class Codebook(nn.Module):
    """Codes that start on latents and follow those that choose them; what is hardly chosen starts again on one."""

    codes: Tensor
    counts: Tensor
    sums: Tensor
    last_used: Tensor

    def __init__(self, size: int, width: int, decay: float):
        super().__init__()
        self.size, self.decay, self.updates, self.threshold = size, decay, 0, 0.0
        self.register_buffer("codes", torch.zeros(size, width))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, width))
        self.register_buffer("last_used", torch.full((size,), -1))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        flat = z.detach().flatten(0, 1)
        if self.training and not self.updates:
            self.start(flat)
        chosen = torch.cdist(flat, self.codes).argmin(1)
        q = self.codes[chosen].view_as(z)
        if self.training:
            self.follow(flat, chosen)
        return q, chosen.view(z.shape[:2])

    def start(self, flat: Tensor) -> None:
        self.codes.copy_(flat[torch.randperm(len(flat))[: self.size]])
        self.counts.fill_(len(flat) / self.size)
        self.sums.copy_(self.codes * self.counts[:, None])
        self.threshold = 0.1 * len(flat) / self.size

    def follow(self, flat: Tensor, chosen: Tensor) -> None:
        members = F.one_hot(chosen, self.size).float()
        self.counts.lerp_(members.sum(0), 1 - self.decay)
        self.sums.lerp_(members.T @ flat, 1 - self.decay)
        self.last_used[chosen] = self.updates
        self.updates += 1
        self.restart(flat, self.counts < self.threshold)
        self.codes.copy_(self.sums / self.counts[:, None])

    def restart(self, flat: Tensor, dead: Tensor) -> None:
        total = self.counts.sum()
        self.counts[dead] = total / self.size
        self.sums[dead] = flat[torch.randint(len(flat), (int(dead.sum()),))] * total / self.size
        kept = total / self.counts.sum()
        self.counts *= kept
        self.sums *= kept


class VQVAE(nn.Module):
    def __init__(self, width: int, latent: int, book: Codebook):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv3d(1, width, PATCH, PATCH), nn.BatchNorm3d(width), nn.ReLU(),
            nn.Conv3d(width, width, (1, 3, 3), 1, AROUND, padding_mode="circular"), nn.BatchNorm3d(width), nn.ReLU(),
            nn.Conv3d(width, latent, 1),
        )  # fmt: skip
        self.codebook = book
        self.decoder = nn.Sequential(
            nn.Conv3d(latent, width, (1, 3, 3), 1, AROUND, padding_mode="circular"), nn.ReLU(),
            nn.ConvTranspose3d(width, 1, PATCH, PATCH), nn.Sigmoid(),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        """(B, T, D): frame by frame, and each frame row by row."""
        return self.encoder(x).flatten(2).mT

    def decode(self, q: Tensor) -> Tensor:
        return self.decoder(q.mT.unflatten(2, GRID))

    def forward(self, x: Tensor, variance: float) -> tuple[dict[str, Tensor], Tensor]:
        z = self.encode(x)
        q, chosen = self.codebook(z)
        rebuilt = self.decode(z + (q - z).detach())
        reconstruction = (rebuilt - x).square().mean() / variance
        return {"reconstruction": reconstruction, "commitment": (z - q).square().mean()}, chosen

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tensor:
        return self.codebook(self.encode(x))[1]

    @torch.no_grad()
    def shown(self, codes: Tensor) -> Tensor:
        return self.decode(self.codebook.codes[codes])


class Prior(nn.Module):
    """A transformer that reads the direction and the codes so far, and says the next one."""

    mask: Tensor

    def __init__(self, codes: int, width: int, layers: int):
        super().__init__()
        self.way, self.code = nn.Embedding(len(MOVES), width), nn.Embedding(codes, width)
        self.start, self.place = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(TOKENS, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, codes))
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -torch.inf).triu(1))

    def forward(self, codes_BT: Tensor, way_B: Tensor) -> Tensor:
        start = self.start.expand(len(codes_BT), 1, -1)
        h = torch.cat([start, self.code(codes_BT[:, :-1])], 1) + self.way(way_B)[:, None]
        h = h + self.place
        return self.head(self.blocks(h, mask=self.mask))

    def nats(self, codes_BT: Tensor, way_B: Tensor) -> Tensor:
        """Of each code, (B, T)."""
        return F.cross_entropy(self(codes_BT, way_B).mT, codes_BT, reduction="none")

    @torch.no_grad()
    def write(self, given: Tensor, way_B: Tensor, temperature: float = 0.7) -> Tensor:
        """The codes that are given, and those after them as they are drawn."""
        codes = F.pad(given, (0, TOKENS - given.shape[1]))
        for t in range(given.shape[1], TOKENS):
            logits = self(codes, way_B)[:, t]
            codes[:, t] = torch.multinomial((logits / temperature).softmax(1), 1)[:, 0]
        return codes


def shifted(clips: Tensor) -> Tensor:
    """All frames by the same random way, around the edges."""
    down, right = (2 * torch.randint(SIDE // 2, (2,))).tolist()
    return clips.roll((down, right), (-2, -1))


@torch.no_grad()
def foretold(clips: Tensor, truth: Tensor) -> Reading:
    """How many clips have last frames that are nearer the true ones than the last frame that was given."""
    last, copied = truth[:, :, FRAMES // 2 :], truth[:, :, FRAMES // 2 - 1, None]
    error = (clips[:, :, FRAMES // 2 :] - last).square().flatten(1).mean(1)
    return share(int((error < (copied - last).square().flatten(1).mean(1)).sum()), len(clips))


def unigram(known: Tensor, held_out: Tensor, size: int) -> float:
    """Nats of a held-out code by how often each occurs."""
    counts = torch.bincount(known.flatten(), minlength=size) + 1.0
    return -float((counts / counts.sum()).log()[held_out].mean())


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(items).split(size):
            if len(rows) == size:
                yield rows


def train(
    folder: Path, seed: int = 0, steps: int = 400, first: int = 400, begins: int = 0, ramp: int = 1, size: int = 32,
    count: int = 800, rate: float = 4e-3, warm: int = 20, width: int = 32, latent: int = 8, codes: int = 32,
    decay: float = 0.95, beta: float = 0.25, wide: int = 48, layers: int = 2,
    optimizer: str = "AdamW", schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    whole, moves = films(count, seed)
    starts = (0, 2, 4)
    clips = torch.stack([whole[:, None, s : s + FRAMES] for s in starts], 1).flatten(0, 1)
    way, film = moves.repeat_interleave(len(starts)), torch.arange(count).repeat_interleave(len(starts))
    held = film % 8 == 0
    x, held_out, way_x, way_held = clips[~held], clips[held], way[~held], way[held]
    variance = float((held_out - x.mean(0)).square().mean())
    book = Codebook(codes, latent, decay)
    vqvae, prior = VQVAE(width, latent, book), Prior(codes, wide, layers)
    model = nn.ModuleDict({"vqvae": vqvae, "prior": prior})
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    course = {
        "cosine": lambda k: 0.5 + 0.5 * math.cos(math.pi * min(1.0, k / steps)),
        "restarts": lambda k: 0.52 + 0.48 * math.cos(math.pi * (3 * k / steps % 1)),
        "linear": lambda k: 1 - k / steps,
        "constant": lambda k: 1.0,
    }
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: min(1.0, (k + 1) / warm) * course[schedule](k))

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, Any]:
        clip, told = probe
        z, seen, per_step = vqvae.encode(clip), vqvae.tokens(clip), TOKENS * size
        of_codes = {
            "perplexity": codebook.perplexity(codebook.code_counts(seen, codes)),
            "norm_ratio": codebook.norm_ratio(book.codes, z.flatten(0, 1)),
            "mass_ratio": codebook.mass_ratio(book.counts, per_step),
            "dead_share": codebook.dead_share(book.last_used, book.updates - 1, per_step),
            "revival_threshold": codebook.revival_threshold(book.threshold, codes, per_step),
        }
        found: dict[str, Any] = {"val/latent": panel.latents(z.flatten(0, 1)), "val/codes": of_codes}
        found["train/codes"] = {"updates_per_step": Reading(book.updates / min(monitor.count, first), 1.0)}
        if monitor.count > begins:
            written = prior.write(seen[:48, :GIVEN], told[:48], temperature=1e-4)
            forced = torch.cat([seen[:48, :GIVEN], prior(seen[:48], told[:48]).argmax(2)[:, GIVEN:]], 1)
            shares = {"accuracy": written, "accuracy_forced": forced}
            found["val/prior"] = {name: foretold(vqvae.shown(c), clip[:48]) for name, c in shares.items()}

            def of_way(way: Tensor) -> tuple[np.ndarray, np.ndarray]:
                each = prior.nats(seen, way.long()).sum(1).double().numpy()
                return each, each

            def of_context(context: Tensor) -> np.ndarray:
                told_so = torch.cat([context.flatten(1), seen[:, -PLACES:]], 1)
                return prior.nats(told_so, told)[:, -PLACES:].sum(1).double().numpy()

            found["val/condition"] = {"permuted_loss": trials.cost_of_exchange(of_way, told.double())["shuffled"]}
            context = seen[:, :-PLACES].unflatten(1, (-1, PLACES))
            costs = trials.cost_of_context(of_context, context)
            found["val/rollout"] = {f"context_{name}": cost for name, cost in costs.items()}
        return found

    monitor = Monitor(
        model, optim, folder=folder, probe=(held_out[:128], way_held[:128]), read=read, every=50, log_every=5,
        steps=steps, nulls={"train/loss/reconstruction": 1.0, "val/loss/reconstruction": 1.0},
    )  # fmt: skip
    names = [[b"film %d" % f for f in film[side].tolist()] for side in (~held, held)]
    monitor.audit(
        augmentations={"shift": audits.augmentation(shifted, x[:64])},
        leaks={"a clip of the same film": audits.leaks(*names)},
        ranges={"pixels": audits.ranges(x, 0.0, 1.0)},
    )
    for step, rows in enumerate(batches(len(x), size), 1):
        model.train()
        clip = shifted(x[rows])
        weighted: dict[str, tuple[Tensor, float]] = {}
        if step <= first:
            terms, chosen = vqvae(clip, variance)
            weighted["reconstruction"] = (terms["reconstruction"], 1.0)
            weighted["commitment"] = (terms["commitment"], beta)
        else:
            chosen = vqvae.requires_grad_(False).eval().tokens(clip)
        weight = min(1.0, max(0, step - begins) / ramp)
        weighted["prior"] = (prior.nats(chosen, way_x[rows]).mean(), weight)
        loss = torch.stack([weight * term for term, weight in weighted.values()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        loss.backward()
        monitor.step({**weighted, "total": loss}, rows)
        optim.step()
        rates.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                of_held, seen = vqvae(held_out, variance)
                known = vqvae(x[:512], variance)[1]
                null = unigram(known, seen, codes)
                nats = Reading(float(prior.nats(seen, way_held).mean()), null)
                of_known = Reading(float(prior.nats(known, way_x[:512]).mean()), null)
            error = float(of_held["reconstruction"])
            if step <= first:
                monitor.validated({f"val/loss/{name}": float(term) for name, term in of_held.items()})
                monitor.validated({"psnr": -10 * math.log10(error * variance)})
            if step > begins:
                monitor.log({"train/prior/nats_per_token": of_known, "val/prior/nats_per_token": nats})
                monitor.validated({"val/loss/prior": nats})
        if step == steps:
            break

    model.eval()
    written = prior.write(seen[:96, :GIVEN], way_held[:96], temperature=1e-4)
    continued = foretold(vqvae.shown(written), held_out[:96])
    monitor.close()
    return {
        "explained variance of held-out clips": (1 - error, 0.0),
        "nats a held-out code that the prior saves": (null - nats.value, 0.0),
        "continued clips nearer the truth than the last frame given": (continued.value, 0.5),
    }


FAMILY = Family(
    "videogpt",
    "judged",
    "a VQ-VAE of short clips with moving shapes, and a causal prior over its codes that is told the direction",
    faults=(
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out clips move the codes and the normalisation's statistics.",
            ("validation-pollutes", "codes-polluted"),
            changes=(Change("            model.eval()\n            with", "            with"),),
        ),
        Fault(
            "mask-one-too-late",
            "The mask begins at the second diagonal, but codes are shifted already: each is read before it is said.",
            ("free-running-gap",),
            changes=(Change(".triu(1)", ".triu(2)"),),
        ),
        Fault(
            "beta-forgotten-in-the-sum",
            "The commitment is logged with its weight, and added without it.",
            ("weight-not-applied",),
            changes=(Change("torch.stack([weight * term for", "torch.stack([term for"),),
        ),
        Fault(
            "prior-not-in-the-optimizer",
            "The optimizer is that of the time before there was a prior, and holds the VQ-VAE alone.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=rate)", "(vqvae.parameters(), lr=rate)"),),
        ),
        Fault(
            "threshold-of-all-uses",
            "A code is dead below a tenth of all uses and not of its share, and there are thirty-two of them.",
            ("revival-threshold",),
            changes=(Change("0.1 * len(flat) / self.size", "0.1 * len(flat)"),),
        ),
        Fault(
            "clips-around-zero",
            "The loader takes a half from every pixel, as the published one does, and the decoder ends in a sigmoid.",
            ("range-mismatch",),
            changes=(Change("s : s + FRAMES] for", "s : s + FRAMES] - 0.5 for"),),
        ),
        Fault(
            "clips-dealt-to-the-splits",
            "Every eighth clip is held out, not every eighth film, whose clips overlap.",
            ("split-leak",),
            changes=(Change("held = film % 8 == 0", "held = torch.arange(len(film)) % 8 == 0"),),
        ),
        Fault(
            "each-frame-shifted-by-itself",
            "The random shift is drawn anew for each frame, so that nothing moves in any direction.",
            ("context-order-inert", "condition-ignored"),
            changes=(Change("= shifted(x[rows])", "= torch.stack([shifted(f) for f in x[rows].unbind(2)], 2)"),),
        ),
        Fault(
            "warm-up-in-epochs",
            "The warm-up's twenty steps are taken for epochs, and the run has not so many.",
            ("learning-rate-off",),
            changes=(Change("(k + 1) / warm)", "(k + 1) / (warm * (len(x) // size)))"),),
            options={"schedule": "constant"},
        ),
        Fault(
            "positions-never-added",
            "The prior has an embedding for each place, and forward goes past it.",
            ("dead-parameters",),
            changes=(Change("        h = h + self.place\n", ""),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy(
            "one-after-the-other",
            "The prior begins when the VQ-VAE is done, and the total is another one from there on.",
            options={"steps": 400, "first": 160, "begins": 160, "schedule": "constant", "rate": 3e-3},
            seeds=(0, 1, 2),
        ),
        Healthy("prior-later", "The prior's weight is 0 at first.", options={"begins": 100}, seeds=(0, 1, 2)),
        Healthy("ramp", "The total rises while the prior's weight does.", options={"ramp": 150}, seeds=(0, 1)),
        Healthy("adam-constant", options={"optimizer": "Adam", "schedule": "constant", "rate": 3e-3}, seeds=(0, 1)),
        Healthy("rmsprop-linear", options={"optimizer": "RMSprop", "schedule": "linear", "rate": 1e-3}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-films", "A small set of films, seen often.", options={"count": 320, "wide": 32}, seeds=(0, 1, 2)),
        Healthy("many-codes", "More codes than such clips need.", options={"codes": 64}, seeds=(0, 1)),
        Healthy("slow-codes", "The codes lag behind the encoder at first.", options={"decay": 0.99}, seeds=(0, 1)),
    ),
)
