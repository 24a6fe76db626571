"""What training needs of each system besides its loss: data, weights, measurements, proofs."""

from collections.abc import Mapping

from intaglio.config import Config
from intaglio.training.kinds.autoencoder import AutoencoderKind
from intaglio.training.kinds.base import Kind
from intaglio.training.kinds.diffusion import DiffusionKind
from intaglio.training.kinds.jepa import JepaKind
from intaglio.training.kinds.multimodal import MultimodalKind
from intaglio.training.kinds.vqa import VqaKind

__all__ = ["KINDS", "Kind", "kind_of"]

KINDS: Mapping[str, type[Kind]] = {
    "multimodal": MultimodalKind,
    "autoencoder": AutoencoderKind,
    "diffusion": DiffusionKind,
    "jepa": JepaKind,
    "vqa": VqaKind,
}


def kind_of(config: Config) -> Kind:
    """The kind of the configuration's system."""
    return KINDS[config.system](config)
