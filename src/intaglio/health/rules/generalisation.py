"""Is anything learnt, and does it hold on items that were not learnt from? No torch."""

import math
from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, Remedy, remedies
from intaglio.health.record import Record, Series
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules.training import FEWEST, QUANTISER, finite, mad, rolling_median, terms
from intaglio.history import NotMeasured

LOWER_IS_BETTER = ("*/loss/*", "*/*/nats_per_token", "*/*/mse", "*/*/error")


@rule(
    id="no-learning",
    source="no number without its null",
    case="J, E",
    needs=("train/loss/*", "val/loss/*", "train/*/nats_per_token"),
    log="a loss with its null",
    limits={"share": 0.02},
)
def no_learning(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A loss is no better than its null model's.

    Seen by the latest value, in training the median of the last quarter, beside its null: mean image, bigram model.
    """
    found = record.matching(*LOWER_IS_BETTER)
    known = {n: s for n, s in found.items() if s.null is not None and "contrastive" not in n}
    if not known:
        yield NotMeasured("no loss has a null to be held against")
    for name, s in known.items():
        assert s.null is not None
        twin = "train" + name.removeprefix("val") if name.startswith("val/") else name
        if twin != name and twin in known:
            continue  # on held-out items alone it is overfitting
        late = s.values[-max(1, len(s) // 4) :] if len(s) >= FEWEST and name.startswith("train/") else s.values[-1:]
        value = float(np.median(late))  # of single batches one alone says little
        if s.null > 0 and value >= (1 - limits["share"]) * s.null and record.settled(s):
            yield Finding(
                "no-learning",
                "fail",
                f"{name} is {value:.4g}; a model that has learnt nothing reaches {s.null:.4g}.",
                {"value": value, "null": s.null},
                (Remedy("train longer: --train.steps", 1000), Remedy("raise --optim.rate", 1000)),
                candidates=(
                    "no gradient reaches it: see dead-parameters and term-inert",
                    "input and target are not of the same item: look at a batch",
                ),
                step=int(s.steps[-1]),
            )


@rule(
    id="plateau",
    source="no number without its null",
    case="J: .0202 was the collapsed SIGReg",
    needs=("train/loss/*",),
    log="each loss term",
    limits={"flat": 0.01, "close": 0.005},
)
def plateau(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A loss stands at a constant that means that nothing is learnt.

    Seen by a flat second half, at ln K of a batch, at the null, or at a value the document names.
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
        for what, constant in _constants(record, f"train/loss/{term}", s).items():
            if abs(middle - constant) < limits["close"] * abs(constant):
                yield Finding(
                    "plateau",
                    "fail",
                    f"train/loss/{term} has stood at {middle:.4g} for half of the run: that is {what}.",
                    {"value": middle, "constant": constant},
                    remedies("raise --optim.rate", "a longer --optim.warmup", wait=1000),
                    step=int(s.steps[len(s) // 2]),
                )
                break
    if not looked:
        yield NotMeasured(f"fewer than {2 * FEWEST} rows of any loss term")


def _constants(record: Record, name: str, s: Series) -> dict[str, float]:
    """Values that a loss has where nothing has been learnt, by what they are."""
    batch = (record.config.get("train") or {}).get("batch_size")
    found = {} if s.null is None else {"its null": s.null}
    if batch and batch > 1:
        found[f"ln {batch}, of guessing in a batch of {batch}"] = math.log(batch)
    held_out = record.get(name.replace("train/", "val/", 1))
    if held_out is not None and held_out.null:
        found["its null on held-out items"] = held_out.null
    return found


@rule(
    id="overfitting",
    source="no number without its null",
    case="V",
    needs=("train/*/nats_per_token", "train/loss/*"),
    log="the held-out loss, and the same quantity on clean training items",
    limits={"kept": 0.5, "learnt": 0.02, "worse": 0.1},
)
def overfitting(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The gain over the null on training items does not carry over to held-out items.

    Seen by the same quantity of the same weights in the same mode, on training and on held-out items, beside the null.
    """
    pairs = {n: (s, record.get("val" + n.removeprefix("train"))) for n, s in record.matching("train/*/*").items()}
    judged = [n for n in pairs if not any(word in n for word in ("/kl", *QUANTISER))]
    paired = {n: (s, v) for n in judged for s, v in [pairs[n]] if v is not None}
    if "total" not in terms(record):
        paired.pop("train/loss/total", None)
    clean = {n: (s, v) for n, (s, v) in paired.items() if n.endswith("nats_per_token") and v.null is not None}
    for name, (train, val) in clean.items():
        assert val.null is not None
        gain, held_out_gain = val.null - train.value, val.null - val.value
        if gain > limits["learnt"] * val.null and held_out_gain < limits["kept"] * gain:
            worse = held_out_gain <= 0
            yield Finding(
                "overfitting",
                "fail" if worse else "warning",
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
        yield from _turned(name, finite(train), finite(val), limits)
    if not looked:
        yield NotMeasured(f"there are not {FEWEST} held-out values of a loss that is also logged in training")


def _turned(name: str, train: Series, val: Series, limits: Limits) -> Iterator[Finding]:
    """The held-out loss has turned while training's goes on falling."""
    best = int(val.values.argmin())
    smooth = rolling_median(val.values, 3)
    noise = mad(val.values - smooth) + 1e-9
    rise, gained = float(smooth[-1] - smooth.min()), float(val.values[0] - val.values.min())
    since = train.after(int(val.steps[best]))
    third = len(since) // 3
    falls = third > 0 and float(np.median(since.values[-third:])) < float(np.median(since.values[:third]))
    if best < len(val) - 3 and rise > 4 * noise and rise > limits["worse"] * gained and falls:
        yield Finding(
            "overfitting",
            "fail" if rise > gained else "warning",
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
def validation_missing(record: Record, limits: Limits) -> Iterator[Finding]:
    """There is no held-out curve, or one on another scale or step axis.

    Seen by looks at held-out items, their steps against those of training, and the ratio of the two losses at the
    start.
    """
    val = record.matching("val/loss/*")
    last = max(int(s.steps[-1]) for s in record.matching("train/loss/*").values())
    fix = remedies("look ten times in a run: --train.validate_every", "log at the optimizer step, not at the epoch")
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
    limits={"share": 0.3, "relative": 1e-3},
)
def log_distorted(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """What is logged is not what it is called: a norm after clipping, a weighted value read as raw.

    Seen by the share of gradient norms that equal the clip to three digits: rounding aside, none do.
    """
    s = finite(record.series["train/optimizer/gradient_norm"])
    if len(s) < FEWEST:
        yield NotMeasured(f"fewer than {FEWEST} gradient norms")
        return
    top = float(s.values.max())
    at_top = np.abs(s.values / top - 1) < limits["relative"] if top > 0 else np.zeros(len(s), bool)
    if at_top.mean() > limits["share"] and np.ptp(s.values) > 0:
        yield Finding(
            "log-distorted",
            "warning",
            f"{at_top.mean():.0%} of the gradient norms are {top:.4g} and none is more: logged after clipping.",
            {"share": float(at_top.mean()), "clip": top},
            remedies("log the norm that clipping was given, not the one it left"),
        )


RULES: tuple[Rule, ...] = (no_learning, plateau, overfitting, validation_missing, log_distorted)
