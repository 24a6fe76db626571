"""The contract: a recipe's network without its numbers, blank items for it, and the facts of its data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from intaglio.config import Config, ImageDataConfig
from intaglio.data import order
from intaglio.data.corpus import Corpus
from intaglio.data.prepare import BUILT_IN_ITEMS, open_corpus
from intaglio.data.splits import split
from intaglio.health.finding import Finding, remedies
from intaglio.health.rules.static import CaptionFacts, DataFacts
from intaglio.history import Reading
from intaglio.models.cost import parameter_counts
from intaglio.systems.base import System

SAMPLE = 2_000
"""Built-in scenes whose captions are read; all of a folder are."""

SAMPLE_IMAGES = 64


@dataclass
class Subject(ABC):
    """A configuration that is checked; ``look`` comes first.

    ``data`` is None where it cannot be read. ``unsure`` says what was assumed of what is not there.
    """

    config: Config
    data: DataFacts | None = field(default=None, init=False)
    unsure: list[str] = field(default_factory=list, init=False)
    of_the_data: ClassVar[str]
    """What cannot be known without the data, besides the steps of an epoch."""

    @abstractmethod
    def system(self) -> System:
        """The system of the recipe as it is written, on the meta device."""

    def trained(self) -> System:
        """The same as training will build it, where the data decides a size."""
        return self.system()

    @abstractmethod
    def batch(self, system: Any) -> Any:
        """Blank items of one process, as ``system`` reads them."""

    def modules(self, system: Any) -> dict[str, int]:
        """Parameters by module; they add up to all of them."""
        return parameter_counts(system.model.network)

    def measured(self, system: Any) -> set[str]:
        """Names of the held-out quantities, without ``val/``; called among fake tensors."""
        return set(system.measure(self.batch(system)))

    def readings(self, system: Any) -> Mapping[str, Reading]:
        """What the history will hold because the configuration decides it."""
        return {}

    @property
    def items(self) -> int:
        """Of a pass in one process."""
        return self.config.train.batch_size // self.config.train.devices

    @property
    def captioned(self) -> bool:
        """Whether images without a caption are left out."""
        return False

    def captions(self, corpus: Corpus, train: np.ndarray) -> CaptionFacts | None:
        """What the captions are like; None where none are learnt from."""
        return None

    def look(self) -> list[Finding]:
        """Reads the data, or finds why it cannot be read."""
        data, scale = self.config.data, 1.0
        assert isinstance(data, ImageDataConfig), "a system without images reads its data itself"
        if data.source == "engravings":
            items = data.items or BUILT_IN_ITEMS
            data = replace(data, items=min(items, SAMPLE))
            scale = items / min(items, SAMPLE)
        try:
            corpus = open_corpus(data, self.config.seed, captioned=self.captioned)
            sides, _ = split(corpus, {"train": 1 - data.held_out, "val": data.held_out}, self.config.seed)
        except ValueError as error:
            return [Finding("data-unusable", "fail", str(error), {}, remedies("name the folder: --data.source FOLDER"))]
        size = 64 if data.source == "engravings" else data.image_size  # how far pixels reach does not hang on the size
        looked_at = order.permutation(len(corpus), 0, 0)[:SAMPLE_IMAGES]
        extremes = np.array([(image.min(), image.max()) for image in (corpus.image(int(i), size) for i in looked_at)])
        self.data = DataFacts(
            round(scale * len(sides["train"])),
            round(scale * len(sides["val"])),
            int(extremes[:, 0].min()),
            int(extremes[:, 1].max()),
            len(corpus),
            tuple(corpus.labels()),
            sum(corpus.label(int(i)) is None for i in sides["train"]),
            self.captions(corpus, sides["train"]),
        )
        return []
