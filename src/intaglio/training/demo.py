"""The five-minute demonstration: a model whose captions never see the image, found out; and the sound one."""

import json
import sys
import webbrowser
from pathlib import Path

import torch
from torch import Tensor

from intaglio.history.run_folder import RunFolder
from intaglio.models.networks import StandardNetwork
from intaglio.reports.page import write_page
from intaglio.systems.base import System
from intaglio.systems.multimodal import MultimodalSystem
from intaglio.training.run import train


def sever(system: System) -> None:
    """The defect of a real project: its text decoder attends to a constant, whatever the image.

    Losses fall and captions read well; only an intervention shows it.
    """
    assert isinstance(system, MultimodalSystem)
    network = system.model.network
    assert isinstance(network, StandardNetwork)
    heard = network.memory

    def constant(z_BZ: Tensor) -> Tensor:
        return heard(torch.zeros_like(z_BZ))

    network.memory = constant  # type: ignore[method-assign]


def demo(out: str | Path = "runs", quiet: bool = False) -> RunFolder:
    """Trains the recipe ``demo`` into ``out``, its broken twin first, and opens the page where there is a screen."""
    print("First its broken twin: the same model, but the text decoder is cut off from the image.", flush=True)
    words = ["--runs", str(out), "--name", "demo-broken-twin", "--health.stop", "true"]
    twin = train("demo", words, quiet=quiet, alter=sever)
    assert twin is not None
    found = json.loads((twin.path / "findings.json").read_text(encoding="utf-8"))
    print(f"Found out after {twin.record['step']} steps, {twin.record['train_seconds']:.0f} s: {found['verdict']}.")
    print("Now the sound one.", flush=True)
    folder = train("demo", ["--runs", str(out)], quiet=quiet)
    assert folder is not None
    folder.update(twin=twin.path.name)
    page = write_page(folder).resolve()
    if sys.stdout.isatty():
        webbrowser.open(page.as_uri())
    print(f"Open {page}")
    return folder
