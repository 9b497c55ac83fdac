"""The bridge on a tiny student: it is silent unless asked, and adds up what the losses say."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kv_trainer.alignment.tokens import take
from kv_trainer.arguments import (
    AlignmentConfig,
    ControlConfig,
    FreezeConfig,
    LayerAlignment,
    MultiTeacherKVConfig,
    ProjectorConfig,
    RopeAlignment,
)
from kv_trainer.bridge import NAME, KVBridge
from kv_trainer.capture import capture_kv, kv_shape
from kv_trainer.fusion import Confidence, Fixed, MinNorm
from kv_trainer.losses import CKALoss, CrossEntropy, DistillationLoss, KVLoss, KVRelationLoss
from kv_trainer.supervision import Supervision
from kv_trainer.types import KVShape, KVStates, TeacherSignal

SAMPLES, LENGTH, THEIRS = 3, 7, 9
SHAPES = {
    "wide": KVShape("random", 4, 1, 12, 1e4, 100, 1000),
    "deep": KVShape("random", 6, 3, 4, None, 50, 1000),
}
ALL: dict[str, DistillationLoss] = {
    "cross_entropy": CrossEntropy(),
    "kv": KVLoss(weight=0.5),
    "kv_relation": KVRelationLoss(weight=2.0),
}


def arguments(losses: dict[str, DistillationLoss], **sections: object) -> MultiTeacherKVConfig:
    return MultiTeacherKVConfig(output_dir="unused", use_cpu=True, report_to="none", losses=losses, **sections)


def bridge_to(student: nn.Module, losses: dict[str, DistillationLoss] = ALL, given=(), **sections) -> KVBridge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bridge = KVBridge(kv_shape(student), SHAPES, arguments(losses, **sections), given)
    bridge.attach(student)
    return bridge


TO_STUDENT = ProjectorConfig(direction="teacher_to_student")


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones((SAMPLES, LENGTH), dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": torch.randint(3, 300, (SAMPLES, LENGTH), generator=generator), "attention_mask": mask}


def supervision(progress: float = 0.0) -> Supervision:
    """Random teachers' states; each reads the text in nine of its own positions, and leaves some of ours out."""
    generator = torch.Generator().manual_seed(1)

    def signal(shape: KVShape, nll: list[float]) -> TeacherSignal:
        sizes = (SAMPLES, shape.num_kv_heads, THEIRS, shape.head_dim)
        layers = tuple(range(shape.num_layers))
        tensors = [tuple(torch.randn(sizes, generator=generator) for _ in layers) for _ in range(2)]
        index = torch.randint(-1, THEIRS, (SAMPLES, LENGTH), generator=generator).sort().values
        mask = torch.ones((SAMPLES, THEIRS), dtype=torch.bool)
        return TeacherSignal(KVStates(*tensors, mask, layers, len(layers)), index, torch.tensor(nll))

    text = batch()
    labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    signals = {"wide": signal(SHAPES["wide"], [1.0, 9.0, 3.0]), "deep": signal(SHAPES["deep"], [6.0, 2.0, 3.0])}
    return Supervision(signals, labels, text["attention_mask"], 13.0, 3.0, progress)


@pytest.fixture
def student(tiny_model):
    return tiny_model("llama", num_hidden_layers=2)


def hooks(student: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules())


# ---- out of supervision


def test_the_student_is_untouched_until_it_is_supervised(student) -> None:
    text = batch()
    before = student(**text)
    bridge = bridge_to(student)
    after = student(**text)
    assert torch.equal(before.logits, after.logits) and after.keys() == before.keys()
    assert "loss" not in after and bridge.terms == {} and bridge._capture._recorded is None
    with bridge.supervise(supervision()):
        supervised = student(**text)
    assert torch.equal(supervised.logits, before.logits) and supervised.loss > 0
    assert "loss" not in student(**text) and bridge._capture._recorded is None


def test_supervision_ends_with_an_error(student) -> None:
    bridge = bridge_to(student)
    with pytest.raises(RuntimeError, match="on purpose"), bridge.supervise(supervision()):
        raise RuntimeError("on purpose")
    assert "loss" not in student(**batch())


@pytest.mark.parametrize(("losses", "count"), [(ALL, 2 + 2 * 2), ({"cross_entropy": CrossEntropy()}, 2)])
def test_just_the_hooks_that_are_needed(student, losses, count: int) -> None:
    """Two on the student itself, and one a captured projection (k, v of two layers) where a loss looks at them."""
    assert hooks(student) == 0
    bridge_to(student, losses)
    assert hooks(student) == count
    assert isinstance(getattr(student, NAME), KVBridge)


def test_generation_works_with_the_bridge_on(student) -> None:
    prompt = batch()["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False}
    before = student.generate(prompt, **options)
    bridge_to(student)
    assert torch.equal(student.generate(prompt, **options), before)


# ---- the sum of the losses


def test_total_is_the_weighted_sum_of_the_terms(student) -> None:
    bridge = bridge_to(student)
    with bridge.supervise(supervision()):
        total = student(**batch()).loss
    assert list(bridge.terms) == list(ALL) and not any(t.requires_grad for t in bridge.terms.values())
    torch.testing.assert_close(total, sum(ALL[n].weight * t for n, t in bridge.terms.items()))
    assert all(term > 0 for term in bridge.terms.values())


def test_terms_are_what_the_losses_say_alone(student, tiny_model) -> None:
    together = bridge_to(student)
    with together.supervise(supervision()):
        student(**batch())
    for name, loss in ALL.items():
        other = tiny_model("llama", num_hidden_layers=2)
        alone = bridge_to(other, {name: loss})
        with alone.supervise(supervision()):
            other(**batch())
        torch.testing.assert_close(alone.terms[name], together.terms[name])


def test_schedules_see_the_progress(student) -> None:
    losses = {"cross_entropy": CrossEntropy(schedule="linear"), "kv_relation": KVRelationLoss(warmup_ratio=0.5)}
    bridge = bridge_to(student, losses)
    with bridge.supervise(supervision(progress=0.25)):
        total = student(**batch()).loss
    torch.testing.assert_close(total, 0.75 * bridge.terms["cross_entropy"] + 0.5 * bridge.terms["kv_relation"])


def test_a_loss_without_weight_is_left_out(student) -> None:
    bridge = bridge_to(student, {"cross_entropy": CrossEntropy(), "kv": KVLoss(weight=0.0)})
    assert list(bridge.losses) == ["cross_entropy"] and not bridge.projectors and hooks(student) == 2


def test_cross_entropy_is_the_student_s_own(student) -> None:
    given = supervision()
    bridge = bridge_to(student)
    with bridge.supervise(given):
        student(**batch())
    theirs = student(**batch(), labels=given.labels, num_items_in_batch=given.num_tokens).loss
    torch.testing.assert_close(bridge.terms["cross_entropy"], theirs)


def test_gradient_reaches_student_and_projectors(student) -> None:
    bridge = bridge_to(student, projector=ProjectorConfig(method="elastic_bottleneck", dropout=0.0))
    with bridge.supervise(supervision()):
        student(**batch()).loss.backward()
    missing = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_states_without_gradient_are_refused(student) -> None:
    bridge = bridge_to(student, {"kv_relation": KVRelationLoss()})
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient"), bridge.supervise(supervision()):
        student(**batch())


def test_a_term_without_gradient_is_refused_unless_something_rests_for_a_while(student, tiny_model) -> None:
    """Layer 0 and all below are frozen, and the term looks at nothing else; layer 1 learns."""
    losses = {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss(layers=[0])}
    bridge = bridge_to(student, losses)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    with pytest.raises(ValueError, match="losses.kv_relation carries no gradient"), bridge.supervise(supervision()):
        student(**batch())
    other = tiny_model("llama", num_hidden_layers=2)
    resting = bridge_to(other, losses, freeze=FreezeConfig(layer_groups=2, unfreeze_every=5))
    for name, parameter in other.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    with resting.supervise(supervision()):
        assert other(**batch()).loss > 0


def test_no_teachers(student) -> None:
    bridge = KVBridge(None, {}, arguments({"cross_entropy": CrossEntropy()}))
    bridge.attach(student)
    given = supervision()
    given.signals = {}
    with bridge.supervise(given):
        loss = student(**batch()).loss
    assert loss > 0 and bridge.weights is None and not bridge.state_dict()


def test_a_loss_on_teachers_without_teachers_is_refused() -> None:
    with pytest.raises(ValueError, match="losses.kv_relation needs a teacher"):
        KVBridge(None, {}, arguments({"kv_relation": KVRelationLoss()}))


# ---- shares


def test_shares_by_confidence(student) -> None:
    bridge = bridge_to(student, fusion=Confidence())
    assert bridge.teacher_needs().scores
    given = supervision()
    with bridge.supervise(given):
        student(**batch())
    tokens = (given.labels != -100).sum(1)
    nll = torch.stack([s.nll for s in given.signals.values()])
    torch.testing.assert_close(bridge.weights, torch.softmax(-nll / tokens, 0))


def test_fixed_shares(student) -> None:
    bridge = bridge_to(student, given=[1.0, 3.0], fusion=Fixed())
    assert not bridge.teacher_needs().scores
    with bridge.supervise(supervision()):
        student(**batch())
    torch.testing.assert_close(bridge.weights, torch.tensor([[0.25] * 3, [0.75] * 3]))


def test_a_fusion_of_targets_needs_a_space_of_targets(student) -> None:
    both = {"cross_entropy": CrossEntropy(), "kv": KVLoss()}
    with pytest.raises(ValueError, match="works on targets that all teachers share"):
        bridge_to(student, both, fusion=MinNorm())
    all_three = {**both, "kv_relation": KVRelationLoss()}
    for more in ({}, {"cka": CKALoss()}):  # whatever stands beside it, kv has each teacher's own space
        with pytest.raises(ValueError, match="works on targets that all teachers share"):
            bridge_to(student, {**all_three, **more}, fusion=MinNorm())
    bridge_to(student, all_three, fusion=MinNorm(), projector=TO_STUDENT)
    bridge_to(student, {"by_another_name": KVRelationLoss()}, fusion=MinNorm())


# ---- alignment


def test_keys_after_rope_are_the_students_own(student) -> None:
    """The turn that both sides get is what the student's attention does to its own keys."""
    bridge = bridge_to(student, alignment=AlignmentConfig(rope=RopeAlignment("after")))
    text = batch()
    with capture_kv(student, queries=True) as capture:
        student(**text)
        states = capture.stop(text["attention_mask"])
    turned = bridge.turn(states, text["attention_mask"])
    for mine, before, form in zip(turned.keys, states.keys, states.attention, strict=True):
        real = states.mask[:, None, :, None]
        torch.testing.assert_close(mine * real, form.rotate(before) * real)
        assert (mine - before).abs().max() > 0.1


def test_align_takes_the_layers_and_the_positions(student) -> None:
    bridge, given = bridge_to(student), supervision()
    for name, signal in given.signals.items():
        aligned = bridge.align(name, signal, given.attention_mask).kv
        assert len(aligned.keys) == len(aligned.values) == aligned.num_layers == 2
        for tensors, ours in ((signal.kv.keys, aligned.keys), (signal.kv.values, aligned.values)):
            for end in (0, -1):  # first layer to first, last to last
                for b in range(SAMPLES):
                    for t in range(LENGTH):
                        at = int(signal.index[b, t])
                        assert bool(aligned.mask[b, t]) == (at >= 0 and bool(given.attention_mask[b, t]))
                        if at >= 0:
                            torch.testing.assert_close(ours[end][b, :, t], tensors[end][b, :, at])


def test_shuffled_rows_get_the_states_and_shares_of_the_row_before(student, tiny_model) -> None:
    """Every sample is taught by another's teachers, positions masked where that other row or this one has none."""
    plain, given = bridge_to(student), supervision()
    other = tiny_model("llama", num_hidden_layers=2)
    shuffled = bridge_to(other, control=ControlConfig("rows"))
    for bridge, model in ((plain, student), (shuffled, other)):
        with bridge.supervise(given):
            model(**batch())
    torch.testing.assert_close(shuffled.weights, plain.weights[:, [2, 0, 1]])
    torch.testing.assert_close(shuffled.terms["cross_entropy"], plain.terms["cross_entropy"])
    assert (shuffled.terms["kv_relation"] - plain.terms["kv_relation"]).abs() > 1e-3
    for name, signal in given.signals.items():
        mapped = take(plain.layer_maps[name].apply(signal.kv), signal.index)
        masked = mapped.mask & given.attention_mask.bool()
        found = shuffled.align(name, signal, given.attention_mask).kv
        for row in range(SAMPLES):
            assert torch.equal(found.keys[1][row], mapped.keys[1][row - 1])
            assert torch.equal(found.values[0][row], mapped.values[0][row - 1])
            assert torch.equal(found.mask[row], masked[row - 1] & given.attention_mask[row].bool())


def test_rows_of_a_task_are_shuffled_among_themselves(student, tiny_model) -> None:
    """Samples 0 and 2 share a task and swap their teachers; 1 is alone of its own and joins them in turn."""
    given = supervision()
    shuffled = bridge_to(student, control=ControlConfig("rows_of_task"))
    name, signal = next(iter(given.signals.items()))
    mapped = take(shuffled.layer_maps[name].apply(signal.kv), signal.index)
    for tasks, order in (([0, 1, 0], [1, 2, 0]), ([0, 0, 0], [2, 0, 1]), ([0, 1, 2], [2, 0, 1])):
        found = shuffled.align(name, signal, given.attention_mask, tasks=torch.tensor(tasks)).kv
        assert torch.equal(found.keys[1], mapped.keys[1][order]), tasks
    with pytest.raises(ValueError, match="rows_of_task, but the rows have no task"):
        shuffled.align(name, signal, given.attention_mask)


def test_a_row_alone_in_its_batch_has_no_teacher_under_the_control_of_rows(student) -> None:
    shuffled = bridge_to(student, control=ControlConfig("rows"))
    name, signal = next(iter(supervision().signals.items()))
    one = replace(signal, kv=signal.kv.map(lambda x: x[:1]), index=signal.index[:1], nll=signal.nll[:1])
    assert not shuffled.align(name, one, torch.ones((1, LENGTH), dtype=torch.long)).kv.mask.any()


def test_a_map_of_layers_is_for_the_teachers_that_are_there(student) -> None:
    with pytest.raises(ValueError, match="method: explicit and map need each other"):
        LayerAlignment(map={"wide": [0, 1]})
    wrong = AlignmentConfig(layers=LayerAlignment(method="explicit", map={"wyde": [0, 1], "deep": [0, 1]}))
    with pytest.raises(ValueError, match="alignment.layers.map is for wyde, deep; the teachers are wide, deep"):
        bridge_to(student, alignment=wrong)


def test_the_student_s_states_are_those_of_a_plain_capture(student) -> None:
    with capture_kv(student) as capture:
        student(**batch())
        expected = capture.stop(batch()["attention_mask"])
    seen = {}

    class Spy(KVRelationLoss):
        def __call__(self, inputs):
            seen["inputs"] = inputs
            return super().__call__(inputs)

    bridge = bridge_to(student, {"spy": Spy()})
    with bridge.supervise(supervision()):
        student(**batch())
    found = seen["inputs"]
    for x, y in zip((*found.student.keys, *found.student.values), (*expected.keys, *expected.values), strict=True):
        assert torch.equal(x, y)
    assert found.logits.shape[:2] == found.labels.shape and (found.num_tokens, found.num_samples) == (13.0, 3.0)
    assert not any(x.requires_grad for t in found.teachers.values() for x in (*t.keys, *t.values))


def test_projectors_are_where_the_losses_need_them(student) -> None:
    names = {re.sub(r"\.\d+\..*", "", n) for n, _ in bridge_to(student).named_parameters()}
    assert names == {f"projectors.{teacher}.{part}" for teacher in SHAPES for part in ("keys", "values")}


def test_projectors_of_layers_that_are_not_compared_rest(student) -> None:
    """DDP would wait for their gradient."""
    bridge = bridge_to(student, {"kv": KVLoss(layers=[1])})
    trained = {n.split(".")[3] for n, p in bridge.named_parameters() if p.requires_grad}
    assert trained == {"1"} and {n.split(".")[3] for n, _ in bridge.named_parameters()} == {"0", "1"}
    with bridge.supervise(supervision()):
        student(**batch()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in bridge.parameters())


@pytest.mark.parametrize(("ratio", "times"), [(0.5, 0.5), (2.0, 2), ("auto", 2)])
def test_projectors_follow_the_recipe(student, ratio: Any, times: float) -> None:
    knobs = ProjectorConfig(method="elastic_bottleneck", direction="teacher_to_student", mlp_ratio=ratio, dropout=0.25)
    bridge = bridge_to(student, projector=knobs)
    for name, shape in SHAPES.items():
        module = bridge.projectors[name]
        assert module.direction == "teacher_to_student" and len(module.keys) == 2
        linear = [m for m in module.keys[0].width if isinstance(m, nn.Linear)]
        assert linear[0].weight.shape == (times * shape.head_dim, shape.head_dim)
        assert [m.p for m in module.modules() if isinstance(m, nn.Dropout)] == [0.25] * 4


def test_layers_that_are_not_there_are_refused_before_a_step() -> None:
    shape = SHAPES["wide"]
    args = MultiTeacherKVConfig(losses={"cross_entropy": CrossEntropy(), "cka": CKALoss(layers=[0, 9])})
    with pytest.raises(ValueError, match=r"losses\.cka\.layers is \[0, 9\]; give 'middle', 'all'"):
        KVBridge(shape, {"t": shape}, args)
