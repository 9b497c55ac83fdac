"""Accumulated micro-batches that grow over the run, such as 1, then 2, then 4 a step.

The Trainer reads `args.gradient_accumulation_steps` anew for every step, so a change between two steps holds at once;
the losses divide by the counts of the batches that a step really has, so every step is exact. Three things do not
follow by themselves, and are worked out here in advance from the length of the data:
- A step ends where the number of micro-batches since the epoch began is a multiple of the setting. A change therefore
  waits for the next such place, fewer than `steps` steps away.
- The Trainer takes the number of steps in a run, and of epochs in `max_steps`, from one setting: the schedule of the
  learning rate would not end with the run. `GrowingAccumulation.run_values` corrects them.
- A resumed run finds its place in the data the same way. `GrowingAccumulation.position` corrects it.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..arguments import AccumulationConfig
from .progress import announce

RunValues = tuple[Any, ...]  # what Trainer.set_initial_training_values returns


def walk(config: AccumulationConfig, batches: int, max_steps: int, epochs: float) -> Iterator[tuple[int, int, int]]:
    """Every step of a run: its epoch, the micro-batches of the epoch before it, and the accumulation setting in it.

    batches: micro-batches an epoch. The run ends after max_steps if that is positive, else after `epochs`; shares are
    of whichever it is.
    """
    step, epoch, done, setting = 0, 0, 0, config.steps[0]
    while step < max_steps if max_steps > 0 else epoch * batches + done < epochs * batches:
        share = step / max_steps if max_steps > 0 else (epoch * batches + done) / (epochs * batches)
        wanted = config.steps[bisect_right(config.at, share + 1e-9) - 1]
        if done % wanted == 0:
            setting = wanted
        yield epoch, done, setting
        step, done = step + 1, done + setting
        if done >= batches:
            epoch, done = epoch + 1, 0


class GrowingAccumulation(TrainerCallback):
    """Carries out the `accumulation` section. A trainer that holds it passes two of its results through it:

        def set_initial_training_values(self, args, dataloader):
            return growth.run_values(args, super().set_initial_training_values(args, dataloader))

        def _init_training_state(self, *args, **kwargs):
            super()._init_training_state(*args, **kwargs)
            return growth.position(self.state.global_step)

    What holds at a step follows from the step alone, so a resumed run needs no memory.
    """

    def __init__(self, config: AccumulationConfig) -> None:
        self.config = config
        self._plan: list[tuple[int, int, int]] = []

    def run_values(self, args: TrainingArguments, values: RunValues) -> RunValues:
        """The Trainer's numbers of a run, made right for a growing setting; sets the first setting.

        ValueError for data without a length, a resumed run that would not skip what it has seen, and DeepSpeed, which
        fixes the setting when it starts.
        """
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError("accumulation does not work with DeepSpeed; set training.gradient_accumulation_steps.")
        if args.ignore_data_skip:
            raise ValueError(
                "accumulation needs a resumed run to find its place; set training.ignore_data_skip: false."
            )
        epochs, _, examples, _, total_batch, batches, _ = values
        if epochs == sys.maxsize or batches is None:
            raise ValueError("accumulation needs training data with a length; this data set streams.")
        micro_batch = total_batch // args.gradient_accumulation_steps
        args.gradient_accumulation_steps = smallest = self.config.steps[0]
        self._plan = list(walk(self.config, batches, args.max_steps, args.num_train_epochs))
        steps_in_epoch = -(-batches // smallest)  # the most there can be; the loop ends an epoch where its data ends
        samples = sum(min(setting, batches - done) for _, done, setting in self._plan) * micro_batch
        return (
            self._plan[-1][0] + 1, steps_in_epoch, examples, samples, micro_batch * smallest, batches, len(self._plan),
        )  # fmt: skip

    def position(self, step: int) -> tuple[int, int]:
        """Whole epochs, and micro-batches of the next, that the first `step` steps took."""
        if step >= len(self._plan):
            return self._plan[-1][0] + 1, 0
        return self._plan[step][:2]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._plan, "the trainer must call run_values"
        self._set(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set(args, state)

    def _set(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.global_step >= len(self._plan):
            return
        setting = self._plan[state.global_step][2]
        if setting != args.gradient_accumulation_steps:
            args.gradient_accumulation_steps = setting
            announce(state, f"accumulation: {setting} micro-batches a step")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.gradient_accumulation_steps = self.config.steps[0]
