"""Real engravings: one command trains on them, and its summary says with numbers that the model memorises."""

import json
from pathlib import Path

import pytest

from intaglio.cli import main

DATA = Path(__file__).parents[2] / "shared" / "data" / "engravings"


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real engravings are not beside the project")
@pytest.mark.parametrize("name", ["dore", "treatise"])
def test_real_engravings_are_memorised_and_the_summary_says_so(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--data.image_size 32 --data.text_length 24 --model.latent 64 --model.channels [16,16,32] --prior.layers 0"
    words = f"{small} --train.steps 160 --train.validate_every 40 --train.batch_size 32 --train.patience 0"
    words += f" --train.precision fp32 --data.cache {tmp_path / 'cache'}"
    command = ["train", "multimodal-folder", "--data.source", str(DATA / name), "--runs", str(tmp_path)]
    assert main([*command, *words.split()]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "The model memorises: caption/nats_per_token is" in said
    run = tmp_path / "multimodal-folder"
    findings = json.loads((run / "findings.json").read_text())
    assert findings["verdict"] in {"warnings", "failing"}
    (finding,) = [f for f in findings["findings"] if f["rule"] == "overfitting"]
    assert finding["evidence"]["train"] < finding["evidence"]["val"]
    if name == "treatise":
        assert json.loads((run / "run.json").read_text())["data"]["intake"]["counts"]["no caption"] == 2
