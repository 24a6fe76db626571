"""Rows of ``intaglio bench speed`` about questions: images encoded once, decoding with a cache, many answers, waiting.

The networks are those of ``vqa-small`` with fresh weights; a token that ends an answer is forbidden, so that every
answer is as long as one can be.
"""

import csv
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from intaglio import answering
from intaglio.bench import Result
from intaglio.bench.process import process
from intaglio.bench.speed_diffusion import Arm, alternated, ratio
from intaglio.config import VqaConfig, load, to_dict
from intaglio.data.questions.corpus import Asked, QuestionCorpus
from intaglio.data.questions.prepare import about_engravings
from intaglio.data.tokenizer import END, CaptionTokenizer
from intaglio.history import read_history
from intaglio.models.vqa import VqaModel
from intaglio.nn.transformer import CachedDecoding
from intaglio.nn.vision import VisionEncoder
from intaglio.training.run import train

IMAGES, QUESTIONS = 4_000, 38_575
"""Of easy-VQA's training side."""

BATCH = 128
"""Images that 1,000 questions are about."""

STEPS, WARM = 60, 20


def measure_questions() -> tuple[list[Result], dict[str, Any]]:
    """Results, and the figures that they come from."""
    model = fresh()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder / "model")
        some = write_questions(folder / "some", BATCH, 1000)
        with encoded() as counts:
            answering.answer_table(folder / "model", some, {})
        many = write_questions(folder / "many", IMAGES, QUESTIONS)
        cost = process("answer", str(folder / "model"), "--table", str(many), "--out", str(folder / "answers.csv"))
        waited = _waited(folder)
    once, anew = alternated(_asked(model, BATCH, 1000))
    cached, recomputed = alternated(_decoded(model, 256))
    results = [
        Result(
            f"images encoded for 1,000 questions about {BATCH}, over {BATCH}", 1.0, sum(counts) / BATCH, better="lower"
        ),
        ratio(f"1,000 questions about {BATCH} images, encoded once over for each question", 1.0, anew, once),
        ratio(f"decoding of {model.lengths[1]} tokens, cached over recomputed, 256 answers", 1.0, recomputed, cached),
        Result(
            f"minutes to answer {QUESTIONS:,} questions about {IMAGES:,} images", 3.0, cost.seconds / 60, better="lower"
        ),
        Result("share of training on questions that waits for data", 0.05, max(waited), better="lower", n=len(waited)),
    ]
    facts = {
        "images_encoded": counts,
        "seconds_of_1000_questions": {"each_image_once": once, "one_for_each_question": anew},
        "seconds_of_decoding": {"cached": cached, "recomputed": recomputed},
        "answering_peak_bytes": cost.peak,
        "wait_shares": waited,
    }
    return results, facts


def fresh(*words: str) -> VqaModel:
    """``vqa-small`` with fresh weights and the tokenizer of the built-in questions; it never ends an answer."""
    config = load("vqa-small", words)
    assert isinstance(config, VqaConfig)
    asked = about_engravings(200, 0).asked
    tokenizer = CaptionTokenizer.train((t for a in asked for t in (a.question, *a.answers)), config.model.vocabulary)
    data = config.data
    torch.manual_seed(0)
    sizes = (data.image_size, (data.question_length, data.answer_length), len(tokenizer))
    model = VqaModel(to_dict(config)["model"], *sizes)
    model.tokenizer, model.known = tokenizer, tuple(dict.fromkeys(answer for a in asked for answer in a.answers))
    nn.init.constant_(model.network.answer.bias[END], -1e4)
    return model.eval()


def write_questions(folder: Path, images: int, questions: int) -> Path:
    """Images of 64 pixels, and a table of so many questions about them, evenly spread and in mixed order; its path."""
    folder.mkdir()
    corpus, kept = _some(images, questions)
    for i in range(images):
        Image.fromarray(corpus.images.image(i, 64)).save(folder / f"{i}.png")
    with (folder / "questions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "question"))
        table.writerows((asked.image, asked.question) for asked in kept)
    return folder / "questions.csv"


def _some(images: int, questions: int) -> tuple[QuestionCorpus, list[Asked]]:
    """Built-in images, and so many of the questions about them, evenly spread and in mixed order."""
    corpus = about_engravings(images, 0)
    image = np.array([a.image for a in corpus.asked])
    place = np.arange(len(image)) - np.searchsorted(image, image)  # of a question among those about its image
    kept = np.lexsort((image, place))[:questions]
    assert len(kept) == questions
    return corpus, [corpus.asked[k] for k in np.random.default_rng(0).permutation(kept)]


@contextmanager
def encoded() -> Iterator[list[int]]:
    """Inside, each pass of a vision encoder adds the images that it saw."""
    counts: list[int] = []

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if isinstance(module, VisionEncoder):
            counts.append(len(given[0]))

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def _asked(model: VqaModel, images: int, questions: int) -> list[Arm]:
    """Answers to questions about a batch of images: each encoded once, or as often as it is asked about."""
    corpus, asked = _some(images, questions)
    pixels = np.stack([corpus.images.image(i, model.image_size) for i in range(images)])
    which, texts = np.array([a.image for a in asked]), [a.question for a in asked]
    return [
        lambda: model.answers(model.latents(pixels, which, texts).mean),
        lambda: model.answers(model.latents(pixels[which], np.arange(questions), texts).mean),
    ]


@torch.inference_mode()
def _decoded(model: VqaModel, answers: int) -> list[Arm]:
    """Logits of every token after the one before it: with a cache, and over all tokens so far."""
    network, length = model.network, model.lengths[1]
    memory = network.bottleneck.memory(torch.randn(answers, model.config.latents, network.bottleneck.numbers))
    ids = torch.randint(4, network.answer.bias.numel(), (answers, length))

    @torch.inference_mode()
    def cached() -> None:
        stepper = CachedDecoding(network.answer, memory)
        for t in range(length):
            stepper.step(ids[:, t : t + 1], t)

    @torch.inference_mode()
    def recomputed() -> None:
        for t in range(length):
            network.answer(ids[:, : t + 1], memory)[:, -1]

    return [cached, recomputed]


def _waited(scratch: Path) -> list[float]:
    """Shares of the time in which a training of ``vqa-small`` waited for batches, after ``WARM`` steps."""
    words = [f"--runs={scratch}", "--data.items=600", f"--train.steps={STEPS}", f"--train.log_every={WARM}"]
    folder = train("vqa-small", [*words, "--train.validate_every=100000"], quiet=True)
    assert folder is not None
    table = read_history(folder.metrics)
    later = table.filter((table["step"] > WARM) & (table["name"] == "train/speed/wait_share"))
    return later["value"].to_list()
