"""Checkpoints: whole or passed by, of this run or refused; and teachers in host memory."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers_trainer import ROWS, World, curve, weights
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from kv_trainer.arguments import (
    AlignmentConfig,
    ControlConfig,
    EarlyStoppingConfig,
    FreezeConfig,
    LayerAlignment,
    ProjectorConfig,
    TeacherConfig,
)
from kv_trainer.callbacks import read_metrics
from kv_trainer.checkpoints import BRIDGE_FILE
from kv_trainer.checks import check_arguments
from kv_trainer.data import Reader
from kv_trainer.files import beside, folder_beside
from kv_trainer.fusion import Uniform
from kv_trainer.losses import CODILoss, CrossEntropy, GradientShare, KVLoss, KVRelationLoss
from kv_trainer.manifest import MANIFEST_FILE, check_match, fingerprint, last_whole, tokenizer_hash, what_is_missing
from kv_trainer.placement import resident
from kv_trainer.teachers import Teacher

SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def world(tiny_model: Any, tiny_tokenizer: Any) -> World:
    return World(tiny_model, tiny_tokenizer)


def losses(weight: float = 0.5) -> dict[str, Any]:
    return {"cross_entropy": CrossEntropy(), "kv": KVLoss(weight=weight)}


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("saved")
    world.trainer(folder, losses(), **SAVING).train()
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of a run of three steps, a checkpoint each (two of them kept)."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


# ---- whole


def test_a_checkpoint_is_whole_and_holds_no_pickle_of_arguments(run: Path) -> None:
    folder, passed = last_whole(run)
    assert folder is not None and folder.name == "checkpoint-3" and passed == {}
    names = {p.name for p in folder.iterdir()}
    assert {"model.safetensors", BRIDGE_FILE, MANIFEST_FILE, "trainer_state.json"} <= names
    assert "training_args.bin" not in names and not [n for n in names if n.startswith(".")]


def test_a_checkpoint_that_a_signal_asked_for_can_be_resumed(world: World, tmp_path: Path) -> None:
    """enable_jit_checkpoint keeps a mark in the folder until all is written, and takes it away."""
    former = signal.getsignal(signal.SIGTERM)
    trainer = world.trainer(tmp_path, losses(), max_steps=3, enable_jit_checkpoint=True)
    signal.signal(signal.SIGTERM, former)
    manager = next(c.jit_manager for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager"))

    class Ask(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            manager.is_checkpoint_requested = state.global_step == 2

    trainer.add_callback(Ask())
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert what_is_missing(folder) is None and not list(folder.glob("*incomplete*"))
    again = world.trainer(tmp_path, losses(), max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_a_plain_student_is_not_saved_beside_adapters_that_would_be_loaded(world: World, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    world.trainer(tmp_path / "a", losses(), peft_config=lora).save_model(str(tmp_path / "s"))
    (tmp_path / "s" / "chat_template.jinja").write_text("of another tokenizer")
    assert (tmp_path / "s" / "adapter_config.json").exists() and (tmp_path / "s" / BRIDGE_FILE).exists()
    plain = world.trainer(tmp_path / "b", {"cross_entropy": CrossEntropy()}, teachers={})
    plain.save_model(str(tmp_path / "s"))
    left = {path.name for path in (tmp_path / "s").iterdir()}
    assert not left & {"adapter_config.json", "adapter_model.safetensors", BRIDGE_FILE, "chat_template.jinja"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "s").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(plain).items() if name in again)


def test_saving_takes_away_older_weights_of_its_own_alone(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path / "run", losses())
    own = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    users = ["model_ema.safetensors", "model-best.safetensors", "modelcard.safetensors.index.json"]
    for name in [*own, *users]:
        (tmp_path / name).write_text("{}")
    trainer.save_model(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir() if "safetensors" in p.name} == {*users, "model.safetensors", BRIDGE_FILE}


@pytest.mark.parametrize("file", ["model.safetensors", BRIDGE_FILE, "optimizer.pt", "rng_state.pth"])
def test_a_file_that_is_cut_off_or_gone_is_seen(run: Path, file: str) -> None:
    path = run / "checkpoint-3" / file
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert what_is_missing(path.parent) == f"{file} is cut off"
    path.unlink()
    assert what_is_missing(path.parent) == f"{file} is not there"
    path.write_bytes(data)
    assert what_is_missing(path.parent) is None


@pytest.mark.parametrize("file", [MANIFEST_FILE, "trainer_state.json"])
def test_a_record_that_is_cut_off_or_gone_is_seen(run: Path, file: str) -> None:
    path = run / "checkpoint-3" / file
    path.write_text(path.read_text()[:-20])
    assert what_is_missing(path.parent) == "one of its records was cut off"
    path.unlink()
    assert what_is_missing(path.parent) == f"it has no {file}"


def test_resume_passes_half_a_checkpoint_by_and_says_so(
    world: World, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    trainer = world.trainer(run, losses(), **SAVING)
    with caplog.at_level(logging.WARNING):
        assert trainer.find_checkpoint(True) == str(run / "checkpoint-2")
    assert "checkpoint-3 is passed by: optimizer.pt is not there." in caplog.text
    with pytest.raises(ValueError, match="checkpoint-3 is no whole checkpoint: optimizer.pt is not there"):
        trainer.find_checkpoint(str(run / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=True)
    assert last_whole(run)[0] == run / "checkpoint-3"


# ---- runs that have ended


def test_a_run_that_has_ended_is_not_trained_on(world: World, tmp_path: Path, caplog: Any) -> None:
    """In the middle of an epoch too: Trainer alone would take a step more with every call."""
    options = {**SAVING, "max_steps": 2}
    first = world.trainer(tmp_path, losses(), **options)
    first.train()
    again = world.trainer(tmp_path, losses(), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and "checkpoint-2 is the end of its run" in caplog.text
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(again)[name]), name
    assert "train_loss" not in again.state.log_history[-1], "of no step"


@pytest.mark.parametrize(("patience", "ends"), [(1, 2), (2, 3)])
def test_a_run_that_was_stopped_early_goes_on_with_more_patience_alone(
    world: World, tmp_path: Path, patience: int, ends: int
) -> None:
    def stopping(patience: int) -> Any:
        options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 8}
        early = EarlyStoppingConfig(patience, threshold=1e9)  # nothing is a gain
        rows = Dataset.from_list([{**row, "answer": ""} for row in ROWS])
        return world.trainer(tmp_path, losses(), eval_rows=rows, early_stopping=early, **{**SAVING, **options})

    stopping(1).train()
    again = stopping(patience)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == ends


def test_what_is_logged_of_an_epoch_is_that_of_an_uninterrupted_run(world: World, tmp_path: Path) -> None:
    """Also where the checkpoint lies between two logs."""
    options = {"max_steps": 6, "logging_steps": 10, "save_strategy": "steps", "save_steps": 2}
    world.trainer(tmp_path, losses(), **options).train()
    path = tmp_path / "metrics.jsonl"
    whole = [row for row in read_metrics(path) if row.get("event") == "epoch_end"]
    world.trainer(tmp_path, losses(), **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    resumed = [row for row in read_metrics(path) if row.get("event") == "epoch_end"]
    assert [row["step"] for row in whole] == [row["step"] for row in resumed] == [3, 6]
    for one, other in zip(whole, resumed, strict=True):
        for name in ("mean_loss", "perplexity"):
            assert other[name] == pytest.approx(one[name], rel=1e-5)


def test_an_attempt_that_did_not_fit_is_not_logged_with_the_next(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path, losses(), auto_find_batch_size=True, max_steps=4, logging_steps=2)
    real, calls = trainer.compute_loss, []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory.")
        return real(*args, **kwargs)

    trainer.compute_loss = full
    trainer.train()
    for log in curve(trainer):
        assert log["loss"] == pytest.approx(log["loss_cross_entropy"] + 0.5 * log["loss_kv"], rel=1e-4)


def test_rows_that_do_not_fill_a_batch_are_an_error_where_it_would_be_dropped(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path, per_device_train_batch_size=16, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="Nothing would be trained: 10 rows are fewer than a batch of 16"):
        trainer.train()


def test_nothing_to_resume_from(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no whole checkpoint to resume from; start without --resume"):
        world.trainer(tmp_path, losses(), **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_not_whole_while_it_is_written_over(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = world.trainer(run, losses(), **SAVING)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda folder: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="checkpoint-3 could not be written, earlier checkpoints are whole: full"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert what_is_missing(run / "checkpoint-3") == f"it has no {MANIFEST_FILE}"
    assert last_whole(run)[0] == run / "checkpoint-2"


# ---- of this run


def other_teachers(world: World, kind: str) -> dict[str, Any]:
    teachers = world.teachers()
    model, tokenizer = teachers["fine"]
    if kind == "weights":
        model.get_input_embeddings().weight.data += 1e-3
    if kind == "tokenizer":
        teachers["fine"] = (model, world.tokenizer(10, bos=True))
    if kind == "one":
        del teachers["deep"]
    return teachers


@pytest.mark.parametrize(
    ("changes", "teachers", "message"),
    [
        ({}, "weights", r"teachers\.fine\.weights was \"\w+\", is \"\w+\""),
        ({}, "tokenizer", r"teachers\.fine\.tokenizer was"),
        ({}, "one", r"teachers\.deep was another, is not there"),
        ({"alignment": AlignmentConfig(layers=LayerAlignment("nearest"))}, "", "alignment.layers.method was"),
        ({"fusion": Uniform()}, "", 'fusion.method was "confidence", is "uniform"'),
        ({"learning_rate": 0.123}, "", r"optimizer.learning_rate was \S+, is 0.123"),
        ({"optim": "adamw_torch"}, "", 'optimizer.optim was "sgd", is "adamw_torch"'),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    world: World, run: Path, changes: dict[str, Any], teachers: str, message: str
) -> None:
    before = sorted(p.name for p in run.iterdir())
    trainer = world.trainer(run, losses(), teachers=other_teachers(world, teachers), **{**SAVING, **changes})
    with pytest.raises(ValueError, match=f"checkpoint-3 is of another run: .*{message}"):
        trainer.train(resume_from_checkpoint=True)
    assert sorted(p.name for p in run.iterdir()) == before, "nothing is lost"


@pytest.mark.parametrize(
    ("weight", "message"),
    [(GradientShare(0.3), r"bridge\.balance\.weights was not there"), (0.0, "bridge.projectors.* is not there")],
)
def test_losses_that_need_another_bridge_are_refused(world: World, run: Path, weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint-3 is of another run: .*{message}"):
        world.trainer(run, losses(weight), **SAVING).train(resume_from_checkpoint=True)


def test_a_loss_that_was_not_there_is_named_and_not_its_tensors(world: World, run: Path) -> None:
    more = {**losses(), "codi": CODILoss()}
    with pytest.raises(ValueError) as caught:
        world.trainer(run, more, **SAVING).train(resume_from_checkpoint=True)
    assert "losses.codi was not there, is another. Restore" in str(caught.value) and "bridge." not in str(caught.value)


def test_knobs_that_an_older_version_did_not_have_were_as_by_default(world: World, run: Path, caplog: Any) -> None:
    path = run / "checkpoint-3" / MANIFEST_FILE
    saved = json.loads(path.read_text())
    del saved["projector"]["activation"], saved["losses"]["kv"]["layers"], saved["resting"], saved["optimizer"]
    del saved["schedule"], saved["training"], saved["order"]
    path.write_text(json.dumps(saved))
    world.trainer(run, losses(), **SAVING).train(resume_from_checkpoint=True)
    assert "the rest of the run is not what it would have been" not in caplog.text
    with pytest.raises(ValueError, match='projector.activation was "silu", is "gelu"'):
        other = world.trainer(run, losses(), **SAVING, projector=ProjectorConfig(dropout=0.0, activation="gelu"))
        check_match(run / "checkpoint-3", other.manifest, sharded=False)


def test_other_layers_of_the_maps_are_refused(world: World, run: Path) -> None:
    """The optimizer's state is of the maps that were trained."""
    changed = losses()
    changed["kv"] = replace(changed["kv"], layers=[1])
    with pytest.raises(ValueError, match="checkpoint-3 is of another run: .*resting was "):
        world.trainer(run, changed, **SAVING).train(resume_from_checkpoint=True)


def test_teachers_in_another_order_are_refused(world: World, run: Path) -> None:
    """What is learned of them, as by a router, is kept in their order."""
    teachers = dict(reversed(world.teachers().items()))
    with pytest.raises(ValueError, match=r'order.teachers was \["fine", "deep"\], is \["deep", "fine"\]'):
        world.trainer(run, losses(), teachers=teachers, **SAVING).train(resume_from_checkpoint=True)


def test_losses_in_another_order_are_refused_where_their_weights_are_measured(world: World, tmp_path: Path) -> None:
    world.trainer(tmp_path, losses(GradientShare(0.3)), **SAVING).train()
    other = dict(reversed(losses(GradientShare(0.3)).items()))
    with pytest.raises(ValueError, match=r'order.losses was \["cross_entropy", "kv"\], is \["kv", "cross_entropy"\]'):
        world.trainer(tmp_path, other, **SAVING).train(resume_from_checkpoint=True)


def test_another_control_or_other_adapters_are_refused(world: World, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="control.shuffle was not there, is \"rows\""):
        trainer = world.trainer(run, losses(), **SAVING, control=ControlConfig("rows"))
        trainer.train(resume_from_checkpoint=True)
    lora = {"r": 2, "target_modules": ["k_proj"], "task_type": "CAUSAL_LM"}
    world.trainer(tmp_path, losses(), peft_config=LoraConfig(lora_alpha=4, **lora), **SAVING).train()
    with pytest.raises(ValueError, match="student.peft.lora_alpha was 4, is 64"):
        other = world.trainer(tmp_path, losses(), peft_config=LoraConfig(lora_alpha=64, **lora), **SAVING)
        other.train(resume_from_checkpoint=True)


def test_a_tokenizer_that_was_used_is_the_same(world: World) -> None:
    tokenizer = world.tokenizer(40)
    before = tokenizer_hash(tokenizer)
    tokenizer(["two", "three is six"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(tokenizer) == before != tokenizer_hash(world.tokenizer(30))


def test_the_same_teacher_under_another_name_is_the_same(world: World, run: Path, tmp_path: Path) -> None:
    model, tokenizer = world.teachers()["fine"]
    model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    teachers = {**world.teachers(), "fine": TeacherConfig(model=str(tmp_path / "copy"))}
    assert world.trainer(run, losses(), teachers=teachers, **SAVING).find_checkpoint(True)


def test_what_a_resume_may_change_is_told(world: World, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {**SAVING, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with caplog.at_level(logging.WARNING):
        world.trainer(run, losses(0.25), **options).train(resume_from_checkpoint=True)
    assert "losses.kv.weight was 0.5, is 0.25" in caplog.text
    assert "step.per_device_train_batch_size was 4, is 2" in caplog.text
    assert "schedule.max_steps was 3, is 4" in caplog.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lr_scheduler_type": "constant"}, 'schedule.lr_scheduler_type was "linear", is "constant"'),
        ({"max_grad_norm": 0.5}, "schedule.max_grad_norm was 1.0, is 0.5"),
        ({"warmup_steps": 2}, "schedule.warmup_steps was 0, is 2"),
        ({"freeze": FreezeConfig(attention=True, until_step=1)}, "schedule.freeze.until_step was not there, is 1"),
        ({"data_seed": 7}, "training.data_seed was not there, is 7"),
        ({"neftune_noise_alpha": 5.0}, "training.neftune_noise_alpha was not there, is 5.0"),
        ({"ignore_data_skip": True}, "training.ignore_data_skip was false, is true"),
        ({"bf16": True}, "training.bf16 was false, is true"),
    ],
)
def test_another_schedule_or_order_of_rows_is_told(
    world: World, run: Path, caplog: Any, change: dict[str, Any], told: str
) -> None:
    with caplog.at_level(logging.WARNING):
        world.trainer(run, losses(), **{**SAVING, **change}).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert told in caplog.text


def test_a_manifest_names_no_folder_of_this_machine(run: Path, world: World, tmp_path: Path) -> None:
    model, tokenizer = world.teachers()["fine"]
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    config = TeacherConfig(model=str(tmp_path / "mine"))
    trainer = world.trainer(tmp_path / "out", losses(), teachers={"fine": config})
    assert trainer.manifest["teachers"]["fine"]["model"] == "mine"
    assert str(tmp_path) not in json.dumps(trainer.manifest)
    assert trainer.manifest["teachers"]["fine"]["weights"] == fingerprint(model)
    assert trainer.manifest["teachers"]["fine"]["tokenizer"] == tokenizer_hash(tokenizer)


# ---- files


def test_what_fails_leaves_nothing_and_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("old")
    for write in (beside, folder_beside):
        with pytest.raises(RuntimeError), write(tmp_path / "model" if write is beside else tmp_path) as temporary:
            (temporary if write is beside else temporary / "model").write_text("new")
            raise RuntimeError
        assert [p.name for p in tmp_path.iterdir()] == ["model"] and (tmp_path / "model").read_text() == "old"
    (tmp_path / ".saving-1").mkdir()
    (tmp_path / ".onnx.12.tmp").mkdir()  # another command's
    (tmp_path / ".mine.tmp").write_text("not ours")
    (tmp_path / ".x.1.tmp").write_text("half")
    with folder_beside(tmp_path) as temporary:
        (temporary / "model").write_text("new")
        (temporary / "templates").mkdir()
        (temporary / "templates" / "a").write_text("a")
    with folder_beside(tmp_path) as temporary:  # a folder that is there already
        (temporary / "templates").mkdir()
        (temporary / "templates" / "a").write_text("b")
    assert {p.name for p in tmp_path.iterdir()} == {"model", "templates", ".onnx.12.tmp", ".mine.tmp"}
    assert (tmp_path / "model").read_text() == "new" and (tmp_path / "templates" / "a").read_text() == "b"


def test_one_process_takes_one_gpu(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = world.arguments(tmp_path, losses())
    args._n_gpu = 2
    with caplog.at_level(logging.WARNING):
        check_arguments(args, {})
    assert args.n_gpu == 1 and "One process sees 2 GPUs and trains on the first" in caplog.text


# ---- teachers in host memory


def test_resident_copies_in_and_puts_back_uncopied() -> None:
    module = nn.Linear(3, 2)
    held = [p.data_ptr() for p in module.parameters()]
    x = torch.randn(4, 3)
    expected = module(x)
    with pytest.raises(RuntimeError), resident(module, torch.device("cpu")):
        assert all(p.data_ptr() != pointer for p, pointer in zip(module.parameters(), held))
        torch.testing.assert_close(module(x), expected)
        raise RuntimeError
    assert [p.data_ptr() for p in module.parameters()] == held


def test_offloaded_teachers_are_there_one_at_a_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And teach the same."""
    import kv_trainer.teachers as module

    present, most = [], []

    def watched(part: nn.Module, device: torch.device) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def inside() -> Any:
            with resident(part, device):
                present.append(part)
                most.append(len(present))
                yield
                present.remove(part)

        return inside()

    monkeypatch.setattr(module, "resident", watched)
    offloaded = {n: Teacher(m, Reader(t), placement="offloaded") for n, (m, t) in world.teachers().items()}
    chosen = {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss()}
    trainer = world.trainer(tmp_path / "a", chosen, teachers=offloaded)
    trainer.train()
    monkeypatch.undo()
    plain = world.trainer(tmp_path / "b", chosen)
    plain.train()
    assert set(most) == {1} and len(most) >= 6
    assert [log["loss"] for log in curve(trainer)] == [log["loss"] for log in curve(plain)]


@pytest.mark.parametrize("other", [{"quantization": "8bit"}, {"device_map": "auto"}])
def test_placements_that_exclude_each_other(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(other))} cannot be used beside placement: offloaded"):
        replace(TeacherConfig(model="x"), placement="offloaded", **other)


def test_sharding_over_one_process_is_told(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = world.teachers()["fine"]
    teacher = Teacher(model, Reader(tokenizer), placement="sharded")
    with caplog.at_level(logging.WARNING):
        world.trainer(tmp_path, losses(), teachers={"fine": teacher}).train()
    assert "teachers.fine.placement is sharded, but there is one process" in caplog.text


def test_what_a_device_map_placed_is_not_moved(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = world.teachers()["fine"]
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    config = TeacherConfig(model=str(tmp_path / "mine"), device_map={"": "cpu"})
    monkeypatch.setattr(type(model), "to", lambda *args, **options: pytest.fail("it was moved"))
    trainer = world.trainer(tmp_path / "out", losses(), teachers={"fine": config})
    assert trainer.teachers["fine"].placement == "dispatched"
    trainer.train()
