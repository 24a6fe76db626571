"""Questions that look at an image, and a few latents that everything which follows must pass.

Shapes: B questions, T tokens, P places, K latents of Z numbers, D width.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.nn.transformer import Attention, blocks
from intaglio.objectives.gaussian import clamp_log_variance

BottleneckKind = Literal["none", "deterministic", "vib"]


class GatedCross(nn.Module):
    """x + tanh(a)·CrossAttention(x, memory), then x + tanh(b)·FeedForward(x) (Alayrac et al. 2022, section 2.2).

    a and b start at ``gate``; at 0 the layer does nothing at first. The feed-forward part is W(GELU(Ux) ⊙ Vx), GEGLU
    of Shazeer 2020: products join what is asked and what is seen, which sums learn several times as late.
    """

    def __init__(self, width: int, heads: int, gate: float):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.feed_norm = nn.LayerNorm(width)
        self.spread, self.feed = nn.Linear(width, 6 * width), nn.Linear(3 * width, width)
        self.gates = nn.Parameter(torch.full((2,), gate))

    def forward(self, x_BTD: Tensor, memory_UPD: Tensor, which_B: Tensor) -> Tensor:
        """``which`` (B,) is the row of ``memory`` that each question looks at: keys are made once for each image."""
        keys, values = self.attention.keys_values(memory_UPD)
        a, b = self.gates.tanh().to(x_BTD.dtype)
        x_BTD = x_BTD + a * self.attention(self.norm(x_BTD), keys[which_B], values[which_B])
        return x_BTD + b * self.joined(x_BTD)

    def joined(self, x_BTD: Tensor) -> Tensor:
        """The feed-forward part, without its gate."""
        passed, value = self.spread(self.feed_norm(x_BTD)).chunk(2, -1)
        return self.feed(F.gelu(passed) * value)


class Latents(NamedTuple):
    """q(z | image, question), a diagonal Gaussian: mean and log-variance (B, K, Z); None where z is its mean."""

    mean: Tensor
    log_variance: Tensor | None


class Bottleneck(nn.Module):
    """K learnt queries read the fused question and become latents; ``out`` makes them memory for a decoder.

    ``vib``: z ~ N(μ, σ²), after Alemi et al. 2017. ``deterministic``: z = μ, as narrow. ``none``: z is what the queries
    have read, of full width.
    """

    def __init__(self, width: int, layers: int, heads: int, latents: int, numbers: int, kind: BottleneckKind):
        super().__init__()
        self.kind = kind
        self.query = nn.Parameter(torch.randn(latents, width) * 0.5)
        self.blocks = blocks(layers, width, heads, 4 * width, 0.0, cross=True)
        self.norm = nn.LayerNorm(width)
        self.numbers = width if kind == "none" else numbers
        if kind != "none":
            self.into = nn.Linear(width, 2 * numbers if kind == "vib" else numbers)
            self.out = nn.Linear(numbers, width)

    def forward(self, fused_BTD: Tensor, real_BT: Tensor) -> Latents:
        """(B, T, D), True where a token stands → q(z)."""
        x, mask = self.query.repeat(len(fused_BTD), 1, 1), real_BT[:, None, None]
        for block in self.blocks:
            x = block(x, block.cross_attention.keys_values(fused_BTD), memory_mask=mask)
        x = self.norm(x)
        if self.kind == "none":
            return Latents(x.float(), None)
        if self.kind == "deterministic":
            return Latents(self.into(x).float(), None)
        mean, raw = self.into(x).float().chunk(2, dim=-1)
        return Latents(mean, clamp_log_variance(raw))

    def memory(self, z_BKZ: Tensor) -> Tensor:
        """What a decoder attends to, (B, K, D)."""
        return z_BKZ if self.kind == "none" else self.out(z_BKZ)
