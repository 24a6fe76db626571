"""Generated images beside real ones, by the features of an independent classifier: distances, coverage, copies.

Shapes: N items, d dimensions, M of the reference. Computed in float64. None of these numbers is comparable with those
that others computed on another network's features: the Fréchet distance of this page is never an FID. All depend on N,
so that each null is measured at the same N, on real images in the place of generated ones: what a perfect generator
would get.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from intaglio.health.instruments.measured import vectors
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.history.reading import share

LEAST = 50
"""Items of a kind below which a distribution is not described."""
SPLITS = 4
"""Random halvings that a null is averaged over."""
BLOCKS = 20
NEIGHBOURS, AROUND = 3, 50
"""Which neighbour bounds a ball of the manifold; how many tell how dense the training set is around an item."""
FEW = 16
"""Items below which no ratio of distances to neighbours is told."""
CLOSEST = 0.01
"""Share of held-out images that lie so close to a training image that generated ones there count as copies."""


def frechet_distance(real: Tensor, generated: Tensor, paired: bool = False) -> Measured:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of features (N, d), (M, d) (Heusel et al. 2017, eq. 6); 0 is the same.

    It is biased upwards, the more so the smaller N/d. Null: of real images against other real ones, at the same N; N
    generated images are compared with those of the real set that the null leaves, and both averaged over 4 splits.
    ``paired``: generated image i was made from real image i, which is then never among those it is compared with.
    """
    return _against_halves(real, generated, _frechet, paired=paired)


def _frechet(x_Nd: Tensor, y_Md: Tensor) -> float:
    a, b = _root(x_Nd), _root(y_Md)
    apart = (x_Nd.mean(0) - y_Md.mean(0)).square().sum()
    return float(apart + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def _root(x_Nd: Tensor) -> Tensor:
    """R (min(N, d), d) with RᵀR = Σ: tr (Σ₁Σ₂)^½ is the sum of singular values of R₁R₂ᵀ, with no root of rounding."""
    n, d = x_Nd.shape
    centred = (x_Nd - x_Nd.mean(0)) / (n - 1) ** 0.5
    if n <= d:
        return centred
    eigenvalues, basis = torch.linalg.eigh(centred.T @ centred)
    return eigenvalues.clamp_min(0).sqrt()[:, None] * basis.T


def kernel_distance(real: Tensor, generated: Tensor) -> Measured:
    """Unbiased MMD² with the kernel (xᵀy/d + 1)³ of features (N, d), (M, d) (Bińkowski et al. 2018).

    Null: 0, exactly, whatever N; single values may be below it. The interval is a jackknife over 20 blocks of either
    set (Efron & Stein 1981): at the null itself it is too wide rather than too narrow.
    """
    both = _described(real, generated)
    if isinstance(both, NotMeasured):
        return both
    x, y = both
    sums = _block_sums(x, x), _block_sums(y, y), _block_sums(x, y)
    sizes = tuple(torch.tensor([len(b) for b in v.tensor_split(BLOCKS)], dtype=v.dtype) for v in both)
    value = _mmd(*sums, *sizes)
    kept = [torch.arange(BLOCKS) != b for b in range(BLOCKS)]
    without = np.array([_mmd(*(s[k][:, k] for s in sums), *(n[k] for n in sizes)) for k in kept])
    half = 1.96 * float(np.sqrt((BLOCKS - 1) * without.var()))
    return Reading(value, 0.0, len(y), value - half, value + half)


def _block_sums(x_Nd: Tensor, y_Md: Tensor) -> Tensor:
    """Σ of the kernel between each block of x and each of y, (B, B); a block with itself without its diagonal."""
    d = x_Nd.shape[1]
    blocks = y_Md.tensor_split(BLOCKS)
    sums = torch.stack([
        torch.stack([(a @ b.T / d + 1).pow(3).sum() for b in blocks]) for a in x_Nd.tensor_split(BLOCKS)
    ])  # fmt: skip
    if x_Nd is y_Md:
        own = (x_Nd.square().sum(1) / d + 1).pow(3)
        sums -= torch.diag(torch.stack([part.sum() for part in own.tensor_split(BLOCKS)]))
    return sums


def _mmd(xx: Tensor, yy: Tensor, xy: Tensor, n_B: Tensor, m_B: Tensor) -> float:
    """The unbiased MMD² (Gretton et al. 2012, eq. 3) from block sums and the sizes of the blocks."""
    n, m = n_B.sum(), m_B.sum()
    return float(xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * xy.sum() / (n * m))


def precision(real: Tensor, generated: Tensor) -> Measured:
    """The share of generated features within the manifold of the real ones (Kynkäänniemi et al. 2019, eq. 1–2, k = 3).

    N of each, averaged over 4 splits; null: of other real features, at the same N. Interval: Wilson's.
    """
    return _against_halves(real, generated, _covered, counts=True, even=True)


def recall(real: Tensor, generated: Tensor) -> Measured:
    """The share of real features within the manifold of the generated ones (Kynkäänniemi et al. 2019, eq. 1–2, k = 3).

    As ``precision``; near 0 where the generated are few different ones.
    """
    return _against_halves(real, generated, lambda x, y: _covered(y, x), counts=True, even=True)


def _covered(x_Nd: Tensor, reference_Md: Tensor) -> float:
    """The share of x in some ball around a reference point that reaches to its third neighbour among the reference."""
    radii_M = torch.cat([d.kthvalue(NEIGHBOURS + 1).values for d in _distances(reference_Md, reference_Md)])
    return float(torch.cat([(d <= radii_M).any(1) for d in _distances(x_Nd, reference_Md)]).double().mean())


def neighbour_ratio(train: Tensor, held_out: Tensor, generated: Tensor) -> Measured:
    """How much nearer the nearest training item is than the nearest 50 on average, 0 for a copy (Carlini et al. 2023).

    Mean over generated features; null: over real ones that were held out, whose error is in the interval, too.
    """
    found = ratios(train, held_out, generated)
    if isinstance(found, NotMeasured):
        return found
    known, r = found
    value, half = float(r.mean()), 1.96 * float(np.sqrt(known.var() / len(known) + r.var() / len(r)))
    return Reading(value, float(known.mean()), len(r), value - half, value + half)


def copied_share(train: Tensor, held_out: Tensor, generated: Tensor) -> Measured:
    """The share of generated features that are as near a training item as the nearest 1 % of held-out ones are.

    By the ratio of ``neighbour_ratio``. Null: k/(n + 1), where k of n held-out ones are so near, exact for samples that
    the training set influences no more than it does held-out images, whatever their distribution. Interval: Wilson's.
    """
    found = ratios(train, held_out, generated)
    if isinstance(found, NotMeasured):
        return found
    known, r = found
    nearest = copied_below(known)
    return share(int((r <= nearest).sum()), len(r), float((known <= nearest).sum()) / (len(known) + 1))


def diversity(real: Tensor, generated: Tensor) -> Measured:
    """Mean distance between two generated features over that between two real ones; null 1.

    Of one class at a time: differences between classes would hide that all of one class look alike. The interval is a
    jackknife over items (Efron & Stein 1981).
    """
    both = _described(real, generated, least=8)
    if isinstance(both, NotMeasured):
        return both
    (a, spread_a), (b, spread_b) = (_mean_distance(x) for x in both)
    if a == 0:
        return NotMeasured("all real features are the same, so there is no variety to compare with")
    value = b / a
    half = 1.96 * value * ((spread_a / a) ** 2 + (spread_b / b) ** 2) ** 0.5 if b else 0.0
    return Reading(value, 1.0, len(both[1]), value - half, value + half)


def _mean_distance(x_Nd: Tensor) -> tuple[float, float]:
    """Mean distance of two different items and its standard error by leaving out one item at a time."""
    n = len(x_Nd)
    rows_N = torch.cat([d.sum(1) for d in _distances(x_Nd, x_Nd)])
    without_N = (rows_N.sum() - 2 * rows_N) / ((n - 1) * (n - 2))
    return float(rows_N.sum() / (n * (n - 1))), float(((n - 1) * without_N.var(correction=0)).sqrt())


def _described(real: Tensor, generated: Tensor, least: int = LEAST) -> tuple[Tensor, Tensor] | NotMeasured:
    """Both sets as ``vectors`` of the same dimensions.

    Raises:
        ValueError: as ``vectors``; or their dimensions differ.
    """
    x, y = vectors(real, least, "real features"), vectors(generated, least, "generated features")
    if isinstance(x, NotMeasured):
        return x
    if isinstance(y, NotMeasured):
        return y
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"real features have {x.shape[1]} dimensions, generated {y.shape[1]}; use one classifier")
    return x, y


def _against_halves(
    real: Tensor,
    generated: Tensor,
    compare: Callable[[Tensor, Tensor], float],
    counts: bool = False,
    even: bool = False,
    paired: bool = False,
) -> Measured:
    """``compare(N generated, the other real ones)``; null: with N real ones in their place. ``even``: N others, too.

    ``paired``: the generated ones are those made from the N real ones.
    """
    both = _described(real, generated, LEAST)
    if isinstance(both, NotMeasured):
        return both
    x, y = both
    n = min(len(y), len(x) // 2)
    if n < LEAST:
        return NotMeasured(f"N too small: {len(x)} real features, and it takes {2 * LEAST} to split them for a null")
    generator = torch.Generator().manual_seed(0)
    values, nulls = [], []
    for _ in range(SPLITS):
        order, drawn = torch.randperm(len(x), generator=generator), torch.randperm(len(y), generator=generator)[:n]
        stand_in, others = x[order[:n]], x[order[n : 2 * n if even else None]]
        values.append(compare(y[order[:n] if paired else drawn], others))
        nulls.append(compare(stand_in, others))
    value, null = float(np.mean(values)), float(np.mean(nulls))
    if not counts:
        return Reading(value, null, n)
    interval = share(round(value * n), n)
    return Reading(value, null, n, interval.low, interval.high)


def copied_below(known: np.ndarray) -> float:
    """The ratio of the nearest 1 % of held-out items, up to which a generated one counts as a copy."""
    return float(np.sort(known)[max(1, int(CLOSEST * (len(known) + 1))) - 1])


def ratios(train: Tensor, held_out: Tensor, generated: Tensor) -> tuple[np.ndarray, np.ndarray] | NotMeasured:
    """Nearest distance over the mean of the nearest 50, of held-out (H,) and of generated items (N,).

    Of fewer training items all are taken: what is learnt by heart is most often a handful.
    """
    known, drawn = _described(train, held_out, FEW), _described(train, generated, FEW)
    if isinstance(known, NotMeasured):
        return known
    if isinstance(drawn, NotMeasured):
        return drawn
    of_held, of_generated = (_nearness(x, known[0]) for x in (known[1], drawn[1]))
    return of_held, of_generated


def _nearness(x_Nd: Tensor, train_Md: Tensor) -> np.ndarray:
    k = min(AROUND, len(train_Md))
    near_NK = torch.cat([d.topk(k, largest=False).values for d in _distances(x_Nd, train_Md)])
    ratios = (near_NK.amin(1) / near_NK.mean(1).clamp_min(1e-300)).cpu().numpy()
    return np.where(ratios < 1e-6, 0.0, ratios)  # rounding, where a copy has 0


def _distances(x_Nd: Tensor, y_Md: Tensor) -> Iterator[Tensor]:
    """Distances of each x to each y, (≤ 512, M) at a time; about their centre, or products would lose small ones."""
    centre = y_Md.mean(0)
    for part in x_Nd.split(512):
        yield torch.cdist(part - centre, y_Md - centre)
