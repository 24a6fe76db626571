"""Student's t distribution for any degrees of freedom > 0, fractions included, as Welch's test needs them."""

import math
from functools import cache


def tail(t: float, df: float) -> float:
    """P(T > t). Source: Abramowitz & Stegun 1964, 26.7.1, by the incomplete beta function."""
    half = 0.5 * _beta(df / (df + t * t), df / 2, 0.5) if math.isfinite(t) else 0.0
    return half if t >= 0 else 1 - half


@cache
def quantile(p: float, df: float) -> float:
    """The t below which a share p of T lies, to ten digits."""
    if p < 0.5:
        return -quantile(1 - p, df)
    high = 1.0
    while tail(high, df) > 1 - p:
        high *= 2
    low = 0.0
    while high - low > 1e-11 * max(high, 1e-3):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, df) > 1 - p else (low, middle)
    return (low + high) / 2


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b). Source: Press et al. 2007, 6.4.6, by Lentz's method."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a
