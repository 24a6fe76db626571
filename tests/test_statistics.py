"""Statistics of histories: each must find what was put in, and nothing where nothing was."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from intaglio.history import Series
from intaglio.history.changes import pieces
from intaglio.history.curves import Curve
from intaglio.history.derived import derived
from intaglio.history.families import WARMED, fit
from intaglio.history.relations import constants, relations
from intaglio.history.statistics import describe, phases, student, trend

DRAWS = 200


def series(values, steps=None) -> Series:
    values = np.asarray(values, float)
    return Series.of(np.arange(len(values)) if steps is None else np.asarray(steps), values)


def autoregressive(rng, n, phi):
    """AR(1) of unit variance, from its stationary distribution."""
    x = np.empty(n)
    x[0] = rng.normal()
    shocks = rng.normal(size=n) * math.sqrt(1 - phi**2)
    for k in range(1, n):
        x[k] = phi * x[k - 1] + shocks[k]
    return x


def schedule(rng, name, warm=False, floor=False, sizes=(40, 60, 100, 200, 777)):
    """A learning rate of that law with random settings: steps, rates, and the step at which the warm-up ends."""
    n, every = int(rng.choice(sizes)), int(rng.choice([1, 10, 50]))
    t = np.arange(n) * every + int(rng.choice([0, 1, every]))
    begin = t[0] + np.ptp(t) * rng.uniform(0.03, 0.3) if warm else float(t[0])
    since, long = np.maximum(t - begin, 0), t[-1] - begin
    peak = 10 ** rng.uniform(-4, 0)
    low = peak * rng.uniform(0.05, 0.6) if floor else 0.0
    if name == "constant":
        y = np.full(n, peak)
    elif name == "linear":
        y = peak * (1 - since / long * rng.uniform(0.3, 1))
    elif name == "exponential":
        y = low + (peak - low) * np.exp(-since / (long * rng.uniform(0.06, 0.5)))
    elif name == "cosine":
        end, period = peak * rng.choice([0, 1e-3, 0.1]), long * rng.choice([1, 1.01, 1.3])
        y = end + (peak - end) * 0.5 * (1 + np.cos(np.pi * np.minimum(since / period, 1)))
    elif name == "step":
        at = np.sort(rng.choice(np.arange(1, 10), int(rng.integers(1, 4)), replace=False)) / 10
        y = peak * rng.choice([0.1, 0.2, 0.5]) ** np.searchsorted(at * long, since, "right").astype(float)
    else:
        y = peak / np.sqrt(1 + since / (long * 10 ** rng.uniform(-2.5, -0.5)))
    if warm:
        start = peak * rng.choice([0, 0.1])
        y = np.where(t < begin, start + (peak - start) * (t - t[0]) / (begin - t[0]), y)
    return t, y, begin


LAWS = ("constant", "linear", "exponential", "cosine", "step", "inverse square root")


@pytest.mark.parametrize("warm", [False, True], ids=["", "warm-up"])
@pytest.mark.parametrize("law", LAWS)
def test_the_law_of_a_learning_rate_is_named(law, warm):
    rng = np.random.default_rng(LAWS.index(law))
    named = Counter()
    for _ in range(DRAWS):
        t, y, begin = schedule(rng, law, warm)
        found = fit(series(y, t))
        assert found is not None
        named[found.name] += 1
        if found.name == law + WARMED:
            rows = 2 if len(t) <= 500 else 4  # of those that one point stands for
            assert found.parameters["warmup"] == pytest.approx(begin, abs=1.1 * rows * (t[1] - t[0]))
    assert named[law + WARMED * warm] >= 0.97 * named.total(), named


@pytest.mark.parametrize(
    ("law", "noise", "floor"),
    [
        ("constant", 0.05, False),
        ("linear", 0.03, False),
        ("exponential", 0.05, True),
        ("exponential", 0.02, False),
        ("cosine", 0.02, False),
        ("inverse square root", 0.01, False),
        ("step", 0.01, False),
    ],
)
def test_the_law_of_a_noisy_curve_is_named(law, noise, floor):
    rng = np.random.default_rng(7)
    named = Counter()
    for _ in range(DRAWS):
        t, y, _ = schedule(rng, law, floor=floor, sizes=(100, 300))
        scale = float(np.ptp(y)) if law != "constant" else float(y[0])
        y = y * (1 + noise * rng.normal(size=len(y))) if law == "step" else y + noise * scale * rng.normal(size=len(y))
        found = fit(series(y, t))
        named[found and found.name] += 1
    assert named[law] >= 0.95 * DRAWS, named


def test_parameters_are_found_and_said():
    t = np.arange(0, 10_000, 10)
    rate = 1e-3 * np.minimum(t / 1255, 0.5 * (1 + np.cos(np.pi * np.maximum(t - 1255, 0) / (10_000 - 1255))))
    cosine = fit(series(rate.astype(np.float32), t))  # as loggers hold it
    assert cosine.name == "cosine" + WARMED
    assert cosine.parameters["over"] == pytest.approx(8745, rel=1e-3)
    assert cosine.parameters["warmup"] == pytest.approx(1255, abs=1)
    assert "after a linear warm-up from 0 until step 1,255" in cosine.said
    drops = fit(series(0.1 * 0.1 ** np.searchsorted([30, 60, 80], np.arange(90), "right")))
    assert (
        drops.said == "step from 0.1 to 0.0001, times 0.1 at steps 30, 60, 80, exactly (next best: cosine, off by 27 %)"
    )
    loss = fit(series(0.4 + 2 * 0.5 ** (t / 1500), t))
    assert loss.name == "exponential"
    assert loss.parameters["floor"] == pytest.approx(0.4)
    assert loss.parameters["half_life"] == pytest.approx(1500)
    short = fit(series(np.minimum(np.arange(1_000_000) / 500, 1)))  # a warm-up of a 2000th of the run
    assert (short.name, round(short.parameters["warmup"])) == ("constant" + WARMED, 500)


def test_what_follows_no_law_is_not_given_one():
    t = np.arange(500)
    assert fit(series(np.sin(t / 25))) is None
    assert fit(series(np.abs(t - 250.0))) is None
    assert fit(series([1.0] * 7)) is None
    assert fit(series(np.arange(9), [3] * 9)) is None


@pytest.mark.parametrize(
    ("phi", "n", "most"),
    [(0, 30, 0.09), (0, 300, 0.08), (0.5, 100, 0.09), (0.8, 100, 0.1), (0.9, 300, 0.1)],
)
def test_noise_is_no_trend(phi, n, most):
    rng = np.random.default_rng(n)
    called, shifts, starts = 0, 0, 0
    for _ in range(DRAWS):
        d = describe(series(3 + 0.5 * autoregressive(rng, n, phi)))
        called += d.rises in ("rising", "falling")
        shifts += bool(d.change_points)
        starts += d.transient is not None
    assert called <= most * DRAWS  # 5 % are due; 200 draws err by 1.5 %
    assert shifts <= 0.02 * DRAWS
    assert starts <= 0.03 * DRAWS


def test_trend_agrees_with_least_squares_and_its_interval_covers():
    rng = np.random.default_rng(0)
    slope, hits, widths = 2e-3, 0, []
    for _ in range(400):
        t = np.sort(rng.choice(1000, 120, replace=False))
        y = slope * t + rng.normal(size=120)
        found, low, high = trend(Curve.of(series(y, t)))
        oracle = stats.linregress(t, y)
        assert found == pytest.approx(oracle.slope, rel=1e-9)
        hits += low <= slope <= high
        widths.append((high - low) / (2 * stats.t.ppf(0.975, 118) * oracle.stderr))
    assert 0.93 <= hits / 400 <= 0.975
    assert 0.95 < np.median(widths) < 1.5  # what it costs to know nothing of the correlation
    for degrees in (1, 2, 3, 4, 5, 10, 25, 100):
        assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-3)


def test_which_way_a_curve_goes():
    rng = np.random.default_rng(1)
    t = np.arange(300)
    noise = 0.02 * rng.normal(size=300)
    assert describe(series(1 - 0.2 * t / 300 + noise)).rises == "falling"
    assert describe(series(0.5 + 2 * np.exp(-t / 60) + noise)).rises == "falling"
    assert describe(series(-0.5 - 2 * np.exp(-t / 60) + noise)).rises == "rising"
    assert describe(series(1 + noise)).rises == "flat"
    assert describe(series(np.full(300, 0.7))).rises == "flat"
    assert describe(series(1 - 0.005 * t / 300)).rises == "flat"  # certain, and too little to count
    fallen = np.concatenate([3 * np.exp(-np.arange(40) / 5), np.zeros(260)]) + np.where(t > 40, t / 260, 0) + noise
    assert describe(series(fallen)).rises == "rising"  # a term that vanished, then came back


def test_a_transient_is_apart_and_a_slow_decay_is_none():
    rng = np.random.default_rng(2)
    t = np.arange(2000)
    noise = 0.02 * rng.normal(size=2000)
    for first in (1, 3, 40, 200):  # rows; and the same at the start of a curve that is binned
        d = describe(series(1 + noise + np.where(t < first, 2 - t / first, 0)))
        assert first <= d.transient <= max(first + 1, 1.2 * first)
        assert d.change_in_transient == pytest.approx(1, abs=0.03)
        assert d.settled_cv == pytest.approx(0.02, rel=0.1)
        assert d.cv > 1.3 * d.settled_cv
    for slow in (np.exp(-t / 600), 1 - t / 2000, (1 + t / 50) ** -0.5, np.cos(np.pi * t / 2000)):
        assert describe(series(slow + noise)).transient is None
        assert describe(series(slow)).transient is None
    late = describe(series(np.where(np.arange(100) < 40, 2.0, 1.0) + noise[:100]))
    assert late.transient is None
    assert late.change_points == (40,)
    warm = describe(series(np.minimum(t / 100, 1)))
    assert (warm.transient, warm.settled_std, warm.change_in_transient) == (100, 0, 1)


def test_spikes_gaps_and_extremes():
    rng = np.random.default_rng(3)
    for n in (60, 500, 3000, 50_000):
        t = np.arange(n) * 10
        y = -4 + 2 * np.exp(-np.arange(n) / (n / 5)) + 0.05 * rng.normal(size=n)
        y[[n // 3, n // 2]] = -9, 3
        y[2 * n // 3 : 2 * n // 3 + 5] = [np.nan, np.inf, np.nan, -np.inf, np.nan]
        d = describe(series(y, t))
        assert d.spikes == (10 * (n // 3), 10 * (n // 2))
        assert d.gaps == ((10 * (2 * n // 3), 10 * (2 * n // 3 + 4)),)
        assert (d.rows, d.finite, d.low, d.high, d.low_step) == (n, n - 5, -9, 3, 10 * (n // 3))
    steep = np.exp(-np.arange(200) / 3) * (1 + 0.05 * rng.normal(size=200)) + 0.01 * rng.normal(size=200)
    assert describe(series(steep)).spikes == ()
    assert sum(len(describe(series(rng.normal(size=1000))).spikes) for _ in range(50)) == 0


def test_levels_change_where_they_change():
    rng = np.random.default_rng(4)
    for n in (60, 200, 1000, 60_000):
        t, noise = np.arange(n), rng.normal(size=n)
        one = np.where(t < 2 * n // 5, 2.0, 1.0) + 0.1 * noise
        assert describe(series(one)).change_points == (2 * n // 5,)
        two = np.where((t >= n // 2) & (t < 3 * n // 4), 1.5, 1.0) + 0.05 * noise
        found = describe(series(two)).change_points
        assert len(found) == 2
        assert np.abs(np.array(found) - [n // 2, 3 * n // 4]).max() <= max(1, n // 1000)
        decay = 2 * np.exp(-t / (0.2 * n)) + np.where(t < 3 * n // 5, 0.5, 0.2) + 0.02 * noise
        (drop,) = describe(series(decay)).change_points
        assert abs(drop - 3 * n // 5) <= max(1, n // 1000)
        for smooth in (np.exp(-t / (0.1 * n)), 1 + np.cos(np.pi * t / n), 1 - t / n):
            assert describe(series(smooth)).change_points == ()
            assert describe(series(smooth + 0.02 * noise)).change_points == ()


def test_pieces_are_the_best_division():
    rng = np.random.default_rng(5)
    y = rng.normal(size=(2, 12)) + np.where(np.arange(12) < 5, 0, 2)
    for order, shortest, penalty in itertools.product((0, 1), (2, 3), (0.5, 3.0)):

        def cost(cuts, order=order, penalty=penalty):
            u = np.arange(12.0)
            ends = [0, *cuts, 12]
            return penalty * len(cuts) + sum(
                np.sum((row[a:b] - np.polyval(np.polyfit(u[a:b], row[a:b], order), u[a:b])) ** 2)
                for row in y
                for a, b in itertools.pairwise(ends)
            )

        every = (c for r in range(6) for c in itertools.combinations(range(1, 12), r))
        allowed = [c for c in every if min(np.diff([0, *c, 12])) >= shortest]
        best = min(allowed, key=cost)
        assert tuple(pieces(y, penalty, shortest, order)) == best


def test_phases_are_found_from_several_curves():
    rng = np.random.default_rng(6)
    t = np.arange(1200)
    course = np.interp(t, [0, 120, 600, 1200], [5, 2, 1, 1])
    run = {f"train/loss/{k}": series((k + 1) * (course + 0.02 * rng.normal(size=1200))) for k in range(3)}
    run["train/logged/accuracy"] = series(rng.random(1200))
    found = phases(run)
    assert [p.what for p in found] == ["falling fast", "falling", "flat"]
    assert [p.first for p in found] == pytest.approx([0, 120, 600], abs=30)
    assert found[-1].last == 1199
    assert [p.what for p in phases({"loss": series(3 + 0.1 * rng.normal(size=500))})] == ["flat"]
    assert phases({}) == phases({"loss": series([1.0, 2.0])}) == ()


def test_identities_are_found_and_likeness_is_not():
    rng = np.random.default_rng(8)
    n = 400
    t = np.arange(n)
    loss = 0.3 + 2 * np.exp(-t / 100) + 0.02 * rng.normal(size=n)
    std = 0.1 + 0.01 * rng.normal(size=n)
    run = {
        "train/loss/caption": series(loss),
        "train/caption/perplexity": series(np.exp(loss)),
        "reward": series(-loss),
        "copy": series(loss),
        "accuracy": series(1 / (1 + loss)),
        "error": series(1 - 1 / (1 + loss)),
        "latent_std": series(std),
        "latent_norm": series(np.round(std * math.sqrt(768), 4)),
        "other/std": series(std[::4], t[::4]),  # on other steps
        "flat": series(0.1 + 1e-7 * rng.normal(size=n)),
        "flat_too": series(0.1 + 1e-7 * rng.normal(size=n)),
        "constant": series(np.ones(n)),
        "one": series(np.ones(n)),
        "alike": series(loss + 0.02 * rng.normal(size=n)),  # the course in common, and not the noise
        "two rows": series([1.0, 2.0]),
        "nan": series(np.full(n, np.nan)),
    }
    found = {r.names: r for r in relations(run)}
    assert {names: r.kind for names, r in found.items()} == {
        ("train/caption/perplexity", "train/loss/caption"): "exponential",
        ("reward", "train/loss/caption"): "negative",
        ("copy", "train/loss/caption"): "same",
        ("error", "accuracy"): "complement",
        ("latent_norm", "latent_std"): "proportional",
        ("other/std", "latent_std"): "same",
    }
    norm = found["latent_norm", "latent_std"]
    assert norm.factor == pytest.approx(math.sqrt(768), rel=1e-4)
    assert "√768" in norm.said


@pytest.mark.parametrize("digits", [12, 4])
def test_a_total_gives_its_weights(digits):
    rng = np.random.default_rng(9)
    t = np.arange(300)
    parts = {
        "mse": 0.05 + np.exp(-t / 50) + 0.01 * rng.normal(size=300),
        "kl": 4 + 6 * np.exp(-t / 90) + 0.2 * rng.normal(size=300),
        "alignment": 0.01 + 0.02 * rng.random(300),
    }
    total = parts["mse"] + 0.05 * parts["kl"] + 0.5 * parts["alignment"]
    other = {"perceptual": rng.random(300), "kl_weighted": 0.05 * parts["kl"], "total_again": total}
    for prefix, name in (("train/loss/", "total"), ("", "loss"), ("val_", "loss")):
        run = {f"{prefix}{k}": series(np.round(v, digits)) for k, v in {**parts, name: total, **other}.items()}
        (found,) = (r for r in relations(run) if r.kind == "sum")
        weights = dict(zip((n.removeprefix(prefix) for n in found.names[1:]), found.weights, strict=True))
        weights["kl"] = weights.pop("kl", 0) + 0.05 * weights.pop("kl_weighted", 0)
        assert found.names[0] == prefix + name
        assert weights == pytest.approx({"mse": 1, "kl": 0.05, "alignment": 0.5}, rel=0.01)


def test_known_constants_are_named():
    assert constants(2.3026)[0].startswith("ln 10 = 2.303, the cross-entropy of guessing among 10")
    assert "ln 2" in constants(0.6935)[0]
    assert any("discriminator" in c for c in constants(1.386))
    assert "SIGReg" in constants(0.0202)[0]
    assert "margin" in constants(0.2001)[0]
    assert constants(3.1) == constants(0.0) == constants(math.nan) == constants(math.inf) == []


@pytest.fixture(scope="module")
def document() -> dict[str, Series]:
    """The analysed engravings run, from the figures that its report gives."""
    rng = np.random.default_rng(10)
    n, epochs = 1600, np.arange(100)
    std = 0.025444 + 0.000297 * autoregressive(rng, n, 0.5)
    std[:4], std[-8:] = (0.037161, 0.0331, 0.0289, 0.0262), 0.025391

    def around(mean, spread):
        x = rng.normal(size=n)
        return mean + spread * (x - x.mean())

    fall = np.exp(-np.arange(n) / 150)
    image, caption, alignment = (
        end + size * (fall + 0.01 * np.abs(rng.normal(size=n)) * (np.arange(n) < n - 8))
        for end, size in ((0.06677, 0.3), (1.14437, 6.0), (0.00997, 0.03))
    )
    accuracy = 0.694 - 0.6 * fall
    rate = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + np.cos(np.pi * epochs / 100))
    return {
        "train/optimizer/rate": series(rate, epochs * 16),
        "train/latent/std": series(std),
        "train/latent/norm": series(32 * std),
        "train/latent/mean": series(around(0.000452, 1e-4)),
        "train/latent/min": series(around(-0.071351, 0.002)),
        "train/latent/max": series(around(0.072583, 0.002)),
        "train/loss/image": series(image),
        "train/loss/caption": series(caption),
        "train/loss/alignment": series(alignment),
        "train/loss/total": series(image + caption + 0.5 * alignment),
        "train/logged/accuracy": series(accuracy),
    }


def test_the_documents_own_run_described(document):
    rate = describe(document["train/optimizer/rate"])
    assert rate.family.name == "cosine"  # "exponential decay", the report said
    assert rate.mean == pytest.approx(5.05e-4, rel=2e-3)
    assert rate.last == pytest.approx(1.246e-6, rel=1e-3)
    assert "cosine from 0.001 to 1.246e-06" in rate.family.said
    assert "an exponential would have the mean 0.000153, this has 0.000505" in rate.family.said
    std = describe(document["train/latent/std"])
    assert (std.first, std.transient) == (0.037161, 4)
    assert std.change == pytest.approx(-0.3167, abs=0.002)
    assert std.change_in_transient > 0.97
    assert std.settled_cv == pytest.approx(0.0117, abs=3e-4)
    assert std.rises in ("flat", "unclear")
    assert describe(document["train/loss/total"]).rises == "falling"


def test_the_documents_own_run_corrected(document):
    norm, total = relations(document)
    assert (norm.kind, norm.names) == ("proportional", ("train/latent/norm", "train/latent/std"))
    assert norm.factor == pytest.approx(32)
    assert "√1,024" in norm.said
    assert total.said.startswith(
        "train/loss/total = train/loss/image + train/loss/caption + 0.5 · train/loss/alignment"
    )
    for config in ({}, {"model": {"latent_dim": 1024, "channels": [64, 128, 256, 512]}, "name": "engravings"}):
        found = {d.name: d for d in derived(document, config)}
        assert found["train/latent/kl_per_dimension"].value == pytest.approx(3.17, abs=0.005)
        assert found["train/latent/kl"].value == pytest.approx(3248, abs=4)
        assert found["train/latent/dimensions"].value == 1024
        assert found["train/latent/norm"].null == 32
        assert found["train/latent/asymmetry"].value == pytest.approx(0.86, abs=0.005)
        assert "ratio is 1.017" in found["train/latent/asymmetry"].said
        assert found["train/latent/std"].null == pytest.approx(0.02552, abs=5e-6)
        assert "the latent ignores its input" in found["train/latent/std"].said
        assert found["train/loss/image: PSNR"].value == pytest.approx(11.75, abs=0.01)
        assert found["train/loss/caption: perplexity"].value == pytest.approx(3.14, abs=0.005)
        assert found["train/logged/accuracy"].null is None
        assert "69.4 % without a null is no finding" in found["train/logged/accuracy"].said


HOSTILE = (0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 1e-300, 3.0, 1e9)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 8, 9, 30, 501, 1300])
def test_nothing_breaks_it(n):
    rng = np.random.default_rng(n)
    steps = (
        np.arange(n),
        np.zeros(n, int),
        np.sort(rng.integers(0, 9, n)),
        np.arange(n) * 10**15 - 10**17,
        rng.permutation(n),
    )
    values = (
        np.full(n, np.nan), np.full(n, np.inf), np.zeros(n), np.full(n, 1e308), np.full(n, 5e-324), np.arange(n),
        rng.normal(size=n) * 1e307, rng.normal(size=n) * 1e-310, rng.normal(size=n).astype(np.float32),
        np.exp(np.linspace(-700, 700, n)),
        np.where(np.arange(n) % 2, np.nan, 1.0), rng.random(n) > 0.5, 1 + 1e-15 * rng.normal(size=n),
        *(rng.choice(HOSTILE, n) for _ in range(4)), np.where(rng.random(n) < 0.9, 1.5, rng.choice(HOSTILE, n)),
    )  # fmt: skip
    for t, v in itertools.product(steps, values):
        s = Series.of(t, v)
        d = describe(s)
        assert (d.rows, d.finite) == (n, np.isfinite(v).sum())
        if not d.finite:
            assert math.isnan(d.first)
            assert math.isnan(d.slope)
            assert (d.transient, d.family, d.spikes, d.rises) == (None, None, (), "unclear")
        elif n < 8:
            assert (d.family, d.transient, d.change_points) == (None, None, ())
    run = {f"train/latent/{k}": series(v) for k, v in zip(("std", "norm", "mean", "min", "max"), values, strict=False)}
    run |= {
        f"train/loss/{k}": series(v)
        for k, v in zip(("total", "mse", "kl", "ce", "nll", "vq"), values[5:], strict=False)
    }
    relations(run)
    phases(run)
    derived(run, {"latent": [1024, "x", None, {"deep": 3}], "vocabulary": math.nan, "batch_size": True})
