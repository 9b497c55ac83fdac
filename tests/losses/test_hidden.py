"""CODI against its formula written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers_losses import random_inputs
from torch import Tensor, nn

from kv_trainer.losses import CODILoss, LossInputs


def naive(inputs: LossInputs) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for m, name in enumerate(inputs.teachers):
        for b, a in enumerate(inputs.answer_positions.tolist()):
            if not inputs.answered[name][b]:
                continue
            for layer, hidden in enumerate(inputs.student_hidden):
                target = inputs.teacher_hidden[name][layer][b].double()
                difference = (inputs.hidden_projectors[name][layer](hidden[b, a]).double() - target).abs()
                smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
                sigma = (target - target.mean()).square().mean().sqrt()
                total = total + inputs.weights[m, b] * smooth / sigma / len(inputs.student_hidden)
    return total / inputs.num_samples


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_loop_with_its_gradients(seed: int) -> None:
    inputs = random_inputs(seed, samples=4, layers=3)
    ours, theirs = CODILoss()(inputs), naive(inputs)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    points = [*inputs.student_hidden, *(p for m in inputs.hidden_projectors.values() for p in m.parameters())]
    found, expected = torch.autograd.grad(ours, points), torch.autograd.grad(theirs, points)
    assert all(g.abs().sum() > 0 for g in found), "projections learn too"
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_only_the_answer_position_learns() -> None:
    inputs = random_inputs(samples=4)
    CODILoss()(inputs).backward()
    for hidden in inputs.student_hidden:
        touched = hidden.grad.abs().sum(-1) > 0
        heard = torch.stack([*inputs.answered.values()]).any(0)
        at = torch.arange(touched.shape[1]) == inputs.answer_positions[:, None]
        assert torch.equal(touched, at & heard[:, None])
        assert touched[0].any() and not touched[2].any(), "the third sample has no answer"


def test_an_equal_student_costs_nothing() -> None:
    inputs = random_inputs(teachers=((3, 4),))
    at = torch.arange(3)[:, None] == torch.arange(inputs.labels.shape[1])
    inputs.answer_positions = torch.arange(3)
    inputs.student_hidden = tuple(torch.where(at[..., None], x[:, None], 9.0) for x in inputs.teacher_hidden["t0"])
    assert CODILoss()(inputs) == 0


def test_without_any_answer_projections_still_take_part() -> None:
    """A parameter that one rank leaves out of its graph stops distributed training."""
    inputs = random_inputs()
    inputs.answer_positions = torch.full_like(inputs.answer_positions, -1)
    inputs.answered = {name: torch.zeros_like(said) for name, said in inputs.answered.items()}
    value = CODILoss()(inputs)
    value.backward()
    assert value == 0
    assert all((p.grad == 0).all() for m in inputs.hidden_projectors.values() for p in m.parameters())


@pytest.mark.parametrize("level", [0.0, 2.0])
def test_a_target_without_spread_stays_sane(level: float) -> None:
    inputs = random_inputs()
    flat = {name: tuple(torch.full_like(x, level) for x in h) for name, h in inputs.teacher_hidden.items()}
    value = CODILoss()(dataclasses.replace(inputs, teacher_hidden=flat))
    value.backward()
    assert value < 1e4 and all(x.grad.isfinite().all() for x in inputs.student_hidden)


def test_each_layer_has_its_own_shares() -> None:
    """The embeddings share as the first layer does."""
    inputs = random_inputs(layers=2)
    inputs.weights = torch.stack([torch.eye(2), torch.eye(2).flip(1)], dim=2)[:, :, :1].expand(-1, -1, 3).contiguous()
    first, second = CODILoss()(inputs), torch.zeros(())
    for name, layers in {"t0": (0, 1), "t1": (2,)}.items():
        terms = []
        for layer in layers:
            alone = dataclasses.replace(
                inputs,
                teachers={name: inputs.teachers[name]},
                weights=torch.ones(1, 3),
                student_hidden=inputs.student_hidden[layer : layer + 1],
                teacher_hidden={name: inputs.teacher_hidden[name][layer : layer + 1]},
                hidden_projectors={name: nn.ModuleList([inputs.hidden_projectors[name][layer]])},
            )
            terms.append(CODILoss()(alone) / 3)
        second = second + sum(terms)
    torch.testing.assert_close(first, second)
