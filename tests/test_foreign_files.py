"""JSON of all kinds, folders of other tools, archives, our own runs; and what Lightning and Hugging Face write."""

import gzip
import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intaglio.history import HistoryWriter, Reading, Series, to_parquet
from intaglio.history.aliases import ours
from intaglio.history.foreign import FORMATS, History, read_histories
from intaglio.history.formats import blocks, objects
from intaglio.history.formats.epochs import one_clock

Read = Callable[..., list[History]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a file with this content, or this value as JSON."""

    def read(content: Any, name: str = "history.json") -> list[History]:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_histories(path)

    return read


def points(history: History, name: str) -> dict[int, float]:
    series = history.given[name]
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


LOSS = {10 * k: 1 / (k + 1) for k in range(20)}
ROWS = [{"step": step, "loss": value} for step, value in LOSS.items()]


# JSON


@pytest.mark.parametrize(
    "value",
    [
        ROWS,
        {"history": ROWS, "model": "vae"},
        {"step": list(LOSS), "loss": list(LOSS.values())},
        {"columns": ["step", "loss"], "index": list(range(20)), "data": [list(pair) for pair in LOSS.items()]},
        {"step": {str(k): s for k, s in enumerate(LOSS)}, "loss": {str(k): v for k, v in enumerate(LOSS.values())}},
        {str(k): row for k, row in enumerate(ROWS)},
        [{"step": str(row["step"]), "loss": f"tensor({row['loss']!r})"} for row in ROWS],
        "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
        json.dumps(ROWS, indent=1),
    ],
)
def test_rows_columns_and_lines_of_json_are_the_same_history(read: Read, value: Any) -> None:
    (history,) = read(value)
    assert (history.axis, points(history, "loss")) == ("step", LOSS)


def test_histories_of_wandb_keras_tensorboard_and_several_runs(read: Read) -> None:
    rows = [
        {"_step": k, "_runtime": k, "train": {"loss": k}, "h": {"_type": "histogram", "values": [1]}} for k in range(9)
    ]
    rows[4] |= {"val/loss": "NaN"}
    (history,) = read(rows)
    assert (history.format, history.axis, history.given.keys()) == (
        "W&B JSON",
        "_step",
        {"_runtime", "train/loss", "val/loss"},
    )
    assert math.isnan(points(history, "val/loss")[4])
    (history,) = read({"loss": [3, 2.5, None], "val_loss": [[4], [3], [2]], "lr": 0.1})
    assert (history.format, points(history, "loss")) == ("Keras history", {0: 3, 1: 2.5})
    assert points(history, "val_loss") == {0: 4, 1: 3, 2: 2}
    assert history.config == {"lr": 0.1}
    (history,) = read([[1.6e9, step, value] for step, value in LOSS.items()], "run-a-tag-loss.json")
    assert (history.format, points(history, "loss")) == ("TensorBoard JSON", LOSS)
    found = read({name: {"loss": [3, 2], "kl": [1, 1]} for name in ("a", "b")})
    assert [h.name for h in found] == ["a", "b"]
    (history,) = read({"train": {"loss": [3, 2]}, "val": {"loss": [4, 3]}})
    assert history.given.keys() == {"train/loss", "val/loss"}
    lines = [{"env": "cuda", "seed": 1}] + [
        {"mode": "train", "epoch": 1, "iter": k, "loss": k} for k in range(50, 200, 50)
    ]
    (history,) = read(
        "\n".join(map(json.dumps, [*lines, {"mode": "val", "epoch": 1, "iter": 150, "acc": 0.5}])), "a.log.json"
    )
    assert points(history, "val/acc") == {150: 0.5}


def test_skorch_epochs_stand_among_their_batches(read: Read) -> None:
    epochs = [
        {
            "batches": [{"train_loss": e + b / 4, "train_batch_size": 8} for b in range(4)] + [{"valid_loss": 1.0}],
            "epoch": e + 1,
            "train_loss": float(e),
            "valid_loss": e + 1,
            "valid_loss_best": True,
        }
        for e in range(5)
    ]
    (history,) = read(epochs)
    assert (history.format, history.axis) == ("skorch history", "batch")
    assert points(history, "valid_loss") == {4: 1, 8: 2, 12: 3, 16: 4, 20: 5}
    assert len(history.given["batch/train_loss"]) == 20
    series, renamed = ours(history)
    assert renamed["batch/train_loss"] == "train/loss/total"
    assert len(series["train_loss"]) == 5
    assert "valid_loss_best" in series


def test_damaged_json_is_read_up_to_the_damage_and_the_rest_is_refused(read: Read) -> None:
    whole = json.dumps(ROWS)
    for end in range(40, len(whole) - 1, 7):
        (history,) = read(whole[:end])
        assert points(history, "loss").items() <= LOSS.items()
        assert any("damaged or cut off" in notice for notice in history.notices)
    (history,) = read(json.dumps({"loss": list(LOSS.values()), "val_loss": [1.5, 2.5, 3.5]})[:-6])
    assert points(history, "val_loss") == {0: 1.5, 1: 2.5}
    lines = [json.dumps(row) for row in ROWS]
    (history,) = read("\n".join([*lines[:5], '{"step": 5, "lo', *lines[5:], '{"step']), "log.jsonl")
    assert points(history, "loss") == LOSS
    assert "2 damaged lines of 22 left out, the first in line 6." in history.notices
    for bad in ("{", "3", '{"a": "b"}', "[" * 100_000, '[{"step": 1, "loss": ' + "9" * 5000 + "}]", "null", "[]"):
        with pytest.raises(ValueError, match=r"JSON|nested too deeply"):
            read(bad)


def test_json_lines_in_blocks_give_the_same(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        json.dumps({"step": k, "loss": k / 7, **({"val": {"loss": 2.0}} if k % 9 == 8 else {}), "t": "x"})
        for k in range(99)
    ]
    lines[50] = lines[50][:9]
    text = "\n".join(lines) + "\n"
    (whole,) = read(text, "a.jsonl")
    monkeypatch.setattr(objects, "_AT_ONCE", 0)
    monkeypatch.setattr(blocks, "_BLOCK", 300)
    (parts,) = read(text, "a.jsonl")
    assert {n: points(whole, n) for n in whole.given} == {n: points(parts, n) for n in parts.given}
    assert any("1 damaged line of 99 left out" in notice for notice in parts.notices)
    assert parts.config == {"t": "x"}


# Formats, folders, archives


def test_an_unknown_format_and_a_missing_file_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nearest is 'tensorboard'"):
        read_histories(tmp_path, format="tensorbord")
    with pytest.raises(ValueError, match="does not exist"):
        read_histories(tmp_path / "nothing.csv")
    (tmp_path / "odd.bin").write_text("step,loss\n1,0.5\n2,0.4\n")
    (history,) = read_histories(tmp_path / "odd.bin", format="csv")
    assert points(history, "loss") == {1: 0.5, 2: 0.4}
    with pytest.raises(ValueError, match="no JSON"):
        read_histories(tmp_path / "odd.bin", format="json")
    assert {"csv", "json", "parquet", "wandb", "tensorboard", "mlflow"} <= FORMATS.keys()


def test_a_folder_is_read_by_the_one_history_in_it_or_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is empty"):
        read_histories(tmp_path)
    (tmp_path / "README.md").write_text("# Run")
    (tmp_path / "config.json").write_text('{"lr": 1}')
    with pytest.raises(ValueError, match=r"it has 'README.md', 'config.json'"):
        read_histories(tmp_path)
    (tmp_path / "a.csv").write_text("step,loss\n1,0.5\n2,0.4\n")
    (history,) = read_histories(tmp_path)
    assert (history.name, points(history, "loss")) == ("a", {1: 0.5, 2: 0.4})
    (tmp_path / "b.csv").write_text("step,loss\n1,0.5\n2,0.4\n")
    with pytest.raises(ValueError, match=r"2 files that may be histories: give one of them: 'a.csv', 'b.csv'"):
        read_histories(tmp_path)
    for k in range(2):
        (tmp_path / "logs" / f"version_{k}").mkdir(parents=True)
        (tmp_path / "logs" / f"version_{k}" / "metrics.csv").write_text(f"epoch,step,loss\n0,9,{k}\n1,19,{k}\n")
        (tmp_path / "logs" / f"version_{k}" / "hparams.yaml").write_text(f"lr: {k + 1}\n")
    found = read_histories(tmp_path / "logs")
    assert [(h.name, h.format, h.config) for h in found] == [
        ("version_0", "Lightning CSV", {"lr": 1}),
        ("version_1", "Lightning CSV", {"lr": 2}),
    ]


def test_a_folder_of_runs_of_several_tools_is_read_whole(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "board")) as writer:
        for step in range(5):
            writer.add_scalar("loss", step, step)
    for name, text in (("keras", "loss,val_loss\n1,2\n0,1\n"), ("notes", "a,b\nx,y\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(text)
    found = read_histories(tmp_path)
    assert [(h.name, h.format) for h in found] == [("board", "TensorBoard events"), ("keras", "Keras CSV")]
    assert "No history could be read in 'notes'." in found[0].notices


def test_panels_exported_one_by_one_are_put_together_by_run(tmp_path: Path) -> None:
    for metric in ("loss", "val_loss"):
        header = '"Step",' + ",".join(
            f'"{r} - {metric}","{r} - {metric}__MIN","{r} - {metric}__MAX"' for r in ("a", "b")
        )
        rows = "".join(f'"{k}",' + ",".join([f'"{k}"'] * 6) + "\n" for k in range(5))
        (tmp_path / f"{metric}.csv").write_text(f"{header}\n{rows}")
    found = read_histories(tmp_path)
    assert [(h.name, list(h.given)) for h in found] == [("a", ["loss", "val_loss"]), ("b", ["loss", "val_loss"])]


def test_archives_are_unpacked_safely(tmp_path: Path) -> None:
    text = "step,loss\n1,0.5\n2,0.4\n"
    packed = tmp_path / "run.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("version_3/metrics.csv", text)
        archive.writestr("version_3/hparams.yaml", "lr: 2\n")
    (history,) = read_histories(packed)
    assert (history.name, history.path, history.config) == ("version_3", packed, {"lr": 2})
    assert points(history, "loss") == {1: 0.5, 2: 0.4}
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert points(read_histories(tmp_path / "log.csv.gz")[0], "loss") == {1: 0.5, 2: 0.4}
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../out.csv", text)
    with pytest.raises(ValueError, match="leads out of the folder"):
        read_histories(packed)
    assert not (tmp_path.parent / "out.csv").exists()
    good = io.BytesIO()
    with zipfile.ZipFile(good, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metrics.csv", text * 50)
    for cut in (20, 60, len(good.getvalue()) - 5):
        packed.write_bytes(good.getvalue()[:cut])
        with pytest.raises(ValueError, match="can't be unpacked"):
            read_histories(packed)


def test_our_own_runs_keep_names_nulls_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with HistoryWriter(path) as writer:
        for step in range(5):
            writer.write(step, step / 10, {"val/loss/total": Reading(1 / (step + 1), null=math.log(8), n=64)})
    (tmp_path / "run.json").write_text('{"name": "first", "status": "finished"}')
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    for source in (tmp_path, path, to_parquet(path)):
        (history,) = read_histories(source)
        assert (history.name, history.format, history.status) == ("first", "intaglio", "finished")
        assert history.config == {"seed": 3}
        series = history.given["val/loss/total"]
        assert (series.null, series.n, series.value) == (math.log(8), 64, 0.2)
        assert ours(history) == (history.given, {})
    path.write_text(path.read_text()[:-30])
    (history,) = read_histories(path)
    assert len(history.given["val/loss/total"]) == 4
    assert "is damaged" in history.notices[0]


def test_metrics_over_epochs_are_moved_to_steps_where_the_epoch_of_a_step_is_known() -> None:
    train = Series.of(np.arange(100), np.linspace(2, 1, 100))
    val = Series.of(np.arange(5), np.array([5.0, 4, 3, 2, 1]))
    epoch = Series.of(np.arange(100), np.arange(100) // 20.0)
    plain = History("r", Path("r"), "TensorBoard events", "step", {"loss": train, "val_loss": val})
    told = one_clock(replace(plain, given={**plain.given, "epoch": epoch}))
    assert told.given["val_loss"].steps.tolist() == [19, 39, 59, 79, 99]
    assert "put at the last step of each epoch" in told.notices[0]
    left = one_clock(plain)
    assert left.given["val_loss"] is val
    assert "counted in 5 epochs while others count steps" in left.notices[0]
    assert one_clock(replace(plain, given={"loss": train})).notices == ()


# What the real tools write


def test_lightning_writes_and_we_read(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="vae")
    logger.log_hyperparams({"lr": 1e-3, "latent": 16})
    for step in range(40):
        logger.log_metrics({"train_loss_step": 1 / (step + 1), "epoch": step // 10}, step)
        if step % 10 == 9:
            logger.log_metrics({"train_loss_epoch": 0.5, "epoch": step // 10}, step)
            logger.log_metrics({"val_loss": step, "val/kl": math.nan if step == 39 else 2.0, "epoch": step // 10}, step)
    logger.finalize("success")
    for source in (tmp_path / "vae", tmp_path / "vae" / "version_0", tmp_path / "vae" / "version_0" / "metrics.csv"):
        (history,) = read_histories(source)
        assert (history.format, history.axis) == ("Lightning CSV", "step")
        assert history.config == {"lr": 1e-3, "latent": 16}
        assert not history.notices
        series, renamed = ours(history)
        assert points(history, "train_loss_step") == {k: 1 / (k + 1) for k in range(40)}
        assert series["val/loss/total"].steps.tolist() == [9, 19, 29, 39]
        assert np.isnan(series["val/loss/kl"].values).tolist() == [False, False, False, True]
        assert renamed["train_loss_step"] == "train/loss/total"
        assert len(series["train_loss_epoch"]) == 4


def test_hugging_face_writes_and_we_read(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            guess = self.layer(x)
            return {"loss": (guess - labels).square().mean(), "logits": guess}

    rows = [{"x": torch.tensor([k / 8]), "labels": torch.tensor([k / 4])} for k in range(16)]
    words = TrainingArguments(
        str(tmp_path / "out"), max_steps=12, logging_steps=2, eval_strategy="steps", eval_steps=4, save_steps=6,
        per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=Line(), args=words, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    (history,) = read_histories(tmp_path / "out")
    logged = trainer.state.log_history
    assert (history.name, history.format, history.axis, history.status) == (
        "out",
        "HF trainer state",
        "step",
        "finished",
    )
    assert points(history, "loss") == {row["step"]: row["loss"] for row in logged if "loss" in row}
    assert points(history, "eval_loss") == {row["step"]: row["eval_loss"] for row in logged if "eval_loss" in row}
    series, _ = ours(history)
    assert {
        "train/loss/total",
        "val/loss/total",
        "train/optimizer/rate",
        "train/optimizer/gradient_norm",
    } <= series.keys()
    assert len(series["train/loss/total"]) == 6
