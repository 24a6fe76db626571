"""Two processes are one: the same losses, weights and numbers at the same global batch, to 1e-5 relative."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ran, start, tiny, train, wait_for

from intaglio.history import read_history
from intaglio.history.run_folder import RunFolder
from intaglio.objectives.contrastive import infonce, sigmoid_pairs
from intaglio.objectives.distributed import alone, gather_rows, mean_over_processes, processes, rank
from intaglio.objectives.text import caption_cross_entropy
from intaglio.training import checkpoint

TOLERANCE = 1e-5
WORDS = ["--train.steps=10", "--train.validate_items=23", "--model.dropout=0"]  # a last batch of 7 for one process


def agree(two: RunFolder, one: RunFolder) -> None:
    """In every loss, rate and gradient norm, trained and held out, and in the weights."""
    a, b = (numbers(run) for run in (two, one))
    assert a.keys() == b.keys()
    assert {name for _, name in a} >= {"train/loss/total", "val/loss/total"}
    for key, value in b.items():
        assert a[key] == pytest.approx(value, rel=TOLERANCE), key
    for mine, theirs in zip(weights(two), weights(one), strict=True):
        assert (mine - theirs).norm() < 1e-3 * theirs.norm()


def weights(run: RunFolder) -> tuple[torch.Tensor, torch.Tensor]:
    """All parameters as one vector, live and averaged. One by one, those that a norm makes idle would not agree: Adam
    turns the rounding of their gradient into steps."""
    content = checkpoint.read(checkpoint.newest(run.checkpoints))
    average = content["callbacks"]["EMA"]["average"]
    return tuple(torch.cat([part[name].flatten() for name in average]) for part in (content["state_dict"], average))


def numbers(run: RunFolder) -> dict[tuple[int, str], float]:
    """The rows of training and of the looks at held-out items."""
    table = read_history(run.metrics)
    kept = table["name"].str.contains("^(train|val)/(loss|optimizer)/")
    return {(step, name): value for step, name, value in table.filter(kept)["step", "name", "value"].rows()}


def test_two_processes_train_as_one_and_stop_and_resume_together(tmp_path):
    words, run = [*WORDS, "--loss.pairing=infonce"], RunFolder(tmp_path / "two" / "a")
    process = start("train", "multimodal-small", *tiny(tmp_path / "two", *words, "--train.devices=2"))
    wait_for(process, run.metrics, 3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Warning" not in said
    assert said.count("everything is saved") == 1, "one process tells"
    code, said = ran("train", "--resume", str(run.path))
    assert code == 0, said
    assert said.count("measuring on held-out items") == 1, "one process measures"
    agree(run, train(tmp_path / "one", *words))


def test_torchrun_decides_how_many(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "intaglio"]
    words = [*WORDS, "--loss.pairing=sigmoid"]
    training = ["train", "multimodal-small", *tiny(tmp_path / "two", *words)]
    run = subprocess.run([*command, *training], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    two = RunFolder(tmp_path / "two" / "a")
    assert two.config().train.devices == 2
    assert two.record["machine_choice"]["devices"] == "started by torchrun"
    agree(two, train(tmp_path / "one", *words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.devices=3", "--train.batch_size=15"], "train.devices is 3, but torchrun started 2 processes"),
        (["--train.batch_size=15"], "train.batch_size 15 must divide over the 2 processes that torchrun started"),
    ],
)
def test_what_torchrun_started_must_fit(words, message, tmp_path, monkeypatch, capsys):
    from intaglio.cli import main

    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "multimodal-small", *tiny(tmp_path, *words)]) == 2
    assert message in capsys.readouterr().err


def global_losses(items: torch.Tensor, part: slice) -> torch.Tensor:
    """Three losses of the rows in ``part`` that need the other rows; ``items`` (8, 5) is the leaf."""
    a, b = (torch.nn.functional.normalize(x[part], dim=-1) for x in (items.sin(), items.cos()))
    scale, bias = torch.tensor(1.5), torch.tensor(-1.0)
    logits = items[part].tanh()[:, None].expand(-1, 4, -1)
    targets = torch.arange(8)[part, None].add(torch.arange(4)).remainder(5)
    targets[:, 1:] *= (torch.arange(8)[part] < 3)[:, None]  # 0 pads: most tokens stand in the first part
    return infonce(a, b, scale) + sigmoid_pairs(a, b, scale, bias) + caption_cross_entropy(logits, targets, pad=0)


def worker(number: int, world: int, port: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port}", rank=number, world_size=world)
    items = torch.linspace(-2, 3, 40, dtype=torch.float64).view(8, 5).requires_grad_()
    size = 8 // world
    part = slice(number * size, (number + 1) * size)
    loss = global_losses(items, part)
    loss.backward()
    gradient = items.grad / world  # as DDP averages it
    dist.all_reduce(gradient)
    rows = torch.full((2, 3), float(number))
    with alone():
        inside = (processes(), rank(), len(gather_rows(rows)))
    outside = (processes(), rank(), gather_rows(rows)[:, 0].tolist())
    result = {"loss": mean_over_processes(loss), "gradient": gradient, "inside": inside, "outside": outside}
    torch.save(result, out / f"{number}.pt")
    dist.destroy_process_group()


def test_losses_over_the_global_batch_have_the_gradient_of_one_process(tmp_path):
    """Also where the processes hold different numbers of tokens."""
    items = torch.linspace(-2, 3, 40, dtype=torch.float64).view(8, 5).requires_grad_()
    loss = global_losses(items, slice(0, 8))
    loss.backward()
    mp.spawn(worker, (2, tmp_path / "port", tmp_path), nprocs=2)
    for number in range(2):
        result = torch.load(tmp_path / f"{number}.pt")
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(result["gradient"], items.grad, rtol=1e-5, atol=1e-8)
        assert result["inside"] == (1, 0, 2)
        assert result["outside"] == (2, number, [0, 0, 1, 1])
