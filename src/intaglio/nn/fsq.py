"""Finite scalar quantisation: Mentzer et al. 2023, appendix A.1, with the bound as vector-quantize-pytorch has it.

Shapes: D numbers in a token, K codes, the product of the levels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from intaglio.nn.codebook import Quantised
from intaglio.objectives.distributed import mean_over_processes, processes

MARGIN = 1e-3  # the bound reaches past the outermost levels by as much, so that they have an inside
DECAY = 0.99  # of the moments that numbers are whitened by


class FSQ(nn.Module):
    """Each number of a token rounded to one of its ``levels``; no codebook, no state, no loss.

    Values are multiples of 1 / (L // 2): −1 … 1 for an odd number L of levels, −1 … 1 − 2/L for an even one. The code
    is the number whose digits are the levels' indices, the first one lowest; (8, 5, 5, 5) has 1,000 codes.
    """

    levels: Tensor
    places: Tensor

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"levels are {tuple(levels)}; give at least three to each number: two cannot be centred")
        self.size, self.width = math.prod(levels), len(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        places = [math.prod(levels[:digit]) for digit in range(len(levels))]
        self.register_buffer("places", torch.tensor(places), persistent=False)

    @property
    def vectors(self) -> Tensor:
        """(K, D): the token of each code, in the order of the codes."""
        codes_K1 = torch.arange(self.size, device=self.levels.device)[:, None]
        half = self.levels // 2
        return (codes_K1 // self.places % self.levels - half) / half

    def forward(self, x: Tensor, real: Tensor | None = None) -> Quantised:
        """(…, D) and a mask (…), True where a token stands (None: everywhere) → as from a `Codebook`.

        The gradient passes the rounding and not the bound; ``commitment`` is a constant 0.

        Raises:
            ValueError: another width, or a mask of another shape.
        """
        if x.shape[-1:] != (self.width,) or not x.is_floating_point():
            raise ValueError(f"tokens are {x.dtype} of shape {tuple(x.shape)}; give real numbers (…, {self.width})")
        if real is not None and real.shape != x.shape[:-1]:
            raise ValueError(f"the mask has the shape {tuple(real.shape)}; give {tuple(x.shape[:-1])}")
        half = self.levels // 2
        bounded = self._bounded(x if x.dtype == torch.float64 else x.float())
        steps = bounded.detach().round()
        q = ((bounded + (steps - bounded).detach()) / half).to(x.dtype)
        codes = ((steps.long() + half) * self.places).sum(-1)
        if real is not None:
            q, codes = q.masked_fill(~real[..., None], 0), codes.masked_fill(~real, -1)
        return Quantised(q, codes, q.new_zeros((), dtype=torch.float32))

    def codes(self, x: Tensor) -> Tensor:
        """(…, D) → (…) int64."""
        return self(x.detach()).codes

    def _bounded(self, x: Tensor) -> Tensor:
        """Between the outermost levels, in steps of 1: moved by a half for even numbers of levels, 0 staying at 0."""
        reach = (self.levels - 1) * (1 + MARGIN) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (x + (offset / reach).atanh()).tanh() * reach - offset


class Whitening(nn.Module):
    """Numbers of mean 0 and covariance I, by running moments of all processes; no gradient enters these.

    x ← L⁻¹(x − μ) with L the Cholesky factor of the covariance, jitter 1e-4 of its mean variance. A forward pass in
    training mode counts its tokens before they are whitened; in eval mode nothing changes. Before the first one it is
    the identity.
    """

    moments: Tensor
    tokens: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("moments", torch.zeros(width, width + 1))  # Σ x(x, 1)ᵀ, and the number of tokens
        self.register_buffer("tokens", torch.tensor(0.0))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(…, D) and a mask (…), True where a token stands → (…, D) float32, 0 elsewhere."""
        with torch.autocast(x.device.type, enabled=False):
            x, real = x.float(), real[..., None]
            if self.training:
                self._count(x.detach().masked_fill(~real, 0).flatten(0, -2), real.sum())
            mean_D, inverse_DD = self._whitener()
            return ((x - mean_D) @ inverse_DD.T).masked_fill(~real, 0)

    @torch.no_grad()
    def _count(self, x_TD: Tensor, tokens: Tensor) -> None:
        sums = x_TD.T @ torch.cat([x_TD, torch.ones_like(x_TD[:, :1])], 1)
        self.moments.lerp_(processes() * mean_over_processes(sums), 1 - DECAY)
        self.tokens.lerp_(processes() * mean_over_processes(tokens.float()), 1 - DECAY)

    def _whitener(self) -> tuple[Tensor, Tensor]:
        """μ and L⁻¹ of the tokens counted so far."""
        moments = self.moments / self.tokens.clamp(min=torch.finfo(torch.float32).tiny)
        mean_D, one_DD = moments[:, -1], torch.eye(len(moments), device=moments.device)
        covariance_DD = moments[:, :-1] - mean_D[:, None] * mean_D
        jitter = 1e-4 * covariance_DD.diagonal().mean().clamp(min=1e-6)
        covariance_DD = torch.where(self.tokens > 0, covariance_DD + jitter * one_DD, one_DD)
        return mean_D, torch.linalg.solve_triangular(torch.linalg.cholesky(covariance_DD), one_DD, upper=False)
