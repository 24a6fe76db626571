"""What a person looks at: proofs, the run's page, the summary. The model that they show is untrained."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intaglio import config as configuration
from intaglio.cli import main
from intaglio.config import CaptionDataConfig, MultimodalModelConfig
from intaglio.data.corpus import Corpus
from intaglio.data.prepare import Captioned, prepare
from intaglio.health.diagnosis import Diagnosis
from intaglio.health.finding import Finding, remedies
from intaglio.history import HistoryWriter, Reading
from intaglio.history.run_folder import RunFolder, create
from intaglio.models.multimodal import MultimodalModel
from intaglio.reports import charts
from intaglio.reports.charts import Curve
from intaglio.reports.page import write_page
from intaglio.reports.proofs.multimodal import make_proofs
from intaglio.reports.summary import summary_lines
from intaglio.reports.words import written

SMALL = MultimodalModelConfig(
    latent=16, channels=(8, 8, 8), width=16, heads=2, feed_forward=16, decoder_layers=1,
    encoder_layers=1, dropout=0.5,
)  # fmt: skip
HOSTILE = "<script>alert('x')</script> & \"$\\frac{$ \x07 🐳 漢字"
SECTIONS = ("Verdict", "Key numbers", "Proofs", "Losses", "Data", "Notices", "How to use", "Configuration")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Captioned:
    cache = str(tmp_path_factory.mktemp("cache"))
    return prepare(CaptionDataConfig(items=120, image_size=32, held_out=0.2, cache=cache), seed=0, vocabulary=300)


def model_for(prepared: Captioned, config: MultimodalModelConfig = SMALL) -> MultimodalModel:
    torch.manual_seed(0)
    model = MultimodalModel(
        asdict(config), {"width": 32, "layers": 1}, 32, prepared.text_length, len(prepared.tokenizer)
    )
    model.tokenizer = prepared.tokenizer
    return model


def pulled(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_proofs_are_the_same_each_time_and_leave_no_trace_in_the_model(prepared: Captioned, tmp_path: Path):
    model = model_for(prepared).train()
    latents = model.encode(prepared.data.images[prepared.splits["train"]])
    model.prior.mean.copy_(latents.mean(0))
    model.prior.fitted.fill_(True)
    model.network.text_decoder.eval()  # a part that its owner keeps in eval mode
    modes = [m.training for m in model.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    made = make_proofs(model, prepared, tmp_path / "a")
    again = make_proofs(model, prepared, tmp_path / "b")

    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [p.name for p in made] == [f"{x}.png" for x in ("reconstructions", "samples", "interpolation", "retrieval")]
    assert len(again) == 4
    assert pulled(tmp_path / "a") == pulled(tmp_path / "b")
    told = json.loads((tmp_path / "a" / "proofs.json").read_text())
    assert told["skipped"] == {}
    assert [len(p["told"]) for p in told["pictures"].values()] == [10, 16, 3, 4]
    for path in made:
        with Image.open(path) as image:
            assert image.width == 1228


def test_what_is_not_proved_is_told_with_its_reason(prepared: Captioned, tmp_path: Path):
    quick = make_proofs(model_for(prepared), prepared, tmp_path, quick=True)
    assert [p.name for p in quick] == ["reconstructions.png"]
    skipped = json.loads((tmp_path / "proofs.json").read_text())["skipped"]
    assert skipped.keys() == {"samples", "interpolation", "retrieval"}

    documented = model_for(prepared, replace(SMALL, network="documented", width=32))
    one = replace(prepared, splits={**prepared.splits, "val": prepared.splits["val"][:1]})
    make_proofs(documented, one, tmp_path)
    skipped = json.loads((tmp_path / "proofs.json").read_text())["skipped"]
    assert "no text encoder" in skipped["retrieval"]
    assert "prior" in skipped["samples"]
    assert "two held-out images" in skipped["interpolation"]


class Hostile(Corpus):
    """The captions of another corpus made unpleasant; no labels."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.intake, self.name = corpus, corpus.intake, "hostile"

    def __len__(self) -> int:
        return len(self.corpus)

    def image(self, i: int, size: int) -> np.ndarray:
        return self.corpus.image(i, size)

    def captions(self, i: int) -> tuple[str, ...]:
        return (HOSTILE, HOSTILE * 20)

    def fingerprint(self) -> str:
        return "hostile"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    config = configuration.load("multimodal-small", [f"--runs={tmp_path / 'runs'}", "--train.steps=2000"])
    return create(config, ["intaglio", "train", HOSTILE])


def filled(run: RunFolder, prepared: Captioned) -> RunFolder:
    """A run with something in every part, hostile words in all of them, and a twin."""
    make_proofs(model_for(prepared), replace(prepared, corpus=Hostile(prepared.corpus)), run.proofs(2000))
    (run.proofs(2000) / "samples.png").write_bytes(b"\x89PNG cut off")
    told = json.loads((run.proofs(2000) / "proofs.json").read_text())
    told["pictures"]["samples.png"] = {"title": "samples"}
    (run.proofs(2000) / "proofs.json").write_text(json.dumps(told))
    readings = {
        "train/caption/token_accuracy": Reading(0.9, 0.5, 100, 0.88, 0.92),
        "val/caption/token_accuracy": Reading(0.8, 0.5, 100, 0.78, 0.82),
        "val/image/mse": Reading(0.05, 0.03, 64),
        "val/odd/<b>": Reading(float("nan")),
    }
    numbers = {"step": 2000, "seconds": 60.0, "readings": {k: asdict(r) for k, r in readings.items()}}
    (run.path / "evaluation.json").write_text(json.dumps(numbers))
    finding = asdict(Finding("overfitting", "fail", HOSTILE, {"train": 0.1, HOSTILE: 2.0}, remedies(HOSTILE)))
    verdict = {"verdict": "failing", "findings": [finding], "not_measured": [{"reason": HOSTILE}]}
    (run.path / "findings.json").write_text(json.dumps(verdict))
    twin = run.path.parent / "twin"
    twin.mkdir()
    (twin / "findings.json").write_text(json.dumps({"verdict": "warnings", "findings": [], "not_measured": []}))
    with HistoryWriter(run.metrics) as history:
        for step in range(0, 2000, 2):
            value = float("nan") if step == 100 else 100 / (step + 1)
            history.write(step, 0.0, {"train/loss/caption": value, "train/weight/caption": 2.0})
        history.write(1000, 0.0, {"val/loss/caption": Reading(0.4, 1.5, 10)})
    intake = {"counts": {"unreadable": 3}, "examples": {"unreadable": [HOSTILE]}}
    run.update(twin="twin", status="failed", error=HOSTILE, data={"source": HOSTILE, "items": {}, "intake": intake})
    run.notice(HOSTILE)
    return run


class Reader(HTMLParser):
    """What a browser sees: text, tags with attributes, and whether the tags close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = list[str](), list[tuple[str, dict[str, str | None]]](), ""
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "line", "rect", "path", "circle", "input", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_holds_everything_escaped_and_loads_nothing(run: RunFolder, prepared: Captioned):
    path = write_page(filled(run, prepared))
    source = path.read_text(encoding="utf-8")
    page = Reader(source)

    assert page.all("script") == [{}]  # one, its own, named by its hash
    assert not page.all("link")
    loaded = [a[key] for _, a in page.tags for key in ("src", "href", "xlink:href", "srcset", "action") if a.get(key)]
    assert all(str(x).startswith(("data:image/", "#")) for x in loaded)
    assert "@import" not in source
    assert "url(" not in source
    assert any("default-src 'none'" in str(a.get("content")) for a in page.all("meta"))
    assert page.text.count("<script>alert('x')</script>") >= 8  # as text: shown, not run

    for section in SECTIONS:
        assert section in page.text
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.tags}
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {str(a["href"])[1:] for a in page.all("a")} <= ids

    assert "Failing" in page.text
    assert "Its broken twin, twin" in page.text
    assert "Warnings" in page.text
    assert "This run has not finished (status: failed)" in page.text
    assert "samples.png cannot be read" in page.text
    assert "not a number" in page.text
    assert "caption × 2" in page.text
    assert "1 not finite, left out" in page.text
    assert "null 1.5" in page.text


def test_a_page_of_an_empty_run_says_what_is_missing(run: RunFolder):
    text = Reader(write_page(run).read_text(encoding="utf-8")).text
    assert "Cannot tell" in text
    for missing in ("findings.json", "evaluation.json", "metrics.jsonl"):
        assert f"Not measured: {missing} is not in the run folder" in text
    assert "no pictures have been made yet" in text
    assert "no record of the data" in text
    assert "broken twin" not in text


def test_the_commands_on_the_page_exist(run: RunFolder, capsys: pytest.CaptureFixture[str]):
    source = write_page(run).read_text(encoding="utf-8")
    commands = [unescape(command) for command in re.findall(r"<dd><code>intaglio (.*?)</code>", source)]
    assert len(commands) == 9
    for verb, *words in map(shlex.split, commands):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        options = [word for word in words if word.startswith("--") and "." not in word]
        shown = capsys.readouterr().out
        assert all(option in shown for option in options), (verb, options)


def test_the_page_needs_no_torch():
    program = "import sys, intaglio.reports.page; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_curves_keep_to_their_frame_and_choose_their_axis():
    falling = [(s, 1000 / (s + 1)) for s in range(0, 1000, 3)]
    steep = charts.curve(Curve("loss", "nats", falling, [(999, 1.0)], 2.0))
    assert "logarithmic axis" in steep
    assert "null 2" in steep
    flat = charts.curve(Curve("loss", "nats", [(1, -2.0), (2, float("inf")), (3, -1.0)]))
    assert "linear axis" in flat
    assert flat.count("M") == 2  # the infinite value is a gap
    for drawn in (steep, flat, charts.curve(Curve("loss", "nats", [(1, 5.0)]))):
        numbers = [float(n) for d in re.findall(r' d="([^"]*)"', drawn) for n in re.findall(r"-?\d+\.\d", d)]
        assert all(0 <= n <= charts.WIDE for n in numbers)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(0.8345, "%", "83.5 %"), (1.066, "", "1.07"), (-0.00047, "", "−0.00047"), (102.4, "", "102"), (0.0, "", "0")],
)
def test_numbers_are_written_for_a_person(value: float, unit: str, expected: str):
    assert written(value, unit) == expected


def test_the_summary_shows_each_number_with_its_null_then_the_findings():
    readings = {
        "val/odd/new": Reading(3.0),
        "val/caption/object": Reading(0.5, 0.45, 100, 0.4, 0.6),
        "train/caption/nats_per_token": Reading(0.3, 1.6, 100),
        "val/caption/nats_per_token": Reading(0.4, 1.6, 100),
    }
    finding = Finding("overfitting", "warning", "It memorises.", {}, remedies("give more images", wait=500), ("luck",))
    lines = summary_lines(readings, Diagnosis("warnings", (finding,), ("spike",), ()))
    known = "✓ Caption: surprise per token (nats) 0.300 0.400 1.60 bigram model"
    assert " ".join(lines[1].split()) == known
    assert lines[2].startswith("✗")  # its interval holds the null
    assert "40.0 to 60.0 %" in lines[2]
    assert "odd/new" in lines[3]
    assert "unknown" in lines[3]
    assert lines[-4:] == [
        "WARNINGS: 2 rules looked, 1 of them found nothing; 0 could not look.",
        "warning: It memorises. [overfitting]",
        "  or: luck",
        "  try 1: give more images (give it 500 steps)",
    ]
