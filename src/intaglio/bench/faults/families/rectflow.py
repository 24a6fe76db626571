"""A rectified flow of small pictures that is told a text, as tutorials have it: a diffusion transformer.

Liu et al. 2023 with the logit-normal times of Esser et al. 2024, the blocks of Peebles & Xie 2023, dropped texts for
guidance (Ho & Salimans 2022) and an average of the weights. A small transformer reads the text.

Shapes: B batch, N items, L words, d width; pictures are (3, 8, 8), four patches; t = 0 is a picture, t = 1 is noise.
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import samples
from intaglio.health.monitor import Monitor
from intaglio.history import Measured, Reading
from intaglio.history.reading import share

CLASSES, LENGTH = len(COLOURS), 12
PAD, START, UNKNOWN = 0, 1, 2
WAVE = torch.exp(torch.linspace(0, math.log(100), 32))
EDGES = torch.tensor([-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
"""Of bins of log-SNR, whose centres are −7, −5, …, 7."""
MEAN, SPREAD = 0.09, 0.15
BLACK, WHITE = -MEAN / SPREAD, (1 - MEAN) / SPREAD


def pooled(images: Tensor) -> Tensor:
    """(N, 3, 8, 8) of mean 0 and deviation 1."""
    return (F.avg_pool2d(images, 2) - MEAN) / SPREAD


def texts_of(factors: Tensor, seed: int) -> list[str]:
    """Three ways to say the same."""
    ways = torch.randint(3, (len(factors),), generator=torch.Generator().manual_seed(seed)).tolist()
    said = list[str]()
    for (a, b, c, d, e), way in zip(factors.tolist(), ways, strict=True):
        shape, colour, size, place = SHAPES[a], COLOURS[b], SIZES[c], f"{ROWS[d]} {COLUMNS[e]}"
        said += [(
            f"A {size} {colour} {shape} at the {place}.",
            f"At the {place} is a {size} {colour} {shape}.",
            f"The {shape} at the {place} is {size} and {colour}.",
        )[way]]  # fmt: skip
    return said


class Vocabulary:
    def __init__(self, texts: Sequence[str]):
        known = sorted({word for text in texts for word in self.words(text)})
        self.ids = {word: k for k, word in enumerate(("<pad>", "<start>", "<unknown>", *known))}

    def words(self, text: str) -> list[str]:
        return re.findall("[a-z]+", text.lower())

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(N, L) int64."""
        ids = torch.full((len(texts), LENGTH), PAD)
        for row, text in zip(ids, texts, strict=True):
            numbers = [START, *(self.ids.get(w, UNKNOWN) for w in self.words(text))][:LENGTH]
            row[: len(numbers)] = torch.tensor(numbers)
        return ids


def blank(ids: Tensor) -> Tensor:
    """As many empty texts."""
    return F.pad(torch.full_like(ids[:, :1], START), (0, LENGTH - 1), value=PAD)


class Reader(nn.Module):
    """Texts (B, L) to (B, d): the mean of what stands at their words after attention."""

    def __init__(self, count: int, width: int, inner: int = 32):
        super().__init__()
        self.words = nn.Embedding(count, inner)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, inner))
        self.body = nn.TransformerEncoderLayer(inner, 4, 2 * inner, 0.1, batch_first=True, norm_first=True)
        self.leave = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width))

    def forward(self, ids: Tensor) -> Tensor:
        left_out = ids == PAD
        h = self.body(self.words(ids) + self.places, src_key_padding_mask=left_out)
        return self.leave(h.masked_fill(left_out[:, :, None], 0).sum(1) / (~left_out).sum(1, keepdim=True))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU("tanh"), nn.Linear(3 * width, width))
        self.told = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.told(F.silu(told))[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        x = x + gate * self.attention(h, h, h, need_weights=False)[0]
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale_2) + shift_2
        return x + gate_2 * self.mlp(h)


class Flow(nn.Module):
    """The velocity at z and t, of pictures that a text tells of."""

    def __init__(self, count: int, width: int, blocks: int):
        super().__init__()
        self.text = Reader(count, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Linear(48, width)
        self.place = nn.Parameter(0.02 * torch.randn(4, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.last = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, 48)
        for name, p in self.named_parameters():
            if name.startswith(("last.", "leave.")) or ".told." in name:
                nn.init.zeros_(p)

    def forward(self, z: Tensor, t_B: Tensor, ids: Tensor) -> Tensor:
        angle = t_B[:, None] * WAVE
        said = self.text(ids)
        told = said + self.time(torch.cat([angle.cos(), angle.sin()], 1))
        h = self.enter(F.pixel_unshuffle(z, 4).flatten(2).mT) + self.place
        for block in self.blocks:
            h = block(h, told)
        shift, scale = self.last(F.silu(told))[:, None].chunk(2, dim=-1)
        h = self.leave(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        return F.pixel_shuffle(h.mT.unflatten(2, (2, 2)), 4)


def times(count: int, kind: str) -> Tensor:
    return torch.randn(count).sigmoid() if kind == "logit-normal" else torch.rand(count)


def mix(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return (1 - t) * x + t * noise


def errors(model: nn.Module, x: Tensor, ids: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
    """Each item's mean squared error of the velocity, (B,)."""
    z = mix(x, noise, t_B.view(-1, 1, 1, 1))
    target = noise - x
    return (model(z, t_B, ids) - target).square().mean((1, 2, 3))


@torch.no_grad()
def sample(model: nn.Module, ids: Tensor, guidance: float, steps: int = 10) -> Tensor:
    """Pictures of these texts, by Euler's method from noise on."""
    z = torch.randn(len(ids), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for k in range(steps):
        t = torch.full((len(z),), 1 - k / steps)
        v = model(z, t, ids)
        if guidance != 1:
            without = model(z, t, blank(ids))
            v = without + guidance * (v - without)
        z = z - v / steps
    return z.clamp(BLACK, WHITE)


class Judge(nn.Module):
    """A classifier of real pictures, for all that is in them; its features describe a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
        self.heads = nn.ModuleList([nn.Linear(64, len(n)) for n in (SHAPES, COLOURS, SIZES, ROWS, COLUMNS)])

    def colours(self, x: Tensor) -> Tensor:
        return self.heads[1](self.features(x)).argmax(1)

    @classmethod
    def trained(cls, seed: int, steps: int = 200) -> "Judge":
        judge, (images, factors) = cls(), pictures(4096, seed)
        x, optimizer = pooled(images), torch.optim.Adam(judge.parameters(), lr=4e-3)
        for _ in range(steps):
            rows = torch.randint(len(x), (128,))
            features = judge.features(x[rows])
            heads = zip(judge.heads, factors[rows].T, strict=True)
            loss = torch.stack([F.cross_entropy(head(features), right) for head, right in heads]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return judge.eval()


@torch.no_grad()
def judged(judge: Judge, model: nn.Module, vocabulary: Vocabulary, x: Tensor, held_out: Tensor, label: Tensor,
           guidance: float) -> panel.Panel:  # fmt: skip
    """What is drawn at two guidance weights, beside held-out pictures."""
    wanted = torch.arange(CLASSES).repeat(50)
    factors = pictures(len(wanted), 30_000).factors
    factors[:, 1] = wanted
    asked = vocabulary.encode(texts_of(factors, 30_000))
    real = judge.features(held_out)
    found = panel.Panel({}, {})
    right = int((judge.colours(held_out) == label).sum())
    found.add("val/judge", {"accuracy": share(right, len(label), 1 / CLASSES)})
    found.add("val/guidance", {"used": Reading(guidance)})
    for weight in sorted({1.0, guidance}):
        made = sample(model, asked, weight)
        drawn = judge.features(made)
        light = [some * SPREAD + MEAN for some in (made, held_out)]
        clipped = [float(((some < 2 / 255) | (some > 253 / 255)).float().mean()) for some in light]
        contrast = [float(some.std((1, 2, 3)).mean()) for some in light]
        varied = [samples.diversity(real[label == k], drawn[wanted == k]) for k in range(CLASSES)]
        each = [m.value for m in varied if isinstance(m, Reading)]
        found.add(f"val/guidance.{weight:g}", {
            "class_accuracy": share(int((judge.colours(made) == wanted).sum()), len(made), 1 / CLASSES),
            "clipped_share": Reading(clipped[0], clipped[1], len(made)),
            "contrast_ratio": Reading(contrast[0] / contrast[1], 1.0, len(made)),
            "diversity": Reading(sum(each) / max(1, len(each)), 1.0, len(made)),
        })  # fmt: skip
        if weight == guidance:
            found.add("val/samples", {
                "frechet_distance": samples.frechet_distance(real, drawn),
                "copied_share": samples.copied_share(judge.features(x), real, drawn),
            })  # fmt: skip
    return found


@torch.no_grad()
def follow(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(averaged.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(items)[: items // size * size].split(size)


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    if schedule == "restarts":
        return 0.55 + 0.45 * math.cos(math.pi * (4 * done % 1))
    return {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "constant": 1.0}[schedule]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 80, items: int = 2048, rate: float = 4e-3,
    width: int = 80, blocks: int = 2, kind: str = "logit-normal", drop: float = 0.1, alone: int = 0,
    guidance: float = 2.0, decay: float = 0.98, optimizer: str = "AdamW", schedule: str = "cosine", warmup: int = 20,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, unknown = pictures(items, seed), pictures(512, 10_000 + seed)
    x, held_out = pooled(known.images), pooled(unknown.images)
    texts, held_texts = texts_of(known.factors, seed), texts_of(unknown.factors, 10_000 + seed)
    vocabulary = Vocabulary(texts)
    ids, held_ids = vocabulary.encode(texts), vocabulary.encode(held_texts)
    judge = Judge.trained(20_000 + seed)
    model = Flow(len(vocabulary.ids), width, blocks)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    held_t, held_noise, count = times(len(held_out), kind), torch.randn(held_out.shape), 8 * 48
    drawn_t = times(20_000, kind)
    even_t = torch.linspace(-4, 4, count + 1)[1:].sub(4 / count).sigmoid()[torch.randperm(count)]
    even_bin, drawn_bin = (torch.bucketize(2 * (1 / t - 1).log(), EDGES) for t in (even_t, drawn_t))
    one, none = torch.ones(()), torch.zeros(())
    terminal_snr = float((mix(one, none, one) / mix(none, one, one)).square())
    unread = sum(not (ids == k).any() for k in range(UNKNOWN + 1, len(vocabulary.ids))) / len(vocabulary.ids)
    unknown_share = float((held_ids == UNKNOWN).sum() / (held_ids > START).sum())

    def guessed(t_T: Tensor) -> Tensor:
        """The error of the best linear guess of the velocity, (T,)."""
        variance, t = x.flatten(1).var(0), t_T[:, None]
        return (variance / ((1 - t).square() * variance + t.square())).mean(1)

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, dict[str, Measured]]:
        image, right = probe
        t, noise = held_t[: len(image)], held_noise[: len(image)]

        def loss(told: Tensor) -> tuple[Any, Any]:
            each = errors(model, image, right[told.long()], t, noise).double().numpy()
            return each, each

        z = mix(image, noise, t.view(-1, 1, 1, 1))
        own, other = (model(z, t, told).flatten(1) for told in (right, right.roll(1, 0)))
        change = float(((own - other).norm(dim=1) / own.norm(dim=1).clamp(min=1e-12)).mean())
        cost = trials.cost_of_exchange(loss, torch.arange(len(image)).double())["shuffled"]
        live, slow = (float(errors(m, image, right, t, noise).mean()) for m in (model, averaged))
        gone = [float((nn.utils.parameters_to_vector(m.parameters()) - start).norm()) for m in (averaged, model)]
        found: dict[str, dict[str, Measured]] = {
            "val/condition": {"velocity_change": Reading(change, 0.0, len(image)), "permuted_loss": cost},
            "val/ema": {"loss": Reading(slow, live, len(image)), "moved": Reading(gone[0] / max(gone[1], 1e-12), 1.0)},
            "train/noise": {"terminal_snr": Reading(terminal_snr, 0.0)},
            "train/text": {"unreachable_share": Reading(unread, 0.0)},
            "val/text": {"unknown_share": Reading(unknown_share, 0.0)},
        }
        parts = (torch.bincount(drawn_bin, minlength=8) / len(drawn_bin)).tolist()
        return found | {f"train/log_snr.{2 * k - 7}": {"weight": Reading(p, 1 / 8)} for k, p in enumerate(parts)}

    null = float(guessed(held_t).mean())
    nulls = {"train/loss/velocity": float(guessed(drawn_t).mean()), "val/loss/velocity": null}
    nulls |= {f"val/log_snr.{2 * k - 7}/loss": float(guessed(even_t)[even_bin == k].mean()) for k in range(8)}
    monitor = Monitor(
        model, optim, folder=folder, probe=(held_out[:96], held_ids[:96]), read=read, every=50, log_every=5,
        steps=steps, nulls=nulls,
    )  # fmt: skip
    monitor.audit(leaks={"pictures": audits.leaks(x.numpy(), held_out.numpy())})
    for step, rows in zip(range(1, steps + 1), batches(items, size), strict=False):
        model.train()
        dropped = torch.rand(size) < (drop if step > alone else 1.0)
        told = torch.where(dropped[:, None], blank(ids[rows]), ids[rows])
        loss = errors(model, x[rows], told, times(size, kind), torch.randn(size, 3, 8, 8)).mean()
        optim.zero_grad()
        loss.backward()
        monitor.step({"velocity": loss}, (x[rows], told))
        if step % 5 == 0:
            monitor.log({"train/condition/dropped_share": float((told[:, 1] == PAD).float().mean())})
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        rates.step()
        follow(averaged, model, min(decay, (1 + step) / (10 + step)))
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                error = float(errors(model, held_out, held_ids, held_t, held_noise).mean())
                each = errors(model, held_out[:count], held_ids[:count], even_t, held_noise[:count])
            monitor.validated({"val/loss/velocity": error, "explained": 1 - error / null})
            monitor.validated({f"val/log_snr.{2 * k - 7}/loss": float(each[even_bin == k].mean()) for k in range(8)})
    found = judged(judge, averaged, vocabulary, x, held_out, unknown.factors[:, 1], guidance)
    monitor.validated(found.readings)
    monitor.close()
    with torch.no_grad():
        error = float(errors(averaged, held_out, held_ids, held_t, held_noise).mean())
    accuracy = found.readings[f"val/guidance.{guidance:g}/class_accuracy"].value
    return {
        "share of the held-out error that the best linear guess makes, less": (1 - error / null, 0.0),
        "samples that show the colour asked for": (accuracy, 1 / CLASSES),
    }


FAMILY = Family(
    "rectflow", "development", "a rectified flow of pictures that is told a text, a diffusion transformer",
    faults=(
        Fault("padding-mask-the-wrong-way-round",
              "PyTorch's mask marks what is left out, and this one marks the words, so that only the padding is read.",
              ("condition-ignored",), changes=(Change("left_out = ids == PAD", "left_out = ids != PAD"),)),
        Fault("nine-texts-of-ten-dropped",
              "The comparison is turned round, so that nine texts of ten are dropped, and not one.",
              ("null-mismatch",), minor=True, changes=(Change("rand(size) < (drop", "rand(size) > (drop"),)),
        Fault("average-stepped-at-validation",
              "The average of the weights is stepped only when held-out pictures are looked at, each fifty steps.",
              ("ema-lag",), minor=True,
              changes=(Change("    follow(", "    if step % 50 == 0:\n            follow("),)),
        Fault("text-encoder-without-gradient",
              "The text is read as in a program whose text encoder was trained before, and so this one never learns.",
              ("dead-parameters",),
              changes=(Change("        said = self", "        with torch.no_grad():\n            said = self"),)),
        Fault("capitals-and-full-stops-unknown",
              "The vocabulary has small letters alone, and texts are split at spaces, so “A” and “red.” have no id.",
              ("vocabulary-unreachable",), changes=(Change("for w in self.words(text)", "for w in text.split()"),)),
        Fault("times-of-uniform-numbers",
              "The sigmoid of the times is taken of uniform numbers, rand for randn, so all lie between .5 and .73.",
              ("high-noise-starved", "schedule-mismatch"),
              changes=(Change("torch.randn(count).sig", "torch.rand(count).sig"),)),
        Fault("gradients-never-emptied",
              "The line that empties the gradients is missing, so each update is made with the sum of all so far.",
              ("gradients-add-up",), changes=(Change("        optim.zero_grad()\n", ""),)),
        Fault("vocabulary-made-anew-for-sampling",
              "Words are numbered as they come, and anew for the texts that samples are asked for.", ("unfaithful",),
              changes=(Change("asked = vocabulary", "asked = Vocabulary(texts_of(factors, 30_000))"),
                       Change("sorted({word for text in texts for word in self.words(text)})",
                              "dict.fromkeys(word for text in texts for word in self.words(text))"))),
        Fault("guidance-of-stable-diffusion",
              "The guidance weight of a large text-to-image model, 7.5, is taken for a small one.",
              ("over-stylised",), options={"guidance": 7.5}, case="D over-stylised"),
        Fault("picture-not-faded",
              "Noise is added to the picture, which does not fade as it grows: t = 1 still shows the picture.",
              ("schedule-mismatch",), minor=True, changes=(Change("return (1 - t) * x + t", "return x + t"),)),
        Fault("warm-up-of-ten-thousand-steps",
              "The warm-up is that of the paper's large model, and far longer than this training.",
              ("learning-rate-off",), options={"warmup": 10_000}),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("uniform-times", options={"kind": "uniform"}, seeds=(0, 1, 2)),
        Healthy("deep", options={"blocks": 3, "width": 64}, seeds=(0, 1)),
        Healthy("sgd", "Slow at first.", options={"optimizer": "SGD", "rate": 0.7, "steps": 500}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 2e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("adam", options={"optimizer": "Adam", "rate": 2e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 640}, seeds=(0, 1)),
        Healthy("small-batches", options={"size": 32, "steps": 500, "rate": 3e-3}, seeds=(0, 1)),
        Healthy("never-dropped", "None is guided, either.", options={"drop": 0.0, "guidance": 1.0}, seeds=(0, 1)),
        Healthy("first-without-texts", "Their gain comes late.", options={"alone": 100, "steps": 450}, seeds=(0, 1)),
    ),
)  # fmt: skip
