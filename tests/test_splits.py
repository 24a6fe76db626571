"""Near-duplicates are found and different pictures are not; splits are whole, declared, even and repeatable."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from intaglio.data.corpus import Corpus, Intake
from intaglio.data.duplicates import near_duplicates
from intaglio.data.pixels import SUFFIXES, read_image, read_images
from intaglio.data.splits import split

SHARED = Path(__file__).parents[2] / "shared/data"
EVEN = {"train": 0.9, "val": 0.1}


class Facts(Corpus):
    """A corpus of groups, labels and declared splits alone."""

    def __init__(
        self, groups: list[str], labels: list[str | None] | None = None, declared: dict[int, str] | None = None
    ):
        self.name, self.intake = "facts", Intake()
        self.groups, self.of, self.declared = groups, labels or [None] * len(groups), declared or {}

    def __len__(self):
        return len(self.groups)

    def image(self, i, size):
        return np.zeros((size, size, 3), np.uint8)

    def captions(self, i):
        return (self.groups[i],)

    def fingerprint(self):
        return ""

    def group(self, i):
        return self.groups[i]

    def label(self, i):
        return self.of[i]

    def labels(self):
        return tuple(sorted({label for label in self.of if label}))

    def declared_split(self, i):
        return self.declared.get(i)


def distinct(n: int) -> list[str]:
    return [f"g{k}" for k in range(n)]


def test_every_item_stands_on_one_side_the_same_each_time():
    sides, torn = split(Facts(distinct(1000)), EVEN, seed=1)
    assert {side: len(items) for side, items in sides.items()} == {"train": 900, "val": 100}
    assert sorted(np.concatenate(list(sides.values()))) == list(range(1000))
    assert torn == 0
    again, other = (split(Facts(distinct(1000)), EVEN, seed)[0]["val"] for seed in (1, 2))
    np.testing.assert_array_equal(again, sides["val"])
    assert len(np.intersect1d(other, again)) < 30


def test_groups_stay_whole_and_those_saved_are_counted():
    rng = np.random.default_rng(0)
    groups = [f"g{k}" for k in rng.integers(0, 150, 1000)]
    sides, torn = split(Facts(groups), EVEN, seed=0)
    assert not {groups[i] for i in sides["train"]} & {groups[i] for i in sides["val"]}
    assert len(sides["val"]) == pytest.approx(100, abs=10)
    # A group of m items escapes a random split with probability .9^m + .1^m.
    expected = sum(1 - 0.9**m - 0.1**m for m in Counter(groups).values())
    assert torn == pytest.approx(expected, rel=0.15)


def test_labels_are_spread_evenly():
    labels: list[str | None] = ["rare"] * 20 + ["common"] * 960 + [None] * 20
    sides, _ = split(Facts(distinct(1000), labels), EVEN, seed=3)
    assert Counter(labels[i] for i in sides["val"]) == {"rare": 2, "common": 96, None: 2}


def test_declared_sides_are_honoured():
    declared = dict.fromkeys(range(50), "val") | dict.fromkeys(range(50, 90), "test")
    sides, _ = split(Facts(distinct(200), declared=declared | dict.fromkeys(range(90, 200), "train")), EVEN, seed=0)
    assert [len(sides[side]) for side in ("train", "val", "test")] == [110, 50, 40]
    assert set(sides["val"]) == set(range(50))
    sides, _ = split(Facts(distinct(200), declared=declared), EVEN, seed=0)  # what is not held out may train
    assert [len(sides[side]) for side in ("train", "val", "test")] == [110, 50, 40]
    sides, _ = split(Facts(distinct(200), declared=declared | {199: "train"}), EVEN, seed=0)  # 109 are left to chance
    assert [len(sides[side]) for side in ("train", "val", "test")] == [99, 61, 40]


def test_a_side_that_is_not_declared_comes_out_of_training():
    declared = dict.fromkeys(range(40), "test") | dict.fromkeys(range(40, 200), "train")
    sides, _ = split(Facts(distinct(200), declared=declared), EVEN, seed=0)
    assert [len(sides[side]) for side in ("train", "val", "test")] == [144, 16, 40]
    assert set(sides["test"]) == set(range(40))


def test_a_group_declared_on_two_sides_is_held_out():
    declared = {0: "train", 1: "val", 2: "train", 3: "train", 4: "test", 5: "val"}
    sides, _ = split(Facts(["a", "a", "a", "b", "c", "c"], declared=declared), EVEN, seed=0)
    assert {side: items.tolist() for side, items in sides.items()} == {"train": [3], "val": [0, 1, 2], "test": [4, 5]}


def test_no_side_is_empty():
    for n in range(2, 12):
        sides, _ = split(Facts(distinct(n)), EVEN, seed=n)
        assert min(len(items) for items in sides.values()) >= 1
    sides, _ = split(Facts(["big"] * 50 + ["small"]), EVEN, seed=0)
    assert sides["val"].tolist() == [50]
    with pytest.raises(ValueError, match=r"nothing is left for val: 50 items form 1 groups.*Add different images"):
        split(Facts(["one"] * 50), EVEN, seed=0)
    with pytest.raises(ValueError, match=r"don't add to 1; correct --data.held_out"):
        split(Facts(distinct(9)), {"train": 0.9, "val": 0.2}, seed=0)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "x1.5": lambda image: image.resize((image.width * 3 // 2, image.height * 3 // 2), Image.Resampling.BILINEAR),
    "jpeg 60": lambda image: jpeg(image, 60),
    "jpeg 30": lambda image: jpeg(image, 30),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "flatter": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
}


def drawing(rng: np.random.Generator) -> Image.Image:
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC)


def copies_found(originals: np.ndarray, images: list[Image.Image], folder: Path) -> dict[str, float]:
    """Share of the copies of ``images`` that fall into the cluster of their original, by kind of copy."""
    found = {}
    for kind, change in COPIES.items():
        squares = []
        for image in images:
            change(image).save(folder / "copy.bmp")
            squares.append(read_image(folder / "copy.bmp", originals.shape[1])[0])
        clusters = near_duplicates(np.concatenate([originals, squares]))
        found[kind] = float((clusters[len(originals) :] == clusters[: len(originals)]).mean())
    return found


def test_copies_are_found_and_different_pictures_are_not(tmp_path):
    rng = np.random.default_rng(0)
    images = [drawing(rng) for _ in range(150)]
    for k, image in enumerate(images):
        image.save(tmp_path / f"{k}.png")
    originals = np.stack([read_image(tmp_path / f"{k}.png", 64)[0] for k in range(150)])
    np.testing.assert_array_equal(near_duplicates(originals), np.arange(150))
    found = copies_found(originals[:50], images[:50], tmp_path)
    assert min(found.values()) == 1, found


def test_clusters_of_degenerate_inputs():
    assert near_duplicates(np.zeros((0, 64, 64, 3), np.uint8)).tolist() == []
    flat = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (9, 200, 9, 200, 50)])
    assert near_duplicates(flat).tolist() == [0, 1, 0, 1, 4]
    noise = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    many = np.concatenate([noise, noise[::-1]])
    np.testing.assert_array_equal(near_duplicates(many), np.concatenate([np.arange(300), np.arange(300)[::-1]]))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "folder", "merged"),
    [
        ("dore", "engravings/dore/images", set()),
        # One bust, printed from the wood and from its cast in metal.
        ("treatise", "engravings/treatise/images", {("illus_637a", "illus_637b")}),
        # One photo, filed under shorts and under skirt.
        (
            "clothing",
            "clothing/train",
            {("6075b4a5-5b1a-4ce0-aea0-9dbfbca7c35c", "637a56e4-7fa6-4f75-8859-0f8902461554")},
        ),
    ],
)
def test_limits_hold_on_real_pictures(name, folder, merged, tmp_path):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"{SHARED / folder} is absent")
    paths = sorted(path for path in (SHARED / folder).rglob("*") if path.suffix in SUFFIXES)
    originals = np.stack([result[0] for result in read_images(paths, 64) if isinstance(result, tuple)])
    clusters = near_duplicates(originals)
    pairs = {tuple(sorted((paths[c].stem, paths[i].stem))) for i, c in enumerate(clusters) if i != c}
    assert pairs == merged
    which = np.random.default_rng(0).permutation(len(paths))[:80]
    images = []
    for k in which:
        with Image.open(paths[k]) as image:
            rgba = image.convert("RGBA")
            images.append(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    found = copies_found(originals[which], images, tmp_path)
    assert np.mean(list(found.values())) >= 0.99, found
    assert min(found.values()) >= 0.97, found


def test_groups_of_all_sizes_are_held_out_alike():
    """Ten items a group or two: the share that is held out does not hang on it."""
    sizes = np.random.default_rng(0).integers(1, 12, 3000)
    groups = np.repeat(np.arange(3000), sizes)
    corpus = Facts([f"g{k}" for k in groups])
    chosen, _ = split(corpus, {"train": 0.9, "val": 0.1}, seed=0)
    held_out = np.unique(groups[chosen["val"]])
    assert len(chosen["val"]) == pytest.approx(0.1 * len(groups), rel=0.01)
    assert sizes[held_out].mean() == pytest.approx(sizes.mean(), rel=0.06)
