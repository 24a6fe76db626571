"""The targets of the multimodal system on the built-in engravings: ``intaglio bench multimodal``."""

import json
import time
from typing import Any

from intaglio.bench import Result

QUANTITIES = {
    "val/caption/token_accuracy": 0.85,
    "val/caption/shuffled_latent_nats": 1.0,
    "val/caption/object": 0.95,
    "val/image/r2_over_mean_image": 0.6,
    "val/retrieval/image_to_text_r1": 0.5,
    "val/retrieval/text_to_image_r1": 0.5,
    "val/prior/object": 0.8,
}


def measure() -> tuple[list[Result], dict[str, Any]]:
    """Trains ``multimodal-small`` as it stands and reads its held-out numbers."""
    from intaglio.api import train

    begun = time.monotonic()
    folder = train("multimodal-small")
    assert folder is not None
    evaluation = json.loads((folder.path / "evaluation.json").read_text(encoding="utf-8"))
    readings, minutes = evaluation["readings"], evaluation["seconds"] / 60
    results = []
    for name, target in QUANTITIES.items():
        r = readings[name]
        results.append(Result(name, target, r["value"], null=r["null"], n=r["n"], low=r["low"], high=r["high"]))
    accuracy = readings["val/caption/token_accuracy"]
    gain = accuracy["value"] - accuracy["null"]
    results.append(Result("token accuracy above the bigram model", 0.15, gain, null=0.0, n=accuracy["n"]))
    results.append(Result("minutes of training", 15.0, minutes, better="lower"))
    besides = ("val/posterior/object", "val/gaussian_prior/object", "val/image/object", "val/judge/accuracy")
    facts = {
        "besides": {name: readings[name] for name in besides},
        "recipe": "multimodal-small",
        "minutes_in_all": round((time.monotonic() - begun) / 60, 1),
        "data": folder.record["data"]["items"],
    }
    return results, facts
