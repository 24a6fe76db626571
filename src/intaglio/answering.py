"""Answers of a trained model to questions about images: the parts of ``intaglio answer``.

Shapes: S image side.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intaglio.api import load_model
from intaglio.data.pixels import UnreadableImage, read_image
from intaglio.data.questions.read import Files, read_rows
from intaglio.models.explain import drawn_again, explain
from intaglio.models.vqa import VqaModel
from intaglio.nn.bottleneck import Latents

BATCH = 512


def answer(
    run: str | Path,
    image: str | Path,
    questions: Sequence[str],
    samples: int = 0,
    closed: bool = False,
    explained: str | Path | None = None,
) -> list[dict[str, Any]]:
    """The answer to each question about an image file, with its probability.

    The image is encoded once. ``samples`` draws the latents as often and tells how the answers spread; ``closed`` takes
    the likeliest of the answers that training had; ``explained`` is a PNG that shows which places of the image and
    which latents the answers rest on.

    Raises:
        ValueError: the run is of another system, the image cannot be read, or a question is empty.
    """
    model = _vqa(run)
    try:
        pixels = read_image(str(image), model.image_size)[0]
    except UnreadableImage as error:
        raise ValueError(str(error)) from None
    if not questions:
        raise ValueError("There is no question: intaglio answer RUN IMAGE “what is the largest thing?”.")
    q = model.latents(pixels[None], np.zeros(len(questions), int), questions)
    told = [{"question": question, **found} for question, found in zip(questions, _told(model, q, closed), strict=True)]
    for k, row in enumerate(told):
        lost, unknown = model.cut(questions[k])
        notes = [f"{lost} tokens of the question were cut off"] if lost else []
        notes += [f"{unknown} pieces of the question are unknown to the model's tokenizer"] if unknown else []
        row |= {"note": "; ".join(notes)} if notes else {}
        if samples:
            one = Latents(q.mean[k : k + 1], None if q.log_variance is None else q.log_variance[k : k + 1])
            row["spread"] = dict(drawn_again(model, one, samples, seed=0))
    if explained is not None:
        from intaglio.reports.proofs.vqa import drawn

        found = [(pixels, explain(model, pixels, question, max(16, samples))) for question in questions]
        for row, (_, e) in zip(told, found, strict=True):
            row |= {name: np.round(getattr(e, name), 4).tolist() for name in ("places", "latents", "alone")}
        drawn(found).save(Path(explained))
    return told


def answer_table(
    run: str | Path, table: str | Path, columns: Mapping[str, str], closed: bool = False
) -> list[dict[str, Any]]:
    """The answer to each row of a table of questions, whose images lie beside or below it; rows need no answers.

    A row that cannot be used has ``skipped``, the reason, in the place of an answer. Each image is read once and
    encoded once, in whatever order it is asked about.
    """
    model, path = _vqa(run), Path(table)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a table of questions, such as questions.csv.")
    files, about = Files(path.parent.resolve(), path.parent.resolve()), defaultdict[str, list[int]](list)
    rows = list(read_rows(path, columns, answered=False))
    told: list[dict[str, Any]] = [{"image": row.image, "question": row.question} for row in rows]
    for k, row in enumerate(rows):
        file = files.find(row.image)
        if file is None or not row.question:
            told[k]["skipped"] = files.why_not(row.image) if file is None else "row without question"
        else:
            about[file].append(k)
    for some in _together(about):
        pixels, asked, which = list[np.ndarray](), list[int](), list[int]()
        for file in some:
            try:
                pixels.append(read_image(str(path.parent / file), model.image_size)[0])
            except UnreadableImage as error:
                for k in about[file]:
                    told[k]["skipped"] = str(error)
                continue
            asked += about[file]
            which += [len(pixels) - 1] * len(about[file])
        if asked:
            found = _answers(model, np.stack(pixels), which, [rows[k].question for k in asked], closed)
            for k, row_found in zip(asked, found, strict=True):
                told[k] |= row_found
    return told


def _together(about: Mapping[str, Sequence[int]]) -> Iterator[list[str]]:
    """Images with ``BATCH`` questions or more together, the last ones with fewer."""
    some, count = list[str](), 0
    for file, asked in about.items():
        some.append(file)
        count += len(asked)
        if count >= BATCH:
            yield some
            some, count = [], 0
    if some:
        yield some


@torch.inference_mode()
def _answers(
    model: VqaModel, images: np.ndarray, which: Sequence[int], questions: Sequence[str], closed: bool
) -> list[dict[str, Any]]:
    """Images are encoded once, and asked ``BATCH`` questions at a time."""
    places, ids = model.places(images), model.question_ids(questions)
    parts = zip(torch.tensor(which, device=model.device).split(BATCH), ids.split(BATCH), strict=True)
    return [row for w, some in parts for row in _told(model, model.network.latents(places, w, some), closed)]


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image", "question", "answer", "probability", "skipped"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@torch.inference_mode()
def _told(model: VqaModel, q: Latents, closed: bool) -> list[dict[str, Any]]:
    """Answer and probability of each."""
    if not closed:
        made = model.answers(q.mean)
        return [
            {"answer": a, "probability": float(f"{p:.4g}")} | ({} if done else {"unfinished": True})
            for a, p, done in zip(made.answers, made.probability.tolist(), made.finished.tolist(), strict=True)
        ]
    shares, best = model.among_known(q.mean).max(1)
    return [
        {"answer": model.known[k], "probability": float(f"{p:.4g}")}
        for k, p in zip(best.tolist(), shares.tolist(), strict=True)
    ]


def _vqa(run: str | Path) -> VqaModel:
    model = load_model(run)
    if not isinstance(model, VqaModel):
        raise ValueError(f"{run} is no model for questions, and cannot answer; train vqa-small for that.")
    return model
