"""One latent, an image and a caption: how the multimodal model is trained.

Shapes: B batch, S image side, T text positions, Z latent dimensions, V vocabulary.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.config import MultimodalConfig, to_dict
from intaglio.data.batches import Batch
from intaglio.data.prepare import Captioned
from intaglio.data.tokenizer import PAD, SPECIAL
from intaglio.health import audits, panel
from intaglio.health.instruments.bottleneck import noise_ratio
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.models import nulls
from intaglio.models.multimodal import MultimodalModel
from intaglio.models.networks import DocumentedNetwork, Gaussian
from intaglio.objectives import Term
from intaglio.objectives.contrastive import infonce, sigmoid_pairs
from intaglio.objectives.gaussian import kl_to_standard, sample
from intaglio.objectives.image import l1_plus_mse
from intaglio.objectives.text import caption_cross_entropy, token_nats
from intaglio.systems.base import System

UNSEEN = 0.1
"""Share of captions that are learnt without their latent, so that captions can be drawn before there is one."""


TRIED, PAINTED = 128, 64
"""Items of the probe whose latents are exchanged in trials of captions, and of images, which take longer."""


class Pairing(nn.Module):
    """The learnt temperature of the contrastive loss, and SigLIP's bias; the document's temperature is fixed."""

    def __init__(self, temperature: float, pairing: str):
        super().__init__()
        scale = torch.tensor(1 / temperature).log()
        self.log_scale: Tensor
        if pairing == "self":
            self.register_buffer("log_scale", scale)
        else:
            self.log_scale = nn.Parameter(scale)
        if pairing == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(-10.0))


class MultimodalSystem(System):
    """Reconstruction, caption, contrast between image and text, KL to N(0, I)."""

    config: MultimodalConfig
    model: MultimodalModel

    def __init__(
        self,
        config: MultimodalConfig,
        steps: int,
        model: MultimodalModel,
        nulls: Mapping[str, float],
        unreachable: Measured = NotMeasured("the tokenizer is not known"),  # noqa: B008 - frozen
    ):
        super().__init__(config, steps)
        self.model, self.unreachable = model, unreachable
        self.pairing = Pairing(config.loss.temperature, config.loss.pairing)
        self._nulls = dict(nulls)

    def loss_terms(self, batch: Batch) -> dict[str, Term]:
        weights, network = self.config.loss, self.model.network
        images = self.model.to_range(batch.images)
        q = network.encode_image(images)
        z = self.draw(q) if self.training else q.mean
        if isinstance(network, DocumentedNetwork) or not self.training:
            logits_BTV = network.caption_logits(z, batch.ids[:, :-1])
        else:
            seen_B = self.noise_like(z[:, 0], stream=2) > NormalDist().inv_cdf(UNSEEN)
            logits_BTV = network.caption_logits(z, batch.ids[:, :-1], seen_B)
        terms = {
            "reconstruction": Term(l1_plus_mse(self.model.decode_image(z), images), weights.reconstruction),
            "caption": Term(caption_cross_entropy(logits_BTV, batch.ids[:, 1:], PAD), weights.caption),
        }
        if isinstance(network, DocumentedNetwork):
            unit = network.embed_image(z)
            terms["contrastive"] = Term(infonce(unit, unit, self.pairing.log_scale), weights.contrastive)
            return terms
        text = network.embed_text(batch.ids, batch.ids != PAD)
        return terms | {
            "contrastive": Term(self.contrast(network.embed_image(q.mean), text), weights.contrastive),
            "kl": Term(kl_to_standard(q.mean, q.log_variance).mean(), weights.kl),
        }

    def draw(self, q: Gaussian) -> Tensor:
        """z ~ q(z|x), with the noise of this step."""
        return sample(q.mean, q.log_variance, self.noise_like(q.mean))

    def contrast(self, image_BE: Tensor, text_BE: Tensor) -> Tensor:
        if self.config.loss.pairing == "infonce":
            return infonce(image_BE, text_BE, self.pairing.log_scale)
        return sigmoid_pairs(image_BE, text_BE, self.pairing.log_scale, self.pairing.bias)

    def measure(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums over held-out items, decoded from the mean of q(z|x): nats and right tokens, squared image error."""
        network, targets = self.model.network, batch.ids[:, 1:]
        images = self.model.to_range(batch.images)
        z = network.encode_image(images).mean
        logits_BTV = network.caption_logits(z, batch.ids[:, :-1])
        real = targets != PAD
        right = (logits_BTV.argmax(-1) == targets) & real
        error = self.model.to_unit(self.model.decode_image(z)) - self.model.to_unit(images)
        items, tokens = torch.tensor(float(len(images))), real.sum().cpu().float()
        sums = {
            "loss/caption": (token_nats(logits_BTV, targets, PAD).sum(), tokens),
            "caption/token_accuracy": (right.sum(), tokens),
            "image/mse": (error.square().mean((1, 2, 3)).sum(), items),
        }
        for name, term in self.loss_terms(batch).items():
            if name != "caption":
                sums[f"loss/{name}"] = (term.value * items.to(term.value), items)
        return sums

    def read(self, batch: Batch) -> dict[str, Mapping[str, Measured]]:
        network, images = self.model.network, self.model.to_range(batch.images[:PAINTED])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            several = batch.images.split(self.config.train.batch_size)
            parts = [network.encode_image(self.model.to_range(some)) for some in several]
            q = Gaussian(*(torch.cat(x) for x in zip(*parts, strict=True)))  # in parts, as memory for training allows
            z, few = q.mean.float(), slice(0, TRIED)
            costs = cost_of_exchange(lambda z: self._caption_nats(z, batch.ids[few]), z[few])
            blurs = cost_of_exchange(lambda z: self._image_errors(z, images), z[:PAINTED])
        found: dict[str, Mapping[str, Measured]] = {
            "val/caption": {f"{other}_latent_nats": m for other, m in costs.items()},
            "val/image": {f"{other}_latent_error": m for other, m in blurs.items()},
            "train/text": {"unreachable_share": self.unreachable},
        }
        if isinstance(network, DocumentedNetwork):
            last, unit = network.image_encoder[-1], network.embed_image(z)
            assert isinstance(last, nn.Linear)
            return found | {"val/latent": panel.latents(z, bias_d=last.bias), "val/pair": panel.pairs(unit, unit)}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            text = network.embed_text(batch.ids, batch.ids != PAD)
        scale = self.pairing.log_scale
        found["train/latent"] = {"noise_ratio": noise_ratio(self.draw(q), q.mean, q.log_variance)}
        found["train/pair"] = {"temperature": Reading(float((-scale).exp()))}
        found["val/pair"] = panel.pairs(network.embed_image(z), text, scale)
        return found | {"val/latent": panel.latents(z, q.log_variance.float())}

    def ranges(self, batch: Batch) -> dict[str, dict[str, float]]:
        low = 0.0 if self.model.config.output == "sigmoid" else -1.0
        return {"image": audits.ranges(self.model.to_range(batch.images), low, 1.0)}

    def _caption_nats(self, z_BZ: Tensor, ids_BT: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Each caption's nats and tokens, (B,), decoded from the given latents."""
        targets = ids_BT[:, 1:]
        nats = token_nats(self.model.network.caption_logits(z_BZ, ids_BT[:, :-1]), targets, PAD)
        return nats.sum(1).double().cpu().numpy(), (targets != PAD).sum(1).double().cpu().numpy()

    def _image_errors(self, z_BZ: Tensor, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Each image's mean squared error in [0, 1], (B,), decoded from the given latents."""
        error = self.model.to_unit(self.model.decode_image(z_BZ)) - self.model.to_unit(images)
        return error.square().mean((1, 2, 3)).double().cpu().numpy(), np.ones(len(images))

    def taps(self) -> dict[str, nn.Module]:
        network = self.model.network
        sites: dict[str, nn.Module] = {"image_latent": network.image_encoder, "text_decoder": network.text_decoder}
        if not isinstance(network, DocumentedNetwork):
            sites["text_encoder"] = network.text_encoder
        return sites

    def nulls(self) -> Mapping[str, float]:
        return self._nulls


def null_readings(config: MultimodalConfig, prepared: Captioned) -> dict[str, float]:
    """What held-out quantities would be if nothing had been learnt."""
    train, val = prepared.splits["train"], prepared.some("val", config.train.validate_items)
    text = nulls.bigram(prepared.ids_of(train), prepared.ids_of(val), len(prepared.tokenizer))
    images = prepared.data.images
    looks = [len(x) for x in np.array_split(val, range(config.train.batch_size, len(val), config.train.batch_size))]
    return {
        "loss/caption": text.nats,
        "caption/token_accuracy": text.accuracy,
        "image/mse": float(nulls.mean_image_errors(images, prepared.some("train", 4096), val).mean()),
        "loss/contrastive": sum(n * chance(n, config.loss.pairing) for n in looks) / len(val),
    }


def chance(n: int, pairing: str) -> float:
    """The contrastive loss of one item among ``n`` when all pairs look alike, nats."""
    if pairing == "sigmoid" and n > 1:  # the entropy of one pair in n, for each of the n
        return math.log(n) + (n - 1) * math.log(n / (n - 1))
    return math.log(n)


def build(config: MultimodalConfig, prepared: Captioned, model: MultimodalModel | None = None) -> MultimodalSystem:
    """The system with fresh weights from the seed, or around a trained ``model``."""
    if model is None:
        torch.manual_seed(config.seed)
        sizes = (config.data.image_size, prepared.text_length, len(prepared.tokenizer))
        plain = to_dict(config)
        model = MultimodalModel(plain["model"], plain["prior"], *sizes)
        model.tokenizer = prepared.tokenizer
    assert config.train.steps is not None, "steps are resolved before a system is built"
    model.train()  # one that was loaded is in eval mode, without dropout
    pieces = len(prepared.tokenizer) - len(SPECIAL)
    reached = prepared.tokenizer.reached(prepared.ids_of(prepared.splits["train"]))
    unreachable = Reading(1 - len(reached) / max(1, pieces), 0.0, pieces)
    system = MultimodalSystem(config, config.train.steps, model, null_readings(config, prepared), unreachable)
    words, places = model.network.embedding.num_embeddings, model.text_length
    system.built_for = {
        "tokens of the vocabulary": {"built_for": words, "data": len(prepared.tokenizer)},
        "places of a caption": {"built_for": places, "data": prepared.text_length},
    }
    return system
