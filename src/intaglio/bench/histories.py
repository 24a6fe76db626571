"""Labelled histories of other people's trainings, judged: ``intaglio bench histories --data FOLDER``.

FOLDER holds ``labels.json``: ``entries`` with ``id``, ``files``, ``verdict`` (healthy, failed, inconclusive) and
``categories`` (what is wrong, as ``posterior_collapse``). A cause is right where a failing finding's rule is one of
those that the categories stand for.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from intaglio.bench import Result
from intaglio.health.foreign import diagnose_file

CAUSES = {
    "nan": {"non-finite"},
    "no_learning": {"no-learning", "plateau"},
    "dead_network": {"no-learning", "plateau"},
    "stuck_at_chance": {"no-learning", "plateau"},
    "posterior_collapse": {"posterior-collapse"},
    "overfitting": {"overfitting"},
    "generalisation_gap": {"overfitting"},
    "instability": {"diverged"},
    "late_instability": {"diverged"},
    "divergence": {"diverged"},
    "loss_explosion": {"diverged", "no-learning"},
    "loss_spike": {"diverged", "spike"},
    "codebook_collapse": {"codebook-collapse", "codes-dead"},
    "quantiser": {"codes-displaced", "codes-shrink", "codebook-collapse"},
    "gan_balance": {"adversary-won"},
    "leak": {"split-leak"},
}
"""Rules that name what a label calls by another word."""


def measure(data: str | None = None) -> tuple[list[Result], dict[str, Any]]:
    """How many failed runs are found, by a right cause, and how many others are accused."""
    if data is None:
        raise ValueError("bench histories needs --data FOLDER, a folder with labels.json and the histories it names.")
    folder = Path(data)
    entries = json.loads((folder / "labels.json").read_text(encoding="utf-8"))["entries"]
    rows = [_judged(folder, entry) for entry in entries]
    failed, healthy, open_ = ([r for r in rows if r["label"] == word] for word in ("failed", "healthy", "inconclusive"))
    found = [r for r in failed if r["verdict"] == "failing"]

    def share(part: int, whole: list[Any]) -> float:
        return part / max(1, len(whole))

    results = [
        Result("failed runs found", 1.0, share(len(found), failed), n=len(failed)),
        Result("failed runs with a right cause", 1.0, share(sum(r["right"] for r in found), failed), n=len(failed)),
        Result("healthy runs called failing", 0, _failing(healthy), better="lower", n=len(healthy)),
        Result("inconclusive runs called failing", 0, _failing(open_), better="lower", n=len(open_)),
    ]
    confusion = Counter(f"{r['label']} → {r['verdict']}" for r in rows)
    return results, {"confusion": dict(sorted(confusion.items())), "runs": rows}


def _failing(rows: list[dict[str, Any]]) -> int:
    return sum(r["verdict"] == "failing" for r in rows)


def _judged(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    files = [folder / name for name in entry["files"]]
    path = files[0] if len(files) == 1 else folder / entry["id"]
    found = [x.diagnosis for x in diagnose_file(path)]
    assert len(found) == 1, f"{path} was read as {len(found)} runs"
    rules = {s: list(dict.fromkeys(f.rule for f in found[0].findings if f.severity == s)) for s in ("fail", "warning")}
    due = set().union(*(CAUSES.get(c, set()) for c in entry["categories"]))
    return {
        "id": entry["id"],
        "label": entry["verdict"],
        "categories": entry["categories"],
        "verdict": found[0].verdict,
        **rules,
        "right": bool(due & set(rules["fail"])),
    }
