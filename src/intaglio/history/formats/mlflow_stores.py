"""Reader of MLflow's stores: the folder ``mlruns`` (or an experiment or a run in it) and the SQLite ``mlflow.db``.

Both are plain, text files and four tables, and importing mlflow takes a second and 120 MB of packages: they are read
as they stand. The test writes them with mlflow itself.
"""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from intaglio.history.foreign import History
from intaglio.history.formats.columns import Columns, distinct, in_order, settings

_SQLITE = b"SQLite format 3\0"
_STATUS = {"FINISHED": "finished", "3": "finished", "FAILED": "crashed", "4": "crashed", "KILLED": "crashed"}
_STATUS |= {"5": "crashed", "RUNNING": "running", "1": "running"}
_LARGEST = 1.7976931348623157e308  # a database holds it for an infinity
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False}


def claims(path: Path) -> bool:
    """Whether ``path`` looks like a run, an experiment or a store of MLflow."""
    try:
        if path.is_dir():
            return (path / "mlflow.db").is_file() or bool(_runs(path))
        with path.open("rb") as file:
            return file.read(16) == _SQLITE
    except OSError:
        return False


def read(path: Path) -> list[History]:
    """One history for each run at ``path`` that logged a number and is not deleted.

    Raises:
        ValueError: there is none; says why.
    """
    try:
        if path.is_dir() and not _runs(path):
            path = path / "mlflow.db"
        runs = [_read_folder(run) for run in _runs(path)] if path.is_dir() else _read_database(path)
    except (OSError, sqlite3.Error, OverflowError) as e:
        raise ValueError(f"{path} cannot be read as an MLflow store: {e}") from None
    logged = sorted((run for run in runs if run.columns.first()), key=lambda run: run.started)
    if not logged:
        raise ValueError(f"{path} holds no MLflow run with a metric: {len(runs)} without one, or deleted")
    names = distinct([run.name for run in logged], [run.id[:8] for run in logged])
    return [_history(run, name) for run, name in zip(logged, names, strict=True)]


@dataclass
class _Run:
    """What a store says of a run."""

    path: Path
    id: str
    name: str
    status: str = ""
    started: int = 0
    columns: Columns = field(default_factory=Columns)
    config: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def _history(run: _Run, name: str) -> History:
    given, axis, notices = in_order(run.columns.arrays(), "step")
    return History(name, run.path, "MLflow", axis, given, (*run.notices, *notices), run.config, run.status)


def _runs(path: Path) -> list[Path]:
    """The folders of the runs in a run, an experiment, a store, or a folder with a store."""
    if (path / "meta.yaml").is_file() and (path / "metrics").is_dir():
        return [path]
    for pattern in ("*/meta.yaml", "*/*/meta.yaml", "mlruns/*/*/meta.yaml"):
        found = [meta.parent for meta in sorted(path.glob(pattern)) if (meta.parent / "metrics").is_dir()]
        if found:
            return found
    return []


def _read_folder(path: Path) -> _Run:
    notices: list[str] = []
    meta = settings(path / "meta.yaml", notices)
    run = _Run(path, path.name, str(meta.get("run_name") or path.name), _STATUS.get(str(meta.get("status")), ""))
    run.started = meta["start_time"] if isinstance(meta.get("start_time"), int) else 0
    run.notices = notices
    if meta.get("lifecycle_stage") == "deleted":
        return run
    for name, file in _files(path / "metrics"):
        damaged = 0
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                _, value, step, *_ = *line.split(" "), "", ""  # time value step; before MLflow 1.0 no step
                try:
                    run.columns.add(name, int(step or 0), float(value))
                except (ValueError, OverflowError):
                    damaged += 1
        if damaged:
            notices.append(f"{damaged} damaged lines of metrics/{name} are left out.")
    run.config = {name: _value(file.read_text("utf-8", errors="replace")) for name, file in _files(path / "params")}
    return run


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below a folder with their names in it: a name with slashes is a path."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file


def _value(text: str) -> Any:
    """A parameter, which MLflow keeps as the text of a Python value."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return _CONSTANTS.get(text, text)


def _read_database(path: Path) -> list[_Run]:
    """The runs in a SQLite store; a damaged table of metrics is read up to the damage.

    Raises:
        ValueError: it is no store of MLflow.
        sqlite3.Error: its tables of runs cannot be read.
    """
    with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as store:
        store.text_factory = lambda data: data.decode(errors="replace")
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if missing := {"runs", "metrics", "params", "tags"} - tables:
            raise ValueError(f"{path} is a database, but no MLflow store: it has no table {', '.join(sorted(missing))}")
        tags = dict(store.execute("SELECT run_uuid, value FROM tags WHERE key = 'mlflow.runName'"))
        runs = {
            run: _Run(path, str(run), str(name or tags.get(run) or run), _STATUS.get(str(status), ""))
            for run, name, status in store.execute(
                "SELECT run_uuid, name, status FROM runs WHERE lifecycle_stage IS NOT 'deleted' ORDER BY start_time"
            )
        }
        for run, key, value in store.execute("SELECT run_uuid, key, value FROM params"):
            if run in runs:
                runs[run].config[str(key)] = _value(str(value))
        notices = []
        damaged, most = 0, path.stat().st_size  # a row takes more than a byte: pages that form a ring would give more
        try:
            for row, (run, key, step, value, is_nan) in enumerate(
                store.execute("SELECT run_uuid, key, step, value, is_nan FROM metrics ORDER BY rowid")
            ):
                if row > most:
                    raise sqlite3.DatabaseError("its pages go round in a ring")
                try:
                    if run in runs:
                        runs[run].columns.add(str(key), step, _float(value, is_nan))
                except (TypeError, ValueError, OverflowError):
                    damaged += 1
        except sqlite3.DatabaseError as e:
            notices.append(f"The table of metrics is damaged ({e}): it was read up to there.")
        if damaged:
            notices.append(f"{damaged} rows of the table of metrics are no numbers: they are left out.")
        for run in runs.values():
            run.notices += notices
        return list(runs.values())


def _float(value: float, is_nan: int) -> float:
    """A value of the table: NaN has a column of its own, an infinity is the largest number."""
    return math.nan if is_nan else math.copysign(math.inf, value) if abs(value) == _LARGEST else float(value)
