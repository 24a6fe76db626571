"""STL-10's binary files as a corpus (Coates, Ng & Lee 2011): 96 px, ten classes, 100,000 images without a label."""

from pathlib import Path

import numpy as np

from intaglio.data.binary import BinaryCorpus, Part, checked, class_names, records
from intaglio.data.corpus import Intake
from intaglio.data.metadata import Side

FOLDER = "stl10_binary"
"""What the published archive unpacks to; it is found in the folder that is named, too."""
SIDE, CLASSES = 96, 10
PUBLISHED: dict[str, tuple[int, Side]] = {"train": (5_000, "train"), "test": (8_000, "test")}
UNLABELLED = 100_000
IMAGE = np.dtype([("planes", "u1", (3, SIDE, SIDE))])


def claims(folder: str | Path) -> bool:
    """Whether a folder holds STL-10's binary files, by their names."""
    root = _root(folder)
    return any((root / name).is_file() for name in ("train_X.bin", "unlabeled_X.bin"))


class STL10(BinaryCorpus):
    """Those of train, test and unlabeled that lie in ``root``, or in its ``stl10_binary``; any number of images each.

    What is published as test is declared test, all else train: the unlabelled images are unconditional items of the
    training side, left out with ``unlabelled=False``. Groups of near-duplicates are kept in the folder ``cache``.

    Raises:
        ValueError: a file is absent, truncated or of the wrong size, or nothing is there to train on.
    """

    def __init__(
        self,
        root: str | Path,
        caption_template: str = "a picture of {label}",
        *,
        cache: Path | None = None,
        unlabelled: bool = True,
    ) -> None:
        self.root, intake = _root(root), Intake()
        names = class_names(self.root / "class_names.txt", CLASSES)
        parts = [
            _labelled(self.root, name, published, side, intake)
            for name, (published, side) in PUBLISHED.items()
            if any((self.root / f"{name}_{half}.bin").exists() for half in "Xy")
        ]
        if unlabelled and (self.root / "unlabeled_X.bin").exists():
            stored = records(self.root / "unlabeled_X.bin", IMAGE, UNLABELLED, intake)
            parts.append(Part("unlabeled", stored, _images(stored), None, "train"))
        if all(part.split == "test" for part in parts):
            raise ValueError(f"{self.root} has neither train_X.bin nor unlabeled_X.bin to train on; unpack it again")
        super().__init__("stl10", parts, names, caption_template, intake, cache)

    def folds(self) -> list[np.ndarray]:
        """The ten published folds of ``fold_indices.txt``: item numbers of the training part, (1000,) each.

        Raises:
            ValueError: the file is absent, or names an image that the training part does not have.
        """
        path, train = self.root / "fold_indices.txt", self.parts[0]
        if not path.is_file() or train.name != "train":
            raise ValueError(f"{self.root} has no fold_indices.txt beside a train_X.bin; unpack the archive again")
        folds = [np.array(line.split(), np.int64) for line in path.read_text().splitlines() if line.strip()]
        if not folds or any(len(fold) == 0 or fold.min() < 0 or fold.max() >= len(train.images) for fold in folds):
            raise ValueError(f"{path} names an image beyond the {len(train.images):,} of train_X.bin")
        return folds


def _root(folder: str | Path) -> Path:
    root = Path(folder).expanduser().resolve()
    return root / FOLDER if (root / FOLDER).is_dir() else root


def _images(stored_N: np.ndarray) -> np.ndarray:
    """(N, 96, 96, 3): the planes R, G, B of an image are stored column by column."""
    planes_NCWH: np.ndarray = stored_N["planes"]
    return planes_NCWH.transpose(0, 3, 2, 1)


def _labelled(root: Path, name: str, published: int, side: Side, intake: Intake) -> Part:
    path = root / f"{name}_y.bin"
    stored = records(root / f"{name}_X.bin", IMAGE, published, intake)
    numbers = records(path, np.dtype("u1"), published, intake)
    if len(numbers) != len(stored):
        raise ValueError(
            f"{path} has {len(numbers):,} labels for the {len(stored):,} images of {name}_X.bin; "
            f"{published:,} of each are published: unpack the archive again"
        )
    return Part(name, stored, _images(stored), checked(path, np.asarray(numbers) - np.uint8(1), CLASSES), side)
