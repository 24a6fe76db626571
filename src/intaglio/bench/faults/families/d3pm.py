"""Discrete diffusion (D3PM, Austin et al. 2021) of small pictures of nine colours, told in which colour to draw.

A token is kept, or replaced by the mask or by any colour; the bound is in nats a token, beside a cross-entropy with a
small weight. The network is a small DiT (Peebles & Xie 2023) on patches of 2 × 2 tokens; colours are dropped for
guidance (Ho & Salimans 2022), weights are averaged, and samples drawn backwards through the levels, some left out.

Shapes: B batch, N items, T tokens of a picture, patch by patch, S states, of which the last is the mask.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, RGB, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import samples
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

HUES = NONE = len(COLOURS)
PALETTE = torch.cat([torch.full((1, 3), 0.05), 0.4 * RGB, RGB])
"""Dark, each hue dim, each hue bright."""
TOKENS, PAINTS, STATES, MASK = 64, len(PALETTE), len(PALETTE) + 1, len(PALETTE)
WAVE = torch.exp(torch.linspace(0, math.log(100), 16))
EDGES = torch.tensor([-2.0, 0.0, 2.0])
"""Of bins of log-SNR, log(kept / replaced), whose centres are −3, −1, 1, 3."""


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of two shapes in one colour, (N, T) ids of the palette, and that colour, (N,); none twice."""
    one, two = pictures(count, seed), pictures(count, 50_000 + seed)
    bright = [F.avg_pool2d(known.images, 2).amax(1) for known in (one, two)]
    light, colour = torch.bucketize(torch.maximum(*bright), torch.tensor([0.15, 0.55])), one.factors[:, 1]
    paint = torch.where(light > 0, 1 + HUES * (light - 1) + colour[:, None, None], 0)
    ids = paint.view(-1, 4, 2, 4, 2).transpose(2, 3).flatten(1)
    rows = torch.unique(torch.cat([colour[:, None], ids], 1), dim=0)
    return rows[:, 1:], rows[:, 0]


class Noise:
    """``kept`` (levels + 1,): the share of tokens that are left at each; ``place`` (S,): what others become."""

    def __init__(self, levels: int, course: str, kernel: str):
        k = torch.arange(levels + 1, dtype=torch.float64) / levels
        kept = torch.cos(math.pi / 2 * k) if course == "cosine" else 1 - k
        self.levels, self.kept = levels, kept.float()
        self.bin = torch.bucketize(self.kept.logit(), EDGES)
        self.snr = self.kept / (1 - self.kept)
        mask = F.one_hot(torch.tensor(MASK), STATES).float()
        self.place = mask if kernel == "absorbing" else (1 - mask) / PAINTS

    def pure(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.multinomial(self.place, count * TOKENS, True, generator=generator).view(count, TOKENS)

    def spoilt(self, x: Tensor, t_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        keep = torch.rand(x.shape, generator=generator) < self.kept[t_B][:, None]
        return torch.where(keep, x, self.pure(len(x), generator))

    def before(self, noisy: Tensor, clean: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """q at the lower level s, given the noisy tokens and the chances of each clean one, (B, T, S)."""
        kept = self.kept[s_B].view(-1, 1, 1)
        since = self.kept[t_B].view(-1, 1, 1) / kept
        ahead = since * F.one_hot(noisy, STATES) + (1 - since) * self.place[noisy][..., None]
        return F.normalize(ahead * (kept * clean + (1 - kept) * self.place), 1, -1)


class Block(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.told = nn.Linear(width, 6 * width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.told.weight)
        nn.init.zeros_(self.told.bias)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift, gate, scale_2, shift_2, gate_2 = self.told(F.silu(told))[:, None].chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        x = x + gate * self.dropout(self.attention(h, h, h, need_weights=False)[0])
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale_2) + shift_2
        return x + gate_2 * self.dropout(self.mlp(h))


class DiT(nn.Module):
    """Logits of each clean token, (B, T, PAINTS). The last colour is that of none."""

    def __init__(self, width: int, layers: int, drop: float, dropout: float):
        super().__init__()
        self.drop = drop
        self.level = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.colour = nn.Embedding(HUES + 1, width)
        self.tokens = nn.Embedding(STATES, 16)
        self.enter = nn.Linear(64, width)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * PAINTS))

    def dropped(self, colour_B: Tensor) -> Tensor:
        """In training some are told none."""
        gone = torch.rand(len(colour_B)) < self.drop
        return torch.where(gone, NONE, colour_B) if self.training else colour_B

    def forward(self, noisy: Tensor, time_B: Tensor, colour_B: Tensor) -> Tensor:
        angle = time_B[:, None] * WAVE
        told = self.level(torch.cat([angle.sin(), angle.cos()], 1)) + self.colour(colour_B)
        x = self.enter(self.tokens(noisy).view(-1, 16, 64)) + self.place
        for block in self.blocks:
            x = block(x, told)
        return self.leave(x).view(-1, TOKENS, PAINTS)


def log(chance: Tensor) -> Tensor:
    return chance.clamp_min(1e-12).log()


def nats(noise: Noise, x: Tensor, noisy: Tensor, t_B: Tensor, clean: Tensor) -> Tensor:
    """The bound, by this level alone, nats a token of each item, (B,); ``clean`` are the guessed chances."""
    right, guess = (noise.before(noisy, c, t_B, t_B - 1) for c in (F.one_hot(x, STATES), F.pad(clean, (0, 1))))
    return noise.levels * (right * (log(right) - log(guess))).sum(-1).mean(1)


def terms(model: nn.Module, noise: Noise, x: Tensor, noisy: Tensor, t_B: Tensor, colour_B: Tensor) -> list[Tensor]:
    """The bound, and the cross-entropy of all tokens, nats a token of each item, (B,)."""
    logits = model(noisy, t_B / noise.levels, colour_B)
    denoising = F.cross_entropy(logits.mT, x, reduction="none").mean(1)
    return [nats(noise, x, noisy, t_B, logits.softmax(-1)), denoising]


def alone(noise: Noise, noisy: Tensor, t_B: Tensor, frequencies: Tensor) -> Tensor:
    """What each token says of itself, given how frequent each colour is at its place, (B, T, PAINTS)."""
    kept = noise.kept[t_B].view(-1, 1, 1)
    chance = kept * F.one_hot(noisy, STATES)[..., :PAINTS] + (1 - kept) * noise.place[noisy][..., None]
    return F.normalize(chance * frequencies, 1, -1)


@torch.no_grad()
def sample(model: nn.Module, noise: Noise, colour_B: Tensor, guidance: float, steps: int = 10) -> Tensor:
    """Pictures in these colours, (B, T)."""
    generator = torch.Generator().manual_seed(0)
    x = noise.pure(len(colour_B), generator)
    for now, then in pairwise(torch.linspace(noise.levels, 0, steps + 1).round().long().tolist()):
        t, s = torch.full_like(colour_B, now), torch.full_like(colour_B, then)
        given = model(x, t / noise.levels, colour_B).log_softmax(-1)
        if guidance != 1:
            none = model(x, t / noise.levels, torch.full_like(colour_B, NONE)).log_softmax(-1)
            given = none + guidance * (given - none)
        chance = noise.before(x, F.pad(given.softmax(-1), (0, 1)), t, s)
        x = torch.multinomial(chance.flatten(0, 1), 1, generator=generator).view_as(x)
    return x


def hue(ids: Tensor) -> Tensor:
    """Which colour most of what is not dark has, (N,); that of none where all is dark."""
    lit = torch.stack([((ids > 0) & ((ids - 1) % HUES == k)).sum(1) for k in range(HUES)], 1)
    return torch.where(lit.any(1), lit.argmax(1), NONE)


def judged(model: nn.Module, noise: Noise, train: Tensor, ids: Tensor, colour: Tensor, used: float) -> panel.Panel:
    """What is drawn at several guidance weights, beside held-out pictures."""
    asked, found = torch.arange(HUES).repeat(50), panel.Panel({}, {})
    known, real = PALETTE[train].flatten(1), PALETTE[ids].flatten(1)
    found.add("val/judge", {"accuracy": share(int((hue(ids) == colour).sum()), len(colour), 1 / HUES)})
    found.add("val/guidance", {"used": Reading(used)})
    for weight in sorted({1.0, 3.0, used}):
        drawn = sample(model, noise, asked, weight)
        made = PALETTE[drawn].flatten(1)
        varied = [samples.diversity(real[colour == k], made[asked == k]) for k in range(HUES)]
        each = [m.value for m in varied if isinstance(m, Reading)]
        found.add(f"val/guidance.{weight:g}", {
            "class_accuracy": share(int((hue(drawn) == asked).sum()), len(drawn), 1 / HUES),
            "contrast_ratio": Reading(float(made.std(1).mean() / real.std(1).mean()), 1.0, len(drawn)),
            "diversity": Reading(sum(each) / len(each), 1.0, len(drawn)),
        })  # fmt: skip
        if weight == used:
            found.add("val/samples", {"copied_share": samples.copied_share(known, real, made)})
            found.add("val/samples", {"neighbour_ratio": samples.neighbour_ratio(known, real, made)})
    return found


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / (steps - warmup))
    if schedule in ("cosine", "restarts"):
        return 0.55 + 0.45 * math.cos(math.pi * (done if schedule == "cosine" else done * 4 % 1))
    return 1 - done if schedule == "linear" else 1.0


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters())


def train(
    folder: Path, seed: int = 0, steps: int = 350, size: int = 32, items: int = 2048, rate: float = 3e-3,
    width: int = 48, layers: int = 2, dropout: float = 0.0, drop: float = 0.15, guidance: float = 2.0,
    decay: float = 0.98, average: bool = True, optimizer: str = "AdamW", pull: float = 0.01, schedule: str = "cosine",
    warmup: int = 20, levels: int = 40, course: str = "linear", kernel: str = "absorbing", even: bool = True,
    beside: float = 0.05, begin: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    everything, colours = scenes(items + 400, seed)
    order = torch.randperm(len(everything))
    held_out, held_colour = everything[order[:256]], colours[order[:256]]
    x, colour = everything[order[256 : 256 + items]], colours[order[256 : 256 + items]]
    noise = Noise(levels, course, kernel)
    model = DiT(width, layers, drop, dropout)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()
    start = vector(model).detach().clone()
    matrices, rest = [p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": pull}, {"params": rest, "weight_decay": 0.0}]
    optim = getattr(torch.optim, optimizer)(groups, lr=rate, **({"momentum": 0.9} if optimizer == "SGD" else {}))
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    fixed_t = (torch.arange(256) * levels // 256 + 1)[torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    fixed_noisy = noise.spoilt(held_out, fixed_t, torch.Generator().manual_seed(0))
    bins, fixed_bin, hidden = noise.bin[1:].unique().tolist(), noise.bin[fixed_t], fixed_noisy != held_out
    frequencies = F.one_hot(x, PAINTS).sum(0) + 0.1
    guess = alone(noise, fixed_noisy, fixed_t, frequencies)
    each_null = nats(noise, held_out, fixed_noisy, fixed_t, guess)
    missed = F.nll_loss(log(F.normalize(frequencies, 1, -1)).expand(256, -1, -1).mT, held_out)
    nulls = {"bound": float(each_null.mean()), "denoising": float(missed)}
    nulls |= {f"val/log_snr.{2 * k - 3}/loss": float(each_null[fixed_bin == k].mean()) for k in bins}
    counts = torch.zeros(4)

    def read(model: Any, probe: tuple[Tensor, ...]) -> dict[str, dict[str, Measured]]:
        ids, noisy, t, right = probe

        def loss(told: Tensor) -> tuple[Any, Any]:
            each = terms(model, noise, ids, noisy, t, told.long())[0].double().numpy()
            return each, each

        own, other = (model(noisy, t / levels, k).softmax(-1) for k in (right, (right + 1) % HUES))
        change = float((own - other).norm() / own.norm())
        cost = trials.cost_of_exchange(loss, right.double())["shuffled"]
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {"velocity_change": Reading(change, 0.0, len(ids)), "permuted_loss": cost},
            "train/noise": {"terminal_snr": Reading(float(noise.snr[-1]), 0.0)},
        }
        for k in bins:
            found[f"train/log_snr.{2 * k - 3}"] = {"weight": Reading(float(counts[k] / counts.sum()), 1 / len(bins))}
        if average:
            here, there = (float(terms(m, noise, ids, noisy, t, right)[0].mean()) for m in (model, averaged))
            slow, fast = (float((vector(m) - start).norm()) for m in (averaged, model))
            found["val/ema"] = {"loss": Reading(there, here), "moved": Reading(slow / max(fast, 1e-12), 1.0)}
        return found

    probe = tuple(part[:128] for part in (held_out, fixed_noisy, fixed_t, held_colour))
    often: dict[str, Any] = {"every": 50, "log_every": 5, "steps": steps}
    monitor = Monitor(model, optim, folder=folder, probe=probe, read=read, nulls=nulls, **often)
    monitor.audit(leaks={"the very same picture": audits.leaks(list(x.numpy()), list(held_out.numpy()))})
    for step in range(1, steps + 1):
        model.train()
        rows = torch.randint(len(x), (size,))
        u = (torch.rand(()) + torch.arange(size) / size) % 1 if even else torch.rand(size)
        t = (u * levels).long() + 1
        counts += torch.bincount(noise.bin[t], minlength=4)
        told = model.dropped(colour[rows])
        bound, denoising = (part.mean() for part in terms(model, noise, x[rows], noise.spoilt(x[rows], t), t, told))
        weight = beside if step > begin else 0.0
        loss = bound + weight * denoising
        optim.zero_grad()
        loss.backward()
        monitor.step({"bound": (bound, 1.0), "denoising": (denoising, weight), "total": loss}, (x[rows], told))
        if step % 5 == 0:
            monitor.log({"train/condition/dropped_share": float((told == NONE).float().mean())})
        optim.step()
        rates.step()
        if average:
            averaged.update_parameters(model)
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                each, other = terms(model, noise, held_out, fixed_noisy, fixed_t, held_colour)
                right = model(fixed_noisy, fixed_t / levels, held_colour).argmax(-1) == held_out
            monitor.validated({"val/loss/bound": float(each.mean()), "val/loss/denoising": float(other.mean())})
            monitor.validated({f"val/log_snr.{2 * k - 3}/loss": float(each[fixed_bin == k].mean()) for k in bins})
            monitor.validated({"val/tokens/accuracy_as_logged": float(right[hidden].float().mean())})
            monitor.validated({"val/tokens/token_accuracy": share(int((right & hidden).sum()), int(hidden.sum()))})
    used = (averaged if average else model).eval()
    found = judged(used, noise, x, held_out, held_colour, guidance)
    monitor.validated(found.readings)
    monitor.close()
    with torch.no_grad():
        reached = float(terms(used, noise, held_out, fixed_noisy, fixed_t, held_colour)[0].mean())
    shown = found.readings[f"val/guidance.{guidance:g}/class_accuracy"].value
    return {
        "share of the bound of frequencies at each place that is saved": (1 - reached / nulls["bound"], 0.0),
        "samples that show the colour asked for": (shown, 1 / HUES),
    }


FAMILY = Family(
    "d3pm",
    "development",
    "discrete diffusion of small pictures of nine colours, a small transformer of patches",
    faults=(
        Fault(
            "logarithm-of-nothing",
            "The logarithm has no floor, and chances of the true posterior are exactly 0.",
            ("non-finite",),
            changes=(Change("chance.clamp_min(1e-12).log()", "chance.log()"),),
        ),
        Fault(
            "colours-left-behind",
            "Double pictures are removed by a function that sorts them, and their colours keep the old order.",
            ("condition-ignored", "unfaithful"),
            changes=(
                Change("rows = torch.unique(torch.cat([colour[:, None], ids], 1), dim=0)", "rows = ids.unique(dim=0)"),
                Change("return rows[:, 1:], rows[:, 0]", "return rows, colour[: len(rows)]"),
            ),
        ),
        Fault(
            "levels-as-bert-masks",
            "Three tokens in twenty are masked at most, as BERT does, and samples begin with masks alone.",
            ("high-noise-starved", "schedule-mismatch"),
            changes=(Change("(u * levels).long() + 1", "(0.15 * u * levels).long() + 1"),),
        ),
        Fault(
            "betas-of-a-thousand-levels",
            "The betas of a thousand levels of Gaussian diffusion are taken for forty: most tokens outlast the last.",
            ("schedule-mismatch",),
            changes=(Change("else 1 - k\n", "else (1 - 0.02 * k).cumprod(0)\n"),),
            minor=True,
        ),
        Fault(
            "branches-exchanged",
            "Guidance takes the step from what was asked to nothing asked, so that it leads away from the colour.",
            ("unfaithful",),
            changes=(Change("none + guidance * (given - none)", "given + guidance * (none - given)"),),
        ),
        Fault(
            "training-mode-once",
            "model.train() was forgotten after the first look at held-out pictures, so no colour is dropped any more.",
            ("null-mismatch",),
            changes=(Change("        model.train()\n", ""),),
            minor=True,
        ),
        Fault(
            "average-of-a-long-run",
            "The average's decay was meant for a million steps; samples are drawn with what is nearly the start.",
            ("ema-lag",),
            options={"decay": 0.9999},
            minor=True,
        ),
        Fault(
            "schedule-stepped-at-each-look",
            "The schedule is stepped in the block of the held-out look, so that its warm-up lasts all the run.",
            ("learning-rate-off",),
            changes=(
                Change("        rates.step()\n", ""),
                Change("            model.eval()\n", "            rates.step()\n            model.eval()\n"),
            ),
        ),
        Fault(
            "given-tokens-counted",
            "The accuracy counts all tokens, also those that are not masked and can be copied.",
            ("flattering-accuracy",),
            changes=(Change("float(right[hidden].float().mean())", "float(right.float().mean())"),),
        ),
        Fault(
            "places-in-no-group",
            "Weight decay is for matrices alone, and the embedding of the places, of three dimensions, is in no group.",
            ("not-in-optimizer",),
            changes=(Change("p.ndim >= 2]", "p.ndim == 2]"),),
        ),
        Fault(
            "split-with-replacement",
            "The order for the split is drawn with replacement, so that pictures stand on both sides.",
            ("split-leak",),
            changes=(Change("torch.randperm(len(everything))", "torch.randint(len(everything), (len(everything),))"),),
        ),
    ),
    healthy=(
        Healthy("plain", "The bound of a single level jumps.", seeds=(0, 1, 2, 3)),
        Healthy("any-colour", "What is not kept becomes any colour.", options={"kernel": "uniform"}, seeds=(0, 1, 2)),
        Healthy("cosine-course", options={"course": "cosine"}, seeds=(0, 1)),
        Healthy("two-hundred-levels", options={"levels": 200}, seeds=(0, 1)),
        Healthy(
            "levels-by-lot", "The bound jumps more.", options={"even": False, "size": 20, "rate": 2e-3}, seeds=(0, 1)
        ),
        Healthy("sgd", "Momentum alone needs another rate.", options={"optimizer": "SGD", "rate": 0.1, "pull": 0.0}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear", "pull": 0.0}),
        Healthy("warm-restarts", "The rate jumps back up four times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("constant-rate", options={"schedule": "constant", "average": False, "rate": 2e-3}, seeds=(0, 1, 2)),
        Healthy("never-dropped", "No colour is dropped, and none guided.", options={"drop": 0.0, "guidance": 1.0}),
        Healthy("beside-later", "Its weight is 0 at first.", options={"beside": 0.5, "begin": 100}, seeds=(0, 1)),
        Healthy("few-items", "A small set, with dropout.", options={"items": 512, "dropout": 0.1}, seeds=(0, 1)),
        Healthy("wide", options={"width": 72, "rate": 2e-3, "optimizer": "Adam", "pull": 0.0}),
    ),
)
