"""What a trained image autoencoder keeps of held-out images, each number beside its null."""

import numpy as np

from intaglio.data.prepare import Pictured
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.history.reading import Evaluation, ratio, share
from intaglio.models import nulls
from intaglio.models.autoencoder import Autoencoder, RoundTrip, round_trip
from intaglio.models.classifier import Judge


def evaluate(model: Autoencoder, prepared: Pictured, judge: Judge | str, items: int = 1024) -> Evaluation:
    """R² and PSNR of decode(encode(x)), by a judge its object too; ``train/…`` are those of clean training items."""
    found: dict[str, Measured] = {}
    images, train = prepared.data.images, prepared.some("train", 4096)
    for side in ("train", "val"):
        trip = round_trip(model, images, train, prepared.some(side, items))
        found |= {f"{side}/{name}": m for name, m in quality(trip).items()}
    val = prepared.some("val", items)
    z = np.concatenate([model.latents(images[part]) for part in _chunks(val)])
    found |= {f"val/latent.{k}/scaled_std": Reading(float(z[:, k].std()), 1.0, len(val)) for k in range(z.shape[1])}
    if isinstance(judge, str):
        found["val/image/object"] = NotMeasured(judge)
    else:
        labels = prepared.labels_of(val)
        common = nulls.majority(prepared.labels_of(prepared.splits["train"]), labels)
        seen = [name for part in _chunks(val) for name in judge(model.decode_images(model.encode(images[part])))]
        right = sum(a == b for a, b in zip(seen, labels, strict=True))
        found["val/image/object"] = share(right, len(val), common)
        found["val/judge/accuracy"] = share(round(judge.accuracy * judge.n), judge.n, common)
    return Evaluation.of(found)


def quality(trip: RoundTrip) -> dict[str, Measured]:
    """R² over the mean training image and PSNR in dB of a round trip."""
    if not trip.null_errors.sum() > 0:
        return {"round_trip/r2": NotMeasured("the held-out images are all alike")}
    return {
        "round_trip/r2": ratio(trip.null_errors - trip.errors, trip.null_errors, 0.0),
        "round_trip/psnr": Reading(trip.psnr, trip.null_psnr, len(trip.errors)),
    }


def _chunks(items: np.ndarray, size: int = 128) -> list[np.ndarray]:
    return [items[at : at + size] for at in range(0, len(items), size)]
