"""Inputs of generated tasks: a few objects on a background, never noise, laid out as the task's program needs them.

Shapes: n scenes, K objects of a scene at most, S the side of the table.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from intaglio.data.arc.program import ODD_COLOUR, PRIMITIVES
from intaglio.data.arc.tasks import OUTSIDE

SMALLEST, SIDE = 6, 14  # of a grid
OBJECTS, DOTS = 4, 2  # most of each in a scene; a dot is one cell
BOX = 5  # side of the square that holds any shape
ABSENT, RING, OPEN_RING, TOUCHING = -1, 10, 11, 12  # kinds of shapes; 0 … 9 are areas of 1 … 10 cells
_EACH = 200  # shapes of each kind


class Shapes(NamedTuple):
    """Shapes in their upper left corner: ``masks`` (13 × 200, 5, 5), 1, and 2 for what touches it; ``bits`` of their
    rows (…, 5) uint32, lowest to the left; ``extents`` (…, 2), height and width."""

    masks: np.ndarray
    bits: np.ndarray
    extents: np.ndarray


@lru_cache(maxsize=1)
def shapes() -> Shapes:
    """The same shapes in every process: areas of 1 … 10 cells, closed outlines, open ones, pairs that touch."""
    rng = np.random.default_rng(0)
    areas = [_grown(rng, np.full(_EACH, cells)) for cells in range(1, 11)]
    inner = np.pad(_grown(rng, rng.integers(1, 8, _EACH), BOX - 2), ((0, 0), (1, 1), (1, 1)))
    rings = _near(inner, corners=True) & ~inner
    gaps = _one_of(rng, rings & _near(inner))
    first = _grown(rng, rng.integers(2, 6, _EACH))
    start = _one_of(rng, _near(first) & ~first)
    second = _grown(rng, rng.integers(2, 6, _EACH), BOX, start, ~first)
    masks = np.concatenate([*areas, rings, rings & ~gaps, first + 2 * second]).astype(np.uint8)
    for mask in masks:
        top, left = mask.any(1).argmax(), mask.any(0).argmax()
        mask[...] = np.roll(mask, (-top, -left), (0, 1))
    bits = ((masks > 0) << np.arange(BOX)).sum(2).astype(np.uint32)
    extents = np.stack([masks.any(2).sum(1), masks.any(1).sum(1)], axis=1)
    return Shapes(masks, bits, extents)


def _near(cells: np.ndarray, corners: bool = False) -> np.ndarray:
    """The cells (…, s, s) and those beside them."""
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    if corners:
        return rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:]
    return rows[:, :, 1:-1] | padded[:, 1:-1, :-2] | padded[:, 1:-1, 2:]


def _one_of(rng: np.random.Generator, cells: np.ndarray) -> np.ndarray:
    """One cell of those given, (n, s, s), drawn for each; none where none is given."""
    scores = (rng.random(cells.shape) * cells).reshape(len(cells), -1)
    chosen = np.zeros_like(scores, dtype=bool)
    chosen[np.arange(len(cells)), scores.argmax(1)] = scores.any(1)
    return chosen.reshape(cells.shape)


def _grown(
    rng: np.random.Generator,
    cells: np.ndarray,
    side: int = BOX,
    start: np.ndarray | None = None,
    free: np.ndarray | None = None,
) -> np.ndarray:
    """Areas of so many ``cells`` (n,), grown cell by cell from ``start`` where it is ``free``. bool (n, side, side)."""
    free = np.ones((len(cells), side, side), bool) if free is None else free
    area = _one_of(rng, free) if start is None else start.copy()
    for grown in range(1, int(cells.max())):
        area |= _one_of(rng, _near(area) & free & ~area & (cells > grown)[:, None, None])
    return area


@dataclass
class Plan:
    """What stands in n scenes: ``kinds`` (n, K) of shapes, ``colours`` (n, K, 3) by number in ``Shapes.masks``,
    ``sizes`` (n, 2) of the grids, ``margins`` (n, 4) left clear at top, bottom, left and right."""

    kinds: np.ndarray
    colours: np.ndarray
    sizes: np.ndarray
    margins: np.ndarray


def plan(rng: np.random.Generator, steps: np.ndarray, parameters: np.ndarray, palette: np.ndarray) -> Plan:
    """Objects that the program ``steps`` (n, 3) with ``parameters`` (n, 3, 2) acts on, beside some that it ignores.

    ``palette`` (n, 5): the colours that objects may have.
    """
    has = {name: (steps == k).any(1) for k, name in enumerate(PRIMITIVES)}
    given = {name: (parameters * (steps == k)[..., None]).sum(1) for k, name in enumerate(PRIMITIVES)}
    odd = has["extract"] & (given["extract"][:, 0] == ODD_COLOUR)
    down, right = given["translate"].T
    return Plan(
        _kinds(rng, has, given["threshold"][:, 0], odd),
        _colours(rng, has, given["recolour"][:, 0], odd, palette),
        rng.integers(SMALLEST, SIDE + 1, (len(steps), 2)),
        np.stack([-down, down, -right, right], axis=1).clip(0),
    )


def _kinds(rng: np.random.Generator, has: dict[str, np.ndarray], least: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """Kinds of shapes, (n, K): the first objects are those that a program needs."""
    n = len(odd)
    kinds = np.concatenate([rng.integers(1, 8, (n, OBJECTS)), np.zeros((n, DOTS), np.int64)], axis=1)
    count = rng.integers(1, OBJECTS + 1, n)

    largest = has["extract"] & ~odd
    kinds[largest, :OBJECTS] = rng.integers(0, 4, (int(largest.sum()), OBJECTS))
    kinds[largest, 0] = rng.integers(6, 10, int(largest.sum()))

    sieve, fill, touch = has["threshold"], has["flood-fill"], has["merge"]
    small = np.where(fill & touch, 2, 1)
    kinds[sieve, 0] = least[sieve] - 1 + rng.integers(0, 4, int(sieve.sum()))
    kinds[sieve, small[sieve]] = rng.integers(0, least[sieve] - 1)

    others, drawn = kinds[:, 1:OBJECTS], rng.random((n, OBJECTS - 1))
    others[(fill & ~largest)[:, None] & (drawn < 0.35)] = OPEN_RING
    others[(fill & ~largest)[:, None] & (drawn < 0.15)] = RING
    others[(touch & ~largest)[:, None] & (drawn > 0.75)] = TOUCHING
    kinds[fill, 0] = RING
    kinds[touch, 0] = TOUCHING
    kinds[fill & touch, 1] = RING

    needed = 1 + (largest | sieve | touch) + 2 * odd + (fill & touch & sieve)
    absent = np.arange(OBJECTS) >= np.maximum(count, needed)[:, None]
    kinds[np.concatenate([absent, rng.random((n, DOTS)) > 0.25], axis=1)] = ABSENT
    return kinds


def _colours(
    rng: np.random.Generator, has: dict[str, np.ndarray], old: np.ndarray, odd: np.ndarray, palette: np.ndarray
) -> np.ndarray:
    """Colours (n, K, 3) of each object and of what touches it, after 0."""
    n, wide = palette.shape
    which = rng.integers(0, wide, (n, OBJECTS + DOTS))
    alike = has["invert-palette"] & ~has["merge"] & ~has["recolour"]
    which[alike | odd] = which[alike | odd, :1]
    which[odd, 0] += rng.integers(1, wide, int(odd.sum()))
    first = np.take_along_axis(palette, which % wide, 1)
    marked = has["recolour"][:, None] & (rng.random(which.shape) < 0.25)
    marked[:, 0] = has["recolour"]
    first = np.where(marked, old[:, None], first)
    return np.stack([np.zeros_like(first), first, np.take_along_axis(palette, (which + 1) % wide, 1)], axis=2)


def drawn(rng: np.random.Generator, plan: Plan) -> np.ndarray:
    """The planned scenes, uint8 (n, S, S): shapes on free places, a cell at least between any two.

    A shape that finds no place is left out.
    """
    n, every, place = len(plan.sizes), np.arange(len(plan.sizes)), np.arange(SIDE, dtype=np.uint32)
    known = shapes()
    grids = np.zeros((n, SIDE + BOX, SIDE + BOX), np.uint8)
    taken = np.zeros((n, SIDE + BOX + 2), np.uint32)  # rows from −1 on, columns from −1 on in their bits
    (height, width), (top, bottom, left, right) = plan.sizes.T, plan.margins.T
    for k in range(plan.kinds.shape[1]):
        kind = plan.kinds[:, k]
        shape = kind.clip(0) * _EACH + rng.integers(0, _EACH, n)
        bits, extent = known.bits[shape], known.extents[shape]
        blocked = np.zeros((n, SIDE, SIDE), np.uint32)
        for row in range(BOX):
            blocked |= taken[:, 1 + row : 1 + row + SIDE, None] & (bits[:, row, None, None] << (place + 1))
        in_rows = (place >= top[:, None]) & (place <= (height - bottom - extent[:, 0])[:, None])
        in_columns = (place >= left[:, None]) & (place <= (width - right - extent[:, 1])[:, None])
        free = (blocked == 0) & in_rows[:, :, None] & in_columns[:, None] & (kind != ABSENT)[:, None, None]
        scores = rng.random((n, SIDE * SIDE), dtype=np.float32) * free.reshape(n, -1)
        chosen = scores.argmax(1)
        y, x = np.divmod(chosen, SIDE)
        masks = known.masks[shape] * (scores[every, chosen] > 0)[:, None, None]
        item, down, across = np.nonzero(masks)
        grids[item, y[item] + down, x[item] + across] = plan.colours[item, k, masks[item, down, across]]
        wide = np.where(scores[every, chosen] > 0, (bits | bits << 1 | bits << 2).T << x.astype(np.uint32), 0)
        for row in range(BOX):
            for near in range(3):
                taken[every, y + row + near] |= wide[row].astype(np.uint32)
    grids = grids[:, :SIDE, :SIDE]
    outside = (np.arange(SIDE) >= height[:, None])[:, :, None] | (np.arange(SIDE) >= width[:, None])[:, None]
    grids[outside] = OUTSIDE
    return grids
