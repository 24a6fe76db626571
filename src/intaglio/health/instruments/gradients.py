"""Who moves the weights, how far, and how noisily? A gradient is a list of tensors, one for each parameter.

Norms are computed in float32, or in float64 where the tensors are.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from intaglio.history import Measured, NotMeasured, Reading
from intaglio.history.reading import ratio

Gradient = Sequence[Tensor]


def term_gradients(terms: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The gradient of each scalar term, zero where it does not reach a parameter; ``.grad`` is left alone.

    Pass terms as they are summed, weights applied. The graph is kept, so that the step itself can follow.
    """
    return {
        name: list(torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True))
        if term.requires_grad
        else [torch.zeros_like(p) for p in parameters]
        for name, term in terms.items()
    }


@torch.no_grad()
def gradient_norms(gradients: Mapping[str, Gradient]) -> dict[str, Measured]:
    """‖g‖ of each term over all parameters, in the loss's unit per unit of weight. Null: 0, a term that is inert."""
    norms = {name: norm(g) for name, g in gradients.items()}
    return {
        name: Reading(v, 0.0) if math.isfinite(v) else NotMeasured(f"the gradient of {name} is NaN or infinite")
        for name, v in norms.items()
    }


@torch.no_grad()
def gradient_shares(gradients: Mapping[str, Gradient]) -> dict[str, Measured]:
    """Each term's norm over the sum of all norms. Null: 1 / number of terms."""
    norms = {name: norm(g) for name, g in gradients.items()}
    total = sum(norms.values())
    if not math.isfinite(total) or total == 0:
        why = "no term has a gradient" if total == 0 else "the gradient of a term is NaN or infinite"
        return dict.fromkeys(norms, NotMeasured(why))
    return {name: Reading(v / total, 1 / len(norms)) for name, v in norms.items()}


@torch.no_grad()
def gradient_cosines(gradients: Mapping[str, Gradient]) -> dict[str, Measured]:
    """Cosine of each term's gradient with the sum of the others', −1 to 1; see ``cosine``."""
    if len(gradients) < 2:
        return dict.fromkeys(gradients, NotMeasured("there is a single term, and nothing to compare it with"))
    whole = [sum(parts[1:], parts[0]) for parts in zip(*gradients.values(), strict=True)]
    return {name: cosine(g, [w - x for w, x in zip(whole, g, strict=True)]) for name, g in gradients.items()}


@torch.no_grad()
def cosine(one: Gradient, other: Gradient) -> Measured:
    """Cosine of two gradients over all parameters (Yu et al. 2020, def. 1). Null: 0, ± P^−½ for P random components."""
    lengths = norm(one), norm(other)
    if not all(map(math.isfinite, lengths)):
        return NotMeasured("a gradient is NaN or infinite")
    if 0 in lengths:
        return NotMeasured("a gradient is zero: it has no direction")
    product = sum(float((_wide(a) / lengths[0] * _wide(b)).sum()) for a, b in zip(one, other, strict=True)) / lengths[1]
    return Reading(product, 0.0, sum(g.numel() for g in one))


@torch.no_grad()
def relative_norms(parts: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Measured]:
    """‖part‖ / ‖weight‖ of each tensor: ``parts`` are gradients, or updates Δw, for which about 1e-3 is usual.

    No null: it depends on the rate and the optimizer. n is the tensor's size.
    """
    found: dict[str, Measured] = {}
    for name, part in parts.items():
        above, below = norm([part]), norm([weights[name]])
        if not math.isfinite(above) or not math.isfinite(below):
            found[name] = NotMeasured(f"{name} or its change is NaN or infinite")
        else:
            found[name] = Reading(above / below, None, part.numel()) if below else NotMeasured(f"{name} is all zero")
    return found


@torch.no_grad()
def noise_scale(small_squares_M: Tensor, big_squares_M: Tensor, small: int, big: int) -> Measured:
    """The simple noise scale tr(Σ) / |G|² in samples: the batch beyond which averaging gains little.

    McCandlish et al. 2018, eq. A.1 and A.2: from M measurements of ‖g‖² at batches of ``small`` and of ``big`` items,
    |G|² = mean of (big ‖g_big‖² − small ‖g_small‖²) / (big − small) and
    tr(Σ) = mean of (‖g_small‖² − ‖g_big‖²) / (1/small − 1/big). Both are unbiased, their ratio is not, so it is taken
    last; with the interval bootstrapped over measurements. No null: without signal it has no value, and abstains.
    """
    if small_squares_M.shape != big_squares_M.shape or small_squares_M.ndim != 1 or not 0 < small < big:
        raise ValueError(
            f"squared norms have shapes {tuple(small_squares_M.shape)} and {tuple(big_squares_M.shape)} at batches of "
            f"{small} and {big}; pass as many of each, (measurements,), and the smaller batch first"
        )
    few, many = small_squares_M.double().cpu().numpy(), big_squares_M.double().cpu().numpy()
    if not len(few):
        return NotMeasured("there are no measurements")
    signal, noise = (big * many - small * few) / (big - small), (few - many) / (1 / small - 1 / big)
    if not math.isfinite(float((signal + noise).sum())):
        return NotMeasured("some squared norms are NaN or infinite")
    least = ratio(signal, signal * 0 + 1).low
    if signal.mean() <= 0 or (least is not None and least <= 0):
        return NotMeasured(
            f"the gradient is lost in its noise after {len(few)} measurements; take more, or bigger batches"
        )
    return ratio(noise, signal)


@torch.no_grad()
def dead_parameters(parameters: Mapping[str, Tensor], largest: Mapping[str, float]) -> Measured:
    """The share of trained parameters whose tensor had no gradient, or all zeros, over a window. Null: 0.

    ``largest`` holds each tensor's largest gradient norm in the window; a name that is missing had none. See
    ``dead_modules`` for their names. n is the number of trained parameters.
    """
    total = sum(p.numel() for p in parameters.values() if p.requires_grad)
    if not total:
        return NotMeasured("no parameter is trained")
    return Reading(sum(dead_modules(parameters, largest).values()) / total, 0.0, total)


def dead_modules(parameters: Mapping[str, Tensor], largest: Mapping[str, float]) -> dict[str, int]:
    """Dead parameters by the outermost module that is all dead, ``""`` for the whole model: {module: count}.

    A tensor whose module lives has its own name. Arguments as ``dead_parameters``.
    """
    trained = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    living = {module for name in trained if largest.get(name, 0.0) != 0 for module in _ancestors(name)}
    dead: dict[str, int] = defaultdict(int)
    for name, size in trained.items():
        outermost = next((module for module in _ancestors(name) if module not in living), None)
        if outermost is not None:
            dead[outermost] += size
    return dict(dead)


def norm(gradient: Gradient) -> float:
    """‖g‖ over all its tensors."""
    return math.hypot(*(float(torch.linalg.vector_norm(_wide(g))) for g in gradient))


def _ancestors(name: str) -> list[str]:
    """The whole model, each module that holds the tensor, and the tensor: "", a, a.b, a.b.weight."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts) + 1)]


def _wide(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"a gradient or weight is {x.dtype}; pass real numbers")
    return x if x.dtype == torch.float64 else x.float()
