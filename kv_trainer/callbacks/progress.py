"""The Trainer's progress bar with the loss terms on it, and how every figure is written on one line."""

from __future__ import annotations

import sys
from numbers import Real
from typing import Any

from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

SHORT_NAMES = {"cross_entropy": "ce", "learning_rate": "lr"}
# Said already by the bar, or by the table at the end.
UNSHOWN = ("total_flos", "epoch", "_runtime", "_per_second")


def format_metric(name: str, value: Any) -> str:
    """`accuracy_chain 45.2%`, `lr 1e-3`, `kv_relation 0.421`."""
    label = SHORT_NAMES.get(name, name)
    if name.startswith("accuracy"):
        return f"{label} {value:.1%}"
    if name == "learning_rate" and value:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{label} {mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{label} {value:.3g}"


def training_line(logs: dict[str, Any]) -> str:
    """A training log as the bar shows it: `loss 1.23 ce 0.61 kv_relation 0.42 lr 1e-3 attn-warmup: 500 steps left`."""
    terms = {name.removeprefix("loss_"): value for name, value in logs.items() if name.startswith("loss_")}
    shown = {"loss": logs.get("loss"), **terms, "learning_rate": logs.get("learning_rate")}
    parts = [format_metric(name, value) for name, value in shown.items() if isinstance(value, Real)]
    left = logs.get("attn_warmup_left")
    if left is not None:
        parts.append(f"attn-warmup: {int(left)} steps left" if left > 0 else "attn-warmup: on")
    return " ".join(parts)


def metrics_line(logs: dict[str, Any]) -> str:
    """Any other log on one line: `loss 1.23, perplexity 3.42, accuracy 45.2%`."""
    shown = {name: value for name, value in logs.items() if not name.endswith(UNSHOWN) and isinstance(value, Real)}
    return ", ".join(format_metric(name.removeprefix("eval_"), value) for name, value in shown.items())


def announce(state: TrainerState, line: str) -> None:
    """One line above the bar, on stdout, where it survives the bar; from world process zero alone."""
    if state.is_world_process_zero:
        tqdm.write(f"step {state.global_step} {line}", file=sys.stdout)


class LossTermsProgress(ProgressCallback):
    """The Trainer's progress bar, with the newest loss terms on it instead of a printed dict a log.

    It takes the place of `ProgressCallback`, which the Trainer must not hold as well.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Training logs move the postfix; all others are a line above the bar."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(training_line(logs))
        elif line := metrics_line(logs):
            title = "evaluation" if any(name.startswith("eval_") for name in logs) else "training"
            announce(state, f"{title}: {line}")
