"""A row through a chat template: the text a model reads, and where the row's own parts lie in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

    ValueError where the template changes texts.

    A template writes marks between the parts, may strip them, and may cut an earlier answer's reasoning. One that would
    change the completion (it cuts its reasoning too, or has no place for it) writes the generation prompt instead, and
    the completion follows as the model would have written it. One that refuses or drops a system turn reads its text
    at the head of the first user's.
    """
    parts = [str(turn["content"]) for turn in turns]
    said = ""
    for groups in groupings(turns):
        chat = Chat(tokenizer, turns, groups, options or {})
        try:
            found = chat.whole(parts) or chat.continued(parts)
        except TemplateError as error:
            said = said or f" ({error})"
            continue
        if found is not None:
            if len(groups) < len(turns):
                logger.warning_once(
                    f"The chat template of {tokenizer.name_or_path} has no system turn; its text is read at the head "
                    "of the user's."
                )
            return found
    raise ValueError(
        f"The chat template of {tokenizer.name_or_path} refuses a row, or changes its text{said}, so that its tokens "
        f"cannot be matched with another model's: {shown(parts)}. Set chat: false, or mend such rows."
    )


def groupings(turns: Turns) -> list[list[list[int]]]:
    """Which parts make a message: each its own; then a system's text and the user's in one."""
    alone = [[i] for i in range(len(turns))]
    if len(turns) > 2 and [turn["role"] for turn in turns[:2]] == ["system", "user"]:
        return [alone, [[0, 1], *alone[2:]]]
    return [alone]


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
        """The generation prompt, the completion as it is, and what ends an answer; None where that fails too."""
        if len(self.groups) < 2:
            return None
        *asked, completion = parts
        prompt, (before, asked_for) = self.text(parts, -1, True), self.between(-1, True)
        whole, written = self.between()
        last = len(asked)
        places = found_in(prompt, asked, before, last) if asked_for == [*range(last)] else None
        if places is None or written[-2:] != [last - 1, last]:
            return None
        tail, spaced = before[-1], whole[-2]
        more = spaced.removeprefix(tail) if spaced.startswith(tail) else ""
        # Where a template has no generation prompt, or an answer begins with a blank, it is the marks that show it.
        if not more.strip() or prompt == self.text(parts, -1):
            tail += more
        if completion.lstrip().startswith(OPEN):  # which opens it itself
            tail = tail.partition(OPEN)[0]
        start = prompt[: len(prompt) - len(before[-1])] + tail
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
        cut = len(part) - len(core)
        left = core.lstrip()
        yield core, cut
        yield core.strip(), cut + len(core) - len(left)
        yield left, cut + len(core) - len(left)
        yield core.rstrip(), cut


def shown(parts: Sequence[str]) -> str:
    text = " | ".join(parts)
    return repr(text if len(text) <= 120 else f"{text[:120]}...")
