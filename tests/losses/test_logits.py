"""Logit distillation against the formula on whole tensors, and what it keeps in memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers_losses import random_inputs
from torch import Tensor

from kv_trainer.losses import LogitKD, LossInputs, TeacherLogits


def naive(inputs: LossInputs, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for m, (name, teacher) in enumerate(inputs.teachers.items()):
        said = inputs.teacher_logits[name]
        theirs, ours = said.head(said.hidden).double(), inputs.logits.double()
        whole = theirs.div(temperature).softmax(-1)
        known = whole.sum(-1) if said.teacher_ids is None else whole[..., said.teacher_ids].sum(-1)
        if said.student_ids is not None:
            theirs, ours = theirs[..., said.teacher_ids], ours[..., said.student_ids]
        p, q = (x.div(temperature).softmax(-1) for x in (theirs, ours))
        for b, row in enumerate(inputs.labels):
            for t in range(len(row) - 1):
                if row[t + 1] != -100 and teacher.mask[b, t]:
                    total = total + inputs.weights[m, b] * known[b, t] * (p[b, t] * (p[b, t] / q[b, t]).log()).sum()
    return total * temperature**2 / inputs.num_tokens


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_the_whole_with_its_gradient(temperature: float, chunk: int) -> None:
    inputs = random_inputs(3, samples=3, teachers=((3, 4), (1, 5), (2, 2)))
    ours, theirs = LogitKD(temperature=temperature, chunk=chunk)(inputs), naive(inputs, temperature)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    (found,), (expected,) = torch.autograd.grad(ours, inputs.logits), torch.autograd.grad(theirs, inputs.logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_is_torch_kl_div() -> None:
    inputs = random_inputs(teachers=((3, 4),))
    inputs.teachers["t0"].mask[:] = True
    said, where = inputs.teacher_logits["t0"], inputs.labels[:, 1:] != -100
    p, q = said.head(said.hidden)[:, :-1][where].log_softmax(-1), inputs.logits[:, :-1][where].log_softmax(-1)
    expected = F.kl_div(q, p, log_target=True, reduction="sum") / inputs.num_tokens
    torch.testing.assert_close(LogitKD()(inputs), expected)


def test_an_equal_student_costs_nothing() -> None:
    inputs = random_inputs(teachers=((3, 4),))
    inputs.logits = inputs.teacher_logits["t0"].head(inputs.teacher_logits["t0"].hidden).requires_grad_()
    value = LogitKD()(inputs)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and inputs.logits.grad.abs().max() < 1e-6


def test_tokens_that_one_side_lacks_do_not_count() -> None:
    inputs = random_inputs()
    said = inputs.teacher_logits["t1"]
    alone = dataclasses.replace(inputs, teachers={"t1": inputs.teachers["t1"]}, weights=torch.ones(1, 3))
    LogitKD()(alone).backward()
    unshared = torch.ones(inputs.logits.shape[2], dtype=torch.bool)
    unshared[said.student_ids] = False
    assert unshared.any() and (inputs.logits.grad[..., unshared] == 0).all() and inputs.logits.grad.abs().sum() > 0


def test_a_teacher_that_is_sure_of_a_token_the_student_lacks_teaches_next_to_nothing() -> None:
    inputs = random_inputs(teachers=((3, 4),))
    inputs.teachers["t0"].mask[:] = True
    said, vocabulary = inputs.teacher_logits["t0"], inputs.logits.shape[2]
    ids = torch.arange(vocabulary)

    def head(hidden: Tensor) -> Tensor:  # a token behind the shared ones takes all but 1e-4
        logits = said.head(hidden)[:, :vocabulary].log_softmax(-1)
        return torch.cat([logits, torch.full_like(logits[:, :1], 9.2)], 1)

    flat = TeacherLogits(said.hidden, lambda hidden: said.head(hidden)[:, :vocabulary], ids, ids)
    sure = TeacherLogits(said.hidden, head, ids, ids)
    values = []
    for each in (flat, sure):
        inputs.teacher_logits["t0"] = each
        values.append(LogitKD()(inputs).item())
    assert values[1] == pytest.approx(1e-4 * values[0], rel=0.02)


def test_unlike_vocabularies_must_be_matched() -> None:
    inputs = random_inputs()
    said = inputs.teacher_logits["t1"]
    inputs.teacher_logits["t1"] = TeacherLogits(said.hidden, said.head)
    with pytest.raises(AssertionError, match="name the tokens that both hold"):
        LogitKD()(inputs)


class Large:
    """A batch whose vocabulary is what counts: 4 x 64 positions, 2,000 tokens, a teacher's head that is watched."""

    def __init__(self) -> None:
        length, vocabulary = 64, 2000
        self.inputs = random_inputs(samples=4, length=length, layers=1, teachers=((3, 4),))
        self.inputs.logits = torch.randn(4, length, vocabulary, requires_grad=True)
        self.inputs.teachers["t0"].mask[:] = True
        self.inputs.labels[:] = 1
        weight = torch.randn(6, vocabulary)
        self.rows: list[int] = []
        self.made: list[weakref.ref] = []

        def head(hidden: Tensor) -> Tensor:
            logits = hidden @ weight
            self.rows.append(len(hidden))
            self.made.append(weakref.ref(logits))
            return logits

        self.inputs.teacher_logits["t0"] = TeacherLogits(self.inputs.teacher_logits["t0"].hidden, head)
        self.full = self.inputs.logits.numel() * 4  # bytes of one tensor of all logits


def test_teacher_logits_are_made_in_chunks_and_made_again() -> None:
    large = Large()
    value = LogitKD(chunk=50)(large.inputs)
    forward = len(large.rows)
    assert forward == -(-4 * 63 // 50) and max(large.rows) <= 50
    assert all(ref() is None for ref in large.made), "none is kept for the backward pass"
    value.backward()
    assert len(large.rows) == 2 * forward and all(ref() is None for ref in large.made)


def test_gradients_can_be_asked_for_twice() -> None:
    """As for measuring a term's share of the gradient before the step's own backward pass."""
    inputs = random_inputs()
    value = LogitKD(chunk=4)(inputs)
    (first,) = torch.autograd.grad(value, inputs.logits, retain_graph=True)
    value.backward()
    torch.testing.assert_close(inputs.logits.grad, first, rtol=0, atol=0)


def test_saves_no_second_tensor_of_logits() -> None:
    """The student's rows that count, once; the plain way keeps both sides' probabilities."""
    assert 0.9 < saved(LogitKD(chunk=50)) < 1.05
    assert saved(naive_at_once) > 1.9


def saved(loss: Callable[[LossInputs], Tensor]) -> float:
    """What autograd keeps beside the student's logits, in tensors of their size."""
    large, storages = Large(), {}
    given = large.inputs.logits.untyped_storage().data_ptr()

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() != given:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = loss(large.inputs)
    assert value.isfinite()
    return sum(storages.values()) / large.full


def naive_at_once(inputs: LossInputs) -> Tensor:
    said = inputs.teacher_logits["t0"]
    target = said.head(said.hidden).log_softmax(-1)
    return F.kl_div(inputs.logits.log_softmax(-1), target, log_target=True, reduction="sum")


@pytest.mark.parametrize(("knob", "value"), [("temperature", 0.0), ("temperature", -1.0), ("chunk", 0)])
def test_impossible_settings_are_refused(knob: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{knob} is {value}"):
        LogitKD(**{knob: value})
