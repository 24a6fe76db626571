"""The verdict on a run from what its folder holds. No torch."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from intaglio.config import to_dict
from intaglio.health import plan as plans
from intaglio.health.finding import Finding
from intaglio.health.plan import Limit
from intaglio.health.record import Record, of_readings, of_table
from intaglio.health.remedies import commanded, in_words
from intaglio.health.rule import Limits, Rule, apply
from intaglio.health.rules import all_rules
from intaglio.history import Reading, read_history
from intaglio.history.run_folder import RunFolder, find, write_atomically
from intaglio.history.table import portable

ESSENTIAL = ("non-finite", "no-learning", "overfitting", "validation-missing")
"""Rules that must have looked before a run is called healthy."""

ESSENTIAL_IF_LOGGED = ("posterior-collapse", "codebook-collapse", "adversary-won")
"""Rules that must have judged what they read of a foreign history before it is called healthy: losses don't show it."""

LOST = (
    "unreadable",
    "no caption",
    "row without question",
    "row without answer",
    "row without image",
    "image not found",
    "several images of one name",
)
"""Reasons of the intake that mean that an item is not learnt from."""


@dataclass(frozen=True)
class Diagnosis:
    """A verdict with its reasons: findings, the gravest first; rules that passed; rules that could not look and why."""

    verdict: str
    findings: tuple[Finding, ...]
    passed: tuple[str, ...]
    not_measured: tuple[Mapping[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists: ``verdict``, ``findings[]``, ``passed[]``, ``not_measured[]``.

        A gap has ``rule``, ``family``, ``reason``, and ``log`` where it had nothing to read; or ``quantity``,
        ``reason``.
        """
        plain = asdict(self)
        for finding in plain["findings"]:
            finding["evidence"] = {name: portable(value) for name, value in finding["evidence"].items()}
        return plain


def diagnose(
    record: Record,
    profile: Mapping[str, Limits] | None = None,
    rules: Sequence[Rule] | None = None,
    not_measured: Mapping[str, str] | None = None,
    plan: Sequence[Limit] | None = None,
) -> Diagnosis:
    """Judges a record by all rules, or those given, and by a plan; by its own plan too where it is judged by all.

    ``not_measured`` are quantities that are known to be missing.
    """
    if plan is None:
        plan = plans.load_plan(record.config) if rules is None and not record.foreign else ()
    rules = [*(all_rules() if rules is None else rules), *plans.rules_of(plan, not_measured)]
    judged = apply(rules, record, profile, not_measured)
    severities = {f.severity for f in judged.findings}
    essential = {r.id for r in rules if r.id in ESSENTIAL} | plans.must_haves(plan, record)
    if record.foreign:
        essential |= (set(ESSENTIAL_IF_LOGGED) & set(judged.not_measured)) - set(judged.unread)
    blind = essential - set(judged.passed)
    if "fail" in severities:
        verdict = "failing"
    elif blind or not judged.passed:
        verdict = "cannot tell"
    else:
        verdict = "warnings" if "warning" in severities else "healthy"
    logs = {r.id: (r.family, r.log) for r in rules}
    reasons: list[Mapping[str, str]] = []
    for name, why in judged.not_measured.items():
        family, log = logs[name]
        reasons.append(
            {"rule": name, "family": family, "reason": why} | ({"log": log} if name in judged.unread else {})
        )
    reasons += [{"quantity": name, "reason": why} for name, why in (not_measured or {}).items()]
    findings = judged.findings
    if record.foreign:
        findings = tuple(map(in_words, findings))
    elif record.run and record.config:
        findings = tuple(commanded(finding, record.run, record.config) for finding in findings)
    return Diagnosis(verdict, findings, judged.passed, tuple(reasons))


def record_of(folder: RunFolder, readings: Mapping[str, Reading] | None = None, step: int = 0) -> Record:
    """What a run folder knows: its history, its configuration, and the facts that audits left.

    ``readings`` taken at ``step`` stand in for series of the same name.

    Raises:
        ValueError: the folder has no history yet.
    """
    history = folder.metrics if folder.metrics.is_file() else folder.metrics.with_suffix(".parquet")
    if not history.is_file():
        raise ValueError(f"{folder.path} has no metrics yet, so there is nothing to judge: train first.")
    config = to_dict(folder.config()) if (folder.path / "config.yaml").is_file() else {}
    steps = config["train"]["steps"] if config else folder.record.get("steps")
    logged = of_table(read_history(history)).series
    series = {**logged, **of_readings(readings or {}, step).series}
    running = folder.record["status"] == "running"
    return Record(series, facts_of(folder), config, steps, running, str(folder.path), logged=logged)


def diagnose_run(
    run: str | Path,
    profile: str | Path = "default",
    rules: Iterable[str] = (),
    plan: Sequence[Limit] | None = None,
) -> Diagnosis:
    """The verdict on a run folder, live or finished, by all rules or those named, and by its own plan or another.

    Writes ``findings.json`` if it is by all rules and its own plan.

    Raises:
        ValueError: no run folder, no metrics in it yet, an unknown profile or rule.
    """
    folder, named = find(run), list(rules)
    limits = load_profile(profile)
    record, missing = all_of(folder)
    diagnosis = diagnose(record, limits, chosen(named) if named else None, missing, plan)
    if not named and plan is None and str(profile) == "default":
        write_findings(folder, diagnosis)
    return diagnosis


def all_of(folder: RunFolder) -> tuple[Record, dict[str, str]]:
    """What a run folder knows, its last evaluation included, and what that could not measure.

    Raises:
        ValueError: the folder has no history yet.
    """
    readings, missing, step = _evaluation(folder)
    return record_of(folder, readings, step), missing


def _evaluation(folder: RunFolder) -> tuple[dict[str, Reading], dict[str, str], int]:
    """Readings of ``evaluation.json``, what it could not measure, and its step; empty where there is none."""
    file = folder.path / "evaluation.json"
    if not file.is_file():
        return {}, {}, 0
    content = json.loads(file.read_text(encoding="utf-8"))
    readings = {name: Reading(**r) for name, r in content["readings"].items()}
    return readings, content.get("not_measured", {}), content["step"]


def explain(rule: Rule) -> str:
    """What a rule measures, against which null, from which source, by which limits, and the case that taught it."""
    limits = ", ".join(f"{name} {value:g}" for name, value in rule.limits.items()) or "none"
    reads = ", ".join((*rule.needs, *rule.facts))
    lines = [
        rule.id,
        "",
        rule.wrong,
        rule.seen,
        "",
        f"reads     {reads}",
        f"to log    {rule.log}",
        f"limits    {limits}",
    ]
    lines.append(f"source    {rule.source}")
    if rule.case:
        lines.append(f"seen in   {rule.case}")
    if rule.concerns:
        lines.append(f"concerns  {', '.join(rule.concerns)}")
    return "\n".join(lines)


def facts_of(folder: RunFolder) -> dict[str, Any]:
    """The facts in ``audits.json``, and what ``run.json`` says of the data."""
    file = folder.path / "audits.json"
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "seed" in folder.record:
        changed = folder.record.get("changed_from_parent", [])
        facts["provenance"] = {"seed": folder.record["seed"], "changed": changed}
    if "loaded" in folder.record:
        facts["loaded"] = folder.record["loaded"]
    data = folder.record.get("data")
    if data:
        lost = {k: n for k, n in data["intake"]["counts"].items() if k in LOST}
        facts["intake"] = {"items": sum(data["items"].values()), "lost": lost}
        if "training items declared as test" in data:
            facts["trained_on_test"] = data["training items declared as test"]
        if "held-out images seen in training" in data:
            facts["leaks"] = {"the very same image": data["held-out images seen in training"]}
        if "held-out tasks seen in training" in data:
            facts["leaks"] = {"the very same task": data["held-out tasks seen in training"]}
        if "augmentations" in data:
            facts["augmentations"] = data["augmentations"]
        if data.get("tokens known from held-out captions alone"):
            what = "the vocabulary was built on their captions; that many of its tokens occur nowhere else"
            facts["leaks"] = facts.get("leaks", {}) | {what: data["tokens known from held-out captions alone"]}
    return facts


def write_findings(folder: RunFolder, diagnosis: Diagnosis) -> None:
    """``findings.json``, atomically, where it is not what it was."""
    content = json.dumps(diagnosis.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    file = folder.path / "findings.json"
    if not file.is_file() or file.read_text(encoding="utf-8") != content:
        write_atomically(file, content)


def chosen(ids: Iterable[str]) -> list[Rule]:
    """The rules of those ids.

    Raises:
        ValueError: an id that no rule has, with the nearest.
    """
    known = {r.id: r for r in all_rules()}
    for name in ids:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"There is no rule {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
                + f" Rules: {', '.join(sorted(known))}."
            )
    return [known[name] for name in ids]


def load_profile(name: str | Path) -> dict[str, Limits]:
    """Limits by rule and name: ``default`` has the rules' own, ``documents`` those of the original documents, or a
    YAML file of your own.

    Raises:
        ValueError: an unknown profile, rule or limit, with the nearest right one.
    """
    return {rule: {limit: mark["value"] for limit, mark in limits.items()} for rule, limits in _profile(name).items()}


def marks(name: str | Path) -> list[str]:
    """What a profile says of its limits: where each comes from, and why it is wrong, a line for each."""
    return [
        f"{rule}: {limit} {mark['value']:g}"
        + (f", from “{mark['document']}”" if "document" in mark else "")
        + (f", is wrong: {mark['wrong']}" if "wrong" in mark else "")
        for rule, limits in _profile(name).items()
        for limit, mark in limits.items()
    ]


def _profile(name: str | Path) -> dict[str, dict[str, dict[str, Any]]]:
    """By rule and limit: ``value``, and where given ``document`` and ``wrong``."""
    import yaml

    if str(name) == "default":
        return {}
    packaged = files("intaglio.health") / "profiles" / f"{name}.yaml"
    source = packaged if packaged.is_file() else Path(name)
    if not source.is_file():
        raise ValueError(f"There is no profile {str(name)!r}: give default, documents, or the path of a YAML file.")
    tree = yaml.safe_load(source.read_text(encoding="utf-8")) or {}
    if not isinstance(tree, dict) or not all(isinstance(v, dict) for v in tree.values()):
        raise ValueError(f"Profile {name}: write rules with their limits below them, as near-chance: {{share: 0.2}}.")
    for r in chosen(tree):
        for limit, given in tree[r.id].items():
            if limit not in r.limits:
                near = difflib.get_close_matches(str(limit), r.limits, 1) or sorted(r.limits)
                raise ValueError(f"Profile {name}: {r.id} has no limit {limit!r}; it has {', '.join(near) or 'none'}.")
            mark = given if isinstance(given, dict) else {"value": given}
            if isinstance(mark.get("value"), bool) or not isinstance(mark.get("value"), int | float):
                raise ValueError(f"Profile {name}: {r.id}.{limit} is {given!r}; it must be a number.")
            tree[r.id][limit] = mark
    return tree
