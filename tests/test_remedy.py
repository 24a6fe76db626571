"""Remedies: proposed from findings, tried in branches beside a control, and none called better that is not."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import SHAPES, train

from intaglio.cli import main
from intaglio.config import JepaConfig, to_dict
from intaglio.health.finding import Remedy
from intaglio.health.remedies import changes
from intaglio.history.run_folder import RunFolder
from intaglio.training.remedy import judged, remedies, try_remedies
from intaglio.training.run import branch

SHORT = (
    "--train.steps=120",
    "--train.validate_every=20",
    "--train.checkpoint_every=0",
    "--prior.layers=0",
    "--health.probe=64",
    "--train.keep=9",
)


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory, shapes):
    """A run whose KL is far too heavy."""
    return train(tmp_path_factory.mktemp("runs"), f"--data.source={shapes}", *SHAPES, *SHORT, "--loss.kl=30")


def everything(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_remedies_are_proposed_with_settings_and_the_run_is_only_read(collapsed, capsys):
    before = everything(collapsed.path)
    found = remedies(collapsed.path)
    assert found.verdict == "failing"
    lower = next(p for p in found.proposals if "loss.kl" in p.changes)
    assert lower.rule == "posterior-collapse"
    assert float(lower.changes["loss.kl"]) < 30
    assert main(["remedy", str(collapsed.path)]) == 0
    assert "posterior-collapse" in capsys.readouterr().out
    assert main(["remedy", str(collapsed.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proposals"][0]["rule"]
    assert everything(collapsed.path) == before


def test_a_branch_goes_on_from_a_checkpoint_with_other_settings(collapsed, tmp_path):
    start = collapsed.checkpoints / "step-00000060.ckpt"
    before = everything(collapsed.path)
    words = [f"--runs={tmp_path}", "--name=branch", "--optim.rate=1e-4", "--loss.kl=0.01"]
    made = branch(start, words, quiet=True)
    assert made.record["branched_at"] == 60
    assert made.record["parent"] == collapsed.record["id"]
    assert made.record["changed_from_parent"] == ["loss.kl", "optim.rate"]
    rows = [json.loads(line) for line in made.metrics.read_text().splitlines()]
    theirs = [json.loads(line) for line in collapsed.metrics.read_text().splitlines()]
    assert [r for r in rows if r["step"] <= 60] == [r for r in theirs if r["step"] <= 60]
    later = {r["name"]: r["value"] for r in rows if r["step"] == 120}
    assert later["train/weight/kl"] == pytest.approx(0.01)
    assert later["train/optimizer/rate"] < 1e-4
    assert everything(collapsed.path) == before
    with pytest.raises(ValueError, match=r"does not fit another model\.latent: train anew"):
        branch(start, ["--model.latent=64"], quiet=True)
    with pytest.raises(ValueError, match=r"is at step 60: give --train\.steps more than that"):
        branch(start, ["--train.steps=60"], quiet=True)


def test_an_unchanged_branch_is_the_run_itself_and_other_draws_are_not(collapsed, tmp_path):
    start = collapsed.checkpoints / "step-00000060.ckpt"

    def losses(folder: RunFolder):
        rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        return [r["value"] for r in rows if r["name"] == "train/loss/total" and r["step"] > 60]

    same = branch(start, [f"--runs={tmp_path}", "--name=same"], quiet=True)
    other = branch(start, [f"--runs={tmp_path}", "--name=other", "--train.draws=1"], quiet=True)
    assert losses(same) == losses(collapsed)
    assert losses(other) != losses(collapsed)
    assert other.record["fingerprint"] == collapsed.record["fingerprint"]


def test_a_remedy_is_tried_beside_a_control_and_the_run_stays_as_it_is(collapsed, tmp_path, capsys):
    run = tmp_path / "a"
    shutil.copytree(collapsed.path, run)
    before = everything(run)
    found = try_remedies(run, seeds=1, steps=20, most=1, say=lambda line: None)
    assert everything(run) == before
    (tried,) = found.tried
    control, treated = RunFolder(Path(tried.control[0])), RunFolder(Path(tried.treated[0]))
    assert control.record["status"] == treated.record["status"] == "finished"
    assert control.record.get("branched_at") == treated.record.get("branched_at")
    assert control.config().loss.kl == 30
    assert treated.config().loss.kl == pytest.approx(2e-5)  # the system's own: it lies further that way
    assert control.config().train.steps == treated.config().train.steps == control.record["branched_at"] + 20
    assert tried.verdict == "cannot tell"
    assert "posterior-collapse is found in" in tried.reason
    written = json.loads((tmp_path / "a-remedies" / "remedies.json").read_text())
    assert written["tried"][0]["verdict"] == "cannot tell"
    made = everything(tmp_path / "a-remedies" / control.path.name)
    try_remedies(run, seeds=1, steps=20, most=1, say=lambda line: None)
    assert everything(tmp_path / "a-remedies" / control.path.name) == made
    try_remedies(run, seeds=1, steps=10, most=1, say=lambda line: None)
    assert RunFolder(control.path).config().train.steps == control.record["branched_at"] + 10


@pytest.mark.slow
def test_a_change_that_helps_is_better_and_a_sham_is_not(collapsed, tmp_path, shapes):
    def arm(name: str, *words: str) -> list[Path]:
        given = (f"--data.source={shapes}", *SHAPES, *SHORT, *words)
        return [train(tmp_path / f"{name}-{seed}", *given, f"--seed={seed}").path for seed in (0, 1)]

    proposal = next(p for p in remedies(collapsed.path).proposals if "loss.kl" in p.changes)
    control = arm("control", "--loss.kl=30")
    sham = judged(proposal, control, arm("sham", "--loss.kl=30", "--optim.clip=0.99"))
    assert sham.verdict == "cannot tell", sham
    assert (sham.before, sham.after) == (2, 2)
    helped = judged(proposal, control, arm("helped"))
    assert (helped.before, helped.after) == (2, 0)
    assert helped.verdict in ("better", "cannot tell"), helped
    (control[0] / "evaluation.json").unlink()
    (control[1] / "evaluation.json").unlink()
    assert judged(proposal, control, [Path(p) for p in helped.treated]).verdict == "better"
    assert judged(proposal, [Path(p) for p in helped.treated], control).verdict == "worse"


@pytest.mark.parametrize(
    ("said", "now", "then"),
    [
        ("another learning rate: --optim.rate", 1e-6, "0.003"),
        ("another learning rate: --optim.rate", 3e-3, "0.006"),
        ("lower --optim.rate tenfold", 3.0, "0.003"),
        ("lower --optim.rate tenfold", 3e-3, "0.0003"),
        ("raise --optim.rate", 1e-4, "0.003"),
        ("raise --optim.rate", 0.1, "0.2"),
    ],
)
def test_a_remedy_that_does_not_say_how_far_goes_to_the_systems_own_value(said, now, then):
    config = to_dict(JepaConfig("jepa"))
    config["optim"]["rate"] = now
    assert changes(Remedy(said), config) == {"optim.rate": then}


def test_what_cannot_be_tried_is_said(collapsed, tmp_path, capsys):
    assert main(["remedy", str(collapsed.path), "--seeds", "2"]) == 2
    assert "--seeds says how remedies are tried: add --try" in capsys.readouterr().err
    assert main(["remedy", str(collapsed.path), "--try", "--seeds", "0"]) == 2
    assert "numbers from 1 on" in capsys.readouterr().err
    assert main(["remedy", str(tmp_path / "none")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
