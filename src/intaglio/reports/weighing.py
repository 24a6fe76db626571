"""What a comparison comes to: the verdict, what may mislead, and what to do next."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from intaglio.reports.arms import Run, alike, common_rows, trained_apart
from intaglio.reports.differences import BETTER, DIFFERS, EQUIVALENT, UNSHARED, UNSURE, WORSE, Metric, confidence
from intaglio.reports.safe import plain
from intaglio.reports.scales import direction
from intaglio.reports.student import quantile
from intaglio.reports.words import change, percent, short

MANY = 200
OTHER_TEST = {"model.vocabulary", "train.validate_items"}
SAME_TEST = {"data.cache", "data.bad_limit", "data.text_length"}


def verdict(
    metrics: Sequence[Metric], refused: str, other_test: str, unfit: Mapping[str, str], counts: tuple[int, int]
) -> tuple[str, str]:
    """The verdict on B against A, and the reason, from the metrics that it rests on; ``unfit`` are those that cannot be
    compared, with the reason."""
    if refused:
        return UNSURE, refused
    main = [m for m in metrics if m.main and m.verdict != UNSHARED]
    if not main:
        told = [f"{plain(n, 60)} cannot be compared ({why})" for n, why in unfit.items()]
        why = told[0] if told else "nothing held out, whose name tells which way is better, was measured by both"
        return UNSURE, f"{why}; a training loss does not say what was learnt"
    if other_test:
        return UNSURE, other_test
    kinds = {m.verdict for m in main}
    said = "; ".join(map(claim, main))
    if min(counts) < 2:
        alone = "one run each" if max(counts) == 1 else f"one run in {'A' if counts[0] == 1 else 'B'}"
        return UNSURE, f"{alone}: cannot tell. Another seed alone could make the difference ({said})"
    if kinds == {EQUIVALENT}:
        return EQUIVALENT, said
    for kind in (BETTER, WORSE):
        if kind in kinds and kinds <= {kind, EQUIVALENT}:
            return kind, said
    if {BETTER, WORSE} <= kinds:
        return UNSURE, f"a trade: {said}"
    return UNSURE, said


def claim(m: Metric) -> str:
    """What the numbers of one metric say, with the interval."""
    name, points = plain(m.name, 60), " points" if m.share else ""
    if m.low is None or m.high is None:
        shown = f"{name} {number(m, float(m.a.mean()))} against {number(m, float(m.b.mean()))}"
        alone = m.why.startswith("one run") or not m.why
        return shown if alone else f"{shown}; {m.why}"
    way = "higher" if m.difference > 0 else "lower"
    span = f"{confidence(m.level)} interval {gap(m, m.low)} to {gap(m, m.high)}{points}"
    if m.verdict == EQUIVALENT:
        return f"{name} differs by less than δ = {gap(m, m.delta)}{points} ({span}; {m.test})"
    if m.verdict in (BETTER, WORSE, DIFFERS):
        share = "" if m.relative is None or m.share else f", {change(m.relative)}"
        unclear = "; its name does not tell which way is better" if m.verdict == DIFFERS else ""
        return f"{name} is {way} by {gap(m, abs(m.difference))}{points}{share} ({span}; {m.test}){unclear}"
    why = m.why or f"neither a difference nor its absence within δ = {gap(m, m.delta)}{points} is shown"
    return f"{name}: {why} ({span}; {m.test})"


def number(m: Metric, value: float) -> str:
    """A value of the metric as a person reads it."""
    return percent(value) if m.share else short(value)


def gap(m: Metric, value: float) -> str:
    """A difference of the metric's values; of shares, in points of a per cent."""
    return short(100 * value if m.share else value)


def recommendation(
    names: tuple[str, str],
    outcome: str,
    metrics: Sequence[Metric],
    changed: Mapping[str, Any],
    cost: Mapping[str, tuple[float | None, float | None]],
    counts: tuple[int, int],
    refused: bool,
    other_test: bool,
) -> str:
    """One sentence that follows from the verdict."""
    a, b = (f"{arm} ({plain(name, 60)})" if name != arm else arm for arm, name in zip("AB", names, strict=True))
    several = f", and change one of the {len(changed)} settings at a time to learn which one did it"
    ending = f"{several if len(changed) > 1 else ''}."
    if refused:
        return "Check where the files come from, and compare runs that were trained apart."
    if other_test:
        return f"Train {b} on the very items and tokens of {a}, then compare again."
    if outcome == BETTER:
        return f"Take {b}{_at_a_price(cost)}{ending}"
    if outcome == WORSE:
        return f"Stay with {a}{ending}"
    if outcome == EQUIVALENT:
        dearer = _dearer(cost)
        if dearer:
            return f"Take {a if dearer == 'B' else b}, which costs less: what they learn is the same within δ."
        return f"Either will do: stay with {a} unless {b} is simpler."
    if min(counts) < 2:
        return (
            f"Decide nothing yet: train both at least three times, with the same seeds in each (--seed 0, 1, 2){ending}"
        )
    main = [m for m in metrics if m.main and m.verdict != UNSHARED]
    if not main:
        return "Log one held-out quantity under the same definition in both arms, then compare again."
    if {BETTER, WORSE} <= {m.verdict for m in main}:
        return "Decide which of the two matters, and name it with --metric."
    if any(m.verdict == DIFFERS for m in main):
        return "Say which way is better, or name with --metric a quantity whose name tells."
    most = max((runs_needed(m) for m in main), default=0)
    if not most:
        return "Look at the runs that gave no usable value first, then compare again."
    told = f"over {MANY}" if most > MANY else f"about {most}"
    fewer = "a wider --delta needs fewer" if main[0].test.startswith("paired") else "the same seeds in both need fewer"
    return f"Stay with {a} for now: {told} runs an arm would show a difference of δ, or its absence; {fewer}."


def runs_needed(m: Metric) -> int:
    """Runs an arm at which a difference of δ would be found with a chance of 80 %; 0 where that is unknown."""
    if not (m.delta > 0 and m.spread > 0):
        return 0
    samples = 1 if m.test.startswith("paired") else 2
    sure = quantile(1 - m.level / 2, 1e6) + 0.84  # Student's t of so many runs is a normal distribution
    return max(3, math.ceil(samples * (sure * m.spread / m.delta) ** 2))


def _at_a_price(cost: Mapping[str, tuple[float | None, float | None]]) -> str:
    told = [
        f"{b / a:.2g}× the {what}"
        for key, what in (("parameters", "parameters"), ("seconds", "training time"))
        if (a := cost[key][0]) and (b := cost[key][1]) and b > 1.05 * a
    ]
    return f", at {' and '.join(told)}" if told else ""


def _dearer(cost: Mapping[str, tuple[float | None, float | None]]) -> str:
    """The arm with over 5 % more parameters, else the one that took over a quarter longer."""
    for key, more in (("parameters", 0.05), ("seconds", 0.25)):
        a, b = cost[key]
        if a and b and abs(a - b) > more * min(a, b):
            return "A" if a > b else "B"
    return ""


def not_one_test(
    a: Sequence[Run], b: Sequence[Run], pairs: Sequence[tuple[int, int]] | None, changed: Iterable[str]
) -> str:
    """Why the arms were not measured on the same held-out items, or nothing."""
    if not all(run.ours for run in (*a, *b)):
        return ""
    of = "held-out items, split or tokens are others in each arm, so they were not put to the same test"
    keys = [k for k in changed if (k.startswith("data.") and k not in SAME_TEST) or k in OTHER_TEST]
    prints = [(a[i].facts.get("fingerprint"), b[j].facts.get("fingerprint")) for i, j in pairs or ()]
    if any(x and y and x != y for x, y in prints):
        return f"{of} (the data fingerprints of runs with one seed differ{_by(keys)})"
    return "" if prints and not set(keys) & OTHER_TEST else f"{of} ({', '.join(keys)})" if keys else ""


def _by(keys: Sequence[str]) -> str:
    return f"; changed: {', '.join(keys)}" if keys else ""


def confounds(
    a: Sequence[Run],
    b: Sequence[Run],
    changed: Mapping[str, Any],
    varied: Mapping[str, Sequence[str]],
    paired: bool,
    axis: str,
) -> list[str]:
    """What could be behind a difference besides what was meant to be changed."""
    said = []
    if len(changed) > 1:
        shown = ", ".join(plain(k, 50) for k in list(changed)[:8]) + (", …" if len(changed) > 8 else "")
        said.append(f"{len(changed)} settings were changed at once ({shown}): which of them did what cannot be told")
    for arm, runs in (("A", a), ("B", b)):
        if not any(run.config for run in runs):
            said.append(f"no configuration stands with {arm}, so what was changed is not known")
        if varied[arm] and not paired:
            keys = ", ".join(plain(k, 50) for k in varied[arm][:6])
            said.append(f"the runs of {arm} are no repetitions: they differ among themselves in {keys}")
        for run in runs:
            if run.facts.get("status") not in (None, "finished"):
                said.append(
                    f"{plain(run.name, 60)} ({arm}) has not finished: its status is {plain(run.facts['status'], 30)}"
                )
    seeds = [sorted({str(run.seed) for run in arm if run.seed is not None}) for arm in (a, b)]
    if not all(seeds):
        said.append("no seeds are recorded, so runs cannot be paired")
    elif seeds[0] != seeds[1]:
        x, y = (plain(", ".join(s[:6]), 60) for s in seeds)
        said.append(f"the seeds differ ({x} against {y}), so runs are not paired")
    for what, told in (
        ("machine", "machines differ, so do not compare times"),
        ("commit", "code differs, by its commit"),
    ):
        old, new = ({str(run.facts[what]) for run in arm if run.facts.get(what)} for arm in (a, b))
        if old and new and not old & new:
            said.append(f"{told} ({plain(min(old), 60)} against {plain(min(new), 60)})")
    for package in sorted({p for run in (*a, *b) for p in run.facts.get("versions", {})}):
        old, new = ({str(v) for run in arm if (v := run.facts.get("versions", {}).get(package))} for arm in (a, b))
        if old and new and not old & new:
            said.append(f"{plain(package, 40)} is {plain(min(old), 40)} in A and {plain(min(new), 40)} in B")
    return [*said, *_lengths(a, b, axis)]


def _lengths(a: Sequence[Run], b: Sequence[Run], axis: str) -> list[str]:
    """Arms of other lengths, and of other batches."""
    said = []
    steps = [[s for run in arm if (s := run.facts.get("steps"))] for arm in (a, b)]
    if all(steps) and min(steps[0]) != min(steps[1]):
        low, high = sorted(((min(steps[0]), "A"), (min(steps[1]), "B")))
        said.append(
            f"{low[1]} was trained for {low[0]:,} steps, {high[1]} for {high[0]:,}: where the common steps end, a "
            f"schedule has come to its end in {low[1]} and not in {high[1]}"
        )
    items = [{n for run in arm if (n := run.facts.get("items per step"))} for arm in (a, b)]
    if all(len(n) == 1 for n in items) and items[0] != items[1]:
        x, y = (next(iter(n)) for n in items)
        said.append(f"a {axis} is {x} items in A and {y} in B: at the same {axis}, B has seen {y / x:.3g}× as many")
    return said


def notices(
    a: Sequence[Run],
    b: Sequence[Run],
    metrics: Sequence[Metric],
    changed: Mapping[str, Any],
    weighted: Mapping[str, str],
) -> list[str]:
    """What was cut, renamed, divided or damaged, and what looks odd; each once."""
    said = [note for run in (*a, *b) for note in run.notices]
    renamed = {f"{plain(old, 50)} → {plain(new, 50)}" for run in (*a, *b) for old, new in run.renamed.items()}
    if renamed:
        said.append(f"read under our names: {', '.join(sorted(renamed))}")
    if not changed and all(run.config for run in (*a, *b)):
        said.append(
            "no setting differs but seeds and names: whatever differs is chance, or is not in the configurations"
        )
    parts = [run for run in (*a, *b) if not run.ours and sum("/loss/" in n for n in run.series) > 2]
    if parts and not weighted and not any(m.verdict == UNSHARED for m in metrics):
        said.append("that the loss terms are weighted alike in both arms is taken from the configurations, if at all")
    by_note: dict[str, list[str]] = {}
    for m in metrics:
        for note in m.notes:
            by_note.setdefault(note, []).append(plain(m.name, 50))
    said += [f"{_few(names)}: {note}" for note, names in by_note.items()]
    return list(dict.fromkeys([*said, *_copied(a, b)]))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _copied(a: Sequence[Run], b: Sequence[Run]) -> list[str]:
    """Series that are the same in a run of each arm while the rest of the two is not."""
    said = []
    for x in a:
        for y in b:
            if trained_apart(x, y):  # theirs is chance, as of two accuracies over few items
                continue
            first, second = x.outcomes(), y.outcomes()
            pairs = {n: common_rows(first[n], second[n]) for n in first if n in second}
            judged = {n: p for n, p in pairs.items() if p is not None and ("/loss/" in n or direction(n))}
            same = [n for n, p in judged.items() if alike(*p) and len(np.unique(p[0][:1000])) >= 3]
            if same and len(same) < len(pairs):
                shown = _few([plain(n, 50) for n in same])
                said.append(
                    f"{shown}: the same in {plain(x.name, 40)} and {plain(y.name, 40)} at every common row, though "
                    "other metrics of the two differ; look whether a table was copied"
                )
    return said
