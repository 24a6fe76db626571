"""The latent cache: it equals direct encoding, survives kill -9 and damage, and refuses what it was not made of."""

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from intaglio.data.latents import PROGRESS, LatentTable, Source, cache_latents, open_latents

SOURCE = Source(data="d" * 40, autoencoder="a" * 32, items=50)


def encode(images: np.ndarray) -> np.ndarray:
    """Not symmetric, so that flipped latents are not latents of flipped images."""
    ramp = np.arange(1, 9, dtype=np.float32)
    cells = images.reshape(len(images), 2, 4, 2, 4, 3).astype(np.float32) / 255
    weights = ramp.reshape(1, 2, 1, 1, 4, 1)
    return (cells * weights).mean((2, 4)).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)


def made(folder: Path, images: np.ndarray, source: Source = SOURCE, encoder=encode) -> LatentTable:
    return cache_latents(folder, images, encoder, source, batch=4, shard_rows=16)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_cache_equals_direct_encoding(tmp_path: Path, images: np.ndarray, dtype) -> None:
    source = Source("d", "a", 50, dtype=dtype)
    stored = tmp_path / "pixels.npy"
    np.save(stored, images)
    table = made(tmp_path / "c", np.load(stored, mmap_mode="r"), source)
    assert len(table) == 100
    assert table.shape == (3, 2, 2)
    assert table.dtype == dtype
    chosen = np.array([49, 0, 17, 17, 33])
    np.testing.assert_array_equal(table.rows(chosen), encode(images[chosen]).astype(dtype))
    mirrored = table.rows(table.mirrored(chosen))
    np.testing.assert_array_equal(mirrored, encode(images[chosen][:, :, ::-1]).astype(dtype))
    assert (mirrored != table.rows(chosen)[..., ::-1]).any()

    def untouched(_: np.ndarray) -> np.ndarray:
        raise AssertionError("a whole cache is not encoded again")

    again = made(tmp_path / "c", images, source, untouched)
    np.testing.assert_array_equal(again.rows(np.arange(100)), table.rows(np.arange(100)))
    assert len(open_latents(tmp_path / "c", source)) == 100
    with pytest.raises(IndexError, match="100 of 100"):
        table.rows(np.array([100]))


def test_without_flips(tmp_path: Path, images: np.ndarray) -> None:
    table = made(tmp_path, images, Source("d", "a", 50, flips=False))
    assert len(table) == 50
    with pytest.raises(ValueError, match="without flips"):
        table.mirrored(np.array([3]))


@pytest.mark.parametrize("failing_call", [1, 3, 9, 12, 25])
def test_an_interrupted_cache_goes_on_and_ends_in_the_same_bytes(tmp_path, images, failing_call) -> None:
    made(tmp_path / "whole", images)
    calls = 0

    def stops(batch: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise KeyboardInterrupt
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", images, SOURCE, stops)
    with pytest.raises(ValueError, match="not whole"):
        open_latents(tmp_path / "cut", SOURCE)
    calls = 100
    made(tmp_path / "cut", images, SOURCE, stops)
    assert calls - 100 <= 25 - (failing_call - 1) // 4 * 4  # no whole shard was encoded twice
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_kill_9_while_writing_loses_nothing(tmp_path: Path, images: np.ndarray) -> None:
    program = f"""
import sys, time, numpy as np
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_latents as t
images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
def slow(batch):
    time.sleep(0.02)
    return t.encode(batch)
t.made(t.Path({str(tmp_path / "cut")!r}), images, t.SOURCE, slow)
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "cut" / "00002.npy").is_file():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for part in (tmp_path / "cut").glob("*.part"):
        os.utime(part, (0, 0))  # as old as one that a killed process left long ago
    calls: list[int] = []
    made(tmp_path / "cut", images, SOURCE, lambda x: calls.append(len(x)) or encode(x))
    made(tmp_path / "whole", images)
    assert sum(calls) <= 100 - 2 * 16
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "changed", "header"])
def test_damage_is_told_and_mended_by_deleting_one_file(tmp_path: Path, images: np.ndarray, damage: str) -> None:
    made(tmp_path, images)
    whole = contents(tmp_path)
    shard = tmp_path / "00002.npy"
    raw = bytearray(shard.read_bytes())
    raw[-5 if damage == "changed" else 3] ^= 1
    shard.write_bytes(raw[:-7] if damage == "cut" else raw)
    for opened in (lambda: open_latents(tmp_path, SOURCE), lambda: made(tmp_path, images)):
        with pytest.raises(ValueError, match=r"damaged: .*00002\.npy.*Delete this file and run"):
            opened()
    shard.unlink()
    with pytest.raises(ValueError, match="not whole"):
        open_latents(tmp_path, SOURCE)
    calls: list[int] = []
    made(tmp_path, images, SOURCE, lambda x: calls.append(len(x)) or encode(x))
    assert sum(calls) == 16
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"autoencoder": "b" * 32}, "autoencoder aaaaaaaaaaaaaaaa there, bbbbbbbbbbbbbbbb here"),
        ({"data": "e" * 40}, "data dddddddddddddddd there, eeeeeeeeeeeeeeee here"),
        ({"dtype": "float32"}, "dtype float16 there, float32 here"),
        ({"flips": False}, "flips True there, False here"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, images, other, said) -> None:
    made(tmp_path, images)
    whole = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{said}.*delete that folder to encode anew"):
        made(tmp_path, images, Source(**{**SOURCE.__dict__, **other}))
    assert contents(tmp_path) == whole


def test_bad_input(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="50 images, but 49 were given"):
        made(tmp_path, images[:49])
    with pytest.raises(ValueError, match=r"entries 0 … 3 are not finite in float16"):
        made(tmp_path / "a", images, SOURCE, lambda x: encode(x) * np.float32(1e6))
    with pytest.raises(ValueError, match=r"not finite in float32"):
        made(tmp_path / "n", images, Source("d", "a", 50, dtype="float32"), lambda x: encode(x) + np.float32(np.nan))
    with pytest.raises(ValueError, match=r"encoder gave \(3, 3, 2, 2\) for 4"):
        made(tmp_path / "b", images, SOURCE, lambda x: encode(x)[:3])
    made(tmp_path / "c", images)
    (tmp_path / "c" / PROGRESS).write_text("{")
    with pytest.raises(ValueError, match=r"latents\.json is damaged.*Delete the folder"):
        made(tmp_path / "c", images)
    (tmp_path / "d").write_text("a file, not a folder")
    with pytest.raises(OSError, match=r"Cannot write the latent cache.*--data\.cache"):
        made(tmp_path / "d", images)


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    def peak(items: int) -> int:
        pixels = np.broadcast_to(np.zeros((1, 8, 8, 3), np.uint8), (items, 8, 8, 3))
        tracemalloc.start()
        table = cache_latents(tmp_path / str(items), pixels, encode, Source("d", "a", items), 64, 512)
        table.rows(np.arange(64) * (items // 64))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(512)
    assert peak(16 * 1024) < 1.2 * peak(1024) + 100_000
