"""Sweeps: files that are refused before a step is spent, a real one killed and gone on with, and what reports claim."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import start
from PIL import Image
from scipy import stats
from test_comparison import arm as arm_of

import intaglio
from intaglio.cli import main
from intaglio.config.sweep import Sweep, read, shipped
from intaglio.history import HistoryWriter, Reading, run_folder
from intaglio.reports.comparison import compare_runs
from intaglio.reports.sweep import Study, Trained, study
from intaglio.reports.sweep_text import markdown_document, terminal_lines, write
from intaglio.training.sweep import _tasks
from intaglio.training.sweep_runs import _last_step

R2, PSNR = "val/round_trip/r2", "val/round_trip/psnr"
ARMS = "arms: {base: {}, slow: {optim.rate: 3e-5}}"


def sweep_file(folder: Path, text: str = "", recipe: str = "autoencoder-small", name: str = "ablation") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(f"recipe: {recipe}\n{text}")
    return path


# files


def test_arms_are_the_recipe_with_what_is_common_and_what_is_theirs(tmp_path: Path) -> None:
    text = """
question: Does it matter?
seeds: [3, 4]
metrics: {val/round_trip/r2: higher, val/loss/total: lower}
common: {train: {steps: 7}, optim.warmup: 2}
arms:
  base:
  long: {train.epochs: 2}
  other: {model: {channels: [16, 32]}, optim.kind: adam}
"""
    plan = read(sweep_file(tmp_path, text), ["--optim.warmup", "3", "--data.items=50"])
    base, long, other = (plan.config(arm, 4) for arm in plan.arms)
    assert (plan.name, plan.baseline, plan.seeds, plan.question) == ("ablation", "base", (3, 4), "Does it matter?")
    assert plan.metrics == {R2: 1, "val/loss/total": -1}
    assert (base.seed, base.train.steps, base.optim.warmup, base.data.items) == (4, 7, 3, 50)
    assert (long.train.steps, long.train.epochs) == (None, 2)
    assert (other.model.channels, other.optim.kind, other.train.steps) == ((16, 32), "adam", 7)
    assert read(tmp_path / "ablation.yaml", seeds=[9]).seeds == (9,)


def test_a_grid_becomes_all_combinations_named_by_their_values(tmp_path: Path) -> None:
    grid = "grid: {optim.rate: [0.001, 0.01], model.channels: [[8, 8], [8, 16]], data.flips: [true]}"
    plan = read(sweep_file(tmp_path, grid))
    names = [f"rate={rate}+channels={c}+flips=true" for rate in (0.001, 0.01) for c in ("8x8", "8x16")]
    assert list(plan.arms) == names
    assert plan.config(names[3], 0).model.channels == (8, 16)


@pytest.mark.parametrize("name", shipped())
def test_sweeps_that_come_with_the_package_can_be_trained(name: str) -> None:
    plan = read(name)
    assert len(plan.arms) > 2
    assert len(plan.seeds) > 2
    assert all(plan.metrics.values())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arm: {}", "unknown key arm. Did you mean arms?"),
        ("", "give arms (name → overrides) or grid (key → values), one of them"),
        (f"{ARMS}\ngrid: {{optim.rate: [1, 2]}}", "one of them"),
        ("arms: {base: {}}", "it has 1 arm"),
        ("arms: {base: {}, b: {optim.rat: 1}}", "arm b: unknown key optim.rat. Did you mean optim.rate?"),
        ("arms: {base: {}, b: {}, c: {optim.kind: mon}}", "arm b is the same as the baseline"),
        ("arms: {base: {}, b: {optim.kind: mon}}", "arm b: Parser key"),
        ("arms: {base: {}, b: {data.image_size: 50}}", "arm b: data.image_size is 50; use a multiple of 16"),
        ("arms: {base: {}, b: {optim.kind: muon}}", "arm b is the same as the baseline (optim.kind: muon)"),
        ("arms: {base: {}, b: {optim.kind: adam}, c: {optim: {kind: adam}}}", "c is the same as the arm b"),
        ("arms: {base: {}, b: {health.probe: 7}}", "differs from the baseline in health.probe alone"),
        ("arms: {base: {}, base: {optim.rate: 1}}", "base stands twice"),
        ("arms: {base: {}, no: {optim.rate: 1}}", "put it in quotes"),
        ("arms: {base: {}, 'a,b': {optim.rate: 1}}", "without commas and slashes"),
        ("arms: {base: {}, a b: {optim.rate: 1}, a-b: {optim.rate: 2}}", "the folder name a-b"),
        ("arms: {base: {}, b: {seed: 7}}", "seed cannot be set here: a sweep's seeds stand under seeds"),
        ("arms: [base]", "write a name for each"),
        ("arms: {base: 1, b: 2}", "arm base is 1; write keys with their values"),
        (f"{ARMS}\nseeds: 3", "seeds is 3; give a list"),
        (f"{ARMS}\nseeds: [1, 1]", "the seed 1 stands twice"),
        (f"{ARMS}\nseeds: [-1]", "the seed -1 is not a whole number"),
        (f"{ARMS}\nmetrics: {{x: hihger}}", "Did you mean higher?"),
        (f"{ARMS}\nmetrics: [val/generated/rule]", "does not tell which way is better"),
        (f"{ARMS}\nmetrics: [val/loss/a]\ntrade: [val/loss/a, x]", "write two of the metrics"),
        (f"{ARMS}\nname: ../x", "it becomes a folder"),
        ("grid: {optim.rate: 1}", "give a list of values"),
        ("grid: {optim.rate: [1, 1]}", "would stand twice"),
        ("arms: [", "is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_trained_is_refused_before_a_step(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        intaglio.sweep(sweep_file(tmp_path, text), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_words_of_the_command_line_are_refused_with_what_is_right(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    sweep_file(tmp_path, ARMS)
    (tmp_path / "runs/ablation").mkdir(parents=True)
    (tmp_path / "runs/ablation/run.json").write_text("{}")
    for words, says in (
        (["jepa-ablatoin"], "Did you mean jepa-ablation?"),
        (["nowhere.yaml"], "No sweep 'nowhere.yaml'"),
        (["ablation.yaml", "--only", "slwo"], "no such arm. Did you mean slow?"),
        (["ablation.yaml", "--optim.rate", "1"], "--optim.rate is what arms of ablation.yaml are for"),
        (["ablation.yaml", "--seed", "1"], "a sweep's seeds stand under seeds, or after --seeds"),
        (["ablation.yaml", "--seeds", "0,x"], "--seeds: x is no seed"),
        (["ablation.yaml", "--jobs", "0"], "at least 1 run at once"),
        (["ablation.yaml"], "is a run, so the sweep cannot lie there"),
    ):
        assert main(["sweep", *words]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"No recipe 'autoencoder-smal'\. Did you mean autoencoder-small"):
        read(sweep_file(tmp_path, ARMS, "autoencoder-smal"))


# a real one

TINY = """
seeds: [0, 1]
metrics: {val/round_trip/r2: higher, val/round_trip/psnr: higher}
common:
  train: {steps: 20, batch_size: 8, log_every: 1, validate_every: 10, validate_items: 24, ema: 0.9, device: cpu}
  optim.warmup: 4
  data: {items: 120, image_size: 16}
  health.probe: 24
  model: {channels: [8, 8], latent: 2}
arms:
  base:
  slow: {optim.rate: 3e-5}
  huge: {train.batch_size: 4000}
"""


def ids(place: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["id"] for path in place.glob("*/run.json")}


def reach(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """Waits until a run has written a row of ``step`` or later; on a busy machine processes start slowly."""
    begun = time.monotonic()
    while _last_step(metrics) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < begun + 400
        time.sleep(0.002)


@contextmanager
def swept(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """``intaglio sweep`` in a process; where the test fails, its runs end with it."""
    process = start("sweep", "ablation.yaml", cwd=folder)
    try:
        yield process
    except BaseException:
        process.kill()
        for run in json.loads((folder / "runs/ablation/sweep.json").read_text())["runs"]:
            if "pid" in run:
                os.kill(run["pid"], signal.SIGKILL)
        raise
    finally:
        process.communicate()


def test_a_killed_sweep_goes_on_where_it_was_and_a_run_that_fails_stops_no_other(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    sweep_file(tmp_path, TINY)
    place = tmp_path / "runs" / "ablation"

    with swept(tmp_path) as first:  # killed at once; the run that it had begun lives on
        reach(first, place / "base-0/metrics.jsonl", 5)
        told = json.loads((place / "sweep.json").read_text())
        (left,) = [run["pid"] for run in told["runs"] if run["status"] == "running"]
        os.kill(left, signal.SIGSTOP)
        first.kill()
    with swept(tmp_path) as second:  # waits for that run; then it is asked to stop
        assert second.stdout is not None
        waits = second.stdout.readline()
        with pytest.raises(ValueError, match="Another sweep is at work in"):
            intaglio.sweep("ablation.yaml")
        os.kill(left, signal.SIGCONT)
        assert f"waiting for what a killed sweep left training: base-0 (process {left})" in waits
        reach(second, place / "slow-0/metrics.jsonl", 5)
        second.terminate()
        said = second.stdout.read()
    assert second.returncode == 143
    assert "1 of 6 runs are finished; the same command goes on" in said
    stopped = json.loads((place / "sweep.json").read_text())
    assert stopped["status"] == "interrupted"
    assert stopped["machine"] == told["machine"]  # precision was timed once
    assert [run["status"] for run in stopped["runs"]][:3] == ["finished", "interrupted", "waiting"]
    assert json.loads((place / "slow-0/run.json").read_text())["status"] == "interrupted"
    before = ids(place)

    found = intaglio.sweep("ablation.yaml", jobs=2, quiet=True)  # the half-trained run, then the others
    after = ids(place)
    assert {name: after[name] for name in before} == before
    assert sorted(after) == ["base-0", "base-1", "slow-0", "slow-1"]
    assert "resumed" not in json.loads((place / "base-0/run.json").read_text())
    assert json.loads((place / "slow-0/run.json").read_text())["resumed"]
    assert [len(arm.cells[R2].values) for arm in found.arms] == [2, 2, 0]
    assert [run.seed for run in found.failed] == [0, 1]
    assert all("only 108 items are left for training" in run.error for run in found.failed)
    assert found.arms[1].comparison is not None
    assert found.arms[1].comparison.metrics[0].test == "paired t, 2 pairs"
    precisions = {run_folder.find(place / name).config().train.precision for name in after}
    assert len(precisions - {"auto"}) == len(precisions) == 1
    for name in ("sweep.json", "REPORT.md", "index.html", "configs/huge-1.yaml", "logs/huge-1.log"):
        assert (place / name).is_file()
    cannot = "\n".join(found.cannot)
    assert "huge: 2 of 2 runs did not finish: train.batch_size is 4000" in cannot
    assert "none of the runs of huge has finished" in cannot

    capsys.readouterr()  # everything is there: nothing is trained again
    assert main(["sweep", "ablation.yaml", "--only", "slow", "--json"]) == (0 if found.can else 3)
    answer = json.loads(capsys.readouterr().out)
    assert [run["status"] for run in answer["runs"]] == ["finished"] * 4 + ["not trained"] * 2
    assert ids(place) == after
    sweep_file(tmp_path, TINY.replace(PSNR, "val/round_trip/psn"))
    with pytest.raises(ValueError, match=r"val/round_trip/psn is not measured by .*base-0\. Did you mean .*psnr\?"):
        intaglio.sweep("ablation.yaml", only=["slow"], quiet=True)
    assert ids(place) == after

    plan, words = read("ablation.yaml", ["--optim.warmup=3"]), list[str]()  # another configuration is another run
    tasks = _tasks(plan, ["base"], Path("runs/ablation"), told["machine"]["chosen"], words.append)
    assert [(t.folder.name, t.status) for t in tasks] == [("base-0-2", "waiting"), ("base-1-2", "waiting")]
    assert words[0] == (
        "base-0 was trained with another configuration (optim.warmup: 4 → 3), so it is trained anew as base-0-2"
    )


# the report


def made_up(
    place: Path,
    plan: Sweep,
    values: Mapping[str, Mapping[str, float]],
    lost: Mapping[tuple[str, int], str] = {},
    steps: Mapping[str, int] = {},
    noise: float = 0.002,
    gaps: Mapping[str, str] = {},
) -> Study:
    """A sweep whose runs measured ``values``, arm → metric → mean, up to what the seed and chance do to them."""
    trained = []
    for k, arm in enumerate(plan.arms):
        for seed in plan.seeds:
            if (arm, seed) in lost:
                trained.append(Trained(arm, seed, None, "failed", lost[arm, seed]))
                continue
            folder = run_folder.create(replace(plan.config(arm, seed), name=f"{arm}-{seed}", runs=str(place)), [])
            step, luck = steps.get(arm, 100), 0.03 * np.random.default_rng(seed).normal()
            own = np.random.default_rng([seed, k])
            found = {n: Reading(v + luck + noise * own.normal(), 0.1, 50, 0.0, 1.0) for n, v in values[arm].items()}
            with HistoryWriter(folder.metrics) as history:
                for s in (step // 2, step):
                    history.write(s, 1.0, {"val/loss/total": Reading(2.0 - s / 100 + luck + 1e-4 * own.normal())})
                history.write(step, 1.0, found)
            readings = {name: asdict(r) for name, r in found.items()}
            evaluation = {"step": step, "readings": readings, "not_measured": gaps}
            (folder.path / "evaluation.json").write_text(json.dumps(evaluation))
            (folder.path / "findings.json").write_text(json.dumps({"verdict": "healthy"}))
            folder.update(status="finished", fingerprint=f"data of seed {seed}", step=step, train_seconds=60.0)
            trained.append(Trained(arm, seed, folder.path, "finished"))
    found = study(plan, trained, place)
    write(found)
    return found


def test_each_arm_is_compared_at_a_share_of_the_level(tmp_path: Path) -> None:
    text = f"""
question: Which?
metrics: {{{R2}: higher, {PSNR}: higher, val/loss/total: lower}}
trade: [{PSNR}, {R2}]
arms:
  base:
  better: {{optim.rate: 0.01}}
  worse: {{optim.rate: 0.02, optim.kind: adam}}
  same: {{optim.rate: 0.03}}
  lost: {{optim.rate: 0.04}}
"""
    plan = read(sweep_file(tmp_path, text))
    level = {"base": 0.5, "better": 0.7, "worse": 0.2, "same": 0.5, "lost": 0.6}
    values = {arm: {R2: v} | ({PSNR: v} if arm != "same" else {}) for arm, v in level.items()}
    found = made_up(tmp_path / "runs", plan, values, {("lost", 1): "NonFiniteStep: nan"}, gaps={PSNR: "no samples"})
    assert found.level == 0.05 / 4
    base, better, worse, same, lost = found.arms
    m = better.metrics[R2]
    interval = stats.ttest_rel(m.b, m.a).confidence_interval(1 - 0.05 / 4)
    assert (m.low, m.high) == pytest.approx((interval.low, interval.high))
    assert (m.verdict, worse.metrics[R2].verdict) == ("better", "worse")
    assert (better.verdict, worse.verdict) == ("better", "worse")  # the held-out loss, which decides too, is equivalent
    assert lost.metrics[R2].test == "paired t, 2 pairs"  # with the seeds that both have
    cell = base.cells[R2].reading
    assert cell is not None
    values_of = list(base.cells[R2].values.values())
    known = stats.t.interval(0.95, 2, np.mean(values_of), stats.sem(values_of))
    assert (cell.low, cell.high, cell.null) == (pytest.approx(known[0]), pytest.approx(known[1]), pytest.approx(0.1))
    assert same.cells[PSNR].reading is None
    can, cannot = "\n".join(found.can), "\n".join(found.cannot)
    assert f"better is better than base: {R2} is higher by" in can
    assert "98.75 % interval" in can
    for said in (
        "lost: 1 of 3 runs did not finish: NonFiniteStep: nan (seed 1); those that are left were chosen by not failing",
        "worse: 2 settings were changed at once (optim.kind, optim.rate): which of them did what cannot be told",
        f"{PSNR} was not measured in same: no samples",
        "Arms were compared with base, not with each other",
    ):
        assert said in cannot
    assert "4 arms are compared with the baseline, each at 98.75 % instead of 95 %" in found.correction
    written = json.loads((tmp_path / "runs/sweep.json").read_text())
    assert written["level"]["each"] == 0.0125
    assert [a["verdict"] for a in written["arms"]][:2] == ["not compared", better.verdict]
    assert written["arms"][1]["values"][R2]["seeds"].keys() == {"0", "1", "2"}
    assert "| better | optim.rate 0.003 → 0.01 | 3 of 3 |" in markdown_document(found)
    with Image.open(tmp_path / "runs/trade.png") as drawn:  # `same`, without the one metric, is a line
        assert drawn.size == (1200, 750)
    assert "One metric against another" in (tmp_path / "runs/index.html").read_text()


class Tags(HTMLParser):
    """Which tags a page has, and whether they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen, self.words = list[str](), list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br", "wbr", "line", "circle", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "rect", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_one_seed_two_seeds_and_other_lengths_are_said(tmp_path: Path) -> None:
    text = f"name: <b>x\nmetrics: [{R2}]\n" + ARMS.replace("slow", "'<i>|slow'")
    plan = read(sweep_file(tmp_path, text), seeds=[5])
    values = {arm: {R2: v} for arm, v in zip(plan.arms, (0.3, 0.9), strict=True)}
    one = made_up(tmp_path / "one", plan, values)
    assert one.arms[1].verdict == "cannot tell"
    assert one.can == ()
    assert one.cannot[0].startswith("One seed: nothing can be concluded")
    assert one.arms[0].cells[R2].reading is not None
    assert one.arms[0].cells[R2].reading.high == 1.0  # the run's own interval
    page = Tags()
    page.feed((tmp_path / "one/index.html").read_text())
    assert page.open == []
    assert not {"b>x", "i", "script", "img", "link"} & set(page.seen)
    assert any("<i>|slow" in word for word in page.words)
    assert "<b>x" in page.words
    assert "\\<i\\>\\|slow" in markdown_document(one)
    assert any("One seed" in line for line in terminal_lines(one))

    plan = read(tmp_path / "ablation.yaml", seeds=[5, 6])
    other = made_up(tmp_path / "two", plan, values, steps={plan.baseline: 80})
    assert other.cannot[0].startswith("Two seeds: an interval reaches 13 standard errors")
    c = other.arms[1].comparison
    assert c is not None
    assert other.arms[1].metrics[R2].difference == pytest.approx(0.6, abs=0.01)
    assert any("measured when a run ended, at steps 80 to 100" in notice for notice in c.notices)
    assert any("was trained for 80 steps" in what for what in other.cannot)


def test_what_is_at_chance_or_of_other_data_or_not_counted_claims_nothing(tmp_path: Path) -> None:
    plan = read(sweep_file(tmp_path, f"metrics: {{{R2}: higher}}\narms: {{base: {{}}, more: {{data.items: 500}}}}"))
    found = made_up(tmp_path / "a", plan, {"base": {R2: 0.1}, "more": {R2: 0.1}}, noise=0.05)
    assert f"{R2}: no arm can be told from its null, 0.1" in found.cannot
    barred = made_up(tmp_path / "b", plan, {"base": {R2: 0.1}, "more": {R2: 0.9}})
    for run in barred.arms[1].runs:
        assert run.folder is not None
        run_folder.RunFolder(run.folder).update(fingerprint="others")
    again = study(plan, [run for arm in barred.arms for run in arm.runs], tmp_path / "b")
    assert again.arms[1].verdict == "cannot tell"
    assert again.can == ()
    assert any("so they were not put to the same test" in what for what in again.cannot)
    plan = read(sweep_file(tmp_path, f"metrics: {{{R2}: higher, {PSNR}: higher}}\n{ARMS}"))
    tied = made_up(tmp_path / "d", plan, {"base": {R2: 0.1, PSNR: 3.0}, "slow": {R2: 0.1, PSNR: 9.0}}, noise=0.0)
    assert tied.arms[1].metrics[R2].verdict == "cannot tell"
    assert f"{R2} (the same in every pair, as counts of few items can be by chance)" in "\n".join(tied.cannot)
    names = {f"val/round_trip/{k}": "higher" for k in "abcdefgh"}
    plan = read(sweep_file(tmp_path, f"metrics: {json.dumps(names)}\n{ARMS}"))
    rng = np.random.default_rng(0)
    values = {"base": dict.fromkeys(names, 0.5), "slow": {name: 0.6 + 0.1 * rng.random() for name in names}}
    many = made_up(tmp_path / "c", plan, values, noise=0.03)
    assert "not once all 8 metrics are counted" in "\n".join(many.cannot)


def test_no_false_claim_more_often_than_the_level_says() -> None:
    """Four arms that are the same: of 60 sweeps, at most 8 may claim a difference (99.5 % of such draws)."""
    claims = 0
    for k in range(60):
        seeds = tuple(range(100 * k, 100 * k + 3))
        base = arm_of("base", 2.0, seeds, 0.1)
        arms = [arm_of(f"arm{j}", 2.0 + j * 1e-6, seeds, 0.1, momentum=j) for j in range(1, 5)]
        found = [compare_runs(base, a, level=0.05 / 4, names=("base", "x")).verdict for a in arms]
        claims += any(v in ("better", "worse") for v in found)
    assert claims <= 8


def test_a_sweep_needs_no_torch() -> None:
    program = "import sys, intaglio; intaglio.sweep; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
