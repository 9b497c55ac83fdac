"""What a loss may return and compare; ValueError says what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import DistillationLoss, chosen_layers
from .kv import KVLoss
from .relation import KVRelationLoss


def check_target_space(losses: Mapping[str, DistillationLoss], direction: str) -> None:
    """A fusion of targets needs a loss in which all teachers' targets live in one space. direction: of projectors."""
    mapped = any(isinstance(loss, KVLoss) for loss in losses.values())
    related = any(isinstance(loss, KVRelationLoss) for loss in losses.values())
    if (mapped and direction == "student_to_teacher") or not (mapped or related):
        raise ValueError(
            "This fusion works on targets that all teachers share: it needs losses.kv_relation, or losses.kv with "
            "projector.direction: teacher_to_student, and cannot serve losses.kv in the other direction."
        )


def check_term(name: str, term: Any) -> Tensor:
    """What a loss has returned. ValueError, which a user's own loss may earn, for anything but a scalar tensor."""
    if isinstance(term, Tensor) and term.dim() == 0:
        return term
    shape = f"a tensor of shape {list(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
    raise ValueError(f"losses.{name} has returned {shape}; a loss returns a scalar tensor.")


def check_gradient(name: str, term: Tensor) -> None:
    """ValueError for a term that teaches nothing; one without anything to compare in this batch is 0."""
    if torch.is_grad_enabled() and not term.requires_grad and bool(term != 0):
        raise ValueError(
            f"losses.{name} carries no gradient, so it would train nothing: all that it looks at is frozen. Unfreeze "
            "the student's layers below what it compares, or, under gradient checkpointing, set "
            "gradient_checkpointing_kwargs: {use_reentrant: false}."
        )


def check_layers(name: str, loss: DistillationLoss, count: int) -> None:
    """ValueError, before anything runs, if a loss names student layers that are not there."""
    try:
        chosen_layers(getattr(loss, "layers", "all"), count)
    except ValueError as error:
        raise ValueError(f"losses.{name}.{error}") from None
