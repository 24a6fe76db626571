"""What a loss is made of."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Term(NamedTuple):
    """One part of a loss: the base class of the systems alone multiplies and sums, so what is logged is applied."""

    value: "Tensor"
    weight: float
