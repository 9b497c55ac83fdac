"""The time axis against slow loops: every length from nothing up, every number type, and the selection of R-KV."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_trainer.alignment.time import linear_indices, place_selected, rkv_select, segment_indices, time_resample

LENGTHS = st.integers(0, 9)


def naive_linear(source: int, target: int, width: int) -> list[float]:
    line = [i * (source - 1) / (target - 1) if target > 1 else 0.0 for i in range(target)]
    return [u if source else -1.0 for u in line] + [-1.0] * (width - target)


@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=4))
def test_linear_indices_of_each_row(lengths):
    source, target = (torch.tensor(side) for side in zip(*lengths))
    found = linear_indices(len(lengths), source, target)
    width = int(target.max())
    assert found.shape == (len(lengths), width) and found.dtype == torch.float32
    expected = torch.tensor([naive_linear(s, t, width) for s, t in lengths]).reshape(len(lengths), width)
    torch.testing.assert_close(found, expected)
    for row, (s, t) in zip(found, lengths, strict=True):
        assert torch.equal(linear_indices(1, s, t, "cpu")[0], row[:t]), "a row does not depend on its neighbours"


def test_equal_lengths_are_the_identity_however_long():
    assert torch.equal(linear_indices(1, 20000, 20000)[0], torch.arange(20000.0))
    assert linear_indices(1, 30001, 20001)[0, -1] == 30000
    assert linear_indices(2, 5, 0).shape == (2, 0) and linear_indices(0, 5, 3).shape[0] == 0


def naive_resample(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """x [B, H, S, D], indices [B, H, T], one number at a time."""
    size, out = x.shape[2], torch.zeros(*indices.shape, x.shape[3])
    for b in range(indices.shape[0]):
        for h in range(indices.shape[1]):
            for t in range(indices.shape[2]):
                u = float(indices[b, h, t])
                if u >= 0 and size:
                    u = min(u, size - 1)
                    low, high = math.floor(u), math.ceil(u)
                    out[b, h, t] = (1 - (u - low)) * x[b, h, low] + (u - low) * x[b, h, high]
    return out


@given(
    size=st.integers(0, 5),
    steps=st.integers(0, 6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int8]),
    data=st.data(),
)
def test_time_resample_is_the_loop(size, steps, dtype, data):
    # Quarters, so that every float type holds them; below zero and beyond the end too.
    quarters = data.draw(st.lists(st.integers(-6, 28), min_size=2 * 3 * steps, max_size=2 * 3 * steps))
    indices = (torch.tensor(quarters, dtype=torch.float64).view(2, 3, steps) / 4).to(dtype)
    x = torch.randn(2, 3, size, 4, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(time_resample(x, indices), naive_resample(x, indices))
    shared = indices[:, 0]
    expected = naive_resample(x, shared[:, None].expand(2, 3, steps))
    torch.testing.assert_close(time_resample(x, shared), expected)
    torch.testing.assert_close(time_resample(x[:, 1], shared), expected[:, 1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_small_integers_reach_as_far_as_they_can(dtype):
    x = torch.randn(1, 1, 300, 2)
    assert torch.equal(time_resample(x, torch.tensor([[0, 127]], dtype=dtype)), x[:, :, [0, 127]])


def test_masked_positions_are_zero_whatever_is_there():
    x = torch.full((1, 2, 3, 2), torch.nan)
    assert time_resample(x, torch.tensor([[-1.0, -0.5, math.nan, -math.inf]])).eq(0).all()
    x = torch.randn(1, 2, 3, 2)
    assert torch.equal(time_resample(x, torch.tensor([[math.inf]])), x[:, :, 2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_keep_their_type(dtype):
    x = torch.randn(1, 2, 3, 2).to(dtype)
    found = time_resample(x, torch.tensor([[0.5, 2.0]]))
    assert found.dtype == dtype and torch.equal(found[:, :, 1], x[:, :, 2])
    torch.testing.assert_close(found[:, :, 0], (x[:, :, 0] + x[:, :, 1]) / 2)


def test_the_gradient_goes_to_the_neighbours_by_their_share():
    x = torch.randn(1, 1, 4, 2, requires_grad=True)
    time_resample(x, torch.tensor([[0.25, 2.0, -1.0]])).sum().backward()
    assert x.grad[0, 0, :, 0].tolist() == [0.75, 0.25, 1.0, 0.0]
    empty = torch.randn(1, 1, 0, 2, requires_grad=True)
    time_resample(empty, torch.tensor([[0.0]])).sum().backward()
    assert empty.grad.shape == empty.shape
    check = torch.randn(1, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: time_resample(y, torch.tensor([[0.3, 1.0, 2.9]])), check)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,)])
def test_positions_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="give one row of positions for each sample"):
        time_resample(torch.randn(2, 5, 4), torch.zeros(shape))


# Segments

ROW = st.tuples(*[st.integers(0, 4)] * 5)


def laid_out(counts: tuple[int, ...]) -> list[int]:
    """BOS, prompt, reasoning, answer, end, where the counts say how many positions each has."""
    return [s for s, count in zip((-1, 0, 1, 2, -1), counts) for _ in range(count)]


@given(source=ROW, target=ROW)
def test_every_segment_is_linear_in_its_own(source, target):
    theirs, ours = laid_out(source), laid_out(target)
    found = segment_indices(torch.tensor([theirs]), torch.tensor([ours]))[0].tolist()
    assert len(found) == len(ours)
    expected = [-1.0] * len(ours)
    for segment in (0, 1, 2):
        places = [i for i, s in enumerate(ours) if s == segment]
        there = [j for j, s in enumerate(theirs) if s == segment]
        for place, u in zip(places, naive_linear(len(there), len(places), len(places)), strict=True):
            expected[place] = there[0] + u if there else -1.0
    assert found == pytest.approx(expected)
    for i, u in enumerate(found):
        if u >= 0:
            assert theirs[math.floor(u)] == theirs[math.ceil(u)] == ours[i], "no position leaves its segment"


def test_rows_and_pieces_of_a_segment():
    source = torch.tensor([[0, 0, -1, 0, 0], [1, 1, 1, 2, -1]])
    found = segment_indices(source, torch.tensor([[0, 0, 0], [1, 2, 0]]))
    assert found.tolist() == [[0.0, 3.0, 4.0], [0.0, 3.0, -1.0]], "1.5 of [0, 1, 3, 4] is rounded to a piece"


# Selection


def naive_rkv(keys, importance, mask, budget: int, tradeoff: float) -> list[int]:
    """One row, one head, by the formula with all cosines: keys [S, D]."""
    real = [i for i in range(len(keys)) if mask[i]]
    cosine = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
    raw = [-sum(float(cosine[i, j]) for j in real if j != i) / len(real) for i in real]
    total = sum(math.exp(r) for r in raw)
    score = {i: tradeoff * float(importance[i]) + (1 - tradeoff) * math.exp(r) / total for i, r in zip(real, raw)}
    return sorted(sorted(real, key=lambda i: -score[i])[:budget])


@given(
    size=st.integers(1, 8), budget=st.integers(0, 9), tradeoff=st.sampled_from([0.1, 0.7, 1.0]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_rkv_is_the_formula(size, budget, tradeoff, seed):
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, size, 4, generator=draw)
    importance = torch.rand(2, 3, size, generator=draw)
    mask = torch.rand(2, size, generator=draw) < 0.7
    keys[~mask[:, None].expand(2, 3, size)] *= 100  # padding has no say
    keys[0, :, 0] = 0.0  # like none, itself included
    found, real = rkv_select(keys, importance, mask, budget, tradeoff)
    assert found.shape == real.shape == (2, 3, budget) and found.dtype == torch.long
    for b in range(2):
        for h in range(3):
            expected = naive_rkv(keys[b, h], importance[b, h], mask[b], budget, tradeoff)
            assert found[b, h].tolist() == expected + [-1] * (budget - len(expected))
            assert real[b, h].tolist() == [i < len(expected) for i in range(budget)]


def test_a_repeated_key_goes_first_and_importance_can_save_it():
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])[None, None]
    mask = torch.ones(1, 4).bool()
    assert 1 not in rkv_select(keys, torch.zeros(1, 4), mask, 2)[0]
    found, _ = rkv_select(keys, torch.tensor([[0.0, 9.0, 0.0, 0.0]]), mask, 2)
    assert 1 in found, "importance is [B, S] here, for all heads"
    with pytest.raises(ValueError, match="tradeoff is 1.5"):
        rkv_select(keys, torch.zeros(1, 4), mask, 2, tradeoff=1.5)


def test_each_row_has_its_own_budget():
    keys, mask = torch.randn(3, 2, 6, 4), torch.ones(3, 6).bool()
    importance = torch.rand(3, 2, 6)
    found, real = rkv_select(keys, importance, mask, torch.tensor([2, 0, 4]))
    assert real.sum(2).tolist() == [[2, 2], [0, 0], [4, 4]]
    assert torch.equal(found[:1, :, :2], rkv_select(keys[:1], importance[:1], mask[:1], 2)[0])
    empty, none = rkv_select(keys[:, :, :0], importance[..., :0], mask[:, :0], 2)
    assert empty.eq(-1).all() and empty.shape == (3, 2, 2) and not none.any()


def test_selected_positions_take_their_place_and_are_taken_head_by_head():
    selected = torch.tensor([[[4, 7], [5, 6]], [[2, -1], [3, -1]]])
    index = torch.tensor([[0.5, -1, -1, -1, 9], [0, -1, -1, 1, -1]])
    rank = torch.tensor([[-1, 0, 1, 1, -1], [-1, 0, 1, -1, -1]])
    found = place_selected(index, rank, selected)
    assert found.tolist() == [
        [[0.5, 4, 7, 7, 9], [0.5, 5, 6, 6, 9]],
        [[0, 2, -1, 1, -1], [0, 3, -1, 1, -1]],
    ]
    x = torch.randn(2, 2, 10, 3)
    assert torch.equal(time_resample(x, found)[0, 1, 2], x[0, 1, 6])
    assert place_selected(index, rank, selected[..., :0])[0, 0].tolist() == [0.5, -1, -1, -1, 9]
