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

MOST, WINDOW = 16, 0.375
"""Places a side, and the share of them that a window covers: a thing that is half covered is often still known."""


@dataclass(frozen=True)
class Explained:
    """An answer, its probability, and what it rests on.

    ``places`` (s, s): how much of the probability is lost where a place and those around it are covered with the
    image's mean colour, mean over the windows that cover it, of which a corner has fewer; ``latents`` (K,): nats that
    the answer costs more where a latent is 0, the prior's mean, which is little where others tell the same; ``alone``
    (K,): nats that it costs less with this latent alone than with none; ``spread``: the answers of latents that are
    drawn, with their shares.
    """

    question: str
    answer: str
    probability: float
    places: np.ndarray
    latents: np.ndarray
    alone: np.ndarray
    spread: list[tuple[str, float]]


@torch.inference_mode()
def explain(model: VqaModel, image: np.ndarray, question: str, samples: int = 16, seed: int = 0) -> Explained:
    """Of a question about an image, uint8 (S, S, 3), after Zeiler & Fergus 2014, section 4.2."""
    q = model.latents(image[None], [0], [question])
    made = model.answers(q.mean)
    answer, probability = made.answers[0], float(made.probability[0])
    ids = torch.from_numpy(model.encoded([answer])).to(model.device)
    windows, covered = _covered(image)
    other = model.latents(covered, np.arange(len(covered)), [question] * len(covered)).mean
    lost = probability - model.nats(other, ids)[:, 0].neg().exp().cpu().numpy()
    places = np.tensordot(lost, windows, 1) / windows.sum(0).max()
    count = q.mean.shape[1]
    own, none = (float(model.nats(z, ids)[0, 0]) for z in (q.mean, torch.zeros_like(q.mean)))
    keep = torch.eye(count, device=q.mean.device)[..., None]
    without, alone = (model.nats(q.mean * mask, ids)[:, 0].cpu().numpy() for mask in (1 - keep, keep))
    spread = drawn_again(model, q, samples, seed)
    return Explained(question, answer, probability, places, without - own, none - alone, spread)


def _covered(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square windows of places, (W, s, s) 0 or 1, three eighths of the image's side; the image with each of them
    covered."""
    side = min(len(image) >> HALVINGS, MOST)
    cell, width = len(image) // side, max(1, round(WINDOW * side))
    steps = side - width + 1
    windows = np.zeros((steps**2, side, side))
    covered = np.repeat(image[None], steps**2, 0)
    colour = image.reshape(-1, 3).mean(0).round().astype(np.uint8)
    for k in range(steps**2):
        y, x = divmod(k, steps)
        windows[k, y : y + width, x : x + width] = 1
        covered[k, y * cell : (y + width) * cell, x * cell : (x + width) * cell] = colour
    return windows, covered


@torch.inference_mode()
def drawn_again(model: VqaModel, q: Latents, samples: int, seed: int) -> list[tuple[str, float]]:
    """The answers of draws from q(z) of one question, with their shares, the commonest first."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((samples, *q.mean.shape[1:]), generator=generator).to(q.mean)
    counts = Counter(model.answers(model.draw(q, noise, 1.0).expand(samples, -1, -1)).answers)
    return [(answer, count / samples) for answer, count in counts.most_common()]
