"""Rows to token ids, labels and position maps; everything that depends on text alone happens here, once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from .arguments import DataConfig, TimeAlignment
from .examples import Example, NoValue, example_of, filled, shown, teacher_example
from .positions import align_rows
from .row_checks import check_teacher_text, warn_of_dates, warn_of_roles, worth_learning
from .text import IGNORED, Encoded, Reader, encode, key_of_bytes

logger = logging.getLogger(__name__)
EVALUATED = ("prompt_ids", "task", "answer")  # columns that evaluation needs beside ids and labels
SEGMENTED = ("segment_aware", "rkv")  # time methods for which rows carry the segment of every position
FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
ALIGNED = ("positions.py", "alignment/tokens.py", "alignment/time.py")
SOURCES = ("data.py", "row_checks.py", "examples.py", "text.py", "chat.py", *ALIGNED)  # they encode a row


def digest_of(folder: Path) -> str:
    """A hash of SOURCES as they lie in a folder."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()


# Part of the name under which `datasets` caches encoded rows: by itself it knows our functions by name, not by code.
# Taken here, while the sources are those that are imported: a run in an edited folder must not name its rows by them.
CODE = digest_of(Path(__file__).parent)


def load_split(config: DataConfig, split: str, limit: int | None) -> Dataset:
    """One split of a hub name, a folder, or a file (which is all 'train'), at most `limit` rows of it."""
    path = Path(config.path)
    known = ", ".join(FILE_BUILDERS)
    if path.is_file() and path.suffix not in FILE_BUILDERS:
        raise ValueError(f"data.path is {config.path}, a file of another kind than {known}; make one of these of it.")
    if path.is_file() and config.name is not None:
        raise ValueError(f"data.name is '{config.name}', but data.path is the file {config.path}; leave data.name out.")
    try:
        if path.suffix in FILE_BUILDERS:
            data = load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path))
        else:
            data = load_dataset(config.path, config.name)
    except (DatasetGenerationError, StopIteration) as error:  # a broken row; an empty file
        why = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"{config.path} cannot be read as rows: {why}.") from error
    assert isinstance(data, DatasetDict)
    if split not in data:
        raise ValueError(f"{config.path} has no split '{split}'; it has {', '.join(data)}.")
    data = data[split]
    return data if limit is None else data.select(range(min(limit, len(data))))


def as_text(rows: Dataset, name: str) -> Dataset:
    """The rows with a column of numbers, or of classes, as text. ValueError for other things than these."""
    kind = rows.features[name]
    if getattr(kind, "dtype", None) in ("string", "large_string", "null"):
        return rows
    values = rows[name]
    if wrong := [x for x in values if not isinstance(x, (str, int, float, type(None)))]:
        raise ValueError(f"The column '{name}' holds {shown(wrong[0])}, no text; make text of it with data.{name}.")
    known = kind.int2str if isinstance(kind, ClassLabel) else str
    texts = [None if x is None or (isinstance(kind, ClassLabel) and x < 0) else known(x) for x in values]
    return rows.remove_columns(name).add_column(name, texts)


def encode_rows(
    rows: Dataset,
    student: Reader,
    teachers: Mapping[str, Reader],
    config: DataConfig,
    keep: Sequence[str] = (),
    time: TimeAlignment | None = None,
    as_student: Collection[str] = (),
) -> Dataset:
    """A data set of ids, labels, and for each teacher its ids, labels and index into its positions.

    Columns: row (its number), input_ids, labels, answer_position and supervised (see text.Encoded), task (a number, see
    `task_names`; where rows have one), and, with `<teacher>/` before their names, input_ids, labels, supervised, index
    and answer_position, -1 also where it says another answer and time is `same_text`; plus those of `keep`, for
    evaluation EVALUATED, where task is the text and labels are on completions alone. index is of ints under time
    `same_text` and `truncate`, of floats else. `segment_aware` and `rkv` add segments and
    `<teacher>/segments`, and `rkv` adds `<teacher>/rank`: for a student position whose reasoning differs, of which of
    the teacher's selected reasoning positions, in time order, it is taught the keys and values; -1 elsewhere. The
    longest rank + 1 is the row's budget. A teacher with a text of its own has `<teacher>/own_text`, a hash of that.
    as_student: teachers that need not be aligned with such a text, since what they say of it is stored aligned.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError("A streamed data set cannot be encoded ahead; load it without streaming=True.")
    time = time or TimeAlignment()
    check_teacher_text(config, teachers, time)
    readers = {"student": student, **{f"teachers.{name}": reader for name, reader in teachers.items()}}
    warn_of_roles(rows, readers, config)
    warn_of_dates(readers)
    columns = set(rows.column_names)
    for name in ("task", "answer"):
        if name in columns and getattr(config, name) is None:
            rows = as_text(rows, name)

    def text_of(row: Mapping[str, Any], name: str) -> str | None:
        if template := getattr(config, name):
            with suppress(NoValue):  # a row need not have an answer, or a task
                return filled(template, row)
            return None
        return row.get(name) if name in columns else None

    # What is evaluated is the completion, whatever was learned: else arms would not be measured alike.
    prompts_too = config.train_on_prompt and not keep

    def encode_as(example: Example, reader: Reader) -> Encoded:
        return encode(example, reader, config.max_length, prompts_too, config.truncation_side)

    def encode_row(row: dict[str, Any], number: int, code: str) -> dict[str, Any]:
        example = example_of(row, config)
        ours = encode_as(example, student)
        result: dict[str, Any] = {"row": number, "input_ids": ours.input_ids, "labels": ours.labels}
        result |= {"answer_position": ours.answer_position, "supervised": ours.supervised}
        if time.method in SEGMENTED:
            result["segments"] = ours.segments
        if config.task or "task" in columns:
            result["task"] = text_of(row, "task")
        for name, reader in teachers.items():
            other = teacher_example(example, config.teacher_text.get(name), row, config)
            if name in config.teacher_text:
                result[f"{name}/own_text"] = key_of_bytes(other.completion.encode())
            other = example if name in as_student else other
            theirs = encode_as(other, reader)
            result[f"{name}/input_ids"] = theirs.input_ids
            result[f"{name}/labels"] = theirs.labels
            result[f"{name}/supervised"] = theirs.supervised
            same = time.method != "same_text" or other.answer == example.answer
            result[f"{name}/answer_position"] = theirs.answer_position if same else -1
            if time.method in SEGMENTED:
                result[f"{name}/segments"] = theirs.segments
            result.update(
                {f"{name}/{key}": value for key, value in align_rows(ours, theirs, example, other, time).items()}
            )
        first = next((i for i, label in enumerate(ours.labels) if label != IGNORED), len(ours.labels))
        extra = {"prompt_ids": ours.input_ids[:first], "task": text_of(row, "task"), "answer": text_of(row, "answer")}
        result.update({name: extra[name] for name in keep})
        return result

    workers = min(config.num_proc or 1, len(rows))
    options: dict[str, Any] = {"num_proc": workers if workers > 1 else None}
    encoded = rows.map(
        encode_row, with_indices=True, fn_kwargs={"code": CODE}, remove_columns=rows.column_names, desc="Encoding rows",
        **options,
    )  # fmt: skip
    supervised = worth_learning(encoded, list(teachers), options)
    return supervised if "task" in keep else number_tasks(supervised)


def number_tasks(rows: Dataset) -> Dataset:
    """The column `task` as numbers into its sorted names; without it where no row has one."""
    if "task" not in rows.column_names or isinstance(rows.features["task"], ClassLabel):
        return rows
    if not any(task is not None for task in rows.unique("task")):
        return rows.remove_columns("task")
    return rows.class_encode_column("task")


def task_names(rows: Dataset) -> tuple[str, ...]:
    """The names behind the numbers in the column `task` of encoded rows, in order; empty where they have none."""
    feature = rows.features.get("task")
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()
