"""From a scene to pixels. Everything is drawn enlarged in black and white, as a plate is, and then reduced once.

Shading is one comparison: an ink line stands wherever a periodic field is lower than the tone there, so lines swell
with the shadow. Fields are equalised, so that a tone means the same amount of ink under every technique. Integers,
exact arithmetic and tables decide every pixel: an image is the same in every process.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from intaglio.data.engravings.scene import INKS, PAPERS, Scene, Thing
from intaglio.data.engravings.shapes import ART, Use

PERIOD = 0.036  # distance of two lines, as a share of the frame
LINE, HALO = 0.0075, 0.025  # widths of an outline and of the clear paper around it
RULE, HORIZON = 3 / 64, 0.79  # distance of the lines of sky and ground; where the ground begins
GONE, CUT, INKED = 0, 1, 255  # values of a thing's stencil: not part of it, paper, ink; all others are levels
FINE, SPAN = 160, 1.25  # pixels and units of the pictures kept for every variant
REACH = 0.25  # largest distance from an edge, in units, that contour lines know
BEVEL = 0.18  # distance from an edge, in units, over which a body rounds off
RELIEF, STEEP = 105, 4.4  # tone of level ground in a relief, and change of tone with its slope


def render(scene: Scene, size: int) -> np.ndarray:
    """The engraving as uint8 (size, size, 3)."""
    factor = 4 if size <= 256 else 2
    plate = background(size * factor, scene.ground, scene.sky).copy()
    for thing in scene.things:
        engrave(plate, thing)
    ink = np.asarray(Image.fromarray(plate).reduce(factor))
    return inking(scene.paper, scene.ink)[ink + grain(size)]


def engrave(plate: np.ndarray, thing: Thing) -> None:
    """Draw a thing into the plate, uint8 (N, N), 255 where ink stands."""
    n, solid = len(plate), thing.technique == "solid"
    pad = HALO + LINE
    left, top, right, bottom = thing.box
    x0, y0 = max(int((left - pad) * n), 0), max(int((top - pad) * n), 0)
    x1, y1 = min(int((right + pad) * n) + 1, n), min(int((bottom + pad) * n) + 1, n)
    shape, centre, scale = (x1 - x0, y1 - y0), (thing.x * n - x0, thing.y * n - y0), thing.extent * n
    stencil = cut_stencil(thing.variant, shape, (-scale if thing.flip else scale, scale), centre, n, solid)
    if solid:
        ink = SOLID[stencil]
    else:
        tone = TONE[stencil] + fitted(relief(thing.variant, thing.flip), shape, centre, scale)
        if thing.technique == "contour":
            lines = triangle(np.arange(256) / 255 * REACH * thing.extent / PERIOD).astype(np.uint8)
            field = lines[fitted(depth(thing.variant, thing.flip), shape, centre, scale)]
        else:
            field = tile(thing.technique, n)[y0:y1, x0:x1]
        ink = (tone > field).view(np.uint8) * np.uint8(255)
    np.copyto(plate[y0:y1, x0:x1], ink, where=stencil != GONE)


TONE = np.arange(256, dtype=np.int16) - RELIEF
TONE[CUT], TONE[INKED] = -999, 999
SOLID = np.full(256, 255, dtype=np.uint8)
SOLID[CUT] = 0


def cut_stencil(
    variant: str, shape: tuple[int, int], scale: tuple[float, float], centre: tuple[float, float], n: int, solid: bool
) -> np.ndarray:
    """What stands where: levels of bodies, INKED lines, CUT paper and GONE surroundings. uint8 (height, width)."""
    art = ART[variant]
    points = (art.points * scale + centre).ravel().tolist()
    image = Image.new("L", shape, GONE)
    draw = ImageDraw.Draw(image)
    width, halo = max(round(LINE * n), 1), round(HALO * n)
    detail = CUT if solid else INKED
    for use, start, end, _ in art.marks:
        if use in ("body", "dark"):
            draw.line(points[2 * start : 2 * end] + points[2 * start : 2 * start + 4], fill=CUT, width=halo)
    for use, start, end, level in art.marks:
        outline = points[2 * start : 2 * end]
        _paint(draw, use, outline, level, detail, width)
    return np.asarray(image)


def _paint(draw: ImageDraw.ImageDraw, use: Use, outline: list[float], level: int, detail: int, width: int) -> None:
    if use == "line":
        draw.line(outline, fill=detail, width=width)
        return
    draw.polygon(outline, fill={"body": level, "dark": detail, "gap": GONE}[use])
    if use != "dark":
        draw.line(outline + outline[:4], fill=detail, width=width)


def fitted(image: Image.Image, shape: tuple[int, int], centre: tuple[float, float], scale: float) -> np.ndarray:
    """A picture of ``SPAN`` units, enlarged to ``scale`` pixels per unit about ``centre``. uint8 (height, width)."""
    unit = image.width / (SPAN * scale)
    left, top = image.width / 2 - centre[0] * unit, image.height / 2 - centre[1] * unit
    area = (left, top, left + shape[0] * unit, top + shape[1] * unit)
    return np.asarray(image.transform(shape, Image.Transform.EXTENT, area, Image.Resampling.BILINEAR))


@lru_cache(maxsize=64)
def depth(variant: str, flip: bool) -> Image.Image:
    """Distance to the nearest edge inside a variant, 255 at ``REACH``; the image is ``SPAN`` units wide."""
    unit = FINE / SPAN
    stencil = cut_stencil(variant, (FINE, FINE), (-unit if flip else unit, unit), (FINE / 2, FINE / 2), FINE, False)
    empty = (stencil == GONE) | (stencil == CUT) | (stencil == INKED)
    rows = np.arange(FINE)
    gaps = (rows[:, None] - rows) ** 2
    down = np.where(empty[None], gaps[:, :, None], FINE * FINE).min(axis=1)
    squared = (down[:, None, :] + gaps[None]).min(axis=2)
    return Image.fromarray(np.minimum(np.sqrt(squared) * (255 / unit / REACH), 255).astype(np.uint8))


@lru_cache(maxsize=64)
def relief(variant: str, flip: bool) -> Image.Image:
    """How dark a variant's slopes are when light falls from the upper left: ``RELIEF`` is level ground."""
    away = np.minimum(np.asarray(depth(variant, flip)) / 255 * REACH / BEVEL, 1)
    domed = Image.fromarray((away * (2 - away) * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(3))
    down, across = np.gradient(np.asarray(domed).astype(np.float64))
    y, x = np.mgrid[-1 : 1 : FINE * 1j, -1 : 1 : FINE * 1j]
    dark = RELIEF - STEEP * (0.55 * across + 0.85 * down) + 22 * x + 34 * y
    return Image.fromarray(np.clip(dark, 0, 255).astype(np.uint8))


def triangle(phase: np.ndarray) -> np.ndarray:
    """0 on whole numbers, 255 halfway between."""
    return np.abs(phase - np.round(phase)) * 510


def interlined(phase: np.ndarray) -> np.ndarray:
    """Lines with finer ones between them in the shadow."""
    return np.minimum(triangle(phase), 120 + 1.9 * triangle(phase + 0.5))


def equalised(field: np.ndarray) -> np.ndarray:
    """The field as uint8, each value equally frequent."""
    values = np.clip(field, 0, 255).astype(np.uint8)
    share = np.cumsum(np.bincount(values.ravel(), minlength=256)) * 255 // values.size
    return share.astype(np.uint8)[values]


@lru_cache(maxsize=32)
def wobble(n: int, seed: int, cells: int = 12) -> np.ndarray:
    """Smooth noise in [-1, 1), float (n, n): what an unsteady hand adds."""
    lattice = np.random.default_rng(seed).integers(0, 256, (cells, cells), dtype=np.uint8)
    return np.asarray(Image.fromarray(lattice).resize((n, n), Image.Resampling.BICUBIC)) / 128 - 1


@lru_cache(maxsize=32)
def tile(technique: str, n: int) -> np.ndarray:
    """The field of a technique over the whole frame, uint8 (n, n)."""
    y, x = np.mgrid[0:n, 0:n] / (n * PERIOD)
    hand = 0.08 * wobble(n, 1)
    if technique == "hatching":
        return equalised(interlined(0.5 * x + 0.866 * y + hand))
    if technique == "crossing":
        return equalised(np.minimum(triangle(0.707 * (x + y) + hand), triangle(0.707 * (x - y) + hand)))
    assert technique == "stippling", technique
    # dots grow with the square of the tone, or they would run together in the shadow
    return np.sqrt(equalised(stipple(x, y)) * 255.0).astype(np.uint8)


def stipple(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the nearest of the dots, which stand unevenly on a staggered grid."""
    count = int(x.max()) + 4
    shift = np.random.default_rng(2).integers(-12, 13, (2, count, count)) / 100
    nearest = np.full(x.shape, np.inf)
    row, column = np.floor(y).astype(int), np.floor(x).astype(int)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            r, c = row + i, column + j
            dx, dy = shift[:, r % count, c % count]
            nearest = np.minimum(nearest, (c + 0.5 + dx + 0.25 * (r % 2 * 2 - 1) - x) ** 2 + (r + 0.5 + dy - y) ** 2)
    return np.sqrt(nearest) * 255


@lru_cache(maxsize=32)
def background(n: int, ground: str, sky: str) -> np.ndarray:
    """Ground and sky, uint8 (n, n), 255 where ink stands."""
    y, x = np.mgrid[0:n, 0:n] / n
    ink = np.zeros((n, n), dtype=bool)
    within = np.abs(x - 0.5) < 0.46
    if sky == "ruled":
        field = triangle(y / RULE + 0.05 * wobble(n, 3))
        ink |= (field < 56 - 84 * y + 8 * wobble(n, 7, 24)) & within & (y > 0.04)
    below = within & (y > HORIZON) & (y < 0.96)
    if ground == "earth":
        field = triangle((0.8 * x + 0.6 * y) / RULE * 1.4 + 0.1 * wobble(n, 5))
        reach = HORIZON + 0.09 + 0.09 * wobble(n, 4, 9)[n // 2]
        ink |= below & ((field < 900 * (reach - y)) | (y < HORIZON + LINE))
    if ground == "water":
        rise = triangle(x / 0.14) / 255
        field = triangle((y - HORIZON) / RULE * 1.15 - 0.3 + 0.55 * rise * rise * (3 - 2 * rise) + 0.1 * wobble(n, 8))
        ink |= below & (field < 40 + 60 * rise)
    return ink.view(np.uint8) * np.uint8(255)


@lru_cache(maxsize=16)
def grain(size: int) -> np.ndarray:
    """Faint mottling and the mark of the plate's edge, in units of ink (of 255): uint16 (size, size)."""
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size
    outside = np.maximum(np.abs(x - 0.5), np.abs(y - 0.5)) > 0.48
    return (4 + 4 * wobble(size, 6, 90) + 14 * outside).astype(np.uint16)


@lru_cache(maxsize=32)
def inking(paper: str, ink: str) -> np.ndarray:
    """Colour by amount of ink: uint8 (288, 3)."""
    amount = np.minimum(np.arange(288), 255)[:, None]
    return ((np.array(PAPERS[paper]) * (255 - amount) + np.array(INKS[ink]) * amount) // 255).astype(np.uint8)
