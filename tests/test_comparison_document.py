"""The comparison of reference 004, from its own tables: reproduced in form, put right in substance."""

from pathlib import Path

import pytest
from test_comparison import a_run, the

from intaglio.reports.arms import Run, read_runs
from intaglio.reports.comparison import compare, compare_runs
from intaglio.reports.comparison_text import markdown_document

EPOCH = 95
CONTEXT = (200, 400, 600, 800, 1000, 2000, 2850)
GENTLE = {
    "val/loss/total": {EPOCH: 9.372, 18 * EPOCH: 8.389, 30 * EPOCH: 8.417},
    "val/loss/contrastive": {EPOCH: 9.026}, "val/loss/sigreg": {EPOCH: 0.0405},
    "val/loss/invariance": {EPOCH: 0.0124}, "val/loss/relational": {EPOCH: 0.337},
    "context/effective_rank": dict(zip(CONTEXT, (2.31, 2.67, 3.49, 3.59, 4.09, 4.48, 7.53), strict=True)),
    "target/effective_rank": dict(zip(CONTEXT, (5.57, 4.94, 5.15, 5.54, 6.01, 7.27, 10.00), strict=True)),
    "codes/usage": {200: 0.177, 400: 0.156, 600: 0.171, 800: 0.115, 1000: 0.124, 1600: 0.098, 2850: 0.109},
    "temperature": {0: 0.0700, 2850: 0.0683},
}  # fmt: skip
OPTIMIZED = GENTLE | {
    "val/loss/contrastive": {EPOCH: 9.025}, "val/loss/relational": {EPOCH: 0.330},
    "context/effective_rank": dict(zip(CONTEXT, (3.64, 4.02, 4.18, 4.33, 4.40, 5.03, 7.66), strict=True)),
    "target/effective_rank": dict(zip(CONTEXT, (6.67, 6.95, 6.45, 6.74, 7.33, 7.36, 11.38), strict=True)),
    "codes/usage": {100: 0.217, 200: 0.190, 400: 0.193, 600: 0.132, 800: 0.139, 1000: 0.137, 1800: 0.133, 2850: 0.143},
}  # fmt: skip
SETTINGS = {"context": "mean pooling", "relational_weight": 0.025, "sigreg_weight": 0.1, "epochs": 30}


def test_the_documents_comparison_in_its_form_and_put_right() -> None:
    """Reference 004, from its own tables: where it says equivalent and better, and what its numbers show."""
    gentle = a_run("gentle-vq", GENTLE, SETTINGS)
    optimized = a_run("optimized", OPTIMIZED, SETTINGS | {"context": "attention", "relational_weight": 0.02})
    c = compare_runs([gentle], [optimized])

    # "equivalent", "better", "proceed with gentle VQ": from one run of each
    assert c.verdict == "cannot tell"
    assert "one run each: cannot tell" in c.reason
    assert "at least three times" in c.recommendation
    assert {m.verdict for m in c.metrics} == {"cannot tell", "not comparable"}
    # "multiple simultaneous changes", yet a verdict on each
    assert set(c.changed) == {"context", "relational_weight"}
    assert "2 settings were changed at once (context, relational_weight)" in " ".join(c.confounds)
    # "identical" validation losses: their terms are weighted otherwise, and they agree to the last digit
    total = the(c, "val/loss/total")
    assert total.verdict == "not comparable"
    assert "relational 0.025 → 0.02" in total.why
    assert "val/loss/total: the same in gentle-vq and optimized" in " ".join(c.notices)
    # "relational loss −2.1 %, slightly better": it was logged weighted; before weighting it is 22 % higher
    relational = the(c, "val/loss/relational")
    assert relational.a[0] == pytest.approx(0.337 / 0.025)
    assert relational.b[0] == pytest.approx(0.330 / 0.02)
    assert relational.relative == pytest.approx(0.224, abs=0.001)
    assert any("logged weighted (val/loss/total (9.372 at step 95) is the sum of the terms" in n for n in c.notices)
    # "0.0700 → 0.0683 (13 % decrease)"
    assert [course.change for course in the(c, "temperature").courses] == pytest.approx([-0.0243, -0.0243], abs=1e-4)
    # usage from step 200 in one and from step 100 in the other, "never drops below 13.3 %", "narrower range"
    usage = the(c, "codes/usage")
    assert (usage.matched.first, usage.matched.last) == (200, 2850)
    assert "B also has rows before step 200" in " ".join(usage.notes)
    assert "A has rows 200 steps apart, B 100" in " ".join(usage.notes)
    old, new = usage.courses
    assert (old.low, old.low_step, old.high) == (0.098, 1600, 0.177)
    assert (new.low, new.low_step, new.high) == (0.132, 600, 0.193)
    # "+31.2 %" are 3.4 points
    assert usage.share
    assert usage.difference == pytest.approx(0.034)
    # ranks: no seed, and no reason to call more of them better
    context = the(c, "context/effective_rank")
    assert context.better == 0
    assert [(w.first, w.a, w.b) for w in context.windows][0::6] == [(200, 2.31, 3.64), (2850, 7.53, 7.66)]

    document = markdown_document(c)
    assert "| Metric | A: gentle-vq | B: optimized | Change | 95 % interval of B − A | Assessment |" in document
    assert "| context/effective\\_rank | 7.53 | 7.66 | +0.13 (+1.73 %) | – | ? one run each: cannot tell |" in document
    assert "| step 200 | 2.31 | 3.64 | +1.33 (+57.6 %) |" in document
    assert "| temperature | A | 0.07 (0) | 0.0683 (2,850) | 0.07 (0) | 0.0683 (2,850) | −2.43 % |" in document
    assert "| val/loss/total | A | 9.372 (95) | 8.389 (1,710) | 9.372 (95) | 8.417 (2,850) | −10.2 % |" in document
    assert "| codes/usage | 10.9 % | 14.3 % | +3.4 points (+31.2 %) |" in document


def test_the_documents_comparison_from_files(tmp_path: Path) -> None:
    """The same tables as a logger writes them, with its settings beside; and two runs of one file."""
    theirs = {
        "val/loss/total": "val_loss",
        "val/loss/contrastive": "val_infonce_loss",
        "val/loss/relational": "val_relational_loss",
    }
    for name, table, weight in (("gentle", GENTLE, 0.025), ("optimized", OPTIMIZED, 0.02)):
        folder = tmp_path / name
        folder.mkdir()
        steps = sorted({k for row in table.values() for k in row})
        lines = [",".join(["step", *(theirs.get(n, n) for n in table)])]
        lines += [",".join([str(k), *(str(row.get(k, "")) for row in table.values())]) for k in steps]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
        (folder / "hparams.yaml").write_text(f"relational_weight: {weight}\nsigreg_weight: 0.1\n")
    c = compare([tmp_path / "gentle"], [tmp_path / "optimized/metrics.csv"])
    assert c.verdict == "cannot tell"
    assert the(c, "val/loss/relational").relative == pytest.approx(0.224, abs=0.001)
    assert c.changed == {"relational_weight": (0.025, 0.02)}
    assert "val_infonce_loss → val/loss/contrastive" in " ".join(c.notices)
    rows = [
        f"{run},{step},{loss + 0.1 * step}"
        for run, loss in (("base-1", 1), ("base-2", 2), ("new", 5))
        for step in range(9)
    ]
    (tmp_path / "many.csv").write_text("\n".join(["run,step,val_loss", *rows]) + "\n")
    c = compare([f"{tmp_path}/many.csv::base-*"], [f"{tmp_path}/many.csv::new"])
    assert [r.name for r in (*c.a, *c.b)] == ["base-1", "base-2", "new"]
    with pytest.raises(ValueError, match="has no run 'nw'; did you mean 'new'"):
        read_runs(f"{tmp_path}/many.csv::nw")


def test_values_logged_weighted_are_found_by_their_ratio_or_left_open() -> None:
    def run(name: str, weight: float, value: float) -> Run:
        tables = {
            "train/loss/kl": {k: value * (10 + 1 / k) for k in range(1, 9)},
            "val/logged/accuracy": {1: 0.2, 8: value},
        }
        return a_run(name, tables, {"kl_weight": weight, "seed": 0})

    by_ratio = the(compare_runs([run("a", 0.5, 0.5)], [run("b", 0.1, 0.1)]), "train/loss/kl")
    assert by_ratio.a[0] == pytest.approx(by_ratio.b[0])
    assert "ratio of the weights" in " ".join(by_ratio.notes)
    left_open = the(compare_runs([run("a", 0.5, 0.5)], [run("b", 0.1, 0.3)]), "train/loss/kl")
    assert left_open.verdict == "not comparable"
    assert "B/A is 0.6 if before, 3 if after" in left_open.why
