"""Labelled histories of other people's trainings: each failure found by a right cause, no healthy run accused."""

from pathlib import Path

import pytest

from intaglio.bench import histories

DATA = Path(__file__).parents[2] / "shared" / "data" / "histories"


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the labelled histories are not beside the project")
def test_every_failure_is_named_and_no_healthy_run_is_accused() -> None:
    results, facts = histories.measure(str(DATA))
    assert [r.quantity for r in results if not r.met] == [], facts["runs"]
    assert facts["confusion"].keys() <= {
        "failed → failing",
        "healthy → healthy",
        "healthy → warnings",
        "healthy → cannot tell",
        "inconclusive → healthy",
        "inconclusive → warnings",
        "inconclusive → cannot tell",
    }
    assert facts["confusion"].get("inconclusive → healthy", 0) <= 2
