"""The verbs that need a history and no model: ``intaglio.diagnose("run.csv")`` is instant. No torch.

``path`` is a run folder of ours, its name under ``runs/``, or a history file or folder that any program wrote.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio.health.diagnosis import Diagnosis, diagnose_run
from intaglio.health.foreign import Judged, diagnose_file
from intaglio.health.plan import load_plan


def is_ours(path: str | Path) -> bool:
    """Whether a word names a run folder of ours, or nothing that is there, and not a file or folder of others."""
    return not Path(path).exists() or (Path(path) / "run.json").is_file()


def diagnose(
    path: str | Path,
    profile: str | Path = "default",
    rules: Sequence[str] = (),
    trials: bool = False,
    plan: str | Path | Sequence[Any] | None = None,
) -> Diagnosis:
    """The verdict on one run, live or finished; with ``trials`` its saved model is read and tried first.

    Raises:
        ValueError: nothing to judge, an unknown profile or rule, many runs in one file (``judge`` gives them all), or
            trials of a history that has no model.
    """
    if is_ours(path):
        if trials:
            from intaglio.api import look_again

            look_again(path)
        return diagnose_run(path, profile, rules, load_plan(plan) if plan is not None else None)
    if trials:
        raise ValueError(f"{path} is a history without a model: trials need a run folder of ours.")
    found = judge(path, profile, rules, plan=plan)
    if len(found) > 1:
        names = ", ".join(x.history.name for x in found[:8])
        raise ValueError(f"{path} holds {len(found)} runs ({names} …): judge({str(path)!r}) gives the verdict on each.")
    return found[0].diagnosis


def judge(
    path: str | Path,
    profile: str | Path = "default",
    rules: Iterable[str] = (),
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    run: str | None = None,
    plan: str | Path | Sequence[Any] | None = None,
) -> list[Judged]:
    """How anybody's history was read, and the verdict on each run in it.

    Raises:
        ValueError: what cannot be read as a history; an unknown format, profile, rule, name or run.
    """
    limits = load_plan(plan) if plan is not None else None
    return diagnose_file(path, profile, rules, format, mapping, run, limits)
