"""The token axis against slow references, on random cuts of random text and on real tokenizers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_trainer.alignment.tokens import BOS, EOS, Span, span_index, take
from kv_trainer.data import Example, Reader, encode
from kv_trainer.types import KVStates

PARTS = {0: 7, 1: 9}  # characters in each segment


@st.composite
def segmentations(draw: st.DrawFn) -> list[Span]:
    """One way to cut the text of PARTS: special tokens, template text, tokens of no width, characters in bytes."""
    spans: list[Span] = [BOS] * draw(st.integers(0, 1))
    for segment, length in PARTS.items():
        spans += [None] * draw(st.integers(0, 2))
        cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) + [length]
        start = 0
        for end in cuts:
            copies = draw(st.integers(1, 3)) if end == start + 1 else 1  # a character as several byte tokens
            spans += [(segment, start, end)] * copies
            start = end
    spans += [EOS] * draw(st.integers(0, 1))
    return spans[: draw(st.integers(1, len(spans)))]  # truncated


def naive_index(student: list[Span], teacher: list[Span]) -> list[int]:
    """By the definition, O(S T): the last positions, on both sides, whose token ends at one character."""

    def ends(spans: list[Span], position: int) -> tuple[int, int] | None:
        here = spans[position]
        later = [s for s in spans[position + 1 :] if s is not None and here is not None]
        return None if here is None or any((s[0], s[2]) == (here[0], here[2]) for s in later) else (here[0], here[2])

    index = []
    for i in range(len(student)):
        end = ends(student, i)
        index.append(next((j for j in range(len(teacher)) if end is not None and ends(teacher, j) == end), -1))
    return index


@given(student=segmentations(), teacher=segmentations())
def test_span_index_is_the_definition(student, teacher):
    index = span_index(student, teacher)
    assert index == naive_index(student, teacher)
    known = [j for j in index if j >= 0]
    assert known == sorted(set(known)), "text is read in order, so the map rises"


@given(spans=segmentations())
def test_one_cut_is_the_identity(spans):
    index = span_index(spans, spans)
    for i, (span, found) in enumerate(zip(spans, index, strict=True)):
        repeated = span is not None and span in spans[i + 1 :]
        assert found == (-1 if span is None or repeated else i)


@given(student=segmentations(), teacher=segmentations(), cut=st.integers(0, 30))
def test_a_truncated_teacher_loses_its_tail_only(student, teacher, cut):
    whole, short = span_index(student, teacher), span_index(student, teacher[:cut])
    for before, after in zip(whole, short, strict=True):
        if after != before:
            assert before >= cut
            assert after == -1 or teacher[after][2] == teacher[before][2], "only a character cut in bytes moves"


def test_byte_tokens_of_one_character_count_at_the_last():
    whole, by_bytes = [(0, 0, 1), (0, 1, 2)], [(0, 0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2)]
    assert span_index(whole, by_bytes) == [0, 3]
    assert span_index(by_bytes, whole) == [0, -1, -1, 1]


def test_special_tokens_meet_their_like_only():
    student, teacher = [BOS, (0, 0, 2), None, EOS], [None, (0, 0, 2), EOS]
    assert span_index(student, teacher) == [-1, 1, -1, 2]
    assert span_index(teacher, [BOS, None, (0, 0, 2)]) == [-1, 2, -1]
    assert span_index([(0, 0, 3)], [(1, 0, 3)]) == [-1], "equal characters of another segment are other text"
    assert span_index([], teacher) == [] and span_index(student, []) == [-1] * 4


@pytest.mark.parametrize(("ours", "theirs"), [(0, 40), (40, 0), (20, 120), (40, 40)])
@pytest.mark.parametrize("text", ["the quick brown fox", "naïve café – 東京 🦊 ok", "a" * 9])
def test_aligned_tokens_have_read_the_same_bytes(tiny_tokenizer, ours, theirs, text):
    """On real tokenizers, by decoding: an aligned pair has the same prefix, and no such pair is missed."""
    student, teacher = (tiny_tokenizer(merges) for merges in (ours, theirs))
    example = Example([{"role": "user", "content": "seven "}], text)
    a, b = (encode(example, Reader(t), 999) for t in (student, teacher))
    index = span_index(a.spans, b.spans)

    def prefixes(tokenizer, ids):
        return [b"".join(raw_bytes(tokenizer, ids[: i + 1])) for i in range(len(ids))]

    left, right = prefixes(student, a.input_ids), prefixes(teacher, b.input_ids)
    for i, j in enumerate(index):
        if j >= 0:
            assert left[i] == right[j]
    whole = {p for p in set(left) & set(right) if valid(p)}
    assert {left[i] for i, j in enumerate(index) if j >= 0} == whole
    if ours == theirs:
        assert [j for j in index if j >= 0] == [i for i, p in enumerate(left) if valid(p)]
    assert index[-1] == len(b.input_ids) - 1, "the end token meets the end token"


def valid(raw: bytes) -> bool:
    """Whether it ends between characters."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def raw_bytes(tokenizer, ids: list[int]) -> list[bytes]:
    """The bytes behind every byte-level token; the end token counts as a zero byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back = {c: bytes([b]) for b, c in bytes_to_unicode().items()}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [b"\0" if t == "</s>" else b"".join(back[c] for c in t) for t in tokens]


def make_states(batch: int = 3, length: int = 6, layers: int = 2) -> KVStates:
    draw = torch.Generator().manual_seed(4)
    every = torch.randn(2, layers, batch, 2, length, 5, generator=draw)
    mask = torch.ones(batch, length).bool()
    mask[-1, 4:] = False
    return KVStates(tuple(every[0]), tuple(every[1]), mask, tuple(range(layers)), layers)


@given(st.lists(st.lists(st.integers(-1, 5), min_size=8, max_size=8), min_size=3, max_size=3))
def test_take_is_the_loop(rows):
    states, index = make_states(), torch.tensor(rows)
    taken = take(states, index)
    assert taken.keys[0].shape == (3, 2, 8, 5) and taken.mask.shape == (3, 8) and taken.layers == states.layers
    for b in range(3):
        for t in range(8):
            j = rows[b][t]
            assert taken.mask[b, t] == (j >= 0 and states.mask[b, j])
            for ours, theirs in zip((*taken.keys, *taken.values), (*states.keys, *states.values), strict=True):
                assert torch.equal(ours[b, :, t], theirs[b, :, max(j, 0)])


def test_take_of_every_position_is_the_same_states():
    states = make_states()
    taken = take(states, torch.arange(6).expand(3, 6))
    assert torch.equal(taken.mask, states.mask)
    for ours, theirs in zip((*taken.keys, *taken.values), (*states.keys, *states.values), strict=True):
        assert torch.equal(ours, theirs)


def test_gradient_returns_to_the_positions_taken():
    states = make_states(layers=1)
    key = states.keys[0].clone().requires_grad_()
    taken = take(KVStates((key,), states.values, states.mask, (0,), 1), torch.tensor([[1, 1, -1]] * 3))
    (taken.keys[0] * taken.mask[:, None, :, None]).sum().backward()
    assert key.grad[:, :, 1].eq(2).all() and key.grad.sum() == key.grad[:, :, 1].sum()


def test_more_padding_changes_nothing():
    states, index = make_states(), torch.tensor([[0, 2, -1, 5], [3, 4, 5, -1], [0, 1, 2, 5]])
    expected = take(states, index)
    wide = states.map(lambda x: torch.nn.functional.pad(x, (0, 0, 0, 3), value=7.0))
    wide = wide.map(lambda x: x, mask=torch.nn.functional.pad(states.mask, (0, 3)))
    found = take(wide, torch.nn.functional.pad(index, (0, 2), value=-1))
    assert torch.equal(found.mask[:, :4], expected.mask) and not found.mask[:, 4:].any()
    for ours, theirs in zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True):
        assert torch.equal(ours[:, :, :4], theirs)
