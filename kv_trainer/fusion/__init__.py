"""How several teachers become one target: every method the recipe can name, in one table."""

from __future__ import annotations

from .base import MIN_SHARE, Fusion, FusionInputs, check_given, teacher_shares, to_the_heard
from .learned import Router, Similarity
from .scores import Confidence, Entropy
from .static import Fixed, TaskWise, Uniform
from .targets import Govern, MinNorm

FUSIONS: dict[str, type[Fusion]] = {
    "uniform": Uniform,
    "fixed": Fixed,
    "confidence": Confidence,
    "entropy": Entropy,
    "task_wise": TaskWise,
    "similarity": Similarity,
    "router": Router,
    "govern": Govern,
    "min_norm": MinNorm,
}


def method_of(fusion: Fusion) -> str:
    """The name of a fusion in the table; of one from elsewhere, that of its class. ValueError for what is none."""
    if not isinstance(fusion, Fusion):
        raise ValueError(
            f"fusion is {fusion!r}; give one of kv_trainer.fusion, such as Uniform() (in a recipe: method: uniform)."
        )
    return next((name for name, kind in FUSIONS.items() if kind is type(fusion)), type(fusion).__name__)


__all__ = [
    "FUSIONS", "MIN_SHARE", "Confidence", "Entropy", "Fixed", "Fusion", "FusionInputs", "Govern", "MinNorm", "Router",
    "Similarity", "TaskWise", "Uniform", "check_given", "method_of", "teacher_shares",
    "to_the_heard",
]  # fmt: skip
