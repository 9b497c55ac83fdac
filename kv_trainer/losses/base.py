"""What every loss is: a dataclass whose fields are its knobs, called on one micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..types import KVStates

if TYPE_CHECKING:
    from ..alignment.heads import TeacherProjectors


@dataclass
class LossInputs:
    """All that a loss may look at. What no loss requires is None.

    logits: [B, T, vocabulary]; labels: [B, T], -100 where not supervised.
    student: its KVStates, keys [B, Hs, T, Ds] with gradient, one a student layer.
    teachers: name -> KVStates already at the student's layers and positions, [B, Ht, T, Dt], mask [B, T].
    weights: [M, B], share of each teacher in each sample, summing to one over M.
    projectors: name -> the teacher's trainable maps; empty where no loss needs them.
    step, progress: optimizer steps done, and their share of the run (0 to 1).
    student_hidden: L + 1 tensors [B, T, C] with gradient: the embeddings, then the output of every student layer.
    teacher_hidden: name -> as many tensors [B, T, Ct], at the student's layers and positions, mask teachers[name].mask.
    hidden_projectors: name -> L + 1 trainable maps from the student's width to the teacher's (identity where equal).
    answer_positions: [B] long, the position whose logits predict the first token of the answer, -1 where unknown.
    teacher_logits: name -> what the teacher predicts after each student position.
    importance: "student" and/or "teacher" -> [B, T], attention mass that the answer pays to each position, no gradient.
    attention: "student" -> and each teacher's name -> per student layer (queries, keys), [B, Hq, T, D], [B, H, T, D],
    after RoPE, queries times the attention's scaling; a teacher's at the student's positions, without gradient.
    num_tokens, num_samples: supervised tokens and samples in the whole accumulated batch, over all ranks. Every
    loss divides by one of them, so a step is the same however it is cut into micro-batches.
    """

    labels: Tensor
    num_tokens: Tensor | float
    num_samples: Tensor | float
    logits: Tensor | None = None
    student: KVStates | None = None
    teachers: dict[str, KVStates] = field(default_factory=dict)
    weights: Tensor | None = None
    projectors: dict[str, TeacherProjectors] = field(default_factory=dict)
    step: int = 0
    progress: float = 0.0
    student_hidden: tuple[Tensor, ...] | None = None
    teacher_hidden: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    hidden_projectors: dict[str, nn.ModuleList] = field(default_factory=dict)
    answer_positions: Tensor | None = None
    teacher_logits: dict[str, TeacherLogits] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, tuple[tuple[Tensor, Tensor], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's next-token predictions, made a few positions at a time: never a full [B, T, V] tensor.

    hidden: [B, T, Ct], the teacher's last hidden states at the student's positions, no gradient.
    head: [n, Ct] -> [n, V_teacher], the teacher's own head with all that follows it (scaling, soft cap).
    student_ids, teacher_ids: [V_shared] long, the tokens that both vocabularies hold; None where they are the same.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    student_ids: Tensor | None = None
    teacher_ids: Tensor | None = None


@dataclass
class DistillationLoss:
    """Base of all losses.

    weight: factor of the term in the total.
    schedule: how the weight moves over the run: constant, or decaying to zero at its end (linear | cosine).
    warmup_ratio: share of the run over which the weight first rises from zero.
    """

    weight: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = 0.0

    requires: ClassVar[frozenset[str]] = frozenset()
    source: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight is {self.weight}; a loss weight must not be negative.")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; give a share of the run between 0 and 1.")

    @property
    def needs(self) -> frozenset[str]:
        """What this loss, with these knobs, looks at; what no loss needs is never computed."""
        return self.requires

    def weight_at(self, progress: float) -> float:
        """The weight when `progress` (0 to 1) of the optimizer steps are done."""
        rise = min(1.0, progress / self.warmup_ratio) if self.warmup_ratio else 1.0
        fall = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
        return self.weight * rise * fall[self.schedule]

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The raw, unweighted term, a scalar."""
        raise NotImplementedError


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Mean of `x` over `dim` where `mask` (broadcast to x) holds; 0 where it holds nowhere."""
    mask = mask.to(x.dtype).expand_as(x)
    return (x * mask).sum(dim) / mask.sum(dim).clamp_min(1)


def heard(inputs: LossInputs) -> Tensor:
    """[M, B, T] bool, where each teacher counts. One with next to no share has no say in which positions do."""
    assert inputs.weights is not None
    return torch.stack([t.mask for t in inputs.teachers.values()]) & (inputs.weights > 1e-6)[:, :, None]


def stacked(states: KVStates, parts: tuple[str, ...]) -> Tensor:
    """Keys and/or values of all layers as one [N, B, T, H * D] tensor, N = parts x layers."""
    tensors = [t for part in parts for t in getattr(states, part)]
    return torch.stack([t.transpose(1, 2).flatten(2) for t in tensors]).float()
