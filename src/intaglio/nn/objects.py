"""Objects of a grid, its connected cells of one colour, read by a Transformer into a few slots.

Shapes: G grids, S side of the table that they lie in, O tokens of a grid, C coloured cells and K components of all
grids together, M slots, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from intaglio.data.arc.tasks import COLOURS, LARGEST, OUTSIDE
from intaglio.nn.grids import sides, slots_of
from intaglio.nn.packed import Run
from intaglio.nn.transformer import blocks

TOKENS = 16
"""Most objects of a grid that are read, the largest ones."""

NUMBERS = 11
"""What is told of an object besides its colour."""


class Components(NamedTuple):
    """The 4-connected components of one colour; 0, the background, has none.

    ``cells`` (C,) places of the coloured cells in the flattened tables, ascending; ``member`` (C,) their components,
    which are numbered in the order of their first cells, ``first`` (K,); ``touching`` (2, T) the pairs of neighbouring
    cells of one component, as rows of ``cells``.
    """

    cells: Tensor
    member: Tensor
    first: Tensor
    touching: Tensor


def components(grids_GSS: Tensor) -> Components:
    """uint8 (G, S, S) → their components.

    Of roots that touch, each later one is hung on the earliest that it touches, then every cell on its root (Shiloach &
    Vishkin 1982, with minima): a handful of rounds, however long the objects are.
    """
    coloured = (grids_GSS > 0) & (grids_GSS < OUTSIDE)
    cells = coloured.flatten().nonzero()[:, 0]
    row = coloured.flatten().cumsum(0).view_as(coloured) - 1
    below = coloured[:, 1:] & (grids_GSS[:, 1:] == grids_GSS[:, :-1])
    beside = coloured[:, :, 1:] & (grids_GSS[:, :, 1:] == grids_GSS[:, :, :-1])
    earlier = torch.cat([row[:, :-1][below], row[:, :, :-1][beside]])
    later = torch.cat([row[:, 1:][below], row[:, :, 1:][beside]])
    touching = torch.stack([earlier, later])
    root = torch.arange(len(cells), device=cells.device)
    while len(later):
        root.scatter_reduce_(0, later, earlier, "amin")
        while not torch.equal(above := root[root], root):
            root = above
        earlier, later = root[earlier], root[later]
        apart = earlier != later
        earlier, later = torch.minimum(earlier, later)[apart], torch.maximum(earlier, later)[apart]
    own = root == torch.arange(len(cells), device=cells.device)
    return Components(cells, (own.cumsum(0) - 1)[root], cells[own], touching)


def ranks(c: Components, grids: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each component its grid, its rank there by its area, 0 for the largest, equals in reading order, and its area,
    (K,) each; of so many grids of so many ``cells``."""
    grid, area = c.first // cells, c.member.bincount(minlength=len(c.first))
    order = (grid * (cells + 1) - area).argsort(stable=True)
    count = grid.bincount(minlength=grids)
    before = count.cumsum(0) - count
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - before[grid[order]]
    return grid, rank, area


def dropped(grids_GSS: Tensor) -> tuple[float, float]:
    """The share of components, and that of coloured cells, that no token stands for."""
    _, rank, area = ranks(components(grids_GSS), len(grids_GSS), grids_GSS[0].numel())
    lost = rank >= TOKENS
    return float(lost.sum() / max(1, len(lost))), float(area[lost].sum() / max(1, int(area.sum())))


class Objects(NamedTuple):
    """The ``TOKENS`` largest components of each grid: ``numbers`` float32 (G, O, ``NUMBERS``), ``colour`` int64 (G, O),
    0 where there is none, ``there`` (G,) how many there are, in front."""

    numbers: Tensor
    colour: Tensor
    there: Tensor


@torch.no_grad()
def objects(grids_GSS: Tensor) -> Objects:
    """uint8 (G, S, S) → what is told of their largest components.

    Area and perimeter over the grid's area; height and width over the grid's; the logarithm of width over height; the
    middle of its cells, and its upper, left, lower and right edge, over the grid's height or width.
    """
    G, S, _ = grids_GSS.shape
    if isinstance(grids_GSS, FakeTensor):  # has a shape and no cells: as if every grid were full of objects
        colour = torch.ones(G, TOKENS, dtype=torch.int64, device=grids_GSS.device)
        return Objects(colour[..., None].expand(-1, -1, NUMBERS).float(), colour, colour.sum(1))
    c = components(grids_GSS)
    grid, rank, area = ranks(c, G, S * S)
    y, x = c.cells % (S * S) // S, c.cells % S
    sums = torch.zeros(len(grid), 2, dtype=torch.int64, device=y.device).index_add_(0, c.member, torch.stack([y, x], 1))
    ends = torch.full((len(grid), 4), -S, device=y.device)
    ends.scatter_reduce_(0, c.member[:, None].expand(-1, 4), torch.stack([-y, -x, y + 1, x + 1], 1), "amax")
    internal = c.member[c.touching[0]].bincount(minlength=len(grid))
    top, left, bottom, right = (ends * ends.new_tensor([-1, -1, 1, 1])).unbind(1)
    height, width, open_sides = bottom - top, right - left, 4 * area - 2 * internal
    h, w = (side[grid] for side in sides(grids_GSS))
    middle_y, middle_x = (sums / area[:, None] + 0.5).unbind(1)
    told = (
        *(area / (h * w), open_sides / (h * w), height / h, width / w, (width / height).log()),
        *(middle_y / h, middle_x / w, top / h, left / w, bottom / h, right / w),
    )
    kept = rank < TOKENS
    at = (grid[kept], rank[kept])
    numbers = torch.zeros(G, TOKENS, NUMBERS, device=y.device)
    numbers[at] = torch.stack(told, 1)[kept]
    colour = torch.zeros(G, TOKENS, dtype=torch.int64, device=y.device)
    colour[at] = grids_GSS.flatten()[c.first[kept]].long()
    return Objects(numbers, colour, grid[kept].bincount(minlength=G))


class ObjectEncoder(nn.Module):
    """Objects and M learnt slots attend to each other; the slots leave, (G, M, D).

    An object is its numbers and its colour through a layer of GELUs. Which cells it has, and all objects beyond the
    ``TOKENS`` largest, stay unseen.
    """

    content = 0  # slots stand for no region

    def __init__(self, width: int, layers: int, heads: int, slots: int):
        super().__init__()
        self.slots = slots
        self.number = nn.Linear(NUMBERS, width)
        self.colour = nn.Embedding(COLOURS, width)
        self.token = nn.Linear(width, width)
        self.size = nn.Embedding(2 * (LARGEST + 1), width)
        self.slot = nn.Embedding(slots, width)
        self.blocks = blocks(layers, width, heads, 4 * width, 0.0, cross=False)
        self.norm = nn.LayerNorm(width)
        for table, std in ((self.number, 0.5), (self.colour, 0.5), (self.size, 0.35), (self.slot, 0.5)):
            nn.init.normal_(table.weight, std=std)

    def forward(self, grids_GSS: Tensor) -> Tensor:
        """uint8 (G, S, S) → (G, M, D). Grids with about as many objects are read together."""
        told = objects(grids_GSS)
        parts = (*told, *sides(grids_GSS))
        return self.norm(slots_of(self.blocks, self._tokens, told.there, TOKENS, self.slots, *parts))

    def _tokens(
        self, longest: int, numbers_GON: Tensor, colour_GO: Tensor, there: Tensor, heights: Tensor, widths: Tensor
    ) -> Run:
        """Slots and objects of grids that have at most ``longest`` objects."""
        x = self.number(numbers_GON[:, :longest]) + self.colour(colour_GO[:, :longest])
        x = self.token(F.gelu(x))
        size = self.size(heights) + self.size(widths + LARGEST + 1)
        x = torch.cat([self.slot.weight + size[:, None], x], 1)
        real = torch.arange(self.slots + longest, device=x.device) < self.slots + there[:, None]
        return Run(x, real)
