"""KL bottlenecks: how many nats a latent holds, where, what is charged for, and what that says of the input.

Shapes: N items, d dimensions of q(z|x) = N(mean, exp(log_variance)), G groups of them. Nats. Computed in float64.
Means and log-variances of different shapes are a ValueError.
"""

import math

import torch
from torch import Tensor

from intaglio.health.instruments.measured import paired, posterior
from intaglio.history import Measured, NotMeasured, Reading

CHUNK = 2**18
"""Differences of means that are held at a time."""


def kl_per_dimension(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, 1)) of each dimension, mean over items: (d,) (Kingma & Welling 2014, appendix B)."""
    m, v = mean.detach().double().flatten(1), log_variance.detach().double().flatten(1)
    return (0.5 * (m.square() + v.exp() - 1 - v)).mean(0)


def kl_nats(mean: Tensor, log_variance: Tensor) -> Measured:
    """KL(q(z|x) || N(0, I)) per item, raw, all dimensions; null 0, of a posterior that is the prior."""
    pair = posterior(mean, log_variance)
    if isinstance(pair, NotMeasured):
        return pair
    return Reading(float(kl_per_dimension(*pair).sum()), 0.0, len(mean))


def kl_charged(mean: Tensor, log_variance: Tensor, floor: float, groups: int) -> Measured:
    """Σ over groups of max(floor, the group's KL, mean over items) (Kingma et al. 2016, eq. 15); null G · floor.

    Raises:
        ValueError: the dimensions do not fall into that many groups.
    """
    pair = posterior(mean, log_variance)
    if isinstance(pair, NotMeasured):
        return pair
    return Reading(float(_by_group(*pair, groups).clamp_min(floor).sum()), groups * floor, len(mean))


def groups_above_floor(mean: Tensor, log_variance: Tensor, floor: float, groups: int) -> Measured:
    """The share of groups whose KL exceeds the floor, so that the term has a gradient for them; null 0."""
    pair = posterior(mean, log_variance)
    if isinstance(pair, NotMeasured):
        return pair
    return Reading(float((_by_group(*pair, groups) > floor).double().mean()), 0.0, len(mean))


def _by_group(mean: Tensor, log_variance: Tensor, groups: int) -> Tensor:
    each = kl_per_dimension(mean, log_variance)
    if len(each) % groups:
        raise ValueError(f"{len(each)} dimensions do not fall into {groups} groups of one size.")
    return each.view(groups, -1).sum(1)


def aggregate_nats(mean: Tensor, log_variance: Tensor) -> Measured:
    """KL(N(m, diag s²) || N(0, I)) of the aggregate posterior's mean and variances, in all: where samples go missing.

    By moments, dimension by dimension: a lower bound that ignores correlations and shapes, but is right at any N. Null:
    d/N, of N draws from N(0, I): half of 1/N for the mean and as much for the variance of each dimension.
    """
    pair = posterior(mean, log_variance)
    if isinstance(pair, NotMeasured):
        return pair
    m, v = pair
    n, d = m.shape
    if n < 2:
        return NotMeasured("N too small: one item has no spread")
    centre, variance = m.mean(0), m.var(0) + v.exp().mean(0)
    return Reading(float(0.5 * (centre.square() + variance - 1 - variance.log()).sum()), d / n, n)


def mutual_information(mean: Tensor, log_variance: Tensor) -> Measured:
    """I(x; z) ≥ E log q(z|x) − log mean over items of q(z|xⱼ), one draw of z each, itself among the N; at most ln N.

    The minibatch bound of Poole et al. 2019, eq. 10 (InfoNCE with the true density ratio). Null 0; a value within 1 nat
    of ln N says only that there is more.
    """
    pair = posterior(mean, log_variance)
    if isinstance(pair, NotMeasured):
        return pair
    m, v = pair
    n = len(m)
    if n < 2:
        return NotMeasured("N too small: it takes two items to tell apart")
    noise = torch.randn(m.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(m.device)
    off, narrow = noise * (0.5 * v).exp(), (-0.5 * v).exp()
    rows = max(1, CHUNK // m.numel())
    squares = torch.cat(  # (zᵢ − mⱼ)² / σⱼ², the noise added last, so that it is not rounded off a mean
        [
            (some[:, None] - m).add_(by[:, None]).mul_(narrow).square_().sum(2)
            for some, by in zip(m.split(rows), off.split(rows), strict=True)
        ]
    )
    each = -0.5 * (squares + v.sum(1))
    return Reading(math.log(n) + float((each.diagonal() - each.logsumexp(1)).mean()), 0.0, n)


def noise_ratio(latents: Tensor, mean: Tensor, log_variance: Tensor) -> Measured:
    """Root mean square of (z − μ)/σ of the latents that a decoder is given: the temperature they are drawn at.

    Null 1, of z ~ q(z|x), for which KL is charged; its standard error is 1/√(2Nd). 0 where the means are given.
    """
    drawn, both = paired(latents, mean, 1, "latents and means"), posterior(mean, log_variance)
    if isinstance(drawn, NotMeasured):
        return drawn
    if isinstance(both, NotMeasured):
        return both
    (z, m), v = drawn, both[1]
    return Reading(float(((z - m) * (-0.5 * v).exp()).square().mean().sqrt()), 1.0, len(z))


def tie_rate(scores_NM: Tensor) -> Measured:
    """The share of pairs among the M scored samples of each item that are equal, so that a ranking says nothing.

    Null 0, of scores that always differ; 1 where all are the same.
    """
    n, m = scores_NM.shape
    if m < 2 or not n:
        return NotMeasured("a single sample an item cannot be ranked" if n else "N too small: there are no items")
    if nan := int(scores_NM.isnan().sum()):
        return NotMeasured(f"{nan} of {n * m} scores are NaN, which equals nothing")
    equal = (scores_NM[:, :, None] == scores_NM[:, None, :]).sum((1, 2)) - m
    return Reading(float(equal.double().mean()) / (m * (m - 1)), 0.0, n)


def entropy_nats(labels_N: Tensor) -> Measured:
    """The entropy of answers, plug-in with the correction (classes seen − 1) / 2N (Miller 1955).

    Null ln(classes seen), of answers that are equally frequent; 0 where all are the same.

    Raises:
        ValueError: not one integer an item.
    """
    if labels_N.ndim != 1 or labels_N.is_floating_point() or labels_N.is_complex():
        raise ValueError(f"answers are {labels_N.dtype} {tuple(labels_N.shape)}; give an integer an item, (N,).")
    n = len(labels_N)
    if n < 2:
        return NotMeasured(f"N too small: {n} answers, and it takes 2")
    counts = labels_N.unique(return_counts=True)[1]
    entropy = float(torch.special.entr(counts.double() / n).sum())
    return Reading(entropy + (len(counts) - 1) / (2 * n), math.log(len(counts)), n)
