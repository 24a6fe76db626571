"""Reader of W&B run folders, offline and online, of old versions and new, and of single ``.wandb`` files.

A ``.wandb`` file is a log of protobuf records in LevelDB's framing (blocks of 32 KiB, a CRC-32 for each piece). The
library wandb itself (0.31) has no reader for it any more; so the framing is read here, and the few fields that matter
are named by their numbers in its ``wandb_internal.proto``. The library is not needed, and its test writes with it.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.history.foreign import History
from intaglio.history.formats.columns import Columns, damage, distinct, few, in_order, number, settings
from intaglio.history.series import Series

_HISTORY, _SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
_BLOCK = 32_768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_BOOKKEEPING = ("_wandb", "_timestamp")
_STEPS = ("global_step", "step", "steps", "iteration", "iterations", "iter", "iters", "epoch", "epochs")
_STATES = {"finished": "finished", "failed": "crashed", "crashed": "crashed", "killed": "crashed"}

# Message → field → (number, type); * for repeated. Strings are bytes here, so that a bad one spoils no record.
_SCHEMA = {
    "Record": {
        "history": (2, "History"),
        "summary": (3, "Items"),
        "config": (5, "Items"),
        "metric": (12, "Metric"),
        "run": (17, "Run"),
        "exit": (18, "Exit"),
    },
    "History": {"item": (1, "Item*"), "step": (2, "Step")},
    "Step": {"num": (1, "int64")},
    "Items": {"update": (1, "Item*")},
    "Item": {
        "key": (1, "bytes"),
        "nested_key": (2, "bytes*"),
        "boolean": (4, "bool"),
        "integer": (5, "int64"),
        "number": (6, "double"),
        "json": (8, "bytes"),
        "value_json": (16, "bytes"),
    },
    "Metric": {"step_metric": (4, "bytes")},
    "Run": {
        "run_id": (1, "bytes"),
        "config": (4, "Items"),
        "display_name": (8, "bytes"),
        "starting_step": (14, "int64"),
    },
    "Exit": {"exit_code": (1, "int32")},
}


def claims(path: Path) -> bool:
    """Whether ``path`` looks like a ``.wandb`` file, a run's folder or a folder of such."""
    try:
        if path.is_dir():
            return bool(_sources(path))
        if path.suffix == ".wandb" or path.name in {_HISTORY, _SUMMARY}:
            return path.is_file()
        with path.open("rb") as file:
            return file.read(4) == b":W&B"
    except OSError:
        return False


def read(path: Path) -> list[History]:
    """One history for each run at ``path``; of several, those that cannot be read are noticed.

    Raises:
        ValueError: no run there can be read; says why.
    """
    histories, failures = [], []
    try:
        if path.name in {_HISTORY, _SUMMARY}:
            path = path.parent.parent if path.parent.name == "files" else path.parent
        sources = _sources(path) if path.is_dir() else [path]
        for source in sources:
            try:
                histories.append(_history(source))
            except (ValueError, OSError, RecursionError) as e:
                failures.append(str(e))
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    if not histories:
        nothing = f"{path} holds no W&B run: neither a .wandb file nor {_HISTORY} nor {_SUMMARY}"
        raise ValueError(failures[0] if failures else nothing)
    marks = [history.path.stem.removeprefix("run-") for history in histories]
    names = distinct([history.name for history in histories], marks)
    histories = [replace(history, name=name) for history, name in zip(histories, names, strict=True)]
    if failures:
        said = f"{len(failures)} of {len(sources)} runs hold nothing that can be read: {few(failures, 2)}."
        histories[0] = replace(histories[0], notices=(*histories[0].notices, said))
    return histories


def _sources(path: Path) -> list[Path]:
    """The ``.wandb`` files in a folder, or in the run folders in it or in its folder wandb; for a run folder without
    such a file, the folder."""
    files = sorted(path.glob("*.wandb"))
    if files:
        return files
    if any((path / where / name).is_file() for where in ("", "files") for name in (_HISTORY, _SUMMARY)):
        return [path]
    runs = [
        run
        for folder in (path, path / "wandb")
        if folder.is_dir()
        for run in sorted(folder.iterdir())
        if re.match(r"(offline-)?run-", run.name) and run.is_dir() and not run.is_symlink()
    ]
    return [source for run in runs for source in _sources(run)]


@dataclass
class _Run:
    """What the files of a run say: its numbers with the row in which each was logged, and the rest."""

    columns: Columns = field(default_factory=Columns)
    rows: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: list[str] = field(default_factory=list)
    name: str = ""
    status: str = ""
    notices: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        """A value of the current row; mappings are taken apart as W&B does it: ``train.loss``."""
        if isinstance(value, dict) and "_type" not in value:
            for key, inner in value.items():
                self.add(f"{name}.{key}" if name else str(key), inner)
        elif value is not None and not name.startswith(_BOOKKEEPING):
            found = number(value)
            if found is not None:
                self.columns.add(name, self.rows, found)
            else:
                self.leave_out(name, value["_type"] if isinstance(value, dict) else type(value).__name__)

    def leave_out(self, name: str, kind: Any) -> None:
        """Remembers a name whose values are no numbers."""
        self.left_out.setdefault(name, str(kind)[:40])


def _history(source: Path) -> History:
    run = _Run()
    if source.is_file():
        form = "W&B offline run" if source.parent.name.startswith("offline-") else "W&B run"
        try:
            _read_log(source, run)
        except ValueError as e:
            run.notices.append(f"{e}.")
        alone = len(list(source.parent.glob("*.wandb"))) == 1
        beside = [source.parent / "files", source.parent] if alone else []
    else:
        form = "W&B history"
        beside = [source / "files", source]
        for file in (folder / _HISTORY for folder in beside):
            if not run.rows and file.is_file():
                _read_lines(file, run)
    for folder in beside:
        run.config = _plain(settings(folder / "config.yaml", run.notices)) | run.config
        run.summary = run.summary or _loaded(folder / _SUMMARY, run)
        run.status = run.status or _STATES.get(str(_loaded(folder / "wandb-metadata.json", run).get("state")), "")
    given, axis, notices = _series(run)
    if not given and run.summary:
        form = "W&B summary"
        last = _Run()
        last.add("", run.summary)
        last.rows = 1
        given, axis, notices = _series(last)
        notices.append("There is no history here, only the summary: the last value of each metric.")
    if not given:
        raise ValueError(
            f"{source.name}: no number was logged{': ' * bool(run.notices)}{' '.join(run.notices)}".rstrip(".")
        )
    if run.left_out:
        kinds = few(f"{name} ({kind})" for name, kind in sorted(run.left_out.items()))
        notices.append(f"Left out, since they are no numbers: {kinds}.")
    name = run.name or re.sub(r"^(offline-)?run-(\d{8}_\d{6}-)?", "", (source.resolve()).name.removesuffix(".wandb"))
    return History(name, source, form, axis, given, (*run.notices, *notices), run.config, run.status)


def _series(run: _Run) -> tuple[dict[str, Series], str, list[str]]:
    """Series by name, what their steps count, and notices; nothing where the run has no metric."""
    columns = run.columns.arrays()
    metrics = {name: column for name, column in columns.items() if not name.startswith("_")}
    axis, steps = _axis(run, metrics)
    notices = []
    if axis == "_step":
        if "_step" in columns:
            steps = _by_row(columns["_step"], run.rows)
        firsts = _rounds(run.rows, metrics)
        if firsts is not None:
            steps = steps[firsts]
            notices.append("The metrics were logged one by one: those of a round stand at the step of its first call.")
    whole = np.abs(steps) < 2**53  # NaN is not
    if not whole.all():
        notices.append(f"{(~whole).sum()} of {run.rows} rows have no {axis}: they are left out.")
    placed = {}
    for name, (rows, values) in sorted(columns.items()):  # the order in the file is W&B's, and random
        kept = whole[rows]
        if name.startswith("_") or _counts(name):
            kept &= np.append(np.diff(steps[rows]) != 0, True)
        if name not in {axis, "_step"} and kept.any():
            placed[name] = steps[rows][kept].astype(np.int64), values[kept]
    if not placed.keys() & metrics.keys():
        return {}, axis, []
    given, axis, more = in_order(placed, axis)
    return given, axis, notices + more


def _counts(name: str) -> bool:
    """Whether a metric is one by its name that counts steps."""
    return _last_word(name) in _STEPS


def _last_word(name: str) -> str:
    return re.split(r"[/.]", name.lower())[-1]


def _rounds(rows: int, metrics: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray | None:
    """For each row the first of its round (rows,), where metrics were logged by calls of their own, so that no two
    share a step: a round goes on until one of its metrics comes again. None where rounds are single rows mostly."""
    logged = [own for name, (own, _) in metrics.items() if not _counts(name)]
    if not logged or rows <= 1.5 * max(map(len, logged)):
        return None
    before = np.full(rows, -1)  # the latest row that has a metric of this row, too
    for own in logged:
        before[own[1:]] = np.maximum(before[own[1:]], own[:-1])
    firsts, first = np.empty(rows, np.int64), 0
    for row, latest in enumerate(before.tolist()):
        first = row if latest >= first else first
        firsts[row] = first
    return firsts if rows > 1.5 * len(np.unique(firsts)) else None


def _axis(run: _Run, metrics: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[str, np.ndarray]:
    """The step that the user logged, if it is there for every number of every metric and goes on with each but a few,
    and its value in each row (rows,); otherwise W&B's own ``_step``, which counts the calls of ``log``."""
    words: dict[str, list[str]] = {word: [] for word in _STEPS}
    for name in metrics:
        words.get(_last_word(name), []).append(name)
    candidates = [*run.step_metrics, *(name for names in words.values() for name in names)]
    for axis in [name for name in dict.fromkeys(candidates) if name in metrics][:12]:
        steps = _by_row(metrics[axis], run.rows)
        of_others = [steps[rows] for name, (rows, _) in metrics.items() if name != axis]
        with np.errstate(invalid="ignore"):
            if of_others and all(_goes_on(own) for own in of_others):
                return axis, steps
    return "_step", np.arange(run.rows, dtype=float)


def _goes_on(steps: np.ndarray) -> bool:
    """Whether steps (n,) are whole, never go back, and hardly ever stand still, as at a last evaluation."""
    ahead = np.diff(steps)
    return bool((steps % 1 == 0).all() and (ahead >= 0).all() and (ahead == 0).sum() <= max(1, len(steps) // 50))


def _by_row(column: tuple[np.ndarray, np.ndarray], rows: int) -> np.ndarray:
    """Values (rows,), NaN where there are none."""
    by_row = np.full(rows, np.nan)
    by_row[column[0]] = column[1]
    return by_row


def _read_log(path: Path, run: _Run) -> None:
    """What a ``.wandb`` file tells, up to its end or to the first damage."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    record_of = _record_type().FromString
    unknown, ended = 0, False
    damages: list[str] = []
    for data in _records(path, damages):
        try:
            record = record_of(data)
        except DecodeError:
            unknown += 1
            continue
        if record.HasField("history"):
            run.columns.add("_step", run.rows, record.history.step.num)
            for name, value in _items(record.history.item).items():
                run.add(name, value)
            run.rows += 1
        elif record.HasField("run"):
            run.name = _text(record.run.display_name) or _text(record.run.run_id)
            run.config.update(_items(record.run.config.update))
            if record.run.starting_step > 0:
                run.notices.append(f"The run was resumed: {path.name} begins at step {record.run.starting_step}.")
        elif record.HasField("config"):
            run.config.update(_items(record.config.update))
        elif record.HasField("summary"):
            run.summary.update(_items(record.summary.update))
        elif record.HasField("metric"):
            run.step_metrics.append(_text(record.metric.step_metric))
        elif record.HasField("exit"):
            ended, run.status = True, "crashed" if record.exit.exit_code else "finished"
    if unknown:
        run.notices.append(f"{unknown} records of {path.name} could not be understood.")
    run.notices += damages
    if not ended and not damages:
        run.notices.append(f"{path.name} has no record of the run's end: it was killed, or was still running.")
    run.config = _plain(run.config)


def _records(path: Path, notices: list[str]) -> Iterator[bytes]:
    """The records of a log in LevelDB's framing, up to its end or to the first damage, which is noticed.

    Source: the format's description in LevelDB, doc/log_format.md; W&B puts 7 bytes before it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start, at, block = 0, 7, file.read(_BLOCK)
        if block[:4] != b":W&B":
            raise ValueError(f"{path.name} is {'no .wandb file: it does not begin with :W&B' if size else 'empty'}")
        if block[4:7] != b"\xe1\xbe\x00":
            raise ValueError(f"{path.name} is cut off or in a version of the .wandb format that is not known here")
        pieces: list[bytes] = []
        while len(block) - at >= 7 or len(block) == _BLOCK:
            if len(block) - at < 7:
                start, at, block = start + _BLOCK, 0, file.read(_BLOCK)
                continue
            crc, length, kind = struct.unpack_from("<IHB", block, at)
            data = block[at + 7 : at + 7 + length]
            fits = kind in ((_MIDDLE, _LAST) if pieces else (_FULL, _FIRST))
            if not fits or len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != crc:
                break
            at += 7 + length
            pieces.append(data)
            if kind in (_FULL, _LAST):
                yield b"".join(pieces)
                pieces = []
        if pieces or start + at < size:
            cut = len(block) - at < 7 or len(data) < length
            notices.append(damage(path, start + at, size, cut))


@cache
def _record_type() -> Any:
    """The protobuf class of ``_SCHEMA``."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

    file = descriptor_pb2.FileDescriptorProto(name="wandb_runs.proto", package="w")
    for message, fields in _SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, (place, kind) in fields.items():
            made = described.field.add(name=name, number=place)
            made.label = made.LABEL_REPEATED if kind.endswith("*") else made.LABEL_OPTIONAL
            kind = kind.removesuffix("*")
            if kind in _SCHEMA:
                made.type, made.type_name = made.TYPE_MESSAGE, f".w.{kind}"
            else:
                made.type = made.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("w.Record"))


def _items(items: Iterable[Any]) -> dict[str, Any]:
    """Values by name; of an image or a histogram, which newer versions take apart, only its type."""
    found = {}
    for item in items:
        name = _text(item.key or b".".join(item.nested_key))
        spelled = item.value_json or item.json
        if spelled:
            found[name] = _value(spelled)
        else:
            kind = next((kind for kind in ("number", "integer", "boolean") if item.HasField(kind)), None)
            found[name] = getattr(item, kind) if kind else None
    media = {name[:-6]: {"_type": kind} for name, kind in found.items() if name.endswith("._type")}
    return {name: value for name, value in found.items() if not _within(name, media)} | media if media else found


def _within(name: str, media: Mapping[str, Any]) -> bool:
    """Whether a name is that of a part: ``samples.width`` is one of the image ``samples``."""
    while name:
        name = name.rpartition(".")[0]
        if name in media:
            return True
    return False


def _value(spelled: bytes) -> Any:
    """What JSON says, or its text where it is none."""
    try:
        return int(spelled) if spelled.lstrip(b"-").isdigit() else float(spelled)
    except ValueError:
        try:
            return json.loads(spelled)
        except (ValueError, RecursionError):
            return _text(spelled)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _read_lines(path: Path, run: _Run) -> None:
    """The rows of a ``wandb-history.jsonl``; lines that are no JSON are counted."""
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no row")
            except (ValueError, RecursionError):
                damaged += bool(line.strip())
                continue
            run.add("", row)
            run.rows += 1
    if damaged:
        run.notices.append(f"{damaged} damaged lines of {path.name} are left out.")


def _loaded(path: Path, run: _Run) -> dict[str, Any]:
    """The mapping in a JSON file, {} where there is none or it is damaged, which is noticed."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    run.notices.append(f"{path.name} is damaged: it is not used.")
    return {}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without W&B's own entries and without its wrapping: ``{"lr": {"desc": …, "value": 0.1}}``."""
    return {
        key: value["value"]
        if isinstance(value, dict) and "value" in value and value.keys() <= {"desc", "value"}
        else value
        for key, value in config.items()
        if key not in {"_wandb", "wandb_version"}
    }
