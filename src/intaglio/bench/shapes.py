"""Captioned pictures of a shape in a colour on a side, which are learnt in seconds: nothing in them is hidden."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "bar")


def write_shapes(folder: Path, count: int, seed: int = 0) -> Path:
    """``count`` images of 32 by 32 pixels with a ``metadata.csv`` (file_name, caption, label); the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random, rows = np.random.default_rng(seed), ["file_name,caption,label"]
    for k in range(count):
        colour, shape = random.choice(list(COLOURS)), random.choice(SHAPES)
        x, y, size = (int(v) for v in random.integers((2, 2, 12), (12, 12, 18)))
        image = Image.new("RGB", (32, 32), tuple(int(v) for v in random.integers(200, 255, 3)))
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            draw.ellipse((x, y, x + size, y + size), fill=COLOURS[colour])
        else:
            top, low = (y, y + size) if shape == "square" else (y + size // 2 - 2, y + size // 2 + 2)
            draw.rectangle((x, top, x + size, low), fill=COLOURS[colour])
        image.save(folder / f"{k}.png")
        rows.append(f"{k}.png,a {colour} {shape} on the {'left' if x + size / 2 < 16 else 'right'},{shape}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def ask_shapes(folder: Path, count: int, seed: int = 0) -> Path:
    """The same images with a ``questions.csv``: which colour, which shape, which side, and one that asks for a yes."""
    folder.mkdir(parents=True, exist_ok=True)
    random, rows = np.random.default_rng((seed, 1)), ["img_id,question,answer,type"]
    told = (write_shapes(folder / "images", count, seed) / "metadata.csv").read_text(encoding="utf-8").splitlines()[1:]
    for file, caption, shape in (line.split(",") for line in told):
        colour, side, asked = caption.split()[1], caption.split()[-1], random.choice(list(COLOURS))
        rows += [
            f"{file},what colour is the {shape}?,{colour},colour",
            f"{file},what is on the {side}?,{shape},shape",
            f"{file},on which side is the {colour} thing?,{side},side",
            f"{file},is the {shape} {asked}?,{'yes' if asked == colour else 'no'},yes or no",
        ]
    (folder / "questions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
