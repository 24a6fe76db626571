"""Pulling proofs: pictures of a model that leave no trace in it, and a record of what they show.

``proofs.json`` beside the pictures says in words what each shows, and what was skipped and why.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from intaglio.health.record import Record
from intaglio.reports.sheet import Sheet

AFTER_TRAINING = "made when training has ended"
WHILE_TRAINING = "an independent classifier is there when training has ended"
UNMEASURED = Record({})


def pull(
    model: nn.Module,
    makers: Mapping[str, Callable[[], Sheet]],
    why_not: Callable[[str], str | None],
    folder: Path,
) -> list[Path]:
    """Writes ``<name>.png`` of each maker, unless ``why_not(name)`` gives a reason, and ``proofs.json``: the pictures.

    Every module's train or eval mode and the global generator are left as they were found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training = [module for module in model.modules() if module.training]
    model.eval()
    skipped = {name: reason for name in makers if (reason := why_not(name)) is not None}
    try:
        with torch.random.fork_rng(devices=[]):
            made = {name: make() for name, make in makers.items() if name not in skipped}
    finally:
        for module in training:
            module.training = True
    for name, sheet in made.items():
        sheet.save(folder / f"{name}.png")
    told = {
        f"{name}.png": {"title": sheet.title, "look_for": sheet.look_for, "told": sheet.told}
        for name, sheet in made.items()
    }
    record = json.dumps({"pictures": told, "skipped": skipped}, indent=2, ensure_ascii=False)
    (folder / "proofs.json").write_text(record + "\n", encoding="utf-8")
    return [folder / name for name in told]
