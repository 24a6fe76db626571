"""The targets of the autoencoder and of diffusion: ``intaglio bench diffusion``, with ``--data FOLDER`` photos too.

A run of the same name and configuration that has finished is measured rather than trained again. Photos are a folder
of images with labels that ``train`` reads.
"""

from typing import Any

from intaglio.bench import Result
from intaglio.bench.runs import finished, minutes, result, told


def measure(photos: str | None = None) -> tuple[list[Result], dict[str, Any]]:
    """Trains the recipes as they stand, one after another, and reads their held-out numbers."""
    facts: dict[str, Any] = {"runs": {}}
    results: list[Result] = []
    trained = finished("autoencoder-small")
    readings = told(trained, facts)
    results.append(result("autoencoder, 64 px: R² of the round trip", 0.95, readings["val/round_trip/r2"]))
    for recipe, name in (("diffusion-small", "pixels, 32 px"), ("diffusion-latent", "latents, 64 px")):
        folder = finished(recipe)
        readings = told(folder, facts)
        for w in (3, 9):
            accuracy = readings[f"val/guidance.{w}/class_accuracy"]
            results.append(result(f"{name}: class accuracy at w = {w}", 0.9, accuracy))
        results.append(
            Result(f"{name}: lower end of it at w = 3", 0.85, readings["val/guidance.3/class_accuracy"]["low"])
        )
        results.append(
            result(f"{name}: diversity at w = 9 over that of real images", 0.5, readings["val/guidance.9/diversity"])
        )
        results.append(Result(f"{name}: minutes of training", 30, minutes(folder), better="lower"))
    if photos is not None:
        folder = finished("diffusion-photos", [f"--data.source={photos}"])
        readings = told(folder, facts)
        results.append(result("photos, 32 px: class accuracy at w = 3", 0.5, readings["val/guidance.3/class_accuracy"]))
        results.append(Result("photos: minutes of training", 60, minutes(folder), better="lower"))
    return results, facts
