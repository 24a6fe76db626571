"""A training that repairs itself: what fails is tried beside a control, and what helps is flown on with."""

import pytest
from conftest import SHAPES, train

import intaglio
from intaglio.cli import main
from intaglio.history.run_folder import RunFolder
from intaglio.reports.changelog import changelog, markdown_document
from intaglio.systems.base import NonFiniteStep

SHORT = (
    "--train.steps=120",
    "--train.validate_every=20",
    "--train.checkpoint_every=0",
    "--prior.layers=0",
    "--health.probe=64",
    "--train.keep=9",
)


@pytest.mark.slow
def test_what_fails_is_repaired_and_the_changelog_says_on_what_evidence(tmp_path, shapes):
    given = (f"--data.source={shapes}", *SHAPES, *SHORT)
    last = train(tmp_path, *given, "--name=flown", "--loss.kl=30", autopilot=4.0)
    first = RunFolder(tmp_path / "flown")
    assert first.record["stopped_by"] == "health: posterior-collapse"
    assert last.path.name == "flown-1"
    assert last.record["status"] == "finished"
    assert last.config().loss.kl < 1e-3
    assert last.config().train.steps == 120
    assert last.record["parent"] == first.record["id"]
    told = markdown_document(changelog(last.path))
    assert "Autopilot, against posterior-collapse" in told
    assert "loss.kl" in told


def test_a_step_that_is_not_finite_before_there_is_a_history_ends_it_as_without(tmp_path, shapes):
    given = (f"--data.source={shapes}", *SHAPES, *SHORT, "--optim.kind=adamw", "--optim.rate=1e6", "--optim.clip=0")
    with pytest.raises(NonFiniteStep, match=r"lower --optim\.rate"):
        train(tmp_path, *given, "--name=wild", autopilot=4.0)
    assert "has no metrics yet" in RunFolder(tmp_path / "wild").record["autopilot"]


def test_a_fault_without_a_remedy_that_can_be_tried_is_left_and_said(tmp_path, shapes):
    few = ("--train.steps=12", "--train.validate_every=4", "--optim.rate=1e-9", "--optim.floor=0")
    folder = train(tmp_path, f"--data.source={shapes}", *SHAPES, *few, "--name=short", autopilot=2.0)
    assert folder.path.name == "short"
    assert folder.record["status"] == "finished"
    assert folder.config().health.stop is False


def test_what_an_autopilot_cannot_do_is_said(tmp_path, capsys):
    assert main(["train", "--autopilot", "--resume", str(tmp_path)]) == 2
    assert "--autopilot begins with a recipe" in capsys.readouterr().err
    assert main(["train", "multimodal-small", "--autopilot", "0"]) == 2
    assert "as a share of the run's" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"needs health's findings"):
        intaglio.train("multimodal-small", ["--health.on=false"], autopilot=1.0)
