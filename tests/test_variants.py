"""The sizes of the multimodal variants, counted without allocating them."""

import resource

import pytest
import torch

from intaglio.config import load
from intaglio.models.cost import parameter_counts
from intaglio.models.multimodal import MultimodalModel
from intaglio.models.networks import build


def meta_network(recipe):
    config = load(recipe)
    with torch.device("meta"):
        return build(config.model, config.data.image_size, config.data.text_length, config.model.vocabulary)


@pytest.mark.parametrize(("size", "millions"), [("small", 5), ("medium", 15), ("large", 50), ("xl", 150)])
def test_variants_have_their_documented_sizes(size, millions):
    config = load(f"multimodal-{size}")
    with torch.device("meta"):
        sizes = (config.data.image_size, config.data.text_length, config.model.vocabulary)
        model = MultimodalModel(vars(config.model), vars(config.prior), *sizes)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.1)


def test_documented_network_is_literal_and_counted_without_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = parameter_counts(meta_network("documented-multimodal"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; the weights are 2.3 GB
    assert counts == {
        "image_encoder": 2_756_544 + 525_312,
        "image_decoder": 537_395_200 + 2_756_035,
        "embedding": 8000 * 512,
        "latent_to_token": 1025 * 512,
        "text_decoder": 12_612_096,
        "output": 4_104_000,
    }
    assert sum(counts.values()) == 564_769_987
