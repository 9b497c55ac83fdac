"""A row through a chat template: the text a model reads, and where the row's own parts lie in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)
OPEN, CLOSE = "<think>", "</think>"
# Between a system's text and a user's, where a template has no system turn: as Mistral's own template writes it.
BETWEEN = "\n\n"
OURS = {"tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "tools", "return_dict"}
Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where a part of the row lies in the text one model reads, in characters.

    Segment n is turn n, the last one is the completion. lead: characters that a template stripped from its front.
    """

    segment: int
    start: int
    end: int
    lead: int = 0


def render_chat(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None
) -> tuple[str, list[Place]]:
    """turns: with a role and a content each, the last one the completion. options: given to the template too.

    A template writes marks between the parts, may strip them, and may cut an earlier answer's reasoning. One that would
    change the completion (it cuts its reasoning too, or has no place for it) writes what comes before an answer, and
    the completion follows as the model would have written it. One that refuses or drops a system turn reads its text at
    the head of the first user's. ValueError where a template changes any other text.
    """
    parts = [str(turn["content"]) for turn in turns]
    chat = Chat(tokenizer, turns, [[i] for i in range(len(turns))], options or {})
    system = len(turns) > 2 and [turn["role"] for turn in turns[:2]] == ["system", "user"]
    blank = system and not parts[0].strip()
    said, found, dropped = "", None, False
    try:
        found = chat.whole(parts) or (None if blank else chat.continued(parts))
        dropped = found is None and 0 not in chat.between()[1]
    except TemplateError as error:
        said, dropped = f" ({error})", True
    if found is None and system:
        found = without_system(chat, parts, blank, dropped)
    if found is None:
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path} refuses a row, or changes its text{said}, so that its "
            f"tokens cannot be matched with another model's: {shown(parts)}. Set chat: false, or mend such rows."
        )
    return found


def without_system(chat: Chat, parts: list[str], blank: bool, dropped: bool) -> tuple[str, list[Place]] | None:
    """A system's text at the head of the user's, where the template has no system turn; a blank one is none at all."""
    if not (blank or dropped):  # it is there, but changed: with the user it would stand twice, or ask for another mode
        return None
    try:
        if blank:
            rest = replace(chat, turns=chat.turns[1:], groups=[[i] for i in range(len(parts) - 1)])
            found = rest.whole(parts[1:]) or rest.continued(parts[1:])
            if found is None:
                return None
            return found[0], [Place(0, 0, 0), *(replace(place, segment=place.segment + 1) for place in found[1])]
        folded = replace(chat, groups=[[0, 1], *chat.groups[2:]])
        found = folded.whole(parts) or folded.continued(parts)
    except TemplateError:
        return None
    if found is not None:
        logger.warning_once(
            f"The chat template of {chat.tokenizer.name_or_path} has no system turn; its text is read at the head "
            "of the user's."
        )
    return found


@dataclass(frozen=True)
class Chat:
    """A tokenizer's template over turns, some of which share a message. groups: the parts of every message."""

    tokenizer: PreTrainedTokenizerBase
    turns: Turns
    groups: list[list[int]]
    options: Mapping[str, Any]

    def text(self, parts: Sequence[str], last: int | None = None, prompt: bool = False) -> str:
        """What the template makes of the messages (without those from `last` on). prompt: an answer is to follow."""
        messages = [
            {**self.turns[group[-1]], "content": BETWEEN.join(parts[i] for i in group)} for group in self.groups[:last]
        ]
        found: Any = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **self.options
        )
        return found

    def between(self, last: int | None = None, prompt: bool = False) -> tuple[list[str], list[int]]:
        """What the template puts before, between and behind the parts, and which parts it writes, in its order.

        It is run on marks instead of parts.
        """
        marks = [f"\ue000{chr(0xE100 + i)}" for i in range(len(self.turns))]
        text = self.text(marks, last, prompt)
        written = [marks.index(mark) for mark in re.findall("|".join(marks), text)]
        return re.split("|".join(marks), text), written

    def whole(self, parts: Sequence[str]) -> tuple[str, list[Place]] | None:
        """The template's own text of the whole row; None where it is not made of the parts."""
        text, (between, written) = self.text(parts), self.between()
        places = found_in(text, parts, between, len(parts) - 1) if written == [*range(len(parts))] else None
        return None if places is None else (text, places)

    def continued(self, parts: Sequence[str]) -> tuple[str, list[Place]] | None:
        """The turns, what comes before an answer, the completion as it is, and what ends it; None if that fails too."""
        if len(self.groups) < 2:
            return None
        *asked, completion = parts
        prompt, (before, asked_for) = self.text(parts, -1, True), self.between(-1, True)
        whole, written = self.between()
        last = len(asked)
        places = found_in(prompt, asked, before, last) if asked_for == [*range(last)] else None
        if places is None or written[-2:] != [last - 1, last]:
            return None
        head = whole[-2]  # what the template writes before an answer; one without a thought, as the marks are
        if OPEN in completion or CLOSE in completion:
            head = head.partition(OPEN)[0]
        if CLOSE in completion and OPEN not in completion:  # what opens it was in the prompt
            head = before[-1] if before[-1].rstrip().endswith(OPEN) else f"{head}{OPEN}\n"
        start = prompt[: len(prompt) - len(before[-1])] + head
        return start + completion + whole[-1], [*places, Place(last, len(start), len(start) + len(completion))]


def found_in(text: str, parts: Sequence[str], between: Sequence[str], completion: int) -> list[Place] | None:
    """Where the parts lie in a text, each with what follows it; None where one is not there in any form.

    completion: the number of the part of which nothing but blanks may be missing.
    """
    if not text.startswith(between[0]):
        return None
    at, places = len(between[0]), []
    for segment, (part, after) in enumerate(zip(parts, between[1:], strict=True)):
        for core, lead in forms(part, segment != completion):
            if text.startswith(core + after, at):
                places.append(Place(segment, at, at + len(core), lead))
                at += len(core) + len(after)
                break
        else:
            return None
    return places if at == len(text) else None


def forms(part: str, shortened: bool) -> Iterator[tuple[str, int]]:
    """A part, stripped and, `shortened`, without its reasoning: what is left, and how much was cut from its front."""
    for core in dict.fromkeys((part, part.rpartition(CLOSE)[2])) if shortened else (part,):
        for blanks in (None, "\n"):  # what templates strip: all, or line ends alone
            left, right = core.lstrip(blanks), core.rstrip(blanks)
            cut, more = len(part) - len(core), len(core) - len(left)
            yield from ((core, cut), (core.strip(blanks), cut + more), (left, cut + more), (right, cut))


def shown(parts: Sequence[str]) -> str:
    text = " | ".join(parts)
    return repr(text if len(text) <= 120 else f"{text[:120]}...")
