"""Cross-entropy against a loop, and against transformers' own losses."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_losses import random_inputs
from hypothesis import given
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from kv_trainer.losses import CrossEntropy, LossInputs


def naive(inputs: LossInputs, smoothing: float) -> float:
    """Position by position, in Python floats."""
    total = 0.0
    for logits, labels in zip(inputs.logits.tolist(), inputs.labels.tolist(), strict=True):
        for row, label in zip(logits[:-1], labels[1:], strict=True):
            if label == -100:
                continue
            normaliser = math.log(sum(math.exp(x) for x in row))
            costs = [normaliser - x for x in row]
            total += (1 - smoothing) * costs[label] + smoothing * sum(costs) / len(costs)
    return total / inputs.num_tokens


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop(seed: int, smoothing: float) -> None:
    inputs = random_inputs(seed)
    assert CrossEntropy(label_smoothing=smoothing)(inputs).item() == pytest.approx(naive(inputs, smoothing), rel=1e-5)


def test_equals_the_loss_of_transformers() -> None:
    inputs = random_inputs()
    vocabulary = inputs.logits.shape[-1]
    count = torch.tensor(inputs.num_tokens)
    theirs = ForCausalLMLoss(inputs.logits, inputs.labels, vocabulary, num_items_in_batch=count)
    ours = CrossEntropy()(inputs)
    torch.testing.assert_close(ours, theirs)
    for x, y in zip(torch.autograd.grad(ours, inputs.logits), torch.autograd.grad(theirs, inputs.logits), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("smoothing", [0.05, 0.5])
def test_equals_the_label_smoother_of_transformers(smoothing: float) -> None:
    inputs = random_inputs()
    inputs.num_tokens = float((inputs.labels[:, 1:] != -100).sum())
    theirs = LabelSmoother(epsilon=smoothing)({"logits": inputs.logits}, inputs.labels, shift_labels=True)
    torch.testing.assert_close(CrossEntropy(label_smoothing=smoothing)(inputs), theirs)


def test_gradient_is_probability_minus_target() -> None:
    inputs = random_inputs()
    (grad,) = torch.autograd.grad(CrossEntropy()(inputs), inputs.logits)
    expected = torch.zeros_like(grad)
    for b, labels in enumerate(inputs.labels.tolist()):
        for t, label in enumerate(labels[1:]):
            if label != -100:
                expected[b, t] = inputs.logits[b, t].detach().softmax(-1)
                expected[b, t, label] -= 1
    torch.testing.assert_close(grad, expected / inputs.num_tokens)


@given(vocabulary=st.integers(2, 50), samples=st.integers(1, 4), length=st.integers(2, 9))
def test_an_even_guess_costs_the_logarithm_of_the_vocabulary(vocabulary: int, samples: int, length: int) -> None:
    labels = torch.randint(vocabulary, (samples, length))
    inputs = LossInputs(labels, samples * (length - 1), samples, logits=torch.zeros(samples, length, vocabulary))
    assert CrossEntropy()(inputs).item() == pytest.approx(math.log(vocabulary), rel=1e-5)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_impossible_smoothing_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing is {smoothing}"):
        CrossEntropy(label_smoothing=smoothing)
