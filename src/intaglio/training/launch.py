"""Which process of how many this is, by what started it: this command itself, torchrun or SLURM's srun."""

import os
from dataclasses import replace
from typing import NamedTuple

import torch.distributed as dist

from intaglio.config import TrainConfig


class Launch(NamedTuple):
    """``processes`` over all ``nodes``, started by ``by``."""

    processes: int
    nodes: int
    by: str


def launched() -> Launch | None:
    """What started this process as one of several; None where the command starts its processes itself."""
    if dist.is_torchelastic_launched():
        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return Launch(world, world // local, "torchrun")
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return Launch(int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1")), "srun")
    return None


def rank() -> int:
    """Number of this process, known before the process group exists."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def follow(config: TrainConfig) -> tuple[TrainConfig, str]:
    """``train.devices`` as it was launched, and why.

    Raises:
        ValueError: the configuration names another number, or the batch does not divide.
    """
    found = launched()
    if found is None:
        return config, "as configured"
    if config.devices not in (1, found.processes):
        raise ValueError(
            f"train.devices is {config.devices}, but {found.by} started {found.processes} processes. "
            f"Start {config.devices}, or leave train.devices out."
        )
    if config.batch_size % found.processes:
        raise ValueError(
            f"train.batch_size {config.batch_size} must divide over the {found.processes} processes that {found.by} "
            "started."
        )
    return replace(config, devices=found.processes), f"started by {found.by}"
