"""CIFAR-10 and CIFAR-100 in their binary version as a corpus (Krizhevsky 2009): 32 px.

The Python version is refused: its batches are pickles, and opening a pickle runs whatever program it carries.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from intaglio.data.binary import BinaryCorpus, Part, checked, class_names, records
from intaglio.data.corpus import Intake
from intaglio.data.metadata import Side

SIDE = 32


@dataclass(frozen=True)
class Form:
    """One of the two data sets: ``files`` with records and side of each; ``label_bytes``, the class being the last."""

    name: str
    folder: str
    pickled: str
    classes: int
    names: str
    label_bytes: int
    files: dict[str, tuple[int, Side]]


CIFAR_10 = Form(
    "cifar10", "cifar-10-batches-bin", "cifar-10-batches-py", 10, "batches.meta.txt", 1,
    {f"data_batch_{k}": (10_000, "train") for k in range(1, 6)} | {"test_batch": (10_000, "test")},
)  # fmt: skip
CIFAR_100 = Form(
    "cifar100", "cifar-100-binary", "cifar-100-python", 100, "fine_label_names.txt", 2,
    {"train": (50_000, "train"), "test": (10_000, "test")},
)  # fmt: skip


def claims(folder: str | Path) -> bool:
    """Whether a folder holds either data set, in the binary version or the pickled one, by their names."""
    return any(_root(folder, form) or _pickled(folder, form) for form in (CIFAR_10, CIFAR_100))


class CIFAR(BinaryCorpus):
    """CIFAR-10, or CIFAR-100 with its fine labels; those of the files that lie in ``root``, or in the folder in it that
    the archive unpacks to. What is published as test is declared test. Groups of near-duplicates are kept in ``cache``.

    Raises:
        ValueError: the Python version, a truncated file, a class without a name, or nothing to train on.
    """

    def __init__(
        self, root: str | Path, caption_template: str = "a picture of {label}", *, cache: Path | None = None
    ) -> None:
        found = [(home, form) for form in (CIFAR_10, CIFAR_100) if (home := _root(root, form))]
        if len(found) != 1:
            raise ValueError(_refusal(Path(root), [form for _, form in found]))
        ((self.root, form),), intake = found, Intake()
        names = class_names(self.root / form.names, form.classes)
        record = np.dtype([("labels", "u1", (form.label_bytes,)), ("planes", "u1", (3, SIDE, SIDE))])
        parts = []
        for name, (published, side) in form.files.items():
            path = self.root / f"{name}.bin"
            if path.exists():
                rows = records(path, record, published, intake)
                classes = checked(path, rows["labels"][:, -1], form.classes)
                parts.append(Part(name, rows, rows["planes"].transpose(0, 2, 3, 1), classes, side))
        if all(part.split == "test" for part in parts):
            raise ValueError(f"{self.root} has nothing but the test split; unpack the archive again")
        super().__init__(form.name, parts, names, caption_template, intake, cache)


def _root(folder: str | Path, form: Form) -> Path | None:
    """Where the binary files lie. A lone ``train.bin`` could be anything's: the names of the classes tell."""
    root = Path(folder).expanduser().resolve()
    homes = (root, root / form.folder)
    marks = [f"{name}.bin" for name in form.files]
    return next((h for h in homes if (h / form.names).is_file() and any((h / m).is_file() for m in marks)), None)


def _pickled(folder: str | Path, form: Form) -> bool:
    root = Path(folder).expanduser().resolve()
    first = next(iter(form.files))
    named = (root / form.pickled, root) if root.name == form.pickled else (root / form.pickled,)
    lone = form is CIFAR_10 and (root / first).is_file() and (root / "batches.meta").is_file()
    return lone or any((home / first).is_file() for home in named)


def _refusal(root: Path, found: list[Form]) -> str:
    if found:
        return f"{root} holds CIFAR-10 and CIFAR-100; name the folder of one"
    pickled = next((form for form in (CIFAR_10, CIFAR_100) if _pickled(root, form)), None)
    if pickled is None:
        return f"{root} holds neither {CIFAR_10.folder} nor {CIFAR_100.folder}; name the folder of the .bin files"
    return (
        f"{root} holds the Python version, whose batches are pickles: opening one runs whatever program it carries, so "
        f"they are not read. The binary version has the same images; unpack {pickled.folder} beside it"
    )
