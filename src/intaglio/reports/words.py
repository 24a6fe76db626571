"""Quantities in plain words: what each is called, which way is better, what its null stands for, how it is written."""

import math
from typing import NamedTuple

from intaglio.history import Reading


class Quantity(NamedTuple):
    """``better`` is +1 where more is better, −1 where less is, 0 where unknown; ``null`` names the null model."""

    title: str
    better: int = 0
    null: str = ""
    unit: str = ""


BIGRAM, CHANCE, COMMONEST = "bigram model", "guess", "commonest object"
QUANTITIES = {
    "caption/token_accuracy": Quantity("Caption: next token right", 1, BIGRAM, "%"),
    "caption/nats_per_token": Quantity("Caption: surprise per token", -1, BIGRAM, "nats"),
    "unigram/nats_per_token": Quantity("Caption: surprise of a unigram model", 0, "", "nats"),
    "caption/shuffled_latent_nats": Quantity("Caption: cost of another image’s latent", 1, "latent ignored", "nats"),
    "caption/object": Quantity("Caption names the main object", 1, COMMONEST, "%"),
    "image/r2_over_mean_image": Quantity("Image: variance explained over the mean image", 1, "mean image", "R²"),
    "image/r2_over_own_colour": Quantity("Image: variance explained over its mean colour", 1, "own mean colour", "R²"),
    "image/mse": Quantity("Image: squared error of reconstructions", -1, "mean image"),
    "image/object": Quantity("Image: reconstruction shows the object", 1, COMMONEST, "%"),
    "prior/object": Quantity("Samples: image shows what its caption names", 1, "captions of others", "%"),
    "posterior/object": Quantity("Real latents: image shows what its caption names", 1, "captions of others", "%"),
    "gaussian_prior/object": Quantity(
        "Gaussian latents: image shows what its caption names", 1, "captions of others", "%"
    ),
    "prior/flow_loss": Quantity("Samples: flow loss of the prior", -1, "Gaussian"),
    "retrieval/image_to_text_r1": Quantity("Search: an image finds its caption first", 1, CHANCE, "%"),
    "retrieval/text_to_image_r1": Quantity("Search: a caption finds its image first", 1, CHANCE, "%"),
    "judge/accuracy": Quantity("Judge of objects, on real images", 1, COMMONEST, "%"),
}

LOSS_UNITS = {
    "reconstruction": "L1 + MSE",
    "caption": "nats per token",
    "contrastive": "nats per item",
    "kl": "nats per image",
    "total": "weighted sum",
}


def quantity(name: str) -> Quantity:
    """The words for ``<site>/<quantity>``; an unknown one keeps its own name."""
    return QUANTITIES.get(name) or Quantity(name)


def paired(readings: dict[str, Reading]) -> dict[str, tuple[Reading | None, Reading | None]]:
    """``<site>/<quantity>`` → (training, held-out), the known ones first and in their order."""
    names = dict.fromkeys(name.split("/", 1)[1] for name in readings)
    known = [name for name in QUANTITIES if name in names]
    ordered = [*known, *(name for name in names if name not in QUANTITIES)]
    return {name: (readings.get(f"train/{name}"), readings.get(f"val/{name}")) for name in ordered}


def written(value: float | None, unit: str = "") -> str:
    """A number as a person reads it: shares in per cent, others with three digits."""
    if value is None:
        return "not measured"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 5)}f}".replace("-", "−") if abs(value) < 1e5 else f"{value:.3g}"


def interval(reading: Reading, unit: str = "") -> str:
    """The 95 % interval, or nothing where none was measured."""
    if reading.low is None or reading.high is None:
        return ""
    return f"{written(reading.low, unit).removesuffix(' %')} to {written(reading.high, unit)}"


def beats_null(reading: Reading, better: int) -> bool | None:
    """Whether the value, with all of its interval, is on the better side of its null; None where that is unknown."""
    if not better or reading.null is None:
        return None
    worst = reading.low if better > 0 else reading.high
    return better * ((reading.value if worst is None else worst) - reading.null) > 0
