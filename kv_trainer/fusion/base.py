"""What every fusion is: a dataclass whose fields are its knobs, that gives each teacher its share of each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..types import KVStates

MIN_SHARE = 1e-3


@dataclass
class FusionInputs:
    """All that a fusion may look at; what it does not need is None. M teachers, B samples.

    given: [M], the recipe's teacher weights. tokens: [B], supervised *student* tokens of each whole row, before it was
    cut to its longest length, as nll is of the whole row.
    nll: [M, B], each teacher's negative log-likelihood of the supervised text (nats, summed).
    entropy: [M, B], each teacher's mean entropy at the supervised positions, as a share of the largest possible.
    tasks: [B] long, the task of each sample; task_nll: [M, tasks], nats a student token on the calibration rows.
    teachers: every teacher's states at the student's layers and positions; student: the student's own.
    prototypes: one [K, C_m] a teacher. router: the trainable module of this fusion.
    """

    given: Tensor
    tokens: Tensor
    nll: Tensor | None = None
    entropy: Tensor | None = None
    tasks: Tensor | None = None
    task_nll: Tensor | None = None
    teachers: list[KVStates] = field(default_factory=list)
    student: KVStates | None = None
    prototypes: list[Tensor] = field(default_factory=list)
    router: Any = None


@dataclass
class Fusion:
    """Base of all fusions.

    needs: the fields of FusionInputs that `shares` reads, beyond given and tokens. Where they depend on the row alone
    (likelihood, entropy, task), the shares of a row are known before any teacher runs on it again.
    in_target_space: the fusion also looks at the targets themselves, which needs a space that all teachers share:
    `kv_relation`, or `kv` with projector.direction teacher_to_student.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    in_target_space: ClassVar[bool] = False
    source: ClassVar[str] = ""

    def shares(self, inputs: FusionInputs) -> Tensor:
        """[M, B], or [M, L, B] by student layer; they sum to one over the teachers."""
        raise NotImplementedError

    def mixing(self, differences: Tensor, weight: Tensor, keep: int) -> Tensor:
        """How much each teacher counts in each element of a target; broadcastable to `differences`.

        differences: [M, ...], each teacher's target less the student's state, no gradient. weight: [M, ...], the
        shares, broadcastable to it. keep: the axis of samples; what is decided, is decided for each of them.
        """
        return weight

    @property
    def remembered(self) -> bool:
        """Whether the shares of a row are the same in every epoch: a frozen teacher does not change its mind."""
        return self.needs <= {"nll", "entropy", "tasks", "task_nll"}


@dataclass
class Tempered(Fusion):
    """Base of fusions by a softmax. temperature: higher is more even."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"fusion.temperature is {self.temperature}; give a number above 0.")


def check_given(given: Sequence[float]) -> None:
    """ValueError for teacher weights that give no shares."""
    if given and not (all(0 <= weight < math.inf for weight in given) and sum(given) > 0):
        raise ValueError(f"The teachers' weights are {list(given)}; each must be 0 or a number above, and one above 0.")


def teacher_shares(fusion: Fusion, inputs: FusionInputs) -> Tensor:
    """[M, B] or [M, L, B] shares that sum to one over teachers.

    Where a row's shares are remembered, one below MIN_SHARE becomes exactly zero: such a teacher need not run on such a
    sample at all.
    """
    if len(inputs.given) == 1:
        return torch.ones(1, len(inputs.tokens), device=inputs.tokens.device)
    share = fusion.shares(inputs)
    if not fusion.remembered:  # all teachers run anyway, and a trained gate must find back from an extreme
        return share
    share = torch.where(share < MIN_SHARE, 0.0, share)
    return share / share.sum(0)


def to_the_heard(share: Tensor, heard: Tensor) -> Tensor:
    """Shares [M, B] or [M, L, B], what teachers have that say nothing of a sample given to those that do.

    heard: [M, B] bool. Else silence would count as agreement, and a router would learn to prefer it. A sample of which
    no teacher says anything keeps its shares; no loss counts it.
    """
    heard = heard if share.dim() == 2 else heard[:, None]
    left = torch.where(heard, share, 0)
    total = left.sum(0)
    lost = ((share > 0) & ~heard).any(0) & (total > 0)
    return torch.where(lost, left / torch.where(lost, total, 1), share)
