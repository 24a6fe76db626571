"""Text decoders: does the text depend on the latent, and is its accuracy what it seems? No torch."""

from collections.abc import Iterator

import numpy as np

from intaglio.health.finding import Finding, remedies
from intaglio.health.record import Record
from intaglio.health.rule import Limits, Rule, rule
from intaglio.history import NotMeasured, Series


@rule(
    id="decoder-ignores-latent",
    follows=("diverged", "dead-parameters"),
    source="Bowman et al. 2016; intervene, don’t only watch",
    case="E: exactly 0",
    needs=("val/*/shuffled_latent_nats",),
    log="the trial that exchanges latents: a monitor with a caption loss runs it",
    limits={"nats": 0.05, "weak": 0.2, "nothing": 0.001},
)
def decoder_ignores_latent(record: Record, limits: Limits) -> Iterator[Finding]:
    """What is decoded, as captions, does not depend on the latent.

    Seen by what a token costs more when its caption is decoded from another image's latent: 0 where it is ignored, and
    then 0 lies in its interval; the caption's surprise beside a bigram model's. Of a site without nats a token the unit
    is not known, so that the interval alone decides.
    """
    for name, s in record.matching("val/*/shuffled_latent_nats").items():
        where = name.split("/")[1]
        others = [record.get(f"val/{where}/{other}_latent_nats") for other in ("shuffled", "zero", "mean")]
        severed = all(o is not None and o.value == 0 for o in others)
        if s.value >= limits["weak"] or not (severed or record.settled(s)):
            continue
        surprise = record.get(f"val/{where}/nats_per_token")
        bigram = (
            ""
            if surprise is None or surprise.null is None
            else (f" Its surprise is {surprise.value:.2f} nats a token, a bigram model's {surprise.null:.2f}.")
        )
        if severed:
            yield Finding(
                "decoder-ignores-latent",
                "fail",
                f"What is decoded at {where} does not depend on the latent: that of another item, one of zeros and the "
                f"mean all cost exactly 0 nats, so nothing of it reaches the decoder.{bigram}",
                {"nats": s.value},
                remedies("let the text decoder attend to the latent: see what stands between the two"),
                step=int(s.steps[0]),
            )
            continue
        low = record.get(f"{name}_low")
        unsure = low is not None and low.value <= 0
        nothing = unsure or s.value < limits["nothing"]
        ignored = nothing or (surprise is not None and low is None and s.value < limits["nats"])
        if surprise is None and not ignored:
            continue
        yield Finding(
            "decoder-ignores-latent",
            "fail" if ignored else "warning",
            f"Another item's latent costs {where} {s.value:.3f} nats{'' if surprise is None else ' a token'}: its "
            f"decoder {'does not use' if ignored else 'hardly uses'} the latent.{bigram}",
            {"nats": s.value},
            remedies(
                "train longer: --train.steps",
                "raise --loss.caption",
                "fewer text layers: --model.decoder_layers 2",
                wait=1000,
            ),
            candidates=(
                "the latent says nothing: see latent-ignores-input",
                "it never reaches the decoder: randomise the layer between them, which would cost nothing",
            ),
            step=int(s.steps[-1]),
        )


@rule(
    id="flattering-accuracy",
    source="counting",
    case="E: 69.4 %",
    needs=("val/*/accuracy_as_logged", "train/*/accuracy_as_logged"),
    log="the accuracy that the run reports as val/SITE/accuracy_as_logged, the true one as val/SITE/token_accuracy",
    limits={"points": 0.01, "unsure": 0.02, "errors": 2.0},
)
def flattering_accuracy(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """START, padding or training tokens are counted in the accuracy.

    Seen by the accuracy as it is logged beside the same one recomputed on held-out items without START and padding, by
    the median of their differences in the later half, beside its standard error, since each is of other items.
    """
    for name, s in record.matching("val/*/accuracy_as_logged", "train/*/accuracy_as_logged").items():
        true = record.get(f"val/{name.split('/')[1]}/token_accuracy")
        if true is None:
            yield NotMeasured(f"{name} has no val/{name.split('/')[1]}/token_accuracy to be held against")
        elif _surplus(s, true) > _least(true, limits):
            yield Finding(
                "flattering-accuracy",
                "fail",
                f"The accuracy is logged as {s.value:.1%}; without START and padding, on held-out items, it is "
                f"{true.value:.1%}" + (f" (a bigram model has {true.null:.1%})." if true.null is not None else "."),
                {"logged": s.value, "true": true.value},
                remedies("count only tokens that are predicted: leave out START and padding, and use held-out items"),
                step=int(s.steps[-1]),
            )


def _least(true: Series, limits: Limits) -> float:
    """The least surplus that is none of chance."""
    if not true.n:
        return limits["unsure"]
    error = (true.value * max(0.0, 1 - true.value) / true.n) ** 0.5
    return min(limits["unsure"], max(limits["points"], limits["errors"] * error))


def _surplus(logged: Series, true: Series) -> float:
    """By how much the logged one is above the true one, in the later half of the looks at both."""
    both, a, b = np.intersect1d(logged.steps, true.steps, return_indices=True)
    differences = (logged.values[a] - true.values[b])[len(both) // 2 :]
    return float(np.median(differences)) if len(both) else logged.value - true.value


@rule(
    id="vocabulary-unreachable",
    source="counting",
    case="E: punctuation",
    needs=("train/text/unreachable_share", "val/text/unknown_share"),
    log="both shares, when the tokenizer is known",
    limits={"unreachable": 0.02, "unknown": 0.01},
)
def vocabulary_unreachable(record: Record, limits: Limits) -> Iterator[Finding]:
    """Ids that no text can produce, or text that has no ids.

    Seen by the share of ids that the tokenizer gives to no training text and no merge can reach; the share of held-out
    tokens that are unknown.
    """
    unreachable, unknown = record.get("train/text/unreachable_share"), record.get("val/text/unknown_share")
    if unreachable is not None and unreachable.value > limits["unreachable"]:
        yield Finding(
            "vocabulary-unreachable",
            "warning",
            f"{unreachable.value:.0%} of the vocabulary's ids are given to no text: parameters that nothing trains.",
            {"share": unreachable.value},
            remedies("train the tokenizer on the same text, prepared in the same way", "--model.vocabulary, smaller"),
        )
    if unknown is not None and unknown.value > limits["unknown"]:
        yield Finding(
            "vocabulary-unreachable",
            "fail" if unknown.value > 10 * limits["unknown"] else "warning",
            f"{unknown.value:.1%} of held-out tokens are unknown to the tokenizer.",
            {"share": unknown.value},
            remedies("train the tokenizer on more of the training text", "--model.vocabulary, larger"),
        )


@rule(
    id="free-running-gap",
    follows=("dead-parameters",),
    source="Ranzato et al. 2016; Bengio et al. 2015",
    case="V",
    needs=("val/*/object_forced", "val/*/accuracy_forced"),
    log="both shares on the same held-out items, as val/SITE/accuracy and val/SITE/accuracy_forced",
    limits={"gap": 0.15, "lost": 0.5},
)
def free_running_gap(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Good under teacher forcing, poor when generating.

    Seen by the share of captions that name the right thing, or of answers that are right, when generated, beside that
    of items whose tokens are right when all true tokens before them are given.
    """
    for name, forced in record.matching("val/*/object_forced", "val/*/accuracy_forced").items():
        free = record.get(name.removesuffix("_forced"))
        if free is None:
            yield NotMeasured(f"{name} has no counterpart that was generated")
        elif forced.value - free.value > limits["gap"]:
            yield Finding(
                "free-running-gap",
                "fail" if free.value < limits["lost"] * forced.value else "warning",
                f"Given the true words before each, the model is right in {forced.value:.0%} of cases; writing on its "
                f"own, in {free.value:.0%}.",
                {"forced": forced.value, "free": free.value},
                remedies("train longer: --train.steps", "--model.dropout 0.1", wait=1000),
                candidates=("decoding ends early or repeats: look at the captions", "it leans on the words before"),
                step=int(forced.steps[-1]),
            )


@rule(
    id="question-only",
    follows=("diverged", "dead-parameters"),
    concerns=("vqa",),
    source="Goyal et al. 2017",
    case="V",
    needs=("val/answer/shuffled_image_nats", "val/answer.*/accuracy"),
    log="accuracy of each question type as val/answer.TYPE/accuracy with its majority as null",
    limits={"nats": 0.05, "share": 0.05, "gain": 0.02, "error": 0.03},
)
def question_only(record: Record, limits: Limits) -> Iterator[Finding | NotMeasured]:
    """Answers do not need the image, or are no better than the commonest one.

    Seen by accuracy by question type, of questions enough to tell, beside the majority answer's; what another image
    costs, alone and beside what another latent does.
    """
    early = [record.early(name) for name in record.matching("val/answer/shuffled_image_nats", "val/answer.*/accuracy")]
    swapped = record.get("val/answer/shuffled_image_nats")
    if any(early) and not (swapped is not None and swapped.value == 0):
        yield next(filter(None, early))
        return
    held = max((s.value for s in record.matching("val/*/shuffled_latent_nats").values()), default=0.0)
    unseen = swapped is not None and swapped.value < max(limits["nats"], limits["share"] * held)
    if swapped is not None and unseen:
        yield Finding(
            "question-only",
            "fail",
            f"Another image costs an answer {swapped.value:.3f} nats: answers do not need the image.",
            {"nats": swapped.value},
            remedies("balance the answers of each question type", wait=1000),
            candidates=("the image never reaches the decoder", "questions give their answers away"),
            step=int(swapped.steps[-1]),
        )
    for name, s in record.matching("val/answer.*/accuracy").items():
        if s.null is None:
            continue
        if not unseen and s.n and (s.null * (1 - s.null) / s.n) ** 0.5 > limits["error"]:
            continue  # too few questions of this kind to tell
        if s.value < s.null + limits["gain"]:
            kind = name.split("/")[1].removeprefix("answer.")
            yield Finding(
                "question-only",
                "warning",
                f"{kind} questions are answered rightly in {s.value:.1%} of cases; always the commonest answer would "
                f"be right in {s.null:.1%}.",
                {"accuracy": s.value, "majority": s.null},
                step=int(s.steps[-1]),
            )


RULES: tuple[Rule, ...] = (
    decoder_ignores_latent,
    flattering_accuracy,
    vocabulary_unreachable,
    free_running_gap,
    question_only,
)
