"""Rules of diffusion over records: each fires on its fault, not on a healthy run like it, and says what it found."""

import numpy as np
import pytest

from intaglio.health.record import Record
from intaglio.health.rule import apply
from intaglio.health.rules import diffusion, noise
from intaglio.history import Series

RULES = (*noise.RULES, *diffusion.RULES)
BY_ID = {r.id: r for r in RULES}
LATE = np.arange(200, 2200, 200)


def looks(value, null=np.nan, steps=LATE):
    columns = (np.broadcast_to(np.asarray(x, float), len(steps)) for x in (value, null, np.nan))
    return Series(np.asarray(steps), *columns)


def between(name, value, low, high, null=np.nan, steps=LATE):
    ends = {name: (value, null), f"{name}_low": (low, np.nan), f"{name}_high": (high, np.nan)}
    return {end: looks(*of, steps) for end, of in ends.items()}


def sweep(*rows, label=""):
    """Rows of w, class accuracy ± .04, clipped share (real .02), contrast and diversity."""
    found = {}
    for w, accuracy, clipped, contrast, diversity in rows:
        at = f"val/guidance.{w:g}"
        found |= between(f"{at}/class_accuracy{label}", accuracy, accuracy - 0.04, accuracy + 0.04, 0.1)
        found |= between(f"{at}/diversity{label}", diversity, diversity - 0.05, diversity + 0.05, 1)
        if not label:
            found |= {f"{at}/clipped_share": looks(clipped, 0.02), f"{at}/contrast_ratio": looks(contrast, 1)}
    return found


def told(rule, series, **rest):
    return apply([BY_ID[rule]], Record(series, config={"system": "diffusion"}, steps=2000, **rest))


MODEST, STRONG = (3, 0.95, 0.03, 1.1, 0.8), (9, 0.97, 0.3, 1.9, 0.3)
USED_3, USED_9 = ({"val/guidance/used": looks(w)} for w in (3, 9))
ONLY_CLIPPED, GRAVELY_CLIPPED = ((9, 0.97, clipped, 1.2, 0.8) for clipped in (0.15, 0.3))
EARLY = np.array([50, 100])

CASES = [
    ("condition-ignored", {"val/condition/velocity_change": looks(0.0, 0)}, ["fail"]),
    ("condition-ignored", {"val/condition/velocity_change": looks(0.001, 0)}, ["warning"]),
    ("condition-ignored", {"val/condition/velocity_change": looks(0.05, 0)}, []),
    ("condition-ignored", {"val/condition/velocity_change": looks(0.001, 0, EARLY)}, None),
    ("condition-ignored", between("val/condition/permuted_loss", 0.0004, -0.0002, 0.001, 0), ["fail"]),
    ("condition-ignored", between("val/condition/permuted_loss", 0.02, 0.015, 0.025, 0), []),
    ("condition-ignored", between("val/condition/permuted_loss", 0.0004, -0.0002, 0.001, 0, EARLY), None),
    ("unfaithful", sweep((1, 0.09, 0.02, 1, 1), (3, 0.12, 0.02, 1, 1)), ["fail"]),
    ("unfaithful", sweep((1, 0.3, 0.02, 1, 1), (3, 0.42, 0.02, 1, 1)), ["fail"]),
    ("unfaithful", sweep((1, 0.5, 0.02, 1, 1), (3, 0.8, 0.02, 1, 1)), ["warning"]),
    ("unfaithful", sweep((1, 0.5, 0.02, 1, 1), MODEST), []),
    ("unfaithful", sweep((1, 0.5, 0.02, 1, 1), MODEST) | {"val/guidance/used": looks(1)}, ["warning"]),
    ("unfaithful", between("val/guidance.3/class_accuracy", 0.9, 0.8, 0.95, 0.1), []),
    ("unfaithful", between("val/guidance.3/class_accuracy", 0.5, 0.1, 0.9, 0.25), []),
    ("unfaithful", sweep((3, 0.7, 0.02, 1, 1)) | {"val/judge/accuracy": looks(0.75)}, []),
    ("unfaithful", sweep((3, 0.3, 0.02, 1, 1)) | {"val/judge/accuracy": looks(0.35)}, None),
    ("over-stylised", sweep(MODEST, STRONG) | USED_9, ["fail"]),
    ("over-stylised", sweep(MODEST, ONLY_CLIPPED) | USED_9, ["warning"]),
    ("over-stylised", sweep(MODEST, GRAVELY_CLIPPED) | USED_9, ["fail"]),
    ("over-stylised", sweep(MODEST, STRONG), ["note"]),
    ("over-stylised", sweep(MODEST, STRONG) | USED_3, []),
    ("over-stylised", sweep(MODEST), []),
    ("over-stylised", sweep((1, 0.9, 0.3, 1.5, 0.9), (3, 0.95, 0.33, 1.7, 0.8)) | USED_3, []),
    ("over-stylised", sweep((1, 0.9, 0.3, 1.2, 0.9), (3, 0.95, 0.5, 1.7, 0.8)) | USED_3, ["warning"]),
    ("memorised", between("val/samples/copied_share", 0.2, 0.16, 0.25, 0.01), ["fail"]),
    ("memorised", between("val/samples/copied_share", 0.06, 0.04, 0.09, 0.01), ["warning"]),
    ("memorised", between("val/samples/copied_share", 0.02, 0.011, 0.036, 0.01), []),
    ("memorised", between("val/samples/neighbour_ratio", 0.5, 0.45, 0.55, 0.9), ["warning"]),
    ("memorised", between("val/samples/neighbour_ratio", 0.88, 0.86, 0.9, 0.9), []),
    ("ema-lag", {"val/ema/moved": looks(0.0, 1)}, ["fail"]),
    ("ema-lag", {"val/ema/moved": looks(0.2, 1)}, ["warning"]),
    ("ema-lag", {"val/ema/moved": looks(0.2, 1, EARLY)}, None),
    ("ema-lag", {"val/ema/moved": looks(0.95, 1), "val/ema/loss": looks(0.099, 0.1)}, []),
    ("ema-lag", {"val/ema/moved": looks(0.95, 1), "val/ema/loss": looks(0.2, 0.1)}, ["warning"]),
    ("ema-lag", {"val/ema/averaged_buffers": looks(3, 0)}, ["warning"]),
    ("round-trip-ceiling", {"val/round_trip/r2": looks(0.7)}, ["fail"]),
    ("round-trip-ceiling", {"val/round_trip/r2": looks(0.9)}, ["warning"]),
    ("round-trip-ceiling", {"val/round_trip/r2": looks(0.98)}, []),
    (
        "round-trip-ceiling",
        {"val/round_trip/frechet_distance": looks(9, 1), "val/samples/frechet_distance": looks(12, 1)},
        ["warning"],
    ),
    (
        "round-trip-ceiling",
        {"val/round_trip/frechet_distance": looks(2, 1), "val/samples/frechet_distance": looks(12, 1)},
        [],
    ),
    (
        "round-trip-ceiling",
        {"val/round_trip/frechet_distance": looks(1.3, 1), "val/samples/frechet_distance": looks(1.4, 1)},
        [],
    ),
    ("high-noise-starved", {"train/log_snr.-7/weight": looks(0.00068, 0.1)}, ["warning"]),
    (
        "high-noise-starved",
        {"train/log_snr.-7/weight": looks(0.00068, 0.1), "val/log_snr.-7/loss": looks(0.2, 0.2)},
        ["fail"],
    ),
    (
        "high-noise-starved",
        {"train/log_snr.-7/weight": looks(0.00068, 0.1), "val/log_snr.-7/loss": looks(0.15, 0.2)},
        [],
    ),
    (
        "high-noise-starved",  # never trained, whatever carries over from its neighbours
        {"train/log_snr.-3/weight": looks(0.0, 0.25), "val/log_snr.-3/loss": looks(0.8, 1.1)},
        ["fail"],
    ),
    (
        "high-noise-starved",  # t drawn by a logit-normal
        {"train/log_snr.-7/weight": looks(0.0012, 0.1), "val/log_snr.-7/loss": looks(0.2, 0.2)},
        ["warning"],
    ),
    (
        "high-noise-starved",  # x0 learns fine detail last, and images are none the worse for it
        {"train/log_snr.7/weight": looks(0.0001, 0.1), "val/log_snr.7/loss": looks(0.001, 0.001)},
        ["warning"],
    ),
    ("high-noise-starved", {"train/log_snr.-7/weight": looks(0.02, 0.1)}, []),
    ("schedule-mismatch", {"train/noise/terminal_snr": looks(0.0047, 0)}, ["warning"]),
    ("schedule-mismatch", {"train/noise/terminal_snr": looks(2.4e-9, 0)}, []),
]


@pytest.mark.parametrize(("rule", "series", "due"), CASES, ids=[f"{k}-{rule}" for k, (rule, _, _) in enumerate(CASES)])
def test_each_rule_fires_on_its_fault_and_on_nothing_else(rule, series, due):
    judged = told(rule, series)
    assert (None if judged.not_measured else [f.severity for f in judged.findings]) == due
    for f in judged.findings:
        assert f.rule == rule
        assert f.remedies
        assert f.evidence
        assert f.step == 2000


@pytest.mark.parametrize(
    ("drop", "guidance", "due"),
    [
        (1.0, 1, ["fail"]),
        (0.0, 3, ["fail"]),
        (0.0, 1, []),
        (0.01, 3, ["warning"]),
        (0.8, 1, ["warning"]),
        (0.9, 3, ["fail"]),
        (0.15, 3, []),
    ],
)
def test_both_branches_of_guidance_are_trained(drop, guidance, due):
    series = {"val/guidance/used": looks(guidance)}
    for by, expected in (("class", due), ("none", [])):
        config = {"system": "diffusion", "condition": {"by": by, "drop": drop}}
        findings = apply([BY_ID["null-mismatch"]], Record(series, config=config, steps=2000)).findings
        assert [f.severity for f in findings] == expected
    strangers = Record(series | {"train/condition/dropped_share": looks(drop)}, steps=2000)
    assert [f.severity for f in apply([BY_ID["null-mismatch"]], strangers).findings] == due


def test_conditions_that_are_dropped_in_the_beginning_alone_are_not_dropped():
    series = {"val/guidance/used": looks(3), "train/condition/dropped_share": looks(np.arange(10) < 2)}
    found = apply([BY_ID["null-mismatch"]], Record(series, steps=2000)).findings
    assert [f.severity for f in found] == ["fail"]


def test_every_rule_is_tested_here():
    assert BY_ID.keys() == {case[0] for case in CASES} | {"null-mismatch"}


def test_a_weight_is_recommended_for_each_class():
    """The least of those within the best one's interval, not extreme; the bird's needs more than the ship's."""
    series = sweep((1, 0.7, 0.02, 1, 1), MODEST, (5, 0.96, 0.03, 1.2, 0.7), STRONG) | USED_9
    series |= sweep((1, 0.95, 0, 1, 1), (3, 0.96, 0, 1, 0.9), (5, 0.97, 0, 1, 0.8), label=".ship")
    series |= sweep((1, 0.4, 0, 1, 1), (3, 0.8, 0, 1, 0.9), (5, 0.95, 0, 1, 0.4), label=".bird")
    (found,) = told("over-stylised", series).findings
    assert found.evidence == {"guidance": 9, "recommended": 3}
    assert "all classes 3; bird 3; ship 1" in found.message
    assert "30% of pixels are clipped, of real ones 2%" in found.message
    assert found.remedies[0].do == "sample with guidance 3: --sampling.guidance 3"
    (hopeless,) = told("over-stylised", sweep(STRONG) | USED_9).findings
    assert "No weight is free of it" in hopeless.message


def test_rules_say_what_they_need_and_leave_other_systems_alone():
    for r in RULES:
        assert r.concerns == ("diffusion",)
        assert r.source
        assert r.log
        assert r.limits
        assert told(r.id, {}).unread == (r.id,)
        other = apply([r], Record({r.needs[0].replace("*", "3"): looks(0.0)}, config={"system": "multimodal"}))
        assert not other.findings
        assert not other.not_measured
