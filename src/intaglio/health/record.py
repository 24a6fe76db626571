"""What a run has measured, as the rules see it: series of readings by name, and facts that are no numbers. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.history import NotMeasured, Reading, Series

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Record:
    """Everything that rules may look at.

    ``facts`` are what audits found that no number says (names of tensors, of modules), and ``config`` the run's
    settings as plain dicts; both are empty for a history alone. ``steps`` is how long the run is meant to be, where
    known, and ``running`` whether it goes on; ``run`` is its folder; ``foreign`` is the format of a history that is not
    ours, whose gaps say nothing of the run. ``logged`` are series every row of which counts, where ``series`` has them
    thinned or replaced by a final measurement, and ``renamed`` maps a foreign history's own names to ours.
    """

    series: Mapping[str, Series]
    facts: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    running: bool = False
    run: str = ""
    foreign: str = ""
    logged: Mapping[str, Series] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Series | None:
        """The series of that very name, if it has a value."""
        return self.series.get(name)

    def matching(self, *patterns: str) -> dict[str, Series]:
        """All series whose names fit one of the patterns, as ``val/*/effective_rank``."""
        return {n: self.series[n] for n in _fitting(tuple(self.series), patterns)}

    def settled(self, s: Series) -> bool:
        """Whether a series has been read late enough to say that something was not learnt.

        That is a quarter of the run and three times its warm-up, or its end; long plateaus before are common.
        """
        if self.steps is None or s.steps[-1] >= self.steps:
            return not (self.steps is None and self.running)
        warmup = int((self.config.get("optim") or {}).get("warmup", 0))
        return bool(s.steps[-1] >= max(0.25 * self.steps, 3 * warmup))

    def early(self, name: str) -> NotMeasured | None:
        """Why it is too early to judge what a series has come to, or None if it has settled."""
        return None if self.settled(self.series[name]) else NotMeasured(f"too early: {name} has not settled")

    @property
    def last_step(self) -> int:
        return max((int(s.steps[-1]) for s in self.series.values()), default=0)


@lru_cache(maxsize=1024)
def _fitting(names: tuple[str, ...], patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(n for n in names if any(fnmatchcase(n, p) for p in patterns))


class Growing:
    """Series that grow while a training goes on, so that judging it reads no file."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, tuple[float, float, float]]] = {}

    def add(self, step: int, readings: Mapping[str, Reading]) -> None:
        """Readings of one step, at least as late as those before; of the same step and name the later ones stay."""
        for name, r in readings.items():
            count = math.nan if r.n is None else float(r.n)
            self._rows.setdefault(name, {})[step] = (r.value, math.nan if r.null is None else r.null, count)
            for end, value in (("low", r.low), ("high", r.high)):
                if value is not None:
                    self._rows.setdefault(f"{name}_{end}", {})[step] = (value, math.nan, count)

    def series(self) -> dict[str, Series]:
        """All of them by name."""
        return {
            name: Series(np.fromiter(rows, np.int64), *np.array(list(rows.values()), float).T)
            for name, rows in self._rows.items()
        }


def of_table(table: "pl.DataFrame", **rest: Any) -> Record:
    """The record of a history table; ``rest`` are the other fields of ``Record``. Later rows of a step replace earlier
    ones."""
    table = table.unique(["name", "step"], keep="last", maintain_order=True).sort("name", "step", maintain_order=True)
    names, steps = table["name"].to_list(), table["step"].to_numpy()
    numbers = [table[c].cast(float).fill_null(float("nan")).to_numpy() for c in ("value", "null", "n")]
    first = [k for k in range(len(names)) if k == 0 or names[k] != names[k - 1]]
    parts = {names[a]: slice(a, b) for a, b in pairwise([*first, len(names)])}
    return Record({name: Series(steps[part], *(x[part] for x in numbers)) for name, part in parts.items()}, **rest)


def of_readings(readings: Mapping[str, Reading], step: int = 0, **rest: Any) -> Record:
    """The record of readings that were taken at one step."""

    def one(number: float | None) -> np.ndarray:
        return np.array([np.nan if number is None else float(number)])

    series = {name: Series(np.array([step]), one(r.value), one(r.null), one(r.n)) for name, r in readings.items()}
    return Record(series, **rest)
