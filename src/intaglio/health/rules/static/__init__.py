"""What is wrong before a step is spent: faults that the configuration, the network's structure and the data show."""

from collections.abc import Callable, Mapping
from typing import Any

from intaglio.config import Config
from intaglio.health.finding import SEVERITIES, Finding
from intaglio.health.rules.static import diffusion, jepa, multimodal, training, vqa
from intaglio.health.rules.static.facts import ATTENTION, CaptionFacts, DataFacts, Facts, GridFacts, QuestionFacts

__all__ = ["ATTENTION", "RULES", "CaptionFacts", "DataFacts", "Facts", "GridFacts", "QuestionFacts", "judge"]

StaticRule = Callable[[Facts[Any]], list[Finding]]

RULES_OF: Mapping[str, tuple[StaticRule, ...]] = {
    "multimodal": (*multimodal.RULES, *training.RULES),
    "autoencoder": training.RULES,
    "diffusion": (*diffusion.RULES, *training.RULES),
    "jepa": (*jepa.RULES, *training.RULES),
    "vqa": (*vqa.RULES, *training.RULES),
}

RULES = tuple(dict.fromkeys(rule for rules in RULES_OF.values() for rule in rules))
"""Every one, of all systems."""


def judge(facts: Facts[Config]) -> list[Finding]:
    """All findings of what can be wrong with the system, the gravest first."""
    found = [finding for rule in RULES_OF[facts.config.system] for finding in rule(facts)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
