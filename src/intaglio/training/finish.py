"""After the last step: what is fitted last, the saved model, the numbers beside their nulls, the findings, the page."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.data.batches import CaptionedImages, Pictures
from intaglio.data.cache import cache_folder
from intaglio.data.prepare import Prepared
from intaglio.health.diagnosis import diagnose, load_profile, record_of, write_findings
from intaglio.health.record import Record
from intaglio.history import HistoryWriter, Reading, read_history, to_parquet
from intaglio.history.reading import Evaluation
from intaglio.history.run_folder import RunFolder, write_atomically
from intaglio.models.classifier import Judge, judge
from intaglio.models.saved import Model
from intaglio.reports.page import write_page
from intaglio.reports.summary import summary_lines
from intaglio.training.kinds import Kind


def finish(
    kind: Kind, folder: RunFolder, model: Model, prepared: Prepared, step: int, say: Callable[[str], None]
) -> None:
    """Completes and saves the model, measures, judges, proves and writes the page.

    ``step`` is the one that the model's weights are of: what is measured belongs to it.
    """
    model.eval()
    begun = time.monotonic()
    kind.complete(model, prepared, say)
    folder.update(train_seconds=round(folder.record["train_seconds"] + time.monotonic() - begun, 1))
    save_model(folder, model)
    folder.update(model_step=step)
    say("measuring on held-out items")
    judged_by = independent_judge(prepared, cache_folder(kind.config.data.cache))
    evaluation = kind.evaluate(model, prepared, judged_by)
    written = read_history(folder.metrics)
    written = written.filter(written["step"] == step)
    logged = dict(zip(written["name"], written["value"], strict=True))
    readings = evaluation.readings | {
        ours: Reading(logged[theirs]) for theirs, ours in kind.kept.items() if theirs in logged
    }
    new = {name: r for name, r in readings.items() if name not in logged}
    with HistoryWriter(folder.metrics) as history:
        history.write(step, float(written["epoch"][-1]), new)
    kind.prove(model, prepared, folder.proofs(step), False, judged_by, measured_at(folder, step))
    to_parquet(folder.metrics)
    conclude(folder, evaluation, step, say)


def measure(kind: Kind, model: Model, prepared: Prepared) -> Evaluation:
    """The system's quantities on held-out items, with an independent judge where the items have labels."""
    return kind.evaluate(model, prepared, independent_judge(prepared, cache_folder(kind.config.data.cache)))


def measured_at(folder: RunFolder, step: int) -> Record:
    """What the history holds of one step, and of no other."""
    record = record_of(folder)
    then = {name: s.at(s.steps == step) for name, s in record.series.items()}
    return replace(record, series={name: s for name, s in then.items() if len(s)})


def conclude(folder: RunFolder, evaluation: Evaluation, step: int, say: Callable[[str], None]) -> None:
    """Writes ``evaluation.json``, ``findings.json`` and the page, and prints the summary."""
    readings = evaluation.readings
    limits = load_profile(folder.config().health.profile)
    record = replace(record_of(folder, readings, step), running=False)
    diagnosis = diagnose(record, limits, not_measured=evaluation.not_measured)
    seconds = folder.record.get("train_seconds")
    numbers = {name: asdict(r) for name, r in readings.items()}
    content = {"step": step, "seconds": seconds, "readings": numbers, "not_measured": evaluation.not_measured}
    write_json(folder, "evaluation.json", content)
    write_findings(folder, diagnosis)
    page = write_page(folder)
    for line in summary_lines(readings, diagnosis):
        say(line)
    say(f"page: {page}")


def independent_judge(prepared: Prepared, cache: Path) -> Judge | str:
    """A classifier of main objects, or the reason why the items do not allow one."""
    if not isinstance(prepared.data, CaptionedImages | Pictures):
        return "the items are no images"
    labels = {side: prepared.labels_of(prepared.splits[side]) for side in ("train", "val")}
    known = [x for x in labels["train"] if x is not None]
    if not known:
        return "the items have no labels, so no classifier can tell their objects apart"
    if len(known) < len(labels["train"]) or None in labels["val"]:
        return "some items have no label, so no classifier can be trained to judge"
    if len(set(known)) < 2 or min(np.unique(known, return_counts=True)[1]) < 10:
        return "a classifier to judge needs two classes or more, with ten training items each"
    train, val = prepared.splits["train"], prepared.splits["val"]
    return judge(prepared.data.images, train, known, val, [str(x) for x in labels["val"]], cache)


def save_model(folder: RunFolder, model: Model) -> None:
    """Writes ``model/`` so that it is whole or absent."""
    part = folder.path / ".model.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    shutil.rmtree(folder.model, ignore_errors=True)
    part.rename(folder.model)


def write_json(folder: RunFolder, name: str, content: Any) -> None:
    """One JSON file of the run folder, atomically."""
    write_atomically(folder.path / name, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
