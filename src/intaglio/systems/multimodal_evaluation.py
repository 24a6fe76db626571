"""What a trained multimodal model can do on held-out items, each number beside its null.

Shapes: N items, S image side, Z latent dimensions, T text positions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from intaglio.data import order
from intaglio.data.batches import fixed_batches
from intaglio.data.prepare import Captioned
from intaglio.data.tokenizer import PAD
from intaglio.history import Reading
from intaglio.history.reading import Evaluation, ratio, share
from intaglio.models import nulls
from intaglio.models.classifier import Judge
from intaglio.models.multimodal import MultimodalModel
from intaglio.models.networks import DocumentedNetwork
from intaglio.objectives.text import token_nats
from intaglio.systems.prior import encode_all, held_out_loss

GALLERY, SAMPLES = 256, 512


def evaluate(model: MultimodalModel, prepared: Captioned, judge: Judge | str, items: int = 1024) -> Evaluation:
    """Everything on this page; ``train/…`` is the same quantity on clean training items.

    ``judge`` tells objects apart, or is the reason why there is none.
    """
    model.eval()
    readings: dict[str, Reading] = {}
    missing: dict[str, str] = {}
    train, val = prepared.some("train", items), prepared.some("val", items)
    for side, chosen in (("train", train), ("val", val)):
        z = encode_all(model, prepared.data.images, chosen)
        readings |= {f"{side}/{k}": r for k, r in _captions(model, prepared, chosen, z).items()}
    latents = encode_all(model, prepared.data.images, val)
    if len(val) > 1:
        readings["val/caption/shuffled_latent_nats"] = _shuffled_latents(model, prepared, val, latents)
    else:
        missing["val/caption/shuffled_latent_nats"] = "it takes two held-out items"
    readings |= _image_quality(model, prepared, val, latents, missing)
    if isinstance(model.network, DocumentedNetwork):
        missing["val/retrieval"] = "the documented network has no text encoder"
    else:
        readings |= _retrieval(model, prepared, val, latents)
    if model.prior.flows:
        readings["val/prior/flow_loss"] = held_out_loss(model, prepared)
    if prepared.corpus.labels():
        readings |= _objects_in_captions(model, prepared, val, latents)
    else:
        missing["val/caption/object"] = "the items have no labels"
    if isinstance(judge, str):
        missing["val/prior/object"] = judge
    else:
        readings |= _objects_in_images(model, prepared, val, latents, judge)
    return Evaluation(readings, missing)


@torch.inference_mode()
def _per_item(
    model: MultimodalModel, prepared: Captioned, items: np.ndarray, latents: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nats, right tokens and tokens of each item's caption decoded from the given latents, (N,) each.

    Teacher-forced; START and padding are not counted.
    """
    columns: list[Tensor] = []
    for batch, z in zip(fixed_batches(prepared.data, items, 128), latents.split(128), strict=True):
        ids = batch.ids.to(model.device)
        logits, targets = model.network.caption_logits(z, ids[:, :-1]), ids[:, 1:]
        right = ((logits.argmax(-1) == targets) & (targets != PAD)).sum(1)
        columns.append(torch.stack([token_nats(logits, targets, PAD).sum(1), right, (targets != PAD).sum(1)]))
    nats, right, tokens = torch.cat(columns, dim=1).double().cpu().numpy()
    return nats, right, tokens


def _captions(model: MultimodalModel, prepared: Captioned, items: np.ndarray, latents: Tensor) -> dict[str, Reading]:
    """Surprise and accuracy, beside a bigram model's on the very same captions; intervals over items."""
    nats, right, tokens = _per_item(model, prepared, items, latents)
    scored = prepared.data.rows(items, order.draws(items, seed=0))
    texts = prepared.ids_of(prepared.splits["train"]), prepared.data.ids[scored]
    null = nulls.bigram(*texts, len(prepared.tokenizer))
    return {
        "caption/nats_per_token": ratio(nats, tokens, null.nats),
        "caption/token_accuracy": ratio(right, tokens, null.accuracy),
        "unigram/nats_per_token": Reading(nulls.unigram(*texts, len(prepared.tokenizer)).nats, n=len(items)),
    }


def _shuffled_latents(model: MultimodalModel, prepared: Captioned, items: np.ndarray, latents: Tensor) -> Reading:
    """What captions cost more, in nats per token, when each is decoded from another image's latent; paired by item."""
    mixed = order.permutation(len(items), 0, 1)
    other = torch.empty_like(latents)
    other[mixed] = latents[np.roll(mixed, 1)]
    own, _, tokens = _per_item(model, prepared, items, latents)
    strange, _, _ = _per_item(model, prepared, items, other)
    return ratio(strange - own, tokens, 0.0)


def _image_quality(
    model: MultimodalModel, prepared: Captioned, items: np.ndarray, latents: Tensor, missing: dict[str, str]
) -> dict[str, Reading]:
    """R² of reconstructions: over the mean training image, and over each image's own mean colour, a harder null."""
    images, n = prepared.data.images, len(items)
    errors, own = np.empty(n), np.empty(n)
    for start in range(0, n, 128):
        part = slice(start, start + 128)
        real = np.asarray(images[items[part]]).astype(np.float64) / 255
        made = model.decode(latents[part]).astype(np.float64) / 255
        errors[part] = np.square(made - real).mean((1, 2, 3))
        own[part] = np.square(real - real.mean((1, 2), keepdims=True)).mean((1, 2, 3))
    mean = nulls.mean_image_errors(images, prepared.some("train", 4096), items)
    readings = {"val/image/mse": ratio(errors, np.ones(n), float(mean.mean()))}
    for name, null in (("r2_over_mean_image", mean), ("r2_over_own_colour", own)):
        if null.sum() > 0:
            readings[f"val/image/{name}"] = ratio(null - errors, null, 0.0)
        else:
            missing[f"val/image/{name}"] = "the held-out images are all alike"
    return readings


def _retrieval(model: MultimodalModel, prepared: Captioned, items: np.ndarray, latents: Tensor) -> dict[str, Reading]:
    """Recall at 1 within galleries of 256 held-out items (or all, if fewer), both ways, one fixed caption an item.

    Galleries are mixed; finding another item with the very same caption counts, in the null as well.
    """
    size = min(GALLERY, len(items))
    mixed = order.permutation(len(items), 0, 2)[: len(items) // size * size]
    texts = np.array([prepared.corpus.captions(int(items[k]))[0] for k in mixed])
    image = model.embed_image(latents[mixed])
    text = torch.cat([model.embed_text(texts[i : i + 256].tolist()) for i in range(0, len(texts), 256)])
    hits, chance = {"image_to_text": 0, "text_to_image": 0}, 0.0
    for start in range(0, len(texts), size):
        part = slice(start, start + size)
        here = texts[part]
        similarity = (image[part] @ text[part].T).cpu()
        hits["image_to_text"] += int((here[similarity.argmax(1).numpy()] == here).sum())
        hits["text_to_image"] += int((here[similarity.argmax(0).numpy()] == here).sum())
        chance += float((here[:, None] == here[None]).mean()) * size / len(texts)
    return {f"val/retrieval/{way}_r1": share(k, len(texts), chance) for way, k in hits.items()}


def _objects_in_captions(
    model: MultimodalModel, prepared: Captioned, items: np.ndarray, latents: Tensor
) -> dict[str, Reading]:
    """The share of held-out images whose greedy caption names their main object; ``forced`` has the true words before
    each word."""
    labels = prepared.labels_of(items)
    named = [prepared.corpus.label_in(c) for z in latents.split(128) for c in model.caption(z)]
    known = [k for k, label in enumerate(labels) if label is not None]
    null = nulls.majority(prepared.labels_of(prepared.splits["train"]), [labels[k] for k in known])
    true, forced = [labels[k] for k in known], _forced(model, prepared, items, latents)
    return {
        "val/caption/object": share(_same([named[k] for k in known], true), len(known), null),
        "val/caption/object_forced": share(_same([forced[k] for k in known], true), len(known), null),
    }


@torch.inference_mode()
def _forced(model: MultimodalModel, prepared: Captioned, items: np.ndarray, latents: Tensor) -> list[str | None]:
    """The object that the likeliest tokens name when each follows the true ones; None where the caption names none."""
    found: list[str | None] = []
    for batch, z in zip(fixed_batches(prepared.data, items, 128), latents.split(128), strict=True):
        ids = batch.ids.to(model.device)
        likeliest = model.network.caption_logits(z, ids[:, :-1]).argmax(-1)
        likeliest = likeliest.where(ids[:, 1:] != PAD, torch.full_like(likeliest, PAD))
        found += [prepared.corpus.label_in(prepared.tokenizer.decode(row.tolist())) for row in likeliest]
    return found


def _objects_in_images(
    model: MultimodalModel, prepared: Captioned, items: np.ndarray, latents: Tensor, judge: Judge
) -> dict[str, Reading]:
    """What the judge sees: the object of the original in its reconstruction, and the object that the caption names in
    the image of the same latent.

    Latents of the prior stand beside those of held-out images and of a Gaussian fitted to them. The null of each puts
    the captions of other latents of the same kind to the images: where all samples are alike it equals the value.
    """
    labels = prepared.labels_of(items)
    common = nulls.majority(prepared.labels_of(prepared.splits["train"]), labels)

    def seen_and_said(z: Tensor) -> tuple[list[str], list[str | None]]:
        seen = judge(np.concatenate([model.decode(part) for part in z.split(128)]))
        return seen, [prepared.corpus.label_in(c) for part in z.split(128) for c in model.caption(part)]

    def agreement(seen: list[str], said: list[str | None]) -> Reading:
        return share(_same(seen, said), len(seen), _same(seen, [*said[1:], *said[:1]]) / len(seen))

    seen, said = seen_and_said(latents)
    sampled = seen_and_said(torch.cat([model.sample_prior(range(i, i + 128)) for i in range(0, SAMPLES, 128)]))
    return {
        "val/judge/accuracy": share(round(judge.accuracy * judge.n), judge.n, common),
        "val/image/object": share(_same(seen, labels), len(items), common),
        "val/posterior/object": agreement(seen, said),
        "val/prior/object": agreement(*sampled),
        "val/gaussian_prior/object": agreement(*seen_and_said(_gaussian_samples(latents, SAMPLES))),
    }


def _gaussian_samples(latents: Tensor, n: int) -> Tensor:
    """Draws (n, Z) of the Gaussian that has the mean and covariance of the given latents."""
    centred = latents - latents.mean(0)
    mix = torch.randn(n, len(latents), generator=torch.Generator().manual_seed(0)).to(latents)
    return latents.mean(0) + mix @ centred / len(latents) ** 0.5


def _same(a: Sequence[str | None], b: Sequence[str | None]) -> int:
    return sum(x == y and x is not None for x, y in zip(a, b, strict=True))
