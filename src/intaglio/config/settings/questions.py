"""Visual question answering through a latent bottleneck."""

from dataclasses import dataclass, field
from typing import Any, Literal

from intaglio.config.settings.common import Config, ImageDataConfig


@dataclass(frozen=True)
class QuestionDataConfig(ImageDataConfig):
    """Questions about images, with their answers.

    Args:
        source: ``engravings`` (built in: what, how many, how shaded, where), or the path of a folder with images and a
            table of questions.
        items: built-in images to draw; each is asked about all that is known of it.
        metadata: the table, where it is not called questions.csv, .tsv, .jsonl or .json.
        columns: names of its columns where they are unusual, as ``question: q``.
        together: questions about one image that are learnt from at once, as it is encoded once for all of them: so many
            for each item of a batch, or as many as there are.
        question_length: longest question in tokens, START and END included; longer ones are cut and counted.
        answer_length: longest answer in tokens.
    """

    together: int = 8
    question_length: int = 48
    answer_length: int = 16


@dataclass(frozen=True)
class VqaModelConfig:
    """Image and question to a few latents, latents to the answer.

    Args:
        width: of all Transformer blocks.
        heads: attention heads.
        vision: folder of a `transformers` vision model (DINOv2, ViT, a CLIP), which sees ``data.image_size`` as it is;
            empty for the built-in encoder.
        question: folder of a `transformers` text model (BERT, the encoder of BART or T5) with its tokenizer; empty for
            the built-in encoder.
        train_vision: layers of that vision model which are trained, from 0, or from -1, the last; or ``all``. The rest
            of it stands still, and a linear layer behind it learns.
        train_question: the same of the text model.
        vision_layers: Transformer blocks over the image's places, of the built-in encoder.
        question_layers: Transformer blocks over the question's tokens, of the built-in encoder.
        fusion_layers: layers in which the question looks at the image, behind gates.
        gate: where these gates start; 0 spares encoders that have learnt elsewhere (Flamingo), and delays all others.
        reasoning_layers: Transformer blocks in which the latents read the fused question.
        answer_layers: Transformer blocks of the decoder, which sees the latents alone.
        bottleneck: ``vib`` (each latent a Gaussian), ``deterministic`` (its mean, as narrow), ``none`` (as wide as the
            network).
        latents: K, how many there are.
        dims: numbers of each.
        temperature: T of z = μ + T·σ·ε in training; KL is charged for T = 1, so another value misstates the rate.
        held_out_temperature: the same on held-out items; 0 takes the mean.
        vocabulary: largest number of tokens; the trained tokenizer has as many as the texts support.
    """

    width: int = 128
    heads: int = 4
    vision: str = ""
    question: str = ""
    train_vision: tuple[int, ...] | Literal["all"] = ()
    train_question: tuple[int, ...] | Literal["all"] = ()
    vision_layers: int = 3
    question_layers: int = 2
    fusion_layers: int = 2
    gate: float = 1.0
    reasoning_layers: int = 2
    answer_layers: int = 2
    bottleneck: Literal["none", "deterministic", "vib"] = "vib"
    latents: int = 6
    dims: int = 32
    temperature: float = 1.0
    held_out_temperature: float = 0.0
    vocabulary: int = 2000


@dataclass(frozen=True)
class VqaLossConfig:
    """Weights of the loss terms; each is the very number that multiplies its term.

    Args:
        answer: cross-entropy, nats of an answer.
        kl: β, of KL(q(z) || N(0, I)) in nats of an item, summed over all latents and numbers: ELBO units.
        floor: free bits λ: a latent pays max(λ, its KL), nats, the KL a mean over the minibatch.
        ramp: optimizer steps over which β rises from 0, behind the stages that are without ``kl``.
        orthogonality: squared cosine between the latents of an item.
        preference: a likelier right answer than wrong one, among ``candidates`` that the model itself has drawn.
        candidates: answers drawn for each question of a batch by ``preference``.
    """

    answer: float = 1.0
    kl: float = 0.02
    floor: float = 0.0
    ramp: int = 300
    orthogonality: float = 0.0
    preference: float = 0.0
    candidates: int = 4


@dataclass(frozen=True)
class VqaConfig(Config):
    """An answer from an image and a question.

    Args:
        stages: the curriculum, from the first on; each line has ``until`` (a step, or a share of the run), and what is
            held back so long: ``freeze`` names parts of the network, ``without`` terms of the loss. Behind the last
            one nothing is.
        rates: a factor on ``optim.rate`` for parts of the network: vision, question, fusion, bottleneck, answer.
    """

    data: QuestionDataConfig = field(default_factory=QuestionDataConfig)
    model: VqaModelConfig = field(default_factory=VqaModelConfig)
    loss: VqaLossConfig = field(default_factory=VqaLossConfig)
    stages: tuple[dict[str, Any], ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
