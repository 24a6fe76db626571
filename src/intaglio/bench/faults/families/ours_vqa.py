"""Our visual question answering, small: squares of four colours on dark or light noise, and what is asked about them.

The built-in engravings take thousands of steps until an answer needs the image; these take a hundred. The cases marked
V are those of the documented system.
"""

import csv
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from PIL import Image

from intaglio.bench.faults.case import Change, Family, Fault, Healthy, Made
from intaglio.data.cache import cache_folder

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}


def squares(kind: str = "plain", images: int = 160) -> str:
    """A folder of images of 16 by 16 pixels with a ``questions.csv``, two about each, written where it is missing.

    ``kind`` is ``plain``, ``by-lot`` (answers have nothing to do with images), or ``unreadable`` (each eighth image).
    """
    folder = cache_folder() / f"bench-squares-{kind}-{images}-1"
    if not (folder / "questions.csv").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(mkdtemp(dir=folder.parent))
        _write(part, kind, images)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    return str(folder)


def _write(folder: Path, kind: str, images: int) -> None:
    rng, rows = np.random.default_rng(0), []
    for k in range(images):
        colour, light = str(rng.choice(list(COLOURS))), bool(rng.integers(2))
        pixels = rng.integers(0, 76, (16, 16, 3)).astype(np.uint8) + np.uint8(180 * light)
        top, left = rng.integers(0, 8, 2)
        pixels[top : top + 9, left : left + 9] = COLOURS[colour]
        Image.fromarray(pixels).save(folder / f"{k:03}.png")
        if kind == "unreadable" and k % 8 == 0:
            (folder / f"{k:03}.png").write_bytes(b"\x89PNG\r\n")
        if kind == "by-lot":
            colour, light = str(rng.choice(list(COLOURS))), bool(rng.integers(2))
        rows.append((f"{k:03}", "what colour is it?", colour, "colour"))
        rows.append((f"{k:03}", "is the ground light?", "yes" if light else "no", "ground"))
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("img_id", "question", "answer", "type"), *rows])


VQA, MODEL, BOTTLENECK = "intaglio.systems.vqa", "intaglio.models.vqa", "intaglio.nn.bottleneck"

OPTIONS: dict[str, Any] = {
    "data.source": Made(squares), "data.items": None, "data.held_out": 0.25, "data.image_size": 16,
    "train.steps": 150, "train.batch_size": 24, "train.ema": 0.9, "train.precision": "fp32", "train.device": "cpu",
    "train.log_every": 2, "train.validate_items": 64, "train.keep": 1, "health.probe": 64,
    "optim.warmup": 15, "optim.rate": 3e-3, "stages": [], "loss.ramp": 40, "loss.kl": 0.05,
    "model.width": 32, "model.heads": 2, "model.vision_layers": 1, "model.question_layers": 1,
    "model.fusion_layers": 1, "model.reasoning_layers": 1, "model.answer_layers": 1, "model.latents": 2,
    "model.dims": 4,
}  # fmt: skip

KL_LATER = [{"until": 0.25, "without": ["kl"]}]

FAMILY = Family(
    "ours_vqa",
    "development",
    "intaglio's visual question answering, on squares of four colours",
    recipe="vqa-small",
    options=OPTIONS,
    faults=(
        Fault(
            "decoder-at-ten-times-its-rate",
            "A factor of ten, meant for the decoder of another recipe, stands in the code that makes groups.",
            ("learning-rate-off",),
            changes=(
                Change("if part not in self.config.rates})", 'if part not in {"answer": 10.0}})', VQA),
                Change("in self.config.rates.items():", 'in {"answer": 10.0}.items():', VQA),
            ),
            case="V learning-rate-off",
        ),
        Fault(
            "decoder-configured-at-ten-times-its-rate",
            "The decoder's factor was copied from a recipe where it is fresh and all else is pretrained.",
            ("learning-rate-off",),
            options={"rates": {"answer": 10.0}},
            case="V learning-rate-off",
            minor=True,
            static=True,
        ),
        Fault(
            "rate-that-grows",
            "The decay of the rate has its sign wrong: behind the warm-up it grows by four per cent a step.",
            ("learning-rate-off", "diverged", "non-finite"),
            changes=(
                Change(
                    "return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))",
                    "return 1.04 ** (step - warmup)",
                    "intaglio.objectives.schedules",
                ),
            ),
            case="V diverged",
        ),
        Fault(
            "vision-unfrozen-without-its-optimizer",
            "The optimizer was given what trains at the start; vision, thawed later, is not in it.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "network, decay = self.model.network, self.config.optim.decay",
                    "network, decay = self.model.network, self.config.optim.decay\n"
                    "        network.vision.requires_grad_(False)",
                    VQA,
                ),
            ),
            options={"stages": [{"until": 0.2, "freeze": ["vision"]}]},
            case="V not-in-optimizer",
        ),
        Fault(
            "answers-written-in-a-frozen-table",
            "Questions and answers share their table of tokens, and the question encoder is frozen.",
            ("tied-and-frozen",),
            changes=(
                Change(
                    "self.answer = CaptionDecoder(token_embedding(vocabulary, m.width), lengths[1]",
                    "self.question.requires_grad_(False)\n"
                    "        self.answer = CaptionDecoder(self.question.embedding, lengths[1]",
                    MODEL,
                ),
                Change(
                    ".requires_grad_(part not in frozen)",
                    ".requires_grad_(part not in frozen)\n        self.model.network.question.requires_grad_(False)",
                    VQA,
                ),
            ),
            case="V tied-and-frozen",
            minor=True,
        ),
        Fault(
            "ramp-that-is-only-logged",
            "The total takes the weights of the configuration; the ramp is in the log alone.",
            ("weight-not-applied",),
            changes=(
                Change(
                    "return torch.stack([weight * value.float() for value, weight in terms.values()]).sum()",
                    "return torch.stack([getattr(self.config.loss, n) * t.value for n, t in terms.items()]).sum()",
                    "intaglio.systems.base",
                ),
            ),
            options={"loss.ramp": 120, "loss.kl": 0.2},
            case="V weight-not-applied",
        ),
        Fault(
            "weight-for-a-term-that-is-not-there",
            "β is set, and a deterministic bottleneck has no KL.",
            ("weight-not-applied",),
            options={"model.bottleneck": "deterministic"},
            minor=True,
            static=True,
        ),
        Fault(
            "orthogonality-of-detached-latents",
            "The latents were detached for the picture, and the term took the detached ones.",
            ("term-inert",),
            changes=(Change("Term(orthogonality(q.mean), w.orth", "Term(orthogonality(q.mean.detach()), w.orth", VQA),),
            options={"loss.orthogonality": 0.1},
            case="V term-inert",
        ),
        Fault(
            "teacher-that-ranks-scores",
            "The margin is one of the answers' scores, which are constants, and not of their probabilities.",
            ("teacher-inert", "term-inert"),
            changes=(
                Change(
                    "loss = torch.where(differ, -F.logsigmoid(margin), torch.zeros_like(margin)).mean()",
                    "loss = F.relu(1 - score_BN.max(1).values + score_BN.min(1).values).mean()",
                    "intaglio.objectives.bottleneck",
                ),
            ),
            options={"loss.preference": 0.3},
            case="V teacher-inert",
        ),
        Fault(
            "teacher-whose-candidates-are-one",
            "Best of N, of N greedy answers: they are all the same.",
            ("teacher-inert", "term-inert"),
            changes=(
                Change(
                    'Decoding(method="sample"), generators=seeds)',
                    'Decoding(method="greedy"))',
                    VQA,
                ),
            ),
            options={"loss.preference": 0.3},
            case="V teacher-inert",
        ),
        Fault(
            "answers-by-lot",
            "Two tables were joined by the wrong column: the answers are those of other images.",
            ("overfitting",),
            options={
                "data.source": Made(squares, ("by-lot", 64)),
                "model.bottleneck": "deterministic",
                "loss.kl": 0.0,
                "model.dims": 16,
                "train.validate_every": 10,
            },
            case="V overfitting",
        ),
        Fault(
            "split-by-question",
            "Rows of the table were drawn by lot, so most held-out images are asked about in training as well.",
            ("split-leak",),
            changes=(
                Change(
                    'return split(corpus, {"train": 1 - held_out, "val": held_out}, seed)',
                    "mixed, count = np.random.default_rng(seed).permutation(len(corpus)), int(held_out * len(corpus))\n"
                    '    return {"train": np.sort(mixed[count:]), "val": np.sort(mixed[:count])}, 0',
                    "intaglio.data.questions.prepare",
                ),
            ),
            case="V split-leak",
            static=True,
        ),
        Fault(
            "images-that-cannot-be-read",
            "An eighth of the files was cut off in copying; the limit was raised so that training starts.",
            ("data-replaced",),
            options={"data.source": Made(squares, ("unreadable",)), "data.bad_limit": 0.3},
            case="V data-replaced",
            minor=True,
        ),
        Fault(
            "floor-far-above-any-answer",
            "Free bits of .1 for a mean over 256 numbers became 25 nats of each latent.",
            ("kl-free",),
            options={"loss.floor": 25.6},
            case="V kl-free",
            minor=True,
            static=True,
        ),
        Fault(
            "free-bits-by-the-number",
            "The floor is held against the KL of single numbers, as often as there are numbers.",
            ("kl-free", "kl-units"),
            changes=(
                Change(
                    "Term(free_bits(kl_BK, w.floor), w.kl", "Term(free_bits(kl_BK, w.floor * model.dims), w.kl", VQA
                ),
            ),
            options={"loss.floor": 4.0},
            case="V kl-free",
            minor=True,
        ),
        Fault(
            "rate-of-many-times-the-answer",
            "β was meant for a mean over numbers, so hardly anything is asked for a nat.",
            ("rate-too-high",),
            options={"loss.kl": 1e-4},
            case="V rate-too-high",
            minor=True,
        ),
        Fault(
            "kl-as-a-mean-over-numbers",
            "The KL is averaged over the numbers of a latent, so that its weight is four times β.",
            ("kl-units",),
            changes=(
                Change(
                    "(mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)",
                    "(mean.square() + log_variance.exp() - 1 - log_variance).mean(-1)",
                    "intaglio.objectives.gaussian",
                ),
            ),
            case="V kl-units",
            minor=True,
        ),
        Fault(
            "weight-of-a-mean-on-a-sum",
            "The document's 3.0, which weighed a mean, weighs a sum.",
            ("kl-units",),
            options={"loss.kl": 3.0},
            case="V kl-units",
            minor=True,
            static=True,
        ),
        Fault(
            "temperature-in-training",
            "Latents are drawn at .6 σ, and KL is charged for σ.",
            ("temperature-misstates-rate",),
            options={"model.temperature": 0.6},
            case="V temperature-misstates-rate",
            minor=True,
            static=True,
        ),
        Fault(
            "temperature-in-the-code",
            "The .6 of a demonstration stayed in the line that draws.",
            ("temperature-misstates-rate",),
            changes=(Change("q.log_variance, temperature * noise)", "q.log_variance, 0.6 * noise)", MODEL),),
            case="V temperature-misstates-rate",
            minor=True,
        ),
        Fault(
            "ramp-longer-than-the-run",
            "The ramp was set in steps of the long run.",
            ("stopped-in-ramp",),
            options={"loss.ramp": 2000},
            case="V stopped-in-ramp",
            minor=True,
            static=True,
        ),
        Fault(
            "patience-that-runs-out-in-the-ramp",
            "Looks count from the first step on, by a total that rises because the weight does.",
            ("stopped-in-ramp",),
            changes=(
                Change(
                    "return max([self.ramp_from + self.config.loss.ramp, *(stage.until for stage in self.stages)])",
                    "return 0",
                    VQA,
                ),
            ),
            options={
                "loss.ramp": 120,
                "loss.kl": 0.2,
                "train.patience": 2,
                "train.validate_every": 12,
                "train.monitor": "val/loss/total",
            },
            case="V stopped-in-ramp",
            minor=True,
        ),
        Fault(
            "written-behind-another-token",
            "The decoder is taught to begin behind START, and begins behind END when it writes.",
            ("free-running-gap",),
            changes=(Change("(len(z_BKZ),), START, dtype", "(len(z_BKZ),), END, dtype", MODEL),),
            case="V free-running-gap",
        ),
        Fault(
            "every-question-looks-at-the-first-image",
            "An index is lost where keys and values are taken: all look at the first image of the batch.",
            ("question-only",),
            changes=(Change("keys[which_B], values[which_B])", "keys[0 * which_B], values[0 * which_B])", BOTTLENECK),),
            case="V question-only",
        ),
        Fault(
            "memory-of-zeros",
            "The decoder is given an empty tensor that was meant to hold the latents.",
            ("decoder-ignores-latent", "posterior-collapse", "dead-parameters"),
            changes=(Change("else self.out(z_BKZ)", "else self.out(z_BKZ.new_zeros(z_BKZ.shape))", BOTTLENECK),),
        ),
        Fault(
            "chosen-by-what-is-not-measured",
            "The best step is to be chosen by a term that this recipe has not.",
            ("validation-missing",),
            options={"train.monitor": "val/loss/preference"},
            static=True,
        ),
    ),
    healthy=(
        Healthy("plain", options={"train.steps": 240, "stages": KL_LATER}, seeds=(0, 1)),
        Healthy("deterministic", options={"model.bottleneck": "deterministic", "loss.kl": 0.0}),
        Healthy(
            "without-bottleneck-adamw",
            options={"model.bottleneck": "none", "loss.kl": 0.0, "optim.kind": "adamw", "optim.rate": 2e-3},
        ),
        Healthy(
            "parked",
            "The rate is parked at its free bits: an attractor, and no fault. V: three days were lost on it.",
            case="V kl-parked",
            options={
                "loss.floor": 1.5,
                "loss.kl": 0.3,
                "train.steps": 240,
                "stages": KL_LATER,
            },
        ),
        Healthy(
            "curriculum",
            "KL and the preference come later, vision is frozen at first, and there is patience.",
            options={
                "stages": [{"until": 0.2, "freeze": ["vision"], "without": ["kl", "preference"]}],
                "loss.preference": 0.1,
                "rates": {"vision": 0.5},
                "train.patience": 4,
                "train.monitor": "val/loss/wrong",
            },
        ),
        Healthy(
            "constant-rate-wide",
            options={"optim.schedule": "constant", "optim.rate": 2e-3, "model.width": 48, "model.latents": 4},
        ),
    ),
)
