import json
import math
import signal
import subprocess
import sys

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from intaglio.history import DamagedHistory, HistoryWriter, Reading, read_history, to_parquet
from intaglio.history.table import COLUMNS


def write_steps(writer, steps):
    for step in steps:
        loss = Reading(1 / (step + 3), null=math.log(64), n=64)
        writer.write(step, step / 10, {"train/loss/contrastive": loss, "train/optim/rate": 1e-3})


def test_rows_come_back_exactly_as_jsonl_and_as_parquet(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with HistoryWriter(path) as writer:
        write_steps(writer, range(3))
        writer.write(3, 0.3, {"val/latent/rank": Reading(7.5, null=9.0, n=512, low=7.1, high=8.0)})
    table = read_history(path)
    assert table.columns == list(COLUMNS)
    assert table["value"].to_list() == [1 / 3, 1e-3, 1 / 4, 1e-3, 1 / 5, 1e-3, 7.5, 7.1, 8.0]
    assert table["name"].to_list()[-3:] == ["val/latent/rank", "val/latent/rank_low", "val/latent/rank_high"]
    assert table["null"].to_list()[:2] == [math.log(64), None]
    assert table["null"].to_list()[-3:] == [9.0, None, None]
    assert table["n"].to_list()[-3:] == [512, 512, 512]
    assert_frame_equal(read_history(to_parquet(path)), table)


def test_non_finite_numbers_are_stored_as_json_that_anybody_can_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with HistoryWriter(path) as writer:
        writer.write(0, 0, {"train/loss/a": math.nan, "train/loss/b": Reading(math.inf, null=-math.inf)})

    def refuse(constant):
        raise AssertionError(constant)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    table = read_history(path)
    assert math.isnan(table["value"][0])
    assert table["null"][0] is None
    assert (table["value"][1], table["null"][1]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    "name", ["loss", "val/loss", "val/loss/a/b", "Val/loss/a", "val//a", "val/loss/a b", "val/loss/.."]
)
def test_a_name_of_another_form_is_refused_and_nothing_of_its_step_written(tmp_path, name):
    with (
        HistoryWriter(tmp_path / "metrics.jsonl") as writer,
        pytest.raises(ValueError, match="<split>/<site>/<quantity>"),
    ):
        writer.write(0, 0, {"train/loss/total": 1.0, name: 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_resumed_history_equals_the_uninterrupted_one_but_for_time(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    with HistoryWriter(whole) as writer:
        write_steps(writer, range(10))
    with HistoryWriter(resumed) as writer:
        write_steps(writer, range(7))
    with HistoryWriter(resumed) as writer:
        assert writer.truncate_after(4) == 4
        write_steps(writer, range(5, 10))
    assert_frame_equal(read_history(resumed).drop("time"), read_history(whole).drop("time"))


def test_a_killed_writer_leaves_a_history_that_is_read_and_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = """
import os, signal, sys
from pathlib import Path
from intaglio.history import HistoryWriter
path = Path(sys.argv[1])
writer = HistoryWriter(path)
for step in range(5):
    writer.write(step, 0, {"train/loss/total": step / 7})
    writer.flush()
writer.write(5, 0, {"train/loss/total": 0.5})  # never flushed
os.truncate(path, path.stat().st_size - 9)  # the kernel took only part of the last write
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.warns(DamagedHistory, match=r"line 5 of 5 is damaged .* read up to step 3, 1 line"):
        assert read_history(path)["step"].to_list() == [0, 1, 2, 3]
    with pytest.warns(DamagedHistory, match="line 5 of 5"), HistoryWriter(path) as writer:
        writer.write(4, 0, {"train/loss/total": 4 / 7})
    assert read_history(path)["value"].to_list() == [step / 7 for step in range(5)]


def test_damage_in_the_middle_ends_the_reading_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with HistoryWriter(path) as writer:
        write_steps(writer, range(4))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0\0\xff\n", *lines[3:]]))
    with pytest.warns(DamagedHistory, match=r"line 3 of 8 .* read up to step 0, 6 line"):
        assert read_history(path)["step"].to_list() == [0, 0]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with HistoryWriter(path) as writer:
        write_steps(writer, range(2))
    path.write_bytes(path.read_bytes().rstrip())
    with HistoryWriter(path) as writer:
        write_steps(writer, [2])
    assert read_history(path)["step"].to_list() == [0, 0, 1, 1, 2, 2]


def test_an_empty_history_has_the_columns_and_other_files_are_refused(tmp_path):
    empty = tmp_path / "metrics.jsonl"
    empty.touch()
    assert read_history(empty).schema["value"] == pl.Float64
    assert read_history(to_parquet(empty)).is_empty()
    foreign = tmp_path / "other.jsonl"
    foreign.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not a history row"):
        read_history(foreign)
    pl.DataFrame({"loss": [1.0]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="not those of a history"):
        read_history(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is not a history: give"):
        read_history(tmp_path / "metrics.csv")
