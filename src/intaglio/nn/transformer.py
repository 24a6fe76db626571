"""Pre-norm Transformer blocks with a key/value cache (Vaswani et al. 2017; Xiong et al. 2020).

Shapes: B batch, T text positions, M memory positions, H heads, E width of a head, D width of the model (D = H·E).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.nn.attention import attend


@dataclass
class KeyValue:
    """Keys and values of one attention layer, (B, H, T, E) each; ``length`` positions of them are filled."""

    keys: Tensor
    values: Tensor
    length: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one or more new positions and returns all that are filled."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder(self, index: Tensor) -> None:
        """Rows of the batch become those of ``index`` (B',), as beam search needs."""
        self.keys, self.values = self.keys[index], self.values[index]


class Attention(nn.Module):
    """Multi-head attention: softmax(QKᵀ/√E)V, Vaswani et al. 2017, eq. 1."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, memory_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory, (B, H, M, E) each."""
        k, v = self.key_value(memory_BMD).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def forward(self, x_BTD: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """``mask`` is boolean, True where attention is allowed, broadcastable to (B, H, T, M)."""
        q = self.split(self.query(x_BTD))
        return self.out(attend(q, k, v, mask, causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + SelfAttention, x + CrossAttention (if ``cross``), x + FeedForward, each behind its own LayerNorm."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float, cross: bool):
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        if cross:
            self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, heads)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, feed_forward), nn.GELU(), nn.Linear(feed_forward, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        memory: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KeyValue | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        h = self.self_norm(x_BTD)
        k, v = self.self_attention.keys_values(h)
        if cache is not None:
            k, v = cache.append(k, v)
        x_BTD = x_BTD + self.dropout(self.self_attention(h, k, v, mask, causal))
        if memory is not None:
            x_BTD = x_BTD + self.dropout(self.cross_attention(self.cross_norm(x_BTD), *memory, memory_mask))
        return x_BTD + self.dropout(self.feed(self.feed_norm(x_BTD)))


def blocks(layers: int, width: int, heads: int, feed_forward: int, dropout: float, cross: bool) -> Sequence[Block]:
    """A stack of Transformer blocks."""
    stack = nn.ModuleList(Block(width, heads, feed_forward, dropout, cross) for _ in range(layers))
    return cast("Sequence[Block]", stack)


class CaptionDecoder(nn.Module):
    """Tokens from latent tokens: causal self-attention over text, cross-attention over the memory, tied output."""

    def __init__(
        self, embedding: nn.Embedding, positions: int, layers: int, heads: int, feed_forward: int, dropout: float
    ):
        super().__init__()
        width = embedding.embedding_dim
        self.embedding = embedding
        self.position = nn.Embedding(positions, width)
        self.blocks = blocks(layers, width, heads, feed_forward, dropout, cross=True)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))
        nn.init.normal_(self.position.weight, std=0.02)

    def logits(self, x_BTD: Tensor) -> Tensor:
        return F.linear(self.norm(x_BTD), self.embedding.weight, self.bias)

    def forward(self, ids_BT: Tensor, memory_BMD: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each position."""
        x = self.embedding(ids_BT) + self.position.weight[: ids_BT.shape[1]]
        for block in self.blocks:
            x = block(x, block.cross_attention.keys_values(memory_BMD), causal=True)
        return self.logits(x)


class CachedDecoding:
    """One caption decoder on one memory, a token at a time: each step costs one position, not all before it."""

    def __init__(self, decoder: CaptionDecoder, memory_BMD: Tensor):
        self.decoder = decoder
        self.memories = [block.cross_attention.keys_values(memory_BMD) for block in decoder.blocks]
        batch, length = memory_BMD.shape[0], decoder.position.num_embeddings
        heads = decoder.blocks[0].self_attention.heads
        empty = memory_BMD.new_empty(batch, heads, length, memory_BMD.shape[2] // heads)
        self.caches = [KeyValue(empty.clone(), empty.clone(), 0) for _ in decoder.blocks]

    def step(self, ids_B1: Tensor, position: int) -> Tensor:
        """Logits (B, V) of the token after ``ids_B1``, which stands at ``position``."""
        x = self.decoder.embedding(ids_B1) + self.decoder.position.weight[position]
        for block, memory, cache in zip(self.decoder.blocks, self.memories, self.caches, strict=True):
            x = block(x, memory, cache=cache)
        return self.decoder.logits(x)[:, -1]

    def reorder(self, index: Tensor) -> None:
        """Rows of the batch become those of ``index`` (B',)."""
        self.memories = [(k[index], v[index]) for k, v in self.memories]
        for cache in self.caches:
            cache.reorder(index)


class TextEncoder(nn.Module):
    """A caption as a vector for each token: bidirectional Transformer."""

    def __init__(
        self, embedding: nn.Embedding, positions: int, layers: int, heads: int, feed_forward: int, dropout: float
    ):
        super().__init__()
        width = embedding.embedding_dim
        self.embedding = embedding
        self.position = nn.Embedding(positions, width)
        self.blocks = blocks(layers, width, heads, feed_forward, dropout, cross=False)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """(B, T, D); ``real_BT`` is True where a token stands."""
        x = self.embedding(ids_BT) + self.position.weight[: ids_BT.shape[1]]
        mask = real_BT[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x)


def mean_of_real(x_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """The mean (B, D) over the positions that are not padding."""
    weight = real_BT[..., None].to(x_BTD.dtype)
    return (x_BTD * weight).sum(1) / weight.sum(1).clamp(min=1)


def token_embedding(vocabulary: int, width: int) -> nn.Embedding:
    """An embedding whose rows have length about 1, as a tied output layer wants."""
    embedding = nn.Embedding(vocabulary, width)
    nn.init.normal_(embedding.weight, std=1 / math.sqrt(width))
    return embedding
