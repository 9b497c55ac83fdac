"""Weights that follow a share of the gradient: right when measured, saved with the run, the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import World, assert_same_run, curve
from torch import nn

from kv_trainer.arguments import MonitorConfig
from kv_trainer.balance import Balance, gradient_norms
from kv_trainer.losses import CrossEntropy, GradientShare, KVLoss, KVRelationLoss


@pytest.fixture
def world(tiny_model: Any, tiny_tokenizer: Any) -> World:
    return World(tiny_model, tiny_tokenizer)


def losses(share: float = 0.3, **knobs: Any) -> dict[str, Any]:
    return {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss(weight=GradientShare(share, **knobs))}


def test_norms_are_those_of_separate_backward_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)

    def terms() -> dict[str, torch.Tensor]:
        out = model(x)
        return {"a": out.square().mean(), "b": out[:, 0].sum(), "c": torch.zeros(())}

    found = gradient_norms(terms(), list(model.parameters()), lambda t: t)
    for name in ("a", "b"):
        model.zero_grad()
        terms()[name].backward()
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        torch.testing.assert_close(found[name], sum(squares).sqrt())
    assert found["c"] == 0


def test_float16_rounds_no_small_gradient_to_nothing() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)

    def norm(dtype: torch.dtype, scale: float) -> float:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            terms = {"a": model(x).float().mean() * 1e-7}
        return float(gradient_norms(terms, list(model.parameters()), lambda t: t, scale)["a"])

    assert norm(torch.float16, 1.0) == 0
    assert norm(torch.float16, 2.0**16) == pytest.approx(norm(torch.float32, 1.0), rel=1e-2)


def test_a_share_of_a_cross_entropy_that_does_not_count_yet_is_not_measured() -> None:
    balance = Balance(losses(0.5, every=4))
    norms = {"cross_entropy": torch.tensor(2.0), "kv_relation": torch.tensor(0.1)}
    balance.follow(norms, 0.0, 0)
    assert float(balance.of("kv_relation")) == 1.0
    balance.follow(norms, 0.1, 4)
    assert float(balance.of("kv_relation")) == pytest.approx(1.0), "half of a tenth of 2, over a tenth"


@pytest.mark.parametrize("broken", ["cross_entropy", "kv_relation"])
def test_a_gradient_that_overflows_moves_no_weight(broken: str) -> None:
    balance = Balance(losses(0.5, every=1))
    for value in (float("inf"), float("nan")):
        norms = {"cross_entropy": torch.tensor(2.0), "kv_relation": torch.tensor(0.1), broken: torch.tensor(value)}
        balance.follow(norms, 1.0, 0)
        assert float(balance.of("kv_relation")) == 1.0
    balance.follow({"cross_entropy": torch.tensor(2.0), "kv_relation": torch.tensor(0.1)}, 1.0, 1)
    assert float(balance.of("kv_relation")) == pytest.approx(10.0), "the first that is told is taken whole"


def test_the_first_measure_is_taken_whole_and_later_ones_are_smoothed() -> None:
    balance = Balance(losses(0.5, every=4, smoothing=0.75))
    norms = {"cross_entropy": torch.tensor(2.0), "kv_relation": torch.tensor(0.1)}
    balance.follow(norms, 1.0, 0)
    assert float(balance.of("kv_relation")) == pytest.approx(10.0)
    norms["kv_relation"] = torch.tensor(1.0)
    balance.follow(norms, 1.0, 2)  # not due
    assert float(balance.of("kv_relation")) == pytest.approx(10.0)
    balance.follow(norms, 1.0, 4)
    assert float(balance.of("kv_relation")) == pytest.approx(10**0.75)
    norms["kv_relation"] = torch.tensor(0.0)  # no gradient now
    balance.follow(norms, 1.0, 8)
    assert float(balance.of("kv_relation")) == pytest.approx(10**0.75)


def test_the_weighted_gradient_has_its_share(world: World, tmp_path: Path) -> None:
    """Measured again from outside, on the first micro-batch."""
    trainer = world.trainer(
        tmp_path, losses(0.25, every=1, smoothing=0.0), max_steps=3, monitor=MonitorConfig(loss_scales_every=1)
    )
    trainer.train()
    for log in curve(trainer):
        assert log["gradient_share_kv_relation"] == pytest.approx(0.25, rel=1e-3)
    assert len({log["weight_kv_relation"] for log in curve(trainer)}) == 3


def test_accumulation_measures_once_a_step(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(
        tmp_path, losses(every=1), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2
    )
    counted = []
    follow = trainer.bridge.balance.follow
    trainer.bridge.balance.follow = lambda *args: (counted.append(args[2]), follow(*args))
    trainer.train()
    assert counted == [0, 1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resume_goes_on_with_the_weight(world: World, tmp_path: Path, checkpointing: bool) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    if checkpointing:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    whole = world.trainer(tmp_path / "whole", losses(every=2), **options)
    whole.train()
    resumed = world.trainer(tmp_path / "resumed", losses(every=2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_run(whole, resumed)


def test_checkpointing_changes_nothing(world: World, tmp_path: Path) -> None:
    plain = world.trainer(tmp_path / "a", losses(every=2))
    plain.train()
    checkpointed = world.trainer(
        tmp_path / "b", losses(every=2), gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    checkpointed.train()
    assert_same_run(plain, checkpointed)


def test_a_swamping_term_is_warned_about(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heavy = {"cross_entropy": CrossEntropy(), "kv": KVLoss(weight=1e5)}
    trainer = world.trainer(tmp_path, heavy, max_steps=1, monitor=MonitorConfig(loss_scales_every=1))
    trainer.train()
    assert "losses.kv pulls" in caplog.text


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"gradient_share": 0.0}, "gradient_share is 0.0; give a number above 0"),
        ({"every": 0}, "every is 0"),
        ({"smoothing": 1.0}, "smoothing 1.0"),
    ],
)
def test_impossible_shares_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientShare(**knobs)


@pytest.mark.parametrize(
    ("chosen", "watched", "message"),
    [
        ({**losses(), "cross_entropy": CrossEntropy(weight=0)}, 0, "losses.kv_relation.weight is a gradient_share"),
        ({"kv_relation": KVRelationLoss(weight=GradientShare())}, 0, "losses.kv_relation.weight is a gradient_share"),
        ({"cross_entropy": CrossEntropy(weight=GradientShare())}, 0, "losses.cross_entropy.weight is a gradient_share"),
        ({"cross_entropy": CrossEntropy(weight=0), "kv": KVLoss()}, 5, "monitor.loss_scales_every measures"),
    ],
)
def test_shares_need_a_cross_entropy_that_counts(
    world: World, tmp_path: Path, chosen: dict[str, Any], watched: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        world.trainer(tmp_path, chosen, monitor=MonitorConfig(loss_scales_every=watched))
