"""What the teachers predict for the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import DistillationLoss, LossInputs, TeacherLogits, predicting


@dataclass
class LogitKD(DistillationLoss):
    """Forward KL from each teacher's next-token distribution to the student's, averaged with the fusion weights.

    KL(teacher || student) x temperature^2 over the tokens that both vocabularies hold, both sides renormalised over
    these, at the supervised positions that are aligned with the teacher, times the teacher's probability of these
    tokens (the chain rule of KL: 1 where the vocabularies are the same). Position t predicts label t + 1.
    Teacher logits are made `chunk` positions at a time and made again in the backward pass: their whole tensor, larger
    than the student's own, is never there.

    Shapes: logits [B, T, vocabulary]; labels [B, T], -100 = not supervised; mask [B, T]. Returns a scalar in nats a
    token, divided by the supervised tokens of the whole accumulated, all-ranks batch.
    Needs: logits, teacher_logits.
    Source: Hinton et al., arXiv 1503.02531.
    """

    temperature: float = 1.0
    chunk: int = 256

    requires: ClassVar[frozenset[str]] = frozenset({"logits", "teacher_logits"})
    source: ClassVar[str] = "knowledge distillation, arXiv 1503.02531"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; give a value above 0.")
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; give at least 1 position.")

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.logits is not None and inputs.weights is not None
        said = [inputs.teacher_logits[name] for name in inputs.teachers]
        masks = torch.stack([teacher.mask for teacher in inputs.teachers.values()])
        counted = predicting(inputs.labels) & masks.any(0)
        weights = inputs.weights if inputs.weights.dim() == 2 else inputs.weights.mean(1)
        shares = (weights[:, :, None] * masks)[:, counted]  # [M, n]
        # Rows that count, picked once in the model's own dtype: only a chunk is ever widened to float32.
        rows = inputs.logits[counted].split(self.chunk)
        hidden = [teacher.hidden[counted].split(self.chunk) for teacher in said]
        total = torch.zeros((), device=inputs.labels.device)
        for i, (ours, share) in enumerate(zip(rows, shares.split(self.chunk, dim=1), strict=True)):
            theirs = [pieces[i] for pieces in hidden]
            total = total + checkpoint(
                self._chunk, ours, theirs, said, share, use_reentrant=False, preserve_rng_state=False
            )
        return total / inputs.num_tokens

    def _chunk(self, logits: Tensor, hidden: list[Tensor], teachers: list[TeacherLogits], share: Tensor) -> Tensor:
        """Weighted sum over positions: logits [n, V], hidden [n, Ct] a teacher, share [M, n]."""
        total = torch.zeros((), device=logits.device)
        for states, teacher, weight in zip(hidden, teachers, share, strict=True):
            with torch.no_grad():
                every = teacher.head(states).float() / self.temperature
                theirs = taken(every, teacher.teacher_ids)
                target = F.log_softmax(theirs, dim=-1)
                # Where tokens that the student does not have hold most of its mass, the shared ones are noise.
                shared = teacher.teacher_ids is not None
                known = (theirs.logsumexp(-1) - every.logsumexp(-1)).exp() if shared else weight.new_ones(())
            ours = taken(logits, teacher.student_ids).float()
            assert ours.shape == target.shape, f"{ours.shape} and {target.shape}: name the tokens that both hold"
            ours = F.log_softmax(ours / self.temperature, dim=-1)
            kl = F.kl_div(ours, target, reduction="none", log_target=True).sum(-1)
            total = total + (weight * known * kl).sum()
        return total * self.temperature**2


def taken(logits: Tensor, ids: Tensor | None) -> Tensor:
    """Logits [n, V] of some tokens, [n, len(ids)], or of all."""
    return logits if ids is None else logits.index_select(1, ids)
