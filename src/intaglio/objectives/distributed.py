"""Values over all processes; the identity where there is one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process counts as the only one, so the processes need not do the same work."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes; no gradient passes."""
    if processes() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / processes()


class _Gather(torch.autograd.Function):
    """All rows of all processes; the gradient of a row is the sum over every process that used it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(processes())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(processes())[rank()]


def gather_rows(x: Tensor) -> Tensor:
    """(B, …) → (processes·B, …), rows in the order of the ranks, with gradient."""
    return x if processes() == 1 else _Gather.apply(x)
