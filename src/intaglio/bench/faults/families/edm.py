"""A diffusion model of small pictures of shapes as Karras et al. 2022 have it (EDM), told what to draw by a caption.

The denoiser is an MLP-mixer (Tolstikhin et al. 2021) whose blocks are scaled, shifted and gated (Peebles & Xie 2023).
Captions are dropped for guidance (Ho & Salimans 2022); samples are drawn without chance (Song et al. 2021).

Shapes: B batch, N items, T patches, d width, L words; x = y + σ·ε, so that the SNR is (SIGMA_DATA / σ)².
"""

import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, LENGTH, PAD, ROWS, WORDS, Pictures, pictures, sentences
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import samples
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

MEAN, STD, SIGMA_DATA = 0.094, 0.146, 0.5
"""Of pictures in [0, 1]; the deviation of scaled ones."""
LOWEST, HIGHEST = 0.002, 80.0
"""Noise levels between which samples are drawn."""
WAVE = torch.exp(torch.linspace(0, math.log(60), 16))
EDGES = torch.tensor([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
"""Of bins of log-SNR, whose centres are −7, −5, …, 7."""


def pooled(known: Pictures) -> Tensor:
    """(N, 3, 8, 8) in [0, 1]."""
    return F.avg_pool2d(known.images, 2)


def scaled(pixels: Tensor) -> Tensor:
    return (pixels - MEAN) / STD * SIGMA_DATA


def captions(known: Pictures, longest: int) -> tuple[Tensor, int]:
    """(N, L) int64, and how many lost their ends."""
    whole = sentences(known.factors)
    return whole[:, :longest], int((whole[:, longest:] != PAD).any(1).sum())


def zero(layer: nn.Linear) -> nn.Linear:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Block(nn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.told = zero(nn.Linear(width, 6 * width))
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BTd: Tensor, told_Bd: Tensor) -> Tensor:
        scale, shift, gate, scale_2, shift_2, gate_2 = self.told(F.silu(told_Bd))[:, None].chunk(6, dim=-1)
        normed = F.layer_norm(x_BTd, x_BTd.shape[-1:])
        x_BTd = x_BTd + gate * self.across((normed * (1 + scale) + shift).mT).mT
        normed = F.layer_norm(x_BTd, x_BTd.shape[-1:])
        return x_BTd + gate_2 * self.within(normed * (1 + scale_2) + shift_2)


class Denoiser(nn.Module):
    """F of EDM, which is scaled to have inputs and targets of variance 1. No caption is one of padding alone."""

    def __init__(self, width: int = 64, blocks: int = 3):
        super().__init__()
        self.level = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.words = nn.Embedding(len(WORDS), width, padding_idx=PAD)
        self.caption = nn.Linear(width, width)
        self.enter = nn.Linear(12, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.body = nn.ModuleList([Block(16, width) for _ in range(blocks)])
        self.leave = zero(nn.Linear(width, 12))

    def forward(self, x: Tensor, sigma_B: Tensor, ids_BL: Tensor) -> Tensor:
        angle = sigma_B.log()[:, None] / 4 * WAVE
        told = self.level(torch.cat([angle.sin(), angle.cos()], 1)) + self.caption(self.words(ids_BL).sum(1))
        x = x / (SIGMA_DATA**2 + sigma_B.view(-1, 1, 1, 1) ** 2).sqrt()
        h = self.enter(F.pixel_unshuffle(x, 2).flatten(2).mT) + self.place
        for block in self.body:
            h = block(h, told)
        h = self.leave(F.layer_norm(h, h.shape[-1:]))
        return F.pixel_shuffle(h.mT.unflatten(2, (4, 4)), 2)


def denoised(model: nn.Module, x: Tensor, sigma_B: Tensor, ids_BL: Tensor) -> Tensor:
    """D of EDM, the guess of the clean picture."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    whole = SIGMA_DATA**2 + sigma**2
    return SIGMA_DATA**2 / whole * x + SIGMA_DATA * sigma / whole.sqrt() * model(x, sigma_B, ids_BL)


def weight_of(sigma: Tensor) -> Tensor:
    return (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2


def errors(model: nn.Module, y: Tensor, ids_BL: Tensor, sigma_B: Tensor, noise: Tensor) -> Tensor:
    """Each item's squared error, weighted so that it is of size 1 at every level, (B,)."""
    guess = denoised(model, y + sigma_B.view(-1, 1, 1, 1) * noise, sigma_B, ids_BL)
    return weight_of(sigma_B) * (guess - y).square().flatten(1).mean(1)


def drawn(count: int, mean: float, std: float) -> Tensor:
    """Noise levels to train on."""
    return (mean + std * torch.randn(count)).exp()


def ladder(steps: int, rho: float = 7.0) -> Tensor:
    """Noise levels to sample at, and 0, (steps + 1,)."""
    k = torch.linspace(0, 1, steps)
    high, low = HIGHEST ** (1 / rho), LOWEST ** (1 / rho)
    return torch.cat([(high + k * (low - high)) ** rho, torch.zeros(1)])


@torch.no_grad()
def sample(model: nn.Module, ids_BL: Tensor, guidance: float, steps: int = 12) -> Tensor:
    """Pictures of these captions, (B, 3, 8, 8)."""
    x = HIGHEST * torch.randn(len(ids_BL), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for now, then in pairwise(ladder(steps)):
        clean = denoised(model, x, now.expand(len(x)), ids_BL)
        if guidance != 1:
            without = denoised(model, x, now.expand(len(x)), torch.full_like(ids_BL, PAD))
            clean = without + guidance * (clean - without)
        x = clean + then / now * (x - clean)
    return (x / SIGMA_DATA * STD + MEAN).clamp(0, 1)


class Judge(nn.Module):
    """A classifier of real pictures, for all that is in them; its features describe a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
        self.heads = nn.ModuleList([nn.Linear(64, n) for n in (3, len(COLOURS), 2, len(ROWS), 3)])

    def says(self, x: Tensor, factor: int) -> Tensor:
        return self.heads[factor](self.features(x)).argmax(1)

    @classmethod
    def trained(cls, known: Pictures, steps: int = 150) -> "Judge":
        judge, x = cls(), pooled(known)
        optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
        for _ in range(steps):
            rows = torch.randint(len(x), (128,))
            features = judge.features(x[rows])
            said = zip(judge.heads, known.factors[rows].T, strict=True)
            loss = torch.stack([F.cross_entropy(head(features), right) for head, right in said]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return judge.eval()


@torch.no_grad()
def judged(judge: Judge, model: nn.Module, pixels: Tensor, held_out: Tensor, held_ids: Tensor, factors: Tensor,
           guidance: float) -> tuple[panel.Panel, float]:  # fmt: skip
    """What is drawn at several guidance weights beside held-out pictures; the share that is in the row asked for."""
    label = factors[:, 1]
    rows = torch.cat([(label == k).nonzero()[:50, 0] for k in range(len(COLOURS))])
    asked, ids = label[rows], held_ids[rows]
    real = judge.features(held_out)
    found, placed = panel.Panel({}, {}), 0.0
    found.add("val/judge", {"accuracy": share(int((judge.says(held_out, 1) == label).sum()), len(label), 1 / 4)})
    found.add("val/guidance", {"used": Reading(guidance)})
    for weight in sorted({1.0, 3.0, guidance}):
        made = sample(model, ids, weight)
        features = judge.features(made)
        clipped = [float(((x < 2 / 255) | (x > 253 / 255)).float().mean()) for x in (made, held_out)]
        contrast = float(made.std((1, 2, 3)).mean() / held_out.std((1, 2, 3)).mean())
        varied = [samples.diversity(real[label == k], features[asked == k]) for k in range(len(COLOURS))]
        each = [m.value for m in varied if isinstance(m, Reading)]
        found.add(f"val/guidance.{weight:g}", {
            "class_accuracy": share(int((judge.says(made, 1) == asked).sum()), len(made), 1 / 4),
            "clipped_share": Reading(clipped[0], clipped[1], len(made)),
            "contrast_ratio": Reading(contrast, 1.0, len(made)),
            "diversity": Reading(sum(each) / max(1, len(each)), 1.0, len(made)),
        })  # fmt: skip
        if weight == guidance:
            placed = float((judge.says(made, 3) == factors[rows, 3]).float().mean())
            found.add("val/samples", {
                "frechet_distance": samples.frechet_distance(real, features),
                "copied_share": samples.copied_share(judge.features(pixels), real, features),
            })  # fmt: skip
    return found, placed


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(items)[: items // size * size].split(size)


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 3072, rate: float = 4e-3,
    width: int = 64, blocks: int = 3, drop: float = 0.15, guidance: float = 2.0, decay: float = 0.97,
    optimizer: str = "Adam", schedule: str = "constant", warmup: int = 10, mean: float = -1.2, std: float = 1.2,
    longest: int = LENGTH,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unknown = pictures(items, seed), pictures(384, 10_000 + seed)
    pixels, held_out = pooled(known), pooled(unknown)
    y, held_y = scaled(pixels), scaled(held_out)
    (ids, cut), (held_ids, _) = captions(known, longest), captions(unknown, longest)
    judge = Judge.trained(pictures(3072, 20_000 + seed))
    model = Denoiser(width, blocks)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    course = {
        "constant": lambda k: 1.0,
        "cosine": lambda k: 0.5 + 0.5 * math.cos(math.pi * k / steps),
        "restarts": lambda k: 0.55 + 0.45 * math.cos(math.pi * (4 * k / steps % 1)),
    }
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: course[schedule](k) * min((k + 1) / warmup, 1.0))
    many = drawn(20_000, mean, std)
    noise, sigma = torch.randn(held_y.shape), many[: len(held_y)]
    even = SIGMA_DATA * torch.linspace(-4, 4, len(held_y))[torch.randperm(len(held_y))].exp()
    of_many, of_even = (torch.bucketize(2 * (SIGMA_DATA / s).log(), EDGES) for s in (many, even))
    variance = y.var(0).flatten()

    def guess(sigma_N: Tensor) -> float:
        """The error of the best linear guess of each number from itself."""
        left = 1 / (1 / variance + 1 / sigma_N[:, None] ** 2)
        return float((weight_of(sigma_N) * left.mean(1)).mean())

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, dict[str, Measured]]:
        clean, right = probe
        s, eps = sigma[: len(clean)], noise[: len(clean)]

        def loss(told: Tensor) -> tuple[Any, Any]:
            each = errors(model, clean, told.long(), s, eps).double().numpy()
            return each, each

        noisy = clean + s.view(-1, 1, 1, 1) * eps
        own, other = (model(noisy, s, told).flatten(1) for told in (right, right.roll(1, 0)))
        change = float(((own - other).norm(dim=1) / own.norm(dim=1).clamp(min=1e-12)).mean())
        cost = trials.cost_of_exchange(loss, right.double())["shuffled"]
        here, there = (float(errors(m, clean, right, s, eps).mean()) for m in (model, averaged.module))
        ends = (nn.utils.parameters_to_vector(m.parameters()) for m in (averaged.module, model))
        gone = [float((end - start).norm()) for end in ends]
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {"velocity_change": Reading(change, 0.0, len(clean)), "permuted_loss": cost},
            "val/ema": {"loss": Reading(there, here, len(clean)), "moved": Reading(gone[0] / max(gone[1], 1e-12), 1.0)},
            "train/noise": {"terminal_snr": Reading((SIGMA_DATA / HIGHEST) ** 2, 0.0)},
        }
        for name, deviation in zip(("red", "green", "blue"), held_y.std((0, 2, 3)), strict=True):
            found[f"val/pixels.{name}"] = {"scaled_std": Reading(float(deviation) / SIGMA_DATA, 1.0)}
        part_K = [float((of_many == k).float().mean()) for k in range(8)]
        return found | {f"train/log_snr.{2 * k - 7}": {"weight": Reading(p, 1 / 8)} for k, p in enumerate(part_K)}

    nulls = dict.fromkeys(("train/loss/denoising", "val/loss/denoising"), guess(many))
    nulls |= {f"val/log_snr.{2 * k - 7}/loss": guess(even[of_even == k]) for k in range(8)}
    monitor = Monitor(model, optim, folder=folder, probe=(held_y[:128], held_ids[:128]), read=read, every=50,
                      log_every=5, steps=steps, nulls=nulls)  # fmt: skip
    monitor.audit(
        intake={"items": items, "lost": {f"captions cut to {longest} words": cut}},
        ranges={"pixels": audits.ranges(pixels, 0.0, 1.0)},
        leaks={"pictures": audits.leaks(pixels.numpy(), held_out.numpy())},
    )
    for step, rows in enumerate(batches(items, size), 1):
        model.train()
        told = torch.where((torch.rand(size) < drop)[:, None], PAD, ids[rows])
        loss = errors(model, y[rows], told, drawn(size, mean, std), torch.randn(size, 3, 8, 8)).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step({"denoising": loss}, (y[rows], told))
        if step % 5 == 0:
            monitor.log({"train/condition/dropped_share": float((told == PAD).all(1).float().mean())})
        optim.step()
        rates.step()
        averaged.update_parameters(model)
        if step % 50 == 0:
            with monitor.validation(), torch.no_grad():
                model.eval()
                live = copy.deepcopy(model.state_dict())
                model.load_state_dict(averaged.module.state_dict())
                error = float(errors(model, held_y, held_ids, sigma, noise).mean())
                each = errors(model, held_y, held_ids, even, noise)
                model.load_state_dict(live)
            monitor.validated({"val/loss/denoising": error})
            monitor.validated({f"val/log_snr.{2 * k - 7}/loss": float(each[of_even == k].mean()) for k in range(8)})
        if step == steps:
            break
    torch.save(averaged.module.state_dict(), folder / "average.pt")
    state = torch.load(folder / "average.pt")
    artist = Denoiser(width, blocks).eval()
    artist.load_state_dict(state)
    monitor.audit(loaded=audits.loaded(artist, state))
    found, placed = judged(judge, artist, pixels, held_out, held_ids, unknown.factors, guidance)
    monitor.validated(found.readings)
    monitor.close()
    with torch.no_grad():
        error = float(errors(artist, held_y, held_ids, even, noise).mean())
    coloured = found.readings[f"val/guidance.{guidance:g}/class_accuracy"].value
    return {
        "share of the held-out error that the best linear guess makes, less": (1 - error / guess(even), 0.0),
        "samples that show the colour asked for": (coloured, 1 / 4),
        "samples in the row asked for": (placed, 1 / 3),
    }


FAMILY = Family(
    "edm",
    "development",
    "a diffusion model of pixels in the manner of EDM, told captions; an MLP-mixer",
    faults=(
        Fault(
            "average-under-other-names",
            "The averaging wrapper's state, whose names all begin with “module.”, is saved, and loaded not strictly.",
            ("partial-load",),
            case="D partial-load",
            changes=(
                Change("torch.save(averaged.module.state_dict(), ", "torch.save(averaged.state_dict(), "),
                Change("artist.load_state_dict(state)", "artist.load_state_dict(state, strict=False)"),
            ),
        ),
        Fault(
            "levels-drawn-evenly",
            "Noise levels are drawn evenly from lowest to highest, so that hardly any is of little noise.",
            ("high-noise-starved",),
            changes=(Change("(mean + std * torch.randn(count)).exp()", "LOWEST + HIGHEST * torch.rand(count)"),),
            minor=True,
        ),
        Fault(
            "divided-by-255-twice",
            "The pictures are in [0, 1] as they come, and are divided by 255 once more.",
            ("range-mismatch", "latent-scale"),
            changes=(Change("F.avg_pool2d(known.images, 2)", "F.avg_pool2d(known.images, 2) / 255"),),
        ),
        Fault(
            "captions-cut",
            "Captions are cut to five words, and all that follows the shape is lost.",
            ("data-replaced",),
            options={"longest": 5},
        ),
        Fault(
            "gate-and-last-layer-zero",
            "Beside the gates, the last layer of each branch begins at 0, too, so that neither ever has a gradient.",
            ("dead-parameters",),
            changes=(
                Change("nn.Linear(2 * tokens, tokens))", "zero(nn.Linear(2 * tokens, tokens)))"),
                Change("nn.Linear(2 * width, width))", "zero(nn.Linear(2 * width, width)))"),
            ),
        ),
        Fault(
            "average-left-in-the-model",
            "Held-out pictures are looked at with the averaged weights, and the live ones are never put back.",
            ("validation-pollutes",),
            changes=(Change("                model.load_state_dict(live)\n", ""),),
        ),
        Fault(
            "warm-up-without-end",
            "The rate's warm-up lacks its upper end, so that the rate rises to forty times what was meant.",
            ("learning-rate-off",),
            changes=(Change("min((k + 1) / warmup, 1.0)", "(k + 1) / warmup"),),
            minor=True,
        ),
        Fault(
            "gradients-emptied-before-the-step",
            "zero_grad() stands between backward and the step, so that no weight ever moves.",
            ("dead-parameters", "not-in-optimizer", "no-learning", "plateau"),
            changes=(
                Change("        optim.zero_grad()\n", ""),
                Change("        optim.step()\n", "        optim.zero_grad()\n        optim.step()\n"),
            ),
        ),
        Fault(
            "guided-away",
            "The two guesses have changed places in the guidance, which leads away from what the caption asks for.",
            ("unfaithful",),
            changes=(Change("without + guidance * (clean - without)", "clean + guidance * (without - clean)"),),
        ),
        Fault(
            "mask-the-wrong-way-round",
            "The comparison is turned round, so that 85 % of captions are dropped and 15 % are told.",
            ("null-mismatch",),
            changes=(Change("torch.rand(size) < drop", "torch.rand(size) > drop"),),
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 96, "blocks": 2}),
        Healthy("sgd", "Momentum alone needs another rate.", options={"optimizer": "SGD", "rate": 0.2}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "cosine"}),
        Healthy("warm-restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}),
        Healthy("never-dropped", "No caption is dropped, and none is guided.", options={"drop": 0.0, "guidance": 1.0}),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 640}, seeds=(0, 1)),
        Healthy("levels-of-edm2", "More noise, and levels nearer to each other.", options={"mean": -0.4, "std": 1.0}),
    ),
)
