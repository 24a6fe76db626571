"""Which of our names a metric of somebody's history means: ``Loss/Val``, ``validation.loss`` and ``valLoss`` are all
``val/loss/total``. What the table below does not know keeps its own name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np

from intaglio.history.series import Series

if TYPE_CHECKING:
    from intaglio.history.foreign import History


def vocabulary(text: str) -> frozenset[str]:
    """The words of a text, for look-up."""
    return frozenset(text.split())


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")
_OURS = re.compile(r"[a-z]+(/[A-Za-z0-9_][A-Za-z0-9_.-]*){2}")

TRAIN = ("train", "training", "trn", "tr")
HELD_OUT = ("val", "valid", "validation", "dev", "holdout", "heldout", "eval", "evaluation", "test", "testing")
SPLITS = dict.fromkeys(TRAIN, "train") | dict.fromkeys(HELD_OUT, "val")

# What a term of the loss is called, the surest name first. Words in _LOOSE may stand beside, and those for a loss;
# names in _ALONE mean nothing without one of those.
_LOSSES = {
    term: tuple(names.split(", "))
    for term, names in {
        "total": "loss, total, elbo, negative elbo, neg elbo, nelbo, objective, cost, vae",
        "kl": "kl, kld, kl div, kl divergence, kldiv, kl d, dkl",
        "reconstruction": "reconstruction, recon, recons, reconstruct, rec, reconst, nll, mse, bce, recon mse, "
        "recon bce, recon nll, reconstruction mse, rec mse, recon x, recon image, image recon, mean squared, pixel, "
        "l1, l2",
        "vq": "vq, quant, quantization, quantizer, quantize, quantiser, codebook, embedding, embed, emb, q",
        "commitment": "commitment, commit",
        "contrastive": "contrastive, infonce, info nce, nce, nt xent, ntxent, clip, itc",
        "generator": "generator, gen, g",
        "discriminator": "discriminator, disc, d, critic, dis",
    }.items()
}


def names_of(term: str) -> tuple[str, ...]:
    """What the term of a loss is called, as the key of a dictionary: of ``kl`` also ``kld`` and ``kl_div``."""
    return tuple(name.replace(" ", "_") for name in _LOSSES[term])


_ALONE = vocabulary("q d g gen dis critic clip embedding embed emb codebook quant pixel l1 l2 total cost vae rec")
_LOOSE = vocabulary(
    "vae model avg average mean step epoch batch iter running smoothed smooth error term metrics metric"
)
_LOSS = frozenset(("loss", "losses", "err"))
_NO_LOSS = vocabulary("scale weight coef coeff lambda ratio factor std var min max count size ema grad")
_GUESS = 30
_BOOKKEEPING = vocabulary(
    "best size time times runtime timestamp timestamps second seconds samples sample per flos flops memory gpu cpu "
    "system sys dur duration wall eta speed throughput count event fps date rss utilization_gpu"
)
_WEIGHT = frozenset(("weight", "beta", "coef", "coeff", "lambda", "cost"))
_LATENT = frozenset(("latent", "latents", "z"))
_MOMENTS = frozenset(("std", "mean", "norm", "min", "max"))
_NO_RATE = vocabulary("decay min max init initial base warmup multiplier mult factor scale")
_NORM = vocabulary("grad grads gradient gradients norm gnorm total global l2 l 2 0 model") | _LOOSE
_OBJECTIVE = frozenset(("elbo", "objective", "bound"))
_ADVERSARY = frozenset(("discriminator", "disc", "critic", "d", "real", "fake"))
_QUANTISER = vocabulary(
    "vq quant quantizer quantiser quantization quantize codebook commit commitment codes vqvae vqgan embed"
)


@dataclass(frozen=True)
class _Meaning:
    """Our name for one of theirs, and how sure that is: 0 surest."""

    ours: str
    doubt: int


def words(name: str) -> tuple[str, ...]:
    """The words of a name, small: ``Loss/valKL_2`` has loss, val, kl, 2."""
    return tuple(part for word in _WORD.findall(name[:300]) for part in _parted(word.lower()))


def _parted(word: str) -> tuple[str, ...]:
    """Two words that were written as one: ``valloss``, ``kldloss``, ``trainacc``."""
    for end in ("losses", "loss", "accuracy", "acc"):
        if (start := word.removesuffix(end)) not in ("", word) and (end.startswith("loss") or start in SPLITS):
            return start, end
    return (word,)


def ours(history: "History", mapping: Mapping[str, str] | None = None) -> tuple[dict[str, Series], dict[str, str]]:
    """The series of a history under our names, or their own where none is known, and {their name: our name}.

    Where two of theirs mean one of ours, the better match has it: the finer of two training losses, the mean over
    the epoch of two held-out ones. The other keeps its own name.

    Args:
        mapping: {their name: our name}, which wins over the table.

    Raises:
        ValueError: ``mapping`` has a name that is not there, one that is not of our form, or one of ours twice.
    """
    mapping = dict(mapping or {})
    _check(mapping, history)
    chosen = {mine: theirs for theirs, mine in mapping.items()}
    if history.format != "intaglio":
        known = {name: words(name) for name in history.given}
        beside = (history.name, history.path.name, *map(str, history.config))
        quantised = any(_QUANTISER.intersection(parts) for parts in (*known.values(), *map(words, beside)))
        named = {split for parts in known.values() for split in _splits(parts)}
        bare = any(set(parts) == {"loss"} for parts in known.values()) or "train" not in named
        best: dict[str, tuple[tuple[float, ...], str]] = {}
        for place, (name, parts) in enumerate(known.items()):
            meaning = None if name in mapping else _meaning(name, parts, quantised, bare)
            if meaning and meaning.doubt >= _GUESS and np.isin(history.given[name].values, (0, 1)).all():
                continue  # a flag
            if meaning and meaning.ours.endswith("/loss/total") and _maximised(parts, history.given[name]):
                meaning = _logged([word for word in parts if word not in SPLITS], meaning.ours.partition("/")[0])
            if meaning and meaning.ours not in chosen:
                cost = (*_cost(history.given[name], meaning, parts, name), place)
                best[meaning.ours] = min(best.get(meaning.ours, (cost, name)), (cost, name))
        chosen |= {mine: theirs for mine, (_, theirs) in best.items()}
    renamed = {theirs: mine for mine, theirs in chosen.items() if theirs != mine}
    taken = set(renamed.values())
    series = {
        renamed.get(name, f"{name} (theirs)" if name in taken else name): values
        for name, values in history.given.items()
    }
    return series, {name: renamed[name] for name in history.given if name in renamed}


def _maximised(parts: tuple[str, ...], series: Series) -> bool:
    """Whether a bound or an objective rises, and is no loss."""
    values = series.values[np.isfinite(series.values)]
    if "loss" in parts or not _OBJECTIVE.intersection(parts) or len(values) < 4:
        return False
    return bool(np.median(values[-len(values) // 4 :]) > np.median(values[: len(values) // 4]))


def _check(mapping: Mapping[str, str], history: "History") -> None:
    for theirs, mine in mapping.items():
        if theirs not in history.given:
            near = get_close_matches(theirs, history.given, 1, 0)
            hint = f"; the nearest there is {near[0]!r}" if near else ""
            raise ValueError(f"--map {theirs}={mine}: {history.name} has no metric {theirs!r}{hint}")
        if not _OURS.fullmatch(mine):
            raise ValueError(f"--map {theirs}={mine}: {mine!r} is not <split>/<site>/<quantity>, as val/loss/total")
    twice = {mine for mine in mapping.values() if list(mapping.values()).count(mine) > 1}
    if twice:
        raise ValueError(f"--map gives {sorted(twice)[0]} to two metrics: give it to one")


def _splits(parts: tuple[str, ...]) -> set[str]:
    return {SPLITS[word] for word in parts if word in SPLITS}


def _cost(series: Series, meaning: _Meaning, parts: tuple[str, ...], name: str) -> tuple[float, ...]:
    """What speaks against a name, the heaviest first."""
    exact = 0.0 if name == meaning.ours else 1.0
    if meaning.ours.startswith("train/"):
        # A loss of each step tells more than its mean over an epoch; twice the rows is a difference in kind.
        return exact, -float(len(series).bit_length()), meaning.doubt, float(not _splits(parts))
    splits = min((HELD_OUT.index(word) for word in parts if word in HELD_OUT), default=0)
    return exact, float("step" in parts or "batch" in parts), float(splits), float(meaning.doubt)


def _meaning(name: str, parts: tuple[str, ...], quantised: bool, bare: bool) -> _Meaning | None:
    """What a name means; ``bare``: names without a split are training's."""
    splits = _splits(parts)
    if len(splits) > 1 or name.startswith("_") or _BOOKKEEPING.intersection(parts):
        return None
    split = next(iter(splits), "train")
    core = [word for word in parts if word not in SPLITS]
    return (
        _optimizer(core)
        or _weight(core)
        or _latent(core, split)
        or _codes(core, split, quantised)
        or _accuracy(core, split, bool(splits) or bare)
        or _loss(core, split)
        or (_logged(core, split) if splits else None)
    )


def _optimizer(core: list[str]) -> _Meaning | None:
    have = set(core)
    if ("lr" in have or {"learning", "rate"} <= have) and not have & _NO_RATE:
        return _Meaning("train/optimizer/rate", len(have))
    if have & {"norm", "gnorm"} and have & {"grad", "grads", "gradient", "gradients", "gnorm"} and have <= _NORM:
        return _Meaning("train/optimizer/gradient_norm", len(have))
    return None


def _weight(core: list[str]) -> _Meaning | None:
    rest = [word for word in core if word not in _WEIGHT | _LOSS]
    if len(rest) == len([word for word in core if word not in _LOSS]):
        return None
    if not rest:
        return _Meaning("train/weight/kl", 2) if core == ["beta"] else None
    term = next((term for term, names in _LOSSES.items() if " ".join(rest) in names), None)
    return _Meaning(f"train/weight/{term}", 0) if term else None


def _latent(core: list[str], split: str) -> _Meaning | None:
    if len(core) != 2 or not _LATENT.intersection(core) or not _MOMENTS.intersection(core):
        return None
    return _Meaning(f"{split}/latent/{next(word for word in core if word in _MOMENTS)}", 0)


def _codes(core: list[str], split: str, quantised: bool) -> _Meaning | None:
    have = set(core) - _LOOSE
    if have & {"perplexity", "ppl"} and have <= {"perplexity", "ppl", *_QUANTISER, "code"}:
        of_codes = quantised and "perplexity" in have
        return _Meaning(f"{split}/{'codes' if of_codes else 'logged'}/perplexity", len(have))
    if have & {"usage", "utilization", "utilisation", "util"} and have & {"code", "codes", "codebook", "vq"}:
        return _Meaning(f"{split}/codes/usage", len(have))
    return _Meaning(f"{split}/codes/usage", 2) if have == {"usage"} and quantised else None


def _accuracy(core: list[str], split: str, known: bool) -> _Meaning | None:
    if _ADVERSARY.intersection(core):
        return None
    have = [word for word in core if word not in _LOOSE]
    digits = [word for word in have if word.isdigit()]
    last = next((word for word in reversed(have) if not word.isdigit()), "")
    if known and last in ("acc", "accuracy") and digits in ([], ["1"]):
        return _Meaning(f"{split}/logged/accuracy", len(have))
    return _Meaning(f"{split}/logged/accuracy", 2) if known and have in (["top", "1"], ["prec", "1"]) else None


def _loss(core: list[str], split: str) -> _Meaning | None:
    """Known losses with or without the word, unknown ones with it."""
    is_loss = bool(_LOSS.intersection(core))
    rest = [word for word in core if word not in _LOSS]
    tight = [word for word in rest if word not in _LOOSE]
    if _NO_LOSS.intersection(rest) or (tight and all(word.isdigit() for word in tight)):
        return None
    if is_loss and not tight:
        return _Meaning(f"{split}/loss/total", len(rest))
    for term, names in _LOSSES.items():
        for doubt, known in enumerate(names):
            if {" ".join(rest), " ".join(tight)} & {known} and (is_loss or known not in _ALONE):
                return _Meaning(f"{split}/loss/{term}", doubt + len(rest) - len(tight))
    if tight and tight[0].startswith("recon") and len(tight) <= 2 and (is_loss or len(tight) == 1):
        return _Meaning(f"{split}/loss/reconstruction", 20)
    return _named(split, "loss", tight) if is_loss and len(tight) <= 4 else None


def _logged(core: list[str], split: str) -> _Meaning | None:
    return _named(split, "logged", core) if core and not set(core) <= _LOOSE else None


def _named(split: str, site: str, parts: list[str]) -> _Meaning | None:
    ours = f"{split}/{site}/{re.sub(r'_(?=[0-9])', '', '_'.join(parts))}"
    return _Meaning(ours, _GUESS) if _OURS.fullmatch(ours) else None
