"""Where latents lie and what moves them: mean, spread, norm, asymmetry, variance between and within items.

Shapes: N items, d dimensions. Computed in float64.
"""

import math

import torch
from torch import Tensor

from intaglio.health.instruments.measured import moving, posterior, vectors
from intaglio.history import Measured, NotMeasured, Reading


def norm(latents: Tensor) -> Measured:
    """Mean ‖z‖; null √2 Γ((d + 1)/2) / Γ(d/2), that of N(0, I)."""
    x = vectors(latents, least=1)
    if isinstance(x, NotMeasured):
        return x
    d = x.shape[1]
    null = 2**0.5 * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    return Reading(float(x.norm(dim=1).mean()), null, len(x))


def std(latents: Tensor) -> Measured:
    """Root of the mean variance of a dimension; null 1, that of N(0, I)."""
    x = vectors(latents)
    return x if isinstance(x, NotMeasured) else Reading(float(x.var(0).mean().sqrt()), 1.0, len(x))


def mean_shift(latents: Tensor) -> Measured:
    """Root mean square of the dimensions' means, in standard deviations; null 1/√N, of a mean that is 0."""
    x = vectors(latents)
    if isinstance(x, NotMeasured):
        return x
    if not moving(x):
        return NotMeasured("all vectors are the same, so there is no deviation to count in")
    return Reading(float((x.mean(0).square().mean() / x.var(0).mean()).sqrt()), len(x) ** -0.5, len(x))


def asymmetry(latents: Tensor) -> Measured:
    """Root mean square of the dimensions' skewness; null √(6(N − 2) / ((N + 1)(N + 3))), of Gaussians (Fisher 1930)."""
    x = vectors(latents, least=8)
    if isinstance(x, NotMeasured):
        return x
    deviation = x.std(0, correction=0)
    live = deviation > 1e-9 * x.abs().amax(0).clamp_min(1e-300)
    if not bool(live.any()):
        return NotMeasured("all vectors are the same, so they have no shape")
    z = (x[:, live] - x[:, live].mean(0)) / deviation[live]
    n = len(x)
    return Reading(float(z.pow(3).mean(0).square().mean().sqrt()), (6 * (n - 2) / ((n + 1) * (n + 3))) ** 0.5, n)


def varying_share(latents: Tensor) -> Measured:
    """tr Cov(z) / E‖z‖²: the share of the second moment that differs between items; 0 where the input is ignored."""
    x = vectors(latents)
    if isinstance(x, NotMeasured):
        return x
    whole = x.square().sum(1).mean()
    if whole == 0:
        return Reading(0.0, None, len(x))
    return Reading(float((x - x.mean(0)).square().sum(1).mean() / whole), None, len(x))


def between_share(mean: Tensor, log_variance: Tensor) -> Measured:
    """Variance of the posterior means over that plus the mean posterior variance; null 0, of a prior that is returned.

    The same split as an analysis of variance with items as groups (Fisher 1925).

    Raises:
        ValueError: as every instrument; or the shapes differ.
    """
    both = posterior(mean, log_variance, least=2)
    if isinstance(both, NotMeasured):
        return both
    x, v = both
    between, within = x.var(0).sum(), v.exp().mean(0).sum()
    return Reading(float(between / (between + within).clamp_min(1e-300)), 0.0, len(x))


def active_units(mean: Tensor, least: float = 0.01) -> Measured:
    """Dimensions whose posterior mean has a variance above ``least`` (Burda et al. 2016, eq. 16); null 0."""
    x = vectors(mean)
    return x if isinstance(x, NotMeasured) else Reading(float((x.var(0) > least).sum()), 0.0, len(x))


def bias_share(latents: Tensor, bias: Tensor) -> Measured:
    """The share of the latents' second moment that one constant vector, as a layer's bias, accounts for; null 0.

    1 − E‖z − b‖² / E‖z‖²: 1 where every latent is the bias, at most 0 where it has nothing to do with them.

    Raises:
        ValueError: as every instrument; or the bias has not the latents' d numbers.
    """
    x, b = vectors(latents), bias.detach().flatten()
    if isinstance(x, NotMeasured):
        return x
    if len(b) != x.shape[1]:
        raise ValueError(f"the bias has {len(b)} numbers, and the latents {x.shape[1]} dimensions; give that layer's.")
    if not bool(torch.isfinite(b).all()):
        return NotMeasured("the bias is not finite")
    whole = float(x.square().sum(1).mean())
    if whole == 0:
        return NotMeasured("all latents are 0")
    rest = (x - b.to(x)).square().sum(1).mean()
    return Reading(float(1 - rest / whole), 0.0, len(x))


def clamped_share(latents: Tensor, low: float, high: float) -> Measured:
    """The share of values that are at a clamp's ends or beyond, where no gradient passes; null 0.

    Raises:
        ValueError: as every instrument; or ``low`` is not below ``high``.
    """
    if not low < high:
        raise ValueError(f"a clamp from {low} to {high} holds no value; give low < high.")
    x = vectors(latents, least=1)
    if isinstance(x, NotMeasured):
        return x
    least, most = torch.tensor([low, high], dtype=latents.dtype).tolist()  # as a clamp rounds them
    return Reading(float(((x <= least) | (x >= most)).double().mean()), 0.0, len(x))


def cut_share(latents_KN: Tensor) -> Measured:
    """The share of values at a bound, (K, N) of K channels, where the clamp is not known; null 0.

    A bound is the largest or the smallest value of a channel, where others have the very same one: that of one channel
    alone may be what it says of empty patches.
    """
    channels, n = latents_KN.shape
    if channels < 2:
        return NotMeasured("of one channel, a clamp cannot be told from a value that many patches have")
    cut = torch.zeros_like(latents_KN, dtype=torch.bool)
    for bound_K in (latents_KN.amin(1), latents_KN.amax(1)):
        shared_K = (bound_K[:, None] == bound_K).sum(1) > 1
        cut |= shared_K[:, None] & (latents_KN == bound_K[:, None])
    return Reading(float(cut.double().mean()), 0.0, channels * n)
