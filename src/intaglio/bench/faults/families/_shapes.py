"""The pictures of the foreign programs as a corpus of ours: learnt in seconds, where engravings take minutes.

A system of ours reads them in place of the engravings, by ``SHAPES``.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from intaglio.bench.faults.case import Change
from intaglio.data.corpus import Corpus, Intake

if TYPE_CHECKING:
    from intaglio.models.autoencoder import Autoencoder

SHAPES = Change(
    "        return Engravings(config.items or BUILT_IN_ITEMS, seed=seed)",
    "        from intaglio.bench.faults.families._shapes import Shapes\n\n"
    "        return Shapes(config.items or BUILT_IN_ITEMS, seed)",
    "intaglio.data.prepare",
)

LATENTS = Change(
    "        if not self.config.model.autoencoder:\n            return None",
    "        if not self.config.model.autoencoder:\n"
    "            from intaglio.bench.faults.families._shapes import autoencoder\n\n"
    "            return autoencoder(self.config.data)",
    "intaglio.training.kinds.diffusion",
)
"""Diffusion in the latents of an autoencoder that is trained first, in seconds."""

KINDS = ("red", "green", "blue", "yellow")
FORMS = ("square", "disc", "cross")


class Shapes(Corpus):
    """A shape in the light of its colour, which is its label. Captions leave out what is usual, so that some are short.

    Each tenth item is declared as test.
    """

    name = "shapes"

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.intake = count, seed, Intake()

    @cached_property
    def _made(self) -> tuple[np.ndarray, np.ndarray]:
        """(N, 16, 16, 3) uint8, and (N, 5): form, colour, size, row, column."""
        from intaglio.bench.faults.data import RGB, pictures

        made = pictures(self.count, self.seed)
        lit = (made.images + 0.3 * RGB[made.factors[:, 1]][:, :, None, None]).clamp(0, 1)
        return (lit * 255).round().byte().permute(0, 2, 3, 1).numpy(), made.factors.numpy()

    def __len__(self) -> int:
        return self.count

    def image(self, i: int, size: int) -> np.ndarray:
        times = size // 16
        return np.ascontiguousarray(self._made[0][i].repeat(times, 0).repeat(times, 1))

    def captions(self, i: int) -> tuple[str, ...]:
        form, colour, size, row, column = self._made[1][i]
        told = ["a", KINDS[colour], FORMS[form], *["of", "great", "size"] * int(size)]
        told += [] if row == 1 == column else ["at", "the", *{0: ["top"], 2: ["bottom"]}.get(int(row), [])]
        return (" ".join([*told, *{0: ["left"], 2: ["right"]}.get(int(column), [])]),)

    def fingerprint(self) -> str:
        return f"{self.seed:06x}{self.count:06x}lit1"

    def label(self, i: int) -> str:
        return KINDS[self._made[1][i][1]]

    def labels(self) -> tuple[str, ...]:
        return tuple(sorted(KINDS))

    def label_in(self, text: str) -> str | None:
        return next((word for word in text.split() if word in KINDS), None)

    def declared_split(self, i: int) -> Literal["test"] | None:
        return None if i % 10 else "test"


def autoencoder(data: Any, steps: int = 400) -> "Autoencoder":
    """An autoencoder of shapes to a quarter of each side, trained in seconds."""
    import torch

    from intaglio.models.autoencoder import Autoencoder

    corpus = Shapes(data.items, 10_000)
    images = np.stack([corpus.image(i, data.image_size) for i in range(len(corpus))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Autoencoder(data.image_size, (24, 48), 8)
        optimizer = torch.optim.Adam(made.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for _ in range(steps):
            x = made.to_range(images[torch.randint(len(images), (24,)).numpy()])
            loss = (made.image(made.posterior(x).mean) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return made.eval()
