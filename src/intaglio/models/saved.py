"""Trained models in folders, whichever system they are of."""

import json
from pathlib import Path

from intaglio.history.run_folder import RunFolder
from intaglio.models.autoencoder import Autoencoder, open_autoencoder
from intaglio.models.diffusion import DiffusionModel, open_diffusion
from intaglio.models.jepa import JepaModel, open_jepa
from intaglio.models.multimodal import MultimodalModel, open_model
from intaglio.models.vqa import VqaModel, open_vqa

Model = MultimodalModel | Autoencoder | DiffusionModel | JepaModel | VqaModel


def of_run(run: RunFolder) -> Model:
    """The trained model of a run, with its averaged weights.

    Raises:
        ValueError: the run has not finished, or its model is damaged.
    """
    return open_saved(run.whole_model())


def open_saved(folder: Path) -> Model:
    """The model that ``save_pretrained`` wrote into a folder.

    Raises:
        ValueError: it is none of ours, or a file of it is cut short, damaged or missing.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no model that can be read ({error}); name a run that has finished.") from None
    if "noise" in settings:
        return open_diffusion(folder)
    if "question_lengths" in settings:
        return open_vqa(folder)
    if "pairs" in settings:
        return open_jepa(folder)
    return open_model(folder) if "prior" in settings else open_autoencoder(folder)
