"""What an answer rests on, by interventions: places covered, latents left out, latents drawn again.

Shapes: S image side, s places a side, K latents of Z numbers.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from intaglio.models.vqa import VqaModel
from intaglio.nn.bottleneck import Latents
from intaglio.nn.vision import HALVINGS

MOST = 16
"""Places a side: each is a forward pass."""


@dataclass(frozen=True)
class Explained:
    """An answer, its probability, and what it rests on.

    ``places`` (s, s): how much of the probability is lost where a place is covered with the image's mean colour;
    ``latents`` (K,): nats that the answer costs more where a latent is 0, the prior's mean; ``spread``: the answers of
    latents that are drawn, with their shares.
    """

    question: str
    answer: str
    probability: float
    places: np.ndarray
    latents: np.ndarray
    spread: list[tuple[str, float]]


@torch.inference_mode()
def explain(model: VqaModel, image: np.ndarray, question: str, samples: int = 16, seed: int = 0) -> Explained:
    """Of a question about an image, uint8 (S, S, 3): 2 + s² forward passes."""
    q = model.latents(image[None], [0], [question])
    made = model.answers(q.mean)
    answer, probability = made.answers[0], float(made.probability[0])
    ids = torch.from_numpy(model.encoded([answer])).to(model.device)
    side = min(len(image) >> HALVINGS, MOST)
    cell = len(image) // side
    covered = np.repeat(image[None], side**2, 0)
    colour = image.reshape(-1, 3).mean(0).round().astype(np.uint8)
    for k in range(side**2):
        y, x = k // side * cell, k % side * cell
        covered[k, y : y + cell, x : x + cell] = colour
    other = model.latents(covered, np.arange(side**2), [question] * side**2).mean
    own = model.nats(q.mean, ids)[0, 0]
    lost = probability - model.nats(other, ids)[:, 0].neg().exp()
    count = q.mean.shape[1]
    without = q.mean.repeat(count, 1, 1)
    without[torch.arange(count), torch.arange(count)] = 0
    cost = model.nats(without, ids)[:, 0] - own
    spread = drawn_again(model, q, samples, seed)
    return Explained(question, answer, probability, lost.view(side, side).cpu().numpy(), cost.cpu().numpy(), spread)


@torch.inference_mode()
def drawn_again(model: VqaModel, q: Latents, samples: int, seed: int) -> list[tuple[str, float]]:
    """The answers of draws from q(z) of one question, with their shares, the commonest first."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((samples, *q.mean.shape[1:]), generator=generator).to(q.mean)
    counts = Counter(model.answers(model.draw(q, noise, 1.0).expand(samples, -1, -1)).answers)
    return [(answer, count / samples) for answer, count in counts.most_common()]
