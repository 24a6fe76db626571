"""The documents of ``report``: on histories made here, on a run folder, in a browser. No torch."""

import base64
import csv
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import browser, installed
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from intaglio import config as configuration
from intaglio.history import HistoryWriter, Reading
from intaglio.history.families import fit
from intaglio.history.run_folder import RunFolder, create
from intaglio.history.series import Series
from intaglio.reports.analysis import Analysis, analyse
from intaglio.reports.charts import thinned
from intaglio.reports.key_findings import key_findings, report
from intaglio.reports.page import history_page
from intaglio.reports.report import write_report
from intaglio.reports.safe import code, columns, markdown, plain, wrapped
from intaglio.reports.sheets import law

DOCUMENTS = {
    "index.html", "comprehensive_analysis.png", "trend_analysis.png", "ANALYSIS_REPORT.md", "KEY_FINDINGS.txt",
    "findings.json", "findings.sarif", "junit.xml",
}  # fmt: skip
HOSTILE = (
    "<script>alert('x')</script>", "</style><img src=x onerror=alert(1)>", "a|b`c`*d*_e_[x](http://evil.example)",
    "$\\frac{$", "\x1b[31mred\x07", "🐳漢字\u202egnp.exe", "www.evil.example a@b.example", "x" * 300, "]]>&amp;",
)  # fmt: skip

Columns = Mapping[str, Sequence[float | None]]


def written(path: Path, columns: Columns) -> Path:
    """A CSV; None is a blank cell."""
    rows = max(map(len, columns.values()))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", *columns])
        for k in range(rows):
            table.writerow([k, *("" if column[k] is None else float(column[k] or 0) for column in columns.values())])
    return path


def healthy(rows: int = 400) -> dict[str, Sequence[float | None]]:
    noise, t = np.random.default_rng(0).normal(size=(4, rows)), np.arange(rows)
    base = 0.4 + 2 * np.exp(-t / (rows / 6))
    held = [1.05 * base[k] + 0.005 * noise[1, k] if k % (rows // 25) == 0 else None for k in range(rows)]
    ramp, fall = rows // 20, np.pi * (t - rows // 20) / (rows - rows // 20)
    return {
        "train_loss": list(base + 0.03 * noise[0]),
        "val_loss": held,
        "lr": list(np.where(t < ramp, 1e-3 * (t + 1) / ramp, 5e-4 * (1 + np.cos(fall)))),
        "grad_norm": list(np.exp(0.3 * noise[2])),
        "train_acc": list(0.9 - 0.8 * np.exp(-t / (rows / 5)) + 0.01 * noise[3]),
    }


def failing(rows: int = 400) -> dict[str, Sequence[float | None]]:
    columns = healthy(rows)
    loss = list(columns["train_loss"])
    loss[rows // 2 :] = [math.nan] * (rows - rows // 2)
    return {**columns, "train_loss": loss}


HISTORIES: dict[str, Columns] = {
    "healthy": healthy(),
    "failing": failing(),
    "one-row": {"train_loss": [0.7], "val_loss": [0.8]},
    "nothing": {"train_loss": [math.nan] * 30, "other": [math.nan] * 30},
    "many": {f"metric_{k}": list(np.random.default_rng(k).normal(size=30)) for k in range(200)},
    "hostile": {**healthy(80), **{name: list(np.random.default_rng(len(name)).normal(size=80)) for name in HOSTILE}},
    "wild": {"huge": [1e308, -1e308] * 20, "tiny": [5e-324 * k for k in range(40)], "flat": [0.0] * 40,
             "endless": [1.0, math.inf] * 20, "steep": list(10.0 ** np.linspace(-200, 200, 40))},
}  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the documents of each history."""
    root = tmp_path_factory.mktemp("reports")
    return {
        name: write_report(written(root / f"{name}.csv", columns), root / name).parent
        for name, columns in HISTORIES.items()
    }


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


@pytest.mark.parametrize("name", HISTORIES)
def test_every_document_is_whole(reports: dict[str, Path], name: str):
    folder = reports[name]
    assert {p.name for p in folder.iterdir()} == DOCUMENTS
    source = (folder / "index.html").read_text(encoding="utf-8")
    page = Reader(source)
    policy = str(page.all("meta")[2]["content"])
    for tag in ("style", "script"):
        for content in re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any(key.startswith("on") or key == "style" for _, attributes in page.tags for key in attributes)
    assert not page.all("img") + page.all("link")
    assert {str(a["href"])[1:] for a in page.all("a")} <= {str(a["id"]) for _, a in page.tags if "id" in a}
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all(th.get("scope") for th in page.all("th"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert len(source) < 300_000 or name == "many"

    findings = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    word = findings["verdict"]
    assert source.index(f"</span> {word.capitalize()}</p>") < source.index('id="curves"')
    for gap in findings["not_measured"]:
        assert gap["reason"] in page.text

    for sheet in ("comprehensive_analysis.png", "trend_analysis.png"):
        with Image.open(folder / sheet) as image:
            image.load()
            assert image.width == 2100
    text = (folder / "KEY_FINDINGS.txt").read_text(encoding="utf-8")
    assert max(map(columns, text.splitlines())) <= 80
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert word.upper() in text
    for title in ("SUMMARY", "DYNAMICS", "STATISTICS", "HEALTH", "KEEP", "CHANGE", "OPTIONS", "CHECKLIST"):
        assert title in text
    assert "excellent" not in text.lower()
    assert "perfect" not in text.lower()


@pytest.mark.parametrize("name", HISTORIES)
def test_other_programs_can_read_the_findings(reports: dict[str, Path], name: str):
    folder = reports[name]
    findings = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    log = json.loads((folder / "findings.sarif").read_text(encoding="utf-8"))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] == "intaglio"
    assert len({r["id"] for r in rules}) == len(rules)
    assert [r["ruleId"] for r in run["results"]] == [f["rule"] for f in findings["findings"]]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in {"error", "warning", "note"}
        assert result["message"]["text"]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].endswith(".csv")
    assert len(run["invocations"][0]["toolExecutionNotifications"]) == len(findings["not_measured"])

    root = ElementTree.parse(folder / "junit.xml").getroot()
    cases = root.findall(".//testcase")
    assert int(root.attrib["tests"]) == len(cases)
    assert sum(int(suite.attrib["tests"]) for suite in root) == len(cases)
    failed = {case.attrib["name"] for case in cases if case.find("failure") is not None}
    assert failed - {"verdict"} == {f["rule"] for f in findings["findings"] if f["severity"] == "fail"}
    assert ("verdict" in failed) == (findings["verdict"] == "failing")
    assert int(root.attrib["skipped"]) == len(findings["not_measured"])


def test_a_stranger_s_words_stay_words(reports: dict[str, Path]):
    folder = reports["hostile"]
    page = Reader((folder / "index.html").read_text(encoding="utf-8"))
    assert "<script>alert('x')</script>" in page.text
    assert "\\x1b[31mred\\x07" in page.text
    assert "\\u202egnp.exe" in page.text
    rendered = (
        MarkdownIt("commonmark").enable("table").render((folder / "ANALYSIS_REPORT.md").read_text(encoding="utf-8"))
    )
    seen = Reader(rendered)
    assert {str(a["href"]) for a in seen.all("a")} < DOCUMENTS
    assert {str(a["src"]) for a in seen.all("img")} == {"comprehensive_analysis.png", "trend_analysis.png"}
    assert not seen.all("script")
    assert "a|b`c`*d*_e_[x](http://evil.example)" in seen.text
    width = [len(re.findall("<t[hd]", row)) for row in re.findall("<tr>(.*?)</tr>", rendered, re.DOTALL)]
    assert set(width) <= {2, 3, 4, 10}


def test_failing_and_healthy_are_told_apart(reports: dict[str, Path]):
    verdicts = {n: json.loads((f / "findings.json").read_text(encoding="utf-8"))["verdict"] for n, f in reports.items()}
    assert verdicts["failing"] == "failing"
    assert verdicts["healthy"] != "failing"
    assert verdicts["one-row"] == "cannot tell"
    text = (reports["one-row"] / "KEY_FINDINGS.txt").read_text(encoding="utf-8")
    assert re.search(r"CHECKLIST.*?\[ \] [\w-]+: ", text, re.DOTALL)  # what was not measured stands first
    healthy = (reports["healthy"] / "index.html").read_text(encoding="utf-8")
    assert "cosine after a linear warm-up" in healthy
    assert "train_loss" in healthy  # how names were mapped


def test_reports_are_the_same_each_time(reports: dict[str, Path], tmp_path: Path):
    folder = reports["hostile"]
    again = write_report(folder.parent / "hostile.csv", tmp_path).parent
    for name in DOCUMENTS - {"index.html"}:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_documents_go_where_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    mine.mkdir()
    written(theirs / "my log.csv", {"train_loss": [1.0, 0.5]})
    monkeypatch.chdir(mine)
    index = write_report("../theirs/my log.csv")
    assert index == mine / "my-log-report" / "index.html"
    assert [p.name for p in theirs.iterdir()] == ["my log.csv"]
    with pytest.raises(ValueError, match="no-such"):
        write_report("no-such")


def test_many_runs_of_one_file_get_a_page_that_lists_them(tmp_path: Path):
    good, bad = healthy(120), failing(120)
    lines = ["run,step," + ",".join(good)]
    for run, table in (("<b>one</b>", good), ("two/../..", bad)):
        lines += [
            f"{run},{k},"
            + ",".join("" if column[k] is None else repr(float(column[k] or 0)) for column in table.values())
            for k in range(120)
        ]
    (tmp_path / "runs.csv").write_text("\n".join(lines), encoding="utf-8")
    assert len(analyse(tmp_path / "runs.csv")) == 2
    index = write_report(tmp_path / "runs.csv", tmp_path / "out")
    page = Reader(index.read_text(encoding="utf-8"))
    links = [str(a["href"]) for a in page.all("a") if "index.html" in str(a["href"])]
    assert len(links) == 2
    for link in links:
        assert (index.parent / link).resolve().is_relative_to(index.parent.resolve())
        assert {p.name for p in (index.parent / link).parent.iterdir()} == DOCUMENTS
    assert page.text.index("failing", page.text.index("Gravest")) < page.text.index("<b>one</b>")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    config = configuration.load("multimodal-small", [f"--runs={tmp_path / 'runs'}", "--train.steps=400"])
    folder = create(config, ["intaglio", "train"])
    with HistoryWriter(folder.metrics) as history:
        for step in range(10, 410, 10):
            loss = 0.5 + 2 * math.exp(-step / 80)
            history.write(
                step, 0.0, {"train/loss/caption": loss, "train/loss/total": 2 * loss, "train/weight/caption": 2.0}
            )
            if step % 40 == 0:
                ends = Reading(0.8 * step / 400, 0.1, 100, 0.7 * step / 400, 0.9 * step / 400)
                history.write(
                    step, 0.0, {"val/loss/caption": Reading(loss + 0.1, 1.5, 100), "val/caption/object": ends}
                )
    folder.update(status="finished", train_seconds=120.0, step=400)
    return folder


def test_a_run_folder_of_ours_gets_all_documents(run: RunFolder):
    index = write_report(run.path)
    assert index == run.report / "index.html"
    assert {p.name for p in run.report.iterdir()} == DOCUMENTS
    page = Reader(index.read_text(encoding="utf-8"))
    for shown in (
        "Key numbers",
        "Proofs",
        "Curves",
        "Each metric in numbers",
        "How to use",
        "95 % interval",
        "null 1.5",
    ):
        assert shown in page.text
    drawn = [svg["aria-label"] or "" for svg in page.all("svg") if "curve" in str(svg.get("class"))]
    assert not any("_low" in label or "_high" in label for label in drawn)
    assert {str(rect["class"]) for rect in page.all("rect")} >= {"worse", "band"}
    text = (run.report / "KEY_FINDINGS.txt").read_text(encoding="utf-8")
    assert "train/loss/caption" in text
    assert "4 min" in text  # twice the run of two minutes


def test_reports_need_no_torch(tmp_path: Path):
    written(tmp_path / "log.csv", healthy(60))
    program = (
        "import sys; from intaglio.reports.report import write_report; write_report('log.csv'); "
        "assert 'torch' not in sys.modules; assert 'plotly' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False).returncode == 0


# what a person does on the page


@pytest.mark.skipif(installed() is None, reason="no Chromium is installed to open the page in")
def test_the_page_in_a_browser(reports: dict[str, Path], tmp_path: Path):
    program = installed()
    assert program is not None
    with browser(program) as page:
        for name in ("healthy", "hostile", "one-row", "nothing"):
            file = reports[name] / "index.html"
            for width in (360, 800, 1400):
                page.open(file, width, dark=width == 800)
                wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert page.run(wider) == 0, (name, width)
                page.shot(tmp_path / f"{name}-{width}.png")
        assert set(page.requests) == {
            (reports[n] / "index.html").as_uri() for n in ("healthy", "hostile", "one-row", "nothing")
        }
        assert page.problems == []

        page.open(reports["healthy"] / "index.html", 1400)
        svg = "document.querySelector('svg.curve')"
        assert page.run(f"{svg}.getAttribute('role')") == "slider"
        page.run(f"{svg}.focus()")
        page.press("Home")
        first = page.run(f"{svg}.getAttribute('aria-valuetext')")
        assert re.fullmatch(r"step 0: .*training 2\.\d+.*", first), first
        page.press("End")
        assert "step 399" in page.run(f"{svg}.closest('figure').querySelector('output').textContent")

        before = page.run(f"{svg}.querySelector('path').getAttribute('d')")
        box = json.loads(
            page.run(f"{svg}.scrollIntoView({{behavior: 'instant'}}), JSON.stringify({svg}.getBoundingClientRect())")
        )
        left, middle = box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"]
        page.mouse("mousePressed", left, middle, True)
        page.mouse("mouseMoved", left + 40, middle, True)
        page.mouse("mouseMoved", left + 80, middle, True)
        page.mouse("mouseReleased", left + 80, middle)
        assert page.run(f"{svg}.querySelector('path').getAttribute('d')") != before
        start, end = (float(page.run(f"document.querySelector('#tools [name={n}]').value")) for n in ("from", "to"))
        assert 100 < start < end < 300
        page.press("Escape")
        assert page.run(f"{svg}.querySelector('path').getAttribute('d')") == before
        page.run("document.querySelector('#tools [value=log]').click()")
        assert page.run(f"{svg}.querySelector('path').getAttribute('d')") != before
        assert page.problems == []

        page.open(reports["healthy"] / "index.html", 800, script=False)
        page.call("Emulation.setScriptExecutionDisabled", value=False)
        assert page.run("document.querySelector('#tools').hidden")
        assert page.run("document.querySelectorAll('svg.curve path').length") > 5


# the pieces


@pytest.mark.parametrize(
    ("words", "as_markdown", "as_code"),
    [
        ("plain", "plain", "`plain`"),
        ("a|b", "a\\|b", "`a\\|b`"),
        ("`x`", "\\`x\\`", "`` `x` ``"),
        ("<b>", "\\<b\\>", "`<b>`"),
        ("two\nlines\x1b[0m", "two lines\\\\x1b\\[0m", "`two lines\\x1b[0m`"),
        ("http://x", "http:\\/\\/x", "`http://x`"),
        ("1. one", "1\\. one", "`1. one`"),
    ],
)
def test_words_are_made_harmless(words: str, as_markdown: str, as_code: str):
    assert markdown(words) == as_markdown
    assert code(words) == as_code


@given(st.text(max_size=200), st.integers(12, 90))
def test_lines_fit_their_width(text: str, width: int):
    lines = wrapped(plain(text), width, "- ", "  ")
    assert all(columns(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(("- " + plain(text)).split())
    assert columns(plain(text, width)) <= width


def test_thinning_keeps_extremes_and_gaps():
    values = np.sin(np.arange(100_000) / 500)
    values[[777, 55_555]] = 9.0, -9.0
    values[33_333] = np.nan
    kept = thinned(Series.of(np.arange(100_000), values), 400)
    assert len(kept) <= 400
    assert np.nanmax(kept.values) == 9
    assert np.nanmin(kept.values) == -9
    assert 33_333 in kept.steps
    assert kept.steps[0] == 0
    assert kept.steps[-1] == 99_999


@pytest.mark.parametrize("kind", ["constant", "linear", "exponential", "cosine", "step", "inverse", "warm"])
def test_a_fitted_law_is_drawn_where_it_was_fitted(kind: str):
    t = np.arange(600.0)
    values = {
        "constant": np.full(600, 0.3),
        "linear": 1 - t / 700,
        "exponential": 0.2 + 2 * np.exp(-t / 90),
        "cosine": 0.01 + 0.5 * (1 + np.cos(np.pi * t / 600)),
        "step": 0.1 * 0.5 ** (t // 200),
        "inverse": 1 / np.sqrt(1 + t / 20),
        "warm": np.where(t < 50, (t + 1) / 50, 0.5 * (1 + np.cos(np.pi * (t - 50) / 550))),
    }[kind]
    family = fit(Series.of(t.astype(int), values))
    assert family is not None
    assert np.abs(law(family, t) - values).max() < 0.02 * np.ptp(values) + 1e-9


def test_nothing_is_called_good_that_was_not_measured(tmp_path: Path):
    (a,) = analyse(written(tmp_path / "log.csv", {"train_loss": HISTORIES["healthy"]["train_loss"]}))
    assert isinstance(a, Analysis)
    assert a.diagnosis.verdict == "cannot tell"
    for words in (key_findings(a), report(a), history_page(a)):
        assert "overfitting" in words
        assert "validation-missing" in words
        assert "not measured" in words.lower()


def test_every_colour_of_words_can_be_read():
    style = (files("intaglio.reports") / "page.css").read_text(encoding="utf-8")
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", theme))
        for ground in ("paper", "sheet", "code"):
            for ink in ("ink", "faint", "accent", "good", "bad", "warn", "unsure"):
                a, b = sorted((_luminance(colours[ground]), _luminance(colours[ink])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (ground, ink, theme)  # WCAG 2.2, 1.4.3


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
