"""Object tokens: components are scipy's, what is told of them is what a loop over cells counts, what is dropped is
counted, and a grid is read alike in any company."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from intaglio.config import JepaConfig, load
from intaglio.data.arc.tasks import COLOURS, OUTSIDE
from intaglio.data.batches import fixed_batches
from intaglio.health.check import check
from intaglio.health.record import of_readings
from intaglio.health.rules import all_rules
from intaglio.nn.grids import sides
from intaglio.nn.objects import NUMBERS, TOKENS, ObjectEncoder, components, dropped, objects
from intaglio.training.kinds import kind_of

SMALL = ["--model.tokens=objects", "--model.width=32", "--model.heads=2", "--model.layers=1", "--model.slots=2"]
SMALL += ["--model.predictor_layers=1", "--model.codes=8", "--data.items=40", "--loss.queue=16", "--train.batch_size=8"]


def spiral(side: int) -> np.ndarray:
    """One cell wide, turning inwards."""
    grid, y, x, dy, dx = np.zeros((side, side), np.uint8), 0, -1, 0, 1
    for length in [side, *(n for n in range(side - 1, 0, -2) for _ in "ab")]:
        for _ in range(length):
            y, x = y + dy, x + dx
            grid[y, x] = 5
        dy, dx = dx, -dy
    return grid


def comb(side: int, colour: int) -> np.ndarray:
    """Teeth that meet in the last row only, so that reading order learns of it last; between them teeth of another."""
    grid = np.zeros((side, side), np.uint8)
    grid[:, ::2] = grid[-1] = colour
    grid[:-2, 1::2] = 10 - colour
    return grid


def grids() -> Tensor:
    """Noise of few and many colours, blobs, shapes that are slow to follow, nothing at all; of all sizes."""
    rng = np.random.default_rng(0)
    found = [spiral(30), spiral(29).T, np.rot90(spiral(28), 2), comb(30, 3), comb(29, 6).T, np.flipud(comb(30, 1))]
    found += [np.zeros((4, 7), np.uint8), np.full((30, 30), 9, np.uint8), np.ones((1, 1), np.uint8)]
    found += [(np.indices((30, 30)).sum(0) % 2 + 1).astype(np.uint8)]
    for k in range(150):
        h, w = rng.integers(1, 31, 2)
        noise = rng.integers(0, 2 + k % 9, (h, w), np.uint8)
        found.append(noise.repeat(1 + k % 3, 0).repeat(1 + k % 2, 1)[:30, :30])
    table = np.full((len(found) + 1, 30, 30), OUTSIDE, np.uint8)  # and a table without a grid
    for place, grid in zip(table, found, strict=False):
        place[: len(grid), : grid.shape[1]] = grid
    return torch.from_numpy(table)


def by_hand(grid: np.ndarray) -> list[tuple[list[tuple[int, int]], int, list[float]]]:
    """All components by scipy: cells in reading order, colour, and what is told of it; the largest first."""
    h, w = (grid != OUTSIDE).any(1).sum(), (grid != OUTSIDE).any(0).sum()
    found = []
    for colour in range(1, COLOURS):
        labels, count = ndimage.label(grid == colour)
        for label in range(1, count + 1):
            mine = np.pad(labels == label, 1)
            open_sides = sum(int((mine & ~np.roll(mine, s, axis)).sum()) for s in (1, -1) for axis in (0, 1))
            y, x = np.nonzero(labels == label)
            top, left, bottom, right = y.min(), x.min(), y.max() + 1, x.max() + 1
            told = [len(y) / (h * w), open_sides / (h * w), (bottom - top) / h, (right - left) / w]
            told += [np.log((right - left) / (bottom - top)), (y.mean() + 0.5) / h, (x.mean() + 0.5) / w]
            told += [top / h, left / w, bottom / h, right / w]
            found.append((list(zip(y.tolist(), x.tolist(), strict=True)), colour, told))
    return sorted(found, key=lambda c: (-len(c[0]), c[0][0]))


def test_components_are_scipys():
    tables = grids()
    c, per = components(tables), tables[0].numel()
    ours: list[list[int]] = [[] for _ in c.first]
    for cell, k in zip(c.cells.tolist(), c.member.tolist(), strict=True):
        ours[k].append(cell)
    theirs = [
        [g * per + y * 30 + x for y, x in cells] for g, t in enumerate(tables.numpy()) for cells, _, _ in by_hand(t)
    ]
    assert ours == sorted(theirs)
    assert c.first.tolist() == [cells[0] for cells in ours]


def test_what_is_told_is_what_a_loop_counts():
    tables = grids()
    told = objects(tables)
    assert told.numbers.shape == (len(tables), TOKENS, NUMBERS)
    for g, table in enumerate(tables.numpy()):
        expected = by_hand(table)[:TOKENS]
        assert int(told.there[g]) == len(expected)
        assert told.colour[g].tolist() == [colour for _, colour, _ in expected] + [0] * (TOKENS - len(expected))
        numbers = torch.zeros(TOKENS, NUMBERS)
        numbers[: len(expected)] = torch.tensor([n for _, _, n in expected]).view(-1, NUMBERS)
        torch.testing.assert_close(told.numbers[g], numbers, rtol=1e-5, atol=1e-6)


def test_what_is_dropped_is_counted():
    tables = grids()
    found = [[len(cells) for cells, _, _ in by_hand(t)] for t in tables.numpy()]
    shares = [sum(map(f, found)) / sum(map(g, found)) for f, g in ((_few, len), (lambda a: sum(a[TOKENS:]), sum))]
    assert dropped(tables) == pytest.approx(tuple(shares), rel=1e-6)
    assert dropped(tables[6:9]) == (0.0, 0.0)
    assert dropped(tables[-1:]) == (0.0, 0.0)
    checkerboard = dropped(tables[9:10])
    assert checkerboard == pytest.approx((1 - TOKENS / 900,) * 2)


def _few(areas: list[int]) -> int:
    return max(0, len(areas) - TOKENS)


@torch.no_grad()
def test_a_grid_is_read_alike_in_any_company():
    torch.manual_seed(0)
    encoder, tables = ObjectEncoder(32, 2, 2, slots=3).eval(), grids()
    together = encoder(tables)
    assert torch.isfinite(together).all()
    mixed = torch.randperm(len(tables), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(tables[mixed]), together[mixed], rtol=0, atol=1e-5)
    for k, (h, w) in enumerate(zip(*(side.tolist() for side in sides(tables)), strict=True)):
        if k % 12 == 0 or k > len(tables) - 3:
            side = max(h, w, 1)
            torch.testing.assert_close(encoder(tables[k : k + 1, :side, :side])[0], together[k], rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        lower = encoder(tables)
        torch.testing.assert_close(lower[mixed], encoder(tables[mixed]), rtol=0, atol=0.05)
    torch.testing.assert_close(lower.float(), together, rtol=0, atol=0.2)


@torch.no_grad()
def test_objects_are_told_apart_by_what_is_told_of_them_and_by_nothing_else():
    torch.manual_seed(0)
    encoder = ObjectEncoder(32, 1, 2, slots=2).eval()
    grid = torch.zeros(1, 30, 30, dtype=torch.uint8)
    grid[0, 2:4, 2:5], grid[0, 10, 10] = 3, 7
    moved, recoloured, larger, smaller = (grid.clone() for _ in range(4))
    moved[0, 10, 10], moved[0, 10, 11] = 0, 7
    recoloured[recoloured == 7] = 8
    larger[0, 10, 11] = 7
    smaller = smaller[:, :29, :29]
    for other in (moved, recoloured, larger, smaller):
        assert (encoder(other) - encoder(grid)).abs().max() > 1e-3
    crowded = torch.zeros(1, 30, 30, dtype=torch.uint8)
    crowded[0, ::3, :8] = crowded[0, ::3, 10:18] = 4  # twenty bars, of which eight rows are read
    unread, read = crowded.clone(), crowded.clone()
    unread[0, 24, :8] = read[0, 21, 10:18] = 9
    assert torch.equal(encoder(unread), encoder(crowded))
    assert not torch.equal(encoder(read), encoder(crowded))


def test_every_parameter_learns():
    encoder = ObjectEncoder(32, 1, 2, slots=2)
    encoder(grids()).square().sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]


def test_check_counts_it_and_finds_no_fault():
    few = ["--data.items=300", "--loss.queue=256"]
    cells, ours = (check(load("jepa-small", [*few, f"--model.tokens={kind}"])) for kind in ("cells", "objects"))
    assert [f.rule for f in ours.findings] == [f.rule for f in cells.findings]
    assert not [f for f in ours.findings if f.severity == "fail"]
    ours_alone = sum(p.numel() for p in ObjectEncoder(192, 3, 6, 16).parameters())
    assert ours.parameters.modules["encoder"] == ours_alone
    assert ours.memory.activations_bytes < cells.memory.activations_bytes
    with pytest.raises(ValueError, match=r"model\.patch has no effect on model\.tokens objects"):
        load("jepa-small", ["--model.tokens=objects", "--model.patch=1"])


@torch.no_grad()
@pytest.mark.parametrize(("noise", "severity"), [(True, ["fail"]), (False, [])])
def test_a_run_that_drops_objects_is_told_so(tmp_path, noise, severity):
    """J: 61 % of objects dropped. Noise has more of them than tokens, scenes of objects have not."""
    source = write_noise(tmp_path / "noise") if noise else "generated"
    config = load("jepa-small", [*SMALL, f"--data.source={source}", *(["--data.items=null"] if noise else [])])
    assert isinstance(config, JepaConfig)
    kind = kind_of(config)
    prepared = kind.prepare(None, None, None, print)
    system = kind.build(prepared).eval()
    batch = next(iter(fixed_batches(prepared.data, prepared.splits["val"], 16)))
    readings = {f"train/tokens/{q}": r for q, r in system.read(batch)["train/tokens"].items()}
    shares = dropped(batch.grids.flatten(0, 2))
    assert [(r.value, r.null) for r in readings.values()] == [(share, 0.0) for share in shares]
    (rule,) = (r for r in all_rules() if r.id == "data-replaced")
    findings = list(rule.judge(of_readings(readings), rule.limits))
    assert [f.severity for f in findings] == severity
    if noise:
        assert "of the objects are in no token" in findings[0].message


def write_noise(folder: Path) -> Path:
    """Tasks of the document: grids whose cells are drawn one by one."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(24):
        pairs = [{side: rng.integers(0, 10, (12, 12)).tolist() for side in ("input", "output")} for _ in range(4)]
        (folder / f"{k}.json").write_text(json.dumps({"train": pairs[:3], "test": pairs[3:]}))
    return folder
