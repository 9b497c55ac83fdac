"""A matrix drawn as coloured cells: layers against layers, teachers against tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .files import beside

INK, MARK = "#333333", "#D55E00"
MANY_CELLS = 150  # beyond these, a number in every cell could not be read


def draw_heatmap(
    matrix: Sequence[Sequence[float]],
    target: Path,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str,
    column_label: str,
    marks: Sequence[int] | None = None,
) -> Path:
    """Draw `matrix` (rows x columns) as a PNG, the first row on top, and return `target`.

    Cells carry their numbers where there are few of them; one that is not finite stays blank. marks: for each row the
    column whose cell is framed, such as the matched layer. ValueError where names, marks and matrix disagree.
    """
    _check(matrix, rows, columns, marks)
    finite = [value for row in matrix for value in row if math.isfinite(value)] or [0.0]
    # The scale of a likeness is 0 to 1; what goes beyond that makes its own.
    low, high = (0.0, 1.0) if min(finite) >= -0.2 and max(finite) <= 1 else (min(finite), max(finite))
    cell = 0.46 if len(rows) * len(columns) <= MANY_CELLS else 0.2
    size = (max(4.0, 0.11 * len(title), cell * len(columns) + 2.2), max(2.6, cell * len(rows) + 1.5))
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(title, parse_math=False, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="viridis", vmin=low, vmax=high, aspect="equal", interpolation="nearest")
    if len(rows) * len(columns) <= MANY_CELLS:
        _write_numbers(axes, matrix, low, high)
    for row, column in enumerate(marks or ()):
        frame = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=MARK, linewidth=1.8)
        axes.add_patch(frame)
    _dress(axes, rows, columns, row_label, column_label)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    with beside(target) as temporary:
        figure.savefig(temporary, format="png")
    return target


def _check(
    matrix: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], marks: Sequence[int] | None
) -> None:
    widths = sorted({len(row) for row in matrix})
    if not rows or not columns or len(matrix) != len(rows) or widths != [len(columns)]:
        raise ValueError(
            f"The matrix has {len(matrix)} rows of {widths} numbers, but there are {len(rows)} row names and "
            f"{len(columns)} column names; give one name for each row and column."
        )
    if marks is not None and (len(marks) != len(rows) or any(not 0 <= mark < len(columns) for mark in marks)):
        raise ValueError(f"marks is {list(marks)}; give one column from 0 to {len(columns) - 1} for each row.")


def _write_numbers(axes: Axes, matrix: Sequence[Sequence[float]], low: float, high: float) -> None:
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if math.isfinite(value):
                bright = value - low > 0.55 * (high - low)
                axes.text(j, i, _short(value), ha="center", va="center", fontsize=8, color=INK if bright else "white")


def _short(value: float) -> str:
    """Two decimals without a leading zero, or three digits from 1 on."""
    if abs(value) >= 0.995:
        return f"{value:.3g}"
    return f"{value:.2f}".replace("-0.00", "0.00").replace("0.", ".")


def _dress(axes: Axes, rows: Sequence[str], columns: Sequence[str], row_label: str, column_label: str) -> None:
    # Of many names some are written, at even steps from the first.
    across, down = (range(0, len(names), 1 + (len(names) - 1) // 20) for names in (columns, rows))
    crowded = sum(len(columns[i]) for i in across) > 3 * len(columns)
    axes.set_xticks(list(across), [columns[i] for i in across], parse_math=False)
    axes.set_yticks(list(down), [rows[i] for i in down], parse_math=False)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    if crowded:
        for name in axes.get_xticklabels():
            name.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlabel(column_label, fontsize=9, color=INK, parse_math=False)
    axes.set_ylabel(row_label, fontsize=9, color=INK, parse_math=False)
    for side in axes.spines.values():
        side.set_visible(False)
