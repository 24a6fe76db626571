"""Generated tasks do what their programs say, one task at a time as in blocks; nothing in them is idle or noise."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from intaglio.data.arc import Task, TaskCorpus, generate, program, refuse_leak
from intaglio.data.arc.augment import turned
from intaglio.data.arc.blocks import run_block
from intaglio.data.arc.generate import BLOCK, ON_OBJECTS, PRIMITIVES, alternatives, programs
from intaglio.data.arc.tasks import OUTSIDE
from intaglio.data.splits import split


@pytest.fixture(scope="module")
def corpus() -> TaskCorpus:
    return generate(2 * BLOCK, seed=3)


def steps_of(task: Task) -> list[tuple[str, tuple[int, int]]]:
    return list(zip(task.program, task.parameters, strict=True))


def drawn(*rows: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


BEFORE = drawn("100022", "100300", "000330", "044400", "040400", "044400")


@pytest.mark.parametrize(
    ("name", "parameters", "after"),
    [
        ("mirror", (0, 0), ("220001", "003001", "033000", "004440", "004040", "004440")),
        ("mirror", (1, 0), ("044400", "040400", "044400", "000330", "100300", "100022")),
        ("mirror", (2, 0), ("110000", "000444", "000404", "033444", "203000", "200000")),
        ("mirror", (3, 0), ("000002", "000302", "444330", "404000", "444000", "000011")),
        ("rotate", (1, 0), ("200000", "203000", "033444", "000404", "000444", "110000")),
        ("rotate", (2, 0), ("004440", "004040", "004440", "033000", "003001", "220001")),
        ("rotate", (3, 0), ("000011", "444000", "404000", "444330", "000302", "000002")),
        ("translate", (1, -2), ("000000", "002200", "030000", "033000", "440000", "040000")),
        ("recolour", (3, 7), ("100022", "100700", "000770", "044400", "040400", "044400")),
        ("invert-palette", (0, 0), ("144422", "144344", "444334", "400044", "404044", "400044")),
        ("threshold", (3, 0), ("000000", "000300", "000330", "044400", "040400", "044400")),
        ("flood-fill", (8, 0), ("100022", "100300", "000330", "044400", "048400", "044400")),
        ("extract", (program.LARGEST_OBJECT, 0), ("0030", "0033", "4440", "4040", "4440")),  # two colours touch
        ("merge", (9, 0), ("100022", "100900", "000990", "099900", "090900", "099900")),
        ("gravity", (program.DOWN, 0), ("000000", "000300", "000300", "040400", "144420", "144432")),
        ("gravity", (program.UP, 0), ("144322", "144330", "040400", "000400", "000400", "000000")),
        ("gravity", (program.LEFT, 0), ("122000", "130000", "330000", "444000", "440000", "444000")),
        ("gravity", (program.RIGHT, 0), ("000122", "000013", "000033", "000444", "000044", "000444")),
    ],
)
def test_each_primitive_by_hand(name: str, parameters: tuple[int, int], after: tuple[str, ...]) -> None:
    got = program.run(BEFORE, [(name, parameters)])
    assert got.tolist() == drawn(*after).tolist()


def test_extract_finds_the_object_with_a_colour_of_its_own() -> None:
    grid = drawn("110000", "000100", "022000", "020001")
    odd = program.run(grid, [("extract", (program.ODD_COLOUR, 0))])
    assert odd.tolist() == [[2, 2], [2, 0]]
    two = np.where(grid == 2, 1, grid)
    assert np.array_equal(program.run(two, [("extract", (program.ODD_COLOUR, 0))]), two)


def test_a_block_does_to_any_grids_what_is_done_to_one() -> None:
    rng = np.random.default_rng(0)
    n, side = 1500, 9
    grids = np.full((n, side, side), OUTSIDE, np.uint8)
    steps = np.stack([rng.integers(0, 10, n), rng.integers(-1, 10, n)], axis=1)
    parameters = rng.integers(0, 4, (n, 2, 2))
    parameters[steps == PRIMITIVES.index("rotate")] = (3, 0)
    parameters[steps == PRIMITIVES.index("extract")] %= 2
    parameters[steps == PRIMITIVES.index("translate")] -= 2
    expected = grids.copy()
    for grid, wanted, chain, given in zip(grids, expected, steps, parameters, strict=True):
        height, width = rng.integers(1, side + 1, 2)
        cells = rng.integers(0, 4, (height, width)) * (rng.random((height, width)) < rng.choice([0.05, 0.4, 0.9]))
        grid[:height, :width] = cells
        for primitive, (a, b) in zip(chain, given, strict=True):
            cells = program.apply(cells, primitive, a, b) if primitive >= 0 else cells
        wanted[: cells.shape[0], : cells.shape[1]] = cells
    before = grids.copy()
    assert np.array_equal(run_block(grids, steps, parameters, (0, 1)), expected)
    assert np.array_equal(grids, before)


def test_every_output_is_what_the_program_makes_of_its_input(corpus: TaskCorpus) -> None:
    for i in range(len(corpus)):
        task = corpus.task(i)
        for pair in task.pairs:
            assert np.array_equal(program.run(pair.input, steps_of(task)), pair.output), task.program


def test_no_step_is_idle_and_two_pairs_show_it(corpus: TaskCorpus) -> None:
    for i in range(len(corpus)):
        task = corpus.task(i)
        assert all(not np.array_equal(pair.input, pair.output) and pair.output.any() for pair in task.pairs)
        for length in range(1, len(task.program)):
            for part in combinations(steps_of(task), length):
                assert sum(not np.array_equal(program.run(p.input, part), p.output) for p in task.pairs) >= 2


def test_inputs_are_a_few_objects_apart_on_a_background(corpus: TaskCorpus) -> None:
    inputs = [pair.input for i in range(len(corpus)) for pair in corpus.task(i).pairs]
    assert {side for grid in inputs for side in grid.shape} == set(range(6, 15))
    counts = Counter(len(program.objects(grid)) for grid in inputs)
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert counts[6] < 0.05 * len(inputs)
    for grid in inputs:
        assert (grid == 0).mean() > 0.2
        for cells in program.objects(grid):
            height, width = np.ptp(np.array(cells), axis=0) + 1
            assert max(height, width) <= 5


def test_programs_are_all_there_in_their_shares(corpus: TaskCorpus) -> None:
    shares = np.bincount(corpus.lengths, minlength=4) / len(corpus)
    assert np.abs(shares - [0, 0.6, 0.25, 0.15]).max() < 0.06
    singles = Counter(names[0] for names in corpus.programs if len(names) == 1)
    assert set(singles) == set(PRIMITIVES)
    assert min(singles.values()) > 0.5 * max(singles.values())
    for names in corpus.programs:
        on_objects = [name in ON_OBJECTS for name in names]
        assert on_objects == sorted(on_objects, reverse=True)
        assert len(set(names)) == len(names)
    assert len(programs(2)) > 40
    assert len(programs(3)) > 150
    only = generate(300, lengths=(0, 0, 1))
    assert set(only.lengths) == {3}
    chosen = {task.parameters for task in map(corpus.task, range(len(corpus))) if task.program == ("extract",)}
    assert chosen == {((0, 0),), ((1, 0),)}


def test_task_i_is_a_function_of_the_seed_alone(corpus: TaskCorpus) -> None:
    few, other = generate(BLOCK + 7, seed=3), generate(40, seed=4)
    for i in (0, 5, BLOCK - 1, BLOCK, BLOCK + 6):
        assert few.task(i).canonical() == corpus.task(i).canonical()
        assert steps_of(few.task(i)) == steps_of(corpus.task(i))
    assert few.part(range(40)).fingerprint() == generate(40, seed=3).fingerprint() != other.fingerprint()
    assert len({corpus.task(i).canonical() for i in range(len(corpus))}) == len(corpus)


def test_a_split_holds_out_whole_tasks_of_every_program(corpus: TaskCorpus) -> None:
    sides, _ = split(corpus, {"train": 0.8, "val": 0.2}, seed=0)
    assert len(sides["val"]) == pytest.approx(0.2 * len(corpus), abs=1)
    assert {corpus.programs[i][0] for i in sides["val"] if len(corpus.programs[i]) == 1} == set(PRIMITIVES)
    refuse_leak(corpus.part(sides["train"]), corpus.part(sides["val"]))
    with pytest.raises(ValueError, match="has the name of generated-3-0"):
        refuse_leak(corpus, generate(4, seed=3))


def test_alternatives_are_other_rules_that_do_something(corpus: TaskCorpus) -> None:
    met: Counter[str] = Counter()
    for i in range(60):
        grid = corpus.task(i).pairs[-1].input
        found = alternatives(grid, seed=i)
        outputs = [output for _, _, output in found]
        met.update(name for name, _, _ in found)
        assert len(found) >= 4
        assert all(np.array_equal(program.run(grid, [(name, given)]), out) for name, given, out in found)
        assert not any(np.array_equal(a, b) for a, b in combinations([grid, *outputs], 2))
        assert [(n, g) for n, g, _ in alternatives(grid, seed=i)] == [(n, g) for n, g, _ in found]
    assert set(met) == set(PRIMITIVES)
    assert alternatives(np.zeros((3, 3), np.uint8), 0) == []


def test_turns_are_numpys() -> None:
    grid = np.arange(6).reshape(2, 3)
    for quarters, element in zip((1, 2, 3), program.TURNS, strict=True):
        assert np.array_equal(turned(grid, element), np.rot90(grid, quarters))


@pytest.mark.parametrize(
    ("words", "message"),
    [({"count": 0}, "at least 1 task"), ({"pairs": 1}, "2 pairs"), ({"lengths": (0.5, 0.2, 0.2)}, "add to 1")],
)
def test_nonsense_is_refused(words: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"count": 3, **words})
