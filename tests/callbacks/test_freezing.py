"""freezing.py: what rests does not move at all, what does not rest moves as if the rest were not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_callbacks import Snapshots, arguments, run, student, trainer
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState

from kv_trainer.arguments import FreezeConfig
from kv_trainer.callbacks import Freezing

ALL = {name for name, _ in student().named_parameters()}
ATTENTION = {name for name in ALL if ".self_attn." in name}


def layer(name: str) -> int | None:
    return int(name.split(".")[2]) if ".layers." in name else None


@pytest.mark.parametrize("optim", [{"optim": "adamw_torch"}, {"optim": "sgd", "optim_args": "momentum=0.9"}])
def test_attention_rests_until_its_step(tmp_path: Path, optim: dict[str, str], capsys) -> None:
    _, seen = run(tmp_path, freeze=FreezeConfig(attention=True, until_step=3), **optim)
    assert [seen.moved(step) for step in range(6)] == [ALL - ATTENTION] * 3 + [ALL] * 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "freeze" in line]
    assert lines == ["step 0 freeze: attention until step 3", "step 3 freeze: nothing rests any more"]


def test_the_others_move_as_if_the_resting_had_no_gradient(tmp_path: Path) -> None:
    """Clipping too: max_grad_norm is small enough to bind at every step."""
    _, seen = run(tmp_path / "a", max_steps=3, freeze=FreezeConfig(attention=True, until_step=9))
    model = student()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in ATTENTION)
    _, other = run(tmp_path / "b", model, max_steps=3)
    assert all(torch.equal(seen.weights[-1][name], other.weights[-1][name]) for name in ALL)


@pytest.mark.parametrize("order", ["top_down", "bottom_up"])
def test_layer_groups_wake_up_one_after_the_other(tmp_path: Path, order: str) -> None:
    freeze = FreezeConfig(layer_groups=3, unfreeze_every=2, order=order)
    _, seen = run(tmp_path, freeze=freeze)
    low = {n for n in ALL if "embed" in n or layer(n) in (0, 1)}
    middle = {n for n in ALL if layer(n) == 2}
    high = ALL - low - middle
    assert {"model.norm.weight", "lm_head.weight"} <= high and {layer(n) for n in high} == {3, None}
    first, last = (high, low) if order == "top_down" else (low, high)
    assert [seen.moved(s) for s in range(6)] == [first] * 2 + [first | middle] * 2 + [first | middle | last] * 2


def test_a_tied_head_is_one_with_the_embeddings(tmp_path: Path) -> None:
    model = student()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    _, seen = run(tmp_path, model, max_steps=1, freeze=FreezeConfig(layer_groups=2, unfreeze_every=5))
    assert "model.norm.weight" in seen.moved(0) and "model.embed_tokens.weight" not in seen.moved(0)


def test_projectors_rest_after_their_warm_up(tmp_path: Path) -> None:
    _, seen = run(tmp_path, student(bridge=True), max_steps=4, freeze=FreezeConfig(projectors_after=2))
    bridge = {"kv_bridge.weight", "kv_bridge.bias"}
    assert [seen.moved(step) for step in range(4)] == [ALL | bridge] * 2 + [ALL] * 2


def test_what_the_user_froze_stays_frozen(tmp_path: Path) -> None:
    model = student()
    own = {"model.layers.1.self_attn.k_proj.weight", "model.norm.weight"}
    for name in own:
        model.get_parameter(name).requires_grad_(False)
    _, seen = run(tmp_path, model, max_steps=4, freeze=FreezeConfig(attention=True, until_step=2))
    assert [seen.moved(step) for step in range(4)] == [ALL - ATTENTION - own] * 2 + [ALL - own] * 2
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == own


def test_no_hook_stays_after_training(tmp_path: Path) -> None:
    built, _ = run(tmp_path, max_steps=1, freeze=FreezeConfig(attention=True, until_step=2))
    assert not any(p._backward_hooks for p in built.model.parameters())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_freezes_what_the_whole_one_does(tmp_path: Path, at: int) -> None:
    settings = {"max_steps": 5, "freeze": FreezeConfig(attention=True, until_step=2), "save_strategy": "steps"}
    settings |= {"save_steps": 1}
    _, whole = run(tmp_path, **settings)
    seen = Snapshots()
    again = trainer(tmp_path, callbacks=[seen], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert [seen.moved(s) for s in range(5 - at)] == [whole.moved(s) for s in range(at, 5)]
    assert all(torch.equal(seen.weights[-1][n], whole.weights[-1][n]) for n in ALL)


def test_ddp_takes_it(tmp_path: Path) -> None:
    """The reducer waits for every parameter, and finds one that rests."""
    args, control = arguments(tmp_path), TrainerControl()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        model = DistributedDataParallel(student(), find_unused_parameters=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        callback = Freezing(FreezeConfig(attention=True, until_step=2))
        state = TrainerState()
        callback.on_train_begin(args, state, control, model=model)
        ids = torch.arange(12).view(2, 6)
        for step in range(4):
            state.global_step = step
            before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
            callback.on_step_begin(args, state, control)
            model(input_ids=ids, labels=ids).loss.backward()
            callback.on_pre_optimizer_step(args, state, control)
            optimizer.step()
            optimizer.zero_grad()
            moved = {n for n, p in model.module.named_parameters() if not torch.equal(p, before[n])}
            assert moved == (ALL - ATTENTION if step < 2 else ALL)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": True}, "until_step need each other"),
        ({"until_step": 5}, "until_step need each other"),
        ({"attention": True, "until_step": 0}, "until_step is 0; give 1 or more"),
        ({"layer_groups": 3}, "unfreeze_every need each other"),
        ({"layer_groups": 1, "unfreeze_every": 5}, "layer_groups is 1; give 2 or more"),
        ({"order": "bottom_up"}, "no effect without layer_groups"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreezeConfig(**settings)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (FreezeConfig(layer_groups=5, unfreeze_every=1), "layer_groups is 5, but the student has 4 layers"),
        (FreezeConfig(projectors_after=1), "trains no projectors"),
    ],
)
def test_settings_that_do_not_fit_the_model(tmp_path: Path, freeze: FreezeConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, freeze=freeze).train()
