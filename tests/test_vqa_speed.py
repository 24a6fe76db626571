"""Questions about a batch of images: each image is encoded once, whatever the order and the number of questions."""

import csv

import numpy as np
import pytest
from PIL import Image

from intaglio import answering
from intaglio.bench.speed_questions import encoded, fresh, write_questions

SMALL = ("--model.width=16", "--model.heads=2", "--data.image_size=16", "--data.answer_length=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A model, and a table of 1,000 questions about 96 images in mixed order."""
    at = tmp_path_factory.mktemp("speed")
    fresh(*SMALL).save_pretrained(at / "model")
    write_questions(at / "some", 96, 1000)
    return at


def test_a_thousand_questions_about_a_batch_of_images_encode_each_image_once(folder):
    with encoded() as counts:
        told = answering.answer_table(folder / "model", folder / "some" / "questions.csv", {})
    assert sum(counts) == 96
    assert len(told) == 1000
    with (folder / "some" / "questions.csv").open(newline="") as file:
        assert [(row["image"], row["question"]) for row in told] == [tuple(row) for row in list(csv.reader(file))[1:]]
    for row in (told[0], told[613], told[999]):
        (alone,) = answering.answer(folder / "model", folder / "some" / f"{row['image']}.png", [row["question"]])
        assert (alone["answer"], alone["probability"]) == (row["answer"], pytest.approx(row["probability"], rel=1e-3))


def test_a_thousand_questions_about_one_image_encode_it_once(folder):
    questions = [f"how many things are there besides the mountain {k}?" for k in range(1000)]
    with encoded() as counts:
        assert len(answering.answer(folder / "model", folder / "some" / "0.png", questions)) == 1000
    assert counts == [1]


def test_an_image_that_cannot_be_read_leaves_its_questions_out_and_no_others(folder, tmp_path):
    for name in "abc":
        Image.fromarray(np.full((16, 16, 3), 40, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG torn")
    (tmp_path / "questions.csv").write_text("image,question\nb,what?\nc,what?\na,where?\nb,where?\nc,\n")
    told = answering.answer_table(folder / "model", tmp_path / "questions.csv", {})
    assert ["answer" in row for row in told] == [False, True, True, False, False]
    assert "b.png" in told[0]["skipped"]
    assert told[0]["skipped"] == told[3]["skipped"]
    assert told[4]["skipped"] == "row without question"
