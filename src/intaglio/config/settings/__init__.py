"""Everything that a user may set: typed, frozen, each with its default. ``intaglio.config`` reads and checks it."""

from collections.abc import Mapping

from intaglio.config.settings.common import Config, DataConfig, HealthConfig, ImageDataConfig, OptimConfig, TrainConfig
from intaglio.config.settings.grids import GridDataConfig, JepaConfig, JepaLossConfig, JepaModelConfig
from intaglio.config.settings.images import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    AutoencoderModelConfig,
    ConditionConfig,
    DiffusionConfig,
    DiffusionLossConfig,
    DiffusionModelConfig,
    NoiseConfig,
    PictureDataConfig,
    SamplingConfig,
)
from intaglio.config.settings.multimodal import (
    CaptionDataConfig,
    MultimodalConfig,
    MultimodalLossConfig,
    MultimodalModelConfig,
    PriorConfig,
)
from intaglio.config.settings.questions import QuestionDataConfig, VqaConfig, VqaLossConfig, VqaModelConfig

__all__ = [
    "SYSTEMS",
    "AutoencoderConfig",
    "AutoencoderLossConfig",
    "AutoencoderModelConfig",
    "CaptionDataConfig",
    "ConditionConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "DiffusionLossConfig",
    "DiffusionModelConfig",
    "GridDataConfig",
    "HealthConfig",
    "ImageDataConfig",
    "JepaConfig",
    "JepaLossConfig",
    "JepaModelConfig",
    "MultimodalConfig",
    "MultimodalLossConfig",
    "MultimodalModelConfig",
    "NoiseConfig",
    "OptimConfig",
    "PictureDataConfig",
    "PriorConfig",
    "QuestionDataConfig",
    "SamplingConfig",
    "TrainConfig",
    "VqaConfig",
    "VqaLossConfig",
    "VqaModelConfig",
]

SYSTEMS: Mapping[str, type[Config]] = {
    "multimodal": MultimodalConfig,
    "autoencoder": AutoencoderConfig,
    "diffusion": DiffusionConfig,
    "jepa": JepaConfig,
    "vqa": VqaConfig,
}
