"""The diffusion time as a vector."""

import math

import torch
from torch import Tensor, nn


def sinusoids(t_B: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """(B, width): cosines, then sines, at ``width``/2 wavelengths of 2π to 2π·``longest`` steps (Vaswani et al. 2017).

    Float32 whatever runs around it: bf16 has no room for the difference between steps 499 and 500.
    """
    half = width // 2
    frequency = torch.exp(-math.log(longest) / half * torch.arange(half, device=t_B.device, dtype=torch.float32))
    angle = t_B.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """(B,) → (B, E): sinusoids, then two layers (Ho et al. 2020). ``t_B`` counts steps and may be fractional."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.layers = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        return self.layers(sinusoids(t_B, self.frequencies))
