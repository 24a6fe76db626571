"""Classifier-free guidance: its formula, its cost, and where it leads."""

from math import inf

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from intaglio.objectives.diffusion import NoiseSchedule, target
from intaglio.sampling.diffusion import Sampler, draw_noise, generators_of, sample
from intaglio.sampling.guidance import Guidance, guided


def conditional(x_BCHW, t_B, label_B):
    return x_BCHW * 0.1 + label_B.view(-1, 1, 1, 1) * torch.linspace(-1, 2, x_BCHW.shape[-1])


def test_guidance_by_its_formula_in_one_call():
    calls, schedule = [], NoiseSchedule("cosine", 500)
    x, t, label, null = torch.randn(2, 3, 4, 4), torch.full((2,), 250), torch.tensor([1.0, 2.0]), torch.zeros(2)

    def network_(x_BCHW, t_B, label_B):
        calls.append(len(x_BCHW))
        return conditional(x_BCHW, t_B, label_B)

    def under(t_B=t, **settings):
        calls.clear()
        return guided(network_, (label,), (null,), Guidance(**settings), schedule)(x, t_B), list(calls)

    y_c, y_u = conditional(x, t, label), conditional(x, t, null)
    for weight, expected, asked in ((1.0, y_c, [2]), (0.0, y_u, [2]), (3.0, y_u + 3 * (y_c - y_u), [4])):
        found, calls_made = under(weight=weight)
        torch.testing.assert_close(found, expected)
        assert calls_made == asked
    found, _ = under(weight=5.0, rescale=0.7)
    torch.testing.assert_close(found, rescale_noise_cfg(y_u + 5 * (y_c - y_u), y_c, 0.7))
    found, _ = under(weight=5.0, rescale=1.0)
    torch.testing.assert_close(found.std((1, 2, 3)), y_c.std((1, 2, 3)))
    middle = schedule.log_snr()[250].item()
    inside = {"interval": (middle - 1, middle + 1)}, {"interval": (200, 250), "interval_in": "t"}
    outside = {"interval": (middle + 1, inf)}, {"interval": (251, 499), "interval_in": "t"}
    for settings in inside:
        assert under(weight=3.0, **settings)[1] == [4]
    for settings in outside:
        found, calls_made = under(weight=3.0, **settings)
        assert calls_made == [2]  # half the cost: the condition alone
        assert torch.equal(found, y_c)


def test_guided_sampling_moves_towards_the_condition():
    """Of N(c, 1), with a null of mean 0: guidance w draws N(wc, 1), for the score is linear in the mean."""
    schedule, noise = NoiseSchedule("cosine", 500), draw_noise(generators_of(range(4)), (1, 16, 16), "cpu")

    def network_(x_BCHW, t_B, mean_B):
        a, s = schedule.level(int(t_B[0]))
        x0 = a * x_BCHW + s**2 * mean_B.view(-1, 1, 1, 1)
        return target("v", x0, (x_BCHW - a * x0) / s, a, s)

    condition, null = (torch.full((4,), 0.5),), (torch.zeros(4),)
    for weight in (0.0, 1.0, 3.0):
        denoise = guided(network_, condition, null, Guidance(weight), schedule)
        images = sample(denoise, noise, schedule, "v", Sampler("dpm-solver++", 50))
        torch.testing.assert_close(images, noise + 0.5 * weight, rtol=0, atol=0.01)


def test_mistakes_are_refused_with_what_to_do():
    for mistake, message in (
        (lambda: Guidance(-1.0), r"guidance.weight is -1.0"),
        (lambda: Guidance(3.0, rescale=2.0), r"guidance.rescale is 2.0; it must be between 0"),
        (lambda: Guidance(3.0, interval=(2.0, -2.0)), r"its first end must be the lower one"),
        (lambda: Guidance(3.0, interval_in="sigma"), r"choose log-snr or t"),
        (lambda: Guidance(1.0, rescale=0.7), r"no effect at weight 1; remove them"),
    ):
        with pytest.raises(ValueError, match=message):
            mistake()
