"""Weights of other precisions, quantised teachers, recomputed activations, and compiled students."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers_trainer import World, assert_same_run, curve

import kv_trainer.resolve
from kv_trainer.arguments import CHECKPOINTING, MultiTeacherKVConfig, TeacherConfig
from kv_trainer.capture import capture_kv, kv_shape
from kv_trainer.fusion import Router
from kv_trainer.losses import LOSSES, CrossEntropy, DistillationLoss, GradientShare, KVRelationLoss
from kv_trainer.models import load_pretrained
from kv_trainer.placement import place
from kv_trainer.recipes import load_recipe, save_recipe
from kv_trainer.resolve import wants_checkpointing
from kv_trainer.trainer import MultiTeacherKVTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
HALF = torch.bfloat16
IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="session")
def world(tiny_model, tiny_tokenizer) -> World:
    return World(tiny_model, tiny_tokenizer)


def with_text(name: str) -> dict[str, DistillationLoss]:
    return {"cross_entropy": CrossEntropy(), name: LOSSES[name]()}


# ---- precision of the weights

PRECISIONS: dict[str, dict[str, Any]] = {
    "bfloat16 teachers": {"teachers": HALF},
    "float16 teachers": {"teachers": torch.float16},
    "bfloat16 student": {"student": HALF},
    "bfloat16 all": {"student": HALF, "teachers": HALF},
    "autocast": {"bf16": True},
    "autocast, bfloat16 teachers": {"bf16": True, "teachers": HALF},
}
exact: dict[str, float] = {}


def trained(
    world: World, folder: Path, losses: dict[str, DistillationLoss], student: torch.dtype = torch.float32,
    teachers: torch.dtype = torch.float32, **changes: Any,
) -> MultiTeacherKVTrainer:  # fmt: skip
    given = {name: (model.to(teachers), tokenizer) for name, (model, tokenizer) in world.teachers().items()}
    taught = given if set(losses) != {"cross_entropy"} else {}
    trainer = world.trainer(folder, losses, student=world.student().to(student), teachers=taught, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_in_every_precision(world: World, tmp_path: Path, name: str, precision: str) -> None:
    """Finite, and as in float32 but for rounding: 8 bits of mantissa, 0.4%, in the models and nowhere else."""
    if name not in exact:
        exact[name] = curve(trained(world, tmp_path, with_text(name), max_steps=1))[0][f"loss_{name}"]
    trainer = trained(world, tmp_path, with_text(name), max_steps=2, **PRECISIONS[precision])
    logs = curve(trainer)
    assert all(math.isfinite(v) for log in logs for k, v in log.items() if k.startswith(("loss", "grad_norm")))
    assert logs[0][f"loss_{name}"] == pytest.approx(exact[name], rel=0.01)
    assert all(p.dtype == torch.float32 for p in trainer.bridge.parameters())
    ours = {p.dtype for n, p in trainer.model.named_parameters() if "kv_bridge" not in n}
    assert ours == {PRECISIONS[precision].get("student", torch.float32)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_router_stays_in_float32(world: World, tmp_path: Path, precision: str) -> None:
    trainer = trained(world, tmp_path, with_text("kv_relation"), fusion=Router(), **PRECISIONS[precision])
    assert {p.dtype for p in trainer.bridge.router.parameters()} == {torch.float32}
    assert all(math.isfinite(log["loss"]) for log in curve(trainer))


def test_positions_are_not_rounded_to_an_engine_s_precision(world: World, tmp_path: Path) -> None:
    """Trainer casts the floats of a batch to DeepSpeed's dtype, in which 257.0 is 256; it asks `_prepare_input`."""
    trainer = world.trainer(tmp_path)
    trainer.is_deepspeed_enabled = True
    batch = {"teachers": {"fine": {"index": torch.tensor([[256.5, 257.0]])}}, "row": torch.tensor([1])}
    found = trainer._prepare_inputs(batch)["teachers"]["fine"]["index"]
    assert found.dtype == torch.float32 and found.tolist() == [[256.5, 257.0]]


def test_sinks_that_an_engine_deals_out_are_refused(world: World, tmp_path: Path, monkeypatch) -> None:
    """Of GPT-OSS: they are read once the layers have let go of them."""
    losses = {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss(attention="student")}
    student = world.model("gpt_oss")
    world.trainer(tmp_path, losses, student=student)
    monkeypatch.setattr("kv_trainer.trainer.zero_stage", lambda accelerator: 3)
    with pytest.raises(ValueError, match="attention: student reads the student's attention sinks, which ZeRO-3"):
        world.trainer(tmp_path, losses, student=world.model("gpt_oss"))
    world.trainer(tmp_path, losses)


@pytest.mark.parametrize("name", ["codi", "router", "router of layers"])
def test_maps_that_an_engine_has_cast_are_fed_their_own_precision(world: World, tmp_path: Path, name: str) -> None:
    """DeepSpeed and FSDP2 cast the bridge with the student; on two processes it is tests/distributed that trains."""
    fusion = {} if name == "codi" else {"fusion": Router(per_layer=name != "router")}
    trainer = world.trainer(tmp_path, with_text("codi" if name == "codi" else "kv_relation"), **fusion)
    trainer.model.kv_bridge.to(HALF)
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in curve(trainer))
    assert name == "codi" or trainer.bridge.weights.dtype == torch.float32


def test_teachers_of_a_recipe_have_their_own_precision(tiny_model, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert load_pretrained(TeacherConfig(model=str(tmp_path), dtype="bfloat16")).dtype == HALF


# ---- quantised teachers

has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(has_bitsandbytes, reason="bitsandbytes is installed")
def test_quantisation_says_what_to_install(tiny_model, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization: 4bit needs bitsandbytes.*pip install bitsandbytes"):
        load_pretrained(TeacherConfig(model=str(tmp_path), quantization="4bit"))


@pytest.mark.skipif(not has_bitsandbytes, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits, error", [("8bit", 0.03), ("4bit", 0.2)])
def test_quantised_teacher_is_captured_and_teaches(
    world: World, tiny_model, tiny_tokenizer, tmp_path: Path, bits: str, error: float
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    whole = tiny_model("llama", seed=7, **sizes)
    whole.save_pretrained(tmp_path / "t")
    tiny_tokenizer().save_pretrained(tmp_path / "t")
    config = TeacherConfig(model=str(tmp_path / "t"), quantization=bits)
    model = load_pretrained(config)
    assert type(model.model.layers[0].self_attn.k_proj).__module__.startswith("bitsandbytes")
    assert kv_shape(model) == kv_shape(whole), "also the number of parameters"
    states = []
    for teacher in (model, whole):
        with torch.no_grad(), capture_kv(teacher) as capture:
            teacher(IDS)
            states.append(capture.stop(torch.ones_like(IDS)))
    for part in ("keys", "values"):  # of the first layer: the others add up
        found, expected = (getattr(s, part)[0] for s in states)
        assert 1e-4 < (found - expected).norm() / expected.norm() < error

    rows = Dataset.from_list([{"text": "two plus two is four"}, {"text": "nine times three is not five"}] * 2)
    trainer = world.trainer(tmp_path / "out", with_text("kv"), teachers={"t": config}, rows=rows)
    trainer.train()
    assert all(math.isfinite(log["loss_kv"]) for log in curve(trainer))


def test_quantised_teacher_is_not_moved_but_must_be_where_the_student_is(tiny_model) -> None:
    model = tiny_model("llama")
    model.quantization_method = "bitsandbytes"
    model.to = lambda *a, **k: pytest.fail("it was moved")
    place("t", model, "replicated", torch.device("cpu"))
    with pytest.raises(ValueError, match="Teacher 't' was quantised on cpu, but the student trains on cuda:1"):
        place("t", model, "replicated", torch.device("cuda", 1))


# ---- gradient checkpointing


def config(tmp_path: Path, **changes: Any) -> MultiTeacherKVConfig:
    return MultiTeacherKVConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_large_students_are_checkpointed_unless_told_otherwise(tmp_path: Path, name: str) -> None:
    unsaid = config(tmp_path)
    assert wants_checkpointing(unsaid, 1_500_000_000) and not wants_checkpointing(unsaid, 1_000_000_000)
    assert wants_checkpointing(dataclasses.replace(unsaid), 1_500_000_000), "a copy has not been told either"
    for said in (True, False):
        told = config(tmp_path, **{name: said})
        assert all(getattr(told, other) is said for other in CHECKPOINTING)
        assert not wants_checkpointing(told, 1_500_000_000)


def test_a_large_student_trains_with_less_memory_alike(world: World, tmp_path, monkeypatch, caplog) -> None:
    plain = trained(world, tmp_path, with_text("kv"))
    assert not plain.args.gradient_checkpointing
    monkeypatch.setattr(kv_trainer.resolve, "CHECKPOINTED_FROM", 1000)
    with caplog.at_level(logging.WARNING):
        large = trained(world, tmp_path, with_text("kv"))
    assert sum("gradient checkpointing is on" in record.message for record in caplog.records) == 1
    assert large.model.model.gradient_checkpointing
    assert large.args.gradient_checkpointing is True
    assert large.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert_same_run(plain, large)
    refused = trained(world, tmp_path, with_text("kv"), gradient_checkpointing=False)
    assert not refused.model.model.gradient_checkpointing


def test_what_a_recipe_says_of_it_survives(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "student: {model: gpt2}\ndata: {path: x, eval_split: null}\ntraining: {use_cpu: true%s}\n"
    for said, value in ((f", {CHECKPOINTING[0]}: false", False), ("", None)):
        Path("r.yaml").write_text(text % said)
        save_recipe(load_recipe("r.yaml"), "s.yaml")
        assert getattr(load_recipe("s.yaml").args, CHECKPOINTING[0]) is value
        assert (CHECKPOINTING[0] in Path("s.yaml").read_text()) == bool(said)


# ---- torch.compile


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """TrainingArguments names its backend in the environment, from where later runs would take it."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")


@pytest.mark.slow
def test_compiled_models_are_one_graph_each_and_teach_the_same(
    world: World, tmp_path: Path, compiler: None
) -> None:
    """Every loss at once, a weight that follows the gradient, and not one graph break."""
    losses = {n: LOSSES[n]() for n in LOSSES} | {"kv_relation": KVRelationLoss(weight=GradientShare(every=2))}
    batch = {"per_device_train_batch_size": len(world.encoded)}  # one shape, one graph
    plain = trained(world, tmp_path, losses, **batch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = trained(world, tmp_path, losses, torch_compile_backend="aot_eager", **batch)
    counters = torch._dynamo.utils.counters
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    assert not counters["graph_break"]
    assert 3 <= counters["stats"]["unique_graphs"] <= 4  # the student, once more while it is measured, two teachers
    assert_same_run(plain, compiled, tolerance=1e-5)


def test_compiling_and_recomputing_warns(world: World, tmp_path: Path, caplog, compiler: None) -> None:
    with caplog.at_level(logging.WARNING):
        world.trainer(tmp_path, with_text("kv"), torch_compile_backend="aot_eager", gradient_checkpointing=True)
    assert any("breaks the student's graph in every layer" in record.message for record in caplog.records)
