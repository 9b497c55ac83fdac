"""Every loss the recipe can name, in one table."""

from __future__ import annotations

from .attention import AttentionKLLoss
from .base import DistillationLoss, GradientShare, LayerwiseLoss, LossInputs, TeacherLogits
from .cka import CKALoss
from .hidden import CODILoss
from .kv import KVLoss
from .language import CrossEntropy
from .logits import LogitKD
from .relation import KVRelationLoss

LOSSES: dict[str, type[DistillationLoss]] = {
    "cross_entropy": CrossEntropy,
    "kv": KVLoss,
    "kv_relation": KVRelationLoss,
    "cka": CKALoss,
    "codi": CODILoss,
    "logit_kd": LogitKD,
    "attention_kl": AttentionKLLoss,
}


def needs_teacher(needs: frozenset[str]) -> bool:
    """Whether a loss with these needs cannot do without a teacher."""
    return any("teacher" in need for need in needs)


__all__ = [
    "LOSSES",
    "AttentionKLLoss",
    "CKALoss",
    "CODILoss",
    "CrossEntropy",
    "DistillationLoss",
    "GradientShare",
    "KVLoss",
    "KVRelationLoss",
    "LayerwiseLoss",
    "LogitKD",
    "LossInputs",
    "TeacherLogits",
    "needs_teacher",
]
