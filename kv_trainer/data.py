"""Rows to token ids, labels and position maps; everything that depends on text alone happens here, once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor

from .arguments import DataConfig, TimeAlignment
from .examples import Example, NoValue, example_of, filled, shown, teacher_example
from .positions import align_rows
from .text import IGNORED, Encoded, Reader, encode

logger = logging.getLogger(__name__)
EVALUATED = ("prompt_ids", "task", "answer")  # columns that evaluation needs beside ids and labels
SEGMENTED = ("segment_aware", "rkv")  # time methods for which rows carry the segment of every position
LOW = (
    "Only %.0f%% of the student's positions are aligned with teacher %s: check that both read the same text (chat, "
    "data.max_length); for texts that differ set alignment.time.method to segment_aware."
)
UNANSWERED = (
    "%d of %d rows lack the first token of their answer: it is empty, or data.max_length cuts it off. They teach what "
    "is left of them; filter them out, or raise data.max_length, if that is not meant."
)
FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
ALIGNED = ("positions.py", "alignment/tokens.py", "alignment/time.py")
SOURCES = ("data.py", "examples.py", "text.py", "chat.py", *ALIGNED)  # they encode a row


def digest_of(folder: Path) -> str:
    """A hash of SOURCES as they lie in a folder."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()


# Part of the name under which `datasets` caches encoded rows: by itself it knows our functions by name, not by code.
# Taken here, while the sources are those that are imported: a run in an edited folder must not name its rows by them.
CODE = digest_of(Path(__file__).parent)


def load_split(config: DataConfig, split: str, limit: int | None) -> Dataset:
    """One split of a hub name, a folder, or a file (which is all 'train'), at most `limit` rows of it."""
    path = Path(config.path)
    try:
        if path.suffix in FILE_BUILDERS:
            data = load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path))
        else:
            data = load_dataset(config.path, config.name)
    except (DatasetGenerationError, StopIteration) as error:  # a broken row; an empty file
        why = error.__cause__ or error
        raise ValueError(f"{config.path} cannot be read as rows: {why or 'it is empty'}.") from error
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
) -> Dataset:
    """A data set of ids, labels, and for each teacher its ids, labels and index into its positions.

    Columns: row (its number), input_ids, labels, answer_position (see text.Encoded), task (a number, see `task_names`;
    where rows have one), and `<teacher>/input_ids`, `<teacher>/labels`, `<teacher>/index` and `<teacher>/supervised`;
    plus those of `keep`, for evaluation EVALUATED, where task is the text and labels are on completions alone. index
    is of ints under time `same_text` and `truncate`, of floats else. `segment_aware` and `rkv` add segments and
    `<teacher>/segments`, and `rkv` adds
    `<teacher>/rank`: for a student position whose reasoning differs, of which of the teacher's selected reasoning
    positions, in time order, it is taught the keys and values; -1 elsewhere. The longest rank + 1 is the row's budget.
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
        result["answer_position"] = ours.answer_position
        if time.method in SEGMENTED:
            result["segments"] = ours.segments
        if config.task or "task" in columns:
            result["task"] = text_of(row, "task")
        for name, reader in teachers.items():
            other = teacher_example(example, config.teacher_text.get(name), row, config)
            theirs = encode_as(other, reader)
            result[f"{name}/input_ids"] = theirs.input_ids
            result[f"{name}/labels"] = theirs.labels
            result[f"{name}/supervised"] = theirs.supervised
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


def worth_learning(encoded: Dataset, teachers: Sequence[str], options: dict[str, Any]) -> Dataset:
    """Encoded rows with something to learn, and a word about rows that are cut. ValueError if none is left.

    options: of datasets.Dataset.filter.
    """
    # The first label is no next token of anything.
    supervised = encoded.filter(lambda labels: any(x != IGNORED for x in labels[1:]), input_columns="labels", **options)
    if len(supervised) < len(encoded):
        without = len(encoded) - len(supervised)
        logger.warning("%d of %d rows have no supervised token and are left out.", without, len(encoded))
    if not len(supervised):
        raise ValueError("No row has a supervised token: completions are empty, or data.max_length cuts them all off.")
    answered = supervised.filter(
        lambda at, labels: at >= 0 or labels[0] != IGNORED, input_columns=["answer_position", "labels"], **options
    )
    if len(answered) < len(supervised):
        logger.warning(UNANSWERED, len(supervised) - len(answered), len(supervised))
    for name in teachers:
        share = aligned_share(supervised, name)
        if share < 0.5:
            logger.warning(LOW, 100 * share, name)
    return supervised


def warn_of_roles(rows: Dataset, readers: Mapping[str, Reader], config: DataConfig) -> None:
    """Conversations that a model with a chat template reads as plain text: their roles are lost."""
    first = rows[0] if len(rows) and config.response is None else {}
    if not any(isinstance(first.get(column), list) for column in ("messages", "prompt", "completion")):
        return
    if plain := [name for name, reader in readers.items() if reader.tokenizer.chat_template and not reader.chat]:
        logger.warning(
            "Rows are conversations, but %s, which has a chat template, reads them as one plain text without roles; "
            "set %s to read them as a chat.", " and ".join(plain), ", ".join(f"{name}.chat: true" for name in plain),
        )  # fmt: skip


def warn_of_dates(readers: Mapping[str, Reader]) -> None:
    """Chat templates that write today's date: another day's rows are others, and no store has them."""
    for name, reader in readers.items():
        if (
            reader.chat
            and "strftime_now" in str(reader.tokenizer.chat_template)
            and "date_string" not in reader.options
        ):
            logger.warning(
                "The chat template of %s writes today's date, so a row is another one tomorrow. Fix it, where the "
                "template takes one: %s.chat: {date_string: 26 Jul 2024}.", name, name,
            )  # fmt: skip


def check_teacher_text(config: DataConfig, teachers: Mapping[str, Reader], time: TimeAlignment) -> None:
    """A text of its own is for a teacher that exists (evaluation has none), and wants an alignment of its own."""
    if not teachers:
        return
    for name in config.teacher_text:
        if name not in teachers:
            raise ValueError(f"data.teacher_text names a teacher '{name}', but the teachers are {', '.join(teachers)}.")
        if time.method == "same_text":
            logger.warning(
                "data.teacher_text gives teacher %s a completion of its own, of which alignment.time.method same_text "
                "aligns nothing; set alignment.time.method to segment_aware.",
                name,
            )


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


def aligned_share(encoded: Dataset, teacher: str, rows: int = 200) -> float:
    """Share of student positions that have a teacher position, or will be given one, over the first rows."""
    first = encoded.select(range(min(rows, len(encoded))))
    columns = [c for c in (f"{teacher}/index", f"{teacher}/rank") if c in encoded.column_names]
    found = [max(at) for row in zip(*(first[c] for c in columns)) for at in zip(*row)]
    return sum(at >= 0 for at in found) / max(1, len(found))


Reads = Callable[[list[list[int]], int], dict[str, Tensor]]


@dataclass
class KVCollator:
    """Pads encoded rows to a batch: input_ids, attention_mask, labels [B, T]; those and index [B, T] a teacher.

    Where the rows have them also row, answer_position and task (-1: none) [B], segments [B, T], and a teacher's
    segments [B, S] and rank [B, T]; where the teacher reads some of the rows alike, `distinct` and `again`, see
    `repetitions`. index is long, or float where it lies between positions; all are padded with -1.
    pad_token_id: the student's; teacher_pad_ids: each teacher's. Padding is on the right, masked everywhere. stores: of
    a stored teacher the column of tokens by which its rows are found, and what reads them; found under `stored`.
    """

    pad_token_id: int
    teacher_pad_ids: Mapping[str, int]
    stores: Mapping[str, tuple[str, Reads]] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = text_batch(rows, "", self.pad_token_id)
        for name in ("row", "answer_position", "task"):
            if name in rows[0] and not isinstance(rows[0][name], str):  # evaluation rows have the task's name
                batch[name] = torch.tensor([-1 if row[name] is None else row[name] for row in rows])
        batch.update(positions(rows, "", ("segments",)))
        batch["teachers"] = {
            name: {
                **text_batch(rows, f"{name}/", pad),
                **positions(rows, f"{name}/", ("index", "segments", "rank")),
                "supervised": torch.tensor([row[f"{name}/supervised"] for row in rows]),
                **({} if name in self.stores else repetitions(rows, f"{name}/")),
            }
            for name, pad in self.teacher_pad_ids.items()
            if f"{name}/index" in rows[0]  # evaluation rows have no teacher's columns
        }
        for name, (column, read) in self.stores.items():
            if name in batch["teachers"]:
                ids = [row[column] for row in rows]
                batch["teachers"][name]["stored"] = read(ids, max(map(len, ids)))
        return batch


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
