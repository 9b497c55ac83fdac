"""The shares of the teachers: whose they are, that they sum to one, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_trainer.arguments import FusionConfig
from kv_trainer.fusion import MIN_SHARE, check_fusion, confidence, fixed, teacher_weights

CPU = torch.device("cpu")
NLL = torch.tensor([[6.0, 1.0, 8.0], [3.0, 1.0, 2.0]])  # two teachers, three samples
LABELS = torch.tensor([[-100, 4, 5, 6], [-100, -100, 7, 8], [-100, -100, -100, 9]])  # 3, 2 and 1 supervised tokens


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5), samples=st.integers(1, 4))
def test_fixed_weights_are_normalised(weights: list[float], samples: int) -> None:
    found = fixed(weights, samples, CPU)
    assert found.shape == (len(weights), samples)
    for row, weight in zip(found.tolist(), weights, strict=True):
        assert row == pytest.approx([weight / sum(weights)] * samples, rel=1e-5)


def test_a_fixed_weight_of_zero_stays_zero() -> None:
    assert fixed([0.0, 2.0], 2, CPU).tolist() == [[0, 0], [1, 1]]


def test_confidence_is_a_softmax_of_the_loss_a_student_token() -> None:
    found = confidence(NLL, torch.tensor([3, 2, 1]), temperature=0.7)
    for b, tokens in enumerate((3, 2, 1)):
        raw = [math.exp(-NLL[m, b].item() / tokens / 0.7) for m in range(2)]
        assert found[:, b].tolist() == pytest.approx([x / sum(raw) for x in raw], rel=1e-5)


@given(
    nll=st.lists(st.lists(st.floats(0, 1e4), min_size=3, max_size=3), min_size=1, max_size=4),
    tokens=st.lists(st.integers(0, 500), min_size=3, max_size=3),
    temperature=st.floats(1e-3, 1e3),
)
def test_shares_sum_to_one_and_follow_the_likelihood(
    nll: list[list[float]], tokens: list[int], temperature: float
) -> None:
    table = torch.tensor(nll)
    found = confidence(table, torch.tensor(tokens), temperature)
    assert found.isfinite().all() and (found >= 0).all()
    torch.testing.assert_close(found.sum(0), torch.ones(3))
    best = table.argmin(0)
    assert (found.gather(0, best[None])[0] >= found.max(0).values - 1e-6).all(), "the surest teacher has the most"


def test_temperature_limits() -> None:
    tokens = torch.tensor([3, 2, 1])
    cold, hot = confidence(NLL, tokens, 1e-4), confidence(NLL, tokens, 1e6)
    torch.testing.assert_close(cold, torch.tensor([[0.0, 0.5, 0.0], [1.0, 0.5, 1.0]]))
    torch.testing.assert_close(hot, torch.full((2, 3), 0.5), rtol=1e-4, atol=1e-4)


def test_equally_sure_teachers_share_alike_however_they_cut_the_text() -> None:
    """The count is the student's, so a teacher does not gain by having more, easier tokens."""
    nll = torch.full((3, 2), 4.0)
    torch.testing.assert_close(confidence(nll, torch.tensor([5, 9]), 1.0), torch.full((3, 2), 1 / 3))


def test_an_offset_common_to_all_teachers_does_not_count() -> None:
    tokens = torch.tensor([3, 2, 1])
    torch.testing.assert_close(confidence(NLL + 11, tokens, 0.5), confidence(NLL, tokens, 0.5))


def test_teacher_weights_follow_the_recipe() -> None:
    ours = teacher_weights(FusionConfig("confidence", 0.7), [1.0, 1.0], NLL, LABELS)
    exact = confidence(NLL, torch.tensor([3, 2, 1]), 0.7)
    torch.testing.assert_close(ours, exact, rtol=0, atol=2 * MIN_SHARE)
    assert (ours == 0).equal(exact < MIN_SHARE) and (ours == 0).any(), "a share that small is none"
    torch.testing.assert_close(ours.sum(0), torch.ones(3))
    ours = teacher_weights(FusionConfig("fixed"), [1.0, 3.0], None, LABELS)
    torch.testing.assert_close(ours, torch.tensor([[0.25] * 3, [0.75] * 3]))


def test_one_teacher_needs_no_likelihood() -> None:
    assert teacher_weights(FusionConfig("confidence"), [0.3], None, LABELS).tolist() == [[1, 1, 1]]


def test_confidence_without_likelihoods_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="likelihood"):
        teacher_weights(FusionConfig("confidence"), [1.0, 1.0], None, LABELS)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"fusion.temperature is {temperature}"):
        check_fusion(FusionConfig(temperature=temperature), [1.0])


@pytest.mark.parametrize("given", [[0.0], [0.0, 0.0], [2.0, -1.0]])
def test_weights_that_give_no_shares_are_refused(given: list[float]) -> None:
    with pytest.raises(ValueError, match="teachers' weights are"):
        check_fusion(FusionConfig("fixed"), given)
