"""Which device and precision a run uses, and why; what memory it takes."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from intaglio.config import TrainConfig


def resident_bytes() -> int:
    """Memory of this process that is resident; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Choice(NamedTuple):
    """``device`` is cpu or cuda, ``precision`` fp32 or bf16; the reasons are sentences for ``run.json``."""

    device: str
    precision: str
    device_reason: str
    precision_reason: str


def choose(config: TrainConfig) -> Choice:
    """Follows the configuration, or decides where it says ``auto``.

    Raises:
        ValueError: a GPU is asked for where there is none.
    """
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise ValueError("train.device is cuda, but PyTorch finds no GPU. Use --train.device cpu or auto.")
    device = ("cuda" if gpu else "cpu") if config.device == "auto" else config.device
    reason = "as configured" if config.device != "auto" else "a GPU was found" if gpu else "no GPU was found"
    if config.precision != "auto":
        return Choice(device, config.precision, reason, "as configured")
    if config.devices > 1:  # timings differ between processes, and all must choose alike
        precision = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        return Choice(device, precision, reason, f"what {config.devices} processes choose on {device} without timing")
    ratio = bf16_speed(device)
    precision = "bf16" if ratio > 1.2 else "fp32"
    return Choice(device, precision, reason, f"bf16 runs a convolution and a product {ratio:.1f}× as fast as fp32 here")


def bf16_speed(device: str) -> float:
    """How many times faster bf16 autocast is than fp32, forward and backward, on a convolution and a product.

    The best of six alternated tries each, since other work on the machine only slows.
    """
    net = nn.Sequential(nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 8 * 8, 256)).to(device)
    x = torch.zeros(32, 64, 16, 16, device=device)
    seconds = {False: float("inf"), True: float("inf")}
    for enabled in (False, True) * 6:
        begun = time.perf_counter()
        for _ in range(3):
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                y = net(x)
            y.float().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[enabled] = min(seconds[enabled], time.perf_counter() - begun)
    return seconds[False] / seconds[True]
