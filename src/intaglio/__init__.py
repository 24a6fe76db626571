"""Train latent-variable models, and prove what they learned.

The verbs of the command line are functions here: ``intaglio.train("multimodal-small")``, ``intaglio.caption(run, …)``.
Nothing heavy is imported until one is called.
"""

from importlib import import_module
from typing import Any

VERBS = (
    "caption",
    "check",
    "demo",
    "diagnose",
    "encode",
    "evaluate",
    "generate",
    "interpolate",
    "load_model",
    "reconstruct",
    "search",
    "train",
)

__version__ = "0.1.0"
__all__ = ["VERBS", "__version__", *VERBS]


def __getattr__(name: str) -> Any:
    if name in VERBS:
        return getattr(import_module("intaglio.api"), name)
    raise AttributeError(f"module 'intaglio' has no attribute {name!r}; verbs: {', '.join(VERBS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
