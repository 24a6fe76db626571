"""From a configuration to questions ready to be batched: images, tokenizer, split, and a record of what was lost."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from intaglio.config import QuestionDataConfig
from intaglio.data.cache import cache_folder, image_table
from intaglio.data.corpus import Corpus, Intake, Progress
from intaglio.data.engravings import Engravings
from intaglio.data.folder import ImageFolder
from intaglio.data.prepare import Prepared, fingerprint, seen_images
from intaglio.data.questions.corpus import Asked, QuestionCorpus, normal
from intaglio.data.questions.read import read_questions
from intaglio.data.questions.table import Questions
from intaglio.data.splits import split
from intaglio.data.tokenizer import CaptionTokenizer, Encoded

BUILT_IN_IMAGES = 6_000


class Reader(Protocol):
    """Texts to ids of somebody else's, 0 where there is none."""

    def encode(self, texts: Sequence[str], length: int) -> Encoded:
        """Ids (N, L), cut to ``length``."""

    def fingerprint(self) -> str:
        """Hex digest of all that the ids depend on."""


@dataclass(frozen=True)
class Questioned(Prepared):
    """Questions about images, encoded."""

    corpus: QuestionCorpus
    data: Questions
    tokenizer: CaptionTokenizer
    lengths: tuple[int, int]

    def answers_of(self, items: np.ndarray) -> list[str]:
        """The first answer of each item, as answers are compared."""
        return [normal(self.corpus.asked[i].answers[0]) for i in items]

    def kinds_of(self, items: np.ndarray) -> list[str]:
        """The kind of each question."""
        return [self.corpus.asked[i].kind for i in items]


def open_questions(config: QuestionDataConfig, seed: int, progress: Progress | None = None) -> QuestionCorpus:
    """The questions that the configuration names.

    Raises:
        ValueError: the source is neither ``engravings`` nor a folder with a table of questions.
    """
    if config.source == "engravings":
        return about_engravings(config.items or BUILT_IN_IMAGES, seed)
    return read_questions(
        config.source,
        config.image_size,
        table=config.metadata,
        columns=config.columns,
        bad_limit=config.bad_limit,
        cache=cache_folder(config.cache),
        progress=progress,
    )


def about_engravings(images: int, seed: int) -> QuestionCorpus:
    """Everything that is asked about so many built-in engravings, in which every answer is known."""
    corpus = Engravings(images, seed=seed)
    asked = {
        (i, q.question): Asked(i, q.question, (q.answer,), q.kind) for i in range(images) for q in corpus.questions(i)
    }
    return QuestionCorpus(corpus, list(asked.values()), Intake())


def split_questions(corpus: QuestionCorpus, held_out: float, seed: int) -> tuple[dict[str, np.ndarray], int]:
    """Questions of each side, by image; and how many images a random split of questions would have torn apart."""
    return split(corpus, {"train": 1 - held_out, "val": held_out}, seed)


def prepare_questions(
    config: QuestionDataConfig,
    seed: int,
    vocabulary: int,
    tokenizer: CaptionTokenizer | None = None,
    lengths: tuple[int, int] | None = None,
    progress: Progress | None = None,
    reader: Reader | None = None,
) -> Questioned:
    """Reads, splits and encodes. A run that goes on gives its own ``tokenizer`` and ``lengths``.

    Questions are those of the ``reader`` where there is one; the tokenizer is then of the answers alone.
    """
    corpus = open_questions(config, seed, progress)
    sides, torn = split_questions(corpus, config.held_out, seed)
    asked = corpus.asked
    learnt = [asked[i] for i in sides["train"]]
    if tokenizer is None:
        tokenizer = CaptionTokenizer.train(
            (t for a in learnt for t in (a.question, *a.answers)[bool(reader) :]), vocabulary
        )
    most = lengths or (config.question_length, config.answer_length)
    questions = (reader or tokenizer).encode([a.question for a in asked], most[0])
    answers = tokenizer.encode([answer for a in asked for answer in a.answers], most[1])
    first = np.concatenate([[0], np.cumsum([len(a.answers) for a in asked])])
    images, image = _pixels(corpus.images, config, progress), np.array([a.image for a in asked])
    data = Questions(images, image, questions.ids, answers.ids, first, config.together)
    known = {normal(answer) for a in learnt for answer in a.answers}
    record: dict[str, Any] = {
        "source": config.source,
        "items": {side: len(items) for side, items in sides.items()},
        "images": {side: len(np.unique(image[items])) for side, items in sides.items()},
        "kinds": dict(Counter(a.kind for a in asked)),
        "intake": corpus.intake.as_dict(),
        "near-duplicate groups kept on one side": torn,
        "training items declared as test": sum(corpus.declared_split(int(i)) == "test" for i in sides["train"]),
        "vocabulary": len(tokenizer),
        "questions cut": questions.truncated,
        "answers cut": answers.truncated,
        "unknown pieces": {"questions": questions.unknown, "answers": answers.unknown},
        "held-out images seen in training": seen_images(
            images, np.unique(image[sides["train"]]), np.unique(image[sides["val"]])
        ),
        "different answers": len(known),
    }
    held_out = [asked[i] for side in sides if side != "train" for i in sides[side]]
    record["warnings"] = [*_lost(questions, answers, most, reader is not None), *_beyond(held_out, known)]
    digest = fingerprint(corpus, sides, tokenizer.to_json() + (reader.fingerprint() if reader else ""))
    sizes = lengths or (questions.ids.shape[1], answers.ids.shape[1])
    return Questioned(corpus, data, sides, digest, record, tokenizer, sizes)


def _lost(questions: Encoded, answers: Encoded, most: tuple[int, int], foreign: bool) -> Iterator[str]:
    """What the encoding lost; ``foreign`` questions have a tokenizer that did not learn from them."""
    for name, texts, length in (("question", questions, most[0]), ("answer", answers, most[1])):
        if texts.truncated:
            yield f"{texts.truncated} of {len(texts.ids)} {name}s cut to {length} tokens; raise --data.{name}_length"
        if texts.unknown:
            why = (
                "are unknown to the tokenizer of model.question"
                if foreign and texts is questions
                else "never occur in training"
            )
            yield f"{texts.unknown} pieces of {name}s {why} and cannot be told apart"


def _beyond(held_out: Sequence[Asked], known: Collection[str]) -> Iterator[str]:
    """What training cannot teach."""
    if len(known) == 1:
        yield f"every training question has the answer {next(iter(known))!r}, which can be given without looking"
    strange = [a.answers[0] for a in held_out if not any(normal(answer) in known for answer in a.answers)]
    if strange:
        shown = ", ".join(map(repr, dict.fromkeys(strange[:3])))
        yield (
            f"{len(strange)} of {len(held_out)} held-out questions have an answer that no training question has "
            f"({shown}) and count as wrong unless the model spells it out"
        )


def _pixels(images: Corpus, config: QuestionDataConfig, progress: Progress | None) -> np.ndarray:
    if isinstance(images, ImageFolder):
        return images.pixels()
    return image_table(images, config.image_size, cache_folder(config.cache), progress)
