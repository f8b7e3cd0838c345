"""Statistics of made-up rollouts, against values worked out by hand or by scipy in another way."""

import numpy as np
import pytest
from scipy import stats

from hvd.benchmark import analysis, page
from hvd.benchmark.matrix import Comparison, Matrix
from hvd.benchmark.work import Done, Episode

RATES = {"good": [0.8, 0.6, 0.9], "fair": [0.5, 0.5, 0.4], "bad": [0.1, 0.3, 0.2]}
N = 10


def done(rates=RATES, task="tote") -> list[Done]:
    return [
        Done(
            f"{task}-{seed}-{policy}",
            60.0,
            30.0,
            {"task": task, "data_seed": seed, "policy": policy, "policy_seed": 0},
            [Episode(1000 + i, i < round(rate * N), 2, 50) for i in range(N)],
        )
        for policy, of in rates.items()
        for seed, rate in enumerate(of)
    ]


def matrix(*comparisons: Comparison, tasks=("tote",)) -> Matrix:
    return Matrix(
        "made up", "demo", list(tasks), [0, 1, 2], {name: {} for name in RATES}, comparisons=list(comparisons)
    )


def test_rows_are_the_best_first_with_the_spread_between_data_sets():
    rows = analysis.rows(matrix(), analysis.Results.of(done()))
    assert [row.policy for row in rows] == ["good", "fair", "bad"]
    assert rows[0].success.mean == pytest.approx(23 / 30) and rows[0].success.n == 30 and rows[0].units == 3
    assert rows[0].spread == pytest.approx(np.std(RATES["good"], ddof=1))


def test_a_difference_has_the_data_set_as_its_unit():
    (found,) = analysis.differences(matrix(Comparison("good", "bad", "primary", 0.4)), analysis.Results.of(done()))
    each = np.subtract(RATES["good"], RATES["bad"])
    test = stats.ttest_rel(RATES["good"], RATES["bad"])
    low, high = test.confidence_interval(0.95)
    assert found.difference.mean == pytest.approx(each.mean())
    assert (found.difference.low, found.difference.high) == (pytest.approx(low), pytest.approx(high))
    assert found.p == pytest.approx(test.pvalue) and (found.higher, found.lower) == (3, 0)
    assert found.mcnemar == pytest.approx(2 * 0.5 ** round(each.sum() * N))  # every discordant pair for the same side


def test_differences_that_are_the_same_in_every_data_set_have_no_interval():
    rates = {"good": [0.3, 0.6], "fair": [0.1, 0.4], "bad": [0.1, 0.3]}  # .3 - .1 and .6 - .4 are not the same float
    (found,) = analysis.differences(matrix(Comparison("good", "fair")), analysis.Results.of(done(rates)))
    assert (found.difference.low, found.difference.high, found.p) == (0.2, 0.2, 0.0)


def test_holm_corrects_the_primary_ones_alone():
    asked = [Comparison("good", "bad", "primary"), Comparison("good", "fair", "primary"), Comparison("fair", "bad")]
    found = analysis.differences(matrix(*asked), analysis.Results.of(done()))
    low, high = sorted(d.p for d in found[:2])
    assert sorted(d.corrected for d in found[:2]) == [pytest.approx(2 * low), pytest.approx(max(2 * low, high))]
    assert found[2].corrected is None


def test_what_was_asked_for_is_there_or_not():
    results = analysis.Results.of(done())
    for asked, there in ((0.3, True), (0.9, False)):
        (found,) = analysis.differences(matrix(Comparison("good", "bad", at_least=asked)), results)
        assert found.reached is there
    (found,) = analysis.differences(matrix(Comparison("bad", "good")), results)
    assert not found.reached
    one = analysis.Results.of(done({"good": [0.9], "fair": [0.2], "bad": [0.1]}))
    (found,) = analysis.differences(matrix(Comparison("good", "bad", "primary")), one)
    assert not found.reached and np.isnan(found.p)  # a single data set proves nothing


def test_of_several_policies_the_best_counts():
    (found,) = analysis.differences(matrix(Comparison(["fair", "good"], ["bad", "fair"])), analysis.Results.of(done()))
    assert (found.better, found.than) == ("good", "fair")


def test_only_data_sets_that_both_have_are_compared():
    some = [d for d in done() if not (d.cell["policy"] == "bad" and d.cell["data_seed"] == 2)]
    (found,) = analysis.differences(matrix(Comparison("good", "bad")), analysis.Results.of(some))
    assert found.difference.n == 2 and found.difference.mean == pytest.approx(0.5)


def test_the_table_of_all_rollouts_does_not_depend_on_the_order():
    ours = analysis.table(done())
    assert ours.equals(analysis.table(done()[::-1])) and ours.num_rows == 90
    assert ours.column_names == ["task", "data_seed", "policy", "policy_seed", "start", "success", "stage", "steps"]


def test_text_markdown_and_page_say_the_same():
    asked = matrix(Comparison("good", "bad", "gate", 0.2), tasks=("tote", "pick"))
    found = done() + done({"good": [0.5], "bad": [0.4]}, "pick")
    text, shown = page.text(asked, found), page.html(asked, found)
    marked = page.markdown(asked, found, "hvd benchmark X")
    for words in (text, marked, shown):
        assert "good - bad" in words and "Differences in pick" in words and "0.767" in words
    assert "`hvd benchmark X`" in marked and shown.count("<img") == 2


def test_how_far_a_policy_comes_on_the_gates_way():
    """From the best plain policy (fair, .467) to the best oracle (good, .767); bad, .2, is behind the start."""
    gate = Comparison(["good"], ["fair", "bad"], "gate")
    ((_, (head, *rows)), *_) = page.tables(matrix(gate), done())
    assert [row[head.index("of the gate's way")] for row in rows] == ["100%", "0%", "-89%"]
    ((_, (head, *_)), *_) = page.tables(matrix(Comparison("good", "bad")), done())
    assert "of the gate's way" not in head
