"""The runs of an experiment: which command each is, whether it is finished, and several of them at a time."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..manifest import differences
from ..recipe_tree import RecipeError
from ..recipes import dump_recipe, load_recipe
from .experiment import Experiment

RECORD = "arm.json"
LOG = "log.txt"


class RunFailed(ValueError):
    """A run ended with an error."""


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed."""

    experiment: Experiment
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.experiment.output_dir) / f"{self.arm}-{self.seed}"

    def overrides(self, max_steps: int | None = None) -> list[str]:
        """What the command line of this run has behind the recipe."""
        settings = self.experiment.settings(self.arm)
        settings |= {} if max_steps is None else {"training.max_steps": max_steps}
        settings |= {"training.seed": self.seed, "training.output_dir": self.folder.as_posix()}
        words = [word for key, value in settings.items() for word in (f"--{key}", as_word(value))]
        return (["--quick"] if self.experiment.is_quick else []) + words

    def recipe_text(self, max_steps: int | None = None) -> str:
        """The recipe of this run as it is resolved. RecipeError names the arm."""
        words = [word for word in self.overrides(max_steps) if word != "--quick"]
        arm = self.experiment.arms[self.arm]
        try:
            return dump_recipe(load_recipe(self.experiment.recipe, words, self.experiment.is_quick))
        except RecipeError as error:
            raise RecipeError(f"arms.{self.arm} {arm.where}: {error}") from error

    def record(self) -> dict[str, Any] | None:
        """What the finished run left; None where it is not finished. ValueError if it is of other settings."""
        path = self.folder / RECORD
        if not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        steps = record["steps"] if self.experiment.arms[self.arm].seconds_of else None
        saved = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8"))
        found = differences(saved, yaml.safe_load(self.recipe_text(steps)))
        if found:
            raise ValueError(
                f"{self.folder} holds a finished run of other settings: {'; '.join(found)}. Remove it to run it again, "
                "or give another output_dir."
            )
        return record

    def shown(self, record: Mapping[str, Any]) -> str:
        """The command that makes this run again, without this experiment."""
        launcher = self.experiment.launcher
        start = [*launcher, "-m", "kv_trainer", "train"] if launcher else ["kv-trainer", "train"]
        steps = record["steps"] if self.experiment.arms[self.arm].seconds_of else None
        threads = [f"OMP_NUM_THREADS={record['threads']}"] if record.get("threads") else []
        return " ".join([*threads, shlex.join([*start, self.experiment.recipe, *self.overrides(steps)])])


def as_word(value: Any) -> str:
    """A setting's value as the command line takes it: YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def equal_steps(job: Job, records: Mapping[tuple[str, int], Mapping[str, Any]]) -> int | None:
    """How many steps of `like` take as long as `seconds_of` did, with the same seed; None for other arms."""
    arm = job.experiment.arms[job.arm]
    if arm.seconds_of is None:
        return None
    pace, other = records[str(arm.like), job.seed], records[arm.seconds_of, job.seed]
    return max(1, round(other["seconds"] / (pace["seconds"] / pace["steps"])))


@dataclass
class Runner:
    """Runs jobs, `processes` at a time, each in a process of its own. told: job, its record, whether it ran now."""

    experiment: Experiment
    told: Callable[[Job, Mapping[str, Any], bool], None]
    records: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    _running: dict[str, subprocess.Popen] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def run(self, jobs: list[Job]) -> dict[Job, Exception]:
        """All jobs, in order; those that depend on others come behind them. Returns what failed, and why.

        Whatever stops this, such as Ctrl-C, stops the runs too; they begin anew, or go on from their last checkpoint,
        when the experiment is run again.
        """
        pool = ThreadPoolExecutor(self.experiment.processes)
        waiting: dict[tuple[str, int], Future] = {}
        failed: dict[Job, Exception] = {}
        try:
            for job in jobs:
                waiting[job.arm, job.seed] = pool.submit(self._one, job, waiting)
            for job in jobs:
                try:
                    waiting[job.arm, job.seed].result()
                except (ValueError, OSError) as error:
                    failed[job] = error
        except BaseException:
            self.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return failed

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running.values():
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGTERM)
                else:
                    process.terminate()

    def _one(self, job: Job, waiting: Mapping[tuple[str, int], Future]) -> None:
        arm = job.experiment.arms[job.arm]
        for other in (arm.like, arm.seconds_of) if arm.seconds_of else ():  # ahead in the queue, so they have begun
            try:
                waiting[str(other), job.seed].result()
            except (ValueError, OSError) as error:
                raise RunFailed(f"it waits for {other}-{job.seed}, which failed") from error
        record = job.record()
        ran = record is None
        if record is None:
            record = self._start(job, equal_steps(job, self.records))
        self.records[job.arm, job.seed] = record
        self.told(job, record, ran)

    def _start(self, job: Job, steps: int | None) -> dict[str, Any]:
        job.folder.mkdir(parents=True, exist_ok=True)
        launcher = self.experiment.launcher or [sys.executable]
        command = [*launcher, "-m", "kv_trainer.experiments.arm", self.experiment.recipe, *job.overrides(steps)]
        with (job.folder / LOG).open("w", encoding="utf-8") as log:
            with self._lock:
                if self._stopped:
                    raise RunFailed("stopped")
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environment(),
                    start_new_session=True,  # Ctrl-C comes to this process alone, which then ends the others whole
                )  # fmt: skip
                self._running[str(job.folder)] = process
            try:
                code = process.wait()
            finally:
                with self._lock:
                    del self._running[str(job.folder)]
        record = job.record() if code == 0 else None
        if record is None:
            lines = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
            raise RunFailed(f"{last} (exit status {code}; see {job.folder / LOG})")
        return record

    def _environment(self) -> dict[str, str]:
        """Runs beside each other share the cores: more threads than cores slow all of them down."""
        if self.experiment.processes == 1 or "OMP_NUM_THREADS" in os.environ:
            return dict(os.environ)
        threads = max(1, (os.cpu_count() or 1) // self.experiment.processes)
        return {**os.environ, "OMP_NUM_THREADS": str(threads)}
