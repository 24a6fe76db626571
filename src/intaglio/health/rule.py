"""What a rule is, and how all of them are applied. No torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from intaglio.health.finding import SEVERITIES, Finding
from intaglio.health.record import Record
from intaglio.history import NotMeasured

Limits = Mapping[str, float]
Judge = Callable[[Record, Limits], Iterable[Finding | NotMeasured]]


@dataclass(frozen=True)
class Rule:
    """One fault and how it is seen.

    Args:
        id: its name, as ``near-chance``.
        wrong: what is wrong, a sentence.
        seen: by which quantities and against which null, a sentence.
        source: paper, equation, or the case that taught it.
        case: the real defect that it must catch.
        needs: patterns of names, one of which must be in the record.
        facts: keys of the record's facts, one of which does as well.
        log: what to log where they are missing.
        concerns: systems that can have this fault; all where none is named.
        limits: its thresholds by name; a profile may set others.
        symptom: many faults look like that, so that what names a cause is told before it.
        follows: rules whose fault brings this one about: where both are found they are told before it, and, if they are
            no symptoms themselves, as grave.
        judge: from a record and limits to findings, or why it cannot tell; None where it is seen before training.
    """

    id: str
    wrong: str
    seen: str
    source: str
    case: str = ""
    needs: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    log: str = ""
    concerns: tuple[str, ...] = ()
    limits: Limits = field(default_factory=dict)
    symptom: bool = False
    follows: tuple[str, ...] = ()
    judge: Judge | None = None

    @property
    def family(self) -> str:
        """What it belongs to: ``training``, ``generalisation``, ``audits``, ``latent``, ``bottleneck``, …"""
        return self.judge.__module__.rpartition(".")[2] if self.judge else "static"


@dataclass(frozen=True)
class Judged:
    """Findings, the gravest first and symptoms after causes; ids of the rules that found nothing; ids of those that
    could not look, and why.

    ``unread`` are those of the latter that had nothing to read at all.
    """

    findings: tuple[Finding, ...]
    passed: tuple[str, ...]
    not_measured: Mapping[str, str]
    unread: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``failing``, ``warnings``, ``healthy``, or ``cannot tell`` where no rule could look."""
        severities = {f.severity for f in self.findings}
        if "fail" in severities:
            return "failing"
        if "warning" in severities:
            return "warnings"
        return "healthy" if self.passed else "cannot tell"


def rule(**parts: Any) -> Callable[[Judge], Rule]:
    """Makes a rule of the function that judges it; ``parts`` are those of ``Rule``.

    The first paragraph of the function's docstring says what is wrong, the second by what it is seen.
    """

    def made(judge: Judge) -> Rule:
        wrong, seen, *_ = [" ".join(part.split()) for part in (judge.__doc__ or "").split("\n\n")]
        return Rule(wrong=wrong, seen=seen, judge=judge, **parts)

    return made


def apply(
    rules: Iterable[Rule],
    record: Record,
    profile: Mapping[str, Limits] | None = None,
    gaps: Mapping[str, str] | None = None,
) -> Judged:
    """Every rule over a record, with the limits that ``profile`` sets by rule id and limit name.

    ``gaps`` are quantities that an instrument could not give, with its reason.
    """
    findings: list[Finding] = []
    passed, unread, missing = [], [], {}
    rules = list(rules)
    for r in rules:
        if r.judge is None or (r.concerns and record.config.get("system", r.concerns[0]) not in r.concerns):
            continue
        if not record.matching(*r.needs) and not any(key in record.facts for key in r.facts):
            if record.foreign and r.concerns:
                continue  # of a kind of model that nothing in this history tells of
            known = [why for name, why in (gaps or {}).items() if any(fnmatchcase(name, p) for p in r.needs)]
            missing[r.id] = known[0] if known else f"needs {' or '.join((*r.needs, *r.facts))}"
            unread += [] if known else [r.id]
            continue
        said = list(r.judge(record, {**r.limits, **(profile or {}).get(r.id, {})}))
        found = [x for x in said if isinstance(x, Finding)]
        findings += found
        reasons = [x.reason for x in said if isinstance(x, NotMeasured)]
        if reasons and not found:
            missing[r.id] = "; ".join(dict.fromkeys(reasons))
        elif not found:
            passed.append(r.id)
    return Judged(_causes_first(findings, rules), tuple(passed), missing, tuple(unread))


def _causes_first(findings: Iterable[Finding], rules: Iterable[Rule]) -> tuple[Finding, ...]:
    """The gravest first; of equal ones symptoms after causes; a warned cause as grave as what follows from it."""
    known = {r.id: r for r in rules}

    def loud(f: Finding) -> int:
        return SEVERITIES.index(f.severity)

    def as_grave(f: Finding, brought: Finding) -> Finding:
        if f.severity != "warning" or loud(brought) >= loud(f):
            return f
        return replace(f, severity=brought.severity, message=f"{f.message} It is known to bring about {brought.rule}.")

    raised, before = list(findings), None
    while raised != before:  # the cause of a cause is as grave, too
        before = raised
        grave: dict[str, Finding] = {}
        for f in sorted(raised, key=loud):
            for cause in known[f.rule].follows:
                grave.setdefault(cause, f)
        raised = [as_grave(f, grave[f.rule]) if f.rule in grave and not known[f.rule].symptom else f for f in raised]
    raised.sort(key=lambda f: (loud(f), known[f.rule].symptom))
    told: list[Finding] = []

    def tell(f: Finding) -> None:
        if f in told or f in waiting:
            return
        waiting.append(f)
        for cause in raised:
            if cause.rule in known[f.rule].follows and loud(cause) <= loud(f):
                tell(cause)
        told.append(f)

    waiting: list[Finding] = []
    for f in raised:
        tell(f)
    return tuple(told)
