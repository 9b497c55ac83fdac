"""Early stopping, from the arguments to the Trainer's own callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_callbacks import Wired, arguments, trainer
from transformers import EarlyStoppingCallback

from kv_trainer.arguments import EarlyStoppingConfig
from kv_trainer.callbacks import default_callbacks

WATCHED = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True
}  # fmt: skip
LOSSES = [3.0, 2.0, 1.99, 2.5, 1.98, 2.6, 2.7, 2.8]


class Scripted(Wired):
    """Its evaluations give LOSSES, one a step."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": LOSSES[self.state.global_step - 1]}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def scripted(folder: Path, **early: Any) -> Wired:
    built = trainer(folder, max_steps=8, early_stopping=EarlyStoppingConfig(**early), **WATCHED)
    built.__class__ = Scripted
    return built


@pytest.mark.parametrize(
    ("early", "stops"),
    [({"patience": 1}, 4), ({"patience": 2}, 7), ({"patience": 2, "threshold": 0.05}, 4), ({}, 8)],
)
def test_it_stops_after_so_many_evaluations_without_a_gain(tmp_path: Path, early: dict[str, Any], stops: int) -> None:
    built = scripted(tmp_path, **early)
    built.train()
    assert built.state.global_step == stops
    assert built.state.best_metric == min(LOSSES[:stops]), "eval_loss is the metric where none is named"


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    scripted(tmp_path, patience=2).train()
    again = scripted(tmp_path, patience=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.state.global_step == 7, "one evaluation without a gain was before the checkpoint"


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, r"add eval_strategy: steps \(or epoch\) and load_best_model_at_end: true\."),
        ({"eval_strategy": "epoch"}, r"add load_best_model_at_end: true\."),
        ({**WATCHED, "metric_for_best_model": "perplexity", "greater_is_better": True}, "which falls; set training"),
    ],
)
def test_what_it_needs_is_one_error(tmp_path: Path, settings: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        trainer(tmp_path, early_stopping=EarlyStoppingConfig(patience=3), **settings)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("perplexity", False), ("eval_math_perplexity", False), ("eval_loss", False), ("accuracy", True), (None, None)],
)
def test_whether_more_is_better_is_known(tmp_path: Path, metric: str | None, greater: bool | None) -> None:
    """TrainingArguments takes whatever does not end in loss for something that rises."""
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater


def test_nothing_asked_for_is_nothing_added(tmp_path: Path) -> None:
    names = [type(callback).__name__ for callback in default_callbacks(trainer(tmp_path).args)]
    assert names == ["MetricsFile", "FiniteGuard"]
    with_it = default_callbacks(trainer(tmp_path, early_stopping=EarlyStoppingConfig(patience=3), **WATCHED).args)
    assert isinstance(with_it[-1], EarlyStoppingCallback)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 0}, "patience is 0; give 1 or more"),
        ({"patience": 1, "threshold": -1.0}, "must not be negative"),
        ({"threshold": 0.1}, "no effect without patience"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyStoppingConfig(**settings)
