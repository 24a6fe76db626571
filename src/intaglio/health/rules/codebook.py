"""Codebook: how many codes live, where they stand, and whether they are counted rightly. No torch."""

from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules.course import finite
from intaglio.health.rules.training import ADVERSARIAL, FEWEST, QUANTISER, rolling_median
from intaglio.history import NotMeasured
from intaglio.history.aliases import names_of

SITES = ("codes*", "*vq*", "*codebook*", "*quanti*")
"""Sites of codes, and not of words."""

PERPLEXITY, USAGE = (tuple(f"*/{site}/{what}" for site in SITES) for what in ("perplexity", "usage"))

AS_VECTORS = ("*/*/norm_ratio", "*/*/updates_per_step", "*/*/revival_threshold")
"""What is measured of codes that stand among the vectors that they quantise."""

TARGETS = ("total", *names_of("reconstruction"), "image", "perceptual", "lpips")
"""Names of terms that cannot be the quantiser's."""

TERMS = tuple(f"train/loss/*{word}*" for word in QUANTISER)


@rule(
    id="codebook-collapse",
    follows=("revival-threshold", "codes-displaced", "codes-shrink"),
    concerns=("jepa",),
    source="van den Oord et al. 2017; Dhariwal et al. 2020",
    case="J: 10.9 %",
    needs=(*PERPLEXITY, *USAGE),
    log="the codes' perplexity as val/vq/perplexity with that of uniform codes as its null",
    limits={"fail": 0.1, "warning": 0.3, "foreign": 0.5, "few": 2.0, "kept": 0.1},
)
def codebook_collapse(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Few codes are used.

    Seen by perplexity of the codes over that of uniform codes at the same token count, both less 1, which is the least;
    the share of codes in use. Where the number of codes is not known: by a perplexity of one or two, or one that fell
    to a tenth of its highest. What another program's data need is not known, so its limits are half of ours.
    """
    if record.foreign:
        yield from _few_codes(record, limits)
        return
    factor = 1.0 if record.config else limits["foreign"]
    for name, s in record.matching(*PERPLEXITY).items():
        if s.null is None:
            yield NotMeasured(f"{name} has no null: log the number of codes and of tokens that it rests on")
        elif early := record.early(name):
            yield early
        elif s.value - 1 < limits["warning"] * factor * (s.null - 1):
            yield Finding(
                "codebook-collapse",
                "fail" if s.value - 1 < limits["fail"] * factor * (s.null - 1) else "warning",
                f"The codes of {name.split('/')[1]} are used as if there were {s.value:.0f}; uniform codes would reach "
                f"{s.null:.0f} on as many tokens.",
                {"perplexity": s.value, "null": s.null},
                remedies(*_against_few(record), wait=1000),
                step=int(s.steps[-1]),
            )


def _against_few(record: Record) -> tuple[str, ...]:
    if (record.config.get("model") or {}).get("quantiser") == "fsq":
        return "whiten the numbers before they are rounded", "fewer levels: --model.levels [5,5,5]"
    return "start the codes by k-means", "revive dead codes", "a smaller codebook"


CODES = ("num_embeddings", "n_embed", "n_e", "codebook_size", "num_codes", "n_codes", "vocab_size", "n_embeddings", "k")
"""Names that settings give to the number of codes, without case."""


def _few_codes(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A foreign history's perplexity or usage of codes."""
    settings = {str(k).rpartition(".")[2].lower(): v for k, v in record.facts.get("settings", {}).items()}
    codes = next(
        (float(settings[n]) for n in CODES if isinstance(settings.get(n), int | float) and settings[n] > 1), None
    )
    looked = False
    for name, s in record.matching(*PERPLEXITY, *USAGE).items():
        s = finite(s)
        if len(s) < FEWEST:
            continue
        looked = True
        late, top = float(np.median(s.values[-max(2, len(s) // 4) :])), float(rolling_median(s.values, 3).max())
        usage = name.endswith("usage")
        null = (100.0 if top > 1.5 else 1.0) if usage and top <= 100 else codes
        share = late / null if null else None
        few = late <= limits["few"] if not usage else late <= 0
        fell = late < limits["kept"] * top and late < 0.5 * float(s.values[0])
        if few or fell or (share is not None and share < limits["warning"]):
            gravely = few or fell or (share is not None and share < limits["fail"])
            yield Finding(
                "codebook-collapse",
                "fail" if gravely else "warning",
                f"{name} is {late:.3g} over the last quarter of the run"
                + (f"; it was up to {top:.3g}" if fell else "")
                + (f"; {null:g} would be all of them" if null else "")
                + ": few codes carry everything.",
                {"late": late, "highest": top} | ({"all": null} if null else {}),
                remedies("start the codes by k-means", "revive dead codes", "a smaller codebook", wait=1000),
                step=int(s.steps[-max(2, len(s) // 4)]),
            )
        elif null is None:
            yield NotMeasured(f"{name} has no null: log the number of codes")
    if not looked:
        yield NotMeasured(f"fewer than {FEWEST} rows of the codes' perplexity or usage")


@rule(
    id="codes-dead",
    follows=("validation-pollutes", "codes-polluted", "codes-shrink", "codes-displaced", "revival-threshold"),
    concerns=("jepa",),
    source="Dhariwal et al. 2020, appendix",
    case="J",
    needs=("*/*/dead_share", "*/*/mass_ratio"),
    log="the age of each code's last use, and the sum of the EMA cluster sizes over the tokens of a step",
    limits={"share": 0.2, "most": 0.5, "mass": 0.2},
)
def codes_dead(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Codes are unused for long and not revived, or revived and at once overwritten.

    Seen by the share of codes whose last use is older than uniform codes would let it be; the EMA mass of all codes
    against the tokens counted.
    """
    for name, s in record.matching("*/*/dead_share").items():
        if early := record.early(name):
            yield early
        elif s.value > limits["share"]:
            yield Finding(
                "codes-dead",
                "fail" if s.value > limits["most"] else "warning",
                f"{s.value:.0%} of the codes of {name.split('/')[1]} have not been used for long.",
                {"dead_share": s.value},
                remedies("revive codes that are unused for a share of 1/K", wait=500),
                candidates=("none is revived", "revived codes are overwritten at once: see the EMA mass"),
                step=int(s.steps[-1]),
            )
    for name, s in record.matching("*/*/mass_ratio").items():
        if early := record.early(name):
            yield early
        elif abs(s.value - 1) > limits["mass"]:
            yield Finding(
                "codes-dead",
                "warning",
                f"The EMA counts of {name.split('/')[1]} add up to {s.value:.2f} of the tokens of a step, 1 is due: "
                "codes are moved by the wrong weight.",
                {"mass_ratio": s.value},
                remedies("give a revived code the mass of its new members, and start all with 1/K of the tokens"),
                step=int(s.steps[-1]),
            )


@rule(
    id="codes-displaced",
    concerns=("jepa",),
    source="Łańcucki et al. 2020",
    case="J: norm 700; EMA mass that starts at zero",
    needs=("*/*/norm_ratio", *TERMS),
    log="the norms of codes and of their inputs",
    limits={"times": 3.0, "fail": 7.0, "grown": 10.0},
)
def codes_displaced(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The codes lie far from the data.

    Seen by mean norm of the codes over mean norm of the vectors that they quantise; 1 is due. Where that is not logged,
    by a quantiser's loss that grows without end.
    """
    norms = record.matching("*/*/norm_ratio")
    if not norms:
        yield from _running_away(record, limits)
    for name, s in norms.items():
        if early := record.early(name):
            yield early
        elif not 1 / limits["times"] < s.value < limits["times"]:
            yield Finding(
                "codes-displaced",
                "warning" if 1 / limits["fail"] < s.value < limits["fail"] else "fail",
                f"The codes of {name.split('/')[1]} are {s.value:.3g} times as long as what they stand for.",
                {"norm_ratio": s.value},
                remedies("start EMA sums and counts together, from the same tokens", "start the codes by k-means"),
                step=int(s.steps[-1]),
            )


def _running_away(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Codes and latents run away from each other: the quantiser's loss ends many times above its settled past."""
    looked = False
    for name, s in record.matching(*TERMS).items():
        s = finite(s)
        if len(s) < 2 * FEWEST:
            continue
        looked = True
        past = float(np.median(s.values[len(s) // 8 : len(s) // 2]))
        half, late = s.values[len(s) // 2 :], float(np.median(s.values[-max(2, len(s) // 8) :]))
        if past > 0 and late > limits["grown"] * past and late >= 0.5 * float(rolling_median(half, 3).max()):
            yield Finding(
                "codes-displaced",
                "fail",
                f"{name} was {past:.3g} in the first half of the run and is {late:.3g} at its end, and grows: "
                "latents and codes run away from each other.",
                {"past": past, "late": late},
                remedies(
                    "EMA codes instead of a codebook loss", "normalise latents and codes", "a lower rate", wait=500
                ),
                step=int(s.steps[len(s) // 2]),
            )
    if not looked:
        yield NotMeasured(f"fewer than {2 * FEWEST} rows of the quantiser's loss")


@rule(
    id="codes-shrink",
    concerns=("jepa",),
    source="Takida et al. 2022",
    case="real VQ-VAE histories",
    needs=TERMS,
    log="the quantiser's loss as train/loss/vq, beside val/loss/reconstruction",
    limits={"fall": 0.5, "worse": 0.05},
)
def codes_shrink(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The quantiser's loss falls because the latents shrink, while reconstruction worsens.

    Seen by the trend of the quantiser's loss, of the latents' norm and of the held-out reconstruction loss together.
    """
    rebuilt = record.get("val/loss/reconstruction") or record.get("train/loss/reconstruction")
    if rebuilt is None or len(rebuilt) < FEWEST:
        yield NotMeasured("there is no course of the reconstruction loss beside the quantiser's")
        return
    for name, s in record.matching(*TERMS).items():
        s = s.after(int(rebuilt.steps[len(rebuilt) // 3]))
        late = rebuilt.values[len(rebuilt) // 3 :]
        if len(s) < FEWEST:
            continue
        fall, worse = 1 - s.value / max(float(s.values[0]), 1e-12), late[-1] / max(float(late.min()), 1e-12) - 1
        if fall > limits["fall"] and worse > limits["worse"]:
            yield Finding(
                "codes-shrink",
                "warning",
                f"{name} fell by {fall:.0%} while reconstruction became {worse:.0%} worse: the latents shrink towards "
                "the codes.",
                {"fall": float(fall), "worse": float(worse)},
                remedies("lower the commitment weight", "normalise latents and codes", wait=1000),
                candidates=(
                    "the latents shrink: compare their norm over the run",
                    "it overfits: compare on training items",
                ),
                step=int(s.steps[-1]),
            )


@rule(
    id="codes-polluted",
    concerns=("jepa",),
    source="watching changes nothing",
    case="J",
    needs=("val/*/codebook_moved", "train/*/updates_per_step"),
    facts=("changed_by_validation", "training_in_validation"),
    log="both, by a monitor that knows the codebook",
    limits={"updates": 1.01},
)
def codes_polluted(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The codebook is updated in validation, or twice in a step.

    Seen by a digest of the codebook before and after a look at held-out items; updates over optimizer steps.

    ``changed_by_validation``, ``training_in_validation``: names of tensors and modules, a codebook's by their names.
    """
    moved = [n for n in record.facts.get("changed_by_validation", ()) if any(word in n.lower() for word in QUANTISER)]
    if moved:
        yield Finding(
            "codes-polluted",
            "fail",
            f"Looking at held-out items changed {len(moved)} tensors of the codebook, {moved[0]} among them.",
            {"tensors": len(moved)},
            remedies("update the codebook only in training mode"),
        )
    training = record.facts.get("training_in_validation", ())
    if not moved and (called := [n for n in training if any(word in n.lower() for word in QUANTISER)]):
        yield Finding(
            "codes-polluted",
            "fail",
            f"{called[0]} is in training mode while held-out items are looked at: its next update counts them.",
            {"modules": len(called)},
            remedies("model.eval() before validation, model.train() after"),
        )
    for name, s in record.matching("val/*/codebook_moved").items():
        if s.values.any():
            yield Finding(
                "codes-polluted",
                "fail",
                f"Looking at held-out items moved the codebook of {name.split('/')[1]}.",
                {"moved": float(s.values.max())},
                remedies("update the codebook only in training mode"),
                step=int(s.steps[s.values > 0][0]),
            )
    if not record.matching("val/*/codebook_moved", "train/*/updates_per_step") and not moved:
        yield NotMeasured("needs val/*/codebook_moved or train/*/updates_per_step")
    for name, s in record.matching("train/*/updates_per_step").items():
        if s.value > limits["updates"]:
            yield Finding(
                "codes-polluted",
                "fail",
                f"The codebook of {name.split('/')[1]} is updated {s.value:.2f} times in an optimizer step.",
                {"updates_per_step": s.value},
                remedies("update it from the online branch alone, once for each optimizer step"),
                step=int(s.steps[-1]),
            )


@rule(
    id="revival-threshold",
    concerns=("jepa",),
    source="Dhariwal et al. 2020, appendix; uniform use is 1/K",
    case="J: 768 of 768 “dead”",
    needs=("*/*/revival_threshold",),
    log="the uses a step below which a code is revived, with uniform use as its null",
    limits={"share": 0.5},
)
def revival_threshold(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Codes are revived although they are used, because the threshold ignores the size of the codebook.

    Seen by the threshold in tokens a step, against what uniform use gives each code: tokens of a step / K.
    """
    for name, s in record.matching("*/*/revival_threshold").items():
        if s.null is None:
            yield NotMeasured(f"{name} has no null: log the tokens of a step over the number of codes")
        elif s.value > limits["share"] * s.null:
            yield Finding(
                "revival-threshold",
                "fail" if s.value >= s.null else "warning",
                f"Codes of {name.split('/')[1]} are revived below {s.value:.3g} uses a step; codes in uniform use have "
                f"{s.null:.3g}.",
                {"threshold": s.value, "uniform": s.null},
                remedies("a threshold of a tenth of tokens / K, counted in optimizer steps", wait=500),
                step=int(s.steps[-1]),
            )


@rule(
    id="quantiser-loss-missing",
    concerns=("jepa",),
    source="van den Oord et al. 2017, eq. 3",
    case="J: the codebook's loss was never added",
    needs=PERPLEXITY,
    log="the quantiser's terms as train/loss/commitment and train/loss/codebook, with their weights",
)
def quantiser_loss_missing(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The commitment or codebook loss is not in the total, or the two weights are exchanged.

    Seen by the terms and weights that were summed, where codes are chosen; β < 1 is the commitment's. Numbers that are
    rounded (FSQ, Mentzer et al. 2023) need no such term, nor do codes that are relaxed, whose lengths nobody compares
    with what they stand for; a term of another name may be it. A tokenizer that is done, whose readings do not move,
    needs none either.
    """
    if (record.config.get("model") or {}).get("quantiser") == "fsq":
        return
    if record.foreign:
        yield NotMeasured("which terms the total of a foreign history holds is not known")
        return
    named = {n.rsplit("/", 1)[1]: s for n, s in record.matching("train/loss/*").items()}
    terms = {name for name in named if any(word in name for word in QUANTISER)}
    weights = {t: w.value for t in terms if (w := record.get(f"train/weight/{t}")) is not None}
    unknown = [n for n in named if n not in TARGETS and not any(word in n for word in ADVERSARIAL)]
    if not terms and not record.config and (unknown or not record.matching(*AS_VECTORS)):
        yield NotMeasured("which term, if any, draws encoder and codes together is not known")
        return
    if not record.config and all(np.ptp(s.values) == 0 for s in record.matching(*PERPLEXITY, *AS_VECTORS).values()):
        yield NotMeasured("codes have not moved so far, as those of a tokenizer that is done")
        return
    if named and (not terms or (weights and not any(weights.values()))):
        yield Finding(
            "quantiser-loss-missing",
            "fail",
            "Codes are chosen, but the total holds no loss of the quantiser"
            + (
                f" ({', '.join(sorted(weights))} at weight 0)."
                if weights
                else ": nothing draws encoder and codes together."
            ),
            {},
            remedies("add the commitment loss with β = .25 to the total"),
        )
    if weights.get("commitment", 0) > weights.get("codebook", float("inf")):
        yield Finding(
            "quantiser-loss-missing",
            "warning",
            f"The commitment's weight {weights['commitment']:g} is above the codebook's {weights['codebook']:g}: the "
            "two look exchanged.",
            {"commitment": weights["commitment"], "codebook": weights["codebook"]},
            remedies("1 for the codebook, .25 for the commitment"),
        )


RULES: tuple[Rule, ...] = (  # causes first
    quantiser_loss_missing,
    codes_polluted,
    revival_threshold,
    codes_displaced,
    codes_dead,
    codes_shrink,
    codebook_collapse,
)
