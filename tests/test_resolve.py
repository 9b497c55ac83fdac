"""resolve.py: what a caller may give the trainer, and what each mistake is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from helpers_trainer import ROWS, World, curve
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, TrainingArguments

from kv_trainer import MultiTeacherKVTrainer
from kv_trainer.arguments import AlignmentConfig, DataConfig, LayerAlignment, TimeAlignment
from kv_trainer.callbacks import NonFiniteLoss
from kv_trainer.checks import check_arguments, check_launcher
from kv_trainer.data import Reader, encode_rows
from kv_trainer.fusion import Confidence, Similarity, TaskWise
from kv_trainer.losses import CrossEntropy, DistillationLoss, KVRelationLoss, LogitKD, LossInputs


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


@dataclass
class Misspelt(DistillationLoss):
    requires: ClassVar[frozenset[str]] = frozenset({"student_kv", "teacher_kvs"})


@dataclass
class Vector(DistillationLoss):
    requires: ClassVar[frozenset[str]] = frozenset({"student_kv", "teacher_kv"})

    def __call__(self, inputs: LossInputs) -> torch.Tensor:
        return inputs.student.keys[0].pow(2).mean((1, 2, 3))


class Loose(Confidence):
    needs = ("nll",)


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
        ({"losses": {"own": Misspelt()}}, "losses\\['own'\\] requires 'teacher_kvs'. Did you mean 'teacher_kv'"),
        ({"fusion": Loose()}, "Loose.needs is a tuple; give a frozenset of names"),
        ({"collator": DataCollatorWithPadding(None)}, "data_collator is a DataCollatorWithPadding, which knows no"),
        ({"rows": Dataset.from_dict({"input_ids": [[1, 2]]})}, "train_dataset has input_ids, but no labels, row"),
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
            processing_class=world.tokenizer(40), data_collator=given.get("collator"),
        )  # fmt: skip


@pytest.mark.parametrize("what", ["nowhere", "no_model"])
def test_a_model_that_is_not_there_is_named(world: World, tmp_path: Path, what: str) -> None:
    (tmp_path / "no_model").mkdir()
    where = str(tmp_path / what)
    with pytest.raises(ValueError, match=f"^teachers.math is '{where}'"):
        world.trainer(tmp_path / "out", teachers={"math": where})
    with pytest.raises(ValueError, match=f"^student is '{where}'"):
        MultiTeacherKVTrainer(where, args=world.arguments(tmp_path / "out"), train_dataset=world.encoded)


def test_a_loss_of_one_s_own_that_is_no_scalar_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"losses.own has returned a tensor of shape \[\d\]; a loss returns a scalar"):
        world.trainer(tmp_path, {"cross_entropy": CrossEntropy(), "own": Vector()}).train()


def test_a_teacher_alone_reads_with_the_tokenizer_it_was_loaded_with(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not with the student's: any ids below its vocabulary would do, and teach nonsense."""
    model, tokenizer = world.teachers()["fine"]
    model.save_pretrained(tmp_path / "fine")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "fine")
    assert len(world.tokenizer(40)) <= model.config.vocab_size
    world.trainer(tmp_path / "a", RELATION, teachers={"fine": alone}, rows=Dataset.from_list(ROWS))
    assert "Teacher 'fine' is a model without a tokenizer, so it reads with the student's" in caplog.text
    caplog.clear()
    tokenizer.save_pretrained(tmp_path / "fine")
    both = {"alone": alone, "pair": (model, tokenizer)}
    rows = world.trainer(tmp_path / "b", RELATION, teachers=both, rows=Dataset.from_list(ROWS)).train_dataset
    assert list(rows["alone/input_ids"]) == list(rows["pair/input_ids"]) != list(rows["input_ids"])
    assert "without a tokenizer" not in caplog.text


def test_a_student_is_not_its_own_teacher(world: World, tmp_path: Path) -> None:
    student = world.student()
    with pytest.raises(ValueError, match="teachers.self is the student itself; load it twice"):
        world.trainer(tmp_path, RELATION, student=student, teachers={"self": (student, world.tokenizer(40))})


@pytest.mark.parametrize("place", ["student", "teachers.big"])
def test_a_model_under_tensor_parallelism_is_refused(world: World, tmp_path: Path, place: str) -> None:
    """What transformers writes on a model that it deals out over two processes."""
    student, (teacher, tokenizer) = world.student(), world.teachers()["fine"]
    (student if place == "student" else teacher)._tp_size = 2
    with pytest.raises(ValueError, match=f"{place} was loaded in 2 parts .*has no whole keys and values"):
        world.trainer(tmp_path, RELATION, student=student, teachers={"big": (teacher, tokenizer)})


def test_teachers_that_no_loss_asks_are_told(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world.trainer(tmp_path, {"cross_entropy": CrossEntropy()})
    assert "teachers has no effect: no loss needs one; add to losses one that does" in caplog.text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"eval_steps": 5}, "training.eval_steps has no effect: training.eval_strategy is no; set it to steps."),
        ({"save_steps": 5}, "training.save_steps has no effect: training.save_strategy is no; set it to steps."),
        ({"save_steps": 5, "save_strategy": "epoch"}, "training.save_strategy is epoch; set it to steps."),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model has no effect: training.eval_strategy is no."),
        ({"save_steps": 5, "save_strategy": "steps", "eval_steps": 2, "eval_strategy": "steps"}, ""),
    ],
)
def test_a_rhythm_that_nothing_follows_is_told(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, given: dict[str, Any], told: str
) -> None:
    check_arguments(world.arguments(tmp_path, **given), {})
    assert told in caplog.text and bool(told) == bool(caplog.text)


def test_processes_that_would_train_side_by_side_are_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = world.arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, and each would train alone.*training.use_cpu"):
        check_arguments(args, {})


def test_deepspeed_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look for MPI, which is not here, once all is loaded."""
    monkeypatch.delenv("RANK", raising=False)
    check_launcher(None)
    with pytest.raises(ValueError, match="training.deepspeed needs a launcher: accelerate launch -m kv_trainer"):
        check_launcher("zero1.json")
    monkeypatch.setenv("RANK", "0")
    check_launcher("zero1.json")


def test_a_student_that_lacks_tokens_is_told(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The student.* tokenizer has .* the model only 20; .* resize_token"):
        world.trainer(tmp_path, student=world.student(vocab_size=20))


def test_a_fusion_from_elsewhere_trains_and_resumes(world: World, tmp_path: Path) -> None:
    options = {"fusion": Own(), "save_strategy": "steps", "save_steps": 1}
    world.trainer(tmp_path, RELATION, **options, max_steps=2).train()
    again = world.trainer(tmp_path, RELATION, **options, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and again.manifest["fusion"]["method"] == "Own"


@pytest.mark.parametrize("setting", ["cka", "similarity", "similarity alone"])
def test_selected_reasoning_goes_with_what_is_measured_before(world: World, tmp_path: Path, setting: str) -> None:
    """R-KV wants to know what the teacher attends to, whoever asks for its states."""
    readers = {name: Reader(tokenizer) for name, (_, tokenizer) in world.teachers().items()}
    rows = [{**row, "long": f" well, then, {row['completion']}"} for row in ROWS]
    data, time = DataConfig(teacher_text={"fine": "{long}"}, answer_markers=[" is"]), TimeAlignment("rkv")
    encoded = encode_rows(Dataset.from_list(rows), Reader(world.tokenizer(40)), readers, data, time=time)
    losses = {"cross_entropy": CrossEntropy(), "logit_kd": LogitKD()} if setting.endswith("alone") else RELATION
    layers = LayerAlignment("cka" if setting == "cka" else "relative_depth")
    fusion = {} if setting == "cka" else {"fusion": Similarity(samples=8)}
    alignment = AlignmentConfig(time=time, layers=layers)
    trainer = world.trainer(tmp_path, losses, rows=encoded, data=data, alignment=alignment, **fusion)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("name", ["qwen2.5", "../x", "Qwen/Qwen2-7B", "half", ""])
def test_a_name_that_no_file_or_module_can_have_is_refused(world: World, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"The teacher '{re.escape(name)}' needs a"):
        world.trainer(tmp_path, RELATION, teachers={name: world.teachers()["fine"]})


@pytest.mark.parametrize(("metric", "known"), [("accuracy_maths", "they are code, math"), ("accuracy_math", None)])
def test_a_task_that_is_not_evaluated_tells_no_best_checkpoint(
    world: World, tmp_path: Path, metric: str, known: str | None
) -> None:
    rows = Dataset.from_list([{**row, "answer": "", "task": ("math", "code")[i % 2]} for i, row in enumerate(ROWS)])
    options = {"metric_for_best_model": metric, "eval_strategy": "steps", "eval_steps": 1}
    if known is None:
        world.trainer(tmp_path, eval_rows=rows, **options)
        return
    with pytest.raises(ValueError, match=f"is {metric}, but no task of that name is evaluated; {known}"):
        world.trainer(tmp_path, eval_rows=rows, **options)


def test_layers_are_matched_once_however_often_train_is_called(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [[0, 1]]
    monkeypatch.setattr("kv_trainer.calibration.match_layers", lambda similarity: found[-1])
    trainer = world.trainer(tmp_path, RELATION, alignment=AlignmentConfig(layers=LayerAlignment("cka")), max_steps=1)
    trainer.train()
    first = dict(trainer.bridge.layer_maps)
    found.append([0, 0])  # what the trained student would be matched with
    trainer.train()
    assert trainer.bridge.layer_maps == first


def test_a_row_of_no_task_is_no_obstacle(world: World, tmp_path: Path) -> None:
    tasks = [None if i % 3 == 0 else i % 2 for i in range(len(ROWS))]
    trainer = world.trainer(tmp_path, RELATION, rows=world.encoded.add_column("task", tasks), fusion=TaskWise())
    trainer.train()
    assert trainer.bridge.task_nll.shape == (2, 2)


def test_a_student_that_does_not_shift_labels_itself_is_counted_like_others(world: World, tmp_path: Path) -> None:
    """Rows of which the first token has a label, as plain text without a start token has."""
    rows = encode_rows(Dataset.from_list([{"text": "two plus"}] * 4), Reader(world.tokenizer(40)), {}, DataConfig())
    assert rows[0]["labels"][0] != -100
    student = world.model("gpt2", n_layer=2, n_embd=16, n_head=2)
    with torch.no_grad():
        ids = torch.tensor(rows["input_ids"])
        logits = student.eval()(ids).logits
        naive = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    with pytest.raises(ValueError, match="student: data.max_length is 1024, but this gpt2 has 128 positions"):
        world.trainer(tmp_path, student=student, teachers={}, rows=Dataset.from_list([{"text": "two plus"}]))
    trainer = world.trainer(tmp_path, student=student, teachers={}, rows=rows, max_steps=1)
    trainer.train()
    assert curve(trainer)[0]["loss"] == pytest.approx(float(naive), rel=1e-3)


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
