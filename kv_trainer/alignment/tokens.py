"""The tokenizer axis: which teacher position has read the same text as a student position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import KVStates

# Where a token lies in the row's text: (segment, first character, end). Segments are numbered parts of the row
# that both models read (0 prompt, 1 completion); None is text only one of them sees, such as template markup.
Span = tuple[int, int, int] | None
BOS: Span = (-1, 0, 0)
EOS: Span = (-2, 0, 0)


def last_at_end(spans: Sequence[Span]) -> dict[tuple[int, int], int]:
    """(segment, end) -> the last position whose token ends there: the one that has read all bytes before it."""
    return {(span[0], span[2]): position for position, span in enumerate(spans) if span is not None}


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

    states: [B, H, S, D]; index [B, T] long, -1 = unaligned. Returns [B, H, T, D] with mask [B, T]; unaligned
    positions hold the state of position 0 and are False in the mask.
    """
    safe = index.clamp_min(0)
    rows = torch.arange(len(index), device=index.device)[:, None]

    def gather(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[rows, safe].transpose(1, 2)

    return states.map(gather, mask=(index >= 0) & states.mask.gather(1, safe))
