"""Does ``compare`` say what is true of real runs? Nine small multimodal trainings: ``intaglio bench comparisons``.

Three seeds of a baseline, three of it with a tenth of the learning rate (a real change), three more of the baseline (no
change). What is due: worse; neither better nor worse; and of one run each, that it cannot be told. Some minutes on two
cores, kept in ``runs/bench-comparisons``.
"""

from pathlib import Path
from typing import Any

from intaglio.bench import Result
from intaglio.bench.healthy import SIZES, SMALL
from intaglio.reports.comparison import compare
from intaglio.training.run import train

ARMS: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "baseline": ([], (0, 1, 2)),
    "slower": (["--optim.rate=3e-4"], (0, 1, 2)),
    "again": ([], (3, 4, 5)),
}


def measure() -> tuple[list[Result], dict[str, Any]]:
    """Whether each of three comparisons has the verdict that is due."""
    place = Path("runs") / "bench-comparisons"
    arms = {arm: [_run(place, arm, words, seed) for seed in seeds] for arm, (words, seeds) in ARMS.items()}
    change, none = compare(arms["baseline"], arms["slower"]), compare(arms["baseline"], arms["again"])
    single = compare(arms["baseline"][:1], arms["slower"][:1])
    results = [
        Result("a real change, three seeds each: is called worse", 1, float(change.verdict == "worse"), n=6),
        Result(
            "no change, three seeds each: is called neither",
            1,
            float(none.verdict in ("cannot tell", "equivalent")),
            n=6,
        ),
        Result("one run each: cannot tell", 1, float(single.verdict == "cannot tell"), n=2),
    ]
    said = {"change": change, "no change": none, "one run each": single}
    return results, {name: {"verdict": c.verdict, "reason": c.reason} for name, c in said.items()}


def _run(place: Path, arm: str, words: list[str], seed: int) -> str:
    """The folder of a run, which is trained where it is not there yet."""
    folder = place / f"{arm}-{seed}"
    if not (folder / "evaluation.json").is_file():
        given = [*SMALL, *SIZES["narrow"], "--data.items=1500", "--train.steps=300", *words]
        train("multimodal-small", [*given, f"--seed={seed}", f"--runs={place}", f"--name={folder.name}"], quiet=True)
    return str(folder)
