"""The callbacks in MultiTeacherKVTrainer, with two teachers, projectors and keys and values that carry gradient."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import World, weights
from transformers import TrainerCallback

from kv_trainer.arguments import AccumulationConfig, EarlyStoppingConfig, FreezeConfig
from kv_trainer.callbacks import NonFiniteLoss, read_metrics
from kv_trainer.facts import seconds_trained
from kv_trainer.losses import CrossEntropy, KVLoss, KVRelationLoss


@pytest.fixture
def world(tiny_model: Any, tiny_tokenizer: Any) -> World:
    return World(tiny_model, tiny_tokenizer)


def losses() -> dict[str, Any]:
    return {"cross_entropy": CrossEntropy(), "kv": KVLoss(), "kv_relation": KVRelationLoss()}


def test_frozen_attention_lets_the_kv_losses_reach_the_layers_below(world: World, tmp_path: Path) -> None:
    silent = {"cross_entropy": CrossEntropy(weight=0.0), "kv_relation": KVRelationLoss()}
    trainer = world.trainer(tmp_path, silent, max_steps=2, freeze=FreezeConfig(attention=True, until_step=9))
    before = weights(trainer)
    trainer.train()
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert not {name for name in moved if ".self_attn." in name}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= moved


def test_all_layers_but_the_highest_at_rest_is_no_error(world: World, tmp_path: Path) -> None:
    freeze = FreezeConfig(layer_groups=2, unfreeze_every=2, projectors_after=1)
    trainer = world.trainer(tmp_path, losses(), max_steps=3, freeze=freeze)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_nan_in_the_student_is_named_with_its_layer_and_rows(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path, losses(), max_steps=3, save_strategy="steps", save_steps=1)

    def spoil(module: Any, args: Any, out: Any) -> Any:
        return out * math.nan if trainer.state.global_step == 1 and module.training else out

    trainer.model.model.layers[1].input_layernorm.register_forward_hook(spoil)
    with pytest.raises(NonFiniteLoss, match=r"Step 2: .*cross_entropy = nan.*: layer 1 \(keys\). Rows.*: \[\d, \d"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_early_stopping_through_the_trainers_own_evaluation(world: World, tmp_path: Path) -> None:
    """With a learning rate of zero nothing is ever gained after the first evaluation."""
    watched = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = world.trainer(
        tmp_path, max_steps=9, learning_rate=0.0, eval_rows=world.encoded, load_best_model_at_end=True,
        early_stopping=EarlyStoppingConfig(patience=2), **watched,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3


class Stop(TrainerCallback):
    """What Ctrl-C does in the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_nothing_rests_after_a_run_that_broke_off(world: World, tmp_path: Path) -> None:
    freeze = FreezeConfig(attention=True, until_step=4)
    trainer = world.trainer(tmp_path, losses(), max_steps=6, freeze=freeze, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(p._backward_hooks for p in trainer.model.parameters())


def test_time_is_that_of_training(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation the next day took none of it, and the card says how long the run was."""
    trainer = world.trainer(tmp_path, losses(), max_steps=2, eval_rows=world.encoded)
    trainer.train()
    before, now = seconds_trained(tmp_path), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 86400)
    trainer.evaluate()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["eval_loss"] > 0
    assert seconds_trained(tmp_path) - before < 60


def test_growing_steps_with_teachers(world: World, tmp_path: Path) -> None:
    growing = AccumulationConfig(steps=[1, 2], at=[0.0, 0.5])
    trainer = world.trainer(
        tmp_path, losses(), max_steps=6, per_device_train_batch_size=2, accumulation=growing, logging_steps=2
    )
    trainer.train()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert trainer.state.global_step == 6 and [row["step"] for row in rows] == [2, 4, 5, 6]
    for row in rows:
        raw = sum(row[f"loss_{name}"] * row[f"weight_{name}"] for name in losses())
        assert row["loss"] == pytest.approx(raw, rel=1e-4), "the same steps are counted on both sides"


def test_the_metrics_file_counts_what_the_trainer_reads(world: World, tmp_path: Path) -> None:
    world.trainer(tmp_path, losses(), max_steps=3).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "loss" in row)
    names = {"learning_rate_student", "learning_rate_projectors", "samples_per_second", "tokens_per_second"}
    assert names <= row.keys()
    assert row["perplexity"] == pytest.approx(math.exp(row["loss_cross_entropy"]))
