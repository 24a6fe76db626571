"""A small diffusion transformer in the latents of a frozen autoencoder, told the colour and the column of a shape.

Peebles & Xie 2023; the cosine schedule of Nichol & Dhariwal 2021, the velocity of Salimans & Ho 2022, guidance (Ho &
Salimans 2022), an average of the weights, sampling without chance (Song et al. 2021). The autoencoder is trained first.

Shapes: B batch, N items, L noise levels, T = 16 places of C channels, of which 2 × 2 are a token; d width.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import moments, samples
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

NAMES = [f"{colour}, {column}" for colour in COLOURS for column in COLUMNS]
CLASSES, PLACES = len(NAMES), 16
WAVE = torch.exp(-math.log(10_000) * torch.arange(32) / 32)
EDGES = torch.tensor([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
"""Of bins of log-SNR, whose centres are −7, −5, …, 7."""


def pooled(images: Tensor) -> Tensor:
    """(N, 3, 8, 8) in −1 to 1."""
    return F.avg_pool2d(images, 2) * 2 - 1


class Autoencoder(nn.Module):
    """Pictures (N, 3, 8, 8) in −1 to 1 to latents (N, T, C), each channel of mean 0 and deviation 1, and back."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, width), nn.GELU(), nn.Linear(width, channels))
        self.decoder = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, 12))
        self.centre, self.spread = (nn.Parameter(x, False) for x in (torch.zeros(channels), torch.ones(channels)))

    def encode(self, x: Tensor) -> Tensor:
        return (self.encoder(F.pixel_unshuffle(x, 2).flatten(2).mT) - self.centre) / self.spread

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(self.decoder(z * self.spread + self.centre).mT.unflatten(2, (4, 4)), 2)

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        raw = self.encode(x)
        self.centre.copy_(raw.mean((0, 1)))
        self.spread.copy_(raw.std((0, 1)))


def fit(module: nn.Module, loss: Callable[[Tensor], Tensor], items: int, steps: int, size: int) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=4e-3)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(items, (size,))).backward()
        optimizer.step()
        course.step()


@torch.no_grad()
def encoded(autoencoder: Autoencoder, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (N, T, C) and their classes."""
    latents, labels = list[Tensor](), list[Tensor]()
    for rows in torch.arange(len(x)).split(64):
        latents += [autoencoder.encode(x[rows])]
        labels += [label[rows]]
    return torch.cat(latents), torch.cat(labels)


class Levels:
    """The noise levels: ``signal`` and ``noise`` (L,), their squares adding up to 1."""

    def __init__(self, count: int):
        t = torch.arange(count + 1, dtype=torch.float64) / count
        left = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        kept = (1 - (1 - left[1:] / left[:-1]).clamp(max=0.999)).cumprod(0)
        self.count, self.snr = count, (kept / (1 - kept)).float()
        self.signal, self.noise = kept.sqrt().float(), (1 - kept).sqrt().float()
        self.bin = torch.bucketize(self.snr.log(), EDGES)

    def at(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.signal[t_B].view(-1, 1, 1), self.noise[t_B].view(-1, 1, 1)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU("tanh"), nn.Linear(3 * width, width))
        self.told = nn.Linear(width, 6 * width)

    def forward(self, x_BTd: Tensor, told_Bd: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.told(F.silu(told_Bd))[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x_BTd, x_BTd.shape[-1:]) * (1 + scale) + shift
        x_BTd = x_BTd + gate * self.attention(h, h, h, need_weights=False)[0]
        h = F.layer_norm(x_BTd, x_BTd.shape[-1:]) * (1 + scale_2) + shift_2
        return x_BTd + gate_2 * self.mlp(h)


class DiT(nn.Module):
    """The velocity at z and t. The last class is that of no class, for which others are dropped in training."""

    def __init__(self, channels: int, width: int, blocks: int, drop: float):
        super().__init__()
        self.drop = drop
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width)
        self.enter = nn.Linear(4 * channels, width)
        self.place = nn.Parameter(0.02 * torch.randn(1, 4, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.last = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, 4 * channels)
        for name, p in self.named_parameters():
            if name.startswith(("last.", "leave.")) or ".told." in name:
                nn.init.zeros_(p)

    def forward(self, z: Tensor, time_B: Tensor, label_B: Tensor) -> Tensor:
        if self.training and self.drop:
            dropped = torch.rand(len(label_B)) < self.drop
            label_B = torch.where(dropped, CLASSES, label_B)
        angle = 1000 * time_B[:, None] * WAVE
        told = self.time(torch.cat([angle.cos(), angle.sin()], 1)) + self.label(label_B)
        h = self.enter(z.unflatten(1, (2, 2, 2, 2)).transpose(2, 3).flatten(3).flatten(1, 2)) + self.place
        for block in self.blocks:
            h = block(h, told)
        shift, scale = self.last(F.silu(told))[:, None].chunk(2, dim=-1)
        h = self.leave(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        return h.unflatten(2, (2, 2, -1)).unflatten(1, (2, 2)).transpose(2, 3).flatten(1, 4)


def errors(model: nn.Module, levels: Levels, z: Tensor, label_B: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
    """Each item's mean squared error of the velocity, (B,)."""
    a, s = levels.at(t_B)
    guess = model(a * z + s * noise, t_B / levels.count, label_B)
    return (guess - (a * noise - s * z)).square().mean((1, 2))


@torch.no_grad()
def sample(model: nn.Module, levels: Levels, label_B: Tensor, channels: int, weight: float, steps: int = 10) -> Tensor:
    """Latents of these classes, (B, T, C)."""
    z = torch.randn(len(label_B), PLACES, channels, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(levels.count - 1, 0, steps).round().long()
    for k in range(steps):
        now = t[k].expand(len(z))
        v = model(z, now / levels.count, label_B)
        if weight != 1:
            without = model(z, now / levels.count, torch.full_like(label_B, CLASSES))
            v = without + weight * (v - without)
        a, s = levels.at(now)
        z, noise = a * z - s * v, s * z + a * v
        if k < steps - 1:
            a, s = levels.at(t[k + 1].expand(len(z)))
            z = a * z + s * noise
    return z


class Judge(nn.Module):
    """A classifier of real pictures, for all that is in them; its features describe a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
        self.heads = nn.ModuleList([nn.Linear(64, n) for n in (3, len(COLOURS), 2, 3, len(COLUMNS))])

    def classes(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.heads[1](features).argmax(1) * 3 + self.heads[4](features).argmax(1)

    def loss(self, x: Tensor, factors: Tensor) -> Tensor:
        features = self.features(x)
        return torch.stack([F.cross_entropy(h(features), k) for h, k in zip(self.heads, factors.T, strict=True)]).sum()


@torch.no_grad()
def judged(judge: Judge, model: nn.Module, levels: Levels, autoencoder: Autoencoder, channels: int, train: Tensor,
           held_out: Tensor, label: Tensor, guidance: float) -> panel.Panel:  # fmt: skip
    """Pictures that are drawn at several guidance weights, and given back, beside held-out ones."""
    numbers = {name: k for k, name in enumerate(NAMES)}
    wanted = torch.arange(CLASSES).repeat(50)
    asked = torch.tensor([numbers[name] for name in NAMES])[wanted]
    real, back = judge.features(held_out), autoencoder.decode(autoencoder.encode(held_out))
    spread = (held_out - train.mean(0)).square().sum()
    found = panel.Panel({}, {})
    accuracy = share(int((judge.classes(held_out) == label).sum()), len(label), 1 / CLASSES)
    found.add("val/judge", {"accuracy": accuracy})
    found.add("val/guidance", {"used": Reading(guidance)})
    found.add("val/round_trip", {"r2": Reading(1 - float((back - held_out).square().sum() / spread), 0.0, len(back))})
    apart = samples.frechet_distance(real, judge.features(back), paired=True)
    found.add("val/round_trip", {"frechet_distance": apart})
    for weight in sorted({1.0, guidance}):
        made = autoencoder.decode(sample(model, levels, asked, channels, weight)).clamp(-1, 1)
        drawn = judge.features(made)
        clipped = [float((x.abs() > 1 - 4 / 255).float().mean()) for x in (made, held_out)]
        contrast = [float(x.std((1, 2, 3)).mean()) for x in (made, held_out)]
        varied = [samples.diversity(real[label == k], drawn[wanted == k]) for k in range(CLASSES)]
        each = [m.value for m in varied if isinstance(m, Reading)]
        found.add(f"val/guidance.{weight:g}", {
            "class_accuracy": share(int((judge.classes(made) == wanted).sum()), len(made), 1 / CLASSES),
            "clipped_share": Reading(clipped[0], clipped[1], len(made)),
            "contrast_ratio": Reading(contrast[0] / contrast[1], 1.0, len(made)),
            "diversity": Reading(sum(each) / max(1, len(each)), 1.0, len(made)),
        })  # fmt: skip
        if weight == guidance:
            copied = samples.copied_share(judge.features(train), real, drawn)
            apart = samples.frechet_distance(real, drawn)
            found.add("val/samples", {"frechet_distance": apart, "copied_share": copied})
    return found


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(items)[: items // size * size].split(size)


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    done, up = step / steps, min(1.0, (step + 1) / warmup)
    if schedule == "restarts":
        return up * (0.55 + 0.45 * math.cos(math.pi * (4 * done % 1)))
    return up * {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "constant": 1.0}[schedule]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 2048, rate: float = 4e-3,
    channels: int = 8, width: int = 96, blocks: int = 2, drop: float = 0.1, guidance: float = 2.0, decay: float = 0.98,
    optimizer: str = "AdamW", schedule: str = "cosine", warmup: int = 20, count: int = 1000, bad: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    whole, factors = pictures(items + 512, seed)
    classes, order = factors[:, 1] * 3 + factors[:, 4], torch.randperm(items + 512)
    here, there = order[512:], order[:512]
    pixels, label, held_out, held_label = pooled(whole[here]), classes[here], pooled(whole[there]), classes[there]
    judge, (seen, factors) = Judge(), pictures(4096, 20_000 + seed)
    fit(judge, lambda k: judge.loss(pooled(seen[k]), factors[k]), 4096, 150, 128)
    folder.mkdir(parents=True, exist_ok=True)
    trained = Autoencoder(channels)
    fit(trained, lambda k: F.mse_loss(trained.decode(trained.encode(pixels[k])), pixels[k]), items, 700, 64)
    trained.standardise(pixels)
    torch.save(trained.state_dict(), folder / "autoencoder.pt")

    state = torch.load(folder / "autoencoder.pt")
    frozen = Autoencoder(channels).requires_grad_(False).eval()
    frozen.load_state_dict(state)
    z, told = encoded(frozen, pixels, label)
    held_z, held_told = encoded(frozen, held_out, held_label)
    levels = Levels(count)
    model = DiT(channels, width, blocks, drop)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01 * (optimizer == "AdamW")},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optim = getattr(torch.optim, optimizer)(groups, lr=rate, **({"momentum": 0.9} if optimizer == "SGD" else {}))
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    fixed = torch.Generator().manual_seed(0)
    fixed_t = torch.randint(count, (len(held_z),), generator=fixed)
    fixed_noise = torch.randn(held_z.shape, generator=fixed)
    variance = z.var(0)
    squares = zip(levels.signal**2, levels.noise**2, strict=True)
    null_L = torch.stack([(variance / (a * variance + s)).mean() for a, s in squares])

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, dict[str, Measured]]:
        clean, right = probe
        t, eps = fixed_t[: len(clean)], fixed_noise[: len(clean)]

        def loss(other: Tensor) -> tuple[Any, Any]:
            each = errors(model, levels, clean, other.long(), t, eps).double().numpy()
            return each, each

        a, s = levels.at(t)
        own, other = (model(a * clean + s * eps, t / count, k).flatten(1) for k in (right, (right + 1) % CLASSES))
        change = float(((own - other).norm(dim=1) / own.norm(dim=1).clamp(min=1e-12)).mean())
        cost = trials.cost_of_exchange(loss, right.double())["shuffled"]
        live, slow = (float(errors(m, levels, clean, right, t, eps).mean()) for m in (model, averaged))
        gone = [float((nn.utils.parameters_to_vector(m.parameters()) - start).norm()) for m in (averaged.module, model)]
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {"velocity_change": Reading(change, 0.0, len(clean)), "permuted_loss": cost},
            "val/ema": {"loss": Reading(slow, live, len(clean)), "moved": Reading(gone[0] / max(gone[1], 1e-12), 1.0)},
            "val/latent": {"clamped_share": moments.cut_share(held_z.flatten(0, 1).T)},
            "train/noise": {"terminal_snr": Reading(float(levels.snr[-1]), 0.0)},
        }
        stds = held_z.std((0, 1)).tolist()
        found |= {f"val/latent.{k}": {"scaled_std": Reading(std, 1.0)} for k, std in enumerate(stds)}
        for k in bins:
            part = float((levels.bin == k).float().mean())
            found[f"train/log_snr.{2 * k - 7}"] = {"weight": Reading(part, 1 / len(bins))}
        return found

    fixed_bin, null_N = levels.bin[fixed_t], null_L[fixed_t]
    bins = fixed_bin.unique().tolist()
    nulls = {"train/loss/velocity": float(null_L.mean()), "val/loss/velocity": float(null_N.mean())}

    def by_bin(each_N: Tensor) -> dict[str, float]:
        return {f"val/log_snr.{2 * k - 7}/loss": float(each_N[fixed_bin == k].mean()) for k in bins}

    monitor = Monitor(
        model, optim, folder=folder, probe=(held_z[:96], held_told[:96]), read=read, every=50, log_every=5,
        steps=steps, nulls=nulls | by_bin(null_N),
    )  # fmt: skip
    leaks = {"pictures": audits.leaks(pixels.numpy(), held_out.numpy())}
    monitor.audit(loaded=audits.loaded(frozen, state), leaks=leaks)
    for step, rows in zip(range(1, steps + 1), batches(len(z), size), strict=False):
        model.train()
        clean = 6 * z[rows] if step == bad else z[rows]
        t = torch.randint(count, (size,))
        loss = errors(model, levels, clean, told[rows], t, torch.randn(clean.shape)).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step({"velocity": loss}, (clean, told[rows]))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        rates.step()
        averaged.update_parameters(model)
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                each = errors(model, levels, held_z, held_told, fixed_t, fixed_noise)
            error = float(each.mean())
            monitor.validated({"val/loss/velocity": error, "explained": 1 - error} | by_bin(each))
    found = judged(judge, averaged, levels, frozen, channels, pixels, held_out, held_label, guidance)
    monitor.validated(found.readings)
    monitor.close()
    with torch.no_grad():
        error = float(errors(averaged, levels, held_z, held_told, fixed_t, fixed_noise).mean())
    accuracy = found.readings[f"val/guidance.{guidance:g}/class_accuracy"].value
    return {
        "share of the held-out error that the best linear guess makes, less": (1 - error / float(null_L.mean()), 0.0),
        "samples that show colour and column": (accuracy, 1 / CLASSES),
        "variance that the autoencoder gives back": (found.readings["val/round_trip/r2"].value, 0.0),
    }


FAMILY = Family(
    "dit", "development", "a diffusion transformer in the latents of an autoencoder, told colour and column",
    faults=(
        Fault("latents-never-standardised", "Mean and deviation of the latents are never taken, so both stay 0 and 1.",
              ("latent-scale",), changes=(Change("    trained.standardise(pixels)\n", ""),)),
        Fault("average-stepped-once-an-epoch",
              "The average of the weights, whose decay is meant for steps, is stepped once an epoch.", ("ema-lag",),
              minor=True,
              changes=(Change("averaged.update", "if step % (items // size) == 0:\n            averaged.update"),)),
        Fault("classes-in-the-files-order",
              "The cache of latents is filled in a shuffled order, and the classes stay in that of the files.",
              ("condition-ignored",),
              changes=(Change("torch.arange(len(x)).split", "torch.randperm(len(x)).split"),
                       Change("torch.cat(latents), torch.cat(labels)", "torch.cat(latents), label"))),
        Fault("dropped-for-the-first-class",
              "Dropped classes become the first one, and what samples are guided away from was never trained.",
              ("null-mismatch",), changes=(Change("(dropped, CLASSES, label_B)", "(dropped, 0, label_B)"),)),
        Fault("matrices-in-no-group",
              "Parameters are grouped by their dimensions for weight decay, and a slip leaves all matrices out.",
              ("not-in-optimizer",), changes=(Change("if p.ndim > 1]", "if p.ndim > 2]"),)),
        Fault("places-never-added", "The tokens' places are parameters of the model, and never added to the tokens.",
              ("dead-parameters",), minor=True, changes=(Change(" + self.place\n", "\n"),)),
        Fault("rates-stepped-once-an-epoch",
              "The schedule counts in steps and is stepped once an epoch, so the run ends amid the rate's warm-up.",
              ("learning-rate-off",),
              changes=(Change("rates.step()", "if step % (items // size) == 0:\n            rates.step()"),)),
        Fault("cache-of-the-last-batch",
              "The cache of latents is overwritten by each batch, so sixty-four pictures are all that is trained on.",
              ("data-replaced", "memorised", "overfitting"),
              changes=(Change("latents += [", "latents = ["), Change("labels += [", "labels = ["))),
        Fault("autoencoder-under-other-names",
              "The autoencoder is saved as torch.compile wraps it, with “_orig_mod.” before all names, and not loaded.",
              ("partial-load", "round-trip-ceiling"),
              changes=(Change("save(trained.state_dict()", "save(torch.compile(trained).state_dict()"),
                       Change("frozen.load_state_dict(state)", "frozen.load_state_dict(state, strict=False)"))),
        Fault("held-out-drawn-again",
              "The held-out pictures are drawn with an order of their own, so most of them are trained on, too.",
              ("split-leak",), changes=(Change("order[:512]", "torch.randperm(items + 512)[:512]"),)),
        Fault("names-sorted-by-the-sampler",
              "The sampler counts the classes in alphabetical order, and training in that of the list.",
              ("unfaithful",), changes=(Change("enumerate(NAMES)", "enumerate(sorted(NAMES))"),)),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 128}, seeds=(0, 1)),
        Healthy("deep", options={"blocks": 4, "width": 64}, seeds=(0, 1)),
        Healthy("sgd", "Slow at first.", options={"optimizer": "SGD", "rate": 1.5, "steps": 600}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 3e-3}, seeds=(0, 1)),
        Healthy("adam", options={"optimizer": "Adam", "rate": 2e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("linear", options={"schedule": "linear", "warmup": 40}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 640}, seeds=(0, 1)),
        Healthy("small-batches", options={"size": 32, "rate": 4e-3, "steps": 600}, seeds=(0, 1)),
        Healthy("never-dropped", "None is guided, either.", options={"drop": 0.0, "guidance": 1.0}, seeds=(0, 1)),
        Healthy("one-bad-batch", "Its latents are six times too large.", options={"bad": 250}, seeds=(0, 1)),
    ),
)  # fmt: skip
