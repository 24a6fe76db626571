"""Proofs of a multimodal model: what an image and its caption keep of each other. The items are the same at every
step."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intaglio.data.prepare import Captioned
from intaglio.models.multimodal import MultimodalModel, interpolate
from intaglio.models.networks import DocumentedNetwork
from intaglio.reports.proofs.pull import AFTER_TRAINING, pull
from intaglio.reports.sheet import FAINT, MARGIN, RIGHT, WIDTH, WRONG, Sheet

GALLERY = 256

Maker = Callable[[MultimodalModel, Captioned], Sheet]


def make_proofs(model: MultimodalModel, prepared: Captioned, folder: Path, quick: bool = False) -> list[Path]:
    """Writes the pictures and ``proofs.json`` into ``folder``; returns the pictures.

    ``quick`` makes the reconstructions only, in about a second.
    """
    makers = {name: partial(make, model, prepared) for name, make in MAKERS.items()}
    return pull(model, makers, lambda name: _why_not(name, model, prepared, quick), folder)


def reconstructions(model: MultimodalModel, prepared: Captioned) -> Sheet:
    """Ten held-out images above what is decoded from their latents: an image and a caption."""
    items = prepared.some("val", 10)
    z, corpus = model.encode(prepared.data.images[items]), prepared.corpus
    captions, decoded = model.caption(z), model.decode(z)
    labels, named = prepared.labels_of(items), [corpus.label_in(c) for c in captions]
    look_for = (
        f"Above: {len(items)} of {len(prepared.splits['val']):,} held-out images. Below: the image and the caption "
        "that are decoded from the latent alone. Look for the same things in the same places, rightly named."
    )
    if any(labels):
        known = [(label, name) for label, name in zip(labels, named, strict=True) if label is not None]
        right, common = sum(a == b for a, b in known), Counter(a for a, _ in known).most_common(1)[0]
        look_for += (
            f" {right} of {len(known)} captions name the right object; “{common[0]}” each time gets {common[1]}."
        )
    sheet = Sheet("Unseen images, and what the model keeps of them", look_for)
    side, room, top = 1.5, 1.925, sheet.y
    for k, (item, said) in enumerate(zip(items, captions, strict=True)):
        if k % 5 == 0:
            top = sheet.y if k == 0 else sheet.bottom + 0.3
        x = MARGIN + k % 5 * room
        sheet.picture(x, top, side, prepared.data.images[item])
        sheet.picture(x, top + side + 0.06, side, decoded[k])
        y = sheet.text(x, top + 2 * side + 0.14, said or "(no words)", room - 0.2)
        if labels[k] is not None and named[k] != labels[k]:
            wrong = f"✗ names {named[k] or 'no object'}; it is {labels[k]}"
            y = sheet.text(x, y, wrong, room - 0.2, colour=WRONG, weight="bold")
        true = _nearest(said, corpus.captions(int(item)))
        sheet.text(x, y + 0.04, f"true: {true}", room - 0.2, size=7, colour=FAINT)
        sheet.told.append(f"Item {corpus.id(int(item))}: the model says “{said}”; true: “{true}”.")
    return sheet


def samples(model: MultimodalModel, prepared: Captioned) -> Sheet:
    """Sixteen images and captions from the prior, seeds 0 to 15."""
    made = model.generate(range(16))
    sheet = Sheet(
        "New images with captions, from nothing but a seed",
        "Each image and its caption are decoded from one latent drawn from the prior, seeds 0 to 15, none picked. Look "
        f"for captions that fit their images, and for variety: {len(set(made.captions))} of 16 captions differ.",
    )
    _captioned(sheet, made.images, made.captions, [f"seed {seed}" for seed in range(16)])
    return sheet


def _captioned(sheet: Sheet, images: np.ndarray, captions: Sequence[str], names: Sequence[str]) -> None:
    room, top = 2.35, sheet.y
    for k, (image, said, name) in enumerate(zip(images, captions, names, strict=True)):
        if k and k % 4 == 0:
            top = sheet.bottom + 0.25
        x = MARGIN + k % 4 * room
        sheet.picture(x, top, 1.5, image)
        sheet.text(x + 1.56, top, name, 0.7, size=7, colour=FAINT)
        sheet.text(x, top + 1.57, said or "(no words)", room - 0.2)
        sheet.told.append(f"{name}: “{said}”.")


def interpolation(model: MultimodalModel, prepared: Captioned) -> Sheet:
    """Rows between the latents of two held-out images."""
    items = prepared.some("val", 6)
    pairs = items[: len(items) // 2 * 2].reshape(-1, 2)
    sheet = Sheet(
        "From one unseen image to another, through the latent space",
        "Outside: two held-out images. Between them: seven images decoded on the way from the one’s latent to the "
        "other’s. Look for shapes that change step by step and stay shapes; a cross-fade shows both at once.",
    )
    top = sheet.y
    for a, b in pairs:
        images = prepared.data.images[[a, b]]
        ends_Z = model.encode(images)
        z = interpolate(ends_Z[0], ends_Z[1], steps=7)
        sheet.picture(MARGIN, top, 1.0, images[0])
        sheet.picture(WIDTH - MARGIN - 1, top, 1.0, images[1])
        for k, image in enumerate(model.decode(z)):
            sheet.picture(MARGIN + 1.1 + k, top, 1.0, image)
        captions = model.caption(z[[0, 3, 6]])
        for x, where, said in zip((1.3, 4.3, 7.3), ("first", "middle", "last"), captions, strict=True):
            sheet.text(x, top + 1.06, where, size=7, colour=FAINT)
            sheet.text(x, top + 1.2, said or "(no words)", 2.1)
        names = " to ".join(prepared.corpus.id(int(i)) for i in (a, b))
        sheet.told.append(f"Items {names}: “{captions[0]}”; half way: “{captions[1]}”; “{captions[2]}”.")
        top = sheet.bottom + 0.25
    return sheet


def retrieval(model: MultimodalModel, prepared: Captioned) -> Sheet:
    """Four true captions of held-out items, each with the five images that the model puts first."""
    items = prepared.some("val", GALLERY)
    n, images = len(items), prepared.data.images[items]
    asked = np.unique(np.linspace(0, n - 1, min(4, n)).round().astype(int))
    texts = [prepared.corpus.captions(int(items[q]))[0] for q in asked]
    z = torch.cat([model.encode(images[i : i + 64]) for i in range(0, n, 64)])
    likeness = (model.embed_text(texts) @ model.embed_image(z).T).cpu()
    order = likeness.argsort(dim=1, descending=True, stable=True)
    ranks = [int((order[k] == int(q)).nonzero()) + 1 for k, q in enumerate(asked)]
    sheet = Sheet(
        "Searching unseen images by a caption",
        f"Left: the caption of one of {n} held-out images. Right: the five that the model finds nearest, best first; "
        f"the caption’s own image is framed. {ranks.count(1)} of {len(ranks)} come first; a guess would put it first "
        f"once in {n}. Others may fit the words too.",
    )
    _hits(sheet, images, texts, asked, order, ranks)
    return sheet


def _hits(
    sheet: Sheet, images: np.ndarray, texts: Sequence[str], asked: np.ndarray, order: Tensor, ranks: Sequence[int]
) -> None:
    top = sheet.y
    for text, own, best, rank in zip(texts, asked, order[:, :5].tolist(), ranks, strict=True):
        y = sheet.text(MARGIN, top, f"“{text}”", 2.2, size=9.5)
        found, colour = ("✓ ", RIGHT) if rank == 1 else ("", FAINT) if rank <= 5 else ("✗ ", WRONG)
        sheet.text(MARGIN, y + 0.05, f"{found}rank {rank} of {len(images)}", 2.2, colour=colour, weight="bold")
        for k, index in enumerate(best):
            sheet.picture(2.6 + 1.1 * k, top, 1.0, images[index], frame=RIGHT if index == own else None)
        if rank > 5:
            sheet.text(8.4, top + 1.05, f"its own, rank {rank}", 1.2, size=7, colour=FAINT)
            sheet.picture(8.4, top, 1.0, images[own], frame=WRONG)
        sheet.told.append(f"“{text}”: its own image has rank {rank} of {len(images)}.")
        top = sheet.bottom + 0.2


MAKERS: dict[str, Maker] = {
    "reconstructions": reconstructions,
    "samples": samples,
    "interpolation": interpolation,
    "retrieval": retrieval,
}


def _why_not(name: str, model: MultimodalModel, prepared: Captioned, quick: bool) -> str | None:
    """Why a proof cannot be made, or None."""
    if quick and name != "reconstructions":
        return AFTER_TRAINING
    if name == "samples" and not model.prior.fitted:
        return "the prior is not fitted, so there is nothing to sample from"
    if name == "retrieval" and isinstance(model.network, DocumentedNetwork):
        return "the documented network has no text encoder, so no text can be searched for"
    if name in ("interpolation", "retrieval") and len(prepared.splits["val"]) < 2:
        return "it needs two held-out images, and there is one"
    return None


def _nearest(said: str, captions: Sequence[str]) -> str:
    """The true caption that shares most words with what was said."""
    words = set(said.split())
    return max(captions, key=lambda c: len(words & set(c.split())) / len(words | set(c.split())))
