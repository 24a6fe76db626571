"""The page of a run: one HTML file that needs nothing else, from the run folder alone. No torch here.

What a run has not measured stands on the page as "not measured", with the reason. Every text is escaped, and the page
forbids itself (Content-Security-Policy) to load or run anything.
"""

import base64
import io
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from intaglio.history import Reading, read_history
from intaglio.history.run_folder import RunFolder, write_atomically
from intaglio.reports import charts
from intaglio.reports.words import LOSS_UNITS, beats_null, interval, paired, quantity, written

VERDICTS = {
    "healthy": ("✓", "No rule found a fault in what was measured."),
    "warnings": ("!", "Look at the findings before you rely on this run."),
    "failing": ("✗", "As it is, this run should not be relied on."),
    "cannot tell": ("?", "Too little was measured to call this run healthy or failing."),
}
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
NOT_MEASURED = '<span class="unseen">not measured</span><span aria-hidden="true">–</span>'
IMAGE_LIMIT = 150_000
"""Bytes above which a picture is stored as WebP."""


@dataclass(frozen=True)
class _Part:
    """One file of the run folder: its content, or why there is none."""

    content: Any
    missing: str = ""


def write_page(folder: RunFolder) -> Path:
    """Writes ``report/index.html`` from what the run folder holds, and returns its path."""
    record = folder.record
    config = _read(folder.path / "config.yaml", yaml.safe_load)
    name = str(record.get("name", folder.path.name))
    sections = {
        "verdict": ("Verdict", _verdicts(folder, record)),
        "numbers": ("Key numbers, beside their nulls", _numbers(_json(folder.path / "evaluation.json"))),
        "proofs": ("Proofs", _proofs(folder)),
        "curves": ("Losses", _curves(folder)),
        "data": ("Data", _data(record)),
        "notices": ("Notices", _notices(record)),
        "use": ("How to use this model", _use(folder, record)),
        "setting": ("Configuration and versions", _setting(config, record)),
    }
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, (title, _) in sections.items())
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(title)}</h2>{content}</section>'
        for key, (title, content) in sections.items()
    )
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{escape(name)} – intaglio</title>
<style>{(files("intaglio.reports") / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#verdict">Skip to the verdict</a>
<header>
<p class="kind">intaglio · a training run</p>
<h1>{escape(name)}</h1>
<p class="lead">{escape(_sentence(record, config.content or {}))}</p>
{_unfinished(folder, record)}
<nav aria-label="On this page"><ul>{links}</ul></nav>
</header>
<main>{body}</main>
<footer>Run {escape(str(record.get("id", "without id")))}, started {escape(str(record.get("started", "unknown")))}.
Page written {datetime.now(UTC).isoformat(timespec="seconds")}.</footer>
</body>
</html>
"""
    folder.report.mkdir(exist_ok=True)
    path = folder.report / "index.html"
    write_atomically(path, page)
    return path


def _read(path: Path, parse: Any) -> _Part:
    try:
        return _Part(parse(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return _Part(None, f"{path.name} is not in the run folder")
    except (ValueError, yaml.YAMLError) as error:
        return _Part(None, f"{path.name} cannot be read ({error})")


def _json(path: Path) -> _Part:
    return _read(path, json.loads)


def _missing(reason: str, what: str = "Not measured") -> str:
    return f'<p class="missing">{what}: {escape(reason)}.</p>'


def _rows(pairs: Iterable[tuple[str, object]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>' for k, v in pairs)}</dl>"


# the head


def _sentence(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
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
        f"({_count(items.get('val'))} held out) for {_count(steps)} optimizer steps in {_duration(seconds)}, "
        f"on {machine}."
    )


def _count(number: object) -> str:
    return f"{number:,}" if isinstance(number, int) else "an unrecorded number of"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unrecorded time"
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _unfinished(folder: RunFolder, record: Mapping[str, Any]) -> str:
    """Said at the top when the run did not reach its end. A run that measures its end still has the status running."""
    status = record.get("status", "unknown")
    if status == "finished" or (status == "running" and (folder.path / "evaluation.json").is_file()):
        return ""
    error = f" {record['error']}." if record.get("error") else ""
    return f'<p class="stop"><b>This run has not finished</b> (status: {escape(str(status))}).{escape(error)}</p>'


# the verdict


def _verdicts(folder: RunFolder, record: Mapping[str, Any]) -> str:
    """This run's verdict and, where ``run.json`` names a twin (a run folder beside this one), that one's."""
    twin = record.get("twin")
    blocks = _verdict("This run" if twin else "", _json(folder.path / "findings.json"))
    if twin:
        blocks += _verdict(
            f"Its broken twin, {twin}", _json(folder.path.parent / Path(str(twin)).name / "findings.json")
        )
    return f'<div class="verdicts">{blocks}</div>'


def _verdict(whose: str, part: _Part) -> str:
    findings = part.content or {}
    given = str(findings.get("verdict", "cannot tell"))
    word = given if given in VERDICTS else "cannot tell"
    mark, meaning = VERDICTS[word]
    said = f"<p>{meaning}</p>" if not part.missing else _missing(part.missing)
    if given != word:
        said += _missing(f"findings.json gives the verdict {given!r}, which this version does not know")
    heading = f"<h3>{escape(whose)}</h3>" if whose else ""
    gaps = [
        ": ".join(filter(None, (gap.get("rule") or gap.get("quantity"), gap["reason"], gap.get("log"))))
        for gap in findings.get("not_measured", [])
    ]
    unmeasured = "".join(f"<li>{escape(gap)}</li>" for gap in gaps)
    told = f"{len(findings.get('passed', []))} rules found nothing; not measured: {len(gaps)}"
    rest = f'<details class="unmeasured"><summary>{told}</summary><ul>{unmeasured}</ul></details>' if unmeasured else ""
    found = "".join(map(_finding, findings.get("findings", [])))
    css = word.replace(" ", "-")
    return (
        f'<div class="verdict {css}">{heading}<p class="word"><span aria-hidden="true">{mark}</span> '
        f"{word.capitalize()}</p>{said}{found}{rest}</div>"
    )


def _finding(finding: Mapping[str, Any]) -> str:
    severity = str(finding.get("severity", "note"))
    evidence = ", ".join(
        f"{k} {written(v) if isinstance(v, float) else v}" for k, v in (finding.get("evidence") or {}).items()
    )
    remedies = "".join(f"<li>{_remedy(remedy)}</li>" for remedy in finding.get("remedies", []))
    candidates = "".join(f"<li>{escape(str(c))}</li>" for c in finding.get("candidates", []))
    return (
        f'<div class="finding"><p><b class="{escape(severity)}">{escape(severity.capitalize())}</b> '
        f"{escape(str(finding['message']))}</p>"
        f"<p><small>rule <code>{escape(str(finding['rule']))}</code>"
        f"{'; evidence: ' + escape(evidence) if evidence else ''}</small></p>"
        + (f"<p><b>What could be behind it</b></p><ul>{candidates}</ul>" if candidates else "")
        + (f"<p><b>What to try, in this order</b></p><ol>{remedies}</ol>" if remedies else "")
        + "</div>"
    )


def _remedy(remedy: Mapping[str, Any]) -> str:
    wait = f" (give it {remedy['wait']:,} steps)" if remedy.get("wait") else ""
    if not remedy.get("command"):
        return escape(f"{remedy['do']}{wait}")
    return f"{escape(remedy['do'].split(': --')[0] + wait)}<br><code>{escape(remedy['command'])}</code>"


# the numbers


def _numbers(part: _Part) -> str:
    if part.missing:
        return _missing(part.missing)
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
        "Null": ("", f"{null}<small>{escape(what.null)}</small>"),
    }
    body = "".join(f'<td role="cell" class="{css}" data-head="{h}">{text}</td>' for h, (css, text) in cells.items())
    return (
        f'<tr role="row"><th scope="row" role="rowheader"><span class="mark {kind}" aria-hidden="true">{mark}</span> '
        f"{escape(what.title)}<small>{', '.join(filter(None, (unit, arrow)))}</small></th>{body}"
        f'<td role="cell" class="drawn">{charts.bar(shown, what.better, what.unit)}</td></tr>'
    )


# the proofs


def _proofs(folder: RunFolder) -> str:
    steps = sorted(p for p in (folder.path / "proofs").glob("step-*") if any(p.glob("*.png")))
    if not steps:
        return _missing("no pictures have been made yet; training makes them at each look at the held-out items")
    final = folder.proofs(folder.record.get("model_step", -1))
    last = final if final in steps else steps[-1]
    part = _json(last / "proofs.json")
    told = part.content or {"pictures": {p.name: {} for p in sorted(last.glob("*.png"))}, "skipped": {}}
    figures = [_proof(last / Path(name).name, words) for name, words in told["pictures"].items()]
    skipped = [_missing(f"{name}, because {reason}", "Not made") for name, reason in told["skipped"].items()]
    step = int(last.name.removeprefix("step-"))
    made = f"<p>Made at step {step:,} with the weights of that step; the items are the same at every step.</p>"
    return made + (_missing(part.missing) if part.missing else "") + "".join([*figures, *skipped])


def _proof(path: Path, words: Mapping[str, Any]) -> str:
    title = str(words.get("title", path.stem))
    try:
        kind, content, (width, height) = _compressed(path)
    except (OSError, ValueError) as error:
        return _missing(f"{path.name} cannot be read ({error})", "Not shown")
    alt = escape(f"{title}. {words.get('look_for', '')}")
    told = "".join(f"<li>{escape(str(line))}</li>" for line in words.get("told", []))
    more = f"<details><summary>The same in words</summary><ul>{told}</ul></details>" if told else ""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return (
        f'<figure class="proof"><figcaption class="unseen">{escape(title)}</figcaption>'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(title)}, picture">'
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


# the curves


def _curves(folder: RunFolder) -> str:
    if not folder.metrics.is_file():
        return _missing("metrics.jsonl is not in the run folder")
    table = read_history(folder.metrics).sort("step", maintain_order=True)
    points: dict[str, list[tuple[int, float]]] = {}
    nulls: dict[str, float] = {}
    for step, name, value, null in table.select("step", "name", "value", "null").iter_rows():
        points.setdefault(name, []).append((step, value))
        if null is not None:
            nulls[name.split("/", 1)[1]] = null
    terms = dict.fromkeys(name.split("/", 2)[2] for name in points if name.split("/")[1] == "loss")
    if not terms:
        return _missing("metrics.jsonl holds no losses yet")
    drawn = "".join(_curve(term, points, nulls.get(f"loss/{term}")) for term in sorted(terms, key="total".__eq__))
    samples = {"train": "training, one batch at a time", "val": "held out", "null": "null, where one is known"}
    line = '<svg viewBox="0 0 32 10" aria-hidden="true"><line class="{}" x2="32" y1="5" y2="5"/></svg>'
    key = "".join(f"<li>{line.format(css)}{text}</li>" for css, text in samples.items())
    return f'<ul class="key">{key}</ul><div class="curves">{drawn}</div>'


def _curve(term: str, points: Mapping[str, list[tuple[int, float]]], null: float | None) -> str:
    train, val = points.get(f"train/loss/{term}", []), points.get(f"val/loss/{term}", [])
    weight = points.get(f"train/weight/{term}")
    unit = LOSS_UNITS.get(term, "value")
    bad = sum(abs(v) == float("inf") or v != v for _, v in (*train, *val))
    now = [f"held out {written(val[-1][1])}" if val else "held out not measured"]
    now += [f"null {written(null)}"] if null is not None else []
    now += [f"{bad} not finite, left out"] if bad else []
    times = f" × {weight[-1][1]:g}" if weight else ""
    drawn = charts.curve(term, unit, train, val, null)
    return (
        f"<figure><figcaption><b>{escape(term.replace('_', ' '))}</b>{times} <small>{escape(unit)}; {', '.join(now)}"
        f"</small></figcaption>{drawn or _missing('no finite value was logged')}</figure>"
    )


# data, notices, use, setting


def _data(record: Mapping[str, Any]) -> str:
    data = dict(record.get("data") or {})
    if not data:
        return _missing("run.json has no record of the data", "Not recorded")
    intake = data.pop("intake", {})
    items = data.pop("items", {})
    names = {"train": "training items", "val": "held-out items"}
    sides = [(names.get(side, f"{side} items"), _count(n)) for side, n in items.items()]
    rows = _rows([*sides, *((k, f"{v:,}" if isinstance(v, int) else v) for k, v in data.items())])
    counts, examples = intake.get("counts", {}), intake.get("examples", {})
    if not counts:
        return rows + "<p>No item was dropped, converted or repaired when the data was read.</p>"
    body = "".join(
        f'<tr><th scope="row">{escape(str(reason))}</th><td>{count:,}</td>'
        f"<td>{'<br>'.join(escape(str(x)) for x in examples.get(reason, []))}</td></tr>"
        for reason, count in counts.items()
    )
    return (
        f"{rows}<h3>Dropped, converted or repaired when the data was read</h3><table><thead><tr>"
        '<th scope="col">What</th><th scope="col">Items</th><th scope="col">Examples</th></tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _notices(record: Mapping[str, Any]) -> str:
    if "notices" not in record:
        return _missing("run.json has no list of notices", "Not recorded")
    notices = "".join(f"<li>{escape(str(notice))}</li>" for notice in record["notices"])
    return f"<ul>{notices}</ul>" if notices else "<p>None: nothing fell back, was cut or was replaced.</p>"


def _use(folder: RunFolder, record: Mapping[str, Any]) -> str:
    run = shlex.quote(str(folder.path))
    lines = COMMANDS.get(str(record.get("system")), {}) | {
        "Measure again": "intaglio evaluate {run}",
        "Go on training": "intaglio train --resume {run}",
        "Fine-tune on your own images": "intaglio train --from {run} --data.source my-images/",
    }
    shown = "".join(
        f"<dt>{what}</dt><dd><code>{escape(line.format(run=run))}</code></dd>" for what, line in lines.items()
    )
    return f'<dl class="use">{shown}</dl>'


def _setting(config: _Part, record: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(config.content, sort_keys=False, allow_unicode=True) if config.content else ""
    folded = f"<details><summary>config.yaml</summary><pre><code>{escape(text)}</code></pre></details>"
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
    return (folded if text else _missing(config.missing, "Not shown")) + _rows(facts)
