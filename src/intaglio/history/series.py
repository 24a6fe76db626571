"""One quantity over steps."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Series:
    """One quantity over optimizer steps, in order: arrays (n,); ``nulls`` and ``counts`` are NaN where unknown."""

    steps: np.ndarray
    values: np.ndarray
    nulls: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, steps: np.ndarray, values: np.ndarray) -> "Series":
        """Without nulls and counts, which take no memory."""
        unknown = np.broadcast_to(np.nan, len(steps))
        return cls(steps, values, unknown, unknown)

    def __len__(self) -> int:
        return len(self.steps)

    def after(self, step: int) -> "Series":
        """The part from ``step`` on."""
        return self.at(self.steps >= step)

    def at(self, rows: np.ndarray) -> "Series":
        """The rows of a mask or of indices."""
        return Series(self.steps[rows], self.values[rows], self.nulls[rows], self.counts[rows])

    @property
    def value(self) -> float:
        """The latest value."""
        return float(self.values[-1])

    @property
    def null(self) -> float | None:
        """The latest null, or None where none is known."""
        return None if np.isnan(self.nulls[-1]) else float(self.nulls[-1])

    @property
    def n(self) -> int | None:
        """How many samples the latest value rests on, or None where that is unknown."""
        return None if np.isnan(self.counts[-1]) else int(self.counts[-1])
