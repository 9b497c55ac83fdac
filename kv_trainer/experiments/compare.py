"""`kv-trainer compare`: arms x seeds of an experiment, then a report of what differs and whether it holds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..recipe_values import suggest
from ..report import format_duration, print_whole
from .checks import check_arms, idle
from .experiment import Experiment, load_experiment
from .fairness import violations
from .jobs import Job
from .report import write_report
from .results import Study, study_of
from .runner import Runner, alone
from .shared import TAKEN, finished
from .statistics import Comparison, mean
from .words import figure_of, finding_of, p_words, percent


def compare(
    path: str, quick: bool = False, arms: Sequence[str] = (), seeds: Sequence[int] = (), report_only: bool = False,
    runs_from: Sequence[str] = (), console: Console | None = None,
) -> Study:  # fmt: skip
    """Run what is not finished of an experiment, and write its report. Returns what was found.

    arms, seeds: run only these; the arm that all are compared with always runs. The report has all arms that are
    finished. runs_from: besides those of the file. ValueError where runs fail, after the others, or where nothing can
    be reported.
    """
    console = console or Console()
    experiment = load_experiment(path, quick)
    for place in runs_from:
        if not finished(place):
            raise ValueError(f"--runs-from {place}: there is no finished run; give an output_dir, or a runs.zip.")
    experiment.runs_from += runs_from
    experiment.check_launcher()
    chosen = experiment.needed(choose(experiment, arms))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds is {', '.join(map(str, seeds))}; name each seed once.")
    numbers = list(seeds) or (experiment.seeds[: experiment.quick.seeds] if quick else experiment.seeds)
    check_arms(experiment)
    for words in idle(experiment):
        console.print(words, style="yellow", markup=False, highlight=False)
    jobs = [Job(experiment, arm, seed) for seed in numbers for arm in chosen]
    extra = [arm for arm in chosen if arms and arm not in arms]
    if extra:
        console.print(f"also needed: {', '.join(extra)}")
    if report_only:
        found = {(job.arm, job.seed): job.record() for job in jobs}
        records: Mapping[tuple[str, int], Any] = {key: record for key, record in found.items() if record is not None}
        for job in jobs:
            if all(key in records for key in ((job.arm, job.seed), *job.waits_for)):
                job.check_time(records)
    else:
        records = run_all(console, experiment, jobs)
    records = {**records, **others_finished(console, experiment, chosen, numbers, records)}
    known = {arm for arm, _ in records} | set(chosen)
    study = study_of(experiment, [arm for arm in experiment.arms if arm in known], numbers, records)
    folder = Path(experiment.output_dir) / "report"
    write_report(study, folder)
    print_study(console, study, folder)
    return study


def others_finished(
    console: Console, experiment: Experiment, chosen: Sequence[str], seeds: Sequence[int],
    records: Mapping[tuple[str, int], Mapping[str, Any]],
) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Runs of arms that were not asked for now, where all seeds are there: what is tested together is corrected so."""
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for arm in (arm for arm in experiment.arms if arm not in chosen):
        try:
            each = {(arm, seed): Job(experiment, arm, seed).record() for seed in seeds}
        except (ValueError, OSError) as error:
            console.print(f"not in the report: {arm}: {error}", style="yellow", markup=False, highlight=False)
            continue
        if all(record is not None for record in each.values()):
            found.update({key: record for key, record in each.items() if record is not None})
    known = {**found, **records}
    for job in [Job(experiment, arm, seed) for arm, seed in found]:
        try:
            if all(key in known for key in job.waits_for):
                job.check_time(known)
        except ValueError as error:  # what was just run is reported all the same
            console.print(f"not in the report: {job.arm}: {error}", style="yellow", markup=False, highlight=False)
            found = {key: record for key, record in found.items() if key[0] != job.arm}
    return found


def choose(experiment: Experiment, arms: Sequence[str]) -> list[str]:
    for arm in arms:
        if arm not in experiment.arms:
            known = list(experiment.arms)
            raise ValueError(f"{experiment.path} has no arm '{arm}'.{suggest(arm, known)} It has {', '.join(known)}.")
    return list(arms) or experiment.is_quick and experiment.quick.arms or list(experiment.arms)


def run_all(console: Console, experiment: Experiment, jobs: list[Job]) -> Mapping[tuple[str, int], Mapping[str, Any]]:
    """A line a run as it ends. ValueError, after all, where some failed."""
    started, metric = time.monotonic(), experiment.metrics[0]
    width = max(len(job.arm) for job in jobs)
    at_once = f", {experiment.processes} at a time" if experiment.processes > 1 else ""
    console.print(f"{len(jobs)} runs{at_once}, in {experiment.output_dir}", highlight=False)

    def told(job: Job, record: Mapping[str, Any], ran: bool) -> None:
        done, value = len(runner.records), record["metrics"].get(metric)
        what = "no " + metric if value is None else f"{metric} {figure_of(metric, value)}"
        before = f"taken from {record[TAKEN]}" if TAKEN in record else "finished before"
        took = format_duration(record["seconds"]) if ran else before
        line = f"{done:>{len(str(len(jobs)))}}/{len(jobs)}  {job.arm:<{width}}  seed {job.seed}  {what:>18}  {took}"
        console.print(line, markup=False, highlight=False)

    if experiment.clock == "processor" and torch.cuda.is_available():
        console.print("clock: processor does not count the seconds of a GPU; set clock: wall", style="yellow")
    for other in experiment.runs_from:
        if not finished(other):
            console.print(f"runs_from: no finished run in {other}", style="yellow", markup=False, highlight=False)
    with alone(Path(experiment.output_dir)) as lock:
        runner = Runner(experiment, told, lock)
        failed = runner.run(jobs)
    if failed:
        lines = "; ".join(f"{job.arm}-{job.seed}: {error}" for job, error in failed.items())
        raise ValueError(f"{len(failed)} of {len(jobs)} runs failed: {lines}")
    console.print(f"all runs after {format_duration(time.monotonic() - started)}", style="dim", highlight=False)
    return runner.records


def print_study(console: Console, study: Study, folder: Path) -> None:
    """The table of comparisons, what is not fair, and where the report is."""
    metric = study.experiment.metrics[0]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm", no_wrap=True)
    firsts = {arm: study.first(arm) for arm in study.arms}
    others = {one.against for one in firsts.values() if one is not None}
    alike = others <= {study.experiment.against}
    against = f"against {study.experiment.against}" if alike else "difference"
    for title in (metric, against, "95% interval", "p", "verdict"):
        table.add_column(title, justify="left" if title == "verdict" else "right", no_wrap=True)
    if not alike:
        table.add_column("from", no_wrap=True)
    for arm, one in firsts.items():
        row = [arm, figure_of(metric, mean(study.values[arm][metric]))]
        if one is not None:
            row += [*cells(one)] + [one.against] * (not alike)
        table.add_row(*row)
    console.print()
    print_whole(console, table)
    console.print()
    for one in study.judged:
        console.print(f"- {escape(finding_of(study, one))}", highlight=False)
    for finding in study.findings:
        if finding.allowed is not None:
            console.print(f"unequal: {escape(finding.arm)}: {escape(finding.words)} ({escape(finding.allowed)})")
    for finding in violations(study.findings):
        console.print(f"NOT FAIR: {finding.arm}: {finding.words}", style="bold red", markup=False, highlight=False)
    if study.left_out:
        words = f"not in this report: {' and '.join(study.left_out)}"
        console.print(words, style="yellow", markup=False, highlight=False)
    if study.missing:
        console.print(f"not finished: {', '.join(study.missing)}", style="yellow", markup=False, highlight=False)
    if study.experiment.is_quick:
        console.print("a quick run: short, few rows; it shows that all works, not which arm is better", style="yellow")
    for name in ("report.html", "report.md"):
        # soft_wrap: a path must stay one piece to be copied.
        console.print(f"report: {folder / name}", soft_wrap=True, markup=False, highlight=False)


def cells(one: Comparison) -> tuple[str, str, str, str]:
    low, high = (None if x is None else percent(one.metric, x) for x in (one.low, one.high))
    verdict = "unstable" if "unstable" in one.verdict else one.verdict  # all of it is in the findings
    return percent(one.metric, one.difference), "-" if low is None else f"{low} to {high}", p_words(one.p), verdict
