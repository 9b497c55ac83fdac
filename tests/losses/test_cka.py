"""The CKA loss against a loop over samples, and what it must and must not see."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers_losses import map_inputs, pad, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_trainer.losses import CKALoss, LossInputs
from kv_trainer.losses.base import chosen_layers

PARTS = {"keys": ("keys",), "values": ("values",), "both": ("keys", "values")}


def naive_hsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1 of two sets of rows, each centred and at unit mean square length, in float64."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    x, y = (z / z.detach().square().sum(1).mean().sqrt() for z in (x, y))
    n = len(x)
    k, m = (z @ z.T * (1 - torch.eye(n)) for z in (x, y))
    cross = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(1))
    return ((k * m).sum() + cross) / (n * (n - 3))


def naive(inputs: LossInputs, parts: str, samples: int, layers: list[int], skip: int) -> Tensor:
    total, pieces = torch.zeros((), dtype=torch.float64), [(p, layer) for p in PARTS[parts] for layer in layers]
    for first in range(0, len(inputs.labels), samples):
        for m, kv in enumerate(inputs.teachers.values()):
            for part, layer in pieces:
                share, sums = 0.0, [0.0, 0.0, 0.0]
                for b in range(first, min(first + samples, len(inputs.labels))):
                    where = kv.mask[b].nonzero()[skip:, 0]
                    if len(where) < 4:
                        continue
                    x, y = (getattr(s, part)[layer][b, :, where] for s in (inputs.student, kv))
                    x, y = (z.transpose(0, 1).flatten(1) for z in (x, y))
                    weight = inputs.weights[m, b].double()
                    share = share + weight
                    for i, (p, q) in enumerate(((x, y), (x, x), (y, y))):
                        sums[i] = sums[i] + weight * naive_hsic(p, q)
                if share:
                    total = total + share * (1 - sums[0] / (sums[1] * sums[2]).sqrt()) / len(pieces)
    return total / inputs.num_samples


@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize(("parts", "layers"), [("keys", "all"), ("values", [1]), ("both", "middle")])
def test_equals_the_loop_with_its_gradients(parts: str, layers, samples: int) -> None:
    inputs = random_inputs(2, samples=3, length=9, layers=3, teachers=((3, 4), (1, 5), (2, 2)))
    inputs.teachers["t0"].mask[1, 3:] = False  # too short a sample
    loss = CKALoss(parts=parts, samples=samples, layers=layers)
    ours, theirs = loss(inputs), naive(inputs, parts, samples, chosen_layers(layers, 3), 1)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    points = [*inputs.student.keys, *inputs.student.values]
    options = {"allow_unused": True, "materialize_grads": True}
    found, expected = torch.autograd.grad(ours, points, **options), torch.autograd.grad(theirs, points, **options)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    chosen = {"all": [True] * 3, "middle": [False, True, False]}.get(str(layers), [False, True, False])
    learns = [bool(g.abs().sum() > 0) for g in found]
    assert learns == [c and part in PARTS[parts] for part in ("keys", "values") for c in chosen]


def test_the_same_geometry_costs_nothing_and_an_unrelated_student_one() -> None:
    inputs = random_inputs(samples=4, length=300, teachers=((2, 3),))
    alike = dataclasses.replace(inputs, student=inputs.teachers["t0"].map(lambda x: 7 * x.flip(1, 3) + 2))
    inputs.num_samples = alike.num_samples = 4.0
    assert float(CKALoss()(alike)) == pytest.approx(0, abs=1e-4)
    assert CKALoss()(inputs).item() == pytest.approx(1, abs=0.1)


def test_can_be_learned() -> None:
    """A random student comes close to the teacher's geometry by this loss alone."""
    inputs = random_inputs(samples=2, length=12, layers=1, teachers=((2, 3),), student=(1, 6))
    points = [*inputs.student.keys, *inputs.student.values]
    optimizer, start = torch.optim.Adam(points, lr=0.05), CKALoss()(inputs).item()
    for _ in range(150):
        optimizer.zero_grad()
        CKALoss()(inputs).backward()
        optimizer.step()
    assert CKALoss()(inputs) < 0.1 * start


def test_sinks_are_left_out() -> None:
    """The first aligned position of each sample, wherever it is, however large."""
    inputs = random_inputs(length=10)
    changed = dataclasses.replace(inputs)
    changed.teachers = {
        name: t.map(lambda x, t=t: torch.where(first(t.mask)[:, None, :, None], 1e3 * x, x))
        for name, t in inputs.teachers.items()
    }
    torch.testing.assert_close(CKALoss()(changed), CKALoss()(inputs))
    assert (CKALoss(skip_first=0)(changed) - CKALoss(skip_first=0)(inputs)).abs() > 0.01


def first(mask: Tensor) -> Tensor:
    return mask & (mask.cumsum(1) == 1)


@settings(max_examples=20)
@given(
    limit=st.integers(4, 20), left=st.integers(0, 5), right=st.integers(0, 5), seed=st.integers(0, 5),
    samples=st.integers(1, 4),
)  # fmt: skip
def test_under_a_limit_padding_changes_nothing(limit: int, left: int, right: int, seed: int, samples: int) -> None:
    inputs = random_inputs(seed, length=12)
    loss = CKALoss(max_positions=limit, samples=samples)
    torch.testing.assert_close(loss(pad(inputs, left, right, -7.0)), loss(inputs), rtol=1e-4, atol=1e-5)


def test_a_limit_bounds_the_positions() -> None:
    inputs = random_inputs(length=12)
    assert CKALoss(max_positions=12)(inputs) == CKALoss()(inputs)
    CKALoss(max_positions=5, skip_first=0)(inputs).backward()
    touched = inputs.student.keys[0].grad.abs().sum((1, 3)) > 0
    assert (touched.sum(1) <= 2 * 5).all() and touched.any(), "at most five for each of two teachers"


def test_a_group_of_samples_is_averaged_before_the_division() -> None:
    inputs = random_inputs(samples=4, length=12)
    one, four = (CKALoss(samples=n) for n in (1, 4))
    assert (one(inputs) - four(inputs)).abs() > 1e-3
    twice = map_inputs(inputs, lambda x: x[[0, 0, 0, 0]])
    torch.testing.assert_close(one(twice), four(twice), rtol=1e-4, atol=1e-5)


def test_shares_by_layer() -> None:
    """One teacher is heard in the first layer alone, the other in the second."""
    inputs = random_inputs(layers=2, length=10)
    inputs.weights = torch.eye(2)[:, :, None].expand(2, 2, 3)
    expected = 0
    for i, name in enumerate(inputs.teachers):
        alone = dataclasses.replace(inputs, teachers={name: inputs.teachers[name]}, weights=torch.ones(1, 3))
        expected = expected + CKALoss(layers=[i])(alone) / 2
    torch.testing.assert_close(CKALoss(layers="all")(inputs), expected)


def test_a_router_learns_through_the_shares() -> None:
    inputs = random_inputs(length=10)
    inputs.weights.requires_grad_()
    CKALoss()(inputs).backward()
    assert inputs.weights.grad.abs().sum() > 0


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 1]), (3, [1]), (4, [1, 2]), (30, range(10, 20))])
def test_the_middle_third(count: int, expected) -> None:
    assert chosen_layers("middle", count) == list(expected)
    assert chosen_layers("all", count) == list(range(count))
    assert chosen_layers([0], count) == [0]


@pytest.mark.parametrize("layers", [[], [2], [-1], "last", [0, 5]])
def test_layers_that_are_not_there_are_refused(layers) -> None:
    with pytest.raises(ValueError, match=r"layers is .*; give 'middle', 'all', or a list .* from 0 to 1"):
        CKALoss(layers=layers)(random_inputs(layers=2))


@pytest.mark.parametrize(("knob", "value"), [("max_positions", 3), ("samples", 0), ("skip_first", -1)])
def test_impossible_settings_are_refused(knob: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{knob} is {value}"):
        CKALoss(**{knob: value})


def test_is_never_out_of_bounds() -> None:
    """Cauchy and Schwarz: 0 to 2, also where the debiased HSIC across is below zero."""
    values = [CKALoss()(dataclasses.replace(random_inputs(s), num_samples=3.0)).item() for s in range(20)]
    assert all(math.isfinite(v) and 0 <= v <= 2 for v in values) and max(values) > 1
