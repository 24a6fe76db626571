"""The U-Net of our denoisers: Dhariwal & Nichol 2021 with residual branches that start at zero.

Shapes: B batch, C channels, H and W sides, P = H·W places, E width of the embedding, M tokens of a text, D their width.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.nn.attention import attend
from intaglio.nn.condition import Condition, ConditionEncoder, Encoded
from intaglio.nn.dropout import Dropout
from intaglio.nn.time_embedding import TimeEmbedding
from intaglio.nn.transformer import Attention


def check_sides(x_BCHW: Tensor, halvings: int) -> None:
    """ValueError: a side that cannot be halved as often as the network does."""
    height, width = x_BCHW.shape[2:]
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(
            f"an image of {height}×{width} cannot be halved {halvings} times: "
            f"give sides divisible by {2**halvings}, or a network of fewer levels"
        )


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of up to 8 groups, none of fewer than 16 channels.

    Channels-last in bf16 on a CPU, the backward of groups of 8 channels takes nine times as long as that of 16.
    """
    groups = next((n for n in (8, 4, 2) if channels % n == 0 and channels >= 16 * n), 1)
    return nn.GroupNorm(groups, channels)


def zeroed(layer: nn.Module) -> nn.Module:
    """``layer`` with weights and biases at zero: its branch starts as if it were not there."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class AdaptiveResidual(nn.Module):
    """x + conv(SiLU((1 + γ) norm(conv(SiLU(norm(x)))) + β)), γ and β linear in the embedding (their AdaGN)."""

    def __init__(self, channels: int, out: int, embedding: int, dropout: float):
        super().__init__()
        self.norm_1, self.conv_1 = norm(channels), nn.Conv2d(channels, out, 3, 1, 1)
        self.norm_2, self.conv_2 = norm(out), zeroed(nn.Conv2d(out, out, 3, 1, 1))
        self.modulate = nn.Linear(embedding, 2 * out)
        self.dropout = Dropout(dropout)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        h = self.norm_2(self.conv_1(F.silu(self.norm_1(x_BCHW))))
        gamma, beta = self.modulate(embedding_BE)[:, :, None, None].to(h).chunk(2, dim=1)
        h = torch.addcmul(beta, h, 1 + gamma)
        return self.skip(x_BCHW) + self.conv_2(self.dropout(F.silu(h)))


class SpatialAttention(nn.Module):
    """x + attention of the places to each other, then, with a ``memory`` width, x + attention to a text."""

    def __init__(self, channels: int, head: int, memory: int = 0):
        super().__init__()
        heads = max(1, channels // head)
        if channels % heads:
            raise ValueError(
                f"{channels} channels cannot be shared among {heads} heads of about {head}: change a width"
            )
        self.self_norm, self.self_attention = norm(channels), Attention(channels, heads)
        zeroed(self.self_attention.out)
        self.cross_attention = Attention(channels, heads) if memory else None
        if self.cross_attention is not None:
            self.cross_norm = norm(channels)
            self.cross_attention.key_value = nn.Linear(memory, 2 * channels)
            zeroed(self.cross_attention.out)

    def forward(self, x_BCHW: Tensor, condition: Encoded) -> Tensor:
        h_BPC, attention = places(self.self_norm(x_BCHW)), self.self_attention
        y_BHPE = attend(attention.split(attention.query(h_BPC)), *attention.keys_values(h_BPC))
        y_BPC = attention.out(y_BHPE.transpose(1, 2).flatten(2))
        x_BCHW = x_BCHW + y_BPC.mT.unflatten(2, x_BCHW.shape[2:])
        if self.cross_attention is None or condition.memory is None:
            return x_BCHW
        keys_values = self.cross_attention.keys_values(condition.memory)
        mask = None if condition.mask is None else condition.mask[:, None, None, :]
        y_BPC = self.cross_attention(places(self.cross_norm(x_BCHW)), *keys_values, mask)
        return x_BCHW + y_BPC.mT.unflatten(2, x_BCHW.shape[2:])


def places(x_BCHW: Tensor) -> Tensor:
    """(B, P, C): a view if the channels stand last in memory."""
    return x_BCHW.flatten(2).mT


class Block(nn.Module):
    """A residual block, and attention where there is some."""

    def __init__(self, channels: int, out: int, embedding: int, dropout: float, attention: SpatialAttention | None):
        super().__init__()
        self.residual = AdaptiveResidual(channels, out, embedding, dropout)
        self.attention = attention

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor, condition: Encoded) -> Tensor:
        h = self.residual(x_BCHW, embedding_BE)
        return h if self.attention is None else self.attention(h, condition)


def doubled(x_BCHW: Tensor, weight_OIHW: Tensor, bias_O: Tensor | None) -> Tensor:
    """Nearest ×2 and a 3×3 convolution (O, C, 3, 3), as one transposed convolution with 4/9 of the work.

    Repeating each value 2×2 is a transposed convolution with ones, so both are one with the kernel 3×3 ∗ ones(2, 2).
    """
    kernel_HWIO = weight_OIHW.permute(2, 3, 1, 0).flip(0, 1)  # rows of O numbers are added, not single ones
    kernel_HWIO = F.pad(kernel_HWIO, (0, 0, 0, 0, 0, 1)) + F.pad(kernel_HWIO, (0, 0, 0, 0, 1, 0))
    kernel_HWIO = F.pad(kernel_HWIO, (0, 0, 0, 0, 0, 0, 0, 1)) + F.pad(kernel_HWIO, (0, 0, 0, 0, 0, 0, 1, 0))
    return F.conv_transpose2d(x_BCHW, kernel_HWIO.permute(2, 3, 0, 1), bias_O, stride=2, padding=1)


class Upsample(nn.Module):
    """Nearest ×2 and a 3×3 convolution."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, 1, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return doubled(x_BCHW, self.conv.weight, self.conv.bias)


class UNet(nn.Module):
    """Noisy image, time and condition → prediction of the image's shape, zero at the start.

    ``widths`` are the channels of each level, sides halved between; ``blocks`` residual blocks a level down and one
    more up; attention at the levels in ``attention`` and in the middle, to tokens too if ``tokens`` gives their width.
    ``classes``, ``pooled``, ``tokens`` and ``empty``: see ``ConditionEncoder``.
    """

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 128),
        blocks: int = 2,
        attention: Collection[int] = (),
        dropout: float = 0.1,
        head: int = 64,
        classes: int = 0,
        pooled: int = 0,
        tokens: int = 0,
        empty: Condition | None = None,
    ):
        super().__init__()
        if any(not 0 <= level < len(widths) for level in attention):
            raise ValueError(f"attention at levels {sorted(attention)}: there are levels 0 to {len(widths) - 1}")
        embedding, last = 4 * widths[0], len(widths) - 1
        self.halvings = last
        self.time = TimeEmbedding(embedding)
        self.condition = ConditionEncoder(embedding, classes, pooled, tokens, empty)

        def block(level: int, a: int, attends: bool) -> Block:
            b = widths[level]
            return Block(a, b, embedding, dropout, SpatialAttention(b, head, tokens) if attends else None)

        self.enter = nn.Conv2d(channels, widths[0], 3, 1, 1)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        skips = [widths[0]]
        for level, (before, width) in enumerate(pairwise((widths[0], *widths))):
            down += [block(level, width if later else before, level in attention) for later in range(blocks)]
            down += [nn.Conv2d(width, width, 3, 2, 1)] if level < last else []
            skips += [width] * (blocks + (level < last))
        for level, width in reversed(list(enumerate(widths))):
            up += [block(level, width + skips.pop(), level in attention) for _ in range(blocks + 1)]
            up += [Upsample(width, widths[level - 1])] if level else []
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.middle = nn.ModuleList(block(last, widths[last], attends) for attends in (True, False))
        self.head = nn.Sequential(norm(widths[0]), nn.SiLU(), zeroed(nn.Conv2d(widths[0], channels, 3, 1, 1)))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """``t_B`` counts steps and may be fractional. ValueError: sides that cannot be halved, a condition amiss."""
        check_sides(x_BCHW, self.halvings)
        encoded = self.condition(condition, len(x_BCHW))
        embedding = self.time(t_B)
        if encoded.vector is not None:
            embedding = embedding + encoded.vector
        embedding = F.silu(embedding)
        h = self.enter(x_BCHW)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding, encoded) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding, encoded)
        for layer in self.up:
            joins = isinstance(layer, Block)
            h = layer(torch.cat([h, skips.pop()], dim=1), embedding, encoded) if joins else layer(h)
        return self.head(h)
