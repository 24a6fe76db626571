"""What all instruments refuse, and what they abstain from."""

import torch
from torch import Tensor

from intaglio.history import NotMeasured

WIDEST = 300.0
"""Log-variances beyond ± this have no variance that float64 could square and sum."""


def vectors(x: Tensor, least: int = 2, what: str = "latents") -> Tensor | NotMeasured:
    """``x`` as float64 (N, d) on its device, or why it cannot be measured.

    Raises:
        ValueError: not a floating-point tensor of two dimensions or more.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"{what} are {x.dtype}; an instrument takes floating-point vectors (N, d): embed or cast them."
        )
    if x.ndim < 2:
        raise ValueError(f"{what} have the shape {tuple(x.shape)}; an instrument takes (N, d), a row for each item.")
    flat = x.detach().flatten(1)
    flat = (flat.cpu() if flat.device.type == "mps" else flat).double()  # which has no float64
    if len(flat) < least:
        return NotMeasured(f"N too small: {len(flat)} {what}, and it takes {least}")
    if not bool(torch.isfinite(flat).all()):
        bad = int((~torch.isfinite(flat)).any(1).sum())
        return NotMeasured(f"{bad} of {len(flat)} {what} are not finite")
    return flat


def paired(a: Tensor, b: Tensor, least: int = 2, what: str = "latents") -> tuple[Tensor, Tensor] | NotMeasured:
    """Two sets of ``vectors`` whose rows and dimensions belong together; ``what`` names both, or each as "a and b".

    Raises:
        ValueError: as ``vectors``; or they differ in shape.
    """
    names = what.split(" and ")
    x, y = vectors(a, least, names[0]), vectors(b, least, names[-1])
    if a.flatten(1).shape != b.flatten(1).shape:
        raise ValueError(
            f"{what} have the shapes {tuple(a.shape)} and {tuple(b.shape)}; give two of one shape (N, d), row by row."
        )
    if isinstance(x, NotMeasured):
        return x
    return y if isinstance(y, NotMeasured) else (x, y)


def posterior(mean: Tensor, log_variance: Tensor, least: int = 1) -> tuple[Tensor, Tensor] | NotMeasured:
    """Means and log-variances as ``paired``, or why there is no variance to compute with."""
    both = paired(mean, log_variance, least, "means and log-variances")
    if not isinstance(both, NotMeasured) and (wide := int((both[1].abs() > WIDEST).any(1).sum())):
        return NotMeasured(
            f"{wide} of {len(mean)} log-variances are beyond ±{WIDEST:.0f}, with no variance to compute with"
        )
    return both


def moving(x_Nd: Tensor) -> bool:
    """Whether anything differs between the rows by more than rounding."""
    spread, size = x_Nd.std(0, correction=0).max(), x_Nd.abs().max()
    return bool(spread > 3e-7 * size)
