"""Instruments of latents and posteriors on distributions whose answer is known, and against a library's."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import linalg, special, stats
from sklearn.decomposition import PCA
from torch.distributions import Normal, kl_divergence

from intaglio.health.instruments import bottleneck, geometry, moments
from intaglio.history import NotMeasured, Reading

D = torch.float64
RANKS = (geometry.effective_rank, geometry.covariance_rank, geometry.rankme, geometry.participation_ratio)
SHAPES = (*RANKS, geometry.stable_rank, geometry.isoscore)


def normal(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread(eigenvalues, n=200):
    """n vectors of mean 0 whose covariance has exactly these eigenvalues, in no axis' direction."""
    d = len(eigenvalues)
    x = normal(n, d, seed=5)
    basis, turn = torch.linalg.qr(x - x.mean(0))[0], torch.linalg.qr(normal(d, d, seed=6))[0]
    return n**0.5 * basis * torch.as_tensor(eigenvalues, dtype=D).sqrt() @ turn


def repeated(instrument, shape, count=40):
    """The mean over fresh draws with its standard error and that of one, and the null."""
    found = [instrument(normal(*shape, seed=1 + s)) for s in range(count)]
    values = [r.value for r in found]
    assert {r.null for r in found} == {found[0].null}
    return np.mean(values), np.std(values) / count**0.5, np.std(values), found[0].null


# ranks and isotropy


@pytest.mark.parametrize("d", [2, 7, 40])
@pytest.mark.parametrize("r", [0.3, 0.9, 1 - 1e-9])
def test_ranks_of_a_geometric_spectrum_are_those_of_closed_form(r, d):
    x = 30 * spread(r ** torch.arange(d, dtype=D))

    def entropy(q):
        return math.log((1 - q**d) / (1 - q)) - math.log(q) * (q / (1 - q) - d * q**d / (1 - q**d))

    ratio = (1 - r**d) ** 2 * (1 - r**2) / ((1 - r) ** 2 * (1 - r ** (2 * d)))
    found = [instrument(x).value for instrument in SHAPES]
    ranks = [math.exp(entropy(q)) for q in (r**0.5, r, r**0.5)]
    assert found == pytest.approx([*ranks, ratio, (1 - r**d) / (1 - r), (ratio - 1) / (d - 1)], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 16, 32])
def test_k_even_directions_are_k(k):
    x, sampled = spread([1.0] * k + [0.0] * (32 - k)), normal(4000, k) @ torch.linalg.qr(normal(32, k))[0].T
    for instrument in SHAPES[:-1]:
        assert instrument(x).value == pytest.approx(k, rel=1e-5)
    assert geometry.isoscore(x).value == pytest.approx((k - 1) / 31, abs=1e-6)
    for instrument in RANKS:
        assert instrument(sampled).value == pytest.approx(k, rel=0.02)


@pytest.mark.parametrize(("n", "d"), [(8, 4), (16, 4), (32, 16), (64, 16), (128, 64), (200, 5), (1500, 20)])
@pytest.mark.parametrize("instrument", [*SHAPES, geometry.uniformity], ids=lambda f: f.__name__)
def test_isotropic_gaussians_are_at_their_null(instrument, n, d):
    mean, error, _, null = repeated(instrument, (n, d), 80 if n < 100 else 16)
    assert mean == pytest.approx(null, abs=4 * error + 2e-3 * abs(null))


def test_nulls_of_large_samples_are_those_of_the_same_ratio():
    """d · (1 + d/N)⁻¹ for the participation ratio, by the moments of Marchenko and Pastur, and their edge."""
    for n, d in ((4096, 2048), (50_000, 1000), (10**6, 512), (2000, 1)):
        found = geometry.gaussian_null("participation_ratio", n, d)
        assert found == pytest.approx(d / (1 + d / n), rel=0.005)
    assert geometry.gaussian_null("stable_rank", 16, 1) == 1
    for n, d in ((300, 100), (600, 300), (2000, 60), (60, 200)):
        assert geometry.gaussian_null("stable_rank", n, d) == pytest.approx(d / (1 + (d / n) ** 0.5) ** 2, rel=0.05)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_no_jitter_makes_a_line_isotropic(scale):
    line = normal(256, 1) * normal(16, seed=1) + 1e-6 * normal(256, 16, seed=2)
    for instrument in (*SHAPES[:-1], lambda x: geometry.lidar(torch.stack([x, x], 1))):
        assert instrument(scale * line).value == pytest.approx(1, abs=2e-4)
    assert geometry.isoscore(scale * line).value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("point", [torch.zeros(16), torch.ones(16), 1e-20 * torch.ones(16), normal(16) * 1e5])
def test_one_point_has_no_directions(point):
    same = point.expand(256, 16)
    for x in (same, same * (1 + 1e-9 * normal(256, 16))):  # and rounding has none
        for instrument in SHAPES:
            assert isinstance(instrument(x), NotMeasured)
        assert isinstance(geometry.lidar(x.reshape(128, 2, 16)), NotMeasured)


def test_a_near_point_is_seen_by_what_is_not_centred():
    """1e-6 of true noise about a point is isotropic, and nothing beside the point."""
    x = 1 + 1e-6 * normal(256, 16)
    assert geometry.rankme(x).value == pytest.approx(1, abs=1e-3)
    assert moments.varying_share(x).value == pytest.approx(1e-12, rel=0.1)
    assert geometry.uniformity(x).value == pytest.approx(0, abs=1e-9)
    assert moments.std(x).value == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize(("n", "d"), [(300, 40), (81, 40), (40, 90), (50, 50)])
def test_spectra_are_scikit_learn_s_and_numpy_s_whichever_product_is_the_smaller(n, d):
    x = normal(n, d) * torch.linspace(0.1, 3, d) + 2
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    found = geometry.spectrum(x).numpy()
    np.testing.assert_allclose(found, PCA().fit(x.numpy()).explained_variance_ * (n - 1) / n, atol=1e-10)
    np.testing.assert_allclose(geometry.spectrum(x, centred=False).numpy(), singular**2 / n, rtol=1e-9)
    assert geometry.stable_rank(x).value == pytest.approx(found.sum() / found.max())
    if n >= 2 * d:
        entropy = stats.entropy(np.sqrt(found)), stats.entropy(found), stats.entropy(singular)
        for instrument, h in zip(RANKS, entropy, strict=False):
            assert instrument(x).value == pytest.approx(math.exp(h))
        assert geometry.participation_ratio(x).value == pytest.approx(found.sum() ** 2 / (found**2).sum())
        most = 2 * (d - d**0.5)  # IsoScore, as its authors write it
        defect = np.linalg.norm(d**0.5 * found / np.linalg.norm(found) - 1) / math.sqrt(most)
        assert geometry.isoscore(x).value == pytest.approx(((d - defect**2 * most / 2) ** 2 / d - 1) / (d - 1))


def test_ranks_are_not_asked_of_fewer_than_two_vectors_a_dimension():
    for instrument in (*RANKS, geometry.isoscore):
        found = instrument(normal(31, 16))
        assert isinstance(found, NotMeasured)
        assert found.reason == "N too small: 31 vectors of 16 dimensions; it takes 32"
        assert isinstance(instrument(normal(32, 16)), Reading)
    assert geometry.lidar(normal(15, 2, 8)).reason.startswith("N too small: 15 items in 2 views")
    assert geometry.lidar(normal(16, 1, 8)).reason.startswith("N too small: 16 items in 1 views")
    assert isinstance(geometry.lidar(normal(16, 2, 8)), Reading)


# pairs and directions


def test_alignment_of_the_same_of_opposites_and_of_strangers():
    x = normal(100, 8) * normal(100, 1, seed=1).exp()
    assert [geometry.alignment(x, y).value for y in (7 * x, 1e-30 * x, -x)] == pytest.approx([0, 0, 4], abs=1e-12)
    turned = torch.stack([-x[:, 1], x[:, 0]], 1)
    assert geometry.alignment(x[:, :2], turned).value == pytest.approx(2)
    y = x + normal(100, 8, seed=2)
    found = geometry.alignment(x, y)
    u, v = F.normalize(x), F.normalize(y)
    squares = torch.cdist(u, v).square()
    assert found.value == pytest.approx(float(squares.diagonal().mean()))
    assert found.null == pytest.approx(float((squares.sum() - squares.trace()) / (100 * 99)))
    mean, error, _, _ = repeated(lambda x: Reading(geometry.alignment(*x.chunk(2)).value), (100, 4))
    assert mean == pytest.approx(2, abs=4 * error)
    for still, none in ((0 * x, 100), (x.index_fill(0, torch.tensor([7]), 0.0), 1)):
        for found in (geometry.alignment(still, still), geometry.alignment(x, still), geometry.uniformity(still)):
            assert found == NotMeasured(f"{none} of 100 vectors are 0 and have no direction")


@pytest.mark.parametrize("d", [1, 2, 3, 64, 500])
def test_uniformity_of_uniform_directions_of_a_simplex_and_of_poles(d):
    null = geometry.uniformity(normal(4, d)).null
    assert null == pytest.approx(math.log(special.hyp0f1(d / 2, 4)) - 4, abs=1e-12)
    for n in (20, 300):
        values = [math.exp(geometry.uniformity(normal(n, d, seed=1 + s)).value) for s in range(60)]
        assert np.mean(values) == pytest.approx(math.exp(null), abs=4 * np.std(values) / 60**0.5)
    assert geometry.uniformity(torch.eye(9) - 1 / 9).value == pytest.approx(-4 - 4 / 8)
    assert geometry.uniformity(torch.tensor([[3.0, 4.0], [-6.0, -8.0]])).value == pytest.approx(-8)


@pytest.mark.parametrize(("n", "v", "d"), [(100, 2, 5), (40, 4, 20), (300, 10, 8)])
def test_lidar_is_the_rank_of_generalised_eigenvalues(n, v, d):
    x = normal(n, 1, d) * torch.linspace(0.2, 2, d) + normal(n, v, d, seed=1) @ normal(d, d, seed=2)
    means = x.mean(1).numpy()
    off = (x.numpy() - means[:, None]).reshape(-1, d)
    values = linalg.eigh(np.cov(means.T), off.T @ off / (n * (v - 1)) + 1e-4 * np.eye(d), eigvals_only=True)
    found = geometry.lidar(x)
    assert found.value == pytest.approx(math.exp(stats.entropy(values)))
    mean, _, one, null = repeated(geometry.lidar, (n, v, d), 10)
    assert mean == pytest.approx(null, abs=5 * one)
    assert found.null == null
    for k in (1, 4, 16):  # the directions that tell items apart
        items = F.pad(100 * normal(2000, 1, k), (0, 16 - k)) + normal(2000, 3, 16, seed=1)
        assert geometry.lidar(items).value == pytest.approx(k, rel=0.02)


# moments


@pytest.mark.parametrize(("n", "d"), [(64, 1), (64, 4), (256, 64), (20, 300)])
def test_standard_normals_have_their_null_moments(n, d):
    for instrument in (moments.norm, moments.std):
        mean, error, _, null = repeated(instrument, (n, d))
        assert mean == pytest.approx(null, abs=4 * error + (4e-3 if instrument is moments.std else 0))
    cases = (moments.mean_shift, n, 1 / n), (moments.asymmetry, 40 * n, 6 / (40 * n)), (moments.asymmetry, 8, 36 / 99)
    for instrument, m, expected in cases:
        squares, error, _, _ = repeated(lambda x, f=instrument: Reading(f(x).value ** 2), (m, d), 20)
        assert instrument(normal(m, d)).null ** 2 == pytest.approx(expected, rel=0.02)
        assert squares == pytest.approx(expected, abs=4 * error + 0.01 * expected)


def test_moments_of_known_vectors():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.full((50, 4), -2.0)
    assert [moments.norm(x).value for x in (a, b)] == [2.5, 4]
    assert moments.std(a).value == pytest.approx(math.sqrt((4.5 + 8) / 2))
    assert moments.varying_share(a).value == pytest.approx(0.5)
    assert moments.varying_share(b).value == moments.varying_share(0 * b).value == moments.std(b).value == 0
    x = 3 * normal(4000, 8) + 6
    assert [moments.mean_shift(x).value, moments.std(x).value] == pytest.approx([2, 3], rel=0.02)
    assert moments.varying_share(x).value == pytest.approx(9 / 45, rel=0.05)
    assert isinstance(moments.mean_shift(0.1 + 1e-8 * normal(64, 8).float()), NotMeasured)  # which is rounding
    assert moments.norm(2000 * x.half()).value == pytest.approx(2000 * moments.norm(x).value, rel=1e-3)


@pytest.mark.parametrize("k", [1, 4, 32])
def test_the_asymmetry_of_chi_squares_is_known(k):
    x = normal(20_000, 6, k).square().sum(2)
    x[:, ::2] *= -5
    found = moments.asymmetry(100 + x)
    assert found.value == pytest.approx((8 / k) ** 0.5, rel=0.05)
    assert found.value == pytest.approx(np.sqrt((stats.skew(x.numpy()) ** 2).mean()), rel=1e-9)
    dead = torch.cat([x, torch.ones(20_000, 3)], 1)  # has no shape, and does not count
    assert moments.asymmetry(100 + dead).value == pytest.approx(found.value, rel=1e-9)
    assert isinstance(moments.asymmetry(x[:7]), NotMeasured)


def test_the_posterior_s_variance_lies_between_items_or_within_them():
    mean, noise = 2 * normal(5000, 3), torch.full((5000, 3), math.log(4 / 3))
    assert moments.between_share(mean, noise).value == pytest.approx(0.75, abs=0.01)
    assert moments.between_share(mean, noise - 40).value == pytest.approx(1)
    assert moments.between_share(torch.ones(50, 3), torch.zeros(50, 3)) == Reading(0.0, 0.0, 50)
    x, v = normal(40, 3, seed=1), normal(40, 3, seed=2)
    between, within = np.var(x.numpy(), axis=0, ddof=1).sum(), np.exp(v.numpy()).mean(0).sum()
    assert moments.between_share(x, v).value == pytest.approx(between / (between + within))


def test_active_units_vary_and_a_bias_accounts_for_its_part_of_the_second_moment():
    scales = torch.tensor([0.0, 0.05, 0.2, 1.0, 30.0])
    assert moments.active_units(normal(2000, 5) * scales + 9) == Reading(3.0, 0.0, 2000)
    assert moments.active_units(normal(2000, 5) * scales, 10.0).value == 1
    bias = torch.full((4,), 3.0)
    assert moments.bias_share(bias + normal(20_000, 4), bias).value == pytest.approx(0.9, abs=0.005)
    assert moments.bias_share(bias.expand(50, 4), bias) == Reading(1.0, 0.0, 50)
    assert moments.bias_share(normal(50, 4), torch.zeros(4)).value == 0
    assert moments.bias_share(normal(5000, 4), bias).value == pytest.approx(-9, rel=0.1)
    assert isinstance(moments.bias_share(torch.zeros(50, 4), bias), NotMeasured)
    assert moments.bias_share(normal(50, 4), bias * math.nan) == NotMeasured("the bias is not finite")


def test_the_clamped_are_counted_as_a_clamp_rounds():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, D):
        x = torch.tensor([-1, 0, 0.5, 1], dtype=dtype).expand(50, 4)
        assert moments.clamped_share(x.clamp(-0.3, 0.7), -0.3, 0.7) == Reading(0.5, 0.0, 50)
        assert [moments.clamped_share(x, *ends).value for ends in ((-2, 2), (-math.inf, 0.5))] == [0, 0.5]
    with pytest.raises(ValueError, match="a clamp from 1 to 1 holds no value"):
        moments.clamped_share(x, 1, 1)


def test_a_clamp_that_is_not_known_is_seen_by_the_bound_that_channels_share():
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    assert moments.cut_share(x) == Reading(0.0, 0.0, 20000)
    assert moments.cut_share(x.clamp(-1, 1)).value == pytest.approx(0.317, abs=0.01)
    x[0, :2000] = 9.0  # what one channel says of an empty patch
    assert moments.cut_share(x).value == 0
    assert isinstance(moments.cut_share(x[:1]), NotMeasured)


# KL bottlenecks


def posteriors(n=60, d=8):
    return normal(n, d), 0.7 * normal(n, d, seed=1) - 1


def test_the_kl_is_torch_s():
    mean, log_variance = posteriors()
    q = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(q, Normal(torch.zeros((), dtype=D), 1.0)).mean(0)
    torch.testing.assert_close(bottleneck.kl_per_dimension(mean, log_variance), expected)
    assert bottleneck.kl_nats(mean, log_variance).value == pytest.approx(float(expected.sum()))
    assert (bottleneck.kl_per_dimension(mean.half(), log_variance.half()) - expected).abs().max() < 1e-2
    assert not bottleneck.kl_per_dimension(mean.requires_grad_(), log_variance).requires_grad


@pytest.mark.parametrize(("n", "d"), [(2, 1), (64, 16), (500, 3)])
def test_a_posterior_that_is_the_prior_holds_nothing(n, d):
    zero = torch.zeros(n, d)
    assert bottleneck.kl_nats(zero, zero) == Reading(0.0, 0.0, n)
    assert bottleneck.mutual_information(zero, zero).value == pytest.approx(0, abs=1e-12)
    assert bottleneck.aggregate_nats(zero, zero).value == 0
    assert bottleneck.kl_charged(zero, zero, 0.25, d) == Reading(0.25 * d, 0.25 * d, n)
    assert bottleneck.groups_above_floor(zero, zero, 0.0, d) == Reading(0.0, 0.0, n)


def test_free_bits_are_by_group_and_by_mean_over_items():
    """KL is m²/2 at unit variance: 2 nats in the first group, 0.1 in the second, and items differ."""
    mean = torch.tensor([[2.0, 0.0, 0.2, 0.4], [0.0, 2.0, 0.4, 0.2]])
    flat = torch.zeros(2, 4)
    assert bottleneck.kl_per_dimension(mean, flat).tolist() == pytest.approx([1, 1, 0.05, 0.05])
    for floor, charged, above in ((0.05, 2.1, 1.0), (0.5, 2.5, 0.5), (3.0, 6.0, 0.0)):
        found = bottleneck.kl_charged(mean, flat, floor, 2)
        assert (found.value, found.null) == (pytest.approx(charged), 2 * floor)
        assert bottleneck.groups_above_floor(mean, flat, floor, 2) == Reading(above, 0.0, 2)
    for instrument in (bottleneck.kl_charged, bottleneck.groups_above_floor):
        with pytest.raises(ValueError, match="4 dimensions do not fall into 3 groups"):
            instrument(mean, flat, 0.5, 3)


def test_the_aggregate_posterior_is_compared_by_its_moments():
    centre, total = torch.tensor([0.0, 1.0, -3.0]), torch.tensor([1.0, 2.0, 0.1])
    expected = float(kl_divergence(Normal(centre, total.sqrt()), Normal(0.0, 1.0)).sum())
    for share in (0.0, 0.5, 0.99):  # of the variance that lies between items
        mean = centre + (share * total).sqrt() * normal(40_000, 3)
        noise = ((1 - share) * total).log().expand_as(mean)
        assert bottleneck.aggregate_nats(mean, noise).value == pytest.approx(expected, rel=0.02)
    sampled, error, _, null = repeated(lambda x: bottleneck.aggregate_nats(x, torch.full_like(x, -60)), (64, 64))
    assert sampled == pytest.approx(null, abs=4 * error + 0.01)
    fitted = 0.8 * normal(5000, 8), torch.full((5000, 8), math.log(1 - 0.64))
    assert bottleneck.aggregate_nats(*fitted).value < 0.01 < bottleneck.kl_nats(*fitted).value


def test_information_is_that_of_torch_s_densities_and_all_there_is_of_separated_posteriors():
    mean, log_variance = posteriors()
    q = Normal(mean, (0.5 * log_variance).exp())
    z = mean + normal(*mean.shape) * q.scale
    each = Normal(mean[None], q.scale[None]).log_prob(z[:, None]).sum(2)
    expected = (each.diagonal() - each.logsumexp(1) + math.log(60)).mean()
    assert bottleneck.mutual_information(mean, log_variance).value == pytest.approx(float(expected))
    for n in (2, 10, 300):
        mean = 100 * torch.arange(n, dtype=D)[:, None].expand(n, 3)
        assert bottleneck.mutual_information(mean, torch.zeros(n, 3)).value == pytest.approx(math.log(n))


@pytest.mark.parametrize("log_variance", [-20, -30, -40, -100, -300])
@pytest.mark.parametrize("place", [0, 1000])
def test_information_is_at_most_ln_n_however_narrow_posteriors_are(place, log_variance):
    mean = place + 10 * normal(50, 8)
    narrow = torch.full_like(mean, log_variance)
    assert math.log(50) - 1e-12 < bottleneck.mutual_information(mean, narrow).value <= math.log(50)
    mean[1::2] = mean[::2]
    assert bottleneck.mutual_information(mean, narrow).value == pytest.approx(math.log(25))


def test_what_leaves_float64_is_not_measured():
    wide = torch.zeros(50, 8).index_fill(0, torch.tensor([4]), 800.0)
    of = [ONE[n] for n in ("kl_nats, log-variance", "kl_charged", "aggregate_nats", "mutual_information")]
    for instrument in (*of, ONE["between_share"], lambda x: bottleneck.noise_ratio(x, x, x)):
        for found in (instrument(wide), instrument(-wide)):
            assert found.reason.startswith("1 of 50 log-variances are beyond ±300")
    assert bottleneck.tie_rate(torch.full((4, 5), math.nan)).reason.startswith("20 of 20 scores are NaN")
    assert bottleneck.tie_rate(torch.tensor([[1, 1, 2], [1, 2, 3]])).value == pytest.approx(1 / 6)


def test_the_entropy_of_answers_is_that_of_their_distribution():
    p, by = np.array([0.5, 0.25, 0.125, 0.125]), np.random.default_rng(0)
    found = [bottleneck.entropy_nats(torch.from_numpy(by.choice(4, 60, p=p))).value for _ in range(400)]
    assert np.mean(found) == pytest.approx(stats.entropy(p), abs=0.01)  # where the plug-in is 0.025 short
    assert bottleneck.entropy_nats(torch.tensor([7, -1] * 50)) == Reading(math.log(2) + 1 / 200, math.log(2), 100)
    assert bottleneck.entropy_nats(torch.full((9,), 3, dtype=torch.uint8)) == Reading(0.0, 0.0, 9)
    assert isinstance(bottleneck.entropy_nats(torch.tensor([3])), NotMeasured)
    for bad in (torch.zeros(9), torch.zeros(3, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="give an integer an item"):
            bottleneck.entropy_nats(bad)


@pytest.mark.parametrize(("power", "d"), [(0.05, 2), (0.5, 2), (1.0, 1)])
def test_information_of_a_gaussian_channel_is_shannon_s(power, d):
    mean, flat = power**0.5 * normal(3000, d, seed=3), torch.zeros(3000, d)
    found = bottleneck.mutual_information(mean, flat).value
    assert found == pytest.approx(0.5 * d * math.log1p(power), abs=4 * (power * d / 3000) ** 0.5)


# what all of them refuse or abstain from

PLAIN = (geometry.uniformity, moments.norm, moments.std, moments.mean_shift, moments.asymmetry, moments.varying_share)
ONE = {f.__name__: f for f in (*SHAPES, *PLAIN, moments.active_units)} | {
    "alignment": lambda x: geometry.alignment(x, x.flip(0)),
    "lidar": lambda x: geometry.lidar(torch.stack([x, x.flip(0)], 1)),
    "between_share": lambda x: moments.between_share(x, x),
    "clamped_share": lambda x: moments.clamped_share(x, -0.5, 0.5),
    "bias_share": lambda x: moments.bias_share(x, torch.full((8,), 0.5)),
    "kl_nats": lambda x: bottleneck.kl_nats(x, x),
    "kl_nats, log-variance": lambda x: bottleneck.kl_nats(torch.zeros(len(x), 8), x),
    "kl_charged": lambda x: bottleneck.kl_charged(x, x, 0.1, 4),
    "groups_above_floor": lambda x: bottleneck.groups_above_floor(x, x, 0.3, 4),
    "aggregate_nats": lambda x: bottleneck.aggregate_nats(x, x),
    "mutual_information": lambda x: bottleneck.mutual_information(x, x),
}
SINGLE = {"norm", "clamped_share", "kl_nats", "kl_nats, log-variance", "kl_charged", "groups_above_floor"}
"""What one item is enough for."""
OF_A_POINT = dict.fromkeys(("alignment", "uniformity", "std", "varying_share", "active_units", "between_share"), 0.0)
OF_A_POINT |= {"mutual_information": 0.0, "clamped_share": 1.0, "norm": 3 * 8**0.5, "bias_share": 1 - 2.5**2 / 9}
"""Of 3 in all eight dimensions; else it is not measured, or a KL, which knows no collapse."""

GOOD = (normal(32, 8, seed=9) / 2).float()


@pytest.mark.parametrize("name", ONE)
def test_precision_layout_and_gradients_do_not_matter_and_nothing_is_changed(name):
    instrument, good = ONE[name], GOOD.clone()
    whole = instrument(good)
    assert isinstance(whole, Reading)
    for dtype, error in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        assert instrument(good.to(dtype)).value == pytest.approx(whole.value, rel=error, abs=error)
        assert instrument(good.to(dtype)) == instrument(good.to(dtype).double())  # which is what is computed in
    assert instrument(good.T.contiguous().T).value == pytest.approx(whole.value, rel=1e-9)
    x, state = good.clone().requires_grad_(), torch.random.get_rng_state()
    x.grad = torch.ones_like(x)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert instrument(x) == whole
    assert torch.equal(x, good)
    assert (x.grad == 1).all()
    assert x._version == 0
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ONE)
def test_what_is_not_finite_is_counted_and_one_item_is_too_few(name):
    for bad in (math.nan, math.inf, -math.inf):
        x = GOOD.clone()
        x[3, 1] = x[3, 2] = x[20, 7] = bad
        found = ONE[name](x)
        assert isinstance(found, NotMeasured)
        assert "not finite" in found.reason
        assert found.reason.startswith("4 of 32 " if name == "lidar" else "2 of 32 ")
    found = ONE[name](GOOD[:1])
    assert found.n == 1 if name in SINGLE else found.reason.startswith("N too small: ")
    assert isinstance(ONE[name](GOOD[:0]), NotMeasured)


@pytest.mark.parametrize("name", [n for n in ONE if not n.startswith(("kl_", "groups", "aggregate"))])
def test_a_point_is_never_a_healthy_cloud(name):
    found = ONE[name](torch.full((32, 8), 3.0))
    if name in OF_A_POINT:
        assert found.value == pytest.approx(OF_A_POINT[name], abs=1e-6)
    else:
        assert "the same" in found.reason


@pytest.mark.parametrize("name", ONE)
def test_numbers_that_are_no_vectors_are_named(name):
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=str(dtype)):
            ONE[name](torch.ones(32, 8, dtype=dtype))
    with pytest.raises(ValueError, match=r"\(N, (V, )?d\)"):
        ONE[name](GOOD[0, :1])


def test_tensors_that_do_not_belong_together_are_named():
    kl, bias = bottleneck.kl_nats, (lambda a, b: moments.bias_share(a, b[0]))
    cases = (kl, (7, 2)), (kl, (5, 1)), (geometry.alignment, (10, 2)), (moments.between_share, (9, 3)), (bias, (5, 1))
    for instrument, shape in (*cases, (lambda a, b: bottleneck.noise_ratio(a, b, b), (5, 1))):
        with pytest.raises(ValueError, match=rf"\(5, 2\) and {re.escape(str(shape))};|has 1 numbers, .* 2 dimensions"):
            instrument(normal(5, 2), normal(*shape))
