"""Everything that a user may set: typed and frozen; read from YAML recipes and the command line, checked, compared.

A recipe is a YAML file with ``system:`` (or one parent named by ``extends:``) and the keys below it that it changes.
``load("multimodal-small", ["--train.steps", "500"])`` gives the configuration; ``dump`` writes it back so that it loads
as itself.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from intaglio.config import plan
from intaglio.config.faults import check_values
from intaglio.config.settings import (
    SYSTEMS,
    AutoencoderConfig,
    AutoencoderLossConfig,
    AutoencoderModelConfig,
    CaptionDataConfig,
    ConditionConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    DiffusionLossConfig,
    DiffusionModelConfig,
    GridDataConfig,
    HealthConfig,
    ImageDataConfig,
    JepaConfig,
    JepaLossConfig,
    JepaModelConfig,
    MultimodalConfig,
    MultimodalLossConfig,
    MultimodalModelConfig,
    NoiseConfig,
    OptimConfig,
    PictureDataConfig,
    PriorConfig,
    QuestionDataConfig,
    SamplingConfig,
    TrainConfig,
    VqaConfig,
    VqaLossConfig,
    VqaModelConfig,
)

__all__ = [
    "AutoencoderConfig",
    "AutoencoderLossConfig",
    "AutoencoderModelConfig",
    "CaptionDataConfig",
    "ConditionConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "DiffusionLossConfig",
    "DiffusionModelConfig",
    "GridDataConfig",
    "HealthConfig",
    "ImageDataConfig",
    "JepaConfig",
    "JepaLossConfig",
    "JepaModelConfig",
    "MultimodalConfig",
    "MultimodalLossConfig",
    "MultimodalModelConfig",
    "NoiseConfig",
    "OptimConfig",
    "PictureDataConfig",
    "PriorConfig",
    "QuestionDataConfig",
    "SamplingConfig",
    "TrainConfig",
    "VqaConfig",
    "VqaLossConfig",
    "VqaModelConfig",
    "diff",
    "dump",
    "from_dict",
    "load",
    "recipes",
    "structural",
    "to_dict",
]

STRUCTURAL = (
    "model.", "data.", "prior.", "system", "seed", "stages", "rates", "optim.kind", "train.ema", "train.accumulate",
    "loss.objective", "loss.queue",
)  # fmt: skip
"""Beginnings of keys that decide what a checkpoint holds."""


_read_before: dict[tuple[Any, ...], Config] = {}
"""A run's configuration is read at each look, and parsing it takes a tenth of a second."""


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _recipe_folder().iterdir() if f.name.endswith(".yaml"))


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe (a name from ``recipes()`` or the path of a YAML file) and applies ``--key.sub value`` overrides.

    Raises:
        ValueError: an unknown recipe, key or value, with the nearest right one.
    """
    tree = _read(recipe, seen=())
    tree.setdefault("name", "")
    if not tree["name"]:
        tree["name"] = Path(recipe).stem
    _choose_length(tree, overrides)
    return from_dict(tree, overrides, where=f"recipe {recipe}")


def from_dict(tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "configuration") -> Config:
    """Builds the typed configuration of ``tree["system"]``.

    Raises:
        ValueError: an unknown system, key or value; the message names the nearest right one.
    """
    system = tree.get("system")
    if not isinstance(system, str) or system not in SYSTEMS:
        raise ValueError(f"{where}: system is {system!r}; it must be one of: {', '.join(SYSTEMS)}.")
    kind = SYSTEMS[system]
    _check_keys(tree, kind, where)
    overrides = list(_plan_read(overrides))
    for word in overrides:
        if word.startswith("--"):
            _check_path(word[2:].split("=", 1)[0], kind)
        elif word.startswith("-") and not _is_number(word):
            raise ValueError(f"{word}: options are written --key.sub value, for example --train.steps 500.")
    known = system, repr(tree), tuple(overrides)
    if known in _read_before:
        return _read_before[known]
    try:
        config = _parsed(kind, dict(tree), overrides)
    except Exception as error:  # jsonargparse raises several unrelated types for a wrong value
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    check_values(config)
    return _read_before.setdefault(known, config)


def _parsed(kind: type[Config], tree: dict[str, Any], overrides: list[str]) -> Config:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, nested_key=None)
    parsed = parser.parse_object(tree)
    if overrides:
        parsed = parser.parse_args(overrides, namespace=parsed)
    return kind(**vars(parser.instantiate(parsed)))


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain dicts, lists, numbers and strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return plain(asdict(config))


def dump(config: Config) -> str:
    """The configuration as YAML that ``load`` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def diff(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new)."""
    a, b = _flat(to_dict(old)), _flat(to_dict(new))
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def structural(key: str) -> bool:
    """Whether a checkpoint does not fit another value of this key, so that training begins anew with it."""
    return key.startswith(STRUCTURAL)


def _recipe_folder() -> Any:
    return files("intaglio") / "recipes"


def _read(recipe: str | Path, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise ValueError(f"No recipe file {recipe}. The recipes that come with intaglio: {', '.join(recipes())}.")
        text = path.read_text(encoding="utf-8")
    else:
        entry = _recipe_folder() / f"{recipe}.yaml"
        if not entry.is_file():
            raise ValueError(
                f"No recipe {str(recipe)!r}.{_nearest(str(recipe), recipes())} Recipes: {', '.join(recipes())}; "
                "or give the path of a YAML file."
            )
        text = entry.read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{recipe} is not a recipe: a recipe is a mapping with the key 'system' or 'extends'.")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if str(parent) in seen:
        raise ValueError(f"Recipes extend each other in a circle: {' -> '.join((*seen, str(parent)))}.")
    beside = path.parent / f"{parent}.yaml"
    inherited = _read(beside if path.is_file() and beside.is_file() else parent, (*seen, str(parent)))
    inherited.pop("name", None)
    return _merge(inherited, tree)


def _choose_length(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Steps on the command line replace the recipe's epochs, and the other way round."""
    given = {word[2:].split("=", 1)[0] for word in overrides}
    for key, other in (("train.steps", "steps"), ("train.epochs", "epochs")):
        if key not in given:
            continue
        for name in {"steps", "epochs"} - {other}:
            if f"train.{name}" not in given:
                tree.setdefault("train", {})[name] = None


def _plan_read(overrides: Sequence[str]) -> Iterator[str]:
    """``--plan FILE`` becomes ``--plan`` with what the file holds; one that is written out begins with a bracket."""
    words = iter(overrides)
    for word in words:
        word = f"--plan={next(words, '')}" if word == "--plan" else word
        given = word.removeprefix("--plan=")
        written = given == word or given.startswith("[")
        yield word if written else f"--plan={json.dumps(plan.read(given), default=str)}"


def _merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _section(kind: type, key: str) -> type | None:
    hint = get_type_hints(kind)[key]
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def _check_keys(tree: Mapping[str, Any], kind: type, where: str, prefix: str = "") -> None:
    for key, value in tree.items():
        _check_key(key, kind, where, prefix)
        section = _section(kind, key)
        if section and not isinstance(value, dict):
            raise ValueError(f"{where}: {prefix}{key} is a section and needs keys below it, not {value!r}.")
        if section:
            _check_keys(value, section, where, f"{prefix}{key}.")


def _check_path(path: str, kind: type) -> None:
    """An override such as ``data.columns.caption``: each part must be a key of the section before it."""
    prefix, at = "", kind
    for part in path.split("."):
        _check_key(part, at, "command line", prefix)
        below = _section(at, part)
        if below is None:
            return
        prefix, at = f"{prefix}{part}.", below


def _check_key(key: str, kind: type, where: str, prefix: str) -> None:
    names = [f.name for f in fields(kind)]
    if key not in names:
        everywhere = [p for p in _flat_names(kind) if p.split(".")[-1] == key]
        hint = f" Did you mean {prefix}{everywhere[0]}?" if everywhere else _nearest(key, names, prefix)
        raise ValueError(f"{where}: unknown key {prefix}{key}.{hint} Keys here: {', '.join(names)}.")


def _nearest(word: str, names: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _flat_names(kind: type, prefix: str = "") -> list[str]:
    names: list[str] = []
    for f in fields(kind):
        section = _section(kind, f.name)
        names += _flat_names(section, f"{prefix}{f.name}.") if section else [f"{prefix}{f.name}"]
    return names


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
