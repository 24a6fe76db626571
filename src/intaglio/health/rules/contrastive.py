"""Contrastive and predictive losses: is anything told apart, and is the pair worth telling apart? No torch."""

import math
from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, Severity, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules.training import FEWEST, LOOKS
from intaglio.history import NotMeasured
from intaglio.history.aliases import names_of

LOSSES = (*(f"val/loss/{name}" for name in names_of("contrastive")), "val/contrastive/loss")
"""A contrastive loss on held-out items, by the names that it goes by."""


@rule(
    id="near-chance",
    follows=("trivial-pair", "ema-lag", "latent-ignores-input", "anisotropic", "learning-rate-off", "diverged"),
    source="van den Oord et al. 2018, eq. 4",
    case="J: 7.98 of 9.07",
    needs=(*LOSSES, "val/contrastive/top1"),
    log="the held-out contrastive loss with ln N as its null",
    limits={"share": 0.15, "fail": 0.075},
)
def near_chance(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The contrastive loss is close to that of guessing.

    Seen by held-out loss beside its null (ln N for InfoNCE); top-1 with its interval beside 1/N.
    """
    for name, s in record.matching(*LOSSES).items():
        if s.null is None or s.null <= 0:
            yield NotMeasured(f"{name} has no null: log ln N beside it")
            continue
        gained = (s.null - s.value) / s.null
        if gained < limits["share"] and record.settled(s):
            nothing = gained < limits["fail"]
            heavier = ("raise --loss.contrastive",) if name.endswith("contrastive") else ()
            yield Finding(
                "near-chance",
                "fail" if nothing else "warning",
                f"{name} is {s.value:.3f} nats; guessing costs {s.null:.3f}"
                + (": next to nothing is told apart." if nothing else f", so {gained:.0%} has been learnt."),
                {"loss": s.value, "null": s.null},
                remedies("train longer: --train.steps", *heavier, "a larger --train.batch_size", wait=1000),
                candidates=("the pair is trivial or unrelated: exchange partners", "the temperature is stuck"),
                step=int(s.steps[-1]),
            )


@rule(
    id="trivial-pair",
    follows=("rank-collapse", "anisotropic", "latent-ignores-input"),
    source="intervene, don’t only watch",
    case="E: InfoNCE(z, z); J",
    needs=("val/*/distinct_views", "val/*/strangers_nats"),
    log="both trials: a monitor that is given the pair runs them",
    limits={"distinct": 0.5, "nats": 1e-3},
)
def trivial_pair(record: Record, limits: Limits) -> Iterator[Finding]:
    """The positive is the same input, or a latent against itself; or the partner is not in the loss.

    Seen by the share of pairs whose two views differ; what the loss costs more with another item's partner.
    """
    for name, s in record.matching("val/*/distinct_views").items():
        if s.value < limits["distinct"]:
            yield Finding(
                "trivial-pair",
                "fail",
                f"{1 - s.value:.0%} of the pairs of {name.split('/')[1]} are one input twice: a low loss says nothing.",
                {"distinct": s.value},
                remedies("pair each image with its text, or with another view: --loss.pairing sigmoid"),
                step=int(s.steps[-1]),
            )
    for name, s in record.matching("val/*/strangers_nats").items():
        exact = abs(s.value) < 1e-9
        if exact or (len(s) >= LOOKS and float(np.abs(s.values).max()) < limits["nats"]):
            yield Finding(
                "trivial-pair",
                "fail",
                f"Exchanging the partners of {name.split('/')[1]} changes the loss by {s.value:.2g} nats: the partner "
                "is not in it.",
                {"nats": s.value},
                remedies("let the loss see both members of the pair"),
                step=int(s.steps[-1]),
            )


@rule(
    id="context-order-inert",
    concerns=("jepa",),
    source="intervene, don’t only watch",
    case="J: one grid three times",
    needs=("val/*/context_permuted", "val/*/context_repeated", "val/*/context_strangers", "val/*/context_distinct"),
    log="these trials: a monitor that is given the context runs them",
    limits={"cost": 1e-6, "distinct": 0.5, "share": 0.05},
)
def context_order_inert(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The context is one frame repeated, or permuting, repeating or exchanging its frames changes nothing.

    Seen by what a prediction costs more with another item's context, with one frame repeated, and with frames
    permuted: nothing where 0 lies in the interval, and no twentieth of the held-out loss does; and by the share of
    contexts whose frames differ at all. The order of what is a set need not matter, nor the number of examples of one
    rule.
    """
    told: tuple[tuple[str, Severity, str], ...] = (
        ("strangers", "fail", "The context of another item costs {site} nothing ({cost:.2g}): it is not read."),
        ("repeated", "fail", "Showing the first context frame alone costs {site} nothing ({cost:.2g}): it sees one."),
        ("permuted", "warning", "The order of its context frames costs {site} nothing ({cost:.2g})."),
    )
    for name, s in record.matching("val/*/context_distinct").items():
        if s.value < limits["distinct"]:
            yield Finding(
                "context-order-inert",
                "fail",
                f"In {1 - s.value:.0%} of the contexts of {name.split('/')[1]} all frames are the same.",
                {"distinct": s.value},
                remedies("look at how a context is put together: frames that are all the same teach nothing"),
                step=int(s.steps[-1]),
            )
    size = max((abs(s.value) for s in record.matching("val/loss/*").values()), default=float("inf"))
    for change, severity, message in told:
        for name, s in record.matching(f"val/*/context_{change}").items():
            low, high = (record.get(f"{name}_{end}") for end in ("low", "high"))
            unsure = low is not None and high is not None and low.value <= 0 <= high.value
            if unsure and high is not None and high.value > limits["share"] * size:
                yield NotMeasured(f"{name}: 0 lies in its interval, as does {high.value:.2g}: give more held-out items")
                continue
            if abs(s.value) < limits["cost"] or (unsure and record.settled(s)):
                yield Finding(
                    "context-order-inert",
                    severity,
                    message.format(site=name.split("/")[1], cost=s.value),
                    {"cost": s.value},
                    remedies("look at what is in a context: frames that are all the same teach nothing"),
                    candidates=("the frames are one", "the predictor averages over them, as over a set"),
                    step=int(s.steps[-1]),
                )


@rule(
    id="temperature-stuck",
    source="Radford et al. 2021, section 2.5",
    case="J",
    needs=("*/*/temperature",),
    log="the temperature as train/contrastive/temperature, its clamp as null, one on a schedule without",
    limits={"relative": 1e-6},
)
def temperature_stuck(record: Record, limits: Limits) -> Iterator[Finding]:
    """The learnable temperature is at its clamp, or does not move.

    Seen by its logged values over the run, and its clamp.
    """
    for name, s in record.matching("*/*/temperature").items():
        if len(s) < FEWEST:
            continue
        late = s.values[len(s) // 2 :]
        if s.null is None and not record.config and np.ptp(s.values[: len(s) // 2]) > 0:
            continue  # a schedule that has come to its end
        clamped = s.null is not None and math.isclose(float(late.min()), s.null, rel_tol=1e-3)
        if np.ptp(late) <= limits["relative"] * abs(s.value) or clamped:
            since = int(s.steps[np.abs(s.values - s.value) <= limits["relative"] * abs(s.value)][0])
            stays = f"stays at {s.value:.6g}" + (f" since step {since:,}." if since > s.steps[0] else ".")
            yield Finding(
                "temperature-stuck",
                "warning",
                f"{name} " + (f"lies at its clamp of {s.null:g}." if clamped else stays),
                {"temperature": s.value},
                remedies("give it a rate of its own, or leave it fixed and say so", wait=500),
                candidates=("it is in no optimizer group: see not-in-optimizer", "the loss pushes it past its clamp"),
                step=int(s.steps[-1]),
            )


@rule(
    id="sigreg-blind",
    concerns=("jepa",),
    source="Balestriero & LeCun 2025",
    case="J: .3955 to .4047 of .4047",
    needs=("*/*/sigreg_blind",),
    log="latents of a probe batch, as the statistic sees them",
)
def sigreg_blind(record: Record, limits: Limits) -> Iterator[Finding]:
    """The normality statistic cannot reach its null: its inputs are normalised or non-negative.

    Seen by the statistic beside its null for N(0, I) and its value under collapse; whether norms or signs are fixed.
    """
    for name, s in record.matching("*/*/sigreg_blind").items():
        if s.value > 0.5:
            statistic = record.get(name.removesuffix("_blind"))
            yield Finding(
                "sigreg-blind",
                "fail",
                f"What SIGReg sees of {name.split('/')[1]} is normalised or non-negative, so it can never be N(0, I)"
                + (
                    f": {statistic.value:.3g}, where N(0, I) gives {statistic.null:.3g}."
                    if statistic is not None and statistic.null is not None
                    else "."
                ),
                {"statistic": statistic.value} if statistic is not None else {},
                remedies("apply it before the normalisation or the ReLU"),
                step=int(s.steps[-1]),
            )


@rule(
    id="queue-stale",
    concerns=("jepa",),
    source="He et al. 2020 (MoCo), section 3.2",
    needs=("*/*/queue_agreement",),
    log="that cosine as train/SITE/queue_agreement",
    limits={"cosine": 0.8, "known": 0.1},
)
def queue_stale(record: Record, limits: Limits) -> Iterator[Finding]:
    """The queue of negatives is older than the encoder's drift.

    Seen by cosine between queued embeddings and the same items encoded now; 1 is due, and what strangers have fails.
    """
    for name, s in record.matching("*/*/queue_agreement").items():
        if s.value < limits["cosine"]:
            strange = s.null is not None and s.value < s.null + limits["known"]
            yield Finding(
                "queue-stale",
                "fail" if strange else "warning",
                f"Embeddings in the queue of {name.split('/')[1]} agree with the encoder of now to {s.value:.2f}.",
                {"cosine": s.value},
                remedies("a shorter queue", "a slower momentum encoder for the keys", wait=1000),
                step=int(s.steps[-1]),
            )


@rule(
    id="modality-gap",
    source="Liang et al. 2022",
    case="E",
    needs=("val/*/modality_gap",),
    log="paired embeddings of a probe batch",
    limits={"gap": 0.3, "times": 3.0, "recall": 0.1},
)
def modality_gap(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Image and text embeddings lie in separate cones although paired retrieval is poor.

    Seen by distance of the two centroids beside that of exchanged members, with retrieval at 1 beside chance.
    """
    recalls = record.matching("val/retrieval/*_r1", "val/*/top1")
    for name, s in record.matching("val/*/modality_gap").items():
        if not recalls:
            yield NotMeasured("there is no retrieval to hold the gap against")
            continue
        above = max((r.value - (r.null or 0)) / (1 - (r.null or 0)) for r in recalls.values())
        apart = s.value > max(limits["gap"], limits["times"] * (s.null or 0))
        if record.settled(s) and apart and above < limits["recall"]:
            best = max(r.value for r in recalls.values())
            yield Finding(
                "modality-gap",
                "warning",
                f"The two kinds of {name.split('/')[1]} lie {s.value:.2f} apart, and {best:.1%} of partners are found.",
                {"gap": s.value, "recall": best},
                remedies("raise --loss.contrastive", "a larger --train.batch_size", wait=1000),
                step=int(s.steps[-1]),
            )


RULES: tuple[Rule, ...] = (
    near_chance,
    trivial_pair,
    context_order_inert,
    temperature_stuck,
    sigreg_blind,
    queue_stale,
    modality_gap,
)
