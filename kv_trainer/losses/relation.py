"""Keys and values compared through the geometry of their positions: no projector, no common shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import DistillationLoss, LossInputs, heard, masked_mean, stacked


def gram(x: Tensor, mask: Tensor) -> Tensor:
    """Cosines between the centred positions of each sample.

    x [N, B, T, C], mask [B, T]; returns [N, B, T, T], zero in the rows and columns that the mask leaves out, and in
    those of positions that differ from the mean by rounding alone: they have no direction.
    """
    where = mask[None, :, :, None]
    centred = (x.float() - masked_mean(x.float(), where, 2).unsqueeze(2)) * where
    norm = centred.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 1e-5 * x.float().norm(dim=-1, keepdim=True), centred / norm.clamp_min(1e-12), 0)
    return unit @ unit.transpose(-1, -2)


def pick_positions(mask: Tensor, count: int) -> Tensor:
    """Indices [B, count] of evenly spaced True positions of each sample; padding moves nothing.

    A sample with fewer True positions than `count` keeps them all; its spare indices point at False ones.
    """
    true = mask.sum(1, keepdim=True)
    rank = torch.arange(count, device=mask.device)[None]
    rank = torch.where(true > count, rank * true // count, rank)
    return (~mask).long().argsort(dim=1, stable=True).gather(1, rank)


@dataclass
class KVRelationLoss(DistillationLoss):
    """Relative squared error between the student's and the fused teachers' Gram matrices of positions.

    For every layer, for K and for V, and for every sample: the states of its positions are flattened over heads,
    centred, made unit length, and multiplied with each other. All teachers' matrices live in one space, positions
    x positions, and are averaged with their fusion weights where both positions are aligned. The term is
    sum (G_student - G_fused)^2 / sum G_fused^2 off the diagonal: 0 where the geometry agrees, 1 for a student
    whose positions are unrelated.

    parts: which states are compared. max_positions: at most so many positions of a sample, evenly spaced.
    Shapes: keys, values [B, H, T, D] a layer, any H and D on either side; mask [B, T]. Returns a scalar.
    Needs: student_kv, teacher_kv.
    Source: relations of MiniLMv2, arXiv 2012.15828, eq. 4-5, and RKD, arXiv 1904.05068, on pre-RoPE K and V.
    """

    parts: Literal["keys", "values", "both"] = "both"
    max_positions: int = 512

    requires: ClassVar[frozenset[str]] = frozenset({"student_kv", "teacher_kv"})
    source: ClassVar[str] = "MiniLMv2, arXiv 2012.15828"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_positions < 2:
            raise ValueError(f"max_positions is {self.max_positions}; a relation needs at least 2 positions.")

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.student is not None and inputs.weights is not None
        parts = ("keys", "values") if self.parts == "both" else (self.parts,)
        masks = heard(inputs)
        student = stacked(inputs.student, parts)
        teachers = [stacked(teacher, parts) for teacher in inputs.teachers.values()]
        if student.shape[2] > self.max_positions:
            chosen = pick_positions(masks.any(0), self.max_positions)
            masks = masks.gather(2, chosen.expand(len(masks), -1, -1))
            student, *teachers = (take_positions(x, chosen) for x in (student, *teachers))
        target, pairs = self._fuse(teachers, masks, inputs.weights)
        difference = (gram(student, masks.any(0)) - target).square()
        energy = (target.square() * pairs).sum((2, 3))
        # Without any relation in the target (one position, or equal ones) the sample teaches nothing.
        per_sample = (difference * pairs).sum((2, 3)) / energy.clamp_min(1e-6) * (energy > 1e-6)
        return per_sample.mean(0).sum() / inputs.num_samples

    @staticmethod
    @torch.no_grad()
    def _fuse(teachers: list[Tensor], masks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted mean Gram matrix [N, B, T, T], and which pairs of positions count [B, T, T]."""
        total: Tensor | float = 0.0
        share: Tensor | float = 0.0
        for x, mask, weight in zip(teachers, masks, weights, strict=True):
            pairs = weight[:, None, None] * (mask[:, :, None] & mask[:, None, :])
            total = total + gram(x, mask) * pairs
            share = share + pairs
        pairs = (share > 0) & ~torch.eye(masks.shape[2], dtype=torch.bool, device=masks.device)
        return total / share.clamp_min(1e-12), pairs


def take_positions(x: Tensor, index: Tensor) -> Tensor:
    """Select positions: x [N, B, T, C], index [B, P] -> [N, B, P, C]."""
    return x.gather(2, index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))
