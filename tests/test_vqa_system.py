"""Visual question answering from command to answer: stages, rates and ramps as applied; killed, asked, refused."""

import csv
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ran, resume, start, wait_for
from PIL import Image
from test_resume import differing, model, rates, rows, same, state
from torch import Tensor

import intaglio
from intaglio import answering
from intaglio.api import load_model
from intaglio.cli import main
from intaglio.data.batches import fixed_batches
from intaglio.data.engravings import Engravings
from intaglio.history import read_history
from intaglio.history.run_folder import RunFolder
from intaglio.models.vqa import VqaModel
from intaglio.systems.optimizers import describe_groups
from intaglio.training import checkpoint
from intaglio.training.kinds import kind_of
from intaglio.training.loop import measure

COMMON = [
    *("--train.steps=20", "--train.batch_size=6", "--train.log_every=1", "--train.keep=9", "--train.validate_every=10"),
    *("--train.checkpoint_every=5", "--train.validate_items=24", "--train.ema=0.9", "--train.precision=fp32"),
    *("--train.device=cpu", "--optim.warmup=4", "--data.items=60", "--data.image_size=16", "--health.probe=24"),
    *("--data.together=3", "--model.width=16", "--model.heads=2", "--model.vision_layers=1", "--model.latents=3"),
    *("--model.question_layers=1", "--model.fusion_layers=1", "--model.reasoning_layers=1", "--model.answer_layers=1"),
    *("--model.dims=4", "--model.vocabulary=200", "--loss.ramp=8", "--loss.floor=0.1"),
]
STAGED = [
    '--stages=[{"until": 6, "freeze": ["vision"], "without": ["preference"]}, {"until": 12, "freeze": ["answer"]}]',
    *("--rates.vision=0.1", "--rates.bottleneck=2", "--loss.preference=0.3", "--loss.candidates=3"),
    "--loss.orthogonality=0.1",
]


def run(runs: Path, *more: str, **options: Any) -> RunFolder:
    folder = intaglio.train("vqa-small", [*COMMON, "--name=a", f"--runs={runs}", *more], quiet=True, **options)
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two stages, three rates, all terms."""
    return run(tmp_path_factory.mktemp("staged"), *STAGED)


def stopped(whole: RunFolder, step: int, at: Path) -> RunFolder:
    """A copy of a run without what came after a step."""
    shutil.copytree(whole.path, at)
    for file in at.glob("checkpoints/step-*.ckpt"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()
    shutil.rmtree(at / "model")
    return RunFolder(at)


def column(found: RunFolder, name: str) -> dict[int, float]:
    table = read_history(found.metrics)
    some = table.filter(table["name"] == name)
    return dict(zip(some["step"].to_list(), some["value"].to_list(), strict=True))


# What is applied


@pytest.mark.parametrize("step", [5, 10])
def test_a_run_that_stopped_in_a_stage_and_went_on_is_the_uninterrupted_one(step, staged, tmp_path):
    same(resume(stopped(staged, step, tmp_path / "a").path), staged)


def test_a_run_killed_in_the_middle_of_a_stage_goes_on_as_if_it_had_not_been(staged, tmp_path):
    process = start("train", "vqa-small", *COMMON, "--name=a", f"--runs={tmp_path}", *STAGED)
    wait_for(process, tmp_path / "a" / "metrics.jsonl", 11)
    process.kill()
    process.communicate()
    same(resume(tmp_path / "a"), staged)


def test_frozen_parts_have_no_update_at_all(tmp_path):
    """Step for step, from the weights themselves: vision until 6, the decoder from 6 to 12, then all."""
    seen: list[dict[str, Tensor]] = []

    def record(system: Any) -> None:
        step = system.optimizer_step

        def after(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            seen.append({name: p.detach().clone() for name, p in system.model.network.named_parameters()})

        system.optimizer_step = after
        seen.append({name: p.detach().clone() for name, p in system.model.network.named_parameters()})

    run(tmp_path, *STAGED, "--train.steps=14", "--train.validate_every=14", "--health.on=false", alter=record)
    moving = [{n.partition(".")[0] for n in a if not torch.equal(a[n], b[n])} for a, b in pairwise(seen)]
    everything = {"vision", "question", "fusion", "bottleneck", "answer"}
    assert moving[:6] == [everything - {"vision"}] * 6
    assert moving[6:12] == [everything - {"answer"}] * 6
    assert moving[12:] == [everything] * 2


def test_parts_have_the_rates_that_were_asked_for(staged):
    groups = state(staged)["optimizer_states"][0]["param_groups"]
    highest = {g["name"].partition(":")[0]: g["initial_lr"] for g in groups}
    rate = staged.config().optim.rate
    assert highest["vision"] == pytest.approx(0.1 * rate)
    assert highest["bottleneck"] == pytest.approx(2 * rate)
    assert highest["biases, norms, embeddings"] == rate
    shares = {g["lr"] / g["initial_lr"] for g in groups}
    assert max(shares) - min(shares) < 1e-12, "one schedule"
    assert max(rates(staged)) == pytest.approx(rate), "what is logged is of the parts without a rate of their own"
    assert sum(len(g["params"]) for g in groups) == len(dict(load_model(staged.path).network.named_parameters()))


def test_every_rate_is_applied_logged_and_judged(tmp_path):
    """From the optimizer itself, step for step; a part whose rate is not the configured one is found by name."""
    seen: list[dict[str, float]] = []

    def record(system: Any, factor: float = 1.0) -> None:
        clip = system.configure_gradient_clipping

        def before(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= factor if group["name"].startswith("vision") else 1
            clip(optimizer, *args, **kwargs)
            seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})

        system.configure_gradient_clipping = before

    def logged(found: RunFolder) -> dict[str, list[float]]:
        names = {"": "optimizer", "vision": "optimizer.vision", "bottleneck": "optimizer.bottleneck"}
        return {part: list(column(found, f"train/{site}/rate").values()) for part, site in names.items()}

    found = run(tmp_path, *STAGED, alter=record)
    for name in seen[0]:
        assert logged(found)[name.rpartition(": ")[0]] == [groups[name] for groups in seen]
    assert logged(found)["vision"][9] == pytest.approx(0.1 * logged(found)[""][9])
    assert not learning_rate_off(found)
    (message,) = learning_rate_off(run(tmp_path, *STAGED, alter=lambda system: record(system, 10)))
    assert "the rate of vision was" in message


def learning_rate_off(found: RunFolder) -> list[str]:
    findings = json.loads((found.path / "findings.json").read_text())["findings"]
    return [f["message"] for f in findings if f["rule"] == "learning-rate-off"]


def test_what_is_printed_of_a_group_is_its_own_rate(staged):
    groups = state(staged)["optimizer_states"][0]["param_groups"]
    parameters = [{**g, "params": [torch.empty(2, 3)] * len(g["params"])} for g in groups]
    rate, lines = staged.config().optim.rate, describe_groups(parameters)
    for line in lines:
        factor = {"vision": 0.1, "bottleneck": 2}.get(line.partition(":")[0], 1)
        assert f"rate {factor * rate:g}, decay" in line
    assert len({line.rpartition("rate")[2].partition(",")[0] for line in lines}) == 3


def test_a_look_encodes_each_held_out_image_once_and_leaves_all_as_it_is(staged):
    """Weights, buffers, modes, what trains and the global generator; its numbers are those of the terms."""
    kind = kind_of(staged.config())
    prepared = kind.prepare(None, None, None, lambda *told: None)
    system: Any = kind.build(prepared)
    system.on_train_batch_start(None, 0)  # the first stage freezes vision
    before = whole(system)
    seen: list[int] = []
    handle = system.model.network.vision.register_forward_hook(lambda m, given, out: seen.append(len(given[0])))
    batches = list(fixed_batches(prepared.data, prepared.splits["val"][:24], 6))
    readings = measure(system, iter(batches), None)
    handle.remove()
    assert seen == [len(batch.images) for batch in batches]
    after = whole(system)
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x, after[name]) if isinstance(x, Tensor) else x == after[name], name
    with torch.no_grad():
        system.eval()
        nats = [float(system.loss_terms(batch)["answer"].value) for batch in batches]
    assert readings["val/loss/answer"].value == pytest.approx(np.mean(nats), rel=1e-6)


def whole(system: Any) -> dict[str, Any]:
    modules = {f"mode {name}": module.training for name, module in system.named_modules()}
    trained = {f"trained {name}": p.requires_grad for name, p in system.named_parameters()}
    gradients = {f"gradient {name}": p.grad for name, p in system.named_parameters()}
    tensors = {name: x.clone() for name, x in system.state_dict().items()}
    return {**tensors, **modules, **trained, **gradients, "generator": torch.get_rng_state()}


def test_the_ramp_and_every_weight_are_applied(staged):
    """Each logged total is the sum of the logged terms by their logged weights, and KL's weight rises over 8 steps."""
    weight, total = column(staged, "train/weight/kl"), column(staged, "train/loss/total")
    beta = staged.config().loss.kl
    assert [weight[k] for k in range(1, 21)] == pytest.approx([beta * min(1, k / 8) for k in range(1, 21)])
    names = ("answer", "kl", "orthogonality", "preference")
    terms = {n: (column(staged, f"train/loss/{n}"), column(staged, f"train/weight/{n}")) for n in names}
    for step in range(1, 21):
        parts = [value[step] * weight[step] for value, weight in terms.values() if step in value]
        assert total[step] == pytest.approx(sum(parts), rel=1e-5)
    assert min(terms["preference"][0]) == 7, "the first stage is without it"
    assert terms["answer"][0][1] > terms["answer"][0][20] > 1, "nats of a whole answer"


def test_the_kl_comes_on_behind_its_stage_and_rises_from_there(tmp_path):
    """From what is summed for the gradient: nothing until step 4, then a ramp of 4 steps."""
    applied: list[float | None] = []

    def record(system: Any) -> None:
        weigh = system.weigh

        def seen(terms: Any) -> Any:
            total = weigh(terms)
            parts = sum(t.weight * float(t.value.detach()) for t in terms.values())
            assert float(total.detach()) == pytest.approx(parts, rel=1e-5)
            if system.training:
                applied.append(terms["kl"].weight if "kl" in terms else None)
            return total

        system.weigh = seen

    words = ["--loss.ramp=4", "--loss.kl=0.5", "--train.steps=10", "--train.validate_every=10", "--health.on=false"]
    run(tmp_path, '--stages=[{"until": 4, "without": ["kl"]}]', *words, alter=record)
    assert applied[:4] == [None] * 4
    assert applied[4:] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_the_preference_has_a_gradient_through_log_probabilities(staged):
    """Along its own gradient the better candidates become likelier; scores alone have none."""
    found: dict[str, Any] = {}

    def look(system: Any) -> None:
        prefer = system.prefer

        def watched(z: Tensor, truth: Tensor) -> Any:
            made = prefer(z, truth)
            if made.loss.requires_grad and float(made.ties) < 1:
                network = system.model.network
                grads = torch.autograd.grad(made.loss, list(network.parameters()), retain_graph=True, allow_unused=True)
                found.setdefault("norm", math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None)))
            return made

        system.prefer = watched

    run(staged.path.parent / "look", *STAGED[1:], "--train.steps=4", "--train.validate_every=4", alter=look)
    assert found["norm"] > 0


def test_two_processes_freeze_and_thaw_as_one_does(tmp_path):
    """Vision stands still for six steps, the decoder for the next six; losses to 1e-4, and all weights together to
    1e-3, as Adam makes steps of what rounding leaves of a gradient."""
    words = [*STAGED, "--train.steps=14", "--train.validate_every=14", "--health.on=false"]
    code, said = ran("train", "vqa-small", *COMMON, *words, "--train.devices=2", "--name=a", f"--runs={tmp_path}")
    assert code == 0, said
    two, one = RunFolder(tmp_path / "a"), run(tmp_path / "one", *words)
    a, b = ({(r[0], r[2]): r[3] for r in rows(x) if r[2].split("/")[1] in ("loss", "weight")} for x in (two, one))
    assert a == pytest.approx(b, rel=1e-4)
    assert len(a) > 100
    first = [checkpoint.read(x.checkpoints / checkpoint.name(5))["state_dict"] for x in (two, one)]
    last = [state(x)["state_dict"] for x in (two, one)]
    vision = [name for name in last[1] if ".vision." in name]
    for name in vision:
        assert torch.equal(first[0][name], first[1][name]), "both as they began"
        assert not torch.equal(first[0][name], last[0][name])
    for names in (list(last[1]), vision):
        mine, theirs = (torch.cat([x[name].flatten() for name in names]) for x in last)
        assert (mine - theirs).norm() < 1e-3 * theirs.norm()


def test_patience_counts_from_behind_the_last_stage_and_the_ramp(tmp_path):
    words = (
        "--train.patience=1",
        "--train.validate_every=2",
        "--train.steps=40",
        "--optim.rate=1e-9",
        "--optim.floor=0",
    )
    stages = '--stages=[{"until": 12, "freeze": ["vision"]}]'
    found = run(tmp_path, *words, stages, "--train.ema=0", "--health.on=false")
    assert 13 < found.record["step"] < 40, "nothing is learnt at such a rate, and yet it looks again"


def test_health_changes_no_weight(staged, tmp_path):
    without = run(tmp_path, *STAGED, "--health.on=false")
    for key in ("state_dict", "optimizer_states"):
        assert differing(state(without)[key], state(staged)[key]) == []


def test_fine_tuning_keeps_the_tokenizer_and_what_does_not_fit_is_refused(staged, tmp_path):
    child = run(tmp_path, *STAGED, "--train.steps=4", "--train.validate_every=4", parent=staged.path)
    assert max(rates(child)) == pytest.approx(max(rates(staged)) / 10)
    assert model(child).keys() == model(staged).keys()
    assert (child.model / "answers.json").read_text() == (staged.model / "answers.json").read_text()
    with pytest.raises(ValueError, match="has another shape than this recipe"):
        run(tmp_path, *STAGED, "--model.latents=4", parent=staged.path)


# Uses


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images and a table of questions about them, one of them about none."""
    folder = tmp_path_factory.mktemp("asked")
    for k in range(2):
        Image.fromarray(Engravings(2, seed=5).image(k, 64)).save(folder / f"{k}.png")
    rows_ = [("0", "how many things are there?"), ("1", "what is the largest thing?"), ("7", "where?"), ("0", "")]
    with (folder / "questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("img", "question"), *rows_])
    return folder


def test_an_image_is_asked_and_explained(staged, asked, tmp_path):
    questions = ["how many things are there?", "où est le bateau 🚢?"]
    found = answering.answer(staged.path, asked / "0.png", questions, samples=8, explained=tmp_path / "why.png")
    assert [row["question"] for row in found] == questions
    for row in found:
        assert 0 < row["probability"] <= 1
        assert sum(row["spread"].values()) == pytest.approx(1)
        assert np.array(row["places"]).shape == (2, 2)
        assert len(row["latents"]) == 3
    assert "pieces of the question are unknown" in found[1]["note"]
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.width > 1000
    known = answering.answer(staged.path, asked / "0.png", questions[:1], closed=True)[0]["answer"]
    loaded = load_model(staged.path)
    assert isinstance(loaded, VqaModel)
    assert known in loaded.known


def test_the_command_answers_a_table_and_says_what_it_left_out(staged, asked, tmp_path):
    out = tmp_path / "answers.csv"
    table = ("--table", str(asked / "questions.csv"), "--columns", "image=img")
    code, told = ran("answer", str(staged.path), *table, "--out", str(out))
    assert code == 0, told
    assert "skipped: 7: there is no image '7'" in told
    assert "skipped: 0: row without question" in told
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["image"] for line in lines] == ["0", "1", "7", "0"]
    assert [bool(line["answer"]) or bool(line["probability"]) for line in lines] == [True, True, False, False]
    code, told = ran("answer", str(staged.path), str(asked / "0.png"), "how many things are there?", "--json")
    assert code == 0, told
    alone = json.loads(told)["answers"][0]
    assert alone["probability"] == pytest.approx(float(lines[0]["probability"]), abs=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}"], "Give an image and questions about it, or --table FILE"),
        (["{run}", "{asked}/0.png"], "There is no question"),
        (["{run}", "{asked}/0.png", " "], "A question is empty"),
        (["{run}", "{asked}/9.png", "what?"], "9.png"),
        (["{run}", "--table", "{asked}/none.csv"], "is no file"),
        (["{run}", "--table", "{asked}/questions.csv", "--columns", "image=imge"], "did you mean 'img'"),
    ],
)
def test_what_cannot_be_answered(words, said, staged, asked, capsys):
    assert main(["answer", *(word.format(run=staged.path, asked=asked) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_other_verbs_say_what_a_model_of_questions_can_do(staged, tmp_path, capsys):
    for verb in (["caption", "{run}", "x.png"], ["generate", "{run}", "--out", str(tmp_path / "g")]):
        assert main([word.format(run=staged.path) for word in verb]) == 2
        assert "answer" in capsys.readouterr().err


def test_held_out_answers_are_measured_beside_what_the_question_gives_away(staged):
    readings = json.loads((staged.path / "evaluation.json").read_text())["readings"]
    assert readings["val/answer/accuracy"]["null"] == readings["val/answer/question_only"]["value"]
    assert readings["val/answer/question_only"]["value"] >= readings["val/answer/question_only"]["null"] - 0.05
    for kind in ("object", "count", "shading", "place"):
        assert 0 <= readings[f"val/answer.{kind}/accuracy"]["null"] <= 1
    assert readings["val/answer/shuffled_latent_drop"]["null"] == 0
    assert {f"val/latent.{k}/drop" for k in range(3)} <= readings.keys()
    entropy, kl = readings["val/answer/entropy"]["value"], readings["val/latent/kl_nats"]["value"]
    assert readings["val/latent/rate_over_entropy"]["value"] == pytest.approx(kl / entropy, rel=1e-6)
    assert rows(staged)


# What cannot be trained


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--model.latents=0", r"model\.latents is 0; it must be at least 1"),
        ("--model.dims=0", r"model\.dims is 0; it must be at least 1"),
        ("--model.dims=1", r"model\.dims is 1; use at least 2"),
        ("--model.fusion_layers=0", r"without one no question ever looks at the image"),
        ("--model.width=18", r"model\.width 18 must be divisible by model\.heads 2, and by 4"),
        ("--model.vocabulary=5", r"four tokens are special"),
        ("--model.temperature=-1", r"model\.temperature is -1\.0; it must not"),
        ("--model.bottleneck=vae", r"bottleneck.*vib"),
        ("--model.bottleneck=none", r"loss\.floor has no effect with model\.bottleneck none"),
        ("--loss.kl=-1", r"loss\.kl is -1\.0; it must not be negative"),
        ("--loss.floor=-1", r"loss\.floor is -1\.0"),
        ("--loss.beta=1", r"unknown key loss\.beta"),
        ("--data.answer_length=2", r"at least 3: START, a token, END"),
        ("--data.together=0", r"data\.together is 0"),
        ("--rates.visoin=0.1", r"no part 'visoin'\. Did you mean vision\?"),
        (
            '--rates={"vision": 0.1, "question": 1, "fusion": 1, "bottleneck": 1, "answer": 2}',
            r"a factor for every part: leave one out",
        ),
        ("--rates.vision=0", r"rates\.vision is 0\.0; use more than 0, or freeze"),
        (
            '--stages=[{"until": 5, "freez": ["vision"]}]',
            r"stages, line 1: unknown key 'freez'\. Did you mean freeze\?",
        ),
        ('--stages=[{"until": 5, "freeze": ["visoin"]}]', r"unknown part 'visoin'\. Did you mean vision\?"),
        ('--stages=[{"until": 5, "without": ["kll"]}]', r"unknown term 'kll'\. Did you mean kl\?"),
        ('--stages=[{"freeze": ["vision"]}]', r"until is None; give an optimizer step, or a share"),
        ('--stages=[{"until": 1.5}]', r"a share is at most 1\.0"),
        ('--stages=[{"until": 8}, {"until": 5}]', r"line 2 ends at step 5, which is not behind"),
        (
            "--train.monitor=val/loss/exact",
            r"train\.monitor is 'val/loss/exact', which is not measured.*val/loss/wrong",
        ),
    ],
)
def test_a_configuration_that_cannot_be_trained_is_refused_with_what_to_do(word, said, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        run(tmp_path, word)
