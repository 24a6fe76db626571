"""Cross-entropy of captions."""

import torch.nn.functional as F
from torch import Tensor

from intaglio.objectives.distributed import mean_over_processes


def caption_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, pad: int) -> Tensor:
    """Nats per token, padding left out; a scalar.

    With several processes the sum is divided by the mean count of tokens over the processes, so that averaged
    gradients are those of the whole batch, however unevenly the tokens fall.
    """
    total = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=pad, reduction="sum")
    return total / mean_over_processes((targets_BT != pad).sum().float()).clamp(min=1)


def token_nats(logits_BTV: Tensor, targets_BT: Tensor, pad: int) -> Tensor:
    """Cross-entropy of every position in nats, (B, T), 0 where the target is padding."""
    nats = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=pad, reduction="none")
    return nats.view_as(targets_BT)
