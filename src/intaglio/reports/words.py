"""Quantities in plain words: what each is called, which way is better, what its null stands for, how it is written."""

import math
import re
from typing import NamedTuple

from intaglio.history import Reading


class Quantity(NamedTuple):
    """``better`` is +1 where more is better, −1 where less is, 0 where unknown; ``null`` names the null model."""

    title: str
    better: int = 0
    null: str = ""
    unit: str = ""


BIGRAM, CHANCE, COMMONEST, REAL = "bigram model", "guess", "commonest object", "real images"
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
    "round_trip/r2": Quantity("Autoencoder: variance explained over the mean image", 1, "mean image", "R²"),
    "round_trip/psnr": Quantity("Autoencoder: PSNR", 1, "mean image", "dB"),
    "round_trip/frechet_distance": Quantity("Autoencoder: Fréchet distance of what it gives back", 0, REAL),
    "samples/frechet_distance": Quantity("Samples: Fréchet distance (own features, no FID)", 0, REAL),
    "samples/kernel_distance": Quantity("Samples: kernel distance (own features, no KID)", 0, "none"),
    "samples/precision": Quantity("Samples: share within the real ones (precision)", 0, REAL, "%"),
    "samples/recall": Quantity("Samples: share of real ones within them (recall)", 0, REAL, "%"),
    "samples/copied_share": Quantity("Samples: copies of training images", -1, "unseen images", "%"),
    "samples/neighbour_ratio": Quantity("Samples: nearest training image over the next", 1, "unseen images"),
    "guidance/used": Quantity("Samples: guidance weight w in use"),
    "condition/permuted_loss": Quantity("Condition: cost of another image’s", 1, "ignored", "%"),
    "latent/clamped_share": Quantity("Latents: cut off at a clamp", -1, "none", "%"),
    "judge/accuracy": Quantity("Judge of objects, on real images", 1, COMMONEST, "%"),
}
SERIAL = {
    r"guidance\.(.+)/class_accuracy": Quantity("Samples at w = {}: the class that was asked for", 1, CHANCE, "%"),
    r"guidance\.(.+)/class_accuracy\.(.+)": Quantity("Samples at w = {}: {}", 1, CHANCE, "%"),
    r"guidance\.(.+)/clipped_share": Quantity("Samples at w = {}: black or white pixels", 0, REAL, "%"),
    r"guidance\.(.+)/contrast_ratio": Quantity("Samples at w = {}: contrast", 0, REAL),
    r"guidance\.(.+)/diversity": Quantity("Samples at w = {}: diversity within a class", 0, REAL),
    r"latent\.(\d+)/scaled_std": Quantity("Latent channel {}: standard deviation, as diffusion sees it", 0, "due"),
}
"""Quantities of which there are many; what the pattern catches stands in their title."""

LOSS_UNITS = {
    "reconstruction": "L1 + MSE",
    "caption": "nats per token",
    "contrastive": "nats per item",
    "kl": "nats per image",
    "total": "weighted sum",
}


def quantity(name: str) -> Quantity:
    """The words for ``<site>/<quantity>``; an unknown one keeps its own name."""
    if name in QUANTITIES:
        return QUANTITIES[name]
    for pattern, what in SERIAL.items():
        if found := re.fullmatch(pattern, name):
            return what._replace(title=what.title.format(*found.groups()))
    return Quantity(name)


def detail(name: str) -> bool:
    """Whether ``<site>/<quantity>`` is a part of another one, such as the accuracy of one class."""
    return name.count(".") > 1


HIGHER = (
    "accuracy",
    "psnr",
    "ssim",
    "bleu",
    "r2",
    "recall",
    "precision",
    "auc",
    "f1",
    "top1",
    "object",
    "active_units",
)
LOWER = ("loss", "mse", "error", "nats_per_token", "nll", "distance")


def better(name: str) -> int:
    """Which way is better for ``<site>/<quantity>``: +1 more, −1 less, 0 unknown, as for a KL or a quantiser's term."""
    known = quantity(name).better
    site, _, last = name.rpartition("/")
    if known or any(word in last for word in ("kl", "vq", "commit", "codebook", "discriminator", "generator")):
        return known
    if site.endswith("loss") or any(last.endswith(word) for word in LOWER):
        return -1
    return 1 if any(word in last for word in HIGHER) else 0


def titled(name: str) -> str:
    """``<site>/<quantity>`` as a person says it: “total loss”, “learning rate”, “latent std”; others as they are."""
    site, _, last = name.partition("/")
    if not last or "/" in last:
        return name
    words = last.replace("_", " ")
    if site == "loss":
        return f"{words} loss"
    if site in ("optimizer", "logged"):
        return {"rate": "learning rate"}.get(last, words)
    if site.startswith("optimizer.") and last == "rate":
        return f"learning rate of {site.removeprefix('optimizer.').replace('.', ', ').replace('_', ' ')}"
    return f"{site} {words}"


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


def short(value: float | None) -> str:
    """A number with four digits, whatever its size."""
    if value is None or not math.isfinite(value):
        return written(value)
    text = f"{value:.4g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa}e{int(exponent)}"
    elif abs(value) >= 1e4:
        text = f"{value:,.0f}"
    return text.replace("-", "−")


def percent(share: float) -> str:
    """A share in per cent with three digits, or a factor where it is large."""
    if not math.isfinite(share):
        return "unknown"
    if abs(share) >= 10:
        return f"{short(share)} times"
    return f"{100 * share:.3g} %".replace("-", "−")


def change(share: float) -> str:
    """A relative change with its sign."""
    return ("+" if share > 0 else "") + percent(share)


COUNTED = {"step", "epoch", "row", "iteration", "batch"}


def unit(axis: str, many: bool = True) -> str:
    """What the column ``axis`` counts, as a person says it: “steps” of ``global_step``, “epochs” of ``Epoch``."""
    word = axis.lower().removeprefix("optimizer ").removeprefix("trainer/").removeprefix("global_").strip("_ ")
    word = {"iter": "iteration", "it": "iteration", "steps": "step", "epochs": "epoch"}.get(word, word)
    if word not in COUNTED:
        return axis
    return {"batch": "batches"}.get(word, f"{word}s") if many else word


def duration(seconds: float | None) -> str:
    """A time as a person says it."""
    if seconds is None:
        return "an unrecorded time"
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


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


SITES = ("loss", "logged", "caption", "image", "latent", "codes", "vq", "pair", "retrieval", "optimizer")
LAST = ("weight", "speed", "text")
COUNTS = "epoch|batch|iter(ation)?s?|steps?|time(stamp)?|runtime|elapsed|dur(ation)?|eta|seed|best|system|event_cp"
PREFERRED = ("total", "rate", "accuracy", "std", "norm", "covariance_rank", "varying_share", "perplexity")


def bookkeeping(name: str) -> bool:
    """Whether a name that is none of ours is that of a counter, a clock or a mark, which says nothing of a model."""
    return re.search(f"(^|[^a-z])({COUNTS})($|[^a-z])", name, re.IGNORECASE) is not None


def importance(name: str) -> tuple[int, int, str, int]:
    """What metrics are sorted by: total losses, their terms, what is judged, statistics, names of others, bookkeeping.

    Training and held-out values of one quantity stand together.
    """
    split, _, rest = name.partition("/")
    site, _, last = rest.partition("/")
    if not last or split not in ("train", "val", "test"):
        return (len(SITES) + 9 if bookkeeping(name) else len(SITES), 0, name, 0)
    first = PREFERRED.index(last) if last in PREFERRED else len(PREFERRED)
    place = SITES.index(site) if site in SITES else len(SITES) + 1 + (LAST.index(site) + 1 if site in LAST else 0)
    return (place, first, f"{site}/{last}", split == "train")
