"""What happens around the steps: controls, freezing, stopping, accumulation, monitoring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ControlConfig:
    """Controls that break the teacher on purpose, so that a gain can be told from an accident."""

    shuffle: Literal["rows", "rows_of_task", "positions"] | None = field(
        default=None,
        metadata={
            "help": "Every row gets the teacher states of another row (of its task), or position of another one."
        },
    )


@dataclass
class FreezeConfig:
    """Which trainable parameters rest for a part of the run (see callbacks/freezing.py); by default none does.

    What `student.freeze` or PEFT froze is never unfrozen.
    """

    attention: bool = field(default=False, metadata={"help": "The student's attention modules rest at first."})
    until_step: int | None = field(default=None, metadata={"help": "attention: the step at which they begin to move."})
    layer_groups: int | None = field(default=None, metadata={"help": "Unfreeze the layers group by group."})
    unfreeze_every: int | None = field(default=None, metadata={"help": "layer_groups: steps from group to group."})
    order: Literal["top_down", "bottom_up"] = "top_down"
    projectors_after: int | None = field(default=None, metadata={"help": "From this step on, kv_bridge rests."})

    def __post_init__(self) -> None:
        for name in ("until_step", "layer_groups", "unfreeze_every", "projectors_after"):
            value, least = getattr(self, name), 2 if name == "layer_groups" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; give {least} or more, or null.")
        if self.attention != (self.until_step is not None):
            raise ValueError("attention and until_step need each other; give both (attention: true), or neither.")
        if (self.layer_groups is None) != (self.unfreeze_every is None):
            raise ValueError("layer_groups and unfreeze_every need each other; give both, or neither.")
        if self.order != "top_down" and self.layer_groups is None:
            raise ValueError(f"order is {self.order}, which has no effect without layer_groups; leave it out.")


@dataclass
class EarlyStoppingConfig:
    """Stop after `patience` evaluations in a row without a gain of more than `threshold`; by default never."""

    patience: int | None = field(default=None, metadata={"help": "Evaluations without a gain; null for no stopping."})
    threshold: float = field(default=0.0, metadata={"help": "Of training.metric_for_best_model, default eval_loss."})

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; give 1 or more evaluations, or null.")
        if self.threshold < 0:
            raise ValueError(f"threshold is {self.threshold}; it must not be negative.")
        if self.threshold and self.patience is None:
            raise ValueError(f"threshold is {self.threshold}, which has no effect without patience; give both.")


@dataclass
class AccumulationConfig:
    """Accumulated micro-batches that grow over the run (see callbacks/accumulation.py); by default they do not."""

    steps: list[int] = field(default_factory=list, metadata={"help": "Micro-batches a step, such as [1, 2, 4]."})
    at: list[float] = field(default_factory=list, metadata={"help": "Share of the run where each begins, from 0."})

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.at):
            raise ValueError(f"steps is {self.steps} and at is {self.at}; give as many of one as of the other.")
        if any(a >= b for a, b in zip(self.steps, self.steps[1:])) or min(self.steps, default=1) < 1:
            raise ValueError(f"steps is {self.steps}; give numbers that grow, from 1 or more.")
        shares = [*self.at, 1.0]
        if any(a >= b for a, b in zip(shares, shares[1:])) or self.at and self.at[0] != 0:
            raise ValueError(f"at is {self.at}; give shares of the run that grow, the first 0, all below 1.")


@dataclass
class MonitorConfig:
    """What is measured while training, beyond the loss terms."""

    loss_scales_every: int = field(
        default=0, metadata={"help": "Log every term's share of the gradient each so many steps; 0 = never."}
    )

    def __post_init__(self) -> None:
        if self.loss_scales_every < 0:
            raise ValueError(f"loss_scales_every is {self.loss_scales_every}; give a number of steps, or 0 for never.")
