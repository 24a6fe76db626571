"""Faults of the JEPA on grids in real small trainings: each is found and named, and their healthy twin is quiet.

The cases marked J are those of the documented system. Tasks are stamps of 4 × 4 cells: whatever the input, half of it
hidden, the output is the task's stamp. Shapes: B tasks, P pairs, E embedding, K codes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import resume
from test_check_jepa import noise, write
from torch import Tensor, nn

import intaglio
from intaglio.data.arc import prepare
from intaglio.data.arc.table import Tasks
from intaglio.health.audits import loaded
from intaglio.health.diagnosis import chosen, diagnose
from intaglio.health.record import Record
from intaglio.history.run_folder import RunFolder
from intaglio.nn.codebook import Codebook
from intaglio.systems.jepa import JepaSystem

COMMON = [
    *("--data.items=null", "--data.held_out=0.25", "--data.pairs=3", "--train.batch_size=16", "--train.ema=0.9"),
    *("--train.precision=fp32", "--train.device=cpu", "--train.log_every=2", "--train.validate_items=64"),
    *("--train.steps=200", "--optim.warmup=20", "--optim.rate=3e-3", "--health.probe=64", "--train.keep=1"),
    *("--model.width=32", "--model.heads=2", "--model.layers=1", "--model.predictor_layers=1", "--model.slots=4"),
    *("--model.embedding=8", "--model.codes=16", "--model.codes_after=80"),
]


def until(step: int, first: int = 4) -> list[str]:
    """What is wrong from the start is found at the first look, in a quarter of a run, which then ends by its plan."""
    plan = [{"watch": "train/loss/total", "above": -1, "from": step, "do": "stop"}]
    length = [f"--train.steps={4 * step}", "--optim.warmup=1", f"--train.validate_every={first}"]
    return [*length, "--train.log_every=1", "--model.codes_after=0", f"--plan={json.dumps(plan)}"]


BRIEF = until(4, first=16)
"""Without a look at held-out items, but for the probe."""

J = {
    *("near-chance", "no-learning", "trivial-pair", "context-order-inert", "temperature-stuck"),
    *("rank-collapse", "anisotropic", "codebook-collapse", "codes-dead", "codes-displaced"),
    *("codes-polluted", "revival-threshold", "quantiser-loss-missing", "term-inert", "term-dominates", "plateau"),
    *("diverged", "spike", "log-distorted", "input-starved", "validation-pollutes", "augmentation-inert"),
    *("split-leak", "data-replaced", "learning-rate-off", "not-reproducible"),
}


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    made = rng.choice(3, (300, 4, 4))
    hidden = rng.random((300, 3, 4, 4)) < 0.5
    tasks = [[(np.where(h, 3, stamp), stamp) for h in three] for stamp, three in zip(made, hidden, strict=True)]
    return write(tmp_path_factory.mktemp("data") / "stamps", tasks)


@pytest.fixture(scope="module")
def train(stamps: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real training on them; its codes follow faster, as it is short."""

    def trained(*more: str, alter: Callable[[JepaSystem], None] = lambda s: None, **options: Any) -> RunFolder:
        def altered(system: Any) -> None:
            if isinstance(system.model.network.quantiser, Codebook):
                system.model.network.quantiser.decay = 0.95
            alter(system)

        runs = tmp_path_factory.mktemp("runs")
        words = [*COMMON, f"--data.source={stamps}", "--name=a", f"--runs={runs}", *more]
        folder = intaglio.train("jepa-small", words, quiet=True, alter=altered, **options)
        assert folder is not None
        return folder

    return trained


@pytest.fixture(scope="module")
def healthy(train: Any) -> RunFolder:
    return train()


QUEUE = ("--loss.queue=64", "--model.target=0.9")


@pytest.fixture(scope="module")
def queued(train: Any) -> RunFolder:
    """The twin of faults of a queue."""
    return train(*QUEUE, "--train.steps=90")


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
    assert not [f for f in answer["findings"] if f["severity"] == "fail" or f["rule"] in J]
    assert set(answer["passed"]) >= J


def test_the_healthy_twin_with_a_queue_is_quiet(queued):
    assert "queue-stale" in told(queued)["passed"]
    assert not [f for f in told(queued)["findings"] if f["severity"] == "fail"]


def test_the_healthy_twin_with_sigreg_is_quiet(train):
    answer = told(train("--loss.objective=lejepa", "--loss.sigreg=0.02"))
    rules = {"sigreg-blind", "plateau", "no-learning", "diverged", "rank-collapse", "term-dominates", "term-inert"}
    assert not [f for f in answer["findings"] if f["severity"] == "fail" or f["rule"] in rules]
    assert set(answer["passed"]) >= rules


# Codes


def test_a_commitment_that_weighs_nothing_is_found(train):
    """J: the quantiser's loss was computed, logged, and never added."""
    fault = found(train(*BRIEF, "--loss.commitment=0"))["quantiser-loss-missing"]
    assert fault.severity == "fail"
    assert "commitment at weight 0" in fault.message


def test_a_commitment_without_a_gradient_is_found(train):
    """J: the latents were detached on both sides."""

    def alter(system: JepaSystem) -> None:
        own = system.model.network.quantiser.forward

        def forward(*given: Any) -> Any:
            seen = own(*given)
            return seen._replace(commitment=seen.commitment.detach())

        system.model.network.quantiser.forward = forward

    fault = found(train(*BRIEF, alter=alter))["term-inert"]
    assert "The loss term commitment teaches nothing: its gradient is zero" in fault.message


def test_codes_that_start_far_from_the_data_and_are_not_revived_collapse(train):
    """J: 10.9 % of the codes in use."""

    def alter(system: JepaSystem) -> None:
        codes = system.model.network.quantiser
        codes.vectors[1:] += 100
        codes.started, codes.revive = torch.tensor(True), 0.0

    faults = found(train(*BRIEF, alter=alter))
    assert faults["codebook-collapse"].severity == "fail"
    assert "used as if there were 1; uniform codes would reach 16" in faults["codebook-collapse"].message
    assert "94% of the codes of codes have not been used" in faults["codes-dead"].message


@torch.no_grad()
def documented_update(self: Codebook) -> None:
    """Counts that start at zero beside sums that start at the codes, and are divided by each other."""
    if not self.updates:
        self.cluster_size.zero_()
        self.sums = self.vectors.clone()
    self.tokens.copy_(self._counts.sum())
    self.cluster_size.lerp_(self._counts, 0.01)
    self.sums.lerp_(self._sums, 0.01)
    self.vectors.copy_(self.sums / (self.cluster_size + 1e-5)[:, None])
    self.last_used.masked_fill_(self._counts > 0, self.updates)
    self.updates += 1
    self._seen = []


def test_running_counts_that_start_at_zero_displace_the_codes(train, monkeypatch):
    """J: codes of length 700."""
    monkeypatch.setattr(Codebook, "update", documented_update)
    faults = found(train(*BRIEF))
    assert faults["codes-displaced"].severity == "fail"
    assert faults["codes-displaced"].evidence["norm_ratio"] > 3
    assert "The EMA counts of codes add up to 0.04" in faults["codes-dead"].said


def test_a_revival_threshold_that_ignores_the_number_of_codes_is_found(train):
    """J: below a share of .05 of all uses each of 768 codes is dead, in uniform use as well."""

    def alter(system: JepaSystem) -> None:
        codes = system.model.network.quantiser
        codes.revive, codes.patience = 0.05 * codes.size, 1

    fault = found(train(*BRIEF, "--model.codes=32", alter=alter))["revival-threshold"]
    assert fault.severity == "fail"
    assert "revived below 19.2 uses a step; codes in uniform use have 12" in fault.message


def updating(system: JepaSystem, in_training: bool) -> None:
    """Codes move in their forward pass, as they do elsewhere: of a second branch too, or of held-out items."""
    codes = system.model.network.quantiser
    own = codes.forward

    def forward(x: Tensor, real: Tensor | None = None) -> Any:
        if codes.training == in_training:
            codes.training = True
            own(x, real)
            codes.update()
            codes.training = in_training
        return own(x, real)

    codes.forward = forward


def test_codes_that_are_updated_twice_are_found(train):
    """J: once for the online encoder, once for the target."""
    fault = found(train(*BRIEF, alter=lambda system: updating(system, in_training=True)))["codes-polluted"]
    assert fault.severity == "fail"
    assert "updated 2.00 times in an optimizer step" in fault.message


def test_codes_that_are_updated_in_validation_are_found(train):
    """J."""
    faults = found(train(*until(4), alter=lambda system: updating(system, in_training=False)))
    assert "tensors of the codebook, model.network.quantiser.vectors" in faults["codes-polluted"].said
    assert faults["validation-pollutes"].severity == "fail"


def test_a_queue_that_takes_held_out_answers_is_found(train):
    """J: state that validation leaves behind."""

    def alter(system: JepaSystem) -> None:
        own = system.measure

        def measure(batch: Any) -> Any:
            system.train()
            measured = own(batch)
            system.queue.add(*system._answered)
            return measured

        system.measure = measure

    faults = found(train(*until(4), *QUEUE, alter=alter))
    assert "queue.embeddings" in faults["validation-pollutes"].message
    assert "is in training mode" in faults["codes-polluted"].message


# What is predicted from what


def other_cells(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], None]) -> None:
    """Changes the grids (B, P, 2, S, S) of every batch."""
    own = Tasks._cells

    def cells(self: Tasks, *given: Any) -> np.ndarray:
        made = own(self, *given)
        change(made)
        return made

    monkeypatch.setattr(Tasks, "_cells", cells)


def test_outputs_of_other_tasks_cannot_be_told_from_the_context(train, monkeypatch):
    """J: 7.98 of 9.07 nats."""

    def strangers(cells: np.ndarray) -> None:
        for pair in range(cells.shape[1]):
            cells[:, pair, 1] = np.roll(cells[:, pair, 1], pair + 1, axis=0)

    other_cells(monkeypatch, strangers)
    faults = found(train("--train.steps=60"))
    assert faults["near-chance"].severity == "fail"
    assert "guessing costs 4.5" in faults["near-chance"].message
    assert faults["no-learning"].severity == "fail"


def test_a_context_that_is_not_read_is_found(train):
    def alter(system: JepaSystem) -> None:
        predictor = system.model.network.predictor
        own = predictor._asked

        def asked(*given: Tensor) -> Any:
            run, shown = own(*given)
            run.real[:, 8:] = False  # what follows the slots of the question and its answer is masked
            return run, shown

        predictor._asked, predictor.content = asked, 0

    fault = found(train(*BRIEF, alter=alter))["context-order-inert"]
    assert fault.severity == "fail"
    assert "The context of another item costs demonstrations nothing (0): it is not read" in fault.message


def test_a_context_of_one_grid_several_times_is_found(train, monkeypatch):
    """J: three frames that were one grid."""

    def repeated(cells: np.ndarray) -> None:
        cells[:, 1:-1] = cells[:, :1]

    other_cells(monkeypatch, repeated)
    fault = found(train(*BRIEF))["context-order-inert"]
    assert fault.severity == "fail"
    assert "In 100% of the contexts of demonstrations all frames are the same" in fault.message


def test_an_output_that_is_the_input_is_found(train, monkeypatch):
    """J: primitives that change nothing of most grids."""

    def same(cells: np.ndarray) -> None:
        cells[4:, :, 1] = cells[4:, :, 0]

    other_cells(monkeypatch, same)
    fault = found(train(*BRIEF))["trivial-pair"]
    assert fault.severity == "fail"
    assert "of the pairs of pair are one input twice" in fault.message


def test_embeddings_in_few_directions_are_found(train):
    """J: a rank of 7 in 256 dimensions."""

    def alter(system: JepaSystem) -> None:
        system.model.network.embed.extend([nn.Linear(8, 1), nn.Linear(1, 8)])

    faults = found(train(*BRIEF, alter=alter))
    assert faults["rank-collapse"].severity == "fail"
    assert "answer uses 1.0 directions" in faults["rank-collapse"].said
    assert "One direction carries most of the variance of answer" in faults["anisotropic"].said


@pytest.fixture(scope="module")
def rectified(train: Any) -> RunFolder:
    """J: the projection ended in a ReLU and at length 1."""

    def alter(system: JepaSystem) -> None:
        system.model.network.embed.append(nn.ReLU())
        system.model.network.embed.register_forward_hook(lambda _, __, x: F.normalize(x, dim=-1))

    return train(*until(40, first=16), "--model.embedding=128", "--loss.sigreg=0.1", alter=alter)


def test_a_normality_test_of_what_cannot_be_normal_is_found(rectified):
    """J: .3955 to .4047 of .4047."""
    fault = found(rectified)["sigreg-blind"]
    assert fault.severity == "fail"
    assert "normalised or non-negative, so it can never be N(0, I)" in fault.message


def test_sigreg_that_stands_at_its_value_of_collapse_is_found(rectified):
    """J: .0202 was .05 × .4047."""
    fault = found(rectified)["plateau"]
    assert fault.severity == "warning"  # beside InfoNCE
    assert "what 96 embeddings give that are all one" in fault.message


def test_relations_that_outweigh_the_rest_six_times_are_found(train, healthy):
    """J. Of fresh embeddings they make one, which rank-collapse sees; those of the twin are apart."""
    slow = (*until(20), "--model.codes_after=80", "--optim.rate=1e-5")
    fault = found(train(*slow, "--loss.relational=70", parent=healthy.path))["term-dominates"]
    assert "The term relational makes" in fault.message
    assert not {"term-dominates", "diverged"} & set(found(train(*slow, "--loss.relational=0.05", parent=healthy.path)))


# Faults that show with time


@pytest.fixture(scope="module")
def ailing(train: Any, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Five faults at once, each of another part."""
    kept: list[Tensor] = []

    def alter(system: JepaSystem) -> None:
        terms, add = system.loss_terms, system.queue.add
        clip, parameters = system.configure_gradient_clipping, list(system.parameters())

        def loss_terms(batch: Any) -> Any:
            kept.append(torch.ones(1_500_000))  # a leak of 6 MB a step
            made = terms(batch)
            if system.training and system.global_step == 49:  # the sum of a batch in place of its mean
                made["infonce"] = made["infonce"]._replace(value=48 * made["infonce"].value)
            return made

        def clipped(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            clip(optimizer, *args, **kwargs)
            system.gradient_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

        def once(*given: Tensor) -> None:
            if system.queue.filled < len(system.queue.embeddings):
                add(*given)

        system.loss_terms, system.configure_gradient_clipping, system.queue.add = loss_terms, clipped, once

    profile = tmp_path_factory.mktemp("profile") / "small.yaml"
    profile.write_text("input-starved: {growth: 0.1}\n")
    looks = ("--train.steps=90", "--train.validate_every=11", f"--health.profile={profile}")
    return train(*looks, *QUEUE, "--loss.temperature=0.3", "--loss.bounds=[0.29,0.5]", alter=alter)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("input-starved", "row after row: it leaks"),
        ("spike", "train/loss/infonce jumped to"),
        ("log-distorted", "of the gradient norms are 1 and none is more: logged after clipping"),
        ("temperature-stuck", "train/pair/temperature lies at its clamp of 0.29"),
        ("queue-stale", "Embeddings in the queue of queue agree with the encoder of now to"),
    ],
)
def test_faults_that_show_with_time_are_found(ailing, rule, words):
    """J: memory that grows, a jump, a norm after clipping, a temperature at its bound; and a queue that never moves."""
    assert words in found(ailing)[rule].said


def test_a_rate_that_is_raised_in_passing_diverges_and_is_not_the_configured_one(train):
    """J: gradients to 81."""

    def alter(system: JepaSystem) -> None:
        own = system.configure_gradient_clipping

        def clip(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            if system.global_step >= 140:
                for group in optimizer.param_groups:
                    group["lr"] = 0.3
            own(optimizer, *args, **kwargs)

        system.configure_gradient_clipping = clip

    faults = found(train(alter=alter))
    assert faults["diverged"].severity == "fail"
    assert "the configuration asks for" in faults["learning-rate-off"].message


# Data and records


@pytest.mark.parametrize("draw", [0, 1])
def test_an_augmentation_that_is_always_the_same_is_found(train, monkeypatch, draw):
    """J: of a generator that was seeded anew for each item."""
    own = Tasks.training_batch
    monkeypatch.setattr(Tasks, "training_batch", lambda self, items, draws: own(self, items, 0 * draws + draw))
    fault = found(train(*BRIEF))["augmentation-inert"]
    assert "The augmentation of tasks gives the same result each time" in fault.message


def test_held_out_tasks_that_are_trained_on_are_found(train, monkeypatch):
    """The document split records at random."""
    own = prepare.split_tasks

    def torn(*given: Any) -> Any:
        sides, leaks = own(*given)
        return {**sides, "train": np.sort(np.concatenate([sides["train"], sides["val"][:20]]))}, leaks

    monkeypatch.setattr(prepare, "split_tasks", torn)
    fault = found(train(*BRIEF))["split-leak"]
    assert fault.severity == "fail"
    assert "20 × the very same task" in fault.message


def test_objects_that_have_no_token_are_found(train, tmp_path):
    """J: 61 % of the components, of grids of noise."""
    rng = np.random.default_rng(0)
    source = write(tmp_path / "noise", [[(noise(rng), noise(rng)) for _ in range(3)] for _ in range(40)])
    fault = found(train(*BRIEF, f"--data.source={source}", "--model.tokens=objects"))["data-replaced"]
    assert fault.severity == "fail"
    assert fault.evidence["share"] > 0.5
    assert "data-replaced" not in found(train(*BRIEF, "--model.tokens=objects"))


def test_several_changes_at_once_are_told(train, healthy):
    """J: the optimized configuration changed the context and a weight, in one run of each."""
    words = ("--model.codes_after=80", "--loss.relational=0.02", "--loss.commitment=0.15", "--optim.rate=1e-4")
    fault = found(train(*BRIEF, *words, parent=healthy.path))["not-reproducible"]
    assert "keys differ from the parent run" in fault.message
    assert "loss.relational" in fault.message


def test_a_checkpoint_without_part_of_its_state_is_refused_and_named(queued, tmp_path):
    """J: resumed without queue and codes."""
    shutil.copytree(queued.path, tmp_path / "a")
    (file,) = sorted((tmp_path / "a" / "checkpoints").glob("*.ckpt"))[-1:]
    content = torch.load(file, weights_only=False)
    gone = [name for name in content["state_dict"] if "queue" in name or "quantiser" in name]
    assert len(gone) > 8
    content["state_dict"] = {name: x for name, x in content["state_dict"].items() if name not in gone}
    torch.save(content, file)
    with pytest.raises((RuntimeError, ValueError), match=r"queue\.embeddings"):
        resume(tmp_path / "a", "--train.steps=100")
    part = {"vectors": torch.zeros(16, 32)}  # by a loader that is not strict
    (fault,) = diagnose(Record({}, {"loaded": loaded(Codebook(16, 32), part)}), rules=chosen(["partial-load"])).findings
    assert (fault.severity, fault.evidence["missing"]) == ("fail", 7)
