"""Questions that cannot be used are counted or refused, and the message says which, where and what to write instead."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_questions_data import asking, pictures, prepared, text_of, usual, vqa

from intaglio.cli import main
from intaglio.data.prepare import notices
from intaglio.data.questions.read import read_questions, read_rows
from intaglio.health.diagnosis import LOST


def refusal(root: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller reads the message
        read_questions(root, 16, **options)
    return str(caught.value)


# Rows that are left out


def test_rows_that_cannot_be_used_are_left_out_counted_and_told(tmp_path: Path) -> None:
    rows = [row for _ in range(12) for row in usual(20)]
    for k, (name, value) in enumerate(
        [("question", "  "), ("question", None), ("answer", ""), ("answer", []), ("answer", math.nan), ("img_id", None)]
    ):
        rows[k] = rows[k] | {name: value}
    rows[6]["img_id"], rows[7]["img_id"], rows[8]["img_id"] = 99, "imagges/3.png", "../3.png"
    del rows[9]["answer"]
    vqa(tmp_path, rows, "json", images=20)
    corpus = read_questions(tmp_path, 16)
    assert corpus.intake.counts == {
        "row without question": 2,
        "row without answer": 4,
        "row without image": 1,
        "image not found": 3,
        "repeated question": 480 - 10 - 40,
    }
    assert corpus.intake.examples["image not found"] == [
        "questions.json entry 7: there is no image '99'; left out",
        "questions.json entry 8: there is no image 'imagges/3.png'; did you mean '3.png'?; left out",
        "questions.json entry 9: there is no image '../3.png'; did you mean '3.png'?; left out",
    ]
    assert corpus.intake.examples["row without answer"][0] == "questions.json entry 3: there is no answer; left out"
    assert set(corpus.intake.counts) - {"repeated question"} <= set(LOST)  # so that a verdict counts them, too
    assert any(notice.startswith("4 × row without answer (e.g. ") for notice in notices(prepared(tmp_path)))


def test_too_many_lost_rows_are_refused_with_what_would_be_accepted(tmp_path: Path) -> None:
    rows = usual(10)
    rows[3]["answer"] = rows[4]["question"] = ""
    rows[5]["img_id"] = "absent"
    vqa(tmp_path, rows, "csv", images=10)
    message = refusal(tmp_path)
    assert "3 of 20 questions cannot be used, more than the limit of 5%" in message
    assert "1 × row without answer, e.g. questions.csv line 5: there is no answer; left out" in message
    assert message.endswith("accept the loss with --data.bad_limit 0.15")
    assert len(read_questions(tmp_path, 16, bad_limit=0.15)) == 17
    vqa(tmp_path / "none", [asking("x", "what is it?", "cat")] * 3, images=2)
    message = refusal(tmp_path / "none", bad_limit=1.0)
    assert "none of 3 questions can be used:\n  3 × image not found" in message
    assert "images anywhere beside or below the table" in message
    vqa(tmp_path / "bare", usual(), images=0)
    assert "no image '0' (no image lies beside or below the table)" in refusal(tmp_path / "bare")


def test_unreadable_images_take_their_questions_with_them(tmp_path: Path) -> None:
    folder = vqa(tmp_path / "torn", usual(40), "csv", images=40)
    (folder / "images" / "7.png").write_bytes(b"\x89PNG not really")
    (folder / "images" / "8.png").write_bytes(b"")
    corpus = read_questions(folder, 16)
    assert corpus.intake.counts == {"unreadable": 2, "question about an unusable image": 4}
    assert {corpus.images.id(a.image) for a in corpus.asked} == {
        f"images/{k}.png" for k in range(40) if k not in (7, 8)
    }
    whole = read_questions(vqa(tmp_path / "whole", usual(40), images=40), 16)
    expected = [a for a in whole.asked if whole.images.id(a.image) not in ("images/7.png", "images/8.png")]
    assert [(a.question, a.answers) for a in corpus.asked] == [(a.question, a.answers) for a in expected]
    for a in corpus.asked[::9]:  # each question kept its own picture
        twin = next(i for i, b in enumerate(whole.asked) if whole.images.id(b.image) == corpus.images.id(a.image))
        assert np.array_equal(corpus.image(corpus.asked.index(a), 16), whole.image(twin, 16))
    (folder / "images" / "9.png").write_bytes(b"")
    assert "3 of 40 items in" in refusal(folder)


def test_names_of_several_images_are_never_guessed(tmp_path: Path) -> None:
    vqa(tmp_path, usual(40), images=40)
    pictures(tmp_path / "more", 2, first=70)
    corpus = read_questions(tmp_path, 16, bad_limit=0.1)
    assert corpus.intake.counts == {"several images of one name": 4}
    assert corpus.intake.examples["several images of one name"][0].endswith(
        "'0' names 2 images (images/0.png, more/0.png); write the path of the one that is meant; left out"
    )
    rows = [asking(f"{where}/{k}.png", "what is it?", where) for where in ("images", "more") for k in range(2)]
    (tmp_path / "questions.json").write_text(text_of(rows, "json"))
    corpus = read_questions(tmp_path, 16)
    assert [corpus.images.id(a.image).split("/")[0] for a in corpus.asked] == [a.answers[0] for a in corpus.asked]


def test_links_that_lead_outside_are_not_followed(tmp_path: Path) -> None:
    vqa(tmp_path / "in", usual(3), images=2)
    pictures(tmp_path / "out", 3)
    (tmp_path / "in" / "images" / "2.png").symlink_to(tmp_path / "out" / "2.png")
    corpus = read_questions(tmp_path / "in", 16)
    assert corpus.intake.counts == {"leads outside the folder": 1, "question about an unusable image": 2}
    assert {a.image for a in corpus.asked} == {0, 1}


def test_long_texts_are_cut_counted_and_told_which_option_takes_more(tmp_path: Path) -> None:
    rows = usual()
    rows[0]["question"], rows[1]["answer"] = "why " * 20_000, "because " * 3_000
    data = prepared(vqa(tmp_path, rows, "csv"))
    assert data.corpus.asked[0].question == ("why " * 20_000).strip()
    assert data.data.questions.shape == (12, 48)
    assert data.data.answers.shape == (12, 16)
    assert (data.record["questions cut"], data.record["answers cut"]) == (1, 1)
    said = notices(data)
    assert "1 of 12 questions cut to 48 tokens; raise --data.question_length" in said
    assert "1 of 12 answers cut to 16 tokens; raise --data.answer_length" in said
    short = prepared(tmp_path, question_length=8, answer_length=4)
    assert short.lengths == (8, 4)
    assert short.data.batch(np.array([0]), np.array([0])).questions.shape == (1, 8)


def test_letters_that_training_never_has_are_counted(tmp_path: Path) -> None:
    rows = [row | {"split": "val" if row["img_id"] > 3 else "train"} for row in usual()]
    rows[-1]["question"] = "何色ですか 🐟?"
    data = prepared(vqa(tmp_path, rows, "jsonl"))
    assert data.record["unknown pieces"]["questions"] > 0
    assert any("pieces of questions never occur in training" in notice for notice in notices(data))
    broken = text_of(rows, "jsonl").replace('"is it a cat?"', '"is it \\ud83d a cat?"')
    (tmp_path / "questions.jsonl").write_text(broken)
    counts = read_questions(tmp_path, 16).intake.counts
    assert counts["broken character in a text"] == 5


# Tables that are refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("questions.csv", "", "questions.csv has no rows"),
        ("questions.csv", "question,answer,img_id\n", "questions.csv has no rows\n  accepted are"),
        ("questions.csv", "question,answer,img_id\nwhat, then?,cat,0\n", "questions.csv line 2 has more cells"),
        ("questions.csv", 'question,answer,img_id\n"what,cat,0\n', "correct the quotes"),
        ("questions.csv", "question,question,img_id\n", "two columns of one name"),
        ("questions.csv", b"question,answer,img_id\n\xe9,cat,0\n", "is not UTF-8 at byte 23; save it as UTF-8"),
        ("questions.csv", "questoin,answer,img_id\nx,y,0\n", "no column for the question: .* did you mean 'questoin'?"),
        ("questions.csv", "question,Anwser,img_id\nx,y,0\n", "no column for the answer: .* did you mean 'Anwser'?"),
        ("questions.csv", "question,answer,picture\nx,y,0\n", r"name it by --data\.columns\.image; it has question, "),
        (
            "questions.json",
            '{"questions": []}',
            r'is not a list; write \[\{"question": …, "answer": …, "image": …\}, …',
        ),
        ("questions.json", '[["what?", "cat"]]', r"entry 1 is not an object like .* or \[question, answer, image\]"),
        ("questions.json", '[["what?", "cat", 0, "kind"]]', r"entry 1 is not an object like .*question, answer, image"),
        ("questions.json", '["what?"]', "entry 1 is not an object like"),
        ("questions.json", "[" * 100_000, "questions.json is not JSON"),
        ("questions.json", "[" + "9" * 5000 + "]", "questions.json is not JSON"),
        ("questions.jsonl", '{"question": "x"\n', "questions.jsonl line 1 is not JSON"),
        ("questions.json", '[[["what?"], "cat", 0]]', "entry 1: 'question' is no text but list; write it as text"),
        (
            "questions.json",
            '[["what?", {"answer": "cat"}, 0]]',
            "'answer' is no text but dict; write it as text, or as",
        ),
        ("questions.json", '[["what?", [{"answer": "cat"}], 0]]', r'or as a list of texts \["yes", "no"\]'),
    ],
)
def test_a_broken_table_is_refused_with_its_place(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    pictures(tmp_path / "train" / "images", 2)
    path = tmp_path / "train" / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"(?s)train.*{message}"):
        read_questions(tmp_path, 16)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_rows(path, {})


def test_wrong_names_of_columns_are_told_the_nearest(tmp_path: Path) -> None:
    rows = [row | {"Frage": "x", "note": 1} for row in usual()]
    vqa(tmp_path, rows, "csv")
    for columns, message in {
        (
            "qestion",
            "Frage",
        ): "'qestion' is no role of a table of questions; did you mean 'question'? those are question,",
        ("img_id", "img_id"): "'img_id' is no role of a table of questions; did you mean 'image'?",
        (
            "colour",
            "note",
        ): "'colour' is no role of a table of questions; those are question, answer, image, type, split",
        ("question", "frage"): "questions.csv has no column 'frage'; did you mean 'Frage'? it has question, answer,",
        ("type", "zzz"): "--data.columns.type: questions.csv has no column 'zzz'; it has question, answer, img_id",
    }.items():
        assert message in refusal(tmp_path, columns=dict([columns]))


def test_folders_without_a_table_say_which_one_may_be_meant(tmp_path: Path) -> None:
    assert "is not a folder; name the folder that holds the images" in refusal(tmp_path / "nowhere")
    pictures(tmp_path, 3)
    message = refusal(tmp_path)
    assert "holds no questions.csv, .tsv, .jsonl or .json; no table lies there\n  accepted are" in message
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "vivqa.csv").write_text(text_of(usual(3), "csv"))
    assert "write --data.metadata text/vivqa.csv if that is the one" in refusal(tmp_path)
    assert "write --data.metadata text/vivqa.csv if that is the one" in refusal(tmp_path, table="text/vivq.csv")
    corpus = read_questions(tmp_path, 16, table="text/vivqa.csv")
    assert corpus.describe().endswith(
        "text/vivqa.csv: question from 'question', answer from 'answer', image from 'img_id'"
    )
    assert f"write --data.source {tmp_path / 'text'} --data.metadata vivqa.csv" in refusal(
        tmp_path / "text" / "vivqa.csv"
    )
    (tmp_path / "text" / "vivqa.csv").rename(tmp_path.with_suffix(".csv"))  # a table that lies outside the folder
    beside = read_questions(tmp_path, 16, table=f"../{tmp_path.name}.csv")
    assert [beside.images.id(a.image) for a in beside.asked] == [corpus.images.id(a.image) for a in corpus.asked]
    for form in ("csv", "json"):
        (tmp_path / f"questions.{form}").write_text(text_of(usual(3), form))
    assert "holds questions.json and questions.csv; choose one (--data.metadata questions.json)" in refusal(tmp_path)


def test_one_image_is_too_few(tmp_path: Path) -> None:
    vqa(tmp_path, usual(1), images=3)
    message = refusal(tmp_path)
    assert (
        "all 2 questions are about images/0.png; at least two images are needed, one to learn from and one" in message
    )


def test_the_command_says_it_in_one_line_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vqa(tmp_path, usual(), "csv")
    words = ["train", "vqa-small", f"--data.source={tmp_path}", f"--runs={tmp_path / 'runs'}", "--train.precision=fp32"]
    assert main([*words, "--data.columns.question=questoin"]) == 2
    said = capsys.readouterr().err
    assert "questions.csv has no column 'questoin'; did you mean 'question'? it has question, answer, img_id" in said
    assert "Traceback" not in said
