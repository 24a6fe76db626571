"""What is wrong before a step is spent: faults that the configuration, the network's structure and the data show."""

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass

from torch import nn

from intaglio.config import MultimodalConfig
from intaglio.health.finding import SEVERITIES, Finding, Severity, remedies
from intaglio.nn.transformer import Attention

LARGEST_LAYER = 0.5
"""A single linear layer above this share of all parameters is where the model's capacity went."""

CUT_CAPTIONS = 0.01
"""Share of captions cut to ``data.text_length`` above which it is a warning."""

FEW_PAIRS = {"infonce": 32, "sigmoid": 8}
"""Below this many pairs in a pass a contrastive loss tells items apart that hardly resemble each other."""

DOCUMENTED_PARAMETERS, DOCUMENTED_LINEAR, DOCUMENTED_BYTES = 50e6, 0.5e6, 16e9
"""What the original document says of its network: "~50M", its image decoder's linear layer "~0.5M", 16 GB."""


@dataclass(frozen=True)
class DataFacts:
    """The data as training will see it.

    ``train`` and ``held_out`` count items; ``vocabulary`` is what the tokenizer takes of the captions and ``longest``
    their longest in tokens, after ``cut`` of ``captions`` were shortened; ``low`` and ``high`` bound the pixels (0 to
    255); ``sampled`` is the number of items that were read.
    """

    train: int
    held_out: int
    vocabulary: int
    longest: int
    captions: int
    cut: int
    low: int
    high: int
    sampled: int


@dataclass(frozen=True)
class Facts:
    """What is known before training.

    ``terms`` and ``measured`` name the loss terms and the held-out quantities; ``unreached`` gives the parameters of
    each module that no weighted term depends on, ``keys`` how many keys each attention layer attends to. ``steps``,
    ``data`` and ``machine_bytes`` are None where unknown.
    """

    config: MultimodalConfig
    network: nn.Module
    parameters: int
    state_bytes: int
    total_bytes: int
    terms: Set[str]
    measured: Set[str]
    unreached: Mapping[str, int]
    keys: Mapping[str, int]
    steps: int | None = None
    data: DataFacts | None = None
    machine_bytes: int | None = None


# Any training


def rate_never_reached(facts: Facts) -> list[Finding]:
    """``learning-rate-off``: the warm-up is as long as the run."""
    warmup, steps = facts.config.optim.warmup, facts.steps
    if steps is None or warmup < steps:
        return []
    message = f"The warm-up of {warmup:,} steps does not end within the {steps:,} of the run."
    options = (f"--optim.warmup {steps // 10}", f"--train.steps {10 * warmup}")
    return [_found("learning-rate-off", "warning", message, {"warmup": warmup, "steps": steps}, options)]


def monitor(facts: Facts) -> list[Finding]:
    """``validation-missing``: the best checkpoint is chosen by something that is not measured."""
    name = facts.config.train.monitor
    if name in facts.measured:
        return []
    message = f"train.monitor {name} is not measured, so the run would end at its first look."
    choices = sorted(q for q in facts.measured if "/loss/" in q)
    return [_found("validation-missing", "fail", message, {}, tuple(f"--train.monitor {c}" for c in choices))]


def few_looks(facts: Facts) -> list[Finding]:
    """``validation-missing``: too few looks at held-out items for a curve."""
    every, steps = facts.config.train.validate_every, facts.steps
    if steps is None or not every or steps >= 2 * every:
        return []
    message = f"Held-out items are looked at every {every:,} steps, too seldom for a curve in a run of {steps:,}."
    options = (f"--train.validate_every {math.ceil(steps / 10)}",)
    return [_found("validation-missing", "warning", message, {"validate_every": every, "steps": steps}, options)]


def stops_in_warmup(facts: Facts) -> list[Finding]:
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
    return [_found("stopped-in-ramp", "warning", message, {"earliest": earliest, "warmup": warmup}, options)]


def average_never_reached(facts: Facts) -> list[Finding]:
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
    return [_found("ema-lag", "note", message, evidence, (f"--train.ema {max(0, 1 - 10 / steps):.3g}",))]


def batch_exceeds_data(facts: Facts) -> list[Finding]:
    """``batch-exceeds-data``: a batch needs more items than there are to learn from."""
    size = facts.config.train.batch_size
    if facts.data is None or size <= facts.data.train:
        return []
    items = facts.data.train
    message = f"A batch has {size} items, but only {items} are left for training."
    option = f"--train.batch_size {2 ** int(math.log2(items))}"
    return [_found("batch-exceeds-data", "fail", message, {"batch_size": size, "items": items}, (option,))]


def captions_cut(facts: Facts) -> list[Finding]:
    """``data-replaced``: captions longer than ``data.text_length`` lose their ends."""
    if facts.data is None or not facts.data.cut:
        return []
    data, length = facts.data, facts.config.data.text_length
    share = data.cut / data.captions
    message = f"{share:.1%} of the captions are longer than {length} tokens and lose their ends."
    severity: Severity = "warning" if share >= CUT_CAPTIONS else "note"
    return [_found("data-replaced", severity, message, {"share": share}, (f"--data.text_length {2 * length}",))]


def vocabulary_size(facts: Facts) -> list[Finding]:
    """``vocabulary-unreachable``: more tokens are asked for than the captions support; training takes fewer."""
    cap = facts.config.model.vocabulary
    if facts.data is None or cap < 2 * facts.data.vocabulary:
        return []
    real = facts.data.vocabulary
    message = (
        f"The captions support {real:,} tokens, not {cap:,}: training takes {real:,}, and the network is smaller than "
        "counted here."
    )
    return [_found("vocabulary-unreachable", "note", message, {"configured": cap, "real": real})]


def pixel_reach(facts: Facts) -> list[Finding]:
    """``range-mismatch``: the images use less than half of the range that the decoder's activation reaches."""
    if facts.data is None or facts.data.high - facts.data.low >= 128:
        return []
    low, high = facts.data.low, facts.data.high
    message = f"The pixels lie between {low} and {high} of 0 to 255: the images are nearly flat, or scaled wrongly."
    return [_found("range-mismatch", "warning", message, {"low": low, "high": high}, ("look at the images",))]


def dead_parameters(facts: Facts) -> list[Finding]:
    """``dead-parameters``: modules that no loss term with a weight depends on."""
    if not facts.unreached:
        return []
    count, names = sum(facts.unreached.values()), ", ".join(facts.unreached)
    message = f"{count:,} parameters get no gradient, because no weighted loss term needs them: {names}."
    zero = [name for name, weight in _weights(facts.config).items() if name in facts.terms and not weight]
    return [
        _found("dead-parameters", "warning", message, {"parameters": count}, tuple(f"--loss.{n} 0.1" for n in zero))
    ]


def weight_not_applied(facts: Facts) -> list[Finding]:
    """``weight-not-applied``: a weight for a loss term that this network does not have."""
    absent = [name for name, weight in _weights(facts.config).items() if weight and name not in facts.terms]
    return [
        _found(
            "weight-not-applied",
            "warning",
            f"loss.{name} multiplies nothing: this network has the terms {', '.join(sorted(facts.terms))}.",
            {},
            (f"--loss.{name} 0",),
        )
        for name in absent
    ]


def memory_short(facts: Facts) -> list[Finding]:
    """``memory-short``: a step needs more memory than this machine has."""
    if facts.machine_bytes is None or facts.total_bytes <= facts.machine_bytes:
        return []
    need, have = facts.total_bytes, facts.machine_bytes
    half = max(1, facts.config.train.batch_size // 2)
    message = f"A step needs about {need / 1e9:.1f} GB, this machine has {have / 1e9:.1f} GB."
    options = (f"--train.batch_size {half} --train.accumulate {2 * facts.config.train.accumulate}",)
    return [_found("memory-short", "warning", message, {"needed": need, "available": have}, options)]


# The network


def count_off(facts: Facts) -> list[Finding]:
    """``count-off``: the documented network against what its document says of it."""
    if facts.config.model.network != "documented":
        return []
    found = []
    linear = _linear_layers(facts.network).get("image_decoder.linear", 0)
    if facts.parameters > 1.1 * DOCUMENTED_PARAMETERS:
        message = (
            f"The network has {facts.parameters:,} parameters; its document says about 50 million, "
            f"{facts.parameters / DOCUMENTED_PARAMETERS:.0f} times fewer. The linear layer image_decoder.linear, "
            f"documented with 0.5 million, alone has {linear:,}."
        )
        evidence = {"parameters": facts.parameters, "documented": DOCUMENTED_PARAMETERS, "linear": linear}
        options = ("as many as documented: intaglio train multimodal-large", _standard(facts.config))
        found.append(_found("count-off", "fail", message, evidence, options))
    if abs(facts.total_bytes / DOCUMENTED_BYTES - 1) > 0.1:
        message = (
            f"The document claims 16 GB of memory: weights, gradients and optimizer take {facts.state_bytes / 1e9:.2f} "
            f"GB, with the activations {facts.total_bytes / 1e9:.2f} GB."
        )
        evidence = {"state": facts.state_bytes, "total": facts.total_bytes, "documented": DOCUMENTED_BYTES}
        found.append(_found("count-off", "warning", message, evidence))
    return found


def one_layer_dominates(facts: Facts) -> list[Finding]:
    """``one-layer-dominates``: most parameters sit in a single linear layer, between an image and its vector."""
    name, count = max(_linear_layers(facts.network).items(), key=lambda item: item[1], default=("", 0))
    share = count / facts.parameters
    if share < LARGEST_LAYER:
        return []
    message = f"The linear layer {name} holds {share:.0%} of all parameters ({count:,}); halve the image further first."
    evidence = {"share": share, "parameters": count}
    return [_found("one-layer-dominates", "warning", message, evidence, (_standard(facts.config),))]


def pooled_away(facts: Facts) -> list[Finding]:
    """``position-pooled-away``: a global average is the last thing that sees the image."""
    pooled = [n for n, m in facts.network.named_modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    message = "The image encoder averages over all places: the latent knows what is in the image, hardly where."
    return [_found("position-pooled-away", "warning", message, {}, (_standard(facts.config),)) for _ in pooled]


def attention_over_one(facts: Facts) -> list[Finding]:
    """``attention-over-one``: the softmax of a single number is 1, whatever the query."""
    modules = dict(facts.network.named_modules())
    widths = [_width(modules[name]) for name, keys in facts.keys.items() if keys == 1]
    if not widths:
        return []
    inert = sum(2 * (d * d + d) for d in widths)
    message = (
        f"{len(widths)} cross-attention layers attend to a single latent token: each adds the same vector at every "
        f"word, and {inert:,} parameters of queries and keys get no gradient."
    )
    fewer = ",".join(map(str, facts.config.model.channels[:-1]))
    standard = facts.config.model.network == "standard"
    remedy = f"--model.channels [{fewer}]" if standard else _standard(facts.config)
    evidence = {"layers": len(widths), "inert_parameters": inert}
    return [_found("attention-over-one", "warning", message, evidence, (remedy,))]


def no_positions(facts: Facts) -> list[Finding]:
    """``decoder-without-positions``: words carry no positions."""
    tables = [m for m in facts.network.modules() if isinstance(m, nn.Embedding)]
    if len(tables) > 1:
        return []
    message = "The text decoder has no positions: it learns the order of words only from what the causal mask hides."
    return [_found("decoder-without-positions", "warning", message, {}, (_standard(facts.config),))]


def trivial_pair(facts: Facts) -> list[Finding]:
    """``trivial-pair``: the contrastive term compares a latent with itself."""
    if facts.config.loss.pairing != "self" or not facts.config.loss.contrastive:
        return []
    message = (
        "The contrastive term pairs each latent with itself, which any encoder solves; no text enters it, so it "
        "teaches nothing about captions. Without a text encoder, generate --text and search --text cannot work either."
    )
    return [_found("trivial-pair", "fail", message, {}, (_standard(facts.config), "--loss.contrastive 0"))]


def few_pairs(facts: Facts) -> list[Finding]:
    """``near-chance``: what a contrastive loss of so small a batch can say."""
    loss, n = facts.config.loss, facts.config.train.batch_size
    if not loss.contrastive or n >= FEW_PAIRS.get(loss.pairing, 32):
        return []
    message = f"A contrastive loss over {n} items is ln {n} = {math.log(n):.2f} by chance: read it beside that."
    options = ("--train.batch_size 64", *["--loss.pairing sigmoid"] * (loss.pairing == "infonce"))
    severity: Severity = "note" if loss.pairing == "self" else "warning"
    return [_found("near-chance", severity, message, {"batch_size": n, "chance": math.log(n)}, options)]


def negatives_per_pass(facts: Facts) -> list[Finding]:
    """``negatives-per-pass``: accumulation enlarges the batch of the gradient, not that of the contrast."""
    train = facts.config.train
    if train.accumulate == 1 or not facts.config.loss.contrastive:
        return []
    message = (
        f"The contrastive term sees the {train.batch_size} items of one pass, not the "
        f"{train.batch_size * train.accumulate} of a step: accumulated passes are no negatives of each other."
    )
    options = (f"--train.batch_size {train.batch_size * train.accumulate} --train.accumulate 1",)
    return [_found("negatives-per-pass", "warning", message, {"negatives": train.batch_size - 1}, options)]


def no_prior_term(facts: Facts) -> list[Finding]:
    """``latents-unshaped``: nothing in the loss shapes what ``generate`` samples from."""
    if "kl" in facts.terms and facts.config.loss.kl:
        return []
    message = "No loss term shapes the latents: the prior that generate samples from is only fitted afterwards."
    standard = facts.config.model.network == "standard"
    remedy = "--loss.kl 0.001" if standard else f"{_standard(facts.config)} --loss.kl 0.001"
    return [_found("latents-unshaped", "note", message, {}, (remedy,))]


RULES = (
    count_off,
    trivial_pair,
    one_layer_dominates,
    attention_over_one,
    pooled_away,
    no_positions,
    no_prior_term,
    few_pairs,
    negatives_per_pass,
    dead_parameters,
    weight_not_applied,
    rate_never_reached,
    monitor,
    few_looks,
    stops_in_warmup,
    average_never_reached,
    batch_exceeds_data,
    captions_cut,
    vocabulary_size,
    pixel_reach,
    memory_short,
)


def judge(facts: Facts) -> list[Finding]:
    """All findings of this page, the gravest first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _found(
    rule: str, severity: Severity, message: str, evidence: Mapping[str, float], do: Iterable[str] = ()
) -> Finding:
    return Finding(rule, severity, message, evidence, remedies(*do))


def _weights(config: MultimodalConfig) -> dict[str, float]:
    return {k: v for k, v in asdict(config.loss).items() if k not in {"pairing", "temperature"}}


def _linear_layers(network: nn.Module) -> dict[str, int]:
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    return {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}


def _width(attention: nn.Module) -> int:
    if isinstance(attention, Attention):
        return attention.query.out_features
    assert isinstance(attention, nn.MultiheadAttention)
    return attention.embed_dim


def _standard(config: MultimodalConfig) -> str:
    """Options of the network without the documented one's faults, with halvings down to a side of about 8."""
    channels = list(config.model.channels[:3])
    while config.data.image_size % 2 ** (len(channels) + 2) == 0 and config.data.image_size > 8 * 2 ** len(channels):
        channels.append(channels[-1])
    options = f"--model.channels [{','.join(map(str, channels))}]"
    if config.model.network == "standard":
        return options
    return f"--model.network standard --model.encoder_layers 2 --loss.pairing sigmoid {options}"
