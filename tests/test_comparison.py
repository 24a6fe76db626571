"""Two arms of runs against each other: the statistics, what is refused, and a document's comparison put right."""

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from intaglio.history import Series
from intaglio.reports.arms import OURS, Run, in_two, read_runs
from intaglio.reports.comparison import Comparison, compare, compare_runs
from intaglio.reports.comparison_text import terminal_lines, write
from intaglio.reports.differences import Margin, Metric, holm
from intaglio.reports.matched import Line, match
from intaglio.reports.scales import direction
from intaglio.reports.student import quantile, tail

HOSTILE = "<script>alert(1)</script>|`x`\x1b[31m\u202e[a](b)"


def series(table: Mapping[int, float]) -> Series:
    return Series.of(np.array(list(table)), np.array(list(table.values()), float))


def a_run(name: str, tables: Mapping[str, Mapping[int, float]], config: Mapping[str, Any] = {}, **given: Any) -> Run:
    seed = config.get("seed")
    known = Run(name, f"{name}.csv", "CSV", "step", {n: series(t) for n, t in tables.items()}, config, {"seed": seed})
    return replace(known, **given)


def arm(
    name: str, level: float, seeds: tuple[int, ...], noise: float = 0.01, step: float = 0.0, **config: Any
) -> list[Run]:
    """Runs whose held-out loss ends at ``level``, up to what the seed (shared by arms) and chance do to it."""
    runs = []
    for seed in seeds:
        own = np.random.default_rng([seed, round(level * 1e6), 7])
        end = level + 0.5 * np.random.default_rng(seed).normal() + noise * own.normal()
        steps = np.arange(10, 101, 10)
        falling = {int(s): end * (1 + 1 / s) + step for s in steps}
        noisy = {int(s): v + 0.1 * own.normal() for s, v in falling.items()}
        tables = {"val/loss/total": falling, "train/loss/total": noisy}
        runs.append(a_run(f"{name}-{seed}", tables, {"seed": seed, "optim.rate": 0.1, **config}))
    return runs


def the(c: Comparison, name: str) -> Metric:
    return next(m for m in c.metrics if m.name == name)


# the statistics


@pytest.mark.parametrize("df", [0.6, 1.0, 2.0, 3.7, 30.0, 2000.0])
def test_students_t_is_scipys(df: float) -> None:
    for t in (-40.0, -1.3, 0.0, 0.2, 2.0, 9.0, 300.0):
        assert tail(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-7)
    for p in (0.001, 0.3, 0.5, 0.9, 0.975, 0.999999):
        assert quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-7, abs=1e-9)


def test_pairs_and_welch_are_scipys() -> None:
    a, b = arm("a", 2.0, (0, 1, 2, 3)), arm("b", 2.1, (0, 1, 2, 3), momentum=0.9)
    m = the(compare_runs(a, b), "val/loss/total")
    known = stats.ttest_rel(m.b, m.a)
    interval = known.confidence_interval(0.95)
    assert m.test == "paired t, 4 pairs"
    assert (m.p, m.low, m.high) == pytest.approx((known.pvalue, interval.low, interval.high))
    d = m.b - m.a
    assert m.p_equal == pytest.approx(
        max(
            stats.ttest_1samp(d, -m.delta, alternative="greater").pvalue,
            stats.ttest_1samp(d, m.delta, alternative="less").pvalue,
        )
    )
    other = compare_runs(a, arm("b", 2.1, (5, 6, 7), momentum=0.9))
    m = the(other, "val/loss/total")
    known = stats.ttest_ind(m.b, m.a, equal_var=False)
    interval = known.confidence_interval(0.95)
    assert m.test == "Welch’s t, 4 against 3"
    assert (m.p, m.low, m.high) == pytest.approx((known.pvalue, interval.low, interval.high))
    assert "the seeds differ (0, 1, 2, 3 against 5, 6, 7)" in " ".join(other.confounds)


def test_holm_is_the_definition() -> None:
    p = [0.01, 0.04, 0.03, 0.5, 0.01]
    rejected = {k for k, corrected in enumerate(holm(p)) if corrected < 0.06}
    by_hand, order = set[int](), sorted(range(5), key=lambda k: p[k])
    for rank, k in enumerate(order):
        if p[k] >= 0.06 / (5 - rank):
            break
        by_hand.add(k)
    assert rejected == by_hand == {0, 4}
    assert holm([]) == []


def test_false_claims_are_as_rare_as_they_should_be() -> None:
    """Without any difference, one comparison in twenty may claim one; of 200, at most 18 (99 % of such draws)."""
    claims = 0
    for k in range(200):
        seeds = tuple(range(1000 + 6 * k, 1003 + 6 * k))
        c = compare_runs(arm("a", 2.0, seeds, 0.1), arm("b", 2.0000011, seeds, 0.1, momentum=0.9))
        claims += c.verdict in ("better", "worse")
    assert claims <= 18


# the verdict


def test_verdicts_follow_the_intervals() -> None:
    seeds = (0, 1, 2)
    base = arm("base", 2.0, seeds)
    better = compare_runs(base, arm("lower", 1.8, seeds, momentum=0.9))
    assert better.verdict == "better"
    assert re.match(r"val/loss/total is lower by 0\.2\d*, −\d", better.reason)
    assert better.recommendation == "Take B (lower)."
    assert better.changed == {"momentum": (None, 0.9)}
    assert compare_runs(arm("lower", 1.8, seeds), base).verdict == "worse"
    same = compare_runs(base, arm("same", 2.001, seeds, 0.002, momentum=0.9))
    assert same.verdict == "equivalent"
    assert "less than δ" in same.reason
    unsure = compare_runs(base, arm("same", 2.001, seeds, 0.002, momentum=0.9), delta=0.0001)
    assert unsure.verdict == "cannot tell"
    assert re.search(r"about \d+ runs an arm|over 200 runs an arm", unsure.recommendation)
    assert the(compare_runs(base, arm("x", 2.1, seeds), delta="50%"), "val/loss/total").verdict == "equivalent"


def test_one_run_each_cannot_tell_whatever_it_shows() -> None:
    c = compare_runs(arm("a", 2.0, (0,)), arm("b", 0.2, (0,), momentum=0.9))
    assert c.verdict == "cannot tell"
    assert "one run each: cannot tell" in c.reason
    assert {m.verdict for m in c.metrics} == {"cannot tell"}
    assert all(m.low is None for m in c.metrics)
    assert "--seed 0, 1, 2" in c.recommendation
    assert "one run in B" in compare_runs(arm("a", 2.0, (0, 1)), arm("b", 0.2, (0,))).reason


def test_what_falls_and_what_rises() -> None:
    assert [direction(n) for n in ("val/loss/caption", "val/image/mse", "val/logged/perplexity", "eval_wer")] == [
        -1
    ] * 4
    assert [direction(n) for n in ("val/logged/accuracy", "val/pair/top1", "val/image/psnr", "val_r2")] == [1] * 4
    for name in ("val/loss/kl", "val/loss/commitment", "train/loss/discriminator", "codes/perplexity",
                 "entropy", "val/latent/effective_rank", "temperature", "val/image/shuffled_latent_error"):  # fmt: skip
        assert direction(name) == 0, name
    seeds = (0, 1, 2, 3)
    ranks = [
        [a_run(f"{n}{s}", {"val/latent/rank": {10: v, 20: v + s + e * s}}, {"seed": s, "x": n}) for s in seeds]
        for n, v, e in (("a", 3.0, 0.0), ("b", 9.0, 0.01))
    ]
    c = compare_runs(*ranks, metrics=["val/latent/rank"])
    assert the(c, "val/latent/rank").verdict == "differs"
    assert c.verdict == "cannot tell"
    assert "does not tell which way is better" in c.reason


def test_a_total_of_other_weights_is_not_compared() -> None:
    def runs(arm_name: str, kl: float, better: float) -> list[Run]:
        return [
            a_run(f"{arm_name}{s}", {
                "val/loss/total": {1: 5.0 * kl + s, 9: 4.0 * kl + s}, "val/loss/kl": {1: 9.0 + s, 9: 8.0 - s * kl},
                "val/loss/image": {1: 3.0 + s, 9: 2.0 - better + s + 0.001 * s * better},
            }, {"seed": s, "loss.kl": kl}, format=OURS) for s in (0, 1, 2)
        ]  # fmt: skip

    c = compare_runs(runs("a", 1.0, 0.0), runs("b", 2.0, 0.5))
    total = the(c, "val/loss/total")
    assert total.verdict == "not comparable"
    assert "kl 1 → 2" in total.why
    assert [m.name for m in c.metrics if m.main] == ["val/loss/image"]
    assert c.verdict == "better"


def test_confounds_are_named() -> None:
    seeds = (0, 1, 2)
    a, b = arm("a", 2.0, seeds, width=8), arm("b", 1.5, seeds, width=16, depth=3)
    facts = {"machine": "one", "versions": {"torch": "2.12"}, "steps": 500, "items per step": 32, "status": "finished"}
    a = [replace(r, facts=r.facts | facts) for r in a]
    other = {
        "machine": "two",
        "versions": {"torch": "2.13"},
        "steps": 900,
        "items per step": 64,
        "status": "interrupted",
    }
    b = [replace(r, facts=r.facts | other) for r in b]
    c = compare_runs(a, b)
    said = " ".join(c.confounds)
    for part in (
        "2 settings were changed at once (depth, width)", "machines differ", "torch is 2.12 in A and 2.13 in B",
        "A was trained for 500 steps, B for 900", "B has seen 2× as many", "has not finished",
    ):  # fmt: skip
        assert part in said, part
    assert c.verdict == "better"
    assert c.recommendation.endswith("change one of the 2 settings at a time to learn which one did it.")
    mixed = compare_runs([*arm("a", 2.0, (0, 1)), *arm("a", 2.0, (2,), width=3)], arm("b", 1.0, (3, 4)))
    assert "they differ among themselves in width" in " ".join(mixed.confounds)
    unknown = [replace(r, config={}, facts={}) for r in a]
    assert "no seeds are recorded" in " ".join(compare_runs(unknown, b).confounds)


def test_runs_that_were_put_to_other_tests_are_not_ranked() -> None:
    seeds = (0, 1, 2)
    a, b = arm("a", 2.0, seeds), arm("b", 1.0, seeds, momentum=0.9)
    a = [replace(r, format=OURS, facts=r.facts | {"fingerprint": f"f{r.seed}"}) for r in a]
    same = [replace(r, format=OURS, facts=r.facts | {"fingerprint": f"f{r.seed}"}) for r in b]
    assert compare_runs(a, same).verdict == "better"
    other = [replace(r, facts=r.facts | {"fingerprint": f"g{r.seed}"}) for r in same]
    c = compare_runs(a, other)
    assert c.verdict == "cannot tell"
    assert "not put to the same test" in c.reason
    assert "the very items" in c.recommendation


# one run read twice


def test_the_same_data_read_twice_is_no_evidence() -> None:
    run = arm("one", 2.0, (0,))[0]
    rounded = {n: Series.of(s.steps, np.round(s.values, 5)) for n, s in run.series.items()}
    halved = {n: s.at(np.arange(0, 10, 2)) for n, s in run.series.items()}
    shifted = {n: Series.of(s.steps - 1, s.values) for n, s in run.series.items()}
    for kind in (rounded, halved, shifted):
        twin = replace(run, name="two", source="two.json", series=kind)
        c = compare_runs([run], [twin])
        assert c.verdict == "cannot tell"
        assert "one-0 and two are one run, read twice" in c.reason
        assert "trained apart" in c.recommendation
    more = compare_runs([*arm("a", 2.0, (1, 2)), run], [*arm("b", 1.5, (1, 2)), replace(run, name="two")])
    assert (len(more.a), len(more.b)) == (2, 2)
    assert "no evidence for either arm" in " ".join(more.notices)
    ids = [[replace(r, facts=r.facts | {"id": f"{k}{r.seed}"}) for r in arm("a", 2.0, (1, 2, 3))] for k in "ab"]
    inert = compare_runs(ids[0], [replace(r, config={**r.config, "inert": 1}) for r in ids[1]])
    assert inert.verdict == "equivalent"
    assert "came out the same to the last digit" in " ".join(inert.notices)
    twice = compare_runs([run, replace(run, name="again")], arm("b", 1.0, (1, 2)))
    assert "counts once in A" in " ".join(twice.notices)
    assert twice.verdict == "cannot tell"


def test_runs_that_differ_are_not_taken_for_one() -> None:
    loss = {"val/loss/total": {1: 3.0, 2: 2.0, 3: 1.0}}
    first, second = (
        a_run(n, loss | {"val/logged/accuracy": {1: 0.1, 2: 0.2, 3: x}}) for n, x in (("a", 0.3), ("b", 0.31))
    )
    c = compare_runs([first], [second])
    assert "one run each" in c.reason
    assert "val/loss/total: the same in a and b at every common row" in " ".join(c.notices)


# steps


def test_windows_are_equal_whatever_the_rows() -> None:
    """Both arms are 3 + t / 100, one logged every step, the other every 37th and for longer."""
    dense, sparse = np.arange(0, 1001), np.arange(20, 1500, 37)
    lines = [Line(Series.of(s, 3 + s / 100)) for s in (dense, sparse)]
    found = match([lines[0]], [lines[1]], 4, True, "step")
    assert not isinstance(found, str)
    assert (found.first, found.last) == (20, 1000)
    assert [w.last - w.first for w in found.windows] == [245] * 4
    for w in found.windows:
        assert w.a == pytest.approx(w.b) == pytest.approx(3 + (w.first + w.last) / 200)
    assert np.allclose(found.a, found.b)
    said = " ".join(found.notes)
    assert "cut to steps 20 to 1,000" in said
    assert "A has rows 1 steps apart, B 37" in said
    assert found.ends[0][0] == pytest.approx(found.ends[1][0]) == pytest.approx(3 + (755 + 1000) / 200)
    assert match([lines[0]], [Line(Series.of(sparse + 5000, sparse * 1.0))], 4, True, "step") == (
        "no common steps: A has steps 0 to 1,000, B 5,020 to 6,463"
    )


def test_values_that_are_not_finite_are_told_and_not_ranked() -> None:
    a, b = arm("a", 2.0, (0, 1, 2)), arm("b", 1.0, (0, 1, 2), momentum=0.9)
    b[1].series["val/loss/total"].values[-1] = math.nan
    b[2].series["train/loss/total"].values[:] = math.inf
    c = compare_runs(a, b)
    assert c.verdict == "cannot tell"
    assert "a run of B ended in a value that is not finite" in c.reason
    assert len(the(c, "train/loss/total").b) == 2
    json.dumps(c.as_dict(), allow_nan=False)


# bad input


def test_bad_input_says_what_to_do(tmp_path: Path) -> None:
    a, b = arm("a", 2.0, (0,)), arm("b", 2.0, (1,))
    for words in ([], ["one"], ["1", "2", "3"]):
        with pytest.raises(ValueError, match=r"two runs at least|without its counterpart"):
            in_two(words)
    assert in_two(["A", "B", "A2", "B2"]) == (["A", "A2"], ["B", "B2"])
    assert in_two(["A", "A2"], ["B"]) == (["A", "A2"], ["B"])
    with pytest.raises(ValueError, match="--metric val/loss/totl: both have val/loss/total"):
        compare_runs(a, b, metrics=["val/loss/totl"])
    with pytest.raises(ValueError, match="only A measured it"):
        compare_runs([replace(a[0], series=a[0].series | {"extra": series({1: 2})})], b, metrics=["extra"])
    with pytest.raises(ValueError, match="no metric in common: A measured x; B val/loss/total"):
        compare_runs([a_run("x", {"x": {1: 1}})], b)
    with pytest.raises(ValueError, match="no common steps"):
        compare_runs([a_run("x", {"val/loss/total": {1: 1, 2: 3}})], b)
    with pytest.raises(ValueError, match="count different things"):
        compare_runs(a, [replace(b[0], axis="epoch")])
    for delta in ("much", "-1", "0", "nan", "5 %%"):
        with pytest.raises(ValueError, match="share of A’s value"):
            Margin.parse(delta)
    with pytest.raises(ValueError, match="window or more"):
        compare_runs(a, b, windows=0)
    with pytest.raises(ValueError, match="not a run folder"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"\.md, \.html or \.json"):
        write(compare_runs(a, b), tmp_path / "x.txt")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def test_hostile_names_are_harmless_in_every_form(tmp_path: Path) -> None:
    arms = [
        [a_run(HOSTILE + n, {f"val/loss/{HOSTILE}": {1: 2.0 + s, 5: v + s * v}, HOSTILE: {1: 1.0, 5: v}},
               {"seed": s, HOSTILE: HOSTILE + n, "note": HOSTILE}, source=HOSTILE) for s in (0, 1)]
        for n, v in (("a", 1.0), ("b", 1.1))
    ]  # fmt: skip
    c = compare_runs(*arms)
    written = [write(c, tmp_path / f"out/c{ending}") for ending in (".md", ".html", ".json")]
    document, html, answer = (path.read_text(encoding="utf-8") for path in written)
    terminal = "\n".join(terminal_lines(c))
    assert json.loads(answer)["verdict"] == c.verdict
    for text in (terminal, document, html):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert "<script>" not in document.replace("\\<", "")
    assert "[a](b)" not in document
    assert all(line.count("|") - line.count("\\|") in (0, 4, 5, 6, 7, 8) for line in document.splitlines())
    tags = Tags()
    tags.feed(html)
    assert "script" not in tags.seen
    assert html.count("<script") == 0


# our run folders


def test_run_folders_are_compared_without_torch(reference: Any, tmp_path: Path) -> None:
    import subprocess

    program = (
        "import sys, json; from intaglio.reports.comparison import compare; "
        "c = compare(sys.argv[1:2], sys.argv[2:3]); print(json.dumps(c.as_dict(), allow_nan=False)); "
        "assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", program, str(reference.path), str(reference.path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["verdict"] == "cannot tell"
    assert "one run, read twice" in answer["reason"]
    assert "both have the id" in answer["reason"]
    run = read_runs(reference.path)[0]
    assert run.seed == 0
    assert run.facts["parameters"] > 1000
    assert "val/loss/total" in run.outcomes()
    assert not any(n.startswith(("train/weight", "train/speed")) or n.endswith("_low") for n in run.outcomes())
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text('{"status": "running"}')
    with pytest.raises(ValueError, match="no metrics yet"):
        compare([empty], [reference.path])
