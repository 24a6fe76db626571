"""The ten primitives on many grids at once; ``program.py`` says what they do and is what the tests compare with.

Grids are uint8 (n, S, S), each in the upper left corner, ``OUTSIDE`` around it; parameters are (n,).
"""

from collections.abc import Iterable

import numpy as np

from intaglio.data.arc.augment import turned_cells
from intaglio.data.arc.program import LARGEST_OBJECT, LEFT, MIRRORS, TURNS, UP
from intaglio.data.arc.tasks import COLOURS, OUTSIDE


def run_block(grids: np.ndarray, steps: np.ndarray, parameters: np.ndarray, which: Iterable[int]) -> np.ndarray:
    """The grids after the steps ``which``, of ``steps`` (n, K), −1 for none, with ``parameters`` (n, K, 2)."""
    grids = grids.copy()
    for step in which:
        for primitive in np.unique(steps[:, step]):
            if primitive >= 0:
                chosen = np.flatnonzero(steps[:, step] == primitive)
                a, b = parameters[chosen, step].T
                grids[chosen] = _FUNCTIONS[primitive](grids[chosen], a, b)
    return grids


def sizes_of(grids: np.ndarray) -> np.ndarray:
    """Heights and widths (n, 2)."""
    return np.stack([(grids[:, :, 0] < OUTSIDE).sum(1), (grids[:, 0] < OUTSIDE).sum(1)], axis=1)


def labels_of(grids: np.ndarray) -> np.ndarray:
    """A number for each object, the same in all its cells, 0 elsewhere. int16 (n, S, S)."""
    side = grids.shape[-1]
    solid = (grids > 0) & (grids < OUTSIDE)
    labels = np.where(solid, np.arange(1, side * side + 1, dtype=np.int16).reshape(side, side), np.int16(0))
    last = np.zeros_like(labels)
    while not np.array_equal(labels, last):
        last = labels.copy()
        np.maximum(labels[:, 1:], labels[:, :-1], out=labels[:, 1:], where=solid[:, 1:])
        np.maximum(labels[:, :-1], labels[:, 1:], out=labels[:, :-1], where=solid[:, :-1])
        np.maximum(labels[:, :, 1:], labels[:, :, :-1], out=labels[:, :, 1:], where=solid[:, :, 1:])
        np.maximum(labels[:, :, :-1], labels[:, :, 1:], out=labels[:, :, :-1], where=solid[:, :, :-1])
    return labels


def _counted(labels: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """How many cells (of those ``where``) bear each label, (n, S² + 1); label 0 is counted as none."""
    n, numbers = len(labels), labels[0].size + 1
    flat = labels.reshape(n, -1) + np.arange(n)[:, None] * numbers
    chosen = flat if where is None else flat[where.reshape(n, -1)]
    counts = np.bincount(chosen.ravel(), minlength=n * numbers).reshape(n, numbers)
    counts[:, 0] = 0
    return counts


def _looked_up(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``table`` (n, S² + 1) at each cell's label."""
    return np.take_along_axis(table, labels.reshape(len(labels), -1).astype(np.int64), 1).reshape(labels.shape)


def _turn(grids: np.ndarray, element: np.ndarray) -> np.ndarray:
    n, side, _ = grids.shape
    cells = turned_cells(sizes_of(grids), element, side, side)
    return grids.reshape(-1).take(cells + np.arange(n)[:, None, None] * side * side)


def _mirror(grids: np.ndarray, axis: np.ndarray, _: np.ndarray) -> np.ndarray:
    return _turn(grids, np.array(MIRRORS)[axis])


def _rotate(grids: np.ndarray, quarters: np.ndarray, _: np.ndarray) -> np.ndarray:
    return _turn(grids, np.array(TURNS)[quarters - 1])


def _moved(grids: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cells of the table, moved; where nothing comes from inside the table stands 0."""
    n, side, _ = grids.shape
    place = np.arange(side)
    rows, columns = place - down[:, None], place - right[:, None]
    known = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
    rows, columns = rows.clip(0, side - 1), columns.clip(0, side - 1)
    return np.where(known, grids[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None]], np.uint8(0))


def _translate(grids: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    inside = grids < OUTSIDE
    return np.where(inside, _moved(np.where(inside, grids, np.uint8(0)), down, right), np.uint8(OUTSIDE))


def _recolour(grids: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.where(grids == old[:, None, None], new[:, None, None], grids)


def _invert_palette(grids: np.ndarray, _: np.ndarray, __: np.ndarray) -> np.ndarray:
    counts = np.stack([(grids == colour).sum((1, 2)) for colour in range(1, COLOURS)], axis=1)
    common = np.where(counts.any(1), counts.argmax(1) + 1, 0).astype(np.uint8)[:, None, None]
    return np.where(grids == 0, common, np.where(grids == common, 0, grids))


def _threshold(grids: np.ndarray, least: np.ndarray, _: np.ndarray) -> np.ndarray:
    labels = labels_of(grids)
    small = _counted(labels) < least[:, None]
    return np.where((labels > 0) & _looked_up(small, labels), 0, grids)


def _flood_fill(grids: np.ndarray, colour: np.ndarray, _: np.ndarray) -> np.ndarray:
    passable = np.pad((grids == 0) | (grids == OUTSIDE), ((0, 0), (1, 1), (1, 1)), constant_values=True)
    outer = np.zeros_like(passable)
    outer[:, 0] = outer[:, -1] = outer[:, :, 0] = outer[:, :, -1] = True
    outer[:, 1:-1, 1:-1] = grids == OUTSIDE
    last = np.zeros_like(outer)
    while not np.array_equal(outer, last):
        last = outer.copy()
        for a, b in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
            outer[:, a] |= outer[:, b] & passable[:, a]
            outer[:, :, a] |= outer[:, :, b] & passable[:, :, a]
    return np.where(outer[:, 1:-1, 1:-1] | (grids != 0), grids, colour[:, None, None])


def _extract(grids: np.ndarray, which: np.ndarray, _: np.ndarray) -> np.ndarray:
    n, side, _w = grids.shape
    labels, every = labels_of(grids), np.arange(n)
    counts = _counted(labels)
    largest, ties = counts.argmax(1), (counts == counts.max(1, keepdims=True)).sum(1)
    present = np.stack([_counted(labels, grids == c) > 0 for c in range(1, COLOURS)], axis=2)
    own = present.sum(1) == 1
    odd = present[every, :, own.argmax(1)].argmax(1)
    by_size = which == LARGEST_OBJECT
    found = np.where(by_size, (ties == 1) & counts.any(1), own.sum(1) == 1)
    mask = labels == np.where(by_size, largest, odd)[:, None, None]
    rows, columns = mask.any(2), mask.any(1)
    top, left = rows.argmax(1), columns.argmax(1)
    height, width = side - rows[:, ::-1].argmax(1) - top, side - columns[:, ::-1].argmax(1) - left
    place = np.arange(side)
    inside = (place < height[:, None])[:, :, None] & (place < width[:, None])[:, None]
    cut = np.where(inside, _moved(np.where(mask, grids, 0), -top, -left), np.uint8(OUTSIDE))
    return np.where(found[:, None, None], cut, grids)


def _merge(grids: np.ndarray, colour: np.ndarray, _: np.ndarray) -> np.ndarray:
    labels = labels_of(grids)
    contact = np.zeros(grids.shape, bool)
    contact[:, 1:] |= (labels[:, 1:] > 0) & (labels[:, :-1] > 0) & (grids[:, 1:] != grids[:, :-1])
    contact[:, :, 1:] |= (labels[:, :, 1:] > 0) & (labels[:, :, :-1] > 0) & (grids[:, :, 1:] != grids[:, :, :-1])
    touching = _looked_up(_counted(labels, contact) > 0, labels)
    return np.where(touching, colour[:, None, None], grids)


def _gravity(grids: np.ndarray, towards: np.ndarray, _: np.ndarray) -> np.ndarray:
    sideways, back = towards >= LEFT, (towards == UP) | (towards == LEFT)
    standing = np.where(sideways[:, None, None], grids.swapaxes(1, 2), grids)
    weight = np.where(standing == OUTSIDE, 2, (standing > 0) ^ back[:, None, None]).astype(np.uint8)
    fallen = np.take_along_axis(standing, weight.argsort(axis=1, kind="stable"), 1)
    return np.where(sideways[:, None, None], fallen.swapaxes(1, 2), fallen)


_FUNCTIONS = (
    *(_mirror, _rotate, _translate, _recolour, _invert_palette),
    *(_threshold, _flood_fill, _extract, _merge, _gravity),
)
