"""The curriculum of a recipe: what is frozen, and which terms of the loss are off, until when.

stages:
  - {until: 0.1, freeze: [vision], without: [preference]}
  - {until: 0.6, without: [preference]}
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEYS = ("until", "freeze", "without")

PARTS = ("vision", "question", "fusion", "bottleneck", "answer")
"""Parts of the network that answers questions."""

TERMS = ("answer", "kl", "orthogonality", "preference")
"""Terms of its loss."""


@dataclass(frozen=True)
class Stage:
    """Until optimizer step ``until``, the first behind it, the parts have no update and the terms no weight."""

    until: int
    freeze: tuple[str, ...]
    without: tuple[str, ...]


NOTHING = Stage(0, (), ())


def parse(
    stages: Sequence[Mapping[str, Any]], steps: int, parts: Collection[str] = PARTS, terms: Collection[str] = TERMS
) -> list[Stage]:
    """The stages of a run of so many steps.

    Raises:
        ValueError: an unknown key, part or term, with the nearest; a stage that ends before it begins.
    """
    found: list[Stage] = []
    for number, line in enumerate(stages, 1):
        where = f"stages, line {number}"
        if not isinstance(line, Mapping):
            raise ValueError(f"{where} is {line!r}; write {{until: 0.2, freeze: [vision]}}.")
        for key in line:
            _known(where, str(key), KEYS, "key")
        until = line.get("until")
        if isinstance(until, bool) or not isinstance(until, int | float) or until <= 0:
            raise ValueError(f"{where}: until is {until!r}; give an optimizer step, or a share of the run such as 0.2.")
        if isinstance(until, float) and until > 1:
            raise ValueError(f"{where}: until is {until}; a share is at most 1.0, and a step is a whole number.")
        end = round(until * steps) if isinstance(until, float) else until
        if found and end <= found[-1].until:
            raise ValueError(f"{where} ends at step {end}, which is not behind the one before it ({found[-1].until}).")
        lists = {key: _listed(where, key, line.get(key, ())) for key in ("freeze", "without")}
        for part in lists["freeze"]:
            _known(where, part, parts, "part")
        for term in lists["without"]:
            _known(where, term, terms, "term")
        found.append(Stage(end, lists["freeze"], lists["without"]))
    return found


def at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of an update, of which the first is step 0."""
    return next((stage for stage in stages if step < stage.until), NOTHING)


def held_back(stages: Sequence[Stage], term: str) -> int:
    """The step from which on a term of the loss is never off."""
    return max((stage.until for stage in stages if term in stage.without), default=0)


def _listed(where: str, key: str, given: Any) -> tuple[str, ...]:
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{where}: {key} is {given!r}; write a list of names, such as [vision].")
    return tuple(words)


def _known(where: str, word: str, known: Collection[str], what: str) -> None:
    if word not in known:
        near = difflib.get_close_matches(word, list(known), 1, 0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{where}: unknown {what} {word!r}.{hint} There are {', '.join(known)}.")
