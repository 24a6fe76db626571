"""Everything that a user may set: typed and frozen; read from YAML recipes and the command line, checked, compared.

A recipe is a YAML file with ``system:`` (or one parent named by ``extends:``) and the keys below it that it changes.
``load("multimodal-small", ["--train.steps", "500"])`` gives the configuration; ``dump`` writes it back so that it loads
as itself.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml


@dataclass(frozen=True)
class DataConfig:
    """Which items are learnt from, and which are held out.

    Args:
        source: ``engravings`` (built in, needs no files) or the path of a folder of images.
        items: number of built-in scenes to draw; a folder has as many as it holds.
        image_size: side of the square images in pixels, a multiple of 16.
        held_out: share of the items that is kept out of training; a split that the folder declares comes first.
        text_length: longest caption in tokens, START and END included; longer ones are cut and counted.
        metadata: file inside the folder that names images and captions; found by itself where it has a usual name.
        columns: names of that file's columns where they are unusual, as ``caption: title``.
        caption_template: caption of images that have only a label.
        bad_limit: largest share of unreadable or captionless items that training starts with.
        cache: folder for decoded images; empty for the user's cache folder.
    """

    source: str = "engravings"
    items: int | None = None
    image_size: int = 64
    held_out: float = 0.1
    text_length: int = 64
    metadata: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    caption_template: str = "a picture of {label}"
    bad_limit: float = 0.05
    cache: str = ""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule, both counted in optimizer steps.

    Args:
        kind: ``muon`` makes the updates of hidden matrices orthogonal and uses AdamW for the rest; ``adamw`` decays
            weights apart from the gradient, ``adam`` adds the decay to it.
        rate: highest learning rate.
        floor: learning rate at the last step.
        warmup: optimizer steps of linear warm-up.
        schedule: shape between warm-up and the last step.
        decay: weight decay of matrices and kernels; biases, norms and embeddings have none.
        betas: decay rates of the first and second moment.
        clip: largest gradient norm; 0 clips nothing.
    """

    kind: Literal["muon", "adamw", "adam"] = "muon"
    rate: float = 3e-3
    floor: float = 1e-6
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how often.

    Args:
        steps: optimizer steps of the whole run; give this or ``epochs``.
        epochs: passes over the training items; resolved to ``steps`` when the data is known.
        batch_size: items of one forward pass, over all processes together.
        accumulate: forward passes of one optimizer step.
        precision: ``auto`` times both on this machine and says which and why.
        device: ``auto`` takes a GPU where there is one and says so.
        devices: processes, one GPU (or CPU worker) each.
        ema: decay of the averaged weights that validation, samples and the saved model use; 0 for none.
        log_every: optimizer steps between rows of the history.
        validate_every: optimizer steps between looks at the held-out items; 0 for a tenth of the run.
        validate_items: held-out items of each look.
        checkpoint_every: optimizer steps between checkpoints; 0 for one at each look.
        keep: how many of the latest checkpoints stay; the best look's stays besides.
        patience: looks without a better ``monitor`` after which the run stops, and the model has the best look's
            weights; 0 never stops early, and it has the last ones.
        monitor: name of the held-out quantity that says which checkpoint is best.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    ema: float = 0.999
    log_every: int = 20
    validate_every: int = 0
    validate_items: int = 512
    checkpoint_every: int = 0
    keep: int = 2
    patience: int = 0
    monitor: str = "val/loss/total"


@dataclass(frozen=True)
class MultimodalModelConfig:
    """The multimodal network. ``documented`` builds the network of the original document literally.

    Args:
        network: ``standard``, or ``documented`` (pooled encoder, one latent token, no text encoder).
        latent: dimensions of the shared latent z, a multiple of its cells: (image_size / 2^len(channels))² of them.
        channels: channels after each halving of the image, at least three; the image decoder mirrors them.
        width: width of the text encoder and decoder, and of the token embedding.
        heads: attention heads.
        feed_forward: width of the hidden layer in each Transformer block.
        decoder_layers: Transformer blocks of the text decoder.
        encoder_layers: Transformer blocks of the text encoder.
        vocabulary: largest number of tokens; the trained tokenizer has as many as the captions support.
        dropout: in the Transformer blocks.
        output: activation of the image decoder: ``sigmoid`` reaches [0, 1], ``tanh`` [-1, 1]; images have that range.
    """

    network: Literal["standard", "documented"] = "standard"
    latent: int = 256
    channels: tuple[int, ...] = (32, 64, 160)
    width: int = 128
    heads: int = 4
    feed_forward: int = 512
    decoder_layers: int = 3
    encoder_layers: int = 2
    vocabulary: int = 4000
    dropout: float = 0.0
    output: Literal["sigmoid", "tanh"] = "sigmoid"


@dataclass(frozen=True)
class MultimodalLossConfig:
    """Weights of the loss terms; each is the very number that multiplies its term.

    Args:
        reconstruction: L1 + MSE of the image, mean over pixels.
        caption: cross-entropy of the caption, nats per token, padding left out.
        contrastive: image against text over the batch.
        kl: KL(q(z|x) || N(0, I)), nats per image.
        pairing: ``sigmoid`` (SigLIP, suits small batches), ``infonce`` (CLIP), or ``self`` (the document's: z against
            itself, which teaches nothing; ``check`` says so).
        temperature: at the start; learnt from there on.
    """

    reconstruction: float = 10.0
    caption: float = 1.0
    contrastive: float = 1.0
    kl: float = 2e-5
    pairing: Literal["sigmoid", "infonce", "self"] = "sigmoid"
    temperature: float = 0.1


@dataclass(frozen=True)
class PriorConfig:
    """The flow over latents that ``generate`` samples from, fitted when the rest has been trained.

    Args:
        width: of its Transformer, a multiple of 32.
        layers: Transformer blocks; with none the prior is the Gaussian of the latents' means and variances.
        steps: optimizer steps of the fit.
        batch_size: latents of a step.
        rate: highest learning rate.
    """

    width: int = 128
    layers: int = 3
    steps: int = 800
    batch_size: int = 256
    rate: float = 2e-3


@dataclass(frozen=True)
class Config:
    """What every system has.

    Args:
        system: which system is trained.
        seed: decides data, order, initial weights and noise.
        name: of the run folder; empty for the recipe's name.
        runs: folder that holds the run folders.
    """

    system: str
    seed: int = 0
    name: str = ""
    runs: str = "runs"
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class MultimodalConfig(Config):
    """One latent, an image and a caption."""

    model: MultimodalModelConfig = field(default_factory=MultimodalModelConfig)
    loss: MultimodalLossConfig = field(default_factory=MultimodalLossConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)


SYSTEMS: Mapping[str, type[Config]] = {"multimodal": MultimodalConfig}
AnyConfig = TypeVar("AnyConfig", bound=Config)


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _recipe_folder().iterdir() if f.name.endswith(".yaml"))


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe (a name from ``recipes()`` or the path of a YAML file) and applies ``--key.sub value`` overrides.

    Raises:
        ValueError: an unknown recipe, key or value, with the nearest right one.
    """
    tree = _read(recipe, seen=())
    tree.setdefault("name", "")
    if not tree["name"]:
        tree["name"] = Path(recipe).stem
    _choose_length(tree, overrides)
    return from_dict(tree, overrides, where=f"recipe {recipe}")


def from_dict(tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "configuration") -> Config:
    """Builds the typed configuration of ``tree["system"]``.

    Raises:
        ValueError: an unknown system, key or value; the message names the nearest right one.
    """
    import jsonargparse

    system = tree.get("system")
    if not isinstance(system, str) or system not in SYSTEMS:
        raise ValueError(f"{where}: system is {system!r}; it must be one of: {', '.join(SYSTEMS)}.")
    kind = SYSTEMS[system]
    _check_keys(tree, kind, where)
    for word in overrides:
        if word.startswith("--"):
            _check_path(word[2:].split("=", 1)[0], kind)
        elif word.startswith("-") and not _is_number(word):
            raise ValueError(f"{word}: options are written --key.sub value, for example --train.steps 500.")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, nested_key=None)
    try:
        parsed = parser.parse_object(dict(tree))
        if overrides:
            parsed = parser.parse_args(list(overrides), namespace=parsed)
        config = kind(**vars(parser.instantiate(parsed)))
    except Exception as error:  # jsonargparse raises several unrelated types for a wrong value
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    _check_values(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain dicts, lists, numbers and strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return plain(asdict(config))


def dump(config: Config) -> str:
    """The configuration as YAML that ``load`` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def diff(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new)."""
    a, b = _flat(to_dict(old)), _flat(to_dict(new))
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _recipe_folder() -> Any:
    return files("intaglio") / "recipes"


def _read(recipe: str | Path, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise ValueError(f"No recipe file {recipe}. The recipes that come with intaglio: {', '.join(recipes())}.")
        text = path.read_text(encoding="utf-8")
    else:
        entry = _recipe_folder() / f"{recipe}.yaml"
        if not entry.is_file():
            raise ValueError(
                f"No recipe {str(recipe)!r}.{_nearest(str(recipe), recipes())} Recipes: {', '.join(recipes())}; "
                "or give the path of a YAML file."
            )
        text = entry.read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{recipe} is not a recipe: a recipe is a mapping with the key 'system' or 'extends'.")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if str(parent) in seen:
        raise ValueError(f"Recipes extend each other in a circle: {' -> '.join((*seen, str(parent)))}.")
    beside = path.parent / f"{parent}.yaml"
    inherited = _read(beside if path.is_file() and beside.is_file() else parent, (*seen, str(parent)))
    inherited.pop("name", None)
    return _merge(inherited, tree)


def _choose_length(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Steps on the command line replace the recipe's epochs, and the other way round."""
    given = {word[2:].split("=", 1)[0] for word in overrides}
    for key, other in (("train.steps", "steps"), ("train.epochs", "epochs")):
        if key not in given:
            continue
        for name in {"steps", "epochs"} - {other}:
            if f"train.{name}" not in given:
                tree.setdefault("train", {})[name] = None


def _merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _section(kind: type, key: str) -> type | None:
    hint = get_type_hints(kind)[key]
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def _check_keys(tree: Mapping[str, Any], kind: type, where: str, prefix: str = "") -> None:
    for key, value in tree.items():
        _check_key(key, kind, where, prefix)
        section = _section(kind, key)
        if section and not isinstance(value, dict):
            raise ValueError(f"{where}: {prefix}{key} is a section and needs keys below it, not {value!r}.")
        if section:
            _check_keys(value, section, where, f"{prefix}{key}.")


def _check_path(path: str, kind: type) -> None:
    """An override such as ``data.columns.caption``: each part must be a key of the section before it."""
    prefix, at = "", kind
    for part in path.split("."):
        _check_key(part, at, "command line", prefix)
        below = _section(at, part)
        if below is None:
            return
        prefix, at = f"{prefix}{part}.", below


def _check_key(key: str, kind: type, where: str, prefix: str) -> None:
    names = [f.name for f in fields(kind)]
    if key not in names:
        everywhere = [p for p in _flat_names(kind) if p.split(".")[-1] == key]
        hint = f" Did you mean {prefix}{everywhere[0]}?" if everywhere else _nearest(key, names, prefix)
        raise ValueError(f"{where}: unknown key {prefix}{key}.{hint} Keys here: {', '.join(names)}.")


def _check_values(config: Config) -> None:
    """What types cannot say."""
    for message in _faults(config):
        raise ValueError(message)


def _faults(config: Config) -> Iterator[str]:
    """What is wrong with the values; later checks may rest on earlier ones. Each message names the key."""
    d, o, t = config.data, config.optim, config.train
    at_least_one = {"train.batch_size": t.batch_size, "train.accumulate": t.accumulate, "train.devices": t.devices}
    at_least_one |= {"train.log_every": t.log_every, "train.keep": t.keep, "train.validate_items": t.validate_items}
    not_negative: dict[str, float] = {
        "seed": config.seed,
        "train.patience": t.patience,
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
    if d.image_size < 16 or d.image_size % 16:
        yield f"data.image_size is {d.image_size}; use a multiple of 16."
    if not 0 < d.held_out < 1:
        yield f"data.held_out is {d.held_out}; use a share between 0 and 1, such as 0.1."
    if d.text_length < 3:
        yield f"data.text_length is {d.text_length}; use at least 3: START, a token, END."
    if d.source != "engravings" and d.items is not None:
        yield "data.items counts built-in scenes; a folder has its own. Leave it out, or set it to null."
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
    if isinstance(config, MultimodalConfig):
        yield from _multimodal_faults(config)


def _multimodal_faults(config: MultimodalConfig) -> Iterator[str]:
    m, size, halvings = config.model, config.data.image_size, len(config.model.channels)
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


def _nearest(word: str, names: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _flat_names(kind: type, prefix: str = "") -> list[str]:
    names: list[str] = []
    for f in fields(kind):
        section = _section(kind, f.name)
        names += _flat_names(section, f"{prefix}{f.name}.") if section else [f"{prefix}{f.name}"]
    return names


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
