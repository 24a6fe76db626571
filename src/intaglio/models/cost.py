"""What a training step costs, counted on tensors that are never allocated, and how fast this machine is.

Memory is what autograd keeps for the backward pass; time is counted operations over a measured rate.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

CALIBRATION_SECONDS = 0.1
"""How long each of the three speeds is measured."""


class StepCost(NamedTuple):
    """One forward and backward pass.

    ``saved_bytes`` is the most that autograd holds between the two; ``flops`` counts operations of both (a
    multiply-add is two) as ``convolution`` and ``product``; ``unreached`` names trainable tensors that the loss does
    not depend on.
    """

    saved_bytes: int
    flops: Mapping[str, int]
    unreached: tuple[str, ...]


class MachineSpeed(NamedTuple):
    """FLOP/s of convolutions and of matrix products, forward and backward, and optimizer updates of weights/s."""

    convolution: float
    product: float
    updates: float

    def seconds(self, flops: Mapping[str, int], passes: int, weights: int) -> float:
        """How long one optimizer step of ``passes`` passes takes."""
        one = flops["convolution"] / self.convolution + flops["product"] / self.product
        return passes * one + weights / self.updates


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """Parameters of each child, adding up to those of the module: a shared tensor counts for its first owner."""
    counts: dict[str, int] = {}
    seen: set[int] = set()
    own = [("(itself)", list(module.parameters(recurse=False)))]
    for name, tensors in [*own, *((n, list(child.parameters())) for n, child in module.named_children())]:
        fresh = {id(t): t.numel() for t in tensors if id(t) not in seen}
        seen |= fresh.keys()
        if fresh:
            counts[name] = sum(fresh.values())
    return counts


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(t.nbytes for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def saved_bytes(module: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that autograd keeps while ``loss`` runs, each storage once and the module's own tensors left out."""
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = loss()
    return sum(storage.nbytes() for storage in kept.values()), value


def step_cost(module: nn.Module, loss: Callable[[], Tensor], bf16: bool = False) -> StepCost:
    """Runs ``loss`` forward and backward on a module that was built on the meta device; nothing is allocated.

    The module's tensors become fake CPU tensors, so that kernels and autocast are chosen as on a CPU; ``loss`` makes
    its inputs itself, and may read real tensors.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        _become_fake(module)
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            saved, value = saved_bytes(module, loss)
        gradients = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
    flops = {"convolution": 0, "product": 0}
    for operation, count in counter.get_flop_counts()["Global"].items():
        flops["convolution" if "convolution" in str(operation) else "product"] += count
    unreached = tuple(name for name, g in zip(trainable, gradients, strict=True) if g is None)
    return StepCost(saved, flops, unreached)


def _become_fake(module: nn.Module) -> None:
    # Module.to_empty fails on a module that is registered twice, and building in fake mode on deepcopied layers.
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]  # type: ignore[assignment]


def machine_speed(device: str = "cpu", bf16: bool = False) -> MachineSpeed:
    """Measures this machine on layers like those of our models, for about half a second."""
    convolutions = nn.Sequential(
        *(nn.Conv2d(32, 64, 4, 2, 1), nn.GroupNorm(8, 64), nn.SiLU()),
        *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 3, 3, 1, 1)),
    )
    products = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    weights = nn.Parameter(torch.zeros(2**20, device=device))
    weights.grad = torch.zeros_like(weights)
    update = torch.optim.AdamW([weights], lr=0.0).step
    return MachineSpeed(
        _flops_per_second(convolutions, torch.randn(32, 32, 64, 64), device, bf16),
        _flops_per_second(products, torch.randn(2048, 256), device, bf16),
        weights.numel() / _seconds(update, device),
    )


def _flops_per_second(net: nn.Module, x: Tensor, device: str, bf16: bool) -> float:
    net, x = net.to(device), x.to(device).requires_grad_()

    def forward_and_backward() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            y = net(x)
        y.float().sum().backward()

    with FlopCounterMode(display=False) as counter:
        forward_and_backward()
    return counter.get_total_flops() / _seconds(forward_and_backward, device)


def _seconds(work: Callable[[], object], device: str) -> float:
    """Of one call: the median of several, after one to warm up."""
    calls: list[float] = []
    while sum(calls[1:]) < CALIBRATION_SECONDS:
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        calls.append(time.perf_counter() - begun)
    return statistics.median(calls[1:])
