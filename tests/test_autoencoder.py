"""The autoencoder: exact statistics, a bit-identical round trip to disk, honest round-trip metrics, foreign weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from intaglio.data.engravings.corpus import Engravings
from intaglio.data.latents import Source, cache_latents
from intaglio.models.autoencoder import Autoencoder, open_autoencoder, round_trip
from intaglio.nn.autoencoder import kl_layout
from intaglio.objectives.gaussian import kl_to_standard, sample
from intaglio.objectives.image import l1_plus_mse


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    corpus = Engravings(224)
    return np.stack([corpus.image(i, 32) for i in range(len(corpus))])


@pytest.fixture(scope="module")
def model(images: np.ndarray) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(32, (8, 16)).eval()
    model.fit_statistics(images[i : i + 30] for i in range(0, 200, 30))
    return model


@pytest.mark.parametrize(("channels", "side"), [((8, 16), 8), ((8, 8, 16), 4)])
def test_shapes(images: np.ndarray, channels: tuple[int, ...], side: int) -> None:
    model = Autoencoder(32, channels, latent=5)
    posterior = model.posterior(model.to_range(images[:3]))
    assert posterior.mean.shape == posterior.log_variance.shape == (3, *model.latent_shape) == (3, 5, side, side)
    assert model.image(posterior.mean).shape == (3, 3, 32, 32)
    with torch.no_grad():
        model.network.encoder.layers[-1].bias.fill_(1e9)
    extreme = model.posterior(model.to_range(images[:3])).log_variance
    assert torch.isfinite(extreme.exp()).all()


@torch.no_grad()
def test_statistics_are_exact_and_latents_standardised(model: Autoencoder, images: np.ndarray) -> None:
    used = images[:210]  # seven batches of 30
    z = model.posterior(model.to_range(used)).mean.double().numpy()
    np.testing.assert_allclose(model.latent_mean, z.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.latent_std, z.std((0, 2, 3)), rtol=1e-5)
    standardised = model.encode(used).double()
    np.testing.assert_allclose(standardised.mean((0, 2, 3)), np.zeros(4), atol=1e-5)
    np.testing.assert_allclose(standardised.std((0, 2, 3), correction=0), np.ones(4), rtol=1e-5)


def test_statistics_far_from_zero_keep_their_digits(images: np.ndarray) -> None:
    model = Autoencoder(32, (8, 16))
    with torch.no_grad():
        model.network.encoder.layers[-1].bias[:4] += 1000
    model.fit_statistics(images[i : i + 7] for i in range(0, 63, 7))
    z = torch.cat([model.posterior(model.to_range(images[i : i + 7])).mean for i in range(0, 63, 7)]).detach().double()
    np.testing.assert_allclose(model.latent_std, z.numpy().std((0, 2, 3)), rtol=1e-6)


def test_decoding_undoes_the_statistics_and_clamps_nothing(model: Autoencoder, images: np.ndarray) -> None:
    x = model.to_range(images[:4])
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model.encode(images[:4])), model.image(model.posterior(x).mean))
        assert model.decode(100 * model.encode(images[:4])).abs().max() > 1.5
    z = model.encode(images[:2]).requires_grad_()
    model.decode(z).sum().backward()
    assert z.grad is not None


def test_saved_and_loaded_bit_for_bit(model: Autoencoder, images: np.ndarray, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = open_autoencoder(tmp_path, 32)
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.encode(images[:5]), model.encode(images[:5]))
    np.testing.assert_array_equal(
        loaded.decode_images(loaded.encode(images[:5])), model.decode_images(model.encode(images[:5]))
    )
    with torch.no_grad():
        loaded.latent_std[2] += 1e-3
    assert loaded.fingerprint() != model.fingerprint()
    with pytest.raises(ValueError, match=r"32 pixels, the data of 64.*data\.image_size=32"):
        open_autoencoder(tmp_path, 64)
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "last")
    assert open_autoencoder(tmp_path / "last").fingerprint() == model.fingerprint()
    model.to(memory_format=torch.contiguous_format)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        open_autoencoder(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        open_autoencoder(tmp_path / "nowhere")


def test_bad_input(model: Autoencoder, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"factor 8 cannot read images of 36 pixels.*data\.image_size=32"):
        Autoencoder(36, (8, 8, 8))
    with pytest.raises(ValueError, match="call fit_statistics"):
        Autoencoder(32, (8, 16)).encode(images)
    with pytest.raises(ValueError, match=r"float32 .*reads uint8 \(N, 32, 32, 3\)"):
        model.encode(images.astype(np.float32))
    with pytest.raises(ValueError, match="no image"):
        Autoencoder(32, (8, 16)).fit_statistics([])
    collapsed = Autoencoder(32, (8, 16))
    with torch.no_grad():
        collapsed.network.encoder.layers[-1].weight[1] = 0
    with pytest.raises(ValueError, match=r"Channels \[1\] of 4 are the same for every image"):
        collapsed.fit_statistics([images])
    with torch.no_grad():
        collapsed.network.encoder.layers[-1].bias[1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        collapsed.fit_statistics([images])


def test_round_trip_null_is_the_mean_image(model: Autoencoder, images: np.ndarray) -> None:
    train, test = np.arange(200), np.arange(200, 224)
    measured = round_trip(model, images, train, test, batch=10)
    mean = images[:200].astype(np.float64).mean(0)
    null = np.square((images[200:] - mean) / 255).mean()
    mse = np.square((model.decode_images(model.encode(images[200:])).astype(float) - images[200:]) / 255).mean()
    np.testing.assert_allclose(measured.null_psnr, -10 * np.log10(null))
    np.testing.assert_allclose(measured.psnr, -10 * np.log10(mse), rtol=1e-4)
    np.testing.assert_allclose(measured.r2, 1 - mse / null, rtol=1e-3)


def test_a_few_seconds_of_training_beat_the_mean_image(images: np.ndarray) -> None:
    torch.manual_seed(0)
    model = Autoencoder(32, (24, 48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    train, test = np.arange(200), np.arange(200, 224)
    model.fit_statistics([images[:200]])
    untrained = round_trip(model, images, train, test)
    assert untrained.r2 < 0
    for _ in range(90):
        x = model.to_range(images[torch.randint(200, (16,), generator=generator).numpy()])
        mean, log_variance = model.posterior(x)
        z = sample(mean, log_variance, torch.randn(mean.shape, generator=generator))
        nats = kl_to_standard(mean.flatten(1), log_variance.flatten(1)).mean()
        loss = l1_plus_mse(model.image(z), x) + 1e-6 * nats
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().fit_statistics([images[:200]])
    measured = round_trip(model, images, train, test)
    assert measured.r2 > 0.35, (measured.r2, measured.psnr, measured.null_psnr)


def test_the_cache_of_an_autoencoder_is_its_encoding(model: Autoencoder, images: np.ndarray, tmp_path: Path) -> None:
    source = Source(Engravings(224).fingerprint(), model.fingerprint(), len(images), dtype="float32")
    table = cache_latents(tmp_path, images, model.latents, source, batch=32, shard_rows=128)
    flipped = np.ascontiguousarray(images[:32, :, ::-1])
    np.testing.assert_allclose(table.rows(np.arange(32)), model.latents(images[:32]), atol=1e-5)
    np.testing.assert_allclose(table.rows(table.mirrored(np.arange(32))), model.latents(flipped), atol=1e-5)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory):
    """A small checkpoint of `diffusers`, written by it."""
    import diffusers

    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
    ).eval()
    folder = tmp_path_factory.mktemp("foreign") / "vae"
    network.save_pretrained(folder)
    return network, folder


@torch.no_grad()
def test_a_checkpoint_of_diffusers_computes_the_same(theirs, images: np.ndarray, tmp_path: Path) -> None:
    network, folder = theirs
    model = open_autoencoder(folder.parent, 32)
    x = model.to_range(images[:6])
    posterior, expected = model.posterior(x), network.encode(x).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.log_variance, expected.logvar, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.image(posterior.mean), network.decode(posterior.mean).sample, rtol=1e-4, atol=1e-5)
    model.fit_statistics([images])
    model.save_pretrained(tmp_path)
    assert torch.equal(open_autoencoder(tmp_path).encode(images[:6]), model.encode(images[:6]))


@torch.no_grad()
def test_foreign_checkpoints_old_half_and_wrong(theirs, images: np.ndarray, tmp_path: Path) -> None:
    _, folder = theirs
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, weight in weights.items():
        for new, before in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = weight

    def written(part: str, config: dict, weights: dict) -> Path:
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / part / "diffusion_pytorch_model.safetensors")
        return tmp_path / part

    model = open_autoencoder(folder, 32)
    assert open_autoencoder(written("old", config, old), 32).fingerprint() == model.fingerprint()
    half = open_autoencoder(written("half", config, {k: v.half() for k, v in weights.items()}), 32)
    x = model.to_range(images[:2])
    torch.testing.assert_close(half.posterior(x).mean, model.posterior(x).mean, rtol=1e-2, atol=1e-2)
    other = open_autoencoder(written("groups", {**config, "norm_num_groups": 2}, weights), 32)
    assert other.fingerprint() != model.fingerprint()  # the same weights, other latents
    missing = {k: v for k, v in weights.items() if k != "quant_conv.bias"}
    for part, wrong_config, wrong_weights, said in (
        ("vq", {**config, "_class_name": "VQModel"}, weights, "VQModel.*not 'AutoencoderKL'"),
        ("tiny", {**config, "down_block_types": ["AttnDownBlock2D"]}, weights, "AttnDownBlock2D"),
        ("missing", config, missing, "do not fit its config.json.*quant_conv.bias"),
    ):
        with pytest.raises(ValueError, match=said):
            open_autoencoder(written(part, wrong_config, wrong_weights), 32)
    (tmp_path / "old" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"safetensors is missing.*pickle"):
        open_autoencoder(tmp_path / "old", 32)
    with pytest.raises(ValueError, match="does not name an AutoencoderKL"):
        kl_layout({})
