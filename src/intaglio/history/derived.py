"""What follows from logged numbers by a formula, each beside what it would be if nothing had been learned."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.history.curves import Curve
from intaglio.history.series import Series
from intaglio.history.statistics import transient

NEAR = 0.01
"""Relative distance within which a spread is that of a default initialisation, or a square of ratios a known width."""
STEADY = 0.05
"""Settled coefficient of variation up to which a spread is one number."""
SMALLEST, LARGEST = 1e-9, 1e9
"""Latents beyond this are broken, and no formula is needed to say so."""

_LATENT = {"latent", "latents", "z", "posterior", "encoder", "embedding", "embeddings", "code"}
_SQUARED = {"mse", "reconstruction", "recon", "rec", "image", "img", "pixel", "pixels", "l2"}
_CONTRASTIVE = {"contrastive", "infonce", "clip", "xent"}
_TOKENS = {"caption", "captions", "nll", "ce", "entropy", "crossentropy", "token", "text", "lm", "language", "answer"}
_ACCURACY = {"accuracy", "acc", "top1"}
_NO_LOSS = {
    *(
        "perplexity",
        "ppl",
        "weight",
        "weighted",
        "gradient",
        "grad",
        "norm",
        "share",
        "rate",
        "lr",
        "std",
        "mean",
        "min",
    ),
    *("max", "psnr", "ssim", "bleu", "low", "high", "l1", "mae", "bce", *_ACCURACY),
}


@dataclass(frozen=True)
class Derived:
    """A quantity that follows from logged ones: ``value`` beside its ``null``, and in words with its formula."""

    name: str
    value: float
    null: float | None
    unit: str
    said: str


def derived(series: Mapping[str, Series], config: Mapping[str, Any]) -> tuple[Derived, ...]:
    """Everything that follows from metrics and the settings of the run.

    Statistics of latents are means after their transient, losses and accuracies medians of their last 200th.
    """
    numbers = list(_numbers(config))
    places = [m[1] for n in series if (m := re.fullmatch(r"(.*[/_. -])std", n)) and _LATENT & set(_words(n))]
    found = [d for place in places for d in _latent(place, series, numbers)]
    for name, s in series.items():
        if (value := _last(s)) is not None and (
            one := _of_value(name, set(_words(name)), value, s, numbers)
        ) is not None:
            found.append(one)
    return tuple(found)


def _latent(place: str, series: Mapping[str, Series], numbers: list[tuple[str, float]]) -> Iterator[Derived]:
    """What the mean, spread, norm, least and greatest entry of latents say of their distance from N(0, I)."""
    settled = {q: _settled(series[place + q]) for q in ("std", "mean", "norm", "min", "max") if place + q in series}
    (std, cv), (mean, _) = settled["std"], settled.get("mean", (0.0, 0.0))
    if not (SMALLEST < std < LARGEST and all(abs(value) < LARGEST for value, _ in settled.values())):
        return
    kl = 0.5 * (mean**2 + std**2 - 1 - math.log(std**2))
    yield Derived(
        f"{place}kl_per_dimension",
        kl,
        0.0,
        "nats",
        f"KL(N(μ, σ²) ‖ N(0, 1)) = ½ (μ² + σ² − 1 − ln σ²) at μ = {mean:.4g}, σ = {std:.4g}: unless it is near 0, "
        "samples of N(0, 1) are not where the latents are",
    )
    if (norm := settled.get("norm", (0.0, 0.0))[0]) > 0:
        d = _width(norm**2 / (std**2 + mean**2), numbers)
        yield Derived(f"{place}dimensions", d, None, "", "d = norm² / (σ² + μ²): the norm is no finding beside the std")
        yield Derived(f"{place}kl", kl * d, 0.0, "nats", f"{d:,.0f} dimensions of {kl:.4g} nats each")
        yield Derived(
            f"{place}norm",
            norm,
            math.sqrt(d),
            "",
            f"√d = {math.sqrt(d):.4g} is due where the {d:,.0f} dimensions are N(0, 1)",
        )
    low, high = settled.get("min", (0.0, 0.0))[0], settled.get("max", (0.0, 0.0))[0]
    if low < 0 < high:
        ratio = max(high, -low) / min(high, -low)
        yield Derived(
            f"{place}asymmetry",
            100 * abs(high + low) / (high - low),
            0.0,
            "%",
            f"|max + min| / (max − min) of {low:.4g} and {high:.4g}, whose ratio is {ratio:.4g}",
        )
    if cv <= STEADY and (inputs := _fan_in(std, numbers)):
        yield from _bias(place, std, inputs, max(high, -low))


def _bias(place: str, std: float, inputs: int, reach: float) -> Iterator[Derived]:
    due = 1 / math.sqrt(3 * inputs)
    said = (
        f"it equals 1/√(3 · {inputs}) = {due:.4g}, the std of the default bias of Linear({inputs}, …), uniform within "
        f"±1/√{inputs} (He et al. 2015, as PyTorch has it): suspected is that the latent ignores its input. The "
        "variance between inputs beside that within one shows it: log both"
    )
    if reach:
        said += f" (entries reach ±{reach:.3g}; such a bias alone would end at ±{1 / math.sqrt(inputs):.3g})"
    yield Derived(f"{place}std", std, due, "", said)


def _fan_in(std: float, numbers: list[tuple[str, float]]) -> int | None:
    """The width of a layer whose default bias has this spread: one of the settings', else a power of two."""
    due = 1 / (3 * std * std)
    known = [int(v) for _, v in numbers if v == int(v) and 16 <= v <= 65536]
    near = min([*known, *(1 << k for k in range(4, 14))], key=lambda width: abs(width / due - 1))
    return near if abs(math.sqrt(near / due) - 1) < NEAR else None


def _width(d: float, numbers: list[tuple[str, float]]) -> float:
    """The width that is meant: of the settings', else a power of two or three times one, else the nearest number."""
    known = [v for _, v in numbers if v > 1] + [float(m << k) for k in range(2, 16) for m in (1, 3)]
    near = min(known, key=lambda width: abs(width - d))
    return near if abs(near - d) < NEAR * d else float(round(d)) if d > 20 else d


def _of_value(name: str, words: set[str], value: float, s: Series, numbers: list[tuple[str, float]]) -> Derived | None:
    """What one loss or accuracy is in another unit, or beside its null."""
    null = s.null if np.isfinite(s.nulls[-1]) else None
    if _words(name)[-1:] and _words(name)[-1] in _ACCURACY and null is None and 0 <= value <= 100:
        said = f"{value if value > 1 else 100 * value:.1f} % without a null is no finding: log what guessing the "
        return Derived(name, value, None, "", said + "commonest answer gets, or a table of which token follows which")
    if words & _NO_LOSS:
        return None
    if words & _SQUARED and SMALLEST < value <= 1:
        unit = value <= 0.25  # beyond, plain grey would be nearer if pixels were in [0, 1]
        low, wide = (10 * math.log10(span**2 / value) for span in (1, 2))
        said = f"10 log₁₀({1 if unit else 4} / {value:.4g}), if it is the mean squared error of pixels in "
        said += f"[0, 1]; {wide:.2f} dB if in [−1, 1]" if unit else "[−1, 1]; it is too much for pixels in [0, 1]"
        return Derived(f"{name}: PSNR", low if unit else wide, None, "dB", said)
    if words & _CONTRASTIVE:
        batch = next((v for k, v in numbers if k in ("batch_size", "batchsize", "batch")), 0)
        chance = math.log(batch) if batch > 1 else 0.0
        said = f"ln N = {chance:.4g} in a batch of {batch:,.0f} is guessing; {chance - value:.3g} nats are learnt"
        return Derived(name, value, chance, "nats", said) if chance else None
    if words & _TOKENS and 0 < value < 15:
        vocabulary = next((v for k, v in numbers if "vocab" in k and v > 1), None)
        said = f"exp({value:.4g}), if it is a cross-entropy in nats per token: as if it chose among so many"
        guess = math.exp(null) if null is not None else vocabulary
        return Derived(f"{name}: perplexity", math.exp(value), guess, "", said)
    return None


def _settled(s: Series) -> tuple[float, float]:
    """Mean after the transient, and coefficient of variation there; NaN where nothing is finite."""
    curve = Curve.of(s)
    if not len(curve):
        return math.nan, math.nan
    rest = curve.values[transient(curve) :]
    mean = float(rest.mean())
    return mean * curve.unit, float(rest.std()) / abs(mean) if mean else math.nan


def _last(s: Series) -> float | None:
    """The median of the last 200th of the rows that are finite; None where those are none."""
    late = np.asarray(s.values[-max(1, len(s) // 200) :], np.float64)
    late = late[np.abs(late) < math.exp(700)]  # neither NaN nor beyond what a mean of two can hold
    return float(np.median(late)) if len(late) else None


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+\d*|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of nested settings, by its innermost name; those of lists by the list's."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one):
                    yield str(name).lower(), float(one)
