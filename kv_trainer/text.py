"""One row as one model reads it: its text, its token ids and labels, and where every token lies in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from .alignment.tokens import ANSWER, BOS, EOS, Span, overlaps
from .chat import OURS, Place, render_chat
from .examples import Example

IGNORED = -100


@dataclass(frozen=True)
class Reader:
    """How one model reads a row: its tokenizer, and whether through its chat template; a dict is given to that too."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool | dict[str, Any] = False

    def __post_init__(self) -> None:
        name = self.tokenizer.name_or_path
        if not self.tokenizer.is_fast:
            raise ValueError(f"The tokenizer {name} is a slow one, without character offsets; a fast one is needed.")
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError(f"chat is true, but the tokenizer {name} has no chat template; set chat: false.")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.chat == {}:
            raise ValueError("chat is an empty dict; give true, or what the chat template is to be given.")
        if wrong := sorted(set(self.options) & OURS):
            raise ValueError(f"chat gives the template {wrong[0]}, which kv_trainer sets itself; leave it out.")
        template = str(self.tokenizer.chat_template)
        for key, value in self.options.items():
            if not re.search(rf"\b{re.escape(key)}\b", template):
                raise ValueError(f"chat gives the template {key}, which the one of {name} does not read; leave it out.")
            if not isinstance(value, (str, int, float, list, dict, NoneType)):  # such as a date of YAML's
                raise ValueError(f"chat.{key} is {value!r}, which no template reads; put it in quotes.")

    @property
    def options(self) -> dict[str, Any]:
        """What the chat template is given beside the messages."""
        return dict(self.chat) if isinstance(self.chat, dict) else {}


@dataclass
class Encoded:
    """One row as one model reads it. spans: see alignment.tokens; labels -100 where not supervised.

    supervised: tokens with a label before the row was cut to its longest length. segments: NONE, PROMPT, REASONING or
    ANSWER of every token. answer_position: the one whose logits predict the answer's first token, -1 where unknown.
    whole: the segments before the cut, and `kept` which of their tokens are left; empty where none was cut.
    """

    input_ids: list[int]
    labels: list[int]
    spans: list[Span]
    supervised: int = 0
    segments: list[int] = field(default_factory=list)
    answer_position: int = -1
    whole: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


def key_of_bytes(data: bytes) -> int:
    """64 bits of a hash, as a signed number: columns and tensors hold that."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def render(example: Example, reader: Reader) -> tuple[str, list[Place]]:
    """The text a model reads, and the places of the row's own parts in it; the rest is the template's."""
    if reader.chat:
        turns = [*example.turns, {"role": "assistant", "content": example.completion}]
        return render_chat(turns, reader.tokenizer, reader.options)
    parts = [*(turn["content"] for turn in example.turns), example.completion]
    text, places = "", []
    for segment, part in enumerate(parts):
        text += "\n" * (0 < segment < len(parts) - 1)
        places.append(Place(segment, len(text), len(text) + len(part)))
        text += part
    return text, places


def turn_end(reader: Reader) -> int | None:
    """The special token with which the chat template ends an answer; None without a chat, or such a token."""
    if not reader.chat:
        return None
    tokenizer, example = reader.tokenizer, Example([{"role": "user", "content": "a"}], "b")
    text, places = render(example, reader)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    behind = [i for i, (start, _) in zip(out["input_ids"], out["offset_mapping"]) if start >= places[-1].end]
    added = tokenizer.added_tokens_decoder
    return next((token for token in behind if token in added and added[token].special), None)


def encode(
    example: Example,
    reader: Reader,
    max_length: int,
    train_on_prompt: bool = False,
    truncation_side: Literal["right", "left"] = "right",
) -> Encoded:
    """Token ids, labels on the completion (and on the prompt if asked), and the span and segment of every token."""
    text, places = render(example, reader)
    # Where the completion starts in this model's text. A template's closing marks after it are learned too.
    begin = 0 if train_on_prompt else places[-1].start
    tokenizer = reader.tokenizer
    marks = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    out = tokenizer(text, add_special_tokens=not reader.chat, **marks)
    ids: list[int] = list(out["input_ids"])
    spans: list[Span] = []
    labels: list[int] = []
    offsets, unsure = settled(out["offset_mapping"], text)
    for i, (token, (start, end), special) in enumerate(zip(ids, offsets, out["special_tokens_mask"], strict=True)):
        if special and not reader.chat:
            # An end token that the tokenizer puts there by itself is learned like the one added below.
            last = bool(spans) and token == tokenizer.eos_token_id
            spans.append(EOS if last else BOS if token == tokenizer.bos_token_id else None)
            labels.append(token if last else IGNORED)
            continue
        spans.append(None if i in unsure else locate(start, end, places))
        # A token across the border is learned: it is what must follow the tokens before it, and else it would give
        # the answer's first characters away in `prompt_ids`.
        labels.append(token if end > begin else IGNORED)
    eos = tokenizer.eos_token_id
    ends = reader.chat and text[places[-1].end :].strip()  # with the template's own mark
    if eos is not None and not ends and (not ids or ids[-1] != eos):
        ids.append(eos)
        spans.append(EOS)
        labels.append(eos)
    segments = [example.segment(span) for span in spans]
    starts = bool(ids) and ids[0] == tokenizer.bos_token_id
    whole = Encoded(ids, labels, spans, sum(label != IGNORED for label in labels), segments)
    whole.answer_position = segments.index(ANSWER) - 1 if ANSWER in segments else -1
    return truncate(whole, max_length, truncation_side, starts)


def settled(offsets: Sequence[tuple[int, int]], text: str) -> tuple[list[tuple[int, int]], set[int]]:
    """Offsets that reach as far as a token has read, and the numbers of those of which nobody can tell.

    A tokenizer that composes characters (NFC) leaves a mark out of the offsets of the token that holds it; one that
    trims them leaves out blanks, of which a token of nothing else then has an end too early.
    """
    found, unsure, following = list(offsets), set(), len(text)
    for i in reversed(range(len(found))):
        start, end = found[i]
        if start == end:  # a special token of the template's, or one of no text
            continue
        between = text[end:following]
        if between.strip():
            found[i] = (start, end + len(between.rstrip()))
        elif between and text[start:end].isspace():
            unsure.add(i)
        following = start
    return found, unsure


def truncate(row: Encoded, max_length: int, side: Literal["right", "left"], starts: bool = False) -> Encoded:
    """The first, or the last, `max_length` tokens of a row.

    starts: the first is a start token, which models lean on: it is kept.
    """
    count = len(row.input_ids)
    if count <= max_length:
        return row
    first = int(side == "left" and starts)
    kept = range(max_length) if side == "right" else [*range(first), *range(count - max_length + first, count)]
    ids, labels, segments = ([values[i] for i in kept] for values in (row.input_ids, row.labels, row.segments))
    spans = [row.spans[i] for i in kept]
    # A character whose last bytes are cut off was not read.
    last = max_length - 1
    while side == "right" and last >= 0 and overlaps(row.spans[last], row.spans[last + 1]):
        spans[last] = None
        last -= 1
    answer = list(kept).index(row.answer_position) if row.answer_position in kept else -1
    return replace(
        row, input_ids=ids, labels=labels, spans=spans, segments=segments, answer_position=answer, whole=row.segments,
        kept=list(kept),
    )


def locate(start: int, end: int, places: Sequence[Place]) -> Span:
    """A token's place in the row's parts, by where it ends; None where that is template text."""
    for place in places:
        if place.start < end <= place.end:
            shift = place.lead - place.start
            return (place.segment, start + shift, end + shift)
    return None
