"""What an engraving shows: a few things on distinct cells of a 3 x 3 grid, their shading, the paper and the ink."""

import random
from dataclasses import dataclass
from typing import Any

from intaglio.data.engravings.shapes import ART

KINDS: dict[str, tuple[str, ...]] = {
    "ship": ("sloop", "galleon", "steamer"),
    "tower": ("lighthouse", "turret", "steeple"),
    "tree": ("oak", "pine", "palm"),
    "house": ("cottage", "townhouse"),
    "moon": ("crescent", "full"),
    "fish": ("carp", "pike", "angelfish"),
    "vase": ("amphora", "jug", "urn"),
    "mountain": ("peak", "volcano", "ridge"),
    "bird": ("swallow", "owl", "swan"),
    "wheel": ("cartwheel", "cogwheel"),
}
PLACES = (
    *("upper left", "top", "upper right"),
    *("left", "middle", "right"),
    *("lower left", "bottom", "lower right"),
)
TECHNIQUES = ("hatching", "crossing", "stippling", "contour", "solid")
EXTENTS = {"great": 0.62, "large": 0.48, "small": 0.33, "tiny": 0.24}  # longer side, as a share of the frame
PAPERS = {
    "ivory": (246, 238, 218),
    "grey": (206, 207, 208),
    "buff": (224, 196, 150),
    "rose": (236, 200, 196),
    "blue": (184, 205, 224),
    "green": (194, 214, 182),
}
INKS = {"black": (26, 24, 26), "sepia": (100, 54, 22), "indigo": (32, 40, 112)}
GROUNDS = ("bare", "earth", "water")
SKIES = ("clear", "ruled")

MARGIN = 0.045  # between the frame and any thing
JITTER = 0.03
OVERLAP = 0.06  # largest share of a smaller thing's box that another box may cover
HOME = {"moon": (6, 3, 1), "bird": (5, 4, 2), "fish": (1, 3, 5)}  # weights of the rows, top to bottom


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. ``x, y`` is its centre and ``extent`` its longer side, in shares of the frame, y downwards."""

    kind: str
    variant: str
    size: str
    place: str
    technique: str
    x: float
    y: float
    extent: float
    flip: bool

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        w, h = (half * self.extent for half in ART[self.variant].half)
        return self.x - w, self.y - h, self.x + w, self.y + h


@dataclass(frozen=True, slots=True)
class Scene:
    """The factors of one engraving. ``things`` stand in the order in which words name them: by size, then by place."""

    things: tuple[Thing, ...]
    paper: str
    ink: str
    ground: str
    sky: str

    def factors(self) -> dict[str, Any]:
        """The facts as plain JSON values."""
        names = ("kind", "variant", "size", "place", "technique", "x", "y", "extent", "flip")
        things = [{name: getattr(thing, name) for name in names} for thing in self.things]
        return {"things": things, "paper": self.paper, "ink": self.ink, "ground": self.ground, "sky": self.sky}


def sample_scene(seed: int, index: int) -> Scene:
    """Scene number ``index`` of the endless series ``seed``: a pure function of both."""
    rng = random.Random(f"{seed}/{index}")
    kinds = rng.sample(tuple(KINDS), rng.choice((1, 2, 2, 3, 3)))
    things: list[Thing] = []
    for kind in kinds:
        size = rng.choice(("small", "tiny") if things else ("great", "large"))
        thing = place_thing(rng, kind, size, things)
        if thing is not None:
            things.append(thing)
    order = sorted(things, key=lambda t: (tuple(EXTENTS).index(t.size), PLACES.index(t.place)))
    paper, ink = rng.choice(tuple(PAPERS)), rng.choice(tuple(INKS))
    return Scene(tuple(order), paper, ink, rng.choice(GROUNDS), rng.choice(SKIES))


def place_thing(rng: random.Random, kind: str, size: str, others: list[Thing]) -> Thing | None:
    """A thing of ``kind`` on a cell where it hardly covers the others, or None where no cell is free."""
    variant, technique, flip = rng.choice(KINDS[kind]), rng.choice(TECHNIQUES), rng.random() < 0.5
    extent = EXTENTS[size] * rng.uniform(0.96, 1.04)
    half_w, half_h = (half * extent for half in ART[variant].half)
    rows = HOME.get(kind, (1, 3, 4))
    cells = sorted(range(9), key=lambda cell: rng.random() ** (1 / rows[cell // 3]), reverse=True)
    for cell in cells:
        row, column = divmod(cell, 3)
        x = inside((column + 0.5) / 3 + rng.uniform(-JITTER, JITTER), half_w)
        y = inside((row + 0.5) / 3 + rng.uniform(-JITTER, JITTER), half_h)
        thing = Thing(kind, variant, size, PLACES[cell], technique, x, y, extent, flip)
        if all(other.place != thing.place and covered(thing, other) <= OVERLAP for other in others):
            return thing
    return None


def inside(centre: float, half: float) -> float:
    """``centre``, moved as far as a thing of this half width needs to stay inside the frame."""
    return min(max(centre, MARGIN + half), 1 - MARGIN - half)


def covered(thing: Thing, other: Thing) -> float:
    """Share of the smaller box that lies in the other one."""
    (a, b, c, d), (e, f, g, h) = thing.box, other.box
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    return shared / min((c - a) * (d - b), (g - e) * (h - f))
