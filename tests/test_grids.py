"""Sequences read together, an answer without its rule, a mask that is added: faster, and what they were."""

import pytest
import torch
from torch import Tensor

from intaglio.nn.attention import attend
from intaglio.nn.grids import Predictor
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
@pytest.mark.parametrize("pooled", [False, True])
def test_answers_alone_are_those_with_the_rule_and_see_the_others(pooled):
    torch.manual_seed(0)
    predictor = Predictor(32, 2, 2, slots=3, pairs=4, pooled=pooled)
    torch.nn.init.normal_(predictor.change.weight, std=0.2)  # it starts at zero
    slots, real = torch.randn(5, 4, 2, 3, 32, generator=random()), torch.ones(5, 4, dtype=torch.bool)
    real[1, 0] = real[2, :2] = False
    answers, rule = predictor(slots, slots, real)
    assert answers.shape == (5, 4, 3, 32)
    assert rule.shape == (5, 4, 2 * 3 * 32)
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
