"""Reader of TensorBoard event files, and of folders of them, however they are nested.

The records are parsed by tensorboard's own protobuf classes and checked by its CRC. Its event file loader is not used:
it passes over damage without a word, and it imports all of TensorFlow where that is installed.
"""

import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.history.foreign import History
from intaglio.history.formats.columns import Columns, damage, few, in_order, settings

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "eval", "evaluation"}
_SMALL = 4096
_MOST_FOLDERS = 2000
_KINDS = {"histo": "histogram", "image": "image", "audio": "audio"}
_TIME = re.compile(r"\d+[.]\d+")
_PLAIN = {"number_value", "string_value", "bool_value"}
_BFLOAT16 = 14
# Of TensorProto's types: how its content is packed, and the field that holds it otherwise; half floats are bits there.
_TENSORS = {
    1: ("<f4", "float_val"),
    2: ("<f8", "double_val"),
    3: ("<i4", "int_val"),
    9: ("<i8", "int64_val"),
    10: ("?", "bool_val"),
    _BFLOAT16: ("<u2", "half_val"),
    19: ("<f2", "half_val"),
}


def claims(path: Path) -> bool:
    """Whether ``path`` looks like an event file, or a folder with one in it at any depth."""
    try:
        if path.is_dir():
            return any(_event_files(names) for _, _, names in islice(os.walk(path), _MOST_FOLDERS))
        if ".tfevents." in path.name:
            return path.is_file()
        with path.open("rb") as file:
            return b"brain.Event:" in file.read(64)
    except OSError:
        return False


def read(path: Path) -> list[History]:
    """One history for each run at ``path``.

    The folders ``train`` and ``validation`` that Keras makes are one run, as are a folder and those that torch's
    ``add_scalars`` and ``add_hparams`` put into it. Files of one folder belong together unless each begins at the
    beginning: then every file is a run.

    Raises:
        ValueError: there is no scalar to read; says why.
    """
    try:
        folders = list(_folders(path)) if path.is_dir() else [(path.parent, [path])]
        runs: dict[Path, list[_Run]] = {}
        failures: list[str] = []
        for folder, files in folders:
            runs[folder] = _runs(files, failures)
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    root = path if path.is_dir() else path.parent
    trials = Counter(folder.parent for folder in runs if _TIME.fullmatch(folder.name))
    for folder in sorted(runs, key=lambda folder: len(folder.parts), reverse=True):
        if folder != root:
            _join(folder, runs, trials)
    histories = [
        _history(run, folder, root, f" ({number})" if len(found) > 1 else "")
        for folder, found in sorted(runs.items(), key=lambda item: _natural(item[0]))
        for number, run in enumerate(found, 1)
        if run.columns.first()
    ]
    if not histories:
        seen = sum((run.left_out for found in runs.values() for run in found), Counter())
        what = f"only {_counted(seen)}" if seen else few(failures, 2) or "its event files are empty"
        raise ValueError(f"{path} holds no TensorBoard scalars: {what}")
    if failures:
        said = f"{len(failures)} event files could not be read: {few(failures, 2)}."
        histories[0] = replace(histories[0], notices=(*histories[0].notices, said))
    return histories


@dataclass
class _Run:
    """What some event files say."""

    files: list[Path]
    columns: Columns = field(default_factory=Columns)
    left_out: Counter[str] = field(default_factory=Counter)
    config: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def take(self, other: "_Run", renamed: Mapping[str, str]) -> None:
        """Appends what ``other`` says, some of its tags renamed."""
        self.files += other.files
        self.columns.extend(other.columns, renamed)
        self.left_out += other.left_out
        self.config |= other.config
        self.notices += other.notices


def _folders(path: Path) -> Iterator[tuple[Path, list[Path]]]:
    """The folders with event files in them, and these in the order in which they were begun."""
    for folder, _, names in os.walk(path):
        if files := [Path(folder, name) for name in _event_files(names)]:
            yield Path(folder), sorted(files, key=_begun)


def _event_files(names: list[str]) -> list[str]:
    return [name for name in names if ".tfevents." in name and not name.endswith(".profile-empty")]


def _begun(path: Path) -> tuple[int, str]:
    time = re.search(r"tfevents[.](\d{1,18})", path.name)
    return int(time[1]) if time else 0, path.name


def _natural(path: Path) -> list[str | int]:
    """Sorts version_10 after version_9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _runs(files: list[Path], failures: list[str]) -> list[_Run]:
    """The runs in the event files of one folder, the latest last."""
    runs: list[_Run] = []
    for file in files:
        try:
            found = _read_file(file)
        except (ValueError, OSError) as e:
            failures.append(str(e))
            continue
        if runs and not _begins_anew(runs[-1].columns, found.columns):
            runs[-1].take(found, {})
        else:
            runs.append(found)
    return runs


def _begins_anew(before: Columns, after: Columns) -> bool:
    """Whether all that both hold goes back to its beginning; a single value that has no step does not."""
    first, again = before.first(), after.first()
    shared = first.keys() & again.keys()
    return all(again[tag] <= first[tag] for tag in shared) and any(len(after.arrays()[tag][0]) > 1 for tag in shared)


def _join(folder: Path, runs: dict[Path, list[_Run]], trials: Counter[Path]) -> None:
    """Gives what a folder holds to the run in the folder above, where it is a part of that run and no trial of many."""
    mine, theirs, name = runs[folder], runs.get(folder.parent, []), folder.name
    tags = list(dict.fromkeys(tag for run in mine for tag in run.columns.first()))
    flat = tags[0].replace("/", "_") + "_" if len(tags) == 1 else ""
    if name.lower() in _SPLITS:
        theirs = runs.setdefault(folder.parent, [_Run([]) for _ in mine])
        renamed = {tag: f"{name}/{tag}" for tag in tags}
    elif flat and name.startswith(flat):  # add_scalars("loss", {"a": …}) writes the tag "loss" into the folder loss_a
        renamed = {tags[0]: f"{tags[0]}/{name.removeprefix(flat)}"}
    elif trials[folder.parent] == 1 and _TIME.fullmatch(name) and any(run.config for run in mine):  # add_hparams
        there = {tag for run in theirs for tag in run.columns.first()}
        renamed = {tag: f"{name}/{tag}" for tag in tags if tag in there}
    else:
        return
    if len(theirs) == len(mine):
        for their, run in zip(theirs, mine, strict=True):
            their.take(run, renamed)
        del runs[folder]


def _history(run: _Run, folder: Path, root: Path, suffix: str) -> History:
    below = folder.relative_to(root).as_posix()
    name = (root.resolve().name if below == "." else below) + suffix
    given, axis, notices = in_order(run.columns.arrays(), "step")
    config = run.config | settings(folder / "hparams.yaml", run.notices)
    if run.left_out:
        notices.append(f"Left out, since they are no scalars: {_counted(run.left_out)}.")
    path = run.files[0] if len(run.files) == 1 else folder
    return History(name, path, "TensorBoard events", axis, given, (*run.notices, *notices), config)


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items()))


def _read_file(path: Path) -> _Run:
    """What one event file says, up to its end or to the first damage.

    Raises:
        ValueError: it is no event file.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto import event_pb2  # type: ignore[import-untyped]

    run = _Run([path])
    event_of, add = event_pb2.Event.FromString, run.columns.add
    plugins: dict[str, str] = {}
    unknown = 0
    for record in _records(path, run.notices):
        try:
            event = event_of(record)
        except DecodeError:
            unknown += 1
            continue
        step = event.step
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                add(value.tag, step, value.simple_value)
                continue
            plugin = value.metadata.plugin_data.plugin_name or plugins.get(value.tag, "")
            if plugin == "hparams":
                run.config |= _hparams(value.metadata.plugin_data.content)
                continue
            plugins.setdefault(value.tag, plugin)
            number = _number(value.tensor) if kind == "tensor" and plugin in {"", "scalars"} else None
            if number is not None:
                add(value.tag, step, number)
            elif kind:
                run.left_out[_KINDS.get(kind) or plugin or kind] += 1
    if unknown:
        run.notices.append(f"{unknown} records of {path.name} could not be understood.")
    return run


def _records(path: Path, notices: list[str]) -> Iterator[bytes]:
    """The records of a TFRecord file, up to its end or to the first damage, which is noticed.

    The CRC of large ones (images, graphs) is not checked: nothing of them is kept, and it is slow.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # type: ignore[import-untyped]

    at, size, cut = 0, path.stat().st_size, True
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length, crc = struct.unpack("<QI", head)
            cut = masked_crc32c(head[:8]) == crc
            if not cut or length > size - at - 16:
                break
            record, crc = file.read(length), int.from_bytes(file.read(4), "little")
            cut = length > _SMALL or masked_crc32c(record) == crc
            if not cut:
                break
            at += 16 + length
            yield record
    if at == 0:
        kind = "no TensorBoard event file, or its beginning is damaged" if size else "empty"
        raise ValueError(f"{path.name} is {kind}")
    if at < size:
        notices.append(damage(path, at, size, cut))


def _number(tensor: Any) -> float | None:
    """The number in a TensorProto that holds exactly one."""
    packed, field_name = _TENSORS.get(tensor.dtype, ("", ""))
    if not packed:
        return None
    kind = np.dtype(packed)
    values = getattr(tensor, field_name)
    if tensor.tensor_content:
        if len(tensor.tensor_content) != kind.itemsize:
            return None
        value = np.frombuffer(tensor.tensor_content, kind)
    elif len(values) == 1:
        value = np.array([values[0] & 0xFFFF], np.uint16).view(kind) if field_name == "half_val" else np.array(values)
    else:
        return None
    if tensor.dtype == _BFLOAT16:
        value = (value.astype(np.uint32) << 16).view(np.float32)
    return float(value[0])


def _hparams(content: bytes) -> dict[str, Any]:
    """The settings of a session's start, as the plugin hparams writes them; {} for its other records."""
    from google.protobuf.message import DecodeError
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]

    try:
        given = HParamsPluginData.FromString(content).session_start_info.hparams
    except DecodeError:
        return {}
    return {name: getattr(value, kind) for name, value in given.items() if (kind := value.WhichOneof("kind")) in _PLAIN}
