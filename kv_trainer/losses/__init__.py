"""Every loss the recipe can name, in one table."""

from __future__ import annotations

from .base import DistillationLoss, LossInputs
from .kv import KVLoss
from .language import CrossEntropy
from .relation import KVRelationLoss

LOSSES: dict[str, type[DistillationLoss]] = {
    "cross_entropy": CrossEntropy,
    "kv": KVLoss,
    "kv_relation": KVRelationLoss,
}

__all__ = ["LOSSES", "CrossEntropy", "DistillationLoss", "KVLoss", "KVRelationLoss", "LossInputs"]
