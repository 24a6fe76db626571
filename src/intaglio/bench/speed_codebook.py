"""Rows of ``intaglio bench speed`` about codes: our codebook beside that of vector-quantize-pytorch.

Both on one thread, in turns, with the same start, decay and revival; a round is a forward pass in training mode, the
gradient to the tokens, and the update.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

import torch

from intaglio.bench import Result
from intaglio.bench.speed_diffusion import Arm, alternated, ratio
from intaglio.nn.codebook import Codebook

SHAPES = ((4096, 64, 512), (8192, 256, 768), (16384, 128, 1024))
"""Tokens, dimensions of each, codes."""

WARM, REVIVE = 3, 0.1


def measure_codebook() -> tuple[list[Result], dict[str, Any]]:
    """A row for each shape, and the seconds that they come from; none without the library."""
    try:
        oracle: Any = import_module("vector_quantize_pytorch")
    except ImportError:
        return [], {"vector-quantize-pytorch": "not installed (extra dev): the rows against it are left out"}
    results, seconds = [], {}
    with one_thread():
        for tokens, width, size in SHAPES:
            mine, others = alternated([_ours(tokens, width, size), _theirs(oracle, tokens, width, size)])
            name = f"{tokens:,} tokens × {width}, {size:,} codes"
            quantity = f"codebook, forward, gradient and update, over vector-quantize-pytorch's: {name}"
            results.append(ratio(quantity, 3.0, others, mine))
            seconds[name] = {"ours": mine, "vector-quantize-pytorch": others}
    return results, {"vector-quantize-pytorch": metadata.version("vector-quantize-pytorch"), "seconds": seconds}


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tokens(tokens: int, width: int) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _ours(tokens: int, width: int, size: int) -> Arm:
    book, x = Codebook(size, width, decay=0.99, revive=REVIVE), _tokens(tokens, width)

    def step() -> None:
        q = book(x)
        torch.autograd.grad(q.x.sum() + 0.25 * q.commitment, x)
        book.update()

    return _warm(step)


def _theirs(oracle: Any, tokens: int, width: int, size: int) -> Arm:
    book = oracle.VectorQuantize(
        width, size, decay=0.99, kmeans_init=True, threshold_ema_dead_code=REVIVE * tokens / size,
        commitment_weight=0.25, rotation_trick=False,
    )  # fmt: skip
    x = _tokens(tokens, width)[None].detach().requires_grad_()

    def step() -> None:
        q, _, loss = book(x)
        torch.autograd.grad(q.sum() + loss.sum(), x)

    return _warm(step)


def _warm(step: Arm) -> Arm:
    """After the start and some steps."""
    for _ in range(WARM):
        step()
    return step
