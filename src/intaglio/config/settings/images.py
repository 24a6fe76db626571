"""The image autoencoder, and diffusion in its latents or in pixels."""

from dataclasses import dataclass, field
from typing import Literal

from intaglio.config.settings.common import Config, ImageDataConfig


@dataclass(frozen=True)
class PictureDataConfig(ImageDataConfig):
    """Images, whose captions are needed by text conditions alone.

    Args:
        flips: mirrors half of the training images, drawn anew each time; held-out ones never.
    """

    flips: bool = True


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
