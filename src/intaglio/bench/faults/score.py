"""Scores of the fault benchmark: what was found, what was named, what was accused wrongly, how soon. No torch."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from intaglio.bench import Result
from intaglio.bench.faults.judge import Outcome, loud
from intaglio.history.reading import share

TARGETS = {"detection": 0.95, "diagnosis": 0.85, "false": 0.02, "steps": 200, "overhead": 0.02}


def scores(outcomes: Sequence[Outcome]) -> list[Result]:
    """The targets and what was measured, on the outcomes given."""
    faulty, healthy = [o for o in outcomes if o.faulty], [o for o in outcomes if not o.faulty]
    sound = [o for o in healthy if o.able is not False and o.status == "finished"]
    found = [o for o in faulty if o.detected_at() is not None]
    steps = [step for o in found if (step := o.detected_at()) is not None]
    overheads = [
        o.monitor_seconds / (o.seconds - o.monitor_seconds) for o in outcomes if 0 < o.monitor_seconds < o.seconds
    ]
    made = [
        *_share("faulty runs that are found", TARGETS["detection"], faulty, lambda o: o.detected_at() is not None),
        *_share("faults named, first of all findings", TARGETS["diagnosis"], faulty, lambda o: o.place_of_cause() == 1),
        *_share("faults named among the first three", TARGETS["diagnosis"], faulty, lambda o: _within(o, 3)),
        *_share("healthy runs that are accused", TARGETS["false"], sound, lambda o: bool(o.accused), "lower"),
    ]
    if steps:
        made.append(Result("steps to detection, median", TARGETS["steps"], median(steps), "lower", n=len(steps)))
    if overheads:
        made.append(
            Result("time for the monitor, median", TARGETS["overhead"], median(overheads), "lower", n=len(overheads))
        )
    return made


def _within(o: Outcome, places: int) -> bool:
    place = o.place_of_cause()
    return place is not None and place <= places


def _share(
    what: str, target: float, of: Sequence[Outcome], hit: Callable[[Outcome], bool], better: str = "higher"
) -> list[Result]:
    """Nothing where there is nobody to count."""
    found = [share(sum(map(hit, of)), len(of))] if of else []
    return [Result(what, target, r.value, better, n=r.n, low=r.low, high=r.high) for r in found]


def by_family(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Of each family: its faults, how many were found and named, its healthy runs, how many were accused or warned."""
    rows = []
    for family in dict.fromkeys(o.family for o in outcomes):
        of_it = [o for o in outcomes if o.family == family]
        faulty, healthy = [o for o in of_it if o.faulty], [o for o in of_it if not o.faulty]
        rows.append(
            {
                "family": family,
                "split": of_it[0].split,
                "faults": len(faulty),
                "found": sum(o.detected_at() is not None for o in faulty),
                "named_first": sum(o.place_of_cause() == 1 for o in faulty),
                "healthy": len(healthy),
                "not_able": sum(o.able is False for o in healthy),
                "accused": sum(bool(o.accused) for o in healthy),
                "warned": sum(any(True for _ in loud(o)) for o in healthy),
            }
        )
    return rows


def by_rule(outcomes: Sequence[Outcome], rules: Sequence[str]) -> list[dict[str, Any]]:
    """Of each rule: faults that it should name, in which families, how often it did, and on how many healthy runs it
    failed or warned."""
    rows = []
    for rule in rules:
        due = [o for o in outcomes if rule in o.due]
        named = [o for o in due if any(s.rule == rule for s in loud(o))]
        wrongly = [o for o in outcomes if not o.faulty and any(s.rule == rule for s in loud(o))]
        rows.append(
            {
                "rule": rule,
                "due": len(due),
                "families": sorted({o.family for o in due}),
                "named": len(named),
                "healthy_warned": len(wrongly),
                "healthy_failed": sum(rule in o.accused for o in wrongly),
            }
        )
    return rows


def confusion(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What was said first of a fault, where it was not its cause: the rule that was due, what was said, how often."""
    pairs = Counter(
        (o.due[0], next((s.rule for s in loud(o)), "nothing")) for o in outcomes if o.faulty and o.place_of_cause() != 1
    )
    return [{"due": due, "said": said, "times": times} for (due, said), times in pairs.most_common()]


def cases(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The real defects: case, rule, how gravely it was named, the step, and the evidence in words."""
    rows = []
    for o in sorted((o for o in outcomes if o.case), key=lambda o: o.case):
        letter, _, rule = o.case.partition(" ")
        named = [s for s in o.said if s.rule == rule]
        step = min((s.step for s in named), default=None)
        gravely = named[0].severity if named else ""
        evidence = named[0].message if named else ""
        rows.append(
            {"case": letter, "rule": rule, "training": o.name, "named": gravely, "step": step, "evidence": evidence}
        )
    return rows


def misses(outcomes: Sequence[Outcome], explained: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every fault that was not found or not named first, and every healthy run that was accused, with the reason."""
    rows = []
    for o in outcomes:
        said = [f"{s.severity} {s.rule}" for s in loud(o)][:3]
        if o.faulty and o.detected_at() is None:
            what = "not found"
        elif o.faulty and o.place_of_cause() != 1:
            what = "not named first" if o.place_of_cause() else "not named"
        elif not o.faulty and o.accused:
            what = "accused"
        else:
            continue
        rows.append(
            {"training": o.name, "what": what, "due": list(o.due), "said": said, "why": explained.get(o.name, "")}
        )
    return rows
