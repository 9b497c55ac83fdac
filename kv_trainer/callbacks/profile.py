"""`kv-trainer train --profile`: what each part of a step takes, told when training ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import profiling
from ..files import write_text

PROFILE_FILE = "profile.json"
WARM_STEPS = 3  # first steps, in which memory is claimed and kernels are chosen, do not count
REST = "everything else (logging, saving, evaluation)"


class ProfileSteps(TrainerCallback):
    """Profiles all steps but the first, prints a table and writes `output_dir`/profile.json, on world process zero.

    Parts: data (loading and collation), each teacher's forward pass, its scores and importance, alignment, the
    student's forward pass, capture, fusion, every loss, backward, optimizer. A part's time does not include that of
    parts within it.
    """

    def __init__(self) -> None:
        self.profile = profiling.Profile()
        self.steps = 0
        self._counting = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.steps += 1
        if not self._counting and self.steps > min(WARM_STEPS, state.max_steps - 1):
            self._counting, self.steps = True, 1
            self.profile = profiling.Profile(args.device)
            profiling.start(self.profile)
            self.profile.begin(REST)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._counting:
            self.profile.begin("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._counting:
            self.profile.end()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if not self._counting:
            return
        self.profile.end()
        profiling.start(None)
        self._counting = False
        if state.is_world_process_zero:
            each = {name: seconds / self.steps for name, seconds in self.profile.seconds.items()}
            found = {"steps": self.steps, "seconds_per_step": each}
            write_text(Path(str(args.output_dir)) / PROFILE_FILE, json.dumps(found, indent=2) + "\n")
            print_profile(Console(), each, self.steps)


def print_profile(console: Console, seconds: dict[str, float], steps: int) -> None:
    """seconds: of each part, a step. The largest part comes first."""
    total = sum(seconds.values())
    title = f"{1000 * total:.1f} ms a step, mean of {steps} steps"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("part")
    table.add_column("ms a step", justify="right")
    table.add_column("share", justify="right")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{1000 * value:.2f}", f"{value / total:.1%}")
    console.print(table)
