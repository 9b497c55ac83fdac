"""When each run first had the training loss at which the arm that all are compared with ended."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..callbacks.figures import CROSS_ENTROPY
from .results import Study
from .statistics import mean

WINDOW = 5  # logs whose mean is taken as the loss; fewer in a short run


@dataclass
class Reached:
    """target: one loss a seed. each: arm -> "steps" and "seconds" -> one value a seed, None where it never was."""

    target: list[float]
    each: dict[str, dict[str, list[float | None]]]

    def means(self, unit: str) -> dict[str, float | None]:
        """Over seeds; None for an arm of which any seed never reached it."""
        found: dict[str, float | None] = {}
        for arm, values in self.each.items():
            known = [value for value in values[unit] if value is not None]
            found[arm] = mean(known) if len(known) == len(values[unit]) else None
        return found


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of a metrics file."""
    points = {row["step"]: float(row[name]) for row in rows if isinstance(row.get(name), (int, float))}
    return list(points), list(points.values())


def trailing(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, of at most WINDOW and a tenth of all."""
    width = max(1, min(WINDOW, len(values) // 10))
    windows = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def seconds_at(clock: Sequence[float], steps: Sequence[int]) -> list[float]:
    """Seconds of training after so many steps. clock: after each."""
    return [clock[min(step, len(clock)) - 1] if clock and step else 0.0 for step in steps]


def reached(study: Study) -> Reached | None:
    """None where a run logged no loss."""
    curves = {}
    for arm in study.arms:
        for seed in study.seeds:
            steps, values = series(study.metrics(arm, seed), CROSS_ENTROPY)
            if not values:
                return None
            curves[arm, seed] = steps, trailing(values)
    target = [curves[study.experiment.against, seed][1][-1] for seed in study.seeds]
    each: dict[str, dict[str, list[float | None]]] = {arm: {"steps": [], "seconds": []} for arm in study.arms}
    for arm in study.arms:
        for seed, goal in zip(study.seeds, target, strict=True):
            steps, values = curves[arm, seed]
            first = next((step for step, value in zip(steps, values, strict=True) if value <= goal), None)
            clock = study.records[arm, seed]["clock"]
            each[arm]["steps"].append(first)
            each[arm]["seconds"].append(None if first is None else seconds_at(clock, [first])[0])
    return Reached(target, each)


def at(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """The value at x of a line through points, flat beyond them."""
    i = bisect.bisect_left(xs, x)
    if i == 0 or i == len(xs):
        return ys[min(i, len(xs) - 1)]
    share = (x - xs[i - 1]) / ((xs[i] - xs[i - 1]) or 1.0)
    return ys[i - 1] + share * (ys[i] - ys[i - 1])
