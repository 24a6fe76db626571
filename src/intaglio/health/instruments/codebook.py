"""Do codes live, and are they where the data is? Shapes: T tokens, K codes, D dimensions of a code."""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from intaglio.health.instruments.measured import vectors
from intaglio.history import Measured, NotMeasured, Reading


@torch.no_grad()
def code_counts(codes: Tensor, size: int) -> Tensor:
    """How often each of ``size`` codes occurs: integers of any shape → (K,). Counts of a window may be added up."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes are {codes.dtype}; pass the integer indices that the quantiser chose")
    if codes.numel() and not bool(((codes >= 0) & (codes < size)).all()):
        raise ValueError(
            f"codes run from {int(codes.min())} to {int(codes.max())}; a codebook of {size} ends at {size - 1}"
        )
    return torch.bincount(codes.flatten().long(), minlength=size)


@torch.no_grad()
def usage(counts_K: Tensor) -> Measured:
    """The share of codes used at all among the T tokens counted, the window; float64.

    Null: T uniform draws use 1 − (1 − 1/K)^T of the codes.
    """
    counts = _counted(counts_K)
    if isinstance(counts, NotMeasured):
        return counts
    size, tokens = len(counts), int(counts.sum())
    return Reading(float((counts > 0).mean()), -math.expm1(tokens * _log_missed(size)), tokens)


@torch.no_grad()
def perplexity(counts_K: Tensor) -> Measured:
    """exp(−Σ p ln p) of the codes' frequencies p among T tokens, the number of codes in even use; float64.

    Null: ``uniform_perplexity(K, T)``, below K and below T.
    """
    counts = _counted(counts_K)
    if isinstance(counts, NotMeasured):
        return counts
    p = counts[counts > 0] / counts.sum()
    tokens = int(counts.sum())
    return Reading(float(np.exp(-(p * np.log(p)).sum())), uniform_perplexity(len(counts), tokens), tokens)


@lru_cache
def uniform_perplexity(size: int, tokens: int) -> float:
    """exp of the expected entropy of T uniform draws of K codes: ln T − (K/T) E[X ln X], X binomial (T, 1/K).

    Exact for the entropy; the mean perplexity itself is above it by a factor of 1 + ½ Var(entropy): 1.6 % at 16 codes
    and 16 tokens, .2 % at 64 and 64, .03 % at 768 and 512.
    """
    if size == 1 or tokens == 1:
        return 1.0
    mean = tokens / size
    x = np.arange(1, min(tokens, int(mean + 12 * math.sqrt(mean) + 40)) + 1)
    # P(x) / P(x − 1) = (T − x + 1) / (x (K − 1)), from P(0) = (1 − 1/K)^T
    log_p = tokens * _log_missed(size) + np.cumsum(np.log(tokens - x + 1) - np.log(x) - math.log(size - 1))
    return math.exp(math.log(tokens) - size / tokens * float((np.exp(log_p) * x * np.log(x)).sum()))


@torch.no_grad()
def mean_age(last_used_K: Tensor, step: int, tokens_per_step: int) -> Measured:
    """Optimizer steps since a code's last use, mean over codes; float64.

    ``last_used_K`` holds the step of each code's last use, −1 where it never was; ``step`` is the latest step, from 0.
    Null: uniform draws, Σ qᵃ over a = 1 … step + 1, with q = (1 − 1/K)^(tokens per step).
    """
    ages = _ages(last_used_K, step, tokens_per_step)
    log_q = tokens_per_step * _log_missed(len(ages))
    q = math.exp(log_q)
    null = q / -math.expm1(log_q) * -math.expm1((step + 1) * log_q) if q else 0.0
    return Reading(float(ages.mean()), null, len(ages))


@torch.no_grad()
def dead_share(last_used_K: Tensor, step: int, tokens_per_step: int) -> Measured:
    """The share of codes unused for longer than uniform codes ever are; arguments as ``mean_age``; float64.

    Longer than a steps, where K (1 − 1/K)^(tokens per step · a) = .01: one of a hundred uniform codebooks has a single
    such code. Null: .01 / K or less.
    """
    ages = _ages(last_used_K, step, tokens_per_step)
    size = len(ages)
    if size == 1:
        return NotMeasured("a single code cannot be passed over")
    longest = math.ceil(math.log(0.01 / size) / (tokens_per_step * _log_missed(size)))
    if step + 1 <= longest:
        return NotMeasured(f"too early: a code in uniform use may rest for {longest} steps, and {step + 1} are done")
    null = math.exp((longest + 1) * tokens_per_step * _log_missed(size))
    return Reading(float((ages > longest).mean()), null, size)


@torch.no_grad()
def norm_ratio(codes_KD: Tensor, vectors_TD: Tensor) -> Measured:
    """Mean norm of the codes over mean norm of the vectors that they quantise, no unit; float64. Null: 1."""
    codes, rows = vectors(codes_KD, 1, "codes"), vectors(vectors_TD, 1, "vectors")
    if isinstance(codes, NotMeasured):
        return codes
    if isinstance(rows, NotMeasured):
        return rows
    if codes.shape[1] != rows.shape[1]:
        raise ValueError(f"codes have {codes.shape[1]} dimensions and vectors {rows.shape[1]}; pass what they quantise")
    below = float(rows.norm(dim=1).mean())
    if below == 0:
        return NotMeasured("all vectors are zero: they have no length to compare with")
    return Reading(float(codes.norm(dim=1).mean()) / below, 1.0, len(vectors_TD))


@torch.no_grad()
def mass_ratio(cluster_size_K: Tensor, tokens_per_update: int) -> Measured:
    """Σ of the EMA cluster sizes over the tokens of one update (van den Oord et al. 2017, eq. 6), no unit; float64.

    Null: 1, whatever the decay, if the sizes started at tokens / K and a revived code takes its mass from others.
    """
    if cluster_size_K.ndim != 1 or not cluster_size_K.is_floating_point():
        raise ValueError(
            f"cluster sizes are {cluster_size_K.dtype} of shape {tuple(cluster_size_K.shape)}; pass the quantiser's "
            "running counts, real numbers of shape (codes,)"
        )
    if tokens_per_update < 1:
        return NotMeasured("an update saw no tokens")
    total = float(cluster_size_K.double().sum())
    return (
        Reading(total / tokens_per_update, 1.0, tokens_per_update)
        if math.isfinite(total)
        else NotMeasured("some cluster sizes are NaN or infinite")
    )


def revival_threshold(uses_per_step: float, size: int, tokens_per_step: int) -> Measured:
    """The uses a step below which a code is revived. Null: tokens / K, what uniform use gives each code."""
    if size < 1 or tokens_per_step < 1:
        return NotMeasured("a step saw no tokens, or there are no codes")
    return Reading(float(uses_per_step), tokens_per_step / size, size)


def _log_missed(size: int) -> float:
    """ln of the chance that one uniform draw is another code; −∞ for a single code."""
    return math.log1p(-1 / size) if size > 1 else -math.inf


def _counted(counts_K: Tensor) -> np.ndarray | NotMeasured:
    if counts_K.ndim != 1 or counts_K.is_floating_point() or not len(counts_K) or bool((counts_K < 0).any()):
        raise ValueError(
            f"counts are {counts_K.dtype} of shape {tuple(counts_K.shape)}; pass whole numbers of shape "
            "(codes,), as code_counts gives them"
        )
    return counts_K.cpu().double().numpy() if bool(counts_K.any()) else NotMeasured("no tokens were counted")


def _ages(last_used_K: Tensor, step: int, tokens_per_step: int) -> np.ndarray:
    if last_used_K.ndim != 1 or last_used_K.is_floating_point() or not len(last_used_K) or tokens_per_step < 1:
        raise ValueError(
            f"last uses are {last_used_K.dtype} of shape {tuple(last_used_K.shape)} at {tokens_per_step} tokens a "
            "step; pass whole steps of shape (codes,), −1 for never, and at least one token"
        )
    if int(last_used_K.max()) > step or int(last_used_K.min()) < -1:
        raise ValueError(
            f"last uses run from {int(last_used_K.min())} to {int(last_used_K.max())}, but the step is {step}"
        )
    return step - last_used_K.cpu().double().numpy()
