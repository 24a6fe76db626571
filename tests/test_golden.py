"""Golden runs: the first losses of each system at a fixed seed, compared exactly with those that are committed.

    python tests/test_golden.py        writes tests/golden/multimodal.json anew

Do that only with a change that is meant to change training, and say so in the changelog.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from intaglio.history import read_history
from intaglio.history.run_folder import RunFolder

GOLDEN = Path(__file__).with_name("golden") / "multimodal.json"


def losses(run: RunFolder) -> dict[str, list[float]]:
    """Every loss of the first 20 steps, terms and total, and the held-out ones; JSON writes floats so that they come
    back as they were."""
    table = read_history(run.metrics)
    names = table["name"].unique(maintain_order=True).to_list()
    return {n: table.filter(table["name"] == n)["value"].to_list() for n in names if n.split("/")[1] == "loss"}


def machine() -> dict[str, str]:
    """What the last bits may depend on: kernels are chosen by the instruction set."""
    return {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}


def test_the_multimodal_losses_are_the_committed_ones(reference):
    golden, now = json.loads(GOLDEN.read_text()), losses(reference)
    assert now.keys() == golden["losses"].keys()
    assert len(now["train/loss/total"]) == 20
    if golden["machine"] == machine():
        assert now == golden["losses"]
    for name, values in golden["losses"].items():
        assert now[name] == pytest.approx(values, rel=1e-4), name


if __name__ == "__main__":
    from conftest import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        content = {"machine": machine(), "losses": losses(train(Path(scratch)))}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{GOLDEN} written with {sys.executable.rsplit('/', 1)[-1]}, torch {content['machine']['torch']}")
