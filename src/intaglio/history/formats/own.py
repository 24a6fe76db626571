"""Reader of our own run folders, ``metrics.jsonl`` and ``metrics.parquet``: names and nulls as they stand."""

import json
import warnings
from pathlib import Path
from typing import Any

from intaglio.history.foreign import History
from intaglio.history.formats.columns import settings
from intaglio.history.series import Series
from intaglio.history.table import COLUMNS, DamagedHistory, read_history


def claims(path: Path) -> bool:
    """Whether ``path`` is a history that intaglio wrote, or a run folder with one."""
    if path.is_dir():
        return (path / "run.json").is_file() and any(map(claims, _tables(path)))
    if path.suffix == ".parquet":
        with path.open("rb") as file:
            file.seek(-min(path.stat().st_size, 8192), 2)
            tail = file.read()
        return path.name == "metrics.parquet" and all(name.encode() in tail for name in COLUMNS)
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        first = file.readline(4096)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and tuple(row) == COLUMNS


def _tables(folder: Path) -> list[Path]:
    return [path for name in ("metrics.jsonl", "metrics.parquet") if (path := folder / name).is_file()]


def read(path: Path) -> list[History]:
    """The run at ``path``.

    Raises:
        ValueError: its table is damaged from the first row on, or of another form.
    """
    folder, source = (path, _tables(path)[0]) if path.is_dir() else (path.parent, path)
    notices: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamagedHistory)
        try:
            table = read_history(source)
        except (TypeError, OverflowError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{source} is damaged: a row holds something else than it should ({error})") from None
    notices += [str(warning.message) for warning in caught if warning.category is DamagedHistory]
    table = table.unique(["name", "step"], keep="last", maintain_order=True).sort("name", "step", maintain_order=True)
    names, steps = table["name"].to_list(), table["step"].to_numpy()
    numbers = [table[c].cast(float).fill_null(float("nan")).to_numpy() for c in ("value", "null", "n")]
    first = [k for k in range(len(names)) if k == 0 or names[k] != names[k - 1]]
    given = {
        names[a]: Series(steps[a:b], *(x[a:b] for x in numbers))
        for a, b in zip(first, [*first[1:], len(names)], strict=True)
    }
    record = _record(folder)
    config = settings(folder / "config.yaml", notices)
    status = {"finished": "finished", "running": "running"}.get(str(record.get("status")), "")
    name = str(record.get("name") or folder.name or source.stem)
    return [History(name, path, "intaglio", "step", given, tuple(notices), config, status)]


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
