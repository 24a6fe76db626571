"""What is wrong with the values of a configuration that types cannot say; each message names the key."""

import difflib
from collections.abc import Iterator

from intaglio.config import stages
from intaglio.config.plan import parse
from intaglio.config.settings import (
    AutoencoderConfig,
    Config,
    DiffusionConfig,
    ImageDataConfig,
    JepaConfig,
    MultimodalConfig,
    VqaConfig,
)
from intaglio.config.stages import PARTS


def check_values(config: Config) -> None:
    """Raises a ``ValueError`` for the first fault."""
    for message in _faults(config):
        raise ValueError(message)
    parse(config.plan)


def _faults(config: Config) -> Iterator[str]:
    """What is wrong with the values; later checks may rest on earlier ones. Each message names the key."""
    d, o, t = config.data, config.optim, config.train
    at_least_one = {"train.batch_size": t.batch_size, "train.accumulate": t.accumulate, "train.devices": t.devices}
    at_least_one |= {"train.log_every": t.log_every, "train.keep": t.keep, "train.validate_items": t.validate_items}
    at_least_one |= {"health.probe": config.health.probe}
    not_negative: dict[str, float] = {
        "seed": config.seed,
        "train.patience": t.patience,
        "train.draws": t.draws,
        "train.validate_every": t.validate_every,
    }
    not_negative |= {"train.checkpoint_every": t.checkpoint_every, "optim.warmup": o.warmup, "optim.decay": o.decay}
    not_negative |= {"optim.clip": o.clip}
    if isinstance(config, MultimodalConfig):
        m, p, w = config.model, config.prior, config.loss
        at_least_one |= {"model.latent": m.latent, "model.width": m.width, "model.heads": m.heads}
        at_least_one |= {"model.vocabulary": m.vocabulary, "model.feed_forward": m.feed_forward}
        at_least_one |= {"prior.steps": p.steps, "prior.batch_size": p.batch_size}
        not_negative |= {"prior.layers": p.layers, "model.decoder_layers": m.decoder_layers}
        not_negative |= {"model.encoder_layers": m.encoder_layers}
        not_negative |= {f"loss.{k}": getattr(w, k) for k in ("reconstruction", "caption", "contrastive", "kl")}
    yield from (f"{k} is {v}; it must be at least 1." for k, v in at_least_one.items() if v < 1)
    yield from (f"{k} is {v}; it must not be negative." for k, v in not_negative.items() if v < 0)
    if isinstance(d, ImageDataConfig):
        yield from _image_faults(d)
    if not 0 < d.held_out < 1:
        yield f"data.held_out is {d.held_out}; use a share between 0 and 1, such as 0.1."
    if d.items is not None and d.items < 2:
        yield f"data.items is {d.items}; use at least 2, one of them held out."
    if not 0 <= d.bad_limit <= 1:
        yield f"data.bad_limit is {d.bad_limit}; use a share from 0 to 1, such as 0.05."
    if (t.steps is None) == (t.epochs is None):
        yield "give train.steps or train.epochs, one of them (null for the other)."
    if t.steps is not None and t.steps < 1:
        yield f"train.steps is {t.steps}; use at least 1."
    if t.epochs is not None and t.epochs <= 0:
        yield f"train.epochs is {t.epochs}; use more than 0."
    if t.batch_size % t.devices:
        yield f"train.batch_size {t.batch_size} must divide over {t.devices} processes."
    if not 0 <= t.ema < 1:
        yield f"train.ema is {t.ema}; use a decay in [0, 1), such as 0.999."
    if o.rate <= 0 or not 0 <= o.floor <= o.rate:
        yield "optim.rate must be above 0 and optim.floor within [0, rate]."
    if not all(0 <= beta < 1 for beta in o.betas):
        yield f"optim.betas is {list(o.betas)}; use decay rates in [0, 1), such as [0.9, 0.99]."
    if not t.monitor.startswith("val/loss/"):
        yield f"train.monitor is {t.monitor}; the best look has the lowest value, so name a val/loss/… quantity."
    if config.plan and not config.health.on:
        yield "plan is checked by health, which is off: set health.on to true, or plan to []."
    if isinstance(config, MultimodalConfig):
        yield from _multimodal_faults(config)
    if isinstance(config, AutoencoderConfig):
        yield from _autoencoder_faults(config)
    if isinstance(config, DiffusionConfig):
        yield from _diffusion_faults(config)
    if isinstance(config, JepaConfig):
        yield from _jepa_faults(config)
    if isinstance(config, VqaConfig):
        yield from _vqa_faults(config)


def _image_faults(d: ImageDataConfig) -> Iterator[str]:
    if d.image_size < 16 or d.image_size % 16:
        yield f"data.image_size is {d.image_size}; use a multiple of 16."
    if d.source != "engravings" and d.items is not None:
        yield "data.items counts built-in scenes; a folder has its own. Leave it out, or set it to null."


def _multimodal_faults(config: MultimodalConfig) -> Iterator[str]:
    m, size, halvings = config.model, config.data.image_size, len(config.model.channels)
    if config.data.text_length < 3:
        yield f"data.text_length is {config.data.text_length}; use at least 3: START, a token, END."
    if m.width % m.heads:
        yield f"model.width {m.width} must be divisible by model.heads {m.heads}."
    if halvings < 3 or min(m.channels) < 1:
        yield f"model.channels is {list(m.channels)}; the image is halved at least 3 times, each with its channels."
    if config.prior.width % 32 or config.prior.width < 32:
        yield f"prior.width is {config.prior.width}; use a multiple of 32."
    if config.prior.rate <= 0:
        yield f"prior.rate is {config.prior.rate}; use more than 0, such as 0.002."
    if not 0 <= m.dropout < 1:
        yield f"model.dropout is {m.dropout}; use a share in [0, 1), such as 0.1."
    if config.loss.temperature <= 0:
        yield f"loss.temperature is {config.loss.temperature}; use more than 0, such as 0.1."
    if (config.loss.pairing == "self") != (m.network == "documented"):
        yield "loss.pairing self is the documented network's, and the only one that it can have."
    if m.network == "documented":
        return
    if size % 2 ** (halvings + 1):
        yield (
            f"data.image_size {size} halved {halvings} times (model.channels) leaves no even grid; use a multiple of "
            f"{2 ** (halvings + 1)} or fewer channels."
        )
    cells = (size // 2**halvings) ** 2
    if m.latent % cells:
        yield (
            f"model.latent is {m.latent}; it must be a multiple of the latent's cells, {cells} at data.image_size "
            f"{size} with {halvings} model.channels."
        )


def _autoencoder_faults(config: AutoencoderConfig) -> Iterator[str]:
    m, size, factor = config.model, config.data.image_size, 2 ** len(config.model.channels)
    if len(m.channels) < 2 or min(m.channels) < 1:
        yield f"model.channels is {list(m.channels)}; the image is halved at least twice, each with its channels."
    if size % factor:
        fitting = max(1, round(size / factor)) * factor
        yield f"data.image_size {size} is not divisible by {factor}, the factor of model.channels: use {fitting}."
    if m.latent < 1:
        yield f"model.latent is {m.latent}; use at least 1 channel, such as 4."
    for name in ("reconstruction", "kl"):
        if getattr(config.loss, name) < 0:
            yield f"loss.{name} is {getattr(config.loss, name)}; it must not be negative."


def _diffusion_faults(config: DiffusionConfig) -> Iterator[str]:
    m, c, n, s = config.model, config.condition, config.noise, config.sampling
    if not m.widths or min(m.widths) < 1 or m.blocks < 1 or m.patch < 1:
        yield "model.widths, model.blocks and model.patch must be at least 1, and there must be a width."
    if any(not 0 <= level < len(m.widths) for level in m.attention):
        yield f"model.attention is {list(m.attention)}; the levels of model.widths are 0 to {len(m.widths) - 1}."
    if not 0 <= m.dropout < 1:
        yield f"model.dropout is {m.dropout}; use a share in [0, 1), such as 0.1."
    if m.network == "documented" and m.patch > 1:
        yield "model.patch has no effect on the documented network: set it to 1."
    if m.network == "documented" and c.by == "none":
        yield "condition.by is none, but the documented network must be told something: set condition.by to class."
    if m.patch > 1 and config.data.image_size % m.patch:
        yield f"data.image_size {config.data.image_size} is not divisible by model.patch {m.patch}."
    if c.by == "text" and not c.encoder:
        yield (
            "condition.by is text, which needs a text encoder: set condition.encoder to the run of a multimodal model "
            "(intaglio train multimodal-small) or to the folder of a CLIP."
        )
    if c.by != "text" and c.encoder:
        yield f"condition.encoder has no effect with condition.by {c.by}: set condition.by to text, or leave it out."
    if not 0 <= c.drop <= 1:
        yield f"condition.drop is {c.drop}; use a share in [0, 1], such as 0.15."
    if n.steps < 2:
        yield f"noise.steps is {n.steps}; use at least 2, such as 500."
    if n.kind == "straight" and n.zero_terminal_snr:
        yield "noise.zero_terminal_snr has no effect on straight, which ends at SNR 0: leave it out."
    if config.loss.prediction == "epsilon" and (n.zero_terminal_snr or n.kind == "straight"):
        yield "loss.prediction epsilon says nothing of the image where no signal is left: use v, x0 or flow."
    if config.loss.gamma <= 0:
        yield f"loss.gamma is {config.loss.gamma}; use more than 0, such as 5."
    if s.guidance < 0 or s.each < 1 or not 1 <= s.steps <= n.steps:
        yield f"sampling needs guidance >= 0, each >= 1 and steps from 1 to {n.steps} (noise.steps)."
    if s.guidance != 1 and c.by != "none" and c.drop == 0:
        yield (
            f"sampling.guidance {s.guidance:g} asks a network without its condition that never was trained so: set "
            "condition.drop to 0.15, or sampling.guidance to 1."
        )


def _jepa_faults(config: JepaConfig) -> Iterator[str]:
    d, m, w = config.data, config.model, config.loss
    counts = {"patch": m.patch, "layers": m.layers, "slots": m.slots, "predictor_layers": m.predictor_layers}
    for name, value in (counts | {"embedding": m.embedding, "width": m.width, "heads": m.heads}).items():
        if value < 1:
            yield f"model.{name} is {value}; it must be at least 1."
    if not 2 <= d.pairs <= 10:
        yield f"data.pairs is {d.pairs}; use 2, a demonstration and a question, to 10."
    if m.patch > 3:
        yield f"model.patch is {m.patch}; more than 3 × 3 cells in one are no longer told apart: use 1 or 2."
    if m.tokens == "cells" and m.slots not in (1, 4, 9, 16, 25, 36):
        yield f"model.slots is {m.slots}; each stands for one of R × R regions: use 4, 9 or 16."
    if m.tokens == "objects" and m.patch != type(m)().patch:
        yield "model.patch has no effect on model.tokens objects: leave it out."
    if m.width % m.heads:
        yield f"model.width {m.width} must be divisible by model.heads {m.heads}."
    if m.quantiser == "vq" and m.codes < 2:
        yield f"model.codes is {m.codes}; use at least 2, such as 512."
    if m.codes_after < 0:
        yield f"model.codes_after is {m.codes_after}; it must not be negative."
    if m.quantiser == "fsq" and (not m.levels or min(m.levels) < 3):
        yield f"model.levels is {list(m.levels)}; each number needs at least 3 values, such as [8, 8, 8]."
    if not 0 <= m.target < 1:
        yield f"model.target is {m.target}; use a decay in [0, 1), such as 0.99, or 0 for none."
    low, high = w.bounds
    if not 0 < low <= w.temperature <= high:
        yield f"loss.temperature {w.temperature} must lie within loss.bounds {list(w.bounds)}, both above 0."
    if w.queue < 0:
        yield f"loss.queue is {w.queue}; it must not be negative."
    if not 0 <= w.sigreg < 1:
        yield f"loss.sigreg is {w.sigreg}; use a share in [0, 1), such as 0.05."
    if w.objective == "lejepa" and not w.sigreg and not m.target:
        yield (
            "loss.objective lejepa predicts embeddings that nothing keeps apart: they would all become one. Set "
            "loss.sigreg to 0.05, or take loss.objective infonce."
        )
    if w.slices < 1:
        yield f"loss.slices is {w.slices}; use at least 1, such as 256."
    for name in ("commitment", "relational", "colour", "flip", "shift"):
        if getattr(w, name) < 0:
            yield f"loss.{name} is {getattr(w, name)}; it must not be negative."


def _vqa_faults(config: VqaConfig) -> Iterator[str]:
    d, m, w = config.data, config.model, config.loss
    counts = {"width": m.width, "heads": m.heads, "answer_layers": m.answer_layers, "latents": m.latents}
    for name, value in (counts | {"dims": m.dims, "reasoning_layers": m.reasoning_layers}).items():
        if value < 1:
            yield f"model.{name} is {value}; it must be at least 1."
    for name in ("vision_layers", "question_layers"):
        if getattr(m, name) < 0:
            yield f"model.{name} is {getattr(m, name)}; it must not be negative."
    for part, folder, layers in (
        ("vision", m.vision, m.train_vision),
        ("question", m.question, m.train_question),
    ):
        if layers and not folder:
            yield (
                f"model.train_{part} names layers of a transformers folder, and model.{part} names none: give the "
                "folder, or leave the layers out, as the built-in encoder is trained whole."
            )
    if m.fusion_layers < 1:
        yield f"model.fusion_layers is {m.fusion_layers}; without one no question ever looks at the image: use 2."
    if m.width % m.heads or m.width % 4:
        yield f"model.width {m.width} must be divisible by model.heads {m.heads}, and by 4."
    if m.bottleneck == "vib" and m.dims < 2:
        yield f"model.dims is {m.dims}; use at least 2 numbers a latent, such as 32."
    if m.vocabulary < 8:
        yield f"model.vocabulary is {m.vocabulary}; four tokens are special, so use more, such as 2000."
    for name in ("temperature", "held_out_temperature"):
        if getattr(m, name) < 0:
            yield f"model.{name} is {getattr(m, name)}; it must not be negative."
    if d.together < 1:
        yield f"data.together is {d.together}; use at least 1, an item's own question."
    if min(d.question_length, d.answer_length) < 3:
        yield "data.question_length and data.answer_length must be at least 3: START, a token, END."
    for name in ("answer", "kl", "floor", "ramp", "orthogonality", "preference"):
        if getattr(w, name) < 0:
            yield f"loss.{name} is {getattr(w, name)}; it must not be negative."
    if m.bottleneck != "vib" and w.floor:
        yield f"loss.floor has no effect with model.bottleneck {m.bottleneck}, which has no KL: set it to 0."
    if w.preference and w.candidates < 2:
        yield f"loss.candidates is {w.candidates}; a preference is between two answers at least: use 4."
    for part, factor in config.rates.items():
        if part not in PARTS:
            near = difflib.get_close_matches(part, PARTS, 1, 0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            yield f"rates: there is no part {part!r}.{hint} There are {', '.join(PARTS)}."
        elif factor <= 0:
            yield f"rates.{part} is {factor}; use more than 0, or freeze the part in stages."
    if set(config.rates) >= set(PARTS):
        yield "rates has a factor for every part: leave one out, which has optim.rate itself."
    stages.parse(config.stages, config.train.steps or 10**9)
