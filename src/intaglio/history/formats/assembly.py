"""From a table to the histories in it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from intaglio.history.foreign import History
from intaglio.history.formats import shapes
from intaglio.history.formats.clock import INDEX, Timed, choose, rank, runs, sampled
from intaglio.history.formats.tables import Table, count, listed
from intaglio.history.series import Series

_VECTOR = 16


def histories(table: Table, path: Path, format: str, name: str) -> list[History]:
    """The runs of a table, whatever its shape; ``name`` is for a run that the table gives none.

    Raises:
        ValueError: the table has rows, but no numbers.
    """
    if format.startswith("TensorBoard"):
        tag = path.stem.rpartition("tag-")[2]  # its downloads are called run-RUN-tag-TAG
        table = replace(table, columns={tag if k == "Value" else k: column for k, column in table.columns.items()})
    found = [
        _history(timed, path, format, label)
        for label, part in _named(table, name)
        for label, timed in _numbered(label, part)
    ]
    if not found and table.length:
        raise ValueError(f"{path} has no numbers: in a history each row has some, under their names")
    return found or [History(name, path, format, "row", {}, (*table.notices, "No row was logged."), table.config)]


def _named(table: Table, name: str) -> Iterator[tuple[str, Table]]:
    """Tables of one run, or of several in sequence, with their names."""
    for run, panel in (shapes.panels(table) or {"": table}).items():
        part = shapes.phased(shapes.pivoted(panel))
        if part.lists and not (part.columns and shapes.width(part) <= _VECTOR and rank(choose(part)[0] or "") != INDEX):
            yield from shapes.curves(part)
            continue
        if part.lists:
            part = shapes.spread(part)
        if not part.columns:
            continue
        for label, group in shapes.grouped(shapes.unblanked(part)):
            yield ", ".join(filter(None, (run, label))) or name, group


def _numbered(name: str, table: Table) -> list[tuple[str, Timed]]:
    """The runs of a table, with names by what differs between them, or by numbers."""
    timed = list(runs(table))
    if len(timed) < 2:
        return [(name, one) for one in timed]
    settings = [_settings(one.table) for one in timed]
    differing = [
        key
        for key in settings[0]
        if all(key in other for other in settings) and len({str(other[key]) for other in settings}) > 1
    ]
    marks = [", ".join(f"{key}={own[key]}" for key in differing[:4]) for own in settings]
    if len(set(marks)) < len(marks):
        marks = [f"{mark + ', ' if mark else ''}{k} of {len(timed)}" for k, mark in enumerate(marks, 1)]
    return [
        (
            f"{name} ({mark})",
            replace(one, table=replace(one.table, config={**one.table.config, **{k: own[k] for k in differing}})),
        )
        for mark, own, one in zip(marks, settings, timed, strict=True)
    ]


def _settings(table: Table) -> dict[str, float | str]:
    """What stays the same in a run: its constant columns."""
    fixed: dict[str, float | str] = {
        name: float(column.values[0])
        for name, column in table.columns.items()
        if len(column) > 1
        and rank(name) is None
        and column.values[0] == column.values[-1]
        and not np.ptp(column.values)
    }
    return fixed | shapes.constant_texts(table)[0]


def _history(timed: Timed, path: Path, format: str, name: str) -> History:
    table, notices = timed.table, list(timed.table.notices)
    fixed, others = shapes.constant_texts(table)
    if others:
        notices.append(f"{listed(others)}: text, left out.")
    given, said = series(timed)
    notices += said
    steps = timed.steps if np.all(np.diff(timed.steps) > 0) else np.unique(timed.steps)
    if timed.axis != "row" and sampled(steps):
        notices.append(
            f"The steps are irregular ({len(steps):,} of {int(np.ptp(steps)) + 1:,}): the history is a sample, as "
            "W&B's exports are, or was logged by the clock; what lay between its rows is not known."
        )
    if not given:
        notices.append("No number was logged.")
    elif all(len(s) == 1 for s in given.values()):
        notices.append("Only one row was logged.")
    axis = "row" if rank(timed.axis) == INDEX else timed.axis
    return History(name, path, format, axis, given, tuple(notices), {**table.config, **fixed})


def series(timed: Timed) -> tuple[Mapping[str, Series], list[str]]:
    """Every metric over its own steps, ascending, and what had to be put right."""
    given: dict[str, Series] = {}
    repeated: dict[str, int] = {}
    turned: dict[str, int] = {}
    replaced: dict[str, int] = {}
    every = _order(timed.steps)
    steady = timed.steps if every[0] is None else timed.steps[every[0]]
    for name, column in timed.table.columns.items():
        if name == timed.axis or not len(column) or (rank(name) == INDEX and np.all(np.diff(column.values) > 0)):
            continue
        steps = steady if column.rows is None else timed.steps[column.rows]
        kept, twice, back, again = every if column.rows is None else _order(steps)
        values = column.values if kept is None else column.values[kept]
        given[name] = Series.of(steps if kept is None or column.rows is None else steps[kept], values)
        for found, number in ((repeated, twice), (turned, back), (replaced, again)):
            if number and rank(name) is None:
                found[name] = number
    said = []
    if repeated:
        rows = count(max(repeated.values()), "row")
        said.append(f"{listed(repeated)}: {rows} with a step that is there again; the last was kept.")
    if turned:
        rows = count(max(turned.values()), "row")
        said.append(f"{listed(turned)}: {rows} after one of a later step; sorted.")
    if replaced:
        rows = count(max(replaced.values()), "row")
        said.append(
            f"{listed(replaced)}: the steps go back, as after a resume; {rows} that were logged again are left out."
        )
    return given, said


def _order(steps: np.ndarray) -> tuple[np.ndarray | None, int, int, int]:
    """Which rows to keep, in which order (None: all, as they are), and how many repeat, go back, were logged again."""
    gaps = np.diff(steps)
    if np.all(gaps > 0):
        return None, 0, 0, 0
    kept, back = np.arange(len(steps)), 0
    falls = (np.flatnonzero(gaps < 0) + 1).tolist()
    if falls:
        stale = np.zeros(len(steps), bool)
        for fall in falls[:100]:
            before = steps[:fall].max()
            overlap = int(np.argmax(steps[fall:] > before)) if steps[fall:].max() > before else len(steps) - fall
            if overlap > 1:
                stale[:fall] |= steps[:fall] >= steps[fall]
            else:
                back += 1
        kept = kept[~stale]
        kept = kept[np.argsort(steps[kept], kind="stable")]
    last = np.append(np.diff(steps[kept]) != 0, True)
    return kept[last], int(np.sum(~last)), back, len(steps) - len(last)
