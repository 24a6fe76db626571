"""What may change about a task and leave its rule: names of colours, the way it is held, and the order of its pairs.

An element of the dihedral group is a number from 0 to 7: transpose first if it holds 4, then reverse the rows if it
holds 2 and the columns if it holds 1. So 1, 2, 4 and 7 are mirrors, 3, 5 and 6 turns, and 0 is nothing.
"""

import numpy as np

from intaglio.data import order

ELEMENTS = 8
_KEYS = 1024  # random numbers that one draw gives: 9 for the colours, 1 for the element, the others for the pairs


def turned(grid: np.ndarray, element: int) -> np.ndarray:
    """One grid (h, w), turned or mirrored."""
    grid = grid.T if element & 4 else grid
    grid = grid[::-1] if element & 2 else grid
    return grid[:, ::-1] if element & 1 else grid


def turned_sizes(sizes: np.ndarray, element: np.ndarray) -> np.ndarray:
    """Heights and widths (n, 2) after each grid's own ``element`` (n,)."""
    return np.where((element & 4 > 0)[:, None], sizes[:, ::-1], sizes)


def turned_cells(sizes: np.ndarray, element: np.ndarray, side: int, stride: int) -> np.ndarray:
    """Where the cells of turned grids come from, in tables of rows ``stride`` long. int64 (n, side, side).

    A cell outside its grid comes from outside; ``side`` holds every grid whichever way it is turned.
    """
    height, width = turned_sizes(sizes, element).T[:, :, None]
    place = np.arange(side)
    rows = np.where((element & 2 > 0)[:, None] & (place < height), height - 1 - place, place)
    columns = np.where((element & 1 > 0)[:, None] & (place < width), width - 1 - place, place)
    transposed = (element & 4 > 0)[:, None]
    rows *= np.where(transposed, 1, stride)
    columns *= np.where(transposed, stride, 1)
    return rows[:, :, None] + columns[:, None, :]


def keys(draw: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Random numbers ``start`` … ``stop`` of each draw, int64 (B, stop − start)."""
    assert stop <= _KEYS
    return order.draws(draw[:, None] * _KEYS + np.arange(start, stop), seed=0)


def colour_maps(draw: np.ndarray, colours: int) -> np.ndarray:
    """(B, 256) uint8: a permutation of colours 1 … ``colours`` − 1 for each draw; all other numbers stay."""
    maps = np.tile(np.arange(256, dtype=np.uint8), (len(draw), 1))
    maps[:, 1:colours] = 1 + keys(draw, 0, colours - 1).argsort(axis=1)
    return maps


def elements(draw: np.ndarray) -> np.ndarray:
    """The dihedral element that each draw chooses, (B,)."""
    return keys(draw, 9, 10)[:, 0] % ELEMENTS


def chosen_pairs(counts: np.ndarray, draw: np.ndarray, most: int, shuffled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which of each task's ``counts`` (B,) pairs are taken, at most ``most``, and which of them are real.

    Both (B, ``most``), padding in front. Without ``shuffled`` the pairs keep their order.
    """
    longest = max(most, int(counts.max(initial=1)))
    order_of = keys(draw, 10, 10 + longest)
    order_of[np.arange(longest) >= counts[:, None]] = -1
    taken = order_of.argsort(axis=1)[:, -most:]
    real = np.take_along_axis(order_of, taken, 1) >= 0
    if not shuffled:
        taken = np.where(real, taken, -1)
        taken.sort(axis=1)
    return np.where(real, taken, 0), real
