"""Keys and values compared by how their positions lie to each other as a whole: one number a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..similarity import FLOOR, MIN_POSITIONS, cka_ratio, linear_hsic, standardise
from .base import DistillationLoss, GradientShare, LossInputs, chosen_layers, layer_weights, stacked
from .relation import grouped, pick_positions, take_positions


@dataclass
class CKALoss(DistillationLoss):
    """1 - CKA between the student's keys and values and each teacher's, averaged with the fusion weights.

    The debiased estimate: the plain one reads nearly 1 for unrelated states, since they have more channels than
    positions. CKA at zero loss need not preserve geometry (arXiv 2509.25253): a term beside others, not alone.

    parts: which states are compared.
    layers: the student layers: "middle" (the middle third), "all", or a list.
    samples: HSIC is averaged over so many consecutive samples before it is divided, each sample at unit scale. A step
    is independent of gradient accumulation as long as `samples` divides the micro-batch.
    skip_first: so many aligned positions at the start of each sample are left out: attention sinks are outliers.
    max_positions: at most so many positions of a sample, evenly spaced. A sample with fewer than 4 is left out.
    Shapes: keys, values [B, H, T, D] a layer, any H and D on either side; mask [B, T]. Returns a scalar.
    Needs: student_kv, teacher_kv.
    Source: Nguyen et al., arXiv 2010.15327 (debiased, in mini-batches); Kornblith et al., arXiv 1905.00414.
    """

    weight: float | GradientShare = 0.05
    parts: Literal["keys", "values", "both"] = "both"
    layers: Literal["middle", "all"] | list[int] = "middle"
    samples: int = 1
    skip_first: int = 1
    max_positions: int = 512

    requires: ClassVar[frozenset[str]] = frozenset({"student_kv", "teacher_kv"})
    source: ClassVar[str] = "debiased CKA, arXiv 2010.15327"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_positions < MIN_POSITIONS:
            raise ValueError(
                f"max_positions is {self.max_positions}; the debiased CKA needs at least {MIN_POSITIONS} positions."
            )
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; a group needs at least 1 sample.")
        if self.skip_first < 0:
            raise ValueError(f"skip_first is {self.skip_first}; give 0 or more positions.")

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.student is not None and inputs.weights is not None
        parts = ("keys", "values") if self.parts == "both" else (self.parts,)
        layers = chosen_layers(self.layers, len(inputs.student.keys))
        ours = stacked(inputs.student, parts, layers)  # [N, B, T, C], N = parts x layers
        total = torch.zeros((), device=inputs.labels.device)
        for weight, teacher in zip(layer_weights(inputs.weights, layers), inputs.teachers.values(), strict=True):
            theirs = stacked(teacher, parts, layers)
            total = total + self._compare(ours, theirs, teacher.mask, weight.repeat(len(parts), 1))
        return total / inputs.num_samples

    def _compare(self, ours: Tensor, theirs: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """Sum over samples of weight x (1 - CKA), a mean over N: ours, theirs [N, B, T, C], weight [N, B]."""
        mask = mask & (mask.cumsum(1) > self.skip_first)
        if mask.shape[1] > self.max_positions:
            chosen = pick_positions(mask, self.max_positions)
            ours, theirs, mask = take_positions(ours, chosen), take_positions(theirs, chosen), mask.gather(1, chosen)
        cross, own, energy = linear_hsic(standardise(ours, mask), standardise(theirs.detach(), mask), mask)
        # Without any relation in the target (few positions, or equal ones) a sample teaches nothing.
        share = weight * (energy > FLOOR)
        counted = self._by_group(share)
        mean = [self._by_group(share * hsic) / counted.clamp_min(1e-12) for hsic in (cross, own, energy)]
        return (counted * (1 - cka_ratio(*mean))).mean(0).sum()

    def _by_group(self, x: Tensor) -> Tensor:
        """Sums over the samples of each group: [N, B] -> [N, groups]."""
        return grouped(x[..., None], -(-x.shape[1] // self.samples), self.samples).sum(2)
