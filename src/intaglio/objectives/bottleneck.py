"""Losses of a latent bottleneck, and of what its decoder says.

Shapes: B items, K latents of Z numbers, N candidate answers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.objectives.distributed import mean_over_processes


def free_bits(kl_BK: Tensor, floor: float) -> Tensor:
    """Σ over groups of max(λ, mean over the minibatch of the group's KL), nats of an item (Kingma et al. 2016, eq. 15).

    A group below the floor has no gradient; at floor 0 this is KL itself. The mean is over all processes, and the
    gradient of each is such that their average is the whole batch's.
    """
    here = kl_BK.mean(0)
    everywhere = mean_over_processes(here.detach())
    return torch.where(everywhere > floor, here, torch.full_like(here, floor)).sum()


def orthogonality(z_BKZ: Tensor) -> Tensor:
    """Mean squared cosine between different latents of an item; 1/Z for random directions, 0 where all are at right
    angles."""
    count = z_BKZ.shape[1]
    if count < 2:
        return z_BKZ.new_zeros(())
    unit = F.normalize(z_BKZ.float(), dim=-1)
    squares = (unit @ unit.transpose(1, 2)).square()
    return ((squares.sum((1, 2)) - count) / (count * (count - 1))).mean()


class Preference(NamedTuple):
    """The loss, a scalar, and the share of items whose candidates all have one score, which teach nothing."""

    loss: Tensor
    ties: Tensor


def preference(log_probability_BN: Tensor, score_BN: Tensor) -> Preference:
    """−log σ(log p(best) − log p(worst)) over candidate answers, mean over items: the preference of Bradley & Terry
    1952 as Rafailov et al. 2023, eq. 7, have it, with the model's own sequence probabilities and a uniform reference.

    The gradient is that of the log-probabilities; scores only say which answer shall be likelier. Items whose
    candidates have one score count as 0.
    """
    best, worst = score_BN.argmax(1, keepdim=True), score_BN.argmin(1, keepdim=True)
    differ = (score_BN.gather(1, best) > score_BN.gather(1, worst))[:, 0]
    margin = (log_probability_BN.gather(1, best) - log_probability_BN.gather(1, worst))[:, 0]
    loss = torch.where(differ, -F.logsigmoid(margin), torch.zeros_like(margin)).mean()
    return Preference(loss, 1 - differ.float().mean())
