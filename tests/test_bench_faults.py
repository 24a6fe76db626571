"""The fault benchmark: every change fits its program, trainings are kept and judged as they were live, scores count."""

from pathlib import Path

import pytest

from intaglio.bench.faults import families, judge, run, score
from intaglio.bench.faults.case import Change, cases
from intaglio.bench.faults.change import program, replaced, source_of
from intaglio.bench.faults.judge import Outcome, Said
from intaglio.health.diagnosis import record_of
from intaglio.health.pages import before_training
from intaglio.health.replay import first_said
from intaglio.health.rules import all_rules
from intaglio.history.run_folder import RunFolder

MODULES = run.modules()
FAMILIES = {name: module.FAMILY for name, module in MODULES.items()}
EVERYTHING = list(cases(FAMILIES, "full"))
RULES = {r.id for r in all_rules()} | set(before_training())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_change_fits_its_program(name):
    for kind in (*FAMILIES[name].faults, *FAMILIES[name].healthy):
        for module in {c.module for c in kind.changes}:
            of_it = [c for c in kind.changes if c.module == module]
            if not module:
                text = replaced(source_of(MODULES[name]), of_it, kind.name)
            else:
                file = Path(families.__path__[0]).parents[3] / f"{module.replace('.', '/')}.py"
                text = replaced(file.read_text(), of_it, kind.name)
            compile(text, kind.name, "exec")


def test_the_catalogue_is_as_large_as_is_claimed():
    faults = [c for c in EVERYTHING if c.faulty]
    assert len(faults) >= 120
    assert len(EVERYTHING) - len(faults) >= 150
    assert sum(not f.recipe for f in FAMILIES.values()) >= 10
    assert len({c.name for c in EVERYTHING}) == len(EVERYTHING)
    assert {rule for c in faults for rule in c.kind.rules} <= RULES


def test_a_change_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="stands there 0 times, not once"):
        replaced("a = 1\n", [Change("b", "c")], "program")
    with pytest.raises(ValueError, match="stands there 2 times"):
        replaced("a = a\n", [Change("a", "c")], "program")


PROGRAM = """
from pathlib import Path
import torch
from torch import nn
from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health.monitor import Monitor


def train(folder: Path, seed: int = 0, steps: int = 60):
    torch.manual_seed(seed)
    x = torch.randn(256, 6)
    y = x @ torch.randn(6, 1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    nulls = {"train/loss/total": 6.0}
    monitor = Monitor(model, optimizer, folder=folder, every=20, log_every=2, steps=steps, nulls=nulls)
    for step in range(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        monitor.step(loss)
        optimizer.step()
        if step % 20 == 19:
            monitor.validated({"val_loss": float(loss)})
    monitor.close()
    return {"fit": (6.0 - float(loss), 0.0)}


FAMILY = Family(
    "regression",
    "judged",
    "a regression",
    faults=(
        Fault("last-layer-alone", "The optimizer holds the last layer alone.", ("not-in-optimizer",),
              changes=(Change("(model.parameters(), lr", "(model[2].parameters(), lr"),)),
        Fault("no-such-name", "It stops with an error.", ("non-finite",), changes=(Change("x @ torch", "w @ torch"),)),
    ),
    healthy=(Healthy("plain", seeds=(0, 1)),),
)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with a family of a user, and its outcomes."""
    folder, place = tmp_path_factory.mktemp("mine"), tmp_path_factory.mktemp("runs")
    (folder / "regression.py").write_text(PROGRAM)
    found = run.module("regression", folder).FAMILY
    wanted = list(cases({"regression": found}, "full"))
    run.run_all(wanted, place, 2, folder, lambda line: None)
    return folder, place, wanted


def test_trainings_are_judged_and_kept(mine):
    folder, place, wanted = mine
    outcomes = {o.name: o for o in (judge.judged(c, r, place / c.name) for c, r in run.records(wanted, place))}
    broken = outcomes["regression/last-layer-alone-0"]
    assert broken.place_of_cause() == 1
    assert broken.detected_at() == 4
    assert outcomes["regression/no-such-name-0"].status == "crashed"
    assert "NameError" in outcomes["regression/no-such-name-0"].error
    sound = outcomes["regression/plain-1"]
    assert (sound.status, sound.able, sound.accused) == ("finished", True, ())
    said: list[str] = []
    run.run_all(wanted, place, 2, folder, said.append)
    assert said == ["4 of 4 trainings are there already"]
    (folder / "regression.py").write_text(PROGRAM.replace("lr=1e-2", "lr=2e-2"))
    assert not run.is_there(wanted[0], place, run.module("regression", folder))
    (folder / "regression.py").write_text(PROGRAM)


def test_a_replayed_history_says_what_the_monitor_found_live(tmp_path):
    told: dict[tuple[str, str], int] = {}
    module = MODULES["vae"]
    fault = next(f for f in FAMILIES["vae"].faults if f.name == "kl-too-heavy")
    names = program(module, fault.changes)
    start = names["Monitor"].__init__

    def listening(self, *words, **options):
        start(self, *words, **options, on_finding=lambda f: told.setdefault((f.rule, f.severity), self.count))

    names["Monitor"].__init__ = listening
    try:
        names["train"](tmp_path / "run", 0, **{"steps": 150, **fault.options})
    finally:
        names["Monitor"].__init__ = start
    replayed = first_said(record_of(RunFolder(tmp_path / "run")))
    failed = {said: step for said, step in told.items() if said[1] == "fail"}
    assert ("posterior-collapse", "fail") in failed
    assert {said: step for said, step in replayed.items() if said[1] == "fail"} == failed


def test_families_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "vae.py").write_text(PROGRAM)
    with pytest.raises(ValueError, match=r"intaglio has a family 'vae'; give the file another name"):
        run.modules(tmp_path)
    (tmp_path / "vae.py").rename(tmp_path / "mine.py")
    with pytest.raises(ValueError, match=r"no FAMILY = Family\('mine', …\); see docs/faults.md"):
        run.module("mine", tmp_path)
    (tmp_path / "mine.py").rename(tmp_path / "empty.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"empty.py has no FAMILY"):
        run.modules(tmp_path)


def outcome(name, due=(), said=(), **more):
    given = {"split": "judged", "seed": 0, "minor": False, "case": "", "what": "", "status": "finished", "error": ""}
    given |= {"steps": 400, "seconds": 10.0, "monitor_seconds": 0.1, "able": True} | more
    found = tuple(Said(*s) for s in said)
    return Outcome(name=name, family=name.partition("/")[0], faulty=bool(due), due=due, said=found, **given)


def test_scores_of_outcomes_that_are_known():
    outcomes = [
        outcome("a/first", ("kl-units",), [("kl-units", "fail", 100), ("no-learning", "fail", 50)], case="V kl-units"),
        outcome("a/third", ("kl-units",), [("x", "fail", 300), ("y", "warning", 4), ("kl-units", "warning", 9)]),
        outcome("a/warned", ("spike",), [("spike", "warning", 10)], minor=True),
        outcome("b/missed", ("spike",), [("spike", "note", 10)]),
        outcome("b/plain"),
        outcome("b/accused", said=[("x", "fail", 5)]),
        outcome("b/unable", said=[("x", "fail", 5)], able=False),
    ]
    found, named, three, false, steps, overhead = score.scores(outcomes)
    assert (found.measured, named.measured, three.measured) == (0.75, 0.5, 0.75)
    assert (false.measured, false.n) == (0.5, 2)
    assert false.low < 0.1 < 0.9 < false.high
    assert steps.measured == 50
    assert overhead.measured == pytest.approx(0.1 / 9.9)
    assert score.confusion(outcomes) == [
        {"due": "kl-units", "said": "x", "times": 1},
        {"due": "spike", "said": "nothing", "times": 1},
    ]
    assert score.cases(outcomes)[0]["step"] == 100
    assert [m["what"] for m in score.misses(outcomes, {"b/missed": "too short"})] == [
        "not named first", "not found", "accused", "accused"
    ]  # fmt: skip
    assert {r["family"]: (r["found"], r["accused"], r["not_able"]) for r in score.by_family(outcomes)} == {
        "a": (3, 0, 0), "b": (0, 2, 1)
    }  # fmt: skip
    rows = {r["rule"]: r for r in score.by_rule(outcomes, ["kl-units", "x"])}
    assert (rows["kl-units"]["due"], rows["kl-units"]["named"], rows["x"]["healthy_failed"]) == (2, 2, 2)
