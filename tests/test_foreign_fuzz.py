"""Whatever bytes a table or a JSON file holds, its reader says what it found or raises a ValueError, and soon."""

import json
import random
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from intaglio.history.aliases import ours
from intaglio.history.foreign import read_histories
from intaglio.history.formats import blocks, delimited, objects

BITS = [b"nan", b'"', b",", b"\n", b"\r", b"1e999", b"-", b"\0" * 8, b"[", b"]", b"{", b"}", b";", b"\t", b"tensor("]
BITS += [
    b"\xef\xbb\xbf",
    b"9" * 400,
    b"null",
    b"[" * 3000,
    b" " * 3000,
    b"#",
    b"\xff\xfe",
    b":",
    b"\\u",
    b"1,2,3\n" * 9,
]


def tables() -> dict[str, bytes]:
    r = random.Random(0)
    wide = "".join(f"{s},{s // 10},{1 / (s + 1)},{0.5 if s % 10 == 9 else ''}\n" for s in range(60))
    long = "".join(f"{u},{s},{m},{r.random()}\n" for u in "ab" for s in range(10) for m in ("loss", "acc"))
    panel = "".join(f'"{7 * s + r.randrange(7)}","{r.random()}","0.1","0.9"\n' for s in range(60))
    cells = "".join(f'x{k},"{[r.random() for _ in range(8)]}","{[r.random() for _ in range(8)]}"\n' for k in range(6))
    runs = "".join(f"{s},VAE,{s // 10},{s % 10},tensor({r.random():.4f})\n" for s in range(60))
    return {
        "wide.csv": f"step,epoch,train_loss,val_loss\n{wide}".encode(),
        "decimal.csv": b"epoch;loss;acc\n"
        + "".join(f"{s};{s / 8};{s} %\n" for s in range(30)).replace(".", ",").encode(),
        "long.csv": f"run,step,metric,value\n{long}".encode(),
        "panel.csv": f'"Step","a - loss","a - loss__MIN","a - loss__MAX"\n{panel}'.encode(),
        "cells.csv": f"feature,train,test\n{cells}".encode(),
        "runs.csv": f",name,epoch,iteration,ppl\n{runs}".encode(),
        "wide16.csv": f"step,loss\n{wide[:400]}".encode("utf-16"),
        "savetxt.txt": b"# epoch loss\n" + b"".join(b"%.3e %.3e\n" % (s, r.random()) for s in range(30)),
    }


def values() -> dict[str, bytes]:
    r = random.Random(0)
    rows = [
        {"_step": k, "_runtime": k, "loss": 1 / (k + 1), "val": {"loss": 2.0} if k % 2 else None} for k in range(30)
    ]
    logged = [{"loss": 1.5 / (k + 1), "learning_rate": 1e-3, "epoch": 0.1 * k, "step": 10 * k} for k in range(20)]
    batches = [{"train_loss": r.random()} for _ in range(5)] + [{"valid_loss": 0.4}]
    made = {
        "rows.json": rows,
        "keras.json": {"history": {"loss": [1, 0.5, 0.3], "val_loss": [2, 1, 0.5]}, "epoch": [0, 1, 2]},
        "trainer_state.json": {"log_history": logged, "max_steps": 20, "global_step": 20},
        "history.json": [
            {"batches": batches, "epoch": e, "train_loss": 0.5, "valid_loss_best": True} for e in range(6)
        ],
        "nested.json": {"a": {"loss": {"0": 1, "1": 0.5}}, "b": {"loss": {"0": 1, "1": 0.5}}},
    }
    lines = "\n".join(json.dumps({"step": k, "loss": k, "note": "x", "nan": float("nan")}) for k in range(30))
    return {name: json.dumps(value).encode() for name, value in made.items()} | {"lines.jsonl": lines.encode()}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """With some bytes flipped, cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at:] = b""
            case 2:
                changed[at : at + rng.randrange(1, 80)] = b""
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(1, 32))
            case 4:
                changed[at:at] = changed[at : at + rng.randrange(1, 400)] * rng.randrange(1, 4)
            case 5:
                changed[at:at] = rng.choice(BITS)
    return bytes(changed)


def survive(path: Path, data: bytes) -> int:
    """The number of histories in a file of these bytes; all that they promise is checked."""
    path.write_bytes(data)
    begun = time.process_time()
    try:
        found = read_histories(path)
    except ValueError:
        found = []
    for history in found:
        for series in history.given.values():
            assert len(series) == len(series.values) > 0
            assert (series.steps.dtype, series.values.dtype) == (np.int64, np.float64)
            assert np.all(np.diff(series.steps) > 0)
        assert all(notice.isprintable() and notice.endswith(".") for notice in history.notices), history.notices
        assert len(ours(history)[0]) == len(history.given)
    assert time.process_time() - begun < 5
    return len(found)


def attack(seeds: dict[str, bytes], files: int, folder: Path) -> None:
    read = 0
    for name, data in seeds.items():
        for k in range(files // len(seeds) + 1):
            read += survive(folder / name, mutated(data, random.Random(f"{name} {k}")))
    assert read > files / 4  # else the mutations are too rough to reach far


@pytest.mark.parametrize("files", [300, pytest.param(2400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seeds", [tables(), values()], ids=["tables", "json"])
def test_damaged_files(tmp_path: Path, seeds: dict[str, bytes], files: int) -> None:
    attack(seeds, files, tmp_path)


@pytest.mark.parametrize("files", [300, pytest.param(2400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("thin", [False, True])
def test_damaged_files_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thin: bool, files: int) -> None:
    for module in (delimited, objects):
        monkeypatch.setattr(module, "_AT_ONCE", 0)
    monkeypatch.setattr(blocks, "_BLOCK", 400)
    if thin:
        monkeypatch.setattr(blocks, "_WHOLE", 100)
        monkeypatch.setattr(blocks, "_ROWS", 10)
    attack(tables() | {"lines.jsonl": values()["lines.jsonl"]}, files, tmp_path)


@pytest.mark.parametrize("files", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_parquet(tmp_path: Path, files: int) -> None:
    path = tmp_path / "good.parquet"
    columns = {
        "step": range(50),
        "loss": [1 / (k + 1) for k in range(50)],
        "name": ["a", "b"] * 25,
        "v": [[1.0, 2.0]] * 50,
    }
    pl.DataFrame(columns).write_parquet(path)
    data = path.read_bytes()
    for k in range(files):
        survive(tmp_path / "bad.parquet", mutated(data, random.Random(k)))
