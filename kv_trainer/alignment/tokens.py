"""The tokenizer axis: which teacher position has read the same text as a student position."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..types import KVStates
from .time import neighbours, time_resample

# Where a token lies in the row's text: (segment, first character, end). Segments are numbered parts of the row
# that both models read (0 prompt, 1 completion); None is text only one of them sees, such as template markup.
Span = tuple[int, int, int] | None
NONE, PROMPT, REASONING, ANSWER = -1, 0, 1, 2  # segments of a row by what they are for; NONE: added by a template
BOS: Span = (-1, 0, 0)
EOS: Span = (-2, 0, 0)


def last_at_end(spans: Sequence[Span]) -> dict[tuple[int, int], int]:
    """(segment, end) -> the last position whose token ends there: the one that has read all bytes before it.

    A token that ends behind the start of the next one has not read its last character: it holds some of its bytes, or
    only the space that a SentencePiece tokenizer puts before it.
    """
    found: dict[tuple[int, int], int] = {}
    for position, span in enumerate(spans):
        after = spans[position + 1] if position + 1 < len(spans) else None
        if span is not None and not overlaps(span, after):
            found[span[0], span[2]] = position
    return found


def overlaps(span: Span, after: Span) -> bool:
    """Whether the token behind begins before this one ends, as when they share a character."""
    return span is not None and after is not None and span[0] == after[0] and after[1] < span[2]


def span_index(student: Sequence[Span], teacher: Sequence[Span]) -> list[int]:
    """For each student position the teacher position that has read exactly the same text, else -1.

    Both token lists are walked by their ends: where the ends coincide, both models have read the same prefix, and
    the last teacher position of the group is its state. Between shared ends there is no such state: -1, masked.
    Source: GOLD's byte offsets (TRL); FuseLLM, arXiv 2401.10491; DSKD, arXiv 2406.17328.
    """
    theirs = last_at_end(teacher)
    index = [-1] * len(student)
    for end, position in last_at_end(student).items():
        index[position] = theirs.get(end, -1)
    return index


def take(states: KVStates, index: Tensor) -> KVStates:
    """Teacher states at the student's positions.

    states: [B, H, S, D]; index [B, T] of any number type: an integer takes a state, a fraction interpolates between
    two, and -1 is unaligned. Returns [B, H, T, D] with mask [B, T]: unaligned positions are zero and False in the
    mask, and a fraction is True only where both of its neighbours are real.
    """
    index = index.to(states.mask.device)
    keep, low, high, _ = neighbours(index, states.mask.shape[1])
    if states.mask.shape[1]:
        keep = keep & states.mask.gather(1, low) & states.mask.gather(1, high)
    return states.map(lambda x: time_resample(x, index), mask=keep)
