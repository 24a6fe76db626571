"""Muon against libraries: PyTorch's own on matrices, its AdamW on the rest; and what is orthogonalised."""

import pytest
import torch
from torch import nn

from intaglio.systems.muon import Muon, orthogonalise
from intaglio.systems.optimizers import parameter_groups


def steps(optimizer, parameters, count=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def weights(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_singular_values_become_one():
    made = orthogonalise(torch.randn(3, 40, 200, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(made)
    assert 0.6 < values.min() <= values.max() < 1.25


def test_matrices_move_as_with_pytorch_s_muon():
    ours, theirs = weights((24, 40), (40, 24), (24, 40)), weights((24, 40), (40, 24), (24, 40))
    groups = [{"params": ours, "orthogonal": True, "weight_decay": 0.1}]
    steps(Muon(groups, lr=0.02, betas=(0.9, 0.99), bf16=True), ours)
    steps(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * 0.2 * 5 * 0.05)  # a twentieth of the way, for bfloat16


def test_a_kernel_moves_as_the_matrix_that_it_is():
    (kernel,), (matrix,) = weights((32, 20, 3, 3)), weights((32, 180))
    assert torch.equal(kernel.flatten(1), matrix)
    for p in (kernel, matrix):
        steps(Muon([{"params": [p], "orthogonal": True}], lr=0.02, betas=(0.9, 0.99)), [p])
    torch.testing.assert_close(kernel.flatten(1), matrix)


def test_the_rest_moves_as_with_adamw():
    ours, theirs = weights((24, 4), (7,)), weights((24, 4), (7,))
    steps(Muon([{"params": ours, "weight_decay": 0.1}], lr=0.02, betas=(0.9, 0.99)), ours)
    steps(torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.99), weight_decay=0.1), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_it_goes_on_from_its_state_as_if_it_had_not_stopped():
    def fresh(parameters):
        groups = [{"params": parameters[:1], "orthogonal": True}, {"params": parameters[1:]}]
        return Muon(groups, lr=0.02, betas=(0.9, 0.99))

    whole, parts = weights((24, 40), (7,)), weights((24, 40), (7,))
    one, two = fresh(whole), fresh(parts)
    steps(one, whole), steps(two, parts)
    three = fresh(parts)
    three.load_state_dict(two.state_dict())
    steps(one, whole), steps(three, parts)
    assert all(map(torch.equal, whole, parts))


def test_what_enters_or_leaves_the_model_is_not_orthogonalised():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 8, 1), nn.Embedding(50, 32))
    hidden, ends, rest = parameter_groups(model, 0.1)
    assert [p.shape for p in hidden["params"]] == [(32, 32, 3, 3)]
    assert {p.shape[0] for p in ends["params"]} == {32, 8}
    assert [g["orthogonal"] for g in (hidden, ends, rest)] == [True, False, False]
    assert rest["weight_decay"] == 0
    assert len(rest["params"]) == 4


def test_parameters_without_a_gradient_stay():
    (p,) = weights((24, 40))
    before = p.detach().clone()
    assert Muon([{"params": [p], "orthogonal": True}], lr=1.0, betas=(0.9, 0.99)).step(lambda: 3.0) == pytest.approx(3)
    assert torch.equal(p, before)
