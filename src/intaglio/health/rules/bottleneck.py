"""KL bottleneck: does the decoder use it, at what rate, and is the pressure on it what it seems? No torch."""

from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules.course import finite
from intaglio.health.rules.training import FEWEST, rolling_median
from intaglio.history import NotMeasured
from intaglio.history.aliases import names_of

KL_TERMS = tuple(f"{split}/loss/{name}" for split in ("train", "val") for name in (*names_of("kl"), "kl_loss"))
"""Names that a KL term goes by."""


@rule(
    id="posterior-collapse",
    follows=("dead-parameters", "temperature-misstates-rate"),
    source="Bowman et al. 2016; He et al. 2019",
    needs=("val/*/kl_nats", *KL_TERMS),
    log="KL(q(z|x) || N(0, I)) per item, raw, as val/SITE/kl_nats",
    limits={"nats": 0.1, "kept": 0.01, "weak": 2.0, "weakened": 0.1},
)
def posterior_collapse(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The decoder works without the latent.

    Seen by nats in the latent, and what the loss costs more with latents shuffled; both are 0 where it is not used.
    Where only a KL term of unknown unit is logged: by its late level against its own highest.
    """
    if not record.matching("val/*/kl_nats"):
        yield from _fallen_rate(record, limits)
    for name, s in record.matching("val/*/kl_nats").items():
        if not record.settled(s):
            continue
        used = [c.value for c in record.matching("val/*/shuffled_latent_*_low").values()]
        unused = bool(used) and max(used) <= 0
        if s.value < limits["nats"] or unused:
            active = record.get(f"val/{name.split('/')[1]}/active_units")
            yield Finding(
                "posterior-collapse",
                "fail",
                f"{name.split('/')[1]} holds {s.value:.3g} nats an item"
                + (f" in {active.value:.0f} active units" if active is not None else "")
                + (", and exchanging it costs the decoder nothing." if unused else ": as good as none."),
                {"nats": s.value} | ({"highest_lower_bound_of_cost": max(used)} if used else {}),
                remedies("lower --loss.kl tenfold", "free bits", "a longer ramp of the KL's weight", wait=1000),
                step=int(s.steps[-1]),
            )


def _fallen_rate(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A KL term that fell to nothing and stays there, or never was anything. Its sign and its unit may be any."""
    looked = False
    costs = [c.value for c in record.matching("val/*/shuffled_latent_*_low").values()]
    unused = bool(costs) and max(costs) <= 0
    for name, s in record.matching(*KL_TERMS).items():
        s = finite(s)
        if len(s) < FEWEST or not record.settled(s):
            continue
        looked = True
        nats = np.abs(s.values)
        late, top = float(np.median(nats[-max(2, len(s) // 4) :])), float(rolling_median(nats, 3).max())
        rising = float(np.median(nats[-max(2, len(s) // 8) :])) > 1.5 * float(np.median(nats[len(nats) // 2 :]))
        never = top < limits["nats"] * (1.0 if unused else limits["kept"])
        gone = late < limits["nats"] and (late < limits["kept"] * top or never)
        if gone and not rising:
            yield Finding(
                "posterior-collapse",
                "fail",
                f"{name} has been {late:.3g} over the last quarter of the run; its highest was {top:.3g}. "
                "Such a KL means that the latent carries nothing, however well the loss improves.",
                {"nats": late, "highest": top},
                remedies("lower the KL's weight tenfold", "free bits", "a longer ramp of the KL's weight", wait=1000),
                candidates=("the term is logged times a tiny weight: log it raw", "exchange the latents and compare"),
                step=int(s.steps[int(np.argmax(nats < max(limits["nats"], limits["kept"] * top)))]),
            )
        elif late < limits["weak"] and late < limits["weakened"] * top:
            yield Finding(
                "posterior-collapse",
                "warning",
                f"{name} fell from {top:.3g} to {late:.3g}: if that is nats of an item, the latent carries little.",
                {"nats": late, "highest": top},
                remedies("lower the KL's weight", "free bits", wait=1000),
                candidates=("its unit is nats of a dimension: log the sum", "exchange the latents and compare"),
                step=int(s.steps[-1]),
            )
    if not looked:
        yield NotMeasured(f"fewer than {FEWEST} rows of a KL term that have settled")


@rule(
    id="kl-free",
    concerns=("vqa",),
    source="Kingma et al. 2016, section 4",
    case="V: floor .1, raw .03 to .08",
    needs=("*/*/groups_above_floor",),
    log="the share of groups above the floor as val/SITE/groups_above_floor",
    limits={"share": 0.0, "parked": 0.5},
)
def kl_free(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Every group sits below the free-bits floor: there is no pressure.

    Seen by the share of groups whose raw KL exceeds the floor, where their sum is not close to it: that is kl-parked.
    """
    for name, s in record.matching("*/*/groups_above_floor").items():
        if early := record.early(name):
            yield early
            continue
        where, late = name.rpartition("/")[0], s.values[len(s) // 2 :]
        floor, raw = record.get(f"{where}/kl_charged"), record.get(f"{where}/kl_nats")
        parked = floor is not None and raw is not None and floor.null and raw.value > limits["parked"] * floor.null
        if float(late.max()) <= limits["share"] and not parked:
            yield Finding(
                "kl-free",
                "warning",
                f"No group of {name.split('/')[1]} exceeds its free bits, so the KL term has no gradient.",
                {"groups_above_floor": s.value},
                remedies("lower the floor below the raw KL of the groups: --loss.floor", wait=500),
                step=int(s.steps[-1]),
            )


@rule(
    id="kl-parked",
    concerns=("vqa",),
    source="Kingma et al. 2016, section 4",
    case="V: three days lost",
    needs=("*/*/kl_charged",),
    log="the charged KL as val/SITE/kl_charged and its floor as its null",
    limits={"relative": 0.03, "raw": 0.5},
)
def kl_parked(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Nothing: a rate that is parked at the free-bits floor is where the term holds it; don't chase it.

    Seen by charged KL close to the floor, median of the second half, and raw KL not far below it; where exchanging
    latents is known to cost the decoder nothing, posterior-collapse speaks instead.
    """
    for name, s in record.matching("*/*/kl_charged").items():
        if s.null is None or s.null <= 0:
            yield NotMeasured(f"{name} has no floor as its null")
            continue
        raw = record.get(name.replace("kl_charged", "kl_nats"))
        used = [c.value for c in record.matching("val/*/shuffled_latent_*_low").values()]
        close = len(s) >= FEWEST and abs(np.median(s.values[len(s) // 2 :]) / s.null - 1) < limits["relative"]
        if close and (raw is None or raw.value > limits["raw"] * s.null) and not (used and max(used) <= 0):
            yield Finding(
                "kl-parked",
                "note",
                f"The rate of {name.split('/')[1]} is parked at its floor of {s.null:.3g} nats: that is what free bits "
                "do, and no fault. Look at what exchanged latents cost instead.",
                {"kl_charged": s.value, "floor": s.null},
                step=int(s.steps[-1]),
            )


@rule(
    id="rate-too-high",
    follows=("kl-units", "kl-free", "temperature-misstates-rate"),
    concerns=("vqa",),
    source="Tishby et al. 1999; Alemi et al. 2017",
    case="V: 77 nats for 6.8 bits",
    needs=("val/*/target_entropy",),
    log="the entropy of what is decoded as val/SITE/target_entropy, nats",
    limits={"times": 3.0},
)
def rate_too_high(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Far more nats in the latent than what is decoded has entropy.

    Seen by KL per item beside the entropy of the answers, H(answer), once a ramp of the KL's weight is over.

    ``patient_from``: the step up to which ramps and stages last.
    """
    for name, s in record.matching("val/*/target_entropy").items():
        kl = record.get(f"val/{name.split('/')[1]}/kl_nats")
        if kl is None:
            yield NotMeasured(f"{name} stands without kl_nats")
        elif record.running and record.last_step < record.facts.get("patient_from", 0):
            yield NotMeasured(f"{name}: the weight of the KL still rises")
        elif kl.value > limits["times"] * s.value:
            yield Finding(
                "rate-too-high",
                "warning",
                f"{name.split('/')[1]} holds {kl.value:.1f} nats for answers of {s.value:.1f}: what is more than that "
                "is memory of the input, not of the answer.",
                {"nats": kl.value, "entropy": s.value},
                remedies("raise --loss.kl tenfold", "fewer latent dimensions", wait=1000),
                step=int(kl.steps[-1]),
            )


@rule(
    id="kl-units",
    source="Higgins et al. 2017, eq. 4",
    case="V: a weight of 3.0 was a β of .006 to .010",
    needs=("val/*/kl_nats",),
    log="KL per item as val/SITE/kl_nats beside train/loss/kl",
    limits={"factor": 1.5},
)
def kl_units(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The KL is meant per item and applied per token, dimension or batch, so its weight is not β.

    Seen by the logged loss term beside the measured KL per item of the largest site or of all, or what free bits charge
    of it: their ratio is 1, or the number of units it hides.
    """
    found = record.matching(*KL_TERMS)
    if not found:
        yield NotMeasured("there is no loss term kl to hold the measured KL against")
        return
    name = max(found, key=lambda n: (n.startswith("val/"), n.endswith("/kl")))
    label = name.rpartition("/")[2]
    term, weight = found[name], record.get(f"train/weight/{label}")
    if weight is not None and not weight.values.any():
        return  # switched off on purpose
    measured = record.matching("val/*/kl_charged") or record.matching("val/*/kl_nats")
    site, read = max(measured.items(), key=lambda item: item[1].value)
    if early := record.early(site):
        yield early
        return
    nats, applied = read.value, float(np.median(term.values[-max(1, len(term) // 4) :]))
    if applied < 0:
        yield NotMeasured(f"{name} is {applied:.4g}, which no KL can be: an estimate by few draws, or weighed")
        return
    factor, whole = (n / max(applied, 1e-12) for n in (nats, sum(s.value for s in measured.values())))
    if nats > 1e-3 and not any(1 / limits["factor"] < f < limits["factor"] for f in (factor, whole)):
        beta = "" if weight is None else f" Its weight of {weight.value:g} is a β of {weight.value / factor:.2g}."
        yield Finding(
            "kl-units",
            "warning",
            f"The term {label} is {applied:.4g}, the latent's KL {nats:.4g} nats an item: a factor of {factor:.3g} is "
            f"between them.{beta}",
            {"term": applied, "nats": nats, "factor": factor},
            remedies("sum the KL over dimensions and average it over items, and set the weight as β"),
            candidates=(
                "it is averaged over dimensions or tokens: compare the factor with their number",
                "free bits charge more than there is: compare with kl_charged",
            ),
        )


@rule(
    id="temperature-misstates-rate",
    source="Alemi et al. 2018, eq. 3",
    case="V: samples at .6 σ, KL for σ",
    needs=("*/*/noise_ratio",),
    log="the root mean square of (z − μ)/σ of the latents that the decoder is given in training, as "
    "train/SITE/noise_ratio",
    limits={"off": 0.1},
)
def temperature_misstates_rate(record: Record, limits: Limits) -> Iterator[Finding]:
    """Latents are drawn with another spread than the one that KL is charged for, so the rate is not the rate.

    Seen by the root mean square of (z − μ)/σ of what the decoder is given in training; 1 is due, and 0 for means.
    """
    for name, s in record.matching("*/*/noise_ratio").items():
        means = name.startswith("val/") and s.value == 0
        if abs(s.value - 1) > limits["off"] and not means:
            snr = "" if s.value == 0 else f": {1 / s.value**2:.1f} times the signal-to-noise ratio that is paid for"
            yield Finding(
                "temperature-misstates-rate",
                "warning" if s.value else "fail",
                f"The latents of {name.split('/')[1]} are drawn at {s.value:.2f} σ, and KL is charged for σ{snr}.",
                {"noise_ratio": s.value},
                remedies("draw at σ in training, and at a temperature only where samples are shown"),
                step=int(s.steps[-1]),
            )


@rule(
    id="teacher-inert",
    concerns=("vqa",),
    source="Rafailov et al. 2023, eq. 7",
    case="V: constants were ranked, which have no gradient",
    needs=("*/*/tie_rate", "train/term.teacher/gradient_norm", "train/term.preference/gradient_norm"),
    log="the share of ties among the scores that are ranked, and the term's gradient norm",
    limits={"ties": 0.8},
)
def teacher_inert(record: Record, limits: Limits) -> Iterator[Finding]:
    """A preference or teacher term has no gradient, or hardly ever a pair that differs.

    Seen by its gradient norm; the share of pairs whose scores are equal.
    """
    for name, s in record.matching("train/term.teacher/gradient_norm", "train/term.preference/gradient_norm").items():
        if not (s.values > 0).any():
            yield Finding(
                "teacher-inert",
                "fail",
                f"The term {name.split('/')[1].removeprefix('term.')} has no gradient in {len(s)} looks: what it ranks "
                "does not depend on a parameter.",
                {"gradient_norm": s.value},
                remedies("rank log-probabilities of answers, not their scores", "leave the term out"),
                step=int(s.steps[0]),
            )
    for name, s in record.matching("*/*/tie_rate").items():
        if s.value > limits["ties"]:
            yield Finding(
                "teacher-inert",
                "warning",
                f"{s.value:.0%} of the pairs that {name.split('/')[1]} ranks have equal scores, and teach nothing.",
                {"tie_rate": s.value},
                remedies("more samples an item", "scores with more steps", wait=500),
                step=int(s.steps[-1]),
            )


RULES: tuple[Rule, ...] = (
    posterior_collapse,
    kl_free,
    kl_parked,
    rate_too_high,
    kl_units,
    temperature_misstates_rate,
    teacher_inert,
)
