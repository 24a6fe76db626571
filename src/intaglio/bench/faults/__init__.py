"""Are our verdicts right? Trainings into which a fault was put, and healthy ones: ``intaglio bench faults``.

    intaglio bench faults --level smoke          # of every second program a fault, some healthy ones: five minutes
    intaglio bench faults                        # everything; goes on where it was stopped
    intaglio bench faults --minutes 30           # as much of it as begins within half an hour
    intaglio bench faults --only vae --more mine # one family; and those of your own folder

Trainings are kept in ``runs/bench-faults/<family>/<case>-<seed>``, with a table of all outcomes as Parquet beside them.
Published are the judged families, of the full level; the others are those that limits of rules were set on.
docs/faults.md says more.
"""

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from intaglio.bench import Result

PLACE = Path("runs") / "bench-faults"


def measure(
    level: str = "full",
    jobs: int | None = None,
    only: Sequence[str] = (),
    more: str | None = None,
    minutes: float | None = None,
) -> tuple[list[Result], dict[str, Any]]:
    """Runs what is left of a level, judges it, and scores it.

    Raises:
        ValueError: an unknown family, or a file of ``more`` that is none.
    """
    import yaml

    from intaglio.bench.faults import judge, others, run, score
    from intaglio.bench.faults.case import cases
    from intaglio.health.pages import before_training
    from intaglio.health.rules import all_rules

    folder = Path(more) if more else None
    families = {name: found.FAMILY for name, found in run.modules(folder).items()}
    if unknown := sorted(set(only) - families.keys()):
        raise ValueError(f"There is no family {', '.join(unknown)}; there are {', '.join(families)}.")
    wanted = list(cases({n: f for n, f in families.items() if not only or n in only}, level))
    jobs = jobs or os.cpu_count() or 1
    left = run.run_all(wanted, PLACE, jobs, folder, lambda line: print(line, flush=True), minutes)
    outcomes = [judge.judged(case, record, PLACE / case.name) for case, record in run.records(wanted, PLACE)]
    judge.write(outcomes, PLACE / "outcomes.parquet")
    explained = yaml.safe_load((files("intaglio.bench.faults") / "explained.yaml").read_text(encoding="utf-8")) or {}
    rules = sorted({r.id for r in all_rules()} | set(before_training()))
    published = [o for o in outcomes if o.split == "judged" and level == "full"]
    return score.scores(published or outcomes), {
        "level": level,
        "trainings": len(outcomes),
        "left": left,
        "development": [vars(r) for r in score.scores([o for o in outcomes if o.split == "development"])],
        "families": score.by_family(outcomes),
        "rules": score.by_rule(outcomes, rules),
        "cases": score.cases(outcomes),
        "confusion": score.confusion(published or outcomes),
        "misses": score.misses(outcomes, explained),
        "others": others.compared([o for o in published if not o.name.startswith("ours")], PLACE),
    }
