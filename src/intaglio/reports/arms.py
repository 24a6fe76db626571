"""Runs to be compared, ours or anybody's, in one form, and the two arms that they make. No torch here."""

import difflib
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.history import Reading, Series
from intaglio.history.run_folder import RunFolder, find
from intaglio.reports.safe import plain

SEEDS = ("seed", "random_seed", "manual_seed", "global_seed")
BOOKKEEPING = {
    "name", "runs", "id", "run_id", "run_name", "group", "tags", "notes", "project", "entity", "_wandb",
    "wandb_version", "train.keep", "train.log_every", "train.checkpoint_every",
}  # fmt: skip
PLACES = re.compile(r"(output|log|logging|save|ckpt|checkpoint|cache|results?)_(dir|folder|path)|cache|log_?dir")
NO_OUTCOME = re.compile(
    r"(train/(optimizer(\..+)?/rate|weight/.*|speed/.*|text/unreachable_share))"
    r"|(.*[/_. -])?_?(epochs?|steps?|global_step|iterations?|iter|row|runtime|time|timestamp|created_at|wall_time"
    r"|\w+_per_second|lr|learning_rate|batch_size|gpu|memory|best|total_flos|train_runtime)",
    re.IGNORECASE,
)
"""Names of settings, clocks and costs: they are told, never judged."""


@dataclass(frozen=True)
class Run:
    """One run as a comparison sees it.

    ``series`` have our names where the alias table knows them; ``config`` has dotted keys; ``facts`` are what the run
    folder says besides (``id``, ``seed``, ``fingerprint``, ``versions``, ``machine``, ``seconds``, ``parameters``,
    ``status``, ``steps``, ``monitor``), as far as it does.
    """

    name: str
    source: str
    format: str
    axis: str
    series: Mapping[str, Series]
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether it is a run folder of ours: its terms are logged before they are weighted."""
        return self.format == OURS

    @property
    def seed(self) -> Any:
        """What the run says its seed is, or None."""
        told = (v for k, v in self.config.items() if k.rsplit(".", 1)[-1].lower() in SEEDS)
        return self.facts["seed"] if self.facts.get("seed") is not None else next(told, None)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration without what can change no result."""
        return {k: v for k, v in self.config.items() if not bookkeeping(k)}

    def outcomes(self) -> dict[str, Series]:
        """What it measured, without settings, clocks, ends of intervals and series without a value."""
        ends = {f"{name}_{end}" for name in self.series for end in ("low", "high")}
        return {n: s for n, s in self.series.items() if n not in ends and len(s) and not NO_OUTCOME.fullmatch(n)}


OURS = "run folder"


def bookkeeping(key: str) -> bool:
    """Whether a key of a configuration only names things: seed, name, folders, and what changes no weight."""
    last = key.rsplit(".", 1)[-1].lower()
    named = key.lower() in BOOKKEEPING or key.startswith(("health.", "_wandb."))
    return named or last in SEEDS or bool(PLACES.fullmatch(last))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def in_two(words: Sequence[str], against: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The arms A and B: ``A B A2 B2 …`` in turn, or the words against the words of ``--against``.

    Raises:
        ValueError: one arm would be empty, or the turns do not come out even.
    """
    if against:
        if not words:
            raise ValueError("what shall be compared? Give A … --against B ….")
        return list(words), list(against)
    if len(words) < 2:
        raise ValueError("a comparison needs two runs at least: intaglio compare A B, or A A2 --against B B2.")
    if len(words) % 2:
        raise ValueError(
            f"{len(words)} runs in turn (A B A2 B2 …) leave one without its counterpart; arms of unequal size are "
            "written A A2 --against B."
        )
    return list(words[::2]), list(words[1::2])


def read_runs(word: str | Path, format: str | None = None, mapping: Mapping[str, str] | None = None) -> list[Run]:
    """The run of a run folder of ours (or of that name under ``runs/``), or all runs of anybody's history file.

    ``FILE::NAME`` takes the runs of that name (or pattern, as ``FILE::base-*``) from a file that holds several.

    Raises:
        ValueError: nothing there, nothing readable, or no run of that name; says what to do.
    """
    path, _, wanted = str(word).partition("::")
    ours = any((place / "run.json").is_file() for place in (Path(path), Path("runs") / path))
    if format is None and (ours or not Path(path).exists()):
        return [_of_folder(find(path))]
    runs = _of_history(Path(path), format, mapping or {})
    if not wanted:
        return runs
    kept = [run for run in runs if run.name == wanted or fnmatchcase(run.name, wanted)]
    if not kept:
        near = difflib.get_close_matches(wanted, [r.name for r in runs], 1, 0.3)
        hint = f"; did you mean {plain(near[0])!r}?" if near else "."
        raise ValueError(f"{path} has no run {plain(wanted)!r}{hint} It has {_few([r.name for r in runs])}.")
    return kept


def _few(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(plain(n, 60) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _of_history(path: Path, format: str | None, mapping: Mapping[str, str]) -> list[Run]:
    from intaglio.history.aliases import ours
    from intaglio.history.foreign import read_histories

    runs = []
    for history in read_histories(path, format):
        series, renamed = ours(history, mapping)
        status = {"status": history.status} if history.status else {}
        read = (history.name, str(history.path), history.format, history.axis)
        runs.append(Run(*read, series, flat(history.config), status, renamed, tuple(history.notices)))
    return runs


def _of_folder(folder: RunFolder) -> Run:
    from intaglio.health.record import of_table
    from intaglio.history import DamagedHistory, read_history

    path = folder.path
    metrics = folder.metrics if folder.metrics.is_file() else folder.metrics.with_suffix(".parquet")
    if not metrics.is_file():
        raise ValueError(f"{path} has no metrics yet, so there is nothing to compare: train first.")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", DamagedHistory)
        series = dict(of_table(read_history(metrics)).series)
    try:
        record, config, evaluation, audits = (
            read_json(path / "run.json"), read_config(path), read_json(path / "evaluation.json"),
            read_json(path / "audits.json"),
        )  # fmt: skip
        readings = {name: Reading(**r) for name, r in evaluation.get("readings", {}).items()}
        commit = (record.get("git_commit") or {}).get("commit")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds a damaged file: {' '.join(str(error).split())}") from None
    for name, r in readings.items():
        series.setdefault(name, Series.of(np.array([evaluation.get("step", 0)]), np.array([float(r.value)])))
    facts = {
        "id": record.get("id"),
        "seed": record.get("seed", config.get("seed")),
        "fingerprint": record.get("fingerprint"),
        "versions": record.get("versions") or {},
        "commit": commit,
        "machine": record.get("machine"),
        "seconds": record.get("train_seconds"),
        "parameters": audits.get("parameters"),
        "status": record.get("status"),
        "steps": record.get("step") or config.get("train.steps"),
        "items per step": (config.get("train.batch_size") or 0) * (config.get("train.accumulate") or 1) or None,
        "monitor": config.get("train.monitor"),
    }
    said = tuple(f"{path}: {w.message}" for w in told if issubclass(w.category, DamagedHistory))
    return Run(path.name, str(path), OURS, "step", series, config, facts, notices=said)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a mapping; an empty one where there is no such file.

    Raises:
        ValueError: damaged, or something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} does not hold what a run folder's does")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run with dotted keys, as they stand in ``config.yaml``; empty where it has none.

    Raises:
        ValueError: damaged, or no settings.
    """
    import yaml

    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"config.yaml is damaged ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ValueError("config.yaml holds no settings")
    return flat(tree)


def same_data(a: Run, b: Run) -> str:
    """Why the two are one and the same data, read twice; empty where they are not.

    All that both measured must be the same, row by row or at the steps that both have, to the digits that the coarser
    of them was written with.
    """
    if a.facts.get("id") and a.facts.get("id") == b.facts.get("id"):
        return f"both have the id {plain(a.facts['id'])}"
    first, second = a.outcomes(), b.outcomes()
    values: set[float] = set()
    names = [n for n in first if n in second]
    for name in names:
        pair = common_rows(first[name], second[name])
        if pair is None or not alike(*pair):
            return ""
        values |= set(pair[0][:1000].tolist())
    told = f"the {len(names)} series that both have hold" if len(names) > 1 else "the series that both have holds"
    return f"{told} the same values in both" if len(values) >= 3 else ""


def trained_apart(a: Run, b: Run) -> bool:
    """Whether the two are known to be two trainings: each has an id of its own."""
    ids = a.facts.get("id"), b.facts.get("id")
    return all(ids) and ids[0] != ids[1]


def common_rows(s: Series, t: Series) -> tuple[np.ndarray, np.ndarray] | None:
    """Values of both, row by row where they have as many rows, else at the steps that both have; None without any."""
    if len(s) == len(t):
        return s.values, t.values
    _, i, j = np.intersect1d(s.steps, t.steps, return_indices=True)
    return (s.values[i], t.values[j]) if len(i) else None


def alike(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether values are the same but for rounding."""
    unit = max(_unit(x), _unit(y))
    return bool(np.allclose(x, y, rtol=1e-5, atol=0.51 * unit, equal_nan=True))


def _unit(x: np.ndarray) -> float:
    """The last decimal place that values were written with, or 0 where they were written in full, or are too few."""
    some = x[np.isfinite(x)][:500]
    for places in range(7 if len(some) >= 8 else 0):
        rounded = np.round(some, places)
        if np.array_equal(rounded, some):
            return 10.0**-places if len(np.unique(rounded)) >= 3 else 0.0
    return 0.0


def pair_key(run: Run, apart: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """What two runs of a pair have in common: the seed and every setting but those in which the arms differ."""
    ignored = set(apart)
    rest = {k: v for k, v in run.settings.items() if k not in ignored} | {"seed": run.seed}
    return tuple(sorted((k, repr(v)) for k, v in rest.items()))


def arm_names(a: Sequence[Run], b: Sequence[Run]) -> tuple[str, str]:
    """What to call each arm: the run's name, or what its runs' names begin with; A and B where that tells nothing."""
    names = [_common(arm) for arm in (a, b)]
    return (names[0], names[1]) if names[0] != names[1] and all(len(n) > 1 for n in names) else ("A", "B")


def _common(runs: Sequence[Run]) -> str:
    start = runs[0].name
    for left, right in pairwise([r.name for r in runs]):
        while not (left.startswith(start) and right.startswith(start)):
            start = start[:-1]
    return start.strip("-_. /") if len(runs) > 1 else start
