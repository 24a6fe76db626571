"""``intaglio diagnose FILE``: anybody's history, from the command line, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from intaglio.cli import main


def write(path: Path, **columns: np.ndarray) -> Path:
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def curve(seed: int = 0, n: int = 60) -> np.ndarray:
    return (2 * np.exp(-np.arange(n) / 12) + 0.3) * np.exp(0.02 * np.random.default_rng(seed).normal(size=n))


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    return write(tmp_path / "healthy.csv", step=np.arange(60) * 50, loss=curve(), val_loss=curve(1) * 1.1)


@pytest.fixture
def failing(tmp_path: Path) -> Path:
    return write(tmp_path / "failing.csv", step=np.arange(60), loss=np.r_[curve()[:40], [np.nan] * 20])


def diagnosed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict]:
    code = main(["diagnose", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_verdict_exit_code_and_how_it_was_read(
    healthy: Path, failing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = diagnosed(capsys, healthy)
    assert (code, answer["verdict"]) == (0, "healthy")
    assert answer["names"] == {"loss": "train/loss/total", "val_loss": "val/loss/total"}
    assert answer["axis"] == "step"
    code, answer = diagnosed(capsys, failing)
    assert (code, answer["verdict"]) == (1, "failing")
    assert [f["rule"] for f in answer["findings"]] == ["non-finite"]
    assert "--" not in "".join(r["do"] for f in answer["findings"] for r in f["remedies"]), "options of ours"
    assert main(["diagnose", str(failing)]) == 1
    said = capsys.readouterr().out
    assert "loss as train/loss/total" in said
    assert "validation-missing" in said


def test_names_are_mapped_by_hand_and_wrong_ones_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "odd.csv", step=np.arange(60), quux=curve(), blah=curve(1))
    assert main(["diagnose", str(file)]) == 3
    assert "quux, blah): --map NAME=" in " ".join(capsys.readouterr().out.split())
    code, answer = diagnosed(capsys, file, "--map", "quux=train/loss/total", "--map", "blah=val/loss/total")
    assert (code, answer["verdict"]) == (0, "healthy")
    assert main(["diagnose", str(file), "--map", "quu=train/loss/total"]) == 2
    assert "quux" in capsys.readouterr().err
    assert main(["diagnose", str(file), "--map", "quux"]) == 2
    assert "--map their_name=" in capsys.readouterr().err


def test_many_runs_in_a_file_get_a_verdict_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = np.repeat(["good", "bad"], 60)
    loss = np.r_[curve(), np.full(60, 2.3)]
    file = write(tmp_path / "many.csv", run=names, step=np.tile(np.arange(60), 2), loss=loss, val_loss=loss * 1.05)
    code, answer = diagnosed(capsys, file)
    assert code == 1
    assert {r["run"]: r["verdict"] for r in answer["runs"]} == {"good": "healthy", "bad": "failing"}
    assert diagnosed(capsys, file, "--run", "good")[1]["verdict"] == "healthy"
    assert main(["diagnose", str(file), "--run", "ugly"]) == 2
    assert "good" in capsys.readouterr().err
    assert main(["diagnose", str(file)]) == 1
    assert "no-learning" in capsys.readouterr().out


def test_a_plan_is_judged_by_their_names_and_ours(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("plan:\n  - {expect: val_loss, below: 0.1, at: end, do: fail}\n")
    code, answer = diagnosed(capsys, healthy, "--plan", plan)
    assert (code, answer["verdict"]) == (1, "failing")
    plan.write_text("plan:\n  - {expect: val/loss/total, below: 1, at: end, do: fail}\n")
    assert diagnosed(capsys, healthy, "--plan", plan)[1]["verdict"] == "healthy"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"step,loss\n", ""),
        (b"\x00\xff\x13" * 400, ""),
        (b"hello\nworld\n", ""),
    ],
)
def test_what_is_no_history_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    file = tmp_path / "thing.csv"
    file.write_bytes(content)
    assert main(["diagnose", str(file)]) in (2, 3)
    out = capsys.readouterr()
    assert says in out.err + out.out
    assert "Traceback" not in out.err


def test_options_for_others_are_refused_for_ours_and_the_other_way_round(
    healthy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", str(healthy), "--trials"]) == 2
    assert "needs a run folder" in capsys.readouterr().err
    assert main(["diagnose", "nowhere", "--format", "csv"]) == 2
    assert main(["diagnose", str(healthy), "--format", "cvs"]) == 2


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.csv"
    file.write_text("step,loss,\x1b[31mred\x07\n" + "\n".join(f"{k},{v},1" for k, v in enumerate(curve())))
    main(["diagnose", str(file)])
    assert "\x1b" not in capsys.readouterr().out


def test_no_torch_is_needed(healthy: Path) -> None:
    program = (
        "import sys; from intaglio.cli import main; import intaglio;"
        f"assert main(['diagnose', {str(healthy)!r}]) == 0; intaglio.diagnose({str(healthy)!r});"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, stdout=subprocess.DEVNULL).returncode == 0
