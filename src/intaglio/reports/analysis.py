"""Everything that a report says of a run, ours or anybody's, measured once. No torch here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.health.diagnosis import Diagnosis, diagnose_run
from intaglio.health.record import of_table
from intaglio.history import read_history
from intaglio.history.derived import Derived, derived
from intaglio.history.relations import Relation, relations
from intaglio.history.run_folder import RunFolder, find
from intaglio.history.series import Series
from intaglio.history.statistics import Description, Phase, describe, phases
from intaglio.reports.charts import thinned
from intaglio.reports.run_parts import read_part
from intaglio.reports.words import importance

if TYPE_CHECKING:
    from intaglio.health.foreign import Judged

DRAWN = 1200
"""Rows that are kept of each series, to be drawn."""
DESCRIBED, RELATED, CORRELATED = 1000, 120, 16
"""How many metrics are described, searched for identities, and correlated; a notice says so where there are more."""


@dataclass(frozen=True)
class Correlations:
    """Pearson's r of every two metrics after their transients: of values, and of changes from row to row.

    Matrices (m, m), NaN where fewer than eight rows are common or one does not move. Trends correlate by themselves;
    changes show whether two metrics move together.
    """

    names: tuple[str, ...]
    levels: np.ndarray
    changes: np.ndarray


@dataclass(frozen=True)
class Analysis:
    """What is known of one run. ``series`` are thinned for drawing; all else rests on every row.

    ``renamed`` maps their names to ours, ``folder`` is None for a history of somebody else's.
    """

    name: str
    source: str
    format: str
    axis: str
    series: Mapping[str, Series]
    renamed: Mapping[str, str]
    descriptions: Mapping[str, Description]
    relations: tuple[Relation, ...]
    derived: tuple[Derived, ...]
    phases: tuple[Phase, ...]
    diagnosis: Diagnosis
    notices: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: RunFolder | None = None
    profile: str = "default"
    status: str = ""
    correlations: Correlations | None = None

    @cached_property
    def rows(self) -> int:
        """Rows of the longest metric."""
        return max((d.rows for d in self.descriptions.values()), default=0)

    @cached_property
    def span(self) -> tuple[int, int]:
        """First and last step of any metric; (0, 0) where there is none."""
        ends = [(int(s.steps[0]), int(s.steps[-1])) for s in self.series.values() if len(s)]
        return (min(a for a, _ in ends), max(b for _, b in ends)) if ends else (0, 0)

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the metrics, the most important first; ends of intervals are parts of their metric."""
        return sorted((n for n in self.series if not is_bound(n, self.series)), key=importance)

    def main(self, most: int) -> list[str]:
        """The metrics that there is room for: the most important that move, a learning rate among them."""
        there = [n for n in self.metrics if n in self.descriptions and self.descriptions[n].finite]
        named = sorted(there, key=lambda n: self.descriptions[n].finite > 1 and self.descriptions[n].std == 0)
        rates = [n for n in named if "optimizer/rate" in n][:1]
        return [*[n for n in named if n not in rates][: most - len(rates)], *rates]


def is_bound(name: str, series: Iterable[str]) -> bool:
    """Whether a series is the end of another one's interval."""
    base = name.removesuffix("_low").removesuffix("_high")
    return base != name and base in series


def analyse(
    path: str | Path,
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    profile: str = "default",
    name: str | None = None,
) -> list[Analysis]:
    """Our run folder, or anybody's history: one analysis for each run in it, or for the run of that ``name`` alone.

    Raises:
        ValueError: nothing that can be read is there, or no run of that name.
    """
    given = Path(path)
    if (given / "run.json").is_file() or not given.exists():
        if format or mapping:
            raise ValueError(f"{path} is a run folder of ours, whose names are known: leave format and mapping out.")
        return [of_run(find(path), profile)]
    from intaglio.health.foreign import diagnose_file

    return [
        of_history(judged, str(path), profile) for judged in diagnose_file(given, profile, (), format, mapping, name)
    ]


def of_run(folder: RunFolder, profile: str = "default") -> Analysis:
    """Of a run folder, judged anew.

    Raises:
        ValueError: it holds no metrics yet.
    """
    return measured(folder, diagnose_run(folder.path, profile), profile)


def measured(folder: RunFolder, diagnosis: Diagnosis, profile: str = "default") -> Analysis:
    """Of a run folder whose verdict is known; without metrics it has none of what rests on them."""
    record = folder.record
    table = folder.metrics if folder.metrics.is_file() else folder.metrics.with_suffix(".parquet")
    series = of_table(read_history(table)).series if table.is_file() else {}
    config = read_part(folder.path / "config.yaml").content
    return _analysis(
        series,
        config if isinstance(config, Mapping) else {},
        name=str(record.get("name", folder.path.name)),
        source=str(folder.path),
        format="run folder",
        axis="optimizer step",
        renamed={},
        diagnosis=diagnosis,
        notices=tuple(map(str, record.get("notices", ()))),
        folder=folder,
        profile=profile,
        status=str(record.get("status", "")),
    )


def of_history(judged: "Judged", source: str, profile: str = "default") -> Analysis:
    """Of one history of somebody else's, read and judged."""
    history = judged.history
    return _analysis(
        judged.series,
        history.config,
        name=history.name,
        source=source,
        format=history.format,
        axis=history.axis,
        renamed=judged.renamed,
        diagnosis=judged.diagnosis,
        notices=history.notices,
        profile=profile,
        status=history.status,
    )


def _analysis(
    given: Mapping[str, Series], config: Mapping[str, Any], notices: tuple[str, ...], **known: Any
) -> Analysis:
    series = {name: s for name, s in sorted(given.items(), key=lambda item: importance(item[0])) if len(s)}
    bounds = {name for name in series if is_bound(name, series)}
    named = [name for name in series if name not in bounds]
    described = {name: describe(series[name]) for name in named[:DESCRIBED]}
    related = {name: series[name] for name in named[:RELATED]}
    for what, most in (("described", DESCRIBED), ("searched for identities", RELATED)):
        if len(named) > most:
            notices = (*notices, f"{most:,} of {len(named):,} metrics are {what}: the most important, then by name.")
    moving = [n for n in named if n in described and described[n].finite >= 8 and described[n].std > 0]
    return Analysis(
        series={name: thinned(s, DRAWN) for name, s in series.items()},
        descriptions=described,
        relations=relations(related),
        derived=derived(series, config),
        phases=phases({name: series[name] for name in named[:CORRELATED]}),
        notices=notices,
        config=config,
        correlations=_correlations({name: series[name] for name in moving[:CORRELATED]}, described),
        **known,
    )


def _correlations(series: Mapping[str, Series], described: Mapping[str, Description]) -> Correlations:
    """Of at most 4,000 common rows, in equal distances."""
    names = tuple(series)
    levels, changes = np.eye(len(names)), np.eye(len(names))
    settled = {n: s.after(described[n].transient or int(s.steps[0])) for n, s in series.items()}
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            x, y = _common(settled[a], settled[b])
            levels[i, j] = levels[j, i] = _pearson(x, y)
            changes[i, j] = changes[j, i] = _pearson(np.diff(x), np.diff(y))
    return Correlations(names, levels, changes)


def _common(a: Series, b: Series) -> tuple[np.ndarray, np.ndarray]:
    if len(a) == len(b) and np.array_equal(a.steps, b.steps):
        x, y = a.values, b.values
    else:
        _, i, j = np.intersect1d(a.steps, b.steps, return_indices=True)
        x, y = a.values[i], b.values[j]
    both = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    rows = both[:: max(1, len(both) // 4000)]
    return _scaled(x[rows]), _scaled(y[rows])


def _scaled(x: np.ndarray) -> np.ndarray:
    """By its largest value, so that no square and no difference overflows."""
    largest = float(np.abs(x).max(initial=0))
    return x / largest if largest else x.astype(float)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 8:
        return float("nan")
    with np.errstate(all="ignore"):
        x, y = x - x.mean(), y - y.mean()
        size = float(np.sqrt((x @ x) * (y @ y)))
        return float(np.clip(x @ y / size, -1, 1)) if 0 < size < np.inf else float("nan")


def evidence_groups(relations: Iterable[Relation]) -> list[tuple[str, ...]]:
    """Metrics that count as one piece of evidence: joined by identities of two, as they are found."""
    groups: list[set[str]] = []
    for relation in relations:
        if len(relation.names) != 2:
            continue
        joined = [g for g in groups if g & set(relation.names)]
        groups = [g for g in groups if not g & set(relation.names)]
        groups.append(set(chain(relation.names, *joined)))
    return [tuple(sorted(g, key=importance)) for g in groups]
