"""Noise schedules and samplers of diffusion against analytic Gaussians and against diffusers.

The oracle's own schedule is float32, ours float64: what they share agrees to float32's rounding.
"""

import json
from dataclasses import asdict
from math import exp, inf, log

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from diffusers.training_utils import compute_snr

from intaglio.objectives.diffusion import (
    NoiseSchedule,
    clean_and_noise,
    diffusion_loss,
    log_snr_bins,
    log_snr_weights,
    loss_by_bin,
    min_snr_weights,
    target,
)
from intaglio.sampling import diffusion
from intaglio.sampling.diffusion import Sampler, draw_noise, generators_of, sample, timesteps, trace

PREDICTIONS = ("v", "epsilon", "x0", "flow")
SCHEDULES = [
    *(NoiseSchedule(kind, 1000) for kind in ("cosine", "linear", "scaled-linear", "straight")),
    *(NoiseSchedule(kind, 1000, zero_terminal_snr=True) for kind in ("cosine", "linear", "scaled-linear")),
]
ORACLE = {  # beta_schedule, beta_start, beta_end at T = 1000
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
    "linear": ("linear", 1e-4, 0.02),
    "scaled-linear": ("scaled_linear", 0.00085, 0.012),
}
ORACLE_PREDICTION = {"v": "v_prediction", "epsilon": "epsilon", "x0": "sample"}
MEAN = torch.tensor([1.5, -1.0, 0.5]).double()
ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.3, 0.2, 0.2]]).double()
COVARIANCE = ROOT @ ROOT.T


def name_of(schedule):
    return schedule.kind + "-zero" * schedule.zero_terminal_snr


def network(schedule, prediction, clean):
    """A float32 network whose x̂₀ is ``clean(x, a, s)``: it computes in float64 and rounds its output alone."""

    def denoise(x_BCHW, t_B):
        a, s = schedule.level(int(t_B[0]))
        x = x_BCHW.double()
        x0 = clean(x, a, s)
        return target(prediction, x0, (x - a * x0) / s, a, s).float()

    return denoise


def gaussian(mean=MEAN, covariance=COVARIANCE):
    """E[x₀|x_t] of N(μ, Σ) over channels, each pixel a sample of its own."""

    def clean(x, a, s):
        total = a**2 * covariance + s**2 * torch.eye(len(mean)).double()
        gain = a * covariance @ torch.linalg.inv(total)
        return mean[:, None, None] + torch.einsum("cd,bdhw->bchw", gain, x - a * mean[:, None, None])

    return clean


def curved(x, a, s):
    """No data's denoiser, but bent: its slope is bounded, so that rounding does not grow from step to step."""
    return torch.tanh(a * x / (s**2 + 0.5 * a**2))


def outcome(schedule, prediction, sampler, clean, mean=MEAN, covariance=COVARIANCE, side=160):
    """Mean and covariance of samples. Without noise of its own a sampler of a Gaussian is affine, x ↦ Ax + b, and gives
    them exactly from x_T ~ N(a_T μ, a_T² Σ + s_T²); with it they are those of the side² pixels of one image."""
    n, denoise = len(mean), network(schedule, prediction, clean)
    a, s = schedule.level(schedule.steps - 1)
    if sampler.method == "ddpm":
        start, generators = draw_noise(generators_of([1]), (n, side, side), "cpu"), generators_of([2])
        root = torch.linalg.cholesky(a**2 * covariance + s**2 * torch.eye(n).double())
        start = (torch.einsum("cd,bdhw->bchw", root, start.double()) + a * mean[:, None, None]).float()
        pixels = sample(denoise, start, schedule, prediction, sampler, generators)[0].flatten(1).double()
        return pixels.mean(1), pixels.cov()
    points = torch.cat([torch.eye(n), torch.zeros(n, 1)], 1)[None, :, None]
    ends = sample(denoise, points, schedule, prediction, sampler)[0, :, 0].double()
    matrix, shift = ends[:, :n] - ends[:, n:], ends[:, n]
    return a * matrix @ mean + shift, matrix @ (a**2 * covariance + s**2 * torch.eye(n).double()) @ matrix.T


def off(result, mean=MEAN, covariance=COVARIANCE):
    return (result[0] - mean).abs().max().item(), (result[1] - covariance).abs().max().item()


# Schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [500, 1000])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", ORACLE)
def test_schedules_are_those_of_diffusers(kind, zero, steps):
    ours = NoiseSchedule(kind, steps, zero)
    theirs = oracle(DDIMScheduler, kind, "v", steps, rescale_betas_zero_snr=zero)
    a_T, s_T = ours.signal_and_noise()
    assert a_T.dtype == torch.float64
    torch.testing.assert_close(a_T.square() + s_T.square(), torch.ones(steps).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), a_T.square(), rtol=5e-5, atol=1e-12)
    betas_T = 1 - (a_T / torch.cat([torch.ones(1), a_T[:-1]])).square()
    torch.testing.assert_close(theirs.betas.double(), betas_T, rtol=0, atol=1e-5)
    if not zero:
        torch.testing.assert_close(compute_snr(theirs, torch.arange(steps)).double().log(), ours.log_snr(), rtol=1e-3,
                                   atol=1e-4)  # fmt: skip


def test_the_end_of_a_schedule():
    assert NoiseSchedule("cosine", 500).terminal_snr() < 1e-8
    assert NoiseSchedule("scaled-linear", 1000).terminal_snr() == pytest.approx(0.004682, rel=1e-4)  # Lin et al.
    for schedule in SCHEDULES:
        assert (schedule.log_snr().diff() < 0).all()
        ends_at_zero = schedule.zero_terminal_snr or schedule.kind == "straight"
        assert (schedule.terminal_snr() == 0) == ends_at_zero == (schedule.log_snr()[-1] == -inf)
        assert schedule.level(0)[1] > 0
        assert NoiseSchedule(**json.loads(json.dumps(asdict(schedule)))) == schedule
        # The same share of the way has the same SNR at another T.
        at = (99, 199, 299, 399)
        other = NoiseSchedule(schedule.kind, 500, schedule.zero_terminal_snr).log_snr()
        apart = max(abs(schedule.log_snr()[2 * t + 1] - other[t]).item() for t in at)
        assert apart < 0.05, name_of(schedule)


# Targets, inversions, weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversions_round_trip(prediction):
    """In float32, as far as the level lets them: ε̂ from x₀ loses a/s, x̂₀ from ε s/a, v and flow nothing."""
    x0, noise = draw_noise(generators_of([0, 1]), (1000, 3, 2), "cpu")
    for schedule in SCHEDULES:
        t = torch.arange(999)  # every level with signal left
        a, s = schedule.at(t, x0[t])
        assert a.dtype == torch.float32
        assert a.shape == (999, 1, 1)
        back = clean_and_noise(prediction, target(prediction, x0[t], noise[t], a, s), a * x0[t] + s * noise[t], a, s)
        lost = {"epsilon": (s / a, 0 * a), "x0": (0 * a, a / s)}.get(prediction, (0 * a, 0 * a))
        for found, true, amplified in zip(back, (x0[t], noise[t]), lost, strict=True):
            assert ((found - true).abs() <= 3e-6 * (1 + amplified)).all(), name_of(schedule)


def test_v_is_that_of_diffusers_and_flow_the_velocity_of_the_straight_path():
    x0, noise = draw_noise(generators_of([0, 1]), (4, 3, 2), "cpu")
    t = torch.tensor([0, 10, 500, 999])
    a, s = NoiseSchedule("linear", 1000).at(t, x0)
    theirs = oracle(DDPMScheduler, "linear", "v", 1000)
    torch.testing.assert_close(target("v", x0, noise, a, s), theirs.get_velocity(x0, noise, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a * x0 + s * noise, theirs.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5)
    a, s = NoiseSchedule("straight", 1000).at(torch.tensor([499, 500]), x0[:2])
    x_t = a * x0[:1] + s * noise[:1]
    torch.testing.assert_close((x_t[1:] - x_t[:1]) * 1000, target("flow", x0[:1], noise[:1], a, s), rtol=0, atol=1e-3)


def test_min_snr_weighs_the_error_of_x0_alike_for_every_prediction():
    schedule = NoiseSchedule("cosine", 1000)
    snr = schedule.log_snr().exp()
    torch.testing.assert_close(min_snr_weights(schedule, "x0"), snr.clamp_max(5))
    torch.testing.assert_close(min_snr_weights(schedule, "epsilon"), snr.clamp_max(5) / snr)
    torch.testing.assert_close(min_snr_weights(schedule, "v"), snr.clamp_max(5) / (snr + 1))
    torch.testing.assert_close(min_snr_weights(schedule, "flow"), snr.clamp_max(5) / (snr.sqrt() + 1).square())
    ends = min_snr_weights(NoiseSchedule("linear", 1000, zero_terminal_snr=True), "v")
    assert ends[-1] == 0
    assert ends[:-1].min() > 0


def test_bins_of_log_snr_share_the_weight():
    for schedule in SCHEDULES:
        bin_T, weight_T = log_snr_bins(schedule), log_snr_weights(schedule)
        assert bin_T[-1] == (schedule.terminal_snr() >= exp(-6))
        assert (bin_T.diff() <= 0).all()
        shares = bin_T.bincount(weight_T, minlength=8)
        torch.testing.assert_close(shares, shares.sum() * (shares > 0) / (shares > 0).sum())
        assert weight_T.mean().item() == pytest.approx(1)
    assert log_snr_bins(NoiseSchedule("straight", 1000))[[498, 499, 500]].tolist() == [4, 4, 3]  # SNR 1 at t = 499
    schedule = NoiseSchedule("cosine", 500)
    mean_K, count_K = loss_by_bin(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([498, 499, 0]), schedule)
    assert (mean_K[0], mean_K[7]) == (2, 7)
    assert count_K.tolist() == [2, 0, 0, 0, 0, 0, 0, 1]
    assert mean_K[1:7].isnan().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_zero_for_a_network_that_knows_the_image_and_one_for_blind_v(prediction):
    schedule = NoiseSchedule("cosine", 500)
    x0, noise = draw_noise(generators_of([0, 1]), (64, 3, 16, 16), "cpu")
    t_B = torch.full((64,), 250)
    knows = network(schedule, prediction, lambda x, a, s: x0.double())
    losses = diffusion_loss(knows, x0, noise, t_B, schedule, prediction)
    assert losses.shape == (64,)
    assert losses.max() < 1e-10
    blind = diffusion_loss(lambda x, t: torch.zeros_like(x), x0, noise, t_B, schedule, prediction)
    assert blind.mean().item() == pytest.approx(2.0 if prediction == "flow" else 1.0, rel=0.02)


# Samplers ------------------------------------------------------------------------------------------------------------

LIMITS = {  # error of a covariance whose largest entry is 1: 100 steps, and 250 of ddpm, whose pixels add ± .009
    Sampler("ddim", 100): 0.04,
    Sampler("heun", 100): 0.012,
    Sampler("dpm-solver++", 100): 0.012,
    Sampler("ddpm", 250): 0.05,
}


@pytest.mark.parametrize("sampler", LIMITS, ids=lambda sampler: sampler.method)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_every_sampler_reproduces_a_gaussian(schedule, sampler):
    sees = [p for p in PREDICTIONS if p != "epsilon" or schedule.terminal_snr() > 0]
    for prediction in ["v"] if sampler.method == "ddpm" and schedule.kind != "linear" else sees:
        mean, covariance = off(outcome(schedule, prediction, sampler, gaussian()))
        assert mean < (0.02 if sampler.method == "ddpm" else 2e-3), prediction
        assert covariance < LIMITS[sampler], prediction


@pytest.mark.parametrize("dimensions", [2, 4])
def test_gaussians_of_other_dimensions(dimensions):
    generator = torch.Generator().manual_seed(dimensions)
    root = torch.randn(dimensions, dimensions, generator=generator).double()
    mean, covariance = root[0], root @ root.T / root.square().sum(1).max()
    for sampler, limit in LIMITS.items():
        result = outcome(SCHEDULES[0], "v", sampler, gaussian(mean, covariance), mean, covariance)
        assert off(result, mean, covariance)[1] < limit, sampler


def test_orders_of_convergence():
    """Twice the steps: half the error of DDIM, a quarter of that of Heun and DPM-Solver++(2M)."""
    for schedule in (NoiseSchedule("cosine", 1000), NoiseSchedule("straight", 1000)):
        for method, least in (("ddim", 1.8), ("heun", 2.8), ("dpm-solver++", 2.3)):
            errors = [off(outcome(schedule, "v", Sampler(method, steps), gaussian()))[1] for steps in (50, 100)]
            assert errors[0] / errors[1] > least, (name_of(schedule), method, errors)


def test_unit_variance_stays_unit_variance():
    """At η = 0 as at η = 1, but for what 500 steps lose (by hand .995 and .990; ± .006 for 65,536 pixels); ancestral
    steps without their noise, which once passed for DDIM, end at almost nothing."""
    zero, one = torch.zeros(3).double(), torch.eye(3).double()
    for sampler in (Sampler("ddim", 500), Sampler("heun", 500), Sampler("dpm-solver++", 500), Sampler("ddpm", 500)):
        result = outcome(NoiseSchedule("cosine", 500), "v", sampler, gaussian(zero, one), zero, one, side=256)
        assert off(result, zero, one)[1] < (0.03 if sampler.method == "ddpm" else 0.006), sampler
    schedule, x = NoiseSchedule("cosine", 500), draw_noise(generators_of([0]), (1, 64, 64), "cpu")
    denoise = network(schedule, "v", gaussian(zero[:1], one[:1, :1]))
    levels = [*map(schedule.level, timesteps(schedule, Sampler(steps=500))), (1.0, 0.0)]
    for now, to, t in zip(levels, levels[1:], reversed(range(500)), strict=False):
        x0, eps = clean_and_noise("v", denoise(x, torch.tensor([t])), x, *now)
        x = diffusion.ddim_step(x0, eps, now, to, eta=1.0)
    assert x.var() < 1e-3


def test_heun_does_not_trust_its_trapezoid_in_the_leap_from_pure_noise(monkeypatch):
    zero, one = torch.zeros(1).double(), torch.eye(1).double()

    def variance():
        return outcome(NoiseSchedule("cosine", 500), "v", Sampler("heun", 20), gaussian(zero, one), zero, one)[1].item()

    assert variance() == pytest.approx(1.004, abs=1e-3)
    monkeypatch.setattr(diffusion, "_LEAP", inf)
    assert variance() == pytest.approx(11.6, abs=0.1)


# Against diffusers ---------------------------------------------------------------------------------------------------


of_diffusers_and_numpy = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # 0.42, 2.4


def oracle(scheduler, kind, prediction, steps, **options):
    beta, first, last = ORACLE[kind]
    return scheduler(num_train_timesteps=steps, beta_schedule=beta, beta_start=first * 1000 / steps,
                     beta_end=last * 1000 / steps, prediction_type=ORACLE_PREDICTION[prediction],
                     timestep_spacing="trailing", **options)  # fmt: skip


@of_diffusers_and_numpy
@pytest.mark.parametrize("prediction", ORACLE_PREDICTION)
@pytest.mark.parametrize("kind", ORACLE)
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        (Sampler("ddpm", 50), DDPMScheduler),
        (Sampler("ddim", 50), DDIMScheduler),
        (Sampler("ddim", 50, eta=0.5), DDIMScheduler),
        (Sampler("dpm-solver++", 50), DPMSolverMultistepScheduler),
    ],
    ids=["ddpm", "ddim", "ddim-eta", "dpm-solver++"],
)
def test_samplers_agree_with_diffusers_step_by_step(sampler, scheduler, kind, prediction):
    """With the same noise, each of 50 steps from the same x: to 5e-6."""
    schedule = NoiseSchedule(kind, 1000)
    denoise, noise = network(schedule, prediction, curved), draw_noise(generators_of([3]), (3, 8, 8), "cpu")
    theirs = oracle(scheduler, kind, prediction, 1000, **({"clip_sample": False} if sampler.method[:2] == "dd" else {}))
    theirs.set_timesteps(50)
    drawn = {} if sampler.method == "dpm-solver++" else {"generator": generators_of([4])[0]}
    drawn |= {"eta": sampler.eta} if sampler.eta else {}
    x = noise
    steps = list(trace(denoise, noise, schedule, prediction, sampler, generators_of([4])))
    assert [step.t for step in steps] == theirs.timesteps.tolist()
    # ε at the end of cosine: x̂₀ is (x − sε)/a with a = 5e-5, which leaves two digits of float32.
    blunt = prediction == "epsilon" and kind == "cosine"
    for i, step in enumerate(steps):
        found = theirs.step(denoise(x, torch.tensor([step.t])), step.t, x, **drawn).prev_sample
        torch.testing.assert_close(step.x, found, rtol=0, atol=1e-3 if blunt and i < 2 else 5e-6)
        x = step.x


@of_diffusers_and_numpy
@pytest.mark.parametrize("prediction", ORACLE_PREDICTION)
@pytest.mark.parametrize("kind", ["linear", "scaled-linear"])
def test_heun_agrees_with_diffusers_step_by_step(kind, prediction):
    """Theirs runs in x̄ = x/a, ours in x: equal to 1e-5 after the scaling. They part on cosine, whose first step they
    take by the trapezoid and we by Euler."""
    schedule = NoiseSchedule(kind, 1000)
    denoise, noise = network(schedule, prediction, curved), draw_noise(generators_of([3]), (3, 8, 8), "cpu")
    theirs = oracle(HeunDiscreteScheduler, kind, prediction, 1000)
    theirs.set_timesteps(50)
    steps = trace(denoise, noise, schedule, prediction, Sampler("heun", 50))
    x, signal = noise / schedule.level(999)[0], [schedule.level(t)[0] for t in timesteps(schedule, Sampler("heun", 50))]
    for i, t in enumerate(theirs.timesteps):
        predicted = denoise(theirs.scale_model_input(x, t), t.long()[None])
        x = theirs.step(predicted, t, x).prev_sample
        if i % 2 == 0 and i < 98:
            continue  # the first half of a step
        torch.testing.assert_close(next(steps).x, x * [*signal[1:], 1.0][i // 2], rtol=0, atol=1e-5)
    assert next(steps, None) is None


def test_ddim_agrees_with_diffusers_at_zero_terminal_snr():
    schedule = NoiseSchedule("scaled-linear", 1000, zero_terminal_snr=True)
    denoise, noise = network(schedule, "v", curved), draw_noise(generators_of([3]), (3, 8, 8), "cpu")
    theirs = oracle(DDIMScheduler, "scaled-linear", "v", 1000, clip_sample=False, rescale_betas_zero_snr=True)
    theirs.set_timesteps(50)
    x = noise
    for step in trace(denoise, noise, schedule, "v", Sampler("ddim", 50)):
        x = theirs.step(denoise(x, torch.tensor([step.t])), step.t, x).prev_sample
        torch.testing.assert_close(step.x, x, rtol=0, atol=2e-5)


def test_timesteps_are_those_of_diffusers():
    for spacing in ("trailing", "linspace", "leading"):
        for steps in (1, 7, 20, 50, 333, 1000):
            theirs = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
            theirs.set_timesteps(steps)
            ours = timesteps(NoiseSchedule("cosine", 1000), Sampler("ddim", steps, spacing=spacing))
            if (spacing, steps) != ("linspace", 1):  # theirs is t = 0 alone, which sees no noise
                assert ours == theirs.timesteps.tolist(), (spacing, steps)
    assert timesteps(NoiseSchedule(), Sampler(steps=4), start=7) == [7, 5, 3, 1]


# Seeds and steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddpm", "ddim", "heun", "dpm-solver++"])
def test_a_seed_gives_the_same_image_in_any_batch(method):
    schedule, sampler, seeds = NoiseSchedule("cosine", 500), Sampler(method, 10), [7, 1, 5, 9]

    def images(seeds):
        generators = generators_of(seeds)
        noise = draw_noise(generators, (3, 5, 7), "cpu")
        return sample(network(schedule, "v", curved), noise, schedule, "v", sampler, generators)

    together = images(seeds)
    assert torch.equal(together, torch.cat([images([seed]) for seed in seeds]))
    assert torch.equal(together, torch.cat([images(seeds[:3]), images(seeds[3:])]))
    assert torch.equal(together.flip(0), images(seeds[::-1]))
    assert not torch.equal(together[0], together[1])


def test_the_network_is_asked_once_a_step_and_twice_by_heun():
    asked = []

    def denoise(x, t):
        asked.append(t.tolist())
        return torch.zeros_like(x)

    for method, calls in (("ddim", 10), ("dpm-solver++", 10), ("heun", 18)):
        asked.clear()
        sample(denoise, torch.randn(2, 1, 2, 2), NoiseSchedule(), "v", Sampler(method, 10))
        assert len(asked) == calls  # of heun, neither the leap from pure noise nor the last step is corrected
        assert asked[0] == [499, 499]


def test_from_a_noised_image_back_to_it():
    schedule = NoiseSchedule("cosine", 500)
    x0, noise = draw_noise(generators_of([0, 1]), (1, 3, 4, 4), "cpu")
    a, s = schedule.level(300)
    knows = network(schedule, "v", lambda x, a, s: x0.double())
    for method in ("ddpm", "ddim", "heun", "dpm-solver++"):
        steps = list(trace(knows, a * x0 + s * noise, schedule, "v", Sampler(method, 5), generators_of([2]), start=300))
        assert steps[0].t == 300
        torch.testing.assert_close(steps[-1].x, x0, rtol=0, atol=1e-5)


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_mistakes_are_refused_with_what_to_do():
    schedule, noise = NoiseSchedule("cosine", 500), torch.zeros(2, 1, 2, 2)
    blind = NoiseSchedule("linear", 500, zero_terminal_snr=True)

    def run(sampler=Sampler(), schedule=schedule, prediction="v", **options):  # noqa: B008
        return sample(lambda x, t: x, noise, schedule, prediction, sampler, **options)

    for mistake, message in (
        (lambda: schedule.refuse(700), r"t is 700.* 500 noise levels t = 0 … 499; choose one of these"),
        (lambda: schedule.level(-1), r"t is -1"),
        (lambda: run(start=500), r"t is 500"),
        (lambda: run(Sampler(steps=501)), r"501 steps .* t = 499 and 0; take at most 500"),
        (lambda: run(start=9), r"50 steps .* t = 9 and 0; take at most 10"),
        (lambda: run(Sampler("ddpm")), r"eta is 1\.0: 2 images need as many generators, not 0"),
        (lambda: run(schedule=blind, prediction="epsilon"), r"t = 499 .*SNR 0.* set the prediction to v, x0 or flow"),
        (lambda: min_snr_weights(blind, "epsilon"), r"SNR 0"),
        (lambda: run(prediction="noise"), r"prediction is 'noise'; choose v, epsilon, x0, flow"),
        (lambda: NoiseSchedule("sigmoid"), r"schedule.kind is 'sigmoid'; choose cosine, linear"),
        (lambda: NoiseSchedule("linear", 20), r"schedule.steps is 20; linear needs at least 21"),
        (lambda: NoiseSchedule("straight", 500, True), r"zero_terminal_snr has no effect on straight.*remove it"),
        (lambda: Sampler("euler"), r"sampler.method is 'euler'; choose ddpm, ddim, heun, dpm-solver\+\+"),
        (lambda: Sampler("heun", eta=0.5), r"sampler.eta has no effect with 'heun'; remove it or choose ddpm"),
        (lambda: Sampler("ddim", eta=1.5), r"sampler.eta is 1.5; it must be between 0 \(DDIM\) and 1"),
        (lambda: Sampler(steps=0), r"sampler.steps is 0"),
        (lambda: Sampler(spacing="karras"), r"sampler.spacing is 'karras'; choose trailing"),
    ):
        with pytest.raises(ValueError, match=message):
            mistake()
    assert NoiseSchedule("linear", 21).log_snr().isfinite().all()
    assert NoiseSchedule("scaled-linear", 13).log_snr().isfinite().all()
    assert NoiseSchedule("linear", 1000).log_snr()[0] == pytest.approx(log((1 - 1e-4) / 1e-4))
