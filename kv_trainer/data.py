"""Rows to token ids, labels and position maps; everything that depends on text alone happens here, once."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .alignment.tokens import BOS, EOS, Span, span_index
from .arguments import DataConfig

logger = logging.getLogger(__name__)
IGNORED = -100
EVALUATED = ("prompt_ids", "task", "answer")  # columns that evaluation needs beside ids and labels
FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Reader:
    """How one model reads a row: its tokenizer, and whether through its chat template."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False

    def __post_init__(self) -> None:
        name = self.tokenizer.name_or_path
        if not self.tokenizer.is_fast:
            raise ValueError(f"The tokenizer {name} is a slow one, without character offsets; a fast one is needed.")
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError(f"chat is true, but the tokenizer {name} has no chat template; set chat: false.")


@dataclass(frozen=True)
class Example:
    """A row's text: turns before the answer, and the answer that is learned."""

    turns: list[dict[str, str]]
    completion: str

    @property
    def prompt(self) -> str:
        return "\n".join(turn["content"] for turn in self.turns)


@dataclass
class Encoded:
    """One row as one model reads it. spans: see alignment.tokens; labels -100 where not supervised.

    supervised: tokens with a label before the row was cut to its longest length.
    """

    input_ids: list[int]
    labels: list[int]
    spans: list[Span]
    supervised: int = 0


def load_split(config: DataConfig, split: str, limit: int | None) -> Dataset:
    """One split of a hub name, a folder, or a file (which is all 'train'), at most `limit` rows of it."""
    path = Path(config.path)
    if path.suffix in FILE_BUILDERS:
        data = load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path))
    else:
        data = load_dataset(config.path, config.name)
    assert isinstance(data, DatasetDict)
    if split not in data:
        raise ValueError(f"{config.path} has no split '{split}'; it has {', '.join(data)}.")
    data = data[split]
    return data if limit is None else data.select(range(min(limit, len(data))))


def example_of(row: Mapping[str, Any], config: DataConfig) -> Example:
    """Any of the row forms as an Example. ValueError names the columns a row lacks."""
    if config.prompt is not None and config.response is None:
        raise ValueError("data.prompt is a template, but data.response is not given; say which column is learned.")
    if config.response is not None:
        try:
            prompt, completion = (config.prompt or "").format(**row), config.response.format(**row)
        except KeyError as error:
            raise ValueError(f"A data template names the column {error}, but the rows have {', '.join(row)}.") from None
        return Example([{"role": "user", "content": prompt}] if prompt else [], completion)
    if "prompt" in row and "completion" in row:
        return Example([{"role": "user", "content": row["prompt"]}], row["completion"])
    if "messages" in row:
        *turns, last = row["messages"]
        if last["role"] != "assistant":
            raise ValueError(f"The last of a row's messages is by '{last['role']}'; it must be the assistant's answer.")
        return Example([dict(turn) for turn in turns], last["content"])
    if "text" in row:
        return Example([], row["text"])
    raise ValueError(
        f"Rows have the columns {', '.join(row)}; give prompt + completion, messages or text, or the templates "
        "data.prompt and data.response."
    )


@dataclass(frozen=True)
class Place:
    """Where a part of the row lies in the text one model reads, in characters.

    Segment n is turn n, the last one is the completion. lead: characters that a template stripped from its front.
    """

    segment: int
    start: int
    end: int
    lead: int = 0


def render(example: Example, reader: Reader) -> tuple[str, list[Place]]:
    """The text a model reads, and the places of the row's own parts in it; the rest is the template's."""
    parts = [*(turn["content"] for turn in example.turns), example.completion]
    if not reader.chat:
        between = ["", *["\n"] * (len(example.turns) - 1), *([""] if example.turns else []), ""]
        return assemble(between, parts, [0] * len(parts))
    turns = [*example.turns, {"role": "assistant", "content": example.completion}]
    text = reader.tokenizer.apply_chat_template(turns, tokenize=False)
    # The template run on marks instead of parts shows what it puts between them.
    marks = [f"\ue000{chr(0xE100 + i)}" for i in range(len(turns))]
    marked = reader.tokenizer.apply_chat_template(
        [{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)], tokenize=False
    )
    between = re.split("|".join(marks), marked)
    stripped = [part.strip() for part in parts]
    lead = [len(part) - len(part.lstrip()) for part in parts]
    for cores, leads in ((parts, [0] * len(parts)), (stripped, lead)):
        if len(between) == len(parts) + 1:
            candidate, places = assemble(between, cores, leads)
            if candidate == text:
                return text, places
    raise ValueError(
        f"The chat template of {reader.tokenizer.name_or_path} changes the text of a row ({text[:80]!r}...), so its "
        "tokens cannot be matched with another model's; set chat: false."
    )


def assemble(between: Sequence[str], parts: Sequence[str], leads: Sequence[int]) -> tuple[str, list[Place]]:
    text, places = between[0], []
    for segment, (part, after, lead) in enumerate(zip(parts, between[1:], leads, strict=True)):
        places.append(Place(segment, len(text), len(text) + len(part), lead))
        text += part + after
    return text, places


def encode(example: Example, reader: Reader, max_length: int, train_on_prompt: bool = False) -> Encoded:
    """Token ids, labels on the completion (and on the prompt if asked), and the span of every token."""
    text, places = render(example, reader)
    # Where the completion starts in this model's text. A template's closing marks after it are learned too.
    begin = 0 if train_on_prompt else places[-1].start
    tokenizer = reader.tokenizer
    marks = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    out = tokenizer(text, add_special_tokens=not reader.chat, **marks)
    ids, spans, labels = list(out["input_ids"]), [], []
    for token, (start, end), special in zip(ids, out["offset_mapping"], out["special_tokens_mask"], strict=True):
        if special and not reader.chat:
            # An end token that the tokenizer puts there by itself is learned like the one added below.
            last = bool(spans) and token == tokenizer.eos_token_id
            spans.append(EOS if last else BOS if token == tokenizer.bos_token_id else None)
            labels.append(token if last else IGNORED)
            continue
        spans.append(locate(start, end, places))
        # A token across the border is learned: it is what must follow the tokens before it, and else it would give
        # the answer's first characters away in `prompt_ids`.
        labels.append(token if end > begin else IGNORED)
    eos = tokenizer.eos_token_id
    if eos is not None and not reader.chat and (not ids or ids[-1] != eos):
        ids.append(eos)
        spans.append(EOS)
        labels.append(eos)
    supervised = sum(label != IGNORED for label in labels)
    return Encoded(ids[:max_length], labels[:max_length], spans[:max_length], supervised)


def locate(start: int, end: int, places: Sequence[Place]) -> Span:
    """A token's place in the row's parts, by where it ends; None where that is template text."""
    for place in places:
        if place.start < end <= place.end:
            shift = place.lead - place.start
            return (place.segment, start + shift, end + shift)
    return None


def encode_rows(
    rows: Dataset, student: Reader, teachers: Mapping[str, Reader], config: DataConfig, keep: Sequence[str] = ()
) -> Dataset:
    """A data set of ids, labels, and for each teacher its ids, labels and index into its positions.

    Columns: row (its number), input_ids, labels, and `<teacher>/input_ids`, `<teacher>/labels`, `<teacher>/index` and
    `<teacher>/supervised`; plus those of `keep`, for evaluation EVALUATED.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError("A streamed data set cannot be encoded ahead; load it without streaming=True.")
    columns = set(rows.column_names)

    def text_of(row: Mapping[str, Any], name: str) -> str | None:
        template = getattr(config, name)
        return template.format(**row) if template else row.get(name) if name in columns else None

    def encode_row(row: dict[str, Any], number: int) -> dict[str, Any]:
        example = example_of(row, config)
        ours = encode(example, student, config.max_length, config.train_on_prompt)
        result: dict[str, Any] = {"row": number, "input_ids": ours.input_ids, "labels": ours.labels}
        for name, reader in teachers.items():
            theirs = encode(example, reader, config.max_length, config.train_on_prompt)
            result[f"{name}/input_ids"] = theirs.input_ids
            result[f"{name}/labels"] = theirs.labels
            result[f"{name}/index"] = span_index(ours.spans, theirs.spans)
            result[f"{name}/supervised"] = theirs.supervised
        first = next((i for i, label in enumerate(ours.labels) if label != IGNORED), len(ours.labels))
        extra = {"prompt_ids": ours.input_ids[:first], "task": text_of(row, "task"), "answer": text_of(row, "answer")}
        result.update({name: extra[name] for name in keep})
        return result

    encoded = rows.map(encode_row, with_indices=True, remove_columns=rows.column_names, desc="Encoding rows")
    supervised = encoded.filter(lambda labels: any(x != IGNORED for x in labels), input_columns="labels")
    if len(supervised) < len(encoded):
        without = len(encoded) - len(supervised)
        logger.warning("%d of %d rows have no supervised token and are left out.", without, len(encoded))
    if not len(supervised):
        raise ValueError("No row has a supervised token: completions are empty, or data.max_length cuts them all off.")
    return supervised


def aligned_share(encoded: Dataset, teacher: str, rows: int = 200) -> float:
    """Share of student positions that have a teacher position, over the first rows."""
    index = [i for row in encoded.select(range(min(rows, len(encoded))))[f"{teacher}/index"] for i in row]
    return sum(i >= 0 for i in index) / max(1, len(index))


@dataclass
class KVCollator:
    """Pads encoded rows to a batch: row [B]; input_ids, attention_mask, labels [B, T]; those and index a teacher.

    pad_token_id: the student's; teacher_pad_ids: each teacher's. Padding is on the right, masked everywhere.
    """

    pad_token_id: int
    teacher_pad_ids: Mapping[str, int]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = text_batch(rows, "", self.pad_token_id)
        if "row" in rows[0]:
            batch["row"] = torch.tensor([row["row"] for row in rows])
        batch["teachers"] = {
            name: {
                **text_batch(rows, f"{name}/", pad),
                "index": padded([row[f"{name}/index"] for row in rows], -1),
                "supervised": torch.tensor([row[f"{name}/supervised"] for row in rows]),
            }
            for name, pad in self.teacher_pad_ids.items()
            if f"{name}/index" in rows[0]  # evaluation rows have no teacher's columns
        }
        return batch


def text_batch(rows: Sequence[Mapping[str, Any]], prefix: str, pad: int) -> dict[str, Tensor]:
    ids = [row[f"{prefix}input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([[1] * len(x) for x in ids], 0),
        "labels": padded([row[f"{prefix}labels"] for row in rows], IGNORED),
    }


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """[B, longest] long tensor."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)
