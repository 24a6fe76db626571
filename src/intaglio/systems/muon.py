"""Muon: momentum whose matrices are made orthogonal, with Adam for everything that is no hidden matrix.

Shapes: a weight of any kind is a matrix of its first dimension against all others; N matrices of one shape go together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM, MATCH = 0.95, 0.2
"""The momentum's decay, and the root mean square of an update, which is that of a typical AdamW update."""

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices_Nmn: Tensor, iterations: int = 5) -> Tensor:
    """Nearly U Vᵀ of each matrix U S Vᵀ (m ≤ n): singular values end between .7 and 1.2.

    Source: the quintic Newton–Schulz iteration X ← aX + (bA + cA²)X, A = XXᵀ, of Jordan et al. 2024.
    """
    a, b, c = QUINTIC
    x = matrices_Nmn / (torch.linalg.matrix_norm(matrices_Nmn, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups with ``orthogonal``, AdamW (Loshchilov & Hutter 2019) for the others.

    Orthogonal updates are scaled by 0.2·√max(m, n) (Liu et al. 2025, eq. 4), so that one rate fits both. ``bf16``
    makes the products of the iteration in bfloat16, which suits machines that are faster in it.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], bf16: bool = False):
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; ``closure`` computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if with_gradient:
                parameters, gradients = map(list, zip(*with_gradient, strict=True))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                (self._orthogonal if group["orthogonal"] else self._adam)(parameters, gradients, group)
        return loss

    def _orthogonal(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        momenta = [self._state(p, "momentum") for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's look ahead
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for k, u in enumerate(updates):
            alike[tuple(sorted(u.flatten(1).shape))].append(k)
        for (small, large), members in alike.items():
            wide = [u if u.shape[0] == small else u.T for k in members for u in [updates[k].flatten(1)]]
            made = orthogonalise(torch.stack(wide).to(self.dtype)).float()
            for k, m in zip(members, made, strict=True):
                p = parameters[k]
                p.add_((m if p.shape[0] == small else m.T).view_as(p), alpha=-group["lr"] * MATCH * large**0.5)

    def _adam(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        first, second = ([self._state(p, name) for p in parameters] for name in ("first", "second"))
        group["steps"] = group.get("steps", 0) + 1
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, (1 - beta2 ** group["steps"]) ** 0.5)
        torch._foreach_add_(root, 1e-8)
        torch._foreach_addcdiv_(parameters, first, root, -group["lr"] / (1 - beta1 ** group["steps"]))

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]
