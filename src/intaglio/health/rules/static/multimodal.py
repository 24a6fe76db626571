"""Faults of the multimodal system: of the documented network, and of captions and pairs."""

import math

from torch import nn

from intaglio.config import MultimodalConfig
from intaglio.health.finding import Finding, Severity
from intaglio.health.rules.static.facts import Facts, constant_attention, found

LARGEST_LAYER = 0.5
"""A single linear layer above this share of all parameters is where the model's capacity went."""

CUT_CAPTIONS = 0.01
"""Share of captions cut to ``data.text_length`` above which it is a warning."""

FEW_PAIRS = {"infonce": 32, "sigmoid": 8}
"""Below this many pairs in a pass a contrastive loss tells items apart that hardly resemble each other."""

DOCUMENTED_PARAMETERS, DOCUMENTED_LINEAR, DOCUMENTED_BYTES = 50e6, 0.5e6, 16e9
"""What the original document says of its network: "~50M", its image decoder's linear layer "~0.5M", 16 GB."""


def count_off(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``count-off``: the documented network against what its document says of it."""
    if facts.config.model.network != "documented":
        return []
    told = []
    linear = _linear_layers(facts.network).get("image_decoder.linear", 0)
    if facts.parameters > 1.1 * DOCUMENTED_PARAMETERS:
        message = (
            f"The network has {facts.parameters:,} parameters; its document says about 50 million, "
            f"{facts.parameters / DOCUMENTED_PARAMETERS:.0f} times fewer. The linear layer image_decoder.linear, "
            f"documented with 0.5 million, alone has {linear:,}."
        )
        evidence = {"parameters": facts.parameters, "documented": DOCUMENTED_PARAMETERS, "linear": linear}
        options = ("as many as documented: intaglio train multimodal-large", _standard(facts.config))
        told.append(found("count-off", "fail", message, evidence, options))
    if abs(facts.total_bytes / DOCUMENTED_BYTES - 1) > 0.1:
        message = (
            f"The document claims 16 GB of memory: weights, gradients and optimizer take {facts.state_bytes / 1e9:.2f} "
            f"GB, with the activations {facts.total_bytes / 1e9:.2f} GB."
        )
        evidence = {"state": facts.state_bytes, "total": facts.total_bytes, "documented": DOCUMENTED_BYTES}
        told.append(found("count-off", "warning", message, evidence))
    return told


def one_layer_dominates(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``one-layer-dominates``: most parameters sit in a single linear layer, between an image and its vector."""
    name, count = max(_linear_layers(facts.network).items(), key=lambda item: item[1], default=("", 0))
    share = count / facts.parameters
    if share < LARGEST_LAYER:
        return []
    message = f"The linear layer {name} holds {share:.0%} of all parameters ({count:,}); halve the image further first."
    evidence = {"share": share, "parameters": count}
    return [found("one-layer-dominates", "warning", message, evidence, (_standard(facts.config),))]


def pooled_away(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``position-pooled-away``: a global average is the last thing that sees the image."""
    pooled = [n for n, m in facts.network.named_modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    message = "The image encoder averages over all places: the latent knows what is in the image, hardly where."
    return [found("position-pooled-away", "warning", message, {}, (_standard(facts.config),)) for _ in pooled]


def attention_over_one(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``attention-over-one``: the softmax of a single number is 1, whatever the query."""
    idle = constant_attention(facts)
    if not idle:
        return []
    inert = sum(idle.values())
    message = (
        f"{len(idle)} cross-attention layers attend to a single latent token: each adds the same vector at every "
        f"word, and {inert:,} parameters of queries and keys get no gradient."
    )
    fewer = ",".join(map(str, facts.config.model.channels[:-1]))
    standard = facts.config.model.network == "standard"
    remedy = f"--model.channels [{fewer}]" if standard else _standard(facts.config)
    evidence = {"layers": len(idle), "inert_parameters": inert}
    return [found("attention-over-one", "warning", message, evidence, (remedy,))]


def no_positions(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``decoder-without-positions``: words carry no positions."""
    tables = [m for m in facts.network.modules() if isinstance(m, nn.Embedding)]
    if len(tables) > 1:
        return []
    message = "The text decoder has no positions: it learns the order of words only from what the causal mask hides."
    return [found("decoder-without-positions", "warning", message, {}, (_standard(facts.config),))]


def trivial_pair(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``trivial-pair``: the contrastive term compares a latent with itself."""
    if facts.config.loss.pairing != "self" or not facts.config.loss.contrastive:
        return []
    message = (
        "The contrastive term pairs each latent with itself, which any encoder solves; no text enters it, so it "
        "teaches nothing about captions. Without a text encoder, generate --text and search --text cannot work either."
    )
    return [found("trivial-pair", "fail", message, {}, (_standard(facts.config), "--loss.contrastive 0"))]


def few_pairs(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``near-chance``: what a contrastive loss of so small a batch can say."""
    loss, n = facts.config.loss, facts.config.train.batch_size
    if not loss.contrastive or n >= FEW_PAIRS.get(loss.pairing, 32):
        return []
    message = f"A contrastive loss over {n} items is ln {n} = {math.log(n):.2f} by chance: read it beside that."
    options = ("--train.batch_size 64", *["--loss.pairing sigmoid"] * (loss.pairing == "infonce"))
    severity: Severity = "note" if loss.pairing == "self" else "warning"
    return [found("near-chance", severity, message, {"batch_size": n, "chance": math.log(n)}, options)]


def negatives_per_pass(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``negatives-per-pass``: accumulation enlarges the batch of the gradient, not that of the contrast."""
    train = facts.config.train
    if train.accumulate == 1 or not facts.config.loss.contrastive:
        return []
    message = (
        f"The contrastive term sees the {train.batch_size} items of one pass, not the "
        f"{train.batch_size * train.accumulate} of a step: accumulated passes are no negatives of each other."
    )
    options = (f"--train.batch_size {train.batch_size * train.accumulate} --train.accumulate 1",)
    return [found("negatives-per-pass", "warning", message, {"negatives": train.batch_size - 1}, options)]


def no_prior_term(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``latents-unshaped``: nothing in the loss shapes what ``generate`` samples from."""
    if "kl" in facts.terms and facts.config.loss.kl:
        return []
    message = "No loss term shapes the latents: the prior that generate samples from is only fitted afterwards."
    standard = facts.config.model.network == "standard"
    remedy = "--loss.kl 0.001" if standard else f"{_standard(facts.config)} --loss.kl 0.001"
    return [found("latents-unshaped", "note", message, {}, (remedy,))]


def captions_cut(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``data-replaced``: captions longer than ``data.text_length`` lose their ends."""
    told = facts.data and facts.data.captions
    if not told or not told.cut:
        return []
    length, share = facts.config.data.text_length, told.cut / told.captions
    message = f"{share:.1%} of the captions are longer than {length} tokens and lose their ends."
    severity: Severity = "warning" if share >= CUT_CAPTIONS else "note"
    return [found("data-replaced", severity, message, {"share": share}, (f"--data.text_length {2 * length}",))]


def vocabulary_size(facts: Facts[MultimodalConfig]) -> list[Finding]:
    """``vocabulary-unreachable``: more tokens are asked for than the captions support; training takes fewer."""
    cap, told = facts.config.model.vocabulary, facts.data and facts.data.captions
    if not told or cap < 2 * told.vocabulary:
        return []
    real = told.vocabulary
    message = (
        f"The captions support {real:,} tokens, not {cap:,}: training takes {real:,}, and the network is smaller than "
        "counted here."
    )
    return [found("vocabulary-unreachable", "note", message, {"configured": cap, "real": real})]


def _linear_layers(network: nn.Module) -> dict[str, int]:
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    return {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}


def _standard(config: MultimodalConfig) -> str:
    """Options of the network without the documented one's faults, with halvings down to a side of about 8."""
    channels = list(config.model.channels[:3])
    while config.data.image_size % 2 ** (len(channels) + 2) == 0 and config.data.image_size > 8 * 2 ** len(channels):
        channels.append(channels[-1])
    options = f"--model.channels [{','.join(map(str, channels))}]"
    if config.model.network == "standard":
        return options
    return f"--model.network standard --model.encoder_layers 2 --loss.pairing sigmoid {options}"


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
    captions_cut,
    vocabulary_size,
)
