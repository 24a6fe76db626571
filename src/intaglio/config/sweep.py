"""A sweep, as its YAML file says it: one recipe, arms that differ in some keys, and the seeds of each.

    recipe: jepa-small                        # a recipe's name, or the path of one
    question: What does the codebook cost?    # one sentence; optional
    seeds: [0, 1, 2]
    metrics: {val/generated/top1: higher}     # what decides; without it, the held-out loss
    trade: [val/a/x, val/a/y]                 # two of them, of which a picture shows one against the other; optional
    common: {train.steps: 1000}               # overrides of all arms
    arms:                                     # the first one is the baseline
      vq: {}
      fsq: {model.quantiser: fsq}

Instead of ``arms``, ``grid`` names values for some keys, all combinations of which become arms, the first values' the
baseline: ``grid: {model.quantiser: [vq, fsq], loss.relational: [0, 0.05]}``.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from intaglio import config as configuration
from intaglio.config.settings import Config

KEYS = ("name", "recipe", "question", "seeds", "metrics", "trade", "common", "arms", "grid")
SEEDS = (0, 1, 2)
WAYS = {"higher": 1, "lower": -1}
RESERVED = {
    "seed": "a sweep's seeds stand under seeds, or after --seeds",
    "name": "runs are named by their arm and seed, and the sweep by name in its file",
    "runs": "--runs DIR says where a sweep goes",
}
NAME = re.compile(r"[^\s\-./,\\][^,/\\\x00-\x1f\x7f]{0,59}")
LENGTHS = ("train.steps", "train.epochs")

Overrides = Mapping[str, str]
"""Dotted keys, and their values as they are written on a command line."""


@dataclass(frozen=True)
class Sweep:
    """Arms by name, each with its overrides, the baseline first.

    ``metrics`` are the held-out quantities that decide: +1 where more is better, −1 where less is, 0 where the file
    leaves it to the name, and ``trade`` two of them that a picture shows, across and up. ``common`` holds for all arms,
    what was ``given`` on a command line among it; ``source`` is the file.
    """

    name: str
    recipe: str
    arms: Mapping[str, Overrides]
    seeds: tuple[int, ...] = SEEDS
    common: Overrides = field(default_factory=dict)
    question: str = ""
    metrics: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    given: Overrides = field(default_factory=dict)
    trade: tuple[str, ...] = ()

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms))

    def config(self, arm: str, seed: int) -> Config:
        """The configuration of one run, but for where it goes."""
        given = {**_upon(self.common, self.arms[arm]), "seed": str(seed)}
        return configuration.load(self.recipe, [f"--{key}={value}" for key, value in given.items()])


def shipped() -> list[str]:
    """Names of the sweeps that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _folder().iterdir() if f.name.endswith(".yaml"))


def read(file: str | Path, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Sweep:
    """Reads a sweep (the path of a YAML file, or a name from ``shipped()``) and checks the configuration of every arm.

    Args:
        file: where it is.
        overrides: ``--key.sub value`` words for all arms, stronger than ``common``.
        seeds: instead of the file's.

    Raises:
        ValueError: what cannot be read, an unknown key or value in any arm, arms that are the same; says what to do.
    """
    text, name, beside = _text(file)
    tree = _tree(text, str(file))
    for key in tree:
        if key not in KEYS:
            raise ValueError(f"{file}: unknown key {key}.{_nearest(str(key), KEYS)} Keys: {', '.join(KEYS)}.")
    recipe = tree.get("recipe")
    if not recipe or not isinstance(recipe, str):
        known = ", ".join(configuration.recipes())
        raise ValueError(f"{file}: recipe is {recipe!r}; name one of {known}, or the path of one.")
    if beside is not None and (beside / recipe).is_file():
        recipe = str(beside / recipe)
    name = str(tree.get("name") or name)
    if not NAME.fullmatch(name):
        raise ValueError(f"{file}: name is {name!r}; it becomes a folder: letters, digits and - will do.")
    common, given = _flat(tree.get("common"), f"{file}: common"), _words(overrides)
    for key in given:
        _refuse_reserved(key, "command line")
    arms = _arms(tree, str(file))
    varied = sorted({key for arm in arms.values() for key in arm} & set(given))
    if varied:
        raise ValueError(
            f"--{varied[0]} is what arms of {file} are for: leave it out, or train some of them with --only ARM,…"
        )
    metrics = _metrics(tree.get("metrics"), str(file))
    sweep = Sweep(
        name, recipe, arms, _seeds(tree.get("seeds", SEEDS) if seeds is None else seeds, str(file)),
        _upon(common, given), str(tree.get("question") or "").strip(), metrics, str(file), given,
        _trade(tree.get("trade"), metrics, str(file)),
    )  # fmt: skip
    _check(sweep, str(file))
    return sweep


def _folder() -> Any:
    return files("intaglio") / "recipes" / "sweeps"


def _text(file: str | Path) -> tuple[str, str, Path | None]:
    """What stands in the file, the name that it gives, and the folder that it lies in, unless it is ours."""
    path = Path(file)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), path.stem, path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The sweep {file} cannot be read ({error}); give the path of a YAML file.") from None
    entry = _folder() / f"{file}.yaml"
    if path.name != str(file) or not entry.is_file():
        hint = _nearest(str(file), shipped())
        raise ValueError(
            f"No sweep {str(file)!r}.{hint} Give the path of a YAML file, or one of: {', '.join(shipped())}."
        )
    return entry.read_text(encoding="utf-8"), str(file), None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _tree(text: str, file: str) -> Mapping[str, Any]:
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file} is not a sweep: a sweep is a mapping with the keys recipe and arms, or grid.")
    return tree


def _arms(tree: Mapping[str, Any], file: str) -> dict[str, Overrides]:
    """Each arm's overrides, of ``arms`` or of the combinations of ``grid``."""
    given, grid = tree.get("arms"), tree.get("grid")
    if (given is None) == (grid is None):
        raise ValueError(f"{file}: give arms (name → overrides) or grid (key → values), one of them.")
    if grid is not None:
        arms = _combinations(grid, file)
    elif isinstance(given, dict):
        arms = {_name(name, file): _flat(words, f"{file}: arm {name}") for name, words in given.items()}
    else:
        raise ValueError(f"{file}: arms is {given!r}; write a name for each, with its overrides: fsq: {{model.x: 1}}.")
    if len(arms) < 2:
        raise ValueError(f"{file}: it has {len(arms)} arm; give the baseline and at least one to compare with it.")
    slugs = Counter(slug(name).lower() for name in arms)
    for name in arms:
        if slugs[slug(name).lower()] > 1:
            raise ValueError(f"{file}: two arms would have the folder name {slug(name)}: rename {name}.")
    return arms


def slug(arm: str) -> str:
    """What the folders of an arm's runs begin with."""
    return re.sub(r"[^\w.=+-]+", "-", arm)


def _name(name: Any, file: str) -> str:
    if name is None or isinstance(name, bool):
        raise ValueError(f"{file}: the arm {name!r} is a word that YAML reads as a value: put it in quotes.")
    if not NAME.fullmatch(str(name)):
        raise ValueError(f"{file}: the arm {str(name)!r}: use up to 60 characters without commas and slashes.")
    return str(name)


def _combinations(grid: Any, file: str) -> dict[str, Overrides]:
    """Arms of a grid, named by their values: ``quantiser=fsq+relational=0.05``."""
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"{file}: grid is {grid!r}; write keys with lists of values: model.quantiser: [vq, fsq].")
    values = _leaves(grid, f"{file}: grid")
    for key, several in values.items():
        if not isinstance(several, list) or not several:
            raise ValueError(f"{file}: grid: {key} is {several!r}; give a list of values, the baseline's first.")
    last = Counter(key.rsplit(".", 1)[-1] for key in values)
    short = {key: end if last[end := key.rsplit(".", 1)[-1]] == 1 else key for key in values}
    arms: dict[str, Overrides] = {}
    for combination in product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        name = "+".join(f"{short[key]}={_shown(value)}" for key, value in chosen.items())
        if name in arms:
            raise ValueError(f"{file}: grid: {name} would stand twice; give each value once.")
        arms[_name(name, file)] = {key: _written(value) for key, value in chosen.items()}
    return arms


def _shown(value: Any) -> str:
    return "x".join(map(_written, value)) if isinstance(value, list) else _written(value)


def _leaves(tree: Mapping[Any, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; sections may be nested, as in recipes, or written with dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        _refuse_reserved(path, where)
        inner = _leaves(value, where, f"{path}.") if isinstance(value, dict) and value else {path: value}
        twice = sorted(found.keys() & inner.keys())
        if twice:
            raise ValueError(f"{where}: {twice[0]} stands twice; leave one of them out.")
        found |= inner
    return found


def _flat(tree: Any, where: str) -> Overrides:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{where} is {tree!r}; write keys with their values: {{train.steps: 500}}.")
    return {key: _written(value) for key, value in _leaves(tree, where).items()}


def _refuse_reserved(key: str, where: str) -> None:
    if key in RESERVED:
        raise ValueError(f"{where}: {key} cannot be set here: {RESERVED[key]}.")


def _written(value: Any) -> str:
    """A value as it stands on a command line."""
    return json.dumps(value) if value is None or isinstance(value, bool | int | float | list | dict) else str(value)


def _words(overrides: Iterable[str]) -> Overrides:
    """``--key value`` and ``--key=value`` by key."""
    given: dict[str, str] = {}
    words = iter(overrides)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"{word}: options are written --key.sub value, for example --train.steps 500.")
        key, equals, value = word[2:].partition("=")
        value = value if equals else next(words, "")
        given = {**_upon(given, {key: value})}
    return given


def _upon(below: Overrides, above: Overrides) -> Overrides:
    """Both, the upper one where they differ; a length in steps replaces one in epochs, and the other way round."""
    below, above = dict(below), dict(above)
    if set(LENGTHS) & set(above):
        below = {key: value for key, value in below.items() if key not in LENGTHS}
    return below | above


def _seeds(given: Any, file: str) -> tuple[int, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"{file}: seeds is {given!r}; give a list of numbers: [0, 1, 2].")
    for seed in given:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"{file}: the seed {seed!r} is not a whole number from 0 on.")
    twice = [seed for seed, count in Counter(given).items() if count > 1]
    if twice:
        raise ValueError(f"{file}: the seed {twice[0]} stands twice, and would make the same run twice.")
    return tuple(given)


def _metrics(given: Any, file: str) -> dict[str, int]:
    if given is None:
        return {}
    pairs = given.items() if isinstance(given, dict) else [(name, None) for name in given] if given else ()
    if not isinstance(given, dict | list) or not all(isinstance(name, str) for name, _ in pairs):
        raise ValueError(f"{file}: metrics is {given!r}; write each with its better side: val/loss/total: lower.")
    for name, way in pairs:
        if way not in (*WAYS, None):
            hint = _nearest(str(way), WAYS)
            raise ValueError(f"{file}: metrics: {name}: {way!r} is no direction.{hint} Write higher or lower.")
    return {name: 0 if way is None else WAYS[way] for name, way in pairs}


def _trade(given: Any, metrics: Mapping[str, int], file: str) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) != 2 or not set(given) <= set(metrics):
        raise ValueError(f"{file}: trade is {given!r}; write two of the metrics: [{', '.join(list(metrics)[:2])}].")
    return tuple(given)


def _check(sweep: Sweep, file: str) -> None:
    """Every arm's configuration can be made, and no two are the same."""
    made: dict[str, Config] = {}
    for arm, given in sweep.arms.items():
        try:
            config = sweep.config(arm, sweep.seeds[0])
        except ValueError as error:
            where = "" if str(error).startswith("No recipe") else f"arm {arm}: "
            raise ValueError(f"{file}: {where}{re.sub(r'^(command line|recipe .+?): ', '', str(error))}") from None
        for other, theirs in made.items():
            if not configuration.diff(theirs, config):
                which = "the baseline" if other == sweep.baseline else f"the arm {other}"
                changed = ", ".join(f"{key}: {value}" for key, value in given.items()) or "it has no overrides"
                raise ValueError(
                    f"{file}: the arm {arm} is the same as {which} ({changed}): change it or leave it out."
                )
        made[arm] = config


def _nearest(word: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""
