"""Tasks of objects with a known program, made whole blocks at once: task i of a seed is the same whatever their count.

A program is one primitive (``program.py``), or two or three in turn: those that act on objects first, then those that
act on the grid. No step of it is idle: see ``_sound``.
"""

from functools import lru_cache
from itertools import permutations

import numpy as np

from intaglio.data.arc import scenes
from intaglio.data.arc.blocks import run_block, sizes_of
from intaglio.data.arc.program import LARGEST_OBJECT, ODD_COLOUR, PRIMITIVES, alternatives
from intaglio.data.arc.tasks import OUTSIDE, TaskCorpus
from intaglio.data.corpus import Intake

__all__ = ["BLOCK", "PRIMITIVES", "alternatives", "generate"]

BLOCK = 256  # tasks made at once; the n-th block is a function of (seed, n)
LONGEST = 3  # steps of a program
ON_OBJECTS = ("translate", "recolour", "threshold", "flood-fill", "merge", "gravity")
# Never in one program: the first is idle, or both are one of the other kind (two mirrors are a turn).
_QUARRELS = (
    *({"mirror", "rotate"}, {"extract", "translate"}, {"extract", "threshold"}, {"extract", "gravity"}),
    {"extract", "flood-fill", "merge"},
)


def generate(
    count: int, seed: int = 0, pairs: int = 4, lengths: tuple[float, float, float] = (0.6, 0.25, 0.15)
) -> TaskCorpus:
    """``count`` tasks of the endless series ``seed``, each of so many ``pairs``, the last of them its test.

    ``lengths`` are the shares of programs of one, two and three steps. Single primitives are equally frequent, and so
    are the programs of each other length.

    Raises:
        ValueError: fewer than one task or two pairs, or shares that don't add to one.
    """
    if count < 1 or pairs < 2:
        raise ValueError(f"generated tasks: give at least 1 task of at least 2 pairs, not {count} of {pairs}")
    if len(lengths) != LONGEST or min(lengths) < 0 or abs(sum(lengths) - 1) > 1e-6:
        raise ValueError(f"generated tasks: the shares {lengths} of one, two and three steps don't add to 1")
    side, blocks = scenes.SIDE, -(-count // BLOCK)
    grids = np.empty((blocks * BLOCK, pairs, 2, side, side), np.uint8)
    steps = np.empty((blocks * BLOCK, LONGEST), np.int64)
    parameters = np.empty((blocks * BLOCK, LONGEST, 2), np.int64)
    for block in range(blocks):
        here = slice(block * BLOCK, (block + 1) * BLOCK)
        grids[here], steps[here], parameters[here] = _block(seed, block, pairs, lengths)
    packed = grids[:count].reshape(-1, 2, side, side)
    names = tuple(f"generated-{seed}-{i}" for i in range(count))
    return TaskCorpus(
        "generated",
        packed,
        sizes_of(packed.reshape(-1, side, side)).reshape(-1, 2, 2),
        np.arange(0, count * pairs + 1, pairs),
        np.ones(count, np.int64),
        names,
        names,
        names,
        (None,) * count,
        tuple(tuple(PRIMITIVES[k] for k in row if k >= 0) for row in steps[:count].tolist()),
        parameters[:count],
        Intake(),
    )


@lru_cache(maxsize=LONGEST)
def programs(length: int) -> np.ndarray:
    """All programs of so many steps as numbers of primitives, (M, 3), −1 behind."""
    found = []
    for names in permutations(PRIMITIVES, length):
        on_objects = [name in ON_OBJECTS for name in names]
        if on_objects == sorted(on_objects, reverse=True) and not any(q <= set(names) for q in _QUARRELS):
            found.append([PRIMITIVES.index(name) for name in names] + [-1] * (LONGEST - length))
    return np.array(found)


def _block(
    seed: int, block: int, pairs: int, lengths: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grids (BLOCK, pairs, 2, S, S), steps and parameters; a task that is not sound is drawn again."""
    rng = np.random.Generator(np.random.Philox(key=[seed, block]))
    length = 1 + rng.choice(LONGEST, BLOCK, p=np.array(lengths) / sum(lengths))
    single = rng.integers(0, len(PRIMITIVES), BLOCK)
    grids = np.empty((BLOCK, pairs, 2, scenes.SIDE, scenes.SIDE), np.uint8)
    steps = np.empty((BLOCK, LONGEST), np.int64)
    parameters = np.empty((BLOCK, LONGEST, 2), np.int64)
    left = np.arange(BLOCK)
    while len(left):
        here = np.full((len(left), LONGEST), -1)
        here[:, 0] = single[left]
        for several in range(2, LONGEST + 1):
            chosen = length[left] == several
            here[chosen] = rng.choice(programs(several), int(chosen.sum()))
        palette = rng.permuted(np.tile(np.arange(1, 10), (len(left), 1)), axis=1)
        given = _parameters(rng, here, palette)
        per_pair = [np.repeat(array, pairs, axis=0) for array in (here, given, palette[:, 4:])]
        inputs = scenes.drawn(rng, scenes.plan(rng, *per_pair))
        outputs, sound = _sound(inputs, per_pair[0], per_pair[1], pairs)
        done = left[sound]
        shape = (len(left), pairs, *inputs.shape[1:])
        grids[done, :, 0], grids[done, :, 1] = inputs.reshape(shape)[sound], outputs.reshape(shape)[sound]
        steps[done], parameters[done] = here[sound], given[sound]
        left = left[~sound]
    return grids, steps, parameters


def _parameters(rng: np.random.Generator, steps: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Two integers for each step (n, 3, 2), as ``program.py`` reads them; the first four colours are theirs."""
    n = len(steps)
    far = np.array([(y, x) for y in range(-3, 4) for x in range(-3, 4) if y or x])[rng.integers(0, 48, n)]
    acted_on = np.isin(steps, [PRIMITIVES.index(name) for name in ON_OBJECTS]).any(1)
    which = np.where(acted_on | (rng.random(n) < 0.5), LARGEST_OBJECT, ODD_COLOUR)
    zero = np.zeros(n, np.int64)
    table = {
        "mirror": (rng.integers(0, 4, n), zero),
        "rotate": (rng.integers(1, 4, n), zero),
        "translate": (far[:, 0], far[:, 1]),
        "recolour": (palette[:, 0], palette[:, 1]),
        "invert-palette": (zero, zero),
        "threshold": (rng.integers(3, 6, n), zero),
        "flood-fill": (palette[:, 2], zero),
        "extract": (which, zero),
        "merge": (palette[:, 3], zero),
        "gravity": (rng.integers(0, 4, n), zero),
    }
    values = np.array([table[name] for name in PRIMITIVES] + [(zero, zero)])  # step −1 reads the last row
    return values[steps, :, np.arange(n)[:, None]]


def _sound(inputs: np.ndarray, steps: np.ndarray, parameters: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (n, S, S), and which tasks are sound, (n / pairs,).

    Sound is a task each of whose outputs differs from its input and is not empty, and whose program gives on two
    pairs at least (or on the only other one) something else than any part of it would: what one pair asks, another
    shows.
    """
    outputs = run_block(inputs, steps, parameters, range(LONGEST))

    def differs(others: np.ndarray) -> np.ndarray:
        return (outputs != others).any((1, 2)).reshape(-1, pairs)

    shown = ((outputs > 0) & (outputs < OUTSIDE)).any((1, 2)).reshape(-1, pairs)
    sound = np.all(differs(inputs) & shown, axis=1)
    for length, parts in ((2, [(0,), (1,)]), (3, [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])):
        here = np.flatnonzero(((steps >= 0).sum(1) == length).reshape(-1, pairs)[:, 0] & sound)
        rows = (here[:, None] * pairs + np.arange(pairs)).ravel()
        for part in parts:
            other = run_block(inputs[rows], steps[rows], parameters[rows], part)
            sound[here] &= (outputs[rows] != other).any((1, 2)).reshape(-1, pairs).sum(1) >= min(2, pairs - 1)
    return outputs, sound
