"""What the readers of native formats share: numbers by name, put in order of their steps, and settings beside them."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from intaglio.history.series import Series

_LARGEST_SETTINGS = 300_000
_LARGEST = 2**1023


class Columns:
    """Numbers by name as they come: each has a place (a step, or the number of its row), an integer of 64 bits."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[array, array]] = {}

    def add(self, name: str, place: int, value: float) -> None:
        """One number.

        Raises:
            OverflowError: ``place`` has more than 64 bits, or ``value`` is an integer beyond floating point.
            TypeError: one of them is no number.
        """
        places, values = self._columns.get(name) or self._columns.setdefault(name, (array("q"), array("d")))
        values.append(value)
        try:
            places.append(place)
        except (OverflowError, TypeError):
            values.pop()
            raise

    def extend(self, other: "Columns", renamed: Mapping[str, str]) -> None:
        """All numbers of ``other``, under the names that it has in ``renamed``, after those that are here."""
        for name, (places, values) in other._columns.items():
            mine = self._columns.setdefault(renamed.get(name, name), (array("q"), array("d")))
            mine[0].extend(places)
            mine[1].extend(values)

    def first(self) -> dict[str, int]:
        """The place that came first, by name."""
        return {name: places[0] for name, (places, _) in self._columns.items()}

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Places and values (n,) of each name, in the order in which they came."""
        return {
            name: (np.frombuffer(places, np.int64), np.frombuffer(values, np.float64))
            for name, (places, values) in self._columns.items()
        }


def in_order(
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]], axis: str
) -> tuple[dict[str, Series], str, list[str]]:
    """Series with ascending steps from steps and values (n,) as logged, the axis, and what a reader must know.

    Where every row of a metric has the same step, nobody gave steps: its rows are counted, and if that holds for all
    metrics the axis is "row". Steps that start again (a batch counter in each epoch) are counted on, by one period for
    all metrics. Of a step that was logged twice (a resumed run) the later value stays.
    """
    given: dict[str, Series] = {}
    again, back, twice, stepless = [], [], [], []
    period = max(
        (int(steps.max()) - int(steps.min()) + 1 for steps, _ in columns.values() if _restarts(steps).any()), default=0
    )
    for name, (steps, values) in columns.items():
        if len(steps) > 1 and (steps == steps[0]).all():
            stepless.append(name)
            steps = np.arange(len(steps))
        elif (restarts := _restarts(steps)).any():
            again.append(name)
            steps = steps + period * np.concatenate([[0], np.cumsum(restarts)])
        if (np.diff(steps) < 0).any():
            back.append(name)
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
        last = np.append(np.diff(steps) != 0, True)
        if not last.all():
            twice.append(name)
            steps, values = steps[last], values[last]
        given[name] = Series.of(steps, values)
    if stepless and all(len(series) == 1 or name in stepless for name, series in given.items()):
        axis, notices = "row", ["No steps were logged: the rows of each metric are counted."]
    else:
        notices = [f"No steps were logged for {few(stepless)}: its rows are counted."] if stepless else []
    if again:
        notices.append(f"The steps of {few(again)} start again in the middle: they are counted on.")
    if back:
        notices.append(f"The steps of {few(back)} go backwards: the rows are sorted by step.")
    if twice:
        notices.append(f"Some steps of {few(twice)} were logged more than once: the last value stays.")
    return given, axis, notices


def _restarts(steps: np.ndarray) -> np.ndarray:
    """Which of the rows from the second on goes back to the first row's step or to one before it: mask (n - 1,)."""
    return (np.diff(steps) < 0) & (steps[1:] <= steps[0])


def damage(path: Path, at: int, size: int, cut: bool) -> str:
    """What to say of a file that could be read up to a byte only: it is cut off there, or something else is wrong."""
    what = "ends in the middle of a record" if cut else "is damaged"
    return f"{path.name} {what} (byte {at:,} of {size:,}): it was read up to there."


def few(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def distinct(names: Sequence[str], marks: Sequence[str]) -> list[str]:
    """The names, each that occurs twice followed by its mark."""
    often = Counter(names)
    return [f"{name} ({mark})" if often[name] > 1 else name for name, mark in zip(names, marks, strict=True)]


def number(value: Any) -> float | None:
    """A number, a truth value or the string that stands for NaN or an infinity as a float; None for all else."""
    if isinstance(value, float):
        return value
    if isinstance(value, int):
        return float(value) if abs(value) < _LARGEST else math.inf if value > 0 else -math.inf
    return _SPELLED.get(value) if isinstance(value, str) else None


_SPELLED = {word: float(word) for word in ("NaN", "nan", "Infinity", "inf", "-Infinity", "-inf")}


def settings(path: Path, notices: list[str]) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, {} where there is none; what keeps it from being read is noticed."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _LARGEST_SETTINGS:
            raise ValueError(f"it is larger than {_LARGEST_SETTINGS:,} bytes")
        found = yaml.load(path.read_bytes(), _loader())
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise ValueError("it holds no names with values")
        if sum(1 for _ in islice(_leaves(found), 100_001)) > 100_000:
            raise ValueError("it unfolds to more than 100,000 values")
        return {str(key): value for key, value in found.items()}
    except (
        yaml.YAMLError,
        ValueError,
        OSError,
        RecursionError,
        TypeError,
        OverflowError,
        AttributeError,
        KeyError,
    ) as e:
        notices.append(f"{path.name} could not be read: {str(e).splitlines()[0] if str(e) else type(e).__name__}.")
        return {}


@cache
def _loader() -> type[yaml.SafeLoader]:
    """Python's objects, as an old Lightning writes a Namespace, become plain mappings, lists and texts."""

    class Loader(yaml.SafeLoader):
        pass

    def plain(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else node.value

    Loader.add_multi_constructor("", plain)
    return Loader


def _leaves(tree: Any) -> Iterator[Any]:
    """Every value below ``tree``; aliases are followed, so that a small file may give very many."""
    rest = [iter([tree])]
    while rest:
        for node in rest[-1]:
            yield node
            if isinstance(node, dict | list):
                rest.append(iter(node.values() if isinstance(node, dict) else node))
                break
        else:
            rest.pop()
