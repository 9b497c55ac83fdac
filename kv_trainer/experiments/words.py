"""Figures and verdicts in words, as the terminal and the report have them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .fairness import share_taken
from .results import Study
from .statistics import Comparison, is_share, lower_is_better, mean, std


def figure_of(metric: str, value: float) -> str:
    """A value as people read it: 91.2% of a share, 1.012 of anything else."""
    return f"{value:.1%}" if is_share(metric) else f"{value:.4g}"


def spread_of(metric: str, values: Sequence[float]) -> str:
    """The standard deviation over seeds, behind a mean; nothing of one seed."""
    if len(values) < 2:
        return ""
    return f" ± {100 * std(values):.1f}" if is_share(metric) else f" ± {std(values):.2g}"


def over_seeds(metric: str, values: Sequence[float]) -> str:
    """91.2% ± 3.7, the mean and the standard deviation over seeds; of one seed its value."""
    return figure_of(metric, mean(values)) + spread_of(metric, values)


def percent(metric: str, difference: float) -> str:
    """A signed difference: +12.3 points, or in the metric's own unit."""
    return f"{100 * difference:+.1f}" if is_share(metric) else f"{difference:+.3g}"


def p_words(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def unit(metric: str) -> str:
    return "points" if is_share(metric) else metric


def finding_of(study: Study, one: Comparison) -> str:
    """One sentence about an arm: how far it is from `against`, how sure that is, and the verdict."""
    value = figure_of(one.metric, mean(study.values[one.arm][one.metric]))
    apart = f"{percent(one.metric, one.difference)} {unit(one.metric)} from {one.against}"
    sure = [f"p {p_words(one.p)}" if one.p is not None else "no p"]
    if one.low is not None and one.high is not None:
        sure = [f"95% interval {percent(one.metric, one.low)} to {percent(one.metric, one.high)}", *sure]
    start = f"{one.arm}: {one.metric} {value}, {apart}" + f" ({', '.join(sure)})"
    if study.experiment.arms[one.arm].control and one == study.first(one.arm):
        return f"{start}. Control: {share_of_gain(study, one)}."
    return f"{start}. Verdict: {one.verdict}."


def share_of_gain(study: Study, one: Comparison) -> str:
    """How much of the best arm's gain a control has too: of those compared with the same arm, and given as much."""
    sign = -1 if lower_is_better(one.metric) else 1
    arms = study.experiment.arms
    fair = [arm for arm in study.ranked() if not (arms[arm].seconds_of or arms[arm].unequal)]
    others = [study.first(arm) for arm in fair]
    best = next((other for other in others if other is not None and other.against == one.against), None)
    if best is None or not (sign * best.difference > 0 and math.isfinite(best.difference)):
        return "no other arm has a gain that it could be measured against"
    share = max(0.0, sign * one.difference) / (sign * best.difference)
    return f"{share:.0%} of the gain of {best.arm}, the best arm"


def steps_of_timed(study: Study) -> list[str]:
    """Of every arm that was given another's seconds: how many steps that was, and what it really took."""
    lines = []
    for name in study.arms:
        other = study.experiment.arms[name].seconds_of
        if other is not None:
            steps = ", ".join(f"{study.records[name, seed]['steps']:,}" for seed in study.seeds)
            each = [share_taken(study.experiment, name, seed, study.records) for seed in study.seeds]
            whole = f"{other} and of filling its store," if study.experiment.arms[name].with_store else other
            took = ", ".join(f"{share:.0%}" for share in each)
            lines.append(
                f"{name} was given the seconds of {whole} with the same seed, at the pace of "
                f"{study.experiment.arms[name].like}: {steps} steps. It took {took} of them."
            )
    return lines


def passes_left_out(study: Study) -> list[str]:
    """Of every arm whose teachers were read from a store: what making it took, which no arm's seconds hold."""
    lines = []
    for name in study.arms:
        took = study.records[name, study.seeds[0]].get("pass_seconds", {}).get(study.experiment.clock)
        if took:
            lines.append(
                f"The seconds of {name} leave out the pass of its teachers over the rows that filled the store: "
                f"{took:,.0f} s, once for all runs that read it."
            )
    return lines
