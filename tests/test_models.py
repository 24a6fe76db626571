"""The multimodal model: its cache, its determinism, its prior, its nulls."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import safe_open

from intaglio.config import MultimodalModelConfig, PriorConfig, from_dict, to_dict
from intaglio.data.tokenizer import START, CaptionTokenizer
from intaglio.data.vectors import VectorFile
from intaglio.models import nulls
from intaglio.models.multimodal import MultimodalModel, interpolate
from intaglio.models.networks import RecomputedDecoding, build
from intaglio.models.prior import FlowPrior
from intaglio.objectives.flow import flow_loss, gaussian_flow_null
from intaglio.sampling.tokens import Decoding

WORDS = ["a large ship at the left", "a small tower, at the right", "a tree in the middle of a field", "two fish"]


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    config = from_dict({"system": "multimodal", "name": "x", "train": {"steps": 1}})
    tiny = {"latent": 16, "channels": [8, 8, 16], "width": 16, "heads": 2, "feed_forward": 32}
    tokenizer = CaptionTokenizer.train(WORDS * 3, 200)
    model = MultimodalModel({**to_dict(config)["model"], **tiny}, {"width": 32, "layers": 1}, 32, 24, len(tokenizer))
    model.tokenizer = tokenizer
    model.prior.fitted.fill_(True)
    return model.eval()


@torch.inference_mode()
def test_cached_decoding_equals_recomputed(model: MultimodalModel) -> None:
    z, ids = torch.randn(3, 16), torch.randint(4, len(model.tokenizer), (3, 20))
    ids[:, 0] = START
    cached, whole = model.network.decoding(z), RecomputedDecoding(model.network, z)
    for t in range(20):
        if t == 10:
            for stepper in (cached, whole):
                stepper.reorder(torch.tensor([2, 0, 1]))
        now = ids[:, t : t + 1]
        torch.testing.assert_close(cached.step(now, t), whole.step(now, t), rtol=1e-4, atol=1e-5)


def test_same_seed_same_image_and_caption_in_any_batch(model: MultimodalModel) -> None:
    decoding = Decoding(method="sample", temperature=1.3)
    together, alone = model.generate(range(6), decoding=decoding), model.generate([4], decoding=decoding)
    np.testing.assert_array_equal(together.latents[4].numpy(), alone.latents[0].numpy())
    assert np.abs(together.images[4].astype(int) - alone.images[0]).max() <= 1
    assert together.captions[4] == alone.captions[0]


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_captions_by_every_method(model: MultimodalModel, method: str) -> None:
    decoding = Decoding(method=method, beams=3 if method == "beam" else 1, repetition_penalty=1.2)  # type: ignore[arg-type]
    captions = model.caption(torch.randn(2, 16), decoding, seeds=[1, 2] if method == "sample" else None)
    assert len(captions) == 2
    assert all(isinstance(c, str) for c in captions)


def test_saved_and_loaded_model_is_the_same(model: MultimodalModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert again.tokenizer.to_json() == model.tokenizer.to_json()
    assert not any(p.suffix in {".bin", ".pt", ".pkl", ".ckpt"} for p in tmp_path.iterdir())
    z = torch.randn(2, 16)
    assert again.caption(z) == model.caption(z)


def test_text_reaches_latents_and_embeddings(model: MultimodalModel) -> None:
    assert model.text_latent(WORDS[:2], seeds=[0, 1]).shape == (2, 16)
    a, b = model.text_latent([WORDS[0]] * 2, seeds=[0, 1])
    assert not torch.equal(a, b)
    torch.testing.assert_close(model.embed_text(WORDS).norm(dim=1), torch.ones(4))
    alone, padded = model.embed_text(WORDS[3:]), model.embed_text(WORDS)[3:]
    torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-5)
    assert model.unknown_tokens("снег") > 0


def test_images_of_another_size_are_refused(model: MultimodalModel) -> None:
    with pytest.raises(ValueError, match=r"reads uint8 \(N, 32, 32, 3\)"):
        model.encode(np.zeros((1, 64, 64, 3), np.uint8))


def test_interpolation_keeps_its_ends_and_its_norm() -> None:
    a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    way = interpolate(a / a.norm(), b / b.norm(), 7)
    torch.testing.assert_close(way[0], a / a.norm())
    torch.testing.assert_close(way[-1], b / b.norm())
    torch.testing.assert_close(way.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(interpolate(a, a, 3), a.expand(3, -1))


def test_documented_network_cannot_see_its_latent_through_attention() -> None:
    """Attention over one token is a constant: the softmax of one number, whatever the text asks."""
    config = MultimodalModelConfig(network="documented", latent=8, width=16, heads=2, feed_forward=32, dropout=0.0)
    network = build(config, 32, 12, 50).eval()
    memory = network.latent_to_token(torch.randn(1, 8))[:, None]
    layer = network.text_decoder.layers[0].multihead_attn
    outputs = [layer(torch.randn(1, 5, 16), memory, memory)[0] for _ in range(2)]
    torch.testing.assert_close(outputs[0], outputs[1])


def test_flow_prior_samples_a_known_distribution() -> None:
    """Two cells that agree in sign: a Gaussian with the same covariance gets the quadrants wrong, the flow doesn't."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    prior = FlowPrior(PriorConfig(width=32, layers=1), cells=2, cell=1, text_width=4)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for _ in range(400):
        sign = torch.randint(0, 2, (256, 1), generator=generator) * 2.0 - 1
        x = sign + 0.2 * torch.randn(256, 2, generator=generator)
        t, noise = torch.rand(256, generator=generator), torch.randn(256, 2, generator=generator)
        loss = flow_loss(lambda zt, t: prior(zt, t, None, None), x, noise, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    draws = prior.sample([torch.Generator().manual_seed(i) for i in range(500)])
    assert (draws[:, 0].sign() == draws[:, 1].sign()).float().mean() > 0.97
    torch.testing.assert_close(draws.abs().mean(0), torch.ones(2), atol=0.1, rtol=0)
    assert abs(float((draws[:, 0] > 0).float().mean()) - 0.5) < 0.08


def test_gaussian_flow_null_is_what_an_optimal_velocity_reaches() -> None:
    t = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    x, noise = torch.randn(2, 200_000, 1, generator=torch.Generator().manual_seed(1))

    def optimal(zt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ((2 * t - 1) / ((1 - t).square() + t.square()))[:, None] * zt

    assert abs(float(flow_loss(optimal, x, noise, t)) - float(gaussian_flow_null(t))) < 0.02


def test_bigram_null_finds_a_known_chain() -> None:
    """A chain that goes on to the next token with probability .9, else anywhere of 20, has a known entropy."""
    random, states = np.random.default_rng(0), 20

    def chains(n: int) -> np.ndarray:
        ids = np.zeros((n, 30), np.int64)
        ids[:, 0] = 1
        for t in range(1, 30):
            jump = random.random(n) < 0.1
            ids[:, t] = np.where(jump, random.integers(4, 4 + states, n), 4 + (ids[:, t - 1] - 3) % states)
        return ids

    found = nulls.bigram(chains(3000), chains(500), 4 + states)
    stay, other = 0.9 + 0.1 / states, 0.1 / states
    entropy = -(stay * np.log(stay) + (states - 1) * other * np.log(other))
    assert abs(found.nats - entropy) < 0.05
    assert abs(found.accuracy - stay) < 0.02
    assert nulls.unigram(chains(3000), chains(500), 4 + states).nats > found.nats + 1


def test_mean_image_null_is_the_variance() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 4, 4, 3)).astype(np.uint8)
    assert abs(nulls.mean_image_errors(noise, np.arange(1500), np.arange(1500, 2000)).mean() - 1 / 12) < 0.005
    assert nulls.majority(["a", "a", "b"], ["a", "b", "b", "b"]) == 0.25


@pytest.mark.parametrize("ending", ["safetensors", "parquet"])
def test_vectors_are_read_back_by_the_library(tmp_path: Path, ending: str) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    names = [f"{i} “é”.png" for i in range(7)]
    path = tmp_path / f"v.{ending}"
    with VectorFile(path, 5) as file:
        file.append(names[:4], rows[:4])
        file.append(names[4:], rows[4:])
    if ending == "parquet":
        table = pl.read_parquet(path)
        assert table["file"].to_list() == names
        np.testing.assert_array_equal(np.stack(table["latent"].to_list()), rows)
    else:
        with safe_open(path, "numpy") as read:
            np.testing.assert_array_equal(read.get_tensor("latents"), rows)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
