"""What every loss is: a dataclass whose fields are its knobs, called on one micro-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

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
