"""What a system must give for its recipes to be checked before they are trained."""

from collections.abc import Mapping

from intaglio.config import Config
from intaglio.health.checks.autoencoder import AutoencoderSubject
from intaglio.health.checks.base import Subject
from intaglio.health.checks.diffusion import DiffusionSubject
from intaglio.health.checks.jepa import JepaSubject
from intaglio.health.checks.multimodal import MultimodalSubject
from intaglio.health.checks.vqa import VqaSubject

__all__ = ["SUBJECTS", "Subject", "subject_of"]

SUBJECTS: Mapping[str, type[Subject]] = {
    "multimodal": MultimodalSubject,
    "autoencoder": AutoencoderSubject,
    "diffusion": DiffusionSubject,
    "jepa": JepaSubject,
    "vqa": VqaSubject,
}


def subject_of(config: Config) -> Subject:
    """The configuration as it is checked."""
    return SUBJECTS[config.system](config)
