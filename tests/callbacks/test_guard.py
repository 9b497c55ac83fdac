"""guard.py: a loss that is not finite ends the run before it is saved, and says where it came from."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_callbacks import Wired, trainer
from torch import Tensor
from transformers import TrainerControl, TrainerState

from kv_trainer.callbacks import FiniteGuard, NonFiniteLoss, check_finite
from kv_trainer.types import KVStates


def states(hidden: bool = False) -> KVStates:
    def layers(count: int) -> tuple[Tensor, ...]:
        return tuple(torch.ones(2, 1, 3, 4) for _ in range(count))

    found = KVStates(layers(3), layers(3), torch.ones(2, 3).bool(), (1, 3, 5), 6)
    return replace(found, hidden=tuple(torch.ones(2, 3, 4) for _ in range(4))) if hidden else found


TERMS = {"cross_entropy": torch.tensor(1.0), "kv": torch.tensor(math.inf), "total": torch.tensor(math.nan)}


def test_the_error_names_term_layer_and_rows() -> None:
    student = states(hidden=True)
    student.values[1][0, 0, 1, 2] = math.nan
    student.hidden[2][0] = math.inf
    with pytest.raises(NonFiniteLoss) as caught:
        check_finite(TERMS, 7, torch.tensor([4, 9]), student)
    said = str(caught.value)
    assert said.startswith("Step 7: the loss is not finite: kv = inf, total = nan. ")
    assert "not finite: layer 3 (values). Rows of the batch: [4, 9]." in said
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("student", [None, states()])
def test_without_a_broken_layer_it_says_none(student: KVStates | None) -> None:
    with pytest.raises(NonFiniteLoss, match=r"that is not finite: none. Rows of the batch: \[3\]"):
        check_finite(TERMS, 1, [3], student)


def test_finite_terms_pass_though_a_padded_position_is_not() -> None:
    student = states()
    student.keys[0][1] = math.nan
    check_finite({"total": torch.tensor(1e30)}, 1, [0], student)


def test_large_finite_states_in_half_precision_are_not_blamed() -> None:
    keys = (torch.full((1, 1, 64, 64), 6e4, dtype=torch.float16),)
    student = KVStates(keys, keys, torch.ones(1, 64).bool(), (0,), 1)
    with pytest.raises(NonFiniteLoss, match="not finite: none"):
        check_finite(TERMS, 1, [0], student)


def test_one_wait_a_step_whatever_is_accumulated(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, waits = FiniteGuard(), []
    real = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: waits.append(1) or real(self))
    for name in ("item", "tolist", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("waits for the device"))
    for _ in range(3):
        guard.watch({"total": torch.tensor(1.0), "kv": torch.tensor(2.0)}, torch.tensor([1, 2]), states())
    assert not waits
    guard.on_pre_optimizer_step(None, TrainerState(), TrainerControl())
    assert len(waits) == 1


def test_it_is_the_bad_micro_batch_that_is_named() -> None:
    guard = FiniteGuard()
    for row in range(3):
        guard.watch({"total": torch.tensor(math.nan if row == 1 else 1.0)}, [row], states())
    with pytest.raises(NonFiniteLoss, match=r"Step 5: .* Rows of the batch: \[1\]"):
        guard.on_pre_optimizer_step(None, TrainerState(global_step=4), TrainerControl())


class Broken(Wired):
    """Its loss is NaN in step 3."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step == 2:
            loss = loss * math.nan
            self.guard.watch({"total": loss}, inputs["input_ids"][:, 0])
        return loss


def test_nothing_is_saved_after_the_bad_step(tmp_path: Path) -> None:
    built = trainer(tmp_path, save_strategy="steps", save_steps=1)
    built.__class__ = Broken
    with pytest.raises(NonFiniteLoss, match="Step 3: the loss is not finite: total = nan"):
        built.train()
    assert sorted(n for n in os.listdir(tmp_path) if n.startswith("checkpoint")) == ["checkpoint-1", "checkpoint-2"]
    assert all(p.isfinite().all() for p in built.model.parameters())


@pytest.mark.parametrize("when", ["steps", "epoch"])
def test_a_broken_gradient_of_a_finite_loss_is_not_saved_either(tmp_path: Path, when: str) -> None:
    built = trainer(tmp_path, save_strategy=when, save_steps=1, max_steps=21)
    last = 7 if when == "steps" else 14  # seven steps an epoch

    def spoil(grad: Tensor) -> Tensor:
        return grad * math.nan if built.state.global_step == last - 1 else grad

    built.model.model.norm.weight.register_hook(spoil)
    with pytest.raises(NonFiniteLoss, match=f"Step {last}: weights are not finite"):
        built.train()
    assert f"checkpoint-{last}" not in os.listdir(tmp_path)
    assert f"checkpoint-{last - (1 if when == 'steps' else 7)}" in os.listdir(tmp_path)


def test_a_broken_gradient_of_the_last_step_is_told_though_nothing_is_saved_there(tmp_path: Path) -> None:
    """The weights of the end are saved by whoever trained them."""
    built = trainer(tmp_path, save_strategy="no", max_steps=3)
    built.model.model.norm.weight.register_hook(lambda grad: grad * (math.nan if built.state.global_step == 2 else 1))
    with pytest.raises(NonFiniteLoss, match="Step 3: weights are not finite"):
        built.train()
