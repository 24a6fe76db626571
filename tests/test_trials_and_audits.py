"""Trials and audits on models whose answer is known: what they find, and that they leave everything as it was."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from intaglio.health import audits, trials
from intaglio.history import NotMeasured, Reading


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(model):
    """Bits of all that a trial or an audit must leave alone: weights, buffers, gradients, their places, modes, RNG."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    tensors |= {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    bits = {
        n: (t.data_ptr(), t.dtype, t.requires_grad, t.detach().double().numpy().tobytes()) for n, t in tensors.items()
    }
    chance = torch.get_rng_state().tolist(), random.getstate(), [str(x) for x in np.random.get_state()]
    return bits, [m.training for m in model.modules()], chance


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before = state(model)
    yield
    assert state(model) == before


class Decoder(nn.Module):
    """The next of six tokens from the last one and a latent, whose first four dimensions say which token it is."""

    def __init__(self, uses):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.latent, self.head = nn.Embedding(5, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        self.uses = uses

    def forward(self, z, last):
        hidden = self.embed(last) + (self.latent(z)[:, None] if self.uses else 0)
        return self.head(F.gelu(hidden))

    def losses(self, z, tokens):
        """Each item's summed loss, (N,)."""
        last = F.pad(tokens[:, :-1], (1, 0), value=4)
        return F.cross_entropy(self(z, last).transpose(1, 2), tokens, reduction="none").sum(1)


def items(n, seed):
    """Latents (n, 8) and six tokens each: those that the latent names, and a coin in between."""
    z = normal(n, 8, seed=seed)
    coins = torch.randint(4, (n, 3), generator=torch.Generator().manual_seed(seed))
    return z, torch.stack([z[:, :4].argmax(1, keepdim=True).expand(n, 3), coins], 2).flatten(1)


@pytest.fixture(scope="module", params=[True, False], ids=["uses", "ignores"])
def decoder(request):
    """A decoder after 60 steps, and whether it uses its latent."""
    model = Decoder(request.param)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model.losses(*items(256, seed=1)).mean().backward()
        optimizer.step()
    return model.eval()


# trials


def test_exchange_costs_a_decoder_what_it_takes_from_its_latent(decoder):
    z, tokens = items(128, seed=2)

    def loss(other):
        with torch.no_grad():
            return decoder.losses(other, tokens).numpy(), np.full(128, 6)

    with untouched(decoder):
        found = trials.cost_of_exchange(loss, z, normal(128, 8, seed=3))
    assert found.keys() == {"shuffled", "zero", "mean", "prior"}
    for reading in found.values():
        assert (reading.null, reading.n) == (0, 128)
        if decoder.uses:
            assert 0.1 < reading.low < reading.value < reading.high
        else:
            assert reading == Reading(0, 0, 128, 0, 0)
    assert trials.cost_of_exchange(loss, z) == {n: r for n, r in found.items() if n != "prior"}


def test_the_cost_of_a_linear_decoder_is_that_of_algebra():
    """‖W z − W z′‖² of standard normal z: 2 ‖W‖² for another's, ‖W‖² for none and for the mean."""
    z, w, units = normal(4000, 6), normal(6, 3, seed=1), np.tile([1, 3], 2000)
    found = trials.cost_of_exchange(
        lambda other: (((z - other) @ w).square().sum(1).numpy(), units), z, normal(4000, 6, seed=2)
    )
    for name, times in {"shuffled": 2, "prior": 2, "zero": 1, "mean": 1}.items():
        assert found[name].value == pytest.approx(times * float(w.square().sum()) / 2, rel=0.1)


def test_intervals_hold_a_cost_that_is_zero_on_average():
    held = []
    for seed in range(100):
        z, other = normal(60, 4, seed=seed), normal(60, 4, seed=1000 + seed)
        found = trials.cost_of_exchange(lambda z: (z.sum(1).numpy(), np.ones(60)), z, other)
        assert found["shuffled"].value == pytest.approx(0, abs=1e-6)
        assert found["shuffled"].low < 0 < found["shuffled"].high
        held.append(found["prior"].low < 0 < found["prior"].high)
    assert np.mean(held) > 0.85


@pytest.mark.parametrize("n", [2, 3, 100])
def test_everyone_gets_another_s_latent(n):
    z, kept = normal(n, 3), normal(n, 3)
    found = trials.exchanged(z)
    assert not (found["shuffled"] == z).all(1).any()
    assert torch.equal(found["shuffled"].sort(0)[0], z.sort(0)[0])
    assert torch.equal(found["shuffled"], trials.exchanged(z)["shuffled"])
    assert torch.equal(found["mean"], z.mean(0).expand(n, 3))
    assert not found["zero"].any()
    assert torch.equal(z, kept)
    assert trials.exchanged(z, kept)["prior"] is kept
    alone = trials.cost_of_exchange(lambda z: (z.sum(1).numpy(), np.ones(1)), z[:1])
    assert all(isinstance(r, NotMeasured) for r in alone.values())
    alone = trials.cost_of_exchange(lambda z: (z.sum(1).numpy(), np.ones(1)), z[:1], z[:1])
    assert alone.keys() == trials.exchanged(z, kept).keys()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_counted(bad):
    def loss(_=None, other=None):
        return np.array([1.0, bad, 2.0, bad])

    found = [
        *trials.cost_of_exchange(lambda _: (loss(), np.ones(4)), normal(4, 3), normal(4, 3)).values(),
        *trials.cost_of_randomising(loss, {"layer": nn.Linear(2, 2)}).values(),
        *trials.cost_of_context(loss, normal(4, 2, 3)).values(),
    ]
    assert found == [NotMeasured("2 of 4 losses are not finite")] * 8
    strangers = trials.cost_of_strangers(lambda a, b: torch.tensor(bad), normal(4, 3), normal(4, 3))
    assert strangers == NotMeasured(f"the loss is {bad}, and {bad} with partners exchanged")
    outputs = trials.batch_dependence(lambda x: x * torch.tensor(bad), normal(4))
    assert set(outputs.values()) == {NotMeasured("4 of 4 outputs are not finite")}
    none = trials.cost_of_exchange(lambda z: (np.ones(4), np.zeros(4)), normal(4, 3))
    assert none["zero"] == NotMeasured("no item has a unit to count the loss by")


class Tied(nn.Module):
    """An embedding that is its head, layers of every kind of values, and one that nobody calls."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.norm, self.unused = nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.coarse = nn.Linear(4, 4, dtype=torch.bfloat16)
            self.head.weight = self.embed.weight
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.frozen = nn.Parameter(torch.full((3,), 5.0), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=torch.bfloat16))
        self.register_buffer("place", torch.arange(7.0), persistent=False)

    def forward(self, x):
        hidden = self.coarse(self.norm(self.embed(x)).bfloat16()).float()
        return self.head(self.scale * hidden) + self.frozen.sum()


def test_random_weights_are_as_large_as_the_old_and_these_come_back_bit_for_bit_even_after_an_error():
    model = Tied().eval()
    model(torch.arange(7)).sum().backward()
    before, parameters = [p.detach().clone() for p in model.parameters()], list(model.parameters())
    with untouched(model), trials.randomised(model) as count:
        assert count == 28 + 4 + 4 + 20 + 20 + 1 + 3
        assert model.head.weight is model.embed.weight
        for p, same, was in zip(model.parameters(), parameters, before, strict=True):
            assert p is same
            assert p.dtype == was.dtype
            assert not torch.equal(p, was) or p is model.empty
        once = model(torch.arange(7)).detach()
    with untouched(model), pytest.raises(RuntimeError, match="in the body"), trials.randomised(model):
        raise RuntimeError("in the body")
    with trials.randomised(model):
        assert torch.equal(model(torch.arange(7)), once)
    with untouched(model), trials.randomised(model, seed=1), trials.randomised(model.head):
        assert not torch.equal(model(torch.arange(7)), once)
    layer, other = nn.Linear(300, 300), 3 + 0.2 * normal(300, 300, seed=3)
    layer.requires_grad_(False).bias.fill_(-4)
    layer.weight.copy_(other)
    with trials.randomised(layer):
        assert layer.weight.mean().item() == pytest.approx(3, abs=0.01)
        assert layer.weight.std().item() == pytest.approx(0.2, rel=0.02)
        assert ((layer.weight - 3) * (other - 3)).mean().abs() < 0.001
        assert layer.bias.std().item() == pytest.approx(0.4, rel=0.15)


def test_a_module_that_is_not_called_costs_nothing_to_randomise(decoder):
    z, tokens = items(128, seed=2)
    modules = {"latent": decoder.latent, "head": decoder.head, "empty": nn.GELU()}

    @torch.no_grad()
    def loss():
        return decoder.losses(z, tokens).numpy()

    with untouched(decoder):
        found = trials.cost_of_randomising(loss, modules)
        assert found == trials.cost_of_randomising(loss, modules)
    assert isinstance(found["empty"], NotMeasured)
    assert found["head"].low > 0
    if decoder.uses:
        assert found["latent"].low > 0
    else:
        assert found["latent"] == Reading(0, 0, 128, 0, 0)


def test_batchnorm_in_training_depends_on_company_and_in_eval_does_not():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Flatten())
    x = normal(32, 6) + torch.arange(32)[:, None] / 8
    model(x)
    training = trials.batch_dependence(model, x)
    assert training["company"].value > 0.1
    assert training["order"].value < 1e-3
    with untouched(model.eval()):
        found = trials.batch_dependence(model, x)
    assert (found["order"].n, found["company"].n) == (32, 16)
    assert all(r.null == 0 and r.value < 1e-5 for r in found.values())
    assert all(r.value == 0 for r in trials.batch_dependence(torch.ones_like, x).values())
    assert all(isinstance(r, NotMeasured) for r in trials.batch_dependence(model, x[:3]).values())
    by_place = trials.batch_dependence(lambda x: torch.arange(len(x))[:, None], x)
    assert [r.value for r in by_place.values()] == pytest.approx([2, 0])  # √(mean (2i − 31)²) over half of it
    by_count = trials.batch_dependence(lambda x: x + len(x), torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None])
    assert [r.value for r in by_count.values()] == pytest.approx([0, 2])
    flat = trials.batch_dependence(lambda x: model(x)[:, 0], x)  # (N,)
    assert all(r.value < 1e-5 for r in flat.values())


def test_strangers_cost_nothing_where_the_pair_is_trivial_and_views_are_distinct_by_item():
    a = F.normalize(normal(64, 8))

    def loss(a, b):
        return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))

    expected = float(loss(a, a.roll(1, 0)) - loss(a, a))
    found = trials.cost_of_strangers(loss, a, a.clone().requires_grad_())
    assert (found.value, found.null, found.n) == (pytest.approx(expected), 0, 64)
    assert found.value > 1
    assert trials.cost_of_strangers(lambda a, b: loss(a, a), a, a).value == 0
    assert trials.cost_of_strangers(loss, a, a[:1].expand(64, 8)).value == pytest.approx(0, abs=1e-6)
    assert isinstance(trials.cost_of_strangers(loss, a[:1], a[:1]), NotMeasured)
    x = normal(10, 3, 4)
    changed = x.clone()
    changed[:4, 0, 0] += 1
    assert trials.distinct_views(x, x.clone()) == Reading(0.0, None, 10)
    assert trials.distinct_views(x, changed).value == pytest.approx(0.4)
    assert trials.distinct_views(x, x[:, :2]) == Reading(1.0, None, 10)
    assert trials.distinct_views(torch.arange(4), torch.tensor([0, 1, 2, 4])) == Reading(0.25, None, 4)
    assert isinstance(trials.distinct_views(x[:0], x[:0]), NotMeasured)


def test_context_costs_what_order_and_history_are_worth():
    frames = normal(200, 4, 5)
    target = frames[:, 3]

    def by(predict):
        return trials.cost_of_context(lambda c: (predict(c) - target).square().sum(1).numpy(), frames)

    last = by(lambda c: c[:, -1])
    assert last["permuted"].value == pytest.approx(10, rel=0.1)  # 2 · 5 of unrelated frames
    assert last["repeated"].low > 0
    assert last["strangers"].value == pytest.approx(10, rel=0.1)
    mean = by(lambda c: c.mean(1))
    assert mean["permuted"].value == pytest.approx(0, abs=1e-6)
    assert mean["repeated"].value > 1
    assert by(lambda c: c[:, 0])["repeated"] == Reading(0, 0, 200, 0, 0)
    assert set(by(lambda c: 0 * c[:, 0]).values()) == {Reading(0, 0, 200, 0, 0)}
    still = trials.cost_of_context(lambda c: c[:, -1].norm(dim=1).numpy(), frames[:, :1].expand_as(frames))
    assert still["permuted"].value == still["repeated"].value == 0
    single = trials.cost_of_context(lambda c: c[:, 0, 0].numpy(), frames[:, :1])
    assert isinstance(single["permuted"], NotMeasured)
    assert isinstance(single["repeated"], NotMeasured)
    assert isinstance(single["strangers"], Reading)


# audits


def test_parameters_that_are_one_are_trained_together():
    model = Tied()
    assert audits.parameters(model) == {"parameters": 77, "tied_and_frozen": []}
    model.embed.weight.requires_grad_(False)
    assert audits.parameters(model) == {"parameters": 49, "tied_and_frozen": [["embed.weight", "head.weight"]]}
    one = torch.ones(4)
    two = nn.ParameterDict({"a": nn.Parameter(one), "b": nn.Parameter(one, requires_grad=False)})  # of one storage
    assert audits.parameters(two) == {"parameters": 4, "tied_and_frozen": [["a", "b"]]}
    empty = nn.ParameterList([torch.zeros(0), nn.Parameter(torch.zeros(0), requires_grad=False)])
    assert audits.parameters(empty) == {"parameters": 0, "tied_and_frozen": []}
    meta = nn.Sequential(nn.Linear(3, 2, device="meta"), nn.Linear(3, 2, device="meta").requires_grad_(False))
    assert audits.parameters(meta) == {"parameters": 8, "tied_and_frozen": []}


def test_silence_is_no_gradient_in_any_step():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "never": nn.Linear(3, 2)})
    model["frozen"] = nn.Linear(3, 2).requires_grad_(False)
    x, silence = torch.ones(4, 3), audits.Silence()
    assert silence.by_module() == {}
    expected = ({"b": 8, "never": 8}, {"a": 8, "never": 8}, {"a": 8, "b": 8, "never": 8})
    for used, silent in zip("ab-", expected, strict=True):
        model.zero_grad()
        if used in model:
            model[used](x).sum().backward()
        with untouched(model):
            assert audits.without_gradient(model) == silent
            silence.look(model)
    (0 * model["never"](x).sum()).backward()
    silence.look(model)
    assert silence.by_module() == {"never": audits.without_gradient(model)["never"]} == {"never": 8}  # 0 is none
    model["never"].weight.grad[0, 0] = torch.nan
    assert audits.without_gradient(model)["never"] == 2  # and NaN is one
    model["never"].weight.requires_grad_(False)
    silence.look(model)
    assert silence.by_module() == {"never": 2}  # what is frozen meanwhile is not dead
    bare = nn.ParameterDict({"token": torch.ones(5), "empty": torch.ones(0)})
    assert audits.without_gradient(bare) == {"token": 5}


def test_fingerprints_are_of_bits():
    model = Tied()
    with untouched(model):
        before = audits.fingerprints(model)
    assert before == audits.fingerprints(copy.deepcopy(model))
    assert before.keys() == model.state_dict().keys() - {"head.weight"} | {"place"}  # tied once, buffers all
    model.state_dict()["coarse.bias"].zero_()
    before = audits.fingerprints(model)
    tensors = model.state_dict() | dict(model.named_buffers())
    for name, value in {"scale": 2.0000002, "coarse.bias": -0.0, "norm.num_batches_tracked": 1, "place": 3}.items():
        tensors[name].fill_(value)
        assert {n for n, digest in audits.fingerprints(model).items() if digest != before[n]} == {name}
        before = audits.fingerprints(model)


def test_weights_that_no_group_holds_or_a_step_leaves_are_named():
    model = Tied()
    with torch.no_grad():
        model.unused.weight.fill_(torch.nan)
    rest = [model.embed.weight, *model.coarse.parameters(), *model.unused.parameters(), model.frozen, model.empty]
    still = {"params": list(model.norm.parameters()), "lr": 0.0}
    optimizer = torch.optim.SGD([{"params": rest}, still], 1.0)
    assert audits.not_in_optimizer(model, optimizer) == ["scale"]
    assert audits.not_in_optimizer(model, torch.optim.SGD([model.head.weight], 0.0))[-1] == "coarse.bias"
    before = audits.fingerprints(model)
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()
    with untouched(model):
        found = audits.unmoved(model, before, optimizer)
    assert found == ["unused.weight", "unused.bias"]  # not: in no group, at rate 0, frozen, empty
    optimizer.param_groups[1]["lr"] = torch.tensor(0.1)
    assert audits.unmoved(model, before, optimizer) == ["norm.weight", "norm.bias", *found]
    model.coarse.weight.grad = torch.full_like(model.coarse.weight, 1e-12)  # below half a step of bfloat16
    before = audits.fingerprints(model)
    optimizer.step()
    assert "coarse.weight" in audits.unmoved(model, before, optimizer)


def test_validation_that_trains_is_found_out():
    model, x, facts = Tied(), torch.arange(7), {"other": 1}
    with audits.around_validation(model, facts):
        model(x)
    names = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert facts == {"other": 1, "changed_by_validation": names}
    model.eval()
    with untouched(model), audits.around_validation(model, facts):
        model(x)
    assert facts["changed_by_validation"] == []
    with audits.around_validation(model, facts), torch.no_grad():
        model.embed.weight += 1
    assert facts["changed_by_validation"] == ["embed.weight"]


def test_modules_that_are_called_in_training_mode_are_named():
    model, x = Tied(), torch.arange(7)
    with audits.called_in_training_mode(model) as found:
        model(x)
    assert found == {"norm"}
    model.eval()
    with audits.called_in_training_mode(model) as found:
        model(x)
    assert found == set()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_rate_too_low_to_move_a_float_is_no_forgotten_tensor():
    model = nn.Linear(3, 2)
    for rate, expected in ((1e-9, []), (0.1, ["weight", "bias"])):
        optimizer = torch.optim.SGD(model.parameters(), rate)
        assert audits.unmoved(model, audits.fingerprints(model), optimizer) == expected


def test_undisturbed_keeps_modes_generator_and_running_statistics():
    model = nn.Sequential(Tied(), nn.Sequential(nn.Dropout(), nn.Linear(7, 2)), nn.Dropout()).train()
    model[0].norm.eval()
    model[1].eval()
    model[1][0].train()
    x = torch.arange(7)
    with untouched(model), audits.undisturbed(model):
        assert not any(m.training for m in model.modules())
        torch.rand(3)
        assert torch.equal(model(x), model(x))
        model.train()
    with untouched(model), pytest.raises(RuntimeError, match="in the body"), audits.undisturbed(model):
        raise RuntimeError("in the body")


@pytest.mark.parametrize(
    ("change", "changed", "variety"),
    [
        (lambda x: x, 0, 0),
        (lambda x: x.flip(-1), 1, 0),
        (lambda x: x.flip(-1) if torch.rand(()) < 0.5 else x, 0.5, 1 - 2**-3),
        (lambda x: x + torch.randn_like(x), 1, 1),
        (lambda x: x.flip(-1) if random.random() < 0.5 else x, 0.5, 1 - 2**-3),
        (lambda x: x + np.random.rand(), 1, 1),
    ],
    ids=["identity", "flip", "random flip", "noise", "python's flip", "numpy's noise"],
)
def test_augmentation_is_change_and_variety(change, changed, variety):
    x = normal(200, 3, 8)
    with untouched(nn.ParameterList([x])):
        found = audits.augmentation(change, x)
    assert found["changed"] == pytest.approx(changed, abs=0.06 if 0 < changed < 1 else 0)
    assert found["variety"] == pytest.approx(variety, abs=0.08 if 0 < variety < 1 else 0)
    assert found == audits.augmentation(change, x)


def test_an_augmentation_that_changes_the_size_is_a_change():
    x = normal(50, 3, 8)
    assert audits.augmentation(lambda x: x[:, :4], x) == {"changed": 1.0, "variety": 0.0}
    assert audits.augmentation(lambda x: x[:, : int(torch.randint(1, 9, ()))], x)["variety"] > 0.5


def test_ranges_are_those_of_the_targets_and_leaks_are_equal_bytes():
    x = torch.tensor([[-0.5, 2.0], [0.0, 1.0]]).bfloat16().requires_grad_()
    assert audits.ranges(x, -1, 1) == {"target_low": -0.5, "target_high": 2.0, "low": -1, "high": 1}
    train = np.arange(60, dtype=np.uint8).reshape(5, 3, 4)
    held_out = np.concatenate([train[[1, 3, 3]], train[:2] + 100])
    assert audits.leaks(train, held_out) == 3
    assert audits.leaks(train[:, :, ::-1], held_out[:, :, ::-1]) == 3
    assert audits.leaks(train, train[:, ::-1]) == 0
    assert audits.leaks([b"a", b"bc"], [b"bc", b"ab", b"", b"a"]) == 2
    assert audits.leaks([x.tobytes() for x in train], held_out) == 3
    assert audits.leaks(["Doré", "Dürer"], ["Dürer", "Dure", "Dürer"]) == 2
    assert audits.leaks(np.arange(5), np.arange(3, 9)) == 2
    assert audits.leaks([], held_out) == audits.leaks(train, []) == 0
