"""Proofs of a diffusion model: the same bytes from the saved model, the right ones skipped, and what they measure."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import intaglio
from intaglio.config import PictureDataConfig, from_dict, to_dict
from intaglio.data.prepare import Prepared, prepare_pictures
from intaglio.data.tokenizer import CaptionTokenizer
from intaglio.health.record import Growing, Record
from intaglio.history import NotMeasured, Reading
from intaglio.models.classifier import Judge, _network
from intaglio.models.diffusion import DiffusionModel
from intaglio.models.multimodal import MultimodalModel
from intaglio.models.prompts import PromptEncoder
from intaglio.reports.proofs.diffusion import make_proofs
from intaglio.reports.proofs.diffusion_measured import Closest, closest, radial_power
from intaglio.reports.proofs.map import tsne

TINY = [
    "--data.items=300", "--health.on=false", "--data.image_size=16", "--data.held_out=0.2", "--train.steps=10",
    "--train.batch_size=8", "--train.validate_every=5", "--train.validate_items=64",
    "--train.device=cpu", "--train.precision=bf16",
    "--model.widths=[8,16]", "--model.blocks=1", "--optim.warmup=2", "--sampling.steps=4", "--sampling.each=2",
]  # fmt: skip
ALL = {"classes", "denoising", "noised", "guidance", "conditions", "noise-levels", "spectrum", "neighbours"}


def pulled(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_all_proofs_are_remade_byte_for_byte_from_the_saved_model(tmp_path: Path):
    run = intaglio.train("diffusion-small", [*TINY, f"--runs={tmp_path}"], quiet=True)
    assert run is not None
    first = json.loads((run.proofs(5) / "proofs.json").read_text())
    assert first["pictures"].keys() == {"classes.png", "denoising.png"}
    assert "classifier" not in first["pictures"]["classes.png"]["look_for"]

    made = intaglio.prove(run.path, tmp_path / "again")
    assert {p.stem for p in made} == ALL
    assert pulled(tmp_path / "again") == pulled(run.proofs(10))
    assert intaglio.load_model(run.path).bf16
    told = json.loads((tmp_path / "again" / "proofs.json").read_text())
    assert told["skipped"].keys() == {"conditions-map"}
    assert "there are 10 classes" in told["skipped"]["conditions-map"]
    assert len(told["pictures"]["classes.png"]["told"]) == 10


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    config = PictureDataConfig(items=200, image_size=16, held_out=0.3, cache=str(tmp_path_factory.mktemp("cache")))
    return prepare_pictures(config, seed=0)


def test_flips_are_measured_and_not_believed(prepared: Prepared):
    flip = prepared.record["augmentations"]["flip"]
    assert flip["changed"] > 0.9
    assert flip["variety"] > 0.9


NETWORK = {"patch": 2, "widths": [8, 16], "blocks": 1, "attention": [1], "dropout": 0.0}


def model_for(prepared: Prepared, classes: bool = True, prompts: PromptEncoder | None = None) -> DiffusionModel:
    torch.manual_seed(0)
    network, told = dict(NETWORK), None
    if prompts is not None:
        network |= {"pooled": prompts.pooled, "tokens": prompts.tokens}
        told = {"config": prompts.config(), "empty": 2}
    names = prepared.corpus.labels() if classes else ()
    dropped = 0.1 if classes or prompts is not None else 0.0
    model = DiffusionModel(16, network, {"steps": 50}, "v", names, dropped, None, told, {"steps": 4})
    model.take(None, prompts)
    return model


def test_a_look_at_training_leaves_no_trace(prepared: Prepared, tmp_path: Path):
    model = model_for(prepared).train()
    model.network.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    made = make_proofs(model, prepared, tmp_path, quick=True)
    assert [p.stem for p in made] == ["classes", "denoising"]
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_condition_those_that_need_one_are_skipped_with_the_reason(prepared: Prepared, tmp_path: Path):
    made = make_proofs(model_for(prepared, classes=False), prepared, tmp_path)
    assert [p.stem for p in made] == ["samples", "denoising", "noised", "spectrum"]
    skipped = json.loads((tmp_path / "proofs.json").read_text())["skipped"]
    assert skipped.keys() == {"guidance", "conditions", "conditions-map", "noise-levels", "neighbours"}
    assert "told nothing" in skipped["guidance"]


def prompts_for(prepared: Prepared) -> PromptEncoder:
    config = to_dict(from_dict({"system": "multimodal", "name": "x", "train": {"steps": 1}}))["model"]
    tiny = {"latent": 16, "channels": [8, 8, 16], "width": 16, "heads": 2, "feed_forward": 32}
    captions = [c for i in prepared.splits["train"] for c in prepared.corpus.captions(int(i))]
    tokenizer = CaptionTokenizer.train(captions, 300)
    torch.manual_seed(0)
    model = MultimodalModel({**config, **tiny}, {"width": 32, "layers": 1}, 32, 40, len(tokenizer))
    model.tokenizer = tokenizer
    return PromptEncoder.of(model.eval())


def test_a_text_model_is_asked_for_held_out_captions(prepared: Prepared, tmp_path: Path):
    model = model_for(prepared, classes=False, prompts=prompts_for(prepared))
    make_proofs(model, prepared, tmp_path, judge=judge_for(prepared), record=sweep(prepared))
    told = json.loads((tmp_path / "proofs.json").read_text())
    assert told["skipped"] == {}
    held_out = {c for i in prepared.splits["val"] for c in prepared.corpus.captions(int(i))}
    asked = [line.split("“")[1].split("”")[0] for line in told["pictures"]["prompts.png"]["told"]]
    assert len(asked) == 10
    assert set(asked) <= held_out
    sheet = told["pictures"]["guidance.png"]
    assert "For all of them that is 3." in sheet["look_for"]
    assert "their contrast is 2.00 times that of real images" in sheet["told"][2]


def judge_for(prepared: Prepared) -> Judge:
    torch.manual_seed(0)
    return Judge(_network(10, 16).eval(), tuple(prepared.corpus.labels()), 0.5, 60)


def sweep(prepared: Prepared) -> Record:
    """A sweep in which guidance 3 is best, and 9 harsh; and a loss by noise level."""
    found = {"val/log_snr.3/loss": Reading(0.2, 0.4), "val/log_snr.-7/loss": Reading(0.4, 0.4)}
    for w, right, contrast in ((1, 0.5, 1.0), (3, 0.9, 1.1), (9, 0.95, 2.0)):
        found[f"val/guidance.{w}/contrast_ratio"] = Reading(contrast, 1.0)
        for name in ("", *(f".{label}" for label in prepared.corpus.labels())):
            found[f"val/guidance.{w}/class_accuracy{name}"] = Reading(right, 0.1, 500, right - 0.03, right + 0.03)
    growing = Growing()
    growing.add(10, found)
    return Record(growing.series())


def test_copies_are_found(prepared: Prepared):
    images, train, judge = prepared.data.images, prepared.splits["train"], judge_for(prepared)
    found = closest(prepared, judge, images[train[:60]])
    assert isinstance(found, Closest)
    assert (found.items[:, 0] == train[:60]).all()
    assert (found.ratios <= found.copied).all()
    assert found.usual > 0.2
    assert closest(prepared, "no labels", images) == NotMeasured("no labels")


def test_power_stands_at_its_frequency_and_that_of_noise_is_flat():
    place = 2 * np.pi * np.arange(32) / 32
    wave = np.broadcast_to((128 + 100 * np.sin(6 * place))[None, None, :, None], (1, 32, 32, 3)).astype(np.uint8)
    power = radial_power(wave)[0]
    assert power.argmax() == 5  # 6 cycles an image
    assert power[4:7].sum() > 0.95 * power.sum()
    noise = radial_power(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)).mean(0)
    assert noise.max() < 1.2 * noise.min()


def test_the_map_keeps_groups_together():
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 32, generator=random)
    x = centres.repeat_interleave(20, 0) + 0.3 * torch.randn(80, 32, generator=random)
    y, group = tsne(x), np.arange(80) // 20
    apart = np.linalg.norm(y[:, None] - y[None], axis=-1) + np.eye(80) * 1e9
    assert (group[apart.argmin(1)] == group).mean() == 1.0
    assert (tsne(x) == y).all()
