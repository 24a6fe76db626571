"""The prior over latents: a flow from Gaussian noise to z, with or without a caption to follow.

Shapes: B batch, M cells of a latent, K numbers in a cell, Z = M·K, T text positions, D width of the text, W of the
flow.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from intaglio.config import PriorConfig
from intaglio.nn.transformer import blocks


class FlowPrior(nn.Module):
    """v(zₜ, t, caption): the velocity of a rectified flow (Liu et al. 2023; Lipman et al. 2023) over the cells of z.

    Latents are standardised by the buffers ``mean`` and ``scale``, which are fitted with the flow. Without a caption it
    attends to a learnt token instead, which training uses for one item in five (Ho & Salimans 2022). With no layers
    it is the Gaussian with the latents' means and variances, and has no parameters.
    """

    mean: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, config: PriorConfig, cells: int, cell: int, text_width: int):
        super().__init__()
        w = config.width
        self.cells = cells
        self.register_buffer("mean", torch.zeros(cells * cell))
        self.register_buffer("scale", torch.ones(cells * cell))
        self.register_buffer("fitted", torch.tensor(False))
        self.flows = config.layers > 0
        if not self.flows:
            return
        self.enter = nn.Linear(cell, w)
        self.position = nn.Parameter(0.02 * torch.randn(cells, w))
        self.time = nn.Sequential(nn.Linear(64, w), nn.SiLU(), nn.Linear(w, w))
        self.text = nn.Linear(text_width, w)
        self.no_text = nn.Parameter(0.02 * torch.randn(w))
        self.blocks = blocks(config.layers, w, max(1, w // 32), 4 * w, 0.0, cross=True)
        self.norm = nn.LayerNorm(w)
        self.leave = nn.Linear(w, cell)
        nn.init.zeros_(self.leave.weight)

    def standardise(self, z_BZ: Tensor) -> Tensor:
        """z with mean 0 and variance 1 in each dimension."""
        return (z_BZ - self.mean) / self.scale

    def forward(self, zt_BZ: Tensor, t_B: Tensor, text_BTD: Tensor | None, real_BT: Tensor | None) -> Tensor:
        """Velocity (B, Z) of standardised latents; ``real_BT`` marks the text's tokens, all False for no caption."""
        time_BW = self.time(_fourier(t_B))
        x = self.enter(zt_BZ.unflatten(-1, (self.cells, -1))) + self.position + time_BW[:, None]
        memory = (self.no_text + time_BW)[:, None]
        mask = None
        if text_BTD is not None and real_BT is not None:
            memory = torch.cat([memory, self.text(text_BTD) + time_BW[:, None]], dim=1)
            always = torch.ones_like(real_BT[:, :1])
            mask = torch.cat([always, real_BT], dim=1)[:, None, None]
        for block in self.blocks:
            x = block(x, block.cross_attention.keys_values(memory), memory_mask=mask)
        return self.leave(self.norm(x)).flatten(1)

    @torch.no_grad()
    def sample(
        self,
        generators: Sequence[torch.Generator],
        text_BTD: Tensor | None = None,
        real_BT: Tensor | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        steps: int = 32,
    ) -> Tensor:
        """One latent for each generator, (B, Z), by Heun's method: the same generator state gives the same latent in
        any batch. ``temperature`` scales the noise at the start; ``guidance`` w goes v₀ + w (v_text − v₀)."""
        device = self.mean.device
        x = torch.stack([torch.randn(len(self.mean), generator=g) for g in generators]).to(device) * temperature
        if not self.flows:
            return x * self.scale + self.mean

        def velocity(x: Tensor, t: float) -> Tensor:
            t_B = torch.full((len(x),), t, device=device)
            v = self(x, t_B, text_BTD, real_BT)
            if text_BTD is None or guidance == 1.0:
                return v
            free = self(x, t_B, None, None)
            return free + guidance * (v - free)

        for k in range(steps):
            t, after = k / steps, (k + 1) / steps
            v = velocity(x, t)
            ahead = x + (after - t) * v
            x = ahead if k == steps - 1 else x + (after - t) * 0.5 * (v + velocity(ahead, after))
        return x * self.scale + self.mean


def _fourier(t_B: Tensor) -> Tensor:
    """(B, 64): sines and cosines of t at frequencies from 1 to 1000 (Vaswani et al. 2017)."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), 32, device=t_B.device))
    angles = t_B[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
