"""What a trained multimodal model can do on held-out items, each number beside its null.

Shapes: N items, S image side, Z latent dimensions, T text positions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from intaglio.data.batches import Batch, fixed_batches
from intaglio.data.prepare import Prepared
from intaglio.data.tokenizer import PAD
from intaglio.history import Reading
from intaglio.history.reading import share
from intaglio.models import nulls
from intaglio.models.classifier import Judge
from intaglio.models.multimodal import MultimodalModel
from intaglio.models.networks import DocumentedNetwork
from intaglio.objectives.text import token_nats
from intaglio.systems.prior import encode_all, held_out_loss

GALLERY, SAMPLES = 256, 512


def evaluate(model: MultimodalModel, prepared: Prepared, judge: Judge | None, items: int = 1024) -> dict[str, Reading]:
    """Readings named ``<split>/<site>/<quantity>``; ``train/…`` is the same quantity on clean training items.

    Objects are told by the classes of the corpus; where it has none, what rests on them is left out.
    """
    model.eval()
    train, val = prepared.some("train", items), prepared.some("val", items)
    text_null = nulls.bigram(prepared.ids_of(prepared.splits["train"]), prepared.ids_of(val), len(prepared.tokenizer))
    readings: dict[str, Reading] = {}
    for side, chosen in (("train", train), ("val", val)):
        nats, right, tokens = _caption_quality(model, prepared, chosen)
        readings[f"{side}/caption/nats_per_token"] = Reading(nats, text_null.nats, tokens)
        readings[f"{side}/caption/token_accuracy"] = share(right, tokens, text_null.accuracy)
    latents = encode_all(model, prepared.data.images, val)
    readings["val/caption/shuffled_latent_nats"] = _shuffled_latents(model, prepared, val, latents)
    readings |= _image_quality(model, prepared, val, latents)
    if not isinstance(model.network, DocumentedNetwork):
        readings |= _retrieval(model, prepared, val, latents)
    if model.prior.flows:
        readings["val/prior/flow_loss"] = held_out_loss(model, prepared)
    if judge:
        readings |= _objects(model, prepared, val, latents, judge)
    return readings


@torch.inference_mode()
def _caption_quality(model: MultimodalModel, prepared: Prepared, items: np.ndarray) -> tuple[float, int, int]:
    """Nats per token, right tokens and tokens, teacher-forced, without START and padding."""
    nats, right, tokens = 0.0, 0, 0
    for batch in fixed_batches(prepared.data, items, 128):
        z = model.network.encode_image(model.to_range(batch.images.to(model.device))).mean
        logits, targets = _logits(model, z, batch)
        real = targets != PAD
        nats += float(token_nats(logits, targets, PAD).sum())
        right += int(((logits.argmax(-1) == targets) & real).sum())
        tokens += int(real.sum())
    return nats / tokens, right, tokens


def _logits(model: MultimodalModel, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    ids = batch.ids.to(model.device)
    return model.network.caption_logits(z, ids[:, :-1]), ids[:, 1:]


@torch.inference_mode()
def _shuffled_latents(model: MultimodalModel, prepared: Prepared, items: np.ndarray, latents: Tensor) -> Reading:
    """What captions cost more, in nats per token, when each is decoded from another image's latent.

    The interval is a paired bootstrap over the items.
    """
    other = torch.roll(latents, 1, dims=0)
    extra, counts = [], []
    for start, batch in zip(range(0, len(items), 128), fixed_batches(prepared.data, items, 128), strict=True):
        part = slice(start, start + 128)
        costs = []
        for z in (latents[part], other[part]):
            logits, targets = _logits(model, z, batch)
            costs.append(token_nats(logits, targets, PAD).sum(1))
        extra.append((costs[1] - costs[0]).cpu().numpy())
        counts.append((batch.ids[:, 1:] != PAD).sum(1).numpy())
    difference, tokens = np.concatenate(extra), np.concatenate(counts)
    draws = np.random.default_rng(0).integers(len(items), size=(1000, len(items)))
    spread = difference[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.quantile(spread, [0.025, 0.975])
    return Reading(float(difference.sum() / tokens.sum()), 0.0, len(items), float(low), float(high))


def _image_quality(
    model: MultimodalModel, prepared: Prepared, items: np.ndarray, latents: Tensor
) -> dict[str, Reading]:
    """R² of reconstructions: over the mean training image, and over each image's own mean colour, a harder null."""
    images = prepared.data.images
    error, own = 0.0, 0.0
    for start in range(0, len(items), 128):
        real = np.asarray(images[items[start : start + 128]]).astype(np.float64) / 255
        made = model.decode(latents[start : start + 128]).astype(np.float64) / 255
        error += float(np.square(made - real).mean((1, 2, 3)).sum())
        own += float(np.square(real - real.mean((1, 2), keepdims=True)).mean((1, 2, 3)).sum())
    mean_error = nulls.mean_image_error(images[prepared.some("train", 4096)], images[items])
    n = len(items)
    return {
        "val/image/r2_over_mean_image": Reading(1 - error / n / mean_error, 0.0, n),
        "val/image/r2_over_own_colour": Reading(1 - error / own, 0.0, n),
        "val/image/mse": Reading(error / n, mean_error, n),
    }


def _retrieval(model: MultimodalModel, prepared: Prepared, items: np.ndarray, latents: Tensor) -> dict[str, Reading]:
    """Recall at 1 within galleries of 256 held-out items (or all, if fewer), both ways, one fixed caption an item."""
    size = min(GALLERY, len(items))
    galleries = len(items) // size
    texts = [prepared.corpus.captions(int(i))[0] for i in items[: galleries * size]]
    image = model.embed_image(latents[: galleries * size])
    text = torch.cat([model.embed_text(texts[i : i + 256]) for i in range(0, len(texts), 256)])
    hits = {"image_to_text": 0, "text_to_image": 0}
    for g in range(galleries):
        part = slice(g * size, (g + 1) * size)
        similarity = image[part] @ text[part].T
        truth = torch.arange(size, device=similarity.device)
        hits["image_to_text"] += int((similarity.argmax(1) == truth).sum())
        hits["text_to_image"] += int((similarity.argmax(0) == truth).sum())
    return {f"val/retrieval/{way}_r1": share(k, galleries * size, 1 / size) for way, k in hits.items()}


def _objects(
    model: MultimodalModel, prepared: Prepared, items: np.ndarray, latents: Tensor, judge: Judge
) -> dict[str, Reading]:
    """Main objects: in captions of held-out images, in reconstructions, and in samples of the prior with captions.

    A sample counts as right when the judge sees in its image the object that its own caption names first. Its null is
    the same for latents of the Gaussian that has the mean and covariance of held-out latents.
    """
    labels = prepared.labels_of(items)
    common = nulls.majority(prepared.labels_of(prepared.splits["train"]), labels)
    named = [prepared.corpus.label_in(c) for c in model.caption(latents)]
    seen = judge(np.concatenate([model.decode(latents[i : i + 128]) for i in range(0, len(items), 128)]))

    def agreement(z: Tensor) -> int:
        said = [prepared.corpus.label_in(c) for c in model.caption(z)]
        return _same(judge(np.concatenate([model.decode(part) for part in z.split(128)])), said)

    sampled, gaussian = model.sample_prior(range(SAMPLES)), _gaussian_samples(latents, SAMPLES)
    return {
        "val/caption/object": share(_same(named, labels), len(items), common),
        "val/image/object": share(_same(seen, labels), len(items), common),
        "val/judge/accuracy": share(round(judge.accuracy * judge.n), judge.n, common),
        "val/prior/object": share(agreement(sampled), SAMPLES, agreement(gaussian) / SAMPLES),
    }


def _gaussian_samples(latents: Tensor, n: int) -> Tensor:
    """Draws (n, Z) of the Gaussian that has the mean and covariance of the given latents."""
    centred = latents - latents.mean(0)
    mix = torch.randn(n, len(latents), generator=torch.Generator().manual_seed(0)).to(latents)
    return latents.mean(0) + mix @ centred / len(latents) ** 0.5


def _same(a: Sequence[str | None], b: Sequence[str | None]) -> int:
    return sum(x == y and x is not None for x, y in zip(a, b, strict=True))
