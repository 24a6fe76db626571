"""Is anything learnt, and does it hold on items that were not learnt from? No torch."""

import math
from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, Remedy, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules import course
from intaglio.health.rules.course import finite
from intaglio.health.rules.terms import terms
from intaglio.health.rules.training import ASIDE, FEWEST, mad, mains, rolling_median
from intaglio.history import NotMeasured, Series

COLLAPSED_SIGREG = 0.40205
"""SIGReg over the number of embeddings where they are all zero: ``objectives.sigreg.collapsed_sigreg()``."""

HITS = ("*/*/accuracy", "*/*/accuracy_as_logged", "*/*/accuracy_forced", "*/*/token_accuracy", "*/*/top1")

LOWER_IS_BETTER = ("*/loss/*", "*/*/nats_per_token", "*/*/mse", "*/*/error")


@rule(
    id="no-learning",
    symptom=True,
    follows=(
        "learning-rate-off",
        "gradients-add-up",
        "tied-and-frozen",
        "range-mismatch",
        "near-chance",
        "plateau",
        "diverged",
        "ema-lag",
    ),
    source="no number without its null",
    case="J, E",
    needs=("train/loss/*", "val/loss/*", "train/*/nats_per_token"),
    log="a loss with its null",
    limits={"share": 0.02, "solved": 0.95, "by_chance": 0.3, "faded": 0.1},
)
def no_learning(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A loss is no better than its null model's.

    Seen by the latest value, in training the median of the last quarter, beside its null: mean image, bigram model. So
    is a held-out accuracy that is hardly at any look surely above its own, that of the commonest answer.
    """
    yield from _guesses(record, limits)
    found = record.matching(*LOWER_IS_BETTER)
    known = {n: s for n, s in found.items() if s.null is not None and "contrastive" not in n}
    if not known:
        yield from _unmoved(record)
    for name, s in known.items():
        assert s.null is not None
        twin = "train" + name.removeprefix("val") if name.startswith("val/") else name
        if twin != name and twin in known:
            continue  # on held-out items alone it is overfitting
        held_out = known.get("val" + name.removeprefix("train")) if name.startswith("train/") else None
        if held_out is not None and held_out.null and held_out.value < (1 - limits["share"]) * held_out.null:
            continue  # training has something that held-out items have not: noise, dropout, smoothed labels
        late = s.values[-max(1, len(s) // 4) :] if len(s) >= FEWEST and name.startswith("train/") else s.values[-1:]
        value = float(np.median(late))  # of single batches one alone says little
        gone = s.null - 10 * limits["share"] * abs(s.null)
        never = held_out is not None and held_out.null and float(held_out.values.min()) >= held_out.null
        weight = record.get(f"train/weight/{name.rpartition('/')[2]}")
        faded = weight is not None and weight.value < limits["faded"] * weight.values.max()
        lost = held_out is not None and bool(held_out.null) and held_out.value >= (held_out.null or 0) and not faded
        if len(s) >= 4 * FEWEST and not never and not lost and float(rolling_median(s.values, FEWEST).min()) < gone:
            continue  # it had learnt, and has lost some of it: see diverged
        size = s.null if s.null > 0 else max(float(s.values[0]) - s.null, 0.0)  # densities have losses below 0
        least = s.null - limits["share"] * size
        if s.null and value >= least and record.settled(s):
            yield Finding(
                "no-learning",
                "fail",
                f"{name} is {value:.4g}; a model that has learnt nothing reaches {s.null:.4g}.",
                {"value": value, "null": s.null},
                (Remedy("another learning rate: --optim.rate", 1000), Remedy("train longer: --train.steps", 1000)),
                candidates=(
                    "no gradient reaches it: see dead-parameters and term-inert",
                    "input and target are not of the same item: look at a batch",
                ),
                step=int(s.steps[-1]),
            )


def _guesses(record: Record, limits: Limits) -> Iterator[Finding]:
    """Held-out accuracies that were never above those of the commonest answer."""
    for name, s in record.matching(*HITS).items():
        if not name.startswith("val/") or "." in name or s.null is None or s.null > limits["solved"]:
            continue  # of a kind of questions: see question-only
        if len(s) < FEWEST or not record.settled(s):
            continue
        low = record.get(f"{name}_low")
        least = s.values - limits["share"] if low is None or len(low) != len(s) else low.values
        if least[-1] <= s.null and np.mean(least > s.null) < limits["by_chance"]:
            yield Finding(
                "no-learning",
                "fail",
                f"{name} is {s.value:.1%}, hardly ever surely above {s.null:.1%}, which needs no input.",
                {"value": s.value, "null": s.null},
                candidates=("answers are not of the same items: look at a batch", "another finding is its cause"),
                step=int(s.steps[-1]),
            )


def _unmoved(record: Record) -> Iterator[Finding | NotMeasured]:
    """Without a null: no loss has fallen since the first rows, and no accuracy has risen."""
    curves = {n: s for n, s in mains(record).items() if len(s) >= FEWEST and record.settled(s)}
    if not curves:
        yield NotMeasured(f"no loss has a null to be held against, nor {FEWEST} rows that have settled")
        return
    stuck = {n: course.stuck(s) for n, s in curves.items()}
    terms_ = [finite(s) for n, s in record.matching("*/loss/*").items() if not any(w in n for w in ASIDE)]
    hits = {n: finite(s) for n, s in record.matching(*HITS).items() if len(finite(s)) >= FEWEST}
    if any(map(course.improved, [*curves.values(), *terms_])) or any(map(_risen, hits.values())):
        return
    if not all(stuck.values()):
        yield NotMeasured("no loss has a null to be held against, and whether one has fallen is hidden by its noise")
        return
    name = next(iter(stuck))
    seen = stuck[name]
    assert seen is not None
    frozen = {n: s.value for n, s in hits.items() if np.ptp(s.values[len(s) // 2 :]) == 0 and s.value < 0.95}
    fell, exploded = seen.since == "first rows", seen.since == "explosion"
    what = {
        "start": f"{name} began at {seen.first:.4g} and stands at {seen.level:.4g}: nothing has been learnt since.",
        "explosion": f"{name} exploded to {seen.first:.4g}, and has stood at {seen.level:.4g} ever since: as a "
        "constant answer would.",
        "first rows": f"{name} has not fallen below {seen.level:.4g} since its first rows.",
    }[seen.since]
    from intaglio.history.relations import constants

    known = constants(seen.level) if hits else []
    yield Finding(
        "no-learning",
        "warning" if fell and not frozen else "fail",
        what
        + "".join(
            f" {n} is {value:.4g} in every row of the second half: always the same answer."
            for n, value in frozen.items()
        )
        + (f" {known[0]}" if known else ""),
        {"first": seen.first, "level": seen.level} | frozen,
        (
            Remedy("lower --optim.rate tenfold" if exploded else "another learning rate: --optim.rate", 1000),
            Remedy("a longer --optim.warmup", 1000),
        ),
        candidates=(
            "no gradient reaches the model: see dead-parameters",
            "input and target are not of the same item: look at a batch",
            "it was trained before: compare with its parent",
        ),
        step=int(curves[name].steps[-1]),
    )


def _risen(s: Series) -> bool:
    """Whether an accuracy has risen by five points, or was high from the start."""
    late = float(np.median(s.values[-max(1, len(s) // 5) :]))
    return late > (95 if s.values.max() > 1.5 else 0.95) or late - float(
        np.median(s.values[: max(1, len(s) // 20)])
    ) > (5 if s.values.max() > 1.5 else 0.05)


@rule(
    id="plateau",
    symptom=True,
    follows=("learning-rate-off", "gradients-add-up", "near-chance", "no-learning"),
    source="no number without its null",
    case="J: .0202 was the collapsed SIGReg",
    needs=("train/loss/*",),
    log="each loss term",
    limits={"flat": 0.01, "close": 0.005, "collapsed": 0.035},
)
def plateau(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A loss stands at a constant that means that nothing is learnt.

    Seen by a flat second half, at ln K of a batch, at the null, or at what SIGReg gives embeddings that are all one, or
    all of length 1, which is hardly less.
    """
    looked = False
    for term, s in terms(record).items():
        s = finite(s)
        if len(s) < 2 * FEWEST:
            continue
        looked = True
        late = s.values[len(s) // 2 :]
        middle = float(np.median(late))
        trend = abs(float(np.median(late[len(late) // 2 :]) - np.median(late[: len(late) // 2])))
        error = 1.77 * mad(late) / (len(late) / 2) ** 0.5  # of the difference of two medians
        if trend > max(limits["flat"] * abs(middle), 3 * error) or middle == 0:
            continue
        collapsed = _collapsed(record) if term == "sigreg" else {}
        for what, constant in (collapsed | _constants(record, f"train/loss/{term}", s)).items():
            if abs(middle - constant) < limits["collapsed" if what in collapsed else "close"] * abs(constant):
                beside = what in collapsed and record.get("train/loss/prediction") is None
                yield Finding(
                    "plateau",
                    "warning" if beside else "fail",
                    f"train/loss/{term} has stood at {middle:.4g} for half of the run: that is {what}.",
                    {"value": middle, "constant": constant},
                    remedies("raise --loss.sigreg", wait=1000)
                    if what in collapsed
                    else remedies("another learning rate: --optim.rate", "a longer --optim.warmup", wait=1000),
                    step=int(s.steps[len(s) // 2]),
                )
                break
    if not looked:
        yield NotMeasured(f"fewer than {2 * FEWEST} rows of any loss term")


def _collapsed(record: Record) -> dict[str, float]:
    """What SIGReg is in a step whose questions and answers have one embedding."""
    if record.config.get("system") != "jepa":
        return {}
    batch, pairs = record.config["train"]["batch_size"], record.config["data"]["pairs"]
    return {f"what {2 * batch * pairs} embeddings give that are all one": 2 * batch * pairs * COLLAPSED_SIGREG}


def _constants(record: Record, name: str, s: Series) -> dict[str, float]:
    """Values that a loss has where nothing has been learnt, by what they are."""
    batch = (record.config.get("train") or {}).get("batch_size")
    found = {} if s.null is None else {"its null": s.null}
    held_out = record.get(name.replace("train/", "val/", 1))
    if held_out is not None and held_out.null:
        found["its null on held-out items"] = held_out.null
    if batch and batch > 1 and not found:  # where a null is known, ln of the batch is a number like any other
        found[f"ln {batch}, of guessing in a batch of {batch}"] = math.log(batch)
    return found


@rule(
    id="overfitting",
    follows=("near-chance", "high-noise-starved", "vocabulary-unreachable", "augmentation-inert", "data-replaced"),
    source="no number without its null",
    case="V",
    needs=("train/*/nats_per_token", "train/loss/*"),
    log="the held-out loss, and the same quantity on clean training items",
    limits={
        "kept": 0.5,
        "learnt": 0.02,
        "worse": 0.1,
        "lost": 1.25,
        "apart": 1.5,
        "given_up": 0.3,
        "gap_warning": 2.0,
        "gap_fail": 3.0,
    },
)
def overfitting(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The gain over the null on training items does not carry over to held-out items.

    Seen by the same quantity of the same weights in the same mode, on training and on held-out items, beside the null:
    it fails where less than half of the gain is left, or three tenths of what held-out items had was given up again
    while training's loss went on falling.
    """
    pairs = {n: (s, record.get("val" + n.removeprefix("train"))) for n, s in record.matching("train/*/*").items()}
    judged = [n for n in pairs if not any(word in n for word in ASIDE)]
    paired = {n: (s, v) for n in judged for s, v in [pairs[n]] if v is not None}
    if "train/loss/total" not in mains(record):  # a ramp lifts it
        paired.pop("train/loss/total", None)
    clean = {n: (s, v) for n, (s, v) in paired.items() if n.endswith("nats_per_token") and v.null is not None}
    for name, (train, val) in clean.items():
        assert val.null is not None
        gain, held_out_gain = val.null - train.value, val.null - val.value
        if gain > limits["learnt"] * val.null and held_out_gain < limits["kept"] * gain:
            worse = held_out_gain <= 0
            apart = val.value - train.value > limits["worse"] * val.null
            yield Finding(
                "overfitting",
                "fail" if worse or apart else "warning",
                f"The model memorises: {name.removeprefix('train/')} is {train.value:.2f} on training items and "
                f"{val.value:.2f} on held-out ones, {'no better than' if worse else 'hardly better than'} a bigram "
                f"model's {val.null:.2f}.",
                {"train": train.value, "val": val.value, "null": val.null},
                remedies("give more images", "train shorter: --train.patience 3", "raise --model.dropout 0.2"),
                step=int(val.steps[-1]),
            )
    if clean:
        return
    looked = False
    for name, (train, val) in paired.items():
        if len(val) < FEWEST or not name.startswith("train/loss/"):
            continue
        looked = True
        train, val = finite(train), finite(val)
        if len(train) < 2 or len(val) < 2:
            continue
        if other_scale(train, val):
            yield NotMeasured(f"{name} and its held-out twin are not on one scale, so their difference says nothing")
            continue
        if not course.improved(train):
            continue  # nothing has been learnt that could not carry over
        turned = list(_turned(name, train, val, limits, record))
        yield from turned or _parted(name, train, val, limits, record)
    if not looked:
        yield NotMeasured(f"there are not {FEWEST} held-out values of a loss that is also logged in training")


def other_scale(train: Series, val: Series, times: float = 5.0) -> bool:
    """Whether two losses of one name can not be one quantity.

    The held-out one starts far above training's, at its start and at that step, which nothing learnt explains, and
    stays above it, or is far below it all along; where they come together it was the statistics of a normalisation.
    Where training's has come close to 0 beside the null, a ratio says nothing.
    """
    if min(train.values.min(), val.values.min()) < 0:
        return False  # a ratio of what crosses 0 says nothing
    size = float(np.median(np.abs(train.values[: max(1, len(train) // 100)])))
    then = float(np.median(np.abs(train.values[np.abs(train.steps - val.steps[0]).argsort()[:5]])))
    begins = float(np.median(np.abs(val.values[: max(1, len(val) // 20)])))
    ends = abs(float(np.median(val.values[-max(1, len(val) // 5) :])))
    late = abs(float(np.median(train.values[-max(1, len(train) // 5) :])))
    solved = val.null is not None and late < 0.05 * val.null
    above = begins > times * max(size, then) and ends > 2 * late
    return above or (begins < min(size, then) / times and ends < late / times and not solved)


def steadily_apart(train: Series, val: Series, times: float = 5.0) -> bool:
    """Whether a held-out loss is as many times training's at its first look as ever after: a sum beside a mean.

    What is learnt by heart parts the two little by little.
    """
    if len(val) < 4 or len(train) < FEWEST or not (train.values > 0).all() or not (val.values > 0).all():
        return False
    nearest = np.abs(train.steps[None] - val.steps[:, None]).argsort(1)[:, :5]
    ratio = val.values / np.median(train.values[nearest], 1)
    return bool((ratio.min() > times or ratio.max() < 1 / times) and ratio.max() < 2 * ratio.min())


def _worse_accuracy(record: Record) -> bool | None:
    """Whether held-out accuracy ends below its best by a point; None where none is logged."""
    curves = [finite(s) for s in record.matching("val/*/accuracy").values()]
    if not curves or len(curves[0]) < 4:
        return None
    smooth = rolling_median(curves[0].values, 3)
    return bool(smooth[-1] < smooth.max() - 0.01 * (100 if smooth.max() > 1.5 else 1))


def _carried(train: float, val: float, null: float | None, limits: Limits) -> bool:
    """Whether held-out items still have that share of training's gain over the null."""
    return null is not None and null - val >= limits["kept"] * (null - train) > 0


def _parted(name: str, train: Series, val: Series, limits: Limits, record: Record) -> Iterator[Finding]:
    """The held-out loss stands far above training's, which goes on falling."""
    found = course.gap(train, val)
    if found is None or found.times < limits["gap_warning"] or _worse_accuracy(record) is False:
        return
    yield Finding(
        "overfitting",
        "fail"
        if found.times > limits["gap_fail"] and not _carried(found.train, found.val, val.null, limits)
        else "warning",
        f"{name.replace('train/', 'val/', 1)} has stood at {found.val:.4g} since step {found.since:,}, while "
        f"training's fell by {found.fallen:.0%} to {found.train:.4g}: {found.times:.1f} times apart.",
        {"train": found.train, "val": found.val, "times": found.times, "since": found.since},
        remedies("train shorter: --train.patience 3", "give more items", "raise --model.dropout 0.2"),
        step=found.since,
    )


def _turned(name: str, train: Series, val: Series, limits: Limits, record: Record) -> Iterator[Finding]:
    """The held-out loss has turned while training's goes on falling."""
    best = int(val.values.argmin())
    width = max(3, 2 * (len(val) // 80) + 1)
    smooth = rolling_median(val.values, width)
    noise = mad(val.values - smooth) + 1e-9
    low = float(smooth.min())
    rise, gained = float(smooth[-1]) - low, float(val.values[0] - val.values.min())
    since = train.after(int(val.steps[best]))
    third = len(since) // 3
    falls = third > 0 and float(np.median(since.values[-third:])) < float(np.median(since.values[:third]))
    then = float(np.median(train.values[np.abs(train.steps - val.steps[best]).argsort()[:5]]))
    far = float(np.median(train.values[-max(1, len(train) // 10) :]))
    falls &= far < then  # else something has made it harder, as a ramp, and it has not learnt by heart
    if best < len(val) - 3 and rise > 4 * noise and rise > limits["worse"] * gained and falls:
        now = float(np.median(val.values[-width:]))
        right = _worse_accuracy(record) is False
        worse = now > limits["lost"] * low > 0 and now > limits["apart"] * far
        gone = (rise > gained or (worse and not right)) and not _carried(far, now, val.null, limits)
        if val.null is not None and low < val.null:
            apart = now > limits["apart"] * far or now < 0
            gone |= val.value >= val.null
            gone |= apart and not right and rise > limits["given_up"] * (val.null - low)
        yield Finding(
            "overfitting",
            "fail" if gone else "warning",
            f"{name.replace('train/', 'val/', 1)} was best at step {int(val.steps[best]):,} ({val.values[best]:.4g}) "
            f"and is {val.value:.4g} now, while training's goes on falling.",
            {"best": float(val.values[best]), "now": val.value},
            remedies("train shorter: --train.patience 3", "give more items", "raise --model.dropout 0.2"),
            step=int(val.steps[best]),
        )


@rule(
    id="validation-missing",
    source="“not measured” is an answer",
    case="E: dropped by the logger, whose steps went backwards",
    needs=("train/loss/*",),
    log="the held-out loss under the training loss's name, at the optimizer step",
    limits={"looks": 3, "covered": 0.5},
)
def validation_missing(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """There is no held-out curve, or one on another scale or step axis.

    Seen by looks at held-out items, their steps against those of training, and the ratio of the two losses at the
    start.
    """
    val = record.matching("val/loss/*")
    last = max(int(s.steps[-1]) for s in record.matching("train/loss/*").values())
    fix = remedies("look ten times in a run: --train.validate_every", "log at the optimizer step, not at the epoch")
    if not val and record.foreign:
        yield NotMeasured("there is no held-out loss in this history, so that generalisation is not measured")
        return
    curves, apart = mains(record), False
    for name, held_out in {**val, **curves}.items():
        train = record.get("train" + name.removeprefix("val")) if name.startswith("val/") else None
        if train is None or apart:
            continue
        if apart := steadily_apart(finite(train), finite(held_out)) or (
            name in curves and other_scale(finite(train), held_out)
        ):
            yield Finding(
                "validation-missing",
                "warning",
                f"{name} starts at {held_out.values[0]:.4g}, training at {train.values[0]:.4g}: they are not one "
                "quantity, so neither a gap nor a rise between them is evidence.",
                {"val": float(held_out.values[0]), "train": float(train.values[0])},
                remedies("weigh the terms alike on both splits, and reduce them alike (mean or sum)"),
                candidates=("a term has another weight in validation", "one is a sum and the other a mean"),
            )
    if not val:
        if not record.running or (record.steps is not None and last >= 0.5 * record.steps):
            yield Finding("validation-missing", "fail", "No held-out loss was ever logged.", {}, fix, step=last)
        return
    longest = max(val.values(), key=len)
    reach = int(longest.steps[-1]) / max(1, last)
    done = not record.running or (record.steps is not None and last >= 0.9 * record.steps)
    if done and (len(longest) < limits["looks"] or reach < limits["covered"]):
        yield Finding(
            "validation-missing",
            "warning",
            f"Held-out items were looked at {len(longest)} times, the last at step {int(longest.steps[-1]):,} of "
            f"{last:,}.",
            {"looks": len(longest), "reach": reach},
            fix,
            candidates=("the logger drops rows whose step goes backwards", "steps of validation count epochs"),
            step=int(longest.steps[-1]),
        )


@rule(
    id="log-distorted",
    source="what is logged is what is applied",
    case="E, J",
    needs=("train/optimizer/gradient_norm",),
    log="the gradient norm before clipping",
    limits={"share": 0.3, "relative": 1e-4},
)
def log_distorted(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """What is logged is not what it is called: a norm after clipping, a weighted value read as raw.

    Seen by the share of gradient norms that equal the clip to four digits: rounding aside, none do.
    """
    s = finite(record.series["train/optimizer/gradient_norm"])
    if len(s) < FEWEST:
        yield NotMeasured(f"fewer than {FEWEST} gradient norms")
        return
    top = float(s.values.max())
    at_top = np.abs(s.values / top - 1) < limits["relative"] if top > 0 else np.zeros(len(s), bool)
    clip = (record.config.get("optim") or {}).get("clip") or np.inf
    if at_top.mean() > limits["share"] and (np.ptp(s.values) > 0 or abs(top / clip - 1) < limits["relative"]):
        yield Finding(
            "log-distorted",
            "warning",
            f"{at_top.mean():.0%} of the gradient norms are {top:.4g} and none is more: logged after clipping.",
            {"share": float(at_top.mean()), "clip": top},
            remedies("log the norm that clipping was given, not the one it left"),
        )


RULES: tuple[Rule, ...] = (no_learning, plateau, overfitting, validation_missing, log_distorted)
