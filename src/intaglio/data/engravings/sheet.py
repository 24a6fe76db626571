"""A sheet of engravings with their captions: ``python -m intaglio.data.engravings.sheet docs/engravings.png``."""

import sys
import textwrap
from itertools import count
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from intaglio.data.engravings.draw import render
from intaglio.data.engravings.grammar import TEMPLATES
from intaglio.data.engravings.scene import KINDS, PAPERS, TECHNIQUES, Scene, sample_scene

PAGE, TEXT, FAINT = (252, 250, 245), (38, 34, 32), (128, 120, 110)
TITLE = "intaglio: the built-in engravings"
LEGEND = (
    "Each picture is drawn from numbers, and each caption is true of it. Columns: the ten kinds of main object. "
    "Rows: the six papers. The five ways of shading run along the diagonals."
)


def choose(row: int, column: int) -> Scene:
    """The first scene of series 0 with the kind of this column, the paper of this row and the shading of both."""
    kind, paper = tuple(KINDS)[column % len(KINDS)], tuple(PAPERS)[row % len(PAPERS)]
    technique = TECHNIQUES[(row + column) % len(TECHNIQUES)]
    for index in count(1000 * (row // len(PAPERS) + column // len(KINDS))):
        scene = sample_scene(0, index)
        main = scene.things[0]
        if (main.kind, scene.paper, main.technique) == (kind, paper, technique):
            return scene
    raise AssertionError("the series has no end")


def contact_sheet(path: str | Path, rows: int = 6, columns: int = 10, size: int = 192) -> None:
    """Write ``rows`` x ``columns`` engravings of ``size`` pixels with a caption under each as one PNG."""
    gap, head = size // 8, size // 2
    small, large = (ImageFont.load_default(size * share) for share in (0.062, 0.16))
    line = size * 0.078
    foot = round(4.6 * line)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, head + rows * (size + foot + gap)), PAGE)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap * 0.7), TITLE, TEXT, large)
    draw.text((gap, gap * 0.7 + size * 0.21), LEGEND, FAINT, small)
    for row in range(rows):
        for column in range(columns):
            scene = choose(row, column)
            x, y = gap + column * (size + gap), head + row * (size + foot + gap)
            sheet.paste(Image.fromarray(render(scene, size)), (x, y))
            caption = TEMPLATES[(row * 3 + column) % len(TEMPLATES)](scene)
            for number, words in enumerate(textwrap.wrap(caption, 34)):
                draw.text((x, y + size + line * (0.35 + number)), words, TEXT, small)
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    contact_sheet(sys.argv[1])
