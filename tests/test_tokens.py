"""Decoding against small Markov chains, whose every sequence can be enumerated."""

from itertools import product

import pytest
import torch
from torch import Tensor

from intaglio.sampling.tokens import Decoding, generate, sample_nucleus

BOS, EOS, PAD = 0, 1, 2


class Chain:
    """A second-order chain: the next token's logits depend on the last two, one of which only the cache holds."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits  # (V, V, V)
        self.steps = 0

    def step(self, ids: Tensor, position: int) -> Tensor:
        if position == 0:
            self.before = ids[:, 0]
        assert len(self.before) == len(ids)
        logits = self.logits[self.before, ids[:, 0]]
        self.before = ids[:, 0]
        self.steps += 1
        return logits

    def reorder(self, index: Tensor) -> None:
        self.before = self.before[index]

    def log_probability(self, sequence: tuple[int, ...], start: int = BOS) -> float:
        before = last = start
        total = 0.0
        for token in sequence:
            total += self.logits[before, last].log_softmax(-1)[token].item()
            before, last = last, token
        return total


def random_chain(vocabulary: int, seed: int, spread: float = 2.0) -> Chain:
    logits = torch.randn(vocabulary, vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    logits[:, :, PAD] = -torch.inf
    return Chain(logits)


def fixed_chain(probabilities: list[float], vocabulary: int = 6) -> Chain:
    """Every token independently from ``probabilities`` over the tokens 3, 4, …; the end never comes by itself."""
    logits = torch.full((vocabulary,), -torch.inf)
    logits[3 : 3 + len(probabilities)] = torch.tensor(probabilities).log()
    return Chain(logits.expand(vocabulary, vocabulary, vocabulary))


def seeded(seeds: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def start(batch: int) -> Tensor:
    return torch.full((batch,), BOS)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_optimum_of_all_sequences(seed, length_penalty):
    vocabulary, longest = 6, 4
    chain = random_chain(vocabulary, seed)
    body = [token for token in range(vocabulary) if token not in (EOS, PAD)]
    ended = [(*words, EOS) for n in range(longest) for words in product(body, repeat=n)]
    best = max(ended, key=lambda s: chain.log_probability(s) / len(s) ** length_penalty)

    strategy = Decoding("beam", beams=vocabulary**2, length_penalty=length_penalty)
    out = generate(chain.step, start(2), EOS, PAD, longest, strategy, chain.reorder)
    for ids, log_probability in zip(out.ids.tolist(), out.log_probability.tolist(), strict=True):
        assert tuple(ids[: len(best)]) == best
        assert set(ids[len(best) :]) <= {PAD}
        assert log_probability == pytest.approx(chain.log_probability(best), abs=1e-4)
    assert out.finished.all()


def test_two_beams_escape_the_trap_that_greedy_walks_into():
    logits = torch.full((6, 6, 6), -torch.inf)
    logits[BOS, BOS, [3, 4]] = torch.tensor([0.6, 0.4]).log()
    logits[BOS, 3, [3, 4, 5, EOS]] = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
    logits[BOS, 4, [EOS, 3]] = torch.tensor([0.9, 0.1]).log()
    logits[3:, 3:, EOS] = 0.0
    chain = Chain(logits)
    greedy = generate(chain.step, start(1), EOS, PAD, 4, Decoding())
    beam = generate(chain.step, start(1), EOS, PAD, 4, Decoding("beam", beams=2, length_penalty=0.0), chain.reorder)
    assert greedy.ids[0, 0] == 3
    assert beam.ids.tolist() == [[4, EOS]]
    assert beam.log_probability.exp().item() == pytest.approx(0.36)


def test_each_item_of_a_beam_batch_is_decoded_as_if_alone():
    chain = random_chain(9, seed=7)
    chain.logits[:, 7:, :7] = -torch.inf  # who starts at 7 or 8 never leaves them
    strategy = Decoding("beam", beams=3, repetition_penalty=1.3)
    starts = torch.arange(3, 9)
    together = generate(chain.step, starts, EOS, PAD, 8, strategy, chain.reorder)
    assert len(set(together.finished.tolist())) == 2, "the batch must hold ended and cut sequences"
    for i, one in enumerate(starts):
        alone = generate(chain.step, one[None], EOS, PAD, 8, strategy, chain.reorder)
        length = alone.ids.shape[1]
        assert together.ids[i, :length].tolist() == alone.ids[0].tolist()
        assert (together.ids[i, length:] == PAD).all()
        assert together.finished[i] == alone.finished[0]
        assert together.log_probability[i].item() == pytest.approx(alone.log_probability.item(), abs=1e-5)


def test_greedy_follows_the_likeliest_token_and_stops_when_all_have_ended():
    chain = random_chain(8, seed=3)
    out = generate(chain.step, torch.tensor([3, 4, 5, 6]), EOS, PAD, 50, Decoding())
    for first, ids, total in zip([3, 4, 5, 6], out.ids.tolist(), out.log_probability.tolist(), strict=True):
        before = last = first
        expected = []
        while len(expected) < len(ids) and EOS not in expected:
            before, last = last, chain.logits[before, last].argmax().item()
            expected.append(last)
        assert ids == expected + [PAD] * (len(ids) - len(expected))
        assert total == pytest.approx(chain.log_probability(tuple(expected), first), abs=1e-4)
    assert out.finished.tolist() == [EOS in ids for ids in out.ids.tolist()]
    quick = fixed_chain([1.0])
    quick.logits = quick.logits.roll(EOS - 3, -1)
    assert generate(quick.step, start(4), EOS, PAD, 50, Decoding()).ids.tolist() == [[EOS]] * 4
    assert quick.steps == 1


@pytest.mark.parametrize(
    ("top_p", "temperature", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.2]),
        (0.75, 1.0, [0.625, 0.375, 0.0]),
        (0.5, 1.0, [1.0, 0.0, 0.0]),
        (0.81, 1.0, [0.5, 0.3, 0.2]),
        (1.0, 0.5, [25 / 38, 9 / 38, 4 / 38]),
    ],
)
def test_sampled_frequencies_are_those_of_the_nucleus(top_p, temperature, expected):
    batch, length = 200, 50
    chain = fixed_chain([0.5, 0.3, 0.2])
    strategy = Decoding("sample", top_p=top_p, temperature=temperature)
    out = generate(chain.step, start(batch), EOS, PAD, length, strategy, generators=seeded(range(batch)))
    n = batch * length
    counts = torch.bincount(out.ids.flatten(), minlength=6)[3:] / n
    for share, p in zip(counts.tolist(), expected, strict=True):
        assert abs(share - p) <= 4.5 * (p * (1 - p) / n) ** 0.5
    assert not out.finished.any()


def test_the_inverse_cdf_covers_its_ends():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).repeat(3, 1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample_nucleus(logits, 1.0, uniform).tolist() == [0, 2, 2]


def test_a_seed_gives_the_same_sequence_in_any_batch():
    chain = random_chain(12, seed=5)
    strategy = Decoding("sample", top_p=0.9, temperature=1.3, repetition_penalty=1.2)
    together = generate(chain.step, start(6), EOS, PAD, 12, strategy, generators=seeded(range(6)))
    lengths = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        alone = generate(chain.step, start(1), EOS, PAD, 12, strategy, generators=[generator])
        lengths.add(alone.ids.shape[1])
        assert together.ids[seed, : alone.ids.shape[1]].tolist() == alone.ids[0].tolist()
    assert len(lengths) > 1, "sequences of one length would not test this"
    assert len({tuple(ids) for ids in together.ids.tolist()}) == 6


def test_repetition_penalty_lowers_a_seen_token_whatever_its_logits_sign():
    # Token 3 leads by a little; once it is seen, a penalty that divided −1.0 would make it lead by more.
    for leader, other in ((1.0, 0.9), (-1.0, -1.1)):
        logits = torch.full((6,), -50.0)
        logits[[3, 4]] = torch.tensor([leader, other])
        chain = Chain(logits.expand(6, 6, 6))
        plain = generate(chain.step, start(1), EOS, PAD, 2, Decoding())
        penalised = generate(chain.step, start(1), EOS, PAD, 2, Decoding(repetition_penalty=1.5))
        assert plain.ids.tolist() == [[3, 3]]
        assert penalised.ids.tolist() == [[3, 4]]
        assert penalised.log_probability.item() == pytest.approx(chain.log_probability((3, 4)), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nucleus"}, "choose greedy, sample or beam"),
        ({"temperature": 0.7}, "temperature has no effect with method 'greedy'"),
        ({"method": "beam", "beams": 4, "top_p": 0.9}, "set decoding.method to 'sample'"),
        ({"method": "beam"}, "beams is 1; it must be at least 2"),
        ({"method": "sample", "temperature": 0.0}, "use greedy"),
        ({"method": "sample", "top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": 0.5}, "at least 1"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


def test_bad_calls_and_diverged_logits_are_refused():
    chain = random_chain(6, seed=0)
    with pytest.raises(ValueError, match="max_length is 0"):
        generate(chain.step, start(1), EOS, PAD, 0, Decoding())
    with pytest.raises(ValueError, match="as many generators, not 1"):
        generate(chain.step, start(2), EOS, PAD, 4, Decoding("sample"), generators=seeded(range(1)))
    with pytest.raises(ValueError, match="needs reorder"):
        generate(chain.step, start(2), EOS, PAD, 4, Decoding("beam", beams=2))
    chain.logits = chain.logits.fill_(torch.nan)
    with pytest.raises(ValueError, match="position 0 are NaN"):
        generate(chain.step, start(2), EOS, PAD, 4, Decoding())
