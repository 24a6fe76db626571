"""Golden runs: the first losses of each system at a fixed seed, compared exactly with those that are committed.

    python tests/test_golden.py        writes tests/golden/*.json anew

Do that only with a change that is meant to change training, and say so in the changelog.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import test_diffusion_system
import test_jepa_system
import test_vqa_system
import torch
from conftest import train

from intaglio.history import read_history
from intaglio.history.run_folder import RunFolder

GOLDEN = Path(__file__).with_name("golden")
LOOKS = "--train.validate_every=5"


def losses(run: RunFolder) -> dict[str, list[float]]:
    """Every loss of the first 20 steps, terms and total, and the held-out ones; JSON writes floats so that they come
    back as they were."""
    table = read_history(run.metrics)
    names = table["name"].unique(maintain_order=True).to_list()
    return {n: table.filter(table["name"] == n)["value"].to_list() for n in names if n.split("/")[1] == "loss"}


def machine() -> dict[str, str]:
    """What the last bits may depend on: kernels are chosen by the instruction set."""
    return {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}


def diffused(scratch: Path) -> dict[str, RunFolder]:
    """Runs of the autoencoder, and of diffusion in pixels and in its latents."""
    autoencoder = test_diffusion_system.run("autoencoder-small", scratch / "autoencoder", LOOKS)
    words = (f"--model.autoencoder={autoencoder.path}", "--model.patch=1", LOOKS)
    return {
        "autoencoder": autoencoder,
        "diffusion": test_diffusion_system.run("diffusion-small", scratch / "pixels", LOOKS),
        "diffusion-latent": test_diffusion_system.run("diffusion-latent", scratch / "latents", *words),
    }


def predicted(scratch: Path) -> dict[str, RunFolder]:
    """Runs of the JEPA among negatives, with codebook, queue and averaged target; and with SIGReg and rounded codes."""
    objectives = {"jepa": test_jepa_system.INFONCE, "jepa-lejepa": test_jepa_system.LEJEPA}
    return {name: test_jepa_system.run(scratch / name, *words) for name, words in objectives.items()}


def answered(scratch: Path) -> dict[str, RunFolder]:
    """A run of questions and answers, with stages and all terms."""
    return {"vqa": test_vqa_system.run(scratch / "vqa", *test_vqa_system.STAGED)}


def made(scratch: Path) -> dict[str, RunFolder]:
    multimodal = train(scratch, LOOKS)
    return {"multimodal": multimodal, **diffused(scratch), **predicted(scratch), **answered(scratch)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    return made(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize(
    "system", ["multimodal", "autoencoder", "diffusion", "diffusion-latent", "jepa", "jepa-lejepa", "vqa"]
)
def test_the_losses_are_the_committed_ones(system, runs):
    golden, now = json.loads((GOLDEN / f"{system}.json").read_text()), losses(runs[system])
    assert now.keys() == golden["losses"].keys()
    assert len(now["train/loss/total"]) == 20
    if golden["machine"] == machine():
        assert now == golden["losses"]
    for name, values in golden["losses"].items():
        assert now[name] == pytest.approx(values, rel=1e-4), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for system, run in made(Path(scratch)).items():
            content = {"machine": machine(), "losses": losses(run)}
            (GOLDEN / f"{system}.json").write_text(json.dumps(content, indent=1) + "\n")
    sys.exit()
