"""What is known before training, as the static rules see it."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import nn

from intaglio.config import Config
from intaglio.health.finding import Finding, Severity, remedies
from intaglio.history import Reading
from intaglio.nn.documented_unet import UnnormedAttention
from intaglio.nn.transformer import Attention

C = TypeVar("C", bound=Config, covariant=True)

ATTENTION = (nn.MultiheadAttention, Attention, UnnormedAttention)


@dataclass(frozen=True)
class CaptionFacts:
    """``vocabulary`` is what the tokenizer takes of the captions and ``longest`` their longest in tokens, after ``cut``
    of ``captions`` were shortened."""

    vocabulary: int
    longest: int
    captions: int
    cut: int


@dataclass(frozen=True)
class GridFacts:
    """What a sample of the training tasks is like.

    ``answers`` counts the pairs of all training tasks. Shares: ``same`` of pairs whose output is their input,
    ``repeated`` of tasks whose demonstrations are one, ``dropped`` of objects that no token stands for (None where
    cells are read), ``changed`` of tasks that a draw of the augmentation alters, ``variety`` of those that draws alter
    differently (None without augmentation).
    """

    answers: int
    same: float = 0.0
    repeated: float = 0.0
    dropped: float | None = None
    changed: float | None = None
    variety: float | None = None


@dataclass(frozen=True)
class QuestionFacts:
    """``vocabulary`` is what the tokenizer takes of questions and answers, ``longest`` the longest of each in tokens,
    after ``cut`` of them were shortened; ``entropy`` of the training answers in nats."""

    vocabulary: int
    longest: tuple[int, int]
    cut: int
    entropy: float


@dataclass(frozen=True)
class DataFacts:
    """The data as training will see it.

    ``train`` and ``held_out`` count items; ``low`` and ``high`` bound the pixels (0 to 255); ``sampled`` is the number
    of items that were read; ``unlabelled`` counts training items without a class; ``captions``, ``grids`` and
    ``questions`` are None where none are learnt from.
    """

    train: int
    held_out: int
    low: int
    high: int
    sampled: int
    classes: tuple[str, ...] = ()
    unlabelled: int = 0
    captions: CaptionFacts | None = None
    grids: GridFacts | None = None
    questions: QuestionFacts | None = None


@dataclass(frozen=True)
class Facts(Generic[C]):
    """What is known before training.

    ``terms`` and ``measured`` name the loss terms and the held-out quantities; ``unreached`` gives the parameters of
    each module that no weighted term depends on, ``keys`` how many keys each attention layer attends to. ``readings``
    are what the history will hold because the configuration decides it. ``steps``, ``data`` and ``machine_bytes`` are
    None where unknown.
    """

    config: C
    network: nn.Module
    parameters: int
    state_bytes: int
    total_bytes: int
    terms: Set[str]
    measured: Set[str]
    unreached: Mapping[str, int]
    keys: Mapping[str, int]
    readings: Mapping[str, Reading] = field(default_factory=dict)
    steps: int | None = None
    data: DataFacts | None = None
    machine_bytes: int | None = None


def found(
    rule: str, severity: Severity, message: str, evidence: Mapping[str, float], do: Iterable[str] = ()
) -> Finding:
    """A finding with options of the command line as remedies."""
    return Finding(rule, severity, message, evidence, remedies(*do))


def constant_attention(facts: Facts[Config]) -> dict[str, int]:
    """The attention layers with a single key, by name, and how many parameters of queries and keys that makes idle."""
    modules = dict(facts.network.named_modules())
    return {name: _idle(modules[name]) for name, keys in facts.keys.items() if keys == 1}


def _idle(attention: nn.Module) -> int:
    if isinstance(attention, nn.MultiheadAttention):
        return 2 * (attention.embed_dim**2 + attention.embed_dim)
    if isinstance(attention, Attention):
        return _size(attention.query) + _size(attention.key_value) // 2
    assert isinstance(attention, UnnormedAttention)
    return _size(attention.query) + _size(attention.key)


def _size(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())
