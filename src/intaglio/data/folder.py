"""A folder of images as a corpus: with a table of captions or labels, or with one subfolder for each class.

Every image is decoded once, into a memory-mapped array, and what could not be used is counted in ``intake``. Names that
lead out of the folder are never opened.
"""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from intaglio.data import duplicates, pixels
from intaglio.data.corpus import Corpus, Intake, Progress
from intaglio.data.decoded import COMPARED_AT, Stats, Store
from intaglio.data.metadata import Row, Side, clean, find_table, read_table, side

ACCEPTED = """accepted are
    a table in the folder (metadata, captions or labels as .csv, .tsv, .jsonl or .json, or --data.metadata FILE)
      with a column file_name and a column caption or label; split, group and id are used if there
    or one subfolder for each class: CLASS/x.jpg, or train/CLASS/x.jpg beside val/CLASS and test/CLASS"""

# A lone subfolder of such a name holds the images; it is not their class.
_NOT_CLASSES = {"images", "image", "imgs", "img", "photos", "pictures", "data", "files"}


class ImageFolder(Corpus):
    """Images under ``root`` with captions from a table, or made from labels by ``caption_template``.

    Args:
        root: the folder.
        size: side of the squares that are kept; ``image(i, other)`` decodes the file again.
        metadata: table to use, where the folder holds several or an unusual name; ``describe()`` tells what was taken.
        columns: role → column name, where the usual names don't fit: ``{"caption": "title"}``.
        rows: what a table of another kind says of the images, which are then these alone.
        caption_template: caption of an image that has only a label.
        bad_limit: share of unreadable and captionless items above which the folder is refused.
        captioned: whether items need a caption; without, those that have none are kept with the empty one, and a
            folder of nothing but images will do.
        cache: where the decoded pixels are kept between runs (may be deleted at any time); None: in memory only.
        workers: threads that decode.
        progress: called with (done, all) after each image; from the start again where ``size`` is not 64.

    Raises:
        ValueError: no usable form, fewer than two images, a broken table, or too many unusable items.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 64,
        *,
        metadata: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
        rows: Sequence[Row] | None = None,
        caption_template: str = "a picture of {label}",
        bad_limit: float = 0.05,
        captioned: bool = True,
        cache: str | Path | None = None,
        workers: int = 2,
        progress: Progress | None = None,
    ) -> None:
        if "{label}" not in caption_template:
            raise ValueError(f"--data.caption_template {caption_template!r} has no {{label}}; write where it goes")
        self.root, self.size, self.intake = Path(root).expanduser().resolve(), size, Intake()
        self.name = self.root.name
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder; name the folder that holds the images")
        files, links = _scan(self.root)
        path = None if rows is not None else find_table(self.root, metadata)
        if rows is not None:
            self._form = "images that a table names"
        elif path is None:
            rows = _class_rows(self.root, files, links, self.intake, captioned)
            self._form = "class subfolders" if any(row.label for row in rows) else "images without classes"
        else:
            table = read_table(path, columns)
            rows = table.rows
            taken = ", ".join(f"{role} from {column!r}" for role, column in table.taken.items())
            self._form = f"{path.name}: {taken}" + f"; not used: {', '.join(table.unused)}" * bool(table.unused)
        found = _merge(self.root, path, rows, files, self.intake)
        if path is not None:
            _note_unnamed(path, found, files, self.intake)
        found = _captioned(found, caption_template, self.intake, captioned)
        self._require_two(len(found))

        stats = {item.file: files[item.file] for item in found}
        store = Store(self.root, stats, Path(cache).expanduser() if cache else None, workers)
        compared = store.load(COMPARED_AT, progress)
        decoded = compared if size == COMPARED_AT else store.load(size, progress)
        if decoded.kept != compared.kept:
            raise ValueError(f"{self.root} changed while it was read; start again")
        self.intake.counts.update(decoded.intake.counts)
        self.intake.examples.update(decoded.intake.examples)
        _refuse_if_bad(self.root, self.intake, len(found), bad_limit)
        self._items = [found[k] for k in decoded.kept]
        self._require_two(len(self._items))
        self._pixels, self._content = decoded.pixels, compared.content
        _number(self._items, self.intake)
        self._labels = tuple(sorted({item.label for item in self._items if item.label is not None}))
        self._named = _any_of(self._labels)
        self._groups = self._grouped(compared.clusters)

    def __len__(self) -> int:
        return len(self._items)

    def image(self, i: int, size: int) -> np.ndarray:
        if size == self.size:
            return np.array(self._pixels[i])
        return pixels.read_image(self.root / self._items[i].file, size)[0]

    def pixels(self) -> np.ndarray:
        """All images, uint8 (N, size, size, 3), read-only; memory-mapped where there is a cache."""
        return self._pixels

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(self._items[i].captions)

    def id(self, i: int) -> str:
        return self._items[i].id

    def label(self, i: int) -> str | None:
        return self._items[i].label

    def labels(self) -> tuple[str, ...]:
        return self._labels

    def label_in(self, text: str) -> str | None:
        match = self._named.search(clean(text).replace("_", " ")) if self._named else None
        return None if match is None else next(x for x in self._labels if _spoken(x) == _spoken(match.group()))

    def group(self, i: int) -> str:
        """The first item that this one is a near-duplicate of, or shares the column ``group`` with."""
        return self._items[self._groups[i]].id

    def declared_split(self, i: int) -> Side | None:
        return self._items[i].split

    def fingerprint(self) -> str:
        """Digest of ids, captions, labels, groups, splits and pixels, whatever ``size`` the folder was opened at."""
        facts = [[x.id, x.captions, x.label, x.group, x.split] for x in self._items]
        return hashlib.blake2b(json.dumps([facts, self._content]).encode(), digest_size=16).hexdigest()

    def describe(self) -> str:
        lines = [f"{self.name}: {len(self)} images, {sum(len(x.captions) for x in self._items)} captions", self._form]
        if self._labels:
            shown = [*self._labels[:12], *("…" for _ in self._labels[12:13])]
            lines.append(f"{len(self._labels)} labels: {', '.join(shown)}")
        return "; ".join(lines)

    def _grouped(self, clusters: Sequence[int]) -> list[int]:
        """For each item the first one of its group; near-duplicates are counted."""
        first: dict[str, int] = {}
        pairs = []
        for i, (item, original) in enumerate(zip(self._items, clusters, strict=True)):
            if item.group is not None:
                pairs.append((i, first.setdefault(item.group, i)))
            if original != i:
                pairs.append((i, original))
                twin = self._items[original]
                self.intake.note("near-duplicate", f"{item.file} looks like {twin.file}; both stay on one side")
                if item.label != twin.label:
                    message = f"{item.file} is {item.label!r}, {twin.file} is {twin.label!r}"
                    self.intake.note("near-duplicate of another label", message)
        groups = duplicates.components(len(self._items), np.array(pairs, dtype=np.int64).reshape(-1, 2)).tolist()
        declared: dict[int, dict[str, str]] = {}
        for item, head in zip(self._items, groups, strict=True):
            if item.split:
                declared.setdefault(head, {}).setdefault(item.split, item.file)
        for sides in declared.values():
            if len(sides) > 1:
                message = " but ".join(f"{file} in {split}" for split, file in sides.items())
                self.intake.note("group declared on two sides", f"{message}; the whole group is held out")
        return groups

    def _require_two(self, images: int) -> None:
        if images < 2:
            raise ValueError(
                f"{self.root} gives {images} usable image{'s' * (images != 1)}; at least two are needed, "
                "one to learn from and one held out\n  " + "\n  ".join([*_told(self.intake), ACCEPTED])
            )


@dataclass(slots=True)
class _Item:
    file: str
    id: str
    captions: list[str]
    label: str | None
    split: Side | None
    group: str | None


def _scan(root: Path) -> tuple[Stats, list[str]]:
    """Every regular file under root → (bytes, mtime), hidden ones apart; and the links that are not followed."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot list {error.filename}: {error.strerror}; make it readable or move it away")

    files: Stats = {}
    links: list[str] = []
    for folder, names, members in os.walk(root, onerror=refuse):
        names[:] = sorted(name for name in names if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        links += [(inside / name).as_posix() for name in names if Path(folder, name).is_symlink()]
        for member in sorted(member for member in members if not member.startswith(".")):
            path, file = Path(folder, member), (inside / member).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                links.append(file)
            elif path.is_file():
                stat = path.stat()
                files[file] = (stat.st_size, stat.st_mtime_ns)
    return files, links


def _class_rows(root: Path, files: Stats, links: list[str], intake: Intake, captioned: bool) -> list[Row]:
    """Rows for CLASS/… or SPLIT/CLASS/…; what is neither is refused, or read without classes where none are needed."""
    for link in links:
        intake.note("leads outside the folder", f"{link} is a link that is not followed; copy the images into {root}")
    images = [file for file in files if PurePosixPath(file).suffix.lower() in pixels.SUFFIXES]
    for file in files:
        if PurePosixPath(file).suffix.lower() not in pixels.SUFFIXES:
            intake.note("other file", f"{file} has no ending of an image that is read")
    in_splits = any(side(file.split("/")[0]) == "train" and file.count("/") >= 2 for file in images)
    rows = []
    for file in images:
        *folders, _ = file.split("/")
        split = folders.pop(0) if in_splits and folders else None
        if in_splits and (split is None or side(split) is None):
            intake.note("outside the splits", f"{file} lies beside train, val and test; not used")
        elif not folders:
            intake.note("outside the classes", f"{file} lies in no class folder; not used")
        else:
            rows.append(Row(file, file, label=clean(folders[0]), split=split))
    if {row.label.lower() for row in rows if row.label} <= _NOT_CLASSES:
        if not captioned and images:
            for reason in ("outside the splits", "outside the classes"):
                intake.counts.pop(reason, None)
                intake.examples.pop(reason, None)
            return [Row(file, file) for file in images]
        endings = Counter(PurePosixPath(file).suffix.lower() or "no ending" for file in files)
        held = [f"{n} {ending}" for ending, n in endings.most_common(6)]
        held += [f"{len(links)} links that are not followed"] * bool(links)
        raise ValueError(
            f"{root} has neither a table nor class subfolders; it holds {len(images)} images "
            f"({', '.join(held) or 'no files at all'})\n  {ACCEPTED}"
        )
    return rows


def _merge(root: Path, table: Path | None, rows: Iterable[Row], files: Stats, intake: Intake) -> list[_Item]:
    """One item for each file that the rows name; several rows of one file add their captions."""
    base = PurePosixPath()
    if table is not None and table.resolve().is_relative_to(root):
        base = PurePosixPath(table.resolve().parent.relative_to(root).as_posix())
    normal = {unicodedata.normalize("NFC", file): file for file in files}
    items: dict[str, _Item] = {}
    for row in rows:
        file, reason = _locate(root, base, row.file, files, normal)
        if file is None:
            intake.note(reason, f"{row.where}: {row.file!r} was not opened")
            continue
        split = side(row.split) if row.split else None
        if row.split and split is None:
            intake.note("unknown split", f"{row.where}: {row.split!r} is not train, val or test; treated as undeclared")
        if any("\ufffd" in caption for caption in row.captions):
            intake.note("broken character in a caption", f"{row.where}: {file}")
        captions = list(dict.fromkeys(row.captions))
        if file not in items:
            items[file] = _Item(file, row.id or file, captions, row.label, split, row.group)
            continue
        item = items[file]
        fresh = [caption for caption in captions if caption not in item.captions]
        item.captions += fresh
        intake.note("row with one more caption" if fresh else "repeated row", f"{row.where}: {file}")
        for name, value in {"label": row.label, "split": split, "group": row.group}.items():
            known = getattr(item, name)
            if known is None:
                setattr(item, name, value)
            elif value is not None and value != known:
                intake.note(f"conflicting {name}", f"{row.where}: {file} is {known!r} already; {value!r} not used")
    return list(items.values())


def _locate(
    root: Path, base: PurePosixPath, name: str, files: Stats, normal: Mapping[str, str]
) -> tuple[str | None, str]:
    """The file that a row names, relative to root, or None and why not; nothing is opened."""
    if not name:
        return None, "row without a file name"
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or PureWindowsPath(name).drive or ".." in pure.parts:
        return None, "leads outside the folder"
    file = (base / pure).as_posix()
    file = file if file in files else normal.get(unicodedata.normalize("NFC", file), file)
    if file in files:
        return file, ""
    try:
        real = (root / file).resolve()
        if not real.is_relative_to(root):
            return None, "leads outside the folder"
        if not real.is_file():
            return None, "absent file"
        files[file] = (real.stat().st_size, real.stat().st_mtime_ns)
    except (OSError, ValueError):  # a name that no file can have: NUL, half a character, too long
        return None, "absent file"
    return file, ""


def _captioned(items: list[_Item], template: str, intake: Intake, needed: bool) -> list[_Item]:
    """Those with a caption, after labels have made theirs; the others get the empty one where none is needed."""
    kept = []
    for item in items:
        if not item.captions and item.label is not None:
            item.captions = [template.replace("{label}", item.label.replace("_", " "))]
            intake.note("caption from the label", f"{item.file}: {item.captions[0]}")
        if not item.captions and not needed:
            item.captions = [""]
        if item.captions:
            kept.append(item)
        else:
            intake.note("no caption", f"{item.file} has neither caption nor label; dropped")
    return kept


def _note_unnamed(table: Path, items: list[_Item], files: Stats, intake: Intake) -> None:
    named = {item.file for item in items}
    for file in files:
        if file not in named and PurePosixPath(file).suffix.lower() in pixels.SUFFIXES:
            intake.note("not in the table", f"no row of {table.name} names {file}; not used")


def _refuse_if_bad(root: Path, intake: Intake, captioned: int, limit: float) -> None:
    unreadable, dropped = intake.counts["unreadable"], intake.counts["no caption"]
    bad, total = unreadable + dropped, captioned + dropped
    if bad > limit * total:
        examples = [*intake.examples.get("unreadable", []), *intake.examples.get("no caption", [])]
        raise ValueError(
            f"{bad} of {total} items in {root} cannot be used ({unreadable} unreadable, {dropped} without a caption), "
            f"more than the limit of {limit:.0%}:\n  " + "\n  ".join(examples[:5]) + "\n"
            f"repair or remove them, or accept the loss with --data.bad_limit {math.ceil(bad / total * 10) / 10}"
        )


def _told(intake: Intake) -> list[str]:
    return [f"{n} × {reason}, e.g. {intake.examples[reason][0]}" for reason, n in intake.counts.most_common()]


def _number(items: list[_Item], intake: Intake) -> None:
    """Make ids unique."""
    used: set[str] = set()
    times: Counter[str] = Counter()
    for item in items:
        wanted = item.id
        while item.id in used:
            times[wanted] += 1
            item.id = f"{wanted}#{times[wanted] + 1}"
        if item.id != wanted:
            intake.note("repeated id", f"{item.file} has the id {wanted!r} of another file; it is {item.id!r} here")
        used.add(item.id)


def _spoken(label: str) -> str:
    return label.replace("_", " ").casefold()


def _any_of(labels: Sequence[str]) -> re.Pattern[str] | None:
    """Finds the first label in a text, as a whole word and the longest: not the shirt of a t-shirt."""
    words = sorted((re.escape(_spoken(label)) for label in labels), key=len, reverse=True)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(words)})(?![\w-])", re.IGNORECASE) if words else None
