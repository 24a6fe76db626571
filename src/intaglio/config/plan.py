"""The plan of a recipe, one limit a line: what must not happen, what is expected, and what is done about it.

    plan:
      - {watch: val/vq/usage, below: 0.08, for: 3}
      - {watch: val/vq/usage, below: 0.05, do: [checkpoint, stop]}
      - {expect: val/loss/total, below: 8.4, by: 20000}
      - {expect: val/vq/usage, above: 0.08, at: end, do: fail}

What the keys mean is on the page docs/plans.md; how limits are judged is in ``intaglio.health.plan``.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

KEYS = ("watch", "expect", "below", "above", "from", "for", "by", "at", "do", "webhook", "command", "why")
SEVERITY: Mapping[str, Literal["note", "warning", "fail"]] = {"note": "note", "alert": "warning", "fail": "fail"}
ACTIONS = (*SEVERITY, "checkpoint", "stop")
FINISHED = "finished"
"""What is expected of a run, and no quantity: that it comes to its last step."""

Moment = int | float
"""A step, or as a float the share of the run that lies before it."""


@dataclass(frozen=True)
class Limit:
    """One line of a plan.

    Args:
        quantity: its name in the history, ours or its own; or ``finished``.
        expected: whether the quantity shall be ``side`` of ``value``; otherwise it must not be.
        side: where; empty for ``finished``.
        value: the limit, in the quantity's own unit.
        start: from when on it is watched.
        length: how long it must be beyond the limit, in ``unit``.
        by: until when it must have been there once; None for at the end.
        severity: of the finding.
        checkpoint: whether the weights of that step are kept.
        stop: whether training ends there, with exit code 1.
        webhook: URL that the finding is posted to as JSON, or ``$NAME`` of the variable that holds it.
        command: of the shell, which reads the same on its standard input.
        why: what a reader of the finding shall know.
    """

    quantity: str
    expected: bool = False
    side: Literal["below", "above", ""] = ""
    value: float = 0.0
    start: Moment = 0
    length: int = 1
    unit: Literal["readings", "steps"] = "readings"
    by: Moment | None = None
    severity: Literal["note", "warning", "fail"] = "warning"
    checkpoint: bool = False
    stop: bool = False
    webhook: str = ""
    command: str = ""
    why: str = ""

    @property
    def bound(self) -> str:
        """``below 0.08``."""
        return f"{self.side} {self.value:.10g}"

    @property
    def claim(self) -> str:
        """The sentence that is true of a run that keeps to it."""
        if not self.side:
            return "the run comes to its last step"
        what = f"{self.quantity} {self.bound}"
        if self.expected:
            return f"{what} at the end" if self.by is None else f"{what} by {moment(self.by)}"
        spell = f" for {self.length:,} {self.unit}" if (self.length, self.unit) != (1, "readings") else ""
        return f"never {what}{spell}" + (f" from {moment(self.start)} on" if self.start else "")

    @property
    def id(self) -> str:
        """What a finding has as its rule."""
        return f"plan: {self.claim}"


def moment(when: Moment) -> str:
    """``step 20,000``, or ``50 % of the run``."""
    return f"{100 * when:.6g} % of the run" if isinstance(when, float) else f"step {when:,}"


def parse(plan: Any) -> tuple[Limit, ...]:
    """The limits of a plan as YAML gives it: a list of mappings.

    Raises:
        ValueError: an unknown key or action, with the nearest; a value that makes no sense; a limit that stands twice.
    """
    if not isinstance(plan, list | tuple):
        raise ValueError(f"plan is {plan!r}; write a list, a limit a line: - {{watch: val/loss/total, above: 9}}.")
    limits: dict[str, Limit] = {}
    for number, line in enumerate(plan, 1):
        try:
            limit = _limit(line)
        except ValueError as error:
            raise ValueError(f"plan, limit {number}: {error}") from None
        if limit.id in limits:
            raise ValueError(f"plan, limit {number}: “{limit.claim}” stands twice; put its actions into one do: [].")
        limits[limit.id] = limit
    return tuple(limits.values())


def read(path: str | Path) -> list[Any]:
    """The lines of a plan in a YAML file, or of a recipe's name: a list by itself, or under the key ``plan``.

    Raises:
        ValueError: no such file, not YAML, or no plan in it.
    """
    packaged = files("intaglio") / "recipes" / f"{path}.yaml"
    try:
        source = packaged if packaged.is_file() and not Path(path).is_file() else Path(path)
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The plan {path} cannot be read ({error}); give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"The plan {path} is not valid YAML: {error}") from None
    lines = tree.get("plan") if isinstance(tree, dict) else tree
    if not isinstance(lines, list):
        raise ValueError(f"{path} holds no plan: write a list of limits, alone or under the key plan.")
    return lines


def _limit(line: Any) -> Limit:
    if not isinstance(line, Mapping):
        raise ValueError(f"it is {line!r}; write {{watch: NAME, below: NUMBER}} or {{expect: NAME, above: NUMBER, …}}.")
    for key in line:
        _known(key, KEYS, "key")
    verb = _one(line, ("watch", "expect"), "a limit watches for what must not happen, or expects what must")
    quantity = _text(line, verb)
    actions = _actions(line)
    common: dict[str, Any] = {
        "quantity": quantity,
        "expected": verb == "expect",
        "severity": actions[0],
        "checkpoint": "checkpoint" in actions,
        "stop": "stop" in actions,
        "webhook": _webhook(line),
        "command": _text(line, "command"),
        "why": _text(line, "why"),
    }
    if verb == "expect" and quantity == FINISHED:
        _refuse(line, ("below", "above", "from", "for", "by", "at"), "it is the run that is to finish: leave it out")
        _refuse_action(actions, "the run has ended then")
        return Limit(**common)
    side = _one(line, ("below", "above"), "a limit has one side")
    common |= {"side": side, "value": _number(line[side], side)}
    if verb == "watch":
        _refuse(line, ("by", "at"), f"it belongs to what is expected: {{expect: {quantity}, below: NUMBER, by: STEP}}")
        length, unit = _spell(line.get("for", 1))
        return Limit(**common, start=_moment(line.get("from", 0), "from"), length=length, unit=unit)
    _refuse(line, ("from", "for"), f"it belongs to what is watched: {{watch: {quantity}, above: NUMBER, for: 3}}")
    if _one(line, ("by", "at"), "by: STEP is until when, at: end is the last reading") == "by":
        return Limit(**common, by=_moment(line["by"], "by"))
    if line["at"] != "end":
        raise ValueError(f"at is {line['at']!r}; it is end, the last reading. Until a step is written by: STEP.")
    _refuse_action(actions, "the run has ended then")
    return Limit(**common)


def _known(word: Any, known: tuple[str, ...], what: str) -> None:
    if word not in known:
        near = difflib.get_close_matches(str(word), known, 1, 0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown {what} {word!r}.{hint} There are {', '.join(known)}.")


def _one(line: Mapping[Any, Any], keys: tuple[str, str], why: str) -> Any:
    given = [key for key in keys if key in line]
    if len(given) != 1:
        raise ValueError(f"give {keys[0]} or {keys[1]}, {'not both' if given else 'one of them'}: {why}.")
    return given[0]


def _refuse(line: Mapping[Any, Any], keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if key in line:
            raise ValueError(f"{key} has no effect here; {why}.")


def _refuse_action(actions: tuple[str, ...], why: str) -> None:
    for action in ("checkpoint", "stop"):
        if action in actions:
            raise ValueError(f"do: {action} has no effect here, {why}; to make the run a failing one, write do: fail.")


def _actions(line: Mapping[Any, Any]) -> tuple[str, ...]:
    """The severity, and what else to do."""
    given = line.get("do", "alert")
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list | tuple) or not words:
        raise ValueError(f"do is {given!r}; write one of {', '.join(ACTIONS)}, or several as [checkpoint, stop].")
    for word in words:
        _known(word, ACTIONS, "action")
    grave = [word for word in words if word in SEVERITY]
    if len(grave) > 1 or ("stop" in words and grave not in ([], ["fail"])):
        raise ValueError(f"do is [{', '.join(words)}]; a finding is a note, an alert or a fail; a stop is a fail.")
    return SEVERITY["fail" if "stop" in words else grave[0] if grave else "alert"], *words


def _number(given: Any, key: str) -> float:
    """YAML reads 1e-3 as a word, so words that are numbers do."""
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key} is {given!r}; write a number as it is logged, such as 0.08.")
    return number


def _moment(given: Any, key: str) -> Moment:
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < 1e12:
        return given
    share = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", given) if isinstance(given, str) else None
    if not share or not 0 < float(share[1]) <= 100:
        raise ValueError(f"{key} is {given!r}; write a step, such as 20000, or a share of the run, such as 50%.")
    return float(share[1]) / 100


def _spell(given: Any) -> tuple[int, Literal["readings", "steps"]]:
    found = re.fullmatch(r"(\d{1,12})(?: (reading|step)s?)?", str(given))
    if isinstance(given, bool) or not found or not int(found[1]):
        raise ValueError(f"for is {given!r}; write readings of the quantity in a row, such as 3, or steps: 2000 steps.")
    return int(found[1]), "steps" if found[2] == "step" else "readings"


def _text(line: Mapping[Any, Any], key: str) -> str:
    text = line.get(key, "")
    if not isinstance(text, str) or (key in line and not text.strip()):
        raise ValueError(f"{key} is {text!r}; write words.")
    return text


def _webhook(line: Mapping[Any, Any]) -> str:
    url = _text(line, "webhook")
    if url and not re.match(r"https?://\S+$|\$\w+$", url):
        raise ValueError(f"webhook is {url!r}; write https://…, or $NAME of the environment variable that holds it.")
    return url
