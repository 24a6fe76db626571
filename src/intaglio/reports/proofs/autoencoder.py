"""Proofs of an image autoencoder: what it gives back of images that it never saw."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from intaglio.data.prepare import Pictured
from intaglio.models.autoencoder import Autoencoder
from intaglio.reports.proofs.pull import pull
from intaglio.reports.sheet import FAINT, MARGIN, Sheet

SHOWN = 12


def make_proofs(model: Autoencoder, prepared: Pictured, folder: Path) -> list[Path]:
    """Writes the pictures and ``proofs.json`` into ``folder``; returns the pictures."""
    makers: dict[str, Callable[[], Sheet]] = {"round-trip": lambda: round_trips(model, prepared)}
    return pull(model, makers, lambda name: None, folder)


def round_trips(model: Autoencoder, prepared: Pictured) -> Sheet:
    """Held-out images, what is decoded from their latents, and where the two differ; the worst of many last."""
    items = prepared.some("val", 256)
    real = prepared.data.images[items]
    made = np.concatenate([_there_and_back(model, real[at : at + 64]) for at in range(0, len(real), 64)])
    error = np.square((made.astype(np.float64) - real) / 255).mean((1, 2, 3))
    worst = np.argsort(error)[-SHOWN // 3 :]
    first = [k for k in range(len(items)) if k not in set(worst.tolist())][: SHOWN - len(worst)]
    sheet = Sheet(
        "Unseen images, and what the autoencoder gives back",
        f"Of each three: a held-out image, what is decoded from its latent of "
        f"{' × '.join(map(str, model.latent_shape))} numbers, and where they differ, four times as strong. Look for "
        f"lines that are lost. The last {len(worst)} are the worst of {len(items)}.",
    )
    side, room, top = 0.72, 2.35, sheet.y
    for place, k in enumerate([*first, *worst]):
        x, y = MARGIN + place % 4 * room, top + place // 4 * 1.05
        apart = np.clip(4 * np.abs(made[k].astype(int) - real[k]), 0, 255).astype(np.uint8)
        for column, image in enumerate((real[k], made[k], 255 - apart)):
            sheet.picture(x + column * (side + 0.03), y, side, image)
        psnr = -10 * np.log10(max(error[k], 1e-12))
        name = prepared.corpus.id(int(items[k]))
        sheet.text(x, y + side + 0.05, f"{name}: {psnr:.1f} dB", room - 0.15, size=7, colour=FAINT, lines=1)
        sheet.told.append(f"Item {name}: {psnr:.1f} dB.")
    return sheet


@torch.no_grad()
def _there_and_back(model: Autoencoder, images: np.ndarray) -> np.ndarray:
    """decode(encode(x)); before the latents' statistics are there it needs none."""
    x = model.image(model.posterior(model.to_range(images)).mean)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
