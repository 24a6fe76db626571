"""Any training: what a history of numbers shows of it. No torch."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from intaglio.health.finding import Finding, Remedy, Severity
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules import course
from intaglio.health.rules.course import finite
from intaglio.history import NotMeasured, Series

LOOKS = 3
"""Looks that must agree before a zero is more than the start of a run, as of a KL below its free bits."""

FEWEST = 8
"""Rows of a series below which nothing is said of its course."""

MINIMISED = ("train/loss/*", "val/loss/*", "train/caption/nats_per_token", "val/caption/nats_per_token")

QUANTISER = ("vq", "commit", "codebook", "quanti")
"""Words in the names of a quantiser's loss terms, which rise where latents grow, and are no loss of the model."""

ADVERSARIAL = ("generator", "discriminator", "adversarial")
"""Words in the names of losses that two networks set each other, and that need not fall."""

BESIDE = ("relational", "invariance", "colour", "flip", "shift", "orthogonality", "preference")
"""Names of terms that stand beside what is to be learnt: relations of embeddings, what they shall not depend on, and an
order among answers that a model gives itself, which costs nothing while all of them are wrong."""

ASIDE = ("/kl", *QUANTISER, *ADVERSARIAL, *(f"/{name}" for name in BESIDE))
"""Terms whose course alone says nothing of whether the model learns."""


def mad(x: np.ndarray) -> float:
    """1.4826 · median |x − median|: the standard deviation of a Gaussian, and unmoved by outliers."""
    return 1.4826 * float(np.median(np.abs(x - np.median(x))))


def rolling_median(x: np.ndarray, width: int) -> np.ndarray:
    """Median of the ``width`` values around each one, fewer at the ends; the same length as ``x``."""
    half = width // 2
    framed = np.concatenate([np.full(half, np.nan), x, np.full(half, np.nan)])
    if not len(x):
        return x
    windows = np.sort(sliding_window_view(framed, 2 * half + 1), axis=1)  # NaN last
    row, count = np.arange(len(x)), (~np.isnan(windows)).sum(1)
    return (windows[row, (count - 1) // 2] + windows[row, count // 2]) / 2  # np.nanmedian takes many times as long


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
    if not bad:
        return
    step, name = min((int(s.steps[~np.isfinite(s.values)][0]), n) for n, s in bad.items())
    steering = [n for n in bad if "/loss/" in n or n.endswith("/gradient_norm")]
    back = record.foreign and all(np.isfinite(bad[n].values[-FEWEST:]).all() for n in steering)
    yield Finding(
        "non-finite",
        "warning" if back else "fail",
        f"{name} is not finite {'at' if back else 'from'} step {step:,}{'' if back else ' on'}"
        + (f", and {len(bad) - 1} more." if len(bad) > 1 else "."),
        {"step": step, "quantities": len(bad), "rows": int(sum((~np.isfinite(s.values)).sum() for s in bad.values()))},
        (
            Remedy("start from the last good checkpoint with half the rate: --optim.rate", 200),
            Remedy("a longer --optim.warmup", 200),
            Remedy("--train.precision fp32", 200),
        ),
        step=step,
    )


@rule(
    id="diverged",
    symptom=True,
    follows=("learning-rate-off", "gradients-add-up", "term-inert", "term-dominates"),
    source="robust z-score: Iglewicz & Hoaglin 1993",
    case="V and J: gradients to 81",
    needs=MINIMISED,
    log="the loss, at least forty times",
    limits={"deviations": 8.0, "share_lost": 0.5, "least": 0.05, "exploded": 4.0},
)
def diverged(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A loss leaves its own past for good.

    Seen by the median of the last quarter against the best stretch of as many rows before it, in robust standard
    deviations of that stretch; a loss must also have given up a share of what it had gained, and a twentieth of what it
    was. Of a program whose terms are not known their weighed sum is judged, and it only warns where more than half of
    the way to the null is kept, as a loss that rises while its negatives become harder, or where the targets are those
    of an averaged teacher, which have more in them the better it is, unless the loss ends at its null. InfoNCE beside a
    queue is judged on held-out items alone: as the encoder slows, the queue's old embeddings become harder to tell
    apart. A prediction beside SIGReg is judged by their total: it rises where SIGReg moves embeddings apart.
    """
    looked = given_up = False
    queued = bool((record.config.get("loss") or {}).get("queue"))
    traded = {"train/loss/prediction", "train/loss/sigreg"} <= set(record.series)
    curves = settled(record, record.matching(*MINIMISED))
    if record.foreign or not record.config:  # what a term of another program is for is not known, its sum is minimised
        rebuilt = {n: finite(s) for n, s in record.matching("*/loss/reconstruction").items()}
        ramped = any(map(course.improved, rebuilt.values()))
        curves = rebuilt if ramped else minimised(record)
    for name, s in curves.items():
        several = len([n for n in curves if n.startswith(name.rpartition("/")[0] + "/")]) > 1
        if several and name.endswith("/total") != traded:
            continue  # the terms are judged, of which some may rise by right; or what they are traded for in all
        if len(s) < FEWEST or any(word in name for word in ASIDE):
            continue
        looked = True
        if queued and name == "train/loss/infonce":
            continue
        twin = None
        if name.startswith("val/") and not queued:
            twin = curves.get("train" + name.removeprefix("val"), curves.get("train/loss/total"))
        if twin is not None and course.improved(twin):
            continue  # on held-out items alone it is overfitting, or another scale
        width = max(3, len(s) // 4)
        starts = np.unique(np.linspace(0, len(s) - width, WINDOWS).astype(int))
        smooth = np.median(sliding_window_view(s.values, width)[starts], axis=1)
        before = smooth[starts < len(s) - 2 * width + 1]
        choice = int((before if len(before) else smooth).argmin())
        best, now, then = int(starts[choice]), float(smooth[-1]), float(smooth[choice])
        noise = mad(s.values[best : best + width] - rolling_median(s.values[best : best + width], 3)) + 1e-9
        noise = max(noise, course.noise(s.values)) if record.foreign else noise
        gained = float(s.values[0]) - then
        least = max(limits["deviations"] * noise, limits["share_lost"] * gained, limits["least"] * abs(then))
        null = None if record.config and not record.foreign else _null(record, name)
        kept = null is not None and now < null - limits["share_lost"] * (null - then)
        led = bool(record.facts.get("moving_targets")) and (null is None or now < null)
        if now - then > least:
            rising = s.steps[best + width - 1 :][s.values[best + width - 1 :] > then + limits["deviations"] * noise]
            step = int(rising[0]) if len(rising) else int(s.steps[-1])
            given_up = True
            yield Finding(
                "diverged",
                "warning" if kept or led else "fail",
                f"{name} was {then:.4g} around step {int(s.steps[best]):,} and is {now:.4g} now: it has left its past.",
                {"best": then, "now": now, "noise": noise},
                (
                    Remedy("go back to the best checkpoint and halve the rate: --optim.rate", 500),
                    _clip(record),
                ),
                candidates=("the rate is too high: halve it", "one batch did it: look at the items of that step"),
                step=step,
            )
    if not looked:
        yield NotMeasured(f"fewer than {FEWEST} rows of any loss under weights that stay as they are")
    elif not given_up and not queued:
        exploded = list(_exploded(minimised(record), record, limits))
        yield from exploded or _lost(minimised(record), record)


def _exploded(curves: Mapping[str, Series], record: Record, limits: Limits) -> Iterator[Finding]:
    """A loss that was several times its first rows for a tenth of the run, and ends no better than it began or than
    its null."""
    for name, s in curves.items():
        if not name.startswith("train/") or len(s) < 2 * FEWEST or s.values.min() <= 0:
            continue
        first, now = float(np.median(s.values[:3])), float(np.median(s.values[-len(s) // 4 :]))
        high = s.values > limits["exploded"] * first
        null = _null(record, name)
        if high.mean() > 0.1 and now > 0.98 * (first if null is None else min(first, null)):
            peak = int(s.values.argmax())
            yield Finding(
                "diverged",
                "fail",
                f"{name} began at {first:.4g}, was {s.values[peak]:.4g} at step {int(s.steps[peak]):,}, and ends at "
                f"{now:.4g}: it exploded, and has learnt nothing since.",
                {"first": first, "peak": float(s.values[peak]), "now": now},
                (Remedy("a tenth of the rate: --optim.rate", 500), _clip(record)),
                candidates=("the rate is too high for this optimizer: a tenth", "targets or inputs are not scaled"),
                step=int(s.steps[high][0]),
            )


def _null(record: Record, name: str) -> float | None:
    """The null of a loss, or of its held-out twin; of a total those of its terms, weighed."""
    split, term = name.split("/")[0], name.rpartition("/")[2]
    found = [s.null for x in (split, "val") if (s := record.get(f"{x}/loss/{term}")) is not None and s.null is not None]
    if found or term != "total":
        return found[0] if found else None
    terms = {n for n in record.matching("train/loss/*", "val/loss/*") if not n.endswith("/total")}
    nulls = {n: _null(record, n) for n in terms if n.startswith(split)} or {n: _null(record, n) for n in terms}
    weights = {n: record.get(f"train/weight/{n.rpartition('/')[2]}") for n in nulls}
    known = [x * (1.0 if (w := weights[n]) is None else w.value) for n, x in nulls.items() if x is not None]
    return sum(known) if known and len(known) == len(nulls) else None


def _lost(curves: Mapping[str, Series], record: Record) -> Iterator[Finding]:
    """A stretch in which training gave up what it had gained and did not come back, or with which it ends."""
    stretches = {name: course.lost(s) for name, s in curves.items()}
    for name, x in stretches.items():
        if x is None or x.recovered or not name.startswith("train/"):
            continue
        held_out = {n: c for n, c in curves.items() if n.startswith("val/") and len(c) >= FEWEST}
        others = [stretches[n] for n, c in held_out.items() if c.steps[-1] >= x.first]  # it looked there
        seen = [y for y in others if y is not None and not y.recovered and y.last >= x.first]
        null = _null(record, name)
        void = null is not None and x.at_end and x.now >= null
        led = not void and bool(record.facts.get("moving_targets"))
        where = f"from step {x.first:,} on" if x.at_end else f"from step {x.first:,} to {x.last:,}"
        yield Finding(
            "diverged",
            "fail" if void or (not led and (seen or (not others and x.rows >= 3))) else "warning",
            f"{name} had come to {x.best:.4g} and was up to {x.peak:.4g} {where}; it ends at {x.now:.4g}"
            + (", and the held-out loss with it." if seen else "."),
            {"best": x.best, "peak": x.peak, "now": x.now, "rows": x.rows},
            (
                Remedy("take the checkpoint before it, and halve the rate: --optim.rate", 500),
                _clip(record),
            ),
            candidates=("the rate is too high for where it is: halve it", "one batch did it: look at its items"),
            step=x.first,
        )


@rule(
    id="spike",
    symptom=True,
    source="Hampel 1974",
    case="J",
    needs=("train/loss/*", "val/loss/*", "train/optimizer/gradient_norm"),
    log="the training loss",
    limits={"deviations": 12.0, "times": 1.5},
)
def spike(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Single steps far off the rest, from which the run recovered.

    Seen by distance from the rolling median of 21 rows, in robust standard deviations, and from the two rows before.
    """
    curves = record.matching("train/loss/*", "val/loss/*", "train/optimizer/gradient_norm").items()
    long = {name: finite(s) for name, s in curves if len(finite(s)) >= 4 * FEWEST}
    if not long:
        yield NotMeasured(f"fewer than {4 * FEWEST} rows of any loss")
    for name, s in long.items():
        if "train/loss/total" in long and "/loss/" in name and any(word in name for word in ASIDE):
            continue  # its hump at the start is none, unless the total has it
        middle = rolling_median(s.values, 21)
        positive = bool((s.values > 0).all())  # heavy tails, as of gradient norms, are symmetric in their logarithm
        off = np.log(s.values / middle) if positive else s.values - middle
        late = np.arange(len(s)) >= max(10, len(s) // 10)  # the start of a run is steep, not spiky
        least = (limits["times"] - 1) * np.abs(middle)
        if not positive:  # a level near 0 is no size
            least = np.maximum(least, 0.05 * np.ptp(middle))
        high = late & (off > limits["deviations"] * (mad(off[late]) + 1e-12)) & (s.values - middle > least)
        before = np.maximum(s.values[:-1], np.concatenate([s.values[:1], s.values[:-2]]))
        jumps = np.concatenate([[False], s.values[1:] > before + (limits["times"] - 1) * np.abs(before)])
        if (high & jumps).any() and not high[-3:].any():
            worst = int(np.where(high, off, -np.inf).argmax())
            yield Finding(
                "spike",
                "warning",
                f"{name} jumped to {s.values[worst]:.4g} at step {int(s.steps[worst]):,}, where {middle[worst]:.4g} is "
                f"usual, and came back; {int(high.sum())} such rows.",
                {"value": float(s.values[worst]), "usual": float(middle[worst]), "rows": int(high.sum())},
                (_clip(record), Remedy("a longer --optim.warmup", 500)),
                step=int(s.steps[worst]),
            )


def _clip(record: Record) -> Remedy:
    """Clipping, or half of what there is of it."""
    now = (record.config.get("optim") or {}).get("clip") or 0
    return Remedy(
        "clip the gradient harder: lower --optim.clip" if 0 < now <= 1 else "clip the gradient: --optim.clip 1.0", 500
    )


RATES = ("train/optimizer/rate", "train/optimizer.*/rate")


@rule(
    id="learning-rate-off",
    source="Loshchilov & Hutter 2017, eq. 5",
    case="D ended at 53 % of its peak; V: decoder at ten times; E: “exponential” that was cosine",
    needs=RATES,
    log="the optimizer's rate as train/optimizer/rate, that of a part with its own as train/optimizer.PART/rate",
    limits={"relative": 0.01, "nothing": 0.01, "idle": 0.33, "fallen": 0.2, "floor": 0.3, "jump": 0.7},
)
def learning_rate_off(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The applied rate is not the configured one.

    Seen by each logged rate, which is read from the optimizer, against the configured schedule at that optimizer step,
    times the factor of its part where it has one. Where none is configured: a rate of 0, and, in a run of its full
    length, a course that ends amid its fall or its warm-up, is next to nothing or at its floor for much of the run, or
    is warmed up again and again.
    """
    optim, logged = record.config.get("optim"), record.matching(*RATES)
    if optim is None or record.steps is None:
        for s in logged.values():
            yield from _no_rate(finite(s))
            if record.steps is not None and not record.running and record.last_step >= 0.95 * record.steps:
                yield from _odd_course(finite(s), limits)
        yield NotMeasured("there is no configured schedule to hold it against")
        return
    factors, found = record.config.get("rates") or {}, []
    for name, s in logged.items():
        group = name.split("/")[1].partition(".")[2]
        due = factors.get(group.partition(".")[0], 1.0) * _due(optim, record.steps, s.steps)
        off = np.abs(s.values - due) / np.maximum(due, 1e-3 * optim["rate"])
        k = int(off.argmax())
        found.append((float(off[k]), group.replace(".", ": ").replace("_", " "), int(s.steps[k]), s.values[k], due[k]))
    worst, group, step, applied, configured = max(found)
    if worst > limits["relative"]:
        yield Finding(
            "learning-rate-off",
            "fail",
            f"At step {step:,} the rate{f' of {group}' if group else ''} was {applied:.3g}; the configuration asks for "
            f"{configured:.3g}.",
            {"applied": float(applied), "configured": float(configured)},
            candidates=(
                "a group has a factor of its own: compare the rates of all groups",
                "micro-batches are counted as steps: compare steps with optimizer.step() calls",
                "the schedule was built for another number of steps: compare --train.steps with its total",
            ),
            step=step,
        )


def _due(optim: Mapping[str, Any], total: int, steps: np.ndarray) -> np.ndarray:
    """The configured rate at each of the optimizer steps."""
    from intaglio.objectives.schedules import warmup_constant, warmup_cosine

    rate, warmup = optim["rate"], optim["warmup"]
    if optim["schedule"] == "constant":
        return np.array([rate * warmup_constant(int(k) - 1, warmup) for k in steps])
    return np.array([rate * warmup_cosine(int(k) - 1, total, warmup, optim["floor"] / rate) for k in steps])


def _no_rate(s: Series) -> Iterator[Finding]:
    """A rate that is 0 in a third of the run or more."""
    zero = s.values == 0
    if len(s) >= FEWEST and zero[1:].mean() > 1 / 3:
        first = int(s.steps[1:][zero[1:]][0])
        yield Finding(
            "learning-rate-off",
            "fail" if zero[1:].all() else "warning",
            f"The rate is 0 in {zero.mean():.0%} of the rows, first at step {first:,}: nothing is learnt there.",
            {"share": float(zero.mean()), "step": first},
            candidates=("the schedule was built for fewer steps", "the rate is rounded to 0 when it is logged"),
            step=first,
        )


def _odd_course(s: Series, limits: Limits) -> Iterator[Finding]:
    """A rate whose course, seen whole, is that of a schedule for another number of steps."""
    if len(s) < 2 * FEWEST or s.values.max() <= 0:
        return
    share = s.values / s.values.max()
    peak = int(share.argmax())
    change = np.diff(share)
    at_once = np.flatnonzero((change < -0.5 * share[:-1]) & (share[:-1] > 0.3))
    climbs = {k: np.diff(share[k + 1 :][:11]) for k in at_once}
    climbed = {k: up for k, up in climbs.items() if up.sum() > share[k + 1]}
    anew = [k for k, up in climbed.items() if up.max() < limits["jump"] * up.sum()]  # a restart jumps
    over = int(np.flatnonzero(share >= limits["nothing"])[-1]) + 1
    early = at_once[(at_once < len(s) // 10) & (share[-1] < limits["fallen"])]
    after, falls = share[peak:], -np.diff(share[peak:])
    message = ""
    severity: Severity = "fail"
    if len(anew) >= 2:
        message = f"The rate falls at once and climbs again {len(anew)} times: it is warmed up anew."
        step = int(s.steps[anew[0] + 1])
    elif len(s) - over > limits["idle"] * len(s):
        step = int(s.steps[over])
        message = f"From step {step:,} on the rate is less than a hundredth of its peak: hardly anything is learnt."
    elif len(early) and share[early[0] + 1 :].max() < limits["fallen"]:
        step = int(s.steps[early[0] + 1])
        message = f"By step {step:,} the rate has fallen at once to {share[early[0] + 1]:.0%} of its peak, for good."
    elif len(after) >= FEWEST and (falls >= -1e-9).all() and after[-1] < 0.99:
        gradual = int((falls > 1e-9).sum()) >= 5
        flat = int(np.flatnonzero(after > 1.01 * after[-1])[-1]) + 1
        late = falls[-max(3, len(falls) // 10) :].mean()
        if gradual and len(after) - flat > 0.6 * len(share):
            message = f"The rate has reached its floor at step {int(s.steps[peak + flat]):,}, and stays there."
            severity = "fail" if after[-1] < limits["floor"] else "warning"
        elif gradual and after[-1] > 0.3 and late > 0.8 * falls.mean() and not course.geometric(after):
            message = f"The rate ends at {after[-1]:.0%} of its peak, and still falls as fast as ever."
        step = int(s.steps[-1])
    elif share[-1] > 0.3 and (change[-5:] > 0).all() and share[peak:].min() < 0.05:
        message = f"The rate had come down, and ends amid a climb, at {share[-1]:.0%} of its peak."
        severity, step = "warning", int(s.steps[-1])
    elif peak >= 0.75 * len(s) and share[0] < 0.5 and (change >= 0).all():
        message = f"The rate rises until step {int(s.steps[peak]):,}: its warm-up takes the run."
        step = int(s.steps[-1])
    if message:
        yield Finding(
            "learning-rate-off",
            severity,
            message,
            {"last": float(s.values[-1]), "peak": float(s.values.max())},
            candidates=(
                "the schedule was built for another number of steps: compare the two",
                "it is stepped once for each micro-batch or epoch: call it once for each optimizer step",
            ),
            step=step,
        )


@rule(
    id="input-starved",
    source="measured; none is due",
    case="J: a leak",
    needs=("train/speed/wait_share",),
    log="the share of time spent waiting for data as train/speed/wait_share, and train/speed/resident_bytes",
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
    memory = record.get("train/speed/resident_bytes") or record.get("train/memory/resident_bytes")
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


def mains(record: Record) -> dict[str, Series]:
    """Finite rows of what is minimised, for each split: the total where no weight moves, else its terms."""
    moving = any(float(np.ptp(s.values)) > 0 for s in record.matching("train/weight/*").values())
    found: dict[str, Series] = {}
    for split in ("train", "val"):
        curves = {n: finite(s) for n, s in record.matching(f"{split}/loss/*").items()}
        total = f"{split}/loss/total"
        own = {n: s for n, s in curves.items() if n != total and not any(w in n for w in ASIDE)}
        found |= {total: curves[total]} if total in curves and not moving else own
    return {n: s for n, s in found.items() if len(s)}


def minimised(record: Record) -> dict[str, Series]:
    """``mains``, but the terms of a split whose total is not known, or lifted by a ramp, weighed as they are at last:
    one may rise by right where another pays for it. A total begins anew where a term comes or goes."""
    found = mains(record)
    for split in ("train", "val"):
        total = f"{split}/loss/total"
        known = {n: finite(s) for n, s in record.matching(f"{split}/loss/*").items() if n != total and len(finite(s))}
        terms = {n: s for n, s in known.items() if not any(word in n for word in ADVERSARIAL)}
        if total not in found and len(terms) > 1 and len({s.steps.tobytes() for s in terms.values()}) == 1:
            weights = {n: record.get(f"train/weight/{n.rsplit('/', 1)[1]}") for n in terms}
            summed = sum(s.values * (1.0 if (w := weights[n]) is None else w.value) for n, s in terms.items())
            found = {n: s for n, s in found.items() if n not in terms}
            found[total] = Series.of(next(iter(terms.values())).steps, np.asarray(summed))
        elif total in found and known:
            last = int(found[total].steps[-1])
            ended = [int(s.steps[-1]) for s in known.values() if s.steps[-1] < 0.9 * last]
            came = [int(s.steps[0]) - 1 for s in known.values() if s.steps[0] > 0.1 * last]
            if since := max([*ended, *came], default=0):
                found[total] = found[total].after(since)
    return {n: s for n, s in found.items() if len(s)}


def settled(record: Record, found: Mapping[str, Series]) -> dict[str, Series]:
    """Finite rows after the warm-up; totals only where no weight moves, since a ramp lifts them."""
    moving = any(float(np.ptp(s.values)) > 0 for s in record.matching("train/weight/*").values())
    warmup = int((record.config.get("optim") or {}).get("warmup", 0))
    kept = {n: finite(s) for n, s in found.items() if not (moving and n.endswith("/total"))}
    return {n: s.after(warmup) if warmup else s for n, s in kept.items()}


RULES: tuple[Rule, ...] = (non_finite, diverged, spike, learning_rate_off, input_starved)
