"""What all figures of a report share: size, dress, and one colour and line an arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...curve import INK, PALETTE
from ...files import beside
from ..results import Study

LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
WIDTH = 11.0
DOTS: dict[str, Any] = {
    "marker": "o", "linestyle": "none", "color": "white", "markeredgecolor": INK, "markersize": 4, "zorder": 3,
    "clip_on": False,
}  # fmt: skip


def new_figure(title: str, height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(title, parse_math=False, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def seeds_of(study: Study) -> str:
    return f"{len(study.seeds)} seed{'s' * (len(study.seeds) != 1)}"


def save(figure: Figure, target: Path) -> None:
    with beside(target) as temporary:
        figure.savefig(temporary, format="png")


def styles(study: Study) -> dict[str, dict[str, Any]]:
    """arm -> colour and line. What the others are compared with is dark; controls come last in the palette's order."""
    found: dict[str, dict[str, Any]] = {study.experiment.against: {"color": INK, "linestyle": "-"}}
    others = [arm for arm in study.arms if arm not in found]
    others.sort(key=lambda arm: study.experiment.arms[arm].control)
    for i, arm in enumerate(others):
        found[arm] = {"color": PALETTE[i % len(PALETTE)], "linestyle": LINES[i // len(PALETTE) % len(LINES)]}
    return found


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One for all panels, below them; as many columns as the figure is wide enough for."""
    letters = 11 * figure.get_figwidth()
    columns = max(1, min(len(labels), 5, int(letters / (max(map(len, labels)) + 6))))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK,
        handlelength=2.4,
    )  # fmt: skip
