"""Two arms of runs against each other: what was changed, what differs by more than chance, and what cannot be told.

Seeds are what a difference is measured against. Arms whose runs match by seed (and by every setting but those in which
the arms differ) are compared in pairs, by Student's paired t; others by Welch's t (Welch 1947). "Equivalent" is claimed
where two one-sided tests (Schuirmann 1987) put the difference within ±δ. The verdict rests on the held-out loss, which
is tested by itself; claims about the other held-out metrics, and about the rest, are corrected for their number (Holm
1979).
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from intaglio.reports import scales, weighing
from intaglio.reports.arms import Run, arm_names, pair_key, read_runs, same_data, trained_apart
from intaglio.reports.differences import LEVEL, UNSHARED, Margin, Metric, judged, plain_values, tested
from intaglio.reports.matched import Line, match
from intaglio.reports.safe import plain

WINDOWS = 4


@dataclass(frozen=True)
class Comparison:
    """What two arms of runs show.

    ``changed`` are the settings in which they differ, key → (in A, in B); ``cost`` means over the runs of each arm;
    ``left_out`` metrics that both have and that could not be compared, with the reason; ``confounds`` what else could
    be behind a difference; ``notices`` what was cut, divided, renamed, or looks odd; ``barred`` why no metric decides
    anything, where the arms were not put to one test.
    """

    names: tuple[str, str]
    a: tuple[Run, ...]
    b: tuple[Run, ...]
    axis: str
    verdict: str
    reason: str
    recommendation: str
    margin: str
    metrics: tuple[Metric, ...]
    changed: Mapping[str, tuple[Any, Any]]
    cost: Mapping[str, tuple[float | None, float | None]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    confounds: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    level: float = LEVEL
    barred: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The answer of ``--json``: ``verdict``, ``reason``, ``recommendation``, ``metrics[]``, what they rest on."""
        return {
            "verdict": self.verdict, "reason": self.reason, "recommendation": self.recommendation,
            "arms": {
                key: {"name": name, "runs": [{"name": r.name, "source": r.source, "format": r.format, "seed": r.seed}
                                             for r in arm]}
                for key, name, arm in zip("ab", self.names, (self.a, self.b), strict=True)
            },
            "axis": self.axis, "margin": self.margin, "level": self.level,
            "changed": {k: {"a": plain_values(x), "b": plain_values(y)} for k, (x, y) in self.changed.items()},
            "metrics": [m.as_dict() for m in self.metrics],
            "cost": {k: {"a": x, "b": y} for k, (x, y) in self.cost.items()},
            "confounds": list(self.confounds), "left_out": dict(self.left_out), "notices": list(self.notices),
        }  # fmt: skip


def compare(
    a: Iterable[str | Path],
    b: Iterable[str | Path],
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    metrics: Sequence[str] = (),
    delta: str | float | None = None,
    windows: int = WINDOWS,
) -> Comparison:
    """Compares runs of arm A with runs of arm B: run folders, their names, history files, or ``FILE::RUN``.

    Args:
        a: the baseline's runs; ``intaglio.reports.arms.in_two`` makes both arms from a command line.
        b: the runs of the change.
        format: of foreign files, where it is not to be found out.
        mapping: their names → ours, for foreign files.
        metrics: compare these alone, and rest the verdict on them.
        delta: largest difference that counts as none: ``"2%"`` of A's value (the default), or a number in the unit of
            the metrics that the verdict rests on.
        windows: how many equal windows of steps.

    Raises:
        ValueError: something unreadable, no metric or no steps in common, or an unknown metric; says what to do.
    """
    arms = [[run for word in arm for run in read_runs(word, format, mapping)] for arm in (a, b)]
    return compare_runs(arms[0], arms[1], metrics=metrics, delta=delta, windows=windows)


def compare_runs(
    a: Sequence[Run],
    b: Sequence[Run],
    *,
    metrics: Sequence[str] = (),
    delta: str | float | None = None,
    windows: int = WINDOWS,
    names: tuple[str, str] | None = None,
    main: Sequence[str] = (),
    better: Mapping[str, int] | None = None,
    level: float = LEVEL,
) -> Comparison:
    """As ``compare``, of runs that have been read.

    Args:
        names: of the arms, where those of their runs are not to tell.
        main: what the verdict rests on, all else being compared, too; a name that an arm has not measured is left out.
        better: +1 where more is better, −1 where less is, for names that don't tell.
        level: chance of a false claim, and that an interval misses: .05 over the number of comparisons, if several.
    """
    if not (a and b):
        raise ValueError("one arm has no runs: give at least one run for each.")
    if windows < 1:
        raise ValueError(f"--windows {windows}: the common steps are cut into 1 window or more.")
    margin = Margin.parse(delta)
    names, axis = names or arm_names(a, b), _axis([*a, *b])
    a, b, doubled, refused = _distinct(a, b)
    changed, varied = _changes(a, b)
    common = _common_metrics(a, b, metrics)
    sure, unsure = scales.logged_weighted(a, b)
    a, b = ([scales.divided(run, sure) for run in arm] for arm in (a, b))
    unshared = scales.other_totals(a, b, changed) | {
        n: unsure[t] for n in common if "/loss/" in n and (t := n.rsplit("/", 1)[-1]) in unsure
    }
    pairs = _pairs(a, b, changed)
    rests_on = _main(common, unshared, [*a, *b], metrics or main)
    compared, left_out = list[Metric](), dict[str, str]()
    for name in common:
        way = (better or {}).get(name, scales.direction(name))
        found = _metric(name, a, b, pairs, name in rests_on, way, level, windows, axis, margin)
        if isinstance(found, str):
            left_out[name] = found
            continue
        if name in unshared:
            found = replace(found, verdict=UNSHARED, why=unshared[name], low=None, high=None, p=None, p_equal=None)
        if "/loss/" in name and (why := sure.get(name.rsplit("/", 1)[-1])):
            found = replace(found, notes=(*found.notes, f"logged weighted ({why}), so divided by its weight"))
        compared.append(found)
    if not compared:
        raise ValueError(
            f"nothing can be compared: {len(left_out)} metrics are in both arms, but {left_out[common[0]]}."
        )
    found_in = sorted(judged(compared), key=lambda m: not m.main)
    other_test = weighing.not_one_test(a, b, pairs, changed)
    counts = (len(a), len(b))
    unfit = {
        n: why for n, why in (unshared | left_out).items() if n in rests_on or (not rests_on and n.startswith("val/"))
    }
    verdict, reason = weighing.verdict(found_in, refused, other_test, unfit, counts)
    cost = {key: (_mean(a, key), _mean(b, key)) for key in ("parameters", "seconds", "steps")}
    advice = weighing.recommendation(
        names, verdict, found_in, changed, cost, counts, bool(refused), bool(other_test) and not refused
    )
    misleading = weighing.confounds(a, b, changed, varied, pairs is not None, axis)
    notices = [*doubled, *weighing.notices(a, b, found_in, changed, sure)]
    return Comparison(
        names, tuple(a), tuple(b), axis, verdict, reason, advice, margin.said, tuple(found_in),
        changed, cost, left_out, tuple(misleading), tuple(notices), level, refused or other_test,
    )  # fmt: skip


def _mean(arm: Sequence[Run], key: str) -> float | None:
    told = [float(v) for run in arm if (v := run.facts.get(key)) is not None]
    return fmean(told) if told else None


# the arms


def _axis(runs: Sequence[Run]) -> str:
    """What the steps of all runs count, in the singular."""
    kinds = {_counted(run.axis) for run in runs}
    if len(kinds) > 1:
        told = "; ".join(f"{plain(r.name, 60)} counts {plain(r.axis, 40)}" for r in runs[:6])
        raise ValueError(
            f"the runs count different things, so their steps cannot be matched: {told}. Export all by one."
        )
    return kinds.pop()


def _counted(axis: str) -> str:
    said = scales.words(axis)
    if "epoch" in said or "epochs" in said:
        return "epoch"
    if set(said) & {"step", "steps", "iter", "iteration", "iterations", "batch", "batches", "update", "updates"}:
        return "step"
    return plain(axis, 40).removesuffix("s")


def _distinct(a: Sequence[Run], b: Sequence[Run]) -> tuple[list[Run], list[Run], list[str], str]:
    """Both arms without data that was read twice, what was found, and why nothing is left to go by, if so."""
    said, kept = list[str](), (list[Run](), list[Run]())
    for name, arm, out in (("A", a, kept[0]), ("B", b, kept[1])):
        for run in arm:
            twin = next(((k, why) for k in out if (why := same_data(k, run))), None)
            if twin is None:
                out.append(run)
            else:
                said.append(f"{_two(twin[0], run)} are one run ({twin[1]}): it counts once in {name}")
    alike = [(x, y, why) for x in kept[0] for y in kept[1] if (why := same_data(x, y))]
    doubled = [pair for pair in alike if not trained_apart(*pair[:2])]
    said += [
        f"{_two(x, y)} were trained apart and came out the same to the last digit: to them, the change is none"
        for x, y, _ in alike
        if trained_apart(x, y)
    ]
    for x, y, why in doubled:
        said.append(f"{_two(x, y)} are one run, read twice ({why}): no evidence for either arm")
    left = [[r for r in arm if not any(r is x or r is y for x, y, _ in doubled)] for arm in kept]
    if left[0] and left[1]:
        return left[0], left[1], said, ""
    x, y, why = doubled[0]
    return kept[0], kept[1], said, f"{_two(x, y)} are one run, read twice: {why}"


def _two(x: Run, y: Run) -> str:
    if x.name != y.name:
        return f"{plain(x.name, 60)} and {plain(y.name, 60)}"
    return f"{plain(x.source, 80)} and {plain(y.source, 80)}"


def _changes(a: Sequence[Run], b: Sequence[Run]) -> tuple[dict[str, tuple[Any, Any]], dict[str, list[str]]]:
    """Settings in which the arms differ, key → (in A, in B), and those that vary within each arm."""
    if not (any(run.config for run in a) and any(run.config for run in b)):
        return {}, {"A": [], "B": []}
    changed = dict[str, tuple[Any, Any]]()
    varied: dict[str, list[str]] = {"A": [], "B": []}
    for key in sorted({k for run in (*a, *b) for k in run.settings}):
        sides = [list({repr(run.config.get(key)): run.config.get(key) for run in arm}.values()) for arm in (a, b)]
        shown = [values[0] if len(values) == 1 else values for values in sides]
        if not {repr(x) for x in sides[0]} & {repr(x) for x in sides[1]}:
            changed[key] = (shown[0], shown[1])
        for name, values in zip("AB", sides, strict=True):
            if len(values) > 1 and key != "data.text_length":  # what the captions of a seed need
                varied[name].append(key)
    return changed, varied


def _pairs(a: Sequence[Run], b: Sequence[Run], changed: Iterable[str]) -> list[tuple[int, int]] | None:
    """Which run of A belongs to which of B, by seed and every setting but the change; None where they don't match."""
    if any(run.seed is None for run in (*a, *b)):
        return None
    keys = [[pair_key(run, changed) for run in arm] for arm in (a, b)]
    if len(set(keys[0])) < len(a) or set(keys[0]) != set(keys[1]) or len(a) != len(b):
        return None
    return [(i, keys[1].index(key)) for i, key in enumerate(keys[0])]


# the metrics


def _common_metrics(a: Sequence[Run], b: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """Names that at least one run of each arm measured, the held-out ones first; or those wanted."""
    sides = [dict.fromkeys(n for run in arm for n in run.outcomes()) for arm in (a, b)]
    common = [n for n in sides[0] if n in sides[1]]
    for name in wanted:
        if name not in common:
            near = difflib.get_close_matches(name, common, 3, 0.4) or common[:5]
            where = [arm for arm, side in zip("AB", sides, strict=True) if name in side]
            only = f"only {where[0]} measured it; " if where else ""
            raise ValueError(f"--metric {plain(name, 60)}: {only}both have {', '.join(plain(n, 60) for n in near)}.")
    if not common:
        first = [", ".join(plain(n, 40) for n in list(side)[:6]) or "none" for side in sides]
        raise ValueError(
            f"the arms have no metric in common: A measured {first[0]}; B {first[1]}. If two of them are the same "
            "quantity, give both one name with --map theirs=ours."
        )
    order = {n: k for k, n in enumerate(wanted or sorted(common, key=_rank))}
    return sorted((n for n in common if n in order), key=lambda n: order[n])


def _rank(name: str) -> tuple[bool, bool, bool, str]:
    held_out, loss = name.startswith("val/"), "/loss/" in name
    return (not held_out, not (name.endswith("/loss/total") or scales.direction(name)), not loss, name)


def _main(common: Sequence[str], unshared: Mapping[str, str], runs: Sequence[Run], wanted: Sequence[str]) -> set[str]:
    """What the verdict rests on: what was asked for, else the held-out loss, else its terms, else what is held out."""
    if wanted:
        return set(wanted)
    judged = {n for n in common if n.startswith("val/") and scales.direction(n) and n not in unshared}
    monitors = {str(run.facts.get("monitor") or "val/loss/total") for run in runs}
    by_loss = {n for n in judged if "/loss/" in n}
    for candidates in (monitors if len(monitors) == 1 else set(), {"val/loss/total"}):
        if candidates & judged:
            return candidates & judged
    return by_loss or judged


def _metric(
    name: str,
    a: Sequence[Run],
    b: Sequence[Run],
    pairs: Sequence[tuple[int, int]] | None,
    main: bool,
    better: int,
    level: float,
    windows: int,
    axis: str,
    margin: Margin,
) -> Metric | str:
    """One metric matched and measured, or why it cannot be."""
    lines = [[Line(run.series[name]) if name in run.series else None for run in arm] for arm in (a, b)]
    has = [[k for k, line in enumerate(side) if line is not None and len(line)] for side in lines]
    for arm, found in zip("AB", has, strict=True):
        if not found:
            return f"{arm} has no finite value of it"
    if pairs is not None:
        joint = [(i, j) for i, j in pairs if i in has[0] and j in has[1]]
        has = [[i for i, _ in joint], [j for _, j in joint]] if joint else has
        pairs = joint or None
    sides = [[lines[k][i] for i in has[k]] for k in (0, 1)]
    usable = [[line for line in side if line is not None] for side in sides]
    matched = match(usable[0], usable[1], windows, not name.startswith("val/"), axis)
    if isinstance(matched, str):
        return matched
    x, y = matched.ends
    delta, notes = margin.of(float(x.mean()), main), matched.notes
    broken = [arm for arm, side in zip("AB", usable, strict=True) if any(line.broken for line in side)]
    if broken:
        notes = (
            *notes,
            f"a run of {' and of '.join(broken)} ends in a value that is not finite; what stands before it counts",
        )
    difference = float(y.mean() - x.mean())
    metric = Metric(name, better, main, matched, x, y, difference, delta=delta, notes=notes, level=level)
    if broken:
        return replace(metric, why=f"a run of {' and of '.join(broken)} ended in a value that is not finite")
    return tested(metric, pairs is not None)
