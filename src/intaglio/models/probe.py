"""What can be read off frozen features: a linear probe (Alain & Bengio 2016)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DECAY = 1e-2


def linear_probe(train_ND: Tensor, labels_N: np.ndarray, test_MD: Tensor) -> np.ndarray:
    """Multinomial logistic regression on standardised features, the labels (M,) that it reads off ``test``.

    Labels are 0 … C − 1. Deterministic: from zero, by L-BFGS, with a weight decay of ``DECAY``.
    """
    mean, std = train_ND.float().mean(0), train_ND.float().std(0).clamp(min=1e-4)
    x, y = (train_ND.float() - mean) / std, torch.from_numpy(labels_N).to(train_ND.device)
    weights = torch.zeros(x.shape[1] + 1, int(labels_N.max()) + 1, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weights[:-1] + weights[-1], y) + DECAY * weights[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        scores = (test_MD.float() - mean) / std @ weights[:-1] + weights[-1]
    return scores.argmax(1).cpu().numpy()
