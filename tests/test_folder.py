"""Image folders: every accepted form, and what is dropped, merged or refused, with its reason."""

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from intaglio.data.folder import ImageFolder
from intaglio.data.metadata import read_table

SHARED = Path(__file__).parents[2] / "shared/data"


def picture(path: Path, seed: int) -> None:
    """An image that is no near-duplicate of another seed's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(path)


def folder(root: Path, rows: list[dict[str, object]], images: int = 4, name: str = "metadata.jsonl") -> Path:
    """``images`` pictures 0.png, 1.png, … beside a table of ``rows``."""
    for seed in range(images):
        picture(root / f"{seed}.png", seed)
    if name.endswith(".json"):
        (root / name).write_text(json.dumps(rows))
    else:
        (root / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return root


def captioned(*captions: str) -> list[dict[str, object]]:
    return [{"file_name": f"{k}.png", "caption": caption} for k, caption in enumerate(captions)]


def refusal(*args: object, **options: object) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller reads the message
        ImageFolder(*args, **options)
    return str(caught.value)


FORMS = {
    "metadata.csv": 'file_name,caption\n0.png,"a ship, at sea"\n1.png,a tower\n',
    "captions.csv": "\ufefffilename;text\r\n0.png;a ship, at sea\r\n1.png;a tower\r\n",
    "metadata.tsv": "image\tcaption\n0.png\ta ship, at sea\n1.png\ta tower\n",
    "captions.jsonl": '{"path": "./0.png", "caption": "a ship,  at\\tsea"}\n\n'
    '{"path": "1.png", "caption": "a tower"}\n',
    "metadata.json": '[{"id": 7, "filename": "0.png", "captions": ["a ship, at sea"]},'
    ' {"id": 8, "filename": "1.png", "captions": ["a tower"]}]',
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_table_is_read(name, tmp_path):
    folder(tmp_path, [], images=2, name="unused.txt")
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    corpus = ImageFolder(tmp_path, 16)
    assert [corpus.captions(i) for i in range(len(corpus))] == [("a ship, at sea",), ("a tower",)]
    assert [corpus.id(i) for i in range(2)] == (["7", "8"] if name.endswith("json") else ["0.png", "1.png"])
    assert name in corpus.describe()
    assert not corpus.intake.counts


def test_columns_are_mapped_and_said(tmp_path):
    rows = [{"plate": f"{k}.png", "title": f"title {k}", "text": "long", "kind": "abc"[k % 2]} for k in range(4)]
    folder(tmp_path, rows)
    columns = {"file": "plate", "caption": "title", "label": "kind"}
    corpus = ImageFolder(tmp_path, 16, columns=columns)
    assert corpus.captions(2) == ("title 2",)
    assert corpus.labels() == ("a", "b")
    assert "file from 'plate', caption from 'title', label from 'kind'; not used: text" in corpus.describe()
    assert "has no column with file names; call it file_name" in refusal(tmp_path, columns={"caption": "title"})
    assert "no column 'titel'; did you mean 'title'?" in refusal(
        tmp_path, columns={"file": "plate", "caption": "titel"}
    )
    assert "'captoin' is not a role; did you mean 'caption'?" in refusal(tmp_path, columns={"captoin": "title"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.csv",
            "file_name,caption\n0.png,a ship, at sea\n",
            "line 2 has more cells than the header; put quotes",
        ),
        ("metadata.csv", 'file_name,caption\n0.png,"a ship\n1.png,x\n', "unexpected end of data; correct the quotes"),
        ("metadata.csv", "file_name,caption,caption\n0.png,a,b\n", "two columns of one name"),
        ("metadata.csv", "file_name,caption\n", "has no rows; write one for each image"),
        ("metadata.csv", "file_name,width\n0.png,3\n", "has neither captions nor labels"),
        ("metadata.csv", b"file_name,caption\n0.png,caf\xe9\n", "is not UTF-8 at byte 27; save it as UTF-8"),
        ("metadata.jsonl", '{"file_name": "0.png"\n', "line 1 is not JSON"),
        ("metadata.jsonl", "[1]\n", "line 1 is not an object like"),
        ("metadata.jsonl", '{"file_name": "0.png", "caption": {"en": "x"}}\n', "'caption' is no text but dict"),
        ("metadata.json", '{"images": []}', "is not a list; write"),
        ("metadata.parquet", "PAR1", "is not a known form of metadata; write it as .csv"),
    ],
)
def test_a_broken_table_is_refused_with_the_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="metadata") as caught:
        read_table(path)
    assert message in str(caught.value)


def test_captions_are_normalised_and_nothing_of_them_is_lost(tmp_path):
    long = "word " * 50_000
    texts = ["cafe\u0301 \n au  lait", "木版画 🖼️ ксилография", long, "half \ud83d of a pair"]
    corpus = ImageFolder(folder(tmp_path, captioned(*texts)), 16)
    assert corpus.captions(0) == ("café au lait",)
    assert corpus.captions(1) == ("木版画 🖼️ ксилография",)
    assert corpus.captions(2) == (long.strip(),)
    assert corpus.captions(3) == ("half \ufffd of a pair",)
    assert corpus.intake.counts["broken character in a caption"] == 1


def test_missing_and_empty_captions_drop_the_item_and_are_counted(tmp_path):
    rows = [*captioned("a ship", "  ", "a tower"), {"file_name": "3.png", "caption": None}]
    folder(tmp_path, rows)
    corpus = ImageFolder(tmp_path, 16, bad_limit=0.5)
    assert [corpus.id(i) for i in range(len(corpus))] == ["0.png", "2.png"]
    assert corpus.intake.counts["no caption"] == 2
    assert corpus.intake.examples["no caption"][0] == "1.png has neither caption nor label; dropped"
    message = refusal(tmp_path)
    assert "2 of 4 items" in message
    assert "0 unreadable, 2 without a caption" in message
    assert "--data.bad_limit 0.5" in message


def test_rows_of_one_file_are_merged(tmp_path):
    rows = [
        {"id": 1, "file_name": "0.png", "caption": "a ship", "label": "ship", "split": "train"},
        {"id": 2, "file_name": "./0.png", "caption": "a vessel", "label": "boat", "split": "val"},
        {"id": 1, "file_name": "0.png", "caption": "a ship", "label": "ship", "split": "train"},
        {"id": 1, "file_name": "1.png", "caption": ["a tower", "a tower", "a keep"], "split": "extra"},
        {"id": 1, "file_name": "2.png", "caption": "a tree", "split": "validation"},
    ]
    corpus = ImageFolder(folder(tmp_path, rows), 16)
    assert [corpus.captions(i) for i in range(3)] == [("a ship", "a vessel"), ("a tower", "a keep"), ("a tree",)]
    assert [corpus.id(i) for i in range(3)] == ["1", "1#2", "1#3"]
    assert [corpus.label(i) for i in range(3)] == ["ship", None, None]
    assert [corpus.declared_split(i) for i in range(3)] == ["train", None, "val"]
    assert corpus.intake.counts == {
        "row with one more caption": 1,
        "repeated row": 1,
        "conflicting label": 1,
        "conflicting split": 1,
        "unknown split": 1,
        "repeated id": 2,
        "not in the table": 1,
    }
    assert corpus.intake.examples["conflicting label"] == [
        "metadata.jsonl line 2: 0.png is 'ship' already; 'boat' not used"
    ]


def test_names_that_lead_outside_are_never_opened(tmp_path):
    picture(tmp_path / "secret.png", 99)
    root = folder(tmp_path / "root", [])
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "own.png").symlink_to(root / "3.png")
    outside = ["../secret.png", "a/../../secret.png", str(tmp_path / "secret.png"), "C:\\secret.png", "..\\secret.png"]
    outside += ["link.png", "linked/secret.png"]
    absent = ["absent.png", "nul\0.png", "x" * 5000, "https://example.org/a.png", "half\ud800.png"]
    rows = [{"file_name": name, "caption": "x"} for name in [*outside, *absent, "", "0.png", "1.png", "own.png"]]
    corpus = ImageFolder(folder(root, rows), 16)
    assert [corpus.id(i) for i in range(len(corpus))] == ["0.png", "1.png", "own.png"]
    assert corpus.intake.counts["leads outside the folder"] == len(outside)
    assert corpus.intake.counts["absent file"] == len(absent)
    assert corpus.intake.counts["row without a file name"] == 1
    assert corpus.intake.examples["leads outside the folder"][0] == (
        "metadata.jsonl line 1: '../secret.png' was not opened"
    )


def test_a_table_of_absent_files_says_so(tmp_path):
    message = refusal(folder(tmp_path, captioned("a", "b"), images=0))
    assert "gives 0 usable images; at least two are needed" in message
    assert "2 × absent file, e.g. metadata.jsonl line 1: '0.png' was not opened" in message


def test_class_folders(tmp_path):
    for k, label in enumerate(["ship", "old_tower", "ship", "old_tower"]):
        picture(tmp_path / label / "deep" / f"{k}.PNG", k)
    picture(tmp_path / "stray.png", 9)
    (tmp_path / "ship" / "photo.heic").write_bytes(b"x")
    (tmp_path / "ship" / "._0.png").write_bytes(b"not seen")
    corpus = ImageFolder(tmp_path, 16)
    assert corpus.labels() == ("old_tower", "ship")
    assert corpus.captions(0) == ("a picture of old tower",)
    assert corpus.label_in("An Old Tower by a ship") == "old_tower"
    assert corpus.label_in("shipping") is None
    assert corpus.intake.counts["outside the classes"] == 1
    assert corpus.intake.examples["other file"] == ["ship/photo.heic has no ending of an image that is read"]
    assert ImageFolder(tmp_path, 16, caption_template="{label}, engraved").captions(3) == ("ship, engraved",)
    assert "has no {label}" in refusal(tmp_path, caption_template="a picture")


def test_split_folders_are_declared_splits(tmp_path):
    for k, part in enumerate(["train/a", "train/b", "validation/a", "test/b", "spare/a"]):
        picture(tmp_path / part / f"{k}.png", k)
    corpus = ImageFolder(tmp_path, 16)
    found = {corpus.id(i): (corpus.declared_split(i), corpus.label(i)) for i in range(len(corpus))}
    assert found == {
        "test/b/3.png": ("test", "b"),
        "train/a/0.png": ("train", "a"),
        "train/b/1.png": ("train", "b"),
        "validation/a/2.png": ("val", "a"),
    }
    assert corpus.intake.counts["outside the splits"] == 1


def test_folders_that_cannot_be_used_say_what_they_hold(tmp_path):
    assert "is not a folder; name the folder" in refusal(tmp_path / "absent")
    assert "it holds 0 images (no files at all)" in refusal(tmp_path)
    picture(tmp_path / "images" / "a.png", 0)
    picture(tmp_path / "b.png", 1)
    message = refusal(tmp_path)
    assert "has neither a table nor class subfolders; it holds 2 images (2 .png)" in message
    assert "accepted are" in message
    (tmp_path / "labels.csv").write_text("file,label\nb.png,x\n")
    message = refusal(tmp_path)
    assert "gives 1 usable image; at least two are needed, one to learn from and one held out" in message
    assert "1 × not in the table, e.g. no row of labels.csv names images/a.png" in message
    (tmp_path / "captions.csv").write_text("file,caption\nb.png,x\n")
    assert "holds captions.csv and labels.csv; choose one, for example --data.metadata captions.csv" in refusal(
        tmp_path
    )
    assert "is not a file; name one in" in refusal(tmp_path, metadata="absent.csv")


def test_a_named_table_in_a_subfolder_speaks_of_its_own_folder(tmp_path):
    folder(tmp_path / "plates", captioned("a", "b"), name="list.jsonl")
    assert ImageFolder(tmp_path, 16, metadata="plates/list.jsonl").id(0) == "plates/0.png"


def test_unreadable_images_are_counted_and_too_many_are_refused(tmp_path):
    folder(tmp_path, captioned(*(f"item {k}" for k in range(40))), images=40)
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "9.png").write_bytes((tmp_path / "9.png").read_bytes()[:-200])
    corpus = ImageFolder(tmp_path, 16)
    assert len(corpus) == 38
    assert corpus.captions(3) == ("item 4",)
    assert corpus.intake.counts["unreadable"] == 2
    assert "3.png is empty (0 bytes): copy it again or remove it" in corpus.intake.examples["unreadable"][0]
    for k in range(10, 18):
        (tmp_path / f"{k}.png").write_text("no picture")
    message = refusal(tmp_path)
    assert "10 of 40 items" in message
    assert message.count("is not an image of a known format") == 3
    assert "--data.bad_limit 0.3" in message
    assert len(ImageFolder(tmp_path, 16, bad_limit=0.3)) == 30
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    assert "gives 0 usable images" in refusal(tmp_path, bad_limit=1.0, cache=tmp_path / "cache")


def test_the_cache_gives_the_same_and_notices_what_changed(tmp_path, monkeypatch):
    root, cache = folder(tmp_path / "root", captioned(*(f"item {k}" for k in range(30))), images=30), tmp_path / "cache"
    (root / "3.png").write_bytes(b"")
    plain, first = ImageFolder(root, 32), ImageFolder(root, 32, cache=cache)
    decode = "intaglio.data.pixels.read_images"
    with monkeypatch.context() as patch:
        patch.setattr(decode, lambda *_: pytest.fail("decoded again"))
        second = ImageFolder(root, 32, cache=cache)
    for other in (first, second):
        assert other.fingerprint() == plain.fingerprint()
        assert other.intake.as_dict() == plain.intake.as_dict()
        for i in range(29):
            np.testing.assert_array_equal(other.image(i, 32), plain.image(i, 32))
        np.testing.assert_array_equal(other.pixels(), plain.pixels())
    np.testing.assert_array_equal(first.image(5, 48), ImageFolder(root, 48).image(5, 48))
    assert ImageFolder(root, 48).fingerprint() == plain.fingerprint()
    assert not list(cache.glob("*.part"))

    stored = max(cache.glob("*.npy"), key=os.path.getsize)
    stored.write_bytes(stored.read_bytes()[:-100])
    np.testing.assert_array_equal(ImageFolder(root, 32, cache=cache).image(28, 32), plain.image(28, 32))
    picture(root / "5.png", 555)
    os.utime(root / "5.png", ns=(1, 1))
    changed = ImageFolder(root, 32, cache=cache)
    assert changed.fingerprint() != plain.fingerprint()
    assert (changed.image(4, 32) != plain.image(4, 32)).any()


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path):
    root = folder(tmp_path / "root", captioned("a", "b", "c", "d"))
    message = "cannot write the pixel cache .*; make 1 MiB free or choose another place with --data.cache"
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match=message):
        ImageFolder(root, cache=tmp_path / "taken")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # acts as a disk that fills up half-way
    try:
        with pytest.raises(OSError, match=message):
            ImageFolder(root, cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").iterdir())


def test_near_duplicates_and_the_group_column_make_one_group(tmp_path):
    rows = [dict(row, label=label) for row, label in zip(captioned("a", "b", "c", "d", "e"), "xxyyy", strict=True)]
    for row, group, split in zip(rows, [None, "g", "g", None, None], ["train", "val", None, None, None], strict=True):
        row |= {"group": group, "split": split}
    folder(tmp_path, rows, images=4)
    with Image.open(tmp_path / "0.png") as image:
        image.resize((40, 40)).save(tmp_path / "2.png")
    picture(tmp_path / "4.png", 44)
    corpus = ImageFolder(tmp_path, 32)
    assert [corpus.group(i) for i in range(5)] == ["0.png", "0.png", "0.png", "3.png", "4.png"]
    assert corpus.intake.examples["near-duplicate"] == ["2.png looks like 0.png; both stay on one side"]
    assert corpus.intake.examples["near-duplicate of another label"] == ["2.png is 'y', 0.png is 'x'"]
    assert corpus.intake.examples["group declared on two sides"] == [
        "0.png in train but 1.png in val; the whole group is held out"
    ]


@pytest.mark.data
@pytest.mark.parametrize(("name", "images"), [("dore", 80), ("treatise", 367)])
def test_the_engravings_open(name, images):
    if not (SHARED / "engravings" / name).is_dir():
        pytest.skip(f"{SHARED / 'engravings'} is absent")
    corpus = ImageFolder(SHARED / "engravings" / name)
    assert len(corpus) == images
    assert all(corpus.captions(i)[0] for i in range(images))
    assert corpus.intake.counts["unreadable"] == 0


@pytest.mark.data
def test_the_clothing_photos_open_and_open_again_at_once(tmp_path):
    if not (SHARED / "clothing").is_dir():
        pytest.skip(f"{SHARED / 'clothing'} is absent")
    started = time.perf_counter()
    corpus = ImageFolder(SHARED / "clothing", cache=tmp_path)
    first = time.perf_counter() - started
    again = ImageFolder(SHARED / "clothing", cache=tmp_path)
    assert first < 30
    assert time.perf_counter() - started - first < 3
    assert again.fingerprint() == corpus.fingerprint()
    assert len(corpus) == 3409
    assert len(corpus.labels()) == 10
    assert sum(corpus.declared_split(i) == "val" for i in range(3409)) == 341
    assert corpus.label_in(corpus.captions(0)[0]) == corpus.label(0)
