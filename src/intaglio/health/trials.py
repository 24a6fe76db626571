"""Interventions on a live model with a fixed probe batch: change one thing, and see what it costs.

Shapes: N items, d latent dimensions, B batch. Nothing here keeps a gradient, touches the global generator or leaves a
weight, a buffer or a mode changed; what a function that is passed in changes when called is its own affair.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.data import order
from intaglio.health.instruments.measured import vectors
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.history.reading import ratio


def exchanged(latents_Nd: Tensor, prior_Nd: Tensor | None = None) -> dict[str, Tensor]:
    """What a latent can be exchanged for: another item's (``shuffled``), none (``zero``), the mean of all (``mean``),
    and draws of the prior where ``prior_Nd`` gives them."""
    mixed = order.permutation(len(latents_Nd), 0, 1)
    shuffled = torch.empty_like(latents_Nd)
    shuffled[mixed] = latents_Nd[np.roll(mixed, 1)]
    others = {"shuffled": shuffled, "zero": torch.zeros_like(latents_Nd)}
    others["mean"] = latents_Nd.mean(0, keepdim=True).expand_as(latents_Nd)
    return others | ({} if prior_Nd is None else {"prior": prior_Nd})


def _rise(other: np.ndarray, own: np.ndarray, units: np.ndarray | None = None) -> Measured:
    """What losses (N,) rise by a unit, or how many of them are not finite."""
    bad = int((~(np.isfinite(other) & np.isfinite(own))).sum())
    if bad:
        return NotMeasured(f"{bad} of {len(own)} losses are not finite")
    units = np.ones(len(own)) if units is None else units
    return ratio(other - own, units, 0.0) if units.sum() > 0 else NotMeasured("no item has a unit to count the loss by")


def cost_of_exchange(
    loss: Callable[[Tensor], tuple[np.ndarray, np.ndarray]], latents_Nd: Tensor, prior_Nd: Tensor | None = None
) -> dict[str, Measured]:
    """What a decoder's loss rises by when its latents are exchanged, per unit (token, pixel, item); null 0.

    ``loss`` maps latents (N, d) to each item's summed loss and number of units, (N,) each. Differences are paired by
    item, intervals bootstrapped over items. A decoder that ignores its latent costs exactly 0.
    """
    if len(latents_Nd) < 2:
        few = NotMeasured("it takes two items to exchange latents between")
        return dict.fromkeys(("shuffled", "zero", "mean", *(["prior"] if prior_Nd is not None else [])), few)
    own, units = loss(latents_Nd)
    return {name: _rise(loss(other)[0], own, units) for name, other in exchanged(latents_Nd, prior_Nd).items()}


@contextmanager
def randomised(module: nn.Module, seed: int = 0) -> Iterator[int]:
    """Inside, the module's weights are drawn anew, each with the mean and spread that it has; yields how many.

    Afterwards they are what they were, bit for bit. A tensor whose values are all alike is moved by a tenth of them.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = {name: p.data for name, p in module.named_parameters()}
    try:
        for p in (p for p in module.parameters() if p.numel()):
            spread = float(p.data.float().std(correction=0)) or 0.1 * float(p.data.float().abs().mean()) or 0.1
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.data = p.data.float().mean().to(p) + spread * noise
        yield sum(p.numel() for p in kept.values())
    finally:
        for name, p in module.named_parameters():
            p.data = kept[name]


def cost_of_randomising(
    loss: Callable[[], np.ndarray], modules: Mapping[str, nn.Module], seed: int = 0
) -> dict[str, Measured]:
    """What the mean loss over items rises by when each module in turn is made random; null 0.

    ``loss`` gives each item's loss, (N,). A module that is never called, or that the loss does not depend on, costs
    exactly 0 (Adebayo et al. 2018 randomise layers likewise).
    """
    own = loss()
    costs: dict[str, Measured] = {}
    for name, module in modules.items():
        if not sum(p.numel() for p in module.parameters()):
            costs[name] = NotMeasured(f"{name} has no weights")
            continue
        with randomised(module, seed):
            other = loss()
        costs[name] = _rise(other, own)
    return costs


@torch.no_grad()
def batch_dependence(encode: Callable[[Tensor], Tensor], batch_B: Tensor) -> dict[str, Measured]:
    """How much an item's output depends on what it is batched with, as a share of the outputs' spread; null 0.

    ``order``: the batch reversed. ``company``: the first half alone. BatchNorm in training mode, or any statistic over
    the batch, is seen in the second; rounding stays below 1e-3. ``encode`` is called three times, and what it changes
    by itself, as BatchNorm in training its buffers, stays changed.
    """
    if len(batch_B) < 4:
        few = NotMeasured("it takes four items to see what company changes")
        return {"order": few, "company": few}
    half = len(batch_B) // 2
    made = [encode(x) for x in (batch_B, batch_B.flip(0), batch_B[:half])]
    outputs = [vectors(y.reshape(len(y), -1).double(), what="outputs") for y in made]
    for y in outputs:
        if isinstance(y, NotMeasured):
            return {"order": y, "company": y}
    whole, reversed_, alone = (y for y in outputs if isinstance(y, Tensor))
    spread = float((whole - whole.mean(0)).square().mean().sqrt()) or 1.0
    return {
        "order": Reading(float((reversed_.flip(0) - whole).square().mean().sqrt()) / spread, 0.0, len(batch_B)),
        "company": Reading(float((alone - whole[:half]).square().mean().sqrt()) / spread, 0.0, half),
    }


@torch.no_grad()
def cost_of_strangers(loss: Callable[[Tensor, Tensor], Tensor], a_ND: Tensor, b_ND: Tensor) -> Measured:
    """What a contrastive loss rises by when each item is paired with another item's partner; null 0, nats or the
    loss's unit.

    A pair that is trivial (z against itself, text that is not in the loss) is one whose loss does not care.
    """
    if len(a_ND) < 2:
        return NotMeasured("it takes two pairs to exchange partners")
    other, own = float(loss(a_ND, b_ND.roll(1, 0))), float(loss(a_ND, b_ND))
    if not np.isfinite([other, own]).all():
        return NotMeasured(f"the loss is {own}, and {other} with partners exchanged")
    return Reading(other - own, 0.0, len(a_ND))


@torch.no_grad()
def distinct_views(a: Tensor, b: Tensor) -> Measured:
    """The share of items whose two views differ at all; 1 is due, and 0 is ``trivial-pair``."""
    if a.shape != b.shape:
        return Reading(1.0, None, len(a))
    if not len(a):
        return NotMeasured("N too small: there are no pairs")
    return Reading(float((a != b).reshape(len(a), -1).any(1).double().mean()), None, len(a))


@torch.no_grad()
def cost_of_context(loss: Callable[[Tensor], np.ndarray], context_BK: Tensor) -> dict[str, Measured]:
    """What each item's loss rises by when its K context frames (B, K, …) are permuted, are all the first, or are those
    of another item (``strangers``); null 0.

    Where the context is one frame repeated the first two are 0; of a predictor that averages over frames ``permuted``
    is.
    """
    items, frames = context_BK.shape[:2]
    own = loss(context_BK)
    found: dict[str, Measured] = {}
    if frames < 2:
        few = NotMeasured("there is a single context frame")
        found |= {"permuted": few, "repeated": few}
    else:
        found["permuted"] = _rise(loss(context_BK.roll(1, 1)), own)
        found["repeated"] = _rise(loss(context_BK[:, :1].expand_as(context_BK)), own)
    if items < 2:
        return found | {"strangers": NotMeasured("it takes two items to exchange contexts between")}
    return found | {"strangers": _rise(loss(context_BK.roll(1, 0)), own)}
