"""A run that was killed, stopped, extended or fine-tuned is the run that it should be, to the last bit."""

import math
import os
import random
import secrets
import signal
import time
from typing import Any

import pytest
import torch
from conftest import resume, start, tiny, train, wait_for
from safetensors.torch import load_file

from intaglio.history import read_history
from intaglio.history.run_folder import RunFolder
from intaglio.training import checkpoint
from intaglio.training.ema import EMA


def rows(run: RunFolder) -> list[tuple[Any, ...]]:
    """The history but for the clock and what is measured with it."""
    table = read_history(run.metrics)
    return table.filter(~table["name"].str.starts_with("train/speed")).drop("time").rows()


def state(run: RunFolder) -> dict[str, Any]:
    """The last checkpoint; its configuration, which names the folder, left out."""
    content = checkpoint.read(checkpoint.newest(run.checkpoints))
    del content["intaglio"]["config"]
    return content


def model(run: RunFolder) -> dict[str, torch.Tensor]:
    """The tensors that the run gives away."""
    return load_file(run.model / "model.safetensors")


def differing(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two checkpoints differ; tensors are compared bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [at]
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a.keys() | b.keys() for d in differing(a.get(key), b.get(key), f"{at}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for k, (x, y) in enumerate(zip(a, b, strict=True)) for d in differing(x, y, f"{at}/{k}")]
    return [] if a == b else [f"{at}: {a!r} != {b!r}"]


def same(run: RunFolder, uninterrupted: RunFolder) -> None:
    assert differing(state(run), state(uninterrupted)) == []
    assert rows(run) == rows(uninterrupted)
    assert differing(model(run), model(uninterrupted)) == []


def rates(run: RunFolder) -> list[float]:
    table = read_history(run.metrics)
    return table.filter(table["name"] == "train/optimizer/rate")["value"].to_list()


def cosine(step: int, steps: int, rate: float = 3e-3, floor: float = 1e-6, warmup: int = 4) -> float:
    """The rate of the step-th optimizer step, counted from 1."""
    if step <= warmup:
        return rate * step / warmup
    return floor + (rate - floor) * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - 1 - warmup))) / 2


def test_a_run_killed_three_times_ends_as_if_it_had_not_been(tmp_path, reference):
    seed = secrets.randbelow(10**6)
    chance = random.Random(seed)
    run = RunFolder(tmp_path / "a")
    words = ["multimodal-small", *tiny(tmp_path)]
    for moment, earliest in enumerate((6, 10, 14)):
        step, delay = earliest + chance.randrange(4), chance.uniform(0, 0.05)
        process = start("train", *words)
        wait_for(process, run.metrics, step)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        print(f"seed {seed}, kill {moment}: step {step} + {delay * 1e3:.0f} ms")
        assert run.record["status"] == "running"
        words = ["--resume", str(run.path)]
    assert resume(run.path).record["status"] == "finished"
    assert len(run.record["resumed"]) == 3
    same(run, reference)


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(which, code, tmp_path, reference):
    run = RunFolder(tmp_path / "a")
    process = start("train", "multimodal-small", *tiny(tmp_path))
    wait_for(process, run.metrics, 7)
    process.send_signal(which)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code
    record = run.record
    assert record["status"] == "interrupted"
    assert record["stopped_by"] == which.name
    assert f"Stopped by signal {which.name} after step {record['step']}; everything is saved." in said
    assert f"Go on with: intaglio train --resume {run.path}" in said
    assert checkpoint.newest(run.checkpoints).name == checkpoint.name(record["step"])
    same(resume(run.path), reference)


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_finishing_says_how_to_go_on(which, code, tmp_path):
    run = RunFolder(tmp_path / "a")
    process = start("train", "multimodal-small", *tiny(tmp_path, "--train.steps=1", "--prior.steps=1000000"))
    assert any("fitting the prior" in line for line in process.stdout)
    process.send_signal(which)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert (run.record["status"], run.record["stopped_by"]) == ("interrupted", which.name)
    assert f"Go on with: intaglio train --resume {run.path}" in said
    assert "Traceback" not in said


def test_the_applied_rate_is_the_schedule(reference):
    assert rates(reference) == pytest.approx([cosine(step, 20) for step in range(1, 21)], rel=1e-12)
    assert rates(reference)[-1] == 1e-6


def test_more_steps_follow_the_longer_schedule(tmp_path):
    assert rates(train(tmp_path, "--train.steps=8"))[-1] == 1e-6
    longer = resume(tmp_path / "a", "--train.steps=12")
    assert longer.record["step"] == 12
    assert rates(longer)[:8] == pytest.approx([cosine(step, 8) for step in range(1, 9)], rel=1e-12)
    assert rates(longer)[8:] == pytest.approx([cosine(step, 12) for step in range(9, 13)], rel=1e-12)


def test_epochs_become_steps(tmp_path):
    run = train(tmp_path, "--train.epochs=0.3", "--train.accumulate=1", "--train.steps=null")
    assert run.config().train.steps == run.record["step"] == 6  # 0.3 × 270 items, 16 a step, rounded up
    assert rates(run)[-1] == 1e-6


def test_a_finished_run_resumes_to_itself(tmp_path, reference):
    """As one does that was killed between its last step and its last file."""
    run = train(tmp_path)
    for file in ("model/model.safetensors", "model/config.json", "findings.json"):
        (run.path / file).unlink()
    same(resume(run.path), reference)
    assert run.record["step"] == 20
    assert (run.path / "findings.json").is_file()


def test_fine_tuning_starts_from_the_parents_model_with_a_fresh_optimizer(tmp_path, reference):
    words = ["--train.steps=2", "--train.ema=0", "--optim.floor=0"]
    child = train(tmp_path, *words, parent=reference.path)
    assert child.record["parent"] == reference.record["id"]
    assert rates(child) == pytest.approx([7.5e-5, 1.5e-4], rel=1e-12)
    groups = state(child)["optimizer_states"][0]["param_groups"]
    assert {g["steps"] for g in groups if not g["orthogonal"]} == {2}
    given = train(tmp_path, *words, "--optim.rate=4e-9", "--optim.warmup=0", parent=reference.path)
    assert rates(given) == pytest.approx([4e-9, 0.0], abs=1e-15)
    before, after = model(reference), model(given)
    for name, old in before.items():
        if name.startswith("network."):
            torch.testing.assert_close(after[name], old, rtol=0, atol=1e-8)
    assert any(name.startswith("/prior") for name in differing(model(child), before)), "fitted anew"


def test_the_averaged_model_is_the_formula(tmp_path):
    """θ̄ ← d·θ̄ + (1 − d)·θ, d = min(0.9, (1 + t)/(10 + t)), over parameters alone."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema = EMA(0.3)
    ema.setup(None, module, "fit")
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    for t in range(1, 6):
        with torch.no_grad():
            for k, p in enumerate(module.parameters()):
                p.add_(torch.full_like(p, 0.1 * t + k))
            module[1].running_mean.add_(1)
        ema.update(module)
        d = min(0.3, (1 + t) / (10 + t))
        expected = {name: d * expected[name] + (1 - d) * p.detach() for name, p in module.named_parameters()}
    assert ema.average.keys() == expected.keys() == dict(module.named_parameters()).keys()
    torch.testing.assert_close(ema.average, expected, rtol=1e-6, atol=1e-7)

    live = {name: x.clone() for name, x in module.state_dict().items()}
    restored = EMA(0.3)
    restored.load_state_dict(ema.state_dict())
    with pytest.raises(KeyError), restored.applied(module):  # noqa: PT012 - the work inside is the test
        assert all(torch.equal(p, ema.average[name]) for name, p in module.named_parameters())
        raise KeyError("also when the work inside fails")
    assert differing(dict(module.state_dict()), live) == []


def test_watching_changes_nothing(tmp_path, reference):
    """Looks, proofs and rows at every second step or at the last alone leave the same weights."""
    watched = train(tmp_path, "--train.validate_every=2", "--name=watched", "--train.checkpoint_every=20")
    blind = train(tmp_path, "--train.validate_every=1000", "--name=blind", "--train.log_every=1000")
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert differing(state(watched)[key], state(reference)[key]) == []
        assert differing(state(blind)[key], state(reference)[key]) == []
    assert len(list(watched.proofs(2).glob("*.png"))) > 0
    assert not blind.proofs(2).exists()
