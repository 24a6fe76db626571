"""STL-10 and CIFAR as published, in small: pixels where they belong, sides as declared, and what is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from intaglio.config import CaptionDataConfig
from intaglio.data import cifar, stl10
from intaglio.data.cifar import CIFAR
from intaglio.data.prepare import prepare
from intaglio.data.splits import split
from intaglio.data.stl10 import STL10

ANIMALS = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def pictures(count: int, side: int, seed: int) -> np.ndarray:
    """(count, side, side, 3), none a near-duplicate of another."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in coarse])


def stl(root: Path, train: int = 40, test: int = 20, unlabelled: int = 30) -> dict[str, np.ndarray]:
    """Writes what the archive holds, in small; its images (N, 96, 96, 3) by part."""
    root.mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, (name, count) in enumerate({"train": train, "test": test, "unlabeled": unlabelled}.items()):
        made[name] = pictures(count, 96, seed)
        # channel, then column, then row: as the authors' MATLAB wrote it
        (root / f"{name}_X.bin").write_bytes(b"".join(x[:, :, c].tobytes("F") for x in made[name] for c in range(3)))
    (root / "train_y.bin").write_bytes(bytes(1 + k % 10 for k in range(train)))
    (root / "test_y.bin").write_bytes(bytes(10 - k % 10 for k in range(test)))
    (root / "class_names.txt").write_text("\n".join(ANIMALS))
    (root / "fold_indices.txt").write_text("0 2 4 \n1 3 39 \n")
    return made


def tens(root: Path, count: int = 20) -> np.ndarray:
    """CIFAR-10 in its binary version, in small: images of both files, test last."""
    root.mkdir(parents=True)
    images = pictures(2 * count, 32, 7)
    for name, part in (("data_batch_1", images[:count]), ("test_batch", images[count:])):
        rows = (bytes([k % 10]) + x.transpose(2, 0, 1).tobytes() for k, x in enumerate(part))
        (root / f"{name}.bin").write_bytes(b"".join(rows))
    (root / "batches.meta.txt").write_text("\n".join(ANIMALS) + "\n\n")
    return images


def hundreds(root: Path) -> np.ndarray:
    root.mkdir(parents=True)
    images = pictures(200, 32, 8)
    rows = [bytes([k % 20, 99 - k % 100]) + x.transpose(2, 0, 1).tobytes() for k, x in enumerate(images)]
    (root / "train.bin").write_bytes(b"".join(rows[:150]))
    (root / "test.bin").write_bytes(b"".join(rows[150:]))
    (root / "fine_label_names.txt").write_text("\n".join(f"kind_{k}" for k in range(100)))
    return images


def test_stl10_is_read_as_published(tmp_path):
    made = stl(tmp_path / "stl10_binary")
    assert stl10.claims(tmp_path)
    assert stl10.claims(tmp_path / "stl10_binary")
    corpus = STL10(tmp_path)
    assert len(corpus) == 90
    images = np.stack([corpus.image(i, 96) for i in range(90)])
    assert np.array_equal(images, np.concatenate(list(made.values())))
    assert isinstance(corpus.parts[0].images.base, np.memmap)
    assert [corpus.label(i) for i in (0, 11, 40, 59, 60)] == ["airplane", "bird", "truck", "airplane", None]
    assert [corpus.captions(i)[0] for i in (11, 60)] == ["a picture of bird", ""]
    assert [corpus.declared_split(i) for i in (0, 40, 60)] == ["train", "test", "train"]
    assert corpus.id(41) == "test#1"
    assert corpus.labels() == tuple(sorted(ANIMALS))
    assert corpus.label_in("two Cats, a cat") == "cat"
    assert corpus.label_in("a category") is None
    assert [fold.tolist() for fold in corpus.folds()] == [[0, 2, 4], [1, 3, 39]]
    assert "train_X.bin has 40 records of 5,000" in corpus.intake.examples["not of the published size"][0]
    assert corpus.image(3, 64).shape == (64, 64, 3)
    assert len(STL10(tmp_path, unlabelled=False)) == 60
    with pytest.raises(IndexError, match="item 90 of 90"):
        corpus.label(90)


def test_nothing_that_stands_in_the_test_split_is_trained_on(tmp_path):
    made = stl(tmp_path, unlabelled=60)
    made["unlabeled"][5] = made["test"][3]
    stored = np.ascontiguousarray(made["unlabeled"].transpose(0, 3, 2, 1))
    (tmp_path / "unlabeled_X.bin").write_bytes(stored.tobytes())
    again, corpus = (STL10(tmp_path, cache=tmp_path / "cache") for _ in range(2))
    assert again.group(65) == "test#3"
    (kept,) = (tmp_path / "cache").iterdir()
    assert np.load(kept)[65] == 43
    sides, torn = split(corpus, {"train": 0.9, "val": 0.1}, seed=0)
    assert set(sides["test"]) == {*range(40, 60), 65}
    assert torn in (0, 1)
    assert corpus.intake.counts["near-duplicate"] == 1
    assert len(np.concatenate(list(sides.values()))) == len(corpus)
    assert {corpus.label(i) for i in sides["val"]} >= {None}


def test_the_fingerprint_covers_pixels_and_labels(tmp_path):
    stl(tmp_path)
    digests = [STL10(tmp_path).fingerprint(), STL10(tmp_path).fingerprint(), STL10(tmp_path, "a {label}").fingerprint()]
    for name in ("unlabeled_X.bin", "test_y.bin"):
        changed = bytearray((tmp_path / name).read_bytes())
        changed[-1] ^= 2
        (tmp_path / name).write_bytes(changed)
        digests.append(STL10(tmp_path).fingerprint())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_source_by_name_is_prepared_for_training(tmp_path):
    stl(tmp_path / "data")
    config = CaptionDataConfig(source=str(tmp_path / "data"), image_size=32, cache=str(tmp_path / "cache"))
    prepared = prepare(config, seed=0, vocabulary=300)
    assert prepared.corpus.name == "stl10"
    assert prepared.record["training items declared as test"] == 0
    assert prepared.data.images.shape == (90, 32, 32, 3)
    assert set(prepared.splits) == {"train", "val", "test"}


@pytest.mark.parametrize(("make", "classes"), [(tens, 10), (hundreds, 100)])
def test_cifar_is_read_as_published(make, classes, tmp_path):
    form = cifar.CIFAR_10 if classes == 10 else cifar.CIFAR_100
    images = make(tmp_path / form.folder)
    assert cifar.claims(tmp_path)
    assert not stl10.claims(tmp_path)
    corpus = CIFAR(tmp_path)
    assert np.array_equal(np.stack([corpus.image(i, 32) for i in range(len(corpus))]), images)
    assert corpus.label(1) == ("bird" if classes == 10 else "kind_98")
    assert len(corpus.labels()) == classes
    assert [corpus.declared_split(i) for i in (0, len(corpus) - 1)] == ["train", "test"]


def test_pickled_batches_are_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    pickled = {"cifar-10-batches-py": ["data_batch_1", "batches.meta"], "cifar-100-python": ["train"]}
    for folder, names in pickled.items():
        home = tmp_path / folder / folder
        home.mkdir(parents=True)
        for name in names:
            (home / name).write_bytes(pickle.dumps(Bomb()))
        for root in (home, home.parent):
            assert cifar.claims(root)
            with pytest.raises(ValueError, match="opening one runs whatever program it carries"):
                CIFAR(root)
    assert not (tmp_path / "ran").exists()
    assert not cifar.claims(tmp_path)


def emptied(path: Path, to: int = 0) -> None:
    path.write_bytes(path.read_bytes()[:to])


BROKEN = {
    "truncated": (lambda r: emptied(r / "train_X.bin", 27_648 * 3 + 5), "82,949 bytes and is truncated or of another"),
    "due": (lambda r: emptied(r / "test_X.bin", 27_647), "has 221,184,000 bytes, 8,000 records of 27,648"),
    "empty": (lambda r: emptied(r / "unlabeled_X.bin"), "unlabeled_X.bin has 0 bytes"),
    "labels": (lambda r: emptied(r / "train_y.bin", 39), "39 labels for the 40 images of train_X.bin"),
    "absent": (lambda r: (r / "train_y.bin").unlink(), r"train_y.bin does not exist; the published file has 5,000"),
    "zero": (lambda r: (r / "test_y.bin").write_bytes(bytes(20)), "record 0 has a class beyond the 10"),
    "names": (lambda r: (r / "class_names.txt").write_text("cat\ndog\n"), "2 different names; 10 are expected"),
    "nameless": (lambda r: (r / "class_names.txt").unlink(), "class_names.txt does not exist; it names the 10"),
    "folds": (lambda r: (r / "fold_indices.txt").write_text("0 40\n"), "names an image beyond the 40"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_damaged_files_say_what_is_due(fault, tmp_path):
    stl(tmp_path)
    damage, message = BROKEN[fault]
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        STL10(tmp_path).folds()


def test_a_folder_without_a_training_side_is_refused(tmp_path):
    stl(tmp_path / "stl")
    for name in ("train_X.bin", "train_y.bin", "unlabeled_X.bin"):
        (tmp_path / "stl" / name).unlink()
    with pytest.raises(ValueError, match=r"neither train_X\.bin nor unlabeled_X\.bin"):
        STL10(tmp_path / "stl")
    tens(tmp_path / "ten")
    (tmp_path / "ten" / "data_batch_1.bin").unlink()
    with pytest.raises(ValueError, match="nothing but the test split"):
        CIFAR(tmp_path / "ten")
    with pytest.raises(ValueError, match=r"name the folder of the \.bin files"):
        CIFAR(tmp_path)
    stl(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"has no \{label\}"):
        STL10(tmp_path / "whole", "a picture")
