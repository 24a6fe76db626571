"""Reconstruction of images."""

from torch import Tensor


def l1_plus_mse(image: Tensor, target: Tensor) -> Tensor:
    """Mean over all pixels and channels of |x − y| + (x − y)²; a scalar."""
    error = image - target
    return error.abs().mean() + error.square().mean()
