"""Nodes as typed values and dataclasses, and back: what fits a type hint, and how it is told what does not."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from typing import Any, Literal

from .arguments import DataConfig, ModelConfig, StoreConfig
from .recipe_tree import Node, RecipeError, join, number, one_line, resolve_path


class Misfit(Exception):
    """A value is not of a type."""


# --------------------------------------------------------------------------------------------- one value


def choices(hint: Any) -> list[Any]:
    """The values that a hint lists one by one."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    return []


def members(hint: Any) -> list[Any]:
    """The members of a union, or the hint alone. `Enum | str`, as TrainingArguments has it, means the Enum."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    found = list(typing.get_args(hint)) if union else [hint]
    if any(isinstance(h, type) and issubclass(h, Enum) for h in found):
        found = [h for h in found if h is not str]
    return sorted(found, key=lambda h: h is float)  # text stays text where both would do


def is_choice(value: Any, choice: Any) -> bool:
    """Whether a value is one that a hint lists; peft's 'pissa_niter_[number of iters]' stands for every number."""
    if isinstance(value, str) and isinstance(choice, str) and "[number" in choice:
        return re.fullmatch(re.sub(r"\\\[.*\\\]", r"\\d+", re.escape(choice)), value) is not None
    return value == choice and isinstance(value, type(choice))


def fit(value: Any, hint: Any) -> Any:
    """`value` as `hint`, or Misfit. An int passes for a float, and so does text such as 5e-5."""
    for option in members(hint):
        try:
            return fit_one(value, option)
        except Misfit:
            continue
    raise Misfit


def fit_one(value: Any, hint: Any) -> Any:
    """`value` as `hint`, which is no union, or Misfit."""
    listed, origin = choices(hint), typing.get_origin(hint) or hint
    if hint is Any:
        return value
    if listed:
        value = "no" if value is False and "no" in listed else value  # YAML 1.1 reads a bare no as false
        if any(is_choice(value, choice) for choice in listed):
            return value
    elif origin is list and isinstance(value, list):
        (inner,) = typing.get_args(hint) or (Any,)
        return [fit(item, inner) for item in value]
    elif origin is dict and isinstance(value, dict):
        _, inner = typing.get_args(hint) or (str, Any)
        return {key: fit(item, inner) for key, item in value.items()}
    elif hint is float:
        value = number(value)
        if type(value) in (int, float) and not math.isnan(value):
            return value
    elif hint in (int, bool, str, types.NoneType) and type(value) is hint:
        return value
    raise Misfit


def describe(hint: Any) -> str:
    """A hint in words: "a float or null", "one of 'a', 'b'"."""
    options = sorted(members(hint), key=lambda h: (h is types.NoneType, bool(choices(h))))
    if len(options) > 1:
        return " or ".join(describe(option) for option in options)
    hint = options[0]
    if listed := choices(hint):
        return ("one of " if len(listed) > 1 else "") + ", ".join(repr(choice) for choice in listed)
    if typing.get_origin(hint) is list:
        return f"a list of {getattr(typing.get_args(hint)[0], '__name__', 'values')}"
    if (typing.get_origin(hint) or hint) is dict:
        return "a mapping"
    if is_dataclass(hint):
        return "a mapping of " + ", ".join(field.name for field in fields(hint))
    words = {int: "an int", float: "a float", str: "a str", bool: "true or false", types.NoneType: "null"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}, which YAML cannot hold")


def coerce(node: Node, hint: Any, path: str) -> Any:
    """The node's value as `hint`; RecipeError says what was given and what fits."""
    value, options = node.plain(), members(hint)
    try:
        return fit(value, hint)
    except Misfit:
        pass
    listed = [choice for option in options for choice in choices(option) if isinstance(choice, str)]
    quotes = " in quotes" if str in options and not isinstance(value, (str, list, dict, type(None))) else ""
    wanted = f"{describe(hint)}{quotes}.{suggest(str(value), listed)}"
    raise RecipeError(f"{path} {node.where} is {shown(node)}; give {wanted}")


def shown(node: Node) -> str:
    """A node's value and type for an error: "null", "[1] (list)"; what is long is cut."""
    if node.value is None:
        return "null"
    text = repr(node.plain())
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"{text} ({type(node.value).__name__})"


def suggest(word: str, known: Sequence[str]) -> str:
    """The known word that was perhaps meant, as a sentence, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


# --------------------------------------------------------------------------------------------- one section


def mapping(node: Node, path: str) -> dict[str, Node]:
    if not isinstance(node.value, dict):
        what = "give a mapping, or leave it out for the defaults"
        raise RecipeError(f"{path} {node.where} is {shown(node)}; {what}.")
    return node.value


def unknown(key: str, path: str, node: Node, known: Sequence[str], listing: str = "", hint: str = "") -> RecipeError:
    """The error for a key that is none of `known`; `listing` and `hint` take the place of the keys and of a guess."""
    hint = hint or suggest(key, known)
    return RecipeError(f"Unknown key '{join(path, key)}' {node.where}.{hint} Known: {listing or ', '.join(known)}.")


def blame(error: object, node: Node, path: str) -> RecipeError:
    """A complaint of a dataclass as a RecipeError, at the line of the first given key that it mentions."""
    message = one_line(error)
    places = {key: re.search(rf"(?<!\w){re.escape(key)}(?!\w)", message) for key in node.value}
    keys = [key for _, key in sorted((match.start(), key) for key, match in places.items() if match)]
    return RecipeError(f"{path} {node.at(*keys[:1])}: {message}.")


def build(cls: type, node: Node, path: str) -> Any:
    """One section's dataclass. RecipeError for unknown keys, wrong types, and what its __post_init__ refuses."""
    hints, values = typing.get_type_hints(cls), {}
    known = [field.name for field in fields(cls) if field.init]
    for key, child in mapping(node, path).items():
        if key not in known:
            raise unknown(key, path, child, known)
        section: Any = next((hint for hint in members(hints[key]) if is_dataclass(hint)), None)
        if section and (section is hints[key] or isinstance(child.value, dict)):
            values[key] = build(section, child, join(path, key))
            continue
        value = coerce(child, hints[key], join(path, key))
        if value and is_path(cls, key):
            value = resolve_path(value, child, join(path, key), exists=cls is not StoreConfig)
        values[key] = value
    try:
        return cls(**values)
    except ValueError as error:
        raise blame(error, node, path) from error


def is_path(cls: type, key: str) -> bool:
    model = issubclass(cls, ModelConfig) and key in ("model", "config", "tokenizer")
    return model or (cls in (DataConfig, StoreConfig) and key == "path")


def plain(value: Any) -> Any:
    """Enums, dataclasses, AcceleratorConfig and containers as YAML can hold them; a token is left out."""
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not str(key).endswith("token")}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
