"""A Gaussian that a sampler must draw: its exact denoiser is known, so what is off is the sampler's own."""

from math import sqrt

from torch import Tensor

from ..objectives.diffusion import NoiseSchedule, Prediction, target
from .diffusion import Sampler, draw_noise, generators_of, sample

IMAGES, SIDE = 4, 128


def moments(
    schedule: NoiseSchedule, prediction: Prediction, sampler: Sampler, variance: float, mean: float
) -> tuple[float, float]:
    """How far the mean of what is drawn is from ``mean``, and its standard deviation, of N(``mean``, ``variance``).

    E[x₀ | x] = μ + aσ²(x − aμ)/(a²σ² + s²) is the denoiser, and the start is drawn from the marginal at T − 1, whatever
    signal is left there. From 65,536 numbers, standardised: deterministic samplers give their own error, ancestral ones
    with another .5 %.
    """

    def denoise(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        a, s = schedule.level(int(t_B[0]))
        x0 = mean + a * variance / (a**2 * variance + s**2) * (x_BCHW - a * mean)
        return target(prediction, x0, (x_BCHW - a * x0) / s, a, s)

    generators = generators_of(range(IMAGES))
    noise = draw_noise(generators, (1, SIDE, SIDE), "cpu").double()
    noise = (noise - noise.mean()) / noise.std()
    a, s = schedule.level(schedule.steps - 1)
    start = a * mean + sqrt(a**2 * variance + s**2) * noise
    drawn = sample(denoise, start, schedule, prediction, sampler, generators)
    return float(drawn.mean()) - mean, float(drawn.std())
