"""What a command costs in a process of its own."""

import os
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

PROGRAM = """
import resource, sys
from intaglio.cli import main
code = main(sys.argv[2:])
try:
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(sys.argv[1], "w") as file:
    file.write(str(peak))
sys.exit(code)
"""
"""``ru_maxrss`` of a child begins with what its parent had when it was started, VmHWM does not."""


class Cost(NamedTuple):
    """Seconds from start to end, Python's own included, and peak resident bytes."""

    seconds: float
    peak: int


def process(*words: str, folder: str | os.PathLike[str] = ".", codes: tuple[int, ...] = (0,)) -> Cost:
    """Runs ``intaglio WORDS`` in ``folder``.

    Raises:
        RuntimeError: an exit code that is not among ``codes``.
    """
    with tempfile.NamedTemporaryFile("r") as peak:
        begun = time.perf_counter()
        command = [sys.executable, "-c", PROGRAM, peak.name, *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begun
        if done.returncode not in codes:
            raise RuntimeError(f"intaglio {' '.join(words)} ended with {done.returncode}: {done.stderr[-800:]}")
        return Cost(seconds, int(peak.read()))
