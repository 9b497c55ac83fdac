"""The runs of an experiment carried out, several at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .experiment import Experiment
from .jobs import LOG, Job, equal_steps
from .shared import take_finished


class RunFailed(ValueError):
    """A run ended with an error."""


@contextmanager
def alone(folder: Path) -> Iterator[tuple[int, ...]]:
    """Inside the block no other experiment runs in `folder`; ValueError if one does. Windows has no such lock.

    Yields the lock, as file descriptors for the runs to keep: whatever becomes of this process, none of them is joined
    by another of the same folder while it lives.
    """
    try:
        import fcntl
    except ImportError:
        yield ()
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"Another experiment, or a run of one that was killed, is still at work in {folder}; wait for it, stop "
                "its `python -m kv_trainer.experiments.arm`, or give another output_dir."
            ) from None
        yield (lock.fileno(),)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside the block a closed terminal, or `kill`, ends this process as Ctrl-C does: its runs are its to stop."""
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@dataclass
class Runner:
    """Runs jobs, `processes` at a time, each in a process of its own.

    told: job, its record, whether it ran now. kept: file descriptors that every run keeps open.
    """

    experiment: Experiment
    told: Callable[[Job, Mapping[str, Any], bool], None]
    kept: tuple[int, ...] = ()
    records: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    failed: dict[Job, Exception] = field(default_factory=dict)
    _queue: list[Job] = field(default_factory=list)
    _running: dict[Job, subprocess.Popen] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stopped: bool = False

    def run(self, jobs: list[Job]) -> dict[Job, Exception]:
        """All jobs, those that wait for others as soon as these have ended. Returns what failed, and why.

        Whatever stops this, such as Ctrl-C, stops the runs too; they begin anew, or go on from their last checkpoint,
        when the experiment is run again.
        """
        self._queue = list(jobs)
        with ended_by_signals(), ThreadPoolExecutor(self.experiment.processes) as pool:
            workers = [pool.submit(self._work, number) for number in range(self.experiment.processes)]
            try:
                for worker in workers:
                    worker.result()
            except BaseException:
                self.stop()
                raise
        return self.failed

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            for process in self._running.values():
                with suppress(ProcessLookupError):  # it has just ended by itself
                    if hasattr(os, "killpg"):
                        os.killpg(process.pid, signal.SIGTERM)
                    else:
                        process.terminate()
            self._changed.notify_all()

    def _work(self, number: int) -> None:
        while (job := self._next()) is not None:
            error: Exception | None = None
            try:
                self._one(job, number)
            except (ValueError, OSError) as found:
                error = found
            except BaseException:
                self.stop()  # else the other workers would wait for this job
                raise
            with self._changed:
                self.failed |= {} if error is None else {job: error}
                self._changed.notify_all()

    def _next(self) -> Job | None:
        """The first job that waits for no other; None when there is none left."""
        with self._changed:
            while self._queue and not self._stopped:
                ended = {*self.records, *((job.arm, job.seed) for job in self.failed)}
                ready = next((job for job in self._queue if all(n in ended for n in job.waits_for)), None)
                if ready is not None:
                    self._queue.remove(ready)
                    return ready
                self._changed.wait()
        return None

    def _one(self, job: Job, number: int) -> None:
        without = [f"{arm}-{seed}" for arm, seed in job.waits_for if (arm, seed) not in self.records]
        if without:
            raise RunFailed(f"it waits for {without[0]}, which failed")
        record = job.record()
        if record is None and take_finished(job):
            record = job.record()
        ran = record is None
        if record is None:
            record = self._start(job, equal_steps(job, self.records), number)
        job.check_time({**self.records, (job.arm, job.seed): record})
        with self._changed:
            self.records[job.arm, job.seed] = record
            self.told(job, record, ran)

    def _start(self, job: Job, steps: int | None, number: int) -> dict[str, Any]:
        job.folder.mkdir(parents=True, exist_ok=True)
        launcher = self.experiment.launcher or [sys.executable]
        command = [*launcher, "-m", "kv_trainer.experiments.arm", self.experiment.recipe, *job.overrides(steps)]
        with (job.folder / LOG).open("w", encoding="utf-8") as log:
            with self._changed:
                if self._stopped:
                    raise RunFailed("stopped")
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    env=self._environment(number, job), pass_fds=self.kept,
                    start_new_session=True,  # Ctrl-C comes to this process alone, which then ends the others whole
                )  # fmt: skip
                self._running[job] = process
            try:
                code = process.wait()
            finally:
                with self._changed:
                    del self._running[job]
        record = job.record() if code == 0 else None
        if record is None:
            lines = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
            raise RunFailed(f"{last} (exit status {code}; see {job.folder / LOG})")
        return record

    def _environment(self, number: int, job: Job) -> dict[str, str]:
        """Runs beside each other share cores and GPUs: more threads than cores slow all of them down, and of all GPUs
        that it sees a run would take the first. One whose teachers are spread over devices by name sees them all.
        """
        found = dict(os.environ)
        if self.experiment.processes == 1:
            return found
        threads = max(1, (os.cpu_count() or 1) // self.experiment.processes)
        found.setdefault("OMP_NUM_THREADS", str(threads))
        if not job.spread and (gpus := visible_gpus()):
            found["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        return found


def visible_gpus() -> list[str]:
    """By the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]
