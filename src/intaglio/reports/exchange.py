"""A diagnosis for other programs: SARIF 2.1.0 for code scanning, JUnit XML for continuous integration.

Sources: OASIS SARIF 2.1.0 (2020); the JUnit schema that Jenkins and GitLab read.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from intaglio.health.diagnosis import Diagnosis
from intaglio.health.finding import Finding
from intaglio.health.rules import all_rules
from intaglio.history.table import portable
from intaglio.reports.safe import plain

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = {"fail": "error", "warning": "warning", "note": "note"}


def sarif(diagnosis: Diagnosis, source: str, run: str) -> str:
    """Findings as results at ``source``; what could not be looked at as notifications of the tool."""
    known = {r.id: r for r in all_rules()}
    used = list(dict.fromkeys([*known, *(f.rule for f in diagnosis.findings)]))
    rules = [
        {
            "id": name,
            "shortDescription": {"text": plain(known[name].wrong if name in known else name)},
            "fullDescription": {"text": plain(known[name].seen if name in known else name)},
            "help": {"text": f"intaglio diagnose --explain {name}"},
            "properties": {"family": known[name].family if name in known else "other"},
        }
        for name in used
    ]
    location = {"physicalLocation": {"artifactLocation": {"uri": quote(plain(source), safe="/._-~")}}}
    notes = [
        {
            "level": "note",
            "message": {"text": plain(f"Not measured: {gap.get('rule') or gap.get('quantity')}: {gap['reason']}")},
            **({"associatedRule": {"id": gap["rule"]}} if "rule" in gap else {}),
        }
        for gap in diagnosis.not_measured
    ]
    result = {
        "tool": {
            "driver": {
                "name": "intaglio",
                "version": _version(),
                "rules": rules,
            }
        },
        "automationDetails": {"id": f"intaglio/{plain(run)}"},
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}],
        "properties": {"verdict": diagnosis.verdict, "passed": list(diagnosis.passed)},
        "results": [_result(f, used.index(f.rule), location, run) for f in diagnosis.findings],
    }
    content = {"$schema": SCHEMA, "version": "2.1.0", "runs": [result]}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _result(finding: Finding, index: int, location: dict[str, Any], run: str) -> dict[str, Any]:
    numberless = re.sub(r"[-−+\d.,e]+", "#", finding.message)
    same = hashlib.sha256(f"{run}\0{finding.rule}\0{numberless}".encode("utf-8", "replace"))
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": LEVELS[finding.severity],
        "message": {"text": plain(_told(finding))},
        "locations": [location],
        "partialFingerprints": {"finding/v1": same.hexdigest()[:32]},
        "properties": {
            "step": finding.step,
            "evidence": {plain(k): portable(v) for k, v in finding.evidence.items()},
            "remedies": [plain(r.command or r.do) for r in finding.remedies],
        },
    }


def _told(finding: Finding) -> str:
    return " ".join([finding.message, *(f"Try: {remedy.command or remedy.do}." for remedy in finding.remedies[:1])])


def _version() -> str:
    try:
        return version("intaglio")
    except PackageNotFoundError:  # run from a checkout
        return "0"


def junit(diagnosis: Diagnosis, run: str) -> str:
    """A suite for each family of rules: a failing finding fails its rule, what could not be looked at is skipped.

    Warnings and notes pass, with their words in ``system-out``. The suite ``verdict`` fails where the run does, and
    has an error where one cannot tell.
    """
    family = {r.id: r.family for r in all_rules()}
    cases: dict[str, list[ElementTree.Element]] = defaultdict(list)
    cases["verdict"].append(_verdict_case(diagnosis))
    for rule, findings in _by_rule(diagnosis.findings).items():
        case = _case(rule, family.get(rule, "other"))
        for finding in findings:
            if finding.severity == "fail":
                ElementTree.SubElement(case, "failure", message=plain(finding.message), type=plain(rule)).text = plain(
                    _told(finding)
                )
        said = [f"{f.severity}: {plain(f.message)}" for f in findings if f.severity != "fail"]
        if said:
            ElementTree.SubElement(case, "system-out").text = "\n".join(said)
        cases[family.get(rule, "other")].append(case)
    for rule in diagnosis.passed:
        cases[family.get(rule, "other")].append(_case(rule, family.get(rule, "other")))
    for gap in diagnosis.not_measured:
        name = gap.get("rule") or gap.get("quantity") or "unnamed"
        where = gap.get("family", "quantities")
        case = _case(name, where)
        ElementTree.SubElement(case, "skipped", message=plain(f"not measured: {gap['reason']}"))
        cases[where].append(case)
    root = ElementTree.Element("testsuites", {"name": plain(f"intaglio {run}"), **_counts(chain(*cases.values()))})
    for title, members in cases.items():
        about = {"name": f"intaglio.{plain(title)}", **_counts(members)}
        ElementTree.SubElement(root, "testsuite", about).extend(members)
    ElementTree.indent(root)
    xml = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}\n'


def _by_rule(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.rule, []).append(finding)
    return found


def _case(name: str, family: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=f"intaglio.{plain(family)}", name=plain(name), time="0")


def _verdict_case(diagnosis: Diagnosis) -> ElementTree.Element:
    case = _case("verdict", "verdict")
    if diagnosis.verdict == "failing":
        ElementTree.SubElement(case, "failure", message="the run is failing", type="failing")
    elif diagnosis.verdict == "cannot tell":
        ElementTree.SubElement(case, "error", message="too little was measured to tell", type="cannot tell")
    else:
        ElementTree.SubElement(case, "system-out").text = diagnosis.verdict
    return case


def _counts(cases: Iterable[ElementTree.Element]) -> dict[str, str]:
    kept = list(cases)
    kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    counts = {name: sum(case.find(tag) is not None for case in kept) for name, tag in kinds.items()}
    return {"tests": str(len(kept)), **{name: str(n) for name, n in counts.items()}, "time": "0"}
