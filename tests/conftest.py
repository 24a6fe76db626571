"""What the tests of training share: a cache that is thrown away, and real runs, tiny."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import intaglio
from intaglio.bench.shapes import write_shapes
from intaglio.history.run_folder import RunFolder

TINY = [
    "--train.steps=20",
    "--train.batch_size=16",
    "--train.accumulate=2",
    "--train.precision=fp32",
    "--train.device=cpu",
    "--train.log_every=1",
    "--train.validate_every=10",
    "--train.checkpoint_every=5",
    "--train.validate_items=24",
    "--train.ema=0.9",
    "--data.items=300",
    "--data.image_size=32",
    "--optim.warmup=4",
    "--model.channels=[8,8,16]",
    "--model.latent=16",
    "--prior.steps=10",
    "--prior.width=32",
    "--prior.layers=1",
    "--model.width=32",
    "--model.heads=2",
    "--model.feed_forward=32",
    "--model.decoder_layers=1",
    "--model.encoder_layers=1",
    "--model.vocabulary=300",
    "--model.dropout=0.1",
]


def tiny(runs: Path, *more: str) -> list[str]:
    """The words of a run of seconds into ``runs/a`` with accumulation, dropout and EMA; later words win."""
    return [*TINY, "--name=a", f"--runs={runs}", *more]


def train(runs: Path, *more: str, **options: Any) -> RunFolder:
    """A tiny run in this process."""
    folder = intaglio.train("multimodal-small", tiny(runs, *more), quiet=True, **options)
    assert folder is not None
    return folder


SHAPES = [
    "--train.steps=200",
    "--train.accumulate=1",
    "--train.validate_every=25",
    "--train.log_every=5",
    "--train.validate_items=40",
    "--train.ema=0.95",
    "--optim.warmup=20",
    "--data.items=null",
    "--data.held_out=0.2",
    "--model.dropout=0",
    "--model.latent=32",
    "--model.channels=[16,24,32]",
    "--prior.layers=0",
    "--health.probe=64",
]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 captioned pictures that are learnt in seconds."""
    return write_shapes(tmp_path_factory.mktemp("shapes"), 400)


@pytest.fixture(scope="session")
def healthy(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on ``shapes`` in which nothing is wrong."""
    prior = ("--prior.layers=2", "--prior.width=64", "--prior.steps=400", "--prior.batch_size=128")
    return train(tmp_path_factory.mktemp("healthy"), f"--data.source={shapes}", *SHAPES, *prior)


def resume(run: Path, *more: str) -> RunFolder:
    """Goes on with a run in this process."""
    folder = intaglio.train(None, more, resume=run, quiet=True)
    assert folder is not None
    return folder


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    """``intaglio WORDS`` in a process of its own, one thread, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "intaglio", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def ran(*words: str, **options: Any) -> tuple[int, str]:
    """Exit code and output of ``intaglio WORDS``."""
    process = start(*words, **options)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def wait_for(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """Returns as soon as ``process``, just started, has written a row of ``step`` or later."""
    begun = time.time()
    while time.time() < begun + 90:
        lines = metrics.read_text().splitlines()[:-1] if metrics.is_file() else []
        if lines and (last := json.loads(lines[-1]))["step"] >= step and last["time"] > begun:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    pytest.fail(f"step {step} was not reached in 90 s")


@pytest.fixture(scope="session", autouse=True)
def _throwaway_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images and judges go where the workers of one test run share them and no other finds them; all
    processes use one thread, so that sums have one order."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTAGLIO_CACHE", str(shared / "intaglio-cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A tiny run that nothing interrupted."""
    return train(tmp_path_factory.mktemp("reference"))
