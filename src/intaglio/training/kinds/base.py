"""The contract of a kind: everything about a system that the run of a training needs to know."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from intaglio.config import Config
from intaglio.data.corpus import Progress
from intaglio.data.prepare import Prepared
from intaglio.health.record import Record
from intaglio.history.reading import Evaluation
from intaglio.history.run_folder import RunFolder
from intaglio.models.classifier import Judge
from intaglio.reports.proofs.pull import UNMEASURED, WHILE_TRAINING
from intaglio.systems.base import System

Say = Callable[[str], None]


@dataclass
class Kind(ABC):
    """One system under one configuration; its own `Prepared` and model are what its methods are given."""

    config: Config
    kept: ClassVar[Mapping[str, str]] = {}
    """Readings of the last step that the evaluation measures more strictly, and their names beside its own."""

    @abstractmethod
    def prepare(self, saved: Mapping[str, Any] | None, model: Any, progress: Progress | None, say: Say) -> Prepared:
        """The data; encoded as ``saved`` in a checkpoint (its ``state_dict`` among it), or as ``model`` has learnt it,
        where one of them is given."""

    @abstractmethod
    def describe(self, prepared: Any) -> str:
        """How much data there is, in a line."""

    @abstractmethod
    def build(self, prepared: Any, model: Any = None) -> System:
        """The system with fresh weights from the seed, or around a trained model."""

    def saved(self, prepared: Any) -> dict[str, Any]:
        """What a checkpoint must hold besides weights and configuration, for ``prepare``."""
        return {}

    def resolve(self, prepared: Any) -> Config:
        """The configuration with what the data has decided."""
        return self.config

    @abstractmethod
    def refuse_other_shape(self, model: Any, source: RunFolder) -> None:
        """ValueError: ``model``, of ``source``, cannot be trained on with this configuration."""

    def complete(self, model: Any, prepared: Any, say: Say) -> None:  # noqa: B027 - most have nothing to fit
        """What is fitted when the weights have been trained, before the model is saved."""

    @abstractmethod
    def evaluate(self, model: Any, prepared: Any, judge: Judge | str) -> Evaluation:
        """The system's quantities on held-out items, each beside its null."""

    @abstractmethod
    def prove(
        self,
        model: Any,
        prepared: Any,
        folder: Path,
        quick: bool,
        judge: Judge | str = WHILE_TRAINING,
        record: Record = UNMEASURED,
    ) -> list[Path]:
        """Writes the pictures of a step, and returns them; ``quick`` those that take a second.

        ``record`` is what has been measured of the very model.
        """
