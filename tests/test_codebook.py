"""The codebook: equal to vector-quantize-pytorch's step by step, its mass kept, alive on drifting data, moved by
training alone, and the same however the tokens of a step are divided."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import vector_quantize_pytorch as oracle
from sklearn.cluster import KMeans
from torch import Tensor

from intaglio.health.instruments import codebook as instruments
from intaglio.history import Reading
from intaglio.models.cost import step_cost
from intaglio.nn.codebook import MOST, Codebook, kmeans


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int, tokens: int, width: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Centres, and tokens around them in turn."""
    centres = 10 * torch.randn(count, width, generator=random(seed))
    noise = torch.randn(tokens, width, generator=random(seed + 1))
    return centres, centres[torch.arange(tokens) % count] + spread * noise


@pytest.mark.parametrize("masked", [False, True])
def test_twenty_updates_are_the_oracles(masked):
    """Without revival. Its Laplace smoothing draws unused codes to zero and makes mass: compared where it vanishes."""
    K, D = 24, 6
    theirs = oracle.VectorQuantize(D, K, decay=0.9, eps=1e-30, commitment_weight=1.0, rotation_trick=False)
    ours = Codebook(K, D, decay=0.9, revive=0)
    start, size = torch.randn(K, D, generator=random(0)), torch.full((K,), 90 / K)
    for buffer, value in (("embed", start), ("embed_avg", start * size[:, None]), ("cluster_size", size)):
        getattr(theirs._codebook, buffer).copy_(value[None])
    for buffer, value in (("vectors", start), ("cluster_size", size), ("tokens", 90.0), ("started", True)):
        getattr(ours, buffer).copy_(torch.as_tensor(value))
    for step in range(20):
        x = torch.randn(3, 30, D, generator=random(step + 1)) + step / 10
        real = torch.rand(3, 30, generator=random(step + 1)) > 0.3 if masked else None
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        q, codes, loss = ours(a, real)
        their_q, their_codes, their_loss = theirs(b, mask=real)
        ours.update()
        assert torch.equal(codes, their_codes)
        torch.testing.assert_close(q, their_q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, their_loss.sum(), rtol=1e-5, atol=0)
        ((q * x).sum() + loss).backward()
        ((their_q * x).sum() + their_loss.sum()).backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
        book = theirs._codebook
        torch.testing.assert_close(ours.cluster_size, book.cluster_size[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.vectors, book.embed[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.vectors * ours.cluster_size[:, None], book.embed_avg[0], rtol=1e-5, atol=1e-4)


def test_tokens_take_the_value_of_their_code_and_keep_their_gradient():
    x = torch.randn(5, 7, 4, generator=random(0)).requires_grad_()
    book = Codebook(8, 4)
    q, codes, loss = book(x)
    assert torch.equal(q, book.vectors[codes])
    assert torch.equal(book.codes(x), codes)
    assert torch.equal(codes, torch.cdist(x, book.vectors).argmin(-1))
    weights = torch.randn(x.shape, generator=random(1))
    torch.testing.assert_close(torch.autograd.grad((q * weights).sum(), x)[0], weights, rtol=0, atol=0)
    torch.testing.assert_close(loss, (x - book.vectors[codes]).square().mean())
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], 2 * (x - q).detach() / x.numel())


def test_the_start_finds_what_can_be_found():
    centres, x = blobs(16, 800, 8, 0.1)
    found, counts = kmeans(x, 16, random(0))
    assert torch.cdist(centres, found).min(1).values.max() < 0.1
    assert counts.min() > 5
    _, x = blobs(50, 2000, 4, 6.0)
    reference = KMeans(64, n_init=1, random_state=0).fit(x.numpy()).inertia_
    found, counts = kmeans(x + 100, 64, random(0))
    assert int(counts.sum()) == 64 * 16, "sixteen tokens a code are looked at"
    assert torch.cdist(x + 100, found).min(1).values.square().sum() < 1.1 * reference


def test_the_start_is_decided_by_the_seed():
    _, x = blobs(50, 500, 4, 6.0)
    first, same, other = (Codebook(32, 4, seed=seed) for seed in (0, 0, 1))
    for book in (first, same, other):
        torch.randn(3)  # what else is drawn does not matter
        book(x)
    assert torch.equal(first.vectors, same.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    assert bool(first.started)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_start_from_fewer_tokens_than_codes_repeats_them_with_a_jitter(tokens):
    x = torch.randn(tokens, 3, generator=random(0))
    book = Codebook(40, 3)
    book(x)
    assert torch.cdist(x, book.vectors).min(1).values.max() < 0.05
    assert torch.cdist(book.vectors, x).min(1).values.max() < 0.1
    book.update()
    assert book.vectors.isfinite().all()
    assert float(book.cluster_size.sum()) == pytest.approx(tokens)


def test_a_start_waits_for_tokens_and_refuses_what_is_not_finite():
    book = Codebook(4, 2)
    nothing = torch.zeros(3, dtype=torch.bool)
    q, codes, loss = book(torch.randn(3, 2), nothing)
    assert (float(loss), codes.tolist(), float(q.abs().sum())) == (0, [-1] * 3, 0)
    book.update()
    assert not bool(book.started)
    book(torch.randn(9, 2))
    book(torch.randn(9, 2), torch.zeros(9, dtype=torch.bool))
    book.update()
    assert book.vectors.isfinite().all()
    assert float(book.cluster_size.sum()) == pytest.approx(9)
    book = Codebook(4, 2)
    with pytest.raises(ValueError, match="not all finite"):
        book(torch.full((5, 2), torch.nan))


def test_the_mass_is_that_of_an_update_from_the_first_one_on():
    """Through revivals, changing token counts and several passes a step; the smallest code keeps a place."""
    book = Codebook(64, 4, decay=0.8, patience=2)
    expected = 0.0
    for step in range(120):
        counted = 0
        for part in range(2):
            x = torch.randn(50, 4, generator=random(2 * step + part)) + step / 2
            real = torch.rand(50, generator=random(step)) > 0.2
            book(x, real)
            counted += int(real.sum())
        book.update()
        expected = 0.8 * expected + 0.2 * counted if step else counted
        assert float(book.cluster_size.sum()) == pytest.approx(expected, rel=1e-5)
        assert float(book.tokens) == pytest.approx(expected, rel=1e-5)
        assert book.cluster_size.min() > 0
        assert instruments.mass_ratio(book.cluster_size, book.tokens_per_update).value == pytest.approx(1, abs=0.01)
    assert int(book.revivals) > 10
    assert book.vectors.isfinite().all()


def test_a_dead_code_is_revived_after_patience_with_mass_from_the_largest():
    """One code lies far away; its mass halves at each update from 1/8, below .1/8 at the fourth."""
    book = Codebook(8, 2, decay=0.5, revive=0.1, patience=3)
    centres, x = blobs(7, 700, 2, 0.01)
    book.vectors.copy_(torch.cat([centres, torch.full((1, 2), 1e4)]))
    book.cluster_size.fill_(100 / 8)
    book.tokens.fill_(700.0)
    book.started.fill_(True)
    for _update in range(5):
        book(x)
        book.update()
    assert (int(book.revivals), int(book.below[7])) == (0, 2)
    assert book.last_used.tolist() == [4] * 7 + [-1]
    assert book.vectors[7].tolist() == [1e4, 1e4], "a code without tokens stays where it is"
    before = book.cluster_size.clone().lerp(book(x).codes.bincount(minlength=8).float(), 0.5)
    book.update()
    assert (int(book.revivals), int(book.below[7])) == (1, 0)
    assert (book.vectors[7] == x).all(1).any(), "it stands on a token"
    assert float(book.cluster_size[7]) == pytest.approx(700 / 8)
    assert float(book.cluster_size.sum()) == pytest.approx(700)
    assert (book.cluster_size[:7] < before[:7]).all()
    assert (book.cluster_size[:7] >= 700 / 8 - 1e-4).all(), "nobody falls below uniform use for it"
    assert book.revival_threshold == pytest.approx(0.1 * 700 / 8)


def train(book: Codebook, steps: range, parts: int = 1, rows: slice = slice(None)) -> None:
    """Steps on drifting tokens, some of them padding, in ``parts`` forward passes."""
    for step in steps:
        x = blobs(20, 240, 4, 1.0, seed=step // 8)[1] + step / 4
        real = torch.arange(240) % (3 + step % 5) > 0
        for a, b in zip(x.chunk(parts), real.chunk(parts), strict=True):
            book(a[rows], b[rows])
        book.update()


def test_a_resumed_codebook_ends_bit_identical():
    whole = Codebook(48, 4, decay=0.8, patience=3)
    train(whole, range(40))
    for stop in (1, 23):
        first, second = Codebook(48, 4, decay=0.8, patience=3), Codebook(48, 4, decay=0.8, patience=3)
        train(first, range(stop))
        second.load_state_dict(first.state_dict())
        train(second, range(stop, 40))
        assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
    assert int(whole.revivals) > 5


def test_a_step_in_several_passes_is_one_step():
    books = [Codebook(48, 4, decay=0.8, patience=3) for _ in range(2)]
    for book in books:
        train(book, range(1))
        train(book, range(1, 40), parts=1 if book is books[0] else 4)
    assert_same(*(book.state_dict() for book in books))


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name} {text}")
    assert int(one["updates"]) == 40
    assert int(one["revivals"]) > 5


def worker(number: int, world: int, port: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port}", rank=number, world_size=world)
    book = Codebook(48, 4, decay=0.8, patience=3)
    book.vectors.mul_(number)  # whatever it was before the start
    train(book, range(40), parts=1, rows=slice(140 * number, 140 if number == 0 else None))
    x = torch.arange(12.0).view(3, 4)[2 * number : 2 + number]
    losses = book.eval()(x.requires_grad_()).commitment
    losses.backward()
    torch.save({"state": book.state_dict(), "gradient": x.grad / world}, out / f"{number}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """With 140 and 100 tokens, padding among them; the commitment's gradient is that of the whole batch too."""
    one = Codebook(48, 4, decay=0.8, patience=3)
    train(one, range(40))
    mp.spawn(worker, (2, tmp_path / "port", tmp_path), nprocs=2)
    results = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    for result in results:
        assert_same(one.state_dict(), result["state"])
    assert all(torch.equal(value, results[1]["state"][name]) for name, value in results[0]["state"].items())
    x = torch.arange(12.0).view(3, 4).requires_grad_()
    one.eval()(x).commitment.backward()
    gradient = torch.cat([result["gradient"] for result in results])
    torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-5)


def test_nothing_moves_outside_of_training():
    book = Codebook(48, 4)
    train(book, range(3))
    before = copy.deepcopy(book.state_dict())
    book.eval()
    for seed in range(20):
        book(100 + torch.randn(30, 4, generator=random(seed)))
        book.train().codes(torch.randn(30, 4))
        book.eval()
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())
    with pytest.raises(RuntimeError, match="without a forward pass in training mode"):
        book.update()


def test_padding_counts_for_nothing_whatever_it_holds():
    x = torch.randn(4, 20, 3, generator=random(0))
    real = torch.rand(4, 20, generator=random(1)) > 0.4
    packed, padded = Codebook(8, 3), Codebook(8, 3)
    bare, full = x[real].requires_grad_(), x.masked_fill(~real[..., None], torch.nan).requires_grad_()
    for _ in range(3):
        a, b = packed(bare), padded(full, real)
        packed.update()
        padded.update()
    assert torch.equal(b.codes[real], a.codes)
    assert b.codes[~real].eq(-1).all()
    assert b.x[~real].eq(0).all()
    for (name, one), two in zip(packed.state_dict().items(), padded.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, msg=lambda text, name=name: f"{name} {text}")
    torch.testing.assert_close(b.commitment, a.commitment)
    (b.x.sum() + b.commitment).backward()
    (a.x.sum() + a.commitment).backward()
    torch.testing.assert_close(full.grad[real], bare.grad)
    assert full.grad[~real].eq(0).all()


def test_distances_are_float32_under_autocast():
    """bf16 has eight bits: codes a thousandth apart far from zero would be one."""
    book = Codebook(16, 2).eval()
    book.vectors.copy_(1 + torch.arange(32).view(16, 2) / 1000)
    with torch.autocast("cpu", torch.bfloat16):
        assert book(book.vectors).codes.tolist() == list(range(16))
        q = book(torch.randn(5, 2).bfloat16())
    assert q.x.dtype == torch.bfloat16
    assert q.commitment.dtype == torch.float32


def drifting(step: int, components: int = 128) -> Tensor:
    """256 tokens of a mixture of which every eighth step replaces one component, and which moves as a whole: by two
    and a half standard deviations of its tokens in 2,000 steps. K-means on the tokens of a hundred steps reaches .9."""
    age = (step // 8 + torch.arange(components)) // components  # how often each has been replaced
    centres = torch.stack([3 * torch.randn(8, generator=random(int(a) * components + i)) for i, a in enumerate(age)])
    noise = torch.randn(256, 8, generator=random(10**6 + step))
    return centres[torch.randint(components, (256,), generator=random(step))] + noise + 0.004 * step


def test_codes_live_through_two_thousand_updates_on_drifting_data():
    """Perplexity ends above .8 of that of uniform codes, as it began; without revival it falls."""
    shares: dict[float, list[float]] = {}
    books = {revive: Codebook(64, 8, revive=revive) for revive in (0.1, 0.0)}
    counts = {revive: torch.zeros(4, 64, dtype=torch.int64) for revive in books}
    for step in range(2000):
        x = drifting(step)
        for revive, book in books.items():
            codes = book(x).codes
            book.update()
            if step % 500 >= 400:
                counts[revive][step // 500] += instruments.code_counts(codes, 64)
    for revive, quarters in counts.items():
        readings = [instruments.perplexity(quarter) for quarter in quarters]
        shares[revive] = [r.value / r.null for r in readings if isinstance(r, Reading)]
    assert shares[0.1][3] >= max(0.8, shares[0.1][0] - 0.1)
    assert min(shares[0.1]) > 0.75
    assert shares[0.0][3] < shares[0.1][3] - 0.1
    book = books[0.1]
    dead = instruments.dead_share(book.last_used, int(book.updates) - 1, book.tokens_per_update)
    threshold = instruments.revival_threshold(book.revival_threshold, 64, book.tokens_per_update)
    assert dead.value < 0.1
    assert instruments.norm_ratio(book.vectors, drifting(2000)).value == pytest.approx(1, abs=0.1)
    assert threshold.value == pytest.approx(0.1 * threshold.null)
    assert 10 < int(book.revivals) < 100


def test_its_cost_is_known_before_a_step_is_taken():
    with torch.device("meta"):
        book = torch.nn.Sequential(torch.nn.Linear(8, 4), Codebook(16, 4))

    def loss() -> Tensor:
        q = book[1](book[0](torch.zeros(10, 6, 8)), torch.ones(10, 6, dtype=torch.bool))
        return q.x.sum() + q.commitment

    assert step_cost(book, loss, bf16=True).unreached == ()


def test_misuse_is_told():
    book = Codebook(8, 3)
    book(torch.randn(20, 3))
    book.update()
    with pytest.raises(RuntimeError, match="once for each optimizer step"):
        book.update()
    for _ in range(MOST):
        book(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="call it after each optimizer step"):
        book(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"give real numbers \(…, 3\)"):
        book(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"booleans \(2,\)"):
        book(torch.randn(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least two codes"):
        Codebook(1, 3)
    with pytest.raises(ValueError, match="decay 1"):
        Codebook(8, 3, decay=1)
