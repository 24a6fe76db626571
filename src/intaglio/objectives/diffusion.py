"""Diffusion in discrete time: noise schedules, what a network predicts, and how its loss is weighted.

x_t = a_t x₀ + s_t ε at t = 0 … T−1, SNR = a²/s². Variance-preserving schedules have a² = ᾱ, s² = 1 − ᾱ (Ho et al. 2020,
eq. 4). Shapes: B images, T times; a and s broadcast against images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["cosine", "linear", "scaled-linear", "straight"]
Prediction = Literal["v", "epsilon", "x0", "flow"]
Coefficient = float | Tensor

LOG_SNR_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""Between the bins of log-SNR; they do not move with the schedule, so that bins of two runs can be compared."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """How signal becomes noise, as plain settings: ``NoiseSchedule(**asdict(schedule))`` is the same schedule.

    ``cosine``: Nichol & Dhariwal 2021, eq. 17, s = .008, β ≤ .999. ``linear``: β from 1e-4 to .02 (Ho et al. 2020).
    ``scaled-linear``: √β linear, β from .00085 to .012 (Rombach et al. 2022). Both are of T = 1000; at another T, β is
    scaled by 1000/T, so that SNR(t/T) stays. ``straight``: a = 1 − τ, s = τ = (t + 1)/T, of rectified flow.
    ``zero_terminal_snr`` rescales the first three until nothing but noise is left at T − 1.

    Raises:
        ValueError: an unknown kind, too few steps, or a rescaling of ``straight``, which ends at SNR 0 by itself.
    """

    kind: Kind = "cosine"
    steps: int = 500
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"schedule.kind is {self.kind!r}; choose {', '.join(get_args(Kind))}")
        least = {"linear": 21, "scaled-linear": 13}.get(self.kind, 2)  # fewer would need a β of 1 or more
        if self.steps < least:
            raise ValueError(f"schedule.steps is {self.steps}; {self.kind} needs at least {least}")
        if self.kind == "straight" and self.zero_terminal_snr:
            raise ValueError("schedule.zero_terminal_snr has no effect on straight, which ends at SNR 0; remove it")

    def signal_and_noise(self) -> tuple[Tensor, Tensor]:
        """a and s of every t, 2 × (T,), float64 on the CPU."""
        return _signal_and_noise(self)

    def log_snr(self) -> Tensor:
        """log a²/s², (T,), float64; falling, −inf where nothing but noise is left."""
        a_T, s_T = self.signal_and_noise()
        return 2 * (a_T.log() - s_T.log())

    def terminal_snr(self) -> float:
        """SNR at T − 1. Sampling starts from pure noise, that is, as if it were 0."""
        return math.exp(self.log_snr()[-1])

    def refuse(self, t: int) -> None:
        """Raise ValueError where ``t`` is no time of this schedule."""
        if not 0 <= t < self.steps:
            raise ValueError(
                f"t is {t}, but the model was trained on the {self.steps} noise levels t = 0 … {self.steps - 1}; "
                f"choose one of these (t = {self.steps - 1} is the noisiest)"
            )

    def level(self, t: int) -> tuple[float, float]:
        """a and s at ``t``; ValueError where it is no time of this schedule."""
        self.refuse(t)
        a_T, s_T = self.signal_and_noise()
        return a_T[t].item(), s_T[t].item()

    def at(self, t_B: Tensor, x_Bx: Tensor) -> tuple[Tensor, Tensor]:
        """a and s at ``t_B``, each (B, 1, …) of the device of ``x_Bx`` and at least float32."""
        dtype = torch.promote_types(x_Bx.dtype, torch.float32)
        shape = (-1, *[1] * (x_Bx.ndim - 1))
        a_T, s_T = _signal_and_noise_on(self, x_Bx.device, dtype)
        return a_T[t_B].view(shape), s_T[t_B].view(shape)


@cache
def _signal_and_noise(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    if schedule.kind == "straight":
        tau_T = torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps
        return 1 - tau_T, tau_T
    abar_T = (1 - _betas(schedule.kind, schedule.steps)).cumprod(0)
    if schedule.zero_terminal_snr:
        abar_T = zero_terminal(abar_T)
    return abar_T.sqrt(), (1 - abar_T).sqrt()


@cache
def _signal_and_noise_on(schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A copy that stays on the device: one at every step of training would wait for it."""
    a_T, s_T = _signal_and_noise(schedule)
    return a_T.to(device, dtype), s_T.to(device, dtype)


def _betas(kind: Kind, steps: int) -> Tensor:
    scale = 1000 / steps
    if kind == "linear":
        return scale * torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    if kind == "scaled-linear":
        return scale * torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64).square()
    share = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = ((share + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    return (1 - abar[1:] / abar[:-1]).clamp_max(0.999)


def zero_terminal(abar_T: Tensor) -> Tensor:
    """ᾱ with √ᾱ shifted and scaled, so that it ends at 0 and begins where it began (Lin et al. 2023, algorithm 1)."""
    a_T = abar_T.sqrt()
    return ((a_T - a_T[-1]) * a_T[0] / (a_T[0] - a_T[-1])).square()


def target(prediction: Prediction, x0_Bx: Tensor, noise_Bx: Tensor, a: Coefficient, s: Coefficient) -> Tensor:
    """What the network is to predict: v = aε − s x₀ (Salimans & Ho 2022), ε, x₀, or flow, ε − x₀.

    Flow is the velocity dx/dτ of the straight path from data to noise: ``objectives.flow`` runs from noise to data and
    has the other sign.
    """
    p, q = _mixture(prediction, a, s)
    return p * x0_Bx + q * noise_Bx


def clean_and_noise(
    prediction: Prediction, predicted_Bx: Tensor, x_Bx: Tensor, a: Coefficient, s: Coefficient
) -> tuple[Tensor, Tensor]:
    """x̂₀ and ε̂ of a prediction at x_t: the solution of a x̂₀ + s ε̂ = x_t and p x̂₀ + q ε̂ = prediction."""
    p, q = _mixture(prediction, a, s)
    d = a * q - s * p
    return (q * x_Bx - s * predicted_Bx) / d, (a * predicted_Bx - p * x_Bx) / d


def _mixture(prediction: Prediction, a: Coefficient, s: Coefficient) -> tuple[Coefficient, Coefficient]:
    """p and q of the target p x₀ + q ε."""
    if prediction == "v":
        return -s, a
    if prediction not in ("epsilon", "x0", "flow"):
        raise ValueError(f"prediction is {prediction!r}; choose {', '.join(get_args(Prediction))}")
    return {"epsilon": (0.0, 1.0), "x0": (1.0, 0.0), "flow": (-1.0, 1.0)}[prediction]


def refuse_blind(schedule: NoiseSchedule, prediction: Prediction) -> None:
    """Raise ValueError where the network's output would say nothing of the image at the noisiest level."""
    if prediction == "epsilon" and schedule.terminal_snr() == 0:
        raise ValueError(
            f"at t = {schedule.steps - 1} this schedule has no signal left (SNR 0) and ε says nothing of the image: "
            "set the prediction to v, x0 or flow, or choose a schedule without zero terminal SNR"
        )


def diffusion_loss(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x0_Bx: Tensor,
    noise_Bx: Tensor,
    t_B: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
) -> Tensor:
    """Mean squared error of the prediction at x_t (Ho et al. 2020, eq. 14, for any target): (B,), not yet weighted."""
    a, s = schedule.at(t_B, x0_Bx)
    predicted_Bx = denoise(a * x0_Bx + s * noise_Bx, t_B)
    return (predicted_Bx.float() - target(prediction, x0_Bx, noise_Bx, a, s)).square().flatten(1).mean(1)


def min_snr_weights(schedule: NoiseSchedule, prediction: Prediction, gamma: float = 5.0) -> Tensor:
    """Weight of every t, (T,), float64: min(SNR, γ) on the error of x̂₀ (Hang et al. 2023).

    On the prediction's own error that is min(SNR, γ) (s/d)²: /SNR for ε, /(SNR + 1) for v. At SNR 0 it is 0, that is,
    a schedule with zero terminal SNR never learns the step from which sampling starts.
    """
    refuse_blind(schedule, prediction)
    a_T, s_T = schedule.signal_and_noise()
    p, q = _mixture(prediction, a_T, s_T)
    return (a_T / s_T).square().clamp_max(gamma) * (s_T / (a_T * q - s_T * p)).square()


def log_snr_bins(schedule: NoiseSchedule) -> Tensor:
    """The bin of every t, (T,), int64: 0 for log-SNR < −6 (most noise), then between ``LOG_SNR_EDGES``, 7 for ≥ 6."""
    return torch.bucketize(schedule.log_snr(), torch.tensor(LOG_SNR_EDGES, dtype=torch.float64), right=True)


def log_snr_weights(schedule: NoiseSchedule) -> Tensor:
    """Weight of every t, (T,), float64, mean 1, that gives each bin of log-SNR the same share of a uniform t."""
    bin_T = log_snr_bins(schedule)
    count_K = bin_T.bincount()
    return schedule.steps / (count_K[bin_T] * (count_K > 0).sum()).double()


def error_factor(schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """(p − q a/s)² of every t, (T,), float64: how the error of the prediction p x₀ + q ε follows that of x̂₀."""
    a_T, s_T = schedule.signal_and_noise()
    p, q = _mixture(prediction, a_T, s_T)
    return torch.as_tensor(p - q * a_T / s_T, dtype=torch.float64).square()


def linear_null(schedule: NoiseSchedule, prediction: Prediction, variance: Tensor) -> Tensor:
    """(T,), float64: the loss of the best linear guess of each number of x₀ from the same number of x_t alone.

    With σ² the variance of a number (``variance``, of any shape) that is σ²s²/(a²σ² + s²), as an error of x̂₀.
    """
    a_T, s_T = schedule.signal_and_noise()
    sigma2 = variance.double().flatten()
    left_T = torch.stack([(sigma2 * s**2 / (a**2 * sigma2 + s**2)).mean() for a, s in zip(a_T, s_T, strict=True)])
    return error_factor(schedule, prediction) * left_T


def loss_by_bin(loss_B: Tensor, t_B: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Mean loss and number of images per bin of log-SNR, 2 × (8,); NaN where no image fell."""
    bin_B = log_snr_bins(schedule).to(t_B.device)[t_B]
    count_K = bin_B.bincount(minlength=len(LOG_SNR_EDGES) + 1)
    return bin_B.bincount(loss_B.detach().double(), minlength=len(count_K)) / count_K, count_K
