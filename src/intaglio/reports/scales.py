"""Which way is better, and which values of two arms are on one scale: the same quantity in the same unit."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from intaglio.history import Series
from intaglio.reports.arms import Run
from intaglio.reports.safe import plain
from intaglio.reports.words import QUANTITIES

NEITHER = {
    "kl", "kld", "vq", "commitment", "codebook", "codes", "generator", "discriminator", "gen", "disc", "adversarial",
    "sigreg", "regularizer", "regularisation", "regularization", "balance", "temperature", "norm", "weight", "ratio",
    "latent", "shuffled", "rank", "gradient",
}  # fmt: skip
"""Words of quantities that are good neither high nor low: a KL that falls to nothing is a collapse."""
FALLS = {
    "loss", "error", "mse", "rmse", "mae", "nll", "bce", "bpd", "ppl", "perplexity", "fid", "kid", "wer", "cer",
    "lpips",
}  # fmt: skip
RISES = {
    "accuracy", "acc", "top1", "top5", "r1", "r5", "r10", "recall", "precision", "f1", "auc", "auroc", "r2", "psnr",
    "ssim", "bleu", "rouge", "meteor", "cider", "iou", "dice", "mrr", "ndcg",
}  # fmt: skip
SHARES = {"accuracy", "acc", "top1", "top5", "r1", "recall", "precision", "usage", "share"}
FACTORS = {"weight", "weights", "lambda", "coef", "coeff", "coefficient", "scale"}


def words(name: str) -> list[str]:
    """The words of a metric's or a setting's name, in small letters."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [w for w in re.split(r"[/._\-\s]+", apart.lower()) if w]


def direction(name: str) -> int:
    """+1 where more is better, −1 where less is, 0 where the name does not tell."""
    known = QUANTITIES.get(name.split("/", 1)[-1])
    if known:
        return known.better
    said = set(words(name))
    if "entropy" in said:
        return -1 if "cross" in said else 0
    if said & NEITHER:
        return 0
    return 1 if said & RISES else -1 if said & FALLS else 0


def is_share(name: str, values: Sequence[float]) -> bool:
    """Whether values are shares of 1, which differ by points of a per cent."""
    known = QUANTITIES.get(name.split("/", 1)[-1])
    named = known.unit == "%" if known else bool(set(words(name)) & SHARES)
    return named and all(0 <= v <= 1 for v in values if math.isfinite(v))


def terms(run: Run) -> set[str]:
    """Names of the loss terms that a run logged."""
    parts = (name.split("/") for name in run.series)
    return {p[2] for p in parts if len(p) == 3 and p[1] == "loss"} - {"total"}


def weights(run: Run) -> dict[str, float]:
    """What each loss term was multiplied with at the end: as it was logged, else as the configuration says."""
    names = terms(run)
    found = {}
    for key, value in run.config.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        said = words(key)
        factor = bool(set(said) & FACTORS)
        close = [t for t in names if key == f"loss.{t}" or (factor and set(words(t)) <= set(said))]
        if len(close) == 1:
            found[close[0]] = float(value)
        elif said[-1:] == ["beta"] and "kl" in names:
            found["kl"] = float(value)
    logged = {t: s.value for t in names if (s := run.series.get(f"train/weight/{t}")) is not None and len(s)}
    return found | {t: w for t, w in logged.items() if math.isfinite(w)}


def reweighted(a: Sequence[Run], b: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Terms whose weight differs between the arms: (in A, in B)."""
    told = [[weights(run) for run in arm] for arm in (a, b)]
    found = {}
    for term in sorted(set.intersection(*(set(w) for arm in told for w in arm))):
        old, new = ([w[term] for w in arm] for arm in told)
        if not np.allclose([*old, *new], old[0], rtol=1e-9, atol=0):
            found[term] = (old[0], next((w for w in new if w != old[0]), new[0]))
    return found


def other_totals(a: Sequence[Run], b: Sequence[Run], changed: Mapping[str, Any]) -> dict[str, str]:
    """Metrics that the arms do not measure on one scale, each with the reason."""
    why: list[str] = []
    moved = reweighted(a, b)
    if moved:
        told = ", ".join(f"{plain(t, 40)} {x:g} → {y:g}" for t, (x, y) in moved.items())
        why.append(f"its terms are weighted otherwise ({told})")
    only = terms(a[0]) ^ terms(b[0])
    if only:
        why.append(f"one arm alone has the term {', '.join(sorted(plain(t, 40) for t in only))}")
    redefined: dict[str, str] = {}
    if "loss.pairing" in changed:
        redefined = {"contrastive": "loss.pairing makes it another loss in each arm"}
        why.append("loss.pairing makes one of its terms another loss")
    names = {n for run in (*a, *b) for n in run.series}
    totals = {n: "; ".join(why) for n in names if why and n.split("/")[1:] == ["loss", "total"]}
    return totals | {n: redefined[t] for n in names if (t := n.rsplit("/", 1)[-1]) in redefined and "/loss/" in n}


def logged_weighted(a: Sequence[Run], b: Sequence[Run]) -> tuple[dict[str, str], dict[str, str]]:
    """Terms with other weights in each arm that were logged multiplied by them, with the evidence; those that may be.

    Our run folders hold terms before weighting. Of a foreign history the total decides, if it was logged and is the sum
    of the terms as they stand; else the ratio of the arms' values, if it is that of the weights.
    """
    moved = reweighted(a, b)
    if not moved or all(run.ours for run in (*a, *b)):
        return {}, {}
    sums = [told for run in (*a, *b) if (told := _sum(run))]
    sure, open_ = {}, {}
    for term, (old, new) in moved.items():
        ratio = _ratio(a, b, term)
        if sums and all(kind == "weighted" for kind, _ in sums):
            sure[term] = sums[0][1]
        elif sums and all(kind == "raw" for kind, _ in sums):
            continue
        elif old and abs(ratio / (new / old) - 1) < 0.02 < abs(ratio - 1):
            sure[term] = f"its values have the ratio of the weights, {ratio:.3g}"
        elif old and new:
            open_[term] = (
                f"its weight is {old:g} in A and {new:g} in B, and nothing tells whether it was logged before or after "
                f"weighting: B/A is {ratio:.3g} if before, {ratio * old / new:.3g} if after"
            )
        else:
            open_[term] = f"its weight is {old:g} in A and {new:g} in B: it can't be told apart from its weight"
    return sure, open_


def _sum(run: Run) -> tuple[str, str] | None:
    """Whether the logged total is the sum of the terms as they were logged or of weight × term, and the evidence."""
    weight = weights(run)
    for split in ("val", "train"):
        total = run.series.get(f"{split}/loss/total")
        parts = {t: s for t in terms(run) if (s := run.series.get(f"{split}/loss/{t}")) is not None}
        if total is None or not set(weight) & set(parts):
            continue
        steps = total.steps
        for s in parts.values():
            steps = np.intersect1d(steps, s.steps)
        if not len(steps):
            continue

        def at(s: Series, steps: np.ndarray = steps) -> np.ndarray:
            return np.asarray(s.values[np.searchsorted(s.steps, steps)], float)

        whole = at(total)
        sums = {
            "weighted": sum(at(s) for s in parts.values()),
            "raw": sum(weight.get(t, 1.0) * at(s) for t, s in parts.items()),
        }
        off = {kind: float(np.nanmedian(np.abs(whole - x) / np.abs(whole))) for kind, x in sums.items()}
        kind = min(off, key=lambda k: off[k])
        if off[kind] < 0.02 and off[kind] < 0.25 * max(off.values()):
            how = "the terms as they were logged" if kind == "weighted" else "weight × term"
            k = len(steps) - 1
            name = f"{split}/loss/total"
            told = f"{name} ({whole[k]:.4g} at step {steps[k]:,}) is the sum of {how} ({np.asarray(sums[kind])[k]:.4g})"
            return kind, told
    return None


def _ratio(a: Sequence[Run], b: Sequence[Run], term: str) -> float:
    """Mean of B over mean of A for a term, at the rows of the split that both logged."""
    for split in ("val", "train"):
        name = f"{split}/loss/{term}"
        sides = [[run.series[name].values for run in arm if name in run.series] for arm in (a, b)]
        if all(sides):
            n = min(len(v) for side in sides for v in side)
            means = [float(np.nanmean([np.nanmean(v[:n]) for v in side])) for side in sides]
            return means[1] / means[0] if means[0] else math.nan
    return math.nan


def divided(run: Run, weighted: Mapping[str, str]) -> Run:
    """The run with those terms divided by their weight."""
    weight = weights(run)
    series = dict(run.series)
    for name, s in run.series.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[1] == "loss" and parts[2] in weighted:
            series[name] = Series(s.steps, s.values / weight[parts[2]], s.nulls, s.counts)
    return replace(run, series=series)
