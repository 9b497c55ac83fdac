"""The trainer on real, tiny models: what must not change a run, what is saved, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers_trainer import ROWS, PaddedOtherwise, World, assert_same_run, curve, weights
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from kv_trainer import collator
from kv_trainer.arguments import ControlConfig, DataConfig, ProjectorConfig, StudentConfig, TeacherConfig
from kv_trainer.calibration import typical
from kv_trainer.checkpoints import BRIDGE_FILE
from kv_trainer.checks import check_arguments, doubtful
from kv_trainer.collator import text_batch
from kv_trainer.data import Reader, encode_rows
from kv_trainer.fusion import Confidence, Entropy, Fusion, FusionInputs, Uniform
from kv_trainer.losses import CKALoss, CODILoss, CrossEntropy, KVLoss, KVRelationLoss, LogitKD
from kv_trainer.model_checks import tokens_of_text
from kv_trainer.resolve import resolve_student, resolve_teacher
from kv_trainer.teachers import HOPELESS, Teacher, TeacherNeeds
from kv_trainer.trainer import MultiTeacherKVTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

TO_STUDENT = {"projector": ProjectorConfig(direction="teacher_to_student", learning_rate=0.05)}
TO_TEACHER = {"projector": ProjectorConfig(direction="student_to_teacher", learning_rate=0.05)}
# name -> losses, and sections of the recipe
KINDS = {
    "ce": ({"cross_entropy": CrossEntropy()}, {}),
    # Two samples a group: in the same micro-batch however a step is cut here.
    "relation": ({"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss(samples=2)}, {}),
    "kv to teacher": ({"cross_entropy": CrossEntropy(), "kv": KVLoss()}, TO_TEACHER),
    "kv to student": ({"cross_entropy": CrossEntropy(), "kv": KVLoss(metric="smooth_l1")}, TO_STUDENT),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def world(tiny_model, tiny_tokenizer) -> World:
    return World(tiny_model, tiny_tokenizer)


@pytest.fixture
def start(world: World, tmp_path: Path):
    """``start(kind, **changes)``: a trainer of that kind; ``run`` also trains it."""
    count = iter(range(100))

    def make(kind: str, **changes) -> MultiTeacherKVTrainer:
        losses, sections = KINDS[kind]
        return world.trainer(tmp_path / str(next(count)), losses, **{**sections, **changes})

    return make


@pytest.fixture
def run(start):
    def trained(kind: str, **changes) -> MultiTeacherKVTrainer:
        trainer = start(kind, **changes)
        trainer.train()
        return trainer

    return trained


# ---- what must not change a run


@every_kind
def test_accumulation_is_a_larger_batch(run, kind: str) -> None:
    """Also in the last step of an epoch, which has two rows: 8 + 2, or 4 x 2 + 1 x 2."""
    whole = run(kind, per_device_train_batch_size=8, max_steps=4)
    cut = run(kind, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4)
    assert_same_run(whole, cut)


def test_accumulation_of_a_student_that_takes_no_loss_arguments(world, run) -> None:
    """Trainer counts tokens for such a model no longer; the losses need the count all the same."""

    def student() -> nn.Module:
        model = world.student()
        model.accepts_loss_kwargs = False
        return model

    whole = run("ce", student=student(), per_device_train_batch_size=4)
    cut = run("ce", student=student(), per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_run(whole, cut)
    assert_same_run(whole, run("ce"))


@pytest.mark.parametrize(
    "padding", [{"extra": 5}, {"token": 77}, {"side": "left"}, {"side": "left", "extra": 6, "token": 77}], ids=str
)
@every_kind
def test_padding_changes_nothing(world, start, run, kind: str, padding: dict) -> None:
    """On either side, any amount, any content; for rotary models, which see distances alone."""
    reference = start(kind, max_steps=2)
    pads = (reference.data_collator.pad_token_id, reference.data_collator.teacher_pad_ids)
    reference.train()
    assert_same_run(reference, run(kind, max_steps=2, collator=PaddedOtherwise(*pads, **padding)), tolerance=1e-5)


@every_kind
def test_the_order_of_a_batch_changes_nothing(start, run, kind: str) -> None:
    reference = start(kind)
    collate = reference.data_collator
    reference.train()
    assert_same_run(reference, run(kind, collator=lambda rows: collate(rows[::-1])))


@every_kind
@pytest.mark.parametrize("reentrant", [None, {"use_reentrant": False}], ids=["default", "not reentrant"])
def test_gradient_checkpointing_changes_nothing(run, kind: str, reentrant: dict | None) -> None:
    kept = run(kind)
    assert_same_run(kept, run(kind, gradient_checkpointing=True, gradient_checkpointing_kwargs=reentrant))


def test_rows_of_text_are_encoded_as_those_given_encoded(run) -> None:
    assert_same_run(run("kv to teacher"), run("kv to teacher", rows=Dataset.from_list(ROWS)), tolerance=0)


def test_models_by_name_are_those_given_as_instances(world, run, tmp_path: Path) -> None:
    named = {}
    for name, (model, tokenizer) in world.teachers().items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        attn = {"attn_implementation": "eager"}
        named[name] = TeacherConfig(model=str(tmp_path / name), **attn)
    world.student().save_pretrained(tmp_path / "student")
    by_name = run("relation", teachers=named, student=str(tmp_path / "student"), rows=Dataset.from_list(ROWS))
    assert_same_run(run("relation"), by_name, tolerance=1e-5)


def test_without_teachers_it_is_a_trainer(world, run, tmp_path: Path) -> None:
    """Same losses, gradient norms and weights as transformers.Trainer, accumulation included."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    ours = run("ce", teachers={}, **options)
    theirs = Trainer(
        world.student(),
        TrainingArguments(
            output_dir=str(tmp_path / "plain"), use_cpu=True, report_to="none", disable_tqdm=True, seed=3,
            save_strategy="no", logging_steps=1, optim="sgd", learning_rate=0.05, remove_unused_columns=False,
            **options,
        ),
        data_collator=lambda rows: text_batch(rows, "", 0),
        train_dataset=world.encoded,
    )  # fmt: skip
    theirs.train()
    for a, b in zip(curve(ours), curve(theirs), strict=True):
        assert [a["loss"], a["grad_norm"]] == pytest.approx([b["loss"], b["grad_norm"]], rel=1e-5)
    assert curve(ours)[-1]["loss"] < curve(ours)[0]["loss"]
    found, expected = weights(ours), theirs.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_cross_entropy_alone_is_the_same_with_teachers(run) -> None:
    assert_same_run(run("ce"), run("ce", teachers={}), tolerance=0)


# ---- resume and save


@pytest.mark.parametrize("kind", ["relation", "kv to teacher", "kv to student"])
def test_a_resumed_run_is_the_uninterrupted_one(world, start, kind: str, tmp_path: Path) -> None:
    """In the middle of an epoch, with AdamW's moments, a schedule, and a log interval that the stop cuts."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = start(kind, **options)
    whole.train()
    resumed = start(kind, **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    # Not to the last bit: a resumed run reads rows with all teachers until it knows their likelihoods again.
    assert_same_run(whole, resumed)
    if "kv" in kind:
        assert any(not torch.equal(x, y) for x, y in zip(*bridge_files(whole, (2, 4)), strict=True)), "projectors learn"


def bridge_files(trainer: MultiTeacherKVTrainer, steps: tuple[int, ...]) -> list[list[torch.Tensor]]:
    files = [load_file(f"{trainer.args.output_dir}/checkpoint-{step}/{BRIDGE_FILE}") for step in steps]
    return [[file[name] for name in sorted(file)] for file in files]


def test_a_checkpoint_without_the_bridge_is_refused(start, tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = start("kv to teacher", **options)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-1"
    (checkpoint / BRIDGE_FILE).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-1 is no whole checkpoint: {BRIDGE_FILE} is not there"):
        start("kv to teacher", **options).train(resume_from_checkpoint=str(checkpoint))


def test_the_best_model_comes_with_its_bridge(world, start) -> None:
    """'Best' is turned around, so that it is the first checkpoint and not what training ended with."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = start("kv to teacher", eval_rows=world.encoded, **options, **best)
    trainer.train()
    first = Path(trainer.args.output_dir) / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(first)
    student, bridge = load_file(first / "model.safetensors"), load_file(first / BRIDGE_FILE)
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in student.items())
    assert all(torch.equal(trainer.bridge.state_dict()[name], tensor) for name, tensor in bridge.items())
    last = load_file(first.with_name("checkpoint-3") / BRIDGE_FILE)
    assert any(not torch.equal(bridge[name], last[name]) for name in bridge)


LOAD = """
import sys
sys.modules["kv_trainer"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
try:
    import kv_trainer
except ImportError:
    model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
    assert not any(info.values()), info
    assert not any("kv_bridge" in name for name in model.state_dict())
    torch.save(model.eval()(torch.arange(3, 23)[None]).logits, sys.argv[2])
"""


def test_a_saved_student_is_a_plain_model(start, tmp_path: Path) -> None:
    """Both a checkpoint and a final save; loaded where this package cannot be imported."""
    trainer = start("kv to teacher", max_steps=2, save_strategy="steps", save_steps=2)
    assert trainer.model.config.use_cache is False, "Trainer switches it off"
    trainer.train()
    trainer.save_model()
    for folder in (Path(trainer.args.output_dir) / "checkpoint-2", Path(trainer.args.output_dir)):
        saved = load_file(folder / "model.safetensors")
        assert saved and not any("kv_bridge" in name for name in saved)
        bridge, ours = load_file(folder / BRIDGE_FILE), trainer.bridge.state_dict()
        assert bridge.keys() == ours.keys() and all(torch.equal(bridge[name], ours[name]) for name in ours)
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
        assert (folder / "tokenizer.json").exists() and not list(folder.glob("*.tmp"))
    command = [sys.executable, "-I", "-c", LOAD, str(folder), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    with torch.no_grad():
        ours = trainer.model.eval()(torch.arange(3, 23)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_stays_as_it_was(world, start, use_cache: bool) -> None:
    student = world.student(use_cache=use_cache)
    trainer = start("ce", student=student, teachers={}, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    config = Path(trainer.args.output_dir) / "checkpoint-1" / "config.json"
    assert json.loads(config.read_text())["use_cache"] is use_cache
    assert trainer.model.config.use_cache is use_cache


def test_without_projectors_the_bridge_file_is_empty(start) -> None:
    trainer = start("relation")
    trainer.save_model()
    assert load_file(Path(trainer.args.output_dir) / BRIDGE_FILE) == {}


# ---- teachers that need not run


@pytest.mark.parametrize("kind", ["relation", "kv to teacher", "kv to student"])
def test_skipping_teachers_without_a_share_changes_nothing(run, start, monkeypatch, kind: str) -> None:
    """At a low temperature one teacher has all of a row; from the second epoch on (step 4) no other reads it."""
    sharp = {"fusion": Confidence(temperature=1e-3), "max_steps": 7}
    read: list[int] = []
    signal = Teacher.signal

    def counted(self, batch, rows=None, scores=True, weighing=True):
        if not scores:
            read.append(len(batch["input_ids"]) if rows is None else len(rows))
        return signal(self, batch, rows, scores, weighing)

    monkeypatch.setattr(Teacher, "signal", counted)
    skipping = run(kind, **sharp)
    calibrating = 2 * 2 if kind == "kv to teacher" else 0  # batches of eight of the ten rows
    assert len(read) == calibrating + 2 * 4, "two teachers in each step after the first epoch"
    assert sum(read[calibrating:]) < 2 * (10 + 4), "fewer rows than if both teachers read all"
    full = start(kind, **sharp)
    full.panel.signals = lambda batch, _: {n: t.signal(batch["teachers"][n]) for n, t in full.teachers.items()}
    full.train()
    assert_same_run(skipping, full)


@pytest.mark.parametrize("fusion", [Confidence(), Uniform()], ids=["confidence", "uniform"])
def test_rows_that_a_teacher_reads_alike_are_read_once(world, tmp_path: Path, monkeypatch, fusion: Fusion) -> None:
    """All that a teacher can say is used; the run is the one in which every row is read."""
    losses = {
        "cross_entropy": CrossEntropy(), "kv": KVLoss(weight=0.5), "codi": CODILoss(), "logit_kd": LogitKD(weight=0.1),
        "kv_relation": KVRelationLoss(attention="teacher", attention_warmup_steps=0),
    }  # fmt: skip
    rows = world.encoded.select([0, 1, 0, 2, 2, 2, 3, 4]).remove_columns("row").add_column("row", [*range(8)])
    rows = rows.remove_columns("answer_position").add_column("answer_position", [3] * 8)
    kept: list[MultiTeacherKVTrainer] = []
    read: list[int] = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(collator, "repetitions", lambda rows, prefix: {})
        options = {"rows": rows, "fusion": fusion, "per_device_train_batch_size": 8, "max_steps": 1}
        trainer = world.trainer(tmp_path / str(apart), losses, projector=ProjectorConfig(dropout=0.0), **options)
        seen: list[int] = []
        for teacher in trainer.teachers.values():
            teacher.model.base_model.register_forward_pre_hook(
                lambda *given, seen=seen: seen.append(len(given[2]["input_ids"])), with_kwargs=True
            )
        trainer.train()
        kept.append(trainer)
        read.append(sum(seen[-2:]))
    assert read == [2 * 5, 2 * 8]
    assert_same_run(*kept, tolerance=1e-5)


def test_one_vocabulary_in_heads_of_other_widths_is_compared(world, tmp_path: Path) -> None:
    """As Qwen2-1.5B and 7B: the same tokenizer, and rows of the head that are padding."""
    teacher = (world.student(seed=9, vocab_size=world.student().config.vocab_size + 24), world.tokenizer(40))
    rows = encode_rows(Dataset.from_list(ROWS), Reader(world.tokenizer(40)), {"big": Reader(teacher[1])}, DataConfig())
    losses = {"cross_entropy": CrossEntropy(), "logit_kd": LogitKD()}
    trainer = world.trainer(tmp_path, losses, teachers={"big": teacher}, rows=rows, max_steps=1)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["loss_logit_kd"] < 10


def test_a_teacher_that_read_nothing_of_the_answer_is_not_sure_of_it(world) -> None:
    teacher = Teacher(world.student(seed=1), Reader(world.tokenizer(0)))
    teacher.prepare((0,), TeacherNeeds(scores=True))
    batch = text_batch([{"input_ids": [3, 4, 5], "labels": [-100, -100, 5]}] * 2, "", 0)
    batch["labels"][1] = -100
    batch |= {"index": torch.zeros((2, 3), dtype=torch.long), "supervised": torch.tensor([1, 1])}
    found = teacher.signal(batch)
    assert found.nll[1] == found.entropy[1] == HOPELESS and found.entropy[0] < 1
    both = torch.stack([found.entropy.flip(0), found.entropy])
    shares = Entropy().shares(FusionInputs(torch.ones(2), torch.ones(2), entropy=both))
    assert shares.argmax(0).tolist() == [1, 0]


def test_rows_cut_to_nothing_do_not_cost_a_teacher_its_task() -> None:
    nats = torch.tensor([[0.2, 0.2, HOPELESS / 40], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(typical(nats), torch.tensor([0.2, 1.0]))
    assert typical(nats[:, 2:])[0] > typical(nats[:, 2:])[1], "nothing else is known"


def test_rows_with_the_same_number_are_refused(start, world) -> None:
    with pytest.raises(ValueError, match="have the same number"):
        start("relation", rows=concatenate_datasets([world.encoded, world.encoded]))


# ---- who learns, and how fast


class Rates(TrainerCallback):
    """The learning rate of every group at the start of each step."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.steps.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("method", ["linear", "elastic_bottleneck"])
def test_projectors_learn_at_their_own_rate(start, method: str) -> None:
    knobs = ProjectorConfig(method=method, learning_rate=0.3)
    trainer = start("kv to teacher", projector=knobs, weight_decay=0.1, optim="adamw_torch")
    groups = trainer.create_optimizer().param_groups
    names = {p: n for n, p in trainer.model.named_parameters()}
    counted = [names[p] for group in groups for p in group["params"]]
    assert sorted(counted) == sorted(n for n, p in trainer.model.named_parameters() if p.requires_grad)
    kinds = set()
    for group in groups:
        ours = {names[p].startswith("kv_bridge.") for p in group["params"]}
        assert len(ours) == 1, "a group is the student's or the bridge's"
        assert group["lr"] == (0.3 if ours == {True} else 0.05)
        for parameter in group["params"]:
            plain = names[parameter].endswith("bias") or "norm" in names[parameter] or ".width.0." in names[parameter]
            assert group["weight_decay"] == (0.0 if plain else 0.1), names[parameter]
        kinds.add((ours.pop(), group["weight_decay"]))
    assert kinds >= {(True, 0.0), (True, 0.1), (False, 0.0), (False, 0.1)} and len(groups) == 4


def test_the_schedule_scales_all_rates(run) -> None:
    rates = Rates()
    knobs = {"projector": ProjectorConfig(learning_rate=0.3), "lr_scheduler_type": "linear", "max_steps": 4}
    run("kv to teacher", callbacks=[rates], **knobs)
    base = {0.05, 0.3}
    for done, found in enumerate(rates.steps):
        assert {round(rate / (1 - done / 4), 9) for rate in found} == base


class MapsAtTheStart(TrainerCallback):
    """The trained maps of the bridge, after calibration."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.maps = {n: p.detach().clone() for n, p in model.kv_bridge.named_parameters() if p.requires_grad}


def with_optimizer(world: World, folder: Path, scheduled: bool = False, **options) -> MultiTeacherKVTrainer:
    """A trainer with projectors, and an optimizer that the caller made over the student alone."""
    student = world.student()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if scheduled else None
    losses, sections = KINDS["kv to teacher"]
    return MultiTeacherKVTrainer(
        student, world.teachers(), world.arguments(folder, losses, **sections), world.encoded,
        processing_class=world.tokenizer(40), optimizers=(optimizer, scheduler), **options,
    )  # fmt: skip


def test_an_optimizer_of_the_callers_trains_the_maps_too(world, tmp_path: Path) -> None:
    start, rates = MapsAtTheStart(), Rates()
    trainer = with_optimizer(world, tmp_path, callbacks=[start, rates])
    trainer.train()
    assert start.maps and rates.steps[0] == [1e-3, 0.05]
    for name, parameter in trainer.bridge.named_parameters():
        assert name not in start.maps or not torch.equal(parameter, start.maps[name]), name
    groups = trainer.create_optimizer().param_groups  # as a second training does
    assert len(groups) == 2 and [g["weight_decay"] for g in groups] == [0.2, 0.2]


def test_a_scheduler_that_cannot_know_the_maps_is_refused(world, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give optimizers=\(optimizer, None\)"):
        with_optimizer(world, tmp_path, scheduled=True).train()


def test_teachers_stay_as_they_are(world, start) -> None:
    teachers = world.teachers()
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, (m, _) in teachers.items()}
    trainer = start("kv to student", teachers=teachers)
    inside = {id(p) for p in trainer.model.parameters()} | {id(m) for m in trainer.model.modules()}
    trainer.train()
    for name, (model, _) in teachers.items():
        assert not model.training
        assert all(p.grad is None and not p.requires_grad and id(p) not in inside for p in model.parameters())
        assert all(id(m) not in inside for m in model.modules())
        assert all(torch.equal(before[name][k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["relation", "kv to teacher", "kv to student"])
def test_training_lowers_every_term(run, kind: str) -> None:
    logs = curve(run(kind, per_device_train_batch_size=10, max_steps=12, learning_rate=0.1))
    for name in KINDS[kind][0]:
        assert logs[-1][f"loss_{name}"] < logs[0][f"loss_{name}"], name


def test_projectors_are_calibrated_on_the_rows_they_will_see(start) -> None:
    """Standardised, the teachers' states on all (ten) rows have mean 0 and deviation 1 in every channel."""
    trainer = start("kv to teacher")
    trainer.calibrate()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(10)])
    for name, teacher in trainer.teachers.items():
        aligned = trainer.bridge.align(name, teacher.signal(batch["teachers"][name]), batch["attention_mask"]).kv
        found = trainer.bridge.projectors[name].standardise(aligned)
        for tensor in (*found.keys, *found.values):
            rows = tensor.transpose(1, 2)[found.mask]
            torch.testing.assert_close(rows.mean(0), torch.zeros(rows.shape[1:]), rtol=0, atol=1e-4)
            torch.testing.assert_close(rows.std(0, correction=0), torch.ones(rows.shape[1:]), rtol=0, atol=1e-3)


# ---- adapters


def test_lora(world, start, tmp_path: Path) -> None:
    """Two steps; adapters and bridge learn, the rest does not, and PEFT loads what is saved."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = start("kv to teacher", peft_config=lora, **options)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert all("lora_" in name or "kv_bridge" in name for name in moved)
    assert any("lora_" in name for name in moved) and any("kv_bridge" in name for name in moved)

    folder = Path(trainer.args.output_dir) / "checkpoint-2"
    adapter = load_file(folder / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter) and (folder / "adapter_config.json").exists()
    assert load_file(folder / BRIDGE_FILE).keys() == trainer.bridge.state_dict().keys()
    loaded = PeftModel.from_pretrained(world.student(), str(folder)).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)

    resumed = start("kv to teacher", peft_config=lora, **options)
    resumed.train(resume_from_checkpoint=str(folder.with_name("checkpoint-1")))
    after = weights(resumed)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights(trainer).items())


def test_bridge_groups_have_their_rate_where_the_student_has_none_of_the_kind(start) -> None:
    """Adapters have no biases, so the group without decay is the bridge's alone."""
    lora = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = start("kv to teacher", peft_config=lora, projector=ProjectorConfig(learning_rate=0.3))
    ours = {id(p) for p in trainer.bridge.parameters()}
    groups = [g for g in trainer.create_optimizer().param_groups if g["params"]]
    assert [g["lr"] for g in groups if id(g["params"][0]) in ours] == [0.3, 0.3]


# ---- logs


def test_logs_are_the_means_of_the_steps(world, start) -> None:
    """At rate zero, so that every step's cross-entropy can be computed afterwards, by the model's own loss."""
    losses = {"cross_entropy": CrossEntropy(weight=0.5, schedule="linear"), "kv_relation": KVRelationLoss(weight=2.0)}
    trainer = world.trainer(
        Path(start("ce").args.output_dir) / "logs", losses, learning_rate=0.0, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, max_steps=4, logging_steps=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    steps = []
    for first in range(0, 8, 2):
        batch = text_batch([world.encoded[i] for i in (first, first + 1)], "", 0)
        with torch.no_grad():
            steps.append(trainer.model.eval()(**batch).loss.item())
    logs = curve(trainer)
    assert [log["step"] for log in logs] == [2, 4]
    for log, (one, two), (early, late) in zip(logs, (steps[:2], steps[2:]), ((1, 0.75), (0.5, 0.25)), strict=True):
        assert log["loss_cross_entropy"] == pytest.approx((one + two) / 2, rel=1e-5)
        assert log["weight_cross_entropy"] == pytest.approx(0.5 * (1 - (log["step"] - 1) / 4)), "of the step itself"
        assert log["weight_kv_relation"] == 2.0
        expected = (0.5 * early * one + 0.5 * late * two) / 2 + 2 * log["loss_kv_relation"]
        assert log["loss"] == pytest.approx(expected, rel=1e-3)  # Trainer rounds it
    assert logs[0]["loss_kv_relation"] != logs[1]["loss_kv_relation"]


def test_terms_that_are_logged_sum_to_the_loss(run) -> None:
    for log in curve(run("kv to teacher", gradient_accumulation_steps=2, per_device_train_batch_size=2)):
        assert log["loss"] == pytest.approx(log["loss_cross_entropy"] + log["loss_kv"], rel=1e-3)


def test_evaluation_is_of_the_student_alone(world, start) -> None:
    trainer = start("relation", eval_rows=world.encoded)
    metrics = trainer.evaluate(metric_key_prefix="test")
    with torch.no_grad():
        batch = text_batch([world.encoded[i] for i in range(10)], "", 0)
        expected = trainer.model.eval()(**batch).loss.item()
    assert metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.state.log_history[-1]["test_loss"] == metrics["test_loss"]
    with pytest.raises(ValueError, match="nothing to evaluate"):
        start("relation").evaluate()


# ---- what is refused


def test_shuffled_rows_need_two_rows(start) -> None:
    with pytest.raises(ValueError, match="per_device_train_batch_size of 2"):
        start("relation", control=ControlConfig("rows"), per_device_train_batch_size=1)


def test_shuffled_rows_teach_something_else(run) -> None:
    assert curve(run("relation"))[0]["loss_kv_relation"] != pytest.approx(
        curve(run("relation", control=ControlConfig("rows")))[0]["loss_kv_relation"], rel=1e-3
    )


def test_reentrant_checkpointing_is_refused(start) -> None:
    with pytest.raises(ValueError, match="use_reentrant"):
        start("relation", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.parametrize(("weight", "given", "expected"), [(1.0, None, None), (0.0, None, True), (0.0, False, False)])
def test_ddp_expects_a_head_that_rests(world, tmp_path: Path, weight: float, given, expected) -> None:
    """Trainer switches the search for unused parameters off under checkpointing; tests/distributed runs it."""
    losses = {"cross_entropy": CrossEntropy(weight=weight), "kv_relation": KVRelationLoss()}
    options = {"gradient_checkpointing": True, "ddp_find_unused_parameters": given}
    assert world.trainer(tmp_path, losses, **options).args.ddp_find_unused_parameters is expected


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_config_that_overrules_the_recipe_is_refused(world, tmp_path: Path, section: str) -> None:
    args = world.arguments(tmp_path)
    config = {"train_batch_size": "auto", "zero_optimization": {"stage": 2}}
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    check_arguments(args, {})
    config[section] = {"type": "any"}
    with pytest.raises(ValueError, match=f"DeepSpeed config has a section {section}, .*leave it out"):
        check_arguments(args, {})


def test_a_student_in_parts_is_refused(world, tmp_path: Path) -> None:
    args = world.arguments(tmp_path, {"cross_entropy": CrossEntropy()})
    args.parallelism_config = SimpleNamespace(tp_size=1, cp_size=2)
    with pytest.raises(ValueError, match="parallelism_config has cp_size 2: a student in parts has no whole keys"):
        check_arguments(args, {})
    args.parallelism_config = None
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"tensor_parallel": {"autotp_size": 2}})
    with pytest.raises(ValueError, match="DeepSpeed config has autotp_size 2: a student in parts"):
        check_arguments(args, {})


@pytest.mark.parametrize("loss", [KVRelationLoss(samples=3), CKALoss(samples=3)])
def test_groups_that_do_not_divide_a_micro_batch_are_told(world, tmp_path: Path, loss: Any) -> None:
    args = world.arguments(tmp_path, {"own": loss}, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert "losses.own.samples is 3, and a micro-batch has 4 samples" in doubtful(args, {})[0]


def test_label_smoothing_of_the_trainer_is_refused(start) -> None:
    with pytest.raises(ValueError, match="losses.cross_entropy.label_smoothing"):
        start("ce", label_smoothing_factor=0.1)


def test_a_teacher_with_another_tokenizer_is_refused(world, start) -> None:
    """An instance alone would read the student's tokens, of which it knows just a part."""
    teacher = world.model("qwen3", vocab_size=120)
    with pytest.raises(ValueError, match="Teacher 'small'.* the pair .* the model only 120"):
        start("relation", teachers={"small": teacher})


def test_a_teacher_that_is_no_model_is_refused(start) -> None:
    with pytest.raises(ValueError, match="Teacher 'odd' is a Linear"):
        start("relation", teachers={"odd": nn.Linear(2, 2)})


def test_instances_read_a_chat_by_a_reader_in_the_tokenizer_s_place(world, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    ours, theirs = world.tokenizer(40, chat_template=template), world.tokenizer(0, chat_template=template)
    theirs.pad_token = None  # as Llama 3's and Mistral's
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]}]
    )
    trainer = MultiTeacherKVTrainer(
        world.student(), {"fine": (world.teachers()["fine"][0], Reader(theirs, chat=True))}, world.arguments(tmp_path),
        rows, processing_class=Reader(ours, chat=True),
    )  # fmt: skip
    row = trainer.train_dataset[0]
    assert ours.decode(row["input_ids"]) == theirs.decode(row["fine/input_ids"]) == "[user] two?[assistant] 2</s>"
    assert trainer.processing_class is ours and theirs.pad_token == theirs.eos_token
    trainer.train()


def test_a_student_s_chat_is_said_once(world, tmp_path: Path) -> None:
    world.student().save_pretrained(tmp_path / "student")
    world.tokenizer(40).save_pretrained(tmp_path / "student")
    config = StudentConfig(model=str(tmp_path / "student"), chat=True)
    with pytest.raises(ValueError, match="The student's chat is True, but its Reader says False; say it once"):
        resolve_student(config, Reader(world.tokenizer(40)))


def test_a_device_map_that_every_process_would_fill_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="teachers.big.device_map is 'auto'.*take placement: sharded"):
        resolve_teacher("big", TeacherConfig(model="org/big", device_map="auto"), None)


def test_special_tokens_that_no_text_has_need_not_be_known(world) -> None:
    """As the image token of the text-only Gemma 3; a turn's mark of the chat template must be."""
    tokenizer = world.tokenizer(40)
    known = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert (tokens_of_text(tokenizer), len(tokenizer)) == (known, known + 1)
    tokenizer.chat_template = "{{ messages[0].content }}<image>"
    assert tokens_of_text(tokenizer) == known + 1
    tokenizer.chat_template, tokenizer.pad_token = None, "<image>"
    assert tokens_of_text(tokenizer) == known + 1


def test_an_instance_needs_its_tokenizer(world, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processing_class"):
        MultiTeacherKVTrainer(world.student(), {}, world.arguments(tmp_path), world.encoded)


def test_a_loss_on_teachers_without_teachers_is_refused(start) -> None:
    with pytest.raises(ValueError, match="losses.kv_relation needs a teacher"):
        start("relation", teachers={})


def test_a_loaded_student_is_what_auto_model_gives(start) -> None:
    trainer = start("kv to teacher")
    trainer.save_model()
    plain = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    found = {n: t for n, t in trainer.model.state_dict().items() if not n.startswith("kv_bridge.")}
    assert found.keys() == plain.state_dict().keys()
    assert all(torch.equal(found[n], t) for n, t in plain.state_dict().items())
