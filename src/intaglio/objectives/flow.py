"""Rectified flow from noise to data."""

from collections.abc import Callable

from torch import Tensor


def logit_normal(noise_B: Tensor) -> Tensor:
    """Times in (0, 1) from N(0, 1): most of them in the middle, where the velocity is hardest (Esser et al. 2024)."""
    return noise_B.sigmoid()


def flow_loss(velocity: Callable[[Tensor, Tensor], Tensor], x_BZ: Tensor, noise_BZ: Tensor, t_B: Tensor) -> Tensor:
    """Mean of |v(xₜ, t) − (x − ε)|², xₜ = (1 − t) ε + t x (Liu et al. 2023, eq. 1); a scalar."""
    t = t_B[:, None]
    predicted = velocity((1 - t) * noise_BZ + t * x_BZ, t_B)
    return (predicted.float() - (x_BZ - noise_BZ)).square().mean()


def gaussian_flow_null(t_B: Tensor) -> Tensor:
    """The least flow loss on standardised data of which only the variance is known: mean of 1 / ((1 − t)² + t²).

    For x, ε ~ N(0, 1), xₜ has variance s² = (1 − t)² + t², covariance with x − ε of 2t − 1, and so the best linear
    velocity leaves 2 − (2t − 1)²/s² = 1/s².
    """
    return (1 / ((1 - t_B).square() + t_B.square())).mean()
