"""Decoding of token models: greedy, nucleus sampling and beam search over an abstract step function.

Shape suffixes: B sequences, K beams, N = B·K rows, V tokens, L steps taken so far.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

Step = Callable[[Tensor, int], Tensor]
"""``step(ids (N, 1), position) -> logits (N, V)``: the last token of every row in, the next one's logits out."""

Reorder = Callable[[Tensor], None]
"""``reorder(index (N',))``: row i of the model's cache becomes what row ``index[i]`` was; N' may differ from N."""

_OPTIONS_OF = {"greedy": set(), "sample": {"temperature", "top_p"}, "beam": {"beams", "length_penalty"}}


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen. An option that the method would ignore is refused.

    ``temperature`` divides the logits before ``top_p`` keeps the smallest set of tokens that holds this probability
    (nucleus sampling, Holtzman et al. 2020). ``beams`` hypotheses compete by Σ log p / length^``length_penalty``, the
    end token included. ``repetition_penalty`` θ divides the positive logits of tokens already generated (CTRL, Keskar
    et al. 2019, section 4.1) and multiplies the negative ones, which dividing would make likelier; 1 is off.

    Raises:
        ValueError: a value is out of range, or an option does not belong to the method.
    """

    method: Literal["greedy", "sample", "beam"] = "greedy"
    temperature: float = 1.0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in _OPTIONS_OF:
            raise ValueError(f"decoding.method is {self.method!r}; choose greedy, sample or beam")
        for option in fields(self):
            owner = next((m for m, options in _OPTIONS_OF.items() if option.name in options), self.method)
            if owner != self.method and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"decoding.{option.name} has no effect with method {self.method!r}; "
                    f"remove it or set decoding.method to {owner!r}"
                )
        for name, value, valid, need in (
            ("temperature", self.temperature, self.temperature > 0, "above 0 (for the likeliest token use greedy)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("beams", self.beams, self.method != "beam" or self.beams >= 2, "at least 2 (one beam is greedy)"),
            ("length_penalty", self.length_penalty, self.length_penalty >= 0, "at least 0"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty >= 1, "at least 1, which is off"),
        ):
            if not valid:
                raise ValueError(f"decoding.{name} is {value}; it must be {need}")


@dataclass(frozen=True, slots=True)
class Generated:
    """Decoded sequences.

    ``ids`` (B, L) begin after the start token and hold the end token, then pad. ``log_probability`` (B,) is that of
    the whole sequence in nats under the model itself: no temperature, no nucleus, no penalties. ``finished`` (B,)
    tells which sequences reached the end token within ``max_length``.
    """

    ids: Tensor
    log_probability: Tensor
    finished: Tensor


@torch.no_grad()
def generate(
    step: Step,
    start: Tensor,
    eos: int,
    pad: int,
    max_length: int,
    strategy: Decoding,
    reorder: Reorder | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Generated:
    """Decode one sequence for each token of ``start`` (B,), until all have ended or ``max_length`` steps are taken.

    The model owns its cache: ``step`` extends it and ``reorder`` (beams only) rearranges it. Rows that have ended are
    fed pad. Pad itself is never chosen. Sampling draws one number a token from the sequence's own generator, so that
    a seed gives the same sequence in any batch.

    Raises:
        ValueError: ``max_length`` < 1, no ``generators`` for sampling (or not one a sequence), no ``reorder`` for
            beams, or logits that leave no distribution to choose from (NaN, +inf, or −inf everywhere).
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1")
    if strategy.method == "beam":
        if reorder is None:
            raise ValueError("beam search needs reorder, which rearranges the rows of the model's cache")
        return _beam_search(step, reorder, start, eos, pad, max_length, strategy)
    if strategy.method == "sample" and len(generators or ()) != len(start):
        raise ValueError(f"sampling {len(start)} sequences needs as many generators, not {len(generators or ())}")
    return _follow(step, start, eos, pad, max_length, strategy, generators)


def _follow(
    step: Step,
    start: Tensor,
    eos: int,
    pad: int,
    max_length: int,
    strategy: Decoding,
    generators: Sequence[torch.Generator] | None,
) -> Generated:
    last, ids = start, start.new_empty(len(start), 0)
    finished = torch.zeros_like(start, dtype=torch.bool)
    total = torch.zeros_like(start, dtype=torch.float32)
    for position in range(max_length):
        logits_BV = _logits(step, last, position, eos, pad)
        penalised_BV = _penalise(logits_BV, ids, strategy.repetition_penalty)
        if strategy.method == "sample":
            uniform = _uniform(generators, finished)
            token = sample_nucleus(penalised_BV / strategy.temperature, strategy.top_p, uniform)
        else:
            token = penalised_BV.argmax(-1)
        last = token.masked_fill(finished, pad)
        total += logits_BV.log_softmax(-1).gather(1, token[:, None])[:, 0].masked_fill(finished, 0)
        ids = torch.cat([ids, last[:, None]], 1)
        finished = finished | (last == eos)
        if finished.all():
            break
    return Generated(ids, total, finished)


def sample_nucleus(logits_BV: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Tokens (B,) by inverse CDF over each row's nucleus, from ``uniform`` (B,) in [0, 1)."""
    p_BV, token_BV = logits_BV.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    cdf_BV = p_BV.cumsum(-1)
    size = (cdf_BV - p_BV < top_p).sum(-1, keepdim=True)
    mass = cdf_BV.gather(1, size - 1)
    rank = (cdf_BV <= uniform[:, None] * mass).sum(-1, keepdim=True)
    return token_BV.gather(1, rank.minimum(size - 1))[:, 0]


def _beam_search(
    step: Step, reorder: Reorder, start: Tensor, eos: int, pad: int, max_length: int, strategy: Decoding
) -> Generated:
    batch, beams, norm = len(start), strategy.beams, strategy.length_penalty
    first_row = torch.arange(batch, device=start.device)[:, None] * beams
    best_ids = start.new_full((batch, max_length), pad)
    best_score = torch.full((batch,), -torch.inf, device=start.device)
    best_total = torch.zeros_like(best_score)

    # All beams start equal: only the first is alive, so that the first choice is of different tokens.
    score_BK = torch.full((batch, beams), -torch.inf, device=start.device)
    score_BK[:, 0] = 0
    total_BK = torch.zeros_like(score_BK)
    ids_BKL = start.new_empty(batch, beams, 0)
    last = start
    for length in range(1, max_length + 1):
        logits_NV = _logits(step, last, length - 1, eos, pad)
        if length == 1:
            rows = torch.arange(batch, device=start.device).repeat_interleave(beams)
            reorder(rows)
            logits_NV = logits_NV[rows]
        penalised_NV = _penalise(logits_NV, ids_BKL.flatten(0, 1), strategy.repetition_penalty)
        score_BKV = score_BK[:, :, None] + penalised_NV.log_softmax(-1).unflatten(0, (batch, beams))
        total_BKV = total_BK[:, :, None] + logits_NV.log_softmax(-1).unflatten(0, (batch, beams))

        ended, beam = (score_BKV[:, :, eos] / length**norm).max(1)
        better = ended > best_score
        best_score = torch.where(better, ended, best_score)
        best_total = torch.where(better, _pick(total_BKV[:, :, eos], beam), best_total)
        best_ids[better, : length - 1] = _pick(ids_BKL, beam)[better]
        best_ids[better, length - 1] = eos
        best_ids[better, length:] = pad

        score_BKV[:, :, eos] = -torch.inf
        score_BK, choice = score_BKV.flatten(1).topk(beams)
        parent, token = choice // score_BKV.shape[-1], choice % score_BKV.shape[-1]
        total_BK = total_BKV.flatten(1).gather(1, choice)
        ids_BKL = torch.cat([_pick(ids_BKL, parent), token[:, :, None]], -1)
        # Log-probabilities only fall, so no hypothesis that runs on can end above this.
        if (best_score >= score_BK[:, 0] / max_length**norm).all():
            break
        reorder((first_row + parent).flatten())
        last = token.flatten()

    finished = best_score > -torch.inf
    best_ids = best_ids[:, :length]
    best_ids[~finished] = ids_BKL[~finished, 0]
    return Generated(best_ids, torch.where(finished, best_total, total_BK[:, 0]), finished)


def _pick(x_BKx: Tensor, beam: Tensor) -> Tensor:
    """``x[b, beam[b]]`` for each b; ``beam`` is (B,) or (B, K)."""
    rows = torch.arange(len(x_BKx), device=x_BKx.device)
    return x_BKx[rows.view(-1, *[1] * (beam.ndim - 1)), beam]


def _logits(step: Step, last: Tensor, position: int, eos: int, pad: int) -> Tensor:
    logits_NV = step(last[:, None], position).float()
    if pad != eos:
        token = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
        logits_NV = logits_NV.masked_fill(token == pad, -torch.inf)
    if logits_NV.logsumexp(-1).isfinite().all():
        return logits_NV
    raise ValueError(
        f"the model's logits at position {position} are NaN, infinite or all −inf: its weights have diverged "
        "or its mask forbids every token"
    )


def _penalise(logits_NV: Tensor, ids_NL: Tensor, penalty: float) -> Tensor:
    if penalty == 1 or ids_NL.shape[1] == 0:
        return logits_NV
    seen = logits_NV.gather(1, ids_NL)
    return logits_NV.scatter(1, ids_NL, torch.where(seen > 0, seen / penalty, seen * penalty))


def _uniform(generators: Sequence[torch.Generator] | None, finished: Tensor) -> Tensor:
    """One number a sequence that runs on; a finished one draws none, so its generator too ignores its neighbours."""
    assert generators is not None
    draws = [
        0.0 if done else torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).item()
        for generator, done in zip(generators, finished.tolist(), strict=True)
    ]
    return torch.tensor(draws, dtype=torch.float64, device=finished.device)
