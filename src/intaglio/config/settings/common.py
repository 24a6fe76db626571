"""What every system has: data, optimizer, training, health."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class DataConfig:
    """Which items are learnt from, and which are held out.

    Args:
        source: what is built in, or the path of a folder.
        items: number of built-in items to draw; a folder has as many as it holds.
        held_out: share of the items that is kept out of training; a split that the folder declares comes first.
        bad_limit: largest share of unusable items that training starts with.
        cache: folder for what is decoded or drawn once; empty for the user's cache folder.
    """

    source: str
    items: int | None = None
    held_out: float = 0.1
    bad_limit: float = 0.05
    cache: str = ""


@dataclass(frozen=True)
class ImageDataConfig(DataConfig):
    """Images, with captions or labels.

    Args:
        source: ``engravings`` (built in, needs no files) or the path of a folder of images.
        image_size: side of the square images in pixels, a multiple of 16.
        metadata: file inside the folder that names images and captions; found by itself where it has a usual name.
        columns: names of that file's columns where they are unusual, as ``caption: title``.
        caption_template: caption of images that have only a label.
    """

    source: str = "engravings"
    image_size: int = 64
    metadata: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    caption_template: str = "a picture of {label}"


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
        draws: which order and noise; another number gives others on the same split, from the same weights.
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
    draws: int = 0

    def drawn_by(self, seed: int) -> int:
        """The seed of order and noise: the run's own for ``draws`` 0."""
        return seed + 1_000_003 * self.draws


@dataclass(frozen=True)
class HealthConfig:
    """What is watched while training; none of it changes a weight.

    Args:
        on: audits in the first steps, instruments and trials at each look, a verdict as the run goes on.
        probe: held-out items that instruments read, the same ones each time; twice the latent's dimensions at least.
        profile: limits of the rules: ``default``, ``documents``, or a YAML file.
        stop: ends the run at the first failing finding, with exit code 1.
    """

    on: bool = True
    probe: int = 512
    profile: str = "default"
    stop: bool = False


@dataclass(frozen=True)
class Config:
    """What every system has.

    Args:
        system: which system is trained.
        seed: decides data, order, initial weights and noise.
        name: of the run folder; empty for the recipe's name.
        runs: folder that holds the run folders.
        plan: limits that are checked while training, and what is done then; see docs/plans.md.
    """

    system: str
    seed: int = 0
    name: str = ""
    runs: str = "runs"
    data: DataConfig = field(default_factory=ImageDataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    plan: tuple[dict[str, Any], ...] = ()
