"""The multimodal system before it is trained: vocabulary and lengths are those of the recipe, or of the captions."""

from dataclasses import dataclass

import numpy as np
import torch

from intaglio.config import MultimodalConfig, to_dict
from intaglio.data.batches import Batch
from intaglio.data.corpus import Corpus
from intaglio.data.tokenizer import CaptionTokenizer
from intaglio.health.checks.base import Subject
from intaglio.health.rules.static import CaptionFacts
from intaglio.models.cost import parameter_counts
from intaglio.models.multimodal import MultimodalModel
from intaglio.systems.multimodal import MultimodalSystem


@dataclass
class MultimodalSubject(Subject):
    """One latent, an image and a caption."""

    config: MultimodalConfig
    captioned = True
    of_the_data = "real vocabulary, caption lengths, pixels"

    def system(self) -> MultimodalSystem:
        return self._of(self.config.data.text_length, self.config.model.vocabulary)

    def trained(self) -> MultimodalSystem:
        told = self.data and self.data.captions
        return self._of(told.longest, told.vocabulary) if told else self.system()

    def _of(self, text_length: int, vocabulary: int) -> MultimodalSystem:
        config, plain = self.config, to_dict(self.config)
        with torch.device("meta"):
            model = MultimodalModel(plain["model"], plain["prior"], config.data.image_size, text_length, vocabulary)
            return MultimodalSystem(config, config.train.steps or 1, model, {})

    def batch(self, system: MultimodalSystem) -> Batch:
        size, length = system.model.image_size, system.model.text_length
        images = torch.zeros(self.items, 3, size, size, dtype=torch.uint8)
        return Batch(images, torch.ones(self.items, length, dtype=torch.long))

    def modules(self, system: MultimodalSystem) -> dict[str, int]:
        parts = {"prior": system.model.prior, "pairing": system.pairing}
        besides = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        return parameter_counts(system.model.network) | {name: count for name, count in besides.items() if count}

    def captions(self, corpus: Corpus, train: np.ndarray) -> CaptionFacts:
        several = [corpus.captions(i) for i in range(len(corpus))]
        tokenizer = CaptionTokenizer.train((c for i in train for c in several[i]), self.config.model.vocabulary)
        flat = [c for captions in several for c in captions]
        encoded = tokenizer.encode(flat, self.config.data.text_length)
        return CaptionFacts(len(tokenizer), encoded.ids.shape[1], len(flat), encoded.truncated)
