"""Rules on curves whose null nobody logged, as in foreign histories: faults by name, healthy curves that look bad."""

import numpy as np
import pytest

from intaglio.health.diagnosis import diagnose
from intaglio.health.record import Record
from intaglio.health.rules import course
from intaglio.history import Series

N = 80
X = np.arange(N)


def rng(seed=0):
    return np.random.default_rng(seed)


def noisy(values, share=0.03, seed=0):
    return np.asarray(values, float) * np.exp(share * rng(seed).normal(size=len(values)))


def verdict(curves, config=None, **settings):
    series = {name: Series.of(np.arange(len(v)) + 1, np.asarray(v, float)) for name, v in curves.items()}
    facts = {"settings": config} if config else {}
    return diagnose(Record(series, facts, foreign="CSV", **settings))


def losses(train, val=None, **more):
    return {"train/loss/total": train} | ({"val/loss/total": val} if val is not None else {}) | more


FALLING = 2.0 * np.exp(-X / 20) + 0.3
GOOD = losses(noisy(FALLING), noisy(FALLING * 1.1, 0.05, 1))
BLOWN = np.r_[noisy(FALLING[:-3]), 0.9, 1.2, 1.4]
HUMP = np.where((X > 45) & (X < 58), 2.2, FALLING)

FAULTS = {
    "never moved": (losses(noisy(np.full(N, 3e-4), 0.05), noisy(np.full(N, 5e-4), 0.05, 1)), "no-learning"),
    "rose": (losses(noisy(np.linspace(184, 210, 14), 0.01), noisy(np.linspace(135, 190, 14), 0.02)), "no-learning"),
    "exploded, then constant": (losses([5e10, 1400, *[288.4] * 10], [5900, *[277.5] * 11]), "no-learning"),
    "guesses among ten": (
        losses([2.4, *noisy([2.302] * 60, 1e-4)], noisy([2.302] * 61, 1e-4), **{"val/logged/accuracy": [0.1135] * 61}),
        "no-learning",
    ),
    "same answer for all": (
        losses([1.6, *noisy([1.06] * 60, 2e-3)], [1.16, *noisy([1.05] * 60, 2e-3)])
        | {"val/logged/accuracy": [0.27, 0.41, *[0.397] * 59]},
        "no-learning",
    ),
    "NaN": (losses([1.0] * 4 + [np.nan] * 30), "non-finite"),
    "NaN from the first row": (losses([np.nan] * 10, [np.nan] * 10), "non-finite"),
    "diverged": (losses(noisy(np.where(X > 50, 0.4 + (X - 50) / 4, FALLING))), "diverged"),
    "ends in a blow-up": (losses(BLOWN, BLOWN * 1.3), "diverged"),
    "lost what it had": (losses(noisy(HUMP)[:62], noisy(HUMP * 1.05, 0.03, 1)[:62]), "diverged"),
    "overfitted": (losses(noisy(np.exp(-X / 15)), noisy(0.6 * np.exp(-X / 8) + 0.3 + X / 200)), "overfitting"),
    "parted": (losses(noisy(25 * np.exp(-X / 20) + 1.2), noisy(20 * np.exp(-X / 9) + 10, 0.02)), "overfitting"),
    "posterior collapsed": (
        losses(noisy(FALLING * 100), **{"train/loss/kl": np.r_[30, 5, 1, noisy([0.05] * 60, 0.2)]}),
        "posterior-collapse",
    ),
    "negative KL collapsed": (
        losses(noisy(FALLING * 100), **{"train/loss/kl": -np.r_[30, 5, 1, noisy([0.05] * 60, 0.2)]}),
        "posterior-collapse",
    ),
    "never any KL": (losses(noisy(FALLING), **{"train/loss/kl": noisy([2e-5] * 60, 0.3)}), "posterior-collapse"),
    "one code": (
        losses(noisy(FALLING), **{"train/codes/perplexity": np.r_[60, 20, 5, [1.02] * 60]}),
        "codebook-collapse",
    ),
    "quantiser runs away": (
        losses(noisy(FALLING), **{"train/loss/vq": noisy(0.1 * np.exp(X / 10), 0.05)}),
        "codes-displaced",
    ),
    "discriminator won": (
        losses(
            noisy(FALLING),
            **{"train/loss/discriminator": noisy(1.3 * np.exp(-X / 8) + 1e-3), "train/loss/generator": 0.7 + X / 15},
        ),
        "adversary-won",
    ),
    "validated on training items": (losses(noisy(FALLING), noisy(FALLING)), "split-leak"),
}
HEALTHY = {
    "plain": GOOD,
    "maximised metric": GOOD | {"val/logged/accuracy": 1 - FALLING / 3},
    "plateau, then learns": losses(
        noisy(np.where(X < 45, 0.692, 0.35 + 0.34 * np.exp(-(X - 45) / 8)), 0.004),
        noisy(np.where(X < 45, 0.693, 0.35 + 0.34 * np.exp(-(X - 45) / 8)), 0.004, 1),
    ),
    "spikes that recover": losses(noisy(np.where(np.isin(X, (21, 46, 65)), 4, 1) * FALLING), noisy(FALLING, 0.05, 1)),
    "warm restarts": losses(
        noisy(FALLING * (1 + 0.8 * np.exp(-(X % 27) / 4) * (X > 26))),
        noisy(FALLING * (1.1 + 0.5 * np.exp(-(X % 27) / 4))),
    ),
    "noisy validation": losses(noisy(FALLING), noisy(FALLING * 1.2, 0.25, 3)),
    "negative loss": losses(-5 + noisy(FALLING), -4.9 + noisy(FALLING, 0.05, 1)),
    "small gap": losses(noisy(0.3 * np.exp(-X / 9) + 0.006), noisy(0.3 * np.exp(-X / 9) + 0.0102, 0.05, 1)),
    "KL that rises from nothing": GOOD | {"train/loss/kl": noisy(12 * (1 - np.exp(-X / 20)) + 1e-3)},
    "KL annealed": GOOD | {"train/loss/kl": noisy(800 * np.exp(-X / 5) + 9)},
    "total lifted by a ramp": {
        "train/loss/reconstruction": noisy(FALLING),
        "val/loss/reconstruction": noisy(FALLING * 1.1, 0.05, 1),
        "train/loss/kl": noisy(5 * (1 - np.exp(-X / 20)) + 0.1),
        "train/weight/kl": np.linspace(0, 1, N),
        "train/loss/total": noisy(FALLING) + np.linspace(0, 1, N) * 5,
    },
    "quantiser's loss rises, then settles": GOOD
    | {
        "train/loss/vq": noisy(0.02 + 0.3 * (1 - np.exp(-X / 10))),
        "train/codes/perplexity": 40 + 200 * (1 - np.exp(-X / 20)),
    },
    "balanced adversaries": GOOD
    | {"train/loss/discriminator": noisy([1.38] * N), "train/loss/generator": noisy([0.7] * N)},
    "perplexity of a language model": GOOD | {"train/logged/perplexity": np.exp(FALLING)},
    "gradients of a heavy tail": GOOD | {"train/optimizer/gradient_norm": np.exp(rng(5).normal(size=N))},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_its_name(name):
    curves, rule = FAULTS[name]
    found = verdict(curves)
    assert found.verdict == "failing"
    assert rule in [f.rule for f in found.findings if f.severity == "fail"], [f.message for f in found.findings]


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("scale", [1.0, 3e-4, 5e3])
def test_a_healthy_curve_is_not_called_failing_at_any_scale(name, scale):
    curves = {n: np.asarray(v) * (scale if "/loss/total" in n else 1) for n, v in HEALTHY[name].items()}
    found = verdict(curves, {"num_embeddings": 512})
    assert found.verdict in {"healthy", "warnings"}, [f.message for f in found.findings]


def test_what_is_missing_is_not_measured_and_never_a_fault():
    for curves in (losses(noisy(FALLING)), losses([1.0]), losses([3, 2, 1.0]), {"weight_norm": FALLING}):
        found = verdict(curves)
        assert found.verdict == "cannot tell"
        assert not [f for f in found.findings if f.severity == "fail"]


def test_two_scales_are_said_and_not_taken_for_overfitting():
    found = verdict(losses(noisy(FALLING), noisy(80 + X / 5)))
    assert found.verdict != "failing"
    assert "validation-missing" in [f.rule for f in found.findings]
    assert "overfitting" in [gap.get("rule") for gap in found.not_measured]


def test_a_collapse_that_recovers_is_not_failing():
    kl = np.r_[30, 2, 1, [0.07] * 20, np.linspace(0.07, 1.3, 57)]
    found = verdict(losses(noisy(FALLING * 100), **{"train/loss/kl": kl}))
    assert [f.severity for f in found.findings if f.rule == "posterior-collapse"] == ["warning"]


def test_codes_are_held_against_the_size_that_the_settings_name():
    curves = GOOD | {"train/codes/perplexity": noisy([30.0] * N)}
    assert verdict(curves, {"model.num_embeddings": 512}).verdict == "failing"
    assert verdict(curves, {"model.num_embeddings": 32}).verdict == "healthy"
    assert "codebook-collapse" in [gap.get("rule") for gap in verdict(curves).not_measured]


def test_noise_alone_is_neither_stuck_nor_lost_more_often_than_chance():
    fell = lost = 0
    for seed in range(300):
        s = Series.of(X, noisy(FALLING, 0.1, seed))
        fell += course.stuck(s) is None
        x = course.lost(s)
        lost += x is not None and not x.recovered
    assert fell == 300
    assert lost <= 3
    still = sum(course.stuck(Series.of(X, noisy(np.ones(N), 0.1, seed))) is not None for seed in range(300))
    assert still >= 295
