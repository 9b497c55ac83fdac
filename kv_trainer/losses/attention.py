"""Where the student looks, compared with where its teachers look."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import DistillationLoss, LossInputs, chosen_layers, layer_weights, masked_mean, predicting
from .relation import pick_positions


@dataclass
class AttentionKLLoss(DistillationLoss):
    """KL(teacher || student) of attention distributions, from some supervised positions to all that they see.

    Heads are averaged, since unlike models have unlike numbers of them. Both sides are distributions over the
    positions that are aligned with the teacher, at or before the query. Averaged over queries, layers, and, with the
    fusion weights, over teachers.

    layers: the student layers: "middle" (the middle third), "all", or a list.
    max_queries: so many supervised positions of a sample, evenly spaced; nothing is ever of size T x T.
    Shapes: queries [B, Hq, T, D], keys [B, H, T, D] a layer, after RoPE, any heads and width on either side; labels,
    mask [B, T]. Returns a scalar in nats.
    Plain causal softmax on both sides: a family's sliding window, soft cap or sinks are left out.
    Needs: student_attention, teacher_attention.
    Source: MiniLM, arXiv 2002.10957, eq. 3; the mean over heads is this package's.
    """

    layers: Literal["middle", "all"] | list[int] = "all"
    max_queries: int = 64

    requires: ClassVar[frozenset[str]] = frozenset({"student_attention", "teacher_attention"})
    source: ClassVar[str] = "MiniLM, arXiv 2002.10957"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_queries < 1:
            raise ValueError(f"max_queries is {self.max_queries}; give at least 1 query.")

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.weights is not None
        student = inputs.attention["student"]
        layers = chosen_layers(self.layers, len(student))
        supervised = predicting(inputs.labels)
        total = torch.zeros(len(supervised), device=supervised.device)
        weights = layer_weights(inputs.weights, layers)
        for weight, (name, teacher) in zip(weights, inputs.teachers.items(), strict=True):
            allowed = supervised & teacher.mask
            chosen = pick_positions(allowed, min(self.max_queries, allowed.shape[1]))
            asked = allowed.gather(1, chosen)
            position = torch.arange(allowed.shape[1], device=allowed.device)
            visible = teacher.mask[:, None] & (position <= chosen[:, :, None]) & asked[:, :, None]
            terms = []
            for i in layers:
                with torch.no_grad():
                    target = log_attention(*inputs.attention[name][i], chosen, visible)
                ours = log_attention(*student[i], chosen, visible)
                kl = torch.where(visible, target.exp() * (target - ours), 0).sum(2)
                terms.append(masked_mean(kl, asked, 1))
            total = total + (weight * torch.stack(terms)).mean(0)
        return total.sum() / inputs.num_samples


def log_attention(queries: Tensor, keys: Tensor, chosen: Tensor, visible: Tensor) -> Tensor:
    """Log of the attention distributions of some queries, averaged over heads; 0 where a position is not visible.

    queries [B, Hq, T, D], keys [B, H, T, D], chosen [B, n], visible [B, n, T] -> [B, n, T].
    """
    index = chosen[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    some = queries.gather(2, index).unflatten(1, (keys.shape[1], -1)).float()
    logits = torch.einsum("bhgnd,bhtd->bhgnt", some, keys.float()).flatten(1, 2)
    seen = visible[:, None]
    # A query that sees nothing would be 0 / 0: it is left with equal logits, and counts nowhere.
    logits = logits.masked_fill(~seen, -math.inf).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    # Averaged in the log domain: a student that is sure of itself has no log of zero.
    logs = logits.log_softmax(-1).masked_fill(~seen, 0.0)
    return logs.logsumexp(1) - math.log(logs.shape[1])
