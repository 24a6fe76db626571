"""SIGReg: embeddings drawn towards N(0, I) through random projections (Balestriero & LeCun 2025, LeJEPA).

Shapes: N samples, D embedding, S slices (random directions), K knots t = h, 2h, …, 3. The knot t = 0 says nothing: both
characteristic functions are 1 there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LAST, KNOTS = 3.0, 16
STEP = LAST / KNOTS


def directions(width: int, slices: int, generator: torch.Generator) -> Tensor:
    """Unit vectors uniform on the sphere, as columns (D, S), on the generator's device."""
    drawn = torch.randn(width, slices, generator=generator, device=generator.device)
    return drawn / drawn.norm(dim=0)


def sigreg(x_ND: Tensor, directions_DS: Tensor) -> Tensor:
    """N ∫ |φ̂(t) − φ(t)|² w(t) dt over [−3, 3], mean over slices (LeJEPA, algorithm 1); a scalar.

    φ̂ is the empirical characteristic function of a slice (Epps & Pulley 1983), φ(t) = w(t) = exp(−t²/2), and the
    integral is the trapezoid rule on 17 knots of [0, 3], doubled, as in the authors' minimal code; the paper's listing
    has 17 on [−5, 5]. The gradient passes to x alone. Half precision is computed in float32. At x ~ N(0, I) it is
    ``expected_sigreg`` on average; where every x is 0, N · ``collapsed_sigreg``.
    """
    with torch.autocast(x_ND.device.type, enabled=False):
        x_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
        # Means over N are all that crosses samples: over processes they would be averaged before they are squared.
        cos_KS, sin_KS = characteristic((STEP * directions_DS.detach().to(x_ND)).T @ x_ND.T)
        phi_K, weight_K = (v.to(x_ND) for v in quadrature())
        return len(x_ND) * (weight_K @ ((cos_KS - phi_K[:, None]).square() + sin_KS.square())).mean()


def characteristic(angles_SN: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of φ̂ at the knots, 2 × (K, S), from h·x: means over N of cos kθ and sin kθ, k = 1 … K."""
    return _Characteristic.apply(angles_SN)


def quadrature() -> tuple[Tensor, Tensor]:
    """φ and the trapezoid's weight times the window at t = h … 3, both halves counted: (K,) each, float64."""
    t_K = STEP * torch.arange(1, KNOTS + 1, dtype=torch.float64)
    phi_K, width_K = (-t_K.square() / 2).exp(), torch.full_like(t_K, 2 * STEP)
    width_K[-1] = STEP
    return phi_K, width_K * phi_K


def expected_sigreg() -> float:
    """Its mean where x ~ N(0, I), at every N: N·E|φ̂ − φ|² = 1 − φ², so ∫ w (1 − φ²) dt."""
    phi_K, weight_K = quadrature()
    return float(weight_K @ (1 - phi_K.square()))


def collapsed_sigreg() -> float:
    """Its value per sample where every embedding is zero: ∫ w (1 − φ)² dt; it grows with N."""
    phi_K, weight_K = quadrature()
    return float(weight_K @ (1 - phi_K).square())


class _Characteristic(torch.autograd.Function):
    """``characteristic`` without K tensors of (S, N), which the plain formula holds several times over.

    Forward by f((k+1)θ) = 2 cos θ f(kθ) − f((k−1)θ), which holds for both; backward by Clenshaw's recurrence.
    """

    @staticmethod
    def forward(ctx: Any, angles_SN: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles_SN.cos(), angles_SN.sin()
        twice = 2 * cos
        ctx.save_for_backward(twice, sin)
        return _means(twice, cos, torch.full_like(cos, -1)), _means(twice, sin.clone(), torch.zeros_like(sin))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_cos_KS: Tensor, to_sin_KS: Tensor) -> Tensor:
        twice, sin = ctx.saved_tensors
        k_K1 = torch.arange(1, KNOTS + 1, dtype=sin.dtype, device=sin.device)[:, None] / sin.shape[1]
        one, two = _clenshaw(twice, k_K1 * to_sin_KS)
        gradient = two.neg_().addcmul_(twice, one, value=0.5)
        one, _ = _clenshaw(twice, k_K1 * to_cos_KS)
        return gradient.addcmul_(sin, one, value=-1)


def _means(twice: Tensor, f: Tensor, before: Tensor) -> Tensor:
    """Means over N of f(θ), …, f(Kθ), (K, S), from 2 cos θ, f(θ) and −f(0); the last two are overwritten."""
    means = [f.mean(1)]
    # One pass a knot: with signs + + − − the recurrence adds its product to what lies in memory.
    for k in range(1, KNOTS):
        f, before = before.addcmul_(twice, f, value=1 if k % 2 else -1), f
        means.append(f.mean(1) if k % 4 < 2 else -f.mean(1))
    return torch.stack(means)


def _clenshaw(twice: Tensor, a_KS: Tensor) -> tuple[Tensor, Tensor]:
    """u₁ and u₂ of uₖ = aₖ + 2 cos θ uₖ₊₁ − uₖ₊₂: Σ aₖ cos kθ = u₁ cos θ − u₂ and Σ aₖ sin kθ = u₁ sin θ."""
    one, two = torch.zeros_like(twice), torch.zeros_like(twice)
    for a_S in a_KS.flip(0):
        one, two = torch.sub(a_S[:, None], two, out=two).addcmul_(twice, one), one
    return one, two
