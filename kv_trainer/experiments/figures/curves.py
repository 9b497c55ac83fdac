"""Curves of the runs, over steps and over seconds, and what share each loss term has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, PercentFormatter

from ...callbacks.figures import CROSS_ENTROPY
from ...curve import INK, PALETTE, PLAIN, dress
from ..reach import at, seconds_at, series
from ..results import Study
from .style import legend_below, new_figure, save, seeds_of, styles

TERMS = ("loss_kv_relation", "loss_kv", "loss_cka", "loss_codi", "loss_attention_kl", "loss_logit_kd")
PANELS = 2  # of terms: of more the figure would be too small to read
POINTS = 80


def draw_curves(study: Study, target: Path) -> str:
    """The teachers' terms, and what they are to bring; above over steps, below over seconds. Returns a caption."""
    terms = [name for name in TERMS if any(has(study, arm, name) for arm in study.arms)][:PANELS]
    evaluated = all(len(series(study.metrics(a, s), "eval_accuracy")[0]) > 2 for a in study.arms for s in study.seeds)
    aim = "eval_accuracy" if evaluated else CROSS_ENTROPY
    titles = {aim: "exact answers" if evaluated else "training cross-entropy (nats a token)"}
    titles = {term: f"{term.removeprefix('loss_')} term (unweighted)" for term in terms} | titles
    figure = new_figure("what the teachers' term does, and what it brings", height=7.2)
    grid = figure.subplots(2, len(titles), squeeze=False)
    handles: dict[str, Any] = {}
    for row, over in zip(grid, ("steps", "seconds"), strict=True):
        for axes, (name, title) in zip(row, titles.items(), strict=True):
            # What the others are compared with comes last, on top: else one that has the same course would hide it.
            for arm in sorted(study.arms, key=lambda arm: arm == study.experiment.against):
                if has(study, arm, name):
                    handles[arm] = draw_arm(study, axes, arm, name, over)
            scale(axes, name)
            dress(axes, title, "step" if over == "steps" else "seconds of training")
    arms = [arm for arm in study.arms if arm in handles]
    legend_below(figure, [handles[arm] for arm in arms], arms)
    save(figure, target)
    apart = " Arms whose teachers differ have targets of their own, so heights of a term are not comparable."
    return (
        f"{', '.join(titles.values())}: over steps (above) and the mean seconds of these steps (below); mean and "
        f"deviation over seeds.{apart * bool(terms)}"
    )


def has(study: Study, arm: str, name: str) -> bool:
    return all(len(series(study.metrics(arm, seed), name)[0]) > 1 for seed in study.seeds)


def draw_arm(study: Study, axes: Axes, arm: str, name: str, over: str) -> Any:
    """The mean over seeds and a band of one deviation, as far as the shortest run goes. Returns the line."""
    runs = [series(study.metrics(arm, seed), name) for seed in study.seeds]
    grid = np.linspace(max(steps[0] for steps, _ in runs), min(steps[-1] for steps, _ in runs), POINTS)
    each = np.array([[at(steps, values, x) for x in grid] for steps, values in runs])
    if over == "seconds":  # of each step: by the same seconds a slower run would be at an earlier step
        clocks = [seconds_at(study.records[arm, s]["clock"], steps) for s, (steps, _) in zip(study.seeds, runs)]
        grid = np.mean(
            [[at(steps, clock, x) for x in grid] for (steps, _), clock in zip(runs, clocks, strict=True)], axis=0
        )
    middle, error = each.mean(0), each.std(0, ddof=1) if len(runs) > 1 else np.zeros(POINTS)
    look = styles(study)[arm]
    (line,) = axes.plot(grid, middle, **look, linewidth=1.6)
    low = np.maximum(middle - error, each.min(0))  # on a log scale a band must stay above zero
    axes.fill_between(grid, low, middle + error, color=look["color"], alpha=0.12, linewidth=0)
    return line


def scale(axes: Axes, name: str) -> None:
    if name == "eval_accuracy":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    if values.min() > 0 and values.max() / values.min() > 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() / values.min() < 1000 else (1,)))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter("")


def weighted_term(row: dict[str, Any], name: str) -> float:
    value, weight = row.get(name) or 0.0, row.get(f"weight_{name.removeprefix('loss_')}") or 0.0
    return max(0.0, value * weight)


def draw_terms(study: Study, arm: str, target: Path) -> bool:
    """How the weighted loss of an arm is made up over its steps. False, and no file, where it has one term only."""
    shares: dict[str, list[np.ndarray]] = {}
    steps: list[int] = []
    for seed in study.seeds:
        rows = [row for row in study.metrics(arm, seed) if "loss" in row and row.get("loss") is not None]
        names = [n for n in rows[0] if n.startswith("loss_") and f"weight_{n[5:]}" in rows[0]] if rows else []
        if len(names) < 2:
            return False
        weighted = np.array([[weighted_term(row, name) for name in names] for row in rows])
        total = weighted.sum(1, keepdims=True)
        for name, share in zip(names, (weighted / np.where(total, total, math.inf)).T, strict=True):
            shares.setdefault(name.removeprefix("loss_"), []).append(share)
        steps = [row["step"] for row in rows]
    length = min(len(one) for each in shares.values() for one in each)
    means = [np.mean([one[:length] for one in each], axis=0) for each in shares.values()]
    figure = new_figure(f"share of each term in the loss of {arm}", height=3.6, width=8)
    axes = figure.subplots()
    axes.stackplot(steps[:length], means, labels=list(shares), colors=PALETTE, alpha=0.75)
    axes.set_ylim(0, 1)
    axes.set_xlim(steps[0], steps[length - 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    dress(axes, f"weighted terms, mean of {seeds_of(study)}", "step")
    handles, labels = axes.get_legend_handles_labels()
    legend_below(figure, handles, labels)
    axes.tick_params(colors=INK)
    save(figure, target)
    return True
