"""The verbs that need a history and no model: diagnose, report, compare, runs, changelog. No torch."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Arguments = argparse.Namespace


def diagnose(a: Arguments) -> int:
    """The verdict, in words or JSON."""
    from intaglio.health.diagnosis import diagnose_run, marks
    from intaglio.health.plan import load_plan

    if a.explain:
        return _explain(a.explain)
    if a.run is None:
        raise ValueError("which run? Give its folder, its name, or a history file; or --explain RULE.")
    from intaglio.analysis import is_ours

    if not is_ours(a.run):
        return _diagnose_file(a)
    _only_foreign(a)
    if a.trials:
        from intaglio.api import look_again

        look_again(a.run)
    found = diagnose_run(a.run, a.profile, a.rule or (), load_plan(a.plan) if a.plan else None)
    if a.json:
        print_json(found.as_dict() | {"profile": {"name": a.profile, "marks": marks(a.profile)}})
    else:
        from intaglio.reports.summary import verdict_lines

        print("\n".join(verdict_lines(found)))
        _tell_profile(a.profile)
    return _exit([found.verdict])


def _explain(rule: str) -> int:
    from intaglio.health.diagnosis import chosen, explain
    from intaglio.health.rules import all_rules

    if rule not in {r.id for r in all_rules()}:  # some are seen before training alone, and need torch
        from intaglio.health.pages import before_training

        if rule in (early := before_training()):
            print(f"{rule}\n\nSeen by intaglio check: " + "; ".join(early[rule]))
            return 0
    print(explain(*chosen([rule])))
    return 0


def _diagnose_file(a: Arguments) -> int:
    from intaglio.analysis import judge
    from intaglio.health.diagnosis import marks
    from intaglio.reports.summary import history_lines

    if a.trials:
        raise ValueError(f"{a.run} is a history without a model: --trials needs a run folder of ours.")
    judged = judge(a.run, a.profile, a.rule or (), format=a.format, mapping=_names(a.map), run=a.one_run, plan=a.plan)
    verdicts = [x.diagnosis.verdict for x in judged]
    if a.json:
        runs = [x.as_dict() for x in judged]
        profile = {"profile": {"name": a.profile, "marks": marks(a.profile)}}
        print_json((runs[0] if len(runs) == 1 else {"verdict": _gravest(verdicts), "runs": runs}) | profile)
    else:
        print("\n".join(history_lines(judged)))
        _tell_profile(a.profile)
    return _exit(verdicts)


def report(a: Arguments) -> int:
    """Writes all documents, and says the verdict and where they are."""
    from intaglio.analysis import is_ours
    from intaglio.reports.analysis import analyse
    from intaglio.reports.report import write_documents

    if is_ours(a.run):
        _only_foreign(a)
    found = analyse(a.run, format=a.format, mapping=_names(a.map), profile=a.profile, name=a.one_run)
    page = write_documents(found, a.run, a.out)
    verdicts = [x.diagnosis.verdict for x in found]
    if a.json:
        files = sorted(str(p.relative_to(page.parent)) for p in page.parent.rglob("*") if p.is_file())
        print_json({"page": str(page), "verdict": _gravest(verdicts), "files": files})
    else:
        print(f"{_gravest(verdicts).upper()}: {page}")
    return _exit(verdicts)


def compare(a: Arguments) -> int:
    """The comparison, in words, JSON or files; exit code 3 where it cannot be told."""
    from intaglio.reports.arms import in_two
    from intaglio.reports.comparison import compare as compared
    from intaglio.reports.comparison_text import terminal_lines, write

    first, second = in_two(a.runs, a.against or ())
    found = compared(
        first, second, format=a.format, mapping=_names(a.map), metrics=a.metric or (), delta=a.delta, windows=a.windows
    )
    written = [write(found, path) for path in a.out or ()]
    if a.json:
        print_json(found.as_dict())
    else:
        print("\n".join([*terminal_lines(found), *map(str, written)]))
    return 3 if found.verdict == "cannot tell" else 0


def runs(a: Arguments) -> int:
    """The tree of runs, or those that fit a question."""
    from intaglio.reports.lineage import read_lineage, tree_lines

    lineage = read_lineage(a.folder)
    lineage = lineage.where(a.where) if a.where else lineage
    if a.json:
        print_json(lineage.as_dict())
    else:
        print("\n".join(tree_lines(lineage)))
    return 0


def changelog(a: Arguments) -> int:
    """What changed, as Markdown or JSON."""
    from intaglio.reports.changelog import changelog as found
    from intaglio.reports.changelog import markdown_document

    log = found(a.run)
    if a.json:
        print_json(log.as_dict())
    else:
        print(markdown_document(log), end="")
    return 0


VERBS = {"diagnose": diagnose, "report": report, "compare": compare, "runs": runs, "changelog": changelog}


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verbs and their options to the command line."""
    p = verb("diagnose", "the verdict on a run or history: what is healthy, what fails and why, what to change")
    p.add_argument("run", nargs="?", help="a run folder or its name; or a history file or folder of any program")
    p.add_argument("--profile", default="default", help="limits: default, documents, or a YAML file")
    p.add_argument("--rule", action="append", metavar="RULE", help="judge by this rule alone (may be repeated)")
    p.add_argument("--plan", metavar="FILE", help="judge by the limits in this YAML file, too")
    p.add_argument("--trials", action="store_true", help="load the model and its data, and run instruments and trials")
    p.add_argument("--explain", metavar="RULE", help="what a rule measures, against which null, and its source")
    _reading(p)
    _one_run(p)

    p = verb(
        "report", "verdict, curves and statistics of a run or history as a page, two sheets, text, SARIF and JUnit"
    )
    p.add_argument("run", help="a run folder or its name; or a history file or folder of any program")
    p.add_argument("--out", metavar="FOLDER", help="default: report/ of a run folder; NAME-report/ here for a file")
    p.add_argument("--profile", default="default", help="limits: default, documents, or a YAML file")
    _reading(p)
    _one_run(p)

    p = verb("compare", "which of two settings is better, with an interval over seeds, or that it cannot be told")
    p.add_argument(
        "runs", nargs="+", metavar="RUN", help="A B, or seed by seed A B A2 B2 …; FILE::NAME for one of many"
    )
    p.add_argument(
        "--against", nargs="+", metavar="RUN", help="runs of the other arm, where they are not given in turn"
    )
    p.add_argument("--metric", action="append", help="rest the verdict on this one alone (may be repeated)")
    p.add_argument("--delta", help='difference that counts as none: "2%%" of A (the default), or a number')
    p.add_argument("--windows", type=int, default=4, help="equal windows of steps that curves are compared in (4)")
    p.add_argument("--out", action="append", metavar="FILE", help="write it as .html, .md or .json (may be repeated)")
    _reading(p)

    p = verb("runs", "all runs with their parents, verdicts and best held-out values")
    p.add_argument("folder", nargs="?", default="runs", help="where they are (runs)")
    p.add_argument("--where", metavar="EXPRESSION", help="\"verdict == 'failing' and optim.rate > 1e-3\"")

    p = verb("changelog", "what changed between a run and its parent, and theirs, from the configurations themselves")
    p.add_argument("run")


def _reading(p: argparse.ArgumentParser) -> None:
    """How a foreign history is to be read."""
    p.add_argument("--format", help="of a foreign history (default: found out)")
    p.add_argument(
        "--map", action="append", metavar="THEIRS=OURS", help="--map my_loss=val/loss/total (may be repeated)"
    )


def _one_run(p: argparse.ArgumentParser) -> None:
    p.add_argument("--run", dest="one_run", metavar="NAME", help="the one run of that name in a file of many")


def _only_foreign(a: Arguments) -> None:
    for option, value in {"format": a.format, "map": a.map, "run": a.one_run}.items():
        if value:
            raise ValueError(f"{a.run} is a run folder of ours: --{option} is for the histories of other programs.")


def _names(pairs: Sequence[str] | None) -> dict[str, str]:
    """``their_name=ours`` as a mapping."""
    for pair in pairs or ():
        if "=" not in pair or pair.startswith("=") or pair.endswith("="):
            raise ValueError(f"--map {pair}: write --map their_name=val/loss/total.")
    return {theirs: ours for theirs, _, ours in (pair.rpartition("=") for pair in pairs or ())}


def _tell_profile(profile: str) -> None:
    from intaglio.health.diagnosis import marks

    if told := marks(profile):
        print("\n".join([f"limits of the profile {Path(profile).name}:", *(f"  {mark}" for mark in told)]))


def _gravest(verdicts: Sequence[str]) -> str:
    return next(v for v in ("failing", "cannot tell", "warnings", "healthy") if v in verdicts)


def _exit(verdicts: Sequence[str]) -> int:
    return {"failing": 1, "cannot tell": 3}.get(_gravest(verdicts), 0)


def print_json(answer: Any) -> None:
    """An answer for programs."""
    print(json.dumps(answer, ensure_ascii=False, indent=2))
