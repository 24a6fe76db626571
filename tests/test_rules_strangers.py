"""What rules say of programs that are not ours, whose conventions differ: each line was a false word once."""

import numpy as np
import pytest
from test_rules import FALLING, HEALTHY, NOISE, STEPS, UP, looks, series

from intaglio.health.diagnosis import chosen
from intaglio.health.record import Record
from intaglio.health.rule import apply

RISING = 1 - FALLING / 3
CODES = {"val/codes/perplexity": looks(np.linspace(12, 20, 10), null=30)}
DONE = {"val/codes/perplexity": looks(20, null=30), "val/codes/norm_ratio": looks(1)}
COARSE = np.tile(np.repeat([1.0, 0.9, 0.65, 0.35, 0.1], [4, 4, 4, 4, 4]), 5)
EASY = np.where(STEPS < 60, 1.5, 3.4 - 2 * np.exp(-STEPS / 400))
RAMP = np.minimum(1e-3, STEPS * 1e-6)
TERMS = {"train/loss/nll": series(700 + 10 * NOISE), "train/loss/kl": series(5 + NOISE**2)}
WEIGHTS = {"train/weight/nll": series(1e-3), "train/weight/kl": series(RAMP)}
WARM = np.concatenate([np.linspace(0.2, 1, 60), np.linspace(1, 0.01, 40)])
LOGGED = TERMS | WEIGHTS | {"train/loss/total": series(1e-3 * (700 + 10 * NOISE) + 1e-3 * (5 + NOISE**2))}
APPLIED = TERMS | WEIGHTS | {"train/loss/total": series(1e-3 * (700 + 10 * NOISE) + RAMP * (5 + NOISE**2))}
CLAMPED = {"train/loss/kl": series(np.minimum(STEPS / 200, 0.5)), "train/weight/kl": series(1.0)}
HUMP = np.where((STEPS > 180) & (STEPS < 220), 9.0, 2.0 + 0.01 * NOISE)
LATE = np.array([0.1] * 9 + [0.3])
ROUNDED = {"train/loss/a": series(HEALTHY), "train/loss/b": series(HEALTHY), "train/term.a/gradient_norm": looks(2)}
LOST = {
    "train/loss/nll": series(np.where(STEPS < 1000, 2.0, 3.1), null=3.0),
    "val/loss/nll": looks(np.where(np.arange(10) < 5, 2.0, 3.1), null=3.0),
}
FALLEN = 3 * (1 - np.exp(-STEPS / 300))
TURNED = np.array([-1.0, -1.8, -2.0, -1.9, -1.8, -1.6, -1.4, -1.2, -1.0, -0.9])
STEEPER = np.array([2.0, 1.2, 0.8, 0.8, 0.9, 1.2, 1.3, 1.4, 1.5, 1.6])
HARDER = np.where(STEPS < 800, 2.0 * np.exp(-STEPS / 300), 1.6 - STEPS / 4000)  # as where a ramp begins


def said(rule, given, facts=None):
    return [f.severity for f in apply(chosen([rule]), Record(given, facts or {}, steps=2000)).findings]


@pytest.mark.parametrize(
    ("rule", "given", "facts", "expected"),
    [
        ("rank-collapse", {"val/z/covariance_rank": looks(1, null=1, n=512)}, {}, []),
        ("rank-collapse", {"val/z/covariance_rank": looks(6, null=60, n=512)}, {}, []),
        ("rank-collapse", {"val/z/covariance_rank": looks(2.5, null=60, n=512)}, {}, ["warning"]),
        ("rank-collapse", {"val/z/covariance_rank": looks(1.1, null=60, n=512)}, {}, ["fail"]),
        ("anisotropic", {"val/z/participation_ratio": looks(1, null=1)}, {}, []),
        ("anisotropic", {"val/z/participation_ratio": looks(1.1, null=8)}, {}, ["warning"]),
        ("anisotropic", {"val/z/participation_ratio": looks(1.01, null=8)}, {}, ["fail"]),
        ("near-chance", {"val/loss/infonce": looks(8.6, null=9.07)}, {}, ["fail"]),
        ("near-chance", {"val/loss/itc": looks(8.6, null=9.07)}, {}, ["fail"]),
        ("near-chance", {"val/loss/infonce": looks(7.98, null=9.07)}, {}, ["warning"]),
        ("no-learning", {"train/loss/re": series(50 - RISING * 200, null=-300)}, {}, ["fail"]),
        ("no-learning", {"train/loss/re": series(50 - RISING * 600, null=-300)}, {}, []),
        ("no-learning", {"train/loss/a": series(HEALTHY), "val/digit/accuracy": looks(0.1, null=0.1)}, {}, ["fail"]),
        ("no-learning", {"train/loss/a": series(HEALTHY), "val/digit/accuracy": looks(LATE, null=0.1)}, {}, []),
        ("no-learning", {"train/loss/a": series(HEALTHY), "val/answer.size/accuracy": looks(0.1, null=0.1)}, {}, []),
        ("no-learning", LOST | {"train/weight/nll": series(1.0)}, {}, ["fail"]),
        ("no-learning", LOST | {"train/weight/nll": series(np.where(STEPS < 1000, 1.0, 0.01))}, {}, []),
        ("diverged", {"train/loss/nce": series(EASY, null=7), "val/loss/nce": looks(3, null=7)}, {}, ["warning"]),
        ("diverged", {"train/loss/total": series(UP)}, {}, ["fail"]),
        ("diverged", {"train/loss/total": series(UP)}, {"moving_targets": ["teacher.weight"]}, ["warning"]),
        ("diverged", {"train/loss/total": series(UP, null=2)}, {"moving_targets": ["teacher.weight"]}, ["fail"]),
        ("diverged", {"train/loss/total": series(np.where((STEPS > 80) & (STEPS < 500), STEPS, 3.3))}, {}, ["fail"]),
        ("spike", {"train/loss/kl": series(HUMP), "train/loss/total": series(HEALTHY)}, {}, []),
        ("spike", {"train/loss/re": series(np.where(STEPS == 1000, -3.0, 150 - STEPS * 0.15) + 0.01 * NOISE)}, {}, []),
        ("weight-not-applied", LOGGED, {}, ["fail"]),
        ("weight-not-applied", APPLIED, {}, []),
        ("kl-units", {"val/a/kl_nats": looks(3), "val/b/kl_nats": looks(2), "train/loss/kl": series(5)}, {}, []),
        ("kl-units", {"val/a/kl_nats": looks(30), "train/loss/kld": series(0.03)}, {}, ["warning"]),
        ("kl-units", {"val/a/kl_nats": looks(3), "train/loss/kl": series(-5)}, {}, []),
        ("codebook-collapse", {"val/codes/perplexity": looks(1.2, null=12)}, {}, ["fail"]),
        ("quantiser-loss-missing", CODES | {"train/loss/nll": series(HEALTHY)}, {}, []),
        ("quantiser-loss-missing", CODES | {"train/loss/commit": series(HEALTHY)}, {}, []),
        (
            "quantiser-loss-missing",
            CODES | {"train/loss/nll": series(HEALTHY), "val/codes/norm_ratio": looks(1)},
            {},
            ["fail"],
        ),
        ("quantiser-loss-missing", DONE | {"train/loss/nll": series(HEALTHY)}, {}, []),
        ("term-inert", CLAMPED | {"val/z/groups_above_floor": looks(0.1)}, {}, []),
        ("term-inert", CLAMPED | {"val/z/groups_above_floor": looks(1.0)}, {}, ["fail"]),
        ("term-inert", ROUNDED | {"train/term.b/gradient_norm": looks(1e-12)}, {}, ["fail"]),
        ("term-inert", ROUNDED | {"train/term.b/gradient_norm": looks(1e-6)}, {}, []),
        ("temperature-stuck", {"train/gumbel/temperature": series(np.maximum(0.5, 1 - STEPS / 1000))}, {}, []),
        ("temperature-stuck", {"train/pair/temperature": series(0.07)}, {}, ["warning"]),
        ("queue-stale", {"train/queue/queue_agreement": looks(0.02, null=0.0)}, {}, ["fail"]),
        ("queue-stale", {"train/queue/queue_agreement": looks(0.5, null=0.0)}, {}, ["warning"]),
        ("split-leak", {"train/loss/kld": series(HEALTHY), "val/loss/kld": series(0.2 * HEALTHY)}, {}, []),
        (
            "split-leak",
            {"val/answer/accuracy": series(0.8), "val/answer.row/accuracy": series(1.0)},
            {},
            [],
        ),
        ("split-leak", {"train/loss/tc": series(7 + NOISE / 1e6), "val/loss/tc": series(7 - NOISE / 1e6)}, {}, []),
        ("split-leak", {"train/loss/tc": series(HEALTHY), "val/loss/tc": series(HEALTHY)}, {}, ["fail"]),
        ("question-only", {"val/answer.size/accuracy": looks(0.5, null=0.5, n=80)}, {}, []),
        ("question-only", {"val/answer.size/accuracy": looks(0.5, null=0.5, n=800)}, {}, ["warning"]),
        (
            "question-only",
            {"val/answer/shuffled_image_nats": looks(0.06), "val/latent/shuffled_latent_nats": looks(4.0)},
            {},
            ["fail"],
        ),
        ("validation-missing", {"train/loss/c": series(0.6 * RISING), "val/loss/c": looks(0.4)}, {}, []),
        ("learning-rate-off", {"train/optimizer/rate": series(np.repeat(np.arange(1, 6), 20) / 5)}, {}, ["fail"]),
        ("learning-rate-off", {"train/optimizer/rate": series(WARM)}, {}, []),
        ("learning-rate-off", {"train/optimizer/rate": series(COARSE)}, {}, []),
        ("learning-rate-off", {"train/optimizer/rate": series(0.9 ** np.repeat(np.arange(7), 15)[:100])}, {}, []),
        ("learning-rate-off", {"train/optimizer/rate": series(1 - np.linspace(0, 0.5, 100))}, {}, ["fail"]),
        (
            "latent-ignores-input",
            {"val/z/varying_share": looks(5e-4), "val/z/std": looks(0.3)},
            {},
            ["warning"],
        ),
        ("latent-ignores-input", {"val/z/varying_share": looks(0), "val/z/std": looks(0)}, {}, ["fail"]),
        ("overfitting", {"train/loss/a": series(FALLING**3), "val/loss/a": looks(1.0, null=9.0)}, {}, ["warning"]),
        ("overfitting", {"train/loss/a": series(-FALLEN), "val/loss/a": looks(TURNED, null=-1)}, {}, ["fail"]),
        ("overfitting", {"train/loss/a": series(HARDER), "val/loss/a": looks(STEEPER, null=9.0)}, {}, []),
        ("overfitting", {"train/loss/a": series(FALLING**3), "val/loss/a": looks(STEEPER, null=3.0)}, {}, ["fail"]),
        (
            "overfitting",
            {"train/text/nats_per_token": looks(0.1), "val/text/nats_per_token": looks(0.7, null=1.0)},
            {},
            ["fail"],
        ),
    ],
)
def test_what_is_right_for_its_kind_of_program_is_not_accused(rule, given, facts, expected):
    assert said(rule, given, facts) == expected


def test_the_cause_of_a_cause_is_as_grave_as_what_follows_in_the_end():
    given = {
        "train/loss/a": series(HEALTHY),
        "val/caption/accuracy_forced": looks(0.9),
        "val/caption/accuracy": looks(0.6),
        "val/prior/object": looks(0.1, null=0.1),
        "val/posterior/object": looks(0.9, null=0.1),
    }
    rules = chosen(["prior-mismatch", "free-running-gap", "dead-parameters"])
    found = apply(rules, Record(given, {"dead_parameters": {"encoder": 10}, "parameters": 10_000}, steps=2000)).findings
    assert [f.rule for f in found] == ["dead-parameters", "free-running-gap", "prior-mismatch"]
    assert {f.severity for f in found} == {"fail"}
