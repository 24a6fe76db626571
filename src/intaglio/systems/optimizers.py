"""Parameter groups, optimizer and schedule, as every system uses them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from intaglio.config import OptimConfig
from intaglio.objectives.schedules import warmup_constant, warmup_cosine
from intaglio.systems.muon import Muon


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels with weight decay; biases, norms, embeddings and positions without.

    Hidden ones, more than 16 wide on both sides, may be orthogonalised; what enters or leaves the model is not (Jordan
    et al. 2024). Each trainable tensor stands in exactly one group; a tensor that two modules share counts once.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings |= {id(p) for name, p in model.named_parameters() if name.endswith("position")}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    hidden = [p for p in matrices if min(p.shape[:2]) > 16]
    ends = [p for p in matrices if min(p.shape[:2]) <= 16]
    rest = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"name": "hidden matrices", "params": hidden, "weight_decay": decay, "orthogonal": True},
        {"name": "first and last matrices", "params": ends, "weight_decay": decay, "orthogonal": False},
        {"name": "biases, norms, embeddings", "params": rest, "weight_decay": 0.0, "orthogonal": False},
    ]
    return [g for g in groups if g["params"]]


def configure(groups: list[dict[str, Any]], config: OptimConfig, steps: int, bf16: bool) -> dict[str, Any]:
    """Optimizer and schedule in Lightning's form; the schedule counts optimizer steps."""
    optimizer: torch.optim.Optimizer
    if config.kind == "muon":
        optimizer = Muon(groups, lr=config.rate, betas=config.betas, bf16=bf16)
    else:
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.kind]
        optimizer = kind(groups, lr=config.rate, betas=config.betas, fused=True)

    def share(step: int) -> float:
        if config.schedule == "constant":
            return warmup_constant(step, config.warmup)
        return warmup_cosine(step, steps, config.warmup, config.floor / config.rate)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def applied_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rate of every group now, by site: one where they are all alike.

    Groups of a part with a rate of its own are ``optimizer.<part>``, the others ``optimizer``; one that has not the
    rate of those before it stands by itself, under its whole name.
    """
    found: dict[str, float] = {}
    for g in groups:
        part, _, kind = g["name"].rpartition(": ")
        site = f"optimizer.{part}" if part else "optimizer"
        if found.setdefault(site, g["lr"]) != g["lr"]:
            found[f"{site}.{kind.replace(',', '').replace(' ', '_')}"] = g["lr"]
    return found


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each group: tensors, parameters, rate before the schedule, decay."""
    return [
        f"{g['name']}: {sum(p.numel() for p in g['params']):,} parameters in {len(g['params'])} tensors, "
        f"rate {g['initial_lr']:g}, decay {g['weight_decay']:g}"
        for g in groups
    ]
