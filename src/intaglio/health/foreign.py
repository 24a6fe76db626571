"""The verdict on anybody's history: a file or folder that another program wrote. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.health.diagnosis import Diagnosis, chosen, diagnose, load_profile
from intaglio.health.plan import Limit
from intaglio.health.record import Record
from intaglio.history import Series
from intaglio.history.aliases import ours
from intaglio.history.foreign import History, read_histories

MOST_ROWS = 4000
"""Rows of a series that rules are given: a regular stride of longer ones, with first, last and extremes."""


@dataclass(frozen=True)
class Judged:
    """One run of a foreign file: as it was read, by whose names, and what is to be said of it."""

    history: History
    series: Mapping[str, Series]
    renamed: Mapping[str, str]
    diagnosis: Diagnosis

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists: the verdict, with ``run``, ``format``, ``axis``, ``names`` and ``notices``."""
        h = self.history
        about = {
            "run": h.name,
            "format": h.format,
            "axis": h.axis,
            "names": dict(self.renamed),
            "notices": [*h.notices],
        }
        return about | self.diagnosis.as_dict()


def diagnose_file(
    path: str | Path,
    profile: str | Path = "default",
    rules: Iterable[str] = (),
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    run: str | None = None,
    plan: Sequence[Limit] | None = None,
) -> list[Judged]:
    """The verdict on each run in a history file or folder, or on the one named ``run``, by rules and a plan.

    Raises:
        ValueError: what cannot be read as a history; an unknown format, profile, rule, name or run.
    """
    limits, picked = load_profile(profile), chosen(rules) or None
    found = read_histories(Path(path), format)
    if run is not None:
        found = [h for h in found if h.name == run]
        if not found:
            raise ValueError(
                f"{path} has no run {run!r}; it has {', '.join(h.name for h in read_histories(Path(path)))}."
            )
    judged = []
    for history in found:
        series, renamed = ours(history, mapping or {})
        record = record_of(history, series, renamed)
        judged.append(Judged(history, series, renamed, diagnose(record, limits, picked, plan=plan)))
    return judged


def record_of(history: History, series: Mapping[str, Series], renamed: Mapping[str, str]) -> Record:
    """What rules may know of a foreign history whose ``series`` stand under our names where there are any."""
    kept = {name: thinned(s) for name, s in series.items() if len(s)}
    facts = {"settings": dict(history.config)} if history.config else {}
    running = history.status == "running"
    return Record(kept, facts, running=running, foreign=history.format, logged=series, renamed=renamed)


def thinned(s: Series, most: int = MOST_ROWS) -> Series:
    """At most about ``most`` rows: every k-th, the first and the last, the extremes, the first that is no number."""
    if len(s) <= most:
        return s
    good = np.isfinite(s.values)
    marks = [0, len(s) - 1, *np.flatnonzero(~good)[:1]]
    if good.any():
        marks += [int(np.where(good, s.values, np.inf).argmin()), int(np.where(good, s.values, -np.inf).argmax())]
    return s.at(np.unique([*range(0, len(s), -(-len(s) // most)), *marks]))
