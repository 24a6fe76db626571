"""Programs with a fault: text of a module with some of it replaced, in this process alone.

A module of ours is replaced as it is imported, so it must not have been imported before.
"""

import importlib.util
import inspect
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from intaglio.bench.faults.case import Change

BELOW = "\nFAMILY = "
"""What follows in a family's module is its catalogue, and no part of the program."""


def replaced(text: str, changes: Iterable[Change], where: str) -> str:
    """The text with every change made.

    Raises:
        ValueError: what a change replaces is not there, or more than once.
    """
    for change in changes:
        if (count := text.count(change.old)) != 1:
            raise ValueError(f"{where}: a change replaces what stands there {count} times, not once:\n{change.old}")
        text = text.replace(change.old, change.new)
    return text


def program(family: ModuleType, changes: Sequence[Change] = ()) -> dict[str, Any]:
    """The names of a family's program, run with the changes made."""
    file = Path(inspect.getfile(family))
    text = replaced(source_of(family), [c for c in changes if not c.module], file.name)
    names: dict[str, Any] = {"__name__": f"{family.__name__}_changed", "__file__": str(file)}
    exec(compile(text, str(file), "exec"), names)
    return names


def source_of(family: ModuleType) -> str:
    """The text of a family's program, without its catalogue."""
    return inspect.getsource(family).partition(BELOW)[0] + "\n"


class _Changed(SourceFileLoader):
    def __init__(self, name: str, path: str, changes: Sequence[Change]):
        super().__init__(name, path)
        self.changes = changes

    def get_code(self, fullname: str) -> CodeType:
        text = Path(self.path).read_text(encoding="utf-8")
        return compile(replaced(text, self.changes, fullname), self.path, "exec")


class _Finder(MetaPathFinder):
    def __init__(self, changes: Sequence[Change]):
        self.changes = {c.module: [d for d in changes if d.module == c.module] for c in changes if c.module}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.changes:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.origin is not None
        return importlib.util.spec_from_file_location(
            name, spec.origin, loader=_Changed(name, spec.origin, self.changes[name])
        )


def change_ours(changes: Sequence[Change]) -> None:
    """From now on these modules of ours are imported with the changes made.

    Raises:
        ValueError: there is no such module, it was imported before, or what is to be replaced is not there once.
    """
    finder = _Finder(changes)
    for name in finder.changes:
        if name in sys.modules:
            raise ValueError(f"{name} was imported before it could be changed")
    sys.meta_path.insert(0, finder)  # before any search: to find a module imports the packages that it lies in
    for name, of_it in finder.changes.items():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"there is no module {name} to change")
        replaced(Path(spec.origin).read_text(encoding="utf-8"), of_it, name)
