"""Rules over records: each fires on the shape of its fault and stays quiet on healthy runs that look like it."""

import math

import numpy as np
import pytest

from intaglio.health.diagnosis import chosen, diagnose, load_profile
from intaglio.health.finding import Remedy
from intaglio.health.record import Record
from intaglio.health.remedies import command
from intaglio.health.rules import all_rules
from intaglio.history import Series

STEPS = np.arange(20, 2020, 20)
NOISE = np.random.default_rng(0).normal(size=len(STEPS))
FALLING = 3 * np.exp(-STEPS / 400) + 0.3
HEALTHY = FALLING + 0.02 * NOISE


def series(values, null=np.nan, steps=STEPS, n=np.nan):
    columns = (np.broadcast_to(np.asarray(x, float), len(steps)) for x in (values, null, n))
    return Series(np.asarray(steps), *columns)


def found(rule, series_by_name, **rest):
    """Severities of one rule's findings; None where it could not look."""
    rest = {"config": {"system": None}, **rest}
    diagnosis = diagnose(Record(series_by_name, **rest), rules=chosen([rule]))
    if diagnosis.not_measured:
        return None
    return [f.severity for f in diagnosis.findings]


def looks(values, null=np.nan, n=np.nan):
    return series(values, null, np.arange(200, 2200, 200), n)


SPIKE = np.where(STEPS == 1000, 20.0, HEALTHY)
NAN = np.where(STEPS > 1500, np.nan, HEALTHY)
UP = np.where(STEPS > 1500, HEALTHY + (STEPS - 1500) / 100, HEALTHY)
LATE = np.where(STEPS < 1000, 3.3, 0.3 + 3 * np.exp(-(STEPS - 1000) / 200)) + 0.02 * NOISE
WIDE = {f"val/context/context_repeated{end}": looks(x) for end, x in (("", 0.1), ("_low", -0.1), ("_high", 0.3))}
OPTIM = {"optim": {"rate": 1e-3, "floor": 1e-6, "warmup": 100, "schedule": "cosine"}, "system": None}
TURNED = np.array([3, 2, 1.5, 1.2, 1.1, 1.3, 1.6, 2.0, 2.4, 2.8])

TRUE = {"val/caption/token_accuracy": looks(0.41)}
CASES = [
    ("non-finite", {"train/loss/a": series(NAN)}, ["fail"]),
    ("non-finite", {"train/loss/a": series(HEALTHY)}, []),
    ("diverged", {"train/loss/a": series(UP)}, ["fail"]),
    ("diverged", {"train/loss/a": series(HEALTHY)}, []),
    ("diverged", {"train/loss/a": series(SPIKE)}, []),
    ("diverged", {"train/loss/a": series(LATE)}, []),
    ("diverged", {"train/loss/total": series(UP), "train/weight/kl": series(STEPS / 2000)}, None),
    ("adversary-won", {"train/loss/discriminator": series(np.where(STEPS > 400, 1e-3, 1.3))}, ["warning"]),
    ("adversary-won", {"train/loss/discriminator": series(1.38 + 0.05 * NOISE)}, []),
    ("spike", {"train/loss/a": series(SPIKE)}, ["warning"]),
    ("spike", {"train/loss/a": series(HEALTHY)}, []),
    ("spike", {"train/optimizer/gradient_norm": series(np.exp(NOISE))}, []),
    ("term-inert", {"train/loss/a": series(0.5)}, ["fail"]),
    ("term-inert", {"train/loss/a": series(0.5), "train/weight/a": series(0.0)}, []),
    ("term-inert", {"train/loss/a": series(HEALTHY), "train/term.a/gradient_norm": series(0.0)}, ["fail"]),
    ("term-inert", {"train/loss/a": series(HEALTHY), "train/term.a/gradient_norm": series(1.0)}, []),
    (
        "term-dominates",
        {"train/term.a/gradient_share": series(0.99), "train/term.b/gradient_share": series(0.01)},
        ["warning"],
    ),
    ("term-dominates", {"train/term.a/gradient_share": series(0.7), "train/term.b/gradient_share": series(0.3)}, []),
    *(
        (
            "term-dominates",
            {
                **{f"train/term.{name}/gradient_share": series(share) for name, share in (("kl", 0.99), ("a", 0.01))},
                "val/loss/a": series(left, null=1.0),
            },
            said,
        )
        for left, said in ((0.5, ["warning"]), (0.01, []))
    ),
    (
        "weight-not-applied",
        {"train/loss/a": series(HEALTHY), "train/weight/a": series(STEPS / 2000), "train/loss/total": series(HEALTHY)},
        ["fail"],
    ),
    (
        "weight-not-applied",
        {"train/loss/a": series(HEALTHY), "train/weight/a": series(0.5), "train/loss/total": series(0.5 * HEALTHY)},
        [],
    ),
    ("input-starved", {"train/speed/wait_share": series(0.6)}, ["warning"]),
    ("input-starved", {"train/speed/wait_share": series(0.01)}, []),
    ("no-learning", {"val/loss/a": looks(2.99, null=3.0)}, ["fail"]),
    ("no-learning", {"val/loss/a": looks(1.0, null=3.0)}, []),
    ("no-learning", {"val/loss/a": looks(1.0)}, ["fail"]),
    ("no-learning", {"val/loss/a": looks(TURNED)}, []),
    ("no-learning", {"val/loss/a": series(1.0, steps=np.arange(3))}, None),
    ("plateau", {"train/loss/a": series(math.log(32) + 0.001 * NOISE)}, ["fail"]),
    ("plateau", {"train/loss/a": series(HEALTHY)}, []),
    ("plateau", {"train/loss/a": series(LATE)}, []),
    ("overfitting", {"train/loss/a": series(HEALTHY), "val/loss/a": looks(TURNED)}, ["fail"]),
    ("overfitting", {"train/loss/a": series(HEALTHY), "val/loss/a": looks(3 * np.exp(-np.arange(10) / 2) + 0.4)}, []),
    ("validation-missing", {"train/loss/a": series(HEALTHY)}, ["fail"]),
    ("validation-missing", {"train/loss/a": series(HEALTHY), "val/loss/a": series([2, 1], steps=[1, 2])}, ["warning"]),
    ("validation-missing", {"train/loss/a": series(HEALTHY), "val/loss/a": looks(1.0)}, []),
    ("log-distorted", {"train/optimizer/gradient_norm": series(np.minimum(1.0, np.exp(NOISE)))}, ["warning"]),
    ("log-distorted", {"train/optimizer/gradient_norm": series(np.exp(NOISE))}, []),
    ("latent-ignores-input", {"val/latent/varying_share": looks(1e-6)}, ["fail"]),
    ("latent-ignores-input", {"val/latent/varying_share": looks(0.5)}, []),
    ("rank-collapse", {"val/latent/covariance_rank": looks(7, null=220)}, ["fail"]),
    ("rank-collapse", {"val/latent/covariance_rank": looks(120, null=220)}, []),
    ("anisotropic", {"val/latent/participation_ratio": looks(1.1, null=180)}, ["fail"]),
    ("anisotropic", {"val/latent/participation_ratio": looks(1.4, null=180)}, ["warning"]),
    ("anisotropic", {"val/latent/participation_ratio": looks(40, null=180)}, []),
    ("prior-mismatch", {"val/prior/object": looks(0.2, 0.1), "val/posterior/object": looks(0.9, 0.1)}, ["fail"]),
    ("prior-mismatch", {"val/prior/object": looks(0.86, 0.1), "val/posterior/object": looks(0.9, 0.1)}, []),
    ("prior-mismatch", {"val/latent/prior_nats": looks(3248.0)}, ["warning"]),
    ("norm-pinned", {"val/latent/norm": looks(16.0)}, ["warning"]),
    (
        "norm-pinned",
        {"val/latent/norm": looks(16 + np.arange(10)), "val/latent/std": looks(1 + np.arange(10) / 16)},
        ["note"],
    ),
    ("norm-pinned", {"val/latent/norm": looks(16 + TURNED), "val/latent/std": looks(TURNED[::-1] ** 2)}, []),
    ("latent-drift", {"val/latent/asymmetry": looks(np.arange(10) / 5, n=512)}, ["warning"]),
    ("latent-drift", {"val/latent/asymmetry": looks(0.1 + 0.05 * NOISE[:10], n=512)}, []),
    ("decoder-ignores-latent", {"val/caption/shuffled_latent_nats": looks(0.0)}, ["fail"]),
    ("decoder-ignores-latent", {"val/caption/shuffled_latent_nats": looks(1.7)}, []),
    ("decoder-ignores-latent", {"val/image/shuffled_latent_nats": looks(0.1)}, []),
    ("flattering-accuracy", TRUE | {"val/caption/accuracy_as_logged": looks(0.694)}, ["fail"]),
    ("flattering-accuracy", TRUE | {"val/caption/accuracy_as_logged": looks(0.42)}, []),
    ("vocabulary-unreachable", {"train/text/unreachable_share": looks(0.3)}, ["warning"]),
    (
        "vocabulary-unreachable",
        {"train/text/unreachable_share": looks(0.0), "val/text/unknown_share": looks(0.001)},
        [],
    ),
    ("free-running-gap", {"val/caption/object_forced": looks(0.95), "val/caption/object": looks(0.5)}, ["warning"]),
    ("free-running-gap", {"val/caption/object_forced": looks(0.95), "val/caption/object": looks(0.93)}, []),
    ("question-only", {"val/answer/shuffled_image_nats": looks(0.0)}, ["fail"]),
    ("question-only", {"val/answer.count/accuracy": looks(0.4, null=0.39)}, ["warning"]),
    (
        "question-only",
        {"val/answer/shuffled_image_nats": looks(1.0), "val/answer.count/accuracy": looks(0.8, null=0.39)},
        [],
    ),
    ("posterior-collapse", {"val/latent/kl_nats": looks(0.01)}, ["fail"]),
    ("posterior-collapse", {"val/latent/kl_nats": looks(30), "val/caption/shuffled_latent_nats": looks(1.0)}, []),
    ("kl-free", {"train/kl/groups_above_floor": series(0.0)}, ["warning"]),
    ("kl-free", {"train/kl/groups_above_floor": series(0.5)}, []),
    ("kl-parked", {"train/kl/kl_charged": series(0.801, null=0.8)}, ["note"]),
    ("kl-parked", {"train/kl/kl_charged": series(3.0, null=0.8)}, []),
    ("rate-too-high", {"val/z/target_entropy": looks(4.7), "val/z/kl_nats": looks(77)}, ["warning"]),
    ("rate-too-high", {"val/z/target_entropy": looks(4.7), "val/z/kl_nats": looks(6)}, []),
    ("kl-units", {"val/z/kl_nats": looks(77), "val/loss/kl": looks(77 / 512)}, ["warning"]),
    ("kl-units", {"val/z/kl_nats": looks(77), "val/loss/kl": looks(76)}, []),
    ("codebook-collapse", {"train/vq/perplexity": series(20, null=500)}, ["fail"]),
    ("codebook-collapse", {"train/vq/perplexity": series(300, null=500)}, []),
    ("codebook-collapse", {"train/vq/perplexity": series(300)}, None),
    ("codes-dead", {"train/vq/dead_share": series(0.9)}, ["fail"]),
    ("codes-dead", {"train/vq/dead_share": series(0.3)}, ["warning"]),
    ("codes-dead", {"train/vq/mass_ratio": series(0.4)}, ["warning"]),
    ("codes-dead", {"train/vq/dead_share": series(0.01), "train/vq/mass_ratio": series(1.0)}, []),
    ("codes-displaced", {"train/vq/norm_ratio": series(60)}, ["fail"]),
    ("codes-displaced", {"train/vq/norm_ratio": series(3.4)}, ["warning"]),
    ("codes-displaced", {"train/vq/norm_ratio": series(0.9)}, []),
    (
        "codes-shrink",
        {"train/loss/vq": series(FALLING), "train/loss/reconstruction": series(0.3 + STEPS / 1000)},
        ["warning"],
    ),
    ("codes-shrink", {"train/loss/vq": series(FALLING), "train/loss/reconstruction": series(FALLING)}, []),
    ("codes-polluted", {"val/vq/codebook_moved": looks(1.0)}, ["fail"]),
    ("codes-polluted", {"train/vq/updates_per_step": series(2.0)}, ["fail"]),
    ("codes-polluted", {"val/vq/codebook_moved": looks(0.0), "train/vq/updates_per_step": series(1.0)}, []),
    ("near-chance", {"val/loss/contrastive": looks(9.0, null=9.07)}, ["fail"]),
    ("near-chance", {"val/loss/contrastive": looks(8.3, null=9.07)}, ["warning"]),
    ("near-chance", {"val/loss/contrastive": looks(4.0, null=9.07)}, []),
    ("trivial-pair", {"val/pair/distinct_views": looks(0.0)}, ["fail"]),
    ("trivial-pair", {"val/pair/strangers_nats": looks(0.0)}, ["fail"]),
    ("trivial-pair", {"val/pair/distinct_views": looks(1.0), "val/pair/strangers_nats": looks(2.0)}, []),
    ("context-order-inert", {"val/context/context_repeated": looks(0.0)}, ["fail"]),
    ("context-order-inert", {"val/context/context_repeated": looks(0.3)}, []),
    ("context-order-inert", WIDE | {"val/loss/infonce": looks(1.0)}, None),
    ("context-order-inert", WIDE | {"val/loss/infonce": looks(40.0)}, ["fail"]),
    ("temperature-stuck", {"train/pair/temperature": series(0.07)}, ["warning"]),
    (
        "temperature-stuck",
        {"train/pair/temperature": series(np.maximum(0.01, 0.07 - STEPS / 2e4), null=0.01)},
        ["warning"],
    ),
    ("temperature-stuck", {"train/pair/temperature": series(0.07 - STEPS / 1e5)}, []),
    ("sigreg-blind", {"val/z/sigreg_blind": looks(1.0), "val/z/sigreg": looks(0.4, null=0.01)}, ["fail"]),
    ("sigreg-blind", {"val/z/sigreg_blind": looks(0.0), "val/z/sigreg": looks(0.01, null=0.01)}, []),
    ("queue-stale", {"train/queue/queue_agreement": series(0.3)}, ["warning"]),
    ("queue-stale", {"train/queue/queue_agreement": series(0.97)}, []),
    ("modality-gap", {"val/pair/modality_gap": looks(1.2), "val/retrieval/x_r1": looks(0.01)}, ["warning"]),
    ("modality-gap", {"val/pair/modality_gap": looks(1.2), "val/retrieval/x_r1": looks(0.6)}, []),
    ("latent-scale", {"val/z/clamped_share": looks(0.317)}, ["fail"]),
    ("latent-scale", {"val/z/clamped_share": looks(0.0), "val/z/scaled_std": looks(1.02)}, []),
]


CASES += [
    ("temperature-misstates-rate", {"train/latent/noise_ratio": looks(0.6, 1)}, ["warning"]),
    ("temperature-misstates-rate", {"train/latent/noise_ratio": looks(0.0, 1)}, ["fail"]),
    ("temperature-misstates-rate", {"train/latent/noise_ratio": looks(1.01, 1)}, []),
    ("temperature-misstates-rate", {"val/latent/noise_ratio": looks(0.0, 1)}, []),
    ("teacher-inert", {"train/term.teacher/gradient_norm": looks(0.0)}, ["fail"]),
    ("teacher-inert", {"train/term.teacher/gradient_norm": looks(0.1)}, []),
    ("teacher-inert", {"train/answers/tie_rate": looks(0.97)}, ["warning"]),
    ("teacher-inert", {"train/answers/tie_rate": looks(0.2)}, []),
    ("revival-threshold", {"train/codes/revival_threshold": looks(1.0, 256 / 768)}, ["fail"]),
    ("revival-threshold", {"train/codes/revival_threshold": looks(0.2, 256 / 768)}, ["warning"]),
    ("revival-threshold", {"train/codes/revival_threshold": looks(0.03, 256 / 768)}, []),
    ("revival-threshold", {"train/codes/revival_threshold": looks(0.03)}, None),
    ("quantiser-loss-missing", {"val/codes/perplexity": looks(90, 100), "train/loss/a": series(HEALTHY)}, ["fail"]),
    (
        "quantiser-loss-missing",
        {"val/codes/perplexity": looks(90, 100), "train/loss/vq": series(HEALTHY), "train/weight/vq": series(0.0)},
        ["fail"],
    ),
    ("quantiser-loss-missing", {"val/codes/perplexity": looks(90, 100), "train/loss/vq": series(HEALTHY)}, []),
    (
        "quantiser-loss-missing",
        {"val/codes/perplexity": looks(90, 100)}
        | {f"train/loss/{t}": series(HEALTHY) for t in ("commitment", "codebook")}
        | {"train/weight/commitment": series(1.0), "train/weight/codebook": series(0.25)},
        ["warning"],
    ),
]


COSINE = 0.55 + 0.45 * np.cos(np.pi * STEPS / 2000)
CASES += [
    ("free-running-gap", {"val/caption/object_forced": looks(0.95), "val/caption/object": looks(0.3)}, ["fail"]),
    (
        "decoder-ignores-latent",
        {"val/caption/shuffled_latent_nats": looks(6e-5), "val/caption/shuffled_latent_nats_low": looks(4e-5)},
        ["fail"],
    ),
    (
        "decoder-ignores-latent",
        {"val/caption/shuffled_latent_nats": looks(0.02), "val/caption/shuffled_latent_nats_low": looks(0.01)}
        | {"val/caption/nats_per_token": looks(1.2)},
        ["warning"],
    ),
    ("no-learning", {"train/loss/a": series(0.8, null=0.71), "val/loss/a": looks(0.32, null=0.71)}, []),
    ("no-learning", {"train/loss/a": series(0.8, null=0.71), "val/loss/a": looks(0.8, null=0.71)}, ["fail"]),
    ("no-learning", {"train/loss/a": series(np.where(STEPS > 1200, 3.6, FALLING), null=3.3)}, []),
    (
        "weight-not-applied",
        {"train/loss/a": series(1.0), "train/weight/a": series(0.5), "train/loss/discriminator": series(0.7)}
        | {"train/loss/total": series(1.0)},
        ["fail"],
    ),
    (
        "weight-not-applied",
        {"train/loss/a": series(1.0), "train/weight/a": series(0.5), "train/loss/discriminator": series(0.7)}
        | {"train/loss/total": series(0.5)},
        [],
    ),
]

COURSES = {
    "half a cosine": (1e-3 * (0.5 + 0.5 * np.cos(np.pi * STEPS / 4000)), ["fail"]),
    "a floor from a quarter on": (
        np.where(STEPS < 500, 1e-3 * (0.55 + 0.45 * np.cos(np.pi * STEPS / 500)), 1e-4),
        ["fail"],
    ),
    "a high floor": (np.where(STEPS < 500, 1e-3 * (0.75 + 0.25 * np.cos(np.pi * STEPS / 500)), 5e-4), ["warning"]),
    "next to nothing from half on": (1e-3 * np.exp(-STEPS / 200), ["fail"]),
    "fallen at once": (np.where(STEPS < 30, 1e-3, 5e-5), ["fail"]),
    "warmed up in every epoch": (1e-3 * np.minimum(1, (STEPS % 500) / 200 + 0.05), ["fail"]),
    "warmed up by epochs": (1e-3 * (STEPS // 250) / 8, ["fail"]),
    "a cosine": (1e-3 * COSINE, []),
    "constant": (np.full(len(STEPS), 1e-3), []),
    "warm restarts": (1e-3 * (0.55 + 0.45 * np.cos(np.pi * (STEPS % 500) / 500)), []),
    "warm restarts down to nothing": (1e-3 * (0.5 + 0.5 * np.cos(np.pi * (STEPS % 500) / 500)), []),
    "steps": (1e-3 * np.where(STEPS < 500, 1.0, np.where(STEPS < 1500, 0.3, 0.1)), []),
    "exponential": (1e-3 * np.exp(-STEPS / 900), []),
    "linear to nothing": (1e-3 * (1 - STEPS / 2100), []),
}


@pytest.mark.parametrize("course", COURSES)
def test_a_rate_that_nobody_configured_is_read_by_its_course(course):
    values, expected = COURSES[course]
    record = Record({"train/optimizer/rate": series(values)}, steps=2000)
    diagnosis = diagnose(record, rules=chosen(["learning-rate-off"]))
    assert [f.severity for f in diagnosis.findings] == expected, diagnosis.findings
    cut = Record({"train/optimizer/rate": series(values)}, steps=8000)
    assert not diagnose(cut, rules=chosen(["learning-rate-off"])).findings


def test_a_training_that_ended_amid_a_ramp_is_told_without_a_configuration():
    given = {"train/weight/kl": series(STEPS / 4000), "train/loss/kl": series(HEALTHY)}
    for steps, expected in ((4000, ["warning"]), (2000, [])):
        assert [
            f.severity for f in diagnose(Record(given, steps=steps), rules=chosen(["stopped-in-ramp"])).findings
        ] == expected


def test_causes_are_told_before_symptoms():
    given = {"train/loss/a": series(0.8, null=0.71)}
    record = Record(given, facts={"dead_parameters": {"encoder": 1000}, "parameters": 1200})
    assert [f.rule for f in diagnose(record).findings if f.severity == "fail"][-1] == "no-learning"


def test_a_warned_cause_is_as_grave_as_what_follows_from_it_and_told_first():
    tied = {"tied_and_frozen": [["head.weight", "embedding.weight"]]}
    rules = chosen(["no-learning", "tied-and-frozen", "spike"])
    stands = Record({"train/loss/a": series(0.71, null=0.71)}, facts=tied)
    cause, symptom = diagnose(stands, rules=rules).findings
    assert (cause.rule, cause.severity, symptom.rule) == ("tied-and-frozen", "fail", "no-learning")
    assert cause.message.endswith("It is known to bring about no-learning.")
    learns = Record({"train/loss/a": series(HEALTHY, null=0.71)}, facts=tied)
    assert [(f.rule, f.severity) for f in diagnose(learns, rules=rules).findings] == [("tied-and-frozen", "warning")]


def test_symptoms_are_told_after_what_they_follow_from_and_are_not_made_graver():
    rules = chosen(["trivial-pair", "rank-collapse"])
    for rank, expected in ((1.2, ["rank-collapse", "trivial-pair"]), (4.0, ["trivial-pair", "rank-collapse"])):
        given = {"val/pair/strangers_nats": series(0.0, null=0), "val/image/covariance_rank": series(rank, null=60)}
        found = diagnose(Record(given, steps=2000), rules=rules).findings
        assert [f.rule for f in found] == expected, found


def test_a_term_that_rises_where_another_pays_for_it_has_not_diverged():
    given = {"train/loss/invariance": series(HEALTHY), "train/loss/covariance": series(UP)}
    for weight, expected in ((1e-3, []), (1.0, ["fail"])):
        weights = {"train/weight/invariance": series(1.0), "train/weight/covariance": series(weight)}
        record = Record(given | weights, steps=2000)
        assert [f.severity for f in diagnose(record, rules=chosen(["diverged"])).findings] == expected


def test_a_total_begins_anew_where_its_terms_do():
    early, late = STEPS[STEPS <= 1000], STEPS[STEPS > 1000]
    falling, prior = np.exp(-early / 300), 3 + np.exp(-(late - 1000) / 300)
    given = {
        "train/loss/reconstruct": series(falling, steps=early),
        "train/loss/prior": series(prior, steps=late),
        "train/loss/total": series(np.concatenate([falling, prior])),
    }
    assert not diagnose(Record(given, steps=2000), rules=chosen(["diverged"])).findings
    alone = {"train/loss/total": given["train/loss/total"]}
    assert diagnose(Record(alone, steps=2000), rules=chosen(["diverged"])).findings


def test_held_out_losses_that_are_a_sum_beside_a_mean_are_not_taken_for_overfitting():
    mean = series(0.1 + 2 * np.exp(-STEPS / 400))
    for held_out, expected in ((7.5 * mean.values, ["warning"]), (mean.values + STEPS / 1000, [])):
        given = {"train/loss/total": mean, "train/loss/answer": mean, "val/loss/answer": series(held_out)}
        assert found("validation-missing", given) == expected


@pytest.mark.parametrize(("rule", "given", "expected"), CASES, ids=[f"{c[0]}-{k}" for k, c in enumerate(CASES)])
def test_a_rule_fires_on_its_fault_and_on_nothing_else(rule, given, expected):
    config = {"train": {"batch_size": 32}, "system": next(iter(chosen([rule])[0].concerns), None)}
    assert found(rule, given, config=config) == expected


FACTS = [
    ("dead-parameters", {"dead_parameters": {"encoder": 900}, "parameters": 1000}, ["fail"]),
    ("dead-parameters", {"dead_parameters": {}, "parameters": 1000}, []),
    ("not-in-optimizer", {"not_in_optimizer": ["head.weight"]}, ["fail"]),
    ("not-in-optimizer", {"not_in_optimizer": [], "unmoved": ["head.weight"]}, ["fail"]),
    ("not-in-optimizer", {"not_in_optimizer": [], "unmoved": []}, []),
    ("gradients-add-up", {"gradients_kept": {"steps": 2, "kept": 2}}, ["fail"]),
    ("gradients-add-up", {"gradients_kept": {"steps": 2, "kept": 0}}, []),
    ("tied-and-frozen", {"tied_and_frozen": [["head.weight", "embedding.weight"]]}, ["warning"]),
    ("tied-and-frozen", {"tied_and_frozen": []}, []),
    ("range-mismatch", {"ranges": {"image": {"target_low": 0, "target_high": 1, "low": -1, "high": 1}}}, ["fail"]),
    ("range-mismatch", {"ranges": {"image": {"target_low": 0, "target_high": 1, "low": 0, "high": 1}}}, []),
    ("augmentation-inert", {"augmentations": {"flip": {"changed": 1.0, "variety": 0.0}}}, ["warning"]),
    ("augmentation-inert", {"augmentations": {"flip": {"changed": 0.5, "variety": 0.8}}}, []),
    ("validation-pollutes", {"changed_by_validation": ["norm.running_mean"]}, ["fail"]),
    ("validation-pollutes", {"changed_by_validation": [], "training_in_validation": ["norm"]}, ["warning"]),
    ("validation-pollutes", {"changed_by_validation": [], "training_in_validation": []}, []),
    ("split-leak", {"leaks": {"the same image": 2633}}, ["fail"]),
    ("split-leak", {"leaks": {"the same image": 0}}, []),
    ("data-replaced", {"intake": {"items": 39, "lost": {"objects dropped": 61}}}, ["fail"]),
    ("data-replaced", {"intake": {"items": 1000, "lost": {"unreadable": 1}}}, []),
    ("partial-load", {"loaded": {"missing": ["a"], "unexpected": [], "reshaped": []}}, ["fail"]),
    ("partial-load", {"loaded": {"missing": [], "unexpected": [], "reshaped": []}}, []),
    ("trained-on-test", {"trained_on_test": 13000}, ["fail"]),
    ("trained-on-test", {"trained_on_test": 0}, []),
    ("conditioned-too-late", {"built_for": {"labels": {"built_for": 0, "data": 10}}}, ["fail"]),
    ("conditioned-too-late", {"built_for": {"tokens": {"built_for": 8000, "data": 1266}}}, ["warning"]),
    ("conditioned-too-late", {"built_for": {"labels": {"built_for": 10, "data": 10}}}, []),
    ("not-reproducible", {"provenance": {"seed": None}}, ["warning"]),
    ("not-reproducible", {"provenance": {"seed": 0, "changed": ["a", "b"]}}, ["note"]),
    ("not-reproducible", {"provenance": {"seed": 0, "changed": ["a"]}}, []),
]


@pytest.mark.parametrize(("rule", "facts", "expected"), FACTS, ids=[f"{c[0]}-{k}" for k, c in enumerate(FACTS)])
def test_a_rule_of_facts_fires_on_its_fault(rule, facts, expected):
    assert found(rule, {}, facts=facts, config={}) == expected


def test_the_applied_rate_is_held_against_the_configured_one():
    from intaglio.objectives.schedules import warmup_cosine

    due = np.array([1e-3 * warmup_cosine(int(k) - 1, 2000, 100, 1e-3) for k in STEPS])
    half = np.array([1e-3 * warmup_cosine(int(k) - 1, 4000, 100, 1e-3) for k in STEPS])
    for rates, expected in ((due, []), (half, ["fail"]), (10 * due, ["fail"])):
        assert found("learning-rate-off", {"train/optimizer/rate": series(rates)}, config=OPTIM, steps=2000) == expected
    assert found("learning-rate-off", {"train/optimizer/rate": series(due)}) is None


def test_every_part_has_the_rate_that_is_configured_for_it():
    from intaglio.objectives.schedules import warmup_cosine

    due = np.array([1e-3 * warmup_cosine(int(k) - 1, 2000, 100, 1e-3) for k in STEPS])
    config = {**OPTIM, "rates": {"vision": 0.1}}
    for vision, answer, expected in ((0.1, 1, []), (1, 1, ["fail"]), (0.1, 10, ["fail"])):
        rates = {"": due, ".vision": vision * due, ".answer": answer * due}
        logged = {f"train/optimizer{part}/rate": series(rate) for part, rate in rates.items()}
        assert found("learning-rate-off", logged, config=config, steps=2000) == expected


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("train longer: --train.steps", "intaglio train --resume runs/a --train.steps 400"),
        ("lower --loss.kl tenfold", "intaglio train runs/a/config.yaml --loss.kl 0.0001"),
        ("go back and halve the rate: --optim.rate", "intaglio train runs/a/config.yaml --optim.rate 0.0015"),
        ("a longer --optim.warmup", "intaglio train runs/a/config.yaml --optim.warmup 200"),
        ("clip the gradient: --optim.clip 1.0", "intaglio train runs/a/config.yaml --optim.clip 1.0"),
        ("raise the rate or train longer: --optim.rate, --train.steps",
         "intaglio train runs/a/config.yaml --optim.rate 0.006 --train.steps 400"),
        ("with its text: --loss.pairing sigmoid", "intaglio train runs/a/config.yaml --loss.pairing sigmoid"),
        ("keep images on a disk: --data.cache FOLDER", "intaglio train runs/a/config.yaml --data.cache FOLDER"),
        ("look at the images", ""), ("lower its weight: --loss.mine", ""), ("--model.vocabulary, odd", ""),
    ],
    ids=lambda value: value[:24],
)  # fmt: skip
def test_a_remedy_is_a_command_where_the_run_is_known(said, typed):
    config = {
        "train": {"steps": 200}, "loss": {"kl": 1e-3, "pairing": "self"}, "data": {"cache": ""},
        "optim": {"rate": 3e-3, "warmup": 100, "clip": 0.5}, "model": {"vocabulary": 4000},
    }  # fmt: skip
    assert command(Remedy(said), "runs/a", config) == typed


RAMP = {"train/weight/kl": series(np.minimum(STEPS / 1000, 1))}


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"patience": 3, "validate_every": 100}, ["warning"]),
        ({"patience": 3, "validate_every": 400}, []),
        ({"patience": 0, "validate_every": 100}, []),
        ({"patience": 3, "validate_every": 400, "monitor": "val/loss/total"}, ["warning"]),
        ({}, None),
    ],
    ids=["in the ramp", "after it", "no patience", "by a moving weight", "unknown"],
)
def test_a_run_may_not_stop_in_its_ramp(train, expected):
    assert found("stopped-in-ramp", RAMP, config={"train": train, "system": None}) == expected


def test_every_rule_is_tested_here_says_what_it_needs_and_has_a_name_of_its_own():
    rules = all_rules()
    assert len({r.id for r in rules}) == len(rules)
    tested = {c[0] for c in CASES} | {c[0] for c in FACTS} | {"learning-rate-off", "stopped-in-ramp"}
    here = {r.id for r in rules if r.family not in ("diffusion", "noise")}  # those are in test_rules_diffusion.py
    assert here == tested
    for r in rules:
        assert r.needs or r.facts
        assert r.log
        assert r.source
        assert r.seen.startswith("Seen by")


def test_nothing_is_healthy_because_nothing_was_looked_at():
    assert diagnose(Record({})).verdict == "cannot tell"
    assert diagnose(Record({"val/latent/varying_share": looks(0.5)})).verdict == "cannot tell"


def test_a_profile_sets_limits_and_refuses_what_it_does_not_know(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("near-chance: {share: 0.9}\n")
    record = Record({"val/loss/contrastive": looks(4.0, null=9.07)})
    assert [f.rule for f in diagnose(record, load_profile(file), chosen(["near-chance"])).findings] == ["near-chance"]
    for text, said in (
        ("near-chanse: {share: 0.9}", "did you mean 'near-chance'"),
        ("near-chance: {shares: 0.9}", "it has share"),
        ("near-chance: {share: much}", "must be a number"),
        ("- near-chance", "write rules with their limits"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_profile(file)
    with pytest.raises(ValueError, match="There is no profile 'absent'"):
        load_profile("absent")
