"""Hidden states at the one position from which the answer is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationLoss, GradientShare, LossInputs, layer_weights


def at(hidden: Tensor, position: Tensor) -> Tensor:
    """The vector of each sample at its position, in float32: [B, T, C], [B] -> [B, C]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), position].float()


def dtype_of(projector: nn.Module) -> torch.dtype:
    """Of its weights, which an engine may have cast to half precision."""
    return next((weight.dtype for weight in projector.parameters()), torch.float32)


@dataclass
class CODILoss(DistillationLoss):
    """SmoothL1 between student's and teachers' hidden states where the first token of the answer is predicted.

    Mean over the embeddings and all layers of SmoothL1(projection(h_student), h_teacher) / sigma(h_teacher). sigma is
    the standard deviation over the channels of the sample's own target, at least 1e-3: the deviation over a batch,
    as in the authors' code, would make a step depend on how it is cut into micro-batches. Teachers are averaged with
    their fusion weights. Each side is taken where it says its own answer, whatever it has read before; a sample of
    which one of them says none, or another than that, adds nothing.

    Shapes: hidden [B, T, C] student, [B, Ct] a teacher, L + 1 each; answer_positions [B]. Returns a scalar.
    Needs: student_hidden, teacher_hidden, hidden_projectors, answer_positions.
    Source: CODI, arXiv 2502.21074.
    """

    weight: float | GradientShare = 0.5

    requires: ClassVar[frozenset[str]] = frozenset(
        {"student_hidden", "teacher_hidden", "hidden_projectors", "answer_positions"}
    )
    source: ClassVar[str] = "CODI, arXiv 2502.21074"

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.student_hidden is not None and inputs.weights is not None and inputs.answer_positions is not None
        position = inputs.answer_positions.clamp_min(0)
        ours = [at(hidden, position) for hidden in inputs.student_hidden]
        # The embeddings share as the first layer does.
        weights = layer_weights(inputs.weights, [max(0, i - 1) for i in range(len(ours))])
        total = ours[0].new_zeros(len(position))
        for weight, name in zip(weights, inputs.teachers, strict=True):
            terms = []
            layers = zip(inputs.hidden_projectors[name], ours, inputs.teacher_hidden[name], strict=True)
            for projector, student, hidden in layers:
                target = hidden.detach().float()
                sigma = target.std(1, correction=0).clamp_min(1e-3)
                mapped = projector(student.to(dtype_of(projector))).float()
                terms.append(F.smooth_l1_loss(mapped, target, reduction="none").mean(1) / sigma)
            total = total + torch.where(inputs.answered[name], (weight * torch.stack(terms)).mean(0), 0)
        return total.sum() / inputs.num_samples
