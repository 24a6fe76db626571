"""Does a remedy help? Each is tried in branches of a run, beside as many that are left as they were.

    intaglio remedy RUN          # what to change, in order
    intaglio remedy RUN --try    # and whether it helps: seeds × (control + remedy), in RUN-remedies/

A branch begins at the last checkpoint before the finding was first said, or, where there is none or the change does not
fit its weights, at the start with a seed of its own. Both arms have the same steps, seeds and draws. No torch here: the
branches are processes of their own, and the run itself is only read.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from intaglio import config as configuration
from intaglio.health.diagnosis import all_of, diagnose
from intaglio.health.finding import SEVERITIES, Finding, Severity
from intaglio.health.remedies import changes, commanded, far_off
from intaglio.health.replay import first_said
from intaglio.history.run_folder import RunFolder, find, write_atomically
from intaglio.reports.comparison import compare

BRANCH = "import sys; from intaglio.training.run import branch; branch(sys.argv[1], sys.argv[2:], quiet=True)"
ANEW = "import sys; from intaglio.training.run import train; train(sys.argv[1], sys.argv[2:], quiet=True)"

LENGTH = {"train.steps", "train.epochs"}

SPOILT = 10.0
"""A rate that is so many times off has left weights that nothing should go on from."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Proposal:
    """One remedy of one finding: what to do in words, the settings that it changes, and the command.

    ``start`` is the checkpoint that it can be tried from, empty for the start of the training.
    """

    rule: str
    severity: Severity
    message: str
    do: str
    changes: Mapping[str, str]
    command: str
    wait: int = 0
    start: str = ""

    @property
    def untried(self) -> str:
        """Why it cannot be tried by itself; empty where it can."""
        if not self.changes:
            return "names no setting with a value"
        if set(self.changes) <= LENGTH:
            return "more steps are no change that a control of as many steps could tell from none"
        return ""


@dataclass(frozen=True)
class Tried:
    """A remedy beside its control.

    ``held_out`` is the verdict of the comparison and ``reason`` what it rests on; ``before`` and ``after`` are in how
    many of the ``runs`` of each arm the finding was made.
    """

    proposal: Proposal
    verdict: str
    held_out: str
    reason: str
    before: int
    after: int
    runs: int
    control: tuple[str, ...] = ()
    treated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Remedies:
    """What a run needs, and what was tried of it."""

    run: str
    verdict: str
    proposals: tuple[Proposal, ...]
    tried: tuple[Tried, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The answer of ``--json``."""
        proposals = [asdict(p) | {"untried": p.untried} for p in self.proposals]
        tried = [asdict(t) for t in self.tried]
        return {"run": self.run, "verdict": self.verdict, "proposals": proposals, "tried": tried}


def remedies(run: str | Path) -> Remedies:
    """The remedies of a run's findings, the gravest finding's first; the run is only read.

    Raises:
        ValueError: no run folder of ours, or one without metrics.
    """
    folder = find(run)
    if not (folder.path / "config.yaml").is_file():
        raise ValueError(f"{folder.path} was trained by another program: its findings say what to change there.")
    record, missing = all_of(folder)
    found = diagnose(record, not_measured=missing)
    first, config = first_said(record), record.config
    made = []
    for finding in found.findings:
        if finding.severity != "note":
            step = first.get((finding.rule, finding.severity), record.last_step)
            made += [_proposal(finding, k, folder, config, step) for k in range(len(finding.remedies))]
    if made:
        made[1:1] = _put_back(made[0], folder, config)
    return Remedies(str(folder.path), found.verdict, tuple(made))


def _put_back(first: Proposal, folder: RunFolder, config: Mapping[str, Any]) -> list[Proposal]:
    """Settings far off the system's own, put back one at a time, from the start."""
    made = []
    for key, usual in far_off(config).items():
        do = f"put --{key} back to the system's own {usual}"
        command = f"intaglio train {shlex.quote(f'{folder.path}/config.yaml')} --{key} {usual}"
        made.append(Proposal(first.rule, first.severity, first.message, do, {key: usual}, command))
    return made


def _proposal(finding: Finding, k: int, folder: RunFolder, config: Mapping[str, Any], step: int) -> Proposal:
    remedy = commanded(finding, str(folder.path), config).remedies[k]
    changed = changes(remedy, config)
    rates = float(changed.get("optim.rate", config["optim"]["rate"])), config["optim"]["rate"]
    spoilt = max(rates) >= SPOILT * min(rates)
    start = _last_before(folder, step) if not spoilt and not any(map(configuration.structural, changed)) else ""
    return Proposal(
        finding.rule, finding.severity, finding.message, remedy.do, changed, remedy.command, remedy.wait, start
    )


def _last_before(folder: RunFolder, step: int) -> str:
    """The last checkpoint before a step; empty where none is kept."""
    kept = [p for p in sorted(folder.checkpoints.glob("step-*.ckpt")) if _step(p) < step]
    return str(kept[-1]) if kept else ""


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def try_remedies(
    run: str | Path, *, seeds: int = 3, steps: int | None = None, jobs: int = 1, most: int = 3, say: Say = print
) -> Remedies:
    """Tries the remedies of a run in their order, until one is better.

    Args:
        run: the run folder, which is not touched.
        seeds: branches of each arm.
        steps: optimizer steps of each branch; by default what the run has left from there.
        jobs: branches at once.
        most: remedies to try, at most.
        say: tells a person how far it is.

    Raises:
        ValueError: nothing that can be tried, or numbers that make no sense.
    """
    if min(seeds, jobs, most) < 1 or (steps is not None and steps < 1):
        raise ValueError("--seeds, --jobs, --most and --steps are numbers from 1 on.")
    found = remedies(run)
    chosen = [p for p in _distinct(found.proposals) if not p.untried][:most]
    if not chosen:
        why = "; ".join(dict.fromkeys(f"{p.do}: {p.untried}" for p in found.proposals)) or "it has no finding"
        raise ValueError(f"{found.run} has no remedy that could be tried: {why}.")
    place = Path(found.run).with_name(f"{Path(found.run).name}-remedies")
    trial = _Trial(find(run), place, seeds, steps, jobs, say)
    tried: list[Tried] = []
    for number, proposal in enumerate(chosen, 1):
        say(f"remedy {number} of {len(chosen)}: {proposal.do} (against {proposal.rule})")
        tried.append(trial.run(proposal, number))
        say(f"{tried[-1].verdict}: {tried[-1].reason}")
        if tried[-1].verdict == "better":
            break
    answer = Remedies(found.run, found.verdict, found.proposals, tuple(tried))
    write_atomically(place / "remedies.json", json.dumps(answer.as_dict(), indent=2, ensure_ascii=False) + "\n")
    return answer


def _distinct(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Without those that change the same settings as one before."""
    seen: dict[str, Proposal] = {}
    for p in proposals:
        seen.setdefault(json.dumps(dict(p.changes), sort_keys=True), p)
    return list(seen.values())


@dataclass(frozen=True)
class _Trial:
    folder: RunFolder
    place: Path
    seeds: int
    steps: int | None
    jobs: int
    say: Say

    def run(self, proposal: Proposal, number: int) -> Tried:
        """Trains both arms, or takes what is there already, and compares them."""
        begin = f"from-{_step(Path(proposal.start))}" if proposal.start else "anew"
        changed = {key: value for key, value in proposal.changes.items() if key not in LENGTH}  # as many steps as it
        arms = {f"control-{begin}": {}, f"remedy-{number}-{begin}": changed}
        wanted = [(f"{arm}-{k}", changed, k) for k in range(self.seeds) for arm, changed in arms.items()]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda task: self._train(proposal, *task), wanted))
        control, treated = ([self.place / f"{arm}-{k}" for k in range(self.seeds)] for arm in arms)
        return judged(proposal, control, treated)

    def _train(self, proposal: Proposal, name: str, changed: Mapping[str, str], k: int) -> None:
        config = self.folder.config()
        begun = _step(Path(proposal.start)) if proposal.start else 0
        steps = begun + self.steps if self.steps else (config.train.steps or 0)
        given = {"train.steps": str(steps), **changed, "runs": str(self.place), "name": name, "health.stop": "false"}
        if proposal.start:
            words = [proposal.start]
            given["train.draws"] = str(config.train.draws + k)
        else:
            words = [str(self.folder.path / "config.yaml")]
            given["seed"] = str(config.seed + k)
        if (ended := trained(self.place, name, words, given, anew=not proposal.start, jobs=self.jobs)) is None:
            return
        self.say(f"{name}: finished" if ended else f"{name}: did not finish; see {self.place / f'{name}.log'}")


def trained(
    place: Path, name: str, words: Sequence[str], given: Mapping[str, str], *, anew: bool, jobs: int = 2
) -> bool | None:
    """Trains a branch, or anew, in a process of its own; whether it finished, None where it is there already."""
    folder, asked = place / name, place / f"{name}.json"
    told = json.dumps([list(words), dict(given)], indent=2) + "\n"
    known = asked.is_file() and asked.read_text(encoding="utf-8") == told
    if known and (folder / "run.json").is_file() and RunFolder(folder).record["status"] in ("finished", "failed"):
        return None
    shutil.rmtree(folder, ignore_errors=True)  # unfinished, or of other settings
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(asked, told)
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with (place / f"{name}.log").open("wb") as log:
        options = [f"--{key}={value}" for key, value in given.items()]
        subprocess.run(
            [sys.executable, "-c", ANEW if anew else BRANCH, *words, *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False,
        )  # fmt: skip
    return (folder / "evaluation.json").is_file()


def judged(proposal: Proposal, control: Sequence[Path], treated: Sequence[Path]) -> Tried:
    """Better, worse or cannot tell: by the held-out quantity, and by whether the finding is still made.

    Better is a remedy with which the finding, made without it, is made in no branch, and that the comparison calls
    better, or equivalent where none of its branches has another failing finding; worse one that it calls worse, or
    whose branches alone do not finish.
    """
    ended = [[(folder / "evaluation.json").is_file() for folder in arm] for arm in (control, treated)]
    before, after = (sum(is_made(proposal, folder) for folder in arm) for arm in (control, treated))
    if all(all(arm) for arm in ended):
        compared = compare([str(folder) for folder in control], [str(folder) for folder in treated])
        held_out, reason = compared.verdict, compared.reason
    else:
        held_out, reason = _by_endings(*ended)
    gone = before > 0 and after == 0
    if held_out == "worse":
        verdict = "worse"
    elif gone and (held_out == "better" or (held_out == "equivalent" and not any(map(fails, treated)))):
        verdict = "better"
    else:
        verdict = "cannot tell"
    told = f"{reason}; {proposal.rule} is found in {before} of {len(control)} without and {after} with it"
    names = [tuple(str(folder) for folder in arm) for arm in (control, treated)]
    return Tried(proposal, verdict, held_out, told, before, after, len(control), *names)


def _by_endings(control: Sequence[bool], treated: Sequence[bool]) -> tuple[str, str]:
    """What it says that some branches did not finish."""
    told = f"{sum(control)} of {len(control)} branches finish without it, {sum(treated)} of {len(treated)} with it"
    if all(treated) and not any(control):
        return "better", told
    if all(control) and not any(treated):
        return "worse", told
    return "cannot tell", told


def is_made(proposal: Proposal, folder: Path) -> bool:
    """Whether a branch has the finding, as gravely as it was made."""
    found = _findings(folder)
    as_grave = SEVERITIES[: SEVERITIES.index(proposal.severity) + 1]
    return found is None or any(f.rule == proposal.rule and f.severity in as_grave for f in found)


def fails(folder: Path) -> bool:
    """Whether a branch has any failing finding, or came to nothing."""
    found = _findings(folder)
    return found is None or any(f.severity == "fail" for f in found)


def _findings(folder: Path) -> Sequence[Finding] | None:
    """What is found of a branch; None where it ended before its first row."""
    if not (folder / "run.json").is_file():
        return None
    try:
        record, missing = all_of(RunFolder(folder))
    except ValueError:
        return None
    return diagnose(record, not_measured=missing).findings
