"""The JEPA from command to model: trained, killed, resumed, extended, fine-tuned, watched, refused."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import resume, start, wait_for
from test_arc_data import raw, written
from test_resume import cosine, differing, model, rates, rows, same, state
from torch import Tensor

import intaglio
from intaglio.api import load_model
from intaglio.data.batches import fixed_batches
from intaglio.history import read_history
from intaglio.history.run_folder import RunFolder
from intaglio.models.jepa import JepaModel
from intaglio.training.kinds import kind_of
from intaglio.training.loop import measure

COMMON = [
    *("--train.steps=20", "--train.batch_size=6", "--train.accumulate=2", "--train.log_every=1", "--train.keep=9"),
    *("--train.validate_every=10", "--train.checkpoint_every=5", "--train.validate_items=12", "--train.ema=0.9"),
    *("--train.precision=fp32", "--train.device=cpu", "--optim.warmup=4", "--data.items=120", "--health.probe=12"),
    *("--model.width=32", "--model.heads=2", "--model.layers=1", "--model.predictor_layers=1", "--model.slots=4"),
    *("--model.embedding=16", "--loss.slices=16"),
]
INFONCE = ["--loss.queue=64", "--model.quantiser=vq", "--model.codes=16", "--model.codes_after=3", "--model.target=0.9"]
LEJEPA = ["--loss.objective=lejepa", "--loss.sigreg=0.05", "--model.quantiser=fsq", "--model.levels=[4,4]"]


def words(runs: Path, *more: str) -> list[str]:
    return [*COMMON, "--name=a", f"--runs={runs}", *more]


def run(runs: Path, *more: str, **options: Any) -> RunFolder:
    folder = intaglio.train("jepa-small", words(runs, *more), quiet=True, **options)
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def infonce(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Codebook, queue, averaged target and learnt temperature."""
    return run(tmp_path_factory.mktemp("infonce"), *INFONCE)


@pytest.fixture(scope="module")
def lejepa(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """SIGReg, rounded codes, no target."""
    return run(tmp_path_factory.mktemp("lejepa"), *LEJEPA)


def stopped(whole: RunFolder, step: int, at: Path) -> RunFolder:
    """A copy of a run without what came after a step."""
    shutil.copytree(whole.path, at)
    for file in at.glob("checkpoints/step-*.ckpt"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()
    shutil.rmtree(at / "model")
    return RunFolder(at)


def buffers(found: RunFolder) -> dict[str, Tensor]:
    return state(found)["state_dict"]


@pytest.mark.parametrize(("which", "step"), [("infonce", 5), ("lejepa", 10)])
def test_a_run_that_stopped_and_went_on_is_the_uninterrupted_one(which, step, request, tmp_path):
    """Weights, averages, codebook, queue, temperature, target and history, to the last bit."""
    whole: RunFolder = request.getfixturevalue(which)
    same(resume(stopped(whole, step, tmp_path / "a").path), whole)


def test_a_checkpoint_holds_what_no_weight_says(infonce, lejepa):
    found = buffers(infonce)
    codes = {k.rpartition(".")[2]: v for k, v in found.items() if k.startswith("model.network.quantiser.")}
    assert int(found["queue.added"]) == 20 * 2 * 6 * 4, "every answer of every pass, and the queue went round"
    assert int(codes["updates"]) == 20 - 3
    assert int(codes["last_used"].max()) == 20 - 3 - 1
    assert float(codes["cluster_size"].sum()) == pytest.approx(2 * 6 * 4 * 2 * 4), "slots of an optimizer step"
    assert bool(codes["started"])
    assert float(found["log_scale"].exp()) != pytest.approx(10, abs=1e-6)
    apart = [k for k in found if k.startswith("model.target.") and not _equal(found, k)]
    assert len(apart) > 10
    assert not any(k.startswith(("queue", "model.target", "log_scale")) for k in buffers(lejepa))


def _equal(found: dict[str, Tensor], name: str) -> bool:
    return torch.equal(found[name], found[name.replace("model.target.", "model.network.")])


def test_a_run_killed_in_the_middle_of_a_step_goes_on_as_if_it_had_not_been(infonce, tmp_path):
    process = start("train", "jepa-small", *words(tmp_path, *INFONCE))
    wait_for(process, tmp_path / "a" / "metrics.jsonl", 12)
    process.kill()
    process.communicate()
    same(resume(tmp_path / "a"), infonce)


def test_more_steps_go_on_with_codes_queue_and_the_longer_schedule(infonce, tmp_path):
    longer = resume(stopped(infonce, 20, tmp_path / "a").path, "--train.steps=24")
    assert longer.record["step"] == 24
    assert rates(longer)[:20] == rates(infonce)
    due = [cosine(step, 24, rate=infonce.config().optim.rate) for step in range(21, 25)]
    assert rates(longer)[20:] == pytest.approx(due, rel=1e-9)
    found = buffers(longer)
    assert int(found["model.network.quantiser.updates"]) == 24 - 3
    assert int(found["queue.added"]) == 24 * 2 * 6 * 4


def test_fine_tuning_goes_on_with_the_parents_codes_at_a_tenth_of_the_rate(infonce, tmp_path):
    child = run(tmp_path, *INFONCE, "--train.steps=6", "--train.validate_every=3", parent=infonce.path)
    assert max(rates(child)) == pytest.approx(max(rates(infonce)) / 10)
    assert child.record["parent"] == infonce.record["id"]
    before, after = model(infonce), model(child)
    for name in ("network.quantiser.vectors", "network.encoder.slot.weight", "target.encoder.slot.weight"):
        moved = float((after[name] - before[name]).norm() / before[name].norm())
        assert 0 < moved < 0.2, name
    assert int(buffers(child)["queue.added"]) == 6 * 2 * 6 * 4, "of its own answers alone"
    first = {name: value for step, _, name, value, *_ in rows(child) if step == 1}
    assert first["train/loss/commitment"] > 0, "a codebook that has started is used from the first step"
    assert set(updates_per_step(child)) == {1.0}
    assert "codes-polluted" not in failing(child)
    assert child.record["loaded"] == {"missing": [], "unexpected": [], "reshaped": []}


def updates_per_step(found: RunFolder) -> list[float]:
    table = read_history(found.metrics)
    return table.filter(table["name"] == "train/codes/updates_per_step")["value"].to_list()


def failing(found: RunFolder) -> set[str]:
    return {f["rule"] for f in json.loads((found.path / "findings.json").read_text())["findings"]}


def test_what_does_not_fit_the_weights_is_not_fine_tuned(infonce, tmp_path):
    for more, said in (
        ("--model.codes=32", "trained with another model than"),
        ("--model.context=mean", "trained with another model than"),
        ("--data.pairs=3", r"trained with another data\.pairs than"),
    ):
        with pytest.raises(ValueError, match=rf"{said}.*so its weights don't fit.*--from {infonce.path}"):
            run(tmp_path, *INFONCE, more, parent=infonce.path)
    with pytest.raises(ValueError, match="another split or other files"):
        run(tmp_path, *INFONCE, "--seed=1", parent=infonce.path)


def test_health_changes_neither_a_weight_nor_what_is_none(infonce, lejepa, tmp_path):
    for k, (whole, more) in enumerate(((infonce, INFONCE), (lejepa, LEJEPA))):
        without = run(tmp_path / str(k), *more, "--health.on=false")
        for key in ("state_dict", "optimizer_states"):
            assert differing(state(without)[key], state(whole)[key]) == []


def test_a_look_leaves_codes_queue_and_target_as_they_are(infonce):
    audits = json.loads((infonce.path / "audits.json").read_text())
    assert audits["changed_by_validation"] == audits["unmoved"] == []
    assert audits["dead_parameters"] == {}
    kind = kind_of(infonce.config())
    prepared = kind.prepare(None, None, None, lambda line: None)
    system = kind.build(prepared)
    system.load_state_dict(buffers(infonce))
    before = {name: x.clone() for name, x in system.state_dict().items()}
    items = prepared.some("val", 12)
    measured = measure(system, fixed_batches(prepared.data, items, 6), None)
    assert system.training
    assert measured["val/loss/commitment"].value > 0
    system.eval()
    with torch.no_grad():
        seen = system.read(prepared.data.batch(items, items))
    assert seen["train/queue"]["queue_agreement"].value > 0
    assert differing(dict(system.state_dict()), before) == []


def test_codes_and_target_follow_each_optimizer_step_once(tmp_path):
    """Two passes a step: θ̄ ← d·θ̄ + (1 − d)·θ with d from .9 to 1 by the cosine, and one update of the codes."""
    seen: list[dict[str, Tensor]] = []

    def record(system: Any) -> None:
        step = system.optimizer_step

        def after(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            seen.append({name: x.detach().clone() for name, x in system.state_dict().items()})

        system.optimizer_step = after
        seen.append({name: x.clone() for name, x in system.state_dict().items()})

    run(tmp_path, *INFONCE, "--train.steps=6", "--train.validate_every=6", "--health.on=false", alter=record)
    assert len(seen) == 7
    book = "model.network.quantiser."
    assert [int(s[f"{book}updates"]) for s in seen] == [0, 0, 0, 0, 1, 2, 3]
    assert [bool(s[f"{book}started"]) for s in seen] == [False] * 4 + [True] * 3
    assert [int(s["queue.added"]) for s in seen] == [2 * 6 * 4 * k for k in range(7)]
    names = [name for name in seen[0] if name.startswith("model.target.")]
    for k, (before, after) in enumerate(pairwise(seen)):
        d = 1 - 0.1 * (math.cos(math.pi * k / 6) + 1) / 2
        for name in names:
            live = after[name.replace("target", "network")]
            torch.testing.assert_close(after[name], d * before[name] + (1 - d) * live, rtol=1e-5, atol=1e-6)


def test_the_model_reads_tasks_after_the_run_is_gone(infonce, tmp_path):
    found = load_model(infonce.path)
    assert isinstance(found, JepaModel)
    assert found.target is not None
    kind = kind_of(infonce.config())
    batch = kind.prepare(None, None, None, lambda line: None).data.batch(*2 * [torch.arange(3).numpy()])
    with torch.no_grad():
        seen = found.read(batch.grids, batch.real)
    assert seen.predicted.shape == seen.answers.shape == (3, 4, 16)
    assert int(seen.codes.min()) >= 0
    assert int(seen.codes.max()) < 16


# What cannot be trained

BATCH_OF_ONE = ["--train.batch_size=1", "--train.steps=4", "--train.validate_every=4", "--train.validate_items=3"]


@pytest.mark.parametrize("more", [INFONCE, LEJEPA], ids=["infonce", "lejepa"])
def test_a_batch_of_one_trains_where_something_else_keeps_answers_apart(more, tmp_path):
    found = run(tmp_path, *BATCH_OF_ONE, *more, "--health.on=false")
    losses = [value for _, _, name, value, *_ in rows(found) if name == "train/loss/total"]
    assert len(losses) == 4
    assert all(math.isfinite(x) and x > 0 for x in losses)


SMALL = ["--model.codes=16", "--loss.queue=64", "--model.target=0.9"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--loss.queue=433"], r"loss\.queue is 433, but the training tasks have 432 answers.*--loss\.queue 128 or"),
        (["--model.codes=4000"], r"model\.codes is 4000, but an epoch has 3456 slots.*--model\.codes 128 or less"),
        (["--train.batch_size=1", "--loss.queue=0"], r"loss\.queue 0: .*--train\.batch_size 32, or --loss\.queue 4096"),
        (["--train.batch_size=128"], r"train\.batch_size is 128, but only 108 items.*--train\.batch_size 64"),
        (["--data.items=1"], r"data\.items is 1; use at least 2"),
        (["--data.pairs=1"], r"data\.pairs is 1; use 2, a demonstration and a question, to 10"),
        (["--data.pairs=11"], r"data\.pairs is 11; use 2"),
        (["--model.patch=0"], r"model\.patch is 0; it must be at least 1"),
        (["--model.patch=4"], r"model\.patch is 4; .* use 1 or 2"),
        (["--model.width=33"], r"model\.width 33 must be divisible by model\.heads 2"),
        (["--model.heads=0"], r"model\.heads is 0; it must be at least 1"),
        (["--model.layers=0"], r"model\.layers is 0; it must be at least 1"),
        (["--model.slots=0"], r"model\.slots is 0; it must be at least 1"),
        (["--model.predictor_layers=0"], r"model\.predictor_layers is 0; it must be at least 1"),
        (["--model.embedding=0"], r"model\.embedding is 0; it must be at least 1"),
        (["--model.width=0"], r"model\.width is 0; it must be at least 1"),
        (["--model.codes=1"], r"model\.codes is 1; use at least 2, such as 512"),
        (["--model.codes_after=-1"], r"model\.codes_after is -1; it must not be negative"),
        (["--model.quantiser=fsq", "--model.levels=[8,2]"], r"model\.levels is \[8, 2\]; .* such as \[8, 8, 8\]"),
        (["--model.quantiser=fsq", "--model.levels=[]"], r"model\.levels is \[\]; .* such as \[8, 8, 8\]"),
        (["--model.target=1"], r"model\.target is 1\.0; use a decay in \[0, 1\), such as 0\.99, or 0"),
        (["--model.tokens=cell"], r"model\.tokens.*cells"),
        (["--model.contxt=mean"], "context"),
        (["--model.context=max"], r"model\.context.*attention"),
        (["--model.quantiser=rvq"], r"model\.quantiser.*fsq"),
        (["--data.augment=perhaps"], r"data\.augment.*bool"),
        (["--loss.objective=info"], r"loss\.objective.*infonce"),
        (["--loss.temperature=0.6"], r"loss\.temperature 0\.6 must lie within loss\.bounds \[0\.02, 0\.5\]"),
        (["--loss.bounds=[0.5,0.02]"], r"loss\.temperature 0\.1 must lie within loss\.bounds \[0\.5, 0\.02\]"),
        (["--loss.bounds=[0,0.5]"], r"within loss\.bounds \[0\.0, 0\.5\], both above 0"),
        (["--loss.queue=-1"], r"loss\.queue is -1; it must not be negative"),
        (["--loss.sigreg=1"], r"loss\.sigreg is 1\.0; use a share in \[0, 1\), such as 0\.05"),
        (["--loss.slices=0"], r"loss\.slices is 0; use at least 1, such as 256"),
        (
            ["--loss.objective=lejepa", "--model.target=0"],
            r"loss\.objective lejepa .*loss\.sigreg to 0\.05, or .*infonce",
        ),
        *((f"--loss.{k}=-1", rf"loss\.{k} is -1\.0; it must not") for k in ("commitment", "relational", "colour")),
        *((f"--loss.{k}=-1", rf"loss\.{k} is -1\.0; it must not") for k in ("flip", "shift")),
        (["--train.monitor=val/loss/sigreg"], r"train\.monitor is 'val/loss/sigreg', which is not measured.*infonce"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.startswith("--") else " ".join(x) if isinstance(x, list) else "",
)
def test_a_configuration_that_cannot_be_trained_is_refused_with_what_to_do(more, said, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        run(tmp_path, *SMALL, *([more] if isinstance(more, str) else more))


def mixed(folder: Path) -> Path:
    """ARC-AGI-2's training tasks hold evaluation tasks of ARC-AGI-1."""
    revised = raw(1)
    revised["train"][0]["input"][0][0] = (revised["train"][0]["input"][0][0] + 1) % 10
    return written(folder, {"training/a": raw(0), "training/b": raw(1), "evaluation/b": revised})


def unanswered(folder: Path) -> Path:
    tasks = {f"training/{k}": raw(k) for k in range(4)}
    for task in tasks.values():
        del task["test"][0]["output"]
    return written(folder, tasks)


def only_one(folder: Path) -> Path:
    return written(folder, {"training/a": raw(0)})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            mixed,
            r"1 of 1 held-out tasks are among those.*evaluation/b\.json.*Train and test on one edition",
        ),
        (unanswered, r"4 of 4 tasks.*test 1 has no output.*give the output.*repair or remove them"),
        (only_one, r"nothing is left for val: 1 items form 1 groups.*Add"),
        (lambda folder: folder, r"holds no task; accepted are.*training/ and evaluation/"),
        (lambda folder: folder / "nowhere", r"neither a file nor a folder; accepted are"),
    ],
    ids=["mixed", "unanswered", "only one", "empty", "nowhere"],
)
def test_tasks_that_cannot_be_learnt_from_are_refused_with_what_to_do(make: Callable[[Path], Path], said, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        run(tmp_path / "runs", f"--data.source={make(tmp_path)}", "--data.items=null", *SMALL)
    assert not (tmp_path / "runs").exists(), "before anything is begun"


def test_a_few_tasks_of_a_folder_train_beside_generated_ones(tmp_path):
    """One demonstration, unlike sizes and tasks of few pairs among them."""
    tasks = {f"training/{k}": raw(k, demonstrations=1 + k % 3) for k in range(6)}
    source = written(tmp_path, tasks | {f"evaluation/{k}": raw(k) for k in range(100, 104)})
    words = ("--train.steps=4", "--train.validate_every=4", "--health.on=false")
    found = run(tmp_path / "runs", *INFONCE, f"--data.source={source}", "--data.items=30", *words, "--loss.queue=32")
    assert found.record["data"]["items"] == {"train": 33, "val": 7}
    readings = json.loads((found.path / "evaluation.json").read_text())["readings"]
    assert readings["val/real/top1"]["n"] == 4
    assert readings["val/generated/top1"]["n"] == 3
