"""Finite scalar quantisation: equal to vector-quantize-pytorch's, every level of odd and even numbers, no state."""

from math import prod

import pytest
import torch
import vector_quantize_pytorch as oracle

from intaglio.nn.fsq import FSQ, Whitening

LEVELS = [(8, 5, 5, 5), (3, 4), (7,), (16, 3, 5)]


@pytest.mark.parametrize("levels", LEVELS)
def test_values_codes_and_gradients_are_the_oracles(levels):
    theirs, ours = oracle.FSQ(list(levels)), FSQ(levels)
    x = 3 * torch.randn(2, 500, len(levels), generator=torch.Generator().manual_seed(0))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    q, codes, loss = ours(a)
    their_q, their_codes = theirs(b)
    torch.testing.assert_close(q, their_q, rtol=0, atol=1e-6)
    assert torch.equal(codes, their_codes.long())
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (q * weights).sum().backward()
    (their_q * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.vectors, theirs.implicit_codebook, rtol=0, atol=1e-7)
    assert float(loss) == 0
    assert not loss.requires_grad
    assert not ours.state_dict()


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_is_reached_and_leads_back_to_its_token(levels):
    fsq, sweep = FSQ(levels), torch.linspace(-4, 4, 401)
    alone = fsq(sweep[:, None].expand(-1, len(levels))).x
    first = [torch.stack([sweep[level == value][0] for value in level.unique()]) for level in alone.T]
    q, codes, _ = fsq(torch.cartesian_prod(*first).view(-1, len(levels)))
    assert sorted(codes.tolist()) == list(range(prod(levels)))
    torch.testing.assert_close(fsq.vectors[codes], q, rtol=0, atol=1e-6)
    for digit, level in enumerate(levels):
        values = fsq.vectors[:, digit].unique()
        assert len(values) == level
        expected = torch.arange(level) - level // 2
        torch.testing.assert_close(values * (level // 2), expected.float())


def test_zero_is_a_level_and_padding_is_none():
    fsq = FSQ((4, 5))
    real = torch.tensor([[True, False]])
    q, codes, _ = fsq(torch.tensor([[[0.0, 0.0], [torch.nan, 1.0]]]).bfloat16(), real)
    assert q.dtype == torch.bfloat16
    assert q.tolist() == [[[0, 0], [0, 0]]]
    assert codes.tolist() == [[2 + 2 * 4, -1]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="two cannot be centred"):
        FSQ((2, 5))
    with pytest.raises(ValueError, match=r"give real numbers \(…, 2\)"):
        FSQ((4, 5))(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"give \(3,\)"):
        FSQ((4, 5))(torch.zeros(3, 2), torch.ones(2, dtype=torch.bool))


def test_whitened_numbers_have_unit_covariance_whatever_they_were():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1e-3, 0, 0], [2e-3, 5, 0], [0, 4, 1]])
    whitening, real = Whitening(3), torch.rand(64, 50, generator=generator) < 0.8
    for _ in range(20):
        x = torch.randn(64, 50, 3, generator=generator) @ mixing.T + torch.tensor([10.0, -3, 0])
        seen = whitening(x.masked_fill(~real[..., None], 1e6), real)
    assert not seen[~real].any()
    whitening.eval()
    before = {name: tensor.clone() for name, tensor in whitening.state_dict().items()}
    x = torch.randn(50_000, 3, generator=generator) @ mixing.T + torch.tensor([10.0, -3, 0])
    white = whitening(x, torch.ones(len(x), dtype=torch.bool))
    torch.testing.assert_close(white.mean(0), torch.zeros(3), rtol=0, atol=0.05)
    torch.testing.assert_close(white.T.cov()[1:, 1:], torch.eye(2), rtol=0, atol=0.05)
    assert 0 < float(white[:, 0].var()) < 0.01  # a thousandth of the others: the jitter keeps its noise down
    assert all(torch.equal(tensor, before[name]) for name, tensor in whitening.state_dict().items())


def test_before_it_has_counted_anything_whitening_is_the_identity():
    whitening, x = Whitening(2).eval(), torch.randn(5, 2)
    assert torch.equal(whitening(x, torch.ones(5, dtype=torch.bool)), x)


def test_codes_stay_in_use_where_numbers_shrink():
    whitening, fsq = Whitening(2), FSQ((5, 5))
    x = 1e-2 * torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) + 3
    real = torch.ones(4096, dtype=torch.bool)
    assert len(fsq(x, real).codes.unique()) == 1
    assert len(fsq(whitening(x, real), real).codes.unique()) == 25
