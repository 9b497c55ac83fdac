"""Keys and values compared one by one, after a trainable map between the two models' heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import KVStates
from .base import DistillationLoss, LossInputs, heard, masked_mean

Metric = Literal["mse", "smooth_l1", "l1", "cosine"]


def distance(x: Tensor, y: Tensor, metric: Metric) -> Tensor:
    """Elementwise distance of two [B, H, T, D] tensors, averaged over H and D: [B, T]."""
    if metric == "cosine":
        return 1 - F.cosine_similarity(x.transpose(1, 2).flatten(2), y.transpose(1, 2).flatten(2), dim=-1)
    function = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}[metric]
    return function(x, y, reduction="none").mean((1, 3))


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation about the mean position of one sample: x [B, H, T, D], mask [B, T] -> [B, 1, 1, 1].

    One position, or equal ones, have no spread but rounding: there it is the root mean square.
    """
    where = mask[:, None, :, None]
    centre = masked_mean(x, where, (2,)).unsqueeze(2)
    variance = masked_mean((x - centre).square(), where, (1, 2, 3))
    size = masked_mean(x.square(), where, (1, 2, 3))
    return torch.where(variance > 1e-6 * size, variance, size).clamp_min(1e-12).sqrt()[:, None, None, None]


@dataclass
class KVLoss(DistillationLoss):
    """Distance between the student's keys and values and the teachers', head by head.

    The projectors decide the direction. `student_to_teacher`: the student's states are mapped to each teacher's
    shape and compared with its fixed states, both standardised by the teacher's calibrated channel statistics;
    teachers are averaged with their fusion weights.
    `teacher_to_student`: each teacher's states are mapped to the student's shape and fused into one target. That
    target is trainable, so the projector can solve the loss alone (target collapse); prefer the first.

    Shapes: keys, values [B, H, T, D] a layer; mask [B, T], True = counts. Both sides are divided by the detached
    spread of the target in each layer and sample. Returns a scalar: mean over positions, layers, K and V, samples.
    Needs: student_kv, teacher_kv, projectors.
    Source: KaVa, arXiv 2510.02312, eq. 6 (the term); projectors and normalisation are this package's.
    """

    metric: Metric = "mse"

    requires: ClassVar[frozenset[str]] = frozenset({"student_kv", "teacher_kv", "projectors"})
    source: ClassVar[str] = "KaVa, arXiv 2510.02312"

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.student is not None and inputs.weights is not None
        directions = {p.direction for p in inputs.projectors.values()}
        assert len(directions) == 1, "all teachers share one direction"
        per_sample = self._to_teachers(inputs) if directions == {"student_to_teacher"} else self._to_student(inputs)
        return per_sample.sum() / inputs.num_samples

    def _to_teachers(self, inputs: LossInputs) -> Tensor:
        total = torch.zeros((), device=inputs.labels.device)
        for weight, (name, teacher) in zip(inputs.weights, inputs.teachers.items(), strict=True):
            # Both sides in the calibrated units of the teacher's channels: a few loud channels must not be all.
            projected = inputs.projectors[name].standardise(inputs.projectors[name](inputs.student))
            with torch.no_grad():
                target = inputs.projectors[name].standardise(teacher)
            total = total + weight * self._compare(projected, target, teacher.mask)
        return total

    def _to_student(self, inputs: LossInputs) -> Tensor:
        masks = heard(inputs)
        share = inputs.weights[:, :, None] * masks
        share = (share / share.sum(0).clamp_min(1e-12))[:, :, None, :, None]  # [M, B, 1, T, 1]
        mapped = [inputs.projectors[name](teacher) for name, teacher in inputs.teachers.items()]
        fused = KVStates(
            keys=tuple(sum(s * k for s, k in zip(share, layer)) for layer in zip(*(m.keys for m in mapped))),
            values=tuple(sum(s * v for s, v in zip(share, layer)) for layer in zip(*(m.values for m in mapped))),
            mask=masks.any(0),
            layers=inputs.student.layers,
            num_layers=inputs.student.num_layers,
        )
        return self._compare(inputs.student, fused, fused.mask)

    def _compare(self, ours: KVStates, target: KVStates, mask: Tensor) -> Tensor:
        """Mean over positions, layers, keys and values: [B]."""
        terms = []
        for x, y in zip((*ours.keys, *ours.values), (*target.keys, *target.values), strict=True):
            x, y = x.float(), y.float()
            scale = 1.0 if self.metric == "cosine" else spread(y.detach(), mask)
            terms.append(masked_mean(distance(x / scale, y / scale, self.metric), mask, 1))
        return torch.stack(terms).mean(0)
