"""The terms of the loss: does each teach, does one drown the others, is what is logged what is applied? No torch."""

from collections.abc import Iterator, Mapping

import numpy as np

from intaglio.health.finding import Finding, Remedy
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules import course
from intaglio.health.rules.training import BESIDE, FEWEST, LOOKS, QUANTISER
from intaglio.history import NotMeasured, Series

ASIDE = (*BESIDE, *QUANTISER)
"""Words in the names of terms that stand beside what is to be learnt."""


@rule(
    id="term-inert",
    follows=("trivial-pair", "augmentation-inert"),
    source="what is logged is what is applied",
    case="V: teacher; J: VQ loss; E: alignment",
    needs=("train/term.*/gradient_norm", "train/loss/*"),
    log="each loss term as train/loss/NAME, its gradient norm as train/term.NAME/gradient_norm",
    limits={"spread": 1e-7, "share": 1e-9, "floored": 0.5},
)
def term_inert(record: Record, limits: Limits) -> Iterator[Finding]:
    """A configured loss term has no gradient, or its value never changes.

    Seen by the gradient norm of each term in the first steps and at each look, beside the largest: what 32 bits round
    off is none; the spread of its logged values.
    """
    norms = record.matching("train/term.*/gradient_norm").values()
    weights = {n.rsplit("/", 1)[1]: s for n, s in record.matching("train/weight/*").items()}
    for term, s in terms(record).items():
        if term in weights and not weights[term].values.any():
            continue  # switched off on purpose
        floors = record.matching("*/*/groups_above_floor").values() if term.startswith("kl") else ()
        if any(above.value < limits["floored"] for above in floors):
            continue  # under free bits: kl-free and kl-parked judge it
        if floors:
            s = s.after(int(s.steps[len(s) // 2]))
        norm = record.get(f"train/term.{term}/gradient_norm")
        flat = len(s) >= FEWEST and float(np.ptp(s.values)) <= limits["spread"] * max(1e-12, abs(s.value))
        looks = [n.values for n in norms if norm is not None and len(n) == len(norm)]
        none = norm is not None and not (norm.values > limits["share"] * np.max(looks, axis=0)).any()
        zero = none and norm is not None and (len(norm) >= LOOKS or record.settled(norm))
        if zero or flat:
            what = "its gradient is zero" if zero else f"it has been {s.value:.6g} in all {len(s)} rows"
            yield Finding(
                "term-inert",
                "warning" if record.foreign else "fail",
                f"The loss term {term} teaches nothing: {what}.",
                {"value": s.value, "rows": len(s)},
                (Remedy(f"see whether it depends on a parameter that is trained, or leave it out: --loss.{term} 0"),),
                step=int(s.steps[0]),
            )


@rule(
    id="term-dominates",
    source="Chen et al. 2018 (GradNorm); Yu et al. 2020 (gradient surgery)",
    case="J: relational at six times the rest",
    needs=("train/term.*/gradient_share",),
    log="the gradient norm of each term as train/term.NAME/gradient_share",
    limits={"share": 0.95, "aside": 0.8, "opposed": 0.8, "cosine": -0.5, "done": 0.05},
)
def term_dominates(record: Record, limits: Limits) -> Iterator[Finding]:
    """One loss term's gradient dwarfs or opposes all others.

    Seen by its share of the summed gradient norms, weights applied, and its cosine with the sum of the others, on the
    parameters that they share; an equal share is 1 / number of terms. A term that stands beside the objective, as one
    of relations, invariance or codes, or a KL, is to stay below it, so that one objective among such terms alone is not
    judged. Nor is what is left when the others have come close to 0 beside their nulls on held-out items, or another
    program's objective when all others fall all the same.
    """
    shares = record.matching("train/term.*/gradient_share")
    rivals = [name for name in shares if not any(word in name for word in ("kl", *ASIDE))]
    for name, s in shares.items():
        others = [other for other in rivals if other != name]
        done = bool(others) and all(_done(record, other, limits["done"]) for other in others)
        if not record.config and others and not any(word in name for word in ("kl", *ASIDE)):
            done |= all(_learns(record, other) for other in others)
        if len(shares) < 2 or [name] == rivals or done:
            continue
        term, late = name.split("/")[1].removeprefix("term."), s.values[len(s) // 2 :]
        cosine = record.get(f"train/term.{term}/gradient_cosine")
        against = cosine is not None and float(np.median(cosine.values[len(cosine) // 2 :])) < limits["cosine"]
        share = float(np.median(late))
        most = limits["opposed" if against else "aside" if any(word in term for word in ASIDE) else "share"]
        if len(late) > 1 and record.settled(s) and share > most:
            evidence = {"share": share, "equal_share": 1 / len(shares)}
            yield Finding(
                "term-dominates",
                "warning",
                f"The term {term} makes {share:.0%} of the gradient on what the terms share"
                + (", against the others" if against else "")
                + f"; an equal share is {1 / len(shares):.0%}.",
                evidence | ({"cosine": cosine.value} if cosine is not None else {}),
                (Remedy(f"lower its weight: --loss.{term}", 1000),),
                step=int(s.steps[len(s) // 2]),
            )


@rule(
    id="weight-not-applied",
    source="what is logged is what is applied",
    case="V: a ramp that was only logged",
    needs=("train/weight/*",),
    log="each term's weight as train/weight/NAME, beside train/loss/NAME and train/loss/total",
    limits={"relative": 0.01, "rounding": 1e-4},
)
def weight_not_applied(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The weight that is logged is not the weight that multiplied.

    Seen by Σ logged weight · logged term against the logged total, row by row, beside Σ |weight · term|; where they
    hardly differ, by terms whose weights are logged as moving, and which weights that stand explain.
    """
    total, weights = record.get("train/loss/total"), record.matching("train/weight/*")
    parts = terms(record)
    if record.foreign:
        yield NotMeasured("which terms the total of a foreign history holds is not known")
        return
    if total is None or not parts:
        yield NotMeasured("train/loss/total and the terms stand not in the history together")
        return
    due, size = np.zeros(len(total)), np.zeros(len(total))
    for term, s in parts.items():
        w, rows = weights.get(f"train/weight/{term}"), np.isin(total.steps, s.steps)  # a term may begin later
        if w is None:  # of another optimizer, as a discriminator's
            continue
        if not np.array_equal(w.steps, s.steps) or not np.array_equal(s.steps, total.steps[rows]):
            yield NotMeasured(f"the term {term} or its weight is not logged in the rows of the total")
            return
        due[rows] += w.values * s.values
        size[rows] += np.abs(w.values * s.values)
    off = np.abs(due - total.values) / (np.maximum(size, np.abs(total.values)) + 1e-6)
    stands = np.nanmax(off) > limits["rounding"] and _stands(total, due, parts, weights)
    if np.nanmax(off) > limits["relative"] or stands:
        worst = int(np.nanargmax(off))
        yield Finding(
            "weight-not-applied",
            "fail",
            f"At step {int(total.steps[worst]):,} the logged weights and terms add up to {due[worst]:.4g}, but the "
            f"total that was minimised is {total.values[worst]:.4g}.",
            {"logged": float(due[worst]), "applied": float(total.values[worst])},
            candidates=("a weight or ramp is only logged", "a term is in the total and not in the log"),
            step=int(total.steps[worst]),
        )


@rule(
    id="stopped-in-ramp",
    source="Prechelt 1998",
    case="V",
    needs=("train/weight/*",),
    log="each term's weight as train/weight/NAME",
)
def stopped_in_ramp(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Early stopping can end a run before a ramp has, or judges by a loss whose weights move.

    Seen by the last step at which a logged weight moved, against the first at which patience can run out, or where that
    is not known, at which training ended.

    ``patient_from``: the step up to which no look counts towards an early stop.
    """
    train = record.config.get("train") or {}
    moving = {n.rsplit("/", 1)[1]: s for n, s in record.matching("train/weight/*").items() if np.ptp(s.values) > 0}
    if "patience" not in train:
        yield from _ended_early(record, moving)
        return
    if not train["patience"] or not moving:
        return
    every = train.get("validate_every") or 1
    earliest = every * (train["patience"] + max(1, record.facts.get("patient_from", 0) // every))
    for term, s in moving.items():
        end = int(s.steps[1:][np.diff(s.values) != 0][-1])
        if earliest < end:
            yield Finding(
                "stopped-in-ramp",
                "warning",
                f"Patience can end the run at step {earliest:,}; the weight of {term} moves until step {end:,}.",
                {"earliest": earliest, "end": end},
                (Remedy(f"--train.patience {-(-end // every) + 1}"), Remedy("a shorter ramp")),
                step=earliest,
            )
        if train.get("monitor") in ("val/loss/total", f"val/loss/{term}_weighted"):
            yield Finding(
                "stopped-in-ramp",
                "warning",
                f"The best step is chosen by {train['monitor']}, in which the weight of {term} moves: it follows the "
                "ramp, not the model.",
                {"first": float(s.values[0]), "last": float(s.values[-1])},
                (Remedy("choose by a term without a moving weight: --train.monitor val/loss/reconstruction"),),
                step=end,
            )


def _stands(total: Series, due: np.ndarray, parts: Mapping[str, Series], weights: Mapping[str, Series]) -> bool:
    """Whether what is missing in the total is that of terms whose logged weights moved, at weights that stood."""
    moving = {t: w for t in parts if (w := weights.get(f"train/weight/{t}")) is not None and np.ptp(w.values) > 0}
    if not moving or len(total) < FEWEST or any(len(parts[t]) != len(total) for t in moving):
        return False
    rest = total.values - due + sum(w.values * parts[t].values for t, w in moving.items())
    columns = np.stack([parts[t].values for t in moving], 1)
    applied, *_ = np.linalg.lstsq(columns, rest, rcond=None)
    return bool(np.abs(rest - columns @ applied).max() < 0.02 * np.abs(total.values - due).max())


def _ended_early(record: Record, moving: dict[str, Series]) -> Iterator[Finding | NotMeasured]:
    """Of a training whose patience is not known: it ended before its time, and a weight was still on its way."""
    if record.running or record.steps is None:
        yield NotMeasured("whether and when training may stop early is not known")
    elif record.last_step < record.steps:
        for term, s in moving.items():
            if len(s) > 1 and s.values[-1] != s.values[-2]:
                yield Finding(
                    "stopped-in-ramp",
                    "warning",
                    f"Training ended at step {record.last_step:,} of {record.steps:,}, and the weight of {term} was "
                    "still moving.",
                    {"last": float(record.last_step), "steps": float(record.steps)},
                    (Remedy("let looks count towards an early stop from the end of the ramp on"),),
                    step=record.last_step,
                )


def _learns(record: Record, name: str) -> bool:
    """Whether the loss of a term has fallen, on held-out items where they are known."""
    term = name.split("/")[1].removeprefix("term.")
    found = [s for split in ("val", "train") if (s := record.get(f"{split}/loss/{term}")) is not None]
    return bool(found) and course.improved(course.finite(found[0]))


def _done(record: Record, name: str, share: float) -> bool:
    """Whether the held-out loss of a term is but a small share of its null."""
    s = record.get(f"val/loss/{name.split('/')[1].removeprefix('term.')}")
    return s is not None and s.null is not None and 0 <= s.value < share * s.null


def terms(record: Record) -> dict[str, Series]:
    """The training loss terms by name; their total only where it is all that is logged."""
    found = {n.rsplit("/", 1)[1]: s for n, s in record.matching("train/loss/*").items()}
    return {n: s for n, s in found.items() if n != "total" or len(found) == 1}


RULES: tuple[Rule, ...] = (term_inert, term_dominates, weight_not_applied, stopped_in_ramp)
