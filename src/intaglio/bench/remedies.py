"""Do remedies help? Settings that are wrong, what their findings propose, tried: ``intaglio bench remedies``.

Of each of our systems a small recipe, with one setting far off. The run with it is judged; its first two remedies are
tried beside a control, as ``intaglio remedy --try`` does, and what comes of them is held against healthy twins, which
have the same seeds and data. A sham, the wrong settings with other seeds, must never be called better. Kept in
``runs/bench-remedies``; goes on where it was stopped.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.bench import Result
from intaglio.bench.faults.case import Family, Made
from intaglio.bench.faults.run import module, word
from intaglio.history.reading import share
from intaglio.reports.comparison import compare
from intaglio.training.remedy import Tried, is_made, judged, trained, try_remedies

PLACE = Path("runs") / "bench-remedies"
SEEDS = 3
MOST = 2

WRONG: dict[str, dict[str, dict[str, Any]]] = {
    "ours_multimodal": {
        "kl-too-heavy": {"loss.kl": 50.0},
        "rate-a-thousandth": {"optim.rate": 2e-6, "optim.floor": 1e-9},
        "rate-a-thousandfold": {"optim.rate": 2.0},
        "contrast-of-nothing": {"loss.contrastive": 1e-6},
    },
    "ours_vqa": {
        "kl-too-heavy": {"loss.kl": 5.0},
        "kl-too-light": {"loss.kl": 1e-4},
        "free-bits-above-any-answer": {"loss.floor": 8.0},
        "rate-a-thousandth": {"optim.rate": 3e-6, "optim.floor": 1e-9},
        "rate-a-thousandfold": {"optim.rate": 3.0},
    },
    "ours_jepa": {
        "relations-two-hundredfold": {"loss.relational": 200.0},
        "rate-a-thousandth": {"optim.rate": 3e-6, "optim.floor": 1e-9},
        "rate-a-thousandfold": {"optim.rate": 3.0},
    },
    "ours_diffusion": {
        "guided-by-fifteen": {"sampling.guidance": 15.0},
        "average-of-ten-thousand-steps": {"train.ema": 0.9999},
        "condition-nearly-always-dropped": {"condition.drop": 0.98},
        "rate-a-thousandth": {"optim.rate": 1e-5, "optim.floor": 1e-9},
        "rate-a-thousandfold": {"optim.rate": 10.0},
    },
}
"""By family of the fault benchmark: settings that are far off."""


def _lit(count: int) -> str:
    """The shapes of the fault benchmark as a folder: their colours are learnt in 300 steps, engravings' classes not."""
    from PIL import Image

    from intaglio.bench.faults.families._shapes import Shapes

    folder = PLACE / "lit"
    if not (folder / "metadata.csv").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        corpus, rows = Shapes(count, 0), ["file_name,caption,label"]
        for k in range(count):
            Image.fromarray(corpus.image(k, 16)).save(folder / f"{k}.png")
            rows.append(f"{k}.png,{corpus.captions(k)[0]},{corpus.label(k)}")
        (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(folder.resolve())


BASE: dict[str, dict[str, Any]] = {"ours_diffusion": {"data.source": Made(_lit, (500,)), "data.items": None}}
"""What a family's trainings have in place of its own options, where those are not healthy in so few steps."""


@dataclass(frozen=True)
class Outcome:
    """A wrong setting, its remedies as they were tried, and which of them brought the run to its healthy twins."""

    name: str
    verdict: str
    findings: tuple[str, ...]
    tried: tuple[Mapping[str, Any], ...]
    repaired_by: int | None
    sham: str
    why: str = ""


def measure(jobs: int | None = None, only: Sequence[str] = ()) -> tuple[list[Result], dict[str, Any]]:
    """Share of wrong settings that a first or second remedy repairs, and of shams that are called better.

    Raises:
        ValueError: an unknown family.
    """
    if unknown := sorted(set(only) - WRONG.keys()):
        raise ValueError(f"There is no family {', '.join(unknown)}; there are {', '.join(WRONG)}.")
    jobs = jobs or os.cpu_count() or 1
    wanted = [(f, n, s) for f, faults in WRONG.items() for n, s in faults.items() if not only or f in only]
    outcomes = [_one(family, name, settings, jobs) for family, name, settings in wanted]
    repaired = share(sum(o.repaired_by is not None for o in outcomes), len(outcomes))
    praised = [t for o in outcomes for t in o.tried if t["verdict"] == "better"]
    wrong = [t for t in praised if not t["as_good"] and not t["above_control"]]
    shams = [o.sham for o in outcomes if o.sham]
    results = [
        Result("wrong settings repaired by the first or second remedy", 0.8, repaired.value, n=repaired.n,
               low=repaired.low, high=repaired.high),
        Result("remedies called better that are not", 0, len(wrong), "lower", n=len(praised)),
        Result("shams called better", 0, sum(s == "better" for s in shams), "lower", n=len(shams)),
    ]  # fmt: skip
    return results, {"outcomes": [vars(o) for o in outcomes]}


def _one(family: str, name: str, settings: Mapping[str, Any], jobs: int) -> Outcome:
    found: Family = module(family).FAMILY
    base = {key: word(value) for key, value in {**found.options, **BASE.get(family, {})}.items()}
    bad = base | {key: word(value) for key, value in settings.items()}
    place = PLACE / family
    with ThreadPoolExecutor(jobs) as pool:
        made = {
            f"{arm}-{seed}": pool.submit(_train, found.recipe, place, f"{arm}-{seed}", given, seed)
            for arm, given, seeds in (
                ("healthy", base, range(SEEDS)), (name, bad, range(1)), (f"sham-{name}", bad, range(SEEDS, 2 * SEEDS)),
            )
            for seed in seeds
        }  # fmt: skip
    folders = {key: future.result() for key, future in made.items()}
    run = folders[f"{name}-0"]
    try:
        answer = try_remedies(run, seeds=SEEDS, jobs=jobs, most=MOST, say=lambda line: print(f"  {line}", flush=True))
    except ValueError as error:
        said = Outcome(f"{family}/{name}", "", (), (), None, "", str(error))
        print(json.dumps(vars(said)), flush=True)
        return said
    healthy = [folders[f"healthy-{k}"] for k in range(SEEDS)]
    rows = [_row(tried, healthy) for tried in answer.tried]
    repaired = next((k for k, row in enumerate(rows, 1) if row["as_good"]), None)
    sham = judged(
        answer.tried[0].proposal, list(map(Path, answer.tried[0].control)),
        [folders[f"sham-{name}-{k}"] for k in range(SEEDS, 2 * SEEDS)],
    )  # fmt: skip
    named = tuple(dict.fromkeys(p.rule for p in answer.proposals))
    said = Outcome(f"{family}/{name}", answer.verdict, named, tuple(rows), repaired, sham.verdict)
    print(json.dumps(vars(said)), flush=True)
    return said


def _train(recipe: str, place: Path, name: str, given: Mapping[str, str], seed: int) -> Path:
    words = {**given, "seed": str(seed), "runs": str(place), "name": name}
    trained(place, name, [recipe], words, anew=True)
    return place / name


def _row(tried: Tried, healthy: Sequence[Path]) -> dict[str, Any]:
    """What was tried, and whether it repairs: as good as the healthy twins are among themselves and accused no oftener,
    which the control is not."""
    treated, control = ([Path(p) for p in arm] for arm in (tried.treated, tried.control))
    within = sum(is_made(tried.proposal, twin) for twin in healthy)
    broken = tried.before > within or not as_good(control, healthy)
    return {
        "do": tried.proposal.do,
        "rule": tried.proposal.rule,
        "changes": dict(tried.proposal.changes),
        "verdict": tried.verdict,
        "reason": tried.reason,
        "as_good": broken and tried.after <= within and as_good(treated, healthy),
        "above_control": not as_good(control, treated),
    }


def as_good(runs: Sequence[Path], twins: Sequence[Path]) -> bool:
    """Whether runs are within seed noise of their twins: no held-out quantity that the comparison rests on is worse by
    more than two standard deviations over seeds, pooled; runs that did not finish are not."""
    if not all((folder / "evaluation.json").is_file() for folder in (*runs, *twins)):
        return False
    found = [m for m in compare(list(map(str, twins)), list(map(str, runs))).metrics if m.main and m.better]
    return bool(found) and all(
        m.better * m.difference >= -2 * math.sqrt((np.var(m.a, ddof=1) + np.var(m.b, ddof=1)) / 2) for m in found
    )
