"""Tables of skorch's ``history.json``: a row an epoch, with the batches of each epoch inside."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intaglio.history.formats.rows import table_of_rows
from intaglio.history.formats.tables import Column, Table


def is_skorch(rows: Sequence[Any]) -> bool:
    """Whether these rows are epochs with batches in them."""
    return (
        bool(rows)
        and all(isinstance(row, dict) for row in rows)
        and any(isinstance(row.get("batches"), list) for row in rows)
    )


def table_of_epochs(epochs: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each batch of training; what belongs to an epoch stands at its last batch.

    Numbers of single batches have the prefix ``batch/``. Those of held-out batches are left out: their mean over the
    epoch is the held-out loss.
    """
    batches = [[b for b in e.get("batches") or [] if isinstance(b, dict) and _of_training(b)] for e in epochs]
    plain = table_of_rows([{k: v for k, v in e.items() if k != "batches"} for e in epochs])
    if not all(batches):
        return plain
    ends = np.cumsum([len(own) for own in batches])
    inner = table_of_rows([b for own in batches for b in own])
    columns = {"batch": Column(np.arange(1.0, ends[-1] + 1))}
    columns |= {name: Column(c.values, ends[c.where(plain.length)] - 1) for name, c in plain.columns.items()}
    columns |= {f"batch/{name}": c for name, c in inner.columns.items() if np.ptp(c.values)}
    said = "Batches of training are counted; those of validation stand in the mean of their epoch only."
    return Table(int(ends[-1]), columns, notices=(*plain.notices, said))


def _of_training(batch: Mapping[str, Any]) -> bool:
    return any(name.startswith("train") for name in batch)
