"""Schedules as functions of the optimizer step."""

import math


def warmup_cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the highest rate at ``step`` (0 … steps − 1): linear to 1 over ``warmup`` steps, then a half cosine to
    ``floor`` at the last step (Loshchilov & Hutter 2017, eq. 5)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_constant(step: int, warmup: int) -> float:
    """Linear to 1 over ``warmup`` steps, then 1."""
    return min(1.0, (step + 1) / max(1, warmup))
