"""Proofs of a diffusion model: what noise becomes, whether it is what was asked for, and what guidance does to it.

What is drawn beside measurements is in ``diffusion_measured.py``. Seeds and held-out items are the same at every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from intaglio.data.prepare import Pictured
from intaglio.health.record import Record
from intaglio.health.rules.diffusion import advised_weights
from intaglio.history import NotMeasured
from intaglio.models.classifier import Judge
from intaglio.models.diffusion import DiffusionModel
from intaglio.reports.proofs import diffusion_measured as measured
from intaglio.reports.proofs.diffusion_measured import ROOM, decibels, own, words
from intaglio.reports.proofs.pull import AFTER_TRAINING, UNMEASURED, WHILE_TRAINING, pull
from intaglio.reports.sheet import FAINT, INK, MARGIN, RIGHT, WRONG, Sheet
from intaglio.sampling.diffusion import draw_noise, generators_of
from intaglio.sampling.guidance import Guidance
from intaglio.systems.diffusion_evaluation import Asked, wanted

COLUMNS = 10
"""Classes, or texts, that are shown side by side at most."""

EACH = 3
"""Samples of a condition at a guidance weight."""


def make_proofs(
    model: DiffusionModel,
    prepared: Pictured,
    folder: Path,
    quick: bool = False,
    judge: Judge | str = WHILE_TRAINING,
    record: Record = UNMEASURED,
) -> list[Path]:
    """Writes the pictures and ``proofs.json`` into ``folder``; returns the pictures.

    Args:
        quick: only samples and how they come about, in about two seconds at 32 px.
        judge: tells in every title what it sees; or why there is none.
        record: what was measured of this model: the sweep of guidance, the held-out loss by noise level.
    """
    drawn = cache(lambda: measured.draw(model, prepared, judge))
    closest = cache(lambda: measured.closest(prepared, judge, drawn()))
    noises = 2 if quick else 6
    shown = "prompts" if model.prompts is not None else "classes" if model.classes else "samples"
    makers: dict[str, Callable[[], Sheet]] = {
        shown: partial(grid, model, prepared, judge, noises)
        if model.conditional
        else partial(samples, model, noises * COLUMNS),
        "denoising": partial(denoising, model, prepared),
        "noised": partial(noised, model, prepared),
        "guidance": partial(guidance, model, prepared, record),
        "conditions": lambda: measured.conditions(model, some(model, prepared, COLUMNS)),
        "conditions-map": partial(measured.conditions_map, model, prepared),
        "noise-levels": partial(measured.noise_levels, model, prepared, record),
        "spectrum": lambda: measured.spectrum(prepared, drawn()),
        "neighbours": lambda: measured.neighbours(prepared, drawn(), closest()),
    }

    def why_not(name: str) -> str | None:
        if quick and name not in (shown, "denoising"):
            return AFTER_TRAINING
        if name in ("guidance", "conditions", "conditions-map") and not model.conditional:
            return "the model is told nothing beside the noise"
        if name == "conditions-map":
            return measured.no_map(model, prepared)
        if name == "guidance" and not model.dropped:
            return "no condition was dropped in training, so there is no guidance"
        if name in ("guidance", "neighbours") and isinstance(judge, str):
            return judge
        if name == "guidance" and not record.matching("val/guidance.*/class_accuracy"):
            return "no sweep of guidance weights was measured"
        if name == "noise-levels" and not record.matching("val/log_snr.*/loss"):
            return "the held-out loss was not measured by noise level"
        if name == "neighbours":
            return found.reason if isinstance(found := closest(), NotMeasured) else None
        return None

    return pull(model, makers, why_not, folder)


# What is asked for.


def some(model: DiffusionModel, prepared: Pictured, count: int) -> Asked:
    """At most ``count`` conditions, spread over all: classes or held-out captions; ``count`` times nothing."""
    labels = prepared.corpus.labels() or ("",)
    if not model.conditional:
        return Asked(None, None, [""] * count)
    each = 1 if model.prompts is None else -(-count // len(labels))
    return spread(wanted(model, prepared, model.classes or labels, each), count)


def spread(asked: Asked, count: int) -> Asked:
    """At most ``count`` of what is asked for, evenly chosen."""
    chosen = np.unique(np.linspace(0, len(asked.labels) - 1, min(count, len(asked.labels))).round().astype(int))
    classes, texts = (None if given is None else [given[k] for k in chosen] for given in (asked.classes, asked.texts))
    return Asked(classes, texts, [asked.labels[k] for k in chosen])


def generate(model: DiffusionModel, asked: Asked, seeds: Sequence[int], weight: float | None = None) -> np.ndarray:
    """Each of what is asked for with each seed, seed by seed, (seeds × asked, S, S, 3)."""
    every = [seed for seed in seeds for _ in asked.labels]
    classes, texts = (None if given is None else given * len(seeds) for given in (asked.classes, asked.texts))
    return model.generate(every, classes, texts, None if weight is None else Guidance(weight))


# The pictures.


@dataclass
class Seen:
    """What a judge sees in an image, how surely, and whether it was asked for."""

    label: str
    p: float
    right: bool

    def __str__(self) -> str:
        return f"{'' if self.right else '✗ '}{self.label} {self.p:.0%}"


def look(judge: Judge, images: np.ndarray, labels: Sequence[str]) -> list[Seen]:
    """The most probable label of each image beside the one that was asked for."""
    p_B, k_B = judge.probabilities(images).max(1)
    named = [judge.labels[k] for k in k_B.tolist()]
    return [Seen(name, p, name == label) for name, p, label in zip(named, p_B.tolist(), labels, strict=True)]


def samples(model: DiffusionModel, count: int) -> Sheet:
    """What a model draws that is told nothing, seeds 0 up."""
    sheet = Sheet(
        "New images, from nothing but a seed",
        f"Seeds 0 to {count - 1}, none picked. Look for variety, and for images that could be real.",
    )
    room = ROOM / COLUMNS
    for k, image in enumerate(model.generate(range(count))):
        sheet.picture(MARGIN + k % COLUMNS * room, sheet.y + k // COLUMNS * room, room - 0.06, image)
    return sheet


def grid(model: DiffusionModel, prepared: Pictured, judge: Judge | str, noises: int) -> Sheet:
    """Noises × classes, or × held-out captions, and what the judge sees in each."""
    asked = some(model, prepared, COLUMNS)
    made, columns = generate(model, asked, range(noises)), len(asked.labels)
    what, size = ("class", 7.5) if asked.classes else ("text", 6.5)
    look_for = (
        f"Each row begins with one and the same noise, each column is asked for one {what}, at guidance "
        f"{model.usual_guidance(True).weight:g}; none is picked. Look for what was asked for in every column, and for "
        "variety down it."
    )
    seen = [] if isinstance(judge, str) else look(judge, made, asked.labels * noises)
    if not isinstance(judge, str):
        look_for += (
            f" Below each: what a classifier of real images sees, and how surely; it agrees in "
            f"{sum(s.right for s in seen)} of {len(seen)}, and is itself right on {judge.accuracy:.0%} of unseen real "
            f"images. A guess is right once in {len(judge.labels)}."
        )
    sheet = Sheet(f"One noise, asked for every {what}", look_for)
    room, bold = min(1.4, ROOM / columns), "bold" if asked.classes else "normal"
    heads = [
        sheet.text(MARGIN + k * room, sheet.y, told, room - 0.07, size, weight=bold)
        for k, told in enumerate(words(asked))
    ]
    side, step, top = room - 0.06, room + (0.1 if seen else 0.0), max(heads) + 0.06
    for k, image in enumerate(made):
        x, y = MARGIN + k % columns * room, top + k // columns * step
        wrong = bool(seen) and not seen[k].right
        sheet.picture(x, y, side, image, frame=WRONG if wrong else None)
        if seen:
            colour, bold = (WRONG, "bold") if wrong else (FAINT, "normal")
            sheet.text(x, y + side + 0.03, str(seen[k]), room, 6.5, colour, 1, weight=bold)
    for k, told in enumerate(words(asked)):
        sheet.told.append(
            f"Asked for “{told}”" + (f", seen: {', '.join(map(str, seen[k::columns]))}." if seen else ".")
        )
    return sheet


def denoising(model: DiffusionModel, prepared: Pictured) -> Sheet:
    """Three samples on their way: the noisy image, and what the network takes it for."""
    asked = some(model, prepared, 3)
    n = len(asked.labels)
    generators = generators_of(range(n))
    x = draw_noise(generators, model.x_shape, model.device)
    weight = model.usual_guidance(model.conditional)
    steps = list(model.trace(x, model.condition(n, asked.classes, asked.texts), weight, None, generators))
    chosen = np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))
    sheet = Sheet(
        "From noise to an image, step by step",
        f"Left: nothing but noise. Above: the image at {len(chosen)} of {len(steps)} steps"
        f"{'' if model.autoencoder is None else ', decoded from its latent'}. Below: what the network takes it for, on "
        "which the next step rests. dB is how much stronger the image is than the noise (below 0, noise is stronger). "
        "Look for a form that is there early below, and only gains detail.",
    )
    room = min(1.2, ROOM / (len(chosen) + 1))
    side, top = room - 0.05, sheet.y
    for column, k in enumerate(chosen):
        sheet.text(MARGIN + column * room, top, f"t {steps[k].t}: {decibels(model, steps[k].t)}", room, 7, FAINT, 1)
    sheet.text(MARGIN + len(chosen) * room, top, "the result", room, 7, weight="bold")
    noisy = [model.to_images(x if k == 0 else steps[k - 1].x) for k in chosen]
    taken, last = [model.to_images(steps[k].x0) for k in chosen], model.to_images(steps[-1].x)
    top += 0.18
    for row, told in enumerate(words(asked)):
        if told:
            top = sheet.text(MARGIN, top, told, size=8, lines=1) + 0.05
        for column in range(len(chosen)):
            sheet.picture(MARGIN + column * room, top, side, noisy[column][row])
            sheet.picture(MARGIN + column * room, top + room, side, taken[column][row])
        sheet.picture(MARGIN + len(chosen) * room, top + room / 2, side, last[row])
        top += 2 * room + 0.12
    sheet.told = [f"t = {steps[k].t}: {decibels(model, steps[k].t)} of signal over noise." for k in chosen]
    return sheet


def noised(model: DiffusionModel, prepared: Pictured) -> Sheet:
    """Held-out images noised to several t and denoised again, told their own condition."""
    items = prepared.some("val", 3)
    real, seeds = prepared.data.images[items], range(len(items))
    condition = own(model, prepared, items)
    times = sorted({max(0, round(share * model.schedule.steps) - 1) for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1)})
    mean = prepared.data.images[prepared.some("train", 256)].mean(0)
    nulls = [psnr(image, mean) for image in real]
    sheet = Sheet(
        "Unseen images, drowned in noise and denoised again",
        f"Left: held-out images. Above: noised to t of {model.schedule.steps}. Below: denoised from there"
        f"{', told what it shows' if model.conditional else ''}, and the likeness to the original (the mean of all "
        f"training images has {np.mean(nulls):.1f} dB). Look for the same image up to the middle; where only noise was "
        "left, at the right, another good one is right, and a blur is wrong.",
    )
    room, top = ROOM / (len(times) + 1), sheet.y
    side = room - 0.06
    for row, image in enumerate(real):
        sheet.picture(MARGIN, top + 0.18 + row * (2 * room + 0.2) + room / 2, side, image)
    for column, t in enumerate(times, 1):
        a, s = model.schedule.level(t)
        noise = draw_noise(generators_of(seeds), model.x_shape, model.device)
        with torch.no_grad():
            drowned = model.to_images(a * model.to_x(real) + s * noise)
        made, x = model.reconstruct(real, t, seeds, condition), MARGIN + column * room
        sheet.text(x, top, f"t {t}: {decibels(model, t)}", room, 7, FAINT, 1)
        likeness = [psnr(image, other) for image, other in zip(real, made, strict=True)]
        for row, db in enumerate(likeness):
            y = top + 0.18 + row * (2 * room + 0.2)
            sheet.picture(x, y, side, drowned[row])
            sheet.picture(x, y + room, side, made[row])
            sheet.text(x, y + 2 * room - 0.03, f"{db:.1f} dB", room, 7, RIGHT if db > nulls[row] else FAINT, 1)
        sheet.told.append(f"t = {t}: denoised to {', '.join(f'{db:.1f}' for db in likeness)} dB of the originals.")
    return sheet


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """Likeness of two images uint8 (S, S, 3), in dB."""
    error = np.square((image.astype(np.float64) - other) / 255).mean()
    return float(-10 * np.log10(max(error, 1e-12)))


def guidance(model: DiffusionModel, prepared: Pictured, record: Record) -> Sheet:
    """Guidance weights × conditions: two samples each, how many are as asked, and the weight to use."""
    labels = [name for name in prepared.corpus.labels() if record.matching(f"val/guidance.*/class_accuracy.{name}")]
    asked = spread(wanted(model, prepared, labels, 1), COLUMNS)
    extremes, best = advised_weights(record)
    weights = sorted(float(name.split("/")[1][9:]) for name in record.matching("val/guidance.*/class_accuracy"))
    overall = best.get("")
    sheet = Sheet(
        "How hard to guide",
        "Guidance exaggerates what a condition changes. Across: its weight, from none (1) up. Down: three samples "
        "each, from the same three noises. Below: the share of samples in which a classifier of real images sees what "
        "was asked for. Look for the least weight (✓) that is as right as the best, and not yet harsh or all alike. "
        + ("Every weight is harsh or all alike." if overall is None else f"For all of them that is {overall:g}."),
    )
    first, gap, top, told = 1.15, 0.14, sheet.y, words(asked)
    room = (ROOM - first) / len(weights)
    side = min(0.68, (room - gap) / EACH - 0.04)
    below = top + 0.3 + len(told) * (side + 0.22)
    for k, w in enumerate(weights):
        x, made = MARGIN + first + k * room, generate(model, asked, range(EACH), w)
        harsh, numbers = extremes.get(w, {}), _numbers(record, w)
        name = f"guidance {w:g}" + (", none" if w == 1 else "")
        sheet.text(x, top, name, room, 10, WRONG if harsh else RIGHT if w == overall else FAINT, weight="bold")
        for row, label in enumerate(asked.labels):
            y = top + 0.25 + row * (side + 0.22)
            for seed in range(EACH):
                sheet.picture(x + seed * (side + 0.04), y, side, made[seed * len(told) + row])
            s, best_one = record.get(f"val/guidance.{w:g}/class_accuracy.{label}"), best.get(label) == w
            said = ("✓ " if best_one else "") + ("" if s is None else f"{s.value:.0%} as asked")
            bold = "bold" if best_one else "normal"
            colour = FAINT if not best_one else RIGHT if s is not None and s.value >= 0.5 else INK
            sheet.text(x, y + side + 0.03, said, room, 7, colour, 1, weight=bold)
        y = below
        for quantity, line in numbers.items():
            wrong = quantity in harsh
            bold = "bold" if wrong else "normal"
            line = f"✗ {line}" if wrong else line
            y = sheet.text(x, y, line, room - gap, 8, WRONG if wrong else INK, weight=bold) + 0.02
        sheet.told.append(f"Guidance {w:g}: {'; '.join([*numbers.values(), *harsh.values()])}.")
    for row, name in enumerate(told):
        sheet.text(MARGIN, top + 0.25 + row * (side + 0.22), name, first - 0.08, 8 if asked.classes else 6.5)
    sheet.text(MARGIN, below, "all of them", first - 0.08, 8, weight="bold")
    sheet.told += [f"{name or 'All'}: {'no weight' if w is None else f'weight {w:g}'}." for name, w in best.items()]
    return sheet


def _numbers(record: Record, w: float) -> dict[str, str]:
    """What the evaluation measured at a weight, in words, each beside what real images have."""
    forms = {
        "class_accuracy": "{:.0%} as asked (guess {:.0%})",
        "clipped_share": "{:.0%} black or white (real {:.0%})",
        "contrast_ratio": "contrast {:.2f} × real",
        "diversity": "variety {:.2f} × real",
    }
    found = {name: record.get(f"val/guidance.{w:g}/{name}") for name in forms}
    return {name: forms[name].format(s.value, s.null or 0.0) for name, s in found.items() if s is not None}
