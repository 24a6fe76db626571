"""Metrics that are one piece of evidence, by identities between them; and values a loss has where nothing is learnt.

Curves that move together are not yet one number: an identity must hold in all rows, again in their later half by
itself, and the curves must move by more than a log rounds.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from intaglio.history.series import Series

Kind = Literal["same", "negative", "proportional", "sum", "exponential", "complement"]

ROWS, FEWEST = 2000, 8
"""Most rows that are compared, in equal distances, and the fewest."""
R2, LATE_R2 = 0.999, 0.99
"""Share of the variance that an identity explains: of all rows, and of the later half."""
MOVES, ROUNDED = 1e-4, 1e-4
"""Standard deviation, over root mean square, of a curve that moves, and error that rounding makes."""
TINIEST, HUGEST = 1e-100, 1e100
"""Between these the squares of numbers are numbers."""
EQUAL = 0.001
"""Relative error within which a factor is a number that is known by itself."""
PARTS, LOOKUPS = 12, 1000
"""Most parts of a sum, and most pairs of groups of other steps whose common steps are looked up."""


@dataclass(frozen=True)
class Relation:
    """An identity; ``names`` has first what follows from the others.

    ``factor`` is a of y = a · x and of y = exp(a · x), else ±1. ``weights`` are those of a sum, as ``names[1:]``.
    """

    kind: Kind
    names: tuple[str, ...]
    factor: float
    r2: float
    said: str
    weights: tuple[float, ...] = ()


def relations(series: Mapping[str, Series]) -> tuple[Relation, ...]:
    """Identities among metrics on the steps that they have in common: of two, then sums.

    Of several that are one number, all are compared with the first alone. A sum is looked for where a name ends in
    total, loss, elbo, objective or cost; its weights are found by least squares, so they must not change; that a total
    is much like one of its parts is then not told again. A hundred metrics take some 0.4 s.
    """
    common = _Common({name: s for name, s in series.items() if len(s) >= FEWEST})
    sums = tuple(_sums(common))
    told = {frozenset((r.names[0], part)) for r in sums for part in r.names[1:]}
    found: list[Relation] = []
    twins: set[str] = set()
    for first, second in combinations(common.series, 2):
        if not twins.isdisjoint((first, second)) or {first, second} in told:
            continue
        both = common.of(first, second)
        if both is not None and (relation := _pair(first, second, *both)) is not None:
            found.append(relation)
            twins.add(second)
    return (*found, *sums)


class _Common:
    """Metrics at common steps; those of the same steps are one group, whose rows are found once."""

    def __init__(self, series: Mapping[str, Series]) -> None:
        self.series = series
        self.group: dict[str, str] = {}
        self._rows: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        for name, s in series.items():
            known = (n for n in set(self.group.values()) if _same_steps(series[n].steps, s.steps))
            self.group[name] = next(known, name)

    def of(self, *names: str) -> np.ndarray | None:
        """Values (names, n) in at most ROWS rows that all have, all finite; None where they are too few, or absurd."""
        if len({self.group[n] for n in names}) > 2:
            return None
        first, other = names[0], next((n for n in names if self.group[n] != self.group[names[0]]), names[0])
        rows = self._common(self.group[first], self.group[other])
        if rows is None:
            return None
        at = [rows[0] if self.group[n] == self.group[first] else rows[1] for n in names]
        values = np.stack([np.asarray(self.series[n].values, np.float64)[r] for n, r in zip(names, at, strict=True)])
        good = np.isfinite(values).all(0)
        values = values if good.all() else values[:, good]
        if values.shape[1] < FEWEST or not TINIEST < np.abs(values).max(1).min() <= np.abs(values).max() < HUGEST:
            return None
        return values

    def _common(self, a: str, b: str) -> tuple[np.ndarray, np.ndarray] | None:
        if (a, b) in self._rows:
            return self._rows[a, b]
        if (b, a) in self._rows:
            return self._rows[b, a][::-1]
        if len(self._rows) >= LOOKUPS:
            return None
        one, two = self.series[a].steps, self.series[b].steps
        if a == b:
            rows = np.unique(np.linspace(0, len(one) - 1, min(ROWS, len(one))).astype(int))
            self._rows[a, b] = rows, rows
        elif len(one) > len(two):
            self._rows[a, b] = _matching(two, one)[::-1]
        else:
            self._rows[a, b] = _matching(one, two)
        return self._rows[a, b]


def _same_steps(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (len(a) == len(b) and a[0] == b[0] and a[-1] == b[-1] and np.array_equal(a, b))


def _matching(short: np.ndarray, long: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both with the same steps, of at most 4 · ROWS of ``short``, thinned to ROWS; both ascend."""
    mine = np.unique(np.linspace(0, len(short) - 1, min(4 * ROWS, len(short))).astype(int))
    theirs = np.minimum(np.searchsorted(long, short[mine]), len(long) - 1)
    hit = np.flatnonzero(long[theirs] == short[mine])
    hit = hit[:: 1 + len(hit) // ROWS]
    return mine[hit], theirs[hit]


def _pair(first: str, second: str, x: np.ndarray, y: np.ndarray) -> Relation | None:
    """What two metrics are to each other, if anything."""
    if not (_moves(x) and _moves(y)):
        return None
    r = float(np.corrcoef(x, y)[0, 1])
    if r * r > 0.99:
        kinds: tuple[tuple[Kind, np.ndarray, str], ...] = (
            ("same", x, f"{second} and {first} are the same number"),
            ("negative", -x, f"{second} = −{first}"),
            ("complement", 1 - x, f"{second} = 1 − {first}"),
        )
        for kind, due, told in kinds:
            if (r2 := _explained(y, due)) is not None:
                return Relation(kind, (second, first), math.copysign(1.0, r), r2, told + _for(r2))
        if relation := _proportional(first, second, x, y) if x @ x < y @ y else _proportional(second, first, y, x):
            return relation
    return _exponential(first, second, x, y) or _exponential(second, first, y, x)


def _proportional(first: str, second: str, x: np.ndarray, y: np.ndarray) -> Relation | None:
    a = float(x @ y) / float(x @ x)
    if (r2 := _explained(y, a * x)) is None:
        return None
    root = _root(abs(a))
    told = f"{second} = {a:.4g} · {first}" + (f" (√{root:,} is {math.sqrt(root):.4g})" if root else "")
    if root and "norm" in second.lower() and re.search("std|rms|deviation", first.lower()):
        told += f": the norm of {root:,} numbers around 0 is √{root:,} times their standard deviation"
    return Relation("proportional", (second, first), a, r2, told + _for(r2))


def _root(a: float) -> int | None:
    """The integer whose root is ``a``, of few digits or a width of networks: where many are near, 2ᵏ or 3 · 2ᵏ."""
    square = a * a
    if not 1.5 < square < 1e6:
        return None
    widths = [m << k for k in range(20) for m in (1, 3)]
    near = min(widths, key=lambda d: abs(d - square))
    if abs(near - square) < 2 * EQUAL * square:
        return near
    return round(square) if abs(round(square) - square) < 2 * EQUAL * square and square < 100 else None


def _exponential(first: str, second: str, x: np.ndarray, y: np.ndarray) -> Relation | None:
    """y = exp(x), or 2ˣ."""
    if y.min() <= 0 or x.max() > 700:
        return None
    log = np.log(y)
    for base, a in (("exp({})", 1.0), ("2 ^ {}", math.log(2))):
        if _explained(log, a * x) is not None and (r2 := _explained(y, np.exp(a * x))) is not None:
            return Relation("exponential", (second, first), a, r2, f"{second} = {base.format(first)}" + _for(r2))
    return None


_TOTAL = re.compile(r"(?:^|[/_. -])(?:total|loss|elbo|objective|cost)$", re.IGNORECASE)
_TERM = re.compile(
    r"loss|mse|mae|l1|l2|kl|nll|bce|ce$|elbo|rec|reg|vq|commit|penalty|adv|percept|lpips|align|contrast|entropy",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"(?:^|[/_. -])(train|val|test|eval|dev)", re.IGNORECASE)


def _sums(common: _Common) -> Iterator[Relation]:
    """total = Σ weight · part. No part of a sum is a total, and a name with fewer words is the total of others."""
    totals = [n for n in common.series if _TOTAL.search(n)]
    rank = {n: (0 if "total" in n.lower() else len(re.split("[/_. -]", n))) for n in totals}
    size = {n: -float(np.nan_to_num(np.abs(common.series[n].values[-1]))) for n in rank}
    known: set[str] = set()
    for total in sorted(totals, key=lambda n: (rank[n], size[n])):
        if total in known:
            continue
        others = [n for n in common.series if n != total and rank.get(n, 99) >= rank[total]]
        others = [
            n for n in others if _side(n) == _side(total) and ("/" not in total or n.count("/") == total.count("/"))
        ]
        if (relation := _sum(common, total, others)) is not None:
            known |= {total, *relation.names}
            yield relation


def _side(name: str) -> tuple[str, str]:
    """Folder and split that the parts of a total share with it."""
    split = _SPLIT.search(name)
    return name.rpartition("/")[0], split[1].lower() if split else ""


def _sum(common: _Common, total: str, others: list[str]) -> Relation | None:
    terms = [n for n in others if _TERM.search(n)]
    parts = (terms if len(terms) > 1 else others)[:PARTS] if "/" not in total or len(others) > PARTS else others
    parts = [n for n in parts if common.group[n] == common.group[total]]
    if len(parts) < 2 or (values := common.of(total, *parts)) is None or not _moves(values[0]):
        return None
    y, x = values[0], values[1:].T
    size = np.sqrt((x**2).mean(0))
    other = (size > 0) & (np.abs(x - y[:, None]).max(0) > 1e-6 * np.abs(y).max())  # no second name of the total
    parts, x, size = [p for p, yes in zip(parts, other, strict=True) if yes], x[:, other] / size[other], size[other]
    if len(parts) < 2:
        return None

    def fitted(kept: list[int]) -> tuple[np.ndarray, float]:
        weights = np.linalg.lstsq(x[:, kept], y, rcond=1e-9)[0]
        return weights, float(np.sum((y - x[:, kept] @ weights) ** 2))

    kept = list(range(len(parts)))
    enough = max(1.1 * fitted(kept)[1], len(y) * (1e-6 * float(np.sqrt(np.mean(y**2)))) ** 2)
    while len(kept) > 2:
        left, part = min((fitted([k for k in kept if k != out])[1], out) for out in kept)
        if left > enough:
            break
        kept.remove(part)
    if len(kept) < 2 or len(y) < 3 * len(kept):
        return None
    weights, left = fitted(kept)
    inverse = np.linalg.pinv(x[:, kept].T @ x[:, kept])
    errors = np.sqrt(np.maximum(np.diag(inverse), 0) * left / (len(y) - len(kept)))
    r2 = _explained(y, x[:, kept] @ weights)
    if r2 is None or (np.abs(weights) < 4 * errors).any():
        return None
    weights = weights / size[kept]
    names = [parts[k] for k in kept]
    told = " + ".join(f"{w:.4g} · {n}" for w, n in zip(weights, names, strict=True))
    told = re.sub(r"(^|\+ )1 · ", r"\1", told).replace("+ -", "− ")
    return Relation("sum", (total, *names), 1.0, r2, f"{total} = {told}" + _for(r2), tuple(float(w) for w in weights))


def _moves(x: np.ndarray) -> bool:
    return float(x.std()) > MOVES * math.sqrt(float(np.mean(x * x)))


def _explained(y: np.ndarray, due: np.ndarray) -> float | None:
    """R² of y = due, or None where it is not enough, in all rows or in the later half."""
    wrong = (y - due) ** 2
    r2 = 1 - float(wrong.sum()) / float(((y - y.mean()) ** 2).sum())
    if not r2 >= R2:
        return None
    late, error = y[len(y) // 2 :], wrong[len(y) // 2 :]
    rounded = float(error.mean()) <= ROUNDED**2 * float(np.mean(late**2))
    return r2 if rounded or float(error.sum()) <= (1 - LATE_R2) * float(((late - late.mean()) ** 2).sum()) else None


def _for(r2: float) -> str:
    return f" (R² {r2:.4f})" if r2 < 0.99995 else ""


CLOSE = 0.005
"""Relative distance within which a value is a known constant."""


def constants(value: float) -> list[str]:
    """What a loss or statistic of this value is where nothing is learnt, the nearest first; within half a per cent.

    ln K is known for K up to 20, and beyond for what people choose: multiples of ten up to 100, of a hundred up to
    1000, and powers of two.
    """
    if not math.isfinite(value) or value == 0:
        return []
    classes = {*range(2, 21), *range(30, 101, 10), *range(200, 1001, 100), *(1 << k for k in range(5, 11))}
    known = [(math.log(k), f"ln {k} = {{}}, the cross-entropy of guessing among {k}") for k in sorted(classes)]
    known += [
        (
            2 * math.log(2),
            "2 ln 2 = {}, both sides of a discriminator that guesses (Goodfellow et al. 2014, theorem 1)",
        ),
        (1.0, "{}, the hinge loss of scores that are 0, or of unrelated unit vectors 1 − cos"),
        (2.0, "{}, the squared distance of unrelated unit vectors, or a discriminator's hinge loss at scores of 0"),
        (1 / 12, "1/12 = {}, the variance of what is uniform on [0, 1]"),
        (0.2, "{}, a triplet loss at its usual margin: all embeddings are alike (Schroff et al. 2015)"),
    ]
    # ∫ w (1 − φ)² dt: over [−5, 5], over [−3, 3], and as a run with unit vectors and weights of .1 and .05 had it.
    for collapsed in (0.4089, 0.4020, 0.4047):
        known += [
            (w * collapsed, "{}, SIGReg of embeddings that are all alike" + (f", times {w}" if w != 1 else ""))
            for w in (1, 0.1, 0.05)
        ]
    near = sorted((abs(value / constant - 1), told.format(f"{constant:.4g}")) for constant, told in known)
    return [told for distance, told in near if distance <= CLOSE]
