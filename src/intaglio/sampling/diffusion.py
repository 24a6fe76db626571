"""Samplers of diffusion models: DDPM, DDIM, Heun and DPM-Solver++(2M), over one noise schedule.

A level is (a, s) of x_t = a x₀ + s ε; a step leads from (a, s) to (a', s'), the last to (1, 0). Shapes: B images, C
channels, H × W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, log, sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from ..objectives.diffusion import NoiseSchedule, Prediction, clean_and_noise, refuse_blind

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``denoise(x (B, C, H, W), t (B,)) -> prediction (B, C, H, W)`` of the kind on which the network was trained."""

Level = tuple[float, float]
Method = Literal["ddpm", "ddim", "heun", "dpm-solver++"]
Spacing = Literal["trailing", "linspace", "leading"]

_LEAP = 10.0


@dataclass(frozen=True, slots=True)
class Sampler:
    """How noise becomes an image.

    ``ddim`` and ``ddpm`` are one family (Song et al. 2021, eq. 12 and 16) in which ``eta`` is the share of fresh
    noise: by default 0 (deterministic) and 1 (ancestral). ``heun`` (Karras et al. 2022, algorithm 1) asks the network
    twice a step, save in the last; ``dpm-solver++`` is 2M (Lu et al. 2022, algorithm 2). ``spacing`` is that of Lin et
    al. 2023, table 2: only ``trailing`` and ``linspace`` start at T − 1.

    Raises:
        ValueError: a value is out of range, or ``eta`` is given to a method without noise.
    """

    method: Method = "ddim"
    steps: int = 50
    eta: float | None = None
    spacing: Spacing = "trailing"

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, Method), ("spacing", self.spacing, Spacing)):
            if value not in get_args(known):
                raise ValueError(f"sampler.{name} is {value!r}; choose {', '.join(get_args(known))}")
        if self.steps < 1:
            raise ValueError(f"sampler.steps is {self.steps}; it must be at least 1")
        if self.eta is not None and self.method not in ("ddpm", "ddim"):
            raise ValueError(f"sampler.eta has no effect with {self.method!r}; remove it or choose ddpm or ddim")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta is {self.eta}; it must be between 0 (DDIM) and 1 (DDPM)")


@dataclass(frozen=True, slots=True)
class Step:
    """After a step from ``t``: the images ``x`` (B, C, H, W) and ``x0``, what the network took them for at ``t``."""

    t: int
    x: Tensor
    x0: Tensor


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator an image, on the CPU, so that a seed means the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape_CHW: Sequence[int], device: torch.device | str) -> Tensor:
    """N(0, 1), (B, C, H, W), float32: each image from its own generator, whatever its neighbours."""
    drawn = [torch.randn(*shape_CHW, generator=generator, device=generator.device) for generator in generators]
    return torch.stack(drawn).to(device)


def timesteps(schedule: NoiseSchedule, sampler: Sampler, start: int | None = None) -> list[int]:
    """The times at which the network is asked, falling from ``start`` (T − 1 where None).

    Raises:
        ValueError: ``start`` is no time of the schedule, or there are fewer times than steps.
    """
    start = schedule.steps - 1 if start is None else start
    schedule.refuse(start)
    levels, steps = start + 1, sampler.steps
    if steps > levels:
        raise ValueError(f"{steps} steps of sampling do not fit between t = {start} and 0; take at most {levels}")
    if sampler.spacing == "trailing":
        return [round(levels - i * levels / steps) - 1 for i in range(steps)]
    if sampler.spacing == "leading":
        return [i * (levels // steps) for i in reversed(range(steps))]
    return [round(start - i * start / max(1, steps - 1)) for i in range(steps)]


def sample(
    denoise: Denoiser,
    x_BCHW: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
    sampler: Sampler,
    generators: Sequence[torch.Generator] = (),
    start: int | None = None,
) -> Tensor:
    """Images (B, C, H, W) from noise, or from x_t at ``start``; see ``trace``."""
    return list(trace(denoise, x_BCHW, schedule, prediction, sampler, generators, start))[-1].x


@torch.no_grad()
def trace(
    denoise: Denoiser,
    x_BCHW: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
    sampler: Sampler,
    generators: Sequence[torch.Generator] = (),
    start: int | None = None,
) -> Iterator[Step]:
    """Every step from ``x_BCHW``, which is ``draw_noise`` or, with ``start``, images at x_t of t = ``start``.

    ``generators``, one an image, are needed where eta > 0 only. What a seed gives depends on neither batch nor
    neighbours, as far as the network's own output does not.

    Raises:
        ValueError: see ``timesteps``; ε-prediction at zero terminal SNR; not one generator an image.
    """
    refuse_blind(schedule, prediction)
    times = timesteps(schedule, sampler, start)
    eta = (1.0 if sampler.method == "ddpm" else 0.0) if sampler.eta is None else sampler.eta
    if eta and len(generators) != len(x_BCHW):
        raise ValueError(f"eta is {eta}: {len(x_BCHW)} images need as many generators, not {len(generators)}")

    def look(x: Tensor, t: int, at: Level) -> tuple[Tensor, Tensor]:
        predicted = denoise(x, torch.full((len(x),), t, device=x.device))
        return clean_and_noise(prediction, predicted.to(x.dtype), x, *at)

    levels: list[Level] = [*map(schedule.level, times), (1.0, 0.0)]
    x, before = x_BCHW, None
    for i, t in enumerate(times):
        now, to, last = levels[i], levels[i + 1], i == len(times) - 1
        x0, eps = look(x, t, now)
        if sampler.method == "dpm-solver++":
            ratio = 0.0 if before is None or last else _log_step(now, to) / _log_step(levels[i - 1], now)
            x, before = multistep(x, x0, x0 if before is None else before, now, to, ratio), x0
        elif sampler.method == "heun":
            x = ddim_step(x0, eps, now, to)
            if not last and to[0] < _LEAP * now[0]:
                x = heun_correction(x, eps, look(x, times[i + 1], to)[1], now, to)
        else:
            x = ddim_step(x0, eps, now, to, eta, lambda: draw_noise(generators, x_BCHW.shape[1:], x_BCHW.device))
        yield Step(t, x, x0)


def ddim_step(
    x0: Tensor, eps: Tensor, now: Level, to: Level, eta: float = 0.0, draw: Callable[[], Tensor] | None = None
) -> Tensor:
    """x' = a' x̂₀ + √(s'² − σ²) ε̂ + σ z (Song et al. 2021, eq. 12), σ = η (s'/s) √(s² − (a s'/a')²) (eq. 16, where
    the root is √(1 − a²/a'²), for any a and s). η = 0 is Euler's step of dx̄ = ε̂ dσ̄ in x̄ = x/a, σ̄ = s/a."""
    (a, s), (a_to, s_to) = now, to
    sigma = eta * s_to / s * sqrt(max(0.0, s**2 - (a * s_to / a_to) ** 2))
    x = a_to * x0 + sqrt(max(0.0, s_to**2 - sigma**2)) * eps
    return x + sigma * draw() if sigma and draw else x


def heun_correction(x: Tensor, eps: Tensor, eps_to: Tensor, now: Level, to: Level) -> Tensor:
    """Euler's step with the mean of both slopes, x̄' + (σ̄' − σ̄)(ε̂' − ε̂)/2 (Karras et al. 2022, algorithm 1, line 8).

    The first step of ``cosine`` leaps from σ̄ = 10⁴ to 10, and from ∞ at SNR 0, which no trapezoid spans: of 20 steps at
    T = 500, exact denoisers of unit variance end with 11.6. Where a' > 10 a, Euler's step, there exact to 1/(2σ̄'²),
    stands alone (1.004; every limit from 3 to 30 gives the same).
    """
    (a, s), (a_to, s_to) = now, to
    return x + 0.5 * a_to * (s_to / a_to - s / a) * (eps_to - eps)


def multistep(x: Tensor, x0: Tensor, before: Tensor, now: Level, to: Level, ratio: float) -> Tensor:
    """x' = (s'/s) x − a' (e⁻ʰ − 1) D, D = x̂₀ + (x̂₀ − x̂₀ of the step before)/(2r), 1/r = h/h_before = ``ratio`` (Lu et
    al. 2022, algorithm 2), where a' e⁻ʰ = a s'/s. A ratio of 0 is the first-order step of both ends."""
    (a, s), (a_to, s_to) = now, to
    return s_to / s * x + (a_to - a * s_to / s) * (x0 + 0.5 * ratio * (x0 - before))


def _log_step(now: Level, to: Level) -> float:
    """h = λ' − λ with λ = log a/s; ∞ from pure noise."""
    (a, s), (a_to, s_to) = now, to
    return log(a_to * s / (s_to * a)) if a else inf
