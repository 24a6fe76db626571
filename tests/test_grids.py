"""Sequences read together, an answer without its rule, a mask that is added: faster, and what they were."""

import pytest
import torch
from torch import Tensor

from intaglio.data.arc.tasks import OUTSIDE
from intaglio.nn.attention import attend
from intaglio.nn.grids import Predictor, colours_of_regions
from intaglio.nn.grids import sides as sides_of
from intaglio.nn.packed import Run, first_of
from intaglio.nn.transformer import blocks


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_packed_sequences_come_out_as_by_themselves():
    torch.manual_seed(0)
    stack = blocks(3, 32, 2, 64, 0.0, cross=False)
    runs = []
    for k, (rows, length) in enumerate([(5, 4), (1, 40), (30, 17)]):
        x = torch.randn(rows, length, 32, generator=random(k)).requires_grad_()
        runs.append(Run(x, torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=random(k))))

    def plainly(run: Run) -> Tensor:
        y = run.x
        for block in stack:
            y = block(y, mask=run.real[:, None, None])
        return y[:, :3]

    learnt = [*stack.parameters(), *(run.x for run in runs)]
    made = [first_of(stack, runs, 3), torch.cat([plainly(run) for run in runs])]
    torch.testing.assert_close(*made, rtol=0, atol=1e-5)
    ours, plain = (torch.autograd.grad(y.square().sum(), learnt) for y in made)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("pooled", "content"), [(False, 0), (True, 0), (False, 8)])
def test_answers_alone_are_those_with_the_rule_and_see_the_others(pooled, content):
    torch.manual_seed(0)
    predictor = Predictor(32, 2, 2, slots=3, pairs=4, pooled=pooled, content=content)
    torch.nn.init.normal_(predictor.change.weight, std=0.2)  # it starts at zero
    slots, real = torch.randn(5, 4, 2, 3, 32, generator=random()), torch.ones(5, 4, dtype=torch.bool)
    real[1, 0] = real[2, :2] = False
    answers, rule = predictor(slots, slots, real)
    assert answers.shape == (5, 4, 3, 32)
    assert rule.shape == (5, 4, 2 * 3 * 32 + (9 if content else 0))
    torch.testing.assert_close(predictor.answers(slots, slots, real), answers, rtol=0, atol=1e-5)
    for pair in range(4):
        for part in range(2):
            other = slots.clone()
            other[:, pair, part] += torch.randn(32, generator=random(1))
            moved = (predictor.answers(other, other, real) - answers).abs().flatten(2).amax(2) > 1e-5
            seen = real[:, pair, None].expand(-1, 4).clone()
            seen[:, pair] = part == 0  # a question is seen, its answer never
            assert torch.equal(moved, seen)


def test_a_mask_that_is_added_is_one_that_is_filled_in():
    shape = (7, 2, 11, 8)
    made = [torch.randn(shape, generator=random(k)).bfloat16().requires_grad_() for k in range(3)]
    mask = torch.rand(7, 1, 1, 11, generator=random(3)) > 0.4
    mask[..., 0] = True
    upstream = torch.randn(shape, generator=random(4)).bfloat16()
    q, k, v = made
    ours = attend(q, k, v, mask)
    plain = (q * 8**-0.5 @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    assert torch.equal(ours, plain)
    for a, b in zip(*(torch.autograd.grad(y, made, upstream) for y in (ours, plain)), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("sides", [(7, 5), (12, 12), (3, 10), (1, 1)])
def test_regions_of_a_turned_grid_are_its_regions_in_another_order(sides):
    h, w = sides
    grid = torch.randint(0, 10, (1, h, w), generator=random(), dtype=torch.uint8)
    variants = [grid, grid.flip(1), grid.flip(2), grid.rot90(2, (1, 2)), grid.mT, grid.rot90(1, (1, 2))]
    shares = []
    for x in variants:
        table = torch.full((1, 14, 14), OUTSIDE, dtype=torch.uint8)
        table[:, : x.shape[1], : x.shape[2]] = x
        shares.append(colours_of_regions(table, *sides_of(table), 4)[0].view(4, 4, 10))
    plain = shares[0]
    torch.testing.assert_close(plain.sum(-1), torch.ones(4, 4), rtol=0, atol=1e-5)
    counts = torch.bincount(grid.flatten().long(), minlength=10) / grid.numel()
    torch.testing.assert_close(plain.mean((0, 1)), counts, rtol=0, atol=1e-5)
    turned = [
        plain,
        plain.flip(0),
        plain.flip(1),
        plain.rot90(2, (0, 1)),
        plain.transpose(0, 1),
        plain.rot90(1, (0, 1)),
    ]
    for a, b in zip(shares, turned, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
def test_contents_are_carried_the_way_that_the_demonstrations_show():
    """Where all outputs are mirrored inputs, the question's contents are mirrored; where nothing moves, none."""
    predictor, mirror = (
        Predictor(48, 1, 2, slots=16, pairs=4, pooled=False, content=16),
        torch.arange(16).view(4, 4).flip(1),
    )
    before = torch.randn(3, 4, 16, 48, generator=random())
    before[..., :16] /= before[..., :16].norm(
        dim=-1, keepdim=True
    )  # contents of one size, as those of full regions are
    for order in (mirror.flatten(), torch.arange(16)):
        slots = torch.stack([before, before[:, :, order]], 2)
        gain, way = predictor.carried(slots, slots, torch.ones(3, 4, dtype=torch.bool))
        assert torch.equal(way.argmax(-1), order.expand(3, 4, -1))
        assert not gain[..., 16:].any()
        wanted = slots[:, :, 1, :, :16] - slots[:, :, 0, :, :16]
        cosine = (
            torch.cosine_similarity(gain[..., :16].flatten(1), wanted.flatten(1)) if wanted.any() else torch.ones(1)
        )
        assert cosine.min() > 0.95
        if not wanted.any():
            assert gain.abs().max() < 0.3
