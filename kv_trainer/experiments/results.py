"""The finished runs of an experiment as one table of values: results.json, and what the report and figures read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..callbacks import METRICS_FILE, read_metrics
from ..evaluation import read_predictions
from ..metrics import MACRO
from ..run import PREDICTIONS
from .experiment import Experiment
from .fairness import Finding, Records, check_budget, violations
from .jobs import Job
from .shared import TAKEN
from .statistics import Comparison, bootstrap, compare, interval_over_seeds, lower_is_better, mean

NOT_JUDGED = "not judged"  # of every metric but the first
CONTROL = "control"  # is no candidate
NOT_FAIR = "none: not fair"


@dataclass
class Items:
    """What some runs of one arm found of every test item: [seeds, items] hits and nll, [items] tokens and tasks."""

    hits: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    tasks: np.ndarray

    def value(self, metric: str, seeds: Any, items: Any) -> float:
        """A metric over some seeds and items, each as often as it is named; NaN for one that items do not have."""
        if metric in ("loss", "perplexity"):
            loss = self.nll[seeds][:, items].sum(1) / max(1, self.tokens[items].sum())
            return float((np.exp(loss) if metric == "perplexity" else loss).mean())
        hits, tasks = self.hits[seeds][:, items], self.tasks[items]
        if metric == "accuracy":
            return float(np.nanmean(hits)) if np.isfinite(hits).any() else math.nan
        if metric == MACRO:
            each = [hits[:, tasks == task] for task in np.unique(tasks[tasks != ""])]
            means = [np.nanmean(some) for some in each if np.isfinite(some).any()]  # one without answers has no share
            return float(np.mean(means)) if means else math.nan
        chosen = tasks == metric.removeprefix("accuracy_")
        return float(np.nanmean(hits[:, chosen])) if metric.startswith("accuracy_") and chosen.any() else math.nan

    def strata(self, metric: str) -> list[np.ndarray]:
        """The numbers of the items that a metric is of; of its mean over tasks, those of each task."""
        if metric in ("loss", "perplexity"):
            return [np.arange(len(self.tokens))]
        scored = np.isfinite(self.hits).all(0)
        tasks = np.unique(self.tasks[self.tasks != ""]) if metric == MACRO else [metric.removeprefix("accuracy_")]
        each = [scored if metric == "accuracy" else scored & (self.tasks == task) for task in tasks]
        return [np.flatnonzero(chosen) for chosen in each if metric != MACRO or chosen.any()]


@dataclass
class Study:
    """arms, seeds: those of which every run is there; missing: the runs that are not."""

    experiment: Experiment
    records: Records
    arms: list[str]
    seeds: list[int]
    missing: list[str] = field(default_factory=list)

    @cached_property
    def values(self) -> dict[str, dict[str, list[float]]]:
        """arm -> metric -> one value a seed."""
        found: dict[str, dict[str, list[float]]] = {}
        for arm in self.arms:
            each = [self.records[arm, seed]["metrics"] for seed in self.seeds]
            names = [name for name in each[0] if all(name in one for one in each)]
            found[arm] = {name: [one[name] for one in each] for name in names}
        return found

    @cached_property
    def tasks(self) -> list[str]:
        names = [n for n in self.values[self.arms[0]] if n.startswith("accuracy_") and n != MACRO]
        return sorted(name.removeprefix("accuracy_") for name in names)

    @cached_property
    def findings(self) -> list[Finding]:
        return check_budget(self.experiment, self.arms, self.seeds, self.records)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Of every metric that is asked for; ValueError names one that the runs do not have."""
        found = []
        for metric in self.experiment.metrics:
            for arm in self.arms:
                if metric not in self.values[arm]:
                    known = ", ".join(self.values[arm])
                    raise ValueError(f"metrics names '{metric}', which the runs of {arm} do not have; known: {known}.")
            values = {arm: self.values[arm][metric] for arm in self.arms}
            intervals = partial(self.interval, metric)
            for one in compare(values, self.experiment.pairs(self.arms), metric, self.experiment.verdict, intervals):
                judged = metric == self.experiment.metrics[0]
                found.append(replace(one, verdict=self.verdict_of(one) if judged else NOT_JUDGED))
        return found

    def verdict_of(self, one: Comparison) -> str:
        """By the rule; none of controls, and none of arms that were not given alike."""
        if self.experiment.arms[one.arm].control:
            return CONTROL
        unfair = any(finding.concerns(one.arm, one.against) for finding in violations(self.findings))
        return NOT_FAIR if unfair else one.verdict

    @property
    def judged(self) -> list[Comparison]:
        return [c for c in self.comparisons if c.metric == self.experiment.metrics[0]]

    def first(self, arm: str) -> Comparison | None:
        """Of the judged metric with the arm it is first compared with; None of that one itself."""
        pair = (arm, self.experiment.compared_with(arm))
        return next((one for one in self.judged if (one.arm, one.against) == pair), None)

    @property
    def left_out(self) -> list[str]:
        """What the file has and this study has not, beyond what is missing."""
        arms = [arm for arm in self.experiment.arms if arm not in self.arms]
        seeds = [seed for seed in self.experiment.seeds if seed not in self.seeds]
        found = [f"the arm{'s' * (len(arms) > 1)} {', '.join(arms)}"] if arms else []
        return found + ([f"the seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"] if seeds else [])

    def budget(self, arm: str, name: str) -> float:
        """The mean over seeds of steps, tokens or seconds."""
        return mean([self.records[arm, seed][name] for seed in self.seeds])

    def folder(self, arm: str, seed: int) -> Path:
        return Job(self.experiment, arm, seed).folder

    def metrics(self, arm: str, seed: int) -> list[dict[str, Any]]:
        path = self.folder(arm, seed) / METRICS_FILE
        return read_metrics(path) if path.exists() else []

    def items(self, arm: str) -> Items | None:
        """None where a run has no predictions, or rows of its own."""
        if arm not in self._items:
            paths = [self.folder(arm, seed) / PREDICTIONS for seed in self.seeds]
            self._items[arm] = gather([read_predictions(p) for p in paths]) if all(p.exists() for p in paths) else None
        return self._items[arm]

    _items: dict[str, Items | None] = field(default_factory=dict)

    def interval(self, metric: str, arm: str, against: str) -> tuple[float, float] | None:
        """Of the difference of two arms: over seeds and test items; over seeds alone where items do not have it."""
        ours, theirs = self.items(arm), self.items(against)
        paired = ours is not None and theirs is not None and ours.hits.shape == theirs.hits.shape
        every = np.arange(len(self.seeds))
        if ours is None or theirs is None or not paired or math.isnan(ours.value(metric, every, slice(None))):
            return interval_over_seeds(self.values[arm][metric], self.values[against][metric])

        def difference(seeds: Any, items: Any) -> float:
            return ours.value(metric, seeds, items) - theirs.value(metric, seeds, items)

        return bootstrap(len(self.seeds), ours.strata(metric), difference)

    def ranked(self) -> list[str]:
        """The arms, no controls, the best first: by the judged metric, where that is equal by the others."""

        def score(arm: str) -> list[float]:
            means = {metric: mean(self.values[arm][metric]) for metric in self.experiment.metrics}
            return [-value if lower_is_better(metric) else value for metric, value in means.items()]

        return sorted((a for a in self.arms if not self.experiment.arms[a].control), key=score, reverse=True)

    def machines(self) -> list[str]:
        """What the runs were made on, and from which other experiments some were taken."""
        runs = {f"{arm}-{seed}": self.records[arm, seed] for arm in self.arms for seed in self.seeds}
        places: dict[str, list[str]] = {}
        for run, record in runs.items():
            places.setdefault(place_of(record), []).append(run)
        told = [place if len(places) == 1 else f"{place}: {', '.join(places[place])}" for place in sorted(places)]
        return told + [f"taken from {record[TAKEN]}" for record in runs.values() if TAKEN in record]


def place_of(record: Mapping[str, Any]) -> str:
    """The machine of a run, and by a hash which version of this package it ran."""
    cpu = f", {record['cpu']}" if record.get("cpu") else ""
    return f"{record['machine']}{cpu}" + (f", code {record['code']}" if "code" in record else "")


def gather(runs: list[list[dict[str, Any]]]) -> Items | None:
    numbers = [[row["row"] for row in run] for run in runs]
    if any(one != numbers[0] for one in numbers):
        return None
    column = lambda name: np.array([[row[name] for row in run] for run in runs], dtype=float)  # noqa: E731
    tasks = np.array([row["task"] or "" for row in runs[0]])
    return Items(column("hit"), column("nll"), column("tokens")[0], tasks)


def study_of(experiment: Experiment, arms: list[str], seeds: list[int], records: Records) -> Study:
    """What can be told of the runs that are there. ValueError where `against`, or a seed of all arms, is not."""
    missing = [f"{arm}-{seed}" for arm in arms for seed in seeds if (arm, seed) not in records]
    there = [arm for arm in arms if any((arm, seed) in records for seed in seeds)]
    needs = {arm: {experiment.compared_with(arm), experiment.arms[arm].seconds_of} - {None} for arm in there}
    begun = [arm for arm in there if needs[arm] <= {*there}]
    missing += [f"{arm} (nothing to compare it with)" for arm in there if arm not in begun]
    common = [seed for seed in seeds if all((arm, seed) in records for arm in begun)]
    if experiment.against not in begun or not common:
        raise ValueError(
            f"{experiment.output_dir} has no seed of which every begun arm, {experiment.against} among them, is "
            f"finished; missing: {', '.join(missing)}. Run the experiment without --report-only."
        )
    return Study(experiment, records, begun, common, missing)
