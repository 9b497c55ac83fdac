"""Bars by arm: a metric over all test items and by task; and what it took to reach a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ...curve import INK, dress
from ..reach import Reached
from ..results import Study
from ..statistics import is_share, mean, std
from ..words import figure_of
from .style import DOTS, WIDTH, new_figure, save, seeds_of, styles


def draw_bars(study: Study, target: Path) -> None:
    """The judged metric, overall and by task: mean, standard deviation, and every seed as a dot."""
    metric = study.experiment.metrics[0]
    panels = {metric: f"{metric}, all rows"}
    if metric == "accuracy" and len(study.tasks) > 1:
        panels = {"accuracy": "exact answers, all tasks"} | {f"accuracy_{t}": t for t in study.tasks[:4]}
    figure = new_rows(study, f"{metric} by arm, {seeds_of(study)}")
    each = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    every = [x for arm in study.arms for name in panels for x in study.values[arm].get(name, [])]
    highest = max(filter(math.isfinite, every), default=0.0)
    for axes, (name, title) in zip(each, panels.items(), strict=True):
        values = {arm: study.values[arm].get(name, []) for arm in study.arms}
        draw_panel(study, axes, values, name, highest or 0.01)
        dress(axes, title)
        axes.grid(axis="y", visible=False)
    name_rows(study, each[0])
    save(figure, target)


def new_rows(study: Study, title: str) -> Figure:
    """A figure with a row an arm, and room for their names."""
    longest = max(map(len, names_of(study)))
    return new_figure(title, 1.4 + 0.36 * len(study.arms), WIDTH + 0.07 * max(0, longest - 30))


def names_of(study: Study) -> list[str]:
    return [f"{arm} (control)" if study.experiment.arms[arm].control else arm for arm in study.arms]


def draw_panel(study: Study, axes: Axes, values: Mapping[str, Sequence[float]], metric: str, highest: float) -> None:
    """highest: of all panels, so that they have one scale."""
    look = styles(study)
    for row, (arm, each) in enumerate(values.items()):
        if not each:
            continue
        if not all(map(math.isfinite, each)):  # of a run that diverged: no bar has that length
            write_beside(axes, "not finite", 0.0, row)
            continue
        middle, error = mean(each), std(each)
        axes.barh(row, middle, height=0.62, color=look[arm]["color"], alpha=0.75)
        right = min(middle + error, 1.0) if is_share(metric) else middle + error  # no share is above 100%
        if error:
            sides = [[middle - max(middle - error, 0.0)], [right - middle]]
            axes.errorbar(middle, row, xerr=sides, color=INK, capsize=2.5, linewidth=1)
        if len(each) > 1:
            axes.plot(each, [row] * len(each), **DOTS)
        right = max([right, *each])
        write_beside(axes, figure_of(metric, middle), right, row)
    axes.set_xlim(0, 1.35 * highest)
    few_ticks(axes)
    if is_share(metric) and highest > 0.4:
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    if is_share(metric):
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0 if highest > 0.05 else 1))


def write_beside(axes: Axes, text: str, right: float, row: int) -> None:
    """To the right of a bar, where the axes have room for it."""
    where: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    # Its width is no number of the axes': a layout that made room for it would shrink them, and so need more.
    axes.annotate(text, (right, row), **where, fontsize=8, color=INK).set_in_layout(False)


def few_ticks(axes: Axes) -> None:
    """Without the last, whose number would touch the first one of the next panel."""
    axes.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))


def name_rows(study: Study, axes: Axes) -> None:
    """The arms' names beside the rows, the first on top."""
    names = names_of(study)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)


def draw_reached(study: Study, reached: Reached, target: Path) -> None:
    """Steps, and seconds, until an arm's training loss was as low as that of `against` at its end; (x): of its run."""
    against = study.experiment.against
    figure = new_rows(study, f"until the final training loss of {against} is reached (x: of its whole run)")
    each = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(each, ("steps", "seconds"), strict=True):
        look = styles(study)
        means = reached.means(unit)
        highest = max((x for arm in study.arms for x in reached.each[arm][unit] if x is not None), default=1.0)
        for row, arm in enumerate(study.arms):
            value = means[arm]
            some = [x for x in reached.each[arm][unit] if x is not None]
            if some:  # an empty line that is not clipped would upset the layout
                axes.plot(some, [row] * len(some), **DOTS)
            label = f"reached by {len(some)} of {len(study.seeds)} seeds" if some else "not reached"
            if value is not None:
                axes.barh(row, value, height=0.62, color=look[arm]["color"], alpha=0.75)
                base = study.budget(against, unit)
                label = f"{value:,.0f}" + (f"  ({value / base:.2f}x)" if base and arm != against else "")
            right = max([value or 0.0, *some])
            write_beside(axes, label, right, row)
        axes.set_xlim(0, 1.5 * highest)
        few_ticks(axes)
        dress(axes, unit)
        axes.grid(axis="y", visible=False)
    name_rows(study, each[0])
    save(figure, target)
