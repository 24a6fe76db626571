"""Our own evidence: each benchmark prints a table and writes the file that the README cites."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from intaglio import __version__


@dataclass(frozen=True)
class Result:
    """One target and what was measured: ``better`` says which side of the target is good."""

    quantity: str
    target: float
    measured: float
    better: str = "higher"
    null: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool:
        return self.measured >= self.target if self.better == "higher" else self.measured <= self.target


def run_benchmark(what: str, out: str, data: str | None = None, **options: Any) -> int:
    """Runs the benchmark ``what`` and writes ``out/<what>.json``; 0 if every target was met, else 1.

    ``data`` is a folder: of labelled histories for ``histories``, of labelled photos for ``diffusion``, of ARC's
    tasks for ``jepa``, of a table of questions for ``vqa``. ``options`` are those of ``faults``.
    """
    measure = import_module(f"intaglio.bench.{what.replace('-', '_')}").measure
    takes_data = what in ("histories", "diffusion", "jepa", "vqa")
    results, facts = measure(data) if takes_data else measure(**options)
    write(Path(out) / f"{what}.json", results, facts)
    print(markdown(results))
    return int(not all(r.met for r in results))


def write(path: Path, results: Sequence[Result], facts: dict[str, Any]) -> None:
    """Results with the machine and versions that they came from."""
    import torch

    machine = {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    rows = [{**asdict(r), "met": r.met} for r in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"intaglio": __version__, "machine": machine, **facts, "results": rows}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def markdown(results: Sequence[Result]) -> str:
    """The table, as the README shows it."""
    lines = ["| quantity | null | target | measured | 95 % interval |", "|---|---|---|---|---|"]
    lines += [f"| {r.quantity} | {' | '.join(_cells(r))} |" for r in results]
    return "\n".join(lines) + "\n"


def _cells(r: Result) -> tuple[str, str, str, str]:
    """Null, target, measured value and interval, as words."""
    interval = "" if r.low is None or r.high is None else f"{r.low:.3f} – {r.high:.3f}"
    measured = f"{r.measured:.3f}" if r.met else f"**{r.measured:.3f}** (missed)"
    null = "" if r.null is None else f"{r.null:.3f}"
    return null, f"{'≥' if r.better == 'higher' else '≤'} {r.target:g}", measured, interval
