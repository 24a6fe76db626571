"""How many directions latents use, and how evenly: ranks, isotropy, alignment, uniformity.

Shapes: N items, d dimensions, V views of an item. Computed in float64, by the smaller of the Gram matrix and the
covariance. The null of a rank is that of N isotropic Gaussian vectors, which is below d: at N = 2d by a third.
"""

from functools import lru_cache

import torch
from torch import Tensor

from intaglio.health.instruments.measured import moving, paired, vectors
from intaglio.history import Measured, NotMeasured, Reading

LEAST_RATIO = 2.0
"""N/d below which a rank says more of N than of the latents."""

LARGEST = 200_000
"""Numbers in a simulated sample; larger ones are simulated at the same N/d, since only that matters."""
MOST_DRAWS = 2048


def spectrum(x_Nd: Tensor, centred: bool = True) -> Tensor:
    """Eigenvalues of the covariance (or second moment), descending, min(N, d) of them; of several samples at once."""
    n, d = x_Nd.shape[-2:]
    x = x_Nd - x_Nd.mean(-2, keepdim=True) if centred else x_Nd
    gram = x @ x.mT if n < d else x.mT @ x
    return torch.linalg.eigvalsh(gram / n).flip(-1).clamp_min(0)


def _entropy_rank(weights: Tensor) -> Tensor:
    """exp of the entropy of the normalised weights (Roy & Vetterli 2007, eq. 2–3)."""
    p = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


@lru_cache(maxsize=256)
def gaussian_null(quantity: str, n: int, d: int) -> float:
    """The mean of the quantity for N isotropic Gaussian vectors of d dimensions, simulated once from a fixed seed.

    Beyond 200 000 numbers both N and d shrink alike, and the value grows back: spectra depend on N/d alone (Marchenko &
    Pastur 1967). The smaller they are, the more of them are drawn: up to 2048.
    """
    shrink = max(1.0, (n * d / LARGEST) ** 0.5)
    small_n, small_d = max(2, round(n / shrink)), max(1, round(d / shrink))
    eigenvalues = _simulated(small_n, small_d, quantity != "rankme")
    grow = min(n, d) / min(small_n, small_d)
    return grow * float(_from_spectrum(quantity, eigenvalues).mean())


@lru_cache(maxsize=32)
def _simulated(n: int, d: int, centred: bool) -> Tensor:
    """Spectra of Gaussian samples: (draws, min(N, d))."""
    draws = max(1, min(MOST_DRAWS, 2 * LARGEST // (n * d)))
    x = torch.randn(draws, n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return spectrum(x, centred)


def _from_spectrum(quantity: str, eigenvalues: Tensor) -> Tensor:
    if quantity in ("effective_rank", "rankme"):
        return _entropy_rank(eigenvalues.sqrt())
    if quantity == "covariance_rank":
        return _entropy_rank(eigenvalues)
    if quantity == "stable_rank":
        return eigenvalues.sum(-1) / eigenvalues[..., 0]
    return eigenvalues.sum(-1).square() / eigenvalues.square().sum(-1)


def ranks(latents: Tensor, *quantities: str) -> dict[str, Measured]:
    """Several of the rank-like quantities of this page by name, from one spectrum (``rankme`` has its own)."""
    x = vectors(latents)
    if isinstance(x, NotMeasured):
        return dict.fromkeys(quantities, x)
    n, d = x.shape
    why = None
    if n < LEAST_RATIO * d:
        why = NotMeasured(f"N too small: {n} vectors of {d} dimensions; it takes {int(LEAST_RATIO * d)}")
    elif not moving(x):
        why = NotMeasured("all vectors are the same, so there is no direction to count")
    if why is not None:
        return dict.fromkeys(quantities, why)
    spectra = {centred: spectrum(x, centred) for centred in {q != "rankme" for q in quantities}}
    return {q: Reading(float(_from_spectrum(q, spectra[q != "rankme"])), gaussian_null(q, n, d), n) for q in quantities}


def effective_rank(latents: Tensor) -> Measured:
    """exp of the entropy of the normalised *singular values* of the centred (N, d) (Roy & Vetterli 2007); 1 … d."""
    return ranks(latents, "effective_rank")["effective_rank"]


def covariance_rank(latents: Tensor) -> Measured:
    """exp of the entropy of the normalised *eigenvalues of the covariance*; 1 … d, and at most ``effective_rank``."""
    return ranks(latents, "covariance_rank")["covariance_rank"]


def rankme(latents: Tensor) -> Measured:
    """As ``effective_rank``, not centred, as the literature has it (Garrido et al. 2023, eq. 1)."""
    return ranks(latents, "rankme")["rankme"]


def participation_ratio(latents: Tensor) -> Measured:
    """(Σλ)² / Σλ² of the covariance (Gao et al. 2017): 1 where one direction has all variance, d where all are alike.

    No jitter: a covariance of 0 with 1e-6 added to its diagonal looks perfectly even.
    """
    return ranks(latents, "participation_ratio")["participation_ratio"]


def stable_rank(latents: Tensor) -> Measured:
    """Σλ / λ₁ of the covariance (Rudelson & Vershynin 2007), at any N.

    Its null nears (1 + √(d/N))⁻² · d, the edge of Marchenko and Pastur.
    """
    x = vectors(latents)
    if isinstance(x, NotMeasured):
        return x
    if not moving(x):
        return NotMeasured("all vectors are the same, so there is no direction to count")
    return Reading(float(_from_spectrum("stable_rank", spectrum(x))), gaussian_null("stable_rank", *x.shape), len(x))


def isoscore(latents: Tensor) -> Measured:
    """IsoScore (Rudman et al. 2022, algorithm 1): 1 where all dimensions vary alike, 0 where one has all variance.

    Null: that of as many Gaussian vectors, from their participation ratio, of which it is a linear function.
    """
    x = vectors(latents)
    if isinstance(x, NotMeasured):
        return x
    n, d = x.shape
    if d < 2 or n < LEAST_RATIO * d:
        return NotMeasured(f"N too small: {n} vectors of {d} dimensions; it takes {max(2, int(LEAST_RATIO * d))}")
    if not moving(x):
        return NotMeasured("all vectors are the same, so there is no direction to count")
    variances = spectrum(x)[:d]  # of the principal components, as the algorithm reorients
    unit = d**0.5 * variances / variances.norm()
    defect = float((unit - 1).norm() / (2 * (d - d**0.5)) ** 0.5)
    share = (d - defect**2 * (d - d**0.5)) ** 2 / d**2
    even = gaussian_null("participation_ratio", n, d)
    return Reading((d * share - 1) / (d - 1), (even - 1) / (d - 1), n)


def _units(*sets_Nd: Tensor) -> list[Tensor] | NotMeasured:
    """Each set of vectors at length 1, or how many have no direction."""
    lengths = [x.norm(dim=1, keepdim=True) for x in sets_Nd]
    for length in lengths:
        if none := int((length == 0).sum()):
            return NotMeasured(f"{none} of {len(length)} vectors are 0 and have no direction")
    return [x / length for x, length in zip(sets_Nd, lengths, strict=True)]


def alignment(a: Tensor, b: Tensor) -> Measured:
    """Mean ‖a − b‖² of paired unit vectors (Wang & Isola 2020, eq. 3, α = 2); 0 is perfect.

    Null: the same with partners exchanged.

    Raises:
        ValueError: as every instrument; or the shapes differ.
    """
    both = paired(a, b)
    units = both if isinstance(both, NotMeasured) else _units(*both)
    if isinstance(units, NotMeasured):
        return units
    x, y = units
    null = float(2 - 2 * (x.sum(0) @ y.sum(0) - (x * y).sum()) / (len(x) * (len(x) - 1)))
    return Reading(float((x - y).square().sum(1).mean()), null, len(x))


def uniformity(latents: Tensor) -> Measured:
    """ln mean exp(−2‖x − y‖²) over pairs of unit vectors (Wang & Isola 2020, eq. 4, t = 2); 0 where all are the same.

    Null: of as many uniform directions in d dimensions, which is the least: ln ₀F₁(; d/2; 4) − 4, for any N.
    """
    x = vectors(latents)
    if isinstance(x, NotMeasured):
        return x
    units = _units(x)
    if isinstance(units, NotMeasured):
        return units
    (unit,), (n, d) = units, x.shape
    close = (4 * (unit @ unit.T) - 4).exp()
    value = float(((close.sum() - close.diagonal().sum()) / (n * (n - 1))).log())
    return Reading(value, _uniform(d), n)


@lru_cache(maxsize=64)
def _uniform(d: int) -> float:
    """ln E exp(4 u·v − 4) for uniform unit u, v: E exp(k u·v) = ₀F₁(; d/2; k²/4), k = 4."""
    total = term = 1.0
    for m in range(1, 200):
        term *= 4.0 / (m * (d / 2 + m - 1))
        total += term
        if term < 1e-17 * total:
            break
    return float(torch.tensor(total, dtype=torch.float64).log()) - 4


def lidar(views_NVd: Tensor, delta: float = 1e-4) -> Measured:
    """LiDAR (Thilak et al. 2023, eq. 1–3): effective rank of between-item over within-item variance, from V views.

    Null: of views that have nothing in common, at the same N, V and d.
    """
    if views_NVd.ndim != 3:
        raise ValueError(f"LiDAR takes views (N, V, d), not the shape {tuple(views_NVd.shape)}.")
    flat, (n, v, d) = vectors(views_NVd, what="items"), views_NVd.shape
    if isinstance(flat, NotMeasured):
        return flat
    if v < 2 or n < LEAST_RATIO * d:
        return NotMeasured(f"N too small: {n} items in {v} views of {d} dimensions; it takes {2 * d} and 2")
    x = flat.view(n, v, d)
    if not moving(x.flatten(0, 1)):
        return NotMeasured("all views are the same")
    noise = torch.randn(n, v, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Reading(_lidar(x, delta), _lidar(noise, delta), n)


def _lidar(x: Tensor, delta: float) -> float:
    n, v, d = x.shape
    means = x.mean(1)
    between = torch.cov(means.T, correction=1)
    off = (x - means[:, None]).flatten(0, 1)
    within = off.T @ off / (n * (v - 1)) + delta * torch.eye(d, dtype=x.dtype, device=x.device)
    values, basis = torch.linalg.eigh(within)
    whiten = basis * values.rsqrt() @ basis.T
    return float(_entropy_rank(torch.linalg.eigvalsh(whiten @ between @ whiten).clamp_min(0)))
