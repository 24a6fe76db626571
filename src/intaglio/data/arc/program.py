"""The ten primitives on one grid: what the steps of a generated task's program do.

An object is an area of cells that are not background, joined by their sides, of one colour or several. Each primitive
takes a grid, uint8 (h, w), and two integers, of which it may ignore some, and gives a new grid; one that cannot do
anything gives the grid as it is. ``blocks.py`` does the same to many grids at once.
"""

from collections.abc import Sequence

import numpy as np

from intaglio.data.arc.augment import turned

PRIMITIVES = (
    *("mirror", "rotate", "translate", "recolour", "invert-palette"),
    *("threshold", "flood-fill", "extract", "merge", "gravity"),
)
MIRRORS, TURNS = (1, 2, 4, 7), (6, 3, 5)
LARGEST_OBJECT, ODD_COLOUR = 0, 1
DOWN, UP, LEFT, RIGHT = range(4)


def apply(grid: np.ndarray, primitive: int, a: int, b: int) -> np.ndarray:
    """``PRIMITIVES[primitive]`` with its two parameters."""
    return np.ascontiguousarray(_FUNCTIONS[primitive](grid, a, b), np.uint8)


def run(grid: np.ndarray, steps: Sequence[tuple[str, tuple[int, int]]]) -> np.ndarray:
    """The grid after all steps, each a name and two parameters."""
    for name, (a, b) in steps:
        grid = apply(grid, PRIMITIVES.index(name), a, b)
    return grid


def objects(grid: np.ndarray) -> list[list[tuple[int, int]]]:
    """The cells (row, column) of each object, in the order in which a reader meets them."""
    return _areas(grid > 0)


def mirror(grid: np.ndarray, axis: int, _: int = 0) -> np.ndarray:
    """The picture in a mirror: left for right, top for bottom, across the diagonal, across the other one."""
    return turned(grid, MIRRORS[axis])


def rotate(grid: np.ndarray, quarters: int, _: int = 0) -> np.ndarray:
    """The picture turned by 1, 2 or 3 quarters, anticlockwise."""
    return turned(grid, TURNS[quarters - 1])


def translate(grid: np.ndarray, down: int, right: int) -> np.ndarray:
    """All cells moved; what leaves the grid is lost."""
    moved = np.zeros_like(grid)
    for y, x in np.argwhere(grid):
        if 0 <= y + down < grid.shape[0] and 0 <= x + right < grid.shape[1]:
            moved[y + down, x + right] = grid[y, x]
    return moved


def recolour(grid: np.ndarray, old: int, new: int) -> np.ndarray:
    """One colour becomes another."""
    return np.where(grid == old, new, grid)


def invert_palette(grid: np.ndarray, _: int = 0, __: int = 0) -> np.ndarray:
    """The background and the commonest other colour (the lower of two) change places."""
    counts = np.bincount(grid.ravel(), minlength=10)[1:]
    common = int(counts.argmax()) + 1
    return grid if not counts.any() else np.where(grid == 0, common, np.where(grid == common, 0, grid))


def threshold(grid: np.ndarray, least: int, _: int = 0) -> np.ndarray:
    """Objects of fewer than ``least`` cells vanish."""
    return _painted(grid, [cell for cells in objects(grid) if len(cells) < least for cell in cells], 0)


def flood_fill(grid: np.ndarray, colour: int, _: int = 0) -> np.ndarray:
    """Background that is closed in, so that no path over cells' sides leads to the rim, takes a colour."""
    height, width = grid.shape
    inside = [
        cells for cells in _areas(grid == 0) if not any(y in (0, height - 1) or x in (0, width - 1) for y, x in cells)
    ]
    return _painted(grid, [cell for cells in inside for cell in cells], colour)


def extract(grid: np.ndarray, which: int, _: int = 0) -> np.ndarray:
    """One object alone, cut out: the largest, or the only one with a colour that no other has."""
    found = objects(grid)
    if which == LARGEST_OBJECT:
        most = max(map(len, found), default=0)
        chosen = [cells for cells in found if len(cells) == most]
    else:
        colours = [{int(grid[cell]) for cell in cells} for cells in found]
        own = [c for c in range(1, 10) if sum(c in some for some in colours) == 1]
        chosen = [cells for cells, some in zip(found, colours, strict=True) if own[0] in some] if len(own) == 1 else []
    if len(chosen) != 1:
        return grid
    rows, columns = np.array(chosen[0]).T
    alone = np.zeros_like(grid)
    alone[rows, columns] = grid[rows, columns]
    return alone[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def merge(grid: np.ndarray, colour: int, _: int = 0) -> np.ndarray:
    """Objects of several colours, which are things that touch, take one colour."""
    touching = [cells for cells in objects(grid) if len({int(grid[cell]) for cell in cells}) > 1]
    return _painted(grid, [cell for cells in touching for cell in cells], colour)


def gravity(grid: np.ndarray, towards: int, _: int = 0) -> np.ndarray:
    """Each cell falls to the edge, or onto what has fallen before it."""
    element = {DOWN: 0, UP: 2, LEFT: 6, RIGHT: 4}[towards]
    standing = turned(grid, element)
    fallen = np.stack([np.concatenate([c[c == 0], c[c > 0]]) for c in standing.T], axis=1)
    return turned(fallen, {0: 0, 2: 2, 6: 5, 4: 4}[element])


_FUNCTIONS = (
    *(mirror, rotate, translate, recolour, invert_palette),
    *(threshold, flood_fill, extract, merge, gravity),
)


def alternatives(grid: np.ndarray, seed: int) -> list[tuple[str, tuple[int, int], np.ndarray]]:
    """Other rules that change the grid, and what they make of it: hard candidates for "which rule was it".

    At most one of each primitive, with parameters drawn by ``seed``: name, parameters, output. No two outputs are
    equal.
    """
    rng = np.random.default_rng(seed)
    found: list[tuple[str, tuple[int, int], np.ndarray]] = []
    for k, name in enumerate(PRIMITIVES):
        options = _options(name, grid)
        for j in rng.permutation(len(options)):
            output = apply(grid, k, *options[j])
            if not np.array_equal(output, grid) and not any(np.array_equal(output, o) for _, _, o in found):
                found.append((name, options[j], output))
                break
    return found


def _options(name: str, grid: np.ndarray) -> list[tuple[int, int]]:
    """The parameters that ``name`` may be given on this grid."""
    present = [int(colour) for colour in np.unique(grid) if colour]
    absent = [colour for colour in range(1, 10) if colour not in present] or present
    if name == "translate":
        return [(y, x) for y in range(-3, 4) for x in range(-3, 4) if y or x]
    if name == "recolour":
        return [(old, new) for old in present for new in absent]
    values = {
        "mirror": range(4),
        "rotate": range(1, 4),
        "threshold": range(2, 7),
        "flood-fill": absent,
        "extract": (LARGEST_OBJECT, ODD_COLOUR),
        "merge": absent,
        "gravity": range(4),
    }
    return [(a, 0) for a in values.get(name, (0,))]


def _areas(where: np.ndarray) -> list[list[tuple[int, int]]]:
    """The cells of each area joined by sides, areas in reading order of their first cells."""
    left, found = {(int(y), int(x)): None for y, x in np.argwhere(where)}, []
    while left:
        cells = [next(iter(left))]
        del left[cells[0]]
        for y, x in cells:
            near = [c for c in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)) if c in left]
            for cell in near:
                del left[cell]
            cells += near
        found.append(cells)
    return found


def _painted(grid: np.ndarray, cells: Sequence[tuple[int, int]], colour: int) -> np.ndarray:
    painted = grid.copy()
    if cells:
        painted[tuple(np.array(cells).T)] = colour
    return painted
