"""The shapes that tables of histories come in, brought into one: a row a moment, a column a metric."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from intaglio.history.aliases import SPLITS, vocabulary, words
from intaglio.history.formats.clock import INDEX, counters, densest, filled, rank
from intaglio.history.formats.tables import Column, Table, count, listed, shown

_BOUND = re.compile(r"__(?:MIN|MAX)$")
_METRIC_NAME = frozenset(("metric", "name", "key", "tag", "variable", "scalar", "quantity"))
_VALUE = frozenset(("value", "values", "scalar"))
_RUN = vocabulary("run runs experiment exp trial job model name seed fold replicate repeat rep variant version")
_NUMBERED = frozenset(("id", "number", "no", "idx", "index", "num"))
_PHASE = frozenset(("split", "phase", "mode", "stage", "set", "subset", "partition", "dataset"))


def panels(table: Table) -> dict[str, Table]:
    """The runs of a W&B panel's export, in which each run has a column ``<run> - <metric>``; {} if it is none."""
    axes = [name for name in table.columns if rank(name) is not None or words(name)[:2] == ("relative", "time")]
    names = [name for name in table.columns if name not in axes]
    plain = [name for name in names if not _BOUND.search(name)]
    bounded = [name for name in plain if f"{name}__MIN" in table.columns and f"{name}__MAX" in table.columns]
    if not plain or not (bounded or (axes and not table.texts and all(" - " in name for name in plain))):
        return {}
    found: dict[str, dict[str, Column]] = {}
    spread = [
        name
        for name in bounded
        if any(not np.array_equal(table.dense(name), table.dense(name + end), True) for end in ("__MIN", "__MAX"))
    ]
    for name in plain:
        run, _, metric = name.rpartition(" - ")
        if not bounded and set(words(run)) & (SPLITS.keys() | {"loss", "acc", "accuracy"}):
            return {}
        if rank(metric) is None:
            found.setdefault(run, {})[metric] = table.columns[name]
    said = []
    if spread:
        said = [f"{listed(spread)}: points of W&B's chart that each stand for many rows (their MIN and MAX differ)."]
    own = {name: table.columns[name] for name in axes if rank(name) is not None}
    return {run: replace(table, columns=own | columns).noting(*said) for run, columns in found.items()}


def pivoted(table: Table) -> Table:
    """A long table, with a column of metrics' names and one of values, made wide; any other as it is."""
    named = [k for k in table.texts if len(parts := words(k)) and set(parts) & _METRIC_NAME and len(parts) <= 2]
    valued = [k for k in table.columns if len(parts := words(k)) and set(parts) <= _VALUE]
    if not named or not valued:
        return table
    name = min(named, key=lambda k: words(k)[-1] == "name")
    codes, values = table.texts[name].codes, table.columns[valued[0]]
    at = codes[values.where(table.length)]
    order = np.argsort(at, kind="stable")
    bounds = np.searchsorted(at[order], np.arange(len(table.texts[name].texts) + 1))
    rows = values.where(table.length)
    columns = {k: column for k, column in table.columns.items() if k != valued[0]}
    for metric, (a, b) in zip(table.texts[name].texts, pairwise(bounds), strict=True):
        if b > a:
            columns[metric if metric not in columns else f"{metric} (2)"] = Column(
                values.values[order[a:b]], rows[order[a:b]]
            )
    table = replace(table.without(name), columns=columns)
    nameless = int(np.sum(at < 0))
    return table.noting(f"{count(nameless, 'row')} without {shown(name)} left out.") if nameless else table


def phased(table: Table) -> Table:
    """A table in which a column says to which split each row belongs, with the splits in the metrics' names."""
    for name, text in table.texts.items():
        splits = [words(cell) for cell in text.texts] if len(text.texts) <= 16 else []
        known = [bool(set(parts) & SPLITS.keys()) for parts in splits]
        # "mode" and its like need one known split among their values, any other name needs all to be splits.
        if known and (any(known) if set(words(name)) & _PHASE else all(known) and len(known) > 1):
            break
    else:
        return table
    ranks = counters(table)
    columns: dict[str, Column] = {k: column for k, column in table.columns.items() if k in ranks}
    for k, column in table.columns.items():
        if k in ranks:
            continue
        rows = column.where(table.length)
        for code, cell in enumerate(text.texts):
            inside = text.codes[rows] == code
            if inside.any():
                columns[f"{cell}/{k}"] = Column(column.values[inside], rows[inside])
        blank = text.codes[rows] < 0
        if blank.any():
            columns[k] = Column(column.values[blank], rows[blank])
    return replace(table.without(name), columns=columns)


def grouped(table: Table) -> Iterator[tuple[str, Table]]:
    """The tables of several runs that a column tells apart, with the runs' names; ("", table) if there are none."""
    keys = _keys(table)
    if not keys:
        yield "", table
        return
    codes = _combined([_codes(table, key) for key in keys])
    order = np.argsort(codes, kind="stable")
    table, codes = table.at(order), codes[order]
    bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), table.length]
    said = f"{count(len(bounds) - 1, 'run')} in one file, told apart by {listed(keys)}."
    if len(bounds) > table.length:
        said = f"Each row is a run of its own, named by {listed(keys)}: these are results, no histories."
    # In the order in which the runs begin in the file.
    for start, stop in sorted(pairwise(bounds), key=lambda part: order[part[0]]):
        part = table.part(start, stop)
        label = {key: _label(table, key, start) for key in keys}
        name = ", ".join(
            f"{key}={value}" if len(keys) > 1 or key in table.columns else value for key, value in label.items()
        )
        config = dict(part.config) | {key: value for key, value in label.items() if key in table.texts}
        config |= {key: float(table.dense(key)[start]) for key in keys if key in table.columns}
        yield name, replace(part.without(*keys), config=config).noting(said)


def _label(table: Table, key: str, row: int) -> str:
    return table.texts[key].cell(row) if key in table.texts else f"{table.dense(key)[row]:g}"


def _codes(table: Table, name: str) -> np.ndarray:
    """(n,) integers that are equal where the column's cells are."""
    if name in table.texts:
        return table.texts[name].codes
    return np.unique(table.dense(name), return_inverse=True)[1]


def _combined(codes: list[np.ndarray]) -> np.ndarray:
    """(n,) integers that are equal where all of the codes (n,) are."""
    whole = codes[0]
    for other in codes[1:]:
        whole = np.unique(whole * (int(other.max(initial=0)) + 2) + other, return_inverse=True)[1]
    return whole


def _keys(table: Table) -> list[str]:
    """The columns that tell runs apart: with them the steps of each run are unique, without them they are not."""
    ranks = counters(table)
    rows, counts = densest(table), [filled(table.dense(name)) for name in ranks if ranks[name] < INDEX]
    if counts and np.all(np.diff(counts[0][rows]) > 0):
        return []
    names = [name for name in table.texts if set(words(name)) & _RUN]
    names += [name for name in table.columns if set(words(name)) & _RUN and set(words(name)) <= _RUN | _NUMBERED]
    several = {name: n for name in (*table.texts, *names) if (n := len(np.unique(_codes(table, name)[rows]))) > 1}
    if not counts:
        # Without steps, rows that each have a name of their own are results of as many runs.
        return [k for k in names if k in several and (several[k] <= len(rows) / 2 or several[k] == len(rows))][:1]
    time = [np.unique(x[rows], return_inverse=True)[1] for x in counts]
    distinct = len(np.unique(_combined(time)))
    keys: list[str] = []
    for name in [*(k for k in names if k in several), *(k for k in several if k not in names)]:
        if distinct >= 0.99 * len(rows):
            break
        if several[name] > len(rows) / 2:
            continue
        now = len(np.unique(_combined([*time, *(_codes(table, key)[rows] for key in [*keys, name])])))
        if now > 1.2 * distinct if name in names else now >= 0.99 * len(rows):
            keys, distinct = [*keys, name], now
    return keys


def unblanked(table: Table) -> Table:
    """Without the NaN that stand for blank cells.

    A NaN is a value, unless other columns have values in its row and the column itself goes to and fro: it holds
    numbers where those hold none, or only in every so many rows, or not before its first number.
    """
    ranks = counters(table)
    metrics = {name: column for name, column in table.columns.items() if name not in ranks}
    gaps = {name: np.isnan(column.values) for name, column in metrics.items() if np.isnan(column.values).any()}
    if not gaps:
        return table
    alive = np.zeros(table.length, np.int32)
    for column in metrics.values():
        alive[column.where(table.length)[np.isfinite(column.values)]] += 1
    columns, cleared, lost = dict(table.columns), [], 0
    for name, gap in gaps.items():
        column, rows = metrics[name], metrics[name].where(table.length)
        if gap.all():
            continue
        last = len(gap) - int(np.argmin(gap[::-1]))
        bounds = np.flatnonzero(np.diff(np.concatenate([[False], gap[:last], [False]])))
        if len(gap) - last > max(np.diff(bounds)[::2], default=0):
            gap[last:] = False  # longer than any blank before: the run has come to NaN
        if not gap.any() or not np.all(alive[rows[gap]] > 0):
            continue
        returns = np.count_nonzero(gap[:-1] & ~gap[1:])
        late = gap[0] and returns == 1 and not gap[-1]
        if late or (returns > 1 and gap[:last].mean() >= 0.5) or _complement(table, metrics, name, rows, gap):
            columns[name] = Column(column.values[~gap], rows[~gap])
            cleared.append(name)
            lost += int(gap.sum())
    if not cleared:
        return table
    said = f"{listed(cleared)}: {lost:,} NaN stand where only other columns have values, and were taken for blanks."
    return replace(table, columns=columns).noting(said)


def _complement(table: Table, metrics: dict[str, Column], name: str, rows: np.ndarray, gap: np.ndarray) -> bool:
    """Whether another metric has numbers just where this one (in ``rows``) has NaN that are followed by numbers."""
    finite = np.isfinite(metrics[name].values)
    if not finite[np.argmax(gap) :].any():
        return False
    for other in [k for k in metrics if k != name][:64]:
        there = np.isfinite(metrics[other].dense(table.length))[rows]
        if there[gap].mean() >= 0.9 and there[finite].mean() <= 0.1:
            return True
    return False


def curves(table: Table) -> list[tuple[str, Table]]:
    """The runs of a table in which cells are whole curves, one run a row, with their names."""
    found = []
    for row in range(table.length):
        cells = {name: cells[row] for name, cells in table.lists.items() if row in cells}
        texts = [cell for text in table.texts.values() if (cell := text.cell(row))]
        if cells:
            config: dict[str, float | str] = {
                name: float(values[row]) for name in table.columns if np.isfinite((values := table.dense(name))[row])
            }
            config |= {name: text.cell(row) for name, text in table.texts.items() if text.cell(row)}
            length = max(int(c.where(len(c))[-1]) + 1 for c in cells.values())
            cells = {k: c if len(c) == length else Column(c.values, c.where(len(c))) for k, c in cells.items()}
            part = Table(length, cells, notices=table.notices, config={**table.config, **config})
            found.append((texts[0] if texts else f"row {row + 1}", part))
    return found


def width(table: Table) -> int:
    """The length of the longest list in a cell."""
    return max((len(column) for cells in table.lists.values() for column in cells.values()), default=0)


def spread(table: Table) -> Table:
    """A table whose cells hold short vectors, with a column for each of their elements."""
    columns = dict(table.columns)
    for name, cells in table.lists.items():
        wide = max((len(c) for c in cells.values()), default=0)
        for k in range(wide):
            own = [row for row in sorted(cells) if k < len(cells[row])]
            values = np.array([cells[row].values[k] for row in own], float)
            columns[name if wide == 1 else f"{name}/{k}"] = Column(values, np.array(own, np.int64))
    return replace(table, columns=columns, lists={})


def constant_texts(table: Table) -> tuple[dict[str, str], list[str]]:
    """The columns of text that hold one thing throughout, as settings, and the names of the others."""
    fixed, others = {}, []
    for name, text in table.texts.items():
        known = np.unique(text.codes[text.codes >= 0])
        if len(known) == 1 and "_type" not in text.texts[int(known[0])][:10]:
            fixed[name] = text.texts[int(known[0])]
        elif len(known):
            others.append(name)
    return fixed, others
