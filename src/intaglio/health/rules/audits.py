"""What audits at load and in the first steps found: parameters, ranges, data, modes, checkpoints. No torch.

The facts that these rules read are plain dicts; ``health.audits`` and the trainer write them, and so can anybody.
"""

from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.health.rules.training import ASIDE
from intaglio.history import NotMeasured


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@rule(
    id="dead-parameters",
    follows=("temperature-stuck", "not-in-optimizer"),
    source="nothing is skipped silently",
    case="E: 16.8M parameters never called; D: 725k",
    facts=("dead_parameters",),
    log="a monitor that watches the model",
    limits={"share": 0.01},
)
def dead_parameters(record: Record, limits: Limits) -> Iterator[Finding]:
    """Trainable tensors get no gradient, or only zeros.

    Seen by the gradient of every tensor in the first steps; none may stay without.

    ``dead_parameters``: {module: count}; ``parameters``: how many are trained in all.
    """
    dead, total = record.facts["dead_parameters"], max(1, record.facts.get("parameters", 1))
    count = sum(dead.values())
    if count:
        names = sorted(dead, key=lambda name: -dead[name])
        yield Finding(
            "dead-parameters",
            "fail" if count > limits["share"] * total else "warning",
            f"{count:,} of {total:,} parameters have no gradient: {_some(names)}.",
            {"parameters": count, "share": count / total},
            remedies("call the module in the forward pass, or freeze or remove it"),
            candidates=(
                "it is never called: randomise it, which would cost nothing",
                "its branch is masked or detached",
            )
            if count < total
            else ("gradients are emptied between backward and the update: call zero_grad before backward",),
        )


@rule(
    id="not-in-optimizer",
    source="nothing is skipped silently",
    case="V: vision “unfrozen”",
    facts=("not_in_optimizer", "unmoved"),
    log="a monitor that is given the optimizer",
)
def not_in_optimizer(record: Record, limits: Limits) -> Iterator[Finding]:
    """A tensor requires a gradient, but no optimizer group holds it; or it never moves.

    Seen by the optimizer's groups against the model's parameters; weights after the first steps against those before.
    """
    for key, why in (("not_in_optimizer", "stand in no optimizer group"), ("unmoved", "have not moved")):
        names = list(record.facts.get(key, ()))
        if names:
            yield Finding(
                "not-in-optimizer",
                "fail",
                f"{len(names)} trainable tensors {why}: {_some(names)}.",
                {"tensors": len(names)},
                remedies("build the optimizer after unfreezing, or add them with add_param_group"),
            )


@rule(
    id="gradients-add-up",
    source="torch.autograd adds to .grad",
    facts=("gradients_kept",),
    log="a monitor whose step is called between backward and the update",
)
def gradients_add_up(record: Record, limits: Limits) -> Iterator[Finding]:
    """Gradients are not emptied: each update is made with the sum of all batches so far.

    Seen by the gradient that is there when that of the next batch is added, after an update; none is due.

    ``gradients_kept``: {"steps": of the first, "kept": of them with such a gradient}.
    """
    seen = record.facts["gradients_kept"]
    if 2 * seen["kept"] > seen["steps"] > 1:
        yield Finding(
            "gradients-add-up",
            "fail",
            f"In {seen['kept']} of the first {seen['steps']} updates the gradient of the batch before was still there, "
            "and the next was added to it.",
            dict(seen),
            remedies("call optimizer.zero_grad() before each backward, or after each update"),
        )


@rule(
    id="tied-and-frozen",
    source="storage sharing",
    case="V",
    facts=("tied_and_frozen",),
    log="a monitor that watches the model",
)
def tied_and_frozen(record: Record, limits: Limits) -> Iterator[Finding]:
    """A head is frozen through tied weights.

    Seen by tensors that share storage, of which some require a gradient and some do not.
    """
    for names in record.facts["tied_and_frozen"]:
        yield Finding(
            "tied-and-frozen",
            "warning",
            f"{' and '.join(names)} are one tensor, and it is frozen.",
            {"tensors": len(names)},
            remedies("untie them, or train both"),
        )


@rule(
    id="range-mismatch",
    source="range of tanh and sigmoid",
    case="E: tanh against [0, 1]",
    facts=("ranges",),
    log="what the decoder's activation reaches, and a batch of targets",
    limits={"outside": 0.01, "unused": 0.4},
)
def range_mismatch(record: Record, limits: Limits) -> Iterator[Finding]:
    """Targets lie outside what the output activation reaches, or use little of it.

    Seen by the range of the targets against that of the outputs on a probe batch.

    ``ranges``: {site: {target_low, target_high, low, high}}; low and high are what the activation reaches.
    """
    for site, r in record.facts["ranges"].items():
        width = r["high"] - r["low"]
        outside = max(r["low"] - r["target_low"], r["target_high"] - r["high"], 0.0) / width
        unused = max(0.0, r["target_low"] - r["low"], r["high"] - r["target_high"]) / width
        if outside > limits["outside"] or unused > limits["unused"]:
            how = "go beyond" if outside > limits["outside"] else "use a part of"
            yield Finding(
                "range-mismatch",
                "fail",
                f"Targets of {site} lie in [{r['target_low']:.3g}, {r['target_high']:.3g}]: they {how} "
                f"[{r['low']:g}, {r['high']:g}], which the output reaches.",
                {"outside": outside, "unused": unused},
                remedies("scale the targets to the activation's range", "--model.output sigmoid for targets in [0, 1]"),
            )


@rule(
    id="augmentation-inert",
    concerns=("jepa", "autoencoder", "diffusion"),
    source="intervene, don’t only watch",
    case="J; D: the flip of every copy",
    facts=("augmentations",),
    log="the augmentation and a probe batch: health.audits.augmentation measures both",
    limits={"changed": 0.02},
)
def augmentation_inert(record: Record, limits: Limits) -> Iterator[Finding]:
    """An augmentation changes nothing, or always the same.

    Seen by the share of inputs that it changes, and how many different results it gives of one input.

    ``augmentations``: {name: {changed, variety}}, both shares of the inputs tried.
    """
    for name, a in record.facts["augmentations"].items():
        if a["changed"] < limits["changed"] or a["variety"] <= 0:
            what = "changes nothing" if a["changed"] < limits["changed"] else "gives the same result each time"
            yield Finding(
                "augmentation-inert",
                "warning",
                f"The augmentation {name} {what} ({a['changed']:.0%} of inputs changed).",
                {"changed": a["changed"], "variety": a["variety"]},
                remedies("draw its randomness for each item and pass, or leave it out"),
            )


@rule(
    id="validation-pollutes",
    source="watching changes nothing",
    case="J",
    facts=("changed_by_validation", "training_in_validation"),
    log="a monitor around the validation loop",
)
def validation_pollutes(record: Record, limits: Limits) -> Iterator[Finding]:
    """Validation runs in training mode, or updates state.

    Seen by modes and a digest of all buffers and parameters before and after a look at held-out items.
    """
    changed = list(record.facts.get("changed_by_validation", ()))
    if changed:
        yield Finding(
            "validation-pollutes",
            "fail",
            f"Looking at held-out items changed {len(changed)} tensors: {_some(changed)}.",
            {"tensors": len(changed)},
            remedies(
                "model.eval() and torch.no_grad() around validation", "update codebooks and statistics in training only"
            ),
        )
    mode = list(record.facts.get("training_in_validation", ()))
    if mode and not changed:
        yield Finding(
            "validation-pollutes",
            "warning",
            f"{len(mode)} modules are in training mode during validation: {_some(mode)}.",
            {"modules": len(mode)},
            remedies("model.eval() before validation, model.train() after"),
        )


@rule(
    id="split-leak",
    follows=("data-replaced",),
    source="Barz & Denzler 2020",
    case="V: 2,633 shared images; E: tokenizer",
    needs=("val/loss/*", "val/*/accuracy"),
    facts=("leaks",),
    log="the splits: health.audits.leaks compares them",
    limits={"rows": 8, "same": 1e-6, "apart": 0.05, "below": 0.5, "perfect": 0.999},
)
def split_leak(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """The same or nearly the same item stands in both splits.

    Seen by exact and perceptual hashes of images, and group keys, across the splits; none may be on both sides. A
    history shows it where the held-out curve is training's, or lies far below it all along.

    ``leaks``: {what: how many held-out items it touches}.
    """
    yield from _one_curve(record, limits)
    if "leaks" not in record.facts:
        yield NotMeasured("the items of the splits were not compared")
    for what, count in record.facts.get("leaks", {}).items():
        if count:
            yield Finding(
                "split-leak",
                "fail",
                f"Held-out items have been seen in training, {count:,} × {what}.",
                {"items": count},
                remedies(
                    "split by group, and let near-duplicates stay on one side", "train the tokenizer on training items"
                ),
            )


def _one_curve(record: Record, limits: Limits) -> Iterator[Finding]:
    """Held-out and training loss, or accuracy, are one curve, or the held-out one lies far below, or is perfect."""
    for name, s in record.matching("val/*/accuracy").items():
        if record.get(f"{name.partition('.')[0]}/accuracy") is not None and "." in name:
            continue  # that of one kind, which may be easy
        if (
            len(s) >= limits["rows"]
            and (s.values[1:] >= limits["perfect"] * (100 if s.values.max() > 1.5 else 1)).all()
        ):
            yield Finding(
                "split-leak",
                "warning",
                f"{name} is {s.value:.4g} from its second row on: too good to be believed unseen.",
                {"accuracy": s.value, "rows": len(s)},
                candidates=("the answer stands in the input, or items in both splits", "the task is trivial"),
                step=int(s.steps[1]),
            )
    for name, val in record.matching("val/loss/*", "val/*/accuracy").items():
        train = record.get("train" + name.removeprefix("val"))
        beside = any(word in name for word in ASIDE)  # a KL is as large on items that were seen
        if train is None or len(val) < limits["rows"]:
            continue
        both, a, b = np.intersect1d(train.steps, val.steps, return_indices=True)
        if len(both) < limits["rows"]:
            continue
        x, y = train.values[a], val.values[b]
        if np.allclose(x, y, rtol=limits["same"], atol=0) and np.abs(x - y).max() < limits["apart"] * np.ptp(x):
            yield Finding(
                "split-leak",
                "fail",
                f"{name} equals training's in all {len(both)} rows: it is not of held-out items.",
                {"rows": len(both)},
                remedies("evaluate on items that were never trained on"),
                step=int(both[0]),
            )
        elif (
            "/loss/" in name
            and min(x.min(), y.min()) > 0
            and float(np.median(y / x)) < limits["below"]
            and (y < x).all()
            and not beside
        ):
            yield Finding(
                "split-leak",
                "warning",
                f"{name} is below training's in every row, at {float(np.median(y / x)):.0%} of it as a rule.",
                {"share": float(np.median(y / x))},
                candidates=(
                    "dropout or augmentation makes training harder: measure clean training items",
                    "held-out items stand in the training set: compare hashes",
                    "the two are reduced differently (mean and sum), or weighed differently",
                ),
                step=int(both[-1]),
            )


@rule(
    id="data-replaced",
    source="nothing is skipped silently",
    case="V: white images; J: 61 % of objects dropped",
    needs=("train/tokens/dropped_share",),
    facts=("intake",),
    log="what was dropped or cut, and why",
    limits={"warning": 0.01, "fail": 0.2},
)
def data_replaced(record: Record, limits: Limits) -> Iterator[Finding]:
    """Items that could not be used were replaced, dropped or cut.

    Seen by counts of what the loader met, against the number of items; by the share of objects that no token stands
    for.

    ``intake``: {"items": number, "lost": {reason: count}}.
    """
    lost = record.get("train/tokens/dropped_share")
    if lost is not None and lost.value > limits["warning"]:
        cells = record.get("train/tokens/dropped_cells")
        coloured = f", with {cells.value:.1%} of the coloured cells" if cells is not None else ""
        yield Finding(
            "data-replaced",
            "fail" if lost.value > limits["fail"] else "warning",
            f"{lost.value:.1%} of the objects are in no token{coloured}: a grid has more than are read.",
            {"share": lost.value},
            remedies("--model.tokens cells"),
            step=int(lost.steps[-1]),
        )
    intake = record.facts.get("intake", {"lost": {}})
    for reason, count in intake["lost"].items():
        share = count / max(1, intake["items"] + count)
        if share > limits["warning"]:
            yield Finding(
                "data-replaced",
                "fail" if share > limits["fail"] else "warning",
                f"{share:.1%} of the input is lost: {count:,} × {reason}.",
                {"share": share, "count": count},
                remedies("mend those files or captions, or raise the limit that cuts them"),
            )


@rule(
    id="partial-load",
    source="a checkpoint holds everything",
    case="D; J",
    facts=("loaded",),
    log="the result of load_state_dict",
)
def partial_load(record: Record, limits: Limits) -> Iterator[Finding]:
    """Keys were missing, unexpected or of another shape when a checkpoint was loaded.

    Seen by the keys of the file against those of the model; loss and rate across the resume.

    ``loaded``: {"missing": [...], "unexpected": [...], "reshaped": [...]}.
    """
    wrong = {kind: names for kind, names in record.facts["loaded"].items() if names}
    if wrong:
        told = "; ".join(f"{len(names)} {kind} ({_some(list(names))})" for kind, names in wrong.items())
        yield Finding(
            "partial-load",
            "fail",
            f"The checkpoint was loaded in part: {told}.",
            {kind: len(names) for kind, names in wrong.items()},
            remedies("load with strict=True, and build the model from the configuration that the checkpoint carries"),
        )


@rule(
    id="trained-on-test",
    source="counting",
    case="D",
    facts=("trained_on_test",),
    log="how many training items the source declares as test",
)
def trained_on_test(record: Record, limits: Limits) -> Iterator[Finding]:
    """Items that the source publishes as its test split are trained on.

    Seen by the declared side of every training item; none may be test.

    ``trained_on_test``: how many.
    """
    count = record.facts["trained_on_test"]
    if count:
        yield Finding(
            "trained-on-test",
            "fail",
            f"{count:,} training items are declared as test by their source: no number on that split means anything.",
            {"items": count},
            remedies("leave declared test items out of training, and out of the data's fingerprint"),
        )


@rule(
    id="conditioned-too-late",
    source="nothing is skipped silently",
    case="D",
    facts=("built_for",),
    log="for how many words, labels or conditions the model was built, and how many the data has",
)
def conditioned_too_late(record: Record, limits: Limits) -> Iterator[Finding]:
    """A module depends on data that was loaded after it was built.

    Seen by the sizes that the model was built for beside those of the data that it is given.

    ``built_for``: {what: {"built_for": number, "data": number}}.
    """
    for what, size in record.facts["built_for"].items():
        if size["built_for"] != size["data"]:
            none = "without any, so that it ignores them" if not size["built_for"] else f"for {size['built_for']:,}"
            yield Finding(
                "conditioned-too-late",
                "fail" if size["built_for"] < size["data"] else "warning",
                f"The data has {size['data']:,} {what}, and the model was built {none}.",
                dict(size),
                remedies("read the data first, and build the model from what it holds"),
            )


@rule(
    id="not-reproducible",
    source="one run is an anecdote",
    case="J",
    facts=("provenance",),
    log="the seed, and what changed against the run that this one is compared with",
    limits={"changes": 1},
)
def not_reproducible(record: Record, limits: Limits) -> Iterator[Finding]:
    """The run cannot be made again, or differs from its parent in several things at once.

    Seen by the seed, and the keys in which its configuration differs from its parent's.

    ``provenance``: {"seed": number or None, "changed": [keys]}.
    """
    known = record.facts["provenance"]
    if known.get("seed") is None:
        yield Finding(
            "not-reproducible",
            "warning",
            "No seed was set, so that this run cannot be made again.",
            {},
            remedies("torch.manual_seed(0) before the model is built: --seed 0"),
        )
    changed = list(known.get("changed", ()))
    if len(changed) > limits["changes"]:
        yield Finding(
            "not-reproducible",
            "note",
            f"{len(changed)} keys differ from the parent run: {_some(changed)}. What caused a difference cannot be "
            "told.",
            {"changes": len(changed)},
            remedies("change one thing at a time, each with several seeds"),
        )


RULES: tuple[Rule, ...] = (
    dead_parameters,
    not_in_optimizer,
    gradients_add_up,
    tied_and_frozen,
    range_mismatch,
    augmentation_inert,
    validation_pollutes,
    split_leak,
    data_replaced,
    partial_load,
    trained_on_test,
    conditioned_too_late,
    not_reproducible,
)
