"""Contrastive losses between two views of the same items, over the global batch.

Shapes: B items of this process, N items of all processes, E embedding; both inputs have unit length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.objectives.distributed import gather_rows, rank


def infonce(a_BE: Tensor, b_BE: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE in nats (Radford et al. 2021, fig. 3): ½ (CE(a→b) + CE(b→a)); chance is ln N."""
    own = torch.arange(len(a_BE), device=a_BE.device) + rank() * len(a_BE)
    a_to_b = log_scale.exp() * a_BE @ gather_rows(b_BE).T
    b_to_a = log_scale.exp() * b_BE @ gather_rows(a_BE).T
    return 0.5 * (F.cross_entropy(a_to_b.float(), own) + F.cross_entropy(b_to_a.float(), own))


def sigmoid_pairs(a_BE: Tensor, b_BE: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP (Zhai et al. 2023, eq. 1): −Σⱼ log σ(±(t·aᵢ·bⱼ + b)) summed over j, mean over i; + for the pair itself."""
    logits_BN = (log_scale.exp() * a_BE @ gather_rows(b_BE).T + bias).float()
    signs_BN = -torch.ones_like(logits_BN)
    rows = torch.arange(len(a_BE), device=a_BE.device)
    signs_BN[rows, rows + rank() * len(a_BE)] = 1
    return -F.logsigmoid(signs_BN * logits_BN).sum(1).mean()
