"""The multimodal model: an image and its caption share one latent."""

from dataclasses import dataclass, field
from typing import Literal

from intaglio.config.settings.common import Config, ImageDataConfig


@dataclass(frozen=True)
class CaptionDataConfig(ImageDataConfig):
    """Images and their captions.

    Args:
        text_length: longest caption in tokens, START and END included; longer ones are cut and counted.
    """

    text_length: int = 64


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
class MultimodalConfig(Config):
    """One latent, an image and a caption."""

    data: CaptionDataConfig = field(default_factory=CaptionDataConfig)
    model: MultimodalModelConfig = field(default_factory=MultimodalModelConfig)
    loss: MultimodalLossConfig = field(default_factory=MultimodalLossConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
