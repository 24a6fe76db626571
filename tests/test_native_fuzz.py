"""Whatever bytes a logger's file holds, its reader says what it found or raises a ValueError: never else, and soon."""

import contextlib
import json
import random
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from native_files import framed, is_history, record

from intaglio.history.foreign import History
from intaglio.history.formats import mlflow_stores, tensorboard_events, wandb_runs


def mutated(data: bytes, rng: random.Random) -> bytes:
    """With some bytes flipped, cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at:] = b""
            case 2:
                changed[at : at + rng.randrange(1, 64)] = b""
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(1, 64))
            case 4:
                changed[at:at] = rng.choice(
                    (b"[" * 3000, b"9" * 400, b"-", b"1e999", b"\x00" * 64, b"&a [*a]\n", b"\xff")
                )
    return bytes(changed)


def resealed_log(data: bytes, rng: random.Random) -> bytes:
    """A ``.wandb`` file with a record mutated and its CRC made good."""
    records = list(framed_records(data))
    at = rng.randrange(len(records))
    records[at] = mutated(records[at], rng)
    return framed(records)


def framed_records(data: bytes) -> Iterator[bytes]:
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def resealed_events(data: bytes, rng: random.Random) -> bytes:
    """An event file with a record mutated and its CRC made good."""
    at, records = 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        records.append(data[at + 12 : at + 12 + length])
        at += 16 + length
    which = rng.randrange(len(records))
    records[which] = mutated(records[which], rng)
    return b"".join(map(record, records))


def survives(
    folder: Path,
    read: Callable[[Path], list[History]],
    seeds: range,
    reseal: Callable[[bytes, random.Random], bytes] | None = None,
) -> int:
    """Reads the folder with one of its files mutated, for each seed; the number of times that it could be read."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    originals = {file: file.read_bytes() for file in files}
    readable = 0
    for seed in seeds:
        rng = random.Random(seed)
        file = rng.choice(files)
        whole = reseal if reseal and file.suffix not in {".yaml", ".json", ".jsonl"} and rng.random() < 0.5 else mutated
        file.write_bytes(whole(originals[file], rng))
        began = time.perf_counter()
        with contextlib.suppress(ValueError):
            readable += all([is_history(history) for history in read(folder)])
        assert time.perf_counter() - began < 10, seed
        file.write_bytes(originals[file])
    return readable


def wandb_log() -> bytes:
    """A ``.wandb`` file with a record of each kind that is read."""
    record_type = wandb_runs._record_type()
    records = [record_type() for _ in range(30)]
    records[0].run.display_name = b"one"
    records[0].run.config.update.add(key=b"lr", value_json=b"0.1")
    records[1].config.update.add(nested_key=[b"model", b"dim"], value_json=b"8")
    records[2].metric.step_metric = b"global_step"
    for step, row in enumerate(records[3:28]):
        row.history.step.num = step
        for name, value in (
            ("loss", 1 / (step + 1)),
            ("global_step", 10 * step),
            ("w._type", "histogram"),
            ("w.n", [1]),
        ):
            row.history.item.add(nested_key=name.encode().split(b"."), value_json=json.dumps(value).encode())
    records[28].summary.update.add(key=b"loss", value_json=b"0.5")
    records[29].exit.exit_code = 1
    return framed([row.SerializeToString() for row in records])


SEEDS = [range(300), pytest.param(range(300, 2300), marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS)
def test_fuzzed_wandb_runs_raise_nothing_but_value_errors(tmp_path: Path, seeds: range) -> None:
    for old in (False, True):
        folder = tmp_path / str(old) / "run-20200101_120000-abc"
        (folder / "files").mkdir(parents=True)
        if not old:
            (folder / "run-abc.wandb").write_bytes(wandb_log())
        rows = [{"loss": 1 / (k + 1), "a": {"b": k}, "epoch": k, "_step": k} for k in range(9)]
        (folder / "files" / "wandb-history.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "files" / "wandb-summary.json").write_text('{"loss": 0.25, "_step": 70, "best": {"acc": 0.5}}')
        (folder / "files" / "config.yaml").write_text("wandb_version: 1\nlr:\n  desc: null\n  value: 0.1\n")
        share = seeds[: len(seeds) // 2] if old else seeds[len(seeds) // 2 :]
        assert survives(folder, wandb_runs.read, share, resealed_log) > 0.3 * len(share)


@pytest.mark.parametrize("seeds", SEEDS)
def test_fuzzed_event_files_raise_nothing_but_value_errors(tmp_path: Path, seeds: range) -> None:
    from tensorboard.summary import Writer
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_hparams({"lr": 0.1, "kind": "vae"}, {"hparam/best": 0.5}, run_name="12.5")
        for step in range(8):
            writer.add_scalar("loss", 0.1, step)
        writer.add_histogram("weights", np.arange(10.0), 0)
    tensors = Writer(str(tmp_path / "train"))
    for step in range(8):
        tensors.add_scalar("epoch_loss", 0.5, step)
    tensors.close()
    (tmp_path / "hparams.yaml").write_text("lr: 0.1\n")
    assert survives(tmp_path, tensorboard_events.read, seeds, resealed_events) > 0.5 * len(seeds)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", ["folder", "database"])
def test_fuzzed_mlflow_stores_raise_nothing_but_value_errors(tmp_path: Path, kind: str, seeds: range) -> None:
    if kind == "database":
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
            store.executescript("""
                CREATE TABLE runs (run_uuid, name, status, lifecycle_stage, start_time);
                CREATE TABLE metrics (key, value, timestamp, step, is_nan, run_uuid, PRIMARY KEY (key, step, run_uuid));
                CREATE TABLE params (key, value, run_uuid);
                CREATE TABLE tags (key, value, run_uuid);
                INSERT INTO runs VALUES ("ab", "one", "FINISHED", "active", 1);
                INSERT INTO params VALUES ("lr", "0.1", "ab");
                INSERT INTO tags VALUES ("mlflow.runName", "one", "ab");
            """)
            rows = [("loss", 1 / (k + 1), k, k, 0, "ab") for k in range(200)]
            store.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
            store.commit()
    else:
        run = tmp_path / "0" / "ab"
        for name, text in (
            ("meta.yaml", "run_name: one\nstatus: 3\nlifecycle_stage: active\nstart_time: 1\n"),
            ("metrics/train/loss", "".join(f"{k} {1 / (k + 1)} {k}\n" for k in range(9))),
            ("params/lr", "0.1"),
        ):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text(text)
    assert survives(tmp_path, mlflow_stores.read, seeds) > 0.1 * len(seeds)


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (wandb_runs.read, "run-a.wandb"),
        (tensorboard_events.read, "events.out.tfevents.1.host"),
        (mlflow_stores.read, "mlflow.db"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"text\n", b":W&B", b"SQLite format 3\0" + bytes(90)])
def test_other_bytes_are_refused_in_words(tmp_path: Path, read: Callable, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=r"."):
            read(path)
