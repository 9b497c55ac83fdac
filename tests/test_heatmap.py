"""The heatmap is read back as pixels: colours, marks, and no half-written file."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from kv_trainer.heatmap import draw_heatmap


def draw(target: Path, matrix, rows=None, columns=None, **options) -> np.ndarray:
    """The drawn picture as [height, width, 3] floats."""
    names = {
        "rows": [str(i) for i in range(len(matrix))] if rows is None else rows,
        "columns": [str(i) for i in range(len(matrix[0]))] if columns is None else columns,
        "row_label": "student layer", "column_label": "teacher layer",
    }  # fmt: skip
    assert draw_heatmap(matrix, target, "likeness of layers", **names, **options) == target
    return matplotlib.image.imread(target)[..., :3]


def share_of(picture: np.ndarray, colour: tuple[float, float, float]) -> float:
    return float((np.abs(picture - np.array(colour)).max(-1) < 0.02).mean())


LOW, HIGH, MARK = (0.267, 0.005, 0.329), (0.993, 0.906, 0.144), (0.835, 0.369, 0.0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 6), (30, 40), (2, 40), (40, 2)])
def test_any_size_is_drawn_whole(tmp_path: Path, rows: int, columns: int) -> None:
    matrix = [[(i + j) % 2 for j in range(columns)] for i in range(rows)]
    picture = draw(tmp_path / "map.png", matrix)
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    low, high = share_of(picture, LOW), share_of(picture, HIGH)
    assert low > 0.01
    if columns > 1:
        assert 0.8 < low / high < 1.5, "half of the cells each, but for the bar and the numbers"
        assert low + high > 0.12


def test_marks_are_seen(tmp_path: Path) -> None:
    matrix = [[0.1] * 6 for _ in range(4)]
    plain, marked = draw(tmp_path / "a.png", matrix), draw(tmp_path / "b.png", matrix, marks=[0, 1, 1, 5])
    assert share_of(plain, MARK) == 0 and share_of(marked, MARK) > 0.002


def test_a_value_beyond_one_makes_its_own_scale(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", [[-3.0, 7.0]])
    assert share_of(picture, LOW) > 0.01 and share_of(picture, HIGH) > 0.01
    ours = draw(tmp_path / "b.png", [[0.4, 0.6]])
    assert share_of(ours, HIGH) < 0.01 < share_of(picture, HIGH), "0 to 1 where it fits"


@pytest.mark.parametrize("matrix", [[[math.nan, 0.5]], [[math.nan]], [[math.inf, 1.0]], [[0.0, 0.0]]])
def test_numbers_that_cannot_be_drawn_stay_blank(tmp_path: Path, matrix) -> None:
    assert draw(tmp_path / "map.png", matrix).std() > 0


def test_names_are_taken_as_they_are(tmp_path: Path) -> None:
    draw(tmp_path / "map.png", [[0.5, 0.2]], rows=["a $broken name"], columns=["$x", "a long teacher name_1"])


@pytest.mark.parametrize(
    ("matrix", "rows", "columns", "marks", "says"),
    [
        ([[1.0, 2.0]], ["a"], ["x"], None, "1 rows of \\[2\\] numbers, but there are 1 row names and 1 column names"),
        ([[1.0], [1.0, 2.0]], ["a", "b"], ["x"], None, "2 rows of \\[1, 2\\] numbers"),
        ([], [], [], None, "give one name for each"),
        ([[1.0, 2.0]], ["a"], ["x", "y"], [2], "marks is \\[2\\]; give one column from 0 to 1"),
        ([[1.0, 2.0]], ["a"], ["x", "y"], [0, 1], "marks is \\[0, 1\\]"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, matrix, rows, columns, marks, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        draw_heatmap(matrix, tmp_path / "map.png", "t", rows, columns, "r", "c", marks)
    assert not list(tmp_path.iterdir())
