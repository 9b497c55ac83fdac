"""Encoded rows to padded batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .text import IGNORED

NUMBERS = ("supervised", "answer_position")  # of a teacher's row
Reads = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


@dataclass
class KVCollator:
    """Pads encoded rows to a batch: input_ids, attention_mask, labels [B, T]; those and index [B, T] a teacher.

    Where the rows have them also row, answer_position, task (-1: none) and supervised [B], segments [B, T], a teacher's
    segments [B, S] and rank [B, T]; where the teacher reads some of the rows alike, `distinct` and `again`, see
    `repetitions`. index is long, or float where it lies between positions; all are padded with -1.
    pad_token_id: the student's; teacher_pad_ids: each teacher's. Padding is on the right, masked everywhere. stores: of
    a stored teacher, what reads rows; they are found under `stored`.
    """

    pad_token_id: int
    teacher_pad_ids: Mapping[str, int]
    stores: Mapping[str, Reads] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = text_batch(rows, "", self.pad_token_id)
        for name in ("row", "answer_position", "task", "supervised"):
            if name in rows[0] and not isinstance(rows[0][name], str):  # evaluation rows have the task's name
                batch[name] = torch.tensor([-1 if row[name] is None else row[name] for row in rows])
        batch.update(positions(rows, "", ("segments",)))
        batch["teachers"] = {
            name: {
                **text_batch(rows, f"{name}/", pad),
                **positions(rows, f"{name}/", ("index", "segments", "rank")),
                **{key: torch.tensor([row[f"{name}/{key}"] for row in rows]) for key in NUMBERS},
                **({} if name in self.stores else repetitions(rows, f"{name}/")),
            }
            for name, pad in self.teacher_pad_ids.items()
            if f"{name}/index" in rows[0]  # evaluation rows have no teacher's columns
        }
        for name, read in self.stores.items():
            if name in batch["teachers"]:
                batch["teachers"][name]["stored"] = read(rows)
        return batch


def tokens_of(batch: Mapping[str, Any]) -> Tensor:
    """[B], the student's supervised tokens of the whole rows, as if none were cut: what likelihoods are divided by."""
    told: Tensor | None = batch.get("supervised")
    return (batch["labels"] != IGNORED).sum(1) if told is None else told


def repetitions(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Tensor]:
    """distinct: [b], the first sample of each text; again: [B], which of these each sample is. Empty if all differ."""
    read = [f"{prefix}{name}" for name in ("input_ids", "labels", "segments", "supervised")]
    texts = [tuple(tuple(x) if isinstance(x := row.get(name), list) else x for name in read) for row in rows]
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    if len(number) == len(rows):
        return {}
    again = [number[text] for text in texts]
    return {"distinct": torch.tensor([again.index(i) for i in range(len(number))]), "again": torch.tensor(again)}


def positions(rows: Sequence[Mapping[str, Any]], prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
    """Those of the columns that the rows have, padded with -1."""
    return {n: padded([row[prefix + n] for row in rows], -1) for n in names if prefix + n in rows[0]}


def text_batch(rows: Sequence[Mapping[str, Any]], prefix: str, pad: int) -> dict[str, Tensor]:
    ids = [row[f"{prefix}input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([[1] * len(x) for x in ids], 0),
        "labels": padded([row[f"{prefix}labels"] for row in rows], IGNORED),
    }


def padded(rows: Sequence[Sequence[int | float]], value: int) -> Tensor:
    """[B, longest] tensor, long or, where a row holds floats, float32."""
    longest = max(map(len, rows))
    dtype = torch.float32 if any(isinstance(x, float) for row in rows for x in row[:1]) else torch.long
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=dtype)
