"""Train latent-variable models, and prove what they learned.

The verbs of the command line are functions here: ``intaglio.train("multimodal-small")``, ``intaglio.caption(run, …)``.
Nothing heavy is imported until one is called.
"""

from importlib import import_module
from typing import Any

ELSEWHERE = {
    "answer": "intaglio.answering:answer",
    "changelog": "intaglio.reports.changelog:changelog",
    "compare": "intaglio.reports.comparison:compare",
    "export": "intaglio.puzzles:export",
    "diagnose": "intaglio.analysis:diagnose",
    "judge": "intaglio.analysis:judge",
    "remedies": "intaglio.training.remedy:remedies",
    "report": "intaglio.reports.report:write_report",
    "runs": "intaglio.reports.lineage:read_lineage",
    "sweep": "intaglio.training.sweep:sweep",
    "try_remedies": "intaglio.training.remedy:try_remedies",
}
"""Where the verbs are that need no model, or one of tasks or of questions."""

VERBS = (
    *ELSEWHERE,
    "caption",
    "check",
    "demo",
    "encode",
    "evaluate",
    "generate",
    "interpolate",
    "load_model",
    "prove",
    "reconstruct",
    "search",
    "train",
)

__version__ = "0.1.0"
__all__ = ["VERBS", "__version__", *VERBS]


def __getattr__(name: str) -> Any:
    if name in VERBS:
        module, _, function = ELSEWHERE.get(name, f"intaglio.api:{name}").partition(":")
        return getattr(import_module(module), function)
    raise AttributeError(f"module 'intaglio' has no attribute {name!r}; verbs: {', '.join(VERBS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
