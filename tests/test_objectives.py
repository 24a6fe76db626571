"""Losses against a library's or a hand's answer."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from intaglio.objectives.contrastive import infonce, sigmoid_pairs
from intaglio.objectives.gaussian import clamp_log_variance, kl_to_standard, sample
from intaglio.objectives.image import l1_plus_mse
from intaglio.objectives.schedules import warmup_constant, warmup_cosine
from intaglio.objectives.text import caption_cross_entropy, token_nats


def test_gaussian_losses_agree_with_torch_distributions() -> None:
    mean, log_variance = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    q = Normal(mean, (0.5 * log_variance).exp())
    torch.testing.assert_close(kl_to_standard(mean, log_variance), kl_divergence(q, Normal(0.0, 1.0)).sum(-1))
    draw = sample(torch.full((20_000, 1), 3.0), torch.full((20_000, 1), math.log(4.0)), torch.randn(20_000, 1))
    assert abs(draw.mean() - 3) < 0.1
    assert abs(draw.std() - 2) < 0.1


def test_log_variance_stays_within_bounds_with_gradient() -> None:
    raw = torch.tensor([-1e4, -5.0, 0.0, 5.0, 1e4], requires_grad=True)
    bounded = clamp_log_variance(raw)
    assert bounded.min() >= -10
    assert bounded.max() <= 4
    bounded.sum().backward()
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()


def test_infonce_is_chance_without_and_zero_with_knowledge() -> None:
    same = F.normalize(torch.ones(16, 8), dim=-1)
    assert abs(infonce(same, same, torch.tensor(2.0)) - math.log(16)) < 1e-5
    eye = torch.eye(16)
    assert infonce(eye, eye, torch.tensor(5.0)) < 1e-5


def test_sigmoid_pairs_is_the_paper_s_sum() -> None:
    a, b = F.normalize(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    scale, bias, total = torch.tensor(1.5), torch.tensor(-2.0), 0.0
    for i in range(6):
        for j in range(6):
            sign = 1.0 if i == j else -1.0
            total += math.log(1 + math.exp(-sign * (math.exp(1.5) * float(a[i] @ b[j]) - 2.0)))
    assert abs(float(sigmoid_pairs(a, b, scale, bias)) - total / 6) < 1e-5


def test_caption_cross_entropy_leaves_padding_out() -> None:
    logits, targets = torch.randn(2, 5, 9), torch.tensor([[4, 5, 6, 0, 0], [7, 0, 0, 0, 0]])
    kept = targets != 0
    expected = F.cross_entropy(logits[kept], targets[kept])
    torch.testing.assert_close(caption_cross_entropy(logits, targets, pad=0), expected)
    nats = token_nats(logits, targets, pad=0)
    assert nats[~kept].abs().max() == 0
    torch.testing.assert_close(nats.sum() / kept.sum(), expected)


def test_image_loss_by_hand() -> None:
    assert abs(float(l1_plus_mse(torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, 3, 4, 4))) - 0.75) < 1e-6


def test_schedules_at_their_corners() -> None:
    shares = [warmup_cosine(s, 100, 10, 0.1) for s in range(100)]
    assert abs(shares[0] - 0.1) < 1e-12
    assert shares[9] == shares[10] == 1.0
    assert abs(shares[-1] - 0.1) < 1e-12
    assert all(a >= b for a, b in pairwise(shares[10:]))
    assert warmup_constant(0, 0) == 1.0
    assert warmup_constant(4, 10) == 0.5
