"""When was something first said of a run? Its history is judged again, as far as it went at each look. No torch."""

from collections.abc import Sequence
from dataclasses import replace

from intaglio.health.diagnosis import diagnose
from intaglio.health.record import Record

AUDITED = 4
"""The step at which audits of the first gradients are closed."""

VALIDATION = ("changed_by_validation", "training_in_validation")
"""Facts that a look at held-out items finds."""


def first_said(record: Record) -> dict[tuple[str, str], int]:
    """By rule and severity, the step at which it was first said."""
    first: dict[tuple[str, str], int] = {}
    for step in looks(record):
        for finding in diagnose(until(record, step)).findings:
            first.setdefault((finding.rule, finding.severity), step)
    return first


def looks(record: Record) -> Sequence[int]:
    """Steps at which held-out items were looked at, and that at which the first audits close."""
    steps = {int(step) for s in record.matching("val/*").values() for step in s.steps}
    return sorted(step for step in steps | {min(AUDITED, record.last_step)} if step > 0)


def until(record: Record, step: int) -> Record:
    """What was known of a run at a step; facts from the first audits on, or the first look at held-out items."""
    seen = any(s.steps[0] <= step for s in record.matching("val/loss/*").values())
    facts = {name: fact for name, fact in record.facts.items() if seen or name not in VALIDATION}
    if step < facts.get("dead_told_at", 0):
        facts.pop("dead_parameters", None)
    series, logged = (
        {name: s.at(s.steps <= step) for name, s in known.items() if s.steps[0] <= step}
        for known in (record.series, record.logged)
    )
    return replace(record, facts=facts, series=series, logged=logged, running=step < record.last_step)
