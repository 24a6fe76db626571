"""Losses of diagonal Gaussians."""

import torch
from torch import Tensor


def kl_to_standard(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) in nats, summed over the last dimension: (..., Z) → (...).

    Kingma & Welling 2014, appendix B: ½ Σ (μ² + σ² − 1 − log σ²).
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def sample(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """μ + σ·ε, the reparametrised draw (Kingma & Welling 2014, eq. 10)."""
    return mean + (0.5 * log_variance).exp() * noise


def clamp_log_variance(raw: Tensor, low: float = -10.0, high: float = 4.0) -> Tensor:
    """Bounds log σ² softly, so that neither the exponential nor its gradient can overflow."""
    return low + (high - low) * torch.sigmoid((raw - low) / (high - low) * 4 - 2)
