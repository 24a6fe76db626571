"""The two multimodal networks: ours, and the document's, literally.

Shapes: B batch, S image side, T text positions, M latent tokens, Z latent dimensions, D width, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.config import MultimodalModelConfig
from intaglio.nn.convolution import ImageDecoder, ImageEncoder
from intaglio.nn.transformer import CachedDecoding, CaptionDecoder, TextEncoder, mean_of_real, token_embedding
from intaglio.objectives.gaussian import clamp_log_variance


class Gaussian(NamedTuple):
    """A diagonal Gaussian over latents: mean and log-variance, (B, Z) each."""

    mean: Tensor
    log_variance: Tensor


class Stepper(Protocol):
    """Decoding of one batch, a token at a time."""

    def step(self, ids_B1: Tensor, position: int) -> Tensor: ...

    def reorder(self, index: Tensor) -> None: ...


class StandardNetwork(nn.Module):
    """Image → q(z|x); z → image; z → caption; caption → embedding.

    z is a grid of s·s cells of K numbers; four neighbours together are a token, M = s²/4 of them with 4K numbers.
    """

    def __init__(self, config: MultimodalModelConfig, image_size: int, text_length: int, vocabulary: int):
        super().__init__()
        c, transformer = config, (config.heads, config.feed_forward, config.dropout)
        self.side = image_size // 2 ** len(c.channels)
        self.tokens = self.side**2 // 4
        cell = c.latent // self.side**2
        self.image_encoder = ImageEncoder(c.channels, 2 * cell)
        self.image_decoder = ImageDecoder(self.side, c.channels, cell)
        self.embedding = token_embedding(vocabulary, c.width)
        self.to_token = nn.Linear(4 * cell, c.width)
        self.token_position = nn.Parameter(0.02 * torch.randn(self.tokens, c.width))
        self.no_latent = nn.Parameter(0.02 * torch.randn(self.tokens, c.width))
        self.text_decoder = CaptionDecoder(self.embedding, text_length, c.decoder_layers, *transformer)
        self.text_encoder = TextEncoder(self.embedding, text_length, c.encoder_layers, *transformer)
        self.image_projection = nn.Sequential(nn.Linear(c.latent, c.width), nn.GELU(), nn.Linear(c.width, c.width))
        self.text_projection = nn.Linear(c.width, c.width)

    def encode_image(self, image: Tensor) -> Gaussian:
        """(B, 3, S, S) in the model's range → q(z|x)."""
        mean, raw = (self.from_grid(half) for half in self.image_encoder(image).float().chunk(2, dim=1))
        return Gaussian(mean, clamp_log_variance(raw))

    def decode_image(self, z_BZ: Tensor) -> Tensor:
        """(B, 3, S, S) before the output activation."""
        half = (self.side // 2, self.side // 2)
        fourfold = z_BZ.unflatten(-1, (self.tokens, -1)).transpose(1, 2).unflatten(2, half)
        return self.image_decoder(F.pixel_shuffle(fourfold, 2))

    def from_grid(self, grid_BKss: Tensor) -> Tensor:
        """(B, K, s, s) → (B, Z), token after token."""
        return F.pixel_unshuffle(grid_BKss, 2).flatten(2).transpose(1, 2).flatten(1)

    def memory(self, z_BZ: Tensor) -> Tensor:
        """z as the (B, M, D) tokens that the text decoder attends to."""
        return self.to_token(z_BZ.unflatten(-1, (self.tokens, -1))) + self.token_position

    def caption_logits(self, z_BZ: Tensor, ids_BT: Tensor, seen_B: Tensor | None = None) -> Tensor:
        """(B, T, V): logits of the token after each of ``ids_BT``; where ``seen_B`` is False, without the latent."""
        memory = self.memory(z_BZ)
        if seen_B is not None:
            memory = torch.where(seen_B[:, None, None], memory, self.no_latent.to(memory))
        return self.text_decoder(ids_BT, memory)

    def decoding(self, z_BZ: Tensor) -> Stepper:
        """A decoding of captions from z with a key/value cache."""
        return CachedDecoding(self.text_decoder, self.memory(z_BZ))

    def free_decoding(self, batch: int) -> Stepper:
        """A decoding of captions without any latent: what the training captions are like."""
        return CachedDecoding(self.text_decoder, self.no_latent.expand(batch, -1, -1))

    def embed_image(self, z_BZ: Tensor) -> Tensor:
        """Unit vectors (B, D) that ``embed_text`` can be compared with."""
        return F.normalize(self.image_projection(z_BZ).float(), dim=-1)

    def embed_text(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Unit vectors (B, D); ``real_BT`` is True where a token stands."""
        mean = mean_of_real(self.text_encoder(ids_BT, real_BT), real_BT)
        return F.normalize(self.text_projection(mean).float(), dim=-1)


class DocumentedNetwork(nn.Module):
    """The network of the original document, with its faults: 564,769,987 parameters at 512 px, 1024, 512, 8000.

    The encoder pools away where things are; one linear layer holds 95 % of the parameters; the text decoder
    cross-attends a single token, which is a constant; there is no text encoder and no positional encoding.
    """

    def __init__(self, config: MultimodalModelConfig, image_size: int, text_length: int, vocabulary: int):
        super().__init__()
        c = config
        self.tokens = 1
        self.side = image_size // 16
        convolutions: list[nn.Module] = []
        for a, b in ((3, 64), (64, 128), (128, 256), (256, 512)):
            convolutions += [nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()]
        self.image_encoder = nn.Sequential(
            *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, c.latent)
        )
        upward: list[nn.Module] = []
        for a, b in ((512, 256), (256, 128), (128, 64)):
            upward += [nn.ConvTranspose2d(a, b, 4, 2, 1), nn.ReLU()]
        self.image_decoder = nn.ModuleDict(
            {
                "linear": nn.Linear(c.latent, 512 * self.side**2),
                "convolutions": nn.Sequential(*upward, nn.ConvTranspose2d(64, 3, 4, 2, 1)),
            }
        )
        self.embedding = nn.Embedding(vocabulary, c.width)
        self.latent_to_token = nn.Linear(c.latent, c.width)
        layer = nn.TransformerDecoderLayer(c.width, c.heads, c.feed_forward, c.dropout, batch_first=True)
        self.text_decoder = nn.TransformerDecoder(layer, c.decoder_layers)
        self.output = nn.Linear(c.width, vocabulary)

    def encode_image(self, image: Tensor) -> Gaussian:
        """The document's encoder is deterministic: a point, given as a Gaussian of variance 0 (log-variance −∞)."""
        mean = self.image_encoder(image).float()
        return Gaussian(mean, torch.full_like(mean, -torch.inf))

    def decode_image(self, z_BZ: Tensor) -> Tensor:
        seed = self.image_decoder["linear"](z_BZ).unflatten(1, (512, self.side, self.side))
        return self.image_decoder["convolutions"](seed)

    def caption_logits(self, z_BZ: Tensor, ids_BT: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids_BT.shape[1], device=ids_BT.device)
        memory_B1D = self.latent_to_token(z_BZ)[:, None]
        h = self.text_decoder(self.embedding(ids_BT), memory_B1D, tgt_mask=causal, tgt_is_causal=True)
        return self.output(h)

    def decoding(self, z_BZ: Tensor) -> Stepper:
        """Decoding without a cache: the document's network recomputes the whole caption for each token."""
        return RecomputedDecoding(self, z_BZ)

    def embed_image(self, z_BZ: Tensor) -> Tensor:
        return F.normalize(z_BZ, dim=-1)


Network = StandardNetwork | DocumentedNetwork


class RecomputedDecoding:
    """Decoding that runs the network over all tokens so far at each step: the reference that the cache must equal."""

    def __init__(self, network: Network, z_BZ: Tensor):
        self.network, self.z, self.ids = network, z_BZ, torch.empty(len(z_BZ), 0, dtype=torch.long, device=z_BZ.device)

    def step(self, ids_B1: Tensor, position: int) -> Tensor:
        """Logits (B, V) of the token after ``ids_B1``."""
        assert position == self.ids.shape[1]
        self.ids = torch.cat([self.ids, ids_B1], dim=1)
        return self.network.caption_logits(self.z, self.ids)[:, -1]

    def reorder(self, index: Tensor) -> None:
        """Rows of the batch become those of ``index`` (B',)."""
        self.z, self.ids = self.z[index], self.ids[index]


def build(config: MultimodalModelConfig, image_size: int, text_length: int, vocabulary: int) -> Network:
    """The network that the configuration names. On ``torch.device("meta")`` it is counted without being allocated."""
    kind = StandardNetwork if config.network == "standard" else DocumentedNetwork
    return kind(config, image_size, text_length, vocabulary)
