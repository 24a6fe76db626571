"""The denoisers' networks: the documented counts, conditions, nulls, masks, batches, layouts, precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.nn.attention import attend
from intaglio.nn.condition import Condition
from intaglio.nn.documented_unet import DocumentedUNet, DocumentedUpsample
from intaglio.nn.dropout import Dropout
from intaglio.nn.time_embedding import sinusoids
from intaglio.nn.unet import UNet, Upsample

SMALL = {"widths": (16, 32, 32), "blocks": 1, "attention": (1,), "dropout": 0.0, "head": 16}
KINDS = ("classes", "pooled", "tokens", "documented", "documented table")


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def awake(network: nn.Module) -> nn.Module:
    """``network`` in evaluation with the layers that start at zero disturbed."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def case(kind: str, batch: int = 3) -> tuple[nn.Module, Tensor, Tensor, Condition]:
    """A network of a kind, awake, and a batch for it."""
    torch.manual_seed(0)
    labels, x, t = torch.arange(batch) % 4, torch.randn(batch, 3, 16, 24), torch.linspace(0, 499, batch)
    if kind.startswith("documented"):
        table = torch.randn(5, 12) if kind.endswith("table") else None
        network: nn.Module = DocumentedUNet(classes=4, base=16, table=table)
        return awake(network), x, t, Condition(labels)
    network = UNet(**SMALL, **{kind: 4 if kind == "classes" else 12})
    real = torch.arange(5) < torch.arange(batch)[:, None] % 4 + 2
    pooled, tokens = torch.randn(batch, 12), torch.randn(batch, 5, 12)
    condition = {"classes": Condition(labels), "pooled": Condition(pooled_BD=pooled)}
    return awake(network), x, t, condition.get(kind, Condition(tokens_BTD=tokens, real_BT=real))


def far(a: Tensor, b: Tensor) -> bool:
    """Whether every image of ``a`` differs visibly from that of ``b``."""
    return bool(((a - b).flatten(1).norm(dim=1) > 1e-3 * b.flatten(1).norm(dim=1)).all())


def test_documented_parameter_counts():
    clip = torch.zeros(11, 512)
    with torch.device("meta"):
        latent = DocumentedUNet(channels=4, base=256, table=clip)
    counts = [parameters(network) for network in (DocumentedUNet(), DocumentedUNet(table=clip), latent)]
    assert counts == [3_385_731, 4_177_539, 55_934_468]


def test_documented_sides_and_first_prediction():
    network, sides = DocumentedUNet(classes=4, base=16), []
    for level in network.levels:
        level.register_forward_hook(lambda _, __, h: sides.append(h.shape[-1]))
    out = network(torch.randn(1, 3, 96, 96), torch.tensor([499]), Condition(torch.tensor([0])))
    assert sides == [96, 48, 24, 48]
    assert out.shape == (1, 3, 96, 96)
    assert not out.any()


def test_attention_to_one_token_is_blind():
    """The documented text condition adds one vector at every place, and its query and key never learn."""
    network, x, t, condition = case("documented table")
    attention = network.levels[1].cross_attention
    y = attention(torch.randn(2, 32, 8, 8), torch.randn(2, 1, 12))
    torch.testing.assert_close(y, y[:, :, :1, :1].expand_as(y))
    network(x, t, condition).square().mean().backward()
    assert attention.query.weight.grad.abs().max() < 1e-6 * attention.value.weight.grad.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    network, x, t, condition = case(kind)
    network(x, t, condition.drop(torch.tensor([True, False, False]))).square().mean().backward()
    blind = ("cross_attention.query", "cross_attention.key.") if kind == "documented table" else ()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    dead = [name for name in dead if not any(word in name for word in blind)]
    assert not dead


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_condition_is_seen_and_can_be_dropped(kind):
    network, x, t, condition = case(kind)
    given, swapped = network(x, t, condition), network(x, t, condition.rows(torch.tensor([1, 2, 0])))
    null = network(x, t, condition.drop(torch.ones(3, dtype=torch.bool)))
    assert far(given, swapped)
    assert far(given, null)
    assert far(given, network(x, t + 50, condition))
    other = condition.rows(torch.tensor([2, 0, 1])).drop(torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(null, network(x, t, other), rtol=0, atol=0)
    some = network(x, t, condition.drop(torch.tensor([False, True, False])))
    torch.testing.assert_close(some, torch.stack([given[0], null[1], given[2]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_an_item_alone_is_as_in_a_batch(kind):
    network, x, t, condition = case(kind)
    together = network(x, t, condition)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], condition.rows(slice(i, i + 1))) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, network(x, t, condition), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["tokens", "documented"])
@torch.inference_mode()
def test_channels_last_and_bf16_give_the_same(kind):
    network, x, t, condition = case(kind)
    plain = network(x, t, condition)
    network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x, t, condition), plain, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, t, condition).float()
    assert (rough - plain).norm() < 0.03 * plain.norm()


@pytest.mark.parametrize("kind", ["tokens", "documented"])
def test_a_batch_is_learnt_channels_last_in_bf16(kind):
    network, x, t, condition = case(kind)
    network, x = network.train().to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer, losses = torch.optim.AdamW(network.parameters(), 2e-3), []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (network(x, t, condition) - x.roll(1, 0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] < 0.6


@torch.inference_mode()
def test_padding_is_not_attended_to():
    network, x, t, condition = case("tokens")
    noisy = torch.where(condition.real_BT[..., None], condition.tokens_BTD, 100.0)
    torch.testing.assert_close(network(x, t, condition._replace(tokens_BTD=noisy)), network(x, t, condition))
    assert far(network(x, t, condition._replace(real_BT=None))[:1], network(x, t, condition)[:1])
    assert network(x, t, condition._replace(real_BT=torch.zeros(3, 5, dtype=torch.bool))).isfinite().all()


@torch.inference_mode()
def test_the_empty_prompt_as_null():
    """Dropping a text is giving the empty prompt: as long as it is, whatever stands around it."""
    torch.manual_seed(0)
    real = torch.tensor([[True, True, True, False]])
    empty = Condition(pooled_BD=torch.randn(1, 12), tokens_BTD=torch.randn(1, 4, 8), real_BT=real)
    network = awake(UNet(**SMALL, pooled=12, tokens=8, empty=empty))
    assert not [name for name, _ in network.named_parameters() if "null" in name]
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 400.0])
    text = Condition(pooled_BD=torch.randn(2, 12), tokens_BTD=torch.randn(2, 2, 8))
    as_prompt = network(x, t, empty.rows(torch.zeros(2, dtype=torch.int64)))
    torch.testing.assert_close(network(x, t, text.drop(torch.ones(2, dtype=torch.bool))), as_prompt)
    again = UNet(**SMALL, pooled=12, tokens=8, empty=empty._replace(pooled_BD=torch.zeros(1, 12))).eval()
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(x, t, text), network(x, t, text), rtol=0, atol=0)


def test_upsampling_is_nearest_and_a_convolution():
    upsample, x = Upsample(6, 4).double(), torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    slow = upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    fast = upsample(x)
    torch.testing.assert_close(fast, slow)
    weights = [x, *upsample.parameters()]
    direction = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad(y, weights, direction) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [1, 8])
def test_documented_upsampling_is_what_it_says(batch):
    """Few places and many go different ways."""
    upsample = DocumentedUpsample(32).double()
    x = torch.randn(batch, 32, 3, 5, dtype=torch.float64, requires_grad=True)
    slow = upsample.narrow(upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
    weights = [x, *upsample.parameters()]
    direction = torch.randn_like(slow)
    torch.testing.assert_close(upsample(x), slow)
    for a, b in zip(*(torch.autograd.grad(y, weights, direction) for y in (upsample(x), slow)), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_drops_its_share_alike_in_both_directions():
    dropout, x = Dropout(0.1), torch.ones(7, 33, 41, 43, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x)
    y.sum().backward()
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.9])
    apart = (y.detach() == 0).float() - 0.1
    assert abs(apart.mean()) < 0.002
    for dim in range(4):  # neighbours don't share their bits
        assert abs((apart * apart.roll(1, dim)).mean() / 0.09) < 0.01
    assert torch.equal(x.grad, y)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients_are_those_of_torch(dtype):
    parts = [torch.randn(2, 4, n, 16, dtype=torch.float64, requires_grad=True) for n in (9, 11, 11)]
    exact = F.scaled_dot_product_attention(*parts)
    ours = attend(*(part.to(dtype) for part in parts)).double()
    direction = torch.randn_like(exact)
    assert (ours - exact).norm() < 0.02 * exact.norm()
    for a, b in zip(*(torch.autograd.grad(y, parts, direction) for y in (ours, exact)), strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_sinusoids_tell_neighbouring_steps_apart():
    with torch.autocast("cpu", torch.bfloat16):
        a, b = sinusoids(torch.tensor([499, 500]), 64)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a[32], torch.tensor(math.sin(499)), rtol=0, atol=1e-4)
    assert (a - b).norm() > 0.5


@torch.inference_mode()
def test_unconditional_and_latent_channels():
    network = awake(UNet(channels=4, **SMALL))
    assert network(torch.randn(2, 4, 8, 12), torch.tensor([0, 9]), Condition()).shape == (2, 4, 8, 12)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("classes", Condition(), "has none: give Condition"),
        ("pooled", Condition(pooled_BD=torch.zeros(2, 12)), "has 2 rows and the images 3"),
        ("classes", Condition(torch.tensor([0, 1, 4])), "the classes 0 to 3"),
        ("documented", Condition(torch.tensor([0, -1, 3])), "the classes 0 to 3"),
    ],
)
def test_conditions_amiss(kind, change, message):
    network, x, t, _ = case(kind)
    with pytest.raises(ValueError, match=message):
        network(x, t, change)


def test_sides_levels_and_tables_amiss():
    for kind in ("classes", "documented"):
        network, _, t, condition = case(kind)
        with pytest.raises(ValueError, match="30×32 cannot be halved 2 times: give sides divisible by 4"):
            network(torch.zeros(3, 3, 30, 32), t, condition)
    with pytest.raises(ValueError, match="there are levels 0 to 2"):
        UNet(widths=(16, 16, 16), attention=(3,))
    with pytest.raises(ValueError, match="40 channels cannot be shared among 3 heads"):
        UNet(widths=(16, 40), head=12)
    with pytest.raises(ValueError, match="10 rows"):
        DocumentedUNet(table=torch.zeros(10, 512))
