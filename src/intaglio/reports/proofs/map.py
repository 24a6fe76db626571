"""t-SNE of some hundred points, exactly, from a fixed start (van der Maaten & Hinton 2008)."""

import numpy as np
import torch
from torch import Tensor

LEAST = 30
"""Points below which t-SNE shows a form that is not there."""


def tsne(x_NE: Tensor, perplexity: float = 10.0, steps: int = 600) -> np.ndarray:
    """Points (N, 2) whose neighbours are those of the rows, centred; starts at the two principal components."""
    x = torch.nn.functional.normalize(x_NE.double(), dim=-1)
    n = len(x)
    p = _neighbours(torch.cdist(x, x).square(), min(perplexity, (n - 1) / 3))
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = u[:, :2] * s[:2] * (1e-2 / s[0].clamp_min(1e-12))
    speed, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(n / 12.0, 10.0)
    for step in range(steps):
        q = 1 / (1 + torch.cdist(y, y).square())
        q.fill_diagonal_(0)
        force = ((12.0 if step < steps // 3 else 1.0) * p - q / q.sum()) * q
        slope = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gain = torch.where(slope.sign() == speed.sign(), gain * 0.8, gain + 0.2).clamp_min(0.01)
        speed = (0.5 if step < steps // 3 else 0.8) * speed - rate * gain * slope
        y = y + speed
    return (y - y.mean(0)).numpy()


def _neighbours(d2: Tensor, perplexity: float) -> Tensor:
    """(N, N), symmetric, sum 1: of each row a Gaussian of that perplexity, its width found by bisection."""
    n = len(d2)
    low, high = torch.full((n, 1), 1e-6).double(), torch.full((n, 1), 1e6).double()
    p = d2
    for _ in range(60):
        beta = (low * high).sqrt()
        logits = (-beta * d2).fill_diagonal_(-torch.inf)
        p = logits.softmax(1)
        entropy = -torch.special.xlogy(p, p).sum(1, keepdim=True)
        wide = entropy > np.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    return (p + p.T) / (2 * n)
