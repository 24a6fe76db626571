"""Finite scalar quantisation: Mentzer et al. 2023, appendix A.1, with the bound as vector-quantize-pytorch has it.

Shapes: D numbers in a token, K codes, the product of the levels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from intaglio.nn.codebook import Quantised

MARGIN = 1e-3  # the bound reaches past the outermost levels by as much, so that they have an inside


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
