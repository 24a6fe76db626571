"""Tasks of the Abstraction and Reasoning Corpus (Chollet 2019), validated, and numbered in a corpus.

A task is some pairs of grids, input and output, which one rule joins; its last pairs are its tests. Grids are uint8,
colours 0 … 9, rows from the top, 0 the background. In tables they stand in the upper left corner, ``OUTSIDE`` around
them.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from intaglio.data.arc.augment import ELEMENTS, turned
from intaglio.data.corpus import Corpus, Intake
from intaglio.data.duplicates import components

LARGEST, COLOURS, OUTSIDE = 30, 10, 10
PALETTE = np.array(
    [
        *((0, 0, 0), (0, 116, 217), (255, 65, 54), (46, 204, 64), (255, 220, 0)),
        *((170, 170, 170), (240, 18, 190), (255, 133, 27), (127, 219, 255), (135, 12, 37)),
        (255, 255, 255),
    ],
    np.uint8,
)
"""(11, 3): the colours that ARC is shown in, and white outside."""

Side = Literal["train", "val", "test"]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """An input grid, uint8 (h, w), and its output; None where a test's answer is not given."""

    input: np.ndarray
    output: np.ndarray | None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Pairs that share a rule, the last ``tests`` of them the tests.

    ``origin`` names the file; ``program`` and ``parameters`` are the rule's steps where the task was generated.
    """

    name: str
    pairs: tuple[Pair, ...]
    tests: int = 1
    origin: str = ""
    program: tuple[str, ...] = ()
    parameters: tuple[tuple[int, int], ...] = ()

    @property
    def answered(self) -> bool:
        return all(pair.output is not None for pair in self.pairs)

    def canonical(self) -> str:
        """Digest which tasks share that are equal up to turns and mirrors, order of pairs and names of colours.

        Colours 1 … 9 are renamed pair by pair, so that the order of pairs does not matter: a little more than one
        renaming for the whole task is taken for equal.
        """
        seen = (b"".join(sorted(_renamed(pair, element) for pair in self.pairs)) for element in range(ELEMENTS))
        return hashlib.blake2b(min(seen), digest_size=16).hexdigest()


class Unusable(ValueError):
    """Why a task cannot be used: ``reason`` in a few words, under which it is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def parse_task(raw: object, name: str, origin: str, answered: bool = True) -> Task:
    """A task from JSON's ``{"train": [{"input": …, "output": …}, …], "test": […]}``.

    Args:
        answered: whether every test needs its output.

    Raises:
        Unusable: what is wrong, in which pair of which file, and what to do.
    """
    if not isinstance(raw, dict) or not all(isinstance(raw.get(part), list) for part in ("train", "test")):
        raise Unusable("not a task", f'{origin}: no task; one is {{"train": [pairs], "test": [pairs]}}')
    pairs = [_parse_pair(p, f"{origin}: demonstration {k}", True) for k, p in enumerate(raw["train"], 1)]
    pairs += [_parse_pair(p, f"{origin}: test {k}", answered) for k, p in enumerate(raw["test"], 1)]
    if not raw["test"]:
        raise Unusable("no test", f"{origin}: the list of tests is empty; move a demonstration there")
    if len(pairs) < 2 or not raw["train"]:
        raise Unusable(
            "too few pairs",
            f"{origin}: {len(raw['train'])} demonstrations and {len(raw['test'])} tests; a rule can be learnt from at "
            "least one demonstration and one test. Add pairs, or leave the task out.",
        )
    return Task(name, tuple(pairs), len(raw["test"]), origin)


def _parse_pair(raw: object, where: str, answered: bool) -> Pair:
    if not isinstance(raw, dict) or "input" not in raw:
        raise Unusable("not a pair", f'{where} is not {{"input": grid, "output": grid}}')
    given = parse_grid(raw["input"], f"{where}, input")
    if raw.get("output") is None:
        if answered:
            raise Unusable(
                "missing output",
                f"{where} has no output, so nothing can be learnt from it or checked by it; give the output (Kaggle's "
                "stand in a …_solutions.json beside the …_challenges.json). Tasks without it can only be encoded.",
            )
        return Pair(given, None)
    return Pair(given, parse_grid(raw["output"], f"{where}, output"))


def parse_grid(raw: object, where: str) -> np.ndarray:
    """A grid from a list of rows, uint8 (h, w).

    Raises:
        Unusable: empty, ragged, larger than 30 × 30, or a cell that is not an integer of 0 … 9.
    """
    if not isinstance(raw, list) or not all(isinstance(row, list) for row in raw):
        raise Unusable("not a grid", f"{where} is not a list of rows")
    widths = {len(row) for row in raw}
    if not raw or widths == {0}:
        raise Unusable("empty grid", f"{where} is an empty grid; give at least one cell")
    if len(widths) > 1:
        raise Unusable("not rectangular", f"{where}: rows have {min(widths)} to {max(widths)} cells; make them equal")
    if max(len(raw), *widths) > LARGEST:
        raise Unusable(
            "too large", f"{where} is {len(raw)} × {max(widths)}; at most {LARGEST} × {LARGEST} cells are read"
        )
    for y, row in enumerate(raw):
        for x, cell in enumerate(row):
            if type(cell) is not int or not 0 <= cell < COLOURS:
                raise Unusable(
                    "not a colour", f"{where}, row {y}, column {x}: {str(cell)[:20]!r} is not an integer from 0 to 9"
                )
    return np.array(raw, dtype=np.uint8)


def _renamed(pair: Pair, element: int) -> bytes:
    """The pair, turned, with colours numbered as they appear, as bytes that begin with its sizes."""
    grids = [turned(grid, element) for grid in (pair.input, pair.output) if grid is not None]
    cells = b"".join(grid.tobytes() for grid in grids)
    met = bytes(colour for colour in dict.fromkeys(cells) if colour)
    sizes = bytes(side for grid in grids for side in grid.shape)
    return sizes + b"\xff" + cells.translate(bytes.maketrans(met, bytes(range(1, len(met) + 1))))


@dataclass(eq=False, repr=False)
class TaskCorpus(Corpus):
    """Tasks numbered 0 … N − 1, their grids in one table.

    ``grids`` (M, 2, S, S) uint8 and ``sizes`` (M, 2, 2), height and width (0 where an output is not given), those of
    task i in rows ``first[i]:first[i + 1]``, the last ``tests[i]`` of them tests; ``hashes`` are equal for tasks that
    are the same but for colours and turns; ``steps`` (N, 3) numbers the primitives of generated programs, −1 for
    none, ``parameters`` (N, 3, 2).
    """

    name: str
    grids: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    tests: np.ndarray
    names: tuple[str, ...]
    origins: tuple[str, ...]
    hashes: tuple[str, ...]
    sides: tuple[Side | None, ...]
    programs: tuple[tuple[str, ...], ...]
    parameters: np.ndarray
    intake: Intake = field(default_factory=Intake)

    def __post_init__(self) -> None:
        self._groups = _grouped(self.names, self.hashes)

    @classmethod
    def of(cls, name: str, tasks: Sequence[Task], sides: Sequence[Side | None], intake: Intake) -> "TaskCorpus":
        """Packs the given tasks; duplicates are counted in ``intake``."""
        pairs = [pair for task in tasks for pair in task.pairs]
        sizes = np.array([[p.input.shape, (0, 0) if p.output is None else p.output.shape] for p in pairs], np.int64)
        side = int(sizes.max(initial=2)) + 1 & ~1
        grids = np.full((len(pairs), 2, side, side), OUTSIDE, np.uint8)
        for table, pair in zip(grids, pairs, strict=True):
            for corner, grid in zip(table, (pair.input, pair.output), strict=True):
                if grid is not None:
                    corner[: grid.shape[0], : grid.shape[1]] = grid
        parameters = np.zeros((len(tasks), 3, 2), np.int64)
        for kept, task in zip(parameters, tasks, strict=True):
            kept[: len(task.parameters)] = np.reshape(task.parameters, (-1, 2))
        hashes = tuple(task.canonical() for task in tasks)
        known: dict[str, Task] = {}
        for digest, task in zip(hashes, tasks, strict=True):
            if (twin := known.setdefault(digest, task)) is not task:
                message = f"{task.origin} is {twin.origin} but for colours, turns or order; both stay on one side"
                intake.note("duplicate task", message)
        return cls(
            name,
            grids,
            sizes,
            np.concatenate([[0], np.cumsum([len(task.pairs) for task in tasks])]).astype(np.int64),
            np.array([task.tests for task in tasks], np.int64),
            tuple(task.name for task in tasks),
            tuple(task.origin for task in tasks),
            hashes,
            tuple(sides),
            tuple(task.program for task in tasks),
            parameters,
            intake,
        )

    def __len__(self) -> int:
        return len(self.names)

    def task(self, i: int) -> Task:
        """Task i with its grids."""
        rows = range(self.first[i], self.first[i + 1])
        pairs = tuple(Pair(self._grid(row, 0), self._grid(row, 1) if self.sizes[row, 1, 0] else None) for row in rows)
        program = self.programs[i]
        parameters = tuple((int(a), int(b)) for a, b in self.parameters[i, : len(program)])
        return Task(self.names[i], pairs, int(self.tests[i]), self.origins[i], program, parameters)

    def _grid(self, row: int, which: int) -> np.ndarray:
        height, width = self.sizes[row, which]
        return self.grids[row, which, :height, :width].copy()

    def part(self, items: Sequence[int] | np.ndarray) -> "TaskCorpus":
        """The given tasks as a corpus of their own."""
        items = np.asarray(items, np.int64)
        counts = self.first[items + 1] - self.first[items]
        first = np.concatenate([[0], np.cumsum(counts)])
        rows = np.repeat(self.first[items] - first[:-1], counts) + np.arange(first[-1])
        chosen: dict[str, Any] = {
            key: tuple(getattr(self, key)[i] for i in items)
            for key in ("names", "origins", "hashes", "sides", "programs")
        }
        return TaskCorpus(
            self.name,
            self.grids[rows],
            self.sizes[rows],
            first,
            self.tests[items],
            parameters=self.parameters[items],
            intake=self.intake,
            **chosen,
        )

    def joined(self, other: "TaskCorpus") -> "TaskCorpus":
        """The tasks of both, this corpus's first."""
        side = max(self.grids.shape[-1], other.grids.shape[-1])
        intake = Intake(Counter(self.intake.counts), {k: list(v) for k, v in self.intake.examples.items()})
        intake.counts.update(other.intake.counts)
        for reason, examples in other.intake.examples.items():
            intake.examples[reason] = [*intake.examples.get(reason, []), *examples][:5]
        return TaskCorpus(
            f"{self.name} and {other.name}",
            np.concatenate([_padded(corpus.grids, side) for corpus in (self, other)]),
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.first, other.first[1:] + self.first[-1]]),
            np.concatenate([self.tests, other.tests]),
            self.names + other.names,
            self.origins + other.origins,
            self.hashes + other.hashes,
            self.sides + other.sides,
            self.programs + other.programs,
            np.concatenate([self.parameters, other.parameters]),
            intake,
        )

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each task's program, (N,); 0 where the program is unknown."""
        return np.array([len(program) for program in self.programs], np.int64)

    def image(self, i: int, size: int) -> np.ndarray:
        """The pairs, one under another, as coloured cells."""
        table = self.grids[self.first[i] : self.first[i + 1]]
        side = int(self.sizes[self.first[i] : self.first[i + 1]].max())
        cells = np.pad(table[:, :, :side, :side], ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=OUTSIDE)
        sheet = cells.transpose(0, 2, 1, 3).reshape(len(table) * (side + 1), 2 * (side + 1))
        place = np.arange(size) * max(sheet.shape) // size
        square = np.full((max(sheet.shape),) * 2, OUTSIDE, np.uint8)
        square[: sheet.shape[0], : sheet.shape[1]] = sheet
        return PALETTE[square[np.ix_(place, place)]]

    def captions(self, i: int) -> tuple[str, ...]:
        return (self.label(i) or self.names[i],)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.names, self.sides, self.programs, self.grids.shape)).encode())
        for array in (self.grids, self.sizes, self.first, self.tests, self.parameters):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def describe(self) -> str:
        sides = Counter(side for side in self.sides if side)
        declared = "".join(f", {count:,} declared as {side}" for side, count in sides.items())
        return f"{self.name}: {len(self):,} tasks, {self.first[-1]:,} pairs{declared}"

    def id(self, i: int) -> str:
        return self.names[i]

    def label(self, i: int) -> str | None:
        """The program in words, or None where it is unknown."""
        return " then ".join(self.programs[i]) or None

    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({" then ".join(program) for program in self.programs if program}))

    def group(self, i: int) -> str:
        """The first task of this name or hash, or of one that shares either with it."""
        return self._groups[i]

    def declared_split(self, i: int) -> Side | None:
        return self.sides[i]


def _grouped(names: Sequence[str], hashes: Sequence[str]) -> list[str]:
    links = []
    for keys in (names, hashes):
        heads: dict[str, int] = {}
        links += [(i, head) for i, key in enumerate(keys) if (head := heads.setdefault(key, i)) != i]
    return [names[head] for head in components(len(names), np.array(links, np.int64).reshape(-1, 2))]


def _padded(grids: np.ndarray, side: int) -> np.ndarray:
    more = side - grids.shape[-1]
    return np.pad(grids, ((0, 0), (0, 0), (0, more), (0, more)), constant_values=OUTSIDE)
