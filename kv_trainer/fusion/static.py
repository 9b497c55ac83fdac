"""Shares that no sample's content decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Fusion, FusionInputs, Tempered


@dataclass
class Uniform(Fusion):
    """Every teacher counts alike in every sample."""

    def shares(self, inputs: FusionInputs) -> Tensor:
        teachers, samples = len(inputs.given), len(inputs.tokens)
        return torch.full((teachers, samples), 1 / teachers, device=inputs.tokens.device)


@dataclass
class Fixed(Fusion):
    """Each teacher counts as much as `teachers.NAME.weight` says, the same in every sample."""

    def shares(self, inputs: FusionInputs) -> Tensor:
        return (inputs.given / inputs.given.sum())[:, None].expand(-1, len(inputs.tokens))


@dataclass
class TaskWise(Tempered):
    """Softmax over teachers of -CE_m / temperature, task by task: how well each teacher knows the sample's task.

    CE_m is measured before training on `samples` training rows of each task, in nats a *student* token. Rows need a
    task (the `task` column, or data.task).
    Source: this package's; the sample-wise form is CA-MKD, arXiv 2201.00007.
    """

    samples: int = 32

    needs: ClassVar[frozenset[str]] = frozenset({"tasks", "task_nll"})
    source: ClassVar[str] = "this package"

    def shares(self, inputs: FusionInputs) -> Tensor:
        assert inputs.tasks is not None and inputs.task_nll is not None
        share = torch.softmax(-inputs.task_nll / self.temperature, dim=0)[:, inputs.tasks.clamp_min(0)]
        return torch.where(inputs.tasks < 0, 1 / len(share), share)  # a row without a task
