"""Faults of the diffusion system: of its condition, its noise levels and its sampler."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

from intaglio.config import DiffusionConfig, to_dict
from intaglio.health.finding import Finding, Severity, remedies
from intaglio.health.record import of_readings
from intaglio.health.rule import Rule
from intaglio.health.rules import noise
from intaglio.health.rules.static.facts import Facts, constant_attention, found
from intaglio.objectives.diffusion import NoiseSchedule, Prediction
from intaglio.sampling.diffusion import Sampler
from intaglio.sampling.gaussian import moments

OFF, WRONG = 0.1, 0.5
"""Shares by which a Gaussian's standard deviation may be missed: a few large steps, or a wrong sampler."""

MEAN, VARIANCES = 0.5, (1.0, 0.25)
"""Of the Gaussians that a sampler must draw: that of standardised latents, and about that of pixels in [−1, 1]."""

STANDARD = ("--model.network standard",)


def told_too_late(facts: Facts[DiffusionConfig]) -> list[Finding]:
    """``conditioned-too-late``: the documented network reads a class, and another condition is asked for."""
    m, c = facts.config.model, facts.config.condition
    if m.network != "documented" or c.by == "class":
        return []
    message = (
        f"The documented network reads the label of a class and nothing else: condition.by {c.by} never reaches it, "
        "and training ends at its first step."
    )
    return [found("conditioned-too-late", "fail", message, {}, STANDARD)]


def unlabelled(facts: Facts[DiffusionConfig]) -> list[Finding]:
    """``data-unusable``: the data cannot be trained on: it is not there, or has not what the recipe asks of it."""
    data = facts.data
    if facts.config.condition.by != "class" or data is None or (len(data.classes) > 1 and not data.unlabelled):
        return []
    message = (
        f"Of {data.train:,} training images {data.unlabelled:,} have no class, and there are {len(data.classes)} "
        "classes: a condition by class needs one for each image."
    )
    evidence = {"classes": len(data.classes), "unlabelled": data.unlabelled}
    return [found("data-unusable", "fail", message, evidence, ("--condition.by none",))]


def attention_over_one(facts: Facts[DiffusionConfig]) -> list[Finding]:
    """``attention-over-one``: a condition of one vector, or a level of one place, is all that there is to attend to."""
    idle = constant_attention(facts)
    told = {name: count for name, count in idle.items() if name.endswith("cross_attention")}
    alone = {name: count for name, count in idle.items() if name not in told}
    widths = facts.config.model.widths[:-1]
    levels = [level for level in facts.config.model.attention if level < len(widths)]
    smaller = f"--model.widths {_listed(widths)} --model.attention {_listed(levels)}"
    return [
        *_over_one(told, "the one vector of the condition, so each adds the same at every place", STANDARD),
        *_over_one(alone, "a single place, so each is a linear layer of that place", (smaller,) if widths else ()),
    ]


def _over_one(idle: Mapping[str, int], what: str, options: Sequence[str]) -> Iterator[Finding]:
    if idle:
        layers, count = len(idle), sum(idle.values())
        message = (
            f"{layers} attention layers attend to {what}: {count:,} parameters of queries and keys have no effect."
        )
        yield found("attention-over-one", "warning", message, {"layers": layers, "inert_parameters": count}, options)


def null_mismatch(facts: Facts[DiffusionConfig]) -> list[Finding]:
    """``null-mismatch``: conditions are dropped always, never although samples are guided, or hardly ever."""
    return _as_in_training(noise.null_mismatch, facts, ("--condition.drop 0.15",))


def schedule_mismatch(facts: Facts[DiffusionConfig]) -> list[Finding]:
    """``schedule-mismatch``: signal is left at the level from which sampling starts as if it were pure noise."""
    zero = "--noise.zero_terminal_snr true"
    blind = facts.config.loss.prediction == "epsilon"  # refused where no signal is left
    return _as_in_training(
        noise.schedule_mismatch, facts, ("--noise.kind cosine", f"--loss.prediction v {zero}" if blind else zero)
    )


def high_noise_starved(facts: Facts[DiffusionConfig]) -> list[Finding]:
    """``high-noise-starved``: the weights of the loss leave levels of much noise next to nothing."""
    noisy = {name: r for name, r in facts.readings.items() if name.startswith("train/log_snr.-")}
    options = ("--loss.prediction v --loss.weighting uniform",)
    return _as_in_training(noise.high_noise_starved, replace(facts, readings=noisy), options)


def sampler_wrong(facts: Facts[DiffusionConfig]) -> list[Finding]:
    """``sampler-wrong``: with an exact denoiser, the sampler does not draw the Gaussian that it should."""
    schedule, prediction = NoiseSchedule(**asdict(facts.config.noise)), facts.config.loss.prediction
    sampler = Sampler(facts.config.sampling.method, facts.config.sampling.steps)
    variance, std, mean = _worst(schedule, prediction, sampler)
    if max(mean, abs(std - 1)) <= OFF:
        return []
    severity: Severity = "fail" if max(mean, abs(std - 1)) > WRONG else "warning"
    message = (
        f"{sampler.method} in {sampler.steps} steps draws N({MEAN:g}, {variance:g}) with {std:.2f} times its standard "
        f"deviation and a mean off by {mean:.2f} of it, although the denoiser is exact."
    )
    options = [f"--sampling.method dpm-solver++ --sampling.steps {min(20, schedule.steps)}"]
    for steps in range(2 * sampler.steps, schedule.steps + 1, sampler.steps):
        _, there, off = _worst(schedule, prediction, replace(sampler, steps=steps))
        if max(off, abs(there - 1)) <= OFF:
            options.append(f"--sampling.steps {steps}")
            break
    return [found("sampler-wrong", severity, message, {"std": std, "mean": mean, "variance": variance}, options)]


def _worst(schedule: NoiseSchedule, prediction: Prediction, sampler: Sampler) -> tuple[float, float, float]:
    """The variance that is drawn worst; its standard deviation and how far the mean is off, over the true one."""
    drawn = [(v, *moments(schedule, prediction, sampler, v, MEAN)) for v in VARIANCES]
    shares = [(v, std / math.sqrt(v), abs(mean) / math.sqrt(v)) for v, mean, std in drawn]
    return max(shares, key=lambda share: max(share[2], abs(share[1] - 1)))


def _as_in_training(rule: Rule, facts: Facts[DiffusionConfig], options: Sequence[str]) -> list[Finding]:
    """What a rule of runs says of the readings that the configuration decides, with options as remedies."""
    assert rule.judge is not None
    record = of_readings(facts.readings, config=to_dict(facts.config))
    if not record.matching(*rule.needs):
        return []
    told = [f for f in rule.judge(record, rule.limits) if isinstance(f, Finding)]
    return [replace(f, remedies=remedies(*options), step=None) for f in told]


def _listed(numbers: Sequence[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"


RULES = (
    told_too_late,
    unlabelled,
    attention_over_one,
    null_mismatch,
    schedule_mismatch,
    high_noise_starved,
    sampler_wrong,
)
