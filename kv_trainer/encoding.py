"""The rows of a run, encoded once for the student and all of its teachers, and their batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig

from .arguments import DataConfig, MultiTeacherKVConfig
from .collator import KVCollator
from .data import EVALUATED, Reader, encode_rows
from .evaluation import check_prompts
from .store.teacher import StoredTeacher


def stored_among(teachers: Mapping[str, Any]) -> dict[str, StoredTeacher]:
    return {name: teacher for name, teacher in teachers.items() if isinstance(teacher, StoredTeacher)}


def collator(reader: Reader, teachers: Mapping[str, Any]) -> KVCollator:
    """What makes batches of encoded rows, with the keys and values of stored teachers."""
    pads = {name: teacher.reader.tokenizer.pad_token_id for name, teacher in teachers.items()}
    stored = {name: teacher.read for name, teacher in stored_among(teachers).items()}
    return KVCollator(reader.tokenizer.pad_token_id, pads, stored)


@contextmanager
def encoding_first(args: MultiTeacherKVConfig, rows: Dataset) -> Iterator[DataConfig]:
    """With data.num_proc the first rank of a host encodes rows, and the others read its cache.

    Rows that were never in a file have none: there the ranks of a host share the processes.
    """
    data, there = args.data, getattr(rows, "cache_files", None)
    if data.num_proc and args.world_size > 1 and not there:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
        data = replace(data, num_proc=max(1, data.num_proc // ranks))
    first = args.main_process_first(desc="encoding rows") if data.num_proc and there else nullcontext()
    with first:
        yield data


def has_text(rows: Dataset | None) -> bool:
    """Whether rows are still to be encoded."""
    return rows is not None and "input_ids" not in (rows.column_names or ())


def encoded_to_evaluate(
    rows: Dataset, args: MultiTeacherKVConfig, reader: Reader, student: PreTrainedConfig | None = None
) -> Dataset:
    """As `encoded`, for the student alone, and with what an answer is generated from.

    student: whose answers are to be generated; ValueError if its positions do not suffice.
    """
    if not has_text(rows):
        return rows
    with encoding_first(args, rows) as data:
        rows = encode_rows(rows, reader, {}, data, keep=EVALUATED)
    check_prompts(rows, args.evaluation, student)
    return rows


def encoded(rows: Dataset, args: MultiTeacherKVConfig, reader: Reader, teachers: Mapping[str, Any]) -> Dataset:
    """Rows of text as ids, for the student and every teacher; rows that are encoded already stay as they are.

    ValueError where a stored teacher does not have them.
    """
    stored = stored_among(teachers)
    missing = {"row", "labels", *(f"{name}/input_ids" for name in teachers)} - set(rows.column_names or ())
    if not has_text(rows) and missing:
        raise ValueError(
            f"train_dataset has input_ids, but no {', '.join(sorted(missing))}: rows that were encoded elsewhere "
            "cannot be aligned with teachers. Give text alone: prompt + completion, messages or text."
        )
    if has_text(rows):
        readers = {name: teacher.reader for name, teacher in teachers.items()}
        as_student = {name for name, teacher in stored.items() if not teacher.raw}
        with encoding_first(args, rows) as data:
            rows = encode_rows(rows, reader, readers, data, time=args.alignment.time, as_student=as_student)
    for teacher in stored.values():
        teacher.check_rows(rows)
    return rows
