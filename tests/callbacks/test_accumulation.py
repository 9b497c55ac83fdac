"""accumulation.py: steps that grow, in a run whose length, schedule, loss and place in the data stay right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_callbacks import Snapshots, Wired, run, student, trainer
from hypothesis import given
from hypothesis import strategies as st

from kv_trainer.arguments import AccumulationConfig
from kv_trainer.callbacks.accumulation import walk

GROWING = AccumulationConfig(steps=[1, 2, 4], at=[0.0, 0.3, 0.6])


@st.composite
def configs(draw: st.DrawFn) -> AccumulationConfig:
    steps = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
    shares = draw(st.sets(st.floats(0.01, 0.99), min_size=len(steps) - 1, max_size=len(steps) - 1))
    return AccumulationConfig(steps=steps, at=[0.0, *sorted(shares)])


@given(configs(), st.integers(1, 30), st.integers(1, 60))
def test_every_step_ends_where_the_trainer_ends_one(config: AccumulationConfig, batches: int, max_steps: int) -> None:
    """The Trainer's own rule, `(batches done) % setting == 0`, finds the plan's steps, and no batch is left out."""
    plan = list(walk(config, batches, max_steps, 3.0))
    assert len(plan) == max_steps
    settings = [setting for _, _, setting in plan]
    assert settings == sorted(settings) and settings[0] == config.steps[0]
    for (epoch, done, setting), (next_epoch, next_done, _) in zip(plan, plan[1:]):
        size = min(setting, batches - done)
        ends = [i for i in range(1, size + 1) if (done + i) % setting == 0 or done + i == batches]
        assert done % setting == 0 and ends == [size]
        assert (next_epoch, next_done) == ((epoch, done + size) if done + size < batches else (epoch + 1, 0))


@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 4))
def test_a_setting_that_does_not_grow_gives_the_trainers_own_length(setting: int, batches: int, epochs: int) -> None:
    plan = list(walk(AccumulationConfig(steps=[setting], at=[0.0]), batches, -1, float(epochs)))
    assert len(plan) == epochs * math.ceil(batches / setting) and plan[-1][0] == epochs - 1


def test_a_change_comes_at_its_share_or_soon_after() -> None:
    settings = [setting for _, _, setting in walk(GROWING, 1000, 100, 1.0)]
    assert settings == [1] * 30 + [2] * 31 + [4] * 39  # step 60 is 30 + 2 * 30 = 90 batches in, no multiple of 4


def learning_rates(built: Wired) -> list[float]:
    return [log["learning_rate"] for log in built.state.log_history if "loss" in log]


def test_steps_grow_within_an_epoch_and_the_schedule_ends_with_the_run(tmp_path: Path, capsys) -> None:
    built, _ = run(tmp_path, rows=28, max_steps=10, accumulation=GROWING)  # 14 micro-batches an epoch
    assert built.batches == [1, 1, 1, 1, 2, 2, 4, 2, 4, 4]
    assert built.state.global_step == built.state.max_steps == 10 and len(learning_rates(built)) == 10
    assert learning_rates(built)[-1] == pytest.approx(1e-2 / 10)
    assert built.state.epoch == pytest.approx(1 + 8 / 14)
    assert built.args.gradient_accumulation_steps == 1, "as it was, for another run"
    lines = [line for line in capsys.readouterr().out.splitlines() if "accumulation" in line]
    assert lines == [f"step {at} accumulation: {n} micro-batches a step" for at, n in ((4, 2), (6, 4))]


def test_a_run_measured_in_epochs_sees_all_its_data_once_an_epoch(tmp_path: Path) -> None:
    config = AccumulationConfig(steps=[1, 3], at=[0.0, 0.5])
    built, _ = run(tmp_path, max_steps=-1, num_train_epochs=2, accumulation=config)  # 7 micro-batches an epoch
    assert built.batches == [1] * 7 + [3, 3, 1]
    assert built.state.global_step == built.state.max_steps == 10 and built.state.epoch == 2.0
    assert learning_rates(built)[-1] == pytest.approx(1e-2 / 10)


def test_more_epochs_than_the_first_setting_would_take(tmp_path: Path) -> None:
    built, _ = run(tmp_path, rows=8, max_steps=12, accumulation=AccumulationConfig(steps=[1, 4], at=[0.0, 0.3]))
    assert built.batches == [1, 1, 1, 1] + [4] * 8 and built.state.global_step == 12 and built.state.epoch == 9.0


class Keeping(Wired):
    """Keeps the micro-batches of every step."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_batch_samples(*args, **kwargs)
        self.kept = [*getattr(self, "kept", []), found[0]]
        return found


def test_a_step_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    """Two micro-batches after the growth move the weights as one batch of all their rows, of unlike token counts."""
    config, seen = AccumulationConfig(steps=[1, 2], at=[0.0, 0.5]), Snapshots()
    plain = {"optim": "sgd", "weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    grown = trainer(tmp_path, rows=16, callbacks=[seen], max_steps=4, accumulation=config, **plain)
    grown.__class__ = Keeping
    grown.train()
    assert grown.batches == [1, 1, 2, 2]
    whole = {name: torch.cat([batch[name] for batch in grown.kept[2]]) for name in grown.kept[2][0]}
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in grown.kept[2]]
    assert counts[0] != counts[1], "else a mean of means would do"
    model = student()
    model.load_state_dict(seen.weights[2])
    model(**whole, num_items_in_batch=sum(counts)).loss.backward()
    for name, parameter in model.named_parameters():
        expected = seen.weights[2][name] - 1e-2 * parameter.grad
        assert torch.allclose(seen.weights[3][name], expected, atol=1e-6), name


@pytest.mark.parametrize("at", [2, 3, 5, 8, 9])
@pytest.mark.parametrize("length", [{"max_steps": 10}, {"max_steps": -1, "num_train_epochs": 2}])
def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path: Path, at: int, length: dict[str, Any]) -> None:
    settings = {**length, "rows": 14 if length["max_steps"] < 0 else 28, "accumulation": GROWING}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    built, whole = run(tmp_path, **settings)
    again = trainer(tmp_path, **settings)
    if at >= built.state.global_step:
        pytest.skip("the run is shorter")
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert again.batches == built.batches[at:] and again.state.global_step == built.state.global_step
    assert again.state.epoch == built.state.epoch
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, whole.weights[-1][name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": [1, 2], "at": [0.0]}, "as many of one as of the other"),
        ({"steps": [2, 1], "at": [0.0, 0.5]}, "numbers that grow"),
        ({"steps": [0, 1], "at": [0.0, 0.5]}, "numbers that grow, from 1"),
        ({"steps": [1, 2], "at": [0.1, 0.5]}, "the first 0"),
        ({"steps": [1, 2], "at": [0.0, 1.0]}, "all below 1"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccumulationConfig(**settings)


def test_two_settings_at_odds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 3, but accumulation.steps begins with 1"):
        trainer(tmp_path, accumulation=GROWING, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="ignore_data_skip: false"):
        trainer(tmp_path, accumulation=GROWING, ignore_data_skip=True).train()
