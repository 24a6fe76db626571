"""Faults of the bottleneck and its curriculum, as the configuration and the data show them."""

import math

from intaglio.config import VqaConfig
from intaglio.config.stages import PARTS, held_back, parse
from intaglio.health.finding import Finding
from intaglio.health.rules.static.facts import Facts, found

CEILING = 20.0
"""Times the entropy of the answers above which free bits are more than any answer could need."""

SLOW = 5.0
"""Times the rate of the bottleneck above which another part is so much faster that it was meant for trained ones."""


def floor_out_of_reach(facts: Facts[VqaConfig]) -> list[Finding]:
    """``kl-free``: the free bits of all latents together are far more than answers can carry."""
    w, m = facts.config.loss, facts.config.model
    told = facts.data.questions if facts.data else None
    if m.bottleneck != "vib" or not w.floor or told is None:
        return []
    free = w.floor * m.latents
    if free <= CEILING * told.entropy:
        return []
    message = (
        f"Free bits of {w.floor:g} nats a latent let {free:g} nats pass unpaid, but the answers have an entropy of "
        f"{told.entropy:.2f}: no latent will exceed its floor, so KL has no gradient."
    )
    options = (f"--loss.floor {told.entropy / m.latents:.2g}", "--loss.floor 0")
    return [found("kl-free", "warning", message, {"free": free, "entropy": told.entropy}, options)]


def no_pressure(facts: Facts[VqaConfig]) -> list[Finding]:
    """``kl-free``: latents are drawn from a posterior that nothing keeps near its prior."""
    if facts.config.model.bottleneck != "vib" or facts.config.loss.kl > 0:
        return []
    message = "loss.kl is 0: latents are Gaussians whose width costs nothing, so their rate is whatever comes of it."
    options = ("--loss.kl 0.02", "--model.bottleneck deterministic")
    return [found("kl-free", "warning", message, {"kl": 0.0}, options)]


def temperature(facts: Facts[VqaConfig]) -> list[Finding]:
    """``temperature-misstates-rate``: drawn at T·σ, charged for σ."""
    t = facts.config.model.temperature
    if facts.config.model.bottleneck != "vib" or t == 1:
        return []
    more = f"{1 / t**2:.1f} times the signal-to-noise ratio that is paid for" if t else "no noise at all"
    message = f"model.temperature is {t:g}: latents are drawn at {t:g} σ, and KL is charged for σ: {more}."
    return [found("temperature-misstates-rate", "warning", message, {"temperature": t}, ("--model.temperature 1.0",))]


def beta_in_elbo_units(facts: Facts[VqaConfig]) -> list[Finding]:
    """``kl-units``: β so far from 1 that the weight was meant for a mean over numbers, or for a sum."""
    w, m = facts.config.loss, facts.config.model
    if m.bottleneck != "vib" or w.kl <= 1:
        return []
    numbers = m.latents * m.dims
    message = (
        f"loss.kl {w.kl:g} weighs the KL summed over {numbers} numbers, in nats of an item: β {w.kl:g}, above the "
        f"ELBO's 1. If it was meant for their mean, β is {w.kl / numbers:.2g}."
    )
    return [found("kl-units", "warning", message, {"beta": w.kl}, (f"--loss.kl {w.kl / numbers:.2g}",))]


def stage_that_never_ends(facts: Facts[VqaConfig]) -> list[Finding]:
    """``stopped-in-ramp``: the ramp or the last stage is as long as the run."""
    if facts.steps is None:
        return []
    stages = parse(facts.config.stages, facts.steps)
    ramp = held_back(stages, "kl") + facts.config.loss.ramp if facts.config.model.bottleneck == "vib" else 0
    ends = {"the last stage": stages[-1].until if stages else 0, "the ramp of KL": ramp}
    late = [(name, end) for name, end in ends.items() if end >= facts.steps][:1]  # the ramp may wait for the stage
    grows = stages and isinstance(facts.config.stages[-1]["until"], float)  # a share of however many steps
    return [
        found(
            "stopped-in-ramp",
            "warning",
            f"{name} ends at step {end:,}, and the run at {facts.steps:,}: what is held back never comes.",
            {"end": end, "steps": facts.steps},
            () if grows and name == "the last stage" else (f"--train.steps {math.ceil(1.5 * end)}",),
        )
        for name, end in late
    ]


def slow_bottleneck(facts: Facts[VqaConfig]) -> list[Finding]:
    """``learning-rate-off``: the bottleneck, which no pretraining has seen, learns far slower than another part."""
    rates = {part: facts.config.rates.get(part, 1.0) for part in PARTS}
    fastest = max(rates, key=lambda part: rates[part])
    share = rates["bottleneck"] / rates[fastest]
    if share > 1 / SLOW:
        return []
    message = (
        f"The bottleneck learns at {share:.2g} of the rate of {fastest}, but is as new: that is for trained parts."
    )
    return [
        found("learning-rate-off", "warning", message, {"share": share}, (f"--rates.bottleneck {rates[fastest]:g}",))
    ]


RULES = (floor_out_of_reach, no_pressure, temperature, beta_in_elbo_units, stage_that_never_ends, slow_bottleneck)
