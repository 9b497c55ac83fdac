"""The forms a data set's rows may have, as one: turns, and the completion that is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from .alignment.tokens import ANSWER, NONE, PROMPT, REASONING, Span
from .arguments import DataConfig

REASONINGS = ("reasoning_content", "reasoning", "thinking")  # what data sets call a message's reasoning, apart from it


@dataclass(frozen=True)
class Example:
    """A row's text: turns before the completion, and the completion that is learned.

    answer_start: the character of the completion at which its answer begins; before it is the reasoning.
    """

    turns: list[dict[str, str]]
    completion: str
    answer_start: int = 0

    @property
    def prompt(self) -> str:
        return "\n".join(turn["content"] for turn in self.turns)

    @property
    def reasoning(self) -> str:
        return self.completion[: self.answer_start]

    @property
    def answer(self) -> str:
        return self.completion[self.answer_start :]

    def segment(self, span: Span) -> int:
        """Which segment a token belongs to, by where it ends."""
        if span is None or span[0] < 0:
            return NONE
        if span[0] < len(self.turns):
            return PROMPT
        return REASONING if span[2] <= self.answer_start else ANSWER


def example_of(row: Mapping[str, Any], config: DataConfig) -> Example:
    """Any of the row forms as an Example. ValueError names the columns a row lacks."""
    if config.prompt is not None and config.response is None:
        raise ValueError("data.prompt is a template, but data.response is not given; say which column is learned.")
    if config.response is not None:
        prompt = filled(config.prompt or "", row)
        return parted([{"role": "user", "content": prompt}] if prompt else [], filled(config.response, row), config)
    if "prompt" in row and "completion" in row:
        more, completion = answered(row, "completion")
        return parted([*asked(row), *more], completion, config)
    if {"prompt", "reasoning", "answer"} <= set(row):
        reasoning, answer = row["reasoning"] or "", row["answer"]
        if answer is None:
            raise ValueError("The column answer is null in a row; filter such rows out.")
        return Example(asked(row), reasoning + str(answer), len(reasoning))
    if "messages" in row:
        return parted(*answered(row, "messages"), config)
    if "text" in row:
        return parted([], text_in(row["text"], "The column text"), config)
    raise ValueError(
        f"Rows have the columns {', '.join(row)}; give prompt + completion, prompt + reasoning + answer, messages or "
        "text, or the templates data.prompt and data.response."
    )


def asked(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns of a row's prompt: those it lists, or its text as the user's."""
    prompt = row["prompt"]
    if isinstance(prompt, list):
        return messages_of(prompt, "prompt")
    return [{"role": "user", "content": text_in(prompt, "The column prompt")}]


def answered(row: Mapping[str, Any], column: str) -> tuple[list[dict[str, str]], str]:
    """What a column of messages, or of the answer's text alone, holds before the assistant's last answer, and that."""
    if column == "completion" and not isinstance(row[column], list):
        return [], text_in(row[column], "The column completion")
    *turns, last = messages_of(row[column], column)
    if last["role"] != "assistant":
        raise ValueError(f"The last of a row's {column} is by '{last['role']}'; it must be the assistant's answer.")
    beside = [name for name in REASONINGS if last.get(name)]
    if not beside or "</think>" in last["content"]:
        return turns, last["content"]
    thought = text_in(last[beside[0]], f"The assistant's {beside[0]} in the column {column}")
    return turns, f"<think>\n{thought.strip()}\n</think>\n\n{last['content']}"


def messages_of(value: Any, column: str) -> list[dict[str, str]]:
    """A row's messages, each with a role and a text. ValueError says what one is instead."""
    form = "a list of messages such as {role: user, content: text}"
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else shown(value)
        raise ValueError(f"The column {column} is {found}; give {form}, or filter such rows out.")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"The column {column} has {shown(message)}, which has no role; give {form}.")
        text_in(message.get("content"), f"The {message['role']}'s content in the column {column}")
        if message.get("tool_calls"):
            text_in(message["tool_calls"], f"The {message['role']}'s tool_calls in the column {column}")
    # Templates drop the reasoning of earlier answers, some ask whether a key is there, whatever it holds, and a column
    # has every key that any message has.
    *before, last = [{key: x for key, x in message.items() if x not in (None, [], {})} for message in value]
    return [*({key: x for key, x in turn.items() if key not in REASONINGS} for turn in before), last]


def text_in(value: Any, what: str) -> str:
    """A text as it is. ValueError for a number, a null, or the parts of which tool calls and images are made."""
    if isinstance(value, str):
        return value
    raise ValueError(
        f"{what} is {shown(value)}, no text; filter such rows out, or make text of them with the templates data.prompt "
        "and data.response. Conversations are read without tool calls and images."
    )


def shown(value: Any) -> str:
    """A value's beginning, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class NoValue(ValueError):
    """A column that a template names is null in a row."""


class Template(Formatter):
    """str.format over a row's columns, which says what is wrong with a row, or with the template."""

    def get_field(self, field_name: str, args: Sequence[Any], row: Mapping[str, Any]) -> Any:
        try:
            value, column = super().get_field(field_name, args, row)
        except (KeyError, IndexError, AttributeError, TypeError):
            name = "without a name" if field_name.isdigit() else f"'{field_name}'"
            raise ValueError(f"A data template names the column {name}, but the rows have {', '.join(row)}.") from None
        if value is None:
            raise NoValue(f"The column '{field_name}' of a data template is null in a row; filter such rows out.")
        return value, column

    def format_field(self, value: Any, format_spec: str) -> str:
        return self.said(super().format_field, value, format_spec, f":{format_spec}")

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        return self.said(super().convert_field, value, conversion, f"!{conversion}")

    def said(self, function: Callable[..., Any], value: Any, how: Any, written: str) -> Any:
        try:
            return function(value, how)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"A data template writes a column as '{written}', which {shown(value)} cannot be ({error}); name the "
                "column alone, as in {question}."
            ) from error


def filled(template: str, row: Mapping[str, Any]) -> str:
    """A template with a row's columns in it; ValueError where the row has no such column, NoValue where it is null."""
    return Template().vformat(template, (), row)


def parted(turns: list[dict[str, str]], completion: str, config: DataConfig) -> Example:
    """An Example whose answer begins at the last of the first marker found, after it where it closes a tag."""
    for marker in config.answer_markers:
        at = completion.rfind(marker) if marker else -1
        if at >= 0:
            return Example(turns, completion, at + len(marker) if marker.startswith("</") else at)
    return Example(turns, completion)


def teacher_example(example: Example, template: str | None, row: Mapping[str, Any], config: DataConfig) -> Example:
    """What a teacher reads of a row: the same, or with the completion that its own template gives."""
    return example if template is None else parted(example.turns, filled(template, row), config)
