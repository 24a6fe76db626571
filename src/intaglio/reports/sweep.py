"""What a sweep shows: each arm against the baseline, what can be concluded, and what cannot. No torch here.

Arms are compared by ``intaglio.reports.comparison``, seed by seed. Each of k arms is a claim of its own, so each is
made at a k-th of the level (Bonferroni; Dunn 1961), intervals included; within an arm, its metrics are corrected by
Holm.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from intaglio import config as configuration
from intaglio.config.sweep import Sweep
from intaglio.history import Reading, Series
from intaglio.reports import scales, weighing
from intaglio.reports.arms import Run, bookkeeping, read_json, read_runs
from intaglio.reports.comparison import Comparison, compare_runs
from intaglio.reports.differences import (
    BETTER,
    DIFFERS,
    EQUIVALENT,
    LEVEL,
    UNSURE,
    WORSE,
    Metric,
    confidence,
    plain_values,
)
from intaglio.reports.student import quantile
from intaglio.reports.weighing import MANY, claim, gap, runs_needed
from intaglio.reports.words import percent, short

TOLD = (BETTER, WORSE, EQUIVALENT, DIFFERS)
"""Verdicts that claim something."""


@dataclass(frozen=True)
class Trained:
    """One run: ``status`` is ``finished``, ``failed``, ``stopped`` (by health or a plan) or ``not trained``."""

    arm: str
    seed: int
    folder: Path | None
    status: str
    error: str = ""

    @property
    def record(self) -> Mapping[str, Any]:
        """What ``run.json`` holds, with the verdict of the run's own findings as ``verdict``."""
        if self.folder is None:
            return {}
        verdict = {"verdict": read_json(self.folder / "findings.json").get("verdict")}
        return read_json(self.folder / "run.json") | verdict


@dataclass(frozen=True)
class Cell:
    """One metric of one arm: a value for each seed; their mean, its 95 % interval over seeds, and the mean null.

    With one run, the interval is that run's own, over held-out items. ``why`` says why nothing was measured.
    """

    values: Mapping[int, float] = field(default_factory=dict)
    reading: Reading | None = None
    why: str = ""


@dataclass(frozen=True)
class Arm:
    """One arm: what it changes of the baseline, its runs, its metrics, and the comparison, or why there is none."""

    name: str
    changed: Mapping[str, tuple[Any, Any]]
    runs: tuple[Trained, ...]
    cells: Mapping[str, Cell]
    comparison: Comparison | None = None
    why: str = ""

    @property
    def verdict(self) -> str:
        """Of the comparison with the baseline."""
        return self.comparison.verdict if self.comparison else "not compared"

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that decide, as they were compared."""
        found = {m.name: m for m in self.comparison.metrics if m.main} if self.comparison else {}
        return {name: found[name] for name in self.cells if name in found}

    def told(self, *verdicts: str) -> list[Metric]:
        """The deciding metrics with one of these verdicts; none, where the arms were not put to one test."""
        barred = self.comparison is None or self.comparison.barred
        return [] if barred else [m for m in self.metrics.values() if m.verdict in verdicts]


@dataclass(frozen=True)
class Study:
    """A sweep that has been trained: ``arms`` with the baseline first, ``metrics`` name → better side (+1, −1, 0).

    ``level`` is the chance of a false claim of one arm; ``machine`` says on which device and in which precision runs
    were trained, and the ``reason``.
    """

    sweep: Sweep
    folder: Path
    arms: tuple[Arm, ...]
    metrics: Mapping[str, int]
    level: float
    machine: Mapping[str, Any] = field(default_factory=dict)
    can: tuple[str, ...] = ()
    cannot: tuple[str, ...] = ()

    @property
    def failed(self) -> list[Trained]:
        """Runs that did not come to their end."""
        return [run for arm in self.arms for run in arm.runs if run.status in ("failed", "stopped")]

    @property
    def correction(self) -> str:
        """How claims allow for their number."""
        k = len(self.sweep.arms) - 1
        if k == 1:
            return f"one arm is compared with the baseline, at {confidence(self.level)}"
        return (
            f"{k} arms are compared with the baseline, each at {confidence(self.level)} instead of "
            f"{confidence(LEVEL)}, so that the chance of any false claim stays at {100 * LEVEL:g} % (Bonferroni)"
        )

    def as_dict(self) -> dict[str, Any]:
        """What ``sweep.json`` holds and ``--json`` prints."""
        sweep = self.sweep
        return {
            "name": sweep.name, "question": sweep.question, "recipe": sweep.recipe, "folder": str(self.folder),
            "baseline": sweep.baseline, "seeds": list(sweep.seeds), "common": dict(sweep.common),
            "metrics": {name: {1: "higher", -1: "lower", 0: "unknown"}[way] for name, way in self.metrics.items()},
            "level": {"overall": LEVEL, "each": self.level, "how": self.correction},
            "machine": dict(self.machine),
            "arms": [_arm_dict(arm, dict(sweep.arms[arm.name])) for arm in self.arms],
            "runs": [
                {"arm": r.arm, "seed": r.seed, "folder": None if r.folder is None else str(r.folder),
                 "status": r.status, "error": r.error, "verdict": r.record.get("verdict"),
                 "step": r.record.get("step"), "seconds": r.record.get("train_seconds")}
                for arm in self.arms for r in arm.runs
            ],
            "can": list(self.can), "cannot": list(self.cannot),
        }  # fmt: skip


def _arm_dict(arm: Arm, overrides: dict[str, str]) -> dict[str, Any]:
    c = arm.comparison
    values = {
        name: {"seeds": {str(seed): value for seed, value in cell.values.items()}, "why": cell.why}
        | ({k: getattr(cell.reading, k, None) for k in ("value", "low", "high", "null")})
        for name, cell in arm.cells.items()
    }
    told = {
        "verdict": arm.verdict,
        "reason": c.reason if c else arm.why,
        "recommendation": c.recommendation if c else "",
    }
    changed = {k: {"baseline": x, "arm": y} for k, (x, y) in arm.changed.items()}
    compared = [m.as_dict() for m in arm.metrics.values()]
    given = {"name": arm.name, "overrides": overrides, "changed": changed, **told, "values": values}
    return plain_values(given | {"metrics": compared, "confounds": list(c.confounds) if c else []})


def study(sweep: Sweep, runs: Sequence[Trained], folder: Path, machine: Mapping[str, Any] | None = None) -> Study:
    """Compares every arm that has finished runs with the baseline."""
    level = LEVEL / max(1, len(sweep.arms) - 1)
    finished = [run for run in runs if run.status == "finished"]
    read = _at_the_end({(r.arm, r.seed): read_runs(r.folder)[0] for r in finished if r.folder is not None})
    by_arm = {arm: [run for (name, _), run in read.items() if name == arm] for arm in sweep.arms}
    base, configs = sweep.baseline, {arm: sweep.config(arm, sweep.seeds[0]) for arm in sweep.arms}
    compared: dict[str, Comparison | str] = {}
    for arm in list(sweep.arms)[1:]:
        asked = any(run.arm == arm and run.status != "not trained" for run in runs)
        compared[arm] = _compared(base, by_arm[base], arm, by_arm[arm], sweep.metrics, level, asked)
    names = dict(sweep.metrics) or dict.fromkeys(_deciding(compared.values()) or [configs[base].train.monitor], 0)
    metrics = {name: way or scales.direction(name) for name, way in names.items()}
    arms = []
    for arm in sweep.arms:
        diff = configuration.diff(configs[base], configs[arm])
        c = compared.get(arm)
        arms.append(
            Arm(
                arm,
                {key: pair for key, pair in diff.items() if not bookkeeping(key)},
                tuple(run for run in runs if run.arm == arm),
                {name: _cell(name, [r for r in finished if r.arm == arm], read) for name in metrics},
                c if isinstance(c, Comparison) else None,
                c if isinstance(c, str) else "",
            )
        )
    found = Study(sweep, folder, tuple(arms), metrics, level, machine or {})
    return replace(found, can=tuple(_can(found)), cannot=tuple(_cannot(found)))


def _compared(
    base: str, a: list[Run], arm: str, b: list[Run], metrics: Mapping[str, int], level: float, asked: bool
) -> Comparison | str:
    """The comparison of an arm with the baseline, or why there is none."""
    if not b:
        return f"none of the runs of {arm} has finished" if asked else f"{arm} was not trained"
    if not a:
        return f"none of the runs of {base} has finished, so there is nothing to compare {arm} with"
    both = {run.seed for run in a} & {run.seed for run in b}
    if both:  # pairs tell more than a run whose counterpart failed
        a, b = ([run for run in runs if run.seed in both] for runs in (a, b))
    better = {name: way for name, way in metrics.items() if way}
    try:
        return _untied(compare_runs(a, b, names=(base, arm), main=tuple(metrics), better=better, level=level))
    except ValueError as error:
        return str(error)


def _untied(c: Comparison) -> Comparison:
    """Takes back an equivalence that rests on the same value in every pair, unless all that was measured is the same.

    Shares of few items agree by chance, and leave no spread to tell by how much they might not have.
    """
    tied = [m.name for m in c.metrics if m.verdict == EQUIVALENT and m.spread == 0]
    if not tied or len(tied) == len(c.metrics):
        return c
    why = "the same in every pair, as counts of few items can be by chance"
    found = tuple(replace(m, verdict=UNSURE, why=why) if m.name in tied else m for m in c.metrics)
    counts = (len(c.a), len(c.b))
    verdict, reason = weighing.verdict(found, "", c.barred, {}, counts)
    advice = weighing.recommendation(c.names, verdict, found, c.changed, c.cost, counts, False, bool(c.barred))
    return replace(c, metrics=found, verdict=verdict, reason=reason, recommendation=advice)


def _deciding(compared: Iterable[Comparison | str]) -> list[str]:
    """What the verdicts rest on, where the sweep does not say."""
    found = (m.name for c in compared if isinstance(c, Comparison) for m in c.metrics if m.main)
    return list(dict.fromkeys(found))


def _at_the_end(runs: Mapping[tuple[str, int], Run]) -> dict[tuple[str, int], Run]:
    """Runs whose last measurements stand at one step, be it that trainings of other lengths ended with them."""
    last = {key: read_json(Path(run.source) / "evaluation.json") for key, run in runs.items()}
    steps = {int(content.get("step", 0)) for content in last.values()}
    if len(steps) < 2:
        return dict(runs)
    end, moved = np.array([max(steps)]), {}
    note = f"measured when a run ended, at steps {min(steps):,} to {max(steps):,}: they stand at {max(steps):,} here"
    for key, run in runs.items():
        names = [name for name in last[key].get("readings", {}) if name in run.series]
        series = {name: Series.of(end, run.series[name].values[-1:]) for name in names}
        moved[key] = replace(run, series={**run.series, **series}, notices=(*run.notices, note))
    return moved


def _cell(name: str, runs: Sequence[Trained], read: Mapping[tuple[str, int], Run]) -> Cell:
    readings: dict[int, Reading] = {}
    gaps: list[str] = []
    for run in runs:
        found = reading(name, run.folder, read[run.arm, run.seed].series)
        if isinstance(found, Reading):
            readings[run.seed] = found
        else:
            gaps.append(found)
    if not readings:
        return Cell(why=gaps[0] if gaps else "no run has finished")
    values = {seed: r.value for seed, r in readings.items()}
    nulls = [r.null for r in readings.values() if r.null is not None]
    mean, low, high = fmean(values.values()), None, None
    if len(values) > 1:
        half = quantile(0.975, len(values) - 1) * stdev(values.values()) / math.sqrt(len(values))
        low, high = mean - half, mean + half
        if scales.is_share(name, list(values.values())):
            low, high = max(0.0, low), min(1.0, high)
    else:
        (only,) = readings.values()
        low, high = only.low, only.high
    return Cell(values, Reading(mean, fmean(nulls) if nulls else None, len(values), low, high), "; ".join(gaps[:1]))


def reading(name: str, folder: Path | None, series: Mapping[str, Series]) -> Reading | str:
    """A metric at the end of a run, or why it was not measured."""
    evaluation = read_json(folder / "evaluation.json") if folder is not None else {}
    found = evaluation.get("readings", {}).get(name)
    if found is not None:
        return Reading(**found)
    if name in series and len(series[name]):
        return Reading(series[name].value, series[name].null, series[name].n)
    return unmeasured(name, evaluation) or "it was not measured"


def unmeasured(name: str, evaluation: Mapping[str, Any]) -> str:
    """Why an evaluation holds no such metric, as far as it says so of the metric or of another one of its site."""
    gaps: Mapping[str, str] = evaluation.get("not_measured", {})
    site = name.rpartition("/")[0]
    return gaps.get(name) or next((why for other, why in gaps.items() if other.rpartition("/")[0] == site), "")


# in words


def written(name: str, value: float) -> str:
    """A value of a metric as a person reads it."""
    return percent(value) if scales.is_share(name, [value]) else short(value)


def spread(name: str, r: Reading) -> str:
    """An interval, or nothing where none is known."""
    if r.low is None or r.high is None:
        return ""
    low, high = (written(name, v) for v in (r.low, r.high))
    return f"{low.removesuffix(' %') if high.endswith(' %') else low} to {high}"


def apart(m: Metric) -> str:
    """The interval of the difference from the baseline."""
    if m.low is None or m.high is None:
        return ""
    return f"{gap(m, m.low)} to {gap(m, m.high)}{' points' if m.share else ''}"


def excludes_none(m: Metric) -> bool:
    """Whether the interval of one metric lies on one side of 0 though, of so many, no claim can be made."""
    return m.verdict == UNSURE and m.low is not None and m.high is not None and (m.low > 0 or m.high < 0)


def headline(s: Study) -> str:
    """The arms by their verdict, in one sentence for each."""
    base = s.sweep.baseline
    words = {
        BETTER: f"Better than {base}", WORSE: f"Worse than {base}", EQUIVALENT: f"Equivalent to {base} within δ",
        UNSURE: "Cannot tell", "not compared": "Not compared",
    }  # fmt: skip
    said = []
    for verdict, word in words.items():
        arms = [a.name + _in_part(a, verdict) for a in s.arms[1:] if a.verdict == verdict]
        said += [f"{word}: {', '.join(arms)}."] if arms else []
    return " ".join(said)


def _in_part(arm: Arm, verdict: str) -> str:
    """What is told of some metrics of an arm of which, as a whole, one cannot tell."""
    if verdict != UNSURE:
        return ""
    parts = [
        f"{word} {', '.join(m.name.removeprefix('val/') for m in found)}"
        for word, kind in (
            ("better in", BETTER),
            ("worse in", WORSE),
            ("equivalent in", EQUIVALENT),
            ("other in", DIFFERS),
        )
        if (found := arm.told(kind))
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def _can(s: Study) -> list[str]:
    """Every claim about a deciding metric."""
    base = s.sweep.baseline
    return [f"{arm.name} is {_word(m)} {base}: {claim(m)}" for arm in s.arms[1:] for m in arm.told(*TOLD)]


def _word(m: Metric) -> str:
    return {BETTER: "better than", WORSE: "worse than", EQUIVALENT: "equivalent to"}.get(m.verdict, "other than")


def _cannot(s: Study) -> list[str]:
    """What stays open, and what the claims don't reach."""
    base, seeds = s.sweep.baseline, s.sweep.seeds
    said = []
    if len(seeds) < 2:
        said.append(
            "One seed: nothing can be concluded, since another seed alone could make any difference that is seen here; "
            "give three at least (--seeds 0,1,2)"
        )
    elif len(seeds) == 2:
        wide = quantile(1 - s.level / 2, 1)
        said.append(f"Two seeds: an interval reaches {wide:.0f} standard errors to each side, so little can be shown")
    for arm in s.arms:
        lost = [run for run in arm.runs if run.status in ("failed", "stopped")]
        if lost:
            by_error: dict[str, list[str]] = {}
            for run in lost:
                by_error.setdefault((run.error or run.status).rstrip("."), []).append(str(run.seed))
            told = "; ".join(f"{why} (seed {', '.join(several)})" for why, several in by_error.items())
            left = "; those that are left were chosen by not failing" if len(lost) < len(arm.runs) else ""
            said.append(f"{arm.name}: {len(lost)} of {len(arm.runs)} runs did not finish: {told}{left}")
    said += [arm.why for arm in s.arms[1:] if arm.comparison is None and arm.why]
    for arm in s.arms[1:]:
        if arm.comparison is not None:
            said += _open(arm, base, len(s.metrics))
    said += _unmeasured(s) + _at_chance(s) + _unhealthy(s)
    if len(s.arms) > 2:
        said.append(
            f"Arms were compared with {base}, not with each other: where one is told from it and another is not, the "
            "two need not differ"
        )
        said.append("Whether the intervals of two arms overlap decides nothing: their difference, seed by seed, does")
    said.append("Seeds repeat a training on its data; other data, sizes and lengths were not tried")
    return said


def _open(arm: Arm, base: str, count: int) -> list[str]:
    """Of one arm: metrics that cannot be told, and what else may be behind a difference."""
    c, said = arm.comparison, list[str]()
    assert c is not None
    unsure = [m for m in arm.metrics.values() if m.verdict not in TOLD]
    if c.barred:
        said.append(f"{arm.name}: {c.barred}")
    elif unsure and any(m.low is not None for m in unsure):
        told = ", ".join(_undecided(m, count) for m in unsure)
        most = max(map(runs_needed, unsure), default=0)
        many = f"over {MANY}" if most > MANY else f"about {most}"
        need = f"; {many} seeds would show a difference of δ, or its absence" if most else ""
        said.append(f"{arm.name} against {base} cannot be told in {told}{need}")
    said += [f"{arm.name}: {what}" for what in c.confounds]
    return said + [f"{arm.name}: {name} was left out ({c.left_out[name]})" for name in arm.cells if name in c.left_out]


def _undecided(m: Metric, count: int) -> str:
    if m.low is None or m.why:
        return f"{m.name} ({m.why})" if m.why else m.name
    more = f", not once all {count} metrics are counted" if excludes_none(m) and count > 1 else ""
    return f"{m.name} ({apart(m)}{more})"


def _unmeasured(s: Study) -> list[str]:
    gaps: dict[tuple[str, str], list[str]] = {}
    for arm in s.arms:
        if any(run.status == "finished" for run in arm.runs):
            for name, cell in arm.cells.items():
                if cell.reading is None:
                    gaps.setdefault((name, cell.why), []).append(arm.name)
    everyone = sum(any(run.status == "finished" for run in arm.runs) for arm in s.arms)
    where = {key: "" if len(arms) == everyone else f" in {', '.join(arms)}" for key, arms in gaps.items()}
    return [f"{name} was not measured{where[name, why]}: {why}" for name, why in gaps]


def _at_chance(s: Study) -> list[str]:
    """Metrics in which no arm can be told from its null: what differs there may be chance."""
    said = []
    for name in s.metrics:
        known = [r for arm in s.arms if (r := arm.cells[name].reading) is not None]
        within = [r.null for r in known if r.null is not None and _holds(r, r.null)]
        if known and len(within) == len(known):
            said.append(f"{name}: no arm can be told from its null, {written(name, fmean(within))}")
    return said


def _holds(r: Reading, value: float) -> bool:
    """Whether the interval holds a value."""
    return r.low is not None and r.high is not None and r.low <= value <= r.high


def _unhealthy(s: Study) -> list[str]:
    failing = [f"{r.arm}, seed {r.seed}" for arm in s.arms for r in arm.runs if r.record.get("verdict") == "failing"]
    if not failing:
        return []
    few = "; ".join(failing[:6]) + (f" and {len(failing) - 6} more" if len(failing) > 6 else "")
    runs = "1 run is" if len(failing) == 1 else f"{len(failing)} runs are"
    return [f"By their own findings {runs} failing ({few}), which says little of what a sound run does"]
