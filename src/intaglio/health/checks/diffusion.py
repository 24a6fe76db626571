"""The diffusion system before it is trained: its autoencoder and its text encoder need not be there yet."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from intaglio.config import AutoencoderModelConfig, DiffusionConfig, MultimodalModelConfig
from intaglio.data.batches import PictureBatch
from intaglio.data.tokenizer import CaptionTokenizer
from intaglio.health.checks.base import Subject
from intaglio.health.finding import Finding
from intaglio.history import Reading, run_folder
from intaglio.models.autoencoder import open_autoencoder
from intaglio.models.cost import parameter_counts
from intaglio.models.diffusion import DiffusionModel
from intaglio.models.prompts import PromptEncoder, Prompts, open_prompts
from intaglio.nn.documented_unet import DocumentedUNet
from intaglio.systems.diffusion import DiffusionSystem, arguments

T = TypeVar("T")

CLASSES = 10
"""How many are assumed of unknown data: engravings and STL-10 have as many."""

CLIP_WIDTH, TEXT_LENGTH = 512, 64
"""Of the documented table, which is that of CLIP ViT-B/32; of a text encoder that is not there."""


@dataclass
class DiffusionSubject(Subject):
    """Images from noise."""

    config: DiffusionConfig
    autoencoder: dict[str, Any] | None = field(default=None, init=False)
    prompts: Prompts | None = field(default=None, init=False)
    of_the_data = "classes, pixels"

    @property
    def captioned(self) -> bool:
        return self.config.condition.by == "text"

    def look(self) -> list[Finding]:
        """Reads the data, and the shapes of the autoencoder and the text encoder, which need not be there."""
        findings, config = super().look(), self.config
        if given := config.model.autoencoder:
            default = {"image_size": config.data.image_size, **asdict(AutoencoderModelConfig())}
            self.autoencoder = self._opened("autoencoder", given, self._autoencoder, findings) or default
        if (given := config.condition.encoder) and config.model.network == "standard":
            self.prompts = self._opened("text encoder", given, _prompts, findings) or _default_prompts()
        if self.data is None and config.condition.by == "class":
            self.unsure.append(f"the number of classes: {CLASSES} are assumed")
        return findings

    def _opened(self, what: str, given: str, read: Callable[[Path], T], findings: list[Finding]) -> T | None:
        """What ``given`` holds; None where nothing is there, or nothing that can be used, which is a finding."""
        if not any(place.exists() for place in (Path(given), Path("runs") / given)):
            self.unsure.append(f"the {what}: {given} is not there, and the default shape is counted in its place")
            return None
        try:
            return read(Path(given))
        except ValueError as error:
            findings.append(Finding("data-unusable", "fail", str(error)))
            return None

    def _autoencoder(self, given: Path) -> dict[str, Any]:
        folder = (given / "config.json").is_file() or (given / "vae").is_dir()
        place = given if folder else run_folder.find(given).whole_model()
        return open_autoencoder(place, self.config.data.image_size).arguments

    def system(self) -> DiffusionSystem:
        config, documented = self.config, self.config.model.network == "documented"
        classes = self.data.classes if self.data and self.data.classes else [str(k) for k in range(CLASSES)]
        if documented and config.condition.by != "class":  # the only condition that it can be built for
            config = replace(config, condition=replace(config.condition, by="class", encoder=""))
        built = arguments(config, classes, self.autoencoder, self.prompts)
        with torch.device("meta"):
            model = DiffusionModel(**built)
            if documented and self.config.condition.by == "text":
                table = torch.zeros(len(classes) + 1, CLIP_WIDTH)
                m = config.model
                model.network = DocumentedUNet(model.x_shape[0], len(classes), m.widths[0], m.dropout, table)
        model.schedule.at(torch.zeros(1, dtype=torch.long), torch.zeros(1))  # it is kept, and the first is to be real
        return DiffusionSystem(config, config.train.steps or 1, model, torch.ones(1))

    def batch(self, system: DiffusionSystem) -> PictureBatch:
        n, model = self.items, system.model
        kind = torch.uint8 if model.autoencoder is None else torch.float32
        prompts = torch.zeros(n, dtype=torch.long)
        if isinstance(model.prompts, PromptEncoder):
            prompts = torch.ones(n, model.prompts.text_length, dtype=torch.long)
        return PictureBatch(torch.zeros(n, *model.x_shape, dtype=kind), torch.zeros(n, dtype=torch.long), prompts)

    def modules(self, system: DiffusionSystem) -> dict[str, int]:
        parts = {"autoencoder": system.model.autoencoder, "text encoder": system.model.prompts}
        besides = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
        return parameter_counts(system.model.network) | {name: count for name, count in besides.items() if count}

    def measured(self, system: DiffusionSystem) -> set[str]:
        return {f"loss/{system.model.prediction}"}  # those by noise level hang on the items

    def readings(self, system: DiffusionSystem) -> Mapping[str, Reading]:
        decided = {f"{site}/{name}": r for site, several in system.decided().items() for name, r in several.items()}
        guided = self.config.condition.by != "none"
        return decided | ({"val/guidance/used": Reading(self.config.sampling.guidance)} if guided else {})


def _prompts(given: Path) -> Prompts:
    return open_prompts(given, [""])


def _default_prompts() -> Prompts:
    m, tokenizer = MultimodalModelConfig(), CaptionTokenizer.train(["a picture"], 300)
    return PromptEncoder(m.width, m.encoder_layers, m.heads, m.feed_forward, TEXT_LENGTH, tokenizer.to_json())
