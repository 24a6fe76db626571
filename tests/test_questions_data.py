"""Questions about images: every form of table, one side of a split for each image, one spelling for each answer."""

import csv
import io
import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from intaglio.config import QuestionDataConfig
from intaglio.data.prepare import notices
from intaglio.data.questions.corpus import Asked, QuestionCorpus, normal, right
from intaglio.data.questions.prepare import Questioned, about_engravings, prepare_questions, split_questions
from intaglio.data.questions.read import Files, read_questions
from intaglio.data.tokenizer import END, PAD, START

EASY = Path(__file__).parents[2] / "shared" / "data" / "easy-vqa"
Rows = list[dict[str, Any]]


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def pictures(folder: Path, count: int, first: int = 0) -> None:
    """0.png, 1.png, …, no two alike; ``first`` makes those of another folder different."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        coarse = np.random.default_rng(first + k).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{k}.png")


def asking(image: object, question: str, answer: object, **more: object) -> dict[str, Any]:
    return {"question": question, "answer": answer, "img_id": image, **more}


def text_of(rows: Rows, form: str) -> str:
    """A table of some form; ``list`` is easy-VQA's."""
    if form in ("csv", "tsv"):
        out = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(out, names, delimiter="," if form == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()
    if form == "jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    kept = [[row["question"], row["answer"], row["img_id"]] for row in rows] if form == "list" else rows
    return json.dumps(kept, ensure_ascii=False)


def vqa(root: Path, rows: Rows, form: str = "json", images: int = 6, first: int = 0) -> Path:
    """A folder of pictures with a table of questions."""
    pictures(root / "images", images, first)
    (root / f"questions.{'json' if form == 'list' else form}").write_text(text_of(rows, form), encoding="utf-8")
    return root


def usual(images: int = 6) -> Rows:
    """Two questions about each image, one of them a yes-or-no question."""
    answers = ("a cat", "a dog", "a fish")
    return [
        row
        for k in range(images)
        for row in (
            asking(k, "what is it?", answers[k % 3]),
            asking(k, "is it a cat?", "yes" if k % 3 == 0 else "no"),
        )
    ]


def prepared(root: Path | str, **more: Any) -> Questioned:
    options: dict[str, Any] = {"image_size": 32, "held_out": 0.3, **more}
    return prepare_questions(QuestionDataConfig(source=str(root), **options), seed=0, vocabulary=300)


def told(corpus: QuestionCorpus) -> list[tuple[str, str, tuple[str, ...], str]]:
    return [(corpus.images.id(a.image), a.question, a.answers, a.kind) for a in corpus.asked]


# Forms


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "list"])
def test_every_form_of_table_says_the_same(form: str, tmp_path: Path) -> None:
    corpus = read_questions(vqa(tmp_path / "a", usual(), form), 16)
    assert told(corpus) == told(read_questions(vqa(tmp_path / "b", usual(), "json"), 16))
    assert told(corpus)[:2] == [
        ("images/0.png", "what is it?", ("a cat",), "what is"),
        ("images/0.png", "is it a cat?", ("yes",), "yes or no"),
    ]
    assert f"12 questions about 6 images; questions.{form if form != 'list' else 'json'}: " in corpus.describe()
    assert "answer from 'answer'" in corpus.describe()
    assert not corpus.intake.counts


def test_a_spreadsheets_csv_is_read(tmp_path: Path) -> None:
    vqa(tmp_path, usual())
    (tmp_path / "questions.json").unlink()
    table = "\ufeffQuestion ;Answer;Img_ID;comment\r\n" + "".join(
        f'"{row["question"]}";{row["answer"]};{row["img_id"]}.0;x\r\n' for row in usual()
    )
    (tmp_path / "questions.csv").write_bytes(table.encode())
    corpus = read_questions(tmp_path, 16)
    assert [a.answers for a in corpus.asked] == [(row["answer"],) for row in usual()]
    assert corpus.describe().endswith("image from 'Img_ID'; not used: comment")


def test_columns_are_mapped_whatever_their_spelling(tmp_path: Path) -> None:
    names = {"question": "câu hỏi", "answer": "trả lời", "img_id": "ảnh", "type": "loại"}
    rows = [{nfd(names[k]): v for k, v in (row | {"type": "k"}).items()} for row in usual()]
    columns = {"question": "câu hỏi", "answer": "trả lời", "image": "ảnh", "type": nfd("loại")}
    corpus = read_questions(vqa(tmp_path, rows, "csv"), 16, columns=columns)
    assert [(a.question, a.answers) for a in corpus.asked] == [(r["question"], (r["answer"],)) for r in usual()]
    assert {a.kind for a in corpus.asked} == {"k"}


def test_images_are_found_by_file_by_name_and_by_coco_number(tmp_path: Path) -> None:
    vqa(tmp_path, [])
    pictures(tmp_path / ".thumbs", 6, first=50)  # hidden, never meant
    (tmp_path / "images" / "5.png").rename(tmp_path / "images" / "000000000042.png")
    files = Files(tmp_path, tmp_path)
    assert {files.find(name) for name in ("images/1.png", "./images\\1.png", "1.png", "1", "1.0")} == {"images/1.png"}
    assert {files.find(name) for name in ("42", "000000000042.png")} == {"images/000000000042.png"}
    assert [files.find(name) for name in ("../1.png", "9", "12345", "", "²")] == [None] * 5


def test_train_and_test_folders_whose_numbers_restart_are_never_mixed(tmp_path: Path) -> None:
    for side, first, answer in (("train", 0, "cat"), ("test", 100, "dog")):
        vqa(tmp_path / side, [asking(k, "what is it?", answer) for k in range(30)], "list", 30, first)
    (tmp_path / "test" / "images" / "7.png").unlink()  # train has a 7.png too
    corpus = read_questions(tmp_path, 16)
    assert {(corpus.images.id(a.image).split("/")[0], *a.answers) for a in corpus.asked} == {
        ("train", "cat"),
        ("test", "dog"),
    }
    assert len(corpus) == 59
    assert corpus.intake.examples["image not found"] == ["test/questions.json entry 8: there is no image '7'; left out"]
    sides, _ = split_questions(corpus, 0.2, seed=0)
    assert {s: len(items) for s, items in sides.items()} == {"train": 24, "val": 6, "test": 29}
    assert {corpus.declared_split(int(i)) for i in sides["val"]} == {"train"}
    assert prepared(tmp_path).record["training items declared as test"] == 0


def test_tables_of_two_sides_may_share_one_folder_of_images(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 8)
    for side, images in (("train", range(6)), ("validation", range(6, 8))):
        (tmp_path / side).mkdir()
        rows = [asking(k, "what is it?", "cat") for k in images]
        (tmp_path / side / "questions.csv").write_text(text_of(rows, "csv"))
    corpus = read_questions(tmp_path, 16)
    assert Counter(corpus.declared_split(i) for i in range(8)) == {"train": 6, "val": 2}


# Spelling


@pytest.mark.parametrize("write", [str, nfd], ids=["composed", "decomposed"])
def test_vietnamese_is_one_text_however_it_is_written(write: Any, tmp_path: Path) -> None:
    question, answer, name = "Con mèo  ở đâu trong bức ảnh?", "ở dưới ghế", "Ảnh số một"
    rows = [asking(write(f"{name} {k}"), write(question), write(answer if k % 2 else "không")) for k in range(6)]
    vqa(tmp_path, rows, "csv")
    for k in range(6):
        # A Mac writes file names decomposed, everybody else composed: each against the table's other form.
        other = nfd if write is str else str
        (tmp_path / "images" / f"{k}.png").rename(tmp_path / "images" / f"{other(f'{name} {k}')}.png")
    corpus = read_questions(tmp_path, 16)
    assert len(corpus) == 6
    assert {a.question for a in corpus.asked} == {"Con mèo ở đâu trong bức ảnh?"}
    assert [a.answers for a in corpus.asked] == [("không",), (answer,)] * 3
    assert [a.kind for a in corpus.asked] == ["yes or no", "con mèo"] * 3
    assert all(right(spell(" Ở dưới GHẾ. "), corpus.asked[1]) for spell in (str, nfd))
    assert not right("ơ dươi ghê", corpus.asked[1])  # the marks are part of the word
    data = prepared(tmp_path)
    assert data.answers_of(np.array([1])) == [normal(nfd(answer))]
    assert data.tokenizer.decode(data.data.answers[data.data.first[1]]) == answer


def test_answers_are_compared_by_what_they_say() -> None:
    asked = Asked(0, "?", ("Yes", "Có.", "..."))
    assert all(right(given, asked) for given in ("yes", " YES. ", "yes!", "có", nfd("CÓ"), "..."))
    assert not any(right(given, asked) for given in ("", "ye", "yes yes", "co", "cò"))
    assert [normal(text) for text in ("Hai\u00a0 con\n mèo?", "3.5", "?", "STRASSE", "straße")] == [
        "hai con mèo",
        "3.5",
        "?",
        "strasse",
        "strasse",
    ]


def test_words_in_any_script_reach_the_batch_as_they_are(tmp_path: Path) -> None:
    questions = [
        "Con mèo màu gì, please — 何色ですか?",
        "🐈‍⬛👩🏽‍🚀 what is it 🤔?",
        '<b>what</b> is it?&nbsp;<script>alert("1")</script>',
        '=HYPERLINK("x"), "quoted"; a,b\tc',
        "ما هذا؟",
        "[PAD] [START] [END] [UNK]",
    ]
    rows = [asking(k, question, "🐟 số 7 & <i>") for k in range(6) for question in questions]
    data = prepared(vqa(tmp_path, rows, "csv"), question_length=200, answer_length=50)
    said = {data.tokenizer.decode(ids) for ids in data.data.questions}
    assert said == {" ".join(question.split()) for question in questions}
    assert {data.tokenizer.decode(ids) for ids in data.data.answers} == {"🐟 số 7 & <i>"}
    assert data.record["unknown pieces"]["questions"] == 0
    assert not data.corpus.intake.counts


# Answers and kinds


@pytest.mark.parametrize("several", ["list", "rows"])
def test_several_answers_are_all_right_and_each_is_taught(several: str, tmp_path: Path) -> None:
    rows = usual()
    if several == "list":
        rows[0] = asking(0, "what is it?", ["a cat", "", "a dogfish", "a cat"])
    else:
        rows += [asking(0, "what is it?", "a dogfish"), asking(0, "what is it?", "a cat")]
    corpus = read_questions(vqa(tmp_path, rows, "jsonl"), 16)
    assert len(corpus) == 12
    assert corpus.asked[0].answers == ("a cat", "a dogfish")
    expected = {"one more answer to a question": 1, "repeated question": 1} if several == "rows" else {}
    assert corpus.intake.counts == expected
    assert right("A dogfish", corpus.asked[0])
    data = prepared(tmp_path, together=1)
    assert data.answers_of(np.arange(2)) == ["a cat", "yes"]

    def answers(batch: Any) -> list[str]:
        return [data.tokenizer.decode(ids) for ids in batch.answers.tolist()]

    items, draw = np.array([0, 2, 0, 0, 1]), np.array([1, 1, 2, 2**31 - 1, 5])
    assert answers(data.data.training_batch(items, draw)) == ["a dogfish", "a dog", "a cat", "a dogfish", "yes"]
    assert answers(data.data.batch(items, draw)) == ["a cat", "a dog", "a cat", "a cat", "yes"]


def test_kinds_are_the_columns_and_else_guessed(tmp_path: Path) -> None:
    rows = [row | {"type": {0: "0", 5: "counting 🐟"}.get(row["img_id"], "")} for row in usual()]
    rows += [asking(k, f"{'xyzuvw'[k]}… {k}?", "3") for k in range(6)]
    rows += [asking(k, f"is it number {n}?", "no") for k in range(6) for n in range(250)]  # so that one is rare
    corpus = read_questions(vqa(tmp_path, rows, "jsonl"), 16)
    assert Counter(a.kind for a in corpus.asked) == {
        "yes or no": 1504,
        "0": 2,
        "counting 🐟": 2,
        "other": 10,  # each too rare to be told of
    }
    plain = read_questions(vqa(tmp_path / "plain", usual()), 16)
    assert Counter(a.kind for a in plain.asked) == {"what is": 6, "yes or no": 6}


def test_a_type_that_only_held_out_questions_have_is_a_type(tmp_path: Path) -> None:
    rows = [row | {"type": "new" if k > 9 else "old", "split": "val" if k > 9 else "train"} for k, row in
            enumerate(usual())]  # fmt: skip
    rows += [rows[0] | {"type": "new"}]
    data = prepared(vqa(tmp_path, rows, "csv"))
    assert set(data.kinds_of(data.splits["val"])) == {"new"}
    assert set(data.kinds_of(data.splits["train"])) == {"old"}
    assert data.record["kinds"] == {"old": 10, "new": 2}
    assert "is of type 'old' already; 'new' not used" in data.corpus.intake.examples["conflicting type"][0]


# Sides


def sides_of(corpus: QuestionCorpus, held_out: float, seed: int) -> dict[str, set[int]]:
    sides, torn = split_questions(corpus, held_out, seed)
    assert torn > 0
    assert sum(map(len, sides.values())) == len(corpus)
    return {side: {corpus.asked[i].image for i in items} for side, items in sides.items()}


def test_no_image_is_asked_about_on_both_sides(tmp_path: Path) -> None:
    first = vqa(tmp_path, usual(12), images=12) / "images" / "0.png"
    (tmp_path / "images" / "11.png").write_bytes(first.read_bytes())  # the same picture under another number
    folder = read_questions(tmp_path, 16)
    for corpus in (folder, about_engravings(40, seed=1)):
        for seed in range(10):
            images = sides_of(corpus, 0.3, seed)
            assert not images["train"] & images["val"]
            assert all(images.values())
            if corpus is folder:
                assert {0, 11} <= images["train"] or {0, 11} <= images["val"]
    data = prepared(tmp_path)
    assert data.record["held-out images seen in training"] == 0
    assert data.record["near-duplicate groups kept on one side"] > 0


def test_an_image_that_two_splits_share_is_held_out_whole(tmp_path: Path) -> None:
    rows = [row | {"split": "train"} for row in usual(8)]
    rows[6]["split"] = "train"
    rows[7]["split"] = "test"  # one of the two questions about image 3
    rows[8] |= {"split": "Validation"}  # one of image 4, the other stays "train"
    rows[10] |= {"split": "later"}  # of image 5
    corpus = read_questions(vqa(tmp_path, rows, "csv", images=8), 16)
    assert [corpus.declared_split(i) for i in range(16)] == ["train"] * 6 + ["test"] * 2 + ["val"] * 2 + ["train"] * 6
    assert corpus.intake.counts == {"image declared on two sides": 2, "unknown split": 1}
    assert corpus.intake.examples["image declared on two sides"][0] == (
        "images/3.png is in test (questions.csv line 9), train (questions.csv line 8); all its questions go to test"
    )
    assert "'later' is not train, val or test; treated as undeclared" in corpus.intake.examples["unknown split"][0]
    images = sides_of(corpus, 0.3, 0)
    assert images == {"train": {0, 1, 2, 5, 6, 7}, "val": {4}, "test": {3}}


def test_an_answer_that_training_lacks_is_told(tmp_path: Path) -> None:
    rows = [row | {"split": "val" if row["img_id"] > 3 else "train"} for row in usual()]
    rows[8]["answer"], rows[10]["answer"] = "A CAT.", ["a ship", "a boat"]
    data = prepared(vqa(tmp_path, rows, "json"))
    assert data.record["warnings"][-1] == (
        "1 of 4 held-out questions have an answer that no training question has ('a ship') and count as wrong unless "
        "the model spells it out"
    )
    assert any("'a ship'" in notice for notice in notices(data))
    assert data.record["different answers"] == 5
    assert prepared(vqa(tmp_path / "b", usual())).record["warnings"] == []


def test_one_answer_to_everything_is_told(tmp_path: Path) -> None:
    data = prepared(vqa(tmp_path, [row | {"answer": "Yes"} for row in usual()], "csv"))
    assert data.record["different answers"] == 1
    assert any("has the answer 'yes', which can be given without looking" in notice for notice in notices(data))
    assert data.record["kinds"] == {"yes or no": 12}


# Batches


def test_the_fingerprint_changes_with_whatever_decides_the_data(tmp_path: Path) -> None:
    def read(name: str, rows: Rows, **more: Any) -> str:
        return prepared(vqa(tmp_path / name / "vqa", rows, "jsonl", **more)).fingerprint

    base = usual()
    other_answer, other_kind, other_question = ([dict(row) for row in base] for _ in range(3))
    other_answer[3]["answer"], other_kind[3]["type"], other_question[3]["question"] = "yes", "odd", "is it?"
    found = {
        "same": read("same", base),
        "answer": read("answer", other_answer),
        "kind": read("kind", other_kind),
        "question": read("question", other_question),
        "order": read("order", base[::-1]),
        "pixels": read("pixels", base, first=30),
    }
    assert len(set(found.values())) == len(found)
    assert read("again", [row | {"question": f" {row['question']}"} for row in base]) == found["same"]
    assert prepared("engravings", items=20).fingerprint != prepared("engravings", items=21).fingerprint


def test_a_batch_holds_each_image_once_and_no_needless_padding(tmp_path: Path) -> None:
    rows = usual()
    rows.append(asking(0, "which of the many animals that there are in the world is shown here?", "a cat with a fish"))
    data = prepared(vqa(tmp_path, rows, "csv"))
    items = np.array([10, 0, 1, 11, 0])
    batch = data.data.batch(items, np.zeros(5, int))
    corpus, pixels = data.corpus, batch.images.numpy()
    assert pixels.shape == (2, 3, 32, 32)
    for item, which in zip(items, batch.which.tolist(), strict=True):
        assert np.array_equal(pixels[which].transpose(1, 2, 0), corpus.image(item, 32))
    for ids, texts in ((batch.questions, "question"), (batch.answers, "answers")):
        assert (ids[:, 0] == START).all()
        assert ((ids == END).sum(1) == 1).all()
        assert (ids[:, -1] != PAD).any()
        said = [data.tokenizer.decode(row) for row in ids.tolist()]
        given = [getattr(corpus.asked[i], texts) for i in items]
        assert said == [g if isinstance(g, str) else g[0] for g in given]
        assert ids.shape[1] < {"question": data.data.questions, "answers": data.data.answers}[texts].shape[1]
    longest = data.data.batch(np.array([0, 12]), np.zeros(2, int))
    assert longest.questions.shape[1] == data.lengths[0]
    assert longest.answers.shape[1] == data.lengths[1]
    assert len(data.data) == 13


def test_training_asks_more_about_the_same_images_and_nothing_held_out(tmp_path: Path) -> None:
    rows = [asking(k, f"question {n}?", [f"answer {n}", f"other {n}"]) for k in range(8) for n in range(k + 1)]
    data = prepared(vqa(tmp_path, rows, images=8), together=4)
    items = data.splits["train"]
    met: set[tuple[str, str]] = set()
    for start in range(30):
        draw = items * 7919 + start
        batch = data.data.training_batch(items, draw)
        assert all(
            np.array_equal(a, b) for a, b in zip(batch, data.data.training_batch(items, draw), strict=True)
        )  # a pure function of what it is given
        said = [data.tokenizer.decode(ids) for ids in batch.questions.tolist()]
        answers = [data.tokenizer.decode(ids) for ids in batch.answers.tolist()]
        assert all(q[9:-1] == a.split()[1] for q, a in zip(said, answers, strict=True))
        shown = {batch.images[k].numpy().tobytes() for k in batch.which.tolist()}
        assert shown == {data.corpus.image(i, 32).transpose(2, 0, 1).tobytes() for i in items}
        one = data.data.training_batch(items[-1:], draw[-1:])
        expected = min(4, sum(a.image == data.corpus.asked[items[-1]].image for a in data.corpus.asked))
        first, *others = [data.tokenizer.decode(ids) for ids in one.questions.tolist()]
        assert len(one.images) == 1
        assert first == data.corpus.asked[items[-1]].question
        assert len({first, *others}) == 1 + len(others) == expected
        met |= set(zip(said, answers, strict=True))
    learnt = [data.corpus.asked[i] for i in items]
    assert met == {(a.question, answer) for a in learnt for answer in a.answers}
    assert len(data.data.batch(items, items).questions) == len(items)


def test_everything_about_an_engraving_is_asked_once() -> None:
    data = prepared("engravings", items=60)
    corpus = data.corpus
    assert {a.kind for a in corpus.asked} == {"object", "count", "shading", "place"}
    assert len({(a.image, a.question) for a in corpus.asked}) == len(corpus)
    assert {a.image for a in corpus.asked} == set(range(60))
    for a in corpus.asked:
        assert (a.question, *a.answers) in {(q.question, q.answer) for q in corpus.images.questions(a.image)}
    assert data.record["questions cut"] == data.record["answers cut"] == 0
    assert sum(data.record["images"].values()) == 60


@pytest.mark.data
@pytest.mark.skipif(not EASY.is_dir(), reason="easy-VQA is not beside the project")
def test_easy_vqa_is_read_whole() -> None:
    data = prepared(EASY, image_size=64, held_out=0.1)
    corpus = data.corpus
    assert "38,575 questions about 4,000 images" in corpus.describe()
    assert set(corpus.intake.counts) == {"near-duplicate"}
    assert len({normal(a) for asked in corpus.asked for a in asked.answers}) == data.record["different answers"] == 13
    assert sum("yes" in a.answers or "no" in a.answers for a in corpus.asked) == data.record["kinds"]["yes or no"]
    assert data.record["kinds"]["yes or no"] == 28_407
    raw = json.loads((EASY / "train" / "questions.json").read_text())
    assert [[a.question, a.answers[0], int(Path(corpus.images.id(a.image)).stem)] for a in corpus.asked] == raw
    images = {side: {corpus.asked[i].image for i in items} for side, items in data.splits.items()}
    assert not images["train"] & images["val"]
    assert len(images["train"]) + len(images["val"]) == 4000
    assert len(data.splits["val"]) == 3859
    assert data.record["held-out images seen in training"] == data.record["questions cut"] == 0
    assert data.record["warnings"] == []
