"""What is shown and written while training: a bar with the loss terms, and a file with every figure."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

METRICS_FILE = "metrics.jsonl"
SHORT_NAMES = {"cross_entropy": "ce", "learning_rate": "lr"}
# Said already by the bar, or by the table at the end.
UNSHOWN = ("total_flos", "epoch", "_runtime", "_per_second")


def format_metric(name: str, value: Any) -> str:
    """`accuracy_chain 45.2%`, `lr 1e-3`, `kv_relation 0.421`."""
    label = SHORT_NAMES.get(name, name)
    if name.startswith("accuracy"):
        return f"{label} {value:.1%}"
    if name == "learning_rate" and value:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{label} {mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{label} {value:.3g}"


def training_line(logs: dict[str, Any]) -> str:
    """A training log as the bar shows it: `loss 1.23 ce 0.61 kv_relation 0.42 lr 1e-3`."""
    terms = {name.removeprefix("loss_"): value for name, value in logs.items() if name.startswith("loss_")}
    shown = {"loss": logs.get("loss"), **terms, "learning_rate": logs.get("learning_rate")}
    return " ".join(format_metric(name, value) for name, value in shown.items() if isinstance(value, Real))


def metrics_line(logs: dict[str, Any]) -> str:
    """Any other log on one line: `loss 1.23, perplexity 3.42, accuracy 45.2%`."""
    shown = {name: value for name, value in logs.items() if not name.endswith(UNSHOWN) and isinstance(value, Real)}
    return ", ".join(format_metric(name.removeprefix("eval_"), value) for name, value in shown.items())


class LossTermsProgress(ProgressCallback):
    """The Trainer's progress bar, with the newest loss terms on it instead of a printed dict a log.

    It takes the place of `ProgressCallback`, which the Trainer must not hold as well.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Training logs move the postfix; all others are a line above the bar."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(training_line(logs))
        elif line := metrics_line(logs):
            title = "evaluation" if any(name.startswith("eval_") for name in logs) else "training"
            # As the base class: on stdout, where it survives the bar.
            tqdm.write(f"step {state.global_step} {title}: {line}", file=sys.stdout)


class MetricsFile(TrainerCallback):
    """Every log of a run as a line of `output_dir`/metrics.jsonl, written by world process zero alone.

    A line holds step, epoch, time (seconds of training since the start) and all numbers of the log; a number that
    is not finite is null. A fresh start empties an older file. A resumed run drops the lines beyond its checkpoint
    and goes on with the time of the last line, so that the curve is that of one run. What is logged before
    training begins belongs to no run and is not written.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the file: empty on a fresh start, cut back to the checkpoint on a resumed one."""
        if not state.is_world_process_zero:
            return
        self.path = Path(args.output_dir or ".") / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        resumed = state.global_step > 0 and self.path.exists()
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step] if resumed else []
        self.start = time.monotonic() - (kept[-1].get("time") or 0.0 if kept else 0.0)
        temporary = self.path.with_name(f".{METRICS_FILE}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if self.path is None or not state.is_world_process_zero or not logs:
            return
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, Real)}
        elapsed = round(time.monotonic() - self.start, 3)
        row: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch, "time": elapsed}
        # Strict readers of JSON know no NaN.
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. One that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def peak_memory_mb() -> float:
    """The most memory this process has held, in MiB: on its GPU where it has one, else in RAM.

    NaN where the system does not say (Windows without a GPU).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB
