"""Instruments of learning on cases whose answer is known, and against the published formula or a library."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score
from torch import nn

from intaglio.health.instruments import codebook, contrastive, gradients, normality
from intaglio.history import NotMeasured, Reading
from intaglio.objectives import sigreg as ours
from intaglio.objectives.contrastive import infonce


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slices(width, count=64, seed=7):
    return ours.directions(width, count, torch.Generator().manual_seed(seed))


def published(x, a, knots=17):
    """SIGReg as its authors' minimal code writes it, every knot of every slice at once."""
    t = torch.linspace(0, 3, knots, dtype=x.dtype)
    weights = torch.full_like(t, 2 * 3 / (knots - 1))
    weights[[0, -1]] /= 2
    phi = torch.exp(-t.square() / 2)
    x_t = (x @ a.to(x)).unsqueeze(-1) * t
    err = (x_t.cos().mean(0) - phi).square() + x_t.sin().mean(0).square()
    return ((err @ (weights * phi)) * len(x)).mean()


# SIGReg


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: 0.05 * x, lambda x: 4 * x + 1, F.relu, F.normalize], ids=range(5)
)
def test_sigreg_and_its_gradient_are_the_published_ones(change):
    x, a = change(normal(300, 24)).requires_grad_(), slices(24)
    (expected,) = torch.autograd.grad(published(x, a), x)
    value = ours.sigreg(x, a)
    (found,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(value, published(x, a), rtol=1e-12, atol=0)
    assert (found - expected).norm() < 1e-10 * expected.norm()
    single = x.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(ours.sigreg(single, a), single)
    assert (found - expected).norm() < 2e-5 * expected.norm()


def test_sigreg_s_gradient_is_that_of_finite_differences():
    x, a = normal(5, 3).requires_grad_(), slices(3, 4).double()
    assert torch.autograd.gradcheck(lambda x: ours.sigreg(3 * x, a), x)


def test_sigreg_draws_a_cloud_to_the_standard_normal():
    x, generator = (0.1 * normal(256, 4) + 2).requires_grad_(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([x], lr=3)
    for _ in range(300):
        optimizer.zero_grad()
        ours.sigreg(x, ours.directions(4, 32, generator)).backward()
        optimizer.step()
    x = x.detach()
    assert x.mean(0).abs().max() < 0.05
    torch.testing.assert_close(x.T.cov(), torch.eye(4, dtype=x.dtype), rtol=0, atol=0.1)


def test_sigreg_of_half_precision_is_computed_in_single():
    x, a = normal(64, 8).bfloat16().requires_grad_(), slices(8)
    with torch.autocast("cpu", torch.bfloat16):
        value = ours.sigreg(x, a)
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), published(x.double(), a), rtol=1e-5, atol=0)


def test_sigreg_over_parts_of_a_batch_is_that_of_the_whole():
    x, a = normal(120, 6), slices(6).double()
    parts = [ours.characteristic(ours.STEP * (part @ a).T) for part in x.split(40)]
    cos, sin = (torch.stack(p).mean(0) for p in zip(*parts, strict=True))
    phi, weight = ours.quadrature()
    whole = len(x) * (weight @ ((cos - phi[:, None]).square() + sin.square())).mean()
    torch.testing.assert_close(whole, ours.sigreg(x, a))


def test_directions_are_unit_and_uniform():
    a = slices(5, 20_000)
    torch.testing.assert_close(a.norm(dim=0), torch.ones(20_000))
    torch.testing.assert_close(a @ a.T / 20_000, torch.eye(5) / 5, rtol=0, atol=0.01)
    assert torch.equal(slices(5), slices(5))


# normality


def test_the_null_is_the_mean_over_standard_normal_batches_of_any_size():
    for n in (8, 200):
        found = [normality.normality(normal(n, 16, seed=s)).value for s in range(300)]
        assert np.mean(found) == pytest.approx(ours.expected_sigreg(), abs=4 * np.std(found) / 300**0.5)
    whole = math.sqrt(2 * math.pi) * (1 - 3**-0.5)  # the integral over the whole line
    assert ours.expected_sigreg() == pytest.approx(whole, rel=0.01)


def test_a_collapsed_batch_has_the_collapsed_value():
    zero = normality.normality(torch.zeros(400, 16))
    assert zero.value == pytest.approx(normality.collapsed(400), rel=1e-6)
    assert zero.null == ours.expected_sigreg()
    assert normality.normality(torch.ones(400, 16)).value > zero.value
    assert ours.collapsed_sigreg() == pytest.approx(0.40205, abs=1e-5)


def test_the_unit_sphere_is_found_out():
    """Uniform on the sphere is as good as normalised vectors get, and nearly a collapse to the statistic."""
    sphere = F.normalize(normal(512, 128))
    found = normality.normality(sphere)
    assert 0.9 * normality.collapsed(512) < found.value < normality.collapsed(512)
    assert normality.normality_floor(sphere).value == pytest.approx(found.value, rel=0.01)
    assert normality.norm_spread(sphere).value < 1e-6
    assert normality.sigreg_blind(sphere).value == 1
    assert normality.sigreg_blind(sphere.bfloat16()).value == 1


@pytest.mark.parametrize(
    ("latents", "blind"),
    [
        (normal(512, 64), 0),
        (0.01 * normal(512, 64), 0),  # collapsing, but free to grow
        (normal(512, 64) + 5, 0),  # merely far away
        (normal(512, 64) * normal(64, seed=1).exp(), 0),
        (64**0.5 * F.normalize(normal(512, 64)), 0),  # pinned where N(0, I) has its norms
        (F.layer_norm(normal(512, 4), (4,)), 1),
        (F.normalize(normal(512, 64) + 3), 1),
        (F.relu(normal(512, 64)), 1),
        (F.normalize(F.relu(normal(512, 64))), 1),
        (normal(512, 64).sigmoid(), 1),
    ],
    ids=range(10),
)
def test_blind_is_what_cannot_become_normal(latents, blind):
    assert normality.sigreg_blind(latents) == Reading(blind, 0.0, 512)


def test_a_single_point_does_not_tell_whether_norms_are_held():
    for latents in (torch.zeros(512, 64), torch.ones(512, 64), normal(8, 64), normal(512, 1)):
        assert isinstance(normality.sigreg_blind(latents), NotMeasured)


def test_the_floor_is_that_of_uniform_directions_at_any_norm():
    for radius, width in ((1.0, 2), (3.0, 3), (11.0, 100)):
        x = radius * F.normalize(normal(2000, width))
        found = [normality.normality(radius * F.normalize(normal(2000, width, seed=s))).value for s in range(12)]
        floor = normality.normality_floor(x).value
        assert floor == pytest.approx(np.mean(found), abs=4 * np.std(found) / 12**0.5 + 1e-3 * floor)
    # ψ in closed form: a Bessel function
    t = torch.tensor([0.1875, 1.5, 3.0], dtype=torch.float64).numpy()
    psi = special.gamma(5) * (2 / (2 * t)) ** 4 * special.jv(4, 2 * t)
    alpha = (np.arange(512) + 0.5) * np.pi / 512
    density = np.sin(alpha) ** 8 / (np.sin(alpha) ** 8).sum()
    np.testing.assert_allclose(np.cos(2 * t[:, None] * np.cos(alpha)) @ density, psi, atol=1e-12)


def test_norms_spread_as_those_of_a_normal():
    for width in (1, 2, 50):
        found = normality.norm_spread(normal(20_000, width))
        assert found.value == pytest.approx(found.null, rel=0.03)


# codebook


def test_uniform_codes_sit_on_their_nulls():
    generator = torch.Generator().manual_seed(0)
    for size, tokens in ((768, 512), (64, 64), (16, 4000), (1, 50)):
        counts = [
            codebook.code_counts(torch.randint(size, (tokens // 2, 2), generator=generator), size) for _ in range(200)
        ]
        for instrument in (codebook.usage, codebook.perplexity):
            found = [instrument(c) for c in counts]
            values = [r.value for r in found]
            error = 4 * np.std(values) / 200**0.5 + 0.005 * found[0].null
            assert np.mean(values) == pytest.approx(found[0].null, abs=error)
            assert found[0].n == tokens


def test_the_null_of_the_perplexity_is_the_exact_expected_entropy():
    size, tokens = 5, 4
    draws = np.stack(np.meshgrid(*[range(size)] * tokens), -1).reshape(-1, tokens)
    counts = np.stack([(draws == k).sum(1) for k in range(size)], 1)
    entropy = special.entr(counts / tokens).sum(1).mean()
    assert codebook.uniform_perplexity(size, tokens) == pytest.approx(math.exp(entropy), rel=1e-12)
    assert codebook.uniform_perplexity(1000, 10**9) == pytest.approx(1000, rel=1e-5)
    assert codebook.uniform_perplexity(10**6, 1) == 1


def test_usage_and_perplexity_of_known_counts():
    counts = codebook.code_counts(torch.tensor([[0, 0, 3], [3, 5, 5]]), 8)
    assert codebook.usage(counts).value == 3 / 8
    assert codebook.perplexity(counts).value == pytest.approx(3)
    assert codebook.perplexity(torch.tensor([0, 70, 0])).value == 1
    assert isinstance(codebook.usage(torch.zeros(8, dtype=torch.long)), NotMeasured)


def test_ages_of_uniform_codes_are_their_null():
    generator, last, size = torch.Generator().manual_seed(0), torch.full((100,), -1), 100
    ages, dead = [], []
    for step in range(400):
        last[torch.randint(size, (20,), generator=generator)] = step
        ages.append(codebook.mean_age(last, step, 20))
        dead.append(codebook.dead_share(last, step, 20))
    early = ages[2]
    assert early.value == pytest.approx(early.null, rel=0.1)
    late = [r.value for r in ages[100:]]
    assert np.mean(late) == pytest.approx(ages[-1].null, rel=0.1)
    assert isinstance(dead[20], NotMeasured)
    assert np.mean([r.value for r in dead[100:]]) < 1e-3
    last[:30] = 100
    found = codebook.dead_share(last, 399, 20)
    assert found.value == pytest.approx(0.3)
    assert found.null <= 0.01 / size


def test_displaced_codes_and_lost_mass():
    data = normal(1000, 16)
    assert codebook.norm_ratio(data[:64], data).value == pytest.approx(1, rel=0.05)
    assert codebook.norm_ratio(700 * data[:64].half(), data).value == pytest.approx(700, rel=0.05)
    sizes, decay = torch.full((32,), 1000 / 32), 0.99
    starved = torch.zeros(32)
    for step in range(20):
        used = codebook.code_counts(torch.randint(32, (1000,), generator=torch.Generator().manual_seed(step)), 32)
        sizes, starved = (decay * s + (1 - decay) * used for s in (sizes, starved))
    assert codebook.mass_ratio(sizes, 1000).value == pytest.approx(1, rel=1e-5)
    assert codebook.mass_ratio(starved, 1000).value == pytest.approx(1 - decay**20, rel=1e-5)
    assert isinstance(codebook.mass_ratio(sizes * math.nan, 1000), NotMeasured)
    assert isinstance(codebook.norm_ratio(data, torch.zeros(5, 16)), NotMeasured)


# contrastive


def test_ranks_and_gain_are_those_of_the_libraries():
    a, b = F.normalize(normal(200, 8)), F.normalize(normal(200, 8) + normal(200, 8, seed=1))
    s = contrastive.similarities(a, b, 5.0)
    own = np.eye(200)
    assert contrastive.top1(s).value == pytest.approx(top_k_accuracy_score(np.arange(200), s.numpy(), k=1))
    mrr = contrastive.mean_reciprocal_rank(s)
    assert mrr.value == pytest.approx(label_ranking_average_precision_score(own, s.numpy()))
    both = [contrastive.infonce_gain(x).value for x in (s, s.T)]
    loss = infonce(a.float(), b.float(), torch.tensor(math.log(5.0)))
    assert np.mean(both) == pytest.approx(math.log(200) - float(loss), abs=1e-5)


def test_unrelated_pairs_are_at_chance_and_their_intervals_hold_it():
    readings = {f: [] for f in (contrastive.infonce_gain, contrastive.top1, contrastive.mean_reciprocal_rank)}
    for seed in range(100):
        s = contrastive.similarities(normal(100, 8, seed=seed), normal(120, 8, seed=1000 + seed), 0.02)
        for instrument, found in readings.items():
            found.append(instrument(s))
    for found in readings.values():
        assert np.mean([r.low <= r.null <= r.high for r in found]) > 0.8
        assert np.mean([r.null < r.low for r in found]) < 0.1  # Wilson's at one expected hit: .058
        spread = np.std([r.value for r in found])
        assert np.mean([r.value for r in found]) == pytest.approx(found[0].null, abs=4 * spread / 10 + 5e-3)
    assert readings[contrastive.top1][0].null == 1 / 120
    assert readings[contrastive.mean_reciprocal_rank][0].null == pytest.approx(sum(1 / k for k in range(1, 121)) / 120)


def test_constant_similarities_are_at_chance_and_perfect_ones_at_the_top():
    flat = torch.zeros(2000, 2000)
    assert contrastive.infonce_gain(flat).value == pytest.approx(0, abs=1e-9)
    assert contrastive.top1(flat).low < 1 / 2000 < contrastive.top1(flat).high
    mrr = contrastive.mean_reciprocal_rank(flat)
    assert mrr.low < mrr.null < mrr.high
    sharp = 1000 * torch.eye(50).half()
    assert contrastive.infonce_gain(sharp).value == pytest.approx(math.log(50))
    assert contrastive.top1(sharp).value == contrastive.mean_reciprocal_rank(sharp).value == 1


def test_the_gap_is_the_distance_of_the_cones_and_its_null_that_of_exchanged_pairs():
    one, other = normal(500, 32), normal(500, 32, seed=1)
    same = contrastive.modality_gap(one, other)
    assert same.value == pytest.approx(same.null, rel=0.3)
    assert contrastive.modality_gap(one, one).value == 0
    shift = torch.zeros(32, dtype=one.dtype)
    shift[0] = 1000
    assert contrastive.modality_gap(one + shift, one - shift).value == pytest.approx(2, rel=1e-3)
    apart = F.normalize(one) - F.normalize(other)
    signs = normal(2000, 500, seed=2).sign()
    assert same.null == pytest.approx(float((signs @ apart / 500).square().sum(1).mean().sqrt()), rel=0.01)


def test_the_temperature_is_the_divisor():
    assert contrastive.temperature(torch.tensor(math.log(100.0)), 0.01).value == pytest.approx(0.01)
    assert contrastive.temperature(0.0) == Reading(1.0)
    assert isinstance(contrastive.temperature(math.nan), NotMeasured)


# gradients


def test_terms_move_the_weights_as_their_gradients_say():
    w, unused = nn.Parameter(normal(6)), nn.Parameter(normal(3))
    direction = normal(6, seed=1)
    terms = {"a": w @ direction, "b": -6 * (w @ direction), "inert": (w.detach() ** 2).sum(), "c": w[0] * 0.0}
    found = gradients.term_gradients(terms, [w, unused])
    assert w.grad is None
    assert float(found["a"][1].norm()) == 0
    norms = gradients.gradient_norms(found)
    assert norms["b"].value == pytest.approx(6 * norms["a"].value)
    assert norms["a"].value == pytest.approx(float(direction.norm()))
    assert norms["inert"].value == norms["c"].value == 0
    shares = gradients.gradient_shares(found)
    assert shares["b"].value == pytest.approx(6 / 7)
    assert shares["b"].null == 1 / 4
    assert gradients.gradient_cosines(found)["a"].value == pytest.approx(-1)
    assert isinstance(gradients.gradient_cosines(found)["inert"], NotMeasured)
    (terms["a"] + terms["b"]).backward()  # the graph is still there


def test_random_gradients_are_orthogonal_and_cosines_are_numpy_s():
    one, other = [normal(30, 40), normal(9)], [normal(30, 40, seed=1), normal(9, seed=1)]
    flat = [torch.cat([g.flatten() for g in side]).numpy() for side in (one, other)]
    found = gradients.cosine(one, other)
    assert found.value == pytest.approx(flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]))
    assert abs(found.value) < 4 * found.n**-0.5
    small = [[1e-4 * g.half() for g in side] for side in (one, other)]  # their squares are below half's least number
    assert gradients.cosine(*small).value == pytest.approx(found.value, abs=1e-3)
    assert isinstance(gradients.cosine(one, [g * math.nan for g in one]), NotMeasured)


def test_ratios_are_those_of_norms():
    weights = {"w": torch.full((4,), 2.0), "bias": torch.zeros(3), "bad": torch.tensor([math.inf])}
    moved = {"w": torch.full((4,), 0.02), "bias": torch.ones(3), "bad": torch.ones(1)}
    found = gradients.relative_norms(moved, weights)
    assert found["w"].value == pytest.approx(0.01)
    assert found["w"].n == 4
    assert isinstance(found["bias"], NotMeasured)
    assert isinstance(found["bad"], NotMeasured)
    with pytest.raises(ValueError, match="real numbers"):
        gradients.relative_norms({"w": torch.ones(4, dtype=torch.int)}, weights)


def test_the_noise_scale_is_the_trace_of_the_noise_over_the_squared_gradient():
    """Gradients of a known mean and covariance: |G|² = 4, tr Σ = 50 · 9."""
    mean, small, big, m = torch.zeros(50, dtype=torch.float64), 8, 64, 4000
    mean[0] = 2
    few = mean + 3 * normal(m, 50) / small**0.5
    many = mean + 3 * normal(m, 50, seed=1) / big**0.5
    found = gradients.noise_scale(few.square().sum(1), many.square().sum(1), small, big)
    assert found.value == pytest.approx(112.5, rel=0.05)
    assert found.low < 112.5 < found.high
    assert found.n == m
    noise = [(g - mean).square().sum(1) for g in (few, many)]
    assert isinstance(gradients.noise_scale(*noise, small, big), NotMeasured)
    assert isinstance(gradients.noise_scale(*(n * math.nan for n in noise), small, big), NotMeasured)
    assert isinstance(gradients.noise_scale(torch.tensor([10.0]), torch.tensor([5.0]), 1, 2), NotMeasured)
    assert gradients.noise_scale(torch.tensor([10.0]), torch.tensor([6.0]), 1, 2) == Reading(4.0, None, 1)
    with pytest.raises(ValueError, match="smaller batch first"):
        gradients.noise_scale(*noise, big, small)


def test_dead_parameters_are_counted_and_named_by_their_outermost_module():
    model = nn.ModuleDict(
        {
            "encoder": nn.Linear(4, 3),
            "never": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
            "frozen": nn.Linear(5, 5).requires_grad_(False),
        }
    )
    model["encoder"](torch.ones(2, 4)).sum().backward()
    parameters = dict(model.named_parameters())
    largest = {n: float(p.grad.norm()) for n, p in parameters.items() if p.grad is not None}
    assert gradients.dead_modules(parameters, largest) == {"never": 144}
    assert gradients.dead_modules(parameters, largest | {"encoder.bias": 0.0}) == {"never": 144, "encoder.bias": 3}
    assert gradients.dead_modules(parameters, {}) == {"": 159}
    assert gradients.dead_parameters(parameters, largest) == Reading(144 / 159, 0.0, 159)
    assert isinstance(gradients.dead_parameters({}, {}), NotMeasured)


# what all of them refuse or abstain from


@pytest.mark.parametrize(
    "instrument",
    [
        normality.normality,
        normality.normality_floor,
        normality.norm_spread,
        normality.bounded_at_zero,
        normality.sigreg_blind,
        contrastive.infonce_gain,
        contrastive.top1,
        contrastive.mean_reciprocal_rank,
        lambda x: contrastive.modality_gap(x, x),
        lambda x: codebook.norm_ratio(x, x),
    ],
    ids=range(10),
)
def test_matrices_of_reals_are_asked_for(instrument):
    good = normal(32, 32, dtype=torch.float32)
    whole, half = instrument(good), instrument(good.half())
    assert half.value == pytest.approx(whole.value, abs=0.02)
    before = torch.random.get_rng_state()
    assert instrument(good.requires_grad_()) == whole
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(instrument(good * math.nan), NotMeasured)
    if instrument(good[:1, :1]) != Reading(1.0, 1.0, 1):  # the norm of one code is the norm of its one vector
        assert isinstance(instrument(good[:1, :1]), NotMeasured)
    for bad in (good[0], torch.ones(32, 32, dtype=torch.long)):
        with pytest.raises(ValueError, match="an instrument takes"):
            instrument(bad)


def test_codes_are_asked_for_as_whole_numbers_in_range():
    for bad in (torch.rand(5), torch.tensor([0, 9]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="codes"):
            codebook.code_counts(bad, 9)
    with pytest.raises(ValueError, match="code_counts"):
        codebook.usage(torch.ones(4))
    with pytest.raises(ValueError, match="the step is 3"):
        codebook.mean_age(torch.tensor([0, 4]), 3, 10)
    with pytest.raises(ValueError, match="running counts"):
        codebook.mass_ratio(torch.ones(3, dtype=torch.long), 3)
