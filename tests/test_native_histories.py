"""Histories in the loggers' own formats: written by the real libraries, and read back; old ones; damaged ones."""

import json
import sqlite3
import subprocess
import sys
import textwrap
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from native_files import events, framed, is_history

from intaglio.history.foreign import History
from intaglio.history.formats import mlflow_stores, tensorboard_events, wandb_runs
from intaglio.history.formats.columns import Columns, in_order

HISTORIES = Path(__file__).parents[2] / "shared" / "data" / "histories"

# In processes of their own: both start services, change logging, and warn of what they use.
WANDB = """
    import os, sys, wandb, numpy as np
    quiet = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True,
                           disable_code=True, silent=True, mode="offline", root_dir=sys.argv[1])
    run = wandb.init(project="p", name="first", config={"lr": 1e-3, "model": {"dim": 8}}, settings=quiet)
    for k in range(400):
        row = {"train": {"loss": 1 / (k + 1)}, "trainer/global_step": 10 * k, "saved": True, "note": "text"}
        if k % 100 == 0:
            row |= {"val/loss": [1.5, float("nan"), float("inf"), 0.5][k // 100], "w": wandb.Histogram(np.arange(9))}
        run.log(row)
    run.config.update({"late": "x"})
    run.finish()
    run = wandb.init(project="p", name="second", settings=quiet)
    for k in range(30):
        run.log({"loss": float(k)})
        run.log({"kl": k / 2, "epoch": k // 10})
    run.finish(exit_code=1)
"""
MLFLOW = """
    import sys
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient
    client = MlflowClient(tracking_uri=sys.argv[1])
    experiment = client.create_experiment("vae")
    for name, status in (("one", "FINISHED"), ("two", "FAILED"), ("two", None), ("gone", "FINISHED")):
        run = client.create_run(experiment, run_name=name).info.run_id
        for key, value in (("lr", 1e-3), ("beta/kl", True), ("optimizer", "Adam")):
            client.log_param(run, key, value)
        train = [Metric("train/loss", 1 / (step + 1), 1000 + step, step) for step in range(200)]
        odd = [Metric("val_loss", float(v), 2000 + k, 50 * k) for k, v in enumerate(["nan", "inf", "-inf", "0.5"])]
        client.log_batch(run, train + odd + [Metric("no step", float(k), 1000 + k, 0) for k in range(5)])
        if status:
            client.set_terminated(run, status)
    client.delete_run(run)
"""


def written(program: str, *words: str, **environment: str) -> None:
    """Runs a program that writes with a library."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wandb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``wandb/`` in it: a run that ended well, and one that failed and logs one metric a call."""
    folder = tmp_path_factory.mktemp("project")
    written(WANDB, str(folder), HOME=str(folder), PATH="/usr/bin:/bin")
    return folder


@pytest.fixture(scope="module", params=["file", "sqlite"])
def mlflow_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with four runs, the last of them deleted."""
    folder = tmp_path_factory.mktemp("mlflow")
    store = folder / ("mlruns" if request.param == "file" else "mlflow.db")
    address = store.as_uri() if request.param == "file" else f"sqlite:///{store}"
    written(MLFLOW, address, HOME=str(folder), PATH="/usr/bin:/bin", MLFLOW_ALLOW_FILE_STORE="true")
    return store


def both(folder: Path) -> list[History]:
    """The runs of ``wandb_folder`` in order: begun in one second, their folders' names do not tell it."""
    return sorted(wandb_runs.read(folder), key=lambda history: history.name)


def test_a_wandb_run_comes_back_as_it_was_logged(wandb_folder: Path) -> None:
    assert wandb_runs.claims(wandb_folder)
    first, second = both(wandb_folder)
    assert (first.name, first.format, first.status) == ("first", "W&B offline run", "finished")
    assert first.axis == "trainer/global_step"
    assert first.config == {"lr": 1e-3, "model": {"dim": 8}, "late": "x"}
    assert first.given.keys() == {"train.loss", "val/loss", "saved", "_runtime"}
    np.testing.assert_array_equal(first.given["train.loss"].steps, 10 * np.arange(400))
    np.testing.assert_array_equal(first.given["train.loss"].values, 1 / np.arange(1, 401))
    np.testing.assert_array_equal(first.given["val/loss"].steps, [0, 1000, 2000, 3000])
    np.testing.assert_array_equal(first.given["val/loss"].values, [1.5, np.nan, np.inf, 0.5])
    assert first.notices == ("Left out, since they are no numbers: note (str), w (histogram).",)
    assert (second.name, second.status, second.axis) == ("second", "crashed", "_step")
    np.testing.assert_array_equal(second.given["loss"].steps, second.given["kl"].steps)
    np.testing.assert_array_equal(second.given["kl"].steps, 2 * np.arange(30))
    assert "logged one by one" in second.notices[0]
    run = first.path
    assert wandb_runs.claims(run)
    assert wandb_runs.claims(run.parent)
    assert wandb_runs.read(run)[0].given.keys() == wandb_runs.read(run.parent)[0].given.keys()
    assert not wandb_runs.claims(run.parent / "logs")


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_wandb_file_cut_in_a_record_is_read_up_to_there(wandb_folder: Path, tmp_path: Path, share: float) -> None:
    whole = both(wandb_folder)[0]
    data = whole.path.read_bytes()
    cut = tmp_path / "run-cut.wandb"
    cut.write_bytes(data[: int(share * len(data))])
    (history,) = wandb_runs.read(cut)
    rows = len(history.given["train.loss"])
    assert 0.5 * share * 400 < rows < 400
    np.testing.assert_array_equal(history.given["train.loss"].values, whole.given["train.loss"].values[:rows])
    assert "of a record" in history.notices[0] or "damaged" in history.notices[0]
    assert history.status == ""


def test_wandb_runs_of_all_ages_are_read_without_the_library(tmp_path: Path) -> None:
    old = tmp_path / "wandb" / "run-20200101_120000-abc"
    old.mkdir(parents=True)
    rows = [
        {"loss": 1 / (k + 1), "kl": "NaN" if k == 2 else 0.1, "epoch": k, "_step": k, "_runtime": k} for k in range(9)
    ]
    (old / "wandb-history.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"loss": 0.')
    (old / "config.yaml").write_text(
        "wandb_version: 1\nlr: {desc: null, value: 0.1}\n_wandb: {desc: null, value: {}}\n"
    )
    (old / "wandb-metadata.json").write_text('{"state": "failed"}')
    last = tmp_path / "wandb" / "run-20210101_120000-xyz" / "files"
    last.mkdir(parents=True)
    (last / "wandb-summary.json").write_text(
        '{"loss": 0.25, "_step": 70, "best": {"acc": 0.5}, "img": {"_type": "image"}}'
    )
    (old.parent / "latest-run").symlink_to(last.parent)
    first, second = wandb_runs.read(tmp_path)
    assert (first.name, first.format, first.axis, first.status) == ("abc", "W&B history", "epoch", "crashed")
    assert first.config == {"lr": 0.1}
    assert len(first.given["loss"]) == 9
    assert np.isnan(first.given["kl"].values[2])
    assert first.notices == ("1 damaged lines of wandb-history.jsonl are left out.",)
    assert (second.name, second.format) == ("xyz", "W&B summary")
    assert {name: (s.steps[0], s.value) for name, s in second.given.items()} == {
        "loss": (70, 0.25),
        "best.acc": (70, 0.5),
    }
    assert "only the summary" in second.notices[0]


def test_fields_have_the_numbers_of_the_library_and_old_records_are_read(tmp_path: Path) -> None:
    library = import_module("wandb.proto.wandb_internal_pb2")
    full = {"Items": "ConfigRecord", "Item": "HistoryItem", "Step": "HistoryStep", "Exit": "RunExitRecord"}
    for message, fields in wandb_runs._SCHEMA.items():
        name = full.get(message, message if message == "Record" else f"{message}Record")
        described = getattr(library, name).DESCRIPTOR.fields_by_name
        assert {field: described[field].number for field in fields} == {field: n for field, (n, _) in fields.items()}
    records = [library.Record(run=library.RunRecord(run_id="abc", starting_step=40))]
    for step, loss in enumerate(["0.5", '"NaN"', "1" + "0" * 400, '"Infinity"', "[1]", "0." + "1" * 40_000]):
        row = library.Record()
        row.history.step.num = 40 + step
        row.history.item.add(key="loss", value_json=loss)
        row.history.item.add(key="_step", value_json=str(40 + step))
        records.append(row)
    (tmp_path / "a.wandb").write_bytes(framed([row.SerializeToString() for row in records]))
    (history,) = wandb_runs.read(tmp_path)
    np.testing.assert_array_equal(history.given["loss"].steps, [40, 41, 42, 43, 45])
    np.testing.assert_array_equal(history.given["loss"].values, [0.5, np.nan, np.inf, np.inf, 0.1111111111111111])
    assert (history.name, history.status) == ("abc", "")
    assert [notice.split(":")[0] for notice in history.notices] == [
        "The run was resumed",
        "a.wandb has no record of the run's end",
        "Left out, since they are no numbers",
    ]


def test_the_step_that_was_logged_counts_only_if_it_is_there_for_all(tmp_path: Path) -> None:
    for rows, axis in (
        ([{"a": 1.0, "global_step": 5 * k} for k in range(5)], "global_step"),
        ([{"a": 1.0, "global_step": 5 * k} for k in (0, 1, 2, 2)], "global_step"),  # evaluated once more at the end
        ([{"a": 1.0, "epoch": k // 2} for k in range(5)], "_step"),
        ([{"a": 1.0, "global_step": 5 * k} if k else {"a": 2.0} for k in range(5)], "_step"),
        ([{"a": 1.0, "global_step": 5 * k, "epoch": k} for k in range(5)], "global_step"),
        ([{"a": 1.0, "epoch": k + 0.5} for k in range(5)], "_step"),
    ):
        (tmp_path / "wandb-history.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert wandb_runs.read(tmp_path)[0].axis == axis, rows


def test_what_torch_writes_for_tensorboard_comes_back(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "a")) as writer:
        for step in range(500):
            writer.add_scalar("train/loss", 1 / (step + 1), step)
        writer.add_scalar("train/loss", float("nan"), 500)
        writer.add_scalars("loss/all", {"train": 1.0, "val": 2.0}, 3)
        writer.add_histogram("weights", np.arange(10.0), 0)
        writer.add_hparams({"lr": 0.1, "kind": "vae", "tied": True}, {"hparam/best": 0.5})
    assert tensorboard_events.claims(tmp_path)
    (history,) = tensorboard_events.read(tmp_path)
    assert (history.name, history.axis, history.format) == ("a", "step", "TensorBoard events")
    assert history.given.keys() == {"train/loss", "loss/all/train", "loss/all/val", "hparam/best"}
    loss = history.given["train/loss"]
    np.testing.assert_array_equal(loss.steps, np.arange(501))
    np.testing.assert_array_equal(loss.values[:500], (1 / np.arange(1, 501)).astype(np.float32))
    assert np.isnan(loss.value)
    assert history.config == {"lr": 0.1, "kind": "vae", "tied": True}
    assert history.notices == ("Left out, since they are no scalars: 1 × histogram.",)
    with SummaryWriter(str(tmp_path / "search")) as writer:
        for trial in range(2):
            writer.add_hparams({"lr": 0.1 * trial}, {"hparam/best": 0.5}, run_name=f"12.{trial}")
    assert [found.config for found in tensorboard_events.read(tmp_path / "search")] == [{"lr": 0.0}, {"lr": 0.1}]


def test_what_lightning_writes_for_tensorboard_comes_back(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    for _ in range(2):
        logger = TensorBoardLogger(tmp_path, name="vae")
        logger.log_hyperparams({"lr": 0.1, "dims": [8, 16]})
        for step in range(20):
            logger.log_metrics({"loss": 1.0 / (step + 1)}, step)
        logger.finalize("success")
    one, two = tensorboard_events.read(tmp_path)
    assert [one.name, two.name] == ["vae/version_0", "vae/version_1"]
    assert len(one.given["loss"]) == 20
    assert one.config == {"lr": 0.1, "dims": [8, 16]}


def test_keras_folders_are_one_run_and_restarts_are_runs_of_their_own(tmp_path: Path) -> None:
    from tensorboard.summary import Writer

    def write(folder: str, tag: str, steps: range) -> None:
        writer = Writer(str(tmp_path / folder))  # scalars as tensors, as TensorFlow 2 writes them
        for step in steps:
            writer.add_scalar(tag, 1.0 / (step + 1), step)
        writer.close()

    for split in ("train", "validation"):
        write(f"keras/{split}", "epoch_loss", range(12))
    write("resumed", "loss", range(12))
    write("resumed", "loss", range(8, 20))
    write("again", "loss", range(5))
    write("again", "loss", range(7))
    histories = {history.name: history for history in tensorboard_events.read(tmp_path)}
    assert histories.keys() == {"keras", "resumed", "again (1)", "again (2)"}
    assert histories["keras"].given.keys() == {"train/epoch_loss", "validation/epoch_loss"}
    np.testing.assert_array_equal(histories["resumed"].given["loss"].steps, np.arange(20))
    assert "logged more than once" in histories["resumed"].notices[-1]
    assert [len(histories[f"again ({k})"].given["loss"]) for k in (1, 2)] == [5, 7]


def test_an_event_file_that_is_cut_or_flipped_is_read_up_to_there(tmp_path: Path) -> None:
    data, ends = events(300)
    file = tmp_path / "events.out.tfevents.1.host"
    for damaged, rows in (
        (data[: ends[200] + 9], 200),
        (data[: ends[200] + 20], 200),
        (data[: ends[150] + 14] + b"\xff" + data[ends[150] + 15 :], 150),
        (data[: ends[100] + 2] + b"\xff" + data[ends[100] + 3 :], 100),
    ):
        file.write_bytes(damaged)
        (history,) = tensorboard_events.read(file)
        assert len(history.given["loss"]) == rows
        assert f"byte {ends[rows]:,} of {len(damaged):,}" in history.notices[0]


def test_a_folder_of_many_event_files_is_many_runs(tmp_path: Path) -> None:
    data, _ = events(10)
    for k in range(300):
        (tmp_path / f"run{k}").mkdir()
        (tmp_path / f"run{k}" / "events.out.tfevents.1.host").write_bytes(data)
    (tmp_path / "run7" / "events.out.tfevents.1.host").write_bytes(b"")
    began = time.perf_counter()
    histories = tensorboard_events.read(tmp_path)
    assert time.perf_counter() - began < 5
    assert len(histories) == 299
    assert "is empty" in histories[0].notices[-1]


def test_an_mlflow_store_comes_back_as_it_was_logged(mlflow_store: Path) -> None:
    assert mlflow_stores.claims(mlflow_store)
    assert mlflow_stores.claims(mlflow_store.parent)
    histories = mlflow_stores.read(mlflow_store)
    assert [history.name.split(" ")[0] for history in histories] == ["one", "two", "two"]
    assert len({history.name for history in histories}) == 3
    assert [history.status for history in histories] == ["finished", "crashed", "running"]
    for history in histories:
        assert is_history(history)
        assert history.config == {"lr": 1e-3, "beta/kl": True, "optimizer": "Adam"}
        np.testing.assert_array_equal(history.given["train/loss"].values, 1 / np.arange(1, 201))
        np.testing.assert_array_equal(history.given["val_loss"].values, [np.nan, np.inf, -np.inf, 0.5])
        np.testing.assert_array_equal(history.given["val_loss"].steps, [0, 50, 100, 150])
        np.testing.assert_array_equal(history.given["no step"].steps, np.arange(5))
        assert history.notices == ("No steps were logged for no step: its rows are counted.",)
    if mlflow_store.is_dir():
        assert mlflow_stores.read(histories[0].path)[0].given.keys() == histories[0].given.keys()


def test_another_database_is_told_from_a_store(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE runs (a)")
    other.close()
    with pytest.raises(ValueError, match="no MLflow store: it has no table metrics, params, tags"):
        mlflow_stores.read(tmp_path / "other.db")


def test_steps_are_put_in_order_and_it_is_said() -> None:
    epochs = np.tile(np.arange(0, 100, 10), 3)
    columns = {
        "batch": (epochs, np.arange(30.0)),
        "rarer": (np.array([50, 90, 50, 90, 50, 90]), np.arange(6.0)),
        "resumed": (np.array([0, 1, 2, 3, 2, 3, 4]), np.arange(7.0)),
        "stepless": (np.zeros(4, np.int64), np.arange(4.0)),
    }
    given, axis, notices = in_order(columns, "step")
    assert axis == "step"
    period = 91
    np.testing.assert_array_equal(given["batch"].steps, epochs + period * np.repeat(np.arange(3), 10))
    np.testing.assert_array_equal(given["rarer"].steps, [50, 90, 50 + 91, 90 + 91, 50 + 182, 90 + 182])
    np.testing.assert_array_equal(given["resumed"].values, [0, 1, 4, 5, 6])
    np.testing.assert_array_equal(given["stepless"].steps, [0, 1, 2, 3])
    assert [notice.split(":")[0] for notice in notices] == [
        "No steps were logged for stepless",
        "The steps of batch, rarer start again in the middle",
        "The steps of resumed go backwards",
        "Some steps of resumed were logged more than once",
    ]
    only = in_order({"a": columns["stepless"], "b": (np.array([0]), np.ones(1))}, "step")
    assert only[1] == "row"


def test_numbers_that_no_column_holds_are_refused_and_leave_nothing() -> None:
    columns = Columns()
    columns.add("a", 1, 2.0)
    for place, value in ((2**70, 1.0), (2, "x"), ("x", 2.0)):
        with pytest.raises((OverflowError, TypeError)):
            columns.add("a", place, value)  # type: ignore[arg-type]
    steps, values = columns.arrays()["a"]
    assert (list(steps), list(values)) == ([1], [2.0])


@pytest.mark.data
@pytest.mark.skipif(not HISTORIES.is_dir(), reason="the real histories are not beside the project")
def test_real_event_files_are_read_in_full() -> None:
    labels = {entry["id"]: entry for entry in json.loads((HISTORIES / "labels.json").read_text())["entries"]}
    for name in ("cifarvae_v0", "cifarvae_v1", "cifarvae_v3_tb", "wandb_tf_asset"):
        (history,) = tensorboard_events.read(HISTORIES / name)
        assert is_history(history)
        assert history.given.keys() == set(labels[name]["metrics"])
        assert 0.97 * labels[name]["rows"] <= max(map(len, history.given.values())) <= labels[name]["rows"]
        assert not history.notices
    loss = tensorboard_events.read(HISTORIES / "cifarvae_v0")[0].given["avg_val_loss"]
    assert (len(loss), int(loss.steps[-1])) == (100, 19499)
    assert loss.value == pytest.approx(112, abs=0.5)
