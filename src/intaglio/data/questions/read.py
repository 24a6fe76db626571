"""Tables of questions beside images: CSV, TSV, JSON Lines, JSON, and easy-VQA's lists.

Columns are found by name (``question``, ``answer``, ``img_id``, ``type``, ``split`` and their usual aliases); others
are mapped by ``columns={"question": "q"}``. An image is named by its file or by the file's name without its ending.
"""

import difflib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from intaglio.data.corpus import Intake, Progress
from intaglio.data.folder import ImageFolder
from intaglio.data.metadata import Row, clean, read_records, side
from intaglio.data.pixels import SUFFIXES
from intaglio.data.questions.corpus import Asked, QuestionCorpus
from intaglio.data.splits import MOST_HELD_OUT

ROLES: dict[str, tuple[str, ...]] = {
    "question": ("question", "questions", "q"),
    "answer": ("answer", "answers", "a", "label"),
    "image": ("img_id", "image_id", "image", "img", "file_name", "filename", "file"),
    "type": ("type", "question_type", "kind", "category"),
    "split": ("split",),
}
FORMS = ("json", "jsonl", "csv", "tsv")
ACCEPTED = """accepted are
    a table questions.csv, .tsv, .jsonl or .json in the folder, or in its train, val and test (or --data.metadata FILE)
      with columns question, answer and img_id (others by --data.columns.question NAME), and type and split if it has
    or easy-VQA's questions.json: [[question, answer, image], ...]
    the images anywhere beside or below the table, named by file or by file name without ending"""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table, texts cleaned."""

    where: str
    image: str
    question: str
    answers: tuple[str, ...]
    kind: str
    split: str


def read_questions(
    root: str | Path,
    size: int,
    *,
    table: str | None = None,
    columns: Mapping[str, str] | None = None,
    bad_limit: float = 0.05,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> QuestionCorpus:
    """The questions of a folder, and the images that they are about.

    Rows without a question, an answer or an image are left out and counted; rows that ask the same of one image become
    one question with several answers. An image that is declared on two sides is held out with all its questions.

    Raises:
        ValueError: no usable table, an unknown column, or too many unusable rows.
    """
    root = Path(root).expanduser().resolve()
    if root.is_file():
        raise ValueError(f"{root} is a file; write --data.source {root.parent} --data.metadata {root.name}")
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name the folder that holds the images and the table of questions")
    intake, asked, forms = Intake(), list[tuple[str, Line]](), list[str]()
    sides: dict[str, dict[str, str]] = defaultdict(dict)  # file → side → the first row that declares it
    lost = 0
    for path, declared in _tables(root, table):
        files, inside = Files(root, path.parent), ""
        if path.parent != root and path.is_relative_to(root):
            inside = f"{path.parent.relative_to(root).as_posix()}/"
        lines, form = _read(path, columns or {}, answered=True)
        forms.append(f"{inside}{path.name}: {form}")
        for line in (replace(line, where=inside + line.where) for line in lines):
            file, (reason, told) = None, _unusable(line)
            if not reason and (file := files.find(line.image)) is None:
                reason = "several images of one name" if files.called(line.image) else "image not found"
                told = files.why_not(line.image) + files.meant(line.image) * (intake.counts[reason] < 5)
            if file is None:
                lost += 1
                intake.note(reason, f"{line.where}: {told}; left out")
                continue
            asked.append((file, line))
            if here := _side(line, declared, intake):
                sides[file].setdefault(here, line.where)
    _refuse_if_lost(root, lost, len(asked), intake, bad_limit)
    if len({file for file, _ in asked}) < 2:
        raise ValueError(
            f"{root}: all {len(asked)} questions are about {asked[0][0]}; at least two images are needed, one to learn "
            "from and one held out"
        )
    rows = [Row("", file, split=_most_held_out(file, sides[file], intake), id=file) for file in dict(asked)]
    images = ImageFolder(
        root, size, rows=rows, captioned=False, bad_limit=bad_limit, cache=cache, progress=progress
    )  # fmt: skip
    number = {images.id(i): i for i in range(len(images))}
    images.intake.counts.update(intake.counts)
    images.intake.examples.update(intake.examples)
    return QuestionCorpus(images, _merged(asked, number, images.intake), images.intake, "; ".join(forms))


def _unusable(line: Line) -> tuple[str, str]:
    """Why a row cannot be used, as a reason and in words, or nothing."""
    missing = {"question": line.question, "answer": line.answers, "image": line.image}
    what = next((what for what, value in missing.items() if not value), "")
    return (f"row without {what}", f"there is no {what}") if what else ("", "")


def _side(line: Line, declared: str, intake: Intake) -> str:
    """The side that a row declares, or else its folder."""
    own = side(line.split) or ""
    if line.split and not own:
        otherwise = f"taken for {declared}, as its folder says" if declared else "treated as undeclared"
        intake.note("unknown split", f"{line.where}: {line.split!r} is not train, val or test; {otherwise}")
    return own or declared


def _most_held_out(file: str, sides: Mapping[str, str], intake: Intake) -> str | None:
    found = [s for s in MOST_HELD_OUT if s in sides]
    if len(found) > 1:
        told = ", ".join(f"{s} ({sides[s]})" for s in found)
        intake.note("image declared on two sides", f"{file} is in {told}; all its questions go to {found[0]}")
    return found[0] if found else None


def _refuse_if_lost(root: Path, lost: int, kept: int, intake: Intake, limit: float) -> None:
    if kept and lost <= limit * (lost + kept):
        return
    told = [f"{n} × {reason}, e.g. {intake.examples[reason][0]}" for reason, n in intake.counts.most_common()]
    if not kept:
        raise ValueError("\n  ".join([f"{root}: none of {lost} questions can be used:", *told, ACCEPTED]))
    share = math.ceil(lost / (lost + kept) * 100) / 100
    raise ValueError(
        f"{root}: {lost} of {lost + kept} questions cannot be used, more than the limit of {limit:.0%}:\n  "
        + "\n  ".join(told)
        + f"\nrepair or remove these rows, or accept the loss with --data.bad_limit {share:g}"
    )


def _merged(asked: Iterable[tuple[str, Line]], number: Mapping[str, int], intake: Intake) -> list[Asked]:
    """One item for each question about each image that could be decoded."""
    found: dict[tuple[int, str], Asked] = {}
    for file, line in asked:
        if file not in number:
            intake.note("question about an unusable image", f"{line.where}: {file}; left out")
            continue
        if "\ufffd" in "".join((line.question, *line.answers)):
            intake.note("broken character in a text", f"{line.where}: {line.question[:80]}")
        key = (number[file], line.question)
        known = found.get(key)
        if known is None:
            found[key] = Asked(key[0], line.question, line.answers, line.kind)
            continue
        fresh = tuple(a for a in line.answers if a not in known.answers)
        intake.note("one more answer to a question" if fresh else "repeated question", line.where)
        if known.kind and line.kind not in ("", known.kind):
            message = f"{line.where}: this question is of type {known.kind!r} already; {line.kind!r} not used"
            intake.note("conflicting type", message)
        found[key] = Asked(known.image, known.question, (*known.answers, *fresh), known.kind or line.kind)
    return list(found.values())


# Which tables?


def _tables(root: Path, named: str | None) -> list[tuple[Path, str]]:
    """The tables of a folder, each with the side that it declares, or ''."""
    if named:
        path = Path(os.path.normpath(root / named))
        if not path.is_file():
            raise ValueError(f"--data.metadata: {path} is not a file; {_other_tables(root, named)}")
        return [(path, "")]
    found: dict[Path, str] = {}
    for folder in sorted([root, *(p for p in root.iterdir() if p.is_dir() and side(p.name))]):
        here = [path for form in FORMS if (path := folder / f"questions.{form}").is_file()]
        if len(here) > 1:
            names = " and ".join(path.name for path in here)
            first = here[0].relative_to(root).as_posix()
            raise ValueError(f"{folder} holds {names}; choose one (--data.metadata {first}), or move one away")
        found |= {p: "" if folder == root else str(side(folder.name)) for p in here}
    if not found:
        raise ValueError(f"{root} holds no questions.csv, .tsv, .jsonl or .json; {_other_tables(root)}\n  {ACCEPTED}")
    return list(found.items())


def _other_tables(root: Path, wanted: str = "questions.csv") -> str:
    """Which table may have been meant."""
    here = [root, *(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]
    tables = [
        p.relative_to(root).as_posix() for f in here for p in sorted(f.iterdir()) if p.suffix[1:].lower() in FORMS
    ]
    if not tables:
        return "no table lies there"
    near = difflib.get_close_matches(wanted, tables, 1, 0.5) or tables[:1]
    return f"write --data.metadata {near[0]} if that is the one" + f" ({len(tables)} tables lie there)" * (
        len(tables) > 1
    )


class Files:
    """Images under a folder by path, by file name and by file name without ending: what lies beside or below the table
    comes before the rest, and what belongs to another side than the table (``train``, ``test``) is never taken."""

    def __init__(self, root: Path, beside: Path):
        beside = beside if beside.is_relative_to(root) else root
        own = _top(beside.relative_to(root))
        self.levels: list[dict[str, list[str]]] = []
        for folder in dict.fromkeys((beside, root)):
            by_path, by_name, by_stem = (defaultdict[str, list[str]](list) for _ in range(3))
            for path in _images(folder):
                file = path.relative_to(root)
                if folder != beside and side(own) and side(_top(file)) not in (None, side(own)):
                    continue
                keys = path.relative_to(folder).as_posix(), path.name, path.stem
                for names, key in zip((by_path, by_name, by_stem), keys, strict=True):
                    names[clean(key)].append(file.as_posix())
            self.levels += [by_path, by_name, by_stem]

    def called(self, image: str) -> list[str]:
        """The paths, relative to the root, of all images that a row can have meant."""
        name = PurePosixPath(clean(image).replace("\\", "/")).as_posix()
        for spelt in _spellings(name):
            for names in self.levels:
                if spelt in names:
                    return names[spelt]
        return []

    def find(self, image: str) -> str | None:
        """The path, relative to the root, of the one image that has the name."""
        found = self.called(image)
        return found[0] if len(found) == 1 else None

    def why_not(self, image: str) -> str:
        """Why none was found."""
        if found := self.called(image):
            return (
                f"{image!r} names {len(found)} images ({', '.join(found[:3])}); write the path of the one that is meant"
            )
        return f"there is no image {image!r}"

    def meant(self, image: str) -> str:
        """The nearest name to one that no image has, as the end of a sentence; it takes time."""
        name = PurePosixPath(image.replace("\\", "/")).name
        known = {key for names in self.levels[1:] for key in names}
        near = [] if name.isdecimal() else difflib.get_close_matches(name, known, 1, 0.75)
        if near and not self.called(image):
            return f"; did you mean {near[0]!r}?"
        return "" if known else " (no image lies beside or below the table)"


def _top(path: Path) -> str:
    return path.parts[0] if path.parts else ""


def _images(folder: Path) -> Iterable[Path]:
    """Those below a folder in order, hidden ones apart."""
    for inside, names, members in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for member in sorted(members):
            if not member.startswith(".") and os.path.splitext(member)[1].lower() in SUFFIXES:
                yield Path(inside, member)


def _spellings(name: str) -> Sequence[str]:
    """A number may stand for a file in COCO's twelve digits, and have become 7.0 in a column with gaps."""
    number = name.removesuffix(".0")
    return (name, number, f"{int(number):012d}") if number.isdecimal() and number.isascii() else (name,)


# Rows


def read_rows(path: Path, columns: Mapping[str, str], answered: bool = True) -> list[Line]:
    """The rows of a table; without ``answered`` it needs no column for answers.

    Raises:
        ValueError: it is empty or broken, or has no column for something.
    """
    return _read(path, columns, answered)[0]


def _read(path: Path, columns: Mapping[str, str], answered: bool) -> tuple[list[Line], str]:
    """The rows of a table, and which column was taken for what."""
    try:
        records = list(read_records(path, lists=("question", "answer", "image")))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path.parent}: {error}") from None
    if not records:
        raise ValueError(f"{path} has no rows\n  {ACCEPTED}")
    present = list(dict.fromkeys(str(key) for _, record in records for key in record))
    taken = _assign(path, present, columns, answered)
    lines = []
    for where, record in records:
        texts = {role: _texts(f"{path.parent}: {where}", record, column, role) for role, column in taken.items()}
        image, question, kind, split = (" ".join(texts.get(r, ())) for r in ("image", "question", "type", "split"))
        lines.append(Line(where, image, question, tuple(dict.fromkeys(texts.get("answer", ()))), kind, split))
    unused = [name for name in present if name not in taken.values()]
    form = ", ".join(f"{role} from {column!r}" for role, column in taken.items())
    return lines, form + f"; not used: {', '.join(unused)}" * bool(unused)


def _texts(where: str, record: Mapping[str, Any], column: str, role: str) -> list[str]:
    """What a cell says: several texts at most for an answer, one for all else, none where it is empty."""
    value = record.get(column)
    values = value if isinstance(value, list) and role == "answer" else [value]
    for v in values:
        if isinstance(v, dict | list):
            how = 'as text, or as a list of texts ["yes", "no"]' if role == "answer" else "as text"
            raise ValueError(f"{where}: {column!r} is no text but {type(v).__name__}; write it {how}")
    return [text for v in values if v == v and (text := clean(v))]  # NaN, which JSON of a data frame may hold, is not


def _assign(path: Path, present: list[str], columns: Mapping[str, str], answered: bool) -> dict[str, str]:
    """Role → column."""
    spelt = {clean(name): name for name in reversed(present)}
    taken = {}
    for role, column in columns.items():
        if role not in ROLES:
            near = [r for r, aliases in ROLES.items() if role.lower() in aliases] or _near(role, ROLES)
            raise ValueError(
                f"--data.columns: {role!r} is no role of a table of questions; {_meant(near)}those are "
                f"{', '.join(ROLES)}"
            )
        if clean(column) not in spelt:
            raise ValueError(
                f"--data.columns.{role}: {path.name} has no column {column!r}; {_meant(_near(column, present))}it has "
                f"{', '.join(present)}"
            )
        taken[role] = spelt[clean(column)]
    usual = {name.lower(): column for name, column in spelt.items() if column not in taken.values()}
    for role, aliases in ROLES.items():
        if role not in taken and (known := next((usual[a] for a in aliases if a in usual), None)):
            taken[role] = known
    for role in ("question", "image", *(["answer"] if answered else [])):
        if role not in taken:
            free = [name for name in present if name not in taken.values()]
            near = next((n for alias in ROLES[role] if (n := _near(alias, free))), [])
            raise ValueError(
                f"{path} has no column for the {role}: call it {ROLES[role][0]}, or name it by --data.columns.{role}; "
                f"{_meant(near)}it has {', '.join(present)}"
            )
    return taken


def _near(name: str, known: Iterable[str]) -> list[str]:
    folded = {k.lower(): k for k in known}
    return [folded[k] for k in difflib.get_close_matches(name.lower(), folded, 1, 0.7)]


def _meant(near: Sequence[str]) -> str:
    return f"did you mean {near[0]!r}? " if near else ""
