"""Faults of visual question answering in real small trainings: each is found and named, and its healthy twin is quiet.

The cases marked V are those of the documented system. Images are a coloured square on light or dark noise, and asked is
its colour, or whether the ground is light. Shapes: B questions, N candidates, K latents of Z numbers, T positions.
"""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import intaglio
from intaglio.data.questions import prepare
from intaglio.data.tokenizer import END
from intaglio.history.run_folder import RunFolder
from intaglio.nn.bottleneck import GatedCross
from intaglio.objectives import Term
from intaglio.objectives.bottleneck import Preference
from intaglio.systems import vqa
from intaglio.systems.optimizers import parameter_groups
from intaglio.systems.vqa import VqaSystem

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}


def write_squares(folder: Path, images: int, seed: int = 0) -> Path:
    """So many images of 16 by 16 pixels with a ``questions.csv``, in which two are asked about each; the folder."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    for k in range(images):
        colour, light = str(rng.choice(list(COLOURS))), bool(rng.integers(2))
        pixels = rng.integers(0, 76, (16, 16, 3)).astype(np.uint8) + np.uint8(180 * light)
        top, left = rng.integers(0, 8, 2)
        pixels[top : top + 9, left : left + 9] = COLOURS[colour]
        Image.fromarray(pixels).save(folder / f"{k:03}.png")
        rows.append((f"{k:03}", "what colour is it?", colour, "colour"))
        rows.append((f"{k:03}", "is the ground light?", "yes" if light else "no", "ground"))
    write_questions(folder, [rows[k] for k in rng.permutation(len(rows))])
    return folder


def write_questions(folder: Path, rows: list[tuple[str, ...]]) -> None:
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("img_id", "question", "answer", "type"), *rows])


def read_rows(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "questions.csv").open(newline="", encoding="utf-8") as file:
        return [tuple(row) for row in list(csv.reader(file))[1:]]


def split_by_question(corpus: Any, held_out: float, seed: int) -> tuple[dict[str, np.ndarray], int]:
    """As it is done to a table: its rows by lot, whatever images they are about."""
    mixed = np.random.default_rng(seed).permutation(len(corpus))
    count = int(held_out * len(corpus))
    return {"train": np.sort(mixed[count:]), "val": np.sort(mixed[:count])}, 0


COMMON = [
    *("--data.items=null", "--data.held_out=0.25", "--data.image_size=16", "--train.batch_size=32", "--train.ema=0.9"),
    *("--train.precision=fp32", "--train.device=cpu", "--train.log_every=2", "--train.validate_items=64"),
    *("--train.steps=180", "--optim.warmup=18", "--optim.rate=3e-3", "--health.probe=64", "--train.keep=1"),
    *("--model.width=32", "--model.heads=2", "--model.vision_layers=1", "--model.question_layers=1"),
    *("--model.fusion_layers=1", "--model.reasoning_layers=1", "--model.answer_layers=1", "--model.latents=2"),
    *("--model.dims=4", "--loss.ramp=40", "--loss.kl=0.02", "--stages=[]"),
]


def until(step: int, first: int = 4) -> list[str]:
    """What is wrong from the start is found at the first look, in a quarter of a run, which then ends by its plan."""
    plan = [{"watch": "train/loss/total", "above": -1, "from": step, "do": "stop"}]
    length = [f"--train.steps={4 * step}", "--optim.warmup=1", f"--train.validate_every={first}"]
    return [*length, "--train.log_every=1", "--loss.ramp=2", f"--plan={json.dumps(plan)}"]


SHORT = ("--train.steps=80", "--optim.warmup=8", "--loss.ramp=8", "--train.validate_every=40")

BRIEF = until(4, first=16)
"""Without a look at held-out items, but for the probe."""

V = {
    *("question-only", "posterior-collapse", "decoder-ignores-latent", "kl-free", "rate-too-high", "kl-units"),
    *("temperature-misstates-rate", "stopped-in-ramp", "weight-not-applied", "term-inert", "not-in-optimizer"),
    *("tied-and-frozen", "dead-parameters", "learning-rate-off", "diverged", "overfitting", "no-learning"),
    *("split-leak", "data-replaced", "validation-pollutes"),
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data") / "squares", 100)


@pytest.fixture(scope="module")
def train(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real training on them."""

    def trained(*more: str, source: Path = squares, **options: Any) -> RunFolder:
        words = [*COMMON, f"--data.source={source}", "--name=a", f"--runs={tmp_path_factory.mktemp('runs')}", *more]
        folder = intaglio.train("vqa-small", words, quiet=True, **options)
        assert folder is not None
        return folder

    return trained


@pytest.fixture(scope="module")
def healthy(train: Any) -> RunFolder:
    return train()


STAGES = '--stages=[{"until": 0.2, "freeze": ["vision"], "without": ["preference"]}]'


@pytest.fixture(scope="module")
def staged(train: Any) -> RunFolder:
    """The twin of faults of the curriculum, the preference and patience."""
    words = ("--loss.preference=0.2", "--loss.orthogonality=0.05", "--rates.vision=0.5", "--loss.kl=0.05")
    return train(STAGES, *words, "--train.patience=4", "--train.validate_every=20")


def told(run: RunFolder) -> dict[str, Any]:
    return json.loads((run.path / "findings.json").read_text())


def found(run: RunFolder) -> dict[str, Any]:
    """The findings, by rule, the gravest of each; all messages of a rule in ``said``."""
    by_rule: dict[str, Any] = {}
    for f in told(run)["findings"]:
        first = by_rule.setdefault(f["rule"], SimpleNamespace(**f, said=""))
        first.said += f["message"]
    return by_rule


def test_the_healthy_twin_is_quiet_and_every_one_of_these_rules_looked(healthy):
    answer = told(healthy)
    assert not answer["findings"]
    assert set(answer["passed"]) >= V


def test_the_healthy_twin_with_a_curriculum_is_quiet(staged):
    answer = told(staged)
    rules = {"teacher-inert", "not-in-optimizer", "stopped-in-ramp", "learning-rate-off", "weight-not-applied"}
    assert not [f for f in answer["findings"] if f["severity"] == "fail" or f["rule"] in V | rules]
    assert set(answer["passed"]) >= rules


# Does the answer need the image, and the latents?


def blind(self: GatedCross, x_BTD: Tensor, memory_UPD: Tensor, which_B: Tensor) -> Tensor:
    """What was looked at stays behind a gate that is never opened."""
    keys, values = self.attention.keys_values(memory_UPD)
    looked = self.attention(self.norm(x_BTD), keys[which_B], values[which_B])
    x_BTD = x_BTD + 0 * looked
    return x_BTD + self.gates[1].tanh() * self.joined(x_BTD)


def test_an_image_that_never_reaches_the_question_is_found(train, monkeypatch):
    """V: answers by the commonest of each kind."""
    monkeypatch.setattr(GatedCross, "forward", blind)
    faults = found(train(*BRIEF))
    assert faults["question-only"].severity == "fail"
    assert "Another image costs an answer 0.000 nats" in faults["question-only"].message


def test_answers_that_the_question_gives_away_are_found(train, squares, tmp_path):
    """V: a majority of 10.4 % for each kind, and hardly more learnt; here all is red."""
    write_squares(tmp_path / "a", 100)
    rows = [(image, q, "yes" if kind == "ground" else "red", kind) for image, q, _, kind in read_rows(tmp_path / "a")]
    write_questions(tmp_path / "a", rows)
    faults = found(train(*SHORT, source=tmp_path / "a"))
    assert "Another image costs an answer" in faults["question-only"].said
    assert "ground questions are answered rightly in 100.0% of cases" in faults["question-only"].said


def test_a_decoder_that_ignores_its_latents_is_found(train):
    def alter(system: VqaSystem) -> None:
        own = system.model.network.bottleneck.memory
        system.model.network.bottleneck.memory = lambda z: own(torch.zeros_like(z))

    faults = found(train(*BRIEF, alter=alter))
    assert faults["posterior-collapse"].severity == "fail"
    assert "exchanging it costs the decoder nothing" in faults["posterior-collapse"].message
    assert "cost exactly 0 nats" in faults["decoder-ignores-latent"].message


def test_a_weight_that_empties_the_latents_is_found(train):
    fault = found(train(*SHORT, "--loss.kl=5"))["posterior-collapse"]
    assert fault.severity == "fail"
    assert fault.evidence["nats"] < 0.1
    assert fault.remedies[0]["do"] == "lower --loss.kl tenfold"


# Rate and pressure


def test_a_floor_that_no_latent_exceeds_is_found(train):
    """V: .1 on a mean over 256 numbers is 25.6 nats of a latent; raw, it held 8 to 20."""
    faults = found(train(*BRIEF, "--loss.floor=25"))
    assert faults["kl-free"].severity == "warning"
    assert "No group of latent exceeds its free bits" in faults["kl-free"].message
    assert not {"kl-parked", "term-inert"} & set(faults)


def test_a_rate_that_is_parked_at_its_floor_is_told_and_is_no_fault(train):
    """V: three days were lost on it."""
    faults = found(train(*SHORT, "--train.validate_every=10", "--loss.floor=1.5", "--loss.kl=0.5"))
    assert faults["kl-parked"].severity == "note"
    assert "parked at its floor of 3 nats" in faults["kl-parked"].message
    assert not {"kl-free", "posterior-collapse", "kl-units"} & set(faults)


def test_a_rate_far_above_what_answers_carry_is_found(train):
    """V: 77 nats for 6.8 bits; the weight was meant for a mean."""
    fault = found(train(*SHORT, "--loss.kl=1e-4"))["rate-too-high"]
    assert fault.evidence["nats"] > 4 * fault.evidence["entropy"] > 4


def test_a_kl_that_is_averaged_over_numbers_is_found(train, monkeypatch):
    """V: a weight of 3.0 was a β of .006 to .010."""
    own = vqa.kl_to_standard
    monkeypatch.setattr(vqa, "kl_to_standard", lambda mean, spread: own(mean, spread) / mean.shape[-1])
    fault = found(train(*BRIEF))["kl-units"]
    assert fault.evidence["factor"] == pytest.approx(4, rel=0.2)
    assert "is a β of" in fault.message


def test_latents_that_are_drawn_at_another_temperature_are_found(train):
    """V: .6 in training, and KL for 1."""
    fault = found(train(*BRIEF, "--model.temperature=0.6"))["temperature-misstates-rate"]
    assert fault.evidence["noise_ratio"] == pytest.approx(0.6, abs=0.08)
    assert "times the signal-to-noise ratio that is paid for" in fault.message


# What is logged, and what is applied


def test_a_ramp_that_is_only_logged_is_found(train):
    """V: β was 3.0 from the first step on, in every plot it rose."""

    def alter(system: VqaSystem) -> None:
        own, beta = system.weigh, system.config.loss.kl

        def weigh(terms: Any) -> Tensor:
            total = own({**terms, "kl": Term(terms["kl"].value, beta)})
            system.weights = {name: float(weight) for name, (_, weight) in terms.items()}
            return total

        system.weigh = weigh

    fault = found(train(*BRIEF, "--loss.ramp=8", "--loss.kl=0.5", alter=alter))["weight-not-applied"]
    assert fault.severity == "fail"
    assert fault.evidence["applied"] > fault.evidence["logged"]


def of_scores(log_probability_BN: Tensor, score_BN: Tensor) -> Preference:
    """The document's: the margin by which the best answer's score is above the worst one's."""
    margin = score_BN.max(1).values - score_BN.min(1).values
    return Preference(F.relu(1 - margin).mean(), (margin == 0).float().mean())


def test_a_teacher_that_ranks_scores_is_found(train, monkeypatch):
    """V: constants have no gradient."""
    monkeypatch.setattr(vqa, "preference", of_scores)
    faults = found(train(*until(16, first=64), "--loss.preference=0.3"))
    assert faults["teacher-inert"].severity == "fail"
    assert "what it ranks does not depend on a parameter" in faults["teacher-inert"].said
    assert "The loss term preference teaches nothing: its gradient is zero" in faults["term-inert"].message


def test_a_teacher_whose_candidates_are_one_answer_is_found(train, monkeypatch):
    """V: best of N, of greedy answers."""
    own = VqaSystem.candidates

    def greedy(self: VqaSystem, z_BKZ: Tensor) -> Tensor:
        return own(self, z_BKZ)[:: self.config.loss.candidates].repeat_interleave(self.config.loss.candidates, 0)

    monkeypatch.setattr(VqaSystem, "candidates", greedy)
    fault = found(train(*BRIEF, "--loss.preference=0.3"))["teacher-inert"]
    assert "100% of the pairs that preference ranks have equal scores" in fault.said


def test_patience_that_runs_out_in_the_ramp_is_found(train, monkeypatch):
    """V: it stopped on a loss that rose because its weight did."""
    monkeypatch.setattr(VqaSystem, "patient_from", 0)
    words = ("--train.patience=1", "--train.validate_every=8", "--loss.ramp=40", "--train.monitor=val/loss/total")
    fault = found(train("--train.steps=48", "--train.log_every=1", "--optim.warmup=2", *words))["stopped-in-ramp"]
    assert "Patience can end the run at step 16" in fault.said
    assert "in which the weight of kl moves: it follows the ramp, not the model" in fault.said


# What is trained


def test_a_part_that_is_unfrozen_without_its_optimizer_is_found(train):
    """V: vision was “unfrozen” after three epochs, and never moved."""

    def alter(system: VqaSystem) -> None:
        groups, vision = system.groups, system.model.network.vision

        def of_what_trains_now() -> Any:
            vision.requires_grad_(False)
            return groups()

        system.groups = of_what_trains_now

    stages = '--stages=[{"until": 5, "freeze": ["vision"]}]'
    fault = found(train(*until(8), stages, alter=alter))["not-in-optimizer"]
    assert fault.severity == "fail"
    assert "model.network.vision" in fault.message


def test_a_head_that_is_frozen_with_the_question_is_found(train):
    """V: one table of tokens for questions and answers, frozen with the encoder that it came with."""

    def alter(system: VqaSystem) -> None:
        network = system.model.network
        network.answer.embedding.weight = network.question.embedding.weight
        system.on_train_batch_start = lambda *given: None  # nothing thaws what its author froze
        network.question.requires_grad_(False)

    fault = found(train(*BRIEF, alter=alter))["tied-and-frozen"]
    assert "are one tensor, and it is frozen" in fault.message
    assert "answer.embedding.weight" in fault.message


def test_a_decoder_at_ten_times_its_rate_is_found(train):
    """V: 5e-3 where 5e-4 was configured."""

    def alter(system: VqaSystem) -> None:
        def groups() -> list[dict[str, Any]]:
            network, rate = system.model.network, system.config.optim.rate
            rest = nn.ModuleList(part for name, part in network.named_children() if name != "answer")
            decoder = [g | {"lr": 10 * rate} for g in parameter_groups(network.answer, 0.0)]
            return [*decoder, *parameter_groups(rest, 0.0)]

        system.groups = groups

    fault = found(train(*BRIEF, alter=alter))["learning-rate-off"]
    assert fault.severity == "fail"
    assert fault.evidence["applied"] == pytest.approx(10 * fault.evidence["configured"])


def test_a_rate_that_is_raised_in_passing_diverges(train):
    """V: gradients to 81."""

    def alter(system: VqaSystem) -> None:
        own = system.configure_gradient_clipping

        def clip(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            if system.global_step >= 60:
                for group in optimizer.param_groups:
                    group["lr"] = 0.3
            own(optimizer, *args, **kwargs)

        system.configure_gradient_clipping = clip

    faults = found(train(*SHORT, alter=alter))
    assert faults["diverged"].severity == "fail"
    assert "the configuration asks for" in faults["learning-rate-off"].message


# Data


def test_answers_that_can_only_be_memorised_overfit(train, tmp_path):
    """V: answers by lot, as where the rows of two tables were joined wrongly."""
    write_squares(tmp_path / "a", 60)
    rows, rng = read_rows(tmp_path / "a"), np.random.default_rng(1)
    write_questions(tmp_path / "a", [(i, q, str(rng.choice(list(COLOURS))), kind) for i, q, _, kind in rows])
    words = ("--train.validate_every=10", "--model.bottleneck=deterministic", "--loss.kl=0", "--model.dims=16")
    fault = found(train("--train.steps=160", "--optim.warmup=8", *words, source=tmp_path / "a"))["overfitting"]
    assert fault.severity == "fail"
    assert "while training's" in fault.message


def test_an_image_on_both_sides_of_the_split_is_found(train, monkeypatch):
    """V: 2,633 shared images."""
    monkeypatch.setattr(prepare, "split_questions", split_by_question)
    fault = found(train(*BRIEF))["split-leak"]
    assert fault.severity == "fail"
    assert "× the very same image" in fault.message


def test_images_that_cannot_be_read_are_counted(train, squares, tmp_path):
    """V: a white image took their place."""
    write_squares(tmp_path / "a", 60)
    for k in range(6):
        (tmp_path / "a" / f"{k:03}.png").write_bytes(b"\x89PNG\r\n")
    fault = found(train(*BRIEF, "--data.bad_limit=0.2", source=tmp_path / "a"))["data-replaced"]
    assert "6 × unreadable" in fault.message


# Generation


def test_answers_that_are_written_otherwise_than_they_were_taught_are_found(train, monkeypatch):
    """Trained behind START and written behind END, as by a decoder that starts with another token."""
    monkeypatch.setattr("intaglio.models.vqa.START", END)
    fault = found(train())["free-running-gap"]
    assert fault.evidence["forced"] > fault.evidence["free"] + 0.15
    assert "writing on its own" in fault.message
