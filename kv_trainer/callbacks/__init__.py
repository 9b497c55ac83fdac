"""What happens around the steps of a run: what is shown and written, what rests, and what stops it."""

from __future__ import annotations

from transformers import EarlyStoppingCallback, TrainerCallback

from ..arguments import MultiTeacherKVConfig
from .accumulation import GrowingAccumulation
from .figures import peak_memory_mb, perplexity, read_metrics
from .freezing import Freezing
from .guard import FiniteGuard, NonFiniteLoss, check_finite
from .metrics import METRICS_FILE, MetricsFile
from .profile import ProfileSteps
from .progress import LossTermsProgress, format_metric, metrics_line, training_line

__all__ = [
    "METRICS_FILE",
    "FiniteGuard",
    "Freezing",
    "GrowingAccumulation",
    "LossTermsProgress",
    "MetricsFile",
    "NonFiniteLoss",
    "ProfileSteps",
    "check_callbacks",
    "check_finite",
    "default_callbacks",
    "format_metric",
    "metrics_line",
    "peak_memory_mb",
    "perplexity",
    "read_metrics",
    "training_line",
]


def default_callbacks(args: MultiTeacherKVConfig) -> list[TrainerCallback]:
    """The metrics file, the guard against losses that are not finite, and what the arguments ask for.

    ValueError, from check_callbacks, where a section lacks what it needs.
    """
    check_callbacks(args)
    found: list[TrainerCallback] = [MetricsFile(), FiniteGuard()]
    if args.freeze.attention or args.freeze.layer_groups or args.freeze.projectors_after:
        found.append(Freezing(args.freeze))
    if args.accumulation.steps:
        found.append(GrowingAccumulation(args.accumulation))
    if args.early_stopping.patience is not None:
        args.restore_callback_states_from_checkpoint = True  # a resumed run goes on counting
        found.append(EarlyStoppingCallback(args.early_stopping.patience, args.early_stopping.threshold))
    return found


def check_callbacks(args: MultiTeacherKVConfig) -> None:
    """ValueError where `early_stopping` or `accumulation` does not fit the fields of TrainingArguments."""
    if args.early_stopping.patience is not None:
        missing = ["eval_strategy: steps (or epoch)"] if args.eval_strategy == "no" else []
        missing += [] if args.load_best_model_at_end else ["load_best_model_at_end: true"]
        if missing:
            raise ValueError(f"early_stopping needs more under training; add {' and '.join(missing)}.")
        metric = str(args.metric_for_best_model)
        if metric.endswith("perplexity") and args.greater_is_better:
            raise ValueError(f"early_stopping watches {metric}, which falls; set training.greater_is_better: false.")
    steps = args.accumulation.steps
    if steps and args.gradient_accumulation_steps not in (1, steps[0]):
        raise ValueError(
            f"training.gradient_accumulation_steps is {args.gradient_accumulation_steps}, but accumulation.steps "
            f"begins with {steps[0]}; leave one of them out."
        )
