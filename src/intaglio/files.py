"""Images and folders that the verbs read and write.

Shapes: N images, S image side.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from intaglio.data.pixels import SUFFIXES, UnreadableImage, read_image

BATCH = 64
"""Images that are in memory at once."""


@dataclass
class Skipped:
    """Files that could not be used, each with the reason: nothing is left out silently."""

    reasons: dict[str, str] = field(default_factory=dict)


def image_files(paths: Sequence[str | Path]) -> Iterator[Path]:
    """Images of files and folders, those of a folder sorted.

    Raises:
        ValueError: there is none.
    """
    for given in map(Path, paths):
        if given.is_dir():
            visible = (p for p in given.rglob("*") if not any(n.startswith(".") for n in p.relative_to(given).parts))
            inside = sorted(p for p in visible if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"{given} holds no images ({', '.join(sorted(SUFFIXES))}).")
            yield from inside
        elif given.is_file():
            yield given
        else:
            raise ValueError(f"There is no file or folder {given}.")


def image_batches(
    paths: Sequence[str | Path], size: int, skipped: Skipped | None = None
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and pixels (≤ 64, S, S, 3) of image files. An unreadable one is noted in ``skipped``, or ends the work."""
    names: list[str] = []
    pixels: list[np.ndarray] = []
    for path in image_files(paths):
        try:
            image, _ = read_image(path, size)
        except UnreadableImage as error:
            if skipped is None:
                raise
            skipped.reasons[str(path)] = str(error)
            continue
        names.append(str(path))
        pixels.append(image)
        if len(names) == BATCH:
            yield names, np.stack(pixels)
            names, pixels = [], []
    if names:
        yield names, np.stack(pixels)


def free_folder(out: str | Path) -> Path:
    """A folder that holds nothing, or is not there yet."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and isn't empty; name another folder with --out.")
    return folder


def new_folder(out: str | Path) -> Path:
    """An empty folder to write into."""
    folder = free_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line of JSON for each."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def contact_sheet(images: np.ndarray, columns: int, gap: int = 4) -> Image.Image:
    """Images (N, S, S, 3) in rows on white."""
    n, side = len(images), images.shape[1] + gap
    rows = -(-n // columns)
    sheet = np.full((rows * side + gap, min(n, columns) * side + gap, 3), 255, np.uint8)
    for k, image in enumerate(images):
        y, x = k // columns * side + gap, k % columns * side + gap
        sheet[y : y + side - gap, x : x + side - gap] = image
    return Image.fromarray(sheet)
