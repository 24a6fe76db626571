"""Sequences of several lengths through Transformer blocks: products of all tokens at once, attention run by run.

Shapes: R sequences of a run, T tokens of each, N tokens of all runs, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.nn.attention import attend
from intaglio.nn.transformer import Block

ROUND = 512
"""The tokens of all runs are made a multiple of it, as kernels are built anew for every number that was not there."""


class Run(NamedTuple):
    """Sequences that are attended to together: ``x`` (R, T, D), and ``real`` (R, T), True where a token stands."""

    x: Tensor
    real: Tensor


def first_of(stack: Sequence[Block], runs: Sequence[Run], first: int) -> Tensor:
    """The ``first`` tokens of each sequence after all blocks, (ΣR, ``first``, D); of the last block no others are made.

    The same as the blocks by themselves: only attention sees more than one token, and to a run it is all there is.
    """
    x = torch.cat([run.x.flatten(0, 1) for run in runs])
    x = F.pad(x, (0, 0, 0, -len(x) % ROUND))
    for block in stack[:-1]:
        x = _block(block, x, runs)
    return _block(stack[-1], x, runs, first).unflatten(0, (-1, first))


def _block(block: Block, x_ND: Tensor, runs: Sequence[Run], first: int | None = None) -> Tensor:
    """``block`` on the tokens of all runs, (N, D); with ``first`` for those of each sequence alone, (ΣR·first, D)."""
    attention = block.self_attention
    h_ND = block.self_norm(x_ND)
    memories = _apart(attention.key_value(h_ND), runs)
    if first is not None:
        x_ND, h_ND = (torch.cat([t[:, :first].flatten(0, 1) for t in _apart(x, runs)]) for x in (x_ND, h_ND))
    made = []
    for query, memory, run in zip(_apart(attention.query(h_ND), runs, first), memories, runs, strict=True):
        q, k, v = map(attention.split, (query, *memory.chunk(2, dim=-1)))
        made.append(attend(q, k, v, run.real[:, None, None]).transpose(1, 2).flatten(2).flatten(0, 1))
    y_ND = torch.cat(made)
    y_ND = attention.out(F.pad(y_ND, (0, 0, 0, len(x_ND) - len(y_ND))))
    x_ND = x_ND + block.dropout(y_ND)
    return x_ND + block.dropout(block.feed(block.feed_norm(x_ND)))


def _apart(x_ND: Tensor, runs: Sequence[Run], tokens: int | None = None) -> list[Tensor]:
    """The tokens of each run, or so many of each of its sequences: (R, T, D) each."""
    shapes = [(len(run.real), tokens or run.real.shape[1]) for run in runs]
    sizes = [rows * length for rows, length in shapes]
    parts = x_ND.split([*sizes, len(x_ND) - sum(sizes)])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=False)]
