"""Who taught what: the teachers' shares by task and layer, and what each teacher contributes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...curve import INK, PALETTE, dress
from ...files import read_json
from ...heatmap import draw_heatmap
from ..contribution import Game, measures
from ..results import Study
from ..statistics import is_share, mean, std
from ..words import percent, unit
from .style import DOTS, new_figure, save, seeds_of

EVEN = 1e-3  # shares that differ by less are of no routing


def draw_routing(study: Study, folder: Path) -> dict[str, str]:
    """A heat map for every arm whose shares differ by task, and one where they differ by layer. Name -> caption."""
    found: dict[str, str] = {}
    for arm in study.arms:
        paths = [study.folder(arm, seed) / "routing.json" for seed in study.seeds]
        if not all(path.exists() for path in paths):
            continue
        runs = [read_json(path) for path in paths]
        for axis in ("task", "layer"):
            if all(axis in run for run in runs):
                matrix = np.mean([run[axis] for run in runs], axis=0)
                by_row = float(np.ptp(matrix, axis=0).max()) if len(matrix) > 1 else 0.0
                if by_row > EVEN:
                    name = f"routing_{axis}_{arm}.png"
                    draw_shares(arm, axis, runs[0], matrix, folder / name)
                    found[name] = f"{arm}: mean share of each teacher by {axis}, over the run and all seeds"
    return found


def draw_shares(arm: str, axis: str, run: dict, matrix: np.ndarray, target: Path) -> None:
    rows = run["tasks"] if axis == "task" else [str(i) for i in range(len(matrix))]
    draw_heatmap(
        matrix.tolist(), target, title=f"share of each teacher: {arm}", rows=rows, columns=run["teachers"],
        row_label=axis if axis == "task" else "student layer", column_label="teacher",
    )  # fmt: skip


def draw_contribution(study: Study, game: Game, target: Path) -> None:
    """For each player its Shapley value where it is known, and what is lost without it; over seeds."""
    metric, names = study.experiment.metrics[0], game.players
    size = 100 if is_share(metric) else 1
    figure = new_figure(f"contribution of each {game.kind} to {game.whole}", height=3.6, width=8)
    axes = figure.subplots()
    both = measures(game)
    for i, (label, values) in enumerate(both.items()):
        each = [[size * x for x in values[name]] for name in names]
        places = [j + (i - (len(both) - 1) / 2) * 0.36 for j in range(len(names))]
        axes.bar(
            places, [mean(v) for v in each], width=0.32, color=PALETTE[i], alpha=0.75, label=label,
            yerr=[std(v) for v in each], error_kw={"ecolor": INK, "capsize": 3, "linewidth": 1},
        )  # fmt: skip
        for j, (place, v) in enumerate(zip(places, each, strict=True)):
            axes.plot([place] * len(v), v, **DOTS)
            top = max([mean(v) + std(v), *v, 0.0])
            said = percent(metric, mean(values[names[j]])).removeprefix("+")
            axes.annotate(
                said, (place, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9, color=INK
            )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.margins(y=0.15)
    if all(abs(x) < 1e-9 for values in both.values() for one in values.values() for x in one):
        axes.set_ylim(0, 1)  # rounding would make a scale of its own
    of_metric = f" of {metric}" if is_share(metric) else ""
    dress(axes, f"{unit(metric)}{of_metric}, over {seeds_of(study)}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    save(figure, target)
