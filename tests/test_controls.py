"""Controls: what breaks a teacher breaks it as it says, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import PaddedOtherwise, World, curve, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kv_trainer.alignment.shuffle import moved, other_positions, other_rows
from kv_trainer.arguments import ControlConfig, TeacherConfig
from kv_trainer.losses import CrossEntropy, KVRelationLoss
from kv_trainer.models import load_random
from kv_trainer.resolve import resolve_teacher

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
POSITIONS = ControlConfig(shuffle="positions")


@pytest.fixture(scope="module")
def world(tiny_model: Any, tiny_tokenizer: Any) -> World:
    return World(tiny_model, tiny_tokenizer)


def relation() -> dict[str, Any]:
    return {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss()}


# ---- rows


@given(st.lists(st.integers(0, 3), min_size=2, max_size=9))
def test_every_sample_gets_another_one_and_of_its_task_where_there_is_one(tasks: list[int]) -> None:
    found = other_rows(len(tasks), torch.tensor(tasks)).tolist()
    assert sorted(found) == list(range(len(tasks))) and all(i != other for i, other in enumerate(found))
    alone = {task for task in tasks if tasks.count(task) == 1}
    apart = [i for i, other in enumerate(found) if tasks[i] != tasks[other]]
    assert sum(tasks[i] not in alone for i in apart) <= 1, "one at most makes room for a sample left over"


def test_without_tasks_it_is_the_sample_before() -> None:
    assert other_rows(4).tolist() == other_rows(4, torch.zeros(4)).tolist() == [3, 0, 1, 2]


# ---- positions


def test_every_position_gets_another_of_its_own_sample() -> None:
    found = other_positions(MASK, seed=3, step=0)
    for row, mask in zip(found, MASK.bool(), strict=True):
        real = mask.nonzero()[:, 0]
        assert sorted(row[real].tolist()) == real.tolist(), "a permutation of the real ones"
        assert len(real) < 2 or bool((row[real] != real).all())
        assert row[~mask].tolist() == (~mask).nonzero()[:, 0].tolist()


def test_it_is_another_one_each_step_and_seed_and_the_same_again() -> None:
    mask = torch.ones(2, 20)
    drawn = [other_positions(mask, seed, step) for seed, step in ((1, 0), (1, 1), (2, 0))]
    assert torch.equal(drawn[0], other_positions(mask, 1, 0))
    assert all(not torch.equal(a, b) for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2])))
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_padding_does_not_matter() -> None:
    lengths, left = (6, 3, 1, 0), torch.zeros(4, 9, dtype=torch.long)
    for b, n in enumerate(lengths):
        left[b, 9 - n :] = 1
    right, other = other_positions(MASK, 3, 5), other_positions(left, 3, 5)
    for b, n in enumerate(lengths):
        assert (other[b, 9 - n :] - (9 - n)).tolist() == right[b, :n].tolist()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 4, 5), (2, 4)])
def test_states_of_any_form_are_moved(shape: tuple[int, ...]) -> None:
    x, source = torch.randn(shape), torch.tensor([[1, 2, 3, 0], [0, 1, 3, 2]])
    found = moved(x, source)
    for b in range(2):
        for t in range(4):
            at: tuple[Any, ...] = (b, slice(None), t) if len(shape) == 4 else (b, t)
            of: tuple[Any, ...] = (b, slice(None), int(source[b, t])) if len(shape) == 4 else (b, int(source[b, t]))
            assert torch.equal(found[at], x[of])


def batch_of(trainer: Any, rows: int = 4) -> dict[str, Any]:
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(rows)]))


def test_the_bridge_teaches_each_position_what_belongs_to_another(world: World, tmp_path: Path) -> None:
    plain = world.trainer(tmp_path / "a", relation())
    broken = world.trainer(tmp_path / "b", relation(), control=POSITIONS)
    batch = batch_of(plain)
    mask, name = batch["attention_mask"], "fine"
    for step in (0, 7):
        broken.bridge.step = step
        signal = plain.teachers[name].signal(batch["teachers"][name])
        right, wrong = (t.bridge.align(name, signal, mask).kv for t in (plain, broken))
        source = other_positions(mask, plain.args.seed, step)
        assert torch.equal(wrong.mask, right.mask.gather(1, source) & mask.bool())
        for ours, theirs in zip(wrong.keys + wrong.values, right.keys + right.values, strict=True):
            assert torch.equal(ours, moved(theirs, source)) and not torch.equal(ours, theirs)


def test_a_run_with_shuffled_positions_is_another_and_does_not_depend_on_padding(world: World, tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> Any:
        trainer = world.trainer(tmp_path / name, relation(), **changes)
        trainer.train()
        return trainer

    plain, broken = run("plain"), run("broken", control=POSITIONS)
    first = [curve(trainer)[0] for trainer in (plain, broken)]
    assert first[0]["loss_cross_entropy"] == pytest.approx(first[1]["loss_cross_entropy"])
    assert first[0]["loss_kv_relation"] != pytest.approx(first[1]["loss_kv_relation"], rel=1e-3)
    base = broken.data_collator
    collator = PaddedOtherwise(base.pad_token_id, base.teacher_pad_ids, side="left", extra=3)
    moved_run = run("padded", control=POSITIONS, collator=collator)
    for name, tensor in weights(broken).items():
        assert (tensor - weights(moved_run)[name]).abs().max() < 1e-5, name
    assert broken.manifest["control"] == {"shuffle": "positions"}


# ---- teachers of random weights


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    world.model("qwen3", seed=7).save_pretrained(folder)
    world.tokenizer(40).save_pretrained(folder)
    return folder


def flat(model: Any) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_random_weights_are_those_of_the_seed_and_of_nothing_else(saved: Path) -> None:
    config = TeacherConfig(model=str(saved), random=True)
    before = torch.random.get_rng_state()
    one = flat(load_random(config, 1))
    assert torch.equal(before, torch.random.get_rng_state()), "a run draws as if there were no such teacher"
    torch.manual_seed(99)
    assert torch.equal(one, flat(load_random(config, 1)))
    assert not torch.equal(one, flat(load_random(config, 2)))


def test_the_manifest_shows_a_random_teacher(saved: Path, world: World) -> None:
    config = TeacherConfig(model=str(saved))
    real = resolve_teacher("t", config, world.tokenizer(40), seed=1).describe()
    drawn = resolve_teacher("t", replace(config, random=True), world.tokenizer(40), seed=1).describe()
    assert "random" not in real and drawn["random"] == 1, "its seed"
    assert real["weights"] != drawn["weights"] and real["tokenizer"] == drawn["tokenizer"]


def test_what_loads_weights_cannot_be_beside_random() -> None:
    with pytest.raises(ValueError, match="quantization cannot be used beside random"):
        TeacherConfig(model="org/x", random=True, quantization="4bit")
