"""Two networks against each other: has one of them won? No torch."""

from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules import course
from intaglio.health.rules.training import FEWEST, rolling_median
from intaglio.history import NotMeasured


@rule(
    id="adversary-won",
    source="Goodfellow et al. 2014, section 3; Arjovsky & Bottou 2017, theorem 2.4",
    case="real GAN and VQ-GAN histories",
    needs=("train/loss/discriminator",),
    log="both losses, as train/loss/discriminator and train/loss/generator",
    limits={"gone": 0.05, "kept": 0.1, "risen": 1.5},
)
def adversary_won(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The discriminator tells all samples from data, so that the generator learns nothing from it.

    Seen by a discriminator's loss near 0 in the last quarter, while the generator's has risen; at balance a
    discriminator guesses, and its cross-entropy is ln 2 for each side.
    """
    judge, maker = (record.get(f"train/loss/{name}") for name in ("discriminator", "generator"))
    assert judge is not None
    judge = course.finite(judge)
    if len(judge) < 2 * FEWEST:
        yield NotMeasured(f"fewer than {2 * FEWEST} rows of the discriminator's loss")
        return
    quarter, top = max(2, len(judge) // 4), float(np.abs(rolling_median(judge.values, 3)).max())
    late = float(np.median(np.abs(judge.values[-quarter:])))
    if top == 0:
        yield NotMeasured("the discriminator's loss is 0 throughout: it is not trained")
        return
    risen = None
    if maker is not None and len(maker := course.finite(maker)) >= 2 * FEWEST:
        first, last = (
            float(np.median(part)) for part in (maker.values[: len(maker) // 4], maker.values[-len(maker) // 4 :])
        )
        risen = last - first > (limits["risen"] - 1) * abs(first)
    if late < limits["gone"] and late < limits["kept"] * top and risen is not False:
        yield Finding(
            "adversary-won",
            "fail" if risen else "warning",
            f"The discriminator's loss is {late:.3g} over the last quarter of the run; guessing costs ln 2 a side"
            + (", and the generator's rises: it learns nothing from it any more." if risen else "."),
            {"discriminator": late, "highest": top},
            remedies("a lower rate for the discriminator", "a gradient penalty (R1)", "start it later", wait=1000),
            step=int(judge.steps[-quarter]),
        )


RULES: tuple[Rule, ...] = (adversary_won,)
