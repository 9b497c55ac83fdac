"""YAML text and command-line overrides as trees in which every value knows where it was written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

# What a recipe may hold at its top level; NESTED are the sections that MultiTeacherKVConfig keeps beside the fields of
# TrainingArguments. They stand here so that the command line knows them without importing torch.
NESTED = (
    "alignment", "projector", "fusion", "losses", "data", "evaluation", "control", "monitor", "freeze",
    "early_stopping", "accumulation", "store",
)  # fmt: skip
SECTIONS = ("student", "teachers", *NESTED, "training")
KINDS = {"fusion": "method", "peft": "type"}  # sections whose other keys depend on one of them
# Overrides that are text, whatever YAML would make of their braces and hashes.
TEXT = re.compile(r"--(data\.(prompt|response|task|answer|teacher_text\.[\w-]+)|evaluation\.answer_pattern)")
COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 reads 5e-5 as text


class RecipeError(ValueError):
    """A recipe or an override is wrong; the message is one line that says where, what, and what to do."""


@dataclass
class Node:
    """A value, where it was written ("in r.yaml, line 3" | "on the command line"), and the folder `./` means there."""

    value: Any  # dict[str, Node], list[Node], or a scalar
    where: str
    folder: Path

    def plain(self) -> Any:
        """The value without its origin; text that is a number in scientific notation becomes that number."""
        if isinstance(self.value, dict):
            return {key: number(child.plain()) for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def at(self, *keys: str) -> str:
        """Where the value under `keys` was written, or the nearest section around it."""
        child = self.value.get(keys[0]) if keys and isinstance(self.value, dict) else None
        return child.at(*keys[1:]) if child is not None else self.where


def number(value: Any) -> Any:
    """Text such as 5e-5 as its number; anything else as it is."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def one_line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")


def parse(text: str, where: Callable[[int], str], folder: Path) -> Node:
    """YAML text as a Node tree; `where` names a line (from 1). RecipeError for what is unsafe, doubled or empty."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise RecipeError(f"Nothing is written {where(1)}; give a value.")
        return _Converter(loader, where, folder).node(root, "", root.start_mark.line + 1)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"YAML error {where(mark.line + 1 if mark else 1)}: {one_line(problem)}.") from error
    except RecursionError:
        raise RecipeError(f"YAML error {where(1)}: an alias contains itself, or the nesting is too deep.") from None


@dataclass
class _Converter:
    """The nodes of one YAML text as ours; `path` is for messages: "losses.kv.weight", "" for the whole text."""

    loader: yaml.SafeLoader
    where: Callable[[int], str]
    folder: Path

    def node(self, node: yaml.Node, path: str, line: int) -> Node:
        where = self.where(line)
        if isinstance(node, yaml.CollectionNode) and node.tag not in COLLECTIONS:
            raise RecipeError(f"{path or 'The recipe'} {where} has the YAML tag {node.tag}; leave it out.")
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = self.mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            value = [self.node(item, path, item.start_mark.line + 1) for item in node.value]
        elif node.value == "" and node.tag == "tag:yaml.org,2002:null":
            raise RecipeError(f"{path or 'The value'} {where} is left empty; write null, or {{}} for all defaults.")
        else:
            try:
                value = self.loader.construct_object(node)
            except (ValueError, OverflowError) as error:
                raise RecipeError(f"{path} {where} is {node.value!r}: {error}; put text in quotes.") from error
        return Node(value, where, self.folder)

    def mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Node]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                kind, where = type(key).__name__, self.where(line)
                raise RecipeError(f"The key {key!r} {where} is not text ({kind}); put it in quotes.")
            if key in seen:
                first = f" (first in line {seen[key]})" if seen[key] != line else ""
                raise RecipeError(f"The key '{join(path, key)}' {self.where(line)} is there twice{first}; keep one.")
            seen[key] = line
        self.loader.flatten_mapping(node)  # resolves `<<: *anchor`; own keys come last and win
        # Kept without what they win over: an alias leads here again, where nothing may be doubled.
        node.value = list({key_node.value: (key_node, child) for key_node, child in node.value}.values())
        return {k.value: self.node(child, join(path, k.value), k.start_mark.line + 1) for k, child in node.value}


def read_file(path: Path, shown: str, chain: tuple[Path, ...] = ()) -> Node:
    """A recipe file over the one it extends. RecipeError if it is missing, not a mapping, or extends itself.

    shown: the file's name in messages. chain: the files that led here.
    """
    if not path.is_file():
        what = "is a folder; name the .yaml file in it" if path.is_dir() else "does not exist"
        raise RecipeError(f"The recipe {shown} {what}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"The recipe {shown} is not UTF-8 text: {error}.") from error
    tree = parse(text, lambda line: f"in {shown}, line {line}", path.parent)
    if not isinstance(tree.value, dict):
        kind = type(tree.value).__name__
        raise RecipeError(f"The recipe {shown} is a {kind}; give a mapping with student, data, ... in it.")
    extends = tree.value.pop("extends", None)
    if extends is None:
        return tree
    if not isinstance(extends.value, str) or not extends.value.startswith(("./", "/")):
        raise RecipeError(f"extends {extends.where} is {extends.value!r}; give a recipe beside this one: ./other.yaml.")
    base, chain = resolve_path(extends.value, extends, "extends"), (*chain, path.resolve())
    if Path(base).resolve() in chain:
        raise RecipeError(f"extends {extends.where} is {extends.value!r}, which leads back to itself; remove one.")
    return merge(read_file(Path(base), base, chain), tree)


def read_overrides(overrides: Sequence[str], folder: Path, here: str) -> Node:
    """`--section.key value` and `--section.key=value`, written `here`, as a Node tree."""
    tree, seen, rest = Node({}, here, folder), set(), list(overrides)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        keys = name.removeprefix("--").split(".")
        if not name.startswith("--") or not all(keys) or keys == ["extends"]:
            raise RecipeError(f"'{name}' {here} is no override; write --section.key value.")
        if name in seen:
            raise RecipeError(f"{name} {here} is given twice; keep one.")
        seen.add(name)
        if not equals:
            if not rest or re.match(r"--[A-Za-z]", rest[0]):
                raise RecipeError(f"{name} {here} has no value; write {name} value.")
            text = rest.pop(0)
        node = override(name, text, folder, here)
        for key in reversed(keys):
            node = Node({key: node}, here, folder)
        tree = merge(tree, node)
    return tree


def override(name: str, text: str, folder: Path, here: str) -> Node:
    """The value of one override: YAML; of TEXT what is written, but for quotes around it, and null."""
    plain = Node(text, here, folder) if TEXT.fullmatch(name) and text.strip() else None
    try:
        node = parse(text, lambda line: here, folder)
    except RecipeError as error:
        if plain is None:
            raise RecipeError(f"{name}: {error}") from error
        return plain
    return node if plain is None or isinstance(node.value, str | None) else plain


def merge(base: Node, over: Node) -> Node:
    """`over` laid on `base`: mappings key by key, anything else replaced. Every value keeps its own origin.

    Another `fusion.method` or `peft.type` replaces the whole section: the knobs beside the old one are not its own.
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    value = dict(base.value)
    for key, child in over.value.items():
        if key in KINDS and changes_kind(value.get(key), child, KINDS[key]):
            value[key] = child
            continue
        value[key] = merge(value[key], child) if key in value else child
    return Node(value, base.where, base.folder)


def changes_kind(base: Node | None, over: Node, key: str) -> bool:
    """Whether `over` names another kind, under `key`, than `base` does."""
    if base is None or not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return False
    old, new = base.value.get(key), over.value.get(key)
    return new is not None and (old is None or old.value != new.value)


def resolve_path(value: str, node: Node, path: str, exists: bool = True) -> str:
    """`./x` beside the recipe as a path from here; others as they are. RecipeError for `..` and what is missing.

    exists: whether it must be there, as what is read must.
    """
    beside = value == "." or value.startswith("./")
    if not os.path.isabs(value):
        if ".." in PurePath(value).parts:
            raise RecipeError(f"{path} {node.where} is '{value}', which leaves its folder; give an absolute path.")
        if not beside:
            return value
    target = os.path.abspath(node.folder / value)
    if exists and not os.path.exists(target):
        looked = f" (looked for {target})" if beside else ""
        raise RecipeError(f"{path} {node.where} is '{value}', which does not exist{looked}; correct the path.")
    return os.path.relpath(target) if beside and Path(target).is_relative_to(os.getcwd()) else target
