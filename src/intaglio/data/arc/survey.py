"""What tasks are like before they are learnt from: pairs that show nothing, inert augmentation, leaks."""

from dataclasses import dataclass, replace

import numpy as np

from intaglio.data import order
from intaglio.data.arc.table import Tasks
from intaglio.data.arc.tasks import OUTSIDE, TaskCorpus

SAMPLE, DRAWS = 128, 3
"""Tasks that are looked at, and how often the augmentation draws each."""


@dataclass(frozen=True)
class Survey:
    """Shares: ``same`` of pairs whose output is their input, ``repeated`` of tasks whose demonstrations are one;
    ``changed`` of tasks that a draw of the augmentation alters, ``variety`` of those that draws alter differently, both
    None without augmentation."""

    same: float
    repeated: float
    changed: float | None = None
    variety: float | None = None


def survey(data: Tasks, items: np.ndarray) -> Survey:
    """Of a sample of the tasks ``items``."""
    items = np.unique(items)
    items = items[np.linspace(0, len(items) - 1, min(SAMPLE, len(items))).astype(int)]
    grids, first, tests = data.corpus.grids, data.corpus.first, data.corpus.tests
    pairs = np.concatenate([grids[first[i] : first[i + 1]] for i in items])
    shown = [grids[first[i] : first[i + 1] - tests[i]] for i in items if first[i + 1] - tests[i] - first[i] > 1]
    same = float((pairs[:, 0] == pairs[:, 1]).all((1, 2)).mean())
    repeated = float(np.mean([(demonstrations == demonstrations[0]).all() for demonstrations in shown] or [0.0]))
    return Survey(same, repeated, *(_drawn(data, items) if data.augment else ()))


def _drawn(data: Tasks, items: np.ndarray) -> tuple[float, float]:
    """The shares of tasks that a draw alters, and that draws alter differently; the order of pairs is no alteration."""
    corpus = data.corpus
    whole = replace(data, pairs=int((corpus.first[items + 1] - corpus.first[items]).max()))
    plain = [_content(corpus.grids[corpus.first[i] : corpus.first[i + 1]]) for i in items]
    made = []
    for k in range(DRAWS):
        batch = whole.training_batch(items, order.draws(np.arange(len(items)) + k * len(items), seed=0))
        tables = zip(batch.grids.numpy(), batch.real.numpy(), strict=True)
        made.append([_content(grids[real]) for grids, real in tables])
    changed = np.mean([[m != p for m, p in zip(row, plain, strict=True)] for row in made])
    return float(changed), float(np.mean([len(set(versions)) > 1 for versions in zip(*made, strict=True)]))


def _content(pairs: np.ndarray) -> tuple[bytes, ...]:
    """Pairs (P, 2, S, S), whatever their order and the size of their table."""
    return tuple(sorted(b"".join(map(_cells, pair)) for pair in pairs))


def _cells(grid: np.ndarray) -> bytes:
    inside = grid != OUTSIDE
    height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
    return bytes((height, width)) + grid[:height, :width].tobytes()


def seen_in_training(corpus: TaskCorpus, train: np.ndarray, held_out: np.ndarray) -> int:
    """How many held-out tasks are among the training tasks: by their grids but for colours and turns, or by half of
    their pairs, two at least (of 50,000 generated tasks some share one by chance)."""

    def pairs(item: int) -> list[tuple[bytes, bytes]]:
        rows = slice(corpus.first[item], corpus.first[item + 1])
        return [(g.tobytes(), s.tobytes()) for g, s in zip(corpus.grids[rows], corpus.sizes[rows], strict=True)]

    train, held_out = np.unique(train), np.unique(held_out)
    hashes, known = {corpus.hashes[i] for i in train}, {pair for i in train for pair in pairs(i)}
    rest = [i for i in held_out if corpus.hashes[i] not in hashes]
    shared = [(sum(pair in known for pair in theirs), len(theirs)) for theirs in map(pairs, rest)]
    return len(held_out) - len(rest) + sum(count >= max(2, of / 2) for count, of in shared)
