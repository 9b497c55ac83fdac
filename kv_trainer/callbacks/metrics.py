"""metrics.jsonl: every figure of a run, a line a log."""

from __future__ import annotations

import json
import math
import time
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import write_text
from .figures import (
    CROSS_ENTROPY,
    EPOCH_END,
    epoch_means,
    group_names,
    group_rates,
    peak_memory_mb,
    perplexity,
    read_metrics,
    since_epoch_end,
)

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Every log of a run as a line of `output_dir`/metrics.jsonl, written by world process zero alone.

    A line holds step, epoch, time (seconds of training since the start) and all numbers of the log; a number that is
    not finite is null. A training log also has perplexity (exp of the cross-entropy term), a learning rate for each
    kind of parameter group, peak_memory_mb, and, over the steps since the last one and without evaluations and saves:
    samples_per_second and tokens_per_second (supervised; where the trainer counts them), input_tokens_per_second
    (where `include_num_input_tokens_seen` is set). When an epoch ends, a log is asked for, and after it comes a line
    `"event": "epoch_end"` with the mean_ of every loss, of the gradient norm, and the perplexity of the epoch.

    A fresh start empties an older file. A resumed run drops the lines beyond its checkpoint and goes on with the time
    of the last line, so that the curve is that of one run. What is logged before training begins belongs to no run
    and is not written.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.start = 0.0
        self.logged_step = 0  # the step of the newest training log
        self.ending = False  # an epoch has ended whose last steps are still to be logged
        self.epoch_rows: list[tuple[int, dict[str, Any]]] = []  # training logs of this epoch, and the steps of each
        self.groups: list[str] = []  # the name of each parameter group of the optimizer
        self.rates: dict[str, float] = {}
        self.samples: Tensor | float = 0.0
        self.tokens: Tensor | float = 0.0
        self.input_tokens = 0
        self.ended: float | None = None  # when training did: what is logged later took none of its time
        self.busy = self.mark = 0.0  # seconds in steps since the last training log; when the present stretch began

    def count(self, samples: Tensor | float, tokens: Tensor | float | None) -> None:
        """What a step holds, over all ranks: samples and supervised tokens. Does not wait for the device."""
        self.samples = self.samples + samples
        self.tokens = self.tokens + (0.0 if tokens is None else tokens)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Open the file: empty on a fresh start, cut back to the checkpoint on a resumed one."""
        self.logged_step, self.ending, self.epoch_rows = state.global_step, False, []
        self.samples = self.tokens = self.busy = 0.0
        self.ended = None
        self.input_tokens, self.mark = state.num_input_tokens_seen, time.monotonic()
        if not state.is_world_process_zero:
            return
        self.groups = group_names(model, optimizer) if model is not None and optimizer is not None else []
        self.path = Path(args.output_dir or ".") / METRICS_FILE
        resumed = state.global_step > 0 and self.path.exists()
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step] if resumed else []
        self.epoch_rows = since_epoch_end(kept)
        self.start = time.monotonic() - (kept[-1].get("time") or 0.0 if kept else 0.0)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """The rates that this step uses; when it is logged, the schedule has already moved on."""
        if self.groups:
            self.rates = group_rates(self.groups, optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log before a checkpoint: a run that goes on from it knows nothing of the steps since the last."""
        self._lap()
        if control.should_save and args.logging_strategy != "no" and state.global_step != self.logged_step:
            control.should_log = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.mark = time.monotonic()

    on_save = on_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line, and after the last of an epoch its means."""
        if not logs:
            return
        training, steps = "loss" in logs, state.global_step - self.logged_step
        if training:
            self.logged_step = state.global_step
        if self.path is None or not state.is_world_process_zero:
            return
        row = {name: float(value) for name, value in logs.items() if isinstance(value, Real)}
        if training:
            row |= self.rates | self._throughput(state) | {"peak_memory_mb": peak_memory_mb()}
            if CROSS_ENTROPY in row:
                row["perplexity"] = perplexity(row[CROSS_ENTROPY])
            self.epoch_rows.append((steps, row))
        self._write(state, row)
        if training and self.ending:
            self._end_epoch(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a log of the steps since the last one, so that the means are of the whole epoch and of no other."""
        if state.global_step == self.logged_step:
            self._end_epoch(state)
        elif args.logging_strategy != "no":
            self.ending = control.should_log = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ended = time.monotonic()

    def _end_epoch(self, state: TrainerState) -> None:
        self.ending, rows, self.epoch_rows = False, self.epoch_rows, []
        if self.path is not None and state.is_world_process_zero and rows:
            self._write(state, epoch_means(rows), EPOCH_END)

    def _lap(self) -> None:
        now = time.monotonic()
        self.busy, self.mark = self.busy + now - self.mark, now

    def _throughput(self, state: TrainerState) -> dict[str, float]:
        self._lap()  # with the wait for the device that a log means
        seen = state.num_input_tokens_seen - self.input_tokens
        counts = {"samples": float(self.samples), "tokens": float(self.tokens), "input_tokens": float(seen)}
        found = {f"{name}_per_second": n / self.busy for name, n in counts.items() if n > 0 and self.busy > 0}
        self.samples = self.tokens = self.busy = 0.0
        self.input_tokens = state.num_input_tokens_seen
        return found

    def _write(self, state: TrainerState, numbers: dict[str, float], event: str | None = None) -> None:
        assert self.path is not None
        elapsed = round((self.ended or time.monotonic()) - self.start, 3)
        row: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch, "time": elapsed}
        row |= {"event": event} if event else {}
        # Strict readers of JSON know no NaN.
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
