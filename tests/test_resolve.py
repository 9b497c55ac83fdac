"""resolve.py: what a caller may give the trainer, and what each mistake is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers_trainer import ROWS, World
from transformers import TrainingArguments

from kv_trainer import MultiTeacherKVTrainer
from kv_trainer.callbacks import NonFiniteLoss
from kv_trainer.fusion import Confidence, TaskWise
from kv_trainer.losses import CrossEntropy, KVRelationLoss


@pytest.fixture(scope="module")
def world(tiny_model: Callable[..., Any], tiny_tokenizer: Callable[..., Any]) -> World:
    return World(tiny_model, tiny_tokenizer)


def broken(world: World, parameter: str) -> dict[str, Any]:
    teachers = world.teachers()
    model = teachers["deep"][0]
    weight = model.get_output_embeddings().weight if parameter == HEAD else model.get_parameter(parameter)
    weight.data.view(-1)[0] = torch.nan
    return teachers


class Own(Confidence):
    """As `confidence`, under another name."""


RELATION = {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss()}
HEAD, LAST = "the head", "gpt_neox.layers.3.attention.query_key_value.weight"


@pytest.mark.parametrize("parameter", ["gpt_neox.embed_in.weight", LAST, HEAD])
def test_a_broken_teacher_is_named_though_no_loss_shows_it(world: World, tmp_path: Path, parameter: str) -> None:
    """Shares that are NaN count for no position: the relation term would be 0, and the run one without teachers."""
    trainer = world.trainer(tmp_path, RELATION, teachers=broken(world, parameter))
    with pytest.raises(NonFiniteLoss, match="Step 1: the keys, values or likelihoods of teacher 'deep' are not finite"):
        trainer.train()


def test_a_teacher_without_likelihoods_is_named_before_the_run(world: World, tmp_path: Path) -> None:
    rows = world.encoded.add_column("task", [i % 2 for i in range(len(ROWS))])
    trainer = world.trainer(tmp_path, RELATION, teachers=broken(world, HEAD), rows=rows, fusion=TaskWise())
    with pytest.raises(ValueError, match="Teacher 'deep' gives 5 of 5 calibration rows a likelihood that is not a num"):
        trainer.train()


def test_shares_that_are_no_numbers_stop_a_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Confidence, "shares", lambda self, inputs: torch.full((2, len(inputs.tokens)), torch.nan))
    with pytest.raises(NonFiniteLoss, match="teachers' shares = nan"):
        world.trainer(tmp_path, RELATION).train()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"args": TrainingArguments}, "args is a TrainingArguments; give MultiTeacherKVConfig"),
        ({"teachers": []}, "teachers is a list; give a dict"),
        ({"losses": {"kv_relation": 1.0}}, "losses\\['kv_relation'\\] is 1.0; give one of kv_trainer.losses"),
        ({"losses": [CrossEntropy()]}, "losses is a list; give a dict"),
        ({"losses": {"cross_entropy": CrossEntropy(weight=0.0)}}, "No loss has a weight"),
        ({"fusion": "uniform"}, "fusion is 'uniform'; give one of kv_trainer.fusion"),
        ({"rows": ROWS}, "train_dataset is a list; give a datasets.Dataset"),
        ({"eval_rows": ROWS}, "eval_dataset is a list; give a datasets.Dataset"),
        ({"eval_rows": {"one": ROWS}}, "eval_dataset\\['one'\\] is a list; give a datasets.Dataset"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(world: World, tmp_path: Path, given: dict, said: str) -> None:
    args = world.arguments(tmp_path)
    for name in ("losses", "fusion"):
        setattr(args, name, given.get(name, getattr(args, name)))
    if "args" in given:
        args = given["args"](output_dir=str(tmp_path), use_cpu=True)
    rows = given.get("rows", world.encoded)
    with pytest.raises(ValueError, match=said):
        MultiTeacherKVTrainer(
            world.student(), given.get("teachers", {}), args, rows, given.get("eval_rows"),
            processing_class=world.tokenizer(40),
        )  # fmt: skip


@pytest.mark.parametrize("what", ["nowhere", "no_model"])
def test_a_model_that_is_not_there_is_named(world: World, tmp_path: Path, what: str) -> None:
    (tmp_path / "no_model").mkdir()
    where = str(tmp_path / what)
    with pytest.raises(ValueError, match=f"^teachers.math is '{where}'"):
        world.trainer(tmp_path / "out", teachers={"math": where})
    with pytest.raises(ValueError, match=f"^student is '{where}'"):
        MultiTeacherKVTrainer(where, args=world.arguments(tmp_path / "out"), train_dataset=world.encoded)


def test_a_student_that_lacks_tokens_is_told(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The student knows 20 tokens, its tokenizer .* resize_token_embeddings"):
        world.trainer(tmp_path, student=world.student(vocab_size=20))


def test_a_fusion_from_elsewhere_trains_and_resumes(world: World, tmp_path: Path) -> None:
    options = {"fusion": Own(), "save_strategy": "steps", "save_steps": 1}
    world.trainer(tmp_path, RELATION, **options, max_steps=2).train()
    again = world.trainer(tmp_path, RELATION, **options, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and again.manifest["fusion"]["method"] == "Own"


def test_several_sets_are_evaluated_by_name(world: World, tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "answer": ""} for row in ROWS])
    trainer = world.trainer(tmp_path, eval_rows={"one": rows, "two": rows.select(range(3))})
    found = trainer.evaluate()
    alone = trainer.evaluate(rows.select(range(3)))
    assert found["eval_two_loss"] == pytest.approx(alone["eval_loss"]) != found["eval_one_loss"]
    with pytest.raises(ValueError, match="eval_dataset is a str; give a datasets.Dataset"):
        trainer.evaluate("one")
    with pytest.raises(ValueError, match="without streaming=True"):
        trainer.evaluate(rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="Call evaluate"):
        trainer.predict(rows)
