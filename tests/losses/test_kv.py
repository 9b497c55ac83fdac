"""The head by head loss against a loop over every number, its units, and the shapes it takes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers_losses import map_inputs, pad, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_trainer.losses import KVLoss, LossInputs

METRICS = ["mse", "smooth_l1", "l1", "cosine"]
DIRECTIONS = ["student_to_teacher", "teacher_to_student"]


def naive_projector(projector, x: Tensor) -> list:
    """[H][T][D] of one sample x [H, T, D]: the width map, then the mixing of heads."""
    weight, bias, heads = (p.double() for p in (projector.width.weight, projector.width.bias, projector.heads.weight))
    wide = [[[sum(w * v for w, v in zip(row, x[h, t])) + b for row, b in zip(weight, bias)] for t in range(x.shape[1])]
            for h in range(x.shape[0])]  # fmt: skip
    return [[[sum(w * wide[h][t][d] for h, w in enumerate(row)) for d in range(len(bias))] for t in range(x.shape[1])]
            for row in heads]  # fmt: skip


def naive_compare(x: list, y: list, mask: list[bool], metric: str) -> Tensor:
    """One sample, one layer, keys or values: x, y [H][T][D]."""
    positions = [t for t, counts in enumerate(mask) if counts]
    heads, width = range(len(y)), range(len(y[0][0]))
    if metric == "cosine":
        def cosine(t: int) -> Tensor:
            dot, xx, yy = (
                sum(a[h][t][d] * b[h][t][d] for h in heads for d in width) for a, b in ((x, y), (x, x), (y, y))
            )  # fmt: skip
            return dot / (xx * yy).sqrt()

        return sum(1 - cosine(t) for t in positions) / len(positions)
    variance = 0.0
    for h in heads:
        for d in width:
            column = [y[h][t][d].detach() for t in positions]
            mean = sum(column) / len(column)
            variance = variance + sum((v - mean) ** 2 for v in column)
    scale = (variance / (len(heads) * len(positions) * len(width))).sqrt()
    total = 0.0
    for h in heads:
        for t in positions:
            for d in width:
                gap = ((x[h][t][d] - y[h][t][d]) / scale).abs()
                small = gap < 1
                cost = {"mse": gap**2, "l1": gap, "smooth_l1": gap**2 / 2 if small else gap - 0.5}[metric]
                total = total + cost
    return total / (len(heads) * len(positions) * len(width))


def naive(inputs: LossInputs, metric: str, direction: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    parts = [(part, layer) for part in ("keys", "values") for layer in range(inputs.student.num_layers)]
    for b in range(len(inputs.labels)):
        for part, layer in parts:
            ours = getattr(inputs.student, part)[layer][b].double()
            term, mapped, masks = 0.0, [], []
            for m, (name, teacher) in enumerate(inputs.teachers.items()):
                projectors, kv = inputs.projectors[name], getattr(teacher, part)[layer][b].double()
                projector = getattr(projectors, part)[layer]
                masks.append(teacher.mask[b].tolist())
                if direction == "student_to_teacher":
                    row = ("keys", "values").index(part)
                    mean, scale = (x[row, layer].double() for x in (projectors.mean, projectors.scale))
                    target = (kv - mean) / scale
                    guess = naive_projector(projector, ours)
                    guess = [[[(v - mean[h, 0, d]) / scale[h, 0, d] for d, v in enumerate(at)] for at in head]
                             for h, head in enumerate(guess)]  # fmt: skip
                    compared = naive_compare(guess, target, masks[-1], metric)
                    term = term + inputs.weights[m, b] * compared
                else:
                    mapped.append(naive_projector(projector, kv))
            if direction == "teacher_to_student":
                term = naive_compare(ours, naive_fuse(mapped, masks, inputs.weights[:, b], ours), any_of(masks), metric)
            total = total + term / len(parts)
    return total / inputs.num_samples


def any_of(masks: list[list[bool]]) -> list[bool]:
    return [any(column) for column in zip(*masks)]


def naive_fuse(mapped: list, masks: list[list[bool]], weights: Tensor, like: Tensor) -> list:
    """Entry by entry, the mean of the teachers that are aligned at the position."""
    def at(h: int, t: int, d: int) -> Tensor:
        share = sum(w for w, mask in zip(weights, masks) if mask[t])
        return sum(w * x[h][t][d] for w, x, mask in zip(weights, mapped, masks) if mask[t]) / share

    zero = torch.zeros((), dtype=torch.float64)
    heads, length, width = (range(n) for n in like.shape)
    return [[[at(h, t, d) if any_of(masks)[t] else zero for d in width] for t in length] for h in heads]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_the_loop_with_its_gradients(metric: str, direction: str) -> None:
    sizes = {"samples": 2, "length": 5, "layers": 1, "student": (2, 2), "teachers": ((1, 3), (2, 2))}
    inputs = random_inputs(3, direction=direction, **sizes)
    for projector in inputs.projectors.values():
        projector.mean.normal_()
        projector.scale.uniform_(0.5, 2)
    ours, theirs = KVLoss(metric=metric)(inputs), naive(inputs, metric, direction)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    points = [*inputs.student.keys, *inputs.student.values]
    points += [p for m in inputs.projectors.values() for p in m.parameters()]
    found, expected = torch.autograd.grad(ours, points), torch.autograd.grad(theirs, points)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert all(g.abs().sum() > 0 for g in found), "every layer and every projector learns"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_student_equal_to_its_teacher_costs_nothing(metric: str, direction: str) -> None:
    """With projectors as they start: the identity where the shapes agree."""
    inputs = random_inputs(teachers=((2, 3), (2, 3)), direction=direction, init="auto")
    inputs.teachers = {
        name: dataclasses.replace(inputs.student.map(Tensor.detach), mask=teacher.mask)
        for name, teacher in inputs.teachers.items()
    }
    assert KVLoss(metric=metric)(inputs).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_units_do_not_count(direction: str) -> None:
    """Both sides a thousand times larger: each layer is measured in the spread of its target."""
    inputs = random_inputs(direction=direction, init="auto")
    larger = dataclasses.replace(
        inputs,
        student=inputs.student.map(lambda x: 1000 * x),
        teachers={n: t.map(lambda x: 1000 * x) for n, t in inputs.teachers.items()},
    )
    for metric in METRICS:
        torch.testing.assert_close(KVLoss(metric=metric)(larger), KVLoss(metric=metric)(inputs))


@pytest.mark.parametrize("metric", METRICS)
def test_channels_of_a_calibrated_teacher_have_no_units(metric: str) -> None:
    """Teacher channels in units of their own, and the map to them too: a loud one is not all of the loss."""
    inputs = random_inputs(samples=8, teachers=((1, 4),))
    projectors = inputs.projectors["t0"]
    projectors.calibrate([inputs.teachers["t0"]])
    before = KVLoss(metric=metric)(inputs)
    units = torch.tensor([1000.0, 1.0, 0.01, 30.0])
    inputs.teachers["t0"] = inputs.teachers["t0"].map(lambda x: x * units)
    for projector in (*projectors.keys, *projectors.values):
        projector.width.weight.data *= units[:, None]
        projector.width.bias.data *= units
    assert (KVLoss(metric=metric)(inputs) - before).abs() > 0.01, "uncalibrated, they do count"
    projectors.calibrate([inputs.teachers["t0"]])
    torch.testing.assert_close(KVLoss(metric=metric)(inputs), before, rtol=1e-4, atol=1e-5)


def test_a_channel_that_does_not_move_is_not_all_of_the_loss() -> None:
    """As a padded head has them: always 0."""
    inputs = random_inputs(samples=8, teachers=((1, 4),))
    projectors = inputs.projectors["t0"]
    projectors.calibrate([inputs.teachers["t0"]])
    before = KVLoss()(inputs).item()
    inputs.teachers["t0"] = inputs.teachers["t0"].map(lambda x: x * torch.tensor([1.0, 1.0, 0.0, 1.0]))
    projectors.calibrate([inputs.teachers["t0"]])
    assert KVLoss()(inputs).item() < 2 * before


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_layer_weighs_the_same(direction: str) -> None:
    """A last layer of huge numbers, as deep layers have them, does not drown the first."""
    inputs = random_inputs(layers=2, direction=direction, init="auto")

    def enlarge_last(kv):
        keys, values = ((x[0], 100 * x[1]) for x in (kv.keys, kv.values))
        return dataclasses.replace(kv, keys=keys, values=values)

    larger = dataclasses.replace(
        inputs,
        student=enlarge_last(inputs.student),
        teachers={n: enlarge_last(t) for n, t in inputs.teachers.items()},
    )
    torch.testing.assert_close(KVLoss()(larger), KVLoss()(inputs))


def test_teachers_share_by_their_weights() -> None:
    """To the teachers' side the loss is the weighted mean of the losses to each of them."""
    inputs = random_inputs()

    def with_weights(first: float) -> Tensor:
        weights = torch.tensor([[first], [1 - first]]).expand(2, len(inputs.labels))
        return KVLoss()(dataclasses.replace(inputs, weights=weights))

    torch.testing.assert_close(with_weights(0.3), 0.3 * with_weights(1.0) + 0.7 * with_weights(0.0))


def test_known_value() -> None:
    """One head, one channel, two positions: target 0 and 2, spread 1, student 1 off everywhere."""
    inputs = random_inputs(samples=1, length=2, layers=1, student=(1, 1), teachers=((1, 1),), init="auto")
    inputs.teachers["t0"] = inputs.teachers["t0"].map(
        lambda x: torch.tensor([0.0, 2.0]).view(1, 1, 2, 1), mask=torch.ones(1, 2, dtype=torch.bool)
    )
    inputs.student = inputs.student.map(lambda x: torch.tensor([1.0, 3.0]).view(1, 1, 2, 1))
    inputs.num_samples = 1.0
    values = {metric: KVLoss(metric=metric)(inputs).item() for metric in METRICS}
    assert values == pytest.approx({"mse": 1, "smooth_l1": 0.5, "l1": 1, "cosine": (1 + 0) / 2}, abs=1e-6)
    assert math.isfinite(sum(values.values()))


shapes = st.tuples(st.integers(1, 4), st.integers(1, 5))


@settings(max_examples=15)
@given(
    samples=st.integers(1, 3), length=st.integers(3, 8), layers=st.integers(1, 3), student=shapes,
    teachers=st.lists(shapes, min_size=1, max_size=3), direction=st.sampled_from(DIRECTIONS),
    metric=st.sampled_from(METRICS), left=st.integers(0, 3), right=st.integers(0, 3),
)  # fmt: skip
def test_any_shapes(samples, length, layers, student, teachers, direction, metric, left, right) -> None:
    """Unlike heads, widths, lengths and numbers of teachers; micro-batches add up and padding adds nothing."""
    inputs = random_inputs(1, samples, length, layers, student, teachers, direction)
    loss = KVLoss(metric=metric)
    whole = loss(inputs)
    assert whole.isfinite() and whole >= -1e-6
    parts = sum(loss(pad(map_inputs(inputs, lambda x, i=i: x[i : i + 1]), left, right, 9.0)) for i in range(samples))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_mixed_directions_are_a_mistake() -> None:
    inputs = random_inputs()
    inputs.projectors["t0"].direction = "teacher_to_student"
    with pytest.raises(AssertionError, match="one direction"):
        KVLoss()(inputs)
