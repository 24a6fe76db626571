"""Copies of grids with another colour, another side up, or a step aside: what a grid must be told apart from.

Shapes: G grids in the upper left corners of S × S tables, ``OUTSIDE`` beyond them.
"""

import torch
from torch import Tensor

from intaglio.data.arc.tasks import OUTSIDE

KINDS = ("colour", "flip", "shift")


def alter(grids_GSS: Tensor, u_G: Tensor, kind: str) -> Tensor:
    """A changed copy of each grid, uint8 (G, S, S); ``u`` in [0, 1) decides which change of its kind.

    ``colour``: one colour that occurs becomes another; ``flip``: mirrored in one direction, turned by 180° or
    transposed; ``shift``: moved one cell in one of four directions, round the edge. A copy may equal its grid.
    """
    if kind == "colour":
        return _recoloured(grids_GSS, u_G)
    return _moved(grids_GSS, (4 * u_G.to(grids_GSS.device)).long(), kind)


def _recoloured(grids_GSS: Tensor, u_G: Tensor) -> Tensor:
    flat = grids_GSS.flatten(1).long()
    there = torch.zeros(len(flat), OUTSIDE + 1, dtype=torch.bool, device=flat.device).scatter_(1, flat, True)
    there = there[:, :OUTSIDE]
    u = u_G.to(flat.device)
    which = (u * there.sum(1)).long()  # the which-th colour that occurs …
    old = ((there.cumsum(1) - 1 == which[:, None]) & there).float().argmax(1)
    step = 1 + ((u * 7919) % 1 * (OUTSIDE - 1)).long()  # … becomes any other
    new = (old + step) % OUTSIDE
    return torch.where(flat == old[:, None], new[:, None], flat).view_as(grids_GSS).to(grids_GSS.dtype)


def _moved(grids_GSS: Tensor, which_G: Tensor, kind: str) -> Tensor:
    inside = grids_GSS != OUTSIDE
    h, w = inside.any(2).sum(1)[:, None, None], inside.any(1).sum(1)[:, None, None]
    side = torch.arange(grids_GSS.shape[1], device=grids_GSS.device)
    y, x = side[:, None].expand(len(grids_GSS), -1, len(side)), side[None].expand(len(grids_GSS), len(side), -1)
    k = which_G[:, None, None]
    if kind == "shift":
        down, right = (k == 0).long() - (k == 1).long(), (k == 2).long() - (k == 3).long()
        from_y, from_x = (y - down) % h.clamp(min=1), (x - right) % w.clamp(min=1)
    else:
        turned = k == 3
        from_y = torch.where(turned, x, torch.where((k == 0) | (k == 2), h - 1 - y, y))
        from_x = torch.where(turned, y, torch.where((k == 1) | (k == 2), w - 1 - x, x))
        h, w = torch.where(turned, w, h), torch.where(turned, h, w)
    real = (y < h) & (x < w)
    source = (from_y.clamp(0, len(side) - 1) * len(side) + from_x.clamp(0, len(side) - 1)).flatten(1)
    moved = grids_GSS.flatten(1).gather(1, source).view_as(grids_GSS)
    return torch.where(real, moved, torch.full_like(moved, OUTSIDE))


def keys(grids_GSS: Tensor) -> Tensor:
    """A number of each grid that equal grids share and others do not, int64 (G,): a product with odd random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (30, 30), generator=generator) * 2 + 1
    side = grids_GSS.shape[1]
    cells = (grids_GSS.long() + 1) % (OUTSIDE + 1)  # nothing outside, so that the table's size does not matter
    return (cells * weights[:side, :side].to(cells.device)).sum((1, 2))
