"""Losses of a predicted embedding: among candidates, against its target, and in its relations to others.

Shapes: Q predictions, N candidates, E embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def logits_among(predicted_QE: Tensor, candidates_NE: Tensor, barred_QN: Tensor, log_scale: Tensor) -> Tensor:
    """e^log_scale · cosines in float32, (Q, N), −∞ where a candidate is barred."""
    a, b = (F.normalize(x.float(), dim=-1) for x in (predicted_QE, candidates_NE))
    return (log_scale.exp() * a @ b.T).masked_fill(barred_QN, -torch.inf)


def infonce_among(
    predicted_QE: Tensor, candidates_NE: Tensor, own_Q: Tensor, barred_QN: Tensor, log_scale: Tensor
) -> Tensor:
    """−ln softmax over candidates of e^log_scale · cos, at each prediction's own, nats, (Q,); chance is the logarithm
    of how many are not barred (van den Oord et al. 2018, eq. 4)."""
    return F.cross_entropy(logits_among(predicted_QE, candidates_NE, barred_QN, log_scale), own_Q, reduction="none")


def squared_distance(predicted_QE: Tensor, target_QE: Tensor) -> Tensor:
    """‖ẑ − z‖² / E, (Q,): the prediction loss of LeJEPA (Balestriero & LeCun 2025, algorithm 2) for one view."""
    return (predicted_QE.float() - target_QE.float()).square().mean(-1)


def relational(predicted_QE: Tensor, target_QE: Tensor) -> Tensor:
    """Mean squared difference of all cosines among predictions and among targets (Park et al. 2019, section 3.2, with
    cosines for distances)."""
    a, b = (F.normalize(x.float(), dim=-1) for x in (predicted_QE, target_QE))
    return (a @ a.T - b @ b.T).square().mean()


def invariance(embedding_QE: Tensor, altered_QE: Tensor) -> Tensor:
    """1 − cosine of each item and its altered copy, (Q,)."""
    return 1 - F.cosine_similarity(embedding_QE.float(), altered_QE.float(), dim=-1)
