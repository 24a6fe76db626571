"""Diffusion: is the condition obeyed, are samples new, and what limits them? No torch.

Series that are read, each with its null; W is a guidance weight, B the centre of a bin of log-SNR, CLASS a class:

- ``val/condition/velocity_change``: ‖v(c₁) − v(c₂)‖ / ‖v‖ at the same noise, null 0; ``val/condition/permuted_loss``:
  what the held-out loss rises by, as a share, with other items' conditions, null 0, with its interval
- ``val/guidance.W/class_accuracy``, and ``…/class_accuracy.CLASS``: by an independent classifier, null 1/K, with its
  interval; ``…/diversity``, null 1, of a class or the mean of classes; ``…/clipped_share``, null that of real images;
  ``…/contrast_ratio``, standard deviation of pixels over that of real ones, null 1
- ``val/guidance/used``: the weight that samples are drawn with; ``val/judge/accuracy``: the classifier's own, held out
- ``val/samples/copied_share``, ``val/samples/neighbour_ratio``, ``val/samples/frechet_distance``: those of
  ``instruments/samples.py``; ``val/round_trip/frechet_distance`` and ``val/round_trip/r2``: of decode(encode(real))
"""

from collections.abc import Iterator, Mapping

from intaglio.health.finding import Finding, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.history import NotMeasured, Series


def _sweep(record: Record, quantity: str) -> dict[float, Series]:
    """The series of a quantity at each guidance weight, in the order of weights."""
    found = record.matching(f"val/guidance.*/{quantity}")
    return dict(sorted((float(name.split("/")[1].partition(".")[2]), s) for name, s in found.items()))


def _end(record: Record, name: str, end: str) -> float:
    """One end of a series' interval, or its value where it has none."""
    s = record.get(f"{name}_{end}") or record.get(name)
    assert s is not None
    return s.value


@rule(
    id="condition-ignored",
    follows=("diverged", "dead-parameters"),
    concerns=("diffusion",),
    source="intervene, don’t only watch; Ho & Salimans 2022",
    case="D: CLIP table loaded after the model was built",
    needs=("val/condition/velocity_change", "val/condition/permuted_loss"),
    log="‖v(c₁) − v(c₂)‖/‖v‖ at the same noise as val/condition/velocity_change; the loss with permuted conditions",
    limits={"change": 1e-6, "weak": 0.003},
)
def condition_ignored(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The output does not depend on the condition.

    Seen by how much the predicted velocity changes with the condition at the same noise, and by what other items'
    conditions cost the held-out loss; both are 0 where it is ignored, and then 0 lies in the interval of the latter.
    """
    change, cost = (record.get(f"val/condition/{name}") for name in ("velocity_change", "permuted_loss"))
    if change is not None and change.value < limits["change"]:
        yield Finding(
            "condition-ignored",
            "fail",
            f"Another condition changes the prediction by {change.value:.2g} of its size: none reaches the network.",
            {"velocity_change": change.value},
            remedies("load the condition's table before the model is built", "let its embedding reach every block"),
            candidates=("attention over one token is a constant: see attention-over-one",),
            step=int(change.steps[-1]),
        )
        return
    s = cost if cost is not None else change
    assert s is not None
    if not record.settled(s):
        yield NotMeasured("too early: what a condition is worth has not settled")
    elif cost is not None and _end(record, "val/condition/permuted_loss", "low") <= 0:
        shown = record.matching("val/guidance.*/class_accuracy")
        obeyed = any(s.null is not None and _end(record, name, "low") > s.null for name, s in shown.items())
        yield Finding(
            "condition-ignored",
            "warning" if obeyed else "fail",
            f"Other items' conditions cost the held-out loss {cost.value:.2%}, and 0 lies in the interval: "
            + ("it hardly says what samples show." if obeyed else "the condition says nothing to the network."),
            {"permuted_loss": cost.value} | ({} if change is None else {"velocity_change": change.value}),
            remedies("lower --condition.drop", "train longer", "give the full token sequence", wait=1000),
            candidates=("the conditions say nothing of the images: train the classifier on them",),
            step=int(cost.steps[-1]),
        )
    elif change is not None and change.value < limits["weak"]:
        yield Finding(
            "condition-ignored",
            "warning",
            f"Another condition changes the prediction by no more than {change.value:.2%} of its size.",
            {"velocity_change": change.value},
            remedies("lower --condition.drop", "train longer", wait=1000),
            step=int(change.steps[-1]),
        )


@rule(
    id="unfaithful",
    symptom=True,
    follows=("learning-rate-off", "ema-lag", "condition-ignored", "null-mismatch", "latent-scale"),
    concerns=("diffusion",),
    source="Ravuri & Vinyals 2019 (classification accuracy), here of the samples by a classifier of real images",
    case="D",
    needs=("val/guidance.*/class_accuracy",),
    log="≥ 50 samples a class judged by an independent classifier as val/guidance.W/class_accuracy, W from 1 on",
    limits={"wrong": 0.5, "due": 0.85},
)
def unfaithful(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The requested class is not the generated one.

    Seen by an independent classifier at the best weight of the sweep, or the one in use; chance is 1/K, and the
    classifier's own accuracy on held-out real images is what faithful samples reach. Few samples, whose interval
    reaches that, show nothing.
    """
    sweep, used = _sweep(record, "class_accuracy"), record.get("val/guidance/used")
    best = used.value if used is not None and used.value in sweep else max(sweep, key=lambda w: sweep[w].value)
    s, name = sweep[best], f"val/guidance.{best:g}/class_accuracy"
    judge = record.get("val/judge/accuracy")
    own = judge.value if judge is not None else 1.0
    if own < limits["wrong"]:
        yield NotMeasured(f"the classifier itself is right on {own:.0%} of real images: it cannot judge others")
        return
    if not record.settled(s):
        yield NotMeasured(f"too early: {name} has not settled")
        return
    low, high = (_end(record, name, end) for end in ("low", "high"))
    chance = s.null is not None and low <= s.null
    if high < limits["due"] * own:
        yield Finding(
            "unfaithful",
            "fail" if chance or high < limits["wrong"] * own else "warning",
            f"At guidance {best:g}, {s.value:.0%} of samples (at most {high:.0%}) show the class that was asked for"
            + ("" if s.null is None else f"; chance is {s.null:.0%}")
            + ("." if judge is None else f", and the classifier is right on {own:.0%} of real images."),
            {"class_accuracy": s.value, "guidance": best},
            remedies("train longer", "more guidance: see the sweep", "lower --condition.drop", wait=1000),
            candidates=("the condition is ignored: see condition-ignored", "a sampler that is wrong for everything"),
            step=int(s.steps[-1]),
        )


GRAVE = {"clipped": 0.2, "contrast": 1.75, "diversity": 0.25}
"""Limits of over-stylised beyond which a single extreme fails."""


@rule(
    id="over-stylised",
    concerns=("diffusion",),
    source="Saharia et al. 2022, section 2.3; Kynkäänniemi et al. 2024",
    case="D: w = 5, 6, 9",
    needs=("val/guidance.*/clipped_share", "val/guidance.*/contrast_ratio", "val/guidance.*/diversity"),
    log="a sweep of w: clipped share, contrast ratio, diversity and class accuracy as val/guidance.W/…",
    limits={"clipped": 0.05, "contrast": 1.5, "diversity": 0.5},
)
def over_stylised(record: Record, limits: Limits) -> Iterator[Finding]:
    """Guidance drives samples to extremes.

    Seen by a sweep of w: clipped share and contrast beside those of real images and of samples without guidance (what
    these have too, guidance did not do), diversity over that of real ones. Where ``val/guidance/used`` is not told it
    is a note; a weight is recommended, for each class where they are measured.
    """
    extremes, best = advised_weights(record, limits)
    used = record.get("val/guidance/used")
    judged = [w for w in extremes if used is None or w == used.value]
    if not judged:
        return
    w = judged[0]
    gravely = len(extremes[w]) > 1 or _extremes(record, w, GRAVE)
    named = "; ".join(f"{label or 'all classes'} {best_w:g}" for label, best_w in best.items() if best_w is not None)
    overall = best[""]
    yield Finding(
        "over-stylised",
        "note" if used is None else "fail" if gravely else "warning",
        (f"From guidance {w:g} on" if used is None else f"At guidance {w:g}")
        + f", samples are driven to extremes: {', '.join(extremes[w].values())}. "
        + (
            f"The least weight that is as accurate, and free of that: {named}." if named else "No weight is free of it."
        ),
        {"guidance": w} | ({} if overall is None else {"recommended": overall}),
        remedies(
            *([] if overall is None else [f"sample with guidance {overall:g}: --sampling.guidance {overall:g}"]),
            "guide in an interval of log-SNR only",
            "rescale the guided prediction",
        ),
        step=record.last_step,
    )


def advised_weights(
    record: Record, limits: Limits | None = None
) -> tuple[dict[float, dict[str, str]], dict[str, float | None]]:
    """What is extreme at weights that drive samples to extremes, {quantity: words}; the weight to use for each class.

    That of the class "" is for all of them; None where every weight is extreme. Limits: those of over-stylised.
    """
    limits = over_stylised.limits if limits is None else limits
    extremes = {w: told for w in _weights(record) if (told := _extremes(record, w, limits))}
    return extremes, {label: _recommended(record, label, extremes, limits) for label in ("", *_classes(record))}


def _weights(record: Record) -> list[float]:
    return sorted({w for q in ("clipped_share", "contrast_ratio", "diversity") for w in _sweep(record, q)})


def _extremes(record: Record, w: float, limits: Limits) -> dict[str, str]:
    """What is extreme at one weight, by quantity, in words."""
    clipped, contrast, diversity = (
        record.get(f"val/guidance.{w:g}/{q}") for q in ("clipped_share", "contrast_ratio", "diversity")
    )
    own_clipped, own_contrast = (record.get(f"val/guidance.1/{q}") for q in ("clipped_share", "contrast_ratio"))
    told = {}
    if clipped is not None:
        real, own = clipped.null or 0.0, 0.0 if own_clipped is None else own_clipped.value
        if clipped.value > max(real, own) + limits["clipped"]:
            told["clipped_share"] = f"{clipped.value:.0%} of pixels are clipped, of real ones {real:.0%}"
            told["clipped_share"] += f", without guidance {own:.0%}" if own > real else ""
    if contrast is not None:
        own = 1.0 if own_contrast is None else max(1.0, own_contrast.value)
        if contrast.value > limits["contrast"] * own:
            told["contrast_ratio"] = f"their contrast is {contrast.value:.2f} times that of real images"
    if diversity is not None and _end(record, f"val/guidance.{w:g}/diversity", "high") < limits["diversity"]:
        told["diversity"] = f"they differ {diversity.value:.0%} as much as real images do"
    return told


def _classes(record: Record) -> list[str]:
    names = {name.partition("/class_accuracy.")[2] for name in record.matching("val/guidance.*/class_accuracy.*")}
    return sorted(name for name in names if not name.endswith(("_low", "_high")))


def _recommended(record: Record, label: str, extremes: Mapping[float, object], limits: Limits) -> float | None:
    """The least weight that is not extreme and whose accuracy the best such weight's interval still holds."""
    ending = f".{label}" if label else ""
    varied = _sweep(record, f"diversity{ending}") if label else {}
    free = {
        w: s
        for w, s in _sweep(record, f"class_accuracy{ending}").items()
        if w not in extremes and not (w in varied and varied[w].value < limits["diversity"])
    }
    if not free:
        return None
    top = max(free, key=lambda w: free[w].value)
    low = _end(record, f"val/guidance.{top:g}/class_accuracy{ending}", "low")
    return next(w for w, s in free.items() if s.value >= low)


@rule(
    id="memorised",
    concerns=("diffusion",),
    source="Carlini et al. 2023; Somepalli et al. 2023",
    case="D",
    needs=("val/samples/copied_share", "val/samples/neighbour_ratio"),
    log="copied_share and neighbour_ratio of instruments/samples.py as val/samples/…",
    limits={"many": 0.1, "times": 2.0, "nearer": 0.8},
)
def memorised(record: Record, limits: Limits) -> Iterator[Finding]:
    """Samples are training items.

    Seen by the share of samples that are as near a training item as the nearest 1 % of held-out images, and how much
    nearer the nearest is than the next ones, beside held-out images.
    """
    share, ratio = (record.get(f"val/samples/{name}") for name in ("copied_share", "neighbour_ratio"))
    low, high = (
        None if s is None else _end(record, f"val/samples/{name}", end)
        for s, name, end in ((share, "copied_share", "low"), (ratio, "neighbour_ratio", "high"))
    )
    if share is not None and low is not None and low > limits["times"] * (share.null or 0):
        yield Finding(
            "memorised",
            "fail" if share.value >= limits["many"] else "warning",
            f"{share.value:.1%} of samples (at least {low:.1%}) are as near a training item as {share.null or 0:.1%} "
            "of held-out images are: they are copies.",
            {"copied_share": share.value},
            remedies("stop earlier", "more items, or flips of them", "dropout, or a smaller network", wait=1000),
            candidates=("an image that stands in the training set many times: see near-duplicates of the data",),
            step=int(share.steps[-1]),
        )
    elif ratio is not None and high is not None and ratio.null and high < limits["nearer"] * ratio.null:
        yield Finding(
            "memorised",
            "warning",
            f"The nearest training item is at {ratio.value:.2f} of the distance of the next ones; from held-out images "
            f"at {ratio.null:.2f}.",
            {"neighbour_ratio": ratio.value},
            remedies("stop earlier", "more items, or flips of them", wait=1000),
            step=int(ratio.steps[-1]),
        )


@rule(
    id="round-trip-ceiling",
    concerns=("diffusion",),
    source="Rombach et al. 2022, table 8",
    case="D",
    needs=("val/round_trip/r2", "val/round_trip/frechet_distance"),
    log="decode(encode(x)) of held-out images: R² and Fréchet distance as val/round_trip/…, that of samples beside",
    limits={"due": 0.95, "poor": 0.8, "share": 0.5},
)
def round_trip_ceiling(record: Record, limits: Limits) -> Iterator[Finding]:
    """The autoencoder, not diffusion, limits quality.

    Seen by R² of decode(encode(x)), of which the mean image has 0, and by its share of the samples' Fréchet distance,
    both above what other real images have.
    """
    r2, own, drawn = (
        record.get(f"val/{name}")
        for name in ("round_trip/r2", "round_trip/frechet_distance", "samples/frechet_distance")
    )
    if r2 is not None and r2.value < limits["due"]:
        yield Finding(
            "round-trip-ceiling",
            "fail" if r2.value < limits["poor"] else "warning",
            f"The autoencoder gives back {r2.value:.1%} of the variance of held-out images; no sample can be better.",
            {"r2": r2.value},
            remedies("train the autoencoder longer", "more latent channels", "factor 4 in place of 8", wait=1000),
            step=int(r2.steps[-1]),
        )
    elif own is not None and drawn is not None and own.null is not None and drawn.null is not None:
        lost, whole = own.value - own.null, drawn.value - drawn.null
        if whole > drawn.null and lost > limits["share"] * whole:
            yield Finding(
                "round-trip-ceiling",
                "warning",
                f"{lost / whole:.0%} of the samples' Fréchet distance is there after decode(encode(x)) of real images.",
                {"share": lost / whole},
                remedies("a better autoencoder before a better diffusion model: train it longer"),
                step=int(own.steps[-1]),
            )


RULES: tuple[Rule, ...] = (  # causes first
    condition_ignored,
    over_stylised,
    unfaithful,
    memorised,
    round_trip_ceiling,
)
