"""``intaglio check`` of visual question answering: each fault that a recipe or its questions show, and the document's
own settings."""

from dataclasses import replace
from functools import cache

import pytest
from test_faults_vqa import split_by_question, write_squares

from intaglio.config import load
from intaglio.health.check import check, report_lines
from intaglio.health.checks import subject_of, vqa
from intaglio.health.rules import static
from intaglio.health.rules.static import DataFacts, Facts, QuestionFacts

TINY = [
    *("--data.items=60", "--train.batch_size=8", "--train.precision=fp32", "--train.device=cuda", "--train.ema=0.9"),
    *("--data.image_size=32", "--health.probe=20", "--model.width=32", "--model.heads=2", "--model.vision_layers=1"),
    *("--model.question_layers=1", "--model.reasoning_layers=1", "--model.answer_layers=1", "--model.dims=4"),
]


def rules(findings, *severities):
    return {f.rule for f in findings if not severities or f.severity in severities} - {"memory-short"}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return "--data.items=null", f"--data.source={write_squares(tmp_path_factory.mktemp('data') / 'squares', 40)}"


@cache
def network():
    """Of the small recipe; no fault below changes it."""
    return subject_of(load("vqa-small", TINY)).system().model.network


def facts_of(*options):
    """A recipe as the rules see it, without the pass that measures it; its data has no fault."""
    config = load("vqa-small", [*TINY, *options])
    total = sum(p.numel() for p in network().parameters())
    terms = {"answer"} | ({"kl"} if config.model.bottleneck == "vib" else set())
    terms |= {term for term in ("orthogonality", "preference") if getattr(config.loss, term)}
    seen = {"val/loss/total", "val/loss/wrong", *(f"val/loss/{term}" for term in terms)}
    data = DataFacts(540, 60, 0, 255, 600, questions=QuestionFacts(200, (12, 5), 0, 3.7))
    rest = {"steps": config.train.steps, "data": data}
    return Facts(config, network(), total, total, total, terms, seen, {}, {}, **rest)


def test_the_small_recipe_has_no_fault_and_adds_up():
    report = check(load("vqa-small", ["--data.items=60", "--train.device=cuda", "--train.precision=fp32"]))
    assert not rules(report.findings)
    p = report.parameters
    assert sum(p.modules.values()) == p.total == p.trainable
    assert set(p.modules) == {"vision", "question", "fusion", "bottleneck", "answer"}
    assert report.memory.activations_bytes > report.memory.weights_bytes


def test_memory_and_time_are_estimated(squares):
    report = check(load("vqa-small", [*TINY, *squares, "--train.device=cpu"]))
    m = report.memory
    assert m.total_bytes == sum(
        (m.weights_bytes, m.gradients_bytes, m.optimizer_bytes, m.ema_bytes, m.activations_bytes)
    )
    assert m.gradients_bytes == m.ema_bytes == m.weights_bytes == 4 * report.parameters.total
    assert 0 < m.optimizer_bytes <= 2 * m.gradients_bytes
    assert report.time.total_seconds == pytest.approx(3000 * report.time.seconds_per_step)
    assert report.time.seconds_per_step > 0


FAULTS = [
    ("--loss.floor 25", "kl-free", "warning"),
    ("--loss.kl 0", "kl-free", "warning"),
    ("--model.temperature 0.6", "temperature-misstates-rate", "warning"),
    ("--model.temperature 0", "temperature-misstates-rate", "warning"),
    ("--loss.kl 3.0", "kl-units", "warning"),
    ("--loss.ramp 3000", "stopped-in-ramp", "warning"),
    ('--stages [{"until":3000,"without":["kl"]}]', "stopped-in-ramp", "warning"),
    ('--stages [{"until":1.0,"freeze":["vision"]}]', "stopped-in-ramp", "warning"),
    ("--train.patience 1 --train.validate_every 20", "stopped-in-ramp", "warning"),
    ("--rates.answer 10", "learning-rate-off", "warning"),
    ("--rates.bottleneck 0.1", "learning-rate-off", "warning"),
    ("--optim.warmup 3000", "learning-rate-off", "warning"),
    ("--train.monitor val/loss/preference", "validation-missing", "fail"),
    ("--train.batch_size 1024", "batch-exceeds-data", "fail"),
    ("--model.bottleneck deterministic", "weight-not-applied", "warning"),
]


@pytest.mark.parametrize(("options", "rule", "severity"), FAULTS)
def test_faults_that_the_configuration_shows(options, rule, severity):
    found = static.judge(wrong(options))
    assert [(f.rule, f.severity) for f in found] == [(rule, severity)]
    for remedy in found[0].remedies:
        assert rule not in rules(static.judge(wrong(f"{options} {remedy.options}")))


def wrong(options):
    return facts_of(*options.split())


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--model.bottleneck none --loss.kl 0",
        "--model.bottleneck deterministic --loss.kl 0",
        "--loss.floor 0.5",
        "--loss.kl 1",
        "--loss.preference 0.3 --loss.orthogonality 0.1",
        "--rates.vision 0.1 --rates.question 0.1",
        "--model.held_out_temperature 0.5",
        "--train.monitor val/loss/answer --train.patience 3",
    ],
)
def test_other_choices_are_no_faults(options):
    assert static.judge(wrong(options)) == []


def test_a_floor_is_held_against_what_answers_carry():
    """Free bits of 2 nats a latent are much for yes and no, and little for a sentence."""
    facts = facts_of("--loss.floor=2")
    for entropy, due in ((0.5, {"kl-free"}), (8.0, set())):
        data = replace(facts.data, questions=replace(facts.data.questions, entropy=entropy))
        assert rules(static.judge(replace(facts, data=data))) == due
    assert static.judge(replace(facts, data=replace(facts.data, questions=None))) == []


def test_questions_of_a_folder_are_counted(squares):
    subject = subject_of(load("vqa-small", [*TINY, *squares]))
    assert subject.look() == []
    data, told = subject.data, subject.data.questions
    assert data.train + data.held_out == data.sampled == 80
    assert (told.cut, told.longest[1]) == (0, 3)
    assert 1.5 < told.entropy < 1.8  # of four colours and two sides, as often asked for
    report = check(load("vqa-small", [*TINY, *squares, "--loss.floor=20"]))
    (fault,) = report.findings
    assert (fault.rule, fault.evidence["free"]) == ("kl-free", 120)


def test_data_that_is_not_there_is_a_finding_and_the_rest_is_checked(tmp_path):
    options = ["--data.items=null", f"--data.source={tmp_path / 'nowhere'}", "--loss.kl=3", "--loss.floor=25"]
    report = check(load("vqa-small", [*TINY, *options]))
    assert [(f.rule, f.severity) for f in report.findings] == [("data-unusable", "fail"), ("kl-units", "warning")]
    assert report.failing
    assert any("real vocabulary, lengths of questions and answers" in gap for gap in report.not_checked)
    assert report.parameters.total > 0
    empty = tmp_path / "empty"
    empty.mkdir()
    (finding,) = subject_of(load("vqa-small", [*TINY, "--data.items=null", f"--data.source={empty}"])).look()
    assert "holds no questions.csv" in finding.message


def test_an_image_on_both_sides_is_a_leak(squares, monkeypatch):
    """V: 2,633 shared images, of a split by question."""
    monkeypatch.setattr(vqa, "split_questions", split_by_question)
    subject = subject_of(load("vqa-small", [*TINY, *squares]))
    (found,) = subject.look()
    assert (found.rule, found.severity) == ("split-leak", "fail")
    assert found.evidence["images"] > 4


def test_the_documents_settings_are_seen_through():
    options = ["--data.items=100", "--train.device=cuda", "--train.precision=fp32", "--data.image_size=64"]
    config = load("documented-vqa")
    assert (config.loss.floor, config.model.temperature, config.data.image_size) == (25.6, 0.6, 224)
    report = check(load("documented-vqa", options))
    due = {"kl-free", "temperature-misstates-rate", "learning-rate-off", "stopped-in-ramp"}
    assert rules(report.findings, "warning") == due
    assert not rules(report.findings, "fail")
    p = report.parameters
    assert sum(p.modules.values()) == p.total == p.trainable
    assert any("2.8 times the signal-to-noise ratio" in line for line in report_lines(report))


def test_a_preference_is_checked_and_counted_though_a_stage_leaves_it_out_at_first(squares):
    stages = "--stages=[{until: 0.3, freeze: [vision], without: [preference]}]"
    with_it = check(load("vqa-small", [*TINY, *squares, "--loss.preference=0.3", stages]))
    assert not rules(with_it.findings)
    assert with_it.parameters.trainable == with_it.parameters.total
    without = check(load("vqa-small", [*TINY, *squares]))
    assert with_it.memory.activations_bytes > 1.2 * without.memory.activations_bytes
