"""From a remedy's words to a command that can be run: the option that it names, moved as it says. No torch."""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from intaglio.config.settings import SYSTEMS
from intaglio.health.finding import Finding, Remedy

UP = ("raise", "longer", "larger", "more", "until it settles", "look ten times")
DOWN = ("lower", "fewer", "shorter", "smaller", "half", "halve")
OPTION = re.compile(r"--([a-z_]+(?:\.[a-z_]+)*)(?: ([\w./\[\]-]*\w\]?))?")


def commanded(finding: Finding, run: str, config: Mapping[str, Any]) -> Finding:
    """The finding with a command for each remedy that names an option of the run's configuration."""
    made = tuple(replace(remedy, command=command(remedy, run, config)) for remedy in finding.remedies)
    return replace(finding, remedies=made)


PLAINLY = {
    "optim.rate": "the learning rate",
    "optim.warmup": "warm-up of the rate",
    "optim.clip": "the gradient's norm",
    "train.steps": "training",
    "train.batch_size": "batch",
    "train.validate_every": "more looks at held-out items",
    "train.patience": "early stopping after a few looks without progress",
    "train.precision": "full precision (float32)",
    "model.dropout": "dropout",
    "loss.kl": "the KL's weight",
    "loss.contrastive": "the contrastive weight",
    "condition.drop": "the share of items whose condition is dropped",
}


def in_words(finding: Finding) -> Finding:
    """The finding with remedies that name no option of ours, as the user of another program can read them."""
    said = (replace(remedy, do=_plainly(remedy.do)) for remedy in finding.remedies)
    return replace(finding, remedies=tuple(remedy for remedy in said if remedy.do))


def _plainly(said: str) -> str:
    if ": --" in said:
        return said.partition(": --")[0]
    return OPTION.sub(lambda option: PLAINLY.get(option[1], ""), said).strip(" ,")


def command(remedy: Remedy, run: str, config: Mapping[str, Any]) -> str:
    """What to type; empty where the remedy names no option, or does not say how far to move it.

    More steps alone go on with the run; anything else trains it anew.
    """
    changed = changes(remedy, config)
    if not changed:
        return ""
    words = " ".join(f"--{key} {value}" for key, value in changed.items())
    if list(changed) == ["train.steps"] and float(changed["train.steps"]) > float(config["train"]["steps"]):
        return f"intaglio train --resume {shlex.quote(run)} {words}"
    return f"intaglio train {shlex.quote(f'{run}/config.yaml')} {words}"


def changes(remedy: Remedy, config: Mapping[str, Any]) -> dict[str, str]:
    """The options that a remedy changes, with their values; empty where it names none, or not how far to move it.

    A value that is given is taken. Otherwise what is to be raised is doubled and what is to be lowered is halved, or
    moved tenfold where the remedy says so; where the system's own value lies further that way, it is taken. Another
    value than this one is the system's own, or twice as much.
    """
    return {key: value for key, given in OPTION.findall(remedy.do) if (value := _value(remedy.do, key, given, config))}


def _value(said: str, key: str, given: str, config: Mapping[str, Any]) -> str:
    now: Any = config
    for part in key.split("."):
        if not isinstance(now, Mapping) or part not in now:
            return ""
        now = now[part]
    known = given and (given in ("true", "false") or not given.isalpha() or isinstance(now, str))
    if known:
        return given
    if isinstance(now, bool) or not isinstance(now, int | float) or not now:
        return ""
    times = 10 if "tenfold" in said else 2
    usual = _usual(key, config)
    if any(word in said for word in DOWN):
        moved = now / times if usual is None else min(now / times, usual)
    elif any(word in said for word in UP):
        moved = max(now * times, usual or 0.0)
    elif "another" in said:
        moved = usual if usual and not now / times < usual < now * times else now * times
    else:
        return ""
    return f"{max(1, round(moved))}" if isinstance(now, int) else f"{moved:g}"


def far_off(config: Mapping[str, Any], times: float = 10.0) -> dict[str, str]:
    """Weights of losses, the rate and the guidance that are ``times`` the system's own or more, or less than a
    ``times``-th, or on where it has them off; with the system's own values, the farthest first."""
    keys = [*(f"loss.{name}" for name in config.get("loss", {})), "optim.rate", "sampling.guidance"]
    apart: dict[str, float] = {}
    for key in keys:
        now: Any = config
        for part in key.split("."):
            now = now.get(part) if isinstance(now, Mapping) else None
        usual = _usual(key, config)
        if usual is None or not isinstance(now, int | float) or isinstance(now, bool) or now == usual:
            continue
        ratio = math.inf if not usual or not now else max(now / usual, usual / now)
        if ratio >= times and now:
            apart[key] = ratio
    return {key: f"{_usual(key, config):g}" for key in sorted(apart, key=lambda key: -apart[key])}


def _usual(key: str, config: Mapping[str, Any]) -> float | None:
    """What the system has where nobody set it; None for what is no number, or depends on data and machine."""
    if key.startswith(("train.", "data.")) or config.get("system") not in SYSTEMS:
        return None
    value: Any = SYSTEMS[config["system"]](config["system"])
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
