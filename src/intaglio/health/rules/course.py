"""The course of a curve, where no null is known: has it moved, has it been lost, has it parted from its twin? No torch.

Positive curves are read in their logarithm, so that a loss of 5e10 and one of 3e-4 are judged alike.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from intaglio.history import Series

START = 3
"""Rows that the start of a training may take, at most; a tenth of fewer than thirty."""

SAME = 0.01
"""Relative change below which a curve has not moved, however smooth it is."""

MOVED = 0.25
"""Relative fall of three rows' median that a curve must have made to have moved and come back."""

GAINED = 0.1
"""Fall of the logarithm from the first rows to the best from which anything had been gained."""

GIVEN_UP = 0.3
"""Share of what a curve has gained, in its logarithm, that it must give up to be lost."""

UNSEEN = 0.15
"""Relative fall that must be excluded, by two standard errors, before a curve is said to stand."""

EXPLODED = 100.0
"""Times of the later level from which the first rows are an explosion, and their fall is no learning."""


def noise(values: np.ndarray) -> float:
    """Robust standard deviation of a row around its neighbours, unmoved by a smooth course and by a few jumps.

    1.4826 · MAD of the second differences / √6 (Gasser et al. 1986, eq. 1; Rousseeuw & Croux 1993).
    """
    bends = np.diff(values, 2)
    return 0.6053 * float(np.median(np.abs(bends - np.median(bends)))) if len(bends) > 1 else 0.0


def finite(s: Series) -> Series:
    """The rows whose value is a number."""
    good = np.isfinite(s.values)
    return s if good.all() else s.at(good)


def scaled(values: np.ndarray) -> np.ndarray:
    """Logarithm of what is positive throughout, so that differences are relative; else values by their own size."""
    if len(values) and values.min() > 0:
        return np.log(values)
    return values / (float(np.median(np.abs(values))) or 1.0)


@dataclass(frozen=True)
class Stuck:
    """A curve that has not moved: ``since`` says where from, ``first`` and ``level`` what it was and is."""

    since: Literal["start", "explosion", "first rows"]
    first: float
    level: float


def stuck(s: Series, errors: float = 3.0) -> Stuck | None:
    """Whether a curve of at least eight finite rows stands, or has only risen, since its first rows.

    Compared are the medians of the first and the last third of what follows the first rows, in standard errors.
    """
    values = s.values
    opening = max(1, min(START, len(values) // 10))
    body = scaled(values[opening:])
    third = len(body) // 3
    if third < 2:
        return None
    early, late = float(np.median(body[:third])), float(np.median(body[-third:]))
    error = 1.2533 * noise(body) * (2 / third) ** 0.5  # of the difference of two medians
    best = float(np.median(sliding_window_view(body, 3), axis=1).min())
    top = max(early, float(np.median(scaled(values)[:opening])))
    if early - late > max(SAME, errors * error) or min(top, late) - best > max(MOVED, 2 * errors * noise(body)):
        return None
    if early - late + 2 * error > UNSEEN:
        return None  # it may have moved by more than that, and the noise hides it
    first, level = float(np.median(values[:opening])), float(np.median(values[opening:][-third:]))
    fallen = first - level
    if fallen <= 0.1 * abs(first):
        return Stuck("start", first, level)
    if level > 0 and first > EXPLODED * level:
        spread = float(np.ptp(np.quantile(values[opening:], [0.25, 0.75])))
        return Stuck("explosion", first, level) if spread < 0.02 * level else None
    return Stuck("first rows", first, level)


def improved(s: Series, by: float = 0.1) -> bool:
    """Whether a curve of losses has fallen since its first rows, by that share and beyond its noise."""
    return (
        len(s) >= 4
        and stuck(s) is None
        and s.values[0] - float(np.median(s.values[-max(1, len(s) // 5) :])) > by * abs(float(s.values[0]))
    )


@dataclass(frozen=True)
class Lost:
    """A stretch in which a curve gave up what it had gained: its steps, its best before, its peak, its last value."""

    first: int
    last: int
    rows: int
    best: float
    peak: float
    now: float
    at_end: bool
    recovered: bool


def lost(s: Series, times: float = 1.5, deviations: float = 8.0) -> Lost | None:
    """The gravest stretch of a positive curve above ``times`` its best before, and beyond its noise; None without one.

    At the end one row is a stretch; before it three are, and a twelfth of the run.
    """
    values = s.values
    if len(values) < 8 or values.min() <= 0:
        return None
    log = np.log(values)
    width = max(1, len(log) // 200)
    smooth = np.median(sliding_window_view(log, width), axis=1) if width > 1 else log
    best = np.minimum.accumulate(smooth)
    high = smooth > np.concatenate([[np.inf], best[:-1]]) + max(np.log(times), deviations * noise(smooth))
    found: list[Lost] = []
    edges = np.flatnonzero(np.diff(np.concatenate([[0], high, [0]])))
    for a, b in edges.reshape(-1, 2):
        at_end = b >= len(smooth)
        if not at_end and b - a < max(3, len(smooth) // 12):
            continue
        before = float(np.exp(best[a - 1]))
        recovered = not at_end and float(np.exp(smooth[b:].min())) <= 1.1 * before
        gained = float(np.median(smooth[: max(1, len(smooth) // 20)])) - best[a - 1]
        given_up = float(smooth[a:b].max()) - best[a - 1]
        if given_up < max(GIVEN_UP * gained, 0.0 if gained > GAINED else np.log(3)):
            continue  # where nothing had been gained it is the start that was easy, unless it explodes
        steps = s.steps[width - 1 :]
        peak = float(np.exp(smooth[a:b].max()))
        found.append(
            Lost(int(steps[a]), int(steps[b - 1]), int(b - a), before, peak, float(values[-1]), at_end, recovered)
        )
    return max(found, key=lambda x: (not x.recovered, x.peak / x.best), default=None)


@dataclass(frozen=True)
class Gap:
    """Training and held-out curve, parted: late levels of both, where the held-out one stopped falling."""

    train: float
    val: float
    since: int
    fallen: float

    @property
    def times(self) -> float:
        return self.val / self.train


def gap(train: Series, val: Series, kept: float = 0.2, fall: float = 0.3) -> Gap | None:
    """Where the held-out loss has stood for long, far above training's, which goes on falling; None if it has not.

    ``kept`` is the share of its first value that the held-out loss must still have, ``fall`` what training must have
    fallen by since.
    """
    if len(val) < 8 or len(train) < 8 or min(train.values.min(), val.values.min()) <= 0:
        return None
    quarter = len(val) // 4
    level = float(np.median(val.values[-quarter:]))
    near = np.flatnonzero(val.values <= 1.1 * level)
    since = int(val.steps[near[0]]) if len(near) else int(val.steps[-1])
    before, after = train.values[train.steps <= since][-3:], train.values[-max(2, len(train) // 10) :]
    if not len(before) or level < kept * float(val.values[0]) or near[0] > 0.6 * len(val):
        return None
    late = float(np.median(after))
    fallen = 1 - late / float(np.median(before))
    return Gap(late, level, since, fallen) if fallen > fall else None


def geometric(rates: np.ndarray) -> bool:
    """Whether each fall is by one factor: such a schedule has no end that it could miss."""
    falls = -np.diff(np.log(np.maximum(rates, 1e-12)))
    falls = falls[falls > 1e-9]
    return bool(np.ptp(falls) < 0.1 * falls.mean())
