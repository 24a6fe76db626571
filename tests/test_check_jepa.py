"""``intaglio check`` of the JEPA: each fault that a recipe or its tasks show, and the documents' own settings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from intaglio.config import load
from intaglio.config.plan import parse
from intaglio.data.arc import generate
from intaglio.data.arc.survey import seen_in_training, survey
from intaglio.data.arc.table import Tasks
from intaglio.health.check import check
from intaglio.health.checks import subject_of
from intaglio.health.plan import load_plan
from intaglio.health.rules import static
from intaglio.health.rules.generalisation import COLLAPSED_SIGREG
from intaglio.health.rules.static import DataFacts, Facts, GridFacts
from intaglio.objectives.sigreg import collapsed_sigreg

TINY = [
    *("--data.items=200", "--train.batch_size=4", "--train.precision=fp32", "--train.device=cuda"),
    *("--model.width=32", "--model.heads=2", "--model.layers=1", "--model.predictor_layers=1", "--model.slots=4"),
    *("--model.codes=16", "--model.embedding=8", "--health.probe=20", "--train.ema=0.9"),
]


def rules(findings, *severities):
    return {f.rule for f in findings if not severities or f.severity in severities} - {"memory-short"}


def facts_of(recipe, *options):
    """A recipe as the rules see it, without the pass that measures it; its data has no fault."""
    config = load(recipe, [*TINY, *options])
    subject = subject_of(config)
    system = subject.system()
    total = sum(p.numel() for p in system.parameters())
    terms = {config.loss.objective.replace("lejepa", "prediction")}
    terms |= {"sigreg"} if config.loss.sigreg else set()
    terms |= {"commitment"} if config.model.quantiser == "vq" else set()
    terms |= {name for name in ("relational", "colour", "flip", "shift") if getattr(config.loss, name)}
    seen = {"val/loss/total", *(f"val/loss/{name}" for name in terms)}
    data = DataFacts(180, 20, 0, 255, 200, grids=GridFacts(720, changed=1.0, variety=1.0))
    rest = {"readings": subject.readings(system), "steps": config.train.steps, "data": data}
    return Facts(config, system.model.network, total, total, total, terms, seen, {}, {}, **rest)


def test_the_small_recipe_has_no_fault_and_adds_up():
    report = check(load("jepa-small", ["--data.items=600", "--train.device=cuda", "--train.precision=fp32"]))
    assert not rules(report.findings, "fail", "warning")
    p = report.parameters
    assert sum(p.modules.values()) == p.total == p.trainable
    assert report.memory.activations_bytes > report.memory.weights_bytes


def test_a_target_is_counted_and_not_trained():
    report = check(load("jepa-small", [*TINY, "--model.target=0.99"]))
    p = report.parameters
    assert sum(p.modules.values()) == p.total
    assert p.trainable == p.total - p.modules["target"]
    assert not rules(report.findings)


FAULTS = [
    ("--optim.warmup 300", "learning-rate-off", "warning"),
    ("--optim.warmup 1400", "learning-rate-off", "warning"),
    ("--loss.commitment 0", "quantiser-loss-missing", "fail"),
    ("--model.codes_after 2000", "quantiser-loss-missing", "fail"),
    ("--model.codes 8192", "codebook-collapse", "fail"),
    ("--model.codes 256", "revival-threshold", "warning"),
    ("--loss.temperature 0.02", "temperature-stuck", "warning"),
    ("--loss.bounds [0.09,0.11]", "temperature-stuck", "warning"),
    ("--loss.queue 4096 --model.target 0.99", "queue-stale", "fail"),
    ("--loss.queue 64", "queue-stale", "warning"),
    (
        "--train.steps 30 --train.ema 0 --optim.warmup 3 --loss.queue 512 --model.target 0.99 --model.codes_after 3",
        "queue-stale",
        "warning",
    ),
    ("--train.batch_size 2", "near-chance", "warning"),
    ("--train.accumulate 4", "negatives-per-pass", "warning"),
    ("--health.probe 8", "rank-collapse", "note"),
    ("--model.quantiser fsq", "weight-not-applied", "warning"),
    ("--train.monitor val/loss/prediction", "validation-missing", "fail"),
]


@pytest.mark.parametrize(("options", "rule", "severity"), FAULTS)
def test_faults_that_the_configuration_shows(options, rule, severity):
    found = static.judge(facts_of("jepa-small", *options.split()))
    assert [(f.rule, f.severity) for f in found] == [(rule, severity)]
    for remedy in found[0].remedies:
        healed = static.judge(facts_of("jepa-small", *options.split(), *remedy.options.split()))
        assert rule not in rules(healed)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--model.quantiser none --loss.commitment 0",
        "--model.quantiser fsq --loss.commitment 0",
        "--loss.objective lejepa --loss.sigreg 0.05",
        "--model.context mean --model.target 0.99",
        "--loss.relational 0.05 --loss.colour 0.1",
        "--train.accumulate 4 --loss.queue 64 --model.target 0.99",
        "--data.augment false",
    ],
)
def test_other_choices_are_no_faults(options):
    assert static.judge(facts_of("jepa-small", *options.split())) == []


@pytest.mark.parametrize(
    ("grids", "rule", "severity"),
    [
        ({"same": 0.6}, "trivial-pair", "fail"),
        ({"same": 0.05}, "trivial-pair", "warning"),
        ({"repeated": 1.0}, "context-order-inert", "fail"),
        ({"repeated": 0.1}, "context-order-inert", "warning"),
        ({"dropped": 0.61}, "data-replaced", "fail"),
        ({"dropped": 0.05}, "data-replaced", "warning"),
        ({"changed": 0.0, "variety": 0.0}, "augmentation-inert", "warning"),
        ({"changed": 1.0, "variety": 0.0}, "augmentation-inert", "warning"),
    ],
)
def test_faults_that_the_tasks_show(grids, rule, severity):
    facts = facts_of("jepa-small")
    assert facts.data is not None
    wrong = replace(facts.data, grids=replace(facts.data.grids, **grids))
    assert [(f.rule, f.severity) for f in static.judge(replace(facts, data=wrong))] == [(rule, severity)]


def write(folder: Path, tasks: list[list[tuple[np.ndarray, np.ndarray]]]) -> Path:
    """ARC's JSON of tasks, the last pair of each its test."""
    folder.mkdir(parents=True)
    for k, pairs in enumerate(tasks):
        told = [{"input": a.tolist(), "output": b.tolist()} for a, b in pairs]
        (folder / f"{k:03}.json").write_text(json.dumps({"train": told[:-1], "test": told[-1:]}))
    return folder


def noise(rng: np.random.Generator) -> np.ndarray:
    """A grid as the document's: 6 to 14 cells a side, each of a colour by lot."""
    return rng.integers(0, 10, rng.integers(6, 15, 2))


def looked(*options):
    """What the subject finds, and its facts."""
    subject = subject_of(load("jepa-small", [*TINY, "--data.items=null", *options]))
    return subject.look(), subject.data


def test_noise_loses_most_of_its_objects_as_in_the_document(tmp_path):
    """J: 61 % of the components had no token."""
    rng = np.random.default_rng(0)
    tasks = [[(noise(rng), noise(rng)) for _ in range(4)] for _ in range(40)]
    source = f"--data.source={write(tmp_path / 'noise', tasks)}"
    unusable, data = looked(source, "--model.tokens=objects")
    assert not unusable
    assert data.grids.dropped == pytest.approx(0.7, abs=0.1)
    options = [*TINY, "--data.items=null", source, "--model.tokens=objects", "--loss.queue=32"]
    (found,) = [f for f in check(load("jepa-small", options)).findings if f.rule == "data-replaced"]
    assert found.severity == "fail"
    assert looked(source)[1].grids.dropped is None


def test_what_tasks_are_like_is_counted(tmp_path):
    rng = np.random.default_rng(0)
    grids = [[rng.integers(0, 10, (4, 4)) for _ in range(8)] for _ in range(20)]
    pairs = [list(zip(g[::2], g[1::2], strict=True)) for g in grids]
    same = [[(a, a) for a, _ in task] if k < 5 else task for k, task in enumerate(pairs)]
    once = [[task[0]] * 3 + task[3:] if k < 10 else task for k, task in enumerate(pairs)]
    for tasks, name, due in ((same, "same", 0.25), (once, "repeated", 0.5), (pairs, "same", 0.0)):
        source = write(tmp_path / f"{name}{due}", tasks)
        data = looked(f"--data.source={source}")[1]
        assert getattr(data.grids, name) == pytest.approx(due, abs=0.1)
        assert (data.grids.changed, data.grids.variety) == (1.0, 1.0)


def test_augmentation_that_is_always_the_same_or_none_is_seen(monkeypatch):
    data, items = Tasks(generate(30, pairs=3), 3), np.arange(30)
    drawn = Tasks.training_batch
    assert (survey(data, items).changed, survey(data, items).variety) == (1.0, 1.0)
    monkeypatch.setattr(Tasks, "training_batch", lambda self, i, draw: drawn(self, i, 0 * draw + 1))
    assert (survey(data, items).changed, survey(data, items).variety) == (1.0, 0.0)
    still = replace(data, augment=False)
    monkeypatch.setattr(Tasks, "training_batch", lambda self, i, draw: drawn(replace(still, pairs=3), i, draw))
    assert (survey(data, items).changed, survey(data, items).variety) == (0.0, 0.0)


def test_a_task_on_both_sides_is_a_leak(tmp_path):
    corpus = generate(40, pairs=3)
    assert seen_in_training(corpus, np.arange(30), np.arange(30, 40)) == 0
    assert seen_in_training(corpus, np.arange(31), np.arange(30, 40)) == 1
    rng = np.random.default_rng(0)
    tasks = [[(rng.integers(0, 10, (3, 3)), rng.integers(0, 10, (3, 3))) for _ in range(3)] for _ in range(8)]
    for side in ("training", "evaluation"):  # as ARC-AGI-1 and -2 in one folder
        write(tmp_path / "both" / side, tasks)
    (found,), data = looked(f"--data.source={tmp_path / 'both'}")
    assert (found.rule, found.severity, data) == ("split-leak", "fail", None)
    (missing,), _ = looked(f"--data.source={tmp_path / 'nowhere'}")
    assert missing.rule == "data-unusable"


@pytest.mark.parametrize("name", ["documented-jepa-gentle", "documented-jepa-optimized", "documented-jepa-production"])
def test_the_documents_settings_are_seen_through(name):
    config = load(name)
    assert (config.model.codes, config.loss.queue, config.model.tokens) == (768, 8192, "objects")
    smaller = ["--data.items=2600", "--train.batch_size=8", "--train.device=cuda", "--train.precision=fp32"]
    report = check(load(name, smaller))
    assert rules(report.findings, "fail") == {"quantiser-loss-missing"}
    (slow,) = [f for f in report.findings if f.rule == "learning-rate-off"]
    assert slow.evidence["warmup"] == 1000
    assert slow.evidence["steps"] == config.train.steps
    apart = {"gentle": ("mean", 0.025), "optimized": ("attention", 0.02), "production": ("mean", 0.025)}
    assert (config.model.context, config.loss.relational) == apart[name.rpartition("-")[2]]


def test_the_documents_plan_is_one_and_its_quantities_are_measured():
    plan = load_plan("documented-jepa-production")
    assert len(plan) == 18
    assert parse(load("jepa-small", ["--plan", "documented-jepa-production"]).plan) == plan
    names = {limit.quantity for limit in plan} - {"finished"}
    sites = {"val/codes/usage", "val/prediction/effective_rank", "val/answer/effective_rank", "val/loss/total"}
    assert names == sites | {"train/optimizer/gradient_norm"}


def test_the_collapsed_sigreg_of_the_rules_is_that_of_the_loss():
    assert collapsed_sigreg() == pytest.approx(COLLAPSED_SIGREG, rel=1e-4)
