"""Rows of ``intaglio bench speed`` about images: our U-Nets beside those of `diffusers`, latents, averages, the cache.

What is compared runs in turns, so that a busy machine slows both sides; each side in the setting that suits it best.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from intaglio.bench import Result
from intaglio.config import AutoencoderConfig, DiffusionConfig, load
from intaglio.data.engravings import Engravings
from intaglio.data.latents import Source, cache_latents
from intaglio.models.autoencoder import Autoencoder
from intaglio.models.diffusion import DiffusionModel
from intaglio.nn.condition import Condition
from intaglio.nn.convolution import channels_last
from intaglio.nn.documented_unet import DocumentedUNet
from intaglio.nn.unet import UNet
from intaglio.objectives.diffusion import NoiseSchedule, diffusion_loss
from intaglio.sampling.diffusion import Sampler
from intaglio.sampling.guidance import Guidance
from intaglio.training.ema import EMA

ROUNDS, CLASSES, BATCH = 9, 10, 32

Arm = Callable[[], object]
Ask = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""A network's prediction at (x, t) for labels."""


def measure_diffusion() -> tuple[list[Result], dict[str, Any]]:
    """Results, and the figures that they come from; without `diffusers`, the rows against it are left out."""
    results = [_latents_over_pixels()]
    with tempfile.TemporaryDirectory() as scratch:
        results.append(_cache_over_encoder(Path(scratch)))
    try:
        version = import_module("diffusers").__version__
    except ImportError:
        return results, {"diffusers": "not installed (extra dev): the rows against it are left out"}
    documented, facts = _documented_training()
    facts = {"diffusers": version, "documented": facts, "default": _default_training()}
    sampled, facts["sampling_settings"] = _sampling()
    return [documented, sampled, _averaging(), *results], facts


def alternated(arms: Sequence[Arm], rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of every round of each arm, in turns, after a round that does not count."""
    times: list[list[float]] = [[] for _ in arms]
    for _ in range(rounds + 1):
        for arm, spent in zip(arms, times, strict=True):
            begun = time.perf_counter()
            arm()
            spent.append(time.perf_counter() - begun)
    return [spent[1:] for spent in times]


def ratio(quantity: str, target: float, slow: Sequence[float], fast: Sequence[float], scale: float = 1.0) -> Result:
    """The median over nine rounds; the second and the eighth enclose it with 96 %."""
    each = sorted(scale * a / b for a, b in zip(slow, fast, strict=True))
    return Result(quantity, target, statistics.median(each), n=len(each), low=each[1], high=each[-2])


def fastest(make: Callable[[bool, bool], Arm], layouts: Sequence[bool] = (False, True)) -> tuple[bool, bool]:
    """Whether bf16, and whether channels last, is faster: the best round of three of each."""
    settings = [(bf16, last) for bf16 in (False, True) for last in layouts]
    times = alternated([make(*setting) for setting in settings], 3)
    return settings[min(range(len(settings)), key=lambda i: min(times[i]))]


def words(setting: tuple[bool, bool]) -> str:
    """A setting, for the file."""
    return f"{'bf16' if setting[0] else 'fp32'}, channels {'last' if setting[1] else 'first'}"


def ours(network: Any, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
    """What ours predicts."""
    return network(x_BCHW, t_B, Condition(labels_B=labels_B))


def theirs(network: Any, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
    """What theirs predicts."""
    return network(x_BCHW, t_B, class_labels=labels_B).sample


def training(
    build: Callable[[], nn.Module], ask: Ask, shape: tuple[int, ...], bf16: bool = True, last: bool = True
) -> Arm:
    """A step of training with fused AdamW, at ``shape`` (B, C, H, W)."""
    torch.manual_seed(0)
    network, schedule = build(), NoiseSchedule()
    x, labels = torch.randn(shape), torch.randint(CLASSES, shape[:1])
    if last:
        channels_last(network)
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)

    def step() -> None:
        t = torch.randint(schedule.steps, shape[:1])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss_B = diffusion_loss(lambda x, t: ask(network, x, t, labels), x, torch.randn_like(x), t, schedule, "v")
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()

    return step


def bare_convolution(width: int, side: int, bf16: bool) -> Arm:
    """A 3×3 convolution forward and backward, channels last: what no network here can exceed."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = torch.randn(BATCH, width, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(width, width, 3, 3, dtype=dtype, requires_grad=True)
    x.requires_grad_()
    return lambda: torch.autograd.grad(F.conv2d(x, kernel, padding=1).sum(), (x, kernel))


def gigaflop(arm: Arm) -> float:
    """What torch counts: products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        arm()
    return counter.get_total_flops() / 1e9


def their_documented() -> nn.Module:
    """Their U-Net nearest to the documented one: as many levels, attention at the same, dropout, parameters (−0.4 %).

    It does 4 % less work an image than the documents' layers. 64-128-256 would have 8.4 million parameters, for theirs
    has two residual blocks a level on the way up.
    """
    return _their_unet(
        3, (64, 96, 128), (1, 2), layers_per_block=1, mid_block_type=None, time_embedding_dim=384, dropout=0.1
    )


def _their_unet(channels: int, widths: tuple[int, ...], attention: Sequence[int], **more: Any) -> nn.Module:
    marks = ["Attn" if level in attention else "" for level in range(len(widths))]
    diffusers: Any = import_module("diffusers")
    return diffusers.UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=tuple(f"{mark}DownBlock2D" for mark in marks),
        up_block_types=tuple(f"{mark}UpBlock2D" for mark in reversed(marks)),
        norm_num_groups=8,
        num_class_embeds=CLASSES + 1,
        **({"attention_head_dim": 32} | more),
    )


def _documented_training() -> tuple[Result, dict[str, Any]]:
    shape = (BATCH, 3, 32, 32)
    sides = {"ours": (DocumentedUNet, ours), "diffusers": (their_documented, theirs)}
    makes = {name: partial(training, build, ask, shape) for name, (build, ask) in sides.items()}
    settings = {name: fastest(make) for name, make in makes.items()}
    arms = {name: make(*settings[name]) for name, make in makes.items()}
    bare = [bare_convolution(width, side, settings["ours"][0]) for width, side in ((128, 32), (256, 16))]
    mine, others, *bares = alternated([*arms.values(), *bare])
    work = {name: gigaflop(arm) for name, arm in arms.items()}
    ceiling = max(gigaflop(arm) / statistics.median(spent) for arm, spent in zip(bare, bares, strict=True))
    rates = {name: work[name] / statistics.median(spent) for name, spent in (("ours", mine), ("diffusers", others))}
    facts = {
        "parameters": {name: _parameters(build()) for name, (build, _) in sides.items()},
        "settings": {name: words(setting) for name, setting in settings.items()},
        "seconds_a_step": {"ours": mine, "diffusers": others},
        "gigaflop_a_step": work,
        "gigaflop_a_second": {**rates, "bare 3×3 convolution": ceiling},
        "share_of_the_bare_convolution": {name: rate / ceiling for name, rate in rates.items()},
    }
    return ratio("training rate, documented U-Net over diffusers' like it", 1.5, others, mine), facts


def _default_training() -> dict[str, Any]:
    """A step of the U-Net of ``diffusion-small`` beside theirs of the same widths, depth and attention."""
    m = _recipe().model
    channels, side = 3 * m.patch**2, _recipe().data.image_size // m.patch
    more: dict[str, Any] = {"layers_per_block": m.blocks, "attention_head_dim": 64, "dropout": m.dropout}
    builds: tuple[Callable[[], nn.Module], ...] = (
        lambda: UNet(channels, m.widths, m.blocks, m.attention, m.dropout, classes=CLASSES),
        lambda: _their_unet(channels, m.widths, m.attention, resnet_time_scale_shift="scale_shift", **more),
    )
    shape = (BATCH, channels, side, side)
    makes = [partial(training, build, ask, shape) for build, ask in zip(builds, (ours, theirs), strict=True)]
    arms = [make(*fastest(make)) for make in makes]
    mine, others = alternated(arms)
    return {
        "parameters": {"ours": _parameters(builds[0]()), "diffusers": _parameters(builds[1]())},
        "seconds_a_step": {"ours": mine, "diffusers": others},
        "times_as_fast": statistics.median(b / a for a, b in zip(mine, others, strict=True)),
    }


def _sampling(images: int = 8, steps: int = 50) -> tuple[Result, dict[str, str]]:
    """Images of classes from noise by DDIM with guidance 3: our model, and their scheduler with its network."""
    diffusers: Any = import_module("diffusers")
    names = [str(label) for label in range(CLASSES)]

    def our_arm(bf16: bool, last: bool = True, steps: int = 4) -> Arm:
        model = DiffusionModel(32, {"documented": True}, {}, "v", names, 0.1).eval()
        model.bf16 = bf16
        return lambda: model.generate(
            range(images), names[:images], guidance=Guidance(3.0), sampler=Sampler("ddim", steps)
        )

    def their_arm(bf16: bool, last: bool, steps: int = 4) -> Arm:
        network = nn.Module.to(their_documented().eval(), torch.bfloat16 if bf16 else torch.float32)  # theirs warns
        if last:
            channels_last(network)
        dtype, form = next(network.parameters()).dtype, torch.channels_last if last else torch.contiguous_format
        scheduler = diffusers.DDIMScheduler(
            500, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
            timestep_spacing="trailing",
        )  # fmt: skip
        labels = torch.cat([torch.arange(images), torch.full((images,), CLASSES)])

        @torch.inference_mode()
        def pipeline() -> np.ndarray:
            x = torch.randn(images, 3, 32, 32, dtype=dtype).contiguous(memory_format=form)
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                conditional, without = theirs(network, torch.cat([x] * 2), t, labels).chunk(2)
                x = scheduler.step(without + 3 * (conditional - without), t, x).prev_sample
            return ((x.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)

        return pipeline

    settings = {"ours": fastest(our_arm, (True,)), "diffusers": fastest(their_arm)}
    mine, others = alternated([our_arm(*settings["ours"], steps=steps), their_arm(*settings["diffusers"], steps=steps)])
    quantity = f"sampling rate, {steps} DDIM steps with guidance, ours over a diffusers pipeline"
    return ratio(quantity, 1.3, others, mine), {name: words(setting) for name, setting in settings.items()}


def _averaging(updates: int = 20) -> Result:
    """Updates of the average of the documented U-Net, theirs in the faster of its two ways."""
    model_average: Any = import_module("diffusers.training_utils").EMAModel
    network = DocumentedUNet()
    channels_last(network)
    average = EMA(0.999)
    average.average = {n: p.detach().clone() for n, p in network.named_parameters()}
    their = [model_average(network.parameters(), decay=0.999, foreach=foreach) for foreach in (False, True)]

    def repeated(update: Arm) -> Arm:
        return lambda: [update() for _ in range(updates)]

    arms: list[Arm] = [lambda: average.update(network), *(partial(_their_update, ema, network) for ema in their)]
    mine, *others = alternated([repeated(arm) for arm in arms])
    return ratio("EMA updates, ours over diffusers' EMAModel", 2.0, min(others, key=statistics.median), mine)


def _their_update(average: Any, network: nn.Module) -> None:
    average.step(network.parameters())


def _latents_over_pixels(pixels: int = 4, latents: int = 32) -> Result:
    """Images a second in training of the same U-Net on 64 × 64 × 3 pixels and on their 16 × 16 × 4 latents."""
    m = _recipe().model

    def arm(batch: int, channels: int, side: int) -> Arm:
        return training(
            lambda: UNet(channels, m.widths, m.blocks, m.attention, m.dropout, classes=CLASSES),
            *(ours, (batch, channels, side, side)),
        )

    slow, fast = alternated([arm(pixels, 3, 64), arm(latents, 4, 16)])
    return ratio("images/s in training, latents over pixels at 64 px", 5.0, slow, fast, latents / pixels)


def _cache_over_encoder(scratch: Path, items: int = 1024, batch: int = 64) -> Result:
    """Entries a second of a latent cache, from uint8 images to whole shards, over the encoder on ready batches."""
    config = load("autoencoder-small")
    assert isinstance(config, AutoencoderConfig)
    side, corpus = config.data.image_size, Engravings(items)
    images = np.stack([corpus.image(i, side) for i in range(items)])
    model = Autoencoder(side, config.model.channels, config.model.latent).eval()
    model.fit_statistics(images[at : at + batch] for at in range(0, items, batch))
    ready = [model.to_range(images[at : at + batch]) for at in range(0, items, batch)]
    source, folders = Source("engravings", model.fingerprint(), items), iter(range(100))

    @torch.no_grad()
    def bare() -> None:
        for x in [*ready, *ready]:  # as often as the cache, which has each image mirrored too
            model.network.moments(x)

    def cache() -> None:
        cache_latents(scratch / str(next(folders)), images, model.latents, source, batch)

    alone, cached = alternated([bare, cache])
    return ratio("latents cached, over the bare encoder", 0.9, alone, cached)


def _recipe() -> DiffusionConfig:
    config = load("diffusion-small")
    assert isinstance(config, DiffusionConfig)
    return config


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
