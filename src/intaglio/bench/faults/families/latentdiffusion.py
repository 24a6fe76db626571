"""A latent diffusion model as tutorials have it, of small pictures of shapes, told the colour and the row of a shape.

Rombach et al. 2022: an autoencoder with a hint of KL is trained first, and its latents are scaled to deviation 1. Then
convolutions that attend to words learn to remove noise from them: the levels of Lin et al. 2023, the velocity of
Salimans & Ho 2022, words dropped for guidance (Ho & Salimans 2022). The monitor watches the second stage.

Shapes: B batch, N items, T = 1000 noise levels, S = 8 pixels a side, C channels of 4 × 4 latents, d width, 2 words.
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
from intaglio.bench.faults.data import COLOURS, ROWS, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import bottleneck, samples
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

CLASSES, NOTHING = len(COLOURS) * len(ROWS), len(COLOURS) + len(ROWS)
"""NOTHING is the word that stands for both where they are dropped."""
WAVE = torch.exp(torch.linspace(0, math.log(1000), 16))
EDGES = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0])
"""Of bins of log-SNR, whose centres are −5, −3, …, 5."""


def pooled(images: Tensor) -> Tensor:
    """(N, 3, S, S) in −1 to 1."""
    return F.avg_pool2d(images, 2) * 2 - 1


class Residual(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Autoencoder(nn.Module):
    """Pictures (N, 3, S, S) in −1 to 1 to a normal distribution of latents (N, C, 4, 4), and back."""

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 2, 2), Residual(width), nn.Conv2d(width, 2 * channels, 1))
        last = nn.GroupNorm(4, width), nn.SiLU(), nn.ConvTranspose2d(width, 3, 2, 2)
        self.decoder = nn.Sequential(nn.Conv2d(channels, width, 1), Residual(width), *last)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.encode(x)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
        return {"reconstruction": F.mse_loss(self.decoder(drawn(mean, log_variance)), x), "kl": kl}


def drawn(mean: Tensor, log_variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return mean + torch.randn(mean.shape, generator=generator) * (0.5 * log_variance).exp()


class Levels:
    """The noise levels: ``signal`` and ``noise`` (T,), their squares adding up to 1; at the last there is no signal."""

    def __init__(self, count: int = 1000):
        roots = torch.linspace(0.00085**0.5, 0.012**0.5, count, dtype=torch.float64)
        kept = (1 - roots.square()).cumprod(0).sqrt()
        kept = (kept - kept[-1]) * kept[0] / (kept[0] - kept[-1])
        self.count, self.signal, self.noise = count, kept.float(), (1 - kept.square()).sqrt().float()
        self.snr = self.signal.square() / self.noise.square()
        self.bin = torch.bucketize(self.snr.log(), EDGES)

    def at(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.signal[t_B].view(-1, 1, 1, 1), self.noise[t_B].view(-1, 1, 1, 1)


def words_of(numbers_N2: Tensor) -> Tensor:
    """Those of a colour and a row, which are counted after the colours."""
    return numbers_N2 + torch.tensor([0, len(COLOURS)])


class Block(nn.Module):
    """A residual block that is told the time, and one that attends to the words."""

    def __init__(self, width: int, told: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.time = nn.Linear(told, width)
        self.second = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.norm, self.words = nn.GroupNorm(4, width), nn.Linear(told, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        for p in (*self.second[-1].parameters(), *self.attention.out_proj.parameters()):
            nn.init.zeros_(p)

    def forward(self, x: Tensor, time_Bd: Tensor, words_B2d: Tensor) -> Tensor:
        x = x + self.second(self.first(x) + self.time(F.silu(time_Bd))[:, :, None, None])
        h, said = self.norm(x).flatten(2).mT, self.words(words_B2d)
        h = self.attention(h, said, said, need_weights=False)[0]
        return x + h.mT.unflatten(2, x.shape[2:])


class Denoiser(nn.Module):
    """The velocity at z and t, told two words."""

    def __init__(self, channels: int, width: int, told: int = 64):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, told), nn.SiLU(), nn.Linear(told, told))
        self.words = nn.Embedding(NOTHING + 1, told)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width, told) for _ in range(2)])
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, z: Tensor, time_B: Tensor, words_B2: Tensor) -> Tensor:
        angle = time_B[:, None] * WAVE
        time, words, h = self.time(torch.cat([angle.sin(), angle.cos()], 1)), self.words(words_B2), self.enter(z)
        for block in self.blocks:
            h = block(h, time, words)
        return self.leave(h)


def heard(net: nn.Module, words_B2: Tensor, drop: float) -> Tensor:
    """The words that the network is told; in training some items are told none."""
    return torch.where(torch.rand(len(words_B2), 1) < drop, NOTHING, words_B2) if net.training else words_B2


def errors(net: nn.Module, levels: Levels, z: Tensor, words_B2: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
    """Each item's mean squared error of the velocity, (B,)."""
    a, s = levels.at(t_B)
    guess = net(a * z + s * noise, t_B / levels.count, words_B2)
    return (guess - (a * noise - s * z)).square().flatten(1).mean(1)


@torch.no_grad()
def sample(net: nn.Module, levels: Levels, words_B2: Tensor, channels: int, weight: float, strides: int) -> Tensor:
    """Scaled latents of what these words say, (B, C, 4, 4), by deterministic steps (Song et al. 2021)."""
    z = torch.randn(len(words_B2), channels, 4, 4, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(levels.count - 1, 0, strides + 1).round().long()
    for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        time_B = torch.full((len(z),), now / levels.count)
        v = net(z, time_B, words_B2)
        if weight != 1:
            without = net(z, time_B, torch.full_like(words_B2, NOTHING))
            v = without + weight * (v - without)
        a, s = levels.signal[now], levels.noise[now]
        clean, noise = a * z - s * v, s * z + a * v
        z = levels.signal[then] * clean + levels.noise[then] * noise
    return z


class Judge(nn.Module):
    """A classifier of real pictures, for all that is in them; its features describe a picture."""

    def __init__(self, images: Tensor, factors: Tensor, steps: int = 200):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
        self.heads = nn.ModuleList([nn.Linear(64, n) for n in (3, len(COLOURS), 2, len(ROWS), 3)])
        optim = torch.optim.Adam(self.parameters(), lr=2e-3)
        for rows in torch.randint(len(images), (steps, 128)):
            features, right = self.features(pooled(images[rows])), factors[rows].T
            optim.zero_grad()
            each = [F.cross_entropy(head(features), k) for head, k in zip(self.heads, right, strict=True)]
            torch.stack(each).sum().backward()
            optim.step()

    def numbers(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return torch.stack([self.heads[k](features).argmax(1) for k in (1, 3)], 1)


@torch.no_grad()
def judged(judge: Judge, draw: Callable[[Tensor, float], Tensor], train: Tensor, held_out: Tensor, right: Tensor,
           guidance: float) -> panel.Panel:  # fmt: skip
    """Pictures that are drawn at several guidance weights, beside held-out ones."""
    kinds = torch.cartesian_prod(torch.arange(len(COLOURS)), torch.arange(len(ROWS)))
    wanted, real, found = kinds.repeat(50, 1), judge.features(held_out), panel.Panel({}, {})
    known = int((judge.numbers(held_out) == right).all(1).sum())
    found.add("val/judge", {"accuracy": share(known, len(right), 1 / CLASSES)})
    found.add("val/guidance", {"used": Reading(guidance)})
    for weight in dict.fromkeys((1.0, guidance)):
        made = draw(words_of(wanted), weight)
        features = judge.features(made)
        clipped = [float((x.abs() > 1 - 4 / 255).float().mean()) for x in (made, held_out)]
        contrast = [float(x.std((1, 2, 3)).mean()) for x in (made, held_out)]
        of_kind = [samples.diversity(real[(right == kinds[k]).all(1)], features[k::CLASSES]) for k in range(CLASSES)]
        each = [m.value for m in of_kind if isinstance(m, Reading)]
        found.add(f"val/guidance.{weight:g}", {
            "class_accuracy": share(int((judge.numbers(made) == wanted).all(1).sum()), len(made), 1 / CLASSES),
            "clipped_share": Reading(clipped[0], clipped[1], len(made)),
            "contrast_ratio": Reading(contrast[0] / contrast[1], 1.0, len(made)),
            "diversity": Reading(sum(each) / max(1, len(each)), 1.0, len(made)),
        })  # fmt: skip
    copied = samples.copied_share(judge.features(train), real, features)
    found.add("val/samples", {"frechet_distance": samples.frechet_distance(real, features), "copied_share": copied})
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
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 2048, rate: float = 3e-3,
    first_steps: int = 500, channels: int = 8, width: int = 32, beta: float = 1e-6, drop: float = 0.1,
    guidance: float = 1.5, strides: int = 8, decay: float = 0.98, optimizer: str = "AdamW", schedule: str = "cosine",
    warmup: int = 20, bad: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known = pictures(items + 512, seed, noise=0.02)
    whole, numbers = pooled(known.images), known.factors[:, [1, 3]]
    x, held_out = whole.split([items, 512])
    words, held_words = words_of(numbers).split([items, 512])
    sets = {"first stage": x, "second stage": x}
    judge = Judge(*pictures(4096, 20_000 + seed, noise=0.02))

    first = Autoencoder(channels)
    first_optim = torch.optim.Adam(first.parameters(), lr=8e-3, betas=(0.9, 0.99))
    first_rates = torch.optim.lr_scheduler.CosineAnnealingLR(first_optim, first_steps, 1e-5)
    for _, rows in zip(range(first_steps), batches(len(sets["first stage"]), 64), strict=False):
        terms = first.terms(sets["first stage"][rows])
        first_optim.zero_grad()
        (terms["reconstruction"] + beta * terms["kl"]).backward()
        first_optim.step()
        first_rates.step()

    first.requires_grad_(False).eval()
    mean, log_variance = first.encode(sets["second stage"])
    centre, scale = mean.mean((0, 2, 3), keepdim=True), 1 / drawn(mean, log_variance).std((0, 2, 3), keepdim=True)
    held_mean, held_log_variance = first.encode(held_out)
    fixed = torch.Generator().manual_seed(0)
    held_z = scale * (drawn(held_mean, held_log_variance, fixed) - centre)
    fixed_t = torch.randint(1000, (len(held_z),), generator=fixed)
    fixed_noise = torch.randn(held_z.shape, generator=fixed)

    levels = Levels()
    net = Denoiser(channels, width)
    slow = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()
    begin = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    more = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.01}}.get(optimizer, {})
    optim = getattr(torch.optim, optimizer)(net.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    variance = scale[0] ** 2 * (mean.var(0) + log_variance.exp().mean(0))
    squares = zip(levels.signal**2, levels.noise**2, strict=True)
    null_T = torch.stack([(variance / (a * variance + s)).mean() for a, s in squares])
    fixed_bin, bins, drawn_T = levels.bin[fixed_t], levels.bin.unique().tolist(), torch.zeros(levels.count)

    def by_bin(each_N: Tensor) -> dict[str, float]:
        return {f"val/log_snr.{2 * k - 5}/loss": float(each_N[fixed_bin == k].mean()) for k in bins}

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, dict[str, Measured]]:
        z, right = probe
        t, eps = fixed_t[: len(z)], fixed_noise[: len(z)]

        def loss(told: Tensor) -> tuple[Any, Any]:
            each = errors(model, levels, z, told.long(), t, eps).double().numpy()
            return each, each

        a, s = levels.at(t)
        own, other = (model(a * z + s * eps, t / levels.count, k).flatten(1) for k in (right, right.roll(1, 0)))
        change = float(((own - other).norm(dim=1) / own.norm(dim=1).clamp(min=1e-12)).mean())
        cost = trials.cost_of_exchange(loss, right.double())["shuffled"]
        live, averaged = (float(errors(m, levels, z, right, t, eps).mean()) for m in (model, slow))
        gone = [float((nn.utils.parameters_to_vector(m.parameters()) - begin).norm()) for m in (slow.module, model)]
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {"velocity_change": Reading(change, 0.0, len(z)), "permuted_loss": cost},
            "val/ema": {"loss": Reading(averaged, live, len(z)), "moved": Reading(gone[0] / max(gone[1], 1e-12), 1.0)},
            "train/noise": {"terminal_snr": Reading(float(levels.snr[-1]), 0.0)},
        }
        for k in bins:
            part = float(drawn_T[levels.bin == k].sum() / drawn_T.sum())
            found[f"train/log_snr.{2 * k - 5}"] = {"weight": Reading(part, 1 / len(bins))}
        return found

    nulls = {"train/loss/velocity": float(null_T.mean()), "val/loss/velocity": float(null_T[fixed_t].mean())}
    monitor = Monitor(
        net, optim, folder=folder, probe=(held_z[:128], held_words[:128]), read=read, every=50, log_every=5,
        steps=steps, nulls=nulls | by_bin(null_T[fixed_t]),
    )  # fmt: skip
    monitor.audit(leaks={name: audits.leaks(seen.numpy(), held_out.numpy()) for name, seen in sets.items()})
    back = first.decoder(held_mean)
    r2 = 1 - float((back - held_out).square().sum() / (held_out - x.mean(0)).square().sum())
    apart = samples.frechet_distance(judge.features(held_out), judge.features(back), paired=True)
    found = panel.Panel({}, {})
    found.add("val/round_trip", {"r2": Reading(r2, 0.0, len(back)), "frechet_distance": apart})
    found.add("val/first_stage", {"kl_nats": bottleneck.kl_nats(held_mean, held_log_variance)})
    for k, std in enumerate(held_z.std((0, 2, 3)).tolist()):
        found.add(f"val/latents.{k}", {"scaled_std": Reading(std, 1.0)})
    monitor.validated(found.readings)

    for step, rows in zip(range(1, steps + 1), batches(len(mean), size), strict=False):
        net.train()
        z = scale * (drawn(mean[rows], log_variance[rows]) - centre) * (6 if step == bad else 1)
        told, t = heard(net, words[rows], drop), torch.randint(levels.count, (size,))
        loss = errors(net, levels, z, told, t, torch.randn(z.shape)).mean()
        optim.zero_grad()
        loss.backward()
        drawn_T += torch.bincount(t, minlength=levels.count)
        monitor.step({"velocity": loss}, (z, told))
        if step % 5 == 0:
            monitor.log({"train/condition/dropped_share": float((told == NOTHING).all(1).float().mean())})
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
        rates.step()
        slow.update_parameters(net)
        if step % 50 == 0:
            net.eval()
            with monitor.validation(), torch.no_grad():
                each = errors(net, levels, held_z, held_words, fixed_t, fixed_noise)
            error = float(each.mean())
            monitor.validated({"val/loss/velocity": error, "explained": 1 - error} | by_bin(each))

    def draw(asked: Tensor, weight: float) -> Tensor:
        return first.decoder(sample(slow, levels, asked, channels, weight, strides) / scale + centre).clamp(-1, 1)

    found = judged(judge, draw, x, held_out, numbers[items:], guidance)
    monitor.validated(found.readings)
    monitor.close()
    with torch.no_grad():
        error = float(errors(slow, levels, held_z, held_words, fixed_t, fixed_noise).mean())
    return {
        "share of the error that a linear guess makes, less": (1 - error / nulls["val/loss/velocity"], 0.0),
        "samples that are right": (found.readings[f"val/guidance.{guidance:g}/class_accuracy"].value, 1 / CLASSES),
        "variance that the autoencoder gives back": (r2, 0.0),
    }


FAMILY = Family(
    "latentdiffusion", "development", "a KL-autoencoder, and a denoiser in its latents that is told colour and row",
    faults=(
        Fault("constant-of-another-autoencoder",
              "The latents are multiplied by 0.18215, which is the constant of a large public autoencoder.",
              ("latent-scale",), changes=(Change("1 / drawn(mean, log_variance).std((0, 2, 3), keepdim=True)",
                                                 "torch.tensor([[[[0.18215]]]])"),)),
        Fault("words-never-asked",
              "The cross-attention is handed the latents as its keys and values, so that it attends to them alone.",
              ("condition-ignored", "dead-parameters"),
              changes=(Change("(h, said, said, need", "(h, h, h, need"),)),
        Fault("left-in-eval-mode",
              "net.train() is never called again after the first look at held-out items, so no words are dropped.",
              ("null-mismatch",), changes=(Change("        net.train()\n", ""),)),
        Fault("times-of-the-sampler",
              "Times are drawn below the number of the sampler's steps, and not below that of the noise levels.",
              ("high-noise-starved", "schedule-mismatch"),
              changes=(Change("torch.randint(levels.count, (size,))", "torch.randint(strides, (size,))"),)),
        Fault("rows-by-their-numbers",
              "Samples are asked for by the numbers of rows, but the words of rows are counted after the colours.",
              ("unfaithful",), changes=(Change("draw(words_of(wanted), weight)", "draw(wanted, weight)"),)),
        Fault("guidance-of-a-large-model",
              "The guidance weight is that of the large public text-to-image models, 7.5.", ("over-stylised",),
              options={"guidance": 7.5}),
        Fault("kl-as-in-a-vae",
              "The KL's weight is 1, as beside an error summed over pixels, and the error here is their mean.",
              ("posterior-collapse", "kl-units"), options={"beta": 1.0}),
        Fault("gradients-of-the-wrong-optimizer",
              "The second stage's loop is a copy of the first's, and empties the gradients of that one's optimizer.",
              ("gradients-add-up",),
              changes=(Change(" optim.zero_grad()\n        loss", " first_optim.zero_grad()\n        loss"),)),
        Fault("first-stage-before-the-split",
              "The autoencoder is trained on all pictures, before those that are held out are set aside.",
              ("split-leak",), changes=(Change('"first stage": x,', '"first stage": whole,'),)),
        Fault("mean-of-all-weights",
              "AveragedModel is not told to forget, so samples are drawn with the plain mean of all weights so far.",
              ("ema-lag",), minor=True, changes=(Change("(net, multi_avg_fn=get_ema_multi_avg_fn(decay))", "(net)"),)),
        Fault("optimizer-of-the-frozen-stage",
              "The second optimizer is handed the parameters of the first stage, as the first one was.",
              ("not-in-optimizer",), changes=(Change("(net.parameters(), lr=rate,", "(first.parameters(), lr=rate,"),)),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 44}, seeds=(0, 1)),
        Healthy("many-channels", options={"channels": 12}, seeds=(0, 1)),
        Healthy("sgd", "Momentum alone needs another rate.", options={"optimizer": "SGD", "rate": 0.3}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3}, seeds=(0, 1)),
        Healthy("adam", options={"optimizer": "Adam", "rate": 2e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("linear", options={"schedule": "linear", "warmup": 40}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 768}, seeds=(0, 1)),
        Healthy("small-batches", options={"size": 32, "rate": 2e-3, "steps": 600}, seeds=(0, 1)),
        Healthy("never-dropped", "None is guided, either.", options={"drop": 0.0, "guidance": 1.0}, seeds=(0, 1)),
        Healthy("one-bad-batch", "Its latents are six times too large.", options={"bad": 250}, seeds=(0, 1)),
    ),
)  # fmt: skip
