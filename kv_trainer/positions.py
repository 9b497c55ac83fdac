"""One row: which teacher position belongs to each student position, before any model has run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .alignment.time import linear_indices, segment_indices
from .alignment.tokens import ANSWER, BOS, NONE, REASONING, Span, span_index
from .arguments import TimeAlignment
from .examples import Example
from .text import Encoded

SEGMENT_TEXT = {REASONING: lambda example: example.reasoning, ANSWER: lambda example: example.answer}


def align_rows(
    ours: Encoded, theirs: Encoded, example: Example, other: Example, time: TimeAlignment
) -> dict[str, list]:
    """A teacher's `index` for each student position, and under rkv `rank`; see data.encode_rows.

    example, other: the row's text as the student and as the teacher reads it. Their prompts are the same. What is
    resampled is the whole row, whatever was cut of it: else the student's beginning would be taught the teacher's end.
    A row that was cut has no ranks: of what is left, R-KV would select for the whole.
    """
    source, target = (row.whole or row.segments for row in (theirs, ours))
    if time.method == "linear":
        return {"index": of_what_is_left(linear_indices(1, len(source), len(target))[0].tolist(), ours, theirs)}
    if time.method == "truncate":
        return {"index": [i if i < len(theirs.input_ids) else -1 for i in range(len(ours.input_ids))]}
    differing = {s for s in (REASONING, ANSWER) if SEGMENT_TEXT[s](example) != SEGMENT_TEXT[s](other)}
    if time.method == "same_text":
        # Behind a text that differs nothing has read the same, not even the end.
        skipped = {REASONING, ANSWER, NONE} if differing else set()
        return {"index": span_index(shared_spans(ours, example, skipped), shared_spans(theirs, other, skipped))}
    spans = span_index(shared_spans(ours, example, differing), shared_spans(theirs, other, differing))
    resampled = segment_indices(torch.tensor([source]), torch.tensor([target]))[0].tolist()
    linear = of_what_is_left(resampled, ours, theirs)
    selected = differing & {REASONING} if not (ours.kept or theirs.kept) else set()
    index = [
        by_line if segment in differing else float(by_span)
        for segment, by_line, by_span in zip(ours.segments, linear, spans, strict=True)
    ]
    return {"index": index} | ({"rank": ranks(ours, theirs, time.budget, selected)} if time.method == "rkv" else {})


def of_what_is_left(index: Sequence[float], ours: Encoded, theirs: Encoded) -> list[float]:
    """An index of whole rows as one of those that were cut; -1 where the teacher's part was cut off."""
    index = [index[i] for i in ours.kept] if ours.kept else list(index)
    if not theirs.kept:
        return index
    place = {position: left for left, position in enumerate(theirs.kept)}

    def left(at: float) -> float:
        low, high = math.floor(at), math.ceil(at)
        beside = low in place and high in place and place[high] - place[low] == high - low
        return place[low] + at - low if beside else -1.0

    return [left(at) for at in index]


def shared_spans(row: Encoded, example: Example, skipped: set[int]) -> list[Span]:
    """Spans without those of the `skipped` segments, and the answer's as a part of its own, counted from its start."""
    spans: list[Span] = []
    for span, segment in zip(row.spans, row.segments, strict=True):
        if span is None or (segment in skipped and span != BOS):
            spans.append(None)
        elif segment == ANSWER:
            spans.append((span[0] + 1, span[1] - example.answer_start, span[2] - example.answer_start))
        else:
            spans.append(span)
    return spans


def ranks(ours: Encoded, theirs: Encoded, budget: int | None, selected: set[int]) -> list[int]:
    """Which selected teacher position each student position of the `selected` segments gets, -1 elsewhere.

    Where there are fewer of them than student positions, neighbours share one.
    """
    places = [i for i, segment in enumerate(ours.segments) if segment in selected]
    there = sum(segment in selected for segment in theirs.segments)
    count = min(len(places), there, budget or len(places))
    found = [-1] * len(ours.segments)
    for number, place in enumerate(places if count else []):
        found[place] = number * count // len(places)
    return found
