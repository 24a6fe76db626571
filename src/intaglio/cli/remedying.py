"""The verb ``remedy``. No torch: branches are processes of their own."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from intaglio.cli.analysing import print_json

if TYPE_CHECKING:
    from intaglio.training.remedy import Remedies

Arguments = argparse.Namespace


def remedy(a: Arguments) -> int:
    """Says what to change, or tries it: 0 where nothing is to be done or a remedy is better, 3 where it cannot be
    told, 1 where what was tried is worse."""
    from intaglio.training.remedy import remedies, try_remedies

    if not a.attempt:
        given = {"--seeds": a.seeds, "--steps": a.steps, "--jobs": a.jobs, "--most": a.most}
        if named := [option for option, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(named)} says how remedies are tried: add --try.")
        found = remedies(a.run)
    else:
        quiet = a.quiet or a.json
        found = try_remedies(
            a.run,
            seeds=3 if a.seeds is None else a.seeds,
            steps=a.steps,
            jobs=1 if a.jobs is None else a.jobs,
            most=3 if a.most is None else a.most,
            say=lambda line: None if quiet else print(line, file=sys.stderr, flush=True),
        )
    if a.json:
        print_json(found.as_dict())
    else:
        print("\n".join(_lines(found)))
    verdicts = [t.verdict for t in found.tried]
    if not a.attempt or "better" in verdicts:
        return 0
    return 3 if "cannot tell" in verdicts else 1


def _lines(found: "Remedies") -> list[str]:
    lines = [f"{found.run}: {found.verdict.upper()}"]
    if not found.proposals:
        return [*lines, "nothing to remedy"]
    last = ""
    for number, p in enumerate(found.proposals, 1):
        if p.message != last:
            lines.append(f"{p.severity}: {p.message} [{p.rule}]")
            last = p.message
        what = ", ".join(f"{key} {value}" for key, value in p.changes.items()) or "no setting with a value"
        lines.append(f"  {number}. {p.do} ({what})")
        lines += [f"     {p.command}"] if p.command else []
    for t in found.tried:
        what = ", ".join(f"--{key} {value}" for key, value in t.proposal.changes.items())
        lines.append(f"{t.verdict.upper()}: {what}: {t.reason}")
    return lines


VERBS = {"remedy": remedy}


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb and its options to the command line."""
    p = verb("remedy", "what to change in a run, in order; with --try, whether it helps, beside a control")
    p.add_argument("run", help="a run folder or its name, which is only read")
    p.add_argument("--try", dest="attempt", action="store_true", help="train branches with each remedy, and without")
    p.add_argument("--seeds", type=int, metavar="N", help="branches of each arm (3)")
    p.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each branch (what the run has left)")
    p.add_argument("--jobs", type=int, metavar="N", help="branches at once (1)")
    p.add_argument("--most", type=int, metavar="N", help="remedies to try, at most (3)")
    p.add_argument("--quiet", action="store_true", help="say only what must be said")
