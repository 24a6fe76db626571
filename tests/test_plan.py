"""Limits that a recipe sets: each form on readings that are known, bad input, and trainings that keep to their plan."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import resume, tiny, train

from intaglio import config
from intaglio.cli import main
from intaglio.config.plan import parse
from intaglio.health.diagnosis import diagnose, diagnose_run
from intaglio.health.finding import Finding
from intaglio.health.notify import Notifier
from intaglio.health.plan import breaches, judge_plan, load_plan
from intaglio.health.record import Record
from intaglio.history import NotMeasured, Series
from intaglio.history.run_folder import RunFolder, find
from intaglio.training import checkpoint

USAGE, LOSS = "val/vq/usage", "val/loss/total"
PAGE = Path(__file__).parents[1] / "docs" / "plans.md"


def record(values: list[float], every: int = 100, name: str = USAGE, **rest: Any) -> Record:
    """One quantity, read each ``every`` steps."""
    steps = np.arange(1, len(values) + 1) * every
    return Record({name: Series.of(steps, np.array(values, float))}, **rest)


def said(line: dict[str, Any], about: Record) -> Finding | NotMeasured | None:
    found = judge_plan(parse([line]), about)
    assert len(found) <= 1
    return found[0] if found else None


BELOW = {"watch": USAGE, "below": 0.08}
SPELL = {**BELOW, "for": 3}


@pytest.mark.parametrize(
    ("line", "values", "step", "words"),
    [
        (BELOW, [0.2, 0.07, 0.2], 200, "was below 0.08 at step 200 (0.07); at step 300 it is 0.2."),
        (BELOW, [0.2, 0.08, 0.09], None, ""),
        (SPELL, [0.2, 0.07, 0.06, 0.05, 0.04], 400, "4 readings in a row, steps 200 to 500 (lowest 0.04)."),
        (SPELL, [0.07, 0.07, 0.2, 0.07, 0.07], None, ""),
        (SPELL, [0.07] * 3 + [0.2] + [0.07] * 3, 300, "the last of 2 times since step 300."),
        ({**BELOW, "for": "200 steps"}, [0.07, 0.07, 0.07, 0.2], 300, "steps 100 to 300"),
        ({**BELOW, "for": "201 steps"}, [0.07, 0.07, 0.07, 0.2], None, ""),
        ({**BELOW, "from": 300}, [0.07, 0.07, 0.2, 0.2], None, ""),
        ({**BELOW, "from": "50%"}, [0.07, 0.2, 0.2, 0.07], 400, "at step 400 (0.07)."),
        ({"watch": USAGE, "above": 30, "for": 2}, [99, 1, 31, 32], 400, "steps 300 to 400 (highest 32)."),
        (BELOW, [0.2, np.nan, 0.2], 200, "was NaN or infinite at step 200"),
        ({"watch": USAGE, "above": 30}, [1, np.nan, 40], 200, "was above 30 or NaN or infinite for 2 readings"),
        ({**BELOW, "why": "Raise the codebook’s decay."}, [0.01], 100, "(0.01). Raise the codebook’s decay."),
        ({"expect": USAGE, "above": 0.5, "by": 300}, [0.1, 0.6, 0.1, 0.1], None, ""),
        ({"expect": USAGE, "above": 0.5, "by": 300}, [0.1, 0.4, 0.2, 0.6], 300, "best of 3 readings is 0.4; it got "),
        ({"expect": USAGE, "below": 0.5, "by": "75%"}, [0.9, 0.8, 0.7, 0.6], 300, "was not below 0.5 by step 300"),
        ({"expect": USAGE, "above": 0.5, "at": "end"}, [0.9, 0.9, 0.9, 0.4], 400, "not above 0.5 at the end: 0.4 at"),
        ({"expect": USAGE, "above": 0.5, "at": "end"}, [0.1, 0.1, 0.1, 0.6], None, ""),
    ],
)
def test_a_limit_fires_where_it_was_not_kept_and_is_quiet_where_it_was(line, values, step, words):
    found = said(line, record(values, steps=100 * len(values)))
    if step is None:
        assert found is None
    else:
        assert isinstance(found, Finding)
        assert (found.step, found.severity) == (step, "warning")
        assert words in found.message
        assert found.message.startswith(USAGE)
        assert found.rule == parse([line])[0].id


@pytest.mark.parametrize(
    ("line", "about", "why"),
    [
        (BELOW, record([0.2], name="val/vq/usages"), "has not been read; nearest: val/vq/usages. Correct the plan"),
        (SPELL, record([0.07, 0.07]), "has 2 readings, and 3 are needed"),
        ({**BELOW, "for": "300 steps"}, record([0.2, 0.2, 0.2]), "has 200 steps, and 300 are needed"),
        ({**BELOW, "from": 400}, record([0.07, 0.07]), "has no reading from step 400 on"),
        ({**BELOW, "from": "50%"}, record([0.07], running=True), "write a step instead"),
        ({"expect": LOSS, "below": 8, "by": 500}, record([9, 9], name=LOSS, running=True), "the run goes on"),
        ({"expect": LOSS, "below": 8, "by": 500}, record([9, 9], name=LOSS), "the run ended at step 200"),
        ({"expect": LOSS, "below": 8, "by": 50}, record([9, 9], name=LOSS), "its first reading is of 100"),
        ({"expect": LOSS, "below": 8, "at": "end"}, record([9], name=LOSS, running=True), "when the run ends"),
        ({"expect": "finished"}, record([9], running=True, steps=200), "the run goes on"),
        ({"expect": "finished"}, record([9]), "how long the run was meant to be is not known"),
    ],
)
def test_what_cannot_be_judged_is_not_measured_and_never_passed(line, about, why):
    found = said(line, about)
    assert isinstance(found, NotMeasured)
    assert why in found.reason
    diagnosis = diagnose(about, rules=[], plan=parse([line]))
    assert diagnosis.passed == ()
    assert why in diagnosis.not_measured[0]["reason"]


def test_a_quantity_that_stopped_being_read_has_no_value_at_the_end():
    steps = {USAGE: [100, 200], LOSS: [100, 200, 300, 400, 500]}
    about = Record({name: Series.of(np.array(s), np.full(len(s), 0.5)) for name, s in steps.items()})
    found = said({"expect": USAGE, "above": 0.1, "at": "end"}, about)
    assert isinstance(found, NotMeasured)
    assert "read at step 200 for the last time, the run ended at 500" in found.reason


def test_a_run_that_ended_early_did_not_finish():
    assert said({"expect": "finished"}, record([1, 1], steps=200)) is None
    found = said({"expect": "finished", "do": "fail"}, record([1, 1], steps=500))
    assert isinstance(found, Finding)
    assert (found.severity, found.message) == ("fail", "The run ended at step 200 of 500.")


def test_a_finding_stands_beside_its_null_and_through_the_verdict():
    series = Series(np.array([100]), np.array([8.6]), np.array([9.07]), np.array([64]))
    about = Record({LOSS: series})
    limits = parse([
        {"watch": LOSS, "above": 8.5, "do": "fail"},
        {"expect": LOSS, "below": 8.3, "at": "end", "do": "note"},
        {"watch": LOSS, "above": 9},
        {"watch": USAGE, "below": 0.05, "do": "stop"},
    ])  # fmt: skip
    diagnosis = diagnose(about, rules=[], plan=limits)
    assert [f.severity for f in diagnosis.findings] == ["fail", "note"]
    assert diagnosis.findings[0].message.endswith("Where nothing is learnt it is 9.07.")
    assert diagnosis.passed == (f"plan: never {LOSS} above 9",)
    assert [gap["rule"] for gap in diagnosis.not_measured] == [f"plan: never {USAGE} below 0.05"]
    assert diagnosis.verdict == "failing"
    kept = diagnose(about, rules=[], plan=limits[2:])
    assert kept.verdict == "cannot tell", "what must not be was not looked at"
    assert diagnose(about, rules=[], plan=limits[2:3]).verdict == "healthy"


def test_a_foreign_history_is_watched_by_our_names_and_by_its_own():
    about = Record({LOSS: Series.of(np.arange(5), np.arange(5.0))}, foreign="CSV", renamed={"valLoss": LOSS})
    for name in (LOSS, "valLoss"):
        found = said({"watch": name, "above": 3.5}, about)
        assert isinstance(found, Finding)
        assert found.message.startswith(f"{name} was above 3.5 at step 4")


def test_every_row_counts_where_the_record_has_them_thinned():
    full = record([0.2] * 5 + [0.01] + [0.2] * 5).series
    assert isinstance(said(BELOW, Record(record([0.2]).series, logged=full)), Finding)


def test_a_long_history_is_judged_in_no_time():
    values = np.random.default_rng(0).normal(size=1_000_000)
    about = Record({USAGE: Series.of(np.arange(1_000_000), values)})
    assert isinstance(said({"watch": USAGE, "above": 1.0, "for": 5}, about), Finding)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"watch": "a", "bellow": 1}, "unknown key 'bellow'. Did you mean below?"),
        ({"below": 1}, "give watch or expect, one of them"),
        ({"watch": "a", "expect": "a", "below": 1}, "not both"),
        ({"watch": "a"}, "give below or above, one of them"),
        ({"watch": "a", "below": 1, "above": 0}, "a limit has one side"),
        ({"watch": "", "below": 1}, "watch is ''; write words"),
        ({"watch": 5, "below": 1}, "watch is 5; write words"),
        ({"watch": "a", "below": "8%"}, "below is '8%'; write a number as it is logged"),
        ({"watch": "a", "below": float("nan")}, "below is nan"),
        ({"watch": "a", "below": True}, "below is True"),
        ({"watch": "a", "below": 1, "for": 0}, "for is 0; write readings"),
        ({"watch": "a", "below": 1, "for": "3 epochs"}, "2000 steps"),
        ({"watch": "a", "below": 1, "from": -1}, "from is -1; write a step"),
        ({"watch": "a", "below": 1, "from": "150%"}, "from is '150%'"),
        ({"watch": "a", "below": 1, "by": 5}, "by has no effect here; it belongs to what is expected"),
        ({"expect": "a", "below": 1}, "give by or at, one of them"),
        ({"expect": "a", "below": 1, "at": 500}, "at is 500; it is end"),
        ({"expect": "a", "below": 1, "by": 5, "for": 3}, "for has no effect here"),
        ({"expect": "a", "below": 1, "at": "end", "do": "stop"}, "stop has no effect here, the run has ended"),
        ({"expect": "finished", "above": 5}, "above has no effect here"),
        ({"watch": "a", "below": 1, "do": "alrt"}, "unknown action 'alrt'. Did you mean alert?"),
        ({"watch": "a", "below": 1, "do": []}, "do is []; write one of"),
        ({"watch": "a", "below": 1, "do": ["alert", "fail"]}, "a finding is a note, an alert or a fail"),
        ({"watch": "a", "below": 1, "do": ["note", "stop"]}, "a stop is a fail"),
        ({"watch": "a", "below": 1, "webhook": "file:///etc/passwd"}, "webhook is 'file:///etc/passwd'; write https"),
        ("a < 1", "write {watch: NAME, below: NUMBER}"),
    ],
)
def test_a_line_that_makes_no_sense_says_what_would(line, says):
    with pytest.raises(ValueError, match=re.escape(says)) as raised:
        load_plan([BELOW, line])
    assert str(raised.value).startswith("plan, limit 2: ")


def test_a_plan_comes_from_a_file_a_recipe_or_the_command_line(tmp_path):
    alone, recipe, other = tmp_path / "plan.yaml", tmp_path / "mine.yaml", tmp_path / "other.yaml"
    alone.write_text("- {watch: val/vq/usage, below: 8e-2, for: 3}\n")
    recipe.write_text("extends: multimodal-small\nplan:\n  - {watch: val/vq/usage, below: 0.08, for: 3 readings}\n")
    other.write_text("system: multimodal\n")
    assert load_plan(alone) == load_plan(recipe) == load_plan({"plan": [SPELL]}) == parse([SPELL])
    assert parse(config.load(recipe).plan) == parse([SPELL])
    assert config.load(recipe, ["--plan", "[]"]).plan == ()
    for words in (["--plan", str(alone)], [f"--plan={recipe}"], ["--plan", json.dumps([SPELL])]):
        loaded = config.load("multimodal-small", words)
        assert parse(loaded.plan) == parse([SPELL])
        assert config.from_dict(yaml.safe_load(config.dump(loaded))) == loaded
    for words, says in (
        (["--plan", str(other)], "holds no plan"),
        (["--plan", str(tmp_path / "none.yaml")], "cannot be read"),
        (["--plan"], "cannot be read"),
        ([f"--plan={json.dumps([SPELL])}", "--health.on=false"], "set health.on to true"),
        ([f"--plan={json.dumps([SPELL, SPELL])}"], "stands twice"),
        (["--plan=[{wach: a}]"], "Did you mean watch?"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            config.load("multimodal-small", words)


def test_every_plan_of_the_page_is_one():
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    plans = [load_plan(yaml.safe_load(block)) for block in blocks]
    assert len(plans) >= 2
    assert max(map(len, plans)) >= 17, "all of the JEPA document's"


class Chat(BaseHTTPRequestHandler):
    """A chat's webhook that keeps what it was sent."""

    got: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(500 if self.path == "/broken" else 204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def chat() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and what it got."""
    got: list[dict[str, Any]] = []
    server = HTTPServer(("127.0.0.1", 0), type("Here", (Chat,), {"got": got}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_broken_limit_is_posted_and_piped_and_what_fails_is_told(tmp_path, chat):
    url, got = chat
    notifier = Notifier(tmp_path / "night")
    file = tmp_path / "heard.json"
    for line in (
        {**BELOW, "webhook": f"{url}/", "command": f"cat > {file}"},
        {**BELOW, "webhook": f"{url}/broken", "command": "echo no way >&2; exit 3"},
        {**BELOW, "webhook": "http://127.0.0.1:9/"},
    ):
        (broken,) = breaches(parse([line]), record([0.2, np.nan]))
        notifier.send(broken.limit, broken.finding, 200)
    failed = notifier.close()
    assert len(failed) == 3
    for words in ("HTTP Error 500", "exit code 3, no way", "Connection refused"):
        assert sum(words in failure for failure in failed) == 1
    assert json.loads(file.read_text()) == got[0]
    assert got[0]["text"].startswith("night, step 200: warning: val/vq/usage was NaN or infinite at step 200")
    assert got[0]["finding"]["rule"] == "plan: never val/vq/usage below 0.08"
    notifier.send(parse([{**BELOW, "command": "sleep 5"}])[0], broken.finding, 200)
    assert "has not ended after 0.1 s" in notifier.close(0.1)[0]


def findings(run: RunFolder) -> dict[str, dict[str, Any]]:
    content = json.loads((run.path / "findings.json").read_text())
    return {f["rule"]: f for f in content["findings"] if f["rule"].startswith("plan")}


def test_a_plan_keeps_weights_calls_and_stops_a_training_and_changes_no_weight(
    tmp_path, reference, chat, capsys, monkeypatch
):
    url, got = chat
    monkeypatch.setenv("CHAT", url)
    lines = [
        {"watch": LOSS, "above": 0, "do": ["alert", "checkpoint"], "webhook": "$CHAT"},
        {"watch": LOSS, "above": 0, "from": 8, "for": 2, "do": "stop", "webhook": f"{url}/broken"},
        {"watch": "val/loss/totl", "above": 0},
        {"expect": "finished", "do": "fail"},
    ]
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(lines))
    words = tiny(tmp_path, "--train.keep=1", "--train.validate_every=5", "--quiet", "--plan", str(plan))
    assert main(["train", "multimodal-small", *words]) == 1
    run = find(tmp_path / "a")
    stop = f"plan: never {LOSS} above 0 for 2 readings from step 8 on"
    assert (run.record["status"], run.record["stopped_by"]) == ("stopped", f"health: {stop}")
    assert run.record["step"] == 15
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [checkpoint.name(5), checkpoint.name(15)]
    assert {f["severity"] for f in findings(run).values()} == {"warning", "fail"}
    assert [message["step"] for message in got] == [5, 15], "once each, not at every look"
    notices = run.record["notices"]
    assert sum("HTTP Error 500" in n for n in notices) == 1
    assert sum("val/loss/totl has not been read; nearest: val/loss/total" in n for n in notices) == 1

    assert main(["diagnose", str(run.path)]) == 1, "the same plan over the history that is there"
    assert "The run ended at step 15 of 20." in capsys.readouterr().out
    assert findings(run)[stop]["step"] == 15
    other = diagnose_run(run.path, plan=parse([{"watch": LOSS, "below": 0}]))
    assert f"plan: never {LOSS} below 0" in other.passed
    assert findings(run)[stop], "another plan than the run's own leaves its findings as they are"

    shutil.copytree(run.path, tmp_path / "b")
    again = resume(run.path)
    assert (again.record["stopped_by"], again.record["step"]) == (f"health: {stop}", 20), "it is still broken"
    on = resume(tmp_path / "b", "--plan=[]")
    assert (on.record["status"], on.record["step"]) == ("finished", 20)
    assert findings(on) == {}
    assert (on.checkpoints / checkpoint.name(5)).is_file()
    ours, theirs = (checkpoint.read(checkpoint.newest(r.checkpoints))["state_dict"] for r in (on, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_keeps_to_its_plan_as_one_that_was_not_interrupted(tmp_path):
    lines = [
        {"watch": "train/optimizer/gradient_norm", "above": 0, "for": 7, "do": ["alert", "checkpoint"]},
        {"expect": LOSS, "below": 0, "by": "50%", "do": "note"},
        {"expect": "val/prior/flow_loss", "below": 1e9, "at": "end", "do": "fail"},
    ]
    words = (f"--plan={json.dumps(lines)}", "--train.keep=1", "--train.checkpoint_every=3")
    whole = train(tmp_path, *words)
    assert [f["step"] for f in findings(whole).values()] == [7, 10]
    passed = json.loads((whole.path / "findings.json").read_text())["passed"]
    assert "plan: val/prior/flow_loss below 1000000000 at the end" in passed
    kept = [p.name for p in sorted(whole.checkpoints.iterdir())]
    assert checkpoint.name(10) in kept, "the look at which it was seen"
    cut = RunFolder(shutil.copytree(whole.path, tmp_path / "b"))
    (cut.checkpoints / checkpoint.name(20)).unlink()
    (cut.path / "findings.json").unlink()
    resume(cut.path)
    assert findings(cut) == findings(whole)
    assert [p.name for p in sorted(cut.checkpoints.iterdir())] == kept


def test_a_webhook_without_an_address_is_refused_before_the_data_is_read(tmp_path, monkeypatch):
    monkeypatch.delenv("CHAT", raising=False)
    with pytest.raises(ValueError, match=r"that variable holds no URL. Set it: export CHAT=https"):
        train(tmp_path, f"--plan={json.dumps([{**BELOW, 'webhook': '$CHAT'}])}")
    assert not list(tmp_path.iterdir())
