"""Does what was learnt hold on items that were not learnt from?"""

from collections.abc import Mapping

from intaglio.health.finding import Finding
from intaglio.history import Reading

NOTHING_LEARNT = 0.02
"""A held-out loss within this share of its null counts as no better."""

MEMORISED = 0.5
"""Held-out gain over the null below this share of the training gain means that most of it was memorised."""


def no_learning(readings: Mapping[str, Reading], quantity: str = "caption/nats_per_token") -> list[Finding]:
    """``no-learning``: a loss on training items that its null reaches as well."""
    train = readings.get(f"train/{quantity}")
    if train is None or train.null is None or train.value < (1 - NOTHING_LEARNT) * train.null:
        return []
    return [
        Finding(
            "no-learning",
            "fail",
            f"{quantity} is {train.value:.3f} on training items; a model that never looks reaches {train.null:.3f}.",
            {"train": train.value, "null": train.null},
            ("train longer: --train.steps", "raise --optim.rate"),
        )
    ]


def memorised(readings: Mapping[str, Reading], quantity: str = "caption/nats_per_token") -> list[Finding]:
    """``overfitting``: the gain over the null on training items does not carry over to held-out items.

    Both sides are the same quantity of the same weights in the same mode.
    """
    train, val = readings.get(f"train/{quantity}"), readings.get(f"val/{quantity}")
    if train is None or val is None or val.null is None:
        return []
    gain, held_out_gain = val.null - train.value, val.null - val.value
    if gain <= NOTHING_LEARNT * val.null or held_out_gain >= MEMORISED * gain:
        return []
    worse = held_out_gain <= 0
    compared = "no better than" if worse else "hardly better than"
    return [
        Finding(
            "overfitting",
            "fail" if worse else "warning",
            f"The model memorises: {quantity} is {train.value:.2f} on training items and {val.value:.2f} on held-out "
            f"ones, {compared} a bigram model's {val.null:.2f}.",
            {"train": train.value, "val": val.value, "null": val.null},
            ("give more images", "train shorter: --train.patience 3", "raise --model.dropout 0.2"),
        )
    ]


RULES = (no_learning, memorised)


def judge(readings: Mapping[str, Reading]) -> list[Finding]:
    """All findings of this page."""
    return [finding for rule in RULES for finding in rule(readings)]
