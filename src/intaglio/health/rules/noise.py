"""Diffusion: what it is trained on, at which noise, with how many conditions, and which weights are kept. No torch.

Series that are read, each with its null; B is the centre of a bin of log-SNR:

- ``val/ema/loss``, its null the loss of the live weights; ``val/ema/moved``: ‖EMA − start‖ / ‖live − start‖, null 1;
  ``val/ema/averaged_buffers``: how many tensors that are no parameters are averaged, null 0
- ``train/log_snr.B/weight``: the bin's share of weight times frequency in the loss of v, null an even share;
  ``val/log_snr.B/loss``: held-out, null that of the best linear guess of each number from itself;
  ``train/noise/terminal_snr``: at T − 1, null 0
- ``val/guidance/used``: the weight that samples are drawn with; ``train/condition/dropped_share``: of the items, null 0
"""

from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, Severity, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.history import NotMeasured


@rule(
    id="ema-lag",
    follows=("tied-and-frozen",),
    concerns=("diffusion",),
    source="Karras et al. 2024, section 3; counting",
    needs=("val/ema/loss", "val/ema/moved", "val/ema/averaged_buffers"),
    log="the held-out loss of the averaged weights, its null that of the live ones, as val/ema/loss; val/ema/moved",
    limits={"worse": 0.05, "moved": 0.5, "still": 1e-6},
)
def ema_lag(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The average of the weights is far from them, is not stepped, or averages what is no parameter.

    Seen by how far it has moved from the start beside the live weights, and by its held-out loss beside theirs.
    """
    moved, loss, buffers = (record.get(f"val/ema/{name}") for name in ("moved", "loss", "averaged_buffers"))
    stands = loss is not None and len(loss) > 2 and np.ptp(loss.values) == 0 < np.ptp(loss.nulls)
    if stands or (moved is not None and moved.value < limits["still"]):
        yield Finding(
            "ema-lag",
            "fail",
            "The average of the weights has not moved since the start: it is not stepped.",
            {} if moved is None else {"moved": moved.value},
            remedies("step the average after every optimizer step"),
            step=record.last_step,
        )
        return
    for s in (moved, loss):
        if s is not None and not record.settled(s):
            yield NotMeasured("too early: the average of the weights is still warm from the start")
            return
    worse = loss is not None and loss.null is not None and loss.value > (1 + limits["worse"]) * loss.null
    if worse or (moved is not None and moved.value < limits["moved"]):
        seen = [] if moved is None else [f"has gone {moved.value:.0%} of the way that the live weights went"]
        seen += [] if loss is None or loss.null is None else [f"has a loss of {loss.value:.4g}, theirs {loss.null:.4g}"]
        yield Finding(
            "ema-lag",
            "warning",
            f"The average of the weights {' and '.join(seen)}.",
            {name: s.value for name, s in (("moved", moved), ("loss", loss)) if s is not None},
            remedies(
                "a shorter average: a decay whose horizon is a tenth of the run"
                + (f": --train.ema {1 - 10 / record.steps:.3g}" if record.steps and record.steps > 10 else ""),
                "warm its decay up",
                wait=1000,
            ),
            step=record.last_step,
        )
    if buffers is not None and buffers.value > 0:
        yield Finding(
            "ema-lag",
            "warning",
            f"{buffers.value:.0f} tensors that are no parameters are averaged: counters and tables become fractions.",
            {"buffers": buffers.value},
            remedies("average parameters, and copy buffers"),
            step=int(buffers.steps[-1]),
        )


@rule(
    id="null-mismatch",
    concerns=("diffusion",),
    source="Ho & Salimans 2022, table 1",
    case="D",
    needs=("val/guidance/used", "train/condition/dropped_share"),
    log="the weight that samples are drawn with as val/guidance/used; without our configuration also the share of "
    "conditions that are dropped as train/condition/dropped_share",
    limits={"seldom": 0.02, "often": 0.5, "nearly": 0.8},
)
def null_mismatch(record: Record, limits: Limits) -> Iterator[Finding]:
    """Guidance compares two branches, and one of them was hardly trained, or never.

    Seen by the share of conditions that were dropped in the later half of training, beside the weight that samples
    are drawn with.
    """
    told, used = record.config.get("condition") or {}, record.get("val/guidance/used")
    measured = record.get("train/condition/dropped_share")
    if (told.get("by", "none") == "none" and measured is None) or (used is None and measured is None):
        return
    late = None if measured is None else float(np.mean(measured.values[len(measured) // 2 :]))
    drop = float(told["drop"]) if "drop" in told or late is None else late
    weight = 1.0 if used is None else used.value
    evidence = {"drop": drop, "guidance": weight}
    again = remedies("drop the condition of 10 to 20 % of the items: --condition.drop 0.15")
    severity: Severity = "fail"
    message = ""
    if drop == 1:
        message = "Every condition is dropped in training, so the network learns nothing of them."
    elif weight != 1 and drop == 0:
        message = f"No condition is dropped in training, but guidance {weight:g} asks the network without one."
    elif drop > limits["often"] or (weight != 1 and drop < limits["seldom"]):
        seldom = "with a condition" if drop > limits["often"] else "without one"
        message = f"{drop:.1%} of conditions are dropped in training: the network is seldom trained {seldom}."
        severity = "fail" if drop > limits["nearly"] else "warning"
    if message:
        yield Finding("null-mismatch", severity, message, evidence, again, step=record.last_step)


@rule(
    id="schedule-mismatch",
    concerns=("diffusion",),
    source="Lin et al. 2023, table 1",
    case="D: t = 700 of 500; √SNR .068",
    needs=("train/noise/terminal_snr",),
    log="the SNR of the last noise level as train/noise/terminal_snr",
    limits={"snr": 1e-5, "unconfigured": 1e-4},
)
def schedule_mismatch(record: Record, limits: Limits) -> Iterator[Finding]:
    """Sampling starts from pure noise, and the last level that was trained on is none.

    Seen by its SNR, 0 for pure noise. What is left there, above all of the mean brightness, which averages over all
    pixels, is then missing from samples. A t beyond the schedule, or another schedule, is refused.
    """
    last = record.get("train/noise/terminal_snr")
    if last is not None and last.value > limits["snr" if record.config else "unconfigured"]:
        left = (last.value / (1 + last.value)) ** 0.5
        yield Finding(
            "schedule-mismatch",
            "warning",
            f"Sampling starts from pure noise, but the last noise level has an SNR of {last.value:.2g}: {left:.2g} of "
            "an image's standard deviation is left there, enough to tell bright images from dark ones.",
            {"snr": last.value, "left": left},
            remedies("a cosine schedule", "rescale the schedule to zero terminal SNR, and predict v", wait=1000),
            step=record.last_step,
        )


@rule(
    id="high-noise-starved",
    concerns=("diffusion",),
    source="Hang et al. 2023; Kingma & Gao 2023, table 1",
    case="D: weight .0068",
    needs=("train/log_snr.*/weight",),
    log="each bin's share of weight times frequency as train/log_snr.B/weight, an even share as null",
    limits={"share": 0.05, "fail": 0.01, "learnt": 0.02, "none": 1e-3},
)
def high_noise_starved(record: Record, limits: Limits) -> Iterator[Finding]:
    """The weighting of the loss, or the choice of t, leaves some bins of log-SNR untrained.

    Seen by the bin's share beside an even one, where the held-out loss in it is no better than its null. It fails where
    noise outweighs the signal and a hundredth of an even share is left, or, whatever carries over from other bins,
    nothing: below, the noisy image is nearly the image, and only fine detail is lost; a logit-normal choice of t (Esser
    et al. 2024) leaves the ends a little more.
    """
    starved, untaught = {}, False
    for name, s in record.matching("train/log_snr.*/weight").items():
        centre = name.split("/")[1].partition(".")[2]
        loss = record.get(f"val/log_snr.{centre}/loss")
        learnt = loss is not None and loss.null is not None and loss.value < (1 - limits["learnt"]) * loss.null
        if not s.null or s.value >= limits["share"] * s.null:
            continue
        even, dark = s.value / s.null, float(centre) < 0
        if not learnt or (dark and even < limits["none"]):
            starved[float(centre)] = even
            told = loss is not None and loss.null is not None and record.settled(loss)
            untaught |= dark and even < limits["fail"] and told
    if starved:
        worst = min(starved, key=lambda b: starved[b])
        yield Finding(
            "high-noise-starved",
            "fail" if untaught else "warning",
            f"{len(starved)} bins of log-SNR from {min(starved):g} to {max(starved):g} have less than "
            f"{limits['share']:.0%} of an even share in the loss; that at {worst:g} has {starved[worst]:.2%}"
            + (", and nothing has been learnt there." if untaught else "."),
            {"log_snr": worst, "share": starved[worst]},
            remedies("weight the loss of v evenly over log-SNR", "draw t evenly over log-SNR", wait=1000),
            step=record.last_step,
        )


RULES: tuple[Rule, ...] = (ema_lag, null_mismatch, schedule_mismatch, high_noise_starved)  # causes first
