"""The targets of visual question answering: ``intaglio bench vqa --data FOLDER``, easy-VQA's images and questions.

``vqa-small`` learns the folder's questions and the built-in ones, with a bottleneck and without, and is measured on
images that it never saw. A run that has finished is measured rather than trained again.
"""

from typing import Any

from intaglio.bench import Result
from intaglio.bench.runs import Readings, finished, minutes, result, told

NONE = ["--model.bottleneck=none"]


def measure(data: str | None = None) -> tuple[list[Result], dict[str, Any]]:
    """Trains ``vqa-small`` on both, and reads its held-out numbers."""
    if data is None:
        raise ValueError("bench vqa needs questions about images: --data FOLDER, with easy-VQA's questions.json in it.")
    facts: dict[str, Any] = {}
    folder = [f"--data.source={data}"]
    shapes = finished("vqa-small", folder, "vqa-shapes")
    engravings = finished("vqa-small", [], "vqa-engravings")
    plain = told(finished("vqa-small", [*folder, *NONE], "vqa-shapes-none"), facts)
    a, b = told(shapes, facts), told(engravings, facts)
    accuracy, rate = a["val/answer/accuracy"], a["val/latent/rate_over_entropy"]
    return [
        result("easy-VQA, held-out images: exactly right", 0.95, accuracy),
        Result("easy-VQA: above what the question gives away", 0.25, accuracy["value"] - accuracy["null"]),
        result("engravings: exactly right", 0.9, b["val/answer/accuracy"]),
        *(_lost(name, run) for name, run in (("easy-VQA", a), ("engravings", b))),
        *(_other_image(name, run) for name, run in (("easy-VQA", a), ("engravings", b))),
        Result("easy-VQA: rate over the entropy of the answers", 4, rate["value"], better="lower", n=rate["n"]),
        Result(
            "easy-VQA: right answers that the bottleneck costs",
            0.01,
            plain["val/answer/accuracy"]["value"] - accuracy["value"],
            better="lower",
        ),
        Result("minutes of training, the longest", 30, max(minutes(shapes), minutes(engravings)), better="lower"),
    ], facts


def _lost(name: str, run: Readings) -> Result:
    return result(f"{name}: right answers lost with latents shuffled", 0.3, run["val/answer/shuffled_latent_drop"])


def _other_image(name: str, run: Readings) -> Result:
    return result(f"{name}: right answers lost with another image", 0.2, run["val/answer/shuffled_image_drop"])
