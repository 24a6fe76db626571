"""Metrics that count epochs beside others that count steps, as Keras and some loggers write them."""

from dataclasses import replace

import numpy as np

from intaglio.history.aliases import SPLITS, words
from intaglio.history.foreign import History
from intaglio.history.formats.clock import EPOCH, rank
from intaglio.history.formats.tables import count, listed
from intaglio.history.series import Series


def one_clock(history: History) -> History:
    """With metrics that count epochs moved to the last step of each epoch, where the history has the epoch of a step;
    else that is noticed."""
    last = max((int(s.steps[-1]) for s in history.given.values()), default=0)
    by_epoch = [name for name, s in history.given.items() if _counts_epochs(name, s, last)]
    if history.axis == "row" or not by_epoch:
        return history
    epochs = next((s for n, s in history.given.items() if rank(n) == EPOCH and n not in by_epoch), None)
    moved = {} if epochs is None else {n: m for n in by_epoch if (m := _moved(history.given[n], epochs)) is not None}
    said = []
    if moved:
        said.append(f"{listed(moved)}: counted in epochs; put at the last step of each epoch.")
    if left := [name for name in by_epoch if name not in moved]:
        said.append(
            f"{listed(left)}: counted in {count(len(history.given[left[0]]), 'epoch')} while others count steps."
        )
    return replace(history, given={**history.given, **moved}, notices=(*history.notices, *said))


def _counts_epochs(name: str, series: Series, last: int) -> bool:
    """Whether a held-out metric, or one of epochs by its name, has the steps 0, 1, 2 … far below the last of others."""
    parts = words(name)
    coarse = "epoch" in parts or any(SPLITS.get(word) == "val" for word in parts)
    few = len(series) > 1 and series.steps[0] in (0, 1) and series.steps[-1] < 0.2 * last
    return bool(coarse and few and np.all(np.diff(series.steps) == 1))


def _moved(series: Series, epochs: Series) -> Series | None:
    """A series over epochs put at the last step of each, or None where these epochs are others."""
    whole = np.floor(epochs.values)
    if np.any(np.diff(whole) < 0) or not np.all(np.isfinite(whole)):
        return None
    own = series.steps - series.steps[0] + whole[0]
    place = np.searchsorted(whole, own, side="right") - 1
    steps = epochs.steps[place]
    if abs(own[-1] - whole[-1]) > 1 or np.any(np.diff(steps) <= 0):
        return None
    return replace(series, steps=steps)
