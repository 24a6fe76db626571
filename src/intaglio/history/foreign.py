"""Histories that other tools wrote: found out by name and content, read by the right reader, named and described."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from intaglio.history.aliases import vocabulary
from intaglio.history.series import Series

# What --format takes, and the module under formats/ that reads it.
FORMATS = {
    "csv": "delimited",
    "parquet": "delimited",
    "lightning": "delimited",
    "json": "objects",
    "jsonl": "objects",
    "huggingface": "objects",
    "skorch": "objects",
    "wandb": "wandb_runs",
    "tensorboard": "tensorboard_events",
    "mlflow": "mlflow_stores",
}
_NATIVE = ("mlflow_stores", "wandb_runs", "tensorboard_events")
_PLAIN = ("objects", "delimited")
_SUFFIXES = vocabulary(".csv .tsv .tab .json .jsonl .ndjson .parquet .pq .log .txt .dat .zip .gz")
_USUAL = frozenset(("metrics", "history", "log", "logs", "training_log", "train_log", "progress", "results"))
_SETTINGS = vocabulary("meta_tags hparams config args params settings requirements readme labels classes vocab")
_MEMBERS, _DEEPEST = 20_000, 4


@dataclass(frozen=True)
class History:
    """A run as somebody's file tells it.

    Args:
        name: of the run, for people.
        path: where it was read.
        format: what it was read as, for people.
        axis: what steps count: the name of their column, or "row".
        given: every metric under its own name, its own rows only: blanks are left out, NaN that is a value is kept,
            and steps ascend.
        notices: what a reader must know, in whole sentences: damage, sampling, what was left out or put right.
        config: settings that stand with it.
        status: "finished", "crashed" or "running", where the file says so.
    """

    name: str
    path: Path
    format: str
    axis: str
    given: Mapping[str, Series]
    notices: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    status: str = ""


def read_histories(path: str | Path, format: str | None = None) -> list[History]:
    """The runs in a file or a folder of any tool that is known here.

    Args:
        path: a file, a folder, or a zip of them.
        format: one of ``FORMATS`` where the content does not show it.

    Raises:
        ValueError: nothing there can be read, or ``format`` is unknown; says what is wrong and what to do.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        near = get_close_matches(format, FORMATS, 1, 0)[0]
        raise ValueError(f"format {format!r} is unknown; the nearest is {near!r}, of {', '.join(FORMATS)}")
    try:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"{path} is neither a file nor a folder")
        found = _in_folder(path, format) if path.is_dir() else _in_file(path, format)
    except (OSError, MemoryError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} can't be read: {error or type(error).__name__}") from None
    one_clock, known = _reader("epochs").one_clock, Counter[str]()
    return [one_clock(_told_apart(history, known)) for history in found]


def _told_apart(history: History, known: Counter[str]) -> History:
    """With a number behind the name, if it was there before."""
    known[history.name] += 1
    number = known[history.name]
    return replace(history, name=f"{history.name} #{number}") if number > 1 else history


def _reader(module: str) -> ModuleType:
    return import_module(f"intaglio.history.formats.{module}")


def _in_file(path: Path, format: str | None) -> list[History]:
    with path.open("rb") as file:
        head = file.read(512)
    if format is None and (head[:4] == b"PK\3\4" or head[:2] == b"\x1f\x8b"):
        return _packed(path)
    if format is not None:
        return _with_settings(_reader(FORMATS[format]).read(path), path)
    own = _reader("own")
    if own.claims(path):
        return own.read(path)
    for module in _NATIVE:
        if (reader := _reader(module)).claims(path):
            return reader.read(path)
    failure: ValueError | None = None
    for module in _PLAIN:
        if (reader := _reader(module)).claims(path):
            try:
                return _with_settings(reader.read(path), path)
            except ValueError as error:
                failure = error
                if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
                    break
    known = "W&B, TensorBoard, MLflow, Lightning, Hugging Face, CSV, JSON and Parquet"
    raise failure or ValueError(f"{path} is no history that is known here ({known}): if it is one, name its format")


def _in_folder(folder: Path, format: str | None, depth: int = 0) -> list[History]:
    """The histories in a folder: of the tool that made it, or in the one file or the subfolders that hold any."""
    if format is not None and FORMATS[format] in _NATIVE:
        return _reader(FORMATS[format]).read(folder)
    own = _reader("own")
    if format is None and own.claims(folder):
        return own.read(folder)
    if state := _trainer_state(folder):
        return [replace(h, name=folder.name or h.name) for h in _in_file(state, format)]
    if format is None:
        for module in _NATIVE:
            if (reader := _reader(module)).claims(folder) and not _mixed(folder, reader):
                return _beside(reader.read(folder), folder)
    files = _candidates(folder)
    if format is not None:
        files = [file for file in files if _reader(FORMATS[format]).claims(file)]
    if len(files) == 1:
        return _in_file(files[0], format)
    if files:
        return _several(folder, files, format)
    found, unread = [], []
    for sub in _subfolders(folder) if depth < _DEEPEST else ():
        try:
            found += _in_folder(sub, format, depth + 1)
        except ValueError:
            unread.append(sub.name)
    if found:
        said = f"No history could be read in {', '.join(map(repr, unread[:8]))}{' and more' * (len(unread) > 8)}."
        return [replace(found[0], notices=(*found[0].notices, said)), *found[1:]] if unread else found
    names = sorted(p.name + "/" * p.is_dir() for p in islice(folder.iterdir(), _MEMBERS))
    there = (
        f"it has {', '.join(map(repr, names[:12]))}{' and more' if len(names) > 12 else ''}" if names else "it is empty"
    )
    raise ValueError(f"{folder} holds no history that is known here: {there}")


def _subfolders(folder: Path) -> list[Path]:
    inside = (p for p in islice(folder.iterdir(), _MEMBERS) if p.is_dir() and not p.is_symlink())
    return sorted(p for p in inside if not p.name.startswith("."))


def _mixed(folder: Path, reader: ModuleType) -> bool:
    """Whether what a reader claims is in some subfolders, and histories that it can't read in others."""
    if any(folder.glob("*tfevents*")):
        return False
    return any(not reader.claims(sub) and _candidates(sub) for sub in _subfolders(folder))


def _trainer_state(folder: Path) -> Path | None:
    """Hugging Face's record of a training: the folder's own, or that of its latest checkpoint."""
    numbers = {int(n): p for p in folder.glob("checkpoint-*") if (n := p.name.rpartition("-")[2]).isdecimal()}
    for place in (folder, *(numbers[n] for n in sorted(numbers, reverse=True))):
        if (place / "trainer_state.json").is_file():
            return place / "trainer_state.json"
    return None


def _candidates(folder: Path) -> list[Path]:
    """The files of a folder that may be histories; one of the usual names alone, if it is there."""
    files = [
        file
        for file in sorted(islice(folder.iterdir(), _MEMBERS))
        if file.suffix.lower() in _SUFFIXES
        and file.is_file()
        and not file.name.startswith((".", "tokenizer", "wandb-"))
        and file.stem.lower() not in _SETTINGS
        and not file.stem.lower().endswith("config")
    ]
    usual = [file for file in files if file.stem.lower() in _USUAL]
    return usual if len(usual) == 1 else files


def _several(folder: Path, files: list[Path], format: str | None) -> list[History]:
    """What several files hold: the panels of W&B charts are put together by run, else only one file may be readable."""
    read: dict[Path, list[History]] = {}
    for file in files[:100]:
        try:
            read[file] = _in_file(file, format)
        except ValueError:
            continue
    if len(read) == 1:
        return next(iter(read.values()))
    if read and all(h.format == "W&B CSV" for found in read.values() for h in found):
        runs: dict[str, History] = {}
        for found in read.values():
            for h in found:
                known = runs.setdefault(h.name, replace(h, given={}, notices=(), path=folder))
                given = {
                    **known.given,
                    **{k if k not in known.given else f"{k} ({h.path.stem})": s for k, s in h.given.items()},
                }
                runs[h.name] = replace(known, given=given, notices=tuple(dict.fromkeys(known.notices + h.notices)))
        return list(runs.values())
    which = ", ".join(repr(file.name) for file in (read or files))
    raise ValueError(f"{folder} holds {len(read or files)} files that may be histories: give one of them: {which}")


def _beside(found: list[History], folder: Path) -> list[History]:
    """With what else is in the folder said, and the settings that stand there."""
    if other := [file.name for file in _candidates(folder) if file.stem.lower() in _USUAL]:
        said = f"{other[0]!r} is in the folder, too, and was not read."
        found = [replace(history, notices=(*history.notices, said)) for history in found]
    return found


def _with_settings(found: list[History], path: Path) -> list[History]:
    """With the hyper-parameters that Lightning's loggers put beside their metrics."""
    if path.name != "metrics.csv":
        return found
    from intaglio.history.formats.columns import settings

    notices: list[str] = []
    config = settings(path.with_name("hparams.yaml"), notices)
    tags = path.with_name("meta_tags.csv")
    if tags.is_file() and tags.stat().st_size < 1 << 20:
        lines = tags.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        config |= {key: value for key, _, value in (line.partition(",") for line in lines) if key}
    return [replace(h, config={**config, **h.config}, notices=(*h.notices, *notices)) for h in found]


def _packed(path: Path) -> list[History]:
    """The histories in an archive, unpacked into a folder that is gone afterwards."""
    with _reader("archives").unpacked(path) as place:
        where = str(place.parent)

        def outside(text: str) -> str:
            return text.replace(where, str(path))

        try:
            found = _in_folder(place, None) if place.is_dir() else _in_file(place, None)
        except ValueError as error:
            raise ValueError(outside(str(error))) from None
        return [replace(h, path=path, notices=tuple(map(outside, h.notices))) for h in found]
