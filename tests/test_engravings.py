"""The built-in corpus: the same everywhere, and everything that it says about a picture is so."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from intaglio.data.engravings import Engravings
from intaglio.data.engravings.draw import cut_stencil, render
from intaglio.data.engravings.grammar import TEMPLATES
from intaglio.data.engravings.scene import EXTENTS, INKS, KINDS, PAPERS, PLACES, TECHNIQUES, Scene
from intaglio.data.engravings.shapes import ART
from intaglio.data.engravings.sheet import contact_sheet

N = 1500
CORPUS = Engravings(N, seed=3)
KIND_OF = {word: kind for kind, variants in KINDS.items() for word in (kind, *variants) if word != "full"}

# what a word says, written down here a second time so that the grammar's own tables are not their own proof
TECHNIQUE_WORDS = {
    "hatching": r"(?<!cross )hatched|parallel hatching|slanting strokes",
    "crossing": r"cross hatched|cross hatching|crossed strokes",
    "stippling": r"stippled|stippling|many dots",
    "contour": r"contoured|contour lines|nested outlines",
    "solid": r"silhouetted|solid ink|flat masses",
}
PLACE_WORDS = {
    "upper left": r"at the upper left|\bhigh on the left|top left corner",
    "top": r"at the top|\bhigh in the centre|top edge",
    "upper right": r"at the upper right|\bhigh on the right|top right corner",
    "left": r"at the left|(?<! high)(?<! low) on the left|left edge",
    "middle": r"in the middle|(?<! high)(?<! low) in the centre|heart of the sheet",
    "right": r"at the right|(?<! high)(?<! low) on the right|right edge",
    "lower left": r"at the lower left|\blow on the left|bottom left corner",
    "bottom": r"at the bottom|\blow in the centre|bottom edge",
    "lower right": r"at the lower right|\blow on the right|bottom right corner",
}
SIZE_WORDS = {"great": r"great|huge|fills", "large": r"large|sizable|keeps", "small": r"little", "tiny": r"minute"}
PAPER_WORDS = {
    **{"ivory": "ivory paper|cream stock", "grey": "grey paper|ashen stock", "buff": "buff paper|tan stock"},
    **{"rose": "rose paper|pink stock", "blue": "blue paper|azure stock", "green": "green paper|mossy stock"},
}
INK_WORDS = {"black": "black ink|in black", "sepia": "sepia ink|in brown", "indigo": "indigo ink|in deep blue"}
GROUND_WORDS = {"bare": "empty ground", "earth": "dry earth", "water": "rippling water"}
SKY_WORDS = {"clear": "clear sky", "ruled": "ruled sky"}


def said(words: dict[str, str], text: str) -> list[str]:
    """The values that a text names, in the order in which it does."""
    found = [(match.start(), value) for value, pattern in words.items() for match in re.finditer(pattern, text)]
    return [value for _, value in sorted(found)]


def every_caption():
    for i in range(N):
        for template in TEMPLATES:
            yield CORPUS.factors(i), template.__name__, template(CORPUS.scene(i))


def test_images_are_the_same_in_every_process():
    script = (
        "import hashlib; from intaglio.data.engravings import Engravings; e = Engravings(40)\n"
        "print(hashlib.sha256(b''.join(e.image(i, s).tobytes() for s in (32, 64, 192) for i in range(40))).hexdigest())"
    )
    digest = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert digest == "c8802598c0b02541ef92f10affddffac9ff92a32a54df8b24c87d72e54c783a3"


def test_an_item_depends_on_seed_and_number_only():
    late = Engravings(5, seed=3, start=20)
    assert [late.captions(i) for i in range(5)] == [CORPUS.captions(20 + i) for i in range(5)]
    assert [late.id(i) for i in range(5)] == [CORPUS.id(20 + i) for i in range(5)]
    np.testing.assert_array_equal(late.image(2, 32), CORPUS.image(22, 32))
    digests = {Engravings(*a).fingerprint() for a in ((5, 3, 20), (5, 3, 21), (5, 4, 20), (6, 3, 20))}
    assert len(digests) == 4
    assert late.fingerprint() == Engravings(5, 3, 20).fingerprint()


@pytest.mark.parametrize("size", [32, 64, 192])
def test_image_shape_and_the_same_scene_at_every_size(size):
    image = CORPUS.image(0, size)
    assert image.dtype == np.uint8
    assert image.shape == (size, size, 3)
    coarse = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX)).astype(float)
    expected = np.asarray(Image.fromarray(CORPUS.image(0, 256)).resize((16, 16), Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(coarse.ravel(), expected.ravel())[0, 1] > 0.97


def test_scenes_keep_their_layout():
    for i in range(N):
        things = CORPUS.scene(i).things
        assert 1 <= len(things) <= 3
        assert len({t.kind for t in things}) == len({t.place for t in things}) == len(things)
        assert all(t.size in ("small", "tiny") and things[0].extent > 1.3 * t.extent for t in things[1:])
        for t in things:
            assert abs(t.extent / EXTENTS[t.size] - 1) <= 0.04
            assert min(t.box) > 0.04
            assert max(t.box) < 0.96
            # a place is where a place is said to be: towards its side of the frame
            row, column = divmod(PLACES.index(t.place), 3)
            for at, cell in ((t.x, column), (t.y, row)):
                assert (at < 0.47, 0.4 < at < 0.6, at > 0.53)[cell], t


def test_labels_are_even_and_scenes_varied():
    labels = Counter(CORPUS.label(i) for i in range(N))
    assert set(labels) == set(CORPUS.labels()) == set(KINDS)
    assert min(labels.values()) > 0.7 * N / 10
    counts = Counter(len(CORPUS.scene(i).things) for i in range(N))
    assert min(counts.values()) > 0.15 * N
    assert len({json.dumps(CORPUS.factors(i)) for i in range(N)}) == N
    assert {t.variant for i in range(N) for t in CORPUS.scene(i).things} == set(ART)


def test_every_caption_is_true():
    for facts, _, text in every_caption():
        things = facts["things"]
        assert [KIND_OF[w] for w in re.findall(r"[a-z]+", text) if w in KIND_OF] == [t["kind"] for t in things], text
        variants = [w for w in re.findall(r"[a-z]+", text) if w in ART]
        assert all(v in [t["variant"] for t in things] for v in variants), text
        for words, key in ((TECHNIQUE_WORDS, "technique"), (PLACE_WORDS, "place")):
            told = said(words, text)
            assert told == [t[key] for t in things][: len(told)], text
        sizes = said(SIZE_WORDS, text)
        assert sizes == [t["size"] for t in things][: len(sizes)], text
        for words, key in ((PAPER_WORDS, "paper"), (INK_WORDS, "ink"), (GROUND_WORDS, "ground"), (SKY_WORDS, "sky")):
            assert set(said(words, text)) <= {facts[key]}, text
        for number, word in enumerate(("one", "two", "three"), 1):
            assert f" {word} thing" not in text or len(things) == number, text
        alone = re.search(r"alone|by itself|no company|far from|nothing else|to itself|adds no more|no other", text)
        assert bool(alone) == (len(things) == 1), text
        for thing, side in zip(things[1:], re.findall(r"(above|below|left of|right of) it", text), strict=False):
            by = {"above": thing["y"] < things[0]["y"], "below": thing["y"] > things[0]["y"]}
            by |= {"left of": thing["x"] < things[0]["x"], "right of": thing["x"] > things[0]["x"]}
            assert by[side], text


def test_captions_have_the_promised_form():
    vocabulary, openings = Counter(), {}
    for facts, template, text in every_caption():
        words = text.replace(",", "").split()
        assert 10 <= len(words) <= 24, text
        assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", text), text
        assert CORPUS.label_in(text) == facts["things"][0]["kind"]
        vocabulary.update(words)
        openings.setdefault(words[0], set()).add(template)
    assert len(vocabulary) >= 150
    assert min(vocabulary.values()) >= 10, "a word too rare to be learned"
    assert all(len(templates) == 1 for templates in openings.values()), "the first word tells the template"
    chosen = [CORPUS.captions(i) for i in range(N)]
    assert all(len(set(four)) == 4 for four in chosen)
    assert len({four[0] for four in chosen}) > 0.9 * N


def test_label_in_reads_any_noun_of_a_kind():
    assert CORPUS.label_in("Proof of a Galleon, beside an oak.") == "ship"
    assert CORPUS.label_in("a full moon over a townhouse") == "moon"
    assert CORPUS.label_in("nothing that we know, in full") is None


def test_every_question_is_true():
    for i in range(300):
        asked, things = CORPUS.questions(i), CORPUS.factors(i)["things"]
        assert {q.kind for q in asked} == {"object", "count", "shading", "place"}
        by_kind = {t["kind"]: t for t in things}
        for q in asked:
            named = by_kind.get(CORPUS.label_in(q.question.rstrip("?")) or "")
            if q.kind == "count":
                left = len(things) - ("besides" in q.question)
                assert q.answer == ("none", "one", "two", "three")[left]
            elif q.kind == "shading":
                assert said(TECHNIQUE_WORDS, q.answer) == [named["technique"]]
            elif q.kind == "place":
                assert said(PLACE_WORDS, q.answer) == [named["place"]]
            elif "what kind" in q.question:
                assert q.answer.removesuffix(" moon") == named["variant"]
            elif "largest" in q.question:
                assert q.answer == CORPUS.label(i)
            else:
                assert said(PLACE_WORDS, q.question) == [by_kind[q.answer]["place"]]


def test_a_thing_is_drawn_in_its_box_and_nowhere_else():
    for i in range(60):
        scene = CORPUS.scene(i)
        whole = render(scene, 64)
        for thing in scene.things:
            others = tuple(t for t in scene.things if t is not thing)
            changed = (whole != render(replace(scene, things=others), 64)).any(axis=-1)
            rows, columns = np.nonzero(changed)
            left, top, right, bottom = (64 * v for v in thing.box)
            assert changed.sum() > 12, thing
            assert left - 3 < columns.min() < columns.max() < right + 3, thing
            assert top - 3 < rows.min() < rows.max() < bottom + 3, thing


def test_paper_and_ink_have_the_colours_named():
    for i in range(100):
        scene, pixels = CORPUS.scene(i), CORPUS.image(i, 64).reshape(-1, 3).astype(int)
        brightness = pixels.sum(axis=1)
        order = np.argsort(brightness)
        for colours, named, seen in ((PAPERS, scene.paper, pixels[order[-400]]), (INKS, scene.ink, pixels[order[5]])):
            apart = {name: np.abs(np.array(colour) - seen).sum() for name, colour in colours.items()}
            assert min(apart, key=apart.__getitem__) == named, i


def test_kinds_variants_and_techniques_look_different():
    shapes = {v: cut_stencil(v, (24, 24), (24, 24), (12, 12), 24, True).ravel() > 1 for v in ART}
    assert min(np.mean(shapes[a] != shapes[b]) for a in ART for b in ART if a < b) > 0.05
    main = next(t for i in range(N) for t in CORPUS.scene(i).things[:1] if t.variant == "oak" and t.size == "great")
    blank = Scene((), "ivory", "black", "bare", "clear")
    drawn = [render(replace(blank, things=(replace(main, technique=t),)), 64).astype(float) for t in TECHNIQUES]
    flat = render(blank, 64).astype(float)
    for a, b in combinations(drawn, 2):
        assert np.abs(a - b).mean() > 0.3 * min(np.abs(a - flat).mean(), np.abs(b - flat).mean())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="size_of_corpus must be at least 1"):
        Engravings(0)
    with pytest.raises(IndexError, match="item 5 of 5"):
        Engravings(5).captions(5)
    with pytest.raises(ValueError, match="size of 16 or more"):
        Engravings(5).image(0, 8)


def test_contact_sheet(tmp_path):
    contact_sheet(tmp_path / "sheet.png", rows=1, columns=2, size=64)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 72 + 8, 32 + 64 + 23 + 8)
