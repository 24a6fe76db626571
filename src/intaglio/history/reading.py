"""One measured number with what it would be if nothing had been learned."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np


@dataclass(frozen=True, slots=True)
class Reading:
    """A measurement in the unit of its name, beside its null at the same sample size.

    Args:
        value: what was measured.
        null: its value under the null model, or None where none is known; it says nothing about the sign of "better".
        n: number of samples that ``value`` rests on.
        low: lower end of the 95 % interval, where the value was resampled.
        high: its upper end.
    """

    value: float
    null: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """An answer too: why there is no reading, and what it would take."""

    reason: str


Measured = Reading | NotMeasured


def share(hits: int, n: int, null: float | None = None) -> Reading:
    """A proportion with Wilson's 95 % interval (Wilson 1927)."""
    p, z2 = hits / n, 1.959964**2
    centre, half = (
        (p + z2 / (2 * n)) / (1 + z2 / n),
        math.sqrt(p * (1 - p) / n * z2 + z2**2 / (4 * n**2)) / (1 + z2 / n),
    )
    return Reading(p, null, n, max(0.0, centre - half), min(1.0, centre + half))


def ratio(numerators: np.ndarray, denominators: np.ndarray, null: float | None = None) -> Reading:
    """Σ numerators / Σ denominators over items (N,) each, with a 95 % bootstrap interval over the items.

    Source: Efron & Tibshirani 1993, chapter 13; 1000 draws from a fixed seed.
    """
    n = len(numerators)
    draws = np.random.default_rng(0).integers(n, size=(1000, n))
    below = denominators[draws].sum(1)
    low, high = np.quantile(numerators[draws].sum(1) / np.where(below == 0, 1, below), [0.025, 0.975])
    value = float(numerators.sum() / denominators.sum())
    return Reading(value, null, n, float(low), float(high)) if n > 1 else Reading(value, null, n)


class Evaluation(NamedTuple):
    """Readings named ``<split>/<site>/<quantity>``, and why others are missing: {quantity: reason}."""

    readings: dict[str, Reading]
    not_measured: dict[str, str]

    @classmethod
    def of(cls, found: Mapping[str, Measured]) -> Self:
        """Readings and gaps of what was found, apart."""
        readings = {name: m for name, m in found.items() if isinstance(m, Reading)}
        return cls(readings, {name: m.reason for name, m in found.items() if isinstance(m, NotMeasured)})
