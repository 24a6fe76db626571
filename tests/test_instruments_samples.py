"""Instruments of generated samples: on Gaussians of closed form, against libraries, at their nulls, and on faults."""

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from intaglio.health.instruments import samples
from intaglio.history import NotMeasured, Reading

D = torch.float64
PAIRS = (samples.frechet_distance, samples.kernel_distance, samples.precision, samples.recall, samples.diversity)
TRIPLES = (samples.neighbour_ratio, samples.copied_share)


def normal(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(x, covariance, mean):
    """x moved so that its mean and covariance are exactly these."""
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), (x - x.mean(0)).T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def frechet_by_sqrtm(x, y):
    a, b = np.cov(x.T), np.cov(y.T)
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    return apart + np.trace(a + b - 2 * np.real(linalg.sqrtm(a @ b)))


# Fréchet distance


def test_frechet_distance_of_gaussians_is_that_of_closed_form():
    """Of commuting covariances it is ‖μ₁ − μ₂‖² + Σ (√λ₁ − √λ₂)²."""
    turn = torch.linalg.qr(normal(6, 6, seed=3))[0]
    a, b = torch.tensor([4.0, 2, 1, 0.5, 0.1, 3], dtype=D), torch.tensor([1.0, 2, 9, 0.5, 0.3, 1e-6], dtype=D)
    x = exact(normal(300, 6), turn * a @ turn.T, 0.0)
    y = exact(normal(200, 6, seed=1), turn * b @ turn.T, torch.arange(6, dtype=D))
    due = 55 + (a.sqrt() - b.sqrt()).square().sum()
    assert samples._frechet(x, y) == pytest.approx(float(due), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 8), (60, 90, 64), (40, 30, 64), (20, 100, 50)])
def test_frechet_distance_agrees_with_sqrtm(n, m, d):
    """Where N < d, sqrtm is that of a singular matrix, and less precise than ours."""
    x, y = normal(n, d) @ normal(d, d, seed=5), 0.5 + normal(m, d, seed=2)
    assert samples._frechet(x, y) == pytest.approx(frechet_by_sqrtm(x.numpy(), y.numpy()), rel=1e-5)
    assert samples._frechet(x, x) == pytest.approx(0, abs=1e-9 * float(x.square().sum()))


@pytest.mark.parametrize(("n", "m", "d"), [(400, 200, 16), (400, 200, 300), (1000, 100, 64)])
def test_frechet_distance_of_more_real_images_is_its_null(n, m, d):
    """Far above 0 where N < d, for the null as for the value."""
    found = [samples.frechet_distance(normal(n, d, seed=2 * k), normal(m, d, seed=2 * k + 1)) for k in range(12)]
    values, nulls = np.array([(r.value, r.null) for r in found]).T
    error = np.hypot(values.std(), nulls.std()) / len(found) ** 0.5
    assert values.mean() == pytest.approx(nulls.mean(), abs=3 * error)
    assert nulls.mean() > (100 if d == 300 else 0.3)
    assert found[0].n == min(m, n // 2)
    shifted = samples.frechet_distance(normal(n, d), 0.3 + normal(m, d, seed=1))
    assert shifted.value - shifted.null == pytest.approx(0.09 * d, rel=0.5)


# kernel distance


@pytest.mark.parametrize(("n", "m"), [(100, 100), (163, 71)])
def test_kernel_distance_agrees_with_sklearn(n, m):
    x, y = normal(n, 12), 0.3 + 1.2 * normal(m, 12, seed=1)

    def kernel(a, b):
        return polynomial_kernel(a, b, degree=3, gamma=1 / 12, coef0=1)

    xx, yy = kernel(x, x), kernel(y, y)
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    due = xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * kernel(x, y).mean()
    assert samples.kernel_distance(x, y).value == pytest.approx(due, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.4])
def test_intervals_of_the_kernel_distance_hold_the_truth(shift):
    """Its expectation, of (1 + xᵀy/d)³ under Gaussians; 80 draws, of which 95 % are due."""
    d, far = 16, shift**2
    x, y = normal(4000, d, seed=9), shift + normal(4000, d, seed=10)

    def moment(u, v):  # E (1 + s)³ of s = uᵀv/d, u and v Gaussian with means whose product is p·d
        p, q = u * v, u * u + v * v
        s2 = p**2 + (1 + q) / d
        s3 = p**3 + 3 * p * (1 + q) / d + 6 * p / d**2
        return 1 + 3 * p + 3 * s2 + s3

    truth = moment(0, 0) + moment(shift, shift) - 2 * moment(0, shift)
    assert samples.kernel_distance(x, y).value == pytest.approx(truth, abs=0.01 + 0.2 * far)
    found = [
        samples.kernel_distance(normal(200, d, seed=3 * k), shift + normal(150, d, seed=3 * k + 1)) for k in range(80)
    ]
    assert np.mean([r.low <= truth <= r.high for r in found]) >= 0.88
    mean, error = np.mean([r.value for r in found]), np.std([r.value for r in found]) / 80**0.5
    assert mean == pytest.approx(truth, abs=3 * error)


# precision and recall


def test_precision_and_recall_are_those_of_their_definition():
    x, y = normal(80, 5), 0.8 * normal(60, 5, seed=1)

    def covered(points, reference):
        radii = NearestNeighbors(n_neighbors=4).fit(reference).kneighbors(reference)[0][:, 3]
        apart = np.linalg.norm(points[:, None] - reference[None], axis=2)
        return float((apart <= radii).any(1).mean())

    assert samples._covered(y, x) == covered(y.numpy(), x.numpy())
    assert samples._covered(x, y) == covered(x.numpy(), y.numpy())


def test_a_perfect_generator_is_at_the_null_and_a_broad_and_a_narrow_one_are_not():
    real = normal(800, 8)
    perfect, narrow, broad = normal(400, 8, seed=1), 0.3 * normal(400, 8, seed=2), 3 * normal(400, 8, seed=3)
    for instrument in (samples.precision, samples.recall):
        found = instrument(real, perfect)
        assert found.value == pytest.approx(found.null, abs=0.05)
        assert found.low <= found.null <= found.high
    assert samples.precision(real, narrow).value > 0.95
    assert samples.recall(real, narrow).value < 0.05
    assert samples.precision(real, broad).high < samples.precision(real, broad).null - 0.3
    assert samples.recall(real, broad).value > 0.9


def test_collapsed_samples_have_no_recall_and_no_diversity():
    """Each item is one of four real ones, with a little noise, or all are exactly one."""
    real = normal(600, 32)
    few = real[torch.arange(300) % 4] + 1e-3 * normal(300, 32, seed=4)
    for collapsed in (few, real[:1].expand(300, -1)):
        assert samples.recall(real, collapsed).value < 0.02
        assert samples.precision(real, collapsed).value == pytest.approx(1, abs=0.7)
    assert samples.diversity(real, real[:1].expand(300, -1)).value == pytest.approx(0, abs=1e-6)
    assert samples.diversity(real, few).high < 0.85


# variety


def test_diversity_is_the_ratio_of_mean_distances_with_an_interval_that_holds_it():
    x, y = normal(60, 10), 0.5 * normal(50, 10, seed=1)
    due = float(torch.pdist(y).mean() / torch.pdist(x).mean())
    assert samples.diversity(x, y).value == pytest.approx(due, rel=1e-9)
    found = [samples.diversity(normal(60, 3, seed=2 * k), 0.7 * normal(40, 3, seed=2 * k + 1)) for k in range(150)]
    assert 0.89 <= np.mean([r.low <= 0.7 <= r.high for r in found]) <= 0.99


# copies


def test_copied_training_items_are_found():
    train, held, fresh = normal(500, 16), normal(400, 16, seed=1), normal(300, 16, seed=2)
    honest = samples.copied_share(train, held, fresh)
    assert honest.null == pytest.approx(4 / 401)
    assert honest.low <= honest.null <= honest.high
    found = [samples.neighbour_ratio(*(normal(n, 16, seed=1000 * k + n) for n in (300, 200, 150))) for k in range(80)]
    assert 0.88 <= np.mean([r.low <= r.null <= r.high for r in found]) < 1
    for copies in (0.0, 1e-3):
        some = torch.cat([train[:30] + copies * normal(30, 16, seed=3), fresh[30:]])
        found = samples.copied_share(train, held, some)
        assert found.value == pytest.approx(0.1, abs=0.02)
        assert found.low > found.null
        ratio = samples.neighbour_ratio(train, held, some)
        assert ratio.high < ratio.null
    assert samples.neighbour_ratio(train, held, train[:200]).value == pytest.approx(0, abs=1e-6)


def test_the_null_of_copied_shares_is_exact_for_any_distribution():
    """Heavy-tailed, clustered, and with copies in the source itself; the mean over fresh draws."""

    def drawn(n, seed):
        centres = 3 * normal(40, 6, seed=99)
        picks = torch.randint(40, (n,), generator=torch.Generator().manual_seed(seed))
        return centres[picks] + normal(n, 6, seed=seed) / normal(n, 1, seed=seed + 1).abs().clamp_min(0.1)

    found = [samples.copied_share(*(drawn(n, 1000 * k + n) for n in (150, 99, 100))) for k in range(80)]
    values = np.array([r.value for r in found])
    assert {round(r.null, 6) for r in found} == {0.01}
    assert values.mean() == pytest.approx(0.01, abs=3 * values.std() / 80**0.5)
    real = normal(200, 6)
    copied = torch.cat([real[:20], normal(180, 6, seed=1)])  # a tenth of the held-out images are training images
    assert samples.copied_share(real, copied, copied).null == pytest.approx(20 / 201)


@pytest.mark.parametrize("instrument", [PAIRS[0], *PAIRS[2:], *TRIPLES], ids=lambda f: f.__name__)
def test_only_differences_count(instrument):
    """Not where the origin lies, nor the unit; the kernel alone has both."""
    given = [normal(150, 6, seed=k) for k in range(3 if instrument in TRIPLES else 2)]
    given[-1][:10] = given[0][:10]
    here, far = instrument(*given), instrument(*(1e-3 * x + 1e3 for x in given))
    unit = 1e-6 if instrument is samples.frechet_distance else 1
    assert far.value == pytest.approx(unit * here.value, rel=1e-5)
    assert far.null == pytest.approx(unit * here.null, rel=1e-5)


# what they refuse


@pytest.mark.parametrize("instrument", [*PAIRS, *TRIPLES], ids=lambda f: f.__name__)
def test_they_abstain_and_refuse(instrument):
    sets = 3 if instrument in TRIPLES else 2

    def of(*shapes, change=None):
        given = [normal(*shape, seed=k).float() for k, shape in enumerate(shapes[:sets])]
        if change is not None:
            given[-1] = change(given[-1])
        return instrument(*given)

    before = torch.random.get_rng_state()
    first, again = of((200, 4), (120, 4), (120, 4)), of((200, 4), (120, 4), (120, 4))
    assert first == again
    assert isinstance(first, Reading)
    assert torch.equal(before, torch.random.get_rng_state())
    few = of((200, 4), (6, 4), (6, 4))
    assert isinstance(few, NotMeasured)
    assert "N too small" in few.reason
    nan = of((200, 4), (120, 4), (120, 4), change=lambda x: x.masked_fill(x > 3, torch.nan).log())
    assert isinstance(nan, NotMeasured)
    assert "not finite" in nan.reason
    with pytest.raises(ValueError, match="4 dimensions, generated 5; use one classifier"):
        of((200, 4), (120, 5) if sets == 2 else (120, 4), (120, 5))
    with pytest.raises(ValueError, match="floating-point"):
        of((200, 4), (120, 4), (120, 4), change=lambda x: x.long())


def test_a_null_that_needs_more_real_images_says_how_many():
    found = samples.frechet_distance(normal(99, 4), normal(60, 4))
    assert found == NotMeasured("N too small: 99 real features, and it takes 100 to split them for a null")
