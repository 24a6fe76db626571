"""What a run folder knows beyond its curves, as parts of its page: numbers beside nulls, proofs, data, use, setting."""

import base64
import io
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from intaglio.history import Reading
from intaglio.history.run_folder import RunFolder
from intaglio.reports.charts import bar
from intaglio.reports.parts import NOT_MEASURED, missing, pairs
from intaglio.reports.safe import html
from intaglio.reports.verdict import verdict
from intaglio.reports.words import beats_null, duration, interval, paired, quantity, written

COMMANDS = {
    "multimodal": {
        "Caption an image": "intaglio caption {run} image.png",
        "New images with captions": "intaglio generate {run} --seed 0",
        "An image from a text": "intaglio generate {run} --text 'a ship at the top left'",
        "From one image to another": "intaglio interpolate {run} a.png b.png --steps 7",
        "Search a folder of images": "intaglio search {run} --in images/ --text 'a ship'",
        "Latents of a folder": "intaglio encode {run} images/",
    }
}
IMAGE_LIMIT = 150_000
"""Bytes above which a picture is stored as WebP."""


@dataclass(frozen=True)
class Part:
    """One file of the run folder: its content, or why there is none."""

    content: Any
    missing: str = ""


def read_part(path: Path) -> Part:
    """A YAML or JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
        return Part(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text))
    except FileNotFoundError:
        return Part(None, f"{path.name} is not in the run folder")
    except (ValueError, yaml.YAMLError) as error:
        return Part(None, f"{path.name} cannot be read ({error})")


# the head


def sentence(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What was trained, on what, how long and where."""
    data, train = record.get("data") or {}, config.get("train") or {}
    items, reasons = data.get("items") or {}, record.get("machine_choice") or {}
    source = str(data.get("source", "unrecorded data"))
    named = "built-in engravings" if source == "engravings" else f"images of {Path(source).name}"
    steps, seconds = record.get("step") or train.get("steps"), record.get("train_seconds")
    machine = " in ".join(
        f"{train.get(key, f'unrecorded {key}')} ({reasons.get(key, 'reason not recorded')})"
        for key in ("device", "precision")
    )
    return (
        f"{str(record.get('system', 'unknown')).capitalize()} model, trained on {_count(items.get('train'))} {named} "
        f"({_count(items.get('val'))} held out) for {_count(steps)} optimizer steps in {duration(seconds)}, "
        f"on {machine}."
    )


def _count(number: object) -> str:
    return f"{number:,}" if isinstance(number, int) else "an unrecorded number of"


def unfinished(folder: RunFolder, record: Mapping[str, Any]) -> str:
    """Said at the top when the run did not reach its end. A run that measures its end still has the status running."""
    status = record.get("status", "unknown")
    if status == "finished" or (status == "running" and (folder.path / "evaluation.json").is_file()):
        return ""
    error = f" {record['error']}." if record.get("error") else ""
    return f'<p class="stop"><b>This run has not finished</b> (status: {html(status)}).{html(error)}</p>'


# the verdict


def verdicts(folder: RunFolder, record: Mapping[str, Any], own: Part) -> str:
    """This run's verdict and, where ``run.json`` names a twin (a run folder beside this one), that one's."""
    twin = record.get("twin")
    blocks = verdict(own.content or {}, own.missing, "This run" if twin else "", linked=True)
    if twin:
        other = read_part(folder.path.parent / Path(str(twin)).name / "findings.json")
        blocks += verdict(other.content or {}, other.missing, f"Its broken twin, {twin}")
    return f'<div class="verdicts">{blocks}</div>'


# the numbers


def numbers(part: Part) -> str:
    """Key numbers beside their nulls, of ``evaluation.json``."""
    if part.missing:
        return missing(part.missing)
    readings = {name: Reading(**row) for name, row in part.content["readings"].items()}
    rows = "".join(_number(name, *sides) for name, sides in paired(readings).items())
    heads = ("Quantity", "Training", "Held out", "Null", "Held out against null")
    head = "".join(f'<th scope="col" role="columnheader">{h}</th>' for h in heads)
    return (
        "<p>A null is what the number would be if nothing had been learnt from the images. In each bar it is the "
        "dashed upright line; the thin line is the 95 % interval. ✓ marks what beats its null with the whole interval. "
        f"– is what was not measured. Measured at step {_count(part.content['step'])}.</p>"
        f'<table class="numbers" role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{rows}</tbody></table>'
    )


def _number(name: str, train: Reading | None, val: Reading | None) -> str:
    what, shown = quantity(name), val or train
    assert shown is not None
    arrow = {1: "more is better", -1: "less is better", 0: ""}[what.better]
    unit = "" if what.unit == "%" else what.unit
    kind, mark = {True: ("good", "✓"), False: ("bad", "✗"), None: ("", "")}[beats_null(shown, what.better)]
    null = written(shown.null, what.unit) if shown.null is not None else "unknown"
    sample = ", ".join(filter(None, (interval(shown, what.unit), f"n {shown.n:,}" if shown.n else "")))
    cells = {
        "Training": ("value", written(train.value, what.unit) if train else NOT_MEASURED),
        "Held out": ("value", f"{written(val.value, what.unit)}<small>{sample}</small>" if val else NOT_MEASURED),
        "Null": ("", f"{null}<small>{html(what.null)}</small>"),
    }
    body = "".join(f'<td role="cell" class="{css}" data-head="{h}">{text}</td>' for h, (css, text) in cells.items())
    return (
        f'<tr role="row"><th scope="row" role="rowheader"><span class="mark {kind}" aria-hidden="true">{mark}</span> '
        f"{html(what.title)}<small>{', '.join(filter(None, (unit, arrow)))}</small></th>{body}"
        f'<td role="cell" class="drawn">{bar(shown, what.better, what.unit)}</td></tr>'
    )


# the proofs


def proofs(folder: RunFolder) -> str:
    """The latest pictures, with what they show in words."""
    steps = sorted(p for p in (folder.path / "proofs").glob("step-*") if any(p.glob("*.png")))
    if not steps:
        return missing("no pictures have been made yet; training makes them at each look at the held-out items")
    final = folder.proofs(folder.record.get("model_step", -1))
    last = final if final in steps else steps[-1]
    part = read_part(last / "proofs.json")
    told = part.content or {"pictures": {p.name: {} for p in sorted(last.glob("*.png"))}, "skipped": {}}
    figures = [picture(last / Path(name).name, words) for name, words in told["pictures"].items()]
    skipped = [missing(f"{name}, because {reason}", "Not made") for name, reason in told["skipped"].items()]
    step = int(last.name.removeprefix("step-"))
    made = f"<p>Made at step {step:,} with the weights of that step; the items are the same at every step.</p>"
    return made + (missing(part.missing) if part.missing else "") + "".join([*figures, *skipped])


def picture(path: Path, words: Mapping[str, Any]) -> str:
    """A PNG inside the page; ``words`` are its ``title``, what to ``look_for``, and what it shows as ``told`` lines."""
    title = str(words.get("title", path.stem))
    try:
        kind, content, (width, height) = _compressed(path)
    except (OSError, ValueError) as error:
        return missing(f"{path.name} cannot be read ({error})", "Not shown")
    alt = html(f"{title}. {words.get('look_for', '')}")
    told = "".join(f"<li>{html(line)}</li>" for line in words.get("told", []))
    more = f"<details><summary>The same in words</summary><ul>{told}</ul></details>" if told else ""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return (
        f'<figure class="proof"><figcaption class="unseen">{html(title)}</figcaption>'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{html(title)}, picture">'
        f'<img src="{source}" alt="{alt}" width="{width}" height="{height}"></div>{more}</figure>'
    )


def _compressed(path: Path) -> tuple[str, bytes, tuple[int, int]]:
    """Kind, bytes and size in pixels: WebP where the PNG is large."""
    from PIL import Image

    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        if len(content) <= IMAGE_LIMIT:
            image.verify()
            return "png", content, image.size
        packed = io.BytesIO()
        image.convert("RGB").save(packed, "WEBP", quality=80, method=4)
        return "webp", packed.getvalue(), image.size


# data, notices, use, setting


def data(record: Mapping[str, Any]) -> str:
    """What was learnt from, and what was dropped or repaired."""
    told = dict(record.get("data") or {})
    if not told:
        return missing("run.json has no record of the data", "Not recorded")
    intake = told.pop("intake", {})
    items = told.pop("items", {})
    names = {"train": "training items", "val": "held-out items"}
    sides = [(names.get(side, f"{side} items"), _count(n)) for side, n in items.items()]
    rows = pairs([*sides, *((k, f"{v:,}" if isinstance(v, int) else v) for k, v in told.items())])
    counts, examples = intake.get("counts", {}), intake.get("examples", {})
    if not counts:
        return rows + "<p>No item was dropped, converted or repaired when the data was read.</p>"
    body = "".join(
        f'<tr><th scope="row">{html(reason)}</th><td>{count:,}</td>'
        f"<td>{'<br>'.join(html(x) for x in examples.get(reason, []))}</td></tr>"
        for reason, count in counts.items()
    )
    return (
        f"{rows}<h3>Dropped, converted or repaired when the data was read</h3><table><thead><tr>"
        '<th scope="col">What</th><th scope="col">Items</th><th scope="col">Examples</th></tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def notices(record: Mapping[str, Any]) -> str:
    """What fell back, was cut or was replaced."""
    if "notices" not in record:
        return missing("run.json has no list of notices", "Not recorded")
    lines = "".join(f"<li>{html(notice)}</li>" for notice in record["notices"])
    return f"<ul>{lines}</ul>" if lines else "<p>None: nothing fell back, was cut or was replaced.</p>"


def use(folder: RunFolder, record: Mapping[str, Any]) -> str:
    """Commands for this run."""
    run = shlex.quote(str(folder.path))
    lines = COMMANDS.get(str(record.get("system")), {}) | {
        "Measure again": "intaglio evaluate {run}",
        "Go on training": "intaglio train --resume {run}",
        "Fine-tune on your own images": "intaglio train --from {run} --data.source my-images/",
    }
    shown = "".join(
        f"<dt>{what}</dt><dd><code>{html(line.format(run=run))}</code></dd>" for what, line in lines.items()
    )
    return f'<dl class="use">{shown}</dl>'


def setting(config: Part, record: Mapping[str, Any]) -> str:
    """The resolved configuration, and what the run was made with."""
    text = yaml.safe_dump(config.content, sort_keys=False, allow_unicode=True) if config.content else ""
    folded = f"<details><summary>config.yaml</summary><pre><code>{html(text)}</code></pre></details>"
    commit = record.get("git_commit") or {}
    state = "" if not commit else " (clean)" if commit.get("clean") else " (with changes that are not committed)"
    facts = [
        ("command", shlex.join(map(str, record["command"])) if record.get("command") else "not recorded"),
        ("seed", record.get("seed", "not recorded")),
        ("parent run", record.get("parent") or "none"),
        ("machine", record.get("machine", "not recorded")),
        ("git commit", f"{commit.get('commit', 'not in a repository')}{state}"),
        ("data fingerprint", record.get("fingerprint", "not recorded")),
        *(record.get("versions") or {"versions": "not recorded"}).items(),
    ]
    return (folded if text else missing(config.missing, "Not shown")) + pairs(facts)
