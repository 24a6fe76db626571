"""Are embeddings N(0, I), and could they be? SIGReg's statistic as an instrument. Shapes: N samples, D dimensions."""

import math

import torch
from torch import Tensor

from intaglio.health.instruments.measured import moving, vectors
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.objectives.sigreg import (
    STEP,
    characteristic,
    collapsed_sigreg,
    directions,
    expected_sigreg,
    quadrature,
    sigreg,
)

PINNED = 0.1
"""Norms that spread less than this share of the norms of N(0, I) are fixed by the model, not by chance."""
FEWEST = 16
"""Fewer draws of a Gaussian may have one sign, or norms that are all alike."""


@torch.no_grad()
def normality(latents_ND: Tensor, slices: int = 256) -> Measured:
    """SIGReg on fixed random directions: N ∫ |φ̂ − φ|² w dt (Balestriero & LeCun 2025, algorithm 1), no unit; float64.

    Null: its expectation under N(0, I), 1.052 at every N and D, which is as low as it is meant to go. All vectors at
    the origin give ``collapsed(N)``, and one other point for all gives more.
    """
    x_ND = vectors(latents_ND)
    if isinstance(x_ND, NotMeasured):
        return x_ND
    directions_DS = directions(x_ND.shape[1], slices, torch.Generator().manual_seed(0))
    return Reading(float(sigreg(x_ND, directions_DS)), expected_sigreg(), len(x_ND))


def collapsed(n: int) -> float:
    """``normality`` of n vectors that are all zero: n ∫ w (1 − φ)² dt = .402 n."""
    return n * collapsed_sigreg()


@torch.no_grad()
def normality_floor(latents_ND: Tensor) -> Measured:
    """The lowest ``normality`` that independent vectors of these norms have on average; float64, null as there.

    The statistic is a distance in a kernel that rotations leave alone (averaged over directions), and so convex and
    least where directions are uniform: ∫ w (1 − ψ²) dt + N ∫ w (ψ − φ)² dt with ψ(t) = E cos(t ‖x‖ u), u one
    coordinate of a uniform unit vector. What is above the null no turning of the vectors can remove, only other norms.
    """
    x_ND = vectors(latents_ND)
    if isinstance(x_ND, NotMeasured):
        return x_ND
    if x_ND.shape[1] < 2:
        return NotMeasured("one dimension has no directions to turn in")
    return Reading(_floor(x_ND), expected_sigreg(), len(x_ND))


@torch.no_grad()
def norm_spread(latents_ND: Tensor) -> Measured:
    """Standard deviation of the norms over their mean, no unit; float64.

    Null: the same of N(0, I) in D dimensions, (D m⁻² − 1)^½ with m = √2 Γ((D+1)/2) / Γ(D/2), about (2D)^−½. It is 0
    for normalised vectors, to rounding.
    """
    x_ND = vectors(latents_ND)
    if isinstance(x_ND, NotMeasured):
        return x_ND
    if not x_ND.any():
        return NotMeasured("all vectors are zero: their norms have no relative spread")
    return Reading(*_spread(x_ND), len(x_ND))


@torch.no_grad()
def bounded_at_zero(latents_ND: Tensor) -> Measured:
    """The share of dimensions that are never negative and come within half a standard deviation of 0; null 0.

    So a ReLU, a sigmoid or an absolute value shows, and a Gaussian that merely lies far from 0 does not.
    """
    x_ND = vectors(latents_ND, FEWEST)
    return x_ND if isinstance(x_ND, NotMeasured) else Reading(_bounded(x_ND), 0.0, len(x_ND))


@torch.no_grad()
def sigreg_blind(latents_ND: Tensor) -> Measured:
    """1 where the statistic cannot reach its null whatever is learnt, 0 where it can; null 0.

    It cannot where vectors are non-negative (``bounded_at_zero`` ≥ .99), or where their norms are pinned
    (``norm_spread`` below a tenth of its null) at a length whose ``normality_floor`` exceeds twice the null: length 1
    does, and length √D at large D does not. A collapse that training could undo is not blindness; one to a single
    point is not judged.
    """
    x_ND = vectors(latents_ND, FEWEST)
    if isinstance(x_ND, NotMeasured):
        return x_ND
    if not moving(x_ND) or x_ND.shape[1] < 2:
        return NotMeasured(
            "all vectors are the same, or have one dimension: whether their norms are held does not show"
        )
    if _bounded(x_ND) >= 0.99:
        return Reading(1.0, 0.0, len(x_ND))
    value, null = _spread(x_ND)
    return Reading(float(value < PINNED * null and _floor(x_ND) > 2 * expected_sigreg()), 0.0, len(x_ND))


def _floor(x_ND: Tensor) -> float:
    # u = cos α with density ∝ sin^(D−2) α on [0, π], where the midpoint rule converges faster than any power
    alpha_A = (torch.arange(512, dtype=x_ND.dtype, device=x_ND.device) + 0.5) * (math.pi / 512)
    density_A = ((x_ND.shape[1] - 2) * alpha_A.sin().log()).exp()
    psi_K = characteristic(STEP * alpha_A.cos()[:, None] * x_ND.norm(dim=1))[0] @ (density_A / density_A.sum())
    phi_K, weight_K = (v.to(x_ND) for v in quadrature())
    return float(weight_K @ (1 - psi_K.square()) + len(x_ND) * (weight_K @ (psi_K - phi_K).square()))


def _spread(x_ND: Tensor) -> tuple[float, float]:
    norms_N, width = x_ND.norm(dim=1), x_ND.shape[1]
    log_mean = math.log(2) / 2 + math.lgamma((width + 1) / 2) - math.lgamma(width / 2)
    return float(norms_N.std(correction=0) / norms_N.mean()), math.sqrt(math.expm1(math.log(width) - 2 * log_mean))


def _bounded(x_ND: Tensor) -> float:
    least_D = x_ND.amin(0)
    return float(((least_D >= 0) & (least_D <= 0.5 * x_ND.std(0))).double().mean())
