"""After the last step: the prior, the saved model, the numbers beside their nulls, the findings, the page."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.config import MultimodalConfig
from intaglio.data.cache import cache_folder
from intaglio.data.prepare import Prepared
from intaglio.health.diagnosis import diagnose, load_profile, record_of, write_findings
from intaglio.history import HistoryWriter, Reading, read_history, to_parquet
from intaglio.history.run_folder import RunFolder, write_atomically
from intaglio.models.classifier import Judge, judge
from intaglio.models.multimodal import MultimodalModel
from intaglio.reports.page import write_page
from intaglio.reports.proofs import make_proofs
from intaglio.reports.summary import summary_lines
from intaglio.systems import prior
from intaglio.systems.multimodal_evaluation import Evaluation, evaluate


def finish(
    folder: RunFolder, model: MultimodalModel, prepared: Prepared, step: int, say: Callable[[str], None]
) -> None:
    """Fits the prior, saves the model, measures, judges, proves and writes the page.

    ``step`` is the one that the model's weights are of: what is measured belongs to it.
    """
    model.eval()
    say("fitting the prior to the latents of the training items")
    begun = time.monotonic()
    config = folder.config()
    assert isinstance(config, MultimodalConfig)
    prior.fit(model, prepared, config.prior, config.seed, config.train.precision == "bf16", say)
    folder.update(train_seconds=round(folder.record["train_seconds"] + time.monotonic() - begun, 1))
    save_model(folder, model)
    folder.update(model_step=step)
    say("measuring on held-out items")
    evaluation = measure(model, prepared, folder)
    written = read_history(folder.metrics)
    written = written.filter(written["step"] == step)
    logged = written.filter(written["name"] == "val/caption/token_accuracy")["value"]
    readings = dict(evaluation.readings)
    if len(logged):
        readings["val/caption/accuracy_as_logged"] = Reading(float(logged[-1]))
    new = {name: r for name, r in readings.items() if name not in set(written["name"])}
    with HistoryWriter(folder.metrics) as history:
        history.write(step, float(written["epoch"][-1]), new)
    make_proofs(model, prepared, folder.proofs(step))
    to_parquet(folder.metrics)
    conclude(folder, evaluation, step, say)


def measure(model: MultimodalModel, prepared: Prepared, folder: RunFolder) -> Evaluation:
    """The system's quantities on held-out items, with an independent judge where the items have labels."""
    return evaluate(model, prepared, independent_judge(prepared, cache_folder(folder.config().data.cache)))


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


def save_model(folder: RunFolder, model: MultimodalModel) -> None:
    """Writes ``model/`` so that it is whole or absent."""
    part = folder.path / ".model.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    shutil.rmtree(folder.model, ignore_errors=True)
    part.rename(folder.model)


def write_json(folder: RunFolder, name: str, content: Any) -> None:
    """One JSON file of the run folder, atomically."""
    write_atomically(folder.path / name, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
