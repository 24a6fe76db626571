"""One metric in two arms of runs: its difference, the interval over seeds, and what may be claimed of it.

Sources: Student's paired t; Welch 1947; equivalence by two one-sided tests, Schuirmann 1987; Holm 1979.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from intaglio.history.table import portable
from intaglio.reports import scales
from intaglio.reports.matched import Course, Matched, Window, relative
from intaglio.reports.safe import plain
from intaglio.reports.student import quantile, tail

LEVEL = 0.05
"""Chance of a false claim: of a difference, and of an equivalence."""
SHARE = 0.02
"""δ where none is given: this share of arm A's value."""
WORSE, BETTER, EQUIVALENT, DIFFERS, UNSURE = "worse", "better", "equivalent", "differs", "cannot tell"
UNSHARED = "not comparable"


@dataclass(frozen=True)
class Metric:
    """One metric in both arms; ``a`` and ``b`` are one value a run, taken ``at`` the end of the common steps.

    ``difference`` is B − A with its interval ``low`` to ``high``, None where an arm has fewer than two runs; ``level``
    is the chance that the interval misses, and that of a false claim. ``delta`` is the largest difference that counts
    as none. ``p`` is that of no difference, ``p_corrected`` after Holm.
    """

    name: str
    better: int
    main: bool
    matched: Matched
    a: np.ndarray
    b: np.ndarray
    difference: float
    low: float | None = None
    high: float | None = None
    test: str = ""
    spread: float = math.nan
    delta: float = 0.0
    p: float | None = None
    p_equal: float | None = None
    p_corrected: float | None = None
    verdict: str = UNSURE
    why: str = ""
    notes: tuple[str, ...] = ()
    level: float = LEVEL

    @property
    def relative(self) -> float | None:
        """(B − A) / |A| of the means."""
        return relative(float(self.a.mean()), float(self.b.mean()))

    @property
    def share(self) -> bool:
        """Whether it is a share of 1, whose difference is in points."""
        return scales.is_share(self.name, [*self.a, *self.b])

    @property
    def courses(self) -> tuple[Course, Course]:
        """How each arm went over the common steps."""
        return self.matched.course(self.matched.a), self.matched.course(self.matched.b)

    @property
    def windows(self) -> tuple[Window, ...]:
        """Both arms' means over equal windows."""
        return self.matched.windows

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what is not finite stands by its name."""
        given = {
            "name": self.name, "better": {1: "higher", -1: "lower", 0: "unknown"}[self.better], "main": self.main,
            "at": self.matched.at, "a": self.a.tolist(), "b": self.b.tolist(), "n": [len(self.a), len(self.b)],
            "mean": [float(self.a.mean()), float(self.b.mean())], "difference": self.difference, "low": self.low,
            "high": self.high, "relative": self.relative, "test": self.test, "delta": self.delta, "p": self.p,
            "p_equivalent": self.p_equal, "p_corrected": self.p_corrected, "verdict": self.verdict, "why": self.why,
            "windows": [asdict(w) for w in self.windows],
            "course": dict(zip("ab", (asdict(c) | {"change": c.change} for c in self.courses), strict=True)),
            "notes": list(self.notes),
        }  # fmt: skip
        return plain_values(given)


@dataclass(frozen=True)
class Margin:
    """δ, the largest difference that counts as none: a share of A's value, or a number in the unit of a metric.

    A number holds for the metrics that the verdict rests on; all others have the default share.
    """

    value: float
    share: bool
    said: str

    @classmethod
    def parse(cls, delta: str | float | None) -> "Margin":
        """``"2%"`` or ``"0.05"``; None is the default.

        Raises:
            ValueError: anything else.
        """
        if delta is None:
            return cls(SHARE, True, f"δ is {100 * SHARE:g} % of A’s value")
        text = str(delta).strip()
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"--delta {plain(delta, 40)}: give a share of A’s value, as 2%, or a number, as 0.05.")
        if text.endswith("%"):
            return cls(value / 100, True, f"δ was given: {value:g} % of A’s value")
        said = f"δ was given: {value:g}; for metrics that the verdict does not rest on, {100 * SHARE:g} % of A’s value"
        return cls(value, False, said)

    def of(self, mean: float, main: bool) -> float:
        """δ of a metric whose mean in A is given."""
        if self.share:
            return self.value * abs(mean)
        return self.value if main else SHARE * abs(mean)


def tested(m: Metric, paired: bool) -> Metric:
    """With its interval over seeds and the two p-values, where the arms have two runs or more."""
    n_a, n_b = len(m.a), len(m.b)
    if min(n_a, n_b) < 2:
        alone = "one run each" if n_a == n_b == 1 else f"one run in {'A' if n_a == 1 else 'B'}"
        return replace(m, why=f"{alone}: cannot tell")
    test = f"paired t, {n_a} pairs" if paired else f"Welch’s t, {n_a} against {n_b}"
    error, df = (float(x) for x in _error(m.a, m.b, paired))
    spread = error * math.sqrt(n_a if paired else n_a * n_b / (n_a + n_b))
    scale = max(float(np.abs([*m.a, *m.b]).max()), 1e-300)
    if error <= 1e-9 * scale:
        if abs(m.difference) <= 1e-9 * scale:
            return replace(m, test=test, difference=0.0, low=0.0, high=0.0, p=1.0, p_equal=0.0, spread=0.0)
        why = "the runs of an arm do not differ at all, so there is no spread to hold the difference against"
        return replace(m, test=test, spread=0.0, why=why)
    half = quantile(1 - m.level / 2, df) * error
    p_equal = max(tail((m.difference + m.delta) / error, df), tail((m.delta - m.difference) / error, df))
    p = min(1.0, 2 * tail(abs(m.difference) / error, df))
    low, high = m.difference - half, m.difference + half
    return replace(m, test=test, low=low, high=high, p=p, p_equal=p_equal, spread=spread)


def _error(a: np.ndarray, b: np.ndarray, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of the mean difference and its degrees of freedom, of values (runs,) or (runs, G)."""
    if paired:
        error = np.std(b - a, axis=0, ddof=1) / math.sqrt(len(a))
        return error, np.full_like(error, len(a) - 1)
    parts = [np.var(v, axis=0, ddof=1) / len(v) for v in (a, b)]
    square = parts[0] + parts[1]
    weight = parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)
    return np.sqrt(square), np.where(weight > 0, square**2 / np.where(weight > 0, weight, 1), 1.0)


def over_steps(m: Metric) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """B − A at each step of the grid with the ends of its interval, (G,) each; None with one run in an arm."""
    a, b = m.matched.a, m.matched.b
    if min(len(a), len(b)) < 2 or not m.test:
        return None
    error, df = _error(a, b, m.test.startswith("paired"))
    difference = b.mean(0) - a.mean(0)
    half = np.array([quantile(1 - m.level / 2, round(float(k), 3)) for k in df]) * error
    return difference, difference - half, difference + half


def judged(metrics: Sequence[Metric]) -> list[Metric]:
    """With the verdict on each: Holm among those that the verdict rests on, and among all others."""
    found = dict[str, Metric]()
    candidates = [m for m in metrics if m.verdict != UNSHARED and m.p is not None]
    for kind in (0, 1, 2):
        family = [m for m in candidates if _family(m) == kind]
        differs = holm([m.p or 0.0 for m in family])
        equal = holm([1.0 if m.p_equal is None else m.p_equal for m in family])
        for m, p, e in zip(family, differs, equal, strict=True):
            if e < m.level:
                verdict = EQUIVALENT
            elif p < m.level:
                verdict = {1: BETTER, -1: WORSE, 0: DIFFERS}[int(math.copysign(m.better, m.better * m.difference))]
            else:
                verdict = UNSURE
            found[m.name] = replace(m, p_corrected=p, verdict=verdict)
    return [found.get(m.name, m) for m in metrics]


def _family(m: Metric) -> int:
    """Whose claims are corrected together: the verdict's, those on what else is held out and has a better, the rest."""
    return 0 if m.main else 1 if m.name.startswith("val/") and m.better else 2


def confidence(level: float) -> str:
    """How sure an interval is: ``95 %``."""
    return f"{100 * (1 - level):.4g} %"


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order given. Source: Holm 1979."""
    corrected, worst = [0.0] * len(p), 0.0
    for rank, k in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[k]))
        corrected[k] = worst
    return corrected


def plain_values(value: Any) -> Any:
    """Nested values as JSON can hold them: what is not finite stands by its name."""
    if isinstance(value, dict):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    if isinstance(value, float | np.floating):
        return portable(float(value))
    if isinstance(value, np.integer):
        return int(value)
    return value if value is None or isinstance(value, str | bool | int) else str(value)
