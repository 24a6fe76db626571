"""The house rules that a machine can check: floors, late torch, short files, docstrings, no trace of a machine."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "intaglio"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    1: {"config", "history"},
    2: {"data", "nn", "objectives"},
    3: {"models", "sampling"},
    4: {"systems", "health"},
    5: {"training", "reports"},
    6: {"__init__", "__main__", "analysis", "answering", "api", "cli", "files", "puzzles", "recipes", "bench"},
}
FLOOR_OF = {part: floor for floor, parts in FLOORS.items() for part in parts}


def part_of(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(source: Path) -> Iterator[tuple[int, str]]:
    """Line and part of the house for each import in ``source``, wherever in the file it stands."""
    package = ["intaglio", *source.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            modules = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for top, *below in (module.split(".") for module in modules):
            if top == "intaglio":
                yield node.lineno, below[0] if below and below[0] in FLOOR_OF else "__init__"


def tree() -> Iterator[Path]:
    """Every file that is ours, without asking git."""
    for entry in ROOT.iterdir():
        if entry.name in {"src", "tests", "docs", "benchmarks", ".ci"}:
            yield from (p for p in entry.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        elif entry.is_file():
            yield entry


def test_no_floor_imports_a_higher_one():
    unknown = {part_of(source) for source in SOURCES} - FLOOR_OF.keys()
    assert not unknown, f"give {unknown} a floor"
    upward = [
        f"{source.relative_to(ROOT)}:{line} (floor {FLOOR_OF[part_of(source)]}) imports {part} (floor {FLOOR_OF[part]})"
        for source in SOURCES
        for line, part in imported_parts(source)
        if FLOOR_OF[part] > FLOOR_OF[part_of(source)]
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("module", ["cli", "config", "history", "data.corpus", "data.engravings", "data.folder"])
def test_what_needs_no_model_does_not_import_torch(module):
    program = f"import sys, intaglio.{module}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tree()
        if path.suffix in {".py", ".yaml", ".toml"} and (lines := len(path.read_text().splitlines())) > 500
    }
    assert not long


def test_public_things_have_docstrings():
    bare = []
    for source in SOURCES:
        if source.parent.name == "families" and not source.name.startswith("_"):
            continue  # programs of other people, as they write them
        module = ast.parse(source.read_text())
        public = [
            node
            for node in module.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        bare += [
            f"{source.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
            for node in [module, *public]
            if node.body and not ast.get_docstring(node)
        ]
    assert not bare, "\n".join(bare)


def test_nothing_tells_of_the_machine_it_was_written_on():
    slash = "/"  # this and the brackets below keep the patterns from finding themselves
    folder = re.compile(rf"(?<![\w.:/-]){slash}(work|root|tmp|farm|opt|home|Users|mnt){slash}")
    registry = re.compile(r"pypi[.]org|pythonhosted[.]|index-ur[l]\b|find-link[s]\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tree()
        if path.suffix not in {".png", ".npy", ".parquet", ".safetensors"}
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if folder.search(line) or registry.search(line)
    ]
    assert not found, "\n".join(found)
