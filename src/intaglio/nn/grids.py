"""Grids of coloured cells, read by a Transformer into a few slots.

Shapes: G grids, S side of the table that they lie in, p side of a patch, N patches, M slots, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from intaglio.data.arc.tasks import LARGEST, OUTSIDE
from intaglio.nn.packed import Run, first_of
from intaglio.nn.transformer import Block, blocks

WASTE = 1.15
"""Tokens computed over tokens there are, in a chunk of grids of several sizes."""

CHUNK = 16_384
"""Most tokens that are read at once."""

COLOURS = 10
"""Of ARC's cells."""


def sides(grids_GSS: Tensor) -> tuple[Tensor, Tensor]:
    """Height and width of each grid, (G,) each: grids lie in the upper left corner."""
    inside = grids_GSS != OUTSIDE
    return inside.any(2).sum(1), inside.any(1).sum(1)


class GridEncoder(nn.Module):
    """Patches of cells and M learnt slots attend to each other; the slots leave, (G, M, D).

    M = R² slots stand for R × R regions of the grid, whatever its size: the first ``content`` numbers of each are how
    much of each colour lies in its region, and nothing of where that is, so that a grid which is mirrored, turned or
    moved has the same contents in other slots. The other numbers are what the slot has read.

    A patch is colour · (1 + gate(place)) + place: the sum of an embedding of each of its cells' colours, weighed by and
    added to what its place has, row and column from both ends, so that what a mirror does is one step away, and the sum
    of a grid's patches tells where each colour is. All enter with like size: a table that starts at .02, as is common,
    is not heard beside the others for hundreds of steps. Nothing outside a grid is attended to.
    """

    def __init__(self, width: int, layers: int, heads: int, slots: int, patch: int):
        super().__init__()
        self.patch, self.slots, self.regions, self.content = patch, slots, math.isqrt(slots), width // 3
        if self.regions**2 != slots:
            raise ValueError(f"{slots} slots are no square of regions: use 4, 9 or 16")
        places = -(-LARGEST // patch)
        self.colour = nn.Embedding((OUTSIDE + 1) * patch**2, width)
        self.place, self.gate = nn.Embedding(4 * places, width), nn.Embedding(4 * places, width)
        self.size = nn.Embedding(2 * (LARGEST + 1), width)
        self.slot = nn.Embedding(slots, width)
        self.blocks = blocks(layers, width, heads, 4 * width, 0.0, cross=False)
        self.norm, self.read = nn.LayerNorm(width), nn.Linear(width, width - self.content)
        self.of_colours = nn.Linear(COLOURS, self.content, bias=False)
        nn.init.normal_(self.of_colours.weight)
        tables = ((self.colour, 0.5 / patch), (self.place, 0.25), (self.gate, 0.7), (self.size, 0.35), (self.slot, 0.5))
        for table, std in tables:
            nn.init.normal_(table.weight, std=std)

    def forward(self, grids_GSS: Tensor) -> Tensor:
        """uint8 (G, S, S) → (G, M, D). Grids of like size are read together: padding costs at most ``WASTE``."""
        p, side = self.patch, grids_GSS.shape[-1]
        grids_GSS = F.pad(grids_GSS, (0, -side % p, 0, -side % p), value=OUTSIDE)
        heights, widths = sides(grids_GSS)
        rows, columns = (heights + p - 1) // p, (widths + p - 1) // p
        parts = (grids_GSS, heights, widths, rows, columns)
        most = (grids_GSS.shape[-1] // p) ** 2
        read = self.read(self.norm(slots_of(self.blocks, self._tokens, rows * columns, most, self.slots, *parts)))
        contents = self.of_colours(colours_of_regions(grids_GSS, heights, widths, self.regions))
        return torch.cat([contents.to(read.dtype), read], -1)

    def _tokens(
        self, longest: int, grids_GSS: Tensor, heights: Tensor, widths: Tensor, rows: Tensor, columns: Tensor
    ) -> Run:
        """Slots and patches of grids that have at most ``longest`` patches."""
        p, side = self.patch, grids_GSS.shape[-1] // self.patch
        cells = grids_GSS.unflatten(2, (side, p)).unflatten(1, (side, p)).transpose(2, 3).flatten(3).flatten(1, 2)
        real = torch.arange(side**2, device=cells.device) % side < columns[:, None]
        real = real & (torch.arange(side**2, device=cells.device) // side < rows[:, None])
        first = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]  # (G, N): patches, then padding
        real = real.gather(1, first)
        cells = cells.gather(1, first[..., None].expand(-1, -1, p * p)).long()  # (G, N, p²)
        kinds = cells + (OUTSIDE + 1) * torch.arange(p * p, device=cells.device)
        x = F.embedding_bag(kinds.flatten(0, 1), self.colour.weight, mode="sum").unflatten(0, cells.shape[:2])
        place, gate = self._places(first // side, first % side, rows[:, None], columns[:, None])
        x = x * (1 + gate) + place
        size = self.size(heights) + self.size(widths + LARGEST + 1)
        x = torch.cat([self.slot.weight + size[:, None], x], 1)
        return Run(x, torch.cat([real.new_ones(len(real), self.slots), real], 1))

    def _places(self, row_GN: Tensor, column_GN: Tensor, rows_G1: Tensor, columns_G1: Tensor) -> tuple[Tensor, Tensor]:
        """Σ of the embeddings of row and column, each counted from both ends; and of their gates."""
        count = self.place.num_embeddings // 4
        ends = (row_GN, column_GN, (rows_G1 - 1 - row_GN).clamp(min=0), (columns_G1 - 1 - column_GN).clamp(min=0))
        which = torch.stack([n + k * count for k, n in enumerate(ends)], -1)
        tables = (self.place.weight, self.gate.weight)
        place, gate = (F.embedding_bag(which.flatten(0, 1), table, mode="sum") for table in tables)
        return place.unflatten(0, row_GN.shape), gate.unflatten(0, row_GN.shape)


def colours_of_regions(grids_GSS: Tensor, heights_G: Tensor, widths_G: Tensor, regions: int) -> Tensor:
    """Shares of each colour in R × R regions of equal area, (G, R², 10) float32: a cell on a border counts in parts, so
    that the regions of a mirrored or turned grid are those of the grid, in another order."""
    at = torch.arange(grids_GSS.shape[-1], device=grids_GSS.device)
    region = torch.arange(regions, device=grids_GSS.device)[:, None]

    def part(sides_G: Tensor) -> Tensor:  # (G, R, S): of a region's side, how much a cell covers
        n = sides_G.clamp(min=1)[:, None, None]
        ends, begins = torch.minimum((at + 1) / n, (region + 1) / regions), torch.maximum(at / n, region / regions)
        return (ends - begins).clamp(min=0) * regions

    cells = F.one_hot(grids_GSS.long(), OUTSIDE + 1)[..., :COLOURS].float()
    with torch.autocast(grids_GSS.device.type, enabled=False):
        rows = torch.einsum("grs,gstc->grtc", part(heights_G), cells)
        return torch.einsum("gqt,grtc->grqc", part(widths_G), rows).flatten(1, 2)


def slots_of(
    stack: Sequence[Block], tokens: Callable[..., Run], count_G: Tensor, most: int, slots: int, *parts: Tensor
) -> Tensor:
    """What the blocks make of the slots of all grids, (G, M, D).

    ``tokens(longest, *parts)`` gives those of some grids, which have ``count`` ≤ longest ≤ ``most`` tokens behind their
    slots. Grids of like length make a run.
    """
    if isinstance(count_G, FakeTensor):  # has no values: as if every grid were full
        return first_of(stack, [tokens(most, *parts)], slots)
    counts = count_G.cpu().numpy()
    order = np.argsort(counts, kind="stable")
    place = torch.from_numpy(order).to(count_G.device)
    parts = tuple(x[place] for x in parts)
    made: list[Tensor] = []
    runs: list[Run] = []
    for part, longest in chunks(counts[order], slots):
        run = tokens(longest, *[x[part] for x in parts])
        if sum(r.real.numel() for r in (*runs, run)) > CHUNK and runs:
            made.append(first_of(stack, runs, slots))
            runs = []
        runs.append(run)
    return torch.cat([*made, first_of(stack, runs, slots)])[place.argsort()]


def chunks(counts: np.ndarray, slots: int) -> Iterator[tuple[slice, int]]:
    """Runs of grids, sorted by their patches, that are read together, and the patches of the largest in each."""
    begin, tokens = 0, 0
    for k, count in enumerate(counts):
        padded = (k + 1 - begin) * (int(count) + slots)
        if k > begin and (padded > CHUNK or padded > max(WASTE * (tokens + int(count) + slots), CHUNK / 8)):
            yield slice(begin, k), int(counts[k - 1])
            begin, tokens = k, 0
        tokens += int(count) + slots
    yield slice(begin, len(counts)), int(counts[-1])


class Predictor(nn.Module):
    """From demonstrations and a question to the slots of its answer.

    Each pair of a task is the question once: its output's slots are its input's and a learnt change, made of what they
    attend to, the slots of its input and of all other pairs; or, with ``pooled``, of the mean of the other pairs. The
    change starts at zero: the first guess is that nothing changes, which an untrained encoder tells well already.

    Where slots have ``content``, that of the question is also carried to where the other pairs' went, as far as that
    explains these: see ``carried``.
    """

    def __init__(self, width: int, layers: int, heads: int, slots: int, pairs: int, pooled: bool, content: int = 0):
        super().__init__()
        self.pooled, self.content = pooled, content
        if content:
            self.match = nn.Linear(content, content, bias=False)
            nn.init.eye_(self.match.weight)
            self.sharpness = nn.Parameter(torch.tensor(3.0))  # ln of what cosines are multiplied by
            self.trust = nn.Parameter(torch.tensor([4.0, 0.0]))
        self.pair = nn.Embedding(1 if pooled else pairs, width)
        self.role = nn.Embedding(4, width)  # input and output of a demonstration, of the question
        self.slot = nn.Embedding(slots, width)
        self.unknown = nn.Embedding(slots, width)
        self.blocks = blocks(layers, width, heads, 4 * width, 0.0, cross=False)
        self.norm, self.change = nn.LayerNorm(width), nn.Linear(width, width)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)
        for table in (self.pair, self.role, self.slot):
            nn.init.normal_(table.weight, std=0.3)
        nn.init.normal_(self.unknown.weight, std=0.5)

    def forward(self, told_BPCMD: Tensor, slots_BPCMD: Tensor, real_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of the inputs and outputs (C = 2) of P pairs, as they are told and as they are asked → for each pair as
        the question: the slots of its answer, (B, P, M, D), and the rule, what has been made of its demonstrations,
        (B, P, 2·M·D), and where contents went, (B, P, M²)."""
        B, P, C, M, D = slots_BPCMD.shape
        run, shown = self._asked(told_BPCMD, slots_BPCMD, real_BP)
        y = run.x
        for block in self.blocks:
            y = block(y, mask=run.real[:, None, None])
        y = self.norm(y).view(B, P, -1, C, M, D)
        weight = shown[..., None].to(y.dtype)
        rule = (y[:, :, 1:].flatten(3) * weight).sum(2) / weight.sum(2).clamp(min=1)
        answers = slots_BPCMD[:, :, 0] + self.change(y[:, :, 0, 0])
        if self.content:
            carried, way = self.carried(told_BPCMD, slots_BPCMD, real_BP)
            answers, rule = answers + carried, torch.cat([rule, way.flatten(2).to(rule.dtype)], 2)
        return answers, rule

    def answers(self, told_BPCMD: Tensor, slots_BPCMD: Tensor, real_BP: Tensor) -> Tensor:
        """The first of what ``forward`` gives, in half the time."""
        run, _ = self._asked(told_BPCMD, slots_BPCMD, real_BP)
        made = self.norm(first_of(self.blocks, [run], self.slot.num_embeddings)).unflatten(0, real_BP.shape)
        answers = slots_BPCMD[:, :, 0] + self.change(made)
        return answers + self.carried(told_BPCMD, slots_BPCMD, real_BP)[0] if self.content else answers

    def carried(self, told_BPCMD: Tensor, slots_BPCMD: Tensor, real_BP: Tensor) -> tuple[Tensor, Tensor]:
        """What the question's slots gain where its contents go the way of the other pairs', (B, P, M, D), and that way,
        (B, P, M, M): for each region of an output, from which of the input it came.

        The way is an attention whose queries are outputs and whose keys are inputs of demonstrations, its logits their
        mean, and whose values are the question's: W = softmax(s · mean cos(o, i)). It is trusted by σ(a · (e − e′) /
        (e + e′) + b), with the demonstrations' own error e where nothing is carried and e′ where all is.
        """
        pairs = real_BP.shape[1]
        other = (real_BP[:, None] & ~torch.eye(pairs, dtype=torch.bool, device=real_BP.device)).float()  # (B, P, P)
        with torch.autocast(slots_BPCMD.device.type, enabled=False):
            shown, asked = (x[..., : self.content].float() for x in (told_BPCMD, slots_BPCMD[:, :, 0]))
            unit = F.normalize(self.match(shown), dim=-1)
            alike = unit[:, :, 1] @ unit[:, :, 0].mT
            mean = (other @ alike.flatten(2)) / other.sum(2, keepdim=True).clamp(min=1)
            way = (self.sharpness.exp() * mean.view_as(alike)).softmax(-1)
            before, after = shown.detach().unbind(2)
            moved = way[:, :, None] @ before[:, None]  # (B, P, P, M, ·): each pair by the way of each question
            error = ((moved - after[:, None]).square().mean((3, 4)) * other).sum(2)
            still = ((before - after).square().mean((2, 3))[:, None] * other).sum(2)
            trust = (self.trust[0] * (still - error) / (still + error + 1e-6) + self.trust[1]).sigmoid()
            gain = trust[..., None, None] * (way @ asked - asked)
        return F.pad(gain, (0, slots_BPCMD.shape[-1] - self.content)).to(slots_BPCMD.dtype), way

    def _asked(self, told_BPCMD: Tensor, slots_BPCMD: Tensor, real_BP: Tensor) -> tuple[Run, Tensor]:
        """For each pair as the question the tokens of its answer, unknown, of itself, and of O other pairs or their
        mean, (B·P, (1 + O)·C·M, D); and which of these others there are, (B, P, O)."""
        B, P, C, M, _ = slots_BPCMD.shape
        pairs = told_BPCMD + self.pair.weight[-P:, None, None]
        told = torch.stack([pairs.roll(-k, 1) for k in range(1, P)], 2)  # (B, P, O, C, M, D)
        shown = torch.stack([real_BP.roll(-k, 1) for k in range(1, P)], 2)
        if self.pooled:
            weight = shown[..., None, None, None].to(told.dtype)
            told = (told * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
            shown = shown.any(2, keepdim=True)
        asked = slots_BPCMD[:, :, 0]
        question = torch.stack([asked + self.unknown.weight, asked], 2) + self.role.weight[2:].flip(0)[:, None]
        x = torch.cat([question[:, :, None], told + self.role.weight[:2, None]], 2) + self.slot.weight
        real = torch.cat([shown.new_ones(B, P, 1), shown], 2).repeat_interleave(C * M, 2)
        return Run(x.flatten(2, 4).flatten(0, 1), real.flatten(0, 1)), shown
