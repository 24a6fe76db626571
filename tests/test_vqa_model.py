"""The parts of visual question answering: losses against their formulas, what sees what, answers and their reasons."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intaglio.config import VqaModelConfig
from intaglio.data.questions.corpus import token_f1
from intaglio.data.tokenizer import END, PAD, START, CaptionTokenizer
from intaglio.models.explain import explain
from intaglio.models.vqa import VqaModel
from intaglio.nn.bottleneck import GatedCross
from intaglio.objectives.bottleneck import free_bits, orthogonality, preference
from intaglio.systems.vqa_evaluation import rouge_l

ANSWERS = ("ship", "cross hatching", "at the upper left", "none")
QUESTIONS = ["what stands at the upper left?", "how is the ship shaded?", "how many things are there?"]


def model(seed: int = 0, **options: Any) -> VqaModel:
    """A tiny one with a tokenizer of its own."""
    torch.manual_seed(seed)
    sizes = {"width": 16, "heads": 2, "vision_layers": 1, "latents": 3, "dims": 4, "vocabulary": 80}
    tokenizer = CaptionTokenizer.train([*QUESTIONS, *ANSWERS] * 3, 80)
    made = VqaModel({**VqaModelConfig().__dict__, **sizes, **options}, 16, (16, 12), len(tokenizer))
    made.tokenizer, made.known = tokenizer, ANSWERS
    return made.eval()


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


# losses


def test_free_bits_are_the_larger_of_floor_and_mean_rate():
    kl = torch.tensor([[0.1, 2.0, 0.6], [0.3, 4.0, 0.2]], requires_grad=True)
    loss = free_bits(kl, 0.5)
    assert float(loss.detach()) == pytest.approx(0.5 + 3.0 + 0.5)
    loss.backward()
    assert kl.grad is not None
    assert torch.equal(kl.grad, torch.tensor([[0, 0.5, 0], [0, 0.5, 0]])), "a latent below the floor has no gradient"
    assert float(free_bits(kl.detach(), 0.0)) == pytest.approx(float(kl.detach().sum(1).mean()))


def test_orthogonality_is_0_at_right_angles_1_for_equals_and_a_share_for_random_ones():
    assert float(orthogonality(torch.eye(4)[None])) == 0
    assert float(orthogonality(torch.ones(2, 3, 5))) == pytest.approx(1, abs=1e-5)
    z = torch.randn(400, 6, 32, generator=torch.Generator().manual_seed(0))
    assert float(orthogonality(z)) == pytest.approx(1 / 32, rel=0.05)
    assert float(orthogonality(z[:, :1])) == 0


def test_a_preference_moves_log_probabilities_and_ties_move_nothing():
    log_p = torch.tensor([[-1.0, -0.5, -2.0], [-1.0, -1.0, -3.0]], requires_grad=True)
    score = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.5, 0.5]])
    found = preference(log_p, score)
    assert float(found.loss.detach()) == pytest.approx(math.log(1 + math.exp(-1)) / 2)
    assert float(found.ties) == 0.5
    found.loss.backward()
    push = 1 / (1 + math.e) / 2  # σ(−margin), of two items
    torch.testing.assert_close(log_p.grad, torch.tensor([[-push, 0, push], [0, 0, 0]]))


@pytest.mark.parametrize(
    ("given", "truth", "f1", "rouge"),
    [
        ("cross hatching", "cross hatching", 1, 1),
        ("at the left", "at the upper left", 6 / 7, 6 / 7),
        ("left the at", "at the left", 1, 1 / 3),
        ("", "ship", 0, 0),
        ("SHIP.", "ship", 1, 1),
    ],
)
def test_scores_of_answers(given, truth, f1, rouge):
    assert token_f1(given, truth) == pytest.approx(f1)
    assert rouge_l(given, truth) == pytest.approx(rouge)


# what sees what


@torch.no_grad()
def test_shut_gates_let_nothing_of_the_image_through_and_open_ones_do():
    torch.manual_seed(0)
    layer, x, memory, which = (
        GatedCross(16, 2, gate=0.0),
        torch.randn(5, 3, 16),
        torch.randn(2, 7, 16),
        torch.tensor([0, 1, 1, 0, 1]),
    )
    assert torch.equal(layer(x, memory, which), x)
    torch.nn.init.constant_(layer.gates, 0.7)
    looked = layer(x, memory, which)
    assert not torch.allclose(looked, x)
    torch.testing.assert_close(looked, layer(x, memory[which], torch.arange(5)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "deterministic", "vib"])
@torch.no_grad()
def test_each_question_has_its_answer_in_any_company_and_each_image_is_seen_once(kind, monkeypatch):
    vqa, pixels = model(bottleneck=kind), images(3)
    seen: list[int] = []
    encode = vqa.network.vision.forward
    monkeypatch.setattr(vqa.network.vision, "forward", lambda x: (seen.append(len(x)), encode(x))[1])
    which = [2, 0, 1, 2, 2, 0]
    asked = [QUESTIONS[k % 3] for k in range(6)]
    together = vqa.latents(pixels, which, asked)
    assert seen == [3], "six questions about three images"
    for k, (image, question) in enumerate(zip(which, asked, strict=True)):
        alone = vqa.latents(pixels[image][None], [0], [question])
        torch.testing.assert_close(alone.mean[0], together.mean[k], rtol=0, atol=1e-5)
    assert together.mean.shape == (6, 3, 16 if kind == "none" else 4)
    assert (together.log_variance is not None) == (kind == "vib")


def test_the_model_without_a_bottleneck_has_about_as_many_parameters():
    counts = {
        kind: sum(p.numel() for p in model(bottleneck=kind, width=128, heads=4, dims=32).parameters())
        for kind in ("none", "vib")
    }
    assert counts["none"] == pytest.approx(counts["vib"], rel=0.02)


# answers


def plainly(vqa: VqaModel, z: Tensor) -> list[tuple[list[int], float]]:
    """Greedy answers, and what they cost in nats, by recomputing everything for each token; padding is none."""
    found = []
    for one in z:
        ids, nats = [START], 0.0
        while len(ids) < vqa.lengths[1] and ids[-1] != END:
            logits = vqa.network.logits(one[None], torch.tensor([ids]))[0, -1]
            logits[PAD] = -torch.inf
            ids.append(int(logits.argmax()))
            nats -= float(logits.log_softmax(0).max())
        found.append((ids[1:], nats))
    return found


@torch.no_grad()
def test_answers_with_a_cache_are_those_without_and_probabilities_those_of_their_tokens():
    vqa = model(3)
    z = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)) * 3
    made, rows = vqa.answers(z), plainly(vqa, z)
    assert made.answers == vqa.texts(torch.tensor([row + [PAD] * (12 - len(row)) for row, _ in rows]))
    for k, (row, nats) in enumerate(rows):
        assert float(made.probability[k]) == pytest.approx(math.exp(-nats), rel=1e-4)
        assert bool(made.finished[k]) == (row[-1] == END)


@torch.no_grad()
def test_known_answers_share_all_probability_and_cost_what_their_tokens_cost():
    vqa = model(1)
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    shares = vqa.among_known(z)
    assert shares.shape == (2, 4)
    torch.testing.assert_close(shares.sum(1), torch.ones(2))
    for k, answer in enumerate(ANSWERS):
        ids = torch.from_numpy(vqa.encoded([answer]))
        torch.testing.assert_close(vqa.nats(z, ids)[:, 0], vqa.known_nats(z)[:, k])


def test_draws_have_the_temperature_and_the_mean_where_there_is_none():
    vqa = model()
    q = vqa.latents(images(1), [0], QUESTIONS[:1])
    noise = torch.ones_like(q.mean)
    assert q.log_variance is not None
    torch.testing.assert_close(vqa.draw(q, noise, 0.5), q.mean + 0.5 * (0.5 * q.log_variance).exp())
    assert torch.equal(vqa.draw(q, noise, 0), q.mean)
    assert torch.equal(vqa.draw(q, None, 1.0), q.mean)


@torch.no_grad()
def test_an_answer_is_explained_by_what_it_loses():
    vqa, picture = model(2), images(1)[0]
    found = explain(vqa, picture, QUESTIONS[0])
    assert found.places.shape == (2, 2)
    assert found.latents.shape == found.alone.shape == (3,)
    assert sum(share for _, share in found.spread) == pytest.approx(1)
    covered = picture.copy()
    covered[8:, :8] = picture.reshape(-1, 3).mean(0).round()
    ids = torch.from_numpy(vqa.encoded([found.answer]))
    other = vqa.nats(vqa.latents(covered[None], [0], QUESTIONS[:1]).mean, ids)
    assert found.places[1, 0] == pytest.approx(found.probability - math.exp(-float(other)), abs=1e-5)
    z = vqa.latents(picture[None], [0], QUESTIONS[:1]).mean
    second = z.clone()
    second[:, [0, 2]] = 0
    saved = float(vqa.nats(0 * z, ids) - vqa.nats(second, ids))
    assert found.alone[1] == pytest.approx(saved, abs=1e-5)
    assert found.latents[1] == pytest.approx(float(vqa.nats(z - second, ids) - vqa.nats(z, ids)), abs=1e-5)


@pytest.mark.parametrize(
    ("pixels", "question", "told"),
    [
        (np.zeros((1, 8, 8, 3), np.uint8), "what?", r"this model reads uint8 \(N, 16, 16, 3\)"),
        (np.zeros((1, 16, 16, 3), np.float32), "what?", "float32"),
        (np.zeros((1, 16, 16, 3), np.uint8), " ", "A question is empty"),
    ],
)
def test_what_cannot_be_asked(pixels, question, told):
    with pytest.raises(ValueError, match=told):
        model().latents(pixels, [0], [question])
