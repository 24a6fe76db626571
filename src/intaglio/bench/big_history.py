"""A history of a million rows by twenty metrics, as a CSV, and what its verdict and its report cost."""

from pathlib import Path

import numpy as np

from intaglio.bench import Result
from intaglio.bench.process import process


def measure_big_history(folder: Path, rows: int = 1_000_000, metrics: int = 20) -> list[Result]:
    """Seconds and peak memory of ``intaglio diagnose`` on it, the better of two, and seconds of ``intaglio report``."""
    file = _write(folder / "big.csv", rows, metrics)
    verdicts = [process("diagnose", str(file), codes=(0, 1, 3)) for _ in range(2)]
    report = process("report", str(file), "--out", str(folder / "report"), codes=(0, 1, 3))
    return [
        Result(
            "seconds to a verdict, CSV of 1,000,000 rows × 20", 3.0, min(v.seconds for v in verdicts), better="lower"
        ),
        Result("GB of memory for it", 1.0, max(v.peak for v in verdicts) / 1e9, better="lower"),
        Result("seconds to its full report", 15.0, report.seconds, better="lower"),
    ]


def _write(file: Path, rows: int, metrics: int) -> Path:
    """Falling losses, a cosine rate, and noise."""
    import polars as pl

    rng, x = np.random.default_rng(0), np.arange(rows) / rows
    falling = 2 * np.exp(-5 * x) + 0.3
    columns = {"step": np.arange(rows), "lr": 5e-4 * (1 + np.cos(np.pi * x))}
    for name in ("train_loss", "val_loss", *(f"metric_{k}" for k in range(metrics - 3))):
        columns[name] = falling * np.exp(0.05 * rng.normal(size=rows))
    pl.DataFrame(columns).write_csv(file)
    return file
