"""Statistics against examples worked by hand, and at the edges where formulas say nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kv_trainer.experiments.experiment import VerdictRule
from kv_trainer.experiments.statistics import (
    bootstrap,
    cohens_d,
    compare,
    holm,
    interval_over_seeds,
    paired_p,
    points,
    verdict,
)

RULE = VerdictRule()


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04; times 4, 3, 2, 1: .04 .06 .06 .04; never below the one before: .04 .06 .06 .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.04, 0.01], 3) == pytest.approx([0.08, 0.03]), "one more was made, without a p"
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


def test_the_paired_test_is_over_seeds() -> None:
    ours, theirs = [0.5, 0.6, 0.8], [0.4, 0.45, 0.5]
    # differences .1 .15 .3: mean .18333, standard deviation .10408, t = .18333 / (.10408 / sqrt 3) = 3.0509
    assert paired_p(ours, theirs) == pytest.approx(2 * stats.t.sf(3.0509, 2), rel=1e-3)
    assert paired_p(ours, theirs) == paired_p(theirs, ours)
    assert cohens_d(ours, theirs) == pytest.approx(0.18333 / 0.10408, rel=1e-3)


def test_differences_without_variance() -> None:
    assert paired_p([0.5, 0.6], [0.5, 0.6]) == 1.0
    assert paired_p([0.6, 0.7], [0.5, 0.6]) is None, "rounding is no variance"
    assert paired_p([1.0, float("inf"), 2.0], [0.5, 0.6, 0.7]) is None
    said = verdict([0.6, 0.7, 0.8], [0.5, 0.6, 0.7], "accuracy", None, VerdictRule())
    assert said == "none: the seeds do not differ, so no test can be made"
    assert paired_p([0.6], [0.5]) is None
    assert cohens_d([0.6, 0.7], [0.5, 0.6]) is None
    assert interval_over_seeds([0.6, 0.7], [0.5, 0.6]) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize(
    ("ours", "metric", "p", "expected"),
    [
        ([0.53, 0.53, 0.54], "accuracy", 0.01, "keep"),
        ([0.53, 0.53, 0.54], "accuracy", 0.05, "optional"),
        ([0.52, 0.52, 0.52], "accuracy", 0.0, "optional"),
        ([0.51, 0.51, 0.51], "accuracy", 0.0, "optional"),
        ([0.509, 0.51, 0.51], "accuracy", 0.0, "drop"),
        ([0.40, 0.40, 0.40], "accuracy", 0.0, "drop"),
        ([0.45, 0.50, 0.70], "accuracy", 0.4, "drop (unstable)"),
        ([0.53, 0.54], "accuracy", 0.01, "none: fewer than 3 seeds"),
        ([0.48, 0.48, 0.48], "perplexity", 0.01, "keep"),
        ([0.52, 0.52, 0.52], "perplexity", 0.01, "drop"),
        ([math.nan, 0.5, 0.5], "perplexity", 0.01, "none: a value is not finite"),
    ],
)
def test_the_verdict_follows_the_rule(ours: list[float], metric: str, p: float, expected: str) -> None:
    apart = (0.01, 0.05) if metric == "accuracy" else (-0.05, -0.01)
    assert verdict(ours, [0.5] * len(ours), metric, p, RULE, apart) == expected


def test_what_other_test_rows_might_undo_is_not_kept() -> None:
    ours, theirs = [0.53, 0.53, 0.54], [0.5, 0.5, 0.5]
    for interval, expected in ((None, "optional"), ((0.001, 0.06), "keep"), ((-0.009, 0.078), "optional")):
        assert verdict(ours, theirs, "accuracy", 0.01, RULE, interval) == expected
    assert verdict([0.4] * 3, [0.5] * 3, "perplexity", 0.01, RULE, (-0.2, -0.1)) == "keep"


def test_points_of_what_should_fall_are_percent_of_what_was() -> None:
    assert points([3.0, 3.0], [4.0, 4.0], "perplexity") == pytest.approx(25.0)
    assert points([0.30, 0.34], [0.30, 0.30], "accuracy_chain") == pytest.approx(2.0)


def test_the_interval_is_of_seeds_and_items_and_always_the_same() -> None:
    generator = np.random.default_rng(3)
    difference = generator.normal(0.1, 1.0, (5, 400)) + generator.normal(0, 0.05, (5, 1))

    def value(seeds: np.ndarray, items: np.ndarray) -> float:
        return float(difference[seeds][:, items].mean())

    low, high = bootstrap(5, [np.arange(400)], value, resamples=500)
    assert (low, high) == bootstrap(5, [np.arange(400)], value, resamples=500)
    assert low < difference.mean() < high
    of_items = stats.norm.ppf(0.975) * np.sqrt(difference.mean(0).var() / 400)
    of_seeds = stats.t.ppf(0.975, 4) * np.sqrt(difference.mean(1).var(ddof=1) / 5)
    assert high - low == pytest.approx(2 * np.hypot(of_items, of_seeds), rel=0.05)
    assert (low + high) / 2 == pytest.approx(difference.mean())
    assert bootstrap(1, [np.arange(400)], value) is None and bootstrap(5, [np.arange(1)], value) is None
    assert bootstrap(3, [np.arange(50)], lambda seeds, items: 0.25) == (0.25, 0.25)


def test_tasks_that_all_count_are_drawn_from_apart() -> None:
    """A mean over tasks is of every task in each resample, however few rows one of them has."""
    tasks = [np.arange(3), np.arange(3, 400)]
    seen = []

    def value(seeds: np.ndarray, items: np.ndarray) -> float:
        seen.append(int((items < 3).sum()))
        return float(items.mean())

    low, high = bootstrap(3, tasks, value, resamples=50)
    assert low < 199.5 < high and set(seen) == {3}


def test_items_that_differ_between_seeds_alone_make_no_interval_of_zero_width() -> None:
    each = np.array([0.1, 0.3, 0.5])
    found = bootstrap(3, [np.arange(10)], lambda seeds, items: float(each[seeds].mean()), resamples=100)
    assert found == pytest.approx(interval_over_seeds(each.tolist(), [0.0] * 3))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Three seeds with a deviation of 3 points, 300 items: 95%, give or take what 120 draws leave open."""
    generator, held = np.random.default_rng(1), 0
    for _ in range(120):
        share = (0.5 + 0.03 * generator.normal(size=(2, 3, 1))).clip(0, 1)
        ours, theirs = generator.random((2, 3, 300)) < share
        low, high = bootstrap(
            3, [np.arange(300)], lambda s, i, a=ours, b=theirs: a[s][:, i].mean() - b[s][:, i].mean(), 100
        )
        held += low <= 0 <= high
    assert held / 120 >= 0.90


def test_all_arms_are_corrected_together() -> None:
    values = {"ce": [0.10, 0.11, 0.12], "good": [0.50, 0.52, 0.51], "same": [0.10, 0.11, 0.12]}
    intervals = {"good": (0.1, 1.0), "same": None}
    pairs = [("good", "ce"), ("same", "ce")]
    good, same = compare(values, pairs, "accuracy", RULE, lambda arm, other: intervals[arm])
    assert (good.arm, good.against, good.verdict, same.verdict) == ("good", "ce", "keep", "drop")
    assert good.p == pytest.approx(2 * good.p_raw) and same.p == 1.0
    assert good.difference == pytest.approx(0.4) and (good.low, same.low) == (0.1, None)
