"""What a denoiser is told beside the noisy image: classes or texts, each of which can be dropped.

Shapes: B batch, T tokens of a text, N tokens of the null text, D width of a text vector, E width of the embedding.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Condition(NamedTuple):
    """The condition of a batch; a network reads the parts that it was built for.

    ``labels_B`` int64; ``pooled_BD`` one vector a text; ``tokens_BTD`` one vector a token, ``real_BT`` True where a
    token stands (None: everywhere). Where ``dropped_B`` is True the null condition takes their place.
    """

    labels_B: Tensor | None = None  # noqa: N815
    pooled_BD: Tensor | None = None  # noqa: N815
    tokens_BTD: Tensor | None = None  # noqa: N815
    real_BT: Tensor | None = None  # noqa: N815
    dropped_B: Tensor | None = None  # noqa: N815

    def drop(self, dropped_B: Tensor) -> Self:
        """The same with the null condition where ``dropped_B`` is True; all True is guidance's unconditional branch."""
        return self._replace(dropped_B=dropped_B)

    def rows(self, index: Tensor | slice) -> Self:
        """The conditions of some rows of the batch."""
        return type(self)(*(None if part is None else part[index] for part in self))


def required(part: Tensor | None, name: str, batch: int) -> Tensor:
    """``part`` itself. ValueError: it is missing, or of another batch."""
    if part is None:
        raise ValueError(f"the network was built with {name}, and the condition has none: give Condition({name}=…)")
    if len(part) != batch:
        raise ValueError(f"{name} has {len(part)} rows and the images {batch}: give one row an image")
    return part


def labels_or_null(condition: Condition, classes: int, batch: int) -> Tensor:
    """(B,) rows of a table whose last row, ``classes``, is the null. ValueError: a label outside of the classes."""
    labels_B = required(condition.labels_B, "labels_B", batch)
    # On other devices the question is a stop; fake tensors, which are of a subclass, have no answer.
    watched = type(labels_B) is Tensor and labels_B.device.type == "cpu" and not torch.compiler.is_compiling()
    if watched and labels_B.numel() and not 0 <= int(labels_B.min()) <= int(labels_B.max()) < classes:
        raise ValueError(
            f"labels_B holds {int(labels_B.min())} to {int(labels_B.max())}, the network knows the classes "
            f"0 to {classes - 1}: drop a condition with dropped_B, not with a label of its own"
        )
    return labels_B if condition.dropped_B is None else labels_B.masked_fill(condition.dropped_B, classes)


class Encoded(NamedTuple):
    """A condition as the blocks use it: a vector (B, E) to add to the time's, a memory (B, M, D), its mask (B, M)."""

    vector: Tensor | None
    memory: Tensor | None
    mask: Tensor | None


class ConditionEncoder(nn.Module):
    """Classes through a table, pooled texts through a linear layer, token sequences as they come; 0 leaves one out.

    The null class is the table's last row. The null of a text is learnt, or the text ``empty`` (one row: the encoded
    empty prompt), which is then kept with the weights and not trained.
    """

    null_pooled: Tensor
    null_tokens: Tensor

    def __init__(self, width: int, classes: int = 0, pooled: int = 0, tokens: int = 0, empty: Condition | None = None):
        super().__init__()
        self.classes, self.pooled_width, self.token_width = classes, pooled, tokens
        if classes:
            self.table = nn.Embedding(classes + 1, width)
        if pooled:
            self.project = nn.Linear(pooled, width)
            self._null("null_pooled", (pooled,), empty and required(empty.pooled_BD, "pooled_BD", 1)[0])
        if tokens:
            self._null("null_tokens", (1, tokens), empty and only_real(empty))

    def _null(self, name: str, shape: tuple[int, ...], empty: Tensor | None) -> None:
        if empty is None:
            self.register_parameter(name, nn.Parameter(0.02 * torch.randn(shape)))
        else:
            self.register_buffer(name, empty.detach().clone())

    def forward(self, condition: Condition, batch: int) -> Encoded:
        vectors: list[Tensor] = []
        if self.classes:
            vectors.append(self.table(labels_or_null(condition, self.classes, batch)))
        if self.pooled_width:
            vectors.append(self.project(self.pooled(condition, batch)))
        memory, mask = self.tokens(condition, batch) if self.token_width else (None, None)
        return Encoded(sum(vectors[1:], vectors[0]) if vectors else None, memory, mask)

    def pooled(self, condition: Condition, batch: int) -> Tensor:
        pooled_BD = required(condition.pooled_BD, "pooled_BD", batch)
        if condition.dropped_B is None:
            return pooled_BD
        return torch.where(condition.dropped_B[:, None], self.null_pooled.to(pooled_BD), pooled_BD)

    def tokens(self, condition: Condition, batch: int) -> tuple[Tensor, Tensor]:
        """The memory (B, M, D) and its mask (B, M), M = max(T, N) if something may be dropped, else T."""
        x = required(condition.tokens_BTD, "tokens_BTD", batch)
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if condition.real_BT is None else condition.real_BT
        if condition.dropped_B is None:
            return x, real
        null, length = self.null_tokens.to(x), max(x.shape[1], len(self.null_tokens))
        dropped = condition.dropped_B[:, None]
        null_real = torch.arange(length, device=x.device) < len(null)
        memory = torch.where(dropped[..., None], padded(null[None], length), padded(x, length))
        return memory, torch.where(dropped, null_real, F.pad(real, (0, length - real.shape[1])))


def padded(x_BTD: Tensor, length: int) -> Tensor:
    """(B, ``length``, D), zeros after the end."""
    return F.pad(x_BTD, (0, 0, 0, length - x_BTD.shape[1]))


def only_real(text: Condition) -> Tensor:
    """(N, D): the tokens of a text of one row, without its padding."""
    tokens_TD = required(text.tokens_BTD, "tokens_BTD", 1)[0]
    return tokens_TD if text.real_BT is None else tokens_TD[text.real_BT[0]]
