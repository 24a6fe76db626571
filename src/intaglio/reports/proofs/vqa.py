"""Proofs of visual question answering: held-out questions with their answers, and what an answer rests on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from intaglio.data.questions.corpus import right
from intaglio.data.questions.prepare import Questioned
from intaglio.models.explain import Explained, explain
from intaglio.models.vqa import VqaModel
from intaglio.reports.proofs.pull import AFTER_TRAINING, pull
from intaglio.reports.sheet import FAINT, INK, MARGIN, RIGHT, WIDTH, WRONG, Sheet

SHOWN, EACH, EXPLAINED = 9, 4, 5
COLUMNS, SIDE = 3, 1.15


def make_proofs(model: VqaModel, prepared: Questioned, folder: Path, quick: bool) -> list[Path]:
    """Writes the pictures and ``proofs.json`` into ``folder``; returns the pictures."""
    makers: dict[str, Callable[[], Sheet]] = {
        "answers": lambda: answers(model, prepared),
        "explained": lambda: explained(model, prepared),
    }
    return pull(model, makers, lambda name: AFTER_TRAINING if quick and name != "answers" else None, folder)


def _asked_of(prepared: Questioned, images: int) -> list[np.ndarray]:
    """Held-out questions of some images, spread over all."""
    val = prepared.splits["val"]
    image = prepared.data.image[val]
    several = np.unique(image)
    chosen = several[np.linspace(0, len(several) - 1, min(images, len(several))).astype(int)]
    return [val[image == i] for i in chosen]


def answers(model: VqaModel, prepared: Questioned) -> Sheet:
    """Held-out images, each with some of its questions."""
    sheet = Sheet(
        "What is asked, and what is answered",
        "Held-out images. Behind each question the model's answer and its probability: green where it is right, red "
        "where it is not, and then the truth in brackets. Look whether wrong answers are at least of the right kind.",
    )
    top, width = sheet.y, (WIDTH - 2 * MARGIN) / COLUMNS
    correct = total = 0
    for place, items in enumerate(_asked_of(prepared, SHOWN)):
        some = items[np.linspace(0, len(items) - 1, min(EACH, len(items))).astype(int)]
        x, y = MARGIN + place % COLUMNS * width, top + place // COLUMNS * (SIDE + 0.5)
        image = prepared.data.images[prepared.data.image[some[0]]]
        sheet.picture(x, y, SIDE, image)
        asked = [prepared.corpus.asked[i] for i in some]
        z = model.latents(image[None], np.zeros(len(some), int), [a.question for a in asked]).mean
        made = model.answers(z)
        at = y
        for a, given, p in zip(asked, made.answers, made.probability.tolist(), strict=True):
            good = right(given, a)
            correct, total = correct + good, total + 1
            room = width - SIDE - 0.25
            at = sheet.text(x + SIDE + 0.1, at, a.question, room, size=7, colour=FAINT, lines=2)
            told = f"{given or '(nothing)'}, {p:.2f}" + ("" if good else f" [{a.answers[0]}]")
            at = sheet.text(x + SIDE + 0.1, at, told, room, size=7.5, colour=RIGHT if good else WRONG, lines=2) + 0.04
            sheet.told.append(f"{prepared.corpus.id(int(some[0])).partition(':')[0]}: {a.question} {told}")
    sheet.told.append(f"{correct} of {total} right.")
    return sheet


def explained(model: VqaModel, prepared: Questioned) -> Sheet:
    """For some held-out questions: which places and which latents their answers rest on."""
    pairs = []
    for place, items in enumerate(_asked_of(prepared, EXPLAINED)):
        item = items[place % len(items)]
        pairs.append((prepared.data.images[prepared.data.image[item]], prepared.corpus.asked[item].question))
    return drawn([(image, explain(model, image, question)) for image, question in pairs])


def drawn(several: Sequence[tuple[np.ndarray, Explained]]) -> Sheet:
    """A row for each question: the image, what covering each place costs the answer, and what each latent is worth."""
    sheet = Sheet(
        "What an answer rests on",
        "Middle: windows of the image are covered with its mean colour; the more of the answer's probability that "
        "takes away, the redder. Right, for each latent: nats that the answer costs more without it (red), and less "
        "with it alone than with none (green). Where several tell the same, no single one is missed.",
    )
    side = 1.3
    for image, e in several:
        y = max(sheet.y, sheet.bottom + 0.2)
        sheet.picture(MARGIN, y, side, image)
        sheet.picture(MARGIN + side + 0.1, y, side, over(image, e.places))
        x = MARGIN + 2 * side + 0.35
        end = sheet.text(x, y, e.question, 3.2, size=9)
        known = ", ".join(f"{answer} {share:.0%}" for answer, share in e.spread)
        end = sheet.text(x, end + 0.04, f"{e.answer}  (probability {e.probability:.2f})", 3.2, size=10, weight="bold")
        end = sheet.text(x, end + 0.04, f"drawn again: {known}", 3.2, size=8, colour=FAINT)
        strongest = e.places.max()
        if strongest < 0.05:
            sheet.text(x, end + 0.04, "No single place matters.", 3.2, size=8, colour=FAINT)
        bars, room = x + 3.4, WIDTH - MARGIN - x - 4.2
        most = max(0.1, float(np.abs([e.latents, e.alone]).max()))
        for k, both in enumerate(zip(e.latents, e.alone, strict=True)):
            at = y + k * side / len(e.latents)
            sheet.text(bars, at, f"z{k}", 0.3, size=7, colour=FAINT, lines=1)
            for place, (nats, colour) in enumerate(zip(both, (WRONG, RIGHT), strict=True)):
                length = max(0.01, room * float(abs(nats)) / most)
                sheet.box(bars + 0.25, at + 0.06 * place, length, 0.05, colour if nats > 0 else FAINT)
            told = ", ".join(f"{round(float(nats), 2) + 0.0:+.2f}" for nats in both)  # no −0.00
            sheet.text(bars + 0.3 + room, at, told, 0.8, size=7, colour=INK, lines=1)
        sheet.bottom = max(sheet.bottom, y + side)
        sheet.told.append(
            f"{e.question} {e.answer} ({e.probability:.2f}); the place that matters most takes {strongest:.2f} of it "
            f"away; without each latent it costs {_listed(e.latents)} nats more, with it alone {_listed(e.alone)} less."
        )
    return sheet


def _listed(nats: np.ndarray) -> str:
    return ", ".join(f"{n:.2f}" for n in nats)


def over(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """An image in grey with the places (s, s) in red, as strong as their values in [0, 1]; uint8 (S, S, 3)."""
    size = len(image)
    heat = torch.nn.functional.interpolate(
        torch.from_numpy(places)[None, None].float().clamp(0, 1), (size, size), mode="bilinear", align_corners=False
    )[0, 0].numpy()[..., None]
    grey = image.mean(-1, keepdims=True).repeat(3, -1) * 0.55 + 255 * 0.45
    return (grey * (1 - heat) + np.array([190.0, 20.0, 30.0]) * heat).round().astype(np.uint8)
