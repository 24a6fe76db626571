"""A plan's limits against what a run has measured, while it trains and when it is over. No torch.

All is judged from the history alone, so that a run that was killed and resumed is judged as one that was not.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.config import plan
from intaglio.config.plan import Limit, Moment, moment
from intaglio.health.finding import Finding
from intaglio.health.record import Record
from intaglio.health.rule import Rule
from intaglio.history import NotMeasured, Series

__all__ = ["Breach", "Limit", "breaches", "judge_plan", "load_plan", "must_haves", "rules_of", "unread"]

GAP = 2.0
"""A quantity whose last reading lies further before the end than that many of its longest intervals has none there."""


@dataclass(frozen=True)
class Breach:
    """A limit that was not kept.

    ``began`` is the step at which it came to be broken for the latest time, ``last`` the latest at which it still was.
    """

    limit: Limit
    finding: Finding
    began: int
    last: int


def load_plan(given: str | Path | Mapping[str, Any] | Sequence[Any]) -> tuple[Limit, ...]:
    """The limits of a YAML file, of a recipe as a mapping, or of a list of lines.

    Raises:
        ValueError: no plan is there, or a limit in it makes no sense; says which and what to write.
    """
    if isinstance(given, str | Path):
        given = plan.read(given)
    return plan.parse(given.get("plan", ()) if isinstance(given, Mapping) else given)


def judge_plan(limits: Sequence[Limit], record: Record) -> list[Finding | NotMeasured]:
    """What is to be said of each limit that was not kept, or that cannot be judged; nothing of those that were kept."""
    judged = (judge(limit, record) for limit in limits)
    return [x.finding if isinstance(x, Breach) else x for x in judged if x is not None]


def breaches(limits: Sequence[Limit], record: Record) -> list[Breach]:
    """The limits that were not kept."""
    return [x for limit in limits if isinstance(x := judge(limit, record), Breach)]


def rules_of(limits: Sequence[Limit], gaps: Mapping[str, str] | None = None) -> list[Rule]:
    """A rule for each limit, by the name of what it claims; ``gaps`` are quantities that could not be measured."""
    return [_rule(limit, (gaps or {}).get(limit.quantity)) for limit in limits]


def must_haves(limits: Sequence[Limit], record: Record) -> set[str]:
    """Rules that must have looked before a run that is over is called healthy."""
    return {limit.id for limit in limits if limit.severity == "fail"} if _over(record) else set()


def unread(limits: Sequence[Limit], record: Record, gaps: Mapping[str, str]) -> list[str]:
    """After the first look at held-out items: what a plan names and nothing has read by then, ``gaps`` apart."""
    if max((len(s) for s in record.matching("val/loss/*").values()), default=0) != 1:
        return []
    names = dict.fromkeys(limit.quantity for limit in limits if limit.side and limit.quantity not in gaps)
    return [
        f"plan: {_absent(name, record)}. What only the end of a run measures is judged then."
        for name in names
        if _series(name, record) is None
    ]


def _rule(limit: Limit, gap: str | None) -> Rule:
    def judged(record: Record, _: Mapping[str, float]) -> list[Finding | NotMeasured]:
        said = judge_plan([limit], record)
        absent = gap and _series(limit.quantity, record) is None
        return [NotMeasured(f"{limit.quantity}: {gap}")] if absent else said

    wrong, log = f"Not kept: {limit.claim}.", f"{limit.quantity}, or correct the plan"
    return Rule(limit.id, wrong, "From its readings.", "the plan of the run", needs=("*",), log=log, judge=judged)


def judge(limit: Limit, record: Record) -> Breach | NotMeasured | None:
    """How a limit was broken, why it cannot be judged, or None where it was kept."""
    if not limit.side:
        return _finished(limit, record)
    s = _series(limit.quantity, record)
    if s is None:
        return NotMeasured(_absent(limit.quantity, record))
    if not limit.expected:
        return _watched(limit, s, record)
    return _at_end(limit, s, record) if limit.by is None else _reached(limit, s, record)


def _watched(limit: Limit, s: Series, record: Record) -> Breach | NotMeasured | None:
    start = _step(limit.start, record)
    if isinstance(start, NotMeasured):
        return start
    s = s.after(start)
    if not len(s):
        return NotMeasured(f"{limit.quantity} has no reading from step {start:,} on")
    firsts, fired, lasts = _spells(_beyond(limit, s.values), s.steps, limit)
    if not len(fired):
        return _too_few(limit, s)
    first, last = int(firsts[-1]), int(lasts[-1])
    spell = s.values[first : last + 1]
    finite = spell[np.isfinite(spell)]
    worst = float(finite.min() if limit.side == "below" else finite.max()) if len(finite) else float("nan")
    said = f"{limit.quantity} was {_what(limit, spell)}"
    if last > first:
        extreme = "lowest" if limit.side == "below" else "highest"
        said += f" for {len(spell)} readings in a row, steps {s.steps[first]:,} to {s.steps[last]:,}"
        said += f" ({extreme} {worst:.4g})" if len(finite) else ""
    else:
        said += f" at step {s.steps[last]:,} ({spell[0]:.4g})"
    if len(fired) > 1:
        said += f", the last of {len(fired)} times since step {s.steps[fired[0]]:,}"
    if last < len(s) - 1:
        said += f"; at step {s.steps[-1]:,} it is {s.value:.4g}"
    evidence = {"limit": limit.value, "worst": worst, "readings": float(len(spell)), "last": s.value}
    began = int(s.steps[fired[-1]])
    return _breach(limit, said, evidence, s, first=int(s.steps[fired[0]]), began=began, last=int(s.steps[last]))


def _reached(limit: Limit, s: Series, record: Record) -> Breach | NotMeasured | None:
    assert limit.by is not None
    by = _step(limit.by, record)
    if isinstance(by, NotMeasured):
        return by
    within = np.flatnonzero(~_beyond(limit, s.values))
    first = int(s.steps[within[0]]) if len(within) else None
    if first is not None and first <= by:
        return None
    if record.last_step < by:
        ended = f"the run ended at step {record.last_step:,}" if _over(record) else "the run goes on"
        return NotMeasured(f"{limit.quantity} is due by step {by:,}; {ended}")
    early = s.at(s.steps <= by)
    if not len(early):
        return NotMeasured(f"{limit.quantity} was not read up to step {by:,}; its first reading is of {s.steps[0]:,}")
    finite = early.values[np.isfinite(early.values)]
    best = float(finite.max() if limit.side == "above" else finite.min()) if len(finite) else float("nan")
    said = f"{limit.quantity} was not {limit.bound} by step {by:,}: the best of {len(early)} readings is "
    said += f"{best:.4g}" + (f"; it got there at step {first:,}" if first is not None else "")
    broken = s.steps if first is None else s.steps[s.steps < first]
    return _breach(limit, said, {"limit": limit.value, "best": best}, s, by, by, max(by, int(broken[-1])))


def _at_end(limit: Limit, s: Series, record: Record) -> Breach | NotMeasured | None:
    if not _over(record):
        return NotMeasured(f"{limit.quantity} is judged when the run ends")
    end, step = record.last_step, int(s.steps[-1])
    if len(s) > 1 and end - step > GAP * np.diff(s.steps).max():
        return NotMeasured(f"{limit.quantity} was read at step {step:,} for the last time, the run ended at {end:,}")
    if not _beyond(limit, s.values[-1:])[0]:
        return None
    said = f"{limit.quantity} is not {limit.bound} at the end: {s.value:.4g} at step {step:,}"
    return _breach(limit, said, {"limit": limit.value, "last": s.value}, s, step, step, step)


def _finished(limit: Limit, record: Record) -> Breach | NotMeasured | None:
    if record.steps is None:
        return NotMeasured("how long the run was meant to be is not known")
    end = record.last_step
    if end >= record.steps:
        return None
    if record.running:
        return NotMeasured("the run goes on")
    said = f"The run ended at step {end:,} of {record.steps:,}"
    finding = Finding(limit.id, limit.severity, _sentence(limit, said), {"steps": float(record.steps)}, step=end)
    return Breach(limit, finding, end, end)


def _breach(
    limit: Limit, said: str, evidence: dict[str, float], s: Series, first: int, began: int, last: int
) -> Breach:
    if s.null is not None:
        said += f". Where nothing is learnt it is {s.null:.4g}"
        evidence = {**evidence, "null": s.null}
    return Breach(limit, Finding(limit.id, limit.severity, _sentence(limit, said), evidence, step=first), began, last)


def _sentence(limit: Limit, said: str) -> str:
    return f"{said}. {limit.why}".rstrip() if limit.why else f"{said}."


def _beyond(limit: Limit, values: np.ndarray) -> np.ndarray:
    """Which values (n,) are where the limit does not want them; NaN and infinity always are."""
    there = values < limit.value if limit.side == "below" else values > limit.value
    return (there != limit.expected) | ~np.isfinite(values)


def _what(limit: Limit, values: np.ndarray) -> str:
    """``below 0.08``, or what else is wrong with the values."""
    finite = int(np.isfinite(values).sum())
    words = [limit.bound] * bool(finite) + ["NaN or infinite"] * (finite < len(values))
    return " or ".join(words)


def _spells(beyond: np.ndarray, steps: np.ndarray, limit: Limit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each spell beyond the limit that is long enough, rows: its first, the one that made it so, and its last."""
    edges = np.diff(np.concatenate([[0], beyond.astype(np.int8), [0]]))
    firsts, lasts = np.flatnonzero(edges > 0), np.flatnonzero(edges < 0) - 1
    if limit.unit == "readings":
        fired = firsts + limit.length - 1
    else:
        fired = np.searchsorted(steps, steps[firsts] + limit.length)
    long = fired <= lasts
    return firsts[long], fired[long], lasts[long]


def _too_few(limit: Limit, s: Series) -> NotMeasured | None:
    """A spell that cannot have been, since there is not so much to look at."""
    have = len(s) if limit.unit == "readings" else int(s.steps[-1] - s.steps[0])
    if have >= limit.length:
        return None
    since = f" from {moment(limit.start)} on" if limit.start else ""
    return NotMeasured(f"{limit.quantity} has {have:,} {limit.unit}{since}, and {limit.length:,} are needed")


def _step(when: Moment, record: Record) -> int | NotMeasured:
    """The step of a share of the run; a run that is over and was never said to be longer was as long as it is."""
    if isinstance(when, int):
        return when
    steps = record.steps if record.steps is not None or record.running else record.last_step
    if steps is None:
        return NotMeasured(f"when {moment(when)} is over is not known: write a step instead")
    return int(np.ceil(when * steps))


def _over(record: Record) -> bool:
    return not record.running or (record.steps is not None and record.last_step >= record.steps)


def _series(name: str, record: Record) -> Series | None:
    """Every reading of a quantity, by our name or the history's own."""
    for known in (name, record.renamed.get(name, "")):
        for table in (record.logged, record.series):
            if known in table and len(table[known]):
                return table[known]
    return None


def _absent(name: str, record: Record) -> str:
    near = difflib.get_close_matches(name, {**record.series, **record.renamed}, 3, 0.5)
    hint = f"nearest: {', '.join(near)}" if near else f"measured are {', '.join(sorted(record.series)[:8])}"
    return f"{name} has not been read; {hint}. Correct the plan, or log it"
