"""Faults of diffusion in real small trainings, in pixels and in latents: each is found and named, its twin is quiet."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import intaglio
from intaglio.bench.shapes import write_shapes
from intaglio.history.run_folder import RunFolder
from intaglio.models.autoencoder import Autoencoder
from intaglio.nn.condition import Condition
from intaglio.systems.diffusion import DiffusionSystem
from intaglio.training import ema
from intaglio.training.ema import EMA

COMMON = [
    *("--train.steps=300", "--train.batch_size=32", "--train.log_every=10", "--train.validate_every=100"),
    *("--train.validate_items=80", "--train.keep=1", "--train.ema=0.95", "--train.precision=fp32"),
    *("--train.device=cpu", "--optim.kind=adamw", "--optim.rate=1e-2", "--optim.warmup=20", "--data.image_size=16"),
    *("--data.held_out=0.25", "--data.flips=false", "--health.probe=100"),
]
AUTOENCODER = [*COMMON, "--model.channels=[32,64]", "--model.latent=32", "--optim.kind=muon", "--train.steps=400"]
DIFFUSION = [*COMMON, "--model.blocks=1", "--sampling.each=50", "--sampling.steps=8"]
PIXELS = [*DIFFUSION, "--model.widths=[16,32]", "--model.patch=2", "--sampling.guidance=1.5"]
LATENTS = [*DIFFUSION, "--model.widths=[32,32]", "--model.patch=1", "--sampling.guidance=2"]
WORDS = {"autoencoder-small": AUTOENCODER, "diffusion-small": PIXELS, "diffusion-latent": LATENTS}

STEPS_20 = ("--train.steps=20", "--optim.warmup=4", "--train.validate_every=10")
"""What is wrong from the start is found in a few steps."""
NO_SAMPLES = ("--sampling.each=2", "--sampling.steps=2")
BRIEF = (*STEPS_20, *NO_SAMPLES)

IN_PIXELS = {
    *("condition-ignored", "unfaithful", "over-stylised", "memorised", "ema-lag", "high-noise-starved"),
    *("schedule-mismatch", "null-mismatch"),
}
IN_LATENTS = {*IN_PIXELS, "round-trip-ceiling", "latent-scale"}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 pictures of a shape whose colour is their label."""
    folder = write_shapes(tmp_path_factory.mktemp("colours"), 400)
    head, *rows = (folder / "metadata.csv").read_text().splitlines()
    told = [",".join([*row.split(",")[:2], row.split(",")[1].split()[1]]) for row in rows]
    (folder / "metadata.csv").write_text("\n".join([head, *told]) + "\n")
    return folder


@pytest.fixture(scope="module")
def train(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real training of a recipe on these pictures."""

    def trained(recipe: str, *more: str, **options: Any) -> RunFolder:
        runs = tmp_path_factory.mktemp("runs")
        words = [*WORDS[recipe], f"--data.source={colours}", "--name=a", f"--runs={runs}", *more]
        folder = intaglio.train(recipe, words, quiet=True, **options)
        assert folder is not None
        return folder

    return trained


@pytest.fixture(scope="module")
def pixels(train: Any) -> RunFolder:
    return train("diffusion-small")


@pytest.fixture(scope="module")
def autoencoder(train: Any) -> RunFolder:
    return train("autoencoder-small")


@pytest.fixture(scope="module")
def latents(train: Any, autoencoder: RunFolder) -> RunFolder:
    return train("diffusion-latent", f"--model.autoencoder={autoencoder.path}")


def found(run: RunFolder) -> dict[str, Any]:
    """The findings that are no notes, by rule."""
    told = json.loads((run.path / "findings.json").read_text())["findings"]
    return {f["rule"]: SimpleNamespace(**f) for f in told if f["severity"] != "note"}


def test_healthy_twins_are_quiet(pixels, latents):
    for run, rules in ((pixels, IN_PIXELS), (latents, IN_LATENTS)):
        told = json.loads((run.path / "findings.json").read_text())
        assert not [f for f in told["findings"] if f["severity"] == "fail" or f["rule"] in rules]
        assert rules <= set(told["passed"])


def test_conditions_that_are_all_alike_are_found(train, monkeypatch):
    """D: the table of conditions was loaded after the model had been built, so that all were the same."""
    alike = lambda self, batch: Condition(labels_B=torch.zeros_like(batch.labels))  # noqa: E731
    monkeypatch.setattr(DiffusionSystem, "condition", alike)
    fault = found(train("diffusion-small", *BRIEF))["condition-ignored"]
    assert fault.severity == "fail"
    assert "none reaches the network" in fault.message


def test_conditions_of_other_images_are_found(train, colours, tmp_path):
    """Labels stand in the wrong rows: they reach the network, and say nothing."""
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for file in colours.glob("*.png"):
        (shuffled / file.name).hardlink_to(file)
    head, *rows = (colours / "metadata.csv").read_text().splitlines()
    parts = [row.rsplit(",", 1) for row in rows]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    wrong = [f"{row},{parts[k][1]}" for (row, _), k in zip(parts, order, strict=True)]
    (shuffled / "metadata.csv").write_text("\n".join([head, *wrong]) + "\n")
    told = found(train("diffusion-small", f"--data.source={shuffled}", "--train.steps=100", *NO_SAMPLES))
    assert told["condition-ignored"].severity == "fail"
    assert "0 lies in the interval" in told["condition-ignored"].message
    assert "unfaithful" not in told  # a classifier that knows no better than chance judges nothing


def test_classes_in_another_order_are_found(train, pixels):
    def alter(system: Any) -> None:
        system.model.classes = (*system.model.classes[1:], system.model.classes[0])

    words = (*STEPS_20, "--optim.rate=1e-4")
    told = found(train("diffusion-small", *words, parent=pixels.path, alter=alter))
    assert told["unfaithful"].severity == "fail"
    assert told["unfaithful"].evidence["class_accuracy"] < 0.1  # below chance: other classes are what it shows
    assert "condition-ignored" not in told


def test_guidance_that_drives_to_extremes_is_found(train, pixels):
    """D: w = 9."""
    words = (*STEPS_20, "--optim.rate=1e-4", "--sampling.guidance=15")
    told = found(train("diffusion-small", *words, parent=pixels.path))
    assert told["over-stylised"].severity == "fail"
    assert told["over-stylised"].evidence["guidance"] == 15
    assert told["over-stylised"].evidence["recommended"] <= 3
    assert not {"unfaithful", "memorised"} & set(told)


def test_a_few_items_that_are_learnt_by_heart_are_found(train):
    words = ("--data.held_out=0.85", "--train.steps=800", "--train.validate_every=400", "--model.widths=[32,32]")
    fault = found(train("diffusion-small", *words, "--optim.rate=5e-3", "--sampling.steps=12"))["memorised"]
    assert fault.severity in ("warning", "fail")
    assert "they are copies" in fault.message


@pytest.mark.parametrize("words", [("--loss.weighting=min-snr",), ("--loss.prediction=epsilon",)])
def test_noise_that_the_loss_leaves_out_is_found(train, words):
    """D: at high noise the weight was .0068; an error of ε there hardly counts either, as an error of the image."""
    fault = found(train("diffusion-small", *words, "--train.steps=150", *NO_SAMPLES))["high-noise-starved"]
    assert fault.severity == "fail"
    assert "nothing has been learnt there" in fault.message
    assert fault.evidence["log_snr"] == -7
    assert fault.evidence["share"] < 0.0068


def test_an_average_that_is_not_stepped_is_found(train, monkeypatch):
    monkeypatch.setattr(EMA, "update", lambda self, module: None)
    fault = found(train("diffusion-small", *BRIEF))["ema-lag"]
    assert fault.severity == "fail"
    assert "has not moved since the start" in fault.message


def averaging(decay: float) -> Callable[[EMA, nn.Module], None]:
    """One step of an average without warm-up, of whatever is held."""

    def update(self: EMA, module: nn.Module) -> None:
        live = [p.detach() for _, p in ema._trained(module)]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)

    return update


def test_an_average_that_is_too_long_is_found(train, monkeypatch):
    monkeypatch.setattr(EMA, "update", averaging(0.9999))
    fault = found(train("diffusion-small", *BRIEF))["ema-lag"]
    assert fault.severity == "fail", "as grave as the unfaithful samples that it explains"
    assert "% of the way that the live weights went" in fault.message


def test_buffers_that_are_averaged_are_found(train, autoencoder, monkeypatch):
    own = ema._trained
    floats = lambda module: [(n, b) for n, b in module.named_buffers() if b.is_floating_point()]  # noqa: E731
    monkeypatch.setattr(ema, "_trained", lambda module: own(module) + floats(module))
    monkeypatch.setattr(EMA, "update", averaging(0.9))
    fault = found(train("diffusion-latent", *BRIEF, f"--model.autoencoder={autoencoder.path}"))["ema-lag"]
    assert "2 tensors that are no parameters are averaged" in fault.message


def test_an_autoencoder_that_limits_the_samples_is_found(train):
    poor = train("autoencoder-small", *STEPS_20, "--model.latent=2")
    words = (*BRIEF, f"--model.autoencoder={poor.path}")
    told = found(train("diffusion-latent", *words))
    assert told["round-trip-ceiling"].severity == "fail"
    assert "latent-scale" not in told


def changed(run: RunFolder, folder: Path, **statistics: float) -> Path:
    """The autoencoder of a run with other statistics of its latents."""
    model = Autoencoder.from_pretrained(run.model)
    for name, value in statistics.items():
        getattr(model, name).fill_(value)
    model.save_pretrained(folder)
    return folder


def test_latents_that_are_not_standardised_are_found(train, autoencoder, tmp_path):
    """A scale factor is taken from another autoencoder, as .18215 often is."""
    other = changed(autoencoder, tmp_path / "other", latent_mean=0, latent_std=1 / 0.18215)
    told = found(train("diffusion-latent", *BRIEF, f"--model.autoencoder={other}"))
    assert told["latent-scale"].severity == "fail"
    assert "where 1 is due" in told["latent-scale"].message
    assert "round-trip-ceiling" not in told


def test_latents_that_are_clamped_are_found(train, autoencoder, monkeypatch):
    """D: latents of unit variance, clamped to [−1, 1], which cuts 31.7 % of a Gaussian off."""
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, images: encode(self, images).clamp(-1, 1))
    monkeypatch.setattr(Autoencoder, "fingerprint", lambda self: "clamped")
    told = found(train("diffusion-latent", *BRIEF, f"--model.autoencoder={autoencoder.path}"))
    assert told["latent-scale"].severity == "fail"
    assert "% of latent is cut off at the clamp" in told["latent-scale"].message
