"""What a trained model answers to held-out questions, each number beside its null.

Shapes: N questions, K latents of Z numbers, T text positions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intaglio.data import order
from intaglio.data.batches import fixed_batches
from intaglio.data.questions.corpus import normal, right, token_f1
from intaglio.data.questions.prepare import Questioned
from intaglio.data.tokenizer import PAD
from intaglio.health.instruments import bottleneck
from intaglio.health.trials import exchanged
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.history.reading import Evaluation, ratio, share
from intaglio.models.nulls import answers_by_kind
from intaglio.models.vqa import VqaModel
from intaglio.nn.bottleneck import Latents
from intaglio.objectives.gaussian import kl_to_standard
from intaglio.objectives.text import token_nats

MOST = 4096
"""Questions of a side that are measured; of training ones a quarter."""

SAMPLES = 8
"""Draws of the latents of a question, to see how far its answer spreads."""


@dataclass(frozen=True)
class Held:
    """Questions with their latents: ``items`` (N,), sorted by image, q(z) of each, and what is asked of which image."""

    items: np.ndarray
    q: Latents
    places: list[Tensor]
    which: list[Tensor]
    questions: list[Tensor]
    answers: list[Tensor]


@torch.no_grad()
def hold(model: VqaModel, prepared: Questioned, items: np.ndarray, size: int = 512) -> Held:
    """Reads questions image after image, so that each image is encoded once in a batch."""
    data = prepared.data
    items = items[np.argsort(data.image[items], kind="stable")]
    held = Held(items, Latents(torch.empty(0), None), [], [], [], [])
    means, spreads = [], []
    for batch in fixed_batches(data, items, size):
        places = model.see(batch.images.to(model.device))
        which, questions = batch.which.to(model.device), batch.questions.to(model.device)
        q = model.network.latents(places, which, questions)
        means.append(q.mean)
        spreads += [] if q.log_variance is None else [q.log_variance]
        held.places.append(places)
        held.which.append(which)
        held.questions.append(questions)
        held.answers.append(batch.answers.to(model.device))
    q = Latents(torch.cat(means), torch.cat(spreads) if spreads else None)
    return Held(items, q, held.places, held.which, held.questions, held.answers)


def evaluate(model: VqaModel, prepared: Questioned, seed: int = 0) -> Evaluation:
    """Everything on this page; ``train/…`` is the same quantity of training questions."""
    model.eval()
    train, val = prepared.some("train", MOST // 4), prepared.some("val", MOST)
    held = hold(model, prepared, val)
    given = written(model, held.q.mean)
    found: dict[str, Measured] = dict(accuracies(prepared, held.items, given))
    known = hold(model, prepared, train)
    hits = _right(prepared, known.items, written(model, known.q.mean))
    found["train/answer/accuracy"] = share(int(hits.sum()), len(hits))
    found |= texts(prepared, held.items, given)
    found |= chosen(model, prepared, held)
    found |= interventions(model, prepared, held, given, seed)
    found |= rate(model, prepared, held)
    return Evaluation.of(found)


@torch.no_grad()
def written(model: VqaModel, z_NKZ: Tensor) -> list[str]:
    """The answers to latents, written freely, the likeliest token each time."""
    return [answer for z in z_NKZ.split(1024) for answer in model.answers(z).answers]


def _right(prepared: Questioned, items: np.ndarray, given: Sequence[str]) -> np.ndarray:
    return np.array([right(a, prepared.corpus.asked[i]) for a, i in zip(given, items, strict=True)])


# How often is it right?


def accuracies(prepared: Questioned, items: np.ndarray, given: Sequence[str]) -> dict[str, Measured]:
    """Answers that are exactly right, of all questions and of each kind.

    The null of all is what the question alone gives away (``question_only``): the commonest answer to these very words
    in training, or else to their kind. The null of a kind is its commonest answer.
    """
    hits, train = _right(prepared, items, given), prepared.splits["train"]
    blind = question_only(prepared, items)
    kinds = prepared.kinds_of(items)
    of_kind = answers_by_kind(prepared.kinds_of(train), prepared.answers_of(train), kinds, prepared.answers_of(items))
    found: dict[str, Measured] = {
        "val/answer/accuracy": share(int(hits.sum()), len(hits), float(blind.mean())),
        "val/answer/question_only": share(int(blind.sum()), len(blind), of_kind.accuracy),
    }
    commonest = {
        kind: Counter(a for a, k in zip(prepared.answers_of(train), prepared.kinds_of(train), strict=True) if k == kind)
        for kind in set(kinds)
    }
    for kind in sorted(set(kinds)):
        at = [k for k, name in enumerate(kinds) if name == kind]
        truths = prepared.answers_of(items[at])
        best = commonest[kind].most_common(1)
        null = float(np.mean([t == best[0][0] for t in truths])) if best else 0.0
        found[f"val/answer.{kind.replace(' ', '_')}/accuracy"] = share(int(hits[at].sum()), len(at), null)
    return found


def question_only(prepared: Questioned, items: np.ndarray) -> np.ndarray:
    """Whether the best that can be said without an image is right, (N,)."""
    by_words: dict[str, Counter[str]] = {}
    by_kind: dict[str, Counter[str]] = {}
    for i in prepared.splits["train"]:
        a = prepared.corpus.asked[i]
        for table, key in ((by_words, normal(a.question)), (by_kind, a.kind)):
            table.setdefault(key, Counter())[normal(a.answers[0])] += 1
    found = []
    for i in items:
        a = prepared.corpus.asked[i]
        counts = by_words.get(normal(a.question)) or by_kind.get(a.kind) or Counter({"": 1})
        found.append(right(counts.most_common(1)[0][0], a))
    return np.array(found)


def texts(prepared: Questioned, items: np.ndarray, given: Sequence[str]) -> dict[str, Measured]:
    """What is right of an answer that is not all right, best over its truths: F1 of words, ROUGE-L."""
    truths = [prepared.corpus.asked[i].answers for i in items]
    scores = {
        "token_f1": [max(token_f1(a, t) for t in several) for a, several in zip(given, truths, strict=True)],
        "rouge_l": [max(rouge_l(a, t) for t in several) for a, several in zip(given, truths, strict=True)],
    }
    return {f"val/answer/{name}": ratio(np.array(s, float), np.ones(len(s))) for name, s in scores.items()}


def rouge_l(given: str, truth: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3.1, β = 1)."""
    a, b = normal(given).split(), normal(truth).split()
    longest = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for k, other in enumerate(b, 1):
            before, longest[k] = longest[k], before + 1 if word == other else max(longest[k], longest[k - 1])
    return 2 * longest[-1] / (len(a) + len(b)) if a and b else 0.0


@torch.no_grad()
def chosen(model: VqaModel, prepared: Questioned, held: Held) -> dict[str, Measured]:
    """Answers among those known from training, each with all its tokens; and the free answer with the true tokens
    before each of its own."""
    if len(model.known) < 2:
        return {"val/answer/closed_accuracy": NotMeasured("training questions have one answer only")}
    best = torch.cat([model.known_nats(z).argmin(1) for z in held.q.mean.split(256)])
    hits = _right(prepared, held.items, [model.known[k] for k in best.tolist()])
    forced, begin = [], 0
    for answers in held.answers:
        z = held.q.mean[begin : begin + len(answers)]
        begin += len(answers)
        wrong = (model.network.logits(z, answers[:, :-1]).argmax(-1) != answers[:, 1:]) & (answers[:, 1:] != PAD)
        forced.append(~wrong.any(1))
    found = torch.cat(forced)
    return {
        "val/answer/closed_accuracy": share(int(hits.sum()), len(hits), 1 / len(model.known)),
        "val/answer/accuracy_forced": share(int(found.sum()), len(found)),
    }


# Does it need its latents, the image, the question?


@torch.no_grad()
def interventions(
    model: VqaModel, prepared: Questioned, held: Held, given: Sequence[str], seed: int
) -> dict[str, Measured]:
    """What share of the answers is lost, paired by question; null 0: latents exchanged, one of them left out (the mean
    in its place), another image, another question. What is right with one latent alone, beside none. And how often
    draws of z agree with their mean."""
    own, mean = _right(prepared, held.items, given).astype(float), held.q.mean
    if len(own) < 2:
        return {"val/answer/shuffled_latent_drop": NotMeasured("it takes two held-out questions")}

    def drop(z: Tensor) -> Reading:
        return ratio(own - _right(prepared, held.items, written(model, z)), np.ones(len(own)), 0.0)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    prior = None if held.q.log_variance is None else noise.flatten(1)
    found: dict[str, Measured] = {
        f"val/answer/{name}_latent_drop": drop(z.view_as(mean)) for name, z in exchanged(mean.flatten(1), prior).items()
    }
    none = float(_right(prepared, held.items, written(model, mean.mean(0, keepdim=True).expand_as(mean))).mean())
    for k in range(mean.shape[1]):
        without = mean.clone()
        without[:, k] = mean[:, k].mean(0)
        found[f"val/latent.{k}/drop"] = drop(without)
        alone = mean.mean(0, keepdim=True).repeat(len(mean), 1, 1)
        alone[:, k] = mean[:, k]
        hits = _right(prepared, held.items, written(model, alone))
        found[f"val/latent.{k}/alone"] = share(int(hits.sum()), len(hits), none)
    mixed = order.permutation(len(mean), 0, 2)
    other = np.empty_like(mixed)
    other[mixed] = np.roll(mixed, 1)
    for name in ("image", "question"):
        found[f"val/answer/shuffled_{name}_drop"] = drop(_swapped(model, prepared, held.items, other, name))
    if held.q.log_variance is not None:
        agree = np.zeros(len(own))
        for _ in range(SAMPLES):
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            drawn = written(model, model.draw(held.q, noise, 1.0))
            agree += [a == b for a, b in zip(drawn, given, strict=True)]
        found["val/answer/agreement"] = ratio(agree, np.full(len(own), float(SAMPLES)))
    return found


def _swapped(model: VqaModel, prepared: Questioned, items: np.ndarray, other: np.ndarray, what: str) -> Tensor:
    """Means of q(z) where the image, or the question, is that of another item."""
    data, parts = prepared.data, []
    for begin in range(0, len(items), 512):
        mine, theirs = items[begin : begin + 512], items[other[begin : begin + 512]]
        batch = data.batch(theirs if what == "image" else mine, np.zeros(len(mine), np.int64))
        asked = data.batch(mine if what == "image" else theirs, np.zeros(len(mine), np.int64))
        places = model.see(batch.images.to(model.device))
        parts.append(model.network.latents(places, batch.which.to(model.device), asked.questions.to(model.device)).mean)
    return torch.cat(parts)


# How much passes?


@torch.no_grad()
def rate(model: VqaModel, prepared: Questioned, held: Held) -> dict[str, Measured]:
    """KL(q(z) ‖ N(0, I)) of a question in nats, beside the entropy of the answers; and the answer's own nats."""
    truths = prepared.answers_of(held.items)
    entropy = bottleneck.entropy_nats(torch.from_numpy(np.unique(truths, return_inverse=True)[1]))
    found: dict[str, Measured] = {"val/answer/entropy": entropy}
    nats, begin = [], 0
    for answers in held.answers:
        logits = model.network.logits(held.q.mean[begin : begin + len(answers)], answers[:, :-1])
        begin += len(answers)
        nats.append(token_nats(logits, answers[:, 1:], PAD).sum(1))
    cost = torch.cat(nats).double().cpu().numpy()
    train = prepared.splits["train"]
    null = answers_by_kind(prepared.kinds_of(train), prepared.answers_of(train), prepared.kinds_of(held.items), truths)
    found["val/answer/nats"] = ratio(cost, np.ones(len(cost)), null.nats)
    if held.q.log_variance is None:
        found["val/latent/kl_nats"] = NotMeasured("the latents are no distribution (model.bottleneck)")
        return found
    kl = kl_to_standard(held.q.mean, held.q.log_variance).sum(1).double().cpu().numpy()
    found["val/latent/kl_nats"] = ratio(kl, np.ones(len(kl)), 0.0)
    if isinstance(entropy, Reading) and entropy.value > 0:
        found["val/latent/rate_over_entropy"] = ratio(kl / entropy.value, np.ones(len(kl)))
    return found
