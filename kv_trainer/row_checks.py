"""What is told of rows: read without their roles, cut, empty, or hardly aligned with a teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from .arguments import DataConfig, TimeAlignment
from .text import IGNORED, Reader

logger = logging.getLogger(__name__)
LOW = (
    "Only %.0f%% of the student's positions are aligned with teacher %s: check that both read the same text (chat, "
    "data.max_length); for texts that differ set alignment.time.method to segment_aware."
)
UNANSWERED = (
    "%d of %d rows lack the first token of their answer: it is empty, or data.max_length cuts it off. They teach what "
    "is left of them; filter them out, or raise data.max_length, if that is not meant."
)


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


def aligned_share(encoded: Dataset, teacher: str, rows: int = 200) -> float:
    """Share of student positions that have a teacher position, or will be given one, over the first rows."""
    first = encoded.select(range(min(rows, len(encoded))))
    columns = [c for c in (f"{teacher}/index", f"{teacher}/rank") if c in encoded.column_names]
    found = [max(at) for row in zip(*(first[c] for c in columns)) for at in zip(*row)]
    return sum(at >= 0 for at in found) / max(1, len(found))
