"""What a trained diffusion model draws: is it what was asked for, is it varied, is it new, and what limits it?

A Fréchet distance here rests on the features of our own small classifier of this data: it is no FID, and compares
nothing but runs on the same data. Shapes: N images, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intaglio.data.prepare import Pictured
from intaglio.health.instruments import samples
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.history.reading import Evaluation, share
from intaglio.models import nulls
from intaglio.models.autoencoder import round_trip
from intaglio.models.classifier import Judge
from intaglio.models.diffusion import DiffusionModel
from intaglio.sampling.guidance import Guidance
from intaglio.systems.autoencoder_evaluation import quality

WEIGHTS = (1.0, 3.0, 9.0)
"""Guidance weights that are tried besides the run's own."""

CLIPPED = 2
"""Pixels within so many of 255 steps of black or white count as clipped, in real images and in generated ones."""


@dataclass
class Asked:
    """What is asked of the model: a class or a caption for each image; ``labels`` are the classes that it must show."""

    classes: list[str] | None
    texts: list[str] | None
    labels: list[str]


def evaluate(model: DiffusionModel, prepared: Pictured, judge: Judge | str, each: int, items: int = 1024) -> Evaluation:
    """Samples at several guidance weights against held-out images; ``each`` of every class at every weight."""
    found: dict[str, Measured] = {}
    val = prepared.some("val", items)
    if model.autoencoder is not None:
        trip = round_trip(model.autoencoder, prepared.data.images, prepared.some("train", 4096), val)
        found |= {f"val/{name}": m for name, m in quality(trip).items()}
    if isinstance(judge, str):
        reason = NotMeasured(judge)
        return Evaluation.of(found | {"val/guidance.1/class_accuracy": reason, "val/samples/frechet_distance": reason})
    real = prepared.data.images[val]
    labels = prepared.labels_of(val)
    common = nulls.majority(prepared.labels_of(prepared.splits["train"]), labels)
    found["val/judge/accuracy"] = share(round(judge.accuracy * judge.n), judge.n, common)
    used = model.usual_guidance(model.conditional).weight
    found["val/guidance/used"] = Reading(used)
    asked = wanted(model, prepared, judge.labels, each)
    features = judge.features(real)
    for weight in sorted({used, *(WEIGHTS if model.conditional and model.dropped else ())}):
        made = model.generate(range(len(asked.labels)), asked.classes, asked.texts, Guidance(weight))
        if model.conditional:
            found |= {f"val/guidance.{weight:g}/{k}": m for k, m in obeyed(judge, made, asked.labels).items()}
        found |= {f"val/guidance.{weight:g}/{k}": m for k, m in extremes(real, made).items()}
        kinds = (labels, asked.labels) if model.conditional else ([""] * len(real), [""] * len(made))
        found[f"val/guidance.{weight:g}/diversity"] = variety(judge, real, kinds[0], made, kinds[1])
        if weight == used:
            found |= {f"val/samples/{k}": m for k, m in nearness(judge, prepared, features, made).items()}
    if model.autoencoder is not None:
        back = np.concatenate([model.to_images(model.to_x(real[at : at + 64])) for at in range(0, len(real), 64)])
        found["val/round_trip/frechet_distance"] = samples.frechet_distance(features, judge.features(back), paired=True)
    return Evaluation.of(found)


def wanted(model: DiffusionModel, prepared: Pictured, labels: Sequence[str], each: int) -> Asked:
    """Each class ``each`` times, in turn; or held-out captions of each class; or nothing, so many images in all."""
    turns = [labels[k % len(labels)] for k in range(each * len(labels))]
    if model.prompts is None:
        return Asked(turns if model.classes else None, None, turns)
    by_label: dict[str, list[str]] = {name: [] for name in labels}
    for i in prepared.splits["val"]:
        name = prepared.corpus.label(int(i))
        if name in by_label:
            by_label[name].append(prepared.corpus.captions(int(i))[0])
    turns = [name for name in turns if by_label[name]]
    counts = {name: 0 for name in labels}
    texts = []
    for name in turns:
        texts.append(by_label[name][counts[name] % len(by_label[name])])
        counts[name] += 1
    return Asked(None, texts, turns)


def obeyed(judge: Judge, made: np.ndarray, labels: Sequence[str]) -> dict[str, Measured]:
    """The share of images in which the judge sees what was asked for, in all and by class; null one in K."""
    right = np.array([a == b for a, b in zip(judge(made), labels, strict=True)])
    chance = 1 / len(judge.labels)
    found: dict[str, Measured] = {"class_accuracy": share(int(right.sum()), len(right), chance)}
    for name in judge.labels:
        here = np.array([label == name for label in labels])
        if here.any():
            found[f"class_accuracy.{name}"] = share(int(right[here].sum()), int(here.sum()), chance)
    return found


def extremes(real: np.ndarray, made: np.ndarray) -> dict[str, Measured]:
    """How much is black or white, and the contrast, beside held-out images."""
    shares = [float(((x <= CLIPPED) | (x >= 255 - CLIPPED)).mean()) for x in (made, real)]
    stds = [float(x.astype(np.float32).std((1, 2, 3)).mean()) for x in (made, real)]
    contrast = Reading(stds[0] / stds[1], 1.0, len(made)) if stds[1] else NotMeasured("real images have no contrast")
    return {"clipped_share": Reading(shares[0], shares[1], len(made)), "contrast_ratio": contrast}


def variety(
    judge: Judge, real: np.ndarray, real_labels: Sequence[str | None], made: np.ndarray, labels: Sequence[str]
) -> Measured:
    """Mean over classes (one, where nothing was asked for) of the diversity within, over that of real images; the
    interval adds theirs in squares."""
    each: list[Reading] = []
    a, b = judge.features(real), judge.features(made)
    for name in sorted(set(labels)):
        ours, theirs = (_rows(known, name) for known in (labels, real_labels))
        found = samples.diversity(a[theirs], b[ours]) if ours.any() and theirs.any() else None
        if isinstance(found, Reading):
            each.append(found)
    if not each:
        return NotMeasured("no class has the 8 real and 8 generated images that its diversity takes")
    half = float(np.sqrt(sum(((r.high or r.value) - r.value) ** 2 for r in each))) / len(each)
    value = float(np.mean([r.value for r in each]))
    return Reading(value, 1.0, sum(r.n or 0 for r in each), value - half, value + half)


def _rows(labels: Sequence[str | None], name: str) -> Tensor:
    return torch.tensor([label == name for label in labels])


def nearness(judge: Judge, prepared: Pictured, real: Tensor, made: np.ndarray) -> dict[str, Measured]:
    """Distances between the sets, and whether what was drawn lies nearer to the training items than new images do."""
    drawn = judge.features(made)
    images, some = prepared.data.images, prepared.splits["train"]
    mirrors = (False, True) if getattr(prepared.data, "flips", False) else (False,)  # as they were trained on
    parts = [(images[some[at : at + 1024]], mirror) for mirror in mirrors for at in range(0, len(some), 1024)]
    train = torch.cat([judge.features(x[:, :, ::-1] if mirror else x) for x, mirror in parts])
    return {
        "frechet_distance": samples.frechet_distance(real, drawn),
        "kernel_distance": samples.kernel_distance(real, drawn),
        "precision": samples.precision(real, drawn),
        "recall": samples.recall(real, drawn),
        "neighbour_ratio": samples.neighbour_ratio(train, real, drawn),
        "copied_share": samples.copied_share(train, real, drawn),
    }
