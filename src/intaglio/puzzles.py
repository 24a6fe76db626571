"""What a trained JEPA does with tasks of grids: the parts of ``intaglio encode``, ``search`` and ``export``.

Shapes: N tasks, R numbers of a rule, K codes of D numbers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from intaglio.api import load_model, open_again
from intaglio.data import order
from intaglio.data.arc.read import read_tasks
from intaglio.data.arc.table import Tasks
from intaglio.data.arc.tasks import TaskCorpus
from intaglio.data.vectors import VectorFile
from intaglio.files import new_folder
from intaglio.history import run_folder
from intaglio.models.jepa import JepaModel
from intaglio.nn.codebook import Codebook
from intaglio.reports.proofs import jepa as proofs
from intaglio.systems.jepa_evaluation import Read, read_items

BATCH = 64


def encode(run: str | Path, sources: Sequence[str | Path], out: Path) -> tuple[int, int]:
    """The rule of each task of files and folders, (N, R), into a ``.safetensors`` or ``.parquet``, and beside it, in
    ``….codes.jsonl``, the codes of each task's grids: N and R. Tests need no answer."""
    model = _jepa(run, "encode tasks")
    with VectorFile(out, model.rule_width) as file, out.with_suffix(".codes.jsonl").open("w", encoding="utf-8") as told:
        for corpus in (read_tasks(source, answered=False) for source in sources):
            for read, batch_codes in _read_in_parts(model, corpus):
                names = [corpus.names[i] for i in read.items]
                file.append(names, read.rule.cpu().numpy())
                for name, codes in zip(names, batch_codes, strict=True):
                    told.write(json.dumps({"task": name, "codes": codes}) + "\n")
    return file.rows, model.rule_width


def _read_in_parts(model: JepaModel, corpus: TaskCorpus) -> Any:
    data = Tasks(corpus, model.pairs)
    for at in range(0, len(corpus), BATCH):
        items = np.arange(at, min(at + BATCH, len(corpus)))
        batch = data.batch(items, order.draws(items, seed=0))
        codes = model.read(batch.grids, batch.real).codes.flatten(2).tolist()
        real = batch.real.tolist()
        told = [[c for c, there in zip(pairs, r, strict=True) if there] for pairs, r in zip(codes, real, strict=True)]
        yield read_items(model, data, items), told


def search(
    run: str | Path, task: str, source: str | Path | None, top: int, out: str | Path | None
) -> list[dict[str, Any]]:
    """The tasks of ``source`` (by default the run's held-out ones) whose rule is most like that of ``task``, a JSON
    file or the name of one of them; with ``out``, also as a picture.

    Raises:
        ValueError: there is no such task.
    """
    model = _jepa(run, "search for tasks")
    if source is not None:
        corpus = read_tasks(source, answered=False)
        items = np.arange(len(corpus))
    else:
        prepared = open_again(run_folder.find(run))[2]
        corpus, items = prepared.corpus, np.unique(prepared.splits["val"])
    if Path(task).is_file():
        asked = read_tasks(task, answered=False)
        corpus, items = corpus.joined(asked), np.append(items, len(corpus))
        at = len(items) - 1
    else:
        named = [k for k, i in enumerate(items) if corpus.names[i] == task]
        if not named:
            some = ", ".join(corpus.names[i] for i in items[:3])
            raise ValueError(f"There is no task {task!r} here, and no such file; there are {some}, …")
        at = named[0]
    read = read_items(model, Tasks(corpus, model.pairs), items)
    rule = F.normalize(read.rule - read.rule.mean(0), dim=1)
    similarity = rule @ rule[at]
    similarity[at] = -torch.inf
    best = similarity.argsort(descending=True)[:top].tolist()
    if out is not None:
        proofs.nearest(corpus, read, at, best, similarity).save(Path(out))
    return [{"task": corpus.names[read.items[k]], "similarity": round(float(similarity[k]), 4)} for k in best]


def export(run: str | Path, out: str | Path) -> dict[str, Any]:
    """``codebook.safetensors`` (K, D), ``codes.json`` with each code's use, and pictures of what the codes stand for.

    Raises:
        ValueError: the model has no codes, or the folder is not empty.
    """
    model = _jepa(run, "export codes")
    if not model.network.coded or model.network.quantiser is None:
        raise ValueError("This model has no codes: train with --model.quantiser vq or fsq.")
    prepared, out = open_again(run_folder.find(run))[2], new_folder(out)
    book = model.network.quantiser
    vectors = book.vectors if isinstance(book, Codebook) else book.fsq.vectors
    save_file({"codes": vectors.detach().cpu().float().contiguous()}, out / "codebook.safetensors")
    read: Read = read_items(model, prepared.data, np.unique(prepared.splits["val"])[:1024])
    counts = np.bincount(read.codes.cpu().numpy(), minlength=len(vectors))
    used, pages = int((counts > 0).sum()), []
    for page, at in enumerate(range(0, used, proofs.CODES)):
        pages.append(f"codes-{page:02d}.png")
        proofs.codes(model, prepared, read, slice(at, at + proofs.CODES)).save(out / pages[-1])
    told = {"codes": len(vectors), "used": used, "slots": int(counts.sum()), "counts": counts.tolist()}
    (out / "codes.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    return told | {"pictures": pages}


def _jepa(run: str | Path, verb: str) -> JepaModel:
    model = load_model(run)
    if not isinstance(model, JepaModel):
        raise ValueError(f"{run} is no JEPA, and cannot {verb}.")
    return model
