"""What holds for every loss: these tests run over the table, so a new loss is tested as soon as it is named there."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import pytest
import torch
from helpers_losses import (
    gradients,
    half,
    leaves,
    leaves_by_need,
    map_inputs,
    pad,
    random_inputs,
    scramble_masked,
    teacher_tensors,
)

from kv_trainer.losses import LOSSES, DistillationLoss, LossInputs

every_loss = pytest.mark.parametrize("name", LOSSES)
KNOWN_NEEDS = {
    "logits", "student_kv", "teacher_kv", "projectors", "student_hidden", "teacher_hidden", "hidden_projectors",
    "answer_positions", "teacher_logits", "student_attention", "teacher_attention", "student_importance",
    "teacher_importance",
}  # fmt: skip


def defaults(name: str) -> DistillationLoss:
    return LOSSES[name]()


def one_by_one(name: str) -> DistillationLoss:
    """The loss with every sample on its own, where it has a knob for that."""
    grouped = "samples" in {field.name for field in dataclasses.fields(LOSSES[name])}
    return LOSSES[name](**({"samples": 1} if grouped else {}))


@every_loss
def test_is_documented(name: str) -> None:
    """A docstring with shapes and needs, and a source for what another paper proposed."""
    kind = LOSSES[name]
    assert dataclasses.is_dataclass(kind) and issubclass(kind, DistillationLoss)
    assert kind.requires and kind.requires <= KNOWN_NEEDS
    text = kind.__doc__ or ""
    assert not text.startswith(f"{kind.__name__}("), "the docstring that dataclass writes itself says nothing"
    assert re.search(r"^    Shapes: .*\[B", text, re.M)
    assert "Returns a scalar" in text
    needs = re.search(r"^    Needs: (.+)\.$", text, re.M)
    assert needs and set(needs[1].split(", ")) == kind.requires
    if kind.requires != {"logits"}:
        assert kind.source and re.search(r"^    Source: .*arXiv \d{4}\.\d{5}", text, re.M)
        assert re.search(r"\d{4}\.\d{5}", kind.source)[0] in text


@every_loss
def test_default_weight_is_usable(name: str) -> None:
    loss = defaults(name)
    assert loss.weight > 0 and loss.weight_at(0.5) > 0


@every_loss
def test_raw_term_ignores_the_weight(name: str) -> None:
    inputs = random_inputs()
    torch.testing.assert_close(LOSSES[name](weight=7.0)(inputs), defaults(name)(inputs))


@every_loss
def test_is_a_positive_finite_scalar_that_reaches_the_student(name: str) -> None:
    inputs = random_inputs()
    value = defaults(name)(inputs)
    assert value.shape == () and value.isfinite() and value > 0
    value.backward()
    for need, points in leaves_by_need(inputs).items():
        reached = [x.grad is not None and bool(x.grad.abs().sum() > 0) for x in points]
        assert reached == [need in LOSSES[name].requires] * len(points), need


@every_loss
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_gradient_is_the_slope(name: str, seed: int, direction: str) -> None:
    """Along a random direction of everything the student says; central differences, since losses work in float32."""
    inputs = random_inputs(seed, direction=direction)
    loss, points = defaults(name), leaves(inputs)
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randn(p.shape, generator=generator) for p in points]
    slope = sum((g * s).sum() for g, s in zip(gradients(loss, inputs), steps, strict=True))
    size = 2e-3
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            for point, step in zip(points, steps, strict=True):
                point += sign * size * step
            values.append(loss(inputs))
    torch.testing.assert_close((values[0] - values[1]) / (2 * size), slope, rtol=2e-2, atol=2e-3)


@every_loss
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_gradient_in_the_shares_is_the_slope(name: str, seed: int, direction: str) -> None:
    """What a router learns by: moving the shares of all samples from one teacher to the other, as a softmax does."""
    if (name, direction) == ("kv", "teacher_to_student"):
        pytest.skip("measured in the detached spread of a target that is trained itself, as it says")
    inputs, loss = random_inputs(seed, direction=direction), defaults(name)
    weights = inputs.weights.requires_grad_()
    step = torch.tensor([1.0, -1.0])[:, None] * torch.rand(weights.shape[1], generator=torch.Generator().manual_seed(9))
    size = 2e-3
    slope = (torch.autograd.grad(loss(inputs), weights, allow_unused=True, materialize_grads=True)[0] * step).sum()
    with torch.no_grad():
        values = [float(loss(dataclasses.replace(inputs, weights=weights + sign * size * step))) for sign in (1, -1)]
    torch.testing.assert_close(torch.tensor((values[0] - values[1]) / (2 * size)), slope, rtol=2e-2, atol=2e-3)


@every_loss
@pytest.mark.parametrize("content", [0.0, 3.0, -1e4])
@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 9), (1, 0), (9, 0), (4, 3)])
def test_padding_changes_nothing(name: str, left: int, right: int, content: float) -> None:
    inputs = random_inputs()
    padded = pad(inputs, left, right, content)
    loss = defaults(name)
    torch.testing.assert_close(loss(padded), loss(inputs), rtol=1e-5, atol=1e-6)
    through = torch.autograd.grad(loss(padded), leaves(inputs), allow_unused=True, materialize_grads=True)
    for ours, reference in zip(through, gradients(loss, inputs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


@every_loss
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_unaligned_teacher_positions_do_not_count(name: str, direction: str) -> None:
    inputs = random_inputs(direction=direction)
    torch.testing.assert_close(defaults(name)(scramble_masked(inputs, 100.0)), defaults(name)(inputs))


@every_loss
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up(name: str, direction: str, size: int) -> None:
    """Some samples at a time, with the counts of the whole step, sum to the whole step.

    A loss that relates samples to each other has a knob for how many, `samples`; they stay in one micro-batch.
    """
    grouped = "samples" in {field.name for field in dataclasses.fields(LOSSES[name])}
    loss = LOSSES[name](**({"samples": size} if grouped else {}))
    inputs = random_inputs(samples=5, direction=direction)
    parts = [loss(map_inputs(inputs, lambda x, i=i: x[i : i + size])) for i in range(0, 5, size)]
    torch.testing.assert_close(sum(parts), loss(inputs), rtol=1e-5, atol=1e-6)


@every_loss
def test_the_order_of_samples_does_not_count(name: str) -> None:
    inputs = random_inputs(samples=4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(defaults(name)(map_inputs(inputs, lambda x: x[order])), defaults(name)(inputs))


@every_loss
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_teachers_get_no_gradient(name: str, direction: str) -> None:
    inputs = random_inputs(direction=direction)
    before = [x.clone() for x in teacher_tensors(inputs)]
    defaults(name)(inputs).backward()
    after = teacher_tensors(inputs)
    assert all(x.grad is None and not x.requires_grad for x in after)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def _masks(inputs: LossInputs, change) -> LossInputs:
    """All masks, and labels with them, changed in the first sample: `change` gets and returns a [T] mask."""
    for kv in inputs.teachers.values():
        kv.mask[0] = change(kv.mask[0])
    said = bool(change(torch.ones_like(inputs.labels[0], dtype=torch.bool)).any())
    for answered in inputs.answered.values():
        answered[0] &= said
    inputs.labels[0, ~change(torch.ones_like(inputs.labels[0], dtype=torch.bool))] = -100
    return inputs


def _only(position: int):
    return lambda mask: torch.arange(len(mask)) == position


EDGES = {
    "all masked": lambda inputs: _masks(inputs, torch.zeros_like),
    "one position": lambda inputs: _masks(inputs, _only(2)),
    "equal teacher rows": lambda inputs: dataclasses.replace(
        inputs, teachers={n: t.map(lambda x: x[:, :, :1].expand_as(x).clone()) for n, t in inputs.teachers.items()}
    ),
    "equal student rows": lambda inputs: dataclasses.replace(
        inputs, student=inputs.student.map(lambda x: x.detach()[:, :, :1].expand_as(x).clone().requires_grad_())
    ),
    "zero student": lambda inputs: dataclasses.replace(
        inputs, student=inputs.student.map(lambda x: torch.zeros_like(x).requires_grad_())
    ),
    "no label": lambda inputs: dataclasses.replace(inputs, labels=torch.full_like(inputs.labels, -100)),
    "one layer, one sample": lambda inputs: random_inputs(samples=1, layers=1),
    "huge": lambda inputs: dataclasses.replace(
        inputs, student=inputs.student.map(lambda x: (x.detach() * 1e4).requires_grad_())
    ),
}


@every_loss
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("make", [defaults, one_by_one])
def test_edges_stay_finite(name: str, edge: str, direction: str, make) -> None:
    """Values and gradients stay finite and of a sane size: no sample may swamp the step."""
    inputs = EDGES[edge](random_inputs(direction=direction))
    loss = make(name)
    value, grads = loss(inputs), gradients(loss, inputs)
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    if edge != "huge":  # a squared error of a huge student is huge
        assert value < 1e4 and all(g.abs().max() < 1e4 for g in grads), (value, [g.abs().max() for g in grads])
    if edge == "all masked":
        assert all((g[0] == 0).all() for g in grads), "a masked sample teaches nothing"


@every_loss
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_a_teacher_without_weight_has_no_effect(name: str, direction: str) -> None:
    """Also where it alone is aligned, and whatever it says there. Fusions make shares next to nothing exactly 0."""
    inputs = random_inputs(teachers=((3, 4), (1, 5)), direction=direction)
    inputs.weights[0], inputs.weights[1] = 1.0, 0.0
    loss = defaults(name)
    alone = dataclasses.replace(
        inputs,
        teachers={"t0": inputs.teachers["t0"]},
        weights=inputs.weights[:1],
        projectors={"t0": inputs.projectors["t0"]},
    )
    torch.testing.assert_close(loss(inputs), loss(alone))


@every_loss
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_shares_by_layer_that_agree_are_shares_by_sample(name: str, direction: str) -> None:
    """A fusion may give [M, B] or [M, L, B]; a teacher without share in any layer has no effect."""
    inputs, loss = random_inputs(direction=direction), defaults(name)
    by_layer = dataclasses.replace(inputs, weights=inputs.weights[:, None].repeat(1, inputs.student.num_layers, 1))
    torch.testing.assert_close(loss(by_layer), loss(inputs))
    micro = [loss(map_inputs(by_layer, lambda x, i=i: x[i : i + 1])) for i in range(3)]
    if "samples" not in {field.name for field in dataclasses.fields(loss)}:
        torch.testing.assert_close(sum(micro), loss(inputs), rtol=1e-5, atol=1e-6)


@every_loss
def test_half_precision_states_are_compared_in_float32(name: str) -> None:
    inputs = random_inputs()
    value = defaults(name)(half(inputs))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, defaults(name)(inputs), rtol=2e-2, atol=2e-2)


@every_loss
def test_needs_no_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defaults(name)(random_inputs())


# ---- schedules


@every_loss
@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, {0: 2, 0.3: 2, 1: 2}),
        ({"schedule": "linear"}, {0: 2, 0.25: 1.5, 1: 0}),
        ({"schedule": "cosine"}, {0: 2, 0.25: 1 + math.sqrt(0.5), 0.5: 1, 1: 0}),
        ({"warmup_ratio": 0.2}, {0: 0, 0.1: 1, 0.2: 2, 1: 2}),
        ({"warmup_ratio": 1.0}, {0: 0, 0.5: 1, 1: 2}),
        ({"schedule": "linear", "warmup_ratio": 0.5}, {0: 0, 0.25: 2 * 0.5 * 0.75, 0.75: 0.5, 1: 0}),
    ],
)
def test_weight_at(name: str, knobs: dict, expected: dict[float, float]) -> None:
    loss = LOSSES[name](weight=2.0, **knobs)
    assert {p: loss.weight_at(p) for p in expected} == pytest.approx(expected, abs=1e-12)


@every_loss
@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"weight": -0.1}, "weight is -0.1"),
        ({"warmup_ratio": -0.01}, "warmup_ratio is -0.01"),
        ({"warmup_ratio": 1.01}, "warmup_ratio is 1.01"),
    ],
)
def test_impossible_settings_are_refused(name: str, knobs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LOSSES[name](**knobs)


def test_the_base_has_no_value() -> None:
    with pytest.raises(NotImplementedError):
        DistillationLoss()(random_inputs())
