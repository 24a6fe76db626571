"""Any training: what a history of numbers shows of it. No torch."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from intaglio.health.finding import Finding, Remedy
from intaglio.health.record import Record, Series
from intaglio.health.rule import Limits, Rule, rule
from intaglio.history import NotMeasured

LOOKS = 3
"""Looks that must agree before a zero is more than the start of a run, as of a KL below its free bits."""

FEWEST = 8
"""Rows of a series below which nothing is said of its course."""

MINIMISED = ("train/loss/*", "val/loss/*", "train/caption/nats_per_token", "val/caption/nats_per_token")


QUANTISER = ("vq", "commitment", "codebook", "quantiser")
"""Words in the names of a quantiser's loss terms, which rise where latents grow, and are no loss of the model."""


def mad(x: np.ndarray) -> float:
    """1.4826 · median |x − median|: the standard deviation of a Gaussian, and unmoved by outliers."""
    return 1.4826 * float(np.median(np.abs(x - np.median(x))))


def rolling_median(x: np.ndarray, width: int) -> np.ndarray:
    """Median of the ``width`` values around each one, fewer at the ends; the same length as ``x``."""
    half = width // 2
    framed = np.concatenate([np.full(half, np.nan), x, np.full(half, np.nan)])
    return np.nanmedian(sliding_window_view(framed, 2 * half + 1), axis=1) if len(x) else x


WINDOWS = 200
"""Stretches of a curve that are compared with each other, however long it is."""


@rule(
    id="non-finite",
    source="IEEE 754",
    needs=("*/*/*",),
    log="any loss or gradient norm",
)
def non_finite(record: Record, limits: Limits) -> Iterator[Finding]:
    """A loss, gradient or weight is NaN or infinite.

    Seen by every row of the history; the trainer and the monitor stop before the optimizer step that would use it.
    """
    bad = {n: s for n, s in record.matching("train/*/*", "val/*/*").items() if not np.isfinite(s.values).all()}
    if bad:
        step, name = min((int(s.steps[~np.isfinite(s.values)][0]), n) for n, s in bad.items())
        yield Finding(
            "non-finite",
            "fail",
            f"{name} is not finite from step {step:,} on" + (f", and {len(bad) - 1} more." if len(bad) > 1 else "."),
            {"step": step, "quantities": len(bad)},
            (
                Remedy("start from the last good checkpoint with half the rate: --optim.rate", 200),
                Remedy("a longer --optim.warmup", 200),
                Remedy("--train.precision fp32", 200),
            ),
            step=step,
        )


@rule(
    id="diverged",
    source="robust z-score: Iglewicz & Hoaglin 1993",
    case="V and J: gradients to 81",
    needs=MINIMISED,
    log="the loss, at least forty times",
    limits={"deviations": 8.0, "share_lost": 0.5},
)
def diverged(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A loss leaves its own past for good.

    Seen by the median of the last quarter against the best stretch of as many rows before it, in robust standard
    deviations of that stretch; a loss must also have given up a share of what it had gained.
    """
    looked = False
    curves = settled(record, record.matching(*MINIMISED))
    for name, s in curves.items():
        if name.endswith("/total") and len([n for n in curves if n.startswith(name[:-5])]) > 1:
            continue  # its terms are judged, of which some may rise by right
        if len(s) < FEWEST or any(word in name for word in ("/kl", *QUANTISER)):
            continue
        looked = True
        width = max(3, len(s) // 4)
        starts = np.unique(np.linspace(0, len(s) - width, WINDOWS).astype(int))
        smooth = np.median(sliding_window_view(s.values, width)[starts], axis=1)
        before = smooth[starts < len(s) - 2 * width + 1]
        choice = int((before if len(before) else smooth).argmin())
        best, now, then = int(starts[choice]), float(smooth[-1]), float(smooth[choice])
        noise = mad(s.values[best : best + width] - rolling_median(s.values[best : best + width], 3)) + 1e-9
        gained = float(s.values[0]) - then
        if now - then > limits["deviations"] * noise and now - then > limits["share_lost"] * max(gained, 0.0):
            rising = s.steps[best + width - 1 :][s.values[best + width - 1 :] > then + limits["deviations"] * noise]
            step = int(rising[0]) if len(rising) else int(s.steps[-1])
            yield Finding(
                "diverged",
                "fail",
                f"{name} was {then:.4g} around step {int(s.steps[best]):,} and is {now:.4g} now: it has left its past.",
                {"best": then, "now": now, "noise": noise},
                (
                    Remedy("go back to the best checkpoint and halve the rate: --optim.rate", 500),
                    Remedy("clip the gradient: --optim.clip 1.0", 500),
                ),
                candidates=("the rate is too high: halve it", "one batch did it: look at the items of that step"),
                step=step,
            )
    if not looked:
        yield NotMeasured(f"fewer than {FEWEST} rows of any loss under weights that stay as they are")


@rule(
    id="spike",
    source="Hampel 1974",
    case="J",
    needs=("train/loss/*", "train/optimizer/gradient_norm"),
    log="the training loss",
    limits={"deviations": 12.0, "times": 1.5},
)
def spike(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Single steps far off the rest, from which the run recovered.

    Seen by distance from the rolling median of 21 rows, in robust standard deviations.
    """
    curves = record.matching("train/loss/*", "train/optimizer/gradient_norm").items()
    long = {name: finite(s) for name, s in curves if len(finite(s)) >= 4 * FEWEST}
    if not long:
        yield NotMeasured(f"fewer than {4 * FEWEST} rows of any loss")
    for name, s in long.items():
        middle = rolling_median(s.values, 21)
        positive = bool((s.values > 0).all())  # heavy tails, as of gradient norms, are symmetric in their logarithm
        off = np.log(s.values / middle) if positive else s.values - middle
        late = np.arange(len(s)) >= max(10, len(s) // 10)  # the start of a run is steep, not spiky
        high = late & (off > limits["deviations"] * (mad(off[late]) + 1e-12)) & (s.values > limits["times"] * middle)
        if high.any() and not high[-3:].any():
            worst = int(np.where(high, off, -np.inf).argmax())
            yield Finding(
                "spike",
                "warning",
                f"{name} jumped to {s.values[worst]:.4g} at step {int(s.steps[worst]):,}, where {middle[worst]:.4g} is "
                f"usual, and came back; {int(high.sum())} such rows.",
                {"value": float(s.values[worst]), "usual": float(middle[worst]), "rows": int(high.sum())},
                (Remedy("clip the gradient: --optim.clip 1.0", 500), Remedy("a longer --optim.warmup", 500)),
                step=int(s.steps[worst]),
            )


@rule(
    id="learning-rate-off",
    source="Loshchilov & Hutter 2017, eq. 5",
    case="D ended at 53 % of its peak; V: decoder at ten times; E: “exponential” that was cosine",
    needs=("train/optimizer/rate",),
    log="the rate of the optimizer's first group as train/optimizer/rate",
    limits={"relative": 0.01},
)
def learning_rate_off(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The applied rate is not the configured one.

    Seen by each logged rate, which is read from the optimizer, against the configured schedule at that optimizer step.
    """
    from intaglio.objectives.schedules import warmup_constant, warmup_cosine

    optim, s = record.config.get("optim"), record.series["train/optimizer/rate"]
    if optim is None or record.steps is None:
        yield NotMeasured("there is no configured schedule to hold it against")
        return
    rate, warmup = optim["rate"], optim["warmup"]
    if optim["schedule"] == "constant":
        due = np.array([rate * warmup_constant(int(k) - 1, warmup) for k in s.steps])
    else:
        floor = optim["floor"] / rate
        due = np.array([rate * warmup_cosine(int(k) - 1, record.steps, warmup, floor) for k in s.steps])
    off = np.abs(s.values - due) / np.maximum(due, 1e-3 * rate)
    if off.max() > limits["relative"]:
        worst = int(off.argmax())
        yield Finding(
            "learning-rate-off",
            "fail",
            f"At step {int(s.steps[worst]):,} the rate was {s.values[worst]:.3g}; the configuration asks for "
            f"{due[worst]:.3g}.",
            {"applied": float(s.values[worst]), "configured": float(due[worst])},
            candidates=(
                "a group has a factor of its own: compare the rates of all groups",
                "micro-batches are counted as steps: compare steps with optimizer.step() calls",
                "the schedule was built for another number of steps: compare --train.steps with its total",
            ),
            step=int(s.steps[worst]),
        )


@rule(
    id="term-inert",
    source="what is logged is what is applied",
    case="V: teacher; J: VQ loss; E: alignment",
    needs=("train/term.*/gradient_norm", "train/loss/*"),
    log="each loss term as train/loss/NAME, its gradient norm as train/term.NAME/gradient_norm",
    limits={"spread": 1e-7, "share": 1e-9},
)
def term_inert(record: Record, limits: Limits) -> Iterator[Finding]:
    """A configured loss term has no gradient, or its value never changes.

    Seen by the gradient norm of each term in the first steps and at each look; the spread of its logged values.
    """
    weights = {n.rsplit("/", 1)[1]: s for n, s in record.matching("train/weight/*").items()}
    for term, s in terms(record).items():
        if term in weights and not weights[term].values.any():
            continue  # switched off on purpose
        if term.startswith("kl") and record.matching("*/*/groups_above_floor"):
            continue  # under free bits: kl-free and kl-parked judge it
        norm = record.get(f"train/term.{term}/gradient_norm")
        flat = len(s) >= FEWEST and float(np.ptp(s.values)) <= limits["spread"] * max(1e-12, abs(s.value))
        zero = norm is not None and not (norm.values > 0).any() and (len(norm) >= LOOKS or record.settled(norm))
        if zero or flat:
            what = "its gradient is zero" if zero else f"it has been {s.value:.6g} in all {len(s)} rows"
            yield Finding(
                "term-inert",
                "fail",
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
    limits={"share": 0.95, "opposed": 0.8, "cosine": -0.5},
)
def term_dominates(record: Record, limits: Limits) -> Iterator[Finding]:
    """One loss term's gradient dwarfs or opposes all others.

    Seen by its share of the summed gradient norms, weights applied, and its cosine with the sum of the others, on the
    parameters that they share; an equal share is 1 / number of terms.
    """
    shares = record.matching("train/term.*/gradient_share")
    for name, s in shares.items():
        term, late = name.split("/")[1].removeprefix("term."), s.values[len(s) // 2 :]
        cosine = record.get(f"train/term.{term}/gradient_cosine")
        against = cosine is not None and float(np.median(cosine.values[len(cosine) // 2 :])) < limits["cosine"]
        share = float(np.median(late))
        if (
            len(shares) > 1
            and len(late) > 1
            and record.settled(s)
            and share > limits["opposed" if against else "share"]
        ):
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
    limits={"relative": 0.01},
)
def weight_not_applied(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The weight that is logged is not the weight that multiplied.

    Seen by Σ logged weight · logged term against the logged total, row by row.
    """
    total, weights = record.get("train/loss/total"), record.matching("train/weight/*")
    parts = terms(record)
    if total is None or not parts:
        yield NotMeasured("train/loss/total and the terms stand not in the history together")
        return
    due = np.zeros(len(total))
    for term, s in parts.items():
        w = weights.get(f"train/weight/{term}")
        if w is None or not np.array_equal(w.steps, total.steps) or not np.array_equal(s.steps, total.steps):
            yield NotMeasured(f"the term {term} or its weight is not logged in the rows of the total")
            return
        due += w.values * s.values
    off = np.abs(due - total.values) / (np.abs(total.values) + 1e-6)
    if np.nanmax(off) > limits["relative"]:
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
    id="input-starved",
    source="measured; none is due",
    case="J: a leak",
    needs=("train/speed/wait_share",),
    log="the share of time spent waiting for data as train/speed/wait_share",
    limits={"wait": 0.2, "growth": 0.5},
)
def input_starved(record: Record, limits: Limits) -> Iterator[Finding]:
    """The loader, not the model, sets the pace.

    Seen by the share of the time in which the trainer waits for a batch; and the process's resident memory over steps.
    """
    s = record.series["train/speed/wait_share"]
    wait = float(np.median(s.values[len(s) // 10 :]))
    if wait > limits["wait"]:
        yield Finding(
            "input-starved",
            "warning",
            f"Training waits for data {wait:.0%} of the time.",
            {"wait_share": wait},
            (Remedy("keep decoded images on a local disk: --data.cache FOLDER"),),
        )
    memory = record.get("train/memory/resident_bytes")
    if memory is not None and len(memory) >= 4 * FEWEST:
        late = memory.values[len(memory) // 4 :]
        growth = float(late[-1] / late[0] - 1)
        if growth > limits["growth"] and np.mean(np.diff(late) > 0) > 0.8:
            yield Finding(
                "input-starved",
                "warning",
                f"The process grew from {late[0] / 1e9:.2f} to {late[-1] / 1e9:.2f} GB, row after row: it leaks.",
                {"before": float(late[0]), "after": float(late[-1])},
                candidates=("the loader keeps what it has read", "losses are kept with their graphs"),
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

    Seen by the last step at which a logged weight moved, against the first at which patience can run out.
    """
    train = record.config.get("train") or {}
    if "patience" not in train:
        yield NotMeasured("whether and when training may stop early is not known")
        return
    moving = {n.rsplit("/", 1)[1]: s for n, s in record.matching("train/weight/*").items() if np.ptp(s.values) > 0}
    if not train["patience"] or not moving:
        return
    every = train.get("validate_every") or 1
    earliest = every * (train["patience"] + 1)
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


def terms(record: Record) -> dict[str, Series]:
    """The training loss terms by name; their total only where it is all that is logged."""
    found = {n.rsplit("/", 1)[1]: s for n, s in record.matching("train/loss/*").items()}
    return {n: s for n, s in found.items() if n != "total" or len(found) == 1}


def finite(s: Series) -> Series:
    """The rows whose value is a number."""
    good = np.isfinite(s.values)
    return Series(s.steps[good], s.values[good], s.nulls[good], s.counts[good])


def settled(record: Record, found: Mapping[str, Series]) -> dict[str, Series]:
    """Finite rows after the warm-up; totals only where no weight moves, since a ramp lifts them."""
    moving = any(float(np.ptp(s.values)) > 0 for s in record.matching("train/weight/*").values())
    warmup = int((record.config.get("optim") or {}).get("warmup", 0))
    kept = {n: finite(s) for n, s in found.items() if not (moving and n.endswith("/total"))}
    return {n: s.after(warmup) if warmup else s for n, s in kept.items()}


RULES: tuple[Rule, ...] = (
    non_finite,
    diverged,
    spike,
    learning_rate_off,
    term_inert,
    term_dominates,
    weight_not_applied,
    input_starved,
    stopped_in_ramp,
)
