"""A codebook learnt by exponential averages: van den Oord et al. 2017, section 3.2 and appendix A.1.

Shapes: T tokens, D numbers in a token, K codes.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.objectives.distributed import gather_rows, mean_over_processes, processes, rank

ROWS = 4096  # tokens whose distances to all codes are in memory at once
START = 16  # tokens a code that k-means looks at, at most
MOST = 256  # forward passes of one optimizer step


class Quantised(NamedTuple):
    """Tokens replaced by their nearest codes.

    ``x`` (…, D) in the dtype of the input, 0 at padding, with the gradient of the input (straight-through); ``codes``
    (…) int64, −1 at padding; ``commitment`` mean (x − e)² over all numbers of the real tokens, a float32 scalar with
    gradient to the input alone.
    """

    x: Tensor
    codes: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """K codes of D numbers, each the running mean of the tokens nearest to it.

    The first forward pass in training mode starts the codes by k-means on its tokens; until then they are random. Every
    forward pass in training mode counts its tokens; ``update()``, called once after each optimizer step and before a
    checkpoint is written, moves the codes by what was counted. In eval mode nothing changes.

    A code whose running use stays below ``revive`` · tokens / K for ``patience`` updates is put on a random token.
    ``seed`` decides on that token and on the start, together with the number of updates and nothing else.

    All processes see the tokens of all. The state is in buffers: ``vectors`` (K, D) the codes; ``cluster_size`` (K) the
    running number of tokens of each, in sum always the tokens of an update (before the first one: their shares);
    ``last_used`` (K) the update, from 0, in which a code was last chosen, −1 for never; ``below`` (K) updates for which
    a code has been below the threshold; ``updates`` and ``revivals`` how many there were; ``started``.
    """

    vectors: Tensor
    cluster_size: Tensor
    tokens: Tensor
    last_used: Tensor
    below: Tensor
    updates: Tensor
    revivals: Tensor
    started: Tensor

    def __init__(
        self, size: int, width: int, decay: float = 0.99, revive: float = 0.1, patience: int = 10, seed: int = 0
    ):
        super().__init__()
        if size < 2 or width < 1 or not 0 <= decay < 1 or not 0 <= revive < 1 or patience < 1:
            raise ValueError(
                f"a codebook of {size} codes of {width} numbers with decay {decay}, revive {revive} and patience "
                f"{patience}: give at least two codes, one number, a decay and a threshold in [0, 1), one update"
            )
        self.size, self.width, self.decay, self.seed = size, width, decay, seed
        self.revive, self.patience = revive, patience
        self.register_buffer("vectors", torch.randn(size, width))
        self.register_buffer("cluster_size", torch.full((size,), 1 / size))
        self.register_buffer("tokens", torch.tensor(0.0))
        self.register_buffer("last_used", torch.full((size,), -1))
        self.register_buffer("below", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("revivals", torch.tensor(0))
        self.register_buffer("started", torch.tensor(False))
        self._seen: list[tuple[Tensor, Tensor | None]] = []  # tokens and masks of the passes since the last update
        self._counts, self._sums = torch.empty(0), torch.empty(0)  # of these tokens, by code

    @property
    def tokens_per_update(self) -> int:
        """Real tokens of all processes that an update counts: their running mean, 0 before the first update."""
        return round(float(self.tokens))

    @property
    def revival_threshold(self) -> float:
        """The uses an update below which a code is revived."""
        return self.revive * float(self.tokens) / self.size

    def forward(self, x: Tensor, real: Tensor | None = None) -> Quantised:
        """(…, D) and a mask (…), True where a token stands (None: everywhere) → their codes.

        Raises:
            ValueError: another width, a mask of another shape, or tokens to start from that are not finite.
            RuntimeError: ``update()`` was not called for long.
        """
        self._check(x, real)
        x_TD, pad_T1 = x.flatten(0, -2), None if real is None else ~real.flatten()[:, None]
        if pad_T1 is not None:
            x_TD = x_TD.masked_fill(pad_T1, 0)
        plain_TD = x_TD.detach().to(self.vectors.dtype)
        if self.training and type(plain_TD) is Tensor and not self.started:  # fake tensors have no answer
            self._start(plain_TD, real)
        codes_T = nearest(plain_TD, self.vectors)
        chosen_TD, weight_T = F.embedding(codes_T, self.vectors), plain_TD.new_ones(len(plain_TD))
        if pad_T1 is not None:
            chosen_TD.masked_fill_(pad_T1, 0)
            weight_T.masked_fill_(pad_T1[:, 0], 0)
        if self.training:
            self._count(plain_TD, codes_T, weight_T, real)
        tokens = mean_over_processes(weight_T.sum()).clamp(min=1)
        commitment = F.mse_loss(x_TD.to(chosen_TD.dtype), chosen_TD, reduction="sum") / (tokens * self.width)
        q_TD: Any = _StraightThrough.apply(x_TD, chosen_TD)
        if pad_T1 is not None:
            codes_T.masked_fill_(pad_T1[:, 0], -1)
        return Quantised(q_TD.view(x.shape), codes_T.view(x.shape[:-1]), commitment)

    def codes(self, x: Tensor) -> Tensor:
        """(…, D) → (…) int64, counting nothing: for a second branch, as that of a target encoder."""
        self._check(x, None)
        return nearest(x.detach().flatten(0, -2).to(self.vectors.dtype), self.vectors).view(x.shape[:-1])

    @torch.no_grad()
    def update(self) -> None:
        """Moves the codes by the tokens of the optimizer step that was just taken.

        Appendix A.1, equations 6 to 8: N ← γN + (1 − γ)n and m ← γm + (1 − γ)s with n tokens of the sum s, e = m / N.
        Here m = Ne is not kept: e ← e + (1 − γ)(s − ne) / N, so that a code without tokens stays where it is. N is not
        smoothed (Laplace), which would draw such codes to zero.

        Raises:
            RuntimeError: there was no forward pass in training mode since the last update.
        """
        if not self._seen:
            raise RuntimeError(
                "Codebook.update() without a forward pass in training mode since the last one: call it once for each "
                "optimizer step"
            )
        n_K, s_KD, new = self._counts, self._sums, 1 - self.decay
        if processes() > 1:
            dist.all_reduce(n_K)
            dist.all_reduce(s_KD)
        before = torch.where(self.tokens > 0, self.tokens, n_K.sum())  # the start has the mass of the first update
        self.tokens.copy_(before.lerp(n_K.sum(), new))
        self.cluster_size.mul_(before / self.cluster_size.sum()).lerp_(n_K, new)
        rate_K = new / self.cluster_size.clamp(min=torch.finfo(n_K.dtype).tiny)
        self.vectors.addcmul_(s_KD.addcmul_(n_K[:, None], self.vectors, value=-1), rate_K[:, None])
        self.last_used.masked_fill_(n_K > 0, self.updates)
        self.below.add_(1).mul_(self.cluster_size < self.revive * self.tokens / self.size)
        dead = (self.below >= self.patience).nonzero().flatten()
        if len(dead):
            self._revive(dead)
        self.updates += 1
        self._seen = []

    def _check(self, x: Tensor, real: Tensor | None) -> None:
        if x.ndim < 2 or x.shape[-1] != self.width or not x.is_floating_point():
            raise ValueError(f"tokens are {x.dtype} of shape {tuple(x.shape)}; give real numbers (…, {self.width})")
        if real is not None and (real.shape != x.shape[:-1] or real.dtype != torch.bool):
            raise ValueError(
                f"the mask is {real.dtype} of shape {tuple(real.shape)}; give booleans {tuple(x.shape[:-1])}, True "
                "where a token stands"
            )

    def _count(self, x_TD: Tensor, codes_T: Tensor, weight_T: Tensor, real: Tensor | None) -> None:
        if len(self._seen) == MOST:
            raise RuntimeError(
                f"{MOST} forward passes in training mode without Codebook.update(): call it after each optimizer step"
            )
        if not self._seen:
            self._counts, self._sums = torch.zeros_like(self.cluster_size), torch.zeros_like(self.vectors)
        add_by_code(self._counts, self._sums, x_TD, codes_T, weight_T)
        self._seen.append((x_TD, real))

    @torch.no_grad()
    def _start(self, x_TD: Tensor, real: Tensor | None) -> None:
        """The codes at the centres of the tokens of all processes; nothing if there are none."""
        x_TD = _packed(x_TD, real)
        sizes = gather_rows(torch.tensor([len(x_TD)], device=x_TD.device)).tolist()
        if not any(sizes):
            return
        gathered = gather_rows(F.pad(x_TD, (0, 0, 0, max(sizes) - len(x_TD)))).split(max(sizes))
        all_TD = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
        if not bool(all_TD.isfinite().all()):
            raise ValueError("the tokens that the codebook is to start from are not all finite: look at the encoder")
        if rank() == 0:
            centres_KD, counts_K = kmeans(all_TD.cpu(), self.size, self._generator())
            self.vectors.copy_(centres_KD)
            self.cluster_size.copy_((counts_K + 1) / (counts_K + 1).sum())
        if processes() > 1:
            dist.broadcast(self.vectors, 0)
            dist.broadcast(self.cluster_size, 0)
        self.started.fill_(True)

    def _revive(self, dead: Tensor) -> None:
        """Puts codes on random tokens with the mass of uniform use, taken from those above it by what they exceed."""
        x_RD = self._random_tokens(len(dead))
        dead, uniform = dead[: len(x_RD)], self.tokens / self.size
        excess_K = (self.cluster_size - uniform).clamp(min=0)
        self.cluster_size.sub_(excess_K * ((uniform - self.cluster_size[dead]).sum() / excess_K.sum()))
        self.cluster_size[dead] = uniform
        self.vectors[dead] = x_RD
        self.below[dead] = 0
        self.revivals += len(dead)

    def _random_tokens(self, count: int) -> Tensor:
        """(≤ count, D), drawn without repetition from the tokens of the step: forward passes in order, in each the
        processes in theirs, so that one process draws the same."""
        seen = [_packed(x, real) for x, real in self._seen]
        sizes = gather_rows(torch.tensor([[len(x) for x in seen]], device=self.vectors.device)).T
        ends = sizes.flatten().cumsum(0).view_as(sizes)
        at = torch.randperm(int(ends[-1, -1]), generator=self._generator())[:count].to(ends.device)
        rows = self.vectors.new_zeros(len(at), self.width)
        for x_TD, size, end in zip(seen, sizes[:, rank()], ends[:, rank()], strict=True):
            mine = (at >= end - size) & (at < end)
            rows[mine] = x_TD[at[mine] - (end - size)]
        if processes() > 1:
            dist.all_reduce(rows)
        return rows

    def _generator(self) -> torch.Generator:
        key = np.random.SeedSequence((self.seed, int(self.updates))).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(key >> np.uint64(1)))


class _StraightThrough(torch.autograd.Function):
    """The second argument, in the dtype of the first, with its gradient to the first."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, q: Tensor) -> Tensor:
        return q.to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _packed(x_TD: Tensor, real: Tensor | None) -> Tensor:
    """The tokens that are no padding."""
    return x_TD if real is None else x_TD[real.flatten()]


@torch.no_grad()
def nearest(x_TD: Tensor, vectors_KD: Tensor) -> Tensor:
    """(T,) the code at the least distance from each token, the first of equals; in the dtype given, autocast or not.

    argmin ‖e‖² − 2xᵀe: what ‖x‖² and the root would add is the same for all codes.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        norms_K = vectors_KD.square().sum(1)
        parts = [torch.addmm(norms_K, part, vectors_KD.T, alpha=-2).argmin(1) for part in x_TD.split(ROWS)]
    return torch.cat(parts)


def add_by_code(counts_K: Tensor, sums_KD: Tensor, x_TD: Tensor, codes_T: Tensor, weight_T: Tensor) -> None:
    """Adds each code's Σ weight and Σ x, in place: where the weight is 0, x is to be 0 too."""
    counts_K.index_add_(0, codes_T, weight_T)
    sums_KD.index_add_(0, codes_T, x_TD)


@torch.no_grad()
def kmeans(x_TD: Tensor, size: int, generator: torch.Generator, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """``size`` centres (K, D) and the tokens nearest to each (K,): k-means++ (Arthur & Vassilvitskii 2007), then Lloyd.

    Of more than 16 tokens a code, as many at random are looked at. Of fewer than one, random ones are repeated with a
    jitter of a hundredth of their standard deviation. On the CPU; ``generator`` decides.
    """
    if len(x_TD) < size:
        again = x_TD[torch.randint(len(x_TD), (size - len(x_TD),), generator=generator)]
        jitter = 0.01 * x_TD.std(0, correction=0) * torch.randn(again.shape, generator=generator)
        x_TD = torch.cat([x_TD, again + jitter])
    elif len(x_TD) > START * size:
        x_TD = x_TD[torch.randperm(len(x_TD), generator=generator)[: START * size]]
    centres_KD = x_TD[_seeds(x_TD - x_TD.mean(0), size, generator)]
    for turn in range(rounds + 1):
        counts_K, sums_KD = x_TD.new_zeros(size), torch.zeros_like(centres_KD)
        add_by_code(counts_K, sums_KD, x_TD, nearest(x_TD, centres_KD), x_TD.new_ones(len(x_TD)))
        if turn < rounds:
            centres_KD = torch.where(counts_K[:, None] > 0, sums_KD / counts_K[:, None], centres_KD)
    return centres_KD, counts_K


def _seeds(x_TD: Tensor, size: int, generator: torch.Generator) -> list[int]:
    """Indices of tokens, each drawn in proportion to its squared distance from the nearest of those before."""
    norms_T, least_T = x_TD.square().sum(1), x_TD.new_ones(len(x_TD))
    chosen = [int(torch.multinomial(least_T, 1, generator=generator))]
    least_T.fill_(torch.inf)
    while len(chosen) < size:
        last = x_TD[chosen[-1]]
        distance_T = (norms_T + last.square().sum()).addmv_(x_TD, last, alpha=-2)
        least_T = torch.minimum(least_T, distance_T).clamp_(min=0)
        least_T[chosen[-1]] = 0
        weights_T = least_T if bool(least_T.any()) else torch.ones_like(least_T)
        chosen.append(int(torch.multinomial(weights_T, 1, generator=generator)))
    return chosen
