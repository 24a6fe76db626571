"""Faults that any training can have, as the configuration and the data show them."""

import math
from collections.abc import Mapping
from dataclasses import asdict

from intaglio.config import Config
from intaglio.health.finding import Finding
from intaglio.health.rules.static.facts import Facts, found

NO_WEIGHTS = {
    *("pairing", "temperature", "prediction", "weighting", "gamma"),
    *("objective", "queue", "bounds", "slices"),
    *("floor", "ramp", "candidates"),
}
"""Keys below ``loss`` that multiply no term."""


def rate_never_reached(facts: Facts[Config]) -> list[Finding]:
    """``learning-rate-off``: the warm-up is as long as the run."""
    warmup, steps = facts.config.optim.warmup, facts.steps
    if steps is None or warmup < steps:
        return []
    message = f"The warm-up of {warmup:,} steps does not end within the {steps:,} of the run."
    options = (f"--optim.warmup {steps // 10}", f"--train.steps {10 * warmup}")
    return [found("learning-rate-off", "warning", message, {"warmup": warmup, "steps": steps}, options)]


def monitor(facts: Facts[Config]) -> list[Finding]:
    """``validation-missing``: the best checkpoint is chosen by something that is not measured."""
    name = facts.config.train.monitor
    if name in facts.measured:
        return []
    message = f"train.monitor {name} is not measured, so the run would end at its first look."
    choices = sorted(q for q in facts.measured if "/loss/" in q)
    return [found("validation-missing", "fail", message, {}, tuple(f"--train.monitor {c}" for c in choices))]


def few_looks(facts: Facts[Config]) -> list[Finding]:
    """``validation-missing``: too few looks at held-out items for a curve."""
    every, steps = facts.config.train.validate_every, facts.steps
    if steps is None or not every or steps >= 2 * every:
        return []
    message = f"Held-out items are looked at every {every:,} steps, too seldom for a curve in a run of {steps:,}."
    options = (f"--train.validate_every {math.ceil(steps / 10)}",)
    return [found("validation-missing", "warning", message, {"validate_every": every, "steps": steps}, options)]


def stops_in_warmup(facts: Facts[Config]) -> list[Finding]:
    """``stopped-in-ramp``: patience can run out before the warm-up has ended."""
    train, warmup = facts.config.train, facts.config.optim.warmup
    if not train.patience or facts.steps is None:
        return []
    every = train.validate_every or math.ceil(facts.steps / 10)
    earliest = every * (train.patience + 1)
    if earliest > warmup:
        return []
    message = f"Patience can end the run at step {earliest:,}, before the warm-up ends at step {warmup:,}."
    options = (f"--train.patience {math.ceil(warmup / every) + 2}", f"--optim.warmup {earliest // 4}")
    return [found("stopped-in-ramp", "warning", message, {"earliest": earliest, "warmup": warmup}, options)]


def average_never_reached(facts: Facts[Config]) -> list[Finding]:
    """``ema-lag``: the configured horizon is longer than a third of the run, so its warm-up decides instead."""
    decay, steps = facts.config.train.ema, facts.steps
    if steps is None or steps * (1 - decay) >= 3 * (1 - 1e-9):
        return []
    applied = min(decay, (1 + steps) / (10 + steps))
    message = (
        f"An average over {1 / (1 - decay):,.0f} steps is too slow for {steps:,}: its warm-up holds the decay at "
        f"{applied:.3f} at the end, {1 / (1 - applied):,.0f} steps, instead of {decay:g}."
    )
    evidence = {"configured": decay, "applied": applied, "steps": steps}
    return [found("ema-lag", "note", message, evidence, (f"--train.ema {max(0, 1 - 10 / steps):.3g}",))]


def batch_exceeds_data(facts: Facts[Config]) -> list[Finding]:
    """``batch-exceeds-data``: a batch needs more items than there are to learn from."""
    size = facts.config.train.batch_size
    if facts.data is None or size <= facts.data.train:
        return []
    items = facts.data.train
    message = f"A batch has {size} items, but only {items} are left for training."
    option = f"--train.batch_size {2 ** int(math.log2(items))}"
    return [found("batch-exceeds-data", "fail", message, {"batch_size": size, "items": items}, (option,))]


def pixel_reach(facts: Facts[Config]) -> list[Finding]:
    """``range-mismatch``: the images use less than half of the range that the decoder's activation reaches."""
    if facts.data is None or facts.data.high - facts.data.low >= 128:
        return []
    low, high = facts.data.low, facts.data.high
    message = f"The pixels lie between {low} and {high} of 0 to 255: the images are nearly flat, or scaled wrongly."
    return [found("range-mismatch", "warning", message, {"low": low, "high": high}, ("look at the images",))]


def dead_parameters(facts: Facts[Config]) -> list[Finding]:
    """``dead-parameters``: modules that no loss term with a weight depends on."""
    if not facts.unreached:
        return []
    count, names = sum(facts.unreached.values()), ", ".join(facts.unreached)
    message = f"{count:,} parameters get no gradient, because no weighted loss term needs them: {names}."
    zero = [name for name, weight in _weights(facts.config).items() if name in facts.terms and not weight]
    return [found("dead-parameters", "warning", message, {"parameters": count}, tuple(f"--loss.{n} 0.1" for n in zero))]


def weight_not_applied(facts: Facts[Config]) -> list[Finding]:
    """``weight-not-applied``: a weight for a loss term that this network does not have."""
    absent = [name for name, weight in _weights(facts.config).items() if weight and name not in facts.terms]
    return [
        found(
            "weight-not-applied",
            "warning",
            f"loss.{name} multiplies nothing: this network has the terms {', '.join(sorted(facts.terms))}.",
            {},
            (f"--loss.{name} 0",),
        )
        for name in absent
    ]


def memory_short(facts: Facts[Config]) -> list[Finding]:
    """``memory-short``: a step needs more memory than this machine has."""
    if facts.machine_bytes is None or facts.total_bytes <= facts.machine_bytes:
        return []
    need, have = facts.total_bytes, facts.machine_bytes
    half = max(1, facts.config.train.batch_size // 2)
    message = f"A step needs about {need / 1e9:.1f} GB, this machine has {have / 1e9:.1f} GB."
    options = (f"--train.batch_size {half} --train.accumulate {2 * facts.config.train.accumulate}",)
    return [found("memory-short", "warning", message, {"needed": need, "available": have}, options)]


def _weights(config: Config) -> Mapping[str, float]:
    loss = getattr(config, "loss", None)
    return {k: v for k, v in asdict(loss).items() if k not in NO_WEIGHTS} if loss else {}


RULES = (
    dead_parameters,
    weight_not_applied,
    rate_never_reached,
    monitor,
    few_looks,
    stops_in_warmup,
    average_never_reached,
    batch_exceeds_data,
    pixel_reach,
    memory_short,
)
