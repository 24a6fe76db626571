"""Latent space: does it depend on the input, in how many directions, is it where the prior samples? No torch."""

from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, Remedy, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules.course import finite
from intaglio.health.rules.training import FEWEST, mad
from intaglio.history import NotMeasured, Series


def site(name: str) -> str:
    """The site of ``<split>/<site>/<quantity>``."""
    return name.split("/")[1]


@rule(
    id="latent-ignores-input",
    follows=("diverged", "codes-displaced"),
    source="between-group share of variance, Fisher 1925; held against the encoder's last bias",
    case="E: std .0255 was the default bias of Linear(512, 1024)",
    needs=("val/*/varying_share", "*/latent/std"),
    log="latents of a probe batch: a monitor with taps reads them",
    limits={"share": 1e-3, "none": 1e-6, "bias": 0.999, "lost": 0.2, "shrunk": 0.5, "default": 0.02, "steady": 0.05},
)
def latent_ignores_input(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The latent is (nearly) the same for every input.

    Seen by the share of the latents' second moment that differs between inputs, 0 where the input is ignored; that
    share and the latents' spread against those of the first look. It fails where nothing differs, or the spread has
    shrunk too, and not where the mean has moved. A history that has the spread alone can only raise the suspicion:
    where it is that of a default bias.
    """
    if not record.matching("val/*/varying_share"):
        yield from _like_a_bias(record, limits)
    for name, s in record.matching("val/*/varying_share").items():
        if s.value >= limits["share"]:
            std = record.get(f"val/{site(name)}/std")
            if std is not None and all(x.value < limits["lost"] * float(x.values[0]) for x in (s, std)):
                yield Finding(
                    "latent-ignores-input",
                    "warning",
                    f"{site(name)} is collapsing: its spread fell from {std.values[0]:.3g} to {std.value:.3g}, and the "
                    f"share of it that differs between inputs from {s.values[0]:.2f} to {s.value:.2g}.",
                    {"varying_share": s.value, "std": std.value},
                    remedies("a variance term or SIGReg", "stop the gradient of the targets", wait=500),
                    step=int(s.steps[-1]),
                )
            continue
        std = record.get(f"val/{site(name)}/std")
        if s.value > limits["none"] and std is not None and std.value > limits["shrunk"] * float(std.values[0]):
            yield Finding(
                "latent-ignores-input",
                "warning",
                f"The mean of {site(name)} lies {s.value**-0.5:.0f} standard deviations off, so that {s.value:.2g} of "
                "its second moment differs between inputs, though its spread is no less than it was.",
                {"varying_share": s.value, "std": std.value},
                remedies("another learning rate: --optim.rate", "centre the latents", wait=500),
                step=int(s.steps[-1]),
            )
            continue
        bias = record.get(f"val/{site(name)}/bias_share")
        constant = bias is not None and bias.value > limits["bias"]
        yield Finding(
            "latent-ignores-input",
            "fail",
            f"{site(name)} is the same for every input: {s.value:.2g} of its second moment differs between "
            f"{s.n or 'the'} inputs" + ("; it equals the bias of the encoder's last layer." if constant else "."),
            {"varying_share": s.value} | ({"bias_share": bias.value} if bias is not None else {}),
            remedies("another learning rate: --optim.rate", "lower --loss.kl", "train longer: --train.steps", wait=500),
            candidates=()
            if constant
            else (
                "no gradient reaches the encoder: see term-inert and dead-parameters",
                "the activations before it died: randomise the encoder and compare",
            ),
            step=int(s.steps[-1]),
        )


def _like_a_bias(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A spread that stands where PyTorch's Linear starts its bias, U(−1/√fan_in, 1/√fan_in): std 1/√(3·fan_in)."""
    for name, s in record.matching("*/latent/std").items():
        s = finite(s)
        if len(s) < FEWEST:
            continue
        late = s.values[len(s) // 2 :]
        level = float(np.median(late))
        fans = [2**k for k in range(4, 14) if level > 0 and abs(level * (3 * 2**k) ** 0.5 - 1) < limits["default"]]
        if fans and mad(late) < limits["steady"] * level:
            yield Finding(
                "latent-ignores-input",
                "warning",
                f"{name} stands at {level:.4g}: that is the spread of an untrained bias of Linear({fans[0]}, …), "
                f"1/√(3·{fans[0]}) = {(3 * fans[0]) ** -0.5:.4g}. The latent may be the same for every input.",
                {"std": level, "default": (3 * fans[0]) ** -0.5},
                candidates=(
                    "the encoder's output is its bias: log the variance between samples, which would be near 0",
                    "chance: the variance between samples would be near the square of this spread",
                ),
                step=int(s.steps[-1]),
            )
    yield NotMeasured("the spread between samples is not in this history, only the spread of all values")


@rule(
    id="rank-collapse",
    symptom=True,
    follows=("learning-rate-off", "norm-pinned", "near-chance", "diverged", "prior-mismatch"),
    source="Roy & Vetterli 2007; Garrido et al. 2023",
    case="J: 7 of 256",
    needs=("val/*/covariance_rank",),
    log="latents of a probe batch of at least twice as many items as dimensions",
    limits={"fail": 0.05, "warning": 0.15, "foreign": 0.4, "foreign_fail": 0.33, "least": 3.0},
)
def rank_collapse(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Few directions carry the latents' variance.

    Seen by effective rank (entropy of the covariance's eigenvalues) over that of as many Gaussian vectors, both less 1,
    which is the least. Of another program's data it is not known how many factors they have: a few colours and places
    need no more than a tenth of the directions, so it warns below two fifths of our limit, and fails below a third.
    """
    ours = record.config and not record.foreign
    factor, grave = (1.0, 1.0) if ours else (limits["foreign"], limits["foreign_fail"])
    for name, s in record.matching("val/*/covariance_rank").items():
        if s.null is None:
            yield NotMeasured(f"{name} has no null")
            continue
        if early := record.early(name):
            yield early
            continue
        if s.null < limits["least"]:
            yield NotMeasured(f"{name}: of so few dimensions a rank says nothing")
            continue
        share = (s.value - 1) / (s.null - 1)  # a rank is at least 1
        if share < limits["warning"] * factor:
            yield Finding(
                "rank-collapse",
                "fail" if share < limits["fail"] * grave else "warning",
                f"{site(name)} uses {s.value:.1f} directions; {s.n or 'as many'} Gaussian vectors would use "
                f"{s.null:.0f}.",
                {"effective_rank": s.value, "null": s.null},
                remedies("lower the pressure on the latent: --loss.kl", "a variance term or SIGReg", wait=1000),
                step=int(s.steps[-1]),
            )


@rule(
    id="anisotropic",
    symptom=True,
    follows=("learning-rate-off", "norm-pinned", "near-chance", "diverged", "prior-mismatch"),
    source="Gao et al. 2017; Rudman et al. 2022 (IsoScore)",
    case="J: measured its own 1e-6",
    needs=("val/*/participation_ratio",),
    log="latents of a probe batch",
    limits={"share": 0.02, "single": 1.2, "excess": 0.0075, "least": 3.0},
)
def anisotropic(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """One direction dominates the latents.

    Seen by participation ratio over that of as many Gaussian vectors, no jitter in the ratio; it fails where a single
    direction is left, more so where there are few: it may be what a few numbers need.
    """
    for name, s in record.matching("val/*/participation_ratio").items():
        if s.null is not None and s.null < limits["least"]:
            yield NotMeasured(f"{name}: of so few dimensions it says nothing")
        elif s.null is not None and s.value < max(1.5, limits["share"] * s.null):
            yield Finding(
                "anisotropic",
                "fail" if s.value < min(limits["single"], 1 + limits["excess"] * (s.null - 1)) else "warning",
                f"One direction carries most of the variance of {site(name)}: {s.value:.1f} directions take part, "
                f"{s.null:.0f} would in Gaussian noise.",
                {"participation_ratio": s.value, "null": s.null},
                remedies("standardise what goes in", "lower --optim.rate", wait=1000),
                step=int(s.steps[-1]),
            )


@rule(
    id="prior-mismatch",
    follows=(
        "free-running-gap",
        "null-mismatch",
        "decoder-ignores-latent",
        "diverged",
        "condition-ignored",
        "queue-stale",
        "kl-units",
        "temperature-misstates-rate",
    ),
    source="Rosca et al. 2018; Tomczak & Welling 2018",
    case="E: norm .81 where 32 is due, 3,248 nats",
    needs=("val/prior/object", "val/*/prior_nats", "*/latent/std"),
    log="samples of the prior beside reconstructions, or the latents where the prior is N(0, I)",
    limits={"warning": 0.8, "fail": 0.4, "nats_per_dimension": 1.0},
)
def prior_mismatch(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The latents are not where the prior samples, so its samples are not like the data.

    Seen by decode(prior) against decode(latents of real images) by the same independent judge; where latents are meant
    to be N(0, I), the nats between their mean and variance and its.
    """
    if record.foreign:
        yield from _far_from_normal(record, limits)
    prior, real = record.get("val/prior/object"), record.get("val/posterior/object")
    if prior is not None and real is not None:
        null = prior.null or 0.0
        if real.value - null > 0.1:
            kept = (prior.value - null) / (real.value - null)
            if kept < limits["warning"]:
                yield Finding(
                    "prior-mismatch",
                    "fail" if kept < limits["fail"] else "warning",
                    f"Samples of the prior show what their captions name in {prior.value:.0%} of cases, latents of "
                    f"real images in {real.value:.0%}: the prior loses {1 - kept:.0%} of what the decoder can do.",
                    {"prior": prior.value, "real": real.value, "null": null},
                    (Remedy("fit the prior longer: --prior.steps 2000"), Remedy("a larger one: --prior.width 256")),
                )
        else:
            yield NotMeasured("the decoder itself is no better than its null, so the prior cannot be judged")
    for name, s in record.matching("val/*/prior_nats").items():
        dimensions = record.get(f"val/{site(name)}/dimensions")
        due = limits["nats_per_dimension"] * (dimensions.value if dimensions is not None else 1.0)
        if s.value > due:
            yield Finding(
                "prior-mismatch",
                "warning",
                f"{site(name)} is {s.value:,.0f} nats away from N(0, I), which samples are drawn from.",
                {"nats": s.value},
                remedies("raise --loss.kl", "fit a prior to the latents: --prior.layers 3", wait=1000),
                step=int(s.steps[-1]),
            )


def _far_from_normal(record: Record, limits: Limits) -> Iterator[Finding]:
    """Logged mean and spread of a latent against N(0, 1): KL = (σ² + μ² − 1 − ln σ²) / 2 nats a dimension."""
    for name, s in record.matching("*/latent/std").items():
        split, s = name.split("/")[0], finite(s)
        mean, norm = (record.get(f"{split}/latent/{what}") for what in ("mean", "norm"))
        if len(s) < FEWEST or s.value <= 0:
            continue
        centre = mean.value if mean is not None else 0.0
        nats = (s.value**2 + centre**2 - 1 - 2 * float(np.log(s.value))) / 2
        if nats > limits["nats_per_dimension"]:
            dimensions = round((norm.value / s.value) ** 2) if norm is not None else None
            total = f", {nats * dimensions:,.0f} in its {dimensions:,}" if dimensions else ""
            due = (
                f" Its norm is {norm.value:.3g}, where √{dimensions:,} = {dimensions**0.5:.3g} is due."
                if norm and dimensions
                else ""
            )
            yield Finding(
                "prior-mismatch",
                "warning",
                f"The latent is {nats:.3g} nats a dimension away from N(0, 1){total}.{due} Samples of that prior "
                "are not where the decoder was trained.",
                {"nats_per_dimension": nats, "std": s.value} | ({"norm": norm.value} if norm is not None else {}),
                remedies("add a KL term, or raise its weight", "fit a prior to the latents, and sample from that"),
                candidates=("nothing is ever sampled from N(0, 1): then it does not matter",),
                step=int(s.steps[-1]),
            )


@rule(
    id="norm-pinned",
    symptom=True,
    source="Pearson 1896",
    case="E: “alignment”; norm = √d · std",
    needs=("val/*/norm", "train/*/norm"),
    log="norm and std of the latents over the run",
    limits={"r2": 0.99, "spread": 1e-4},
)
def norm_pinned(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """A statistic of the latents is fixed by a loss term or by another statistic, so it is no evidence of its own.

    Seen by its spread over the run; regression of one statistic on another, R² ≥ .99.
    """
    looked = False
    for name, norm in record.matching("val/*/norm", "train/*/norm").items():
        if len(norm) < FEWEST:
            continue
        looked = True
        split, where, _ = name.split("/")
        mean = float(np.mean(norm.values))
        if np.ptp(norm.values) <= limits["spread"] * abs(mean):
            yield Finding(
                "norm-pinned",
                "warning",
                f"The norm of {where} stays at {mean:.4g} to within {limits['spread']:g}: a term or a normalisation "
                "holds it there. It says nothing about health.",
                {"norm": mean, "spread": float(np.ptp(norm.values))},
                remedies("judge by what the latents do: effective_rank, and trials that exchange them"),
            )
            continue
        std = record.get(f"{split}/{where}/std")
        if std is not None and np.array_equal(std.steps, norm.steps):
            r2 = float(np.corrcoef(norm.values, std.values)[0, 1] ** 2) if np.ptp(std.values) else 0.0
            if r2 >= limits["r2"]:
                yield Finding(
                    "norm-pinned",
                    "note",
                    f"norm and std of {where} are one statistic (R² {r2:.3f}): count them as one piece of evidence.",
                    {"r2": r2},
                )
    if not looked:
        yield NotMeasured(f"fewer than {FEWEST} readings of a norm")


@rule(
    id="latent-drift",
    symptom=True,
    source="two-sample z-test; standard error of skewness √(6/n)",
    case="E: a profile with a fixed .001",
    needs=("val/*/mean_shift", "val/*/asymmetry"),
    log="mean and asymmetry of a fixed probe batch's latents",
    limits={"errors": 5.0, "least": 0.2},
)
def latent_drift(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Mean or asymmetry of the latents drifts.

    Seen by the change from the middle of the run to its end, in standard errors of each; none is due.
    """
    looked = False
    for name, s in record.matching("val/*/mean_shift", "val/*/asymmetry").items():
        if len(s) < FEWEST or s.n is None or not record.settled(s):
            continue
        looked = True
        error = (6 / s.n) ** 0.5 if name.endswith("asymmetry") else s.n**-0.5
        half = s.values[len(s) // 2 :]
        change = float(half[-1] - half[0])
        steady = np.mean(np.sign(np.diff(half)) == np.sign(change))
        if abs(change) > max(limits["errors"] * error, limits["least"]) and steady > 0.7:
            yield Finding(
                "latent-drift",
                "warning",
                f"{name.split('/')[2]} of {site(name)} moved by {change:+.3g} over the second half of the run, "
                f"{abs(change) / error:.0f} standard errors, and goes on.",
                {"change": change, "standard_error": error},
                remedies("train until it settles: --train.steps", "raise --loss.kl", wait=1000),
                step=int(s.steps[-1]),
            )
    if not looked:
        yield NotMeasured(f"fewer than {FEWEST} readings of mean or asymmetry")


@rule(
    id="latent-scale",
    concerns=("autoencoder", "diffusion"),
    source="Rombach et al. 2022, appendix G",
    case="D: 31.7 % clamped",
    needs=("val/*/scaled_std", "val/*/clamped_share"),
    log="the latents that diffusion is trained on",
    limits={"low": 0.5, "high": 2.0, "clamped": 0.01},
)
def latent_scale(record: Record, limits: Limits) -> Iterator[Finding]:
    """Latents are not standardised before diffusion, or clamped.

    Seen by standard deviation of each channel as the diffusion sees it, 1 is due; the share of values at the clamp.
    """
    for name, s in record.matching("val/*/scaled_std").items():
        if not limits["low"] <= s.value <= limits["high"]:
            yield _scale(f"{site(name)} has a standard deviation of {s.value:.3g} where 1 is due.", {"std": s.value}, s)
    for name, s in record.matching("val/*/clamped_share").items():
        if s.value > limits["clamped"]:
            yield _scale(f"{s.value:.1%} of {site(name)} is cut off at the clamp.", {"clamped": s.value}, s)


def _scale(message: str, evidence: dict[str, float], s: Series) -> Finding:
    fix = remedies("standardise each channel by the training latents' mean and standard deviation, and clamp nothing")
    return Finding("latent-scale", "fail", message, evidence, fix, step=int(s.steps[-1]))


RULES: tuple[Rule, ...] = (
    latent_ignores_input,
    rank_collapse,
    anisotropic,
    prior_mismatch,
    norm_pinned,
    latent_drift,
    latent_scale,
)
