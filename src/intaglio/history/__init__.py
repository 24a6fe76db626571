"""Metric tables: what a run measured, in long form. No torch here."""

from intaglio.history.reading import Measured, NotMeasured, Reading
from intaglio.history.series import Series
from intaglio.history.table import DamagedHistory, HistoryWriter, read_history, to_parquet

__all__ = [
    "DamagedHistory",
    "HistoryWriter",
    "Measured",
    "NotMeasured",
    "Reading",
    "Series",
    "read_history",
    "to_parquet",
]
