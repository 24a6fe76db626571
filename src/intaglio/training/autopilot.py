"""A training that repairs itself: where a rule fails, its remedies are tried, and the one that helps is flown on with.

    intaglio train RECIPE --autopilot

At the first failing finding training stops, with its checkpoint kept. Branches of some steps try the first remedies
beside a control, as ``intaglio remedy --try`` does; what is better there becomes the settings of a new run that goes on
from where the branches began. Where none is better, training goes on as it was. Every run of the line is kept, and
``intaglio changelog`` tells what was changed in each, and on what evidence.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from intaglio.history.run_folder import RunFolder, find
from intaglio.systems.base import NonFiniteStep
from intaglio.training.remedy import LENGTH, Tried, try_remedies
from intaglio.training.run import branch, train

SEEDS = 3
"""Branches of each arm: fewer cannot tell a remedy from chance."""

MOST = 2
"""Remedies that are tried of one run."""

NOT_FINITE = "non-finite"

FEWEST = 10
"""Optimizer steps of a branch below which nothing is tried."""

Say = Callable[[str], None]


def fly(recipe: str | Path, overrides: Sequence[str] = (), *, budget: float = 2.0, quiet: bool = False) -> RunFolder:
    """Trains a recipe, and changes what its findings ask for where that is shown to help.

    Args:
        recipe: name or path.
        overrides: ``--key.sub value`` words.
        budget: optimizer steps that all trials may take, as a share of the run's own.
        quiet: says only what must be said.

    Returns:
        The folder of the last run of the line.

    Raises:
        ValueError: anything that the user can put right; says how.
    """
    if budget <= 0:
        raise ValueError(f"--autopilot {budget:g}: give the steps of all trials as a share of the run's, as 2.")
    given = [word.split("=")[0] for word in overrides]
    if "--health.on=false" in overrides or "--health.stop" in given:
        raise ValueError("--autopilot needs health's findings and stops by them: leave --health.on and .stop out.")

    def say(line: str) -> None:
        if not quiet:
            print(f"autopilot: {line}", flush=True)

    folder = _flown(lambda: train(recipe, [*overrides, "--health.stop=true"], quiet=quiet))
    total = folder.config().train.steps or 0
    each, left = int(budget * total / (SEEDS * (MOST + 1))), budget * total
    interventions = 0
    while _accused(folder) and each >= FEWEST and left >= 2 * SEEDS * each:
        say(f"{_accused(folder)} fails: trying what it asks for, {each} steps each")
        try:
            found = try_remedies(folder.path, seeds=SEEDS, steps=each, most=MOST, say=say)
        except ValueError as error:
            folder.update(autopilot=str(error))
            say(str(error))
            break
        left -= SEEDS * each * (1 + len(found.tried))
        better = next((tried for tried in found.tried if tried.verdict == "better"), None)
        if better is None:
            told = "; ".join(f"{t.proposal.do}: {t.verdict}" for t in found.tried)
            folder.update(autopilot=f"No remedy of {_accused(folder)} was shown to help: {told}.")
            say(folder.record["autopilot"])
            break
        interventions += 1
        folder = _changed(folder, better, f"{_first_name(folder)}-{interventions}", quiet)
    if _accused(folder) == NOT_FINITE:
        raise NonFiniteStep(str(folder.record["error"]))
    if _accused(folder):
        say(f"going on as it is, with {_accused(folder)}")
        folder = train(resume=folder.path, overrides=["--health.stop=false"], quiet=quiet) or folder
    return folder


def _flown(training: Callable[[], RunFolder | None]) -> RunFolder:
    """The folder of a training, also where a step was not finite."""
    try:
        folder = training()
    except NonFiniteStep as error:
        if error.run is None:
            raise
        return find(error.run)
    assert folder is not None  # no dry run
    return folder


def _accused(folder: RunFolder) -> str:
    """The rule that stopped a run; empty where none did."""
    if str(folder.record.get("error") or "").startswith("NonFiniteStep"):
        return NOT_FINITE
    stopped = str(folder.record.get("stopped_by") or "")
    return stopped.removeprefix("health: ") if stopped.startswith("health: ") else ""


def _first_name(folder: RunFolder) -> str:
    return str(folder.record.get("line") or folder.path.name)


def _changed(folder: RunFolder, better: Tried, name: str, quiet: bool) -> RunFolder:
    """A new run with what has helped, from where its branches began."""
    proposal = better.proposal
    changed = [f"--{key}={value}" for key, value in proposal.changes.items() if key not in LENGTH]
    words = [*changed, f"--runs={folder.path.parent}", f"--name={name}"]
    config = folder.path / "config.yaml"
    made = _flown(
        lambda: branch(proposal.start, words, quiet=quiet) if proposal.start else train(config, words, quiet=quiet)
    )
    made.update(
        parent=folder.record["id"],
        changed_from_parent=[key for key in proposal.changes if key not in LENGTH],
        line=_first_name(folder),
        autopilot=f"Autopilot, against {proposal.rule}: {proposal.do}. Better in {better.runs} branches: "
        f"{better.reason}.",
    )
    return made
