"""Faults of the JEPA system: of its codes, its candidates, its temperature and its tasks."""

import math

from intaglio.config import JepaConfig
from intaglio.health.finding import Finding, Severity
from intaglio.health.rules.audits import augmentation_inert
from intaglio.health.rules.audits import data_replaced as lost
from intaglio.health.rules.contrastive import trivial_pair as trivial
from intaglio.health.rules.static.facts import Facts, GridFacts, found

LONG_WARMUP = 0.1
"""Share of the run that a warm-up may take."""

FEW_CANDIDATES = 32
"""Among fewer a contrastive loss tells answers apart that hardly resemble each other."""

NARROW = 1.5
"""The highest temperature over the least, below which none is learnt."""

PER_DIMENSION = 2
"""Items of the probe for each dimension of the embedding, below which its rank is not measured."""

FEW = 0.01
"""Share of tasks or pairs that may be without a lesson."""


def long_warmup(facts: Facts[JepaConfig]) -> list[Finding]:
    """``learning-rate-off``: the warm-up takes more than a tenth of the run."""
    warmup, steps = facts.config.optim.warmup, facts.steps
    if steps is None or not LONG_WARMUP * steps < warmup < steps:
        return []
    message = (
        f"The warm-up takes {warmup:,} of {steps:,} steps, {warmup / steps:.0%} of the run: the configured rate is "
        "hardly ever applied. A tenth is enough."
    )
    options = (f"--optim.warmup {steps // 10}", f"--train.steps {10 * warmup}")
    return [found("learning-rate-off", "warning", message, {"warmup": warmup, "steps": steps}, options)]


def quantiser_loss_missing(facts: Facts[JepaConfig]) -> list[Finding]:
    """``quantiser-loss-missing``: codes are chosen, and nothing draws the encoder to them; or none is ever chosen."""
    m, w = facts.config.model, facts.config.loss
    if m.quantiser != "vq":
        return []
    if not w.commitment:
        message = "loss.commitment is 0: codes are chosen, but nothing draws the encoder to them."
        options = ("--loss.commitment 0.25", "--model.quantiser none")
        return [found("quantiser-loss-missing", "fail", message, {"commitment": 0.0}, options)]
    if facts.steps is not None and m.codes_after >= facts.steps:
        message = f"Slots pass the codes after step {m.codes_after:,}, and the run has {facts.steps:,}: none is chosen."
        options = (f"--model.codes_after {facts.steps // 10}", "--model.quantiser none --loss.commitment 0")
        evidence = {"codes_after": m.codes_after, "steps": facts.steps}
        return [found("quantiser-loss-missing", "fail", message, evidence, options)]
    return []


def codes_beyond_tokens(facts: Facts[JepaConfig]) -> list[Finding]:
    """``codebook-collapse``: there are more codes than slots to be coded in an epoch."""
    m, grids = facts.config.model, _grids(facts)
    if m.quantiser != "vq" or grids is None or m.codes <= (tokens := 2 * grids.answers * m.slots):
        return []
    message = f"There are {m.codes:,} codes, and an epoch has {tokens:,} slots: most could never be used."
    option = f"--model.codes {_power(tokens // 16)}"
    return [found("codebook-collapse", "fail", message, {"codes": m.codes, "tokens": tokens}, (option,))]


def idle_codes(facts: Facts[JepaConfig]) -> list[Finding]:
    """``revival-threshold``: a step has fewer slots than codes, so that a code may be revived between its uses."""
    m, train, grids = facts.config.model, facts.config.train, _grids(facts)
    tokens = 2 * train.batch_size * train.accumulate * facts.config.data.pairs * m.slots
    if m.quantiser != "vq" or m.codes <= tokens or (grids and m.codes > 2 * grids.answers * m.slots):
        return []
    message = (
        f"A step has {tokens:,} slots for {m.codes:,} codes: in uniform use a code is chosen {tokens / m.codes:.2g} "
        "times a step, and one that is not chosen need not be dead."
    )
    evidence = {"tokens": tokens, "codes": m.codes}
    return [found("revival-threshold", "warning", message, evidence, (f"--model.codes {_power(tokens // 4)}",))]


def narrow_temperature(facts: Facts[JepaConfig]) -> list[Finding]:
    """``temperature-stuck``: the temperature starts at one of its bounds, or these leave it no room."""
    w = facts.config.loss
    low, high = w.bounds
    at_bound = min(abs(w.temperature / low - 1), abs(w.temperature / high - 1)) < 0.01
    if w.objective != "infonce" or not (at_bound or high < NARROW * low):
        return []
    what = f"starts at {w.temperature:g}, one of its bounds" if at_bound else "has hardly any room"
    message = f"The temperature {what} ({low:g} to {high:g}): nothing can be learnt of it."
    middle = math.sqrt(low * high) if high >= NARROW * low else w.temperature
    room = "" if high >= NARROW * low else f" --loss.bounds [{middle / 5:.2g},{5 * middle:.2g}]"
    options = (f"--loss.temperature {middle:.2g}{room}",)
    return [found("temperature-stuck", "warning", message, {"temperature": w.temperature}, options)]


def queue_beyond_data(facts: Facts[JepaConfig]) -> list[Finding]:
    """``queue-stale``: the queue holds answers twice, from long ago, or of an encoder without a running average."""
    w, train, grids = facts.config.loss, facts.config.train, _grids(facts)
    if w.objective != "infonce" or not w.queue:
        return []
    if grids is not None and w.queue > grids.answers:
        message = f"The queue holds {w.queue:,} answers, and the training tasks have {grids.answers:,}."
        option = f"--loss.queue {_power(grids.answers // 2)}"
        return [found("queue-stale", "fail", message, {"queue": w.queue, "answers": grids.answers}, (option,))]
    a_step = train.batch_size * train.accumulate * facts.config.data.pairs
    age = w.queue / a_step
    if not facts.config.model.target:
        message = (
            f"The queue holds what the encoder made of answers up to {age:,.0f} steps ago, and it moves fast: such "
            "answers are told apart by their age. They are to be made by its running average (He et al. 2020)."
        )
        options = ("--loss.queue 0", "--model.target 0.99")
        return [found("queue-stale", "warning", message, {"age": age}, options)]
    if facts.steps is None or age <= LONG_WARMUP * facts.steps:
        return []
    message = f"The oldest answers of the queue are {age:,.0f} steps old, in a run of {facts.steps:,}."
    option = f"--loss.queue {_power(int(LONG_WARMUP * facts.steps * a_step))}"
    return [found("queue-stale", "warning", message, {"age": age, "steps": facts.steps}, (option,))]


def few_candidates(facts: Facts[JepaConfig]) -> list[Finding]:
    """``near-chance``: what InfoNCE among so few candidates can say."""
    w, train = facts.config.loss, facts.config.train
    candidates = 2 * train.batch_size * facts.config.data.pairs + w.queue
    if w.objective != "infonce" or candidates >= FEW_CANDIDATES:
        return []
    message = f"InfoNCE looks among {candidates} candidates: ln {candidates} = {math.log(candidates):.2f} by chance."
    evidence = {"candidates": candidates, "chance": math.log(candidates)}
    return [
        found(
            "near-chance",
            "warning",
            message,
            evidence,
            ("--train.batch_size 32", "--loss.queue 1024 --model.target 0.99"),
        )
    ]


def trivial_pair(facts: Facts[JepaConfig]) -> list[Finding]:
    """``trivial-pair``: the output of a task is its input, so that to copy is to predict."""
    grids = _grids(facts)
    if grids is None or grids.same <= FEW:
        return []
    severity: Severity = "fail" if 1 - grids.same < trivial.limits["distinct"] else "warning"
    message = f"The output is the input in {grids.same:.0%} of the pairs: what copies predicts them."
    return [found("trivial-pair", severity, message, {"share": grids.same}, ("leave such tasks out",))]


def repeated_context(facts: Facts[JepaConfig]) -> list[Finding]:
    """``context-order-inert``: the demonstrations of a task are one pair several times."""
    grids = _grids(facts)
    if grids is None or grids.repeated <= FEW:
        return []
    message = f"The demonstrations of {grids.repeated:.0%} of the tasks are one pair, repeated: they are one."
    severity: Severity = "fail" if grids.repeated > 0.5 else "warning"
    evidence = {"share": grids.repeated}
    return [found("context-order-inert", severity, message, evidence, ("look at how contexts are put together",))]


def objects_dropped(facts: Facts[JepaConfig]) -> list[Finding]:
    """``data-replaced``: objects beyond the largest sixteen of a grid have no token."""
    grids = _grids(facts)
    if grids is None or grids.dropped is None or grids.dropped <= lost.limits["warning"]:
        return []
    severity: Severity = "fail" if grids.dropped > lost.limits["fail"] else "warning"
    message = f"No token stands for {grids.dropped:.0%} of the objects: a grid has 16 tokens, for its largest ones."
    return [found("data-replaced", severity, message, {"share": grids.dropped}, ("--model.tokens cells",))]


def inert_augmentation(facts: Facts[JepaConfig]) -> list[Finding]:
    """``augmentation-inert``: the augmentation changes no task, or each always in the same way."""
    grids = _grids(facts)
    if grids is None or grids.changed is None or grids.variety is None:
        return []
    if grids.changed >= augmentation_inert.limits["changed"] and grids.variety > 0:
        return []
    how = "changes no task" if not grids.changed else "alters each task always in the same way, or hardly any"
    evidence = {"changed": grids.changed, "variety": grids.variety}
    return [found("augmentation-inert", "warning", f"The augmentation {how}.", evidence, ("--data.augment false",))]


def rank_unmeasured(facts: Facts[JepaConfig]) -> list[Finding]:
    """``rank-collapse``: the probe is too small for the rank of the embedding to be measured."""
    probe, width = facts.config.health.probe, facts.config.model.embedding
    if not facts.config.health.on:
        return []
    have = min(probe, facts.data.held_out) if facts.data else probe
    if have >= PER_DIMENSION * width:
        return []
    message = f"A probe of {have} tasks is too small for the rank of {width} dimensions, so it is not measured."
    need = PER_DIMENSION * width
    options = (f"--health.probe {need}",) if not facts.data or facts.data.held_out >= need else ()
    return [found("rank-collapse", "note", message, {"probe": have, "dimensions": width}, options)]


def negatives_per_pass(facts: Facts[JepaConfig]) -> list[Finding]:
    """``negatives-per-pass``: without a queue, accumulation enlarges the batch of the gradient alone."""
    train, w = facts.config.train, facts.config.loss
    if train.accumulate == 1 or w.objective != "infonce" or w.queue:
        return []
    message = (
        f"InfoNCE sees the {train.batch_size} tasks of one pass, not the {train.batch_size * train.accumulate} of a "
        "step: accumulated passes are no negatives of each other."
    )
    options = (
        f"--train.batch_size {train.batch_size * train.accumulate} --train.accumulate 1",
        "--loss.queue 4096 --model.target 0.99",
    )
    return [found("negatives-per-pass", "warning", message, {"negatives": train.batch_size - 1}, options)]


def _grids(facts: Facts[JepaConfig]) -> GridFacts | None:
    return facts.data.grids if facts.data else None


def _power(most: int) -> int:
    """The power of two at most so large, 2 or more."""
    return 2 ** max(1, int(math.log2(max(2, most))))


RULES = (
    long_warmup,
    quantiser_loss_missing,
    codes_beyond_tokens,
    idle_codes,
    narrow_temperature,
    queue_beyond_data,
    few_candidates,
    trivial_pair,
    repeated_context,
    objects_dropped,
    inert_augmentation,
    rank_unmeasured,
    negatives_per_pass,
)
