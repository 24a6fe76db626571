"""What a rule says of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["note", "warning", "fail"]


@dataclass(frozen=True)
class Finding:
    """One rule's statement: what was seen, the numbers that show it, and what to change, in order.

    ``fail`` stops belief in the run. ``remedies`` are options of the command line.
    """

    rule: str
    severity: Severity
    message: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    remedies: tuple[str, ...] = ()
