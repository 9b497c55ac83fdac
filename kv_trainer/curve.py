"""The curve of a run, drawn from its metrics file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

from .callbacks import read_metrics
from .files import beside

# Okabe and Ito's palette, told apart by colour-blind readers as well.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
FIXED_COLOURS = {"cross_entropy": PALETTE[0], "kv_relation": PALETTE[1], "kv": PALETTE[2]}
INK, FAINT = "#333333", "#DDDDDD"
PLAIN = FuncFormatter(lambda y, _: f"{y:g}")


def draw_curve(metrics: Path, target: Path, title: str) -> Path | None:
    """Draw a metrics file as a PNG: loss terms on the left; evaluations, or else the learning rate, on the right.

    Returns `target`, or None (and writes nothing) where the file is missing or holds no training log.
    """
    rows = read_metrics(metrics) if metrics.exists() else []
    if not any(isinstance(row.get("loss"), float) for row in rows):
        return None
    figure = Figure(figsize=(11, 4), dpi=150, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title, parse_math=False, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    _draw_losses(left, rows)
    if len(_series(rows, "eval_loss")[0]) > 1 or len(_series(rows, "eval_accuracy")[0]) > 1:
        _draw_evaluations(right, rows)
    else:
        steps, rates = _series(rows, "learning_rate")
        right.plot(steps, rates, color=PALETTE[0], linewidth=1.8)
        right.set_ylim(bottom=0)
        right.yaxis.set_major_formatter(PLAIN)
        dress(right, "learning rate", "step")
    with beside(target) as temporary:
        figure.savefig(temporary, format="png")
    return target


def _draw_losses(axes: Axes, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("loss_")))
    spare = (colour for colour in PALETTE if colour not in FIXED_COLOURS.values())
    series = {name.removeprefix("loss_"): _series(rows, name) for name in names}
    values: list[float] = []
    for label, (steps, points) in {"total": _series(rows, "loss"), **series}.items():
        colour = INK if label == "total" else FIXED_COLOURS.get(label) or next(spare, INK)
        style: dict[str, Any] = {"color": colour, "linestyle": (0, (4, 2)) if label == "total" else "-"}
        if len(points) > 60:  # many noisy points: the mean is the line, they are its haze
            axes.plot(steps, points, **{**style, "linestyle": "-"}, linewidth=0.8, alpha=0.2)
        axes.plot(steps, _smooth(points), **style, linewidth=1.8, label=label, solid_capstyle="round")
        values += points
    # Terms of unlike size share a panel only on a log scale.
    if min(values) > 0 and max(values) / min(values) > 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) / min(values) < 1000 else (1,)))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter("")
    dress(axes, "loss terms (unweighted) and their weighted total", "step")
    _legend(axes, axes.get_legend_handles_labels()[0])


def _draw_evaluations(axes: Axes, rows: list[dict[str, Any]]) -> None:
    steps, perplexity = _series(rows, "eval_perplexity")
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("eval_accuracy")))
    tasks = sorted(name for name in names if name not in ("eval_accuracy", "eval_accuracy_macro"))
    handles = []
    lower = axes
    if names:
        # More tasks than colours: those of the next round have another mark.
        styles = [(colour, mark) for mark in "osD^v" for colour in (*PALETTE[3:], *PALETTE[1:3])]
        for name, (colour, mark) in zip(["eval_accuracy", *tasks], [(INK, "o"), *styles], strict=False):
            label = name.removeprefix("eval_accuracy").lstrip("_") or "all"
            handles += axes.plot(*_series(rows, name), color=colour, marker=mark, markersize=4, label=label)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        lower = axes.twinx()
        lower.tick_params(axis="y", colors=PALETTE[0], labelsize=9, length=0)
    style: dict[str, Any] = {"marker": "s", "markersize": 3.5, "linestyle": (0, (2, 2)), "linewidth": 1.2}
    handles += lower.plot(steps, perplexity, color=PALETTE[0], label="perplexity", **style)
    dress(axes, "exact answers (left) and perplexity (right)" if names else "perplexity", "step")
    if names:
        for side in lower.spines.values():
            side.set_visible(False)
        _legend(axes, handles, letters=60)


def dress(axes: Axes, title: str, across: str = "") -> None:
    """The plain look of all panels. across: what their x axis counts."""
    axes.set_title(title, loc="left", fontsize=10, color=INK, parse_math=False)  # it may be the name of a task
    axes.set_xlabel(across, fontsize=9, color=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=INK, length=0, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def _legend(axes: Axes, handles: list[Any], letters: int = 90) -> None:
    """One row below the axes, where it hides no line; more rows where the names are many or long.

    letters: as many as go into a row.
    """
    longest = max((len(handle.get_label()) for handle in handles), default=1)
    columns = max(1, min(len(handles), 5, letters // longest))
    where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": columns}
    axes.legend(handles=handles, **where, frameon=False, fontsize=9, handlelength=1.8, labelcolor=INK)


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged and finite; of two at one step, the later."""
    points = {row["step"]: row[name] for row in rows if isinstance(row.get(name), int | float)}
    return list(points), list(points.values())


def _smooth(points: list[float]) -> list[float]:
    """Mean over a window around each point, of at most 1/30 of the curve."""
    half = len(points) // 60
    windows = (points[max(0, i - half) : i + half + 1] for i in range(len(points)))
    return [sum(window) / len(window) for window in windows]
