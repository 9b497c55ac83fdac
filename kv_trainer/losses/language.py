"""Losses on the text itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss, LossInputs


@dataclass
class CrossEntropy(DistillationLoss):
    """Cross-entropy of the next token, over the supervised positions.

    Shapes: logits [B, T, vocabulary]; labels [B, T], -100 = not supervised. Returns a scalar in nats a token,
    divided by the supervised tokens of the whole accumulated, all-ranks batch.
    Needs: logits.
    """

    label_smoothing: float = 0.0

    requires: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; give a value from 0 up to, not with, 1.")

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.logits is not None
        # Only rows that count are widened to float32: prompts and padding cost nothing.
        targets = inputs.labels[:, 1:]
        counted = targets != -100
        logits = inputs.logits[:, :-1][counted].float()
        total = F.cross_entropy(logits, targets[counted], reduction="sum", label_smoothing=self.label_smoothing)
        return total / inputs.num_tokens
