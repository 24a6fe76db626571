"""The tree of runs, questions about it, and what was changed from run to run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from intaglio import config as configuration
from intaglio.history import HistoryWriter
from intaglio.history.run_folder import RunFolder, create
from intaglio.reports.changelog import changelog, markdown_document
from intaglio.reports.lineage import Lineage, read_lineage, tree_lines

HOSTILE = "<b>|x|\x1b[31m`y`[a](b)"


def a_run(
    root: Path, name: str, losses: list[float], verdict: str = "healthy", parent: RunFolder | None = None, **given: Any
) -> RunFolder:
    """A run folder as a training leaves it, of the recipe ``demo`` with other settings."""
    words = [f"--{key.replace('__', '.')}={value}" for key, value in given.items()]
    config = replace(configuration.load("demo", words), name=name, runs=str(root))
    folder = create(config, ["intaglio"], parent.record["id"] if parent else None)
    with HistoryWriter(folder.metrics) as history:
        for k, loss in enumerate(losses, 1):
            history.write(10 * k, 0.1, {"val/loss/total": loss, "train/loss/total": loss - 1})
    started = f"2026-01-{len(list(root.glob('*/run.json'))):02d}T08:00:00+00:00"
    folder.update(
        status="finished", step=10 * len(losses), train_seconds=5.0, started=started, versions={}, git_commit=None
    )
    findings = {"verdict": verdict, "findings": [{"rule": "near-chance"}] if verdict == "failing" else []}
    (folder.path / "findings.json").write_text(json.dumps(findings))
    return folder


@pytest.fixture(scope="module")
def relatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base → tuned → tuned-again, and a failing run by itself; to be read only."""
    root = tmp_path_factory.mktemp("lineage") / "runs"
    base = a_run(root, "base", [3.0, 2.0, float("nan"), 2.5])
    tuned = a_run(root, "tuned", [1.5, 1.25], parent=base, optim__rate=0.001, seed=1)
    a_run(root, "tuned-again", [1.4], "warnings", parent=tuned, optim__rate=0.001, data__items=500, seed=1)
    a_run(root, "lost", [4.0], "failing", optim__kind="adamw")
    return root


@pytest.fixture
def family(relatives: Path, tmp_path: Path) -> Path:
    """The same to be altered."""
    return Path(shutil.copytree(relatives, tmp_path / "runs"))


def names(lineage: Lineage) -> list[str]:
    return [r.name for r in lineage.runs]


def test_children_stand_below_their_parents_with_their_best_value(relatives: Path) -> None:
    lineage = read_lineage(relatives)
    lines = tree_lines(lineage)
    assert [line.split("  multimodal")[0].rstrip() for line in lines[1:]] == [
        "base",
        "└─ tuned",
        "   └─ tuned-again",
        "lost",
    ]
    assert "val/loss/total 2 at 20" in lines[1]
    assert "val/loss/total 1.25 at 20" in lines[2]
    answer = lineage.as_dict()
    json.dumps(answer, allow_nan=False)
    assert [(r["name"], r["verdict"], r["best"], r["parent_name"]) for r in answer["runs"]] == [
        ("base", "healthy", 2.0, None), ("tuned", "healthy", 1.25, "base"),
        ("tuned-again", "warnings", 1.4, "tuned"), ("lost", "failing", 4.0, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "fits"),
    [
        ("verdict == 'failing' and system == 'multimodal'", ["lost"]),
        ("verdict != 'failing'", ["base", "tuned", "tuned-again"]),
        ("best < 1.45 or optim.kind == 'adamw'", ["tuned", "tuned-again", "lost"]),
        ("1.3 < best <= 2", ["base", "tuned-again"]),
        ("not (seed in (0, 2)) and data.items != 500", ["tuned"]),
        ("parent == 'base'", ["tuned"]),
        ("'tuned' in name", ["tuned", "tuned-again"]),
        ("'near-chance' in findings", ["lost"]),
        ("data.cache == '' and train.patience >= -1 and best > 3", ["lost"]),
        ("train.epochs > 3", []),
        ("name == 'a\\d'", []),
    ],
)
def test_questions(relatives: Path, expression: str, fits: list[str]) -> None:
    found = read_lineage(relatives).where(expression)
    assert names(found) == fits
    if not fits:
        assert tree_lines(found) == ["none of the 4 runs fits"]


def test_a_parent_that_a_question_left_out_is_named(relatives: Path) -> None:
    assert "tuned-again (from tuned)" in tree_lines(read_lineage(relatives).where("verdict == 'warnings'"))[1]


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("verdct == 'failing'", "no run has 'verdct'; did you mean verdict"),
        ("optim.rat > 1", "did you mean optim.rate"),
        ("verdict == failing", "Texts stand in quotes"),
        ("verdict = 'failing'", "equality is =="),
        ("__import__('os').remove('x')", "takes no calls"),
        ("name.__class__ == 1", r"no run has 'name.__class__'"),
        ("[].append == 1", "a dot stands between"),
        ("best + 1 > 2", "takes no arithmetic"),
        ("findings[0] == 1", "takes no brackets"),
        ("(lambda: 1) == 1", "takes no functions"),
        ("best is None", "use == and !="),
        ("-best > 1", "before numbers only"),
        ("seed in (seed, 1)", "a list holds texts and numbers"),
        ("best < 'low'", "have no order"),
        ("seed in 3", "cannot be in"),
        ("f'{best}' == 'x'", "JoinedStr"),
        ("(" * 900 + "1" + ")" * 900, "cannot be read"),
        ("not " * 400 + "seed", "nested too deeply"),
        ("1" * 3000, "are enough"),
        ("seed == 1\0", "cannot be read"),
        ("", "cannot be read"),
        (f"{HOSTILE} == 1", "cannot be read"),
    ],
)
def test_anything_else_is_refused(relatives: Path, expression: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        read_lineage(relatives).where(expression)
    assert "\x1b" not in str(refused.value)


def test_what_is_damaged_or_gone_is_said(family: Path) -> None:
    (family / "lost/run.json").write_text('{"id": ')
    (family / "base").rename(family.parent / "elsewhere")
    lines = tree_lines(read_lineage(family))
    assert "is not here)" in lines[1]
    assert lines[-1].startswith("! ")
    assert "lost cannot be read" in lines[-1]
    (family / "tuned/metrics.jsonl").write_bytes(b'{"step": 10, "name": "val/loss/total", "val')
    assert read_lineage(family).runs[0].best is None
    log = changelog(family / "tuned-again")
    assert [e.run for e in log.entries] == ["tuned-again", "tuned"]
    assert "is no longer here, so old values are not known" in log.entries[1].remarks[0]


def test_folders_without_runs_and_circles(family: Path, tmp_path: Path) -> None:
    for place, says in ((tmp_path / "none", "not a folder"), (family / "base", "is a run itself")):
        with pytest.raises(ValueError, match=says):
            read_lineage(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no runs under"):
        read_lineage(tmp_path / "empty")
    base, tuned = RunFolder(family / "base"), RunFolder(family / "tuned")
    base.update(parent=tuned.record["id"])
    assert len(tree_lines(read_lineage(family))) == 5
    with pytest.raises(ValueError, match="in a circle"):
        changelog(tuned.path)


def test_changelog_tells_only_what_changed(family: Path) -> None:
    again = RunFolder(family / "tuned-again")
    with (again.path / "notes.md").open("a") as notes:
        notes.write("fewer items, to see\n<script>alert(1)</script>\n")
    again.update(resumed=[{"from": "step-10.ckpt"}], fingerprint="other")
    log = changelog(again.path)
    assert [e.run for e in log.entries] == ["tuned-again", "tuned", "base"]
    last, tuned, base = log.entries
    assert last.changed == {"data.items": (12000, 500)}
    assert tuned.changed == {"seed": (0, 1), "optim.rate": (0.003, 0.001)}
    assert not base.changed
    assert last.notes.startswith("fewer items")
    text = markdown_document(log)
    assert "## 2026-01-03 · tuned-again, from tuned" in text
    assert "- changed: `data.items` `12000` → `500`" in text
    assert "- Went on from step-10.ckpt." in text
    assert "fingerprint differs" in text
    assert "best val/loss/total 1.4 at step 10" in text
    assert "<script>" not in text.replace("\\<", "")
    json.dumps(log.as_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="not a run folder"):
        changelog(family / "nowhere")


def test_hostile_values_are_harmless(family: Path) -> None:
    lost = RunFolder(family / "lost")
    text = (lost.path / "config.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("system")]
    (lost.path / "config.yaml").write_text(
        "\n".join([*lines, f"system: {json.dumps(HOSTILE)}", f"{json.dumps(HOSTILE)}: 1"])
    )
    lost.update(
        system=HOSTILE, status=HOSTILE, parent=RunFolder(family / "base").record["id"], versions={HOSTILE: HOSTILE}
    )
    RunFolder(family / "base").update(versions={HOSTILE: "1"})
    said = "\n".join(tree_lines(read_lineage(family))) + markdown_document(changelog(lost.path))
    assert "\x1b" not in said
    assert "[a](b)" not in markdown_document(changelog(lost.path)).replace("`y`[a](b)``", "")
