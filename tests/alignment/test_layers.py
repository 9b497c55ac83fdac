"""The layer axis against the formula written out."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_trainer.alignment.layers import LayerMap, explicit, layer_map, nearest, relative_depth
from kv_trainer.types import KVStates

COUNT = st.integers(1, 40)


def make_states(layers: tuple[int, ...], num_layers: int) -> KVStates:
    """Two rows, two heads, three positions; keys and values differ."""
    draw = torch.Generator().manual_seed(2)
    every = torch.randn(2, num_layers, 2, 2, 3, 4, generator=draw)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    return KVStates(tuple(every[0][i] for i in layers), tuple(every[1][i] for i in layers), mask, layers, num_layers)


def depth_of(found: LayerMap) -> list[float]:
    return [lo + f * (hi - lo) for lo, hi, f in zip(found.lower, found.upper, found.fraction, strict=True)]


@given(ours=COUNT, theirs=COUNT)
def test_relative_depth_is_the_formula(ours, theirs):
    found = relative_depth(ours, theirs)
    assert len({len(getattr(found, f.name)) for f in fields(found)} | {ours}) == 1
    depth = depth_of(found)
    if ours == 1:
        assert depth == [theirs - 1]
    else:
        assert depth[0] == 0 and depth[-1] == pytest.approx(theirs - 1)
        assert depth == pytest.approx([i * (theirs - 1) / (ours - 1) for i in range(ours)])
    assert depth == sorted(depth)
    assert all(0 <= lo <= hi <= min(lo + 1, theirs - 1) for lo, hi in zip(found.lower, found.upper, strict=True))
    assert all(0 <= f < 1 for f in found.fraction)


@given(ours=COUNT, theirs=COUNT)
def test_needed_is_all_and_only_what_apply_reads(ours, theirs):
    found = relative_depth(ours, theirs)
    assert list(found.needed) == sorted(set(found.needed)) and set(found.needed) <= set(range(theirs))
    states = make_states(found.needed, theirs)
    mapped = found.apply(states)
    assert len(mapped.keys) == len(mapped.values) == ours
    every = make_states(tuple(range(theirs)), theirs)
    for i, u in enumerate(depth_of(found)):
        below, share = int(u + 1e-9), u - int(u + 1e-9)
        above = min(below + 1, theirs - 1)
        for part in ("keys", "values"):
            naive = (1 - share) * getattr(every, part)[below] + share * getattr(every, part)[above]
            torch.testing.assert_close(getattr(mapped, part)[i], naive, atol=1e-5, rtol=0)
    assert mapped.layers == tuple(range(ours)) and mapped.num_layers == ours
    assert torch.equal(mapped.mask, states.mask)


@pytest.mark.parametrize("method", ["relative_depth", "nearest"])
def test_equal_depth_is_the_identity(method):
    found = layer_map(method, 5, 5)
    assert found.lower == (0, 1, 2, 3, 4) and set(found.fraction) == {0.0} and found.needed == (0, 1, 2, 3, 4)
    states = make_states((0, 1, 2, 3, 4), 5)
    assert all(torch.equal(a, b) for a, b in zip(found.apply(states).keys, states.keys, strict=True))


def test_one_layer_on_either_side():
    assert relative_depth(1, 1).needed == (0,)
    assert relative_depth(1, 7).needed == (6,)
    assert relative_depth(4, 1).lower == (0, 0, 0, 0) and relative_depth(4, 1).needed == (0,)
    assert relative_depth(2, 7).needed == (0, 6), "layers between, which no student layer reads, are not captured"


@given(ours=COUNT, theirs=COUNT)
def test_nearest_is_nearest(ours, theirs):
    found = nearest(ours, theirs)
    assert set(found.fraction) == {0.0} and found.lower == found.upper
    for layer, depth in zip(found.lower, depth_of(relative_depth(ours, theirs)), strict=True):
        assert abs(layer - depth) == min(abs(other - depth) for other in range(theirs))
    assert found.lower[-1] == theirs - 1


def test_explicit_repeats_and_reorders():
    found = layer_map("explicit", 3, 4, [3, 0, 0])
    assert found == explicit([3, 0, 0]) and found.needed == (0, 3)
    states = make_states((0, 3), 4)
    mapped = found.apply(states)
    assert torch.equal(mapped.keys[0], states.keys[1]) and torch.equal(mapped.values[2], states.values[0])


@pytest.mark.parametrize(
    ("given_map", "says"),
    [
        (None, "alignment.layers.map gives None for a student of 3 layers"),
        ([0, 1], "gives \\[0, 1\\] for a student of 3 layers; list one teacher layer for each"),
        ([0, 1, 4], "names the teacher layers \\[4\\].* layers 0 to 3"),
        ([-1, 0, 1], "names the teacher layers \\[-1\\]"),
    ],
)
def test_a_wrong_explicit_map_is_refused(given_map, says):
    with pytest.raises(ValueError, match=says):
        layer_map("explicit", 3, 4, given_map)


def test_interpolation_passes_no_teacher_by():
    """A gradient with respect to the teacher shows which layers take part, and how much."""
    states = make_states((0, 1, 2), 3)
    keys = tuple(k.clone().requires_grad_() for k in states.keys)
    mapped = relative_depth(2, 3).apply(KVStates(keys, states.values, states.mask, (0, 1, 2), 3))
    sum(k.sum() for k in mapped.keys).backward()
    assert keys[0].grad.eq(1).all() and keys[1].grad is None and keys[2].grad.eq(1).all()
    middle = relative_depth(3, 4).apply(make_states((0, 1, 2, 3), 4)).keys[1]
    every = make_states((0, 1, 2, 3), 4).keys
    torch.testing.assert_close(middle, (every[1] + every[2]) / 2)


HYBRID = (3, 7, 11, 15)  # the layers of a hybrid teacher that have keys and values


@given(ours=COUNT)
def test_relative_depth_of_a_hybrid_counts_layers_with_keys_and_values(ours):
    plain, found = relative_depth(ours, 4), layer_map("relative_depth", ours, HYBRID)
    assert found.fraction == plain.fraction
    assert found.lower == tuple(HYBRID[i] for i in plain.lower) and found.upper == tuple(HYBRID[i] for i in plain.upper)
    assert set(found.needed) <= set(HYBRID)
    assert set(layer_map("nearest", ours, HYBRID).lower) <= set(HYBRID)


def test_a_hybrids_layers_are_applied_by_their_number_in_the_model():
    states = make_states(HYBRID, 16)
    mapped = layer_map("relative_depth", 7, HYBRID).apply(states)
    torch.testing.assert_close(mapped.keys[1], (states.keys[0] + states.keys[1]) / 2)
    assert torch.equal(mapped.keys[6], states.keys[3])
    explicitly = layer_map("explicit", 2, HYBRID, [15, 3]).apply(states)
    assert torch.equal(explicitly.values[0], states.values[3]) and torch.equal(explicitly.values[1], states.values[0])


def test_naming_a_layer_without_keys_and_values_is_an_error():
    with pytest.raises(ValueError, match=r"names the teacher layers \[0, 4\], but only \[3, 7, 11, 15\] have keys and"):
        layer_map("explicit", 3, HYBRID, [0, 3, 4])


def test_hidden_states_are_mixed_behind_the_embeddings_and_queries_left_out():
    draw = torch.Generator().manual_seed(4)
    hidden = tuple(torch.randn(5, 2, 3, 6, generator=draw))
    states = replace(make_states((0, 1, 2, 3), 4), hidden=hidden, queries=hidden[1:], attention=(None,) * 4)
    mapped = relative_depth(3, 4).apply(states)
    assert len(mapped.hidden) == 4 and mapped.queries is None and mapped.attention is None
    assert torch.equal(mapped.hidden[0], hidden[0]) and torch.equal(mapped.hidden[3], hidden[4])
    torch.testing.assert_close(mapped.hidden[2], (hidden[2] + hidden[3]) / 2)
