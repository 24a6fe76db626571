"""Tables as people and tools write them: which column counts, which rows are one run, what a blank is, what is said."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from intaglio.history.foreign import History, read_histories
from intaglio.history.formats import blocks, delimited

Read = Callable[..., list[History]]
DATA = Path(__file__).parents[2] / "shared" / "data" / "histories"


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a file with this content."""

    def read(content: str | bytes, name: str = "log.csv") -> list[History]:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_histories(path)

    return read


def table(header: str, rows: Sequence[tuple[Any, ...]]) -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def points(history: History, name: str) -> dict[int, float]:
    series = history.given[name]
    assert series.steps.dtype == np.int64
    assert np.all(np.diff(series.steps) > 0)
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def said(history: History, *parts: str) -> bool:
    return all(any(part in notice for notice in history.notices) for part in parts)


FALLING = [(k, 1 / (k + 1)) for k in range(40)]


# Cells


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("step,loss\n1,0.5\n2,.4e0\n", {1: 0.5, 2: 0.4}),
        ("\ufeffstep,loss\r\n1,0.5\r\n2,0.4\r\n", {1: 0.5, 2: 0.4}),
        ("step,loss\r1,0.5\r2,0.4\r", {1: 0.5, 2: 0.4}),
        ("step;loss\n1;0,5\n2;1.234,5\n", {1: 0.5, 2: 1234.5}),
        ('step,loss\n"1,000",0.5\n"2,000","1,234.5"\n', {1000: 0.5, 2000: 1234.5}),
        ("step\tloss\n1\t0.5\n2\t-\n3\t0,4\n", {1: 0.5, 3: 0.4}),
        ("| step | loss |\n|---|---|\n| 1 | 0.5 |\n", {1: 0.5}),
        ("# step loss\n1.0e+00 5.0e-01\n2.0e+00 nan\n", {1: 0.5, 2: math.nan}),
        ("step,loss\n1,tensor(0.5)\n2,\"tensor(0.4, device='cuda:0')\"\n", {1: 0.5, 2: 0.4}),
        ("step,loss\n1,tensor(0.5, device='cuda:0', grad_fn=<Mul>)\n2,np.float32(0.4)\n", {1: 0.5, 2: 0.4}),
        ("step, loss\n1, inf\n2, 1.#IND\n3, Infinity\n", {1: math.inf, 2: math.nan, 3: math.inf}),
        ("step,loss\n1,−0.5\n2, +3 \n3,NA\n", {1: -0.5, 2: 3.0}),
        ("a training log\n\nstep,loss\n1,0.5\n2,0.4\n", {1: 0.5, 2: 0.4}),
    ],
)
def test_numbers_are_read_however_they_are_written(read: Read, content: str, expected: dict[int, float]) -> None:
    (history,) = read(content)
    assert history.axis == "step"
    np.testing.assert_equal(points(history, "loss"), expected)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "cp1252"])
def test_encodings_are_found_out(read: Read, encoding: str) -> None:
    (history,) = read(table("step,Verlust für alle", FALLING).encode(encoding))
    assert points(history, "Verlust für alle")[39] == 1 / 40


def test_per_cent_truths_and_words_among_numbers_are_said(read: Read) -> None:
    (history,) = read("epoch,acc,best,loss\n1,50 %,True,0.5\n2,62.5%,False,oops\n3,,True,0.3\n")
    assert points(history, "acc") == {1: 0.5, 2: 0.625}
    assert points(history, "best") == {1: 1.0, 2: 0.0, 3: 1.0}
    assert points(history, "loss") == {1: 0.5, 3: 0.3}
    assert said(history, "'acc': written in per cent", "'loss': 1 cell that is no number, as 'oops'")


def test_damaged_lines_are_counted_and_the_cut_last_one_is_left_out(read: Read) -> None:
    (history,) = read("step,loss,acc\n1,0.5,.1\n2;0.4;.2\n3,0.3\n4,0.2,.4,9\nstep,loss,acc\n5,.1,.5\n6,0.0")
    assert points(history, "loss") == {1: 0.5, 2: 0.4, 3: 0.3, 4: 0.2, 5: 0.1}
    assert points(history, "acc") == {1: 0.1, 2: 0.2, 4: 0.4, 5: 0.5}
    assert said(history, "parted by ';'", "too few cells", "too many cells", "repeats the header", "was cut off")
    (history,) = read(b"step,loss\n1,0.5\n2,0.4\n" + b"\0" * 64)
    assert points(history, "loss") == {1: 0.5, 2: 0.4}
    assert said(history, "zero bytes")
    (history,) = read('step,note,loss\n1,"fine",0.5\n2,"never closed,0.4\n3,x,0.3\n4,y,0.2\n')
    assert points(history, "loss") == {1: 0.5, 2: 0.4, 3: 0.3, 4: 0.2}


def test_names_that_repeat_lack_or_attack_stay_apart_and_are_shown_safely(read: Read) -> None:
    (history,) = read("step,loss,loss,\x1b[31mred\x07\n1,0.5,5,oops\n2,0.4,4,1\n3,0.3,3,2\n")
    assert history.given.keys() == {"loss", "loss (2)", "\x1b[31mred\x07"}
    assert all(notice.isprintable() for notice in history.notices)
    assert said(history, r"'\x1b[31mred\x07': 1 cell")
    (history,) = read("1,0.5\n2,0.4\n")
    assert points(history, "column 2") == {0: 0.5, 1: 0.4}
    assert said(history, "There is no header")
    assert said(read("2020-01-01,0.5,x\n2020-01-02,0.4,y\n")[0], "There is no header")
    assert read(",0,1\n0,0.5,3\n1,0.4,2\n")[0].given.keys() == {"0", "1"}
    assert read("epoch,1,2\n0,0.5,3\n1,0.4,2\n")[0].given.keys() == {"1", "2"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"\n\n \n", "empty"),
        (bytes(random.Random(0).randbytes(4000)), "binary"),
        (b"It was a dark night.\nThe loss fell, as it does.\nNobody wrote it down.\n", "has no numbers"),
        (b"Epoch 1 loss 0.5\nEpoch 2 loss 0.4\n", "log in words"),
    ],
)
def test_what_is_no_table_is_refused_with_a_reason(read: Read, content: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        read(content)


def test_little_is_read_as_little(read: Read) -> None:
    (history,) = read("step,loss\n")
    assert not history.given
    assert said(history, "No row was logged")
    (history,) = read("step,loss\n7,0.5\n")
    assert points(history, "loss") == {7: 0.5}
    assert said(history, "Only one row")
    (history,) = read("epoch,loss\n1,nan\n2,nan\n")
    np.testing.assert_equal(points(history, "loss"), {1: math.nan, 2: math.nan})


# Steps


def test_the_finest_column_that_counts_is_the_axis(read: Read) -> None:
    rows = [(4 * k, k % 10, k // 10, 1 / (k + 1)) for k in range(40)]
    assert read(table("global_step,step,epoch,loss", rows))[0].axis == "global_step"
    assert read(table("epoch,batch,loss", [(k, 64, 1 / (k + 1)) for k in range(9)]))[0].axis == "epoch"
    (history,) = read(table("epoch,loss", [(k // 10, 1 / (k + 1)) for k in range(40)]))
    assert history.axis == "row"
    assert len(history.given["loss"]) == 40
    assert said(history, "'epoch' repeats (40 rows, 4 values)")
    (history,) = read(table("epoch,loss", [(k / 10, 1 / (k + 1)) for k in range(9)]))
    assert history.axis == "row"
    assert said(history, "'epoch' holds fractions")
    (history,) = read("loss,val_loss\n0.5,0.6\n0.4,0.5\n")
    assert (history.axis, history.format) == ("row", "Keras CSV")


def test_every_metric_keeps_its_own_steps(read: Read) -> None:
    rows: list[tuple[Any, ...]] = [(k // 10, k, 1 / (k + 1), "") for k in range(40)]
    for epoch in range(4):
        rows.insert(11 * epoch + 10, (epoch, "", "", 10 - epoch))
    (history,) = read(table("epoch,step,train_loss,val_loss", rows))
    assert points(history, "val_loss") == {9: 10, 19: 9, 29: 8, 39: 7}
    assert len(history.given["train_loss"]) == 40
    assert said(history, "'val_loss': 4 rows without 'step', placed at the last step of their epoch")
    blocks_apart: list[Any] = [(k, 1 / (k + 1), "") for k in range(30)] + [(k, "", 2.0) for k in range(0, 30, 5)]
    (history,) = read(table("step,train_loss,val_loss", blocks_apart))
    assert list(points(history, "val_loss")) == [0, 5, 10, 15, 20, 25]


def test_steps_that_repeat_go_back_or_come_newest_first_are_put_right(read: Read) -> None:
    (history,) = read(table("step,loss", [(1, 5), (1, 4), (2, 3), (3, 2), (4, 1)]))
    assert points(history, "loss") == {1: 4, 2: 3, 3: 2, 4: 1}
    assert said(history, "'loss': 1 row with a step that is there again")
    (history,) = read(table("step,loss", [(s, s) for s in (0, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10)]))
    assert list(points(history, "loss")) == list(range(11))
    assert said(history, "sorted")
    resumed = [(s, s) for s in range(0, 200, 10)] + [(s, -s) for s in range(145, 300, 10)]
    (history,) = read(table("step,loss", resumed))
    assert points(history, "loss") == {s: s for s in range(0, 145, 10)} | {s: -s for s in range(145, 300, 10)}
    assert said(history, "as after a resume; 5 rows")
    (history,) = read(table("step,loss", FALLING[::-1]))
    assert points(history, "loss") == dict(FALLING)
    assert said(history, "newest rows come first")


def test_a_step_that_restarts_is_an_epoch_where_the_other_columns_go_on_and_a_run_where_they_do_not(read: Read) -> None:
    within = [(k // 20, k % 20, 1 / (k + 1)) for k in range(60)]
    (history,) = read(table("epoch,iteration,loss", within))
    assert points(history, "loss") == {k: 1 / (k + 1) for k in range(60)}
    assert said(history, "restarts in each epoch")
    (history,) = read(table("batch,loss", [row[1:] for row in within]))
    assert points(history, "loss") == {k: 1 / (k + 1) for k in range(60)}
    assert said(history, "go on where they were")
    noise = random.Random(0)
    again = [(k % 20, 1 / (k % 20 + 1) + noise.random() / 100) for k in range(60)]
    found = read(table("epoch,loss", again))
    assert [h.name.partition(" (")[2] for h in found] == ["1 of 3)", "2 of 3)", "3 of 3)"]
    assert all(list(points(h, "loss")) == list(range(20)) for h in found)
    assert said(found[0], "'epoch' restarts in row 21, 41: these are 3 runs")
    later = [(s, 1 / (s + 1)) for k in (0, 50) for s in range(k, 1000, 10)]
    assert [len(h.given["loss"]) for h in read(table("step,loss", later))] == [100, 95]


def test_runs_of_a_search_in_one_file_are_told_apart_by_their_settings(read: Read) -> None:
    rows = [
        ("VAE", dropout, epoch, step, 100 / (1 + 20 * epoch + step / 10), f"tensor({5 - epoch:.2f})")
        for dropout, epochs in ((0.0, 1), (0.25, 1), (0.5, 3))
        for epoch in range(epochs)
        for step in range(0, 200, 10)
    ]
    found = read(table("model_name,word_dropout,epoch,iteration,elbo,ppl", rows))
    assert [h.config for h in found] == [{"model_name": "VAE", "word_dropout": d} for d in (0.0, 0.25, 0.5)]
    assert len({h.name for h in found}) == 3
    assert [len(h.given["elbo"]) for h in found] == [20, 20, 60]
    assert int(found[2].given["elbo"].steps[-1]) == 590


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_column_that_names_runs_parts_them(read: Read, interleaved: bool) -> None:
    rows = [(run, k, 1 / (k + 1) + shift) for shift, run in enumerate("ab") for k in range(12)]
    rows = sorted(rows, key=lambda row: row[1]) if interleaved else rows
    found = read(table("run,epoch,loss", rows))
    assert [(h.name, h.config["run"]) for h in found] == [("a", "a"), ("b", "b")]
    assert points(found[1], "loss") == {k: 1 / (k + 1) + 1 for k in range(12)}
    found = read(table("seed,fold,epoch,loss", [(s, f, e, e) for s in (1, 2) for f in (0, 1) for e in range(5)]))
    assert [h.name for h in found] == [f"seed={s}, fold={f}" for s in (1, 2) for f in (0, 1)]
    results = read("Name,State,loss\nred-1,finished,0.5\nblue-2,crashed,0.4\n")
    assert [h.name for h in results] == ["red-1", "blue-2"]
    assert said(results[0], "these are results, no histories")


def test_absurd_steps_neither_overflow_nor_hang(read: Read) -> None:
    (history,) = read(table("epoch,step,loss", [(10**6 * (k // 5), 10**12 * (k % 5), k) for k in range(20)]))
    assert len(history.given["loss"]) == 20
    noise = np.random.default_rng(0)
    jumble = np.arange(200_000) + noise.integers(0, 2, 200_000) * 3
    assert len(read(table("step,loss", [(s, 1) for s in jumble.tolist()]))[0].given["loss"]) > 100_000
    (history,) = read(table("step,loss", [(s, k) for k, s in enumerate(noise.permutation(1000).tolist())]))
    assert history.axis == "row"
    assert said(history, "'step' goes up and down")


# Shapes


def test_long_tables_and_rows_of_a_split_become_metrics(read: Read) -> None:
    rows = [
        (run, k, metric, k + shift) for run in "ab" for shift, metric in enumerate(("loss", "kl")) for k in range(9)
    ]
    found = read(table("run,step,metric,value", rows))
    assert [h.name for h in found] == ["a", "b"]
    assert points(found[0], "kl") == {k: k + 1 for k in range(9)}
    (history,) = read(table("epoch,phase,loss", [(e, p, e + len(p)) for e in range(5) for p in ("train", "val")]))
    assert points(history, "train/loss") == {e: e + 5 for e in range(5)}
    assert points(history, "val/loss") == {e: e + 3 for e in range(5)}
    (history,) = read(table("step,loss - train,loss - val", [(k, k, k) for k in range(9)]))
    assert history.given.keys() == {"loss - train", "loss - val"}
    (history,) = read(b"Wall time,Step,Value\n1.5e9,0,0.5\n1.6e9,10,0.4\n", "run-a-tag-val_loss.csv")
    assert (history.format, points(history, "val_loss")) == ("TensorBoard CSV", {0: 0.5, 10: 0.4})


def test_exports_of_wandb_charts_are_a_run_a_column(read: Read) -> None:
    header = '"Step","sun-1 - train/loss","sun-1 - train/loss__MIN","sun-1 - train/loss__MAX","dark - 2 - train/loss"'
    header += ',"dark - 2 - train/loss__MIN","dark - 2 - train/loss__MAX"'
    rows = [(f'"{s}"', *[f'"{1 / (s + 1)}"'] * 3, *['""'] * 3) for s in range(0, 50, 10)]
    found = read(table(header, [*rows, ('"60"', '""', '""', '""', '"0.3"', '"0.2"', '"0.5"')]))
    assert [(h.name, h.format) for h in found] == [("sun-1", "W&B CSV"), ("dark - 2", "W&B CSV")]
    assert points(found[1], "train/loss") == {60: 0.3}
    assert said(found[1], "their MIN and MAX differ")
    steps = sorted(random.Random(1).sample(range(20_000), 500))
    (history,) = read(table(",_step,_runtime,loss", [(k, s, 2 * s, 1 / (s + 1)) for k, s in enumerate(steps)]))
    assert (history.axis, history.format, history.given.keys()) == ("_step", "W&B CSV", {"_runtime", "loss"})
    assert said(history, "the history is a sample")
    (history,) = read(table("step,loss", [(50 * k, 1 / (k + 1)) for k in range(200)]))
    assert not history.notices


def test_cells_that_are_curves_are_a_run_a_row_and_vectors_are_columns(read: Read) -> None:
    found = read('feature,n,train,test\nBCI,3,"[0.3, 0.2, nan]","[0.4, None]"\nSD,3,"[tensor(3.), 2, 1]","[4 3 2]"\n')
    assert [(h.name, h.config) for h in found] == [
        ("BCI", {"feature": "BCI", "n": 3.0}),
        ("SD", {"feature": "SD", "n": 3.0}),
    ]
    np.testing.assert_equal(points(found[0], "train"), {0: 0.3, 1: 0.2, 2: math.nan})
    assert points(found[0], "test") == {0: 0.4}
    assert points(found[1], "test") == {0: 4, 1: 3, 2: 2}
    assert found[0].format == "CSV of curves"
    (history,) = read('epoch,loss,per_class\n1,"[0.5]","[0.1, 0.2]"\n2,"[0.4]","[0.2 0.3]"\n')
    assert points(history, "per_class/1") == {1: 0.2, 2: 0.3}
    assert points(history, "loss") == {1: 0.5, 2: 0.4}


# NaN and blanks


def test_nan_is_a_value_unless_the_column_interleaves_it_where_others_have_values(read: Read) -> None:
    apart: list[Any] = [(k, "nan", 0.5) if k % 5 == 0 else (k, 1 / k, "nan") for k in range(40)]
    (history,) = read(table("step,train_loss,val_loss", apart))
    assert list(points(history, "val_loss")) == list(range(0, 40, 5))
    assert not np.isnan(history.given["train_loss"].values).any()
    assert said(history, "40 NaN stand where only other columns have values")
    (history,) = read(table("step,train_loss,val_loss", [(k, 1, 2 if k % 5 == 0 else "nan") for k in range(40)]))
    assert len(history.given["val_loss"]) == 8
    (history,) = read(table("epoch,loss,val_loss", [(1, 3, "nan"), (2, 2, 1), (3, 1, 1)]))
    assert list(points(history, "val_loss")) == [2, 3]
    apart = [(k, "nan", 0.5) if k % 5 == 0 else (k, 1 / k if k < 27 else "nan", "nan") for k in range(40)]
    (history,) = read(table("step,train_loss,val_loss", apart))
    assert np.isnan(history.given["train_loss"].values).sum() == 13, "a divergence is no blank"
    ended = [(k, *(2 * [1 / (k + 1)] if k < 20 else 2 * ["nan"])) for k in range(40)]
    (history,) = read(table("step,train_loss,val_loss", ended))
    assert np.isnan(history.given["train_loss"].values).sum() == 20
    assert not history.notices
    (history,) = read(table("step,loss,grad_norm", [(k, 1, "nan" if k in (7, 13) else 1) for k in range(40)]))
    assert np.isnan(history.given["grad_norm"].values).sum() == 2


# Large files


def as_plain(found: list[History]) -> list[Any]:
    return [
        (
            h.name,
            h.axis,
            h.notices,
            h.config,
            {k: (s.steps.tolist(), repr(s.values.tolist())) for k, s in h.given.items()},
        )
        for h in found
    ]


@pytest.mark.parametrize("size", [100, 400, 3000])
def test_reading_in_blocks_gives_the_same(read: Read, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    contents: list[str | bytes] = [
        table(
            "step,epoch,name,train_loss,val_loss",
            [(k, k // 9, "a b", 1 / (k + 1), k if k % 9 == 8 else "") for k in range(99)],
        ),
        table("epoch;loss;acc", []) + "".join(f"{k};{k / 8};{k} %\n".replace(".", ",") for k in range(40)),
        table("run,step,metric,value", [(r, s, m, s) for r in "ab" for s in range(20) for m in ("loss", "acc")]),
        table("step,loss", [(k, f"tensor({k}.5)" if k != 33 else "oops") for k in range(60)]),
        "f,curve\n" + "".join(f'x{k},"[{k}, {k + 1}]"\n' for k in range(30)),
        table("step,loss", FALLING).encode("utf-16"),
        table("step,note,loss", [(k, '"two\nlines"', k) for k in range(60)]),
        table("step,loss", FALLING) + "41,0.",
    ]
    at_once = [as_plain(read(content)) for content in contents]
    monkeypatch.setattr(delimited, "_AT_ONCE", 0)
    monkeypatch.setattr(blocks, "_BLOCK", size)
    assert [as_plain(read(content)) for content in contents] == at_once


def test_a_file_beyond_memory_keeps_a_stride_its_extremes_and_every_rare_row(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = np.random.default_rng(0).normal(size=20_000)
    loss[[7_001, 9_003]] = 50, -50
    rows: list[Any] = [(k, loss[k], k / 2 if k % 1000 == 999 else "") for k in range(20_000)]
    whole = dict(enumerate(loss.tolist()))
    monkeypatch.setattr(delimited, "_AT_ONCE", 0)
    monkeypatch.setattr(blocks, "_BLOCK", 1 << 16)
    monkeypatch.setattr(blocks, "_WHOLE", 1 << 16)
    monkeypatch.setattr(blocks, "_ROWS", 200)
    for columns in (slice(0, 3), slice(1, 3)):
        header = ",".join(("step", "loss", "val_loss")[columns])
        (history,) = read(table(header, [row[columns] for row in rows]))
        kept = points(history, "loss")
        assert kept.items() <= whole.items()
        assert {0, 7_001, 9_003, 19_999} <= kept.keys()
        assert len(kept) < 800
        assert list(points(history, "val_loss")) == list(range(999, 20_000, 1000))
        assert said(history, "The file is large: of its 20,000 rows every")


def test_ten_thousand_columns(read: Read) -> None:
    names = [f"layer{k}/norm" for k in range(10_000)]
    (history,) = read(table(",".join(["step", *names]), [(s, *[s + 0.5] * 10_000) for s in range(3)]))
    assert len(history.given) == 10_000
    assert points(history, "layer9999/norm") == {0: 0.5, 1: 1.5, 2: 2.5}


# Parquet


def test_parquet_wide_and_long_and_damaged(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    steps = list(range(0, 100, 10))
    pl.DataFrame(
        {"step": steps, "loss": [s / 7 for s in steps], "val": [None, 1.5] * 5, "n": ["a"] * 10}
    ).write_parquet(path)
    (history,) = read_histories(path)
    assert (history.format, history.axis, history.config) == ("Parquet", "step", {"n": "a"})
    assert points(history, "loss") == {s: s / 7 for s in steps}
    assert list(points(history, "val")) == steps[1::2]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="can't be read as Parquet"):
        read_histories(path)


# Real ones


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the labelled histories are not beside the project")
def test_the_labelled_tables_are_read_with_all_their_rows() -> None:
    entries = json.loads((DATA / "labels.json").read_text())["entries"]
    read = 0
    for entry in entries:
        for file in (DATA / f for f in entry["files"] if f.endswith((".csv", ".json")) and "meta_tags" not in f):
            (history,) = read_histories(file)
            finest = max(len(series) for series in history.given.values())
            batches = 2880 if "skorch" in entry["format"] else entry["rows"]
            assert 0.97 * batches <= finest <= batches, file
            assert len(history.given) >= min(2, len(entry["metrics"])), file
            read += 1
    assert read == 24
