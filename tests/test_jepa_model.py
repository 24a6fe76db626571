"""The JEPA's parts by themselves: a grid is read alike in any company, no prediction knows its answer, and negatives,
queue and copies are what they are said to be; two processes are one."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ran
from test_jepa_system import INFONCE, LEJEPA, run
from test_jepa_system import words as jepa_words
from test_resume import rows, state
from torch import Tensor

from intaglio import config as configuration
from intaglio.config import JepaModelConfig, to_dict
from intaglio.data.arc.alter import KINDS, alter, keys
from intaglio.data.arc.generate import generate
from intaglio.data.arc.table import TaskBatch, Tasks
from intaglio.data.arc.tasks import COLOURS, LARGEST, OUTSIDE
from intaglio.data.batches import fixed_batches
from intaglio.history.run_folder import RunFolder
from intaglio.models.jepa import JepaModel, open_jepa
from intaglio.nn.grids import CHUNK, GridEncoder
from intaglio.objectives.distributed import mean_over_processes
from intaglio.objectives.predictive import infonce_among
from intaglio.systems.jepa import JepaSystem, Queue
from intaglio.training.kinds import kind_of
from intaglio.training.loop import measure

TINY = {"width": 32, "heads": 2, "layers": 1, "predictor_layers": 2, "slots": 4, "embedding": 16, "codes": 64}


def model(seed: int = 0, **options: Any) -> JepaModel:
    torch.manual_seed(seed)
    c = JepaModelConfig(**{"codes_after": 0, **TINY, **options})
    made = JepaModel(to_dict(c), pairs=4, seed=seed)
    torch.nn.init.normal_(made.network.predictor.change.weight, std=0.2)  # it starts at zero
    return made.eval()


def tables(sizes: list[tuple[int, int]], side: int, seed: int = 0) -> Tensor:
    """Random grids of the given heights and widths."""
    rng = np.random.default_rng(seed)
    table = np.full((len(sizes), side, side), OUTSIDE, np.uint8)
    for place, (h, w) in zip(table, sizes, strict=True):
        place[:h, :w] = rng.integers(0, COLOURS, (h, w))
    return torch.from_numpy(table)


def some_tasks(items: int = 6) -> TaskBatch:
    """Generated tasks, the first two of them with a pair less, the third with two less."""
    batch = Tasks(generate(items, 0, 4)).batch(np.arange(items), np.arange(items))
    grids, real = batch.grids.clone(), batch.real.clone()
    real[:2, 0] = real[2, :2] = False
    grids[~real] = OUTSIDE
    return batch._replace(grids=grids, real=real)


@pytest.mark.parametrize("patch", [1, 2, 3])
@torch.no_grad()
def test_a_grid_has_one_embedding_in_any_company(patch):
    torch.manual_seed(0)
    encoder = GridEncoder(32, 2, 2, slots=4, patch=patch).eval()
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 30), (30, 1), (2, 3), (3, 2), *map(tuple, rng.integers(1, 12, (40, 2)).tolist())]
    sizes += [(30, 30)] * (CHUNK // 900 + 2 if patch == 1 else 2)  # more than one chunk holds
    grids = tables(sizes, 30)
    together = encoder(grids)
    mixed = torch.from_numpy(rng.permutation(len(grids)))
    torch.testing.assert_close(encoder(grids[mixed]), together[mixed], rtol=0, atol=1e-5)
    for k in (0, 1, 2, 3, 17, len(grids) - 1):
        h, w = sizes[k]
        for side in {max(h, w), max(h, w) + 1 & ~1, 30}:
            torch.testing.assert_close(encoder(grids[k : k + 1, :side, :side])[0], together[k], rtol=0, atol=1e-5)


@torch.no_grad()
def test_another_cell_place_or_size_is_another_embedding():
    encoder = GridEncoder(32, 1, 2, slots=4, patch=2).eval()
    grid = tables([(5, 6)], 8)
    other = grid.clone()
    other[0, 4, 5] = (other[0, 4, 5] + 1) % COLOURS
    blank = tables([(5, 6)], 8)
    blank[0, :5, :6] = 0
    longer = blank.clone()
    longer[0, 5, :6] = 0  # in the same patches
    variants = [grid, other, blank, longer, *(alter(grid, torch.tensor([u]), "flip") for u in (0.0, 0.3, 0.6, 0.9))]
    z = encoder(torch.cat(variants)).flatten(1)
    apart = torch.cdist(z, z) + 100 * torch.eye(len(z))
    assert apart.min() > 1e-3


@pytest.mark.parametrize("context", ["attention", "mean"])
@pytest.mark.parametrize("quantiser", ["none", "vq", "fsq"])
@torch.no_grad()
def test_no_prediction_knows_its_answer(context, quantiser):
    """Another answer of the same size leaves the prediction as it is, to the last bit; the other ones move."""
    jepa, batch = model(context=context, quantiser=quantiser, levels=(8, 8)), some_tasks()
    jepa.train().read(*batch[:2])  # the codes start where the slots are
    jepa.eval()
    before = jepa.read(batch.grids, batch.real)
    for b, p in ((0, 3), (3, 0), (5, 2)):
        grids = batch.grids.clone()
        inside = grids[b, p, 1] != OUTSIDE
        grids[b, p, 1][inside] = (grids[b, p, 1][inside] + 3) % COLOURS
        after = jepa.read(grids, batch.real)
        for x, y in ((before.predicted, after.predicted), (before.rule, after.rule)):
            same = (x == y).all(-1)
            assert same[b, p]
            if quantiser == "none":  # codes may take both for the same
                assert not same[b][batch.real[b]].all(), "it is a demonstration of the others"
            same[b] = True
            assert same.all(), "other tasks are not concerned"
        assert not torch.equal(before.answers[b, p], after.answers[b, p])
    larger = batch.grids.clone()
    larger[3, 0, 1] = OUTSIDE
    larger[3, 0, 1, :1, :1] = 0
    torch.testing.assert_close(jepa.read(larger, batch.real).predicted[3, 0], before.predicted[3, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("context", ["attention", "mean"])
@torch.no_grad()
def test_a_pair_that_is_missing_says_nothing(context):
    jepa, batch = model(context=context), some_tasks()
    jepa.train().read(*batch[:2])  # until then there are no codes
    jepa.eval()
    before = jepa.read(batch.grids, batch.real)
    assert (model(context=context).read(*batch[:2]).codes == -1).all()
    grids = batch.grids.clone()
    grids[~batch.real] = batch.grids[5, 3]
    after = jepa.read(grids, batch.real)
    torch.testing.assert_close(after.predicted[batch.real], before.predicted[batch.real], rtol=0, atol=1e-5)
    torch.testing.assert_close(after.rule[batch.real], before.rule[batch.real], rtol=0, atol=1e-5)
    assert (after.codes[~batch.real] == -1).all()
    assert (after.codes[batch.real] >= 0).all()
    alone = jepa.read(batch.grids[2:3, 2:], batch.real[2:3, 2:])  # padding stands in front: without it, too
    torch.testing.assert_close(alone.predicted[0], before.predicted[2, 2:], rtol=0, atol=1e-5)


def test_tables_have_the_same_number_of_pairs_whatever_the_tasks():
    """Or predictions would depend on a task's company, and processes would hold tables that do not fit together."""
    corpus = generate(4, 0, 2)
    assert set(np.diff(corpus.first)) == {2}
    data = Tasks(corpus, pairs=4)
    for batch in (data.batch(np.arange(2), np.arange(2)), data.training_batch(np.arange(2), np.arange(2))):
        assert batch.grids.shape[:3] == (2, 4, 2)
        assert batch.real.tolist() == [[False, False, True, True]] * 2
        assert (batch.grids[~batch.real] == OUTSIDE).all()


@torch.no_grad()
def test_a_saved_model_is_the_model(tmp_path):
    jepa, batch = model(target=0.9), some_tasks()
    jepa.save_pretrained(tmp_path)
    found = open_jepa(tmp_path)
    for x, y in zip(found.read(*batch[:2]), jepa.read(*batch[:2]), strict=True):
        assert torch.equal(x, y)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        open_jepa(tmp_path)


# Copies and keys


def shown(grid_SS: Tensor) -> np.ndarray:
    """The grid out of its table."""
    inside = (grid_SS != OUTSIDE).numpy()
    h, w = inside.any(1).sum(), inside.any(0).sum()
    assert inside.sum() == h * w
    assert inside[:h, :w].all(), "one piece in the corner"
    return grid_SS[:h, :w].numpy()


SIZES = [(1, 1), (1, 4), (5, 1), (3, 5), (6, 6), (7, 2)]
CHANGES = 12  # of each grid, evenly over u


def altered(kind: str, side: int = 8) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    grids = tables([size for size in SIZES for _ in range(CHANGES)], side)
    u = (torch.arange(len(grids)) % CHANGES + 0.5) / CHANGES
    before = grids.clone()
    copies = alter(grids, u, kind)
    assert torch.equal(grids, before)
    assert copies.dtype == torch.uint8
    for grid, copy, number in zip(grids, copies, u.tolist(), strict=True):
        yield shown(grid), shown(copy), number


def test_a_copy_of_another_colour_has_one_colour_exchanged_and_nothing_else():
    seen = set()
    for grid, copy, _ in altered("colour"):
        assert grid.shape == copy.shape
        changed = grid != copy
        (old,), (new,) = set(grid[changed].tolist()), set(copy[changed].tolist())
        assert np.array_equal(changed, grid == old)
        seen.add((old, new))
    assert len(seen) > 30


def test_a_flipped_copy_is_mirrored_turned_or_transposed_as_u_says():
    moves = [np.flipud, np.fliplr, lambda g: np.rot90(g, 2), np.transpose]
    for grid, copy, u in altered("flip"):
        assert np.array_equal(copy, moves[int(4 * u)](grid))


def test_a_shifted_copy_is_rolled_by_one_cell_as_u_says():
    moves = [(1, 0), (-1, 0), (0, 1), (0, -1)]
    for grid, copy, u in altered("shift"):
        assert np.array_equal(copy, np.roll(grid, moves[int(4 * u)], (0, 1)))


def test_a_table_without_a_grid_has_no_copy_and_no_key():
    nothing = torch.full((2, 6, 6), OUTSIDE, dtype=torch.uint8)
    for kind in KINDS:
        assert torch.equal(alter(nothing, torch.tensor([0.1, 0.9]), kind), nothing)
    assert keys(nothing).tolist() == [0, 0]


def test_equal_grids_share_a_key_and_no_others_do():
    grids = tables([(h, w) for h in range(1, 11) for w in range(1, 11)] * 5, 10)
    blank = torch.where(grids == OUTSIDE, OUTSIDE, 0).to(torch.uint8)  # shapes alone
    one_cell = grids.clone()
    one_cell[:, 0, 0] = (one_cell[:, 0, 0] + 1) % COLOURS
    for side in (10, 12, 30):
        larger = torch.full((len(grids), side, side), OUTSIDE, dtype=torch.uint8)
        larger[:, :10, :10] = grids
        assert torch.equal(keys(larger), keys(grids))
    everything = torch.cat([grids, blank, one_cell])
    distinct = np.unique(everything.flatten(1).numpy(), axis=0)
    assert len(distinct) > 900
    assert len(keys(everything).unique()) == len(distinct)


# Queue and negatives


def test_the_queue_holds_the_last_answers_and_knows_the_oldest():
    queue, grids = Queue(5, 3), tables([(2, 2)] * 12, LARGEST)
    assert (queue.filled, queue.oldest(3).tolist()) == (0, [])

    def put(*numbers: int) -> None:
        z = torch.tensor(numbers).float()[:, None].expand(-1, 3)
        queue.add(z, torch.where(torch.tensor(numbers)[:, None, None] < 0, OUTSIDE, grids[list(numbers)]))

    def order_of(count: int) -> list[float]:
        return queue.embeddings[queue.oldest(count), 0].tolist()

    put(0, 1, -1, 2)
    assert queue.filled == 3, "a table without a grid is none"
    assert order_of(2) == [0, 1]
    put(3, 4, 5)
    assert queue.filled == 5
    assert order_of(5) == [1, 2, 3, 4, 5]
    assert queue.embeddings[:, 0].tolist() == [5, 1, 2, 3, 4]
    put(6, 7, 8, 9, 10, 11)
    assert order_of(9) == [7, 8, 9, 10, 11]
    assert torch.equal(queue.grids, grids[queue.embeddings[:, 0].long()])
    assert torch.equal(queue.keys, keys(queue.grids))
    restored = Queue(5, 3)
    restored.load_state_dict(queue.state_dict())
    assert torch.equal(restored.embeddings[restored.oldest(5)], queue.embeddings[queue.oldest(5)])


def test_infonce_is_the_formula_and_chance_the_logarithm_of_the_candidates():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, generator=generator), torch.randn(9, 4, generator=generator)
    own, barred = torch.tensor([0, 3, 8, 4, 4]), torch.rand(5, 9, generator=generator) < 0.3
    barred[range(5), own] = False
    scale = torch.tensor(2.0).log()
    found = infonce_among(a, b, own, barred, scale)
    for q in range(5):
        cosines = [float(a[q] @ c / a[q].norm() / c.norm()) for c in b]
        total = sum(math.exp(2 * c) for c, out in zip(cosines, barred[q], strict=True) if not out)
        assert float(found[q]) == pytest.approx(math.log(total) - 2 * cosines[own[q]], rel=1e-5)
    apart = torch.cat([b[:, :2], torch.zeros(9, 2)], 1)
    chance = infonce_among(torch.tensor([[0.0, 0, 3, 4]] * 5), apart, own, barred, torch.tensor(5.0))
    torch.testing.assert_close(chance, (~barred).sum(1).float().log())


def build(*more: str, model: JepaModel | None = None) -> tuple[JepaSystem, Any]:
    """The system of a tiny configuration, and its data."""
    config = configuration.load("jepa-small", jepa_words(Path("unused"), *more))
    kind = kind_of(config)
    prepared = kind.prepare(None, None, None, lambda line: None)
    return kind.build(prepared, model), prepared  # type: ignore[return-value]


def test_a_model_that_says_nothing_scores_the_null():
    """Predictions without direction: every candidate is alike, and the loss is the logarithm of how many there are."""
    system, prepared = build(*INFONCE)
    for p in system.model.network.embed[-1].parameters():
        p.data.zero_()
    items = prepared.some("val", 12)
    found = measure(system, fixed_batches(prepared.data, items, 6), None)["val/loss/infonce"]
    assert found.value == pytest.approx(found.null, rel=1e-6)
    assert found.null > math.log(20)


@pytest.mark.parametrize("target", [0.0, 0.9])
def test_every_term_moves_the_encoder_with_an_averaged_target_and_without(target):
    words = ["--loss.sigreg=0.05", "--loss.relational=0.1", "--loss.colour=0.1", "--loss.flip=0.1", "--loss.shift=0.1"]
    system, prepared = build(f"--model.target={target}", *words)
    terms = system.loss_terms(prepared.data.batch(np.arange(4), np.arange(4)))
    assert terms.keys() >= {"infonce", "sigreg", "relational", "colour", "flip", "shift"}
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term.value, system.model.network.encoder.colour.weight, retain_graph=True)
        assert gradient.abs().max() > 0, name


def test_an_equal_grid_is_no_wrong_answer():
    """A task twice in a batch: its answers are barred as each other's negatives."""
    system, prepared = build(*INFONCE, "--data.augment=false")
    system.eval()
    once = prepared.data.batch(np.array([3]), np.array([0]))
    twice = prepared.data.batch(np.array([3, 3]), np.array([0, 0]))
    with torch.no_grad():
        one, two = (float(system.loss_terms(batch)["infonce"].value) for batch in (once, twice))
    assert two > one, "questions are there twice, and candidates each time"
    assert two < one + math.log(2) - 0.01, "as it would be if the copy of its answer were among them"


# Two processes

STEPS = 3
CASES = {
    "infonce": [*INFONCE, "--model.codes_after=0", "--loss.relational=0.1"],
    "lejepa": [*LEJEPA, "--loss.sigreg=0.3", "--loss.relational=0.1", "--loss.colour=0.1", "--loss.shift=0.1"],
}


def stepped(number: int, world: int, case: str) -> dict[str, Any]:
    """Forward and backward passes of one process's part of some batches, codes and average following each."""
    system, prepared = build(*CASES[case])
    corpus = prepared.corpus
    widest = np.array([corpus.sizes[i:j].max() for i, j in pairwise(corpus.first)]).argsort(kind="stable")
    part = slice(number * 4 // world, (number + 1) * 4 // world)
    sides, losses = [], []
    for step in range(STEPS):
        items = widest[[2 * step, 2 * step + 1, -2 * step - 2, -2 * step - 1]]  # narrow ones, and wide ones
        batch = prepared.data.training_batch(items[part], items[part])
        system.zero_grad()
        total = system.training_step(batch, 0)
        total.backward()
        sides.append(batch.grids.shape[-1])
        losses.append(mean_over_processes(torch.stack([t.value for t in system.terms.values()])))
        if system.model.target is not None:
            system.model.network.quantiser.update()
            system.model.target.follow(system.model.network, 0.9)
    gradients = {}
    for name, p in system.named_parameters():
        assert (p.grad is not None) == p.requires_grad, f"{name}: one process would wait for the other's gradient"
        if p.grad is not None:
            dist.all_reduce(p.grad) if world > 1 else None
            gradients[name] = p.grad / world  # as DDP averages it
    return {"sides": sides, "losses": losses, "gradients": gradients, "buffers": dict(system.named_buffers())}


def worker(number: int, world: int, port: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port}", rank=number, world_size=world)
    torch.save({case: stepped(number, world, case) for case in CASES}, out / f"{number}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_codes_and_queue_of_one(tmp_path):
    """SIGReg, InfoNCE among the other's negatives, copies, relations: at the same global batch, also where the
    processes hold tables of different sizes."""
    mp.spawn(worker, (2, tmp_path / "port", tmp_path), nprocs=2)
    two = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    for case in CASES:
        one, (first, second) = stepped(0, 1, case), (found[case] for found in two)
        assert first["sides"] != second["sides"]
        for mine in (first, second):
            torch.testing.assert_close(mine["losses"], one["losses"], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(mine["gradients"], one["gradients"], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mine["buffers"], one["buffers"], rtol=1e-5, atol=1e-6)


def test_two_processes_train_as_one(tmp_path):
    """Losses, weights, averages, and all that is no weight, a whole run through."""
    more = (*INFONCE, "--train.steps=8", "--train.accumulate=1", "--train.batch_size=8", "--train.validate_items=11")
    code, said = ran("train", "jepa-small", *jepa_words(tmp_path / "two", *more, "--train.devices=2"))
    assert code == 0, said
    two, one = RunFolder(tmp_path / "two" / "a"), run(tmp_path / "one", *more)
    a, b = ({(r[0], r[2]): r[3] for r in rows(x) if r[2].split("/")[1] == "loss"} for x in (two, one))
    assert a == pytest.approx(b, rel=1e-4)
    assert len(a) > 20
    mine, theirs = (state(x) for x in (two, one))
    averages = [x["callbacks"]["EMA"]["average"] for x in (mine, theirs)]
    for ours, expected in ((mine["state_dict"], theirs["state_dict"]), averages):
        assert ours.keys() == expected.keys()
        weights = [torch.cat([x[name].flatten().float() for name in expected]) for x in (ours, expected)]
        assert (weights[0] - weights[1]).norm() < 1e-3 * weights[1].norm()
    for name in ("queue.added", "model.network.quantiser.last_used", "model.network.quantiser.updates"):
        assert torch.equal(mine["state_dict"][name], theirs["state_dict"][name])
