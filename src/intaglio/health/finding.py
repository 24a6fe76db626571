"""What a rule says of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["note", "warning", "fail"]
SEVERITIES: tuple[Severity, ...] = ("fail", "warning", "note")
"""The gravest first."""


@dataclass(frozen=True)
class Remedy:
    """One thing to change: a sentence, or options of the command line, from the first ``--`` on.

    ``wait`` is how many optimizer steps to give it before the next remedy is tried, ``command`` what to type, where the
    run is known that it is for.
    """

    do: str
    wait: int = 0
    command: str = ""

    @property
    def options(self) -> str:
        """The options in it, as a command line takes them; empty where there are none."""
        return self.do[self.do.index("--") :] if "--" in self.do else ""

    def __str__(self) -> str:
        return self.do


def remedies(*things: str, wait: int = 0) -> tuple["Remedy", ...]:
    """Each thing to do as a remedy with the same time to wait."""
    return tuple(Remedy(do, wait) for do in things)


@dataclass(frozen=True)
class Finding:
    """One rule's statement: what was seen, the numbers that show it, and what to change, in order.

    ``fail`` stops belief in the run. ``message`` names only a cause that the evidence shows; where several would look
    alike, ``candidates`` names them, each with the trial that would tell it apart. ``step`` is when it was first seen.
    """

    rule: str
    severity: Severity
    message: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    remedies: tuple[Remedy, ...] = ()
    candidates: tuple[str, ...] = ()
    step: int | None = None
