"""The U-Net of the documents, literally: its parameter counts, its missing norms, its one-token attention.

Shapes: B batch, C channels, H and W sides, P = H·W places, E width of the time embedding, D width of a text vector.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.nn.attention import attend
from intaglio.nn.condition import Condition, labels_or_null
from intaglio.nn.dropout import Dropout
from intaglio.nn.time_embedding import TimeEmbedding
from intaglio.nn.unet import check_sides, doubled, zeroed

EMBEDDING = 256
HEADS = 4  # the documents do not say how many; the parameter counts do not depend on it


class DocumentedNorm(nn.GroupNorm):
    """Eight groups; in float32 where they have fewer than 16 channels.

    Channels-last on a CPU, the bf16 backward of such takes four times as long, conversions included.
    """

    def __init__(self, channels: int):
        super().__init__(8, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.num_channels >= 16 * self.num_groups:
            return super().forward(x_BCHW)
        return super().forward(x_BCHW.float()).to(x_BCHW.dtype)


class DocumentedResidual(nn.Module):
    """Norm, SiLU, conv; + embedding; norm, SiLU, dropout, conv; + input."""

    def __init__(self, channels: int, out: int, dropout: float):
        super().__init__()
        self.norm_1, self.conv_1 = DocumentedNorm(channels), nn.Conv2d(channels, out, 3, 1, 1)
        self.embed = nn.Linear(EMBEDDING, out)
        self.norm_2, self.conv_2 = DocumentedNorm(out), nn.Conv2d(out, out, 3, 1, 1)
        self.dropout = Dropout(dropout)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x_BCHW))) + self.embed(embedding_BE)[:, :, None, None]
        return self.skip(x_BCHW) + self.conv_2(self.dropout(F.silu(self.norm_2(h))))


class UnnormedAttention(nn.Module):
    """Attention of the places to ``memory`` (None: to themselves), without biases and without a norm before it.

    To a memory of one token the softmax is 1: every place receives the same vector, whatever the image shows.
    """

    def __init__(self, channels: int, memory: int | None = None):
        super().__init__()
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(memory or channels, channels, bias=False)
        self.value = nn.Linear(memory or channels, channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, x_BCHW: Tensor, memory_BTD: Tensor | None = None) -> Tensor:
        x_BPC = x_BCHW.flatten(2).mT
        memory = x_BPC if memory_BTD is None else memory_BTD
        sources = (self.query(x_BPC), self.key(memory), self.value(memory))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in sources)
        y_BPC = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return y_BPC.mT.unflatten(2, x_BCHW.shape[2:])


class DocumentedLevel(nn.Module):
    """ResBlock → self-attention → cross-attention; what scales comes after."""

    def __init__(self, channels: int, out: int, attention: bool, context: int | None, dropout: float):
        super().__init__()
        self.residual = DocumentedResidual(channels, out, dropout)
        self.self_attention = UnnormedAttention(out) if attention else None
        self.cross_attention = UnnormedAttention(out, context) if context else None

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor, context_BTD: Tensor | None) -> Tensor:
        h = self.residual(x_BCHW, embedding_BE)
        if self.self_attention is not None:
            h = h + self.self_attention(h)
        return h if self.cross_attention is None else h + self.cross_attention(h, context_BTD)


class DocumentedUpsample(nn.Module):
    """Nearest ×2, a 3×3 convolution, then a 1×1 to half the channels: all linear, so one transposed convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.narrow = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels // 2, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        if 2 * batch * height * width < channels:  # for so few places, making one kernel of both takes longer
            return self.narrow(doubled(x_BCHW, self.conv.weight, self.conv.bias))
        narrow, bias = self.narrow.weight.flatten(1), self.narrow.bias
        assert self.conv.bias is not None
        assert bias is not None
        kernel = narrow @ self.conv.weight.permute(0, 2, 3, 1).flatten(1)
        weight = kernel.view(channels // 2, 3, 3, channels).permute(0, 3, 1, 2)
        return doubled(x_BCHW, weight, torch.addmv(bias, narrow, self.conv.bias))


class DocumentedUNet(nn.Module):
    """Levels of b, 2b, 4b, 2b channels at sides 1, 1/2, 1/4, 1/2; attention in the second and third.

    With ``table``, frozen text vectors of the classes and last of the empty prompt, there is no embedding of labels:
    the one vector is what cross-attention in every level attends to. Parameters at ``base`` 64: 3,385,731, and
    4,177,539 with a table of width 512; 55,934,468 with that at ``base`` 256 on 4 channels. What the documents leave
    open, attention's missing biases and the head's widths, is as these three numbers demand.
    """

    table: Tensor | None

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        base: int = 64,
        dropout: float = 0.1,
        table: Tensor | None = None,
    ):
        super().__init__()
        if table is not None and len(table) != classes + 1:
            raise ValueError(f"the table has {len(table)} rows: {classes} classes and the empty prompt need one each")
        self.classes = classes
        self.time = TimeEmbedding(EMBEDDING)
        self.label = nn.Embedding(classes + 1, EMBEDDING) if table is None else None
        self.register_buffer("table", table)
        context = None if table is None else table.shape[1]
        widths = (base, base, 2 * base, 4 * base, 2 * base)
        self.enter = nn.Conv2d(channels, base, 3, 1, 1)
        self.levels = nn.ModuleList(
            DocumentedLevel(a, b, attention, context, dropout)
            for (a, b), attention in zip(pairwise(widths), (False, True, True, False), strict=True)
        )
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for width in (base, 2 * base))
        self.up = nn.ModuleList(DocumentedUpsample(width) for width in (4 * base, 2 * base))
        self.head = nn.Sequential(
            *(nn.Conv2d(2 * base, base, 3, 1, 1), nn.SiLU(), nn.Conv2d(base, base, 3, 1, 1), nn.SiLU()),
            zeroed(nn.Conv2d(base, channels, 1)),
        )

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """The prediction, of the shape of ``x_BCHW``. ValueError: sides not divisible by 4, labels amiss."""
        check_sides(x_BCHW, 2)
        rows_B = labels_or_null(condition, self.classes, len(x_BCHW))
        embedding, context = self.time(t_B), None
        if self.label is not None:
            embedding = embedding + self.label(rows_B)
        elif self.table is not None:
            context = self.table[rows_B, None]
        skips: list[Tensor] = []
        h = self.enter(x_BCHW)
        for level, down in zip(self.levels[:2], self.down, strict=True):
            skips.append(level(h, embedding, context))
            h = down(skips[-1])
        for level, up in zip(self.levels[2:], self.up, strict=True):
            h = torch.cat([up(level(h, embedding, context)), skips.pop()], dim=1)
        return self.head(h)
