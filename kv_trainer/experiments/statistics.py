"""What several seeds say: paired tests, intervals, corrections, and the verdict. The tests are scipy's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .experiment import VerdictRule

Array = NDArray[np.float64]
Value = Callable[[NDArray[np.int64], NDArray[np.int64]], float]
RESAMPLES = 2000
FEWEST = 3  # seeds, for a verdict


@dataclass
class Comparison:
    """One metric of an arm against that of another, paired by seed.

    difference: arm - against, of the means over seeds. low, high: 95% interval of it, None where it cannot be had.
    p: Holm-corrected over all comparisons of the metric; p_raw: before that. effect: Cohen's d of the paired
    differences, None where they do not vary. points: as the rule counts them, positive where the arm is better.
    """

    arm: str
    against: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    verdict: str
    points: float
    p_raw: float | None
    effect: float | None
    std: float


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def std(values: Sequence[float]) -> float:
    """Over seeds, of a sample; 0 of a single one."""
    with np.errstate(invalid="ignore"):  # of values that are not finite there is none
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction, told in percent and compared in percentage points."""
    return metric.split("_")[0] == "accuracy"


def lower_is_better(metric: str) -> bool:
    return metric.split("_")[0] in ("perplexity", "loss")


def paired_p(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Two-sided, of a paired t-test over seeds; None of a single seed.

    None too where the test says nothing: a value is not finite, or the differences are all the same, but not zero.
    """
    differences = np.subtract(ours, theirs)
    if len(differences) < 2 or not np.isfinite(differences).all():
        return None
    if np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs(differences).max())):
        return 1.0 if abs(differences[0]) <= 1e-12 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_rel(ours, theirs).pvalue)


def cohens_d(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    differences = np.subtract(ours, theirs)
    spread = std(differences.tolist())
    return float(differences.mean()) / spread if spread > 1e-12 else None


def holm(values: Sequence[float], tests: int | None = None) -> list[float]:
    """Corrected p-values: the smallest of m times m, the next times m - 1, ..., never below the one before.

    tests: m, where some have no p but were made all the same; default the number of values.
    """
    found, highest, number = [0.0] * len(values), 0.0, tests or len(values)
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (number - rank) * values[i]))
        found[i] = highest
    return found


def bootstrap(
    seeds: int, strata: Sequence[NDArray[np.int64]], difference: Value, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95% interval of a difference over both seeds and test items; the same every time.

    strata: numbers of items, each set drawn from by itself, as tasks of which every one counts. difference: numbers of
    seeds and of items -> the difference over these. Arms stay paired: they share both. Two half-widths are added in
    squares: of seeds, Student's (percentiles of three seeds are no wider than the seeds' own range), and of items, the
    standard error of a bootstrap in which each is as often there for all seeds and arms.
    """
    if seeds < 2 or min(map(len, strata), default=0) < 2:
        return None
    every, rows = np.arange(seeds), np.concatenate(strata)
    middle, each = difference(every, rows), [difference(every[[seed]], rows) for seed in every]
    error = stats.bootstrap(
        tuple(strata), lambda *chosen: difference(every, np.concatenate(chosen)), n_resamples=resamples,
        vectorized=False, method="percentile", rng=np.random.default_rng(0),
    ).standard_error  # fmt: skip
    of_seeds = stats.t.ppf(0.975, seeds - 1) * std(each) / math.sqrt(seeds)
    half = math.hypot(of_seeds, stats.norm.ppf(0.975) * error)
    return (float(middle - half), float(middle + half)) if math.isfinite(middle + half) else None


def interval_over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean difference by the t-distribution: for metrics that no test item has."""
    differences = np.subtract(ours, theirs)
    spread = std(differences.tolist()) / math.sqrt(len(differences))
    if len(differences) < 2:
        return None
    if spread <= 1e-12:
        return float(differences.mean()), float(differences.mean())
    found = stats.t.interval(0.95, len(differences) - 1, loc=differences.mean(), scale=spread)
    return float(found[0]), float(found[1])


def points(ours: Sequence[float], theirs: Sequence[float], metric: str) -> float:
    """How much better ours are: percentage points of a share; of another metric, percent of theirs."""
    gain = mean(theirs) - mean(ours) if lower_is_better(metric) else mean(ours) - mean(theirs)
    return 100 * gain if is_share(metric) else 100 * gain / abs(mean(theirs)) if mean(theirs) else math.inf * gain


def verdict(
    ours: Sequence[float], theirs: Sequence[float], metric: str, p: float | None, rule: VerdictRule,
    interval: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """keep, optional or drop, by the rule; "none: ..." and why, where nothing can be said.

    interval: of the difference, over seeds and test items; without one, None, nothing is kept.
    """
    if len(ours) < FEWEST:
        return f"none: fewer than {FEWEST} seeds"
    better = points(ours, theirs, metric)
    if not math.isfinite(better):
        return "none: a value is not finite"
    if p is None:
        return "none: the seeds do not differ, so no test can be made"
    if better < rule.optional - 1e-9:
        return "drop"
    differences = np.subtract(ours, theirs).tolist()
    if std(differences) > abs(mean(differences)):
        return "drop (unstable)"
    # p is over seeds alone, an interval over items too.
    apart = interval is not None and not interval[0] <= 0 <= interval[1]
    return "keep" if better > rule.keep + 1e-9 and p < rule.p and apart else "optional"


def compare(
    values: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]], metric: str, rule: VerdictRule,
    intervals: Callable[[str, str], tuple[float, float] | None],
) -> list[Comparison]:  # fmt: skip
    """Arms against others. values: arm -> one value a seed; intervals: of the difference of two arms."""
    raw = {(arm, other): paired_p(values[arm], values[other]) for arm, other in pairs}
    known = {pair: p for pair, p in raw.items() if p is not None and math.isfinite(p)}
    corrected = dict(zip(known, holm(list(known.values()), len(raw)), strict=True))
    found = []
    for pair in raw:
        (arm, other), p = pair, corrected.get(pair)
        ours, theirs = values[arm], values[other]
        interval = intervals(arm, other)
        low, high = interval or (None, None)
        found.append(Comparison(
            arm, other, metric, mean(ours) - mean(theirs), low, high, p,
            verdict(ours, theirs, metric, p, rule, interval),
            points(ours, theirs, metric), raw[pair], cohens_d(ours, theirs), std(np.subtract(ours, theirs).tolist()),
        ))  # fmt: skip
    return found
