"""Speed, side by side in one process run: ``intaglio bench speed``.

Every figure that compares is a ratio of alternated measurements, so that a busy machine slows both sides.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from intaglio.bench import Result
from intaglio.bench.big_history import measure_big_history
from intaglio.bench.process import process
from intaglio.bench.speed_codebook import measure_codebook
from intaglio.bench.speed_diffusion import measure_diffusion
from intaglio.bench.speed_questions import measure_questions
from intaglio.config import MultimodalConfig, load
from intaglio.data.batches import TrainingBatches
from intaglio.data.engravings import Engravings
from intaglio.data.prepare import Captioned, prepare
from intaglio.health.monitor import Monitor
from intaglio.health.panel import latents
from intaglio.history import Measured, read_history
from intaglio.models.multimodal import MultimodalModel
from intaglio.models.networks import RecomputedDecoding
from intaglio.objectives.sigreg import directions, sigreg
from intaglio.systems import multimodal
from intaglio.training.health import EARLY
from intaglio.training.run import train

STEPS, WARM, ROUNDS = 100, 20, 4


def measure() -> tuple[list[Result], dict[str, Any]]:
    """All speed targets, with the figures that they come from."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer, bare, waits = _trainer_against_bare(Path(scratch))
        watched, unwatched, look = _health_on_and_off(Path(scratch))
        small_on, small_off = _monitor_on_and_off(Path(scratch))
        grown = _memory_with_health(Path(scratch))
        few, many = _encode_memory(Path(scratch))
        history = measure_big_history(Path(scratch))
    images, of_images = measure_diffusion()
    codes, of_codes = measure_codebook()
    questions, of_questions = measure_questions()
    cached = _decoding_ratio()
    started = {"--help": _started("-m", "intaglio", "--help"), "import": _started("-c", "import intaglio")}
    python = _started("-c", "pass")
    ratios = [a / b for a, b in zip(trainer, bare, strict=True)]
    results = [
        Result("training rate, our trainer over a bare loop", 0.97, statistics.median(ratios), n=ROUNDS),
        Result(
            "training rate, health on over off, multimodal-small", 0.98, _with_looks(watched, unwatched, look), n=ROUNDS
        ),
        Result(
            "training rate, monitor on over off, tiny VAE", 0.98, _undisturbed(small_on, small_off), n=len(small_on)
        ),
        Result("peak memory, health on over off", 1.05, grown, better="lower"),
        Result("SIGReg with gradient, published formula over ours", 4.5, _sigreg_ratio()),
        Result("share of training that waits for data", 0.05, max(waits), better="lower", n=ROUNDS),
        Result("seconds of intaglio --help", 0.3, started["--help"], better="lower"),
        Result("seconds of import intaglio", 0.15, started["import"] - python, better="lower"),
        Result("caption decoding, cached over recomputed, 100 tokens", 3.0, cached),
        Result("peak memory, encoding 10,000 over 1,000 images", 1.1, many / few, better="lower"),
        Result("built-in images a second at 64 px, one core", 500.0, _drawing_rate()),
        *history,
        *images,
        *codes,
        *questions,
    ]
    facts = {
        "items_per_second": {"trainer": trainer, "bare_loop": bare, "health_on": watched, "health_off": unwatched},
        "seconds_of_a_look": look,
        "tiny_vae_milliseconds_a_step": {"monitor_on": small_on, "monitor_off": small_off},
        "encode_peak_bytes": {"1000": few, "10000": many},
        "python_start_seconds": python,
        "images": of_images,
        "codes": of_codes,
        "questions": of_questions,
    }
    return results, facts


def _trainer_against_bare(scratch: Path) -> tuple[list[float], list[float], list[float]]:
    """Items per second of both, alternated, after ``WARM`` steps each; and the trainer's share of waiting."""
    words = ["--runs", str(scratch), "--data.items", "4000", "--train.validate_every", "100000", "--prior.steps", "1"]
    config = load("multimodal-small", [*words, "--train.steps", str(STEPS), "--train.precision", _precision()])
    assert isinstance(config, MultimodalConfig)
    prepared = prepare(config.data, config.seed, config.model.vocabulary)
    ours, theirs, waits = [], [], []
    for _ in range(ROUNDS):
        rate, wait = _trainer(config, words)
        ours.append(rate)
        waits.append(wait)
        theirs.append(_bare_loop(config, prepared))
    return ours, theirs, waits


def _health_on_and_off(scratch: Path) -> tuple[list[float], list[float], float]:
    """Items per second with health on and off, alternated, and the seconds of one look."""
    words = ["--runs", str(scratch), "--data.items", "4000", "--train.validate_every", "100000", "--prior.steps", "1"]
    config = load("multimodal-small", [*words, "--train.precision", _precision()])
    assert isinstance(config, MultimodalConfig)
    on: list[float] = []
    off: list[float] = []
    looks: list[float] = []
    for turn in range(ROUNDS):
        for watched in (turn % 2 == 0, turn % 2 == 1):
            more = ["--name", "watched"] if watched else ["--health.on", "false"]
            (on if watched else off).append(_trainer(config, [*words, *more])[0])
    for folder in scratch.glob("watched*"):
        table = read_history(folder / "metrics.parquet")
        looks += table.filter(table["name"] == "train/speed/look_seconds")["value"].to_list()
    return on, off, statistics.median(looks)


def _with_looks(on: list[float], off: list[float], look: float) -> float:
    """The rate of the whole recipe, its looks at the default interval included, over the rate without health."""
    config = load("multimodal-small")
    assert isinstance(config, MultimodalConfig)
    assert config.train.steps is not None
    every = config.train.validate_every or -(-config.train.steps // 10)
    looks = config.train.steps // every + len(EARLY)
    training = config.train.steps * config.train.batch_size / statistics.median(off)
    return statistics.median(a / b for a, b in zip(on, off, strict=True)) * training / (training + looks * look)


class _TinyVAE(torch.nn.Module):
    """784-400-20, as in PyTorch's example."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(784, 400), torch.nn.ReLU(), torch.nn.Linear(400, 40))
        self.decoder = torch.nn.Sequential(torch.nn.Linear(20, 400), torch.nn.ReLU(), torch.nn.Linear(400, 784))

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return {"reconstruction": (self.decoder(z) - x).square().sum(1).mean(), "kl": kl}


def _monitor_on_and_off(scratch: Path, rounds: int = 80, steps: int = 50) -> tuple[list[float], list[float]]:
    """Milliseconds a step of a tiny VAE with a monitor at its defaults and without, in blocks that alternate."""

    def read(model: _TinyVAE, probe: Tensor) -> dict[str, dict[str, Measured]]:
        mean, log_variance = model.encoder(probe).chunk(2, dim=1)
        return {"val/latent": latents(mean, log_variance)}

    x, probe = torch.rand(4096, 784), torch.rand(512, 784)
    arms: list[tuple[_TinyVAE, torch.optim.Optimizer, Monitor | None]] = []
    for watched in (True, False):
        model = _TinyVAE()
        adam = torch.optim.Adam(model.parameters(), 1e-3)
        watch: dict[str, Any] = {"folder": scratch / "tiny", "probe": probe, "read": read, "steps": rounds * steps}
        arms.append((model, adam, Monitor(model, adam, **watch) if watched else None))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for (model, optimizer, monitor), spent in zip(arms, times, strict=True):
            begun = time.perf_counter()
            for _ in range(steps):
                batch = x[torch.randint(4096, (128,))]
                terms = model.terms(batch)
                optimizer.zero_grad()
                (terms["reconstruction"] + 0.1 * terms["kl"]).backward()
                if monitor:
                    monitor.step({"reconstruction": terms["reconstruction"], "kl": (terms["kl"], 0.1)}, batch)
                optimizer.step()
            spent.append(1000 * (time.perf_counter() - begun) / steps)
    return times


def _undisturbed(on: list[float], off: list[float]) -> float:
    """Rate of all blocks together, without the pairs in which something else held the machine: a block of twice the
    median or more. A look of the monitor takes a tenth of a block."""
    stalled = 2 * statistics.median(on + off)
    kept = [(a, b) for a, b in zip(on, off, strict=True) if max(a, b) < stalled]
    return sum(b for _, b in kept) / sum(a for a, _ in kept)


def _memory_with_health(scratch: Path) -> float:
    """Peak resident bytes of a short training with health on, looks included, over those with it off.

    Each has a cache of its own: a classifier that is found there need not be trained, which takes memory too.
    """
    words = ["--runs", str(scratch), "--data.items", "2000", "--train.steps", "30", "--train.validate_every", "10"]
    words += ["--prior.steps", "1"]
    peaks = [
        process("train", "multimodal-small", *words, f"--data.cache={scratch / on}", f"--health.on={on}").peak
        for on in ("true", "false")
    ]
    return peaks[0] / peaks[1]


def _sigreg_ratio(n: int = 512, width: int = 128, slices: int = 256) -> float:
    """Time of SIGReg forward and backward as its authors' minimal code writes it, over ours; median of fifteen."""
    x, a = torch.randn(n, width, requires_grad=True), directions(width, slices, torch.Generator().manual_seed(0))
    t = torch.linspace(0, 3, 17)
    weights = torch.full_like(t, 2 * 3 / 16)
    weights[[0, -1]] /= 2
    phi = (-t.square() / 2).exp()

    def published() -> Tensor:
        x_t = (x @ a).unsqueeze(-1) * t
        return ((((x_t.cos().mean(0) - phi).square() + x_t.sin().mean(0).square()) @ (weights * phi)) * n).mean()

    def seconds(loss: Callable[[], Tensor]) -> float:
        begun = time.perf_counter()
        loss().backward()
        return time.perf_counter() - begun

    pairs = [(seconds(published), seconds(lambda: sigreg(x, a))) for _ in range(20)][5:]
    return statistics.median(a / b for a, b in pairs)


def _precision() -> str:
    from intaglio.training.device import choose

    return choose(load("multimodal-small").train).precision


def _trainer(config: MultimodalConfig, words: list[str]) -> tuple[float, float]:
    """Rate and waiting share between step ``WARM`` and the last, as the run itself recorded them."""
    more = ["--train.steps", str(STEPS), "--train.log_every", str(WARM), "--train.precision", config.train.precision]
    folder = train("multimodal-small", [*words, *more], quiet=True)
    assert folder is not None
    table = read_history(folder.metrics)
    later = table.filter(table["step"] > WARM)
    speed = later.filter(later["name"] == "train/speed/items_per_second")["value"].to_list()
    wait = later.filter(later["name"] == "train/speed/wait_share")["value"].to_list()
    return len(speed) / sum(1 / s for s in speed), max(wait)


def _bare_loop(config: MultimodalConfig, prepared: Captioned) -> float:
    """The same network, terms and optimizer in twenty lines of PyTorch."""
    system = multimodal.build(replace(config, train=replace(config.train, steps=STEPS)), prepared)
    system.train()
    parts = system.configure_optimizers()
    optimizer, schedule = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    parameters = [p for p in system.parameters() if p.requires_grad]
    batches = iter(TrainingBatches(prepared.data, prepared.splits["train"], 0, config.train.batch_size, 0, 0, 1))
    begun = 0.0
    for step in range(STEPS):
        if step == WARM:
            begun = time.perf_counter()
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            terms = system.loss_terms(batch)
            total = torch.stack([t.weight * t.value.float() for t in terms.values()]).sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip)
        optimizer.step()
        schedule.step()
    return (STEPS - WARM) * config.train.batch_size / (time.perf_counter() - begun)


def _small_model(text_length: int) -> MultimodalModel:
    from intaglio.config import to_dict
    from intaglio.data.tokenizer import CaptionTokenizer

    config = load("multimodal-small")
    tokenizer = CaptionTokenizer.train((c for i in range(500) for c in Engravings(500).captions(i)), 4000)
    plain = to_dict(config)
    model = MultimodalModel(plain["model"], plain["prior"], 64, text_length, len(tokenizer))
    model.tokenizer = tokenizer
    return model.eval()


@torch.inference_mode()
def _decoding_ratio(tokens: int = 100, batch: int = 16) -> float:
    """Time of ``tokens`` steps without the key/value cache over the time with it, alternated, median of three."""
    model = _small_model(tokens)
    z = torch.randn(batch, model.config.latent)
    ids = torch.randint(4, 100, (batch, tokens))

    def seconds(make: Callable[[], Any]) -> float:
        begun, stepper = time.perf_counter(), make()
        for t in range(tokens):
            stepper.step(ids[:, t : t + 1], t)
        return time.perf_counter() - begun

    pairs = [
        seconds(lambda: RecomputedDecoding(model.network, z)) / seconds(lambda: model.network.decoding(z))
        for _ in range(3)
    ]
    return statistics.median(pairs)


def _encode_memory(scratch: Path) -> tuple[int, int]:
    """Peak resident bytes of ``intaglio encode`` over 1,000 and over 10,000 images."""
    _small_model(64).save_pretrained(scratch / "model")
    peaks = []
    for count in (1_000, 10_000):
        folder = scratch / f"images-{count}"
        folder.mkdir()
        corpus = Engravings(256)
        for i in range(256):
            Image.fromarray(corpus.image(i, 64)).save(folder / f"{i:05d}.png")
        for i in range(256, count):
            os.link(folder / f"{i % 256:05d}.png", folder / f"{i:05d}.png")
        peaks.append(
            process("encode", str(scratch / "model"), str(folder), "--out", str(scratch / f"{count}.safetensors")).peak
        )
    return peaks[0], peaks[1]


def _started(*words: str) -> float:
    """Least seconds of five starts of Python with the given words."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        times.append(time.perf_counter() - begun)
    return min(times)


def _drawing_rate(count: int = 1000) -> float:
    """Images drawn in a second of this process's own time."""
    corpus = Engravings(count)
    corpus.image(0, 64)
    begun = time.process_time()
    for i in range(count):
        corpus.image(i, 64)
    return count / (time.process_time() - begun)
