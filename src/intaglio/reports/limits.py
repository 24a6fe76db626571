"""Between which values a rule has nothing to say of a quantity, from the limits that the rule itself uses."""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import numpy as np

from intaglio.health.rule import Limits
from intaglio.health.rules import all_rules
from intaglio.history.series import Series
from intaglio.reports.charts import Band

Ends = tuple[float | None, float | None]

# Pattern of names → rule, and from its limits and the null (NaN where none is known) to the ends of the band.
BANDS: Mapping[str, tuple[str, Callable[[Limits, float], Ends]]] = {
    "val/loss/contrastive": ("near-chance", lambda k, null: (None, (1 - k["share"]) * null)),
    "val/loss/infonce": ("near-chance", lambda k, null: (None, (1 - k["share"]) * null)),
    "*/loss/*": ("no-learning", lambda k, null: (None, (1 - k["share"]) * null)),
    "*/*/nats_per_token": ("no-learning", lambda k, null: (None, (1 - k["share"]) * null)),
    "*/*/mse": ("no-learning", lambda k, null: (None, (1 - k["share"]) * null)),
    "*/*/covariance_rank": ("rank-collapse", lambda k, null: (1 + k["warning"] * (null - 1), None)),
    "*/*/participation_ratio": ("anisotropic", lambda k, null: (max(k["share"] * null, 1.5), None)),
    "*/*/varying_share": ("latent-ignores-input", lambda k, null: (k["share"], None)),
    "*/codes/perplexity": ("codebook-collapse", lambda k, null: (k["warning"] * null, None)),
    "*/vq/perplexity": ("codebook-collapse", lambda k, null: (k["warning"] * null, None)),
    "*/*/scaled_std": ("latent-scale", lambda k, null: (k["low"], k["high"])),
    "*/*/clamped_share": ("latent-scale", lambda k, null: (None, k["clamped"])),
    "train/speed/wait_share": ("input-starved", lambda k, null: (None, k["wait"])),
}


def band(name: str, s: Series, profile: Mapping[str, Limits]) -> Band | None:
    """The band of a series under a profile, or None where no rule has a limit for it or its null is unknown."""
    known = {r.id: r for r in all_rules()}
    for pattern, (rule, ends) in BANDS.items():
        if fnmatchcase(name, pattern) and rule in known:
            null = null_of(s)
            low, high = ends({**known[rule].limits, **profile.get(rule, {})}, math.nan if null is None else null)
            unknown = any(end is not None and math.isnan(end) for end in (low, high))
            return None if unknown else Band(low, high, rule)
    return None


def null_of(s: Series) -> float | None:
    """The latest null that is known."""
    known = s.nulls[np.isfinite(s.nulls)]
    return float(known[-1]) if len(known) else None
