"""What follows from an analysis: what to keep, what to change, what next at which cost, what to check first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.health.diagnosis import ESSENTIAL
from intaglio.health.rules import all_rules
from intaglio.reports.analysis import Analysis
from intaglio.reports.words import duration, short, unit


@dataclass(frozen=True)
class Option:
    """One thing that could be done next, why, and what it costs."""

    what: str
    why: str
    cost: str
    command: str = ""


def verdict_sentence(a: Analysis) -> str:
    """The verdict in one sentence that holds what it rests on."""
    d = a.diagnosis
    looked = len(d.passed) + len({f.rule for f in d.findings})
    blind = sum("rule" in gap for gap in d.not_measured)
    rests = f"{looked} {'rule' if looked == 1 else 'rules'} looked, {blind} could not."
    worst = d.findings[0].message if d.findings else ""
    if d.verdict == "failing":
        return f"This run should not be relied on as it is. {worst} {rests}"
    if d.verdict == "warnings":
        return f"No failing finding, but look at the warnings before you rely on it. {worst} {rests}"
    if d.verdict == "healthy":
        return f"No rule found a fault in what was measured. {rests}"
    why = next((f"{g['rule']}: {g['reason']}" for g in d.not_measured if g.get("rule") in ESSENTIAL), "")
    return f"Too little was measured to call this run healthy or failing{f' ({why})' if why else ''}. {rests}"


SETTINGS = {
    "the learning rate": ("learning-rate-off", "diverged", "spike", "non-finite"),
    "the loss and its weights": ("term-inert", "term-dominates", "weight-not-applied", "stopped-in-ramp"),
    "what generalises": ("overfitting", "no-learning", "plateau", "validation-missing"),
    "data and splits": ("split-leak", "trained-on-test", "data-replaced", "augmentation-inert", "range-mismatch"),
    "the wiring of the model": ("dead-parameters", "not-in-optimizer", "tied-and-frozen", "conditioned-too-late"),
    "the latent space": "latent",
    "the bottleneck": "bottleneck",
    "the codebook": "codebook",
    "the contrastive pair": "contrastive",
    "the text decoder": "text",
}
"""What may be kept or changed, and the rules, or the family of rules, that speak of it."""


def keep(a: Analysis) -> list[str]:
    """What no rule accuses, of those whose first rule, or half of whose family, could look."""
    accused = {f.rule for f in a.diagnosis.findings if f.severity != "note"}
    passed = set(a.diagnosis.passed) | {f.rule for f in a.diagnosis.findings if f.severity == "note"}
    told = []
    for setting, named in SETTINGS.items():
        rules = [r.id for r in all_rules() if r.family == named] if isinstance(named, str) else list(named)
        looked = [rule for rule in rules if rule in passed]
        enough = rules[0] in looked if isinstance(named, tuple) else 2 * len(looked) >= len(rules)
        if enough and not accused.intersection(rules):
            blind = f"; {_rules(len(rules) - len(looked))} could not look" if len(looked) < len(rules) else ""
            told.append(f"{setting}: {', '.join(looked)} found nothing{blind}")
    return told


def passed_by_family(a: Analysis) -> dict[str, list[str]]:
    """Rules that found nothing, by family."""
    found: dict[str, list[str]] = {}
    for r in all_rules():
        if r.id in a.diagnosis.passed:
            found.setdefault(r.family, []).append(r.id)
    return found


def options(a: Analysis) -> list[Option]:
    """What could be done next, the cheapest knowledge first."""
    d, found = a.diagnosis, list[Option]()
    wanted = logs(a)
    if wanted:
        command = f"intaglio diagnose {a.source} --trials" if a.folder else ""
        cost = (
            "a look at the finished model, no training"
            if a.folder
            else f"an evaluation of the kept weights, no training; where none were kept, this run again ({_whole(a)})"
        )
        names = "; ".join(wanted[:2]) + (f"; and what {_rules(len(wanted) - 2)} more need" if len(wanted) > 2 else "")
        found.append(Option("Measure what was not measured", f"missing: {names}", cost, command))
    for finding in [f for f in d.findings if f.remedies][:2]:
        remedy = finding.remedies[0]
        cost = f"{remedy.wait:,} steps before the next remedy{_share(a, remedy.wait)}" if remedy.wait else _whole(a)
        found.append(Option(f"Try: {remedy.do.split(': --')[0]}", f"against {finding.rule}", cost, remedy.command))
    falling = _still_falling(a)
    if falling and d.verdict != "failing":
        found.append(Option("Train on", falling, f"half as many steps again ({_whole(a, 0.5)})"))
    found.append(Option("Repeat it with two other seeds", "one run is an anecdote", f"twice this run ({_whole(a, 2)})"))
    return found


def logs(a: Analysis) -> list[str]:
    """What to log to have more measured, what a verdict of health needs first."""
    gaps = sorted((g for g in a.diagnosis.not_measured if g.get("log")), key=lambda g: g.get("rule") not in ESSENTIAL)
    return list(dict.fromkeys(g["log"] for g in gaps))


def checks(a: Analysis) -> list[str]:
    """What to do before this run is relied on: what was not measured first, then what no history can show."""
    first = [g for g in a.diagnosis.not_measured if g.get("rule") in ESSENTIAL or "rule" not in g]
    told = [
        f"{g.get('rule') or g.get('quantity')}: {g['reason']}" + (f"; to have it: {g['log']}" if g.get("log") else "")
        for g in first
    ]
    families: dict[str, list[Mapping[str, str]]] = {}
    for gap in a.diagnosis.not_measured:
        if gap not in first:
            families.setdefault(gap.get("family", "other"), []).append(gap)
    for family, gaps in families.items():
        wanted = next((f"; to have it: {g['log']}" for g in gaps if g.get("log")), "")
        which = gaps[0].get("rule") if len(gaps) == 1 else f"{_rules(len(gaps))}, {gaps[0].get('rule')} among them,"
        told.append(f"{family}: {which} could not look{wanted}")
    mend = [f"mend what fails: {f.rule}" for f in a.diagnosis.findings if f.severity == "fail"]
    always = ["look at outputs for items that were not trained on", "repeat with other seeds: one run is an anecdote"]
    return [*told, *dict.fromkeys(mend), *always]


def _rules(count: int) -> str:
    return "1 rule" if count == 1 else f"{count} rules"


def _still_falling(a: Analysis) -> str:
    for name in ("val/loss/total", "train/loss/total"):
        d = a.descriptions.get(name)
        if d is not None and d.rises == "falling" and np.isfinite(d.slope):
            per = max(1, (a.span[1] - a.span[0]) // 10)
            return f"{name} still falls when the run ends, by {short(-d.slope * per)} in {per:,} {unit(a.axis)}"
    return ""


def _whole(a: Analysis, times: float = 1) -> str:
    first, last = a.span
    length = f"{round(times * (last - first)):,} {unit(a.axis)}"
    seconds = _seconds(a)
    return f"{length}, {duration(times * seconds)}" if seconds else length


def _share(a: Analysis, steps: int) -> str:
    first, last = a.span
    if unit(a.axis) != "steps" or last <= first:
        return ""
    seconds = _seconds(a)
    took = f", {duration(seconds * steps / (last - first))}" if seconds else ""
    return f" ({100 * steps / (last - first):.0f} % of this run{took})"


def _seconds(a: Analysis) -> float | None:
    record: Mapping[str, Any] = a.folder.record if a.folder else {}
    seconds = record.get("train_seconds")
    return float(seconds) if isinstance(seconds, int | float) else None
