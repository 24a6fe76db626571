"""``report RUN or FILE``: every document of a run, in one folder."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from intaglio.health.diagnosis import Diagnosis
from intaglio.history.run_folder import write_atomically
from intaglio.reports.analysis import Analysis, analyse
from intaglio.reports.exchange import junit, sarif
from intaglio.reports.key_findings import key_findings, report
from intaglio.reports.page import GRAVEST, history_page, overview, run_page
from intaglio.reports.run_parts import Part

FULL = 24
"""Runs of one file that get all documents; the page that lists them has them all."""


def write_report(
    path: str | Path,
    out: str | Path | None = None,
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    profile: str = "default",
    name: str | None = None,
) -> Path:
    """Writes all documents of a run folder or of anybody's history, and returns the path of ``index.html``.

    They go into ``out``; without it into ``report/`` of a run folder, and for a file into ``<name>-report/`` of the
    working directory, never beside the file. A file of many runs gets a page that lists them, and a folder for each of
    the 24 gravest.

    Raises:
        ValueError: nothing that can be read, an unknown format, profile, name or run.
    """
    return write_documents(analyse(path, format=format, mapping=mapping, profile=profile, name=name), path, out)


def write_documents(analyses: Sequence[Analysis], path: str | Path, out: str | Path | None = None) -> Path:
    """The documents of runs that are analysed already, as ``write_report`` places them."""
    own = analyses[0].folder
    folder = Path(out) if out is not None else own.report if own else Path.cwd() / f"{_stem(Path(path))}-report"
    folder.mkdir(parents=True, exist_ok=True)
    if len(analyses) == 1:
        return _write(analyses[0], folder)
    order = sorted(range(len(analyses)), key=lambda k: GRAVEST.index(analyses[k].diagnosis.verdict))[:FULL]
    links: dict[int, str] = {}
    for k in order:
        part = _free(_file_name(analyses[k].name), set(links.values()))
        (folder / part).mkdir(exist_ok=True)
        _write(analyses[k], folder / part)
        links[k] = part
    left = len(analyses) - len(order)
    notes = (
        [f"{left:,} runs have no page of their own: the {FULL} gravest do. Name one to have its report."]
        if left
        else []
    )
    links = {k: f"{part}/index.html" for k, part in links.items()}
    index = folder / "index.html"
    write_atomically(index, overview(Path(path).name, analyses, links, notes))
    return index


def _write(a: Analysis, folder: Path) -> Path:
    from intaglio.reports.sheets import comprehensive
    from intaglio.reports.trends import trends

    write_atomically(folder / "findings.json", _json(a.diagnosis))
    comprehensive(a, folder / "comprehensive_analysis.png")
    trends(a, folder / "trend_analysis.png")
    write_atomically(folder / "ANALYSIS_REPORT.md", report(a))
    write_atomically(folder / "KEY_FINDINGS.txt", key_findings(a))
    write_atomically(folder / "findings.sarif", sarif(a.diagnosis, a.source, a.name))
    write_atomically(folder / "junit.xml", junit(a.diagnosis, a.name))
    page = history_page(a) if a.folder is None else run_page(a, Part(a.diagnosis.as_dict()))
    write_atomically(folder / "index.html", page)
    return folder / "index.html"


def _json(diagnosis: Diagnosis) -> str:
    return json.dumps(diagnosis.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _stem(path: Path) -> str:
    """Of ``metrics.csv`` its own name, of a folder the folder's."""
    resolved = path.resolve()
    return _file_name(resolved.stem if resolved.is_file() else resolved.name)


def _file_name(name: str) -> str:
    """A name that any file system takes and that leads nowhere else."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:60] or "run"


def _free(name: str, taken: set[str]) -> str:
    return name if name not in taken else next(n for k in range(2, 10_000) if (n := f"{name}-{k}") not in taken)
