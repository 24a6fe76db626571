"""Which column counts the steps, and where in a table one run ends and the next begins."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from intaglio.history.aliases import vocabulary, words
from intaglio.history.formats.tables import Table, count, listed, shown

EPOCH, INDEX = 5, 6
_COUNTED = {
    **dict.fromkeys(("step", "steps"), 1),
    **dict.fromkeys(("timestep", "timesteps", "update", "updates"), 3),
    **dict.fromkeys(("iteration", "iterations", "iter", "iters", "it", "itr"), 3),
    **dict.fromkeys(("batch", "batches", "minibatch"), 4),
    **dict.fromkeys(("epoch", "epochs", "episode", "episodes", "round", "rounds"), EPOCH),
}
_QUALIFIERS = vocabulary("trainer train training global num number n no current cur total idx id nr optimizer")
_MANY_RUNS = 2000
_LARGEST = 1e12


@dataclass(frozen=True)
class Timed:
    """The rows of one run and their ``steps`` (n,) in counts of ``axis``, in the order of the file."""

    table: Table
    axis: str
    steps: np.ndarray


@lru_cache(1 << 14)
def rank(name: str) -> int | None:
    """How good a counter of steps a column of this name would be, 0 the best; None for a metric."""
    parts = words(name)
    if parts in ((), ("unnamed", "0"), ("index",), ("idx",), ("i",)):
        return INDEX
    rest = set(parts) - _QUALIFIERS
    if len(rest) != 1 or (kind := _COUNTED.get(rest.pop())) is None:
        return None
    if kind == 1:
        return 0 if "global" in parts else 2 if name.startswith("_") else 1
    return kind


def counters(table: Table) -> dict[str, int]:
    """The columns that might count steps, with their ranks, the best first."""
    ranks = {name: place for name in table.columns if (place := rank(name)) is not None}
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def densest(table: Table) -> np.ndarray:
    """The rows (m,) of the metric that has the most."""
    ranks = counters(table)
    metrics = [column for name, column in table.columns.items() if name not in ranks]
    return max(metrics or table.columns.values(), key=len).where(table.length)


def choose(table: Table) -> tuple[str | None, str]:
    """The column to count steps by, the finest that is usable, or None; and what there is to say about it."""
    rows = densest(table)
    fineness, covers, refused = {}, {}, {}
    for name in counters(table):
        values = table.dense(name)
        known = np.isfinite(values)
        cover = np.count_nonzero(known) / max(1, table.length)
        if cover < 0.5:
            refused[name] = f"stands in {cover:.1%} of the rows only"
            continue
        given = values[known]
        if np.any(given != np.rint(given)) or np.any(np.abs(given) > _LARGEST):
            refused[name] = "holds fractions"
            continue
        own = filled(values)[rows]
        turns = 1 + np.count_nonzero(np.diff(own))
        if turns < 0.5 * len(own) and counters(table)[name] >= EPOCH:
            refused[name] = f"repeats ({len(own):,} rows, {turns:,} values)"
        elif turns == 1 < len(own):
            refused[name] = "does not change"
        elif jumbled(own):
            refused[name] = "goes up and down"
        else:
            fineness[name], covers[name] = turns, cover >= 0.99
    fine = [name for name in fineness if fineness[name] >= 0.4 * max(fineness.values())]
    if fine:
        return max(fine, key=lambda name: covers[name]), ""
    why = "; ".join(f"{shown(name)} {reason}" for name, reason in refused.items())
    return None, f"Rows are counted, as no column counts steps{f' ({why})' if why else ''}."


def jumbled(x: np.ndarray) -> bool:
    """Whether the numbers (n,) have no order that steps could have."""
    if len(x) < 4 or np.all(x[1:] <= x[:-1]):
        return False
    falls = np.flatnonzero(x[1:] < x[:-1]) + 1
    if len(falls) <= 0.1 * len(x):
        return False
    # Short runs or epochs restart often, but each time at the same place.
    return bool(np.mean(x[falls] <= np.min(x) + 2 * stride(x)) < 0.9)


def stride(x: np.ndarray) -> float:
    """The usual distance between neighbours (n,) that ascend."""
    gaps = np.diff(x)
    return float(np.median(gaps[gaps > 0])) if np.any(gaps > 0) else 1.0


def filled(x: np.ndarray) -> np.ndarray:
    """(n,) with each NaN replaced by the number before it, those at the start by the first."""
    known = np.flatnonzero(np.isfinite(x))
    if len(known) == len(x) or not len(known):
        return x
    last = np.searchsorted(known, np.arange(len(x)), side="right") - 1
    return x[known[np.maximum(last, 0)]]


def runs(table: Table) -> list[Timed]:
    """The runs of a table, one after the other."""
    if not table.columns:
        return []
    name, said = choose(table)
    if name is None:
        return [_by_row(table, said)]
    table = _forwards(table, name)
    x, rows, place = filled(table.dense(name)), densest(table), rank(name) or 0
    epochs = _epochs(table, name)
    inner = epochs is not None and restarts_with(x[rows], epochs[rows])
    time = unrolled(x, epochs) if inner and epochs is not None else x
    starts = [0, *restarts(time, rows)]
    if len(starts) > _MANY_RUNS:
        return [_by_row(table, f"{shown(name)} restarts {len(starts):,} times: rows are counted.")]
    if len(starts) > 1:
        if why := continuing(table, rows, starts, place if epochs is None else EPOCH):
            part = np.searchsorted(starts, np.arange(len(x)), side="right") - 1.0
            said = f"{shown(name)} restarts {count(len(starts) - 1, 'time')}, and {why}: the steps were counted on."
            return [Timed(table.noting(said), name, _whole(unrolled(time, part)))]
        where = ", ".join(f"{k + 1:,}" for k in starts[1:4]) + (" and later" if len(starts) > 4 else "")
        table = table.noting(f"{shown(name)} restarts in row {where}: these are {len(starts):,} runs.")
    return [
        _timed(table.part(a, b), name, None if epochs is None else epochs[a:b], inner)
        for a, b in pairwise([*starts, len(x)])
    ]


def _by_row(table: Table, said: str) -> Timed:
    numbers = np.arange(table.length) if table.numbers is None else table.numbers
    return Timed(table.noting(said), "row", numbers)


def _forwards(table: Table, name: str) -> Table:
    """The table, turned round if its newest rows come first."""
    x = filled(table.dense(name))[densest(table)]
    if len(x) < 3 or x[0] == x[-1] or np.any(np.diff(x) > 0):
        return table
    return table.at(np.arange(table.length)[::-1]).noting("The newest rows come first: they were turned round.")


def _epochs(table: Table, name: str) -> np.ndarray | None:
    """The epoch (n,) of each row, where a column beside ``name`` gives it."""
    for other, place in counters(table).items():
        if place == EPOCH and other != name and np.all(np.abs(epochs := filled(table.dense(other))) < 1e6):
            return np.floor(epochs)
    return None


def _timed(table: Table, name: str, epochs: np.ndarray | None, inner: bool) -> Timed:
    """One run with its steps, counted on over the epochs (n,) if they restart in each."""
    if inner and epochs is not None and len(np.unique(epochs)) > 1:
        steps = unrolled(filled(table.dense(name)), epochs)
        said = [f"{shown(name)} restarts in each epoch: the steps were counted on over the epochs."]
    else:
        steps, said = placed(table, name, epochs)
    return Timed(table.noting(*said), name, _whole(steps))


def _whole(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -9e18, 9e18).astype(np.int64)


def restarts_with(x: np.ndarray, epochs: np.ndarray) -> bool:
    """Whether steps (n,) start again in most epochs (n,)."""
    rises = np.diff(epochs) > 0
    return bool(np.any(rises) and np.mean(np.diff(x)[rises] < 0) > 0.5)


def unrolled(x: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Steps (n,) that restart with each epoch (n,), counted on."""
    return (epochs - epochs.min()) * (x.max() - x.min() + stride(x)) + x


def restarts(x: np.ndarray, rows: np.ndarray) -> Iterator[int]:
    """The rows at which steps x (n,) go back to where they began, seen in the rows (m,) of one metric."""
    own, begun, seen, peak = x[rows], 0, 0, -np.inf
    falls = np.flatnonzero(own[1:] < own[:-1]) + 1
    usual = stride(own) if len(falls) else 1.0
    edges = np.flatnonzero(x[1:] < x[:-1]) + 1
    for fall in falls.tolist():
        first, peak, seen = own[begun], max(peak, own[seen:fall].max()), fall
        # Where a longer run goes back to its first tenth, that is another one, not a resume.
        near = max(2 * usual, 0.1 * (peak - first)) if peak >= first + 10 * usual else 0
        if fall - begun >= 2 and own[fall] <= first + near:
            begun, peak = fall, -np.inf
            edge = edges[np.searchsorted(edges, rows[fall], side="right") - 1]
            yield edge if edge > rows[fall - 1] else rows[fall]


def continuing(table: Table, rows: np.ndarray, starts: list[int], place: int) -> str:
    """Why the parts of a table that begin at the rows ``starts`` are one run, or "" if they are several.

    Runs start from scratch, so their metrics jump back to where they were at the start; epochs of one run go on.
    """
    bounds = list(pairwise([*starts, table.length]))
    for text in table.texts.values():
        inside = [np.unique(text.codes[a:b]) for a, b in bounds]
        if all(len(codes) == 1 for codes in inside) and len({int(codes[0]) for codes in inside}) > 1:
            return ""
    ranks, on, back = counters(table), 0, 0
    metrics = [name for name, column in table.columns.items() if name not in ranks and len(column) >= 0.5 * len(rows)]
    for name in metrics[:8]:
        values = np.where(np.isfinite(values := table.dense(name)), values, np.nan)
        if np.all(values[~np.isnan(values)] > 0):
            values = np.log(values)  # losses fall by factors
        ends = [_ends(values[a:b]) for a, b in bounds]
        for (first, last, noise), (following, _, _) in pairwise(ends):
            if abs(first - last) > 4 * noise:
                on, back = on + (abs(following - last) < abs(following - first)), back + 1
    if back:
        return f"its metrics go on where they were in {on} of {back} places" if on > 0.6 * back else ""
    return "as a count within an epoch does" if place in (3, 4) else ""


def _ends(values: np.ndarray) -> tuple[float, float, float]:
    """The levels at both ends of values (n,), and their noise; the noise is infinite where there is too little."""
    known = values[np.isfinite(values)]
    if len(known) < 3:
        return float(known[0]) if len(known) else np.inf, np.inf, np.inf
    k = min(5, max(1, len(known) // 5))
    return float(np.median(known[:k])), float(np.median(known[-k:])), float(np.median(np.abs(np.diff(known))))


def placed(table: Table, name: str, epochs: np.ndarray | None) -> tuple[np.ndarray, list[str]]:
    """The steps (n,) of all rows, also of those in which the column ``name`` is blank.

    A row with an epoch stands at the last step of that epoch, another at the step of the row before it.
    """
    given = table.dense(name)
    known = np.isfinite(given)
    steps = filled(given)
    if known.all():
        return steps, []
    ranks = counters(table)
    lost = [k for k, c in table.columns.items() if k not in ranks and not known[c.where(table.length)].all()]
    if not lost:
        return steps, []
    if epochs is not None and np.all(np.diff(epochs[known]) >= 0):
        last = np.searchsorted(epochs[known], epochs[~known], side="right") - 1
        steps = steps.copy()
        steps[~known] = given[known][np.maximum(last, 0)]
        how = "at the last step of their epoch"
    else:
        how = "at the step of the row before"
    return steps, [f"{listed(lost)}: {count(int(np.sum(~known)), 'row')} without {shown(name)}, placed {how}."]


def sampled(steps: np.ndarray) -> bool:
    """Whether steps (n,) that ascend are irregular as a sample of those that were logged is."""
    span = int(steps[-1] - steps[0]) if len(steps) >= 50 else 0
    if span < 1.5 * len(steps):
        return False
    gaps = np.diff(steps)
    _, counts = np.unique(gaps, return_counts=True)
    return bool(int(np.gcd.reduce(gaps)) * 1.5 * len(steps) < span and counts.max() < 0.5 * len(gaps))
