"""What all instruments refuse, and what they abstain from."""

import torch
from torch import Tensor

from intaglio.history import NotMeasured


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


def moving(x_Nd: Tensor) -> bool:
    """Whether anything differs between the rows by more than rounding."""
    spread, size = x_Nd.std(0, correction=0).max(), x_Nd.abs().max()
    return bool(spread > 1e-7 * size)
