"""YAML recipes to the dataclasses of arguments.py, and back: strict, with line numbers and suggested spellings."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from .arguments import (
    DataConfig,
    ModelConfig,
    MultiTeacherKVConfig,
    ProjectorConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
)
from .losses import LOSSES, CrossEntropy, DistillationLoss

# What differs from TrainingArguments' own defaults: our columns are not the model's, nothing is reported to a service
# that nobody named, short runs show a line now and then, and checkpoints do not fill the disk.
TRAINING_DEFAULTS = {"remove_unused_columns": False, "report_to": "none", "logging_steps": 10, "save_total_limit": 2}
# Sections that MultiTeacherKVConfig holds beside the fields of TrainingArguments.
NESTED = ("alignment", "projector", "fusion", "losses", "data", "evaluation", "control")
SECTIONS = ("student", "teachers", *NESTED, "training")
COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
DTYPES = ("float32", "bfloat16", "float16", "auto")
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


# --------------------------------------------------------------------------------------------- text to nodes


def parse(text: str, where: Callable[[int], str], folder: Path) -> Node:
    """YAML text as a Node tree; `where` names a line (from 1). RecipeError for what is unsafe, doubled or empty."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise RecipeError(f"Nothing is written {where(1)}; give a value.")
        return _convert(loader, root, "", root.start_mark.line + 1, where, folder)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"YAML error {where(mark.line + 1 if mark else 1)}: {one_line(problem)}.") from error
    except RecursionError:
        raise RecipeError(f"YAML error {where(1)}: an alias contains itself, or the nesting is too deep.") from None


def _convert(
    loader: yaml.SafeLoader, node: yaml.Node, path: str, line: int, where: Callable[[int], str], folder: Path
) -> Node:
    if isinstance(node, yaml.CollectionNode) and node.tag not in COLLECTIONS:
        raise RecipeError(f"{path or 'The recipe'} {where(line)} has the YAML tag {node.tag}; leave it out.")
    if isinstance(node, yaml.MappingNode):
        value: Any = _convert_mapping(loader, node, path, where, folder)
    elif isinstance(node, yaml.SequenceNode):
        value = [_convert(loader, item, path, item.start_mark.line + 1, where, folder) for item in node.value]
    elif node.value == "" and node.tag == "tag:yaml.org,2002:null":
        raise RecipeError(f"{path or 'The value'} {where(line)} is left empty; write null, or {{}} for all defaults.")
    else:
        try:
            value = loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            raise RecipeError(f"{path} {where(line)} is {node.value!r}: {error}; put text in quotes.") from error
    return Node(value, where(line), folder)


def _convert_mapping(
    loader: yaml.SafeLoader, node: yaml.MappingNode, path: str, where: Callable[[int], str], folder: Path
) -> dict[str, Node]:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise RecipeError(f"The key {key!r} {where(line)} is not text ({type(key).__name__}); put it in quotes.")
        if key in seen:
            first = f" (first in line {seen[key]})" if seen[key] != line else ""
            raise RecipeError(f"The key '{join(path, key)}' {where(line)} is there twice{first}; keep one.")
        seen[key] = line
    loader.flatten_mapping(node)  # resolves `<<: *anchor`; own keys come last and win
    node.value = list({key_node.value: (key_node, child) for key_node, child in node.value}.values())
    children = {}
    for key_node, child in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        children[key] = _convert(loader, child, join(path, key), line, where, folder)
    return children


def read_file(path: Path, shown: str, chain: tuple[Path, ...] = ()) -> Node:
    """A recipe file over the one it extends. RecipeError if it is missing, not a mapping, or extends itself."""
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
    chain = (*chain, path.resolve())
    extends = tree.value.pop("extends", None)
    if extends is None:
        return tree
    if not isinstance(extends.value, str) or not extends.value.startswith(("./", "/")):
        raise RecipeError(f"extends {extends.where} is {extends.value!r}; give a recipe beside this one: ./other.yaml.")
    base = resolve_path(extends.value, extends, "extends")
    if Path(base).resolve() in chain:
        raise RecipeError(f"extends {extends.where} is {extends.value!r}, which leads back to itself; remove one.")
    return merge(read_file(Path(base), base, chain), tree)


def read_overrides(overrides: Sequence[str], folder: Path) -> Node:
    """`--section.key value` and `--section.key=value` as a Node tree."""
    here = "on the command line"
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
        try:
            node = parse(text, lambda line: here, folder)
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}") from error
        for key in reversed(keys):
            node = Node({key: node}, here, folder)
        tree = merge(tree, node)
    return tree


def merge(base: Node, over: Node) -> Node:
    """`over` laid on `base`: mappings key by key, anything else replaced. Every value keeps its own origin."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    value = dict(base.value)
    for key, child in over.value.items():
        value[key] = merge(value[key], child) if key in value else child
    return Node(value, base.where, base.folder)


# --------------------------------------------------------------------------------------------- nodes to values


class Misfit(Exception):
    """A value is not of a type."""


def number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


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


def fit(value: Any, hint: Any) -> Any:
    """`value` as `hint`, or Misfit. An int passes for a float, and so does text such as 5e-5."""
    options = members(hint)
    if len(options) > 1:
        for option in options:
            try:
                return fit(value, option)
            except Misfit:
                continue
        raise Misfit
    hint = options[0]
    listed, origin = choices(hint), typing.get_origin(hint) or hint
    if hint is Any:
        return value
    if listed:
        value = "no" if value is False and "no" in listed else value  # YAML 1.1 reads a bare no as false
        if any(value == choice and isinstance(value, type(choice)) for choice in listed):
            return value
    elif origin is list and isinstance(value, list):
        return [fit(item, *(typing.get_args(hint) or (Any,))) for item in value]
    elif origin is dict and isinstance(value, dict):
        inner = (typing.get_args(hint) or (str, Any))[1]
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
    words = {int: "an int", float: "a float", str: "a str", bool: "true or false", types.NoneType: "null"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}, which YAML cannot hold")


def coerce(node: Node, hint: Any, path: str) -> Any:
    """The node's value as `hint`; RecipeError says what was given and what fits."""
    value = node.plain()
    try:
        return fit(value, hint)
    except Misfit:
        pass
    shown = "null" if value is None else f"{short(value)} ({type(value).__name__})"
    listed = [choice for option in members(hint) for choice in choices(option) if isinstance(choice, str)]
    quotes = " in quotes" if str in members(hint) and not isinstance(value, (str, list, dict, type(None))) else ""
    raise RecipeError(f"{path} {node.where} is {shown}; give {describe(hint)}{quotes}.{suggest(str(value), listed)}")


def resolve_path(value: str, node: Node, path: str) -> str:
    """`./x` beside the recipe as a path from here; hub names as they are. RecipeError for `..` and what is missing."""
    beside = value == "." or value.startswith("./")
    if not os.path.isabs(value):
        if ".." in PurePath(value).parts:
            raise RecipeError(f"{path} {node.where} is '{value}', which leaves its folder; give an absolute path.")
        if not beside:
            return value
    target = os.path.abspath(node.folder / value)
    if not os.path.exists(target):
        looked = f" (looked for {target})" if beside else ""
        raise RecipeError(f"{path} {node.where} is '{value}', which does not exist{looked}; correct the path.")
    return os.path.relpath(target) if Path(target).is_relative_to(os.getcwd()) else target


# --------------------------------------------------------------------------------------------- values to sections


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def one_line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(key: str, path: str, node: Node, known: Sequence[str], listing: str = "", hint: str = "") -> RecipeError:
    hint = hint or suggest(key, known)
    return RecipeError(f"Unknown key '{join(path, key)}' {node.where}.{hint} Known: {listing or ', '.join(known)}.")


def mapping(node: Node, path: str) -> dict[str, Node]:
    if not isinstance(node.value, dict):
        shown = "null" if node.value is None else f"{short(node.plain())} ({type(node.value).__name__})"
        raise RecipeError(f"{path} {node.where} is {shown}; give a mapping, or leave it out for the defaults.")
    return node.value


def is_path(cls: type, key: str) -> bool:
    model = issubclass(cls, ModelConfig) and key in ("model", "config", "tokenizer")
    return model or (cls is DataConfig and key == "path")


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
        if is_dataclass(hints[key]):
            values[key] = build(hints[key], child, join(path, key))
            continue
        value = coerce(child, hints[key], join(path, key))
        values[key] = resolve_path(value, child, join(path, key)) if value and is_path(cls, key) else value
    try:
        return cls(**values)
    except ValueError as error:
        raise blame(error, node, path) from error


def build_losses(node: Node | None) -> dict[str, DistillationLoss]:
    if node is None:
        return {"cross_entropy": CrossEntropy()}
    losses = {}
    for name, child in mapping(node, "losses").items():
        if name not in LOSSES:
            raise unknown(name, "losses", child, list(LOSSES))
        if child.value is not None:
            losses[name] = build(LOSSES[name], child, f"losses.{name}")
    if "cross_entropy" not in losses:
        add = "'cross_entropy: {weight: 0}' if it must not count"
        raise RecipeError(f"losses {node.at('cross_entropy')} lacks cross_entropy; add {add}.")
    return losses


def build_teachers(node: Node | None) -> dict[str, TeacherConfig]:
    teachers = {}
    for name, child in mapping(node, "teachers").items() if node and node.value is not None else ():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise RecipeError(f"The teacher '{name}' {child.where} needs a name of letters, digits, _ and - only.")
        if child.value is not None:
            teachers[name] = build(TeacherConfig, child, f"teachers.{name}")
            if not teachers[name].model:
                raise RecipeError(f"teachers.{name} {child.where} has no 'model'; give a hub name or a folder.")
    return teachers


def training_hints() -> dict[str, Any]:
    """Field -> type of TrainingArguments; Any where this version's types do not resolve."""
    try:
        hints = typing.get_type_hints(TrainingArguments)
    except (NameError, TypeError):
        hints = {}
    # Its own __post_init__ takes and leaves more than the annotation of fsdp says.
    hints["fsdp"] = str | bool | list[str] | None
    return {field.name: hints.get(field.name, Any) for field in fields(TrainingArguments) if field.init}


def build_training(node: Node, sections: dict[str, Any], output_dir: str) -> MultiTeacherKVConfig:
    """MultiTeacherKVConfig of the `training` section and the built others."""
    hints, values = training_hints(), {}
    for key, child in mapping(node, "training").items():
        if key not in hints:
            hint = f" '{key}' is a section of its own: move it to the top level." if key in SECTIONS else ""
            raise unknown(key, "training", child, list(hints), "the fields of transformers.TrainingArguments", hint)
        values[key] = coerce(child, hints[key], f"training.{key}")
    values["output_dir"] = values.get("output_dir") or output_dir
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            args = MultiTeacherKVConfig(**{**TRAINING_DEFAULTS, **values, **sections})
        except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
            raise blame(error, node, "training") from error
    for warning in caught:
        message = str(warning.message)
        if "deprecated" in message and any(re.search(rf"\b{key}\b", message) for key in node.value):
            raise blame(message, node, "training")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return args


# --------------------------------------------------------------------------------------------- checks across sections


def check_student(student: StudentConfig, tree: Node) -> None:
    where = tree.at("student")
    if student.model and student.config:
        where = tree.at("student", "config")
        raise RecipeError(f"student {where} has both 'model' and 'config'; give model (pretrained) or config (random).")
    if not student.model and not student.config:
        raise RecipeError(f"student {where} has neither 'model' nor 'config'; give one of them.")
    if student.config and student.keep_layers is not None:
        where = tree.at("student", "keep_layers")
        raise RecipeError(f"student.keep_layers {where} needs 'model': with 'config', set the layers in the config.")
    if student.config and not student.tokenizer:
        raise RecipeError(f"student {where} has 'config' but no 'tokenizer'; give a hub name or a folder.")


def check_losses(recipe: Recipe, tree: Node) -> None:
    """Losses that need a teacher, and teachers that need a loss."""
    users = [name for name, loss in recipe.args.losses.items() if "teacher_kv" in loss.requires]
    if users and not recipe.teachers:
        raise RecipeError(f"losses.{users[0]} {tree.at('losses', users[0])} needs a teacher; add one under teachers.")
    if recipe.teachers and not users:
        name = next(iter(recipe.teachers))
        usable = ", ".join(loss for loss in LOSSES if "teacher_kv" in LOSSES[loss].requires)
        where = tree.at("teachers", name)
        raise RecipeError(f"teachers.{name} {where} would be ignored: no loss needs a teacher; add one of {usable}.")


def check_layers(recipe: Recipe, tree: Node) -> None:
    """An explicit layer map names every teacher, and a map is there only for `explicit`."""
    layers, where = recipe.args.alignment.layers, tree.at("alignment", "layers", "map")
    if (layers.method == "explicit") != (layers.map is not None):
        raise RecipeError(f"alignment.layers {where} needs both 'method: explicit' and 'map', or neither of them.")
    if layers.map is not None and set(layers.map) != set(recipe.teachers):
        names, teachers = ", ".join(layers.map), ", ".join(recipe.teachers)
        raise RecipeError(f"alignment.layers.map {where} is for {names or 'nobody'}; the teachers are {teachers}.")


def check_evaluation(recipe: Recipe, tree: Node) -> None:
    args, where = recipe.args, tree.at("evaluation", "answer_pattern")
    if args.eval_strategy != "no" and args.data.eval_split is None:
        asked = tree.at("training", "eval_strategy")
        raise RecipeError(f"training.eval_strategy {asked} needs data to evaluate on; give data.eval_split.")
    try:
        groups = re.compile(args.evaluation.answer_pattern).groups
    except re.error as error:
        raise RecipeError(f"evaluation.answer_pattern {where} is no regular expression: {error}.") from error
    if not groups:
        raise RecipeError(f"evaluation.answer_pattern {where} has no group; put the answer in one: '#### (.+)'.")


def check(recipe: Recipe, tree: Node) -> None:
    """What no section can see alone. RecipeError for the impossible, a warning for what has no effect."""
    check_student(recipe.student, tree)
    for path, model in {"student": recipe.student, **{f"teachers.{n}": t for n, t in recipe.teachers.items()}}.items():
        if model.dtype not in DTYPES:
            hint, where = suggest(model.dtype, DTYPES), tree.at(*path.split("."), "dtype")
            raise RecipeError(f"{path}.dtype {where} is '{model.dtype}'; give one of {', '.join(DTYPES)}.{hint}")
    if not recipe.args.data.path:
        raise RecipeError(f"data {tree.at('data')} has no 'path'; give a hub name, a folder or a file.")
    check_losses(recipe, tree)
    check_layers(recipe, tree)
    check_evaluation(recipe, tree)
    for message in ignored(recipe):
        warnings.warn(message, stacklevel=3)


def ignored(recipe: Recipe) -> list[str]:
    """Settings that differ from their defaults and have no effect in this recipe."""
    args, found = recipe.args, []
    weighted = [name for name, teacher in recipe.teachers.items() if teacher.weight != 1.0]
    if weighted and args.fusion.method != "fixed":
        found.append(f"teachers.{weighted[0]}.weight has no effect: it needs fusion.method: fixed.")
    if args.fusion.temperature != 1.0 and args.fusion.method == "fixed":
        found.append("fusion.temperature has no effect with fusion.method: fixed.")
    if args.projector != ProjectorConfig() and not any("projectors" in loss.requires for loss in args.losses.values()):
        found.append("projector has no effect: no loss of this recipe uses projectors.")
    if args.control.shuffle and not recipe.teachers:
        found.append("control.shuffle has no effect: there is no teacher.")
    return found


# --------------------------------------------------------------------------------------------- the way in and out


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file as dataclasses.

    overrides: what a command line leaves over, such as ["--training.learning_rate", "1e-5", "--losses.kv=null"].
    Values may begin with `./` for a file beside the recipe. Raises RecipeError, one line that says where.
    """
    file = Path(path)
    tree = read_file(file, str(path))
    tree = merge(Node({}, f"in {path}", file.parent), merge(tree, read_overrides(overrides, file.parent)))
    hints = typing.get_type_hints(MultiTeacherKVConfig)
    for key, node in tree.value.items():
        if key not in SECTIONS:
            known = training_hints()
            raise unknown(key, "", node, SECTIONS, hint=f" Did you mean 'training.{key}'?" if key in known else "")
    if "student" not in tree.value:
        raise RecipeError(f"student is missing in {path}; give student: {{model: ...}}.")
    get = tree.value.get
    student = build(StudentConfig, get("student"), "student")
    teachers = build_teachers(get("teachers"))
    sections = {key: build(hints[key], get(key), key) for key in NESTED if key != "losses" and key in tree.value}
    sections["losses"] = build_losses(get("losses"))
    default = os.path.join("outputs", file.resolve().parent.name, file.stem)
    args = build_training(get("training", Node({}, tree.where, file.parent)), sections, default)
    recipe = Recipe(student, teachers, args, str(path))
    check(recipe, tree)
    return recipe


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write the resolved recipe as YAML that load_recipe, from the same folder, reads back as equal.

    `training` holds what differs from TrainingArguments' defaults, and never a token. The file appears whole.
    """
    args = recipe.args
    content: dict[str, Any] = {"student": dataclasses.asdict(recipe.student)}
    content["teachers"] = {name: dataclasses.asdict(teacher) for name, teacher in recipe.teachers.items()}
    for key in NESTED:
        section = getattr(args, key)
        losses = {name: dataclasses.asdict(loss) for name, loss in section.items()} if key == "losses" else {}
        content[key] = losses or dataclasses.asdict(section)
    content["training"] = changed_training(args)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def changed_training(args: TrainingArguments) -> dict[str, Any]:
    """The fields of TrainingArguments that differ from its defaults, as plain YAML values."""
    names = {field.name for field in fields(TrainingArguments)}
    # What TrainingArguments fills in itself is put back as it was given: written out it would only be noise.
    filled: dict[str, Any] = {"debug": " ".join(plain(list(args.debug)))}
    if isinstance(args.accelerator_config, AcceleratorConfig) and args.accelerator_config == AcceleratorConfig():
        filled["accelerator_config"] = None
    if getattr(args, "activation_checkpointing", None) is False:
        filled["activation_checkpointing"] = None
    changed = {}
    for field in fields(TrainingArguments):
        mirror = field.name.startswith("gradient_checkpointing") and "activation_checkpointing" in names
        if not field.init or field.name.endswith("token") or mirror:
            continue
        value = plain(filled.get(field.name, getattr(args, field.name)))
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != plain(default) or field.name in TRAINING_DEFAULTS or field.name == "output_dir":
            changed[field.name] = value
    return changed


def plain(value: Any) -> Any:
    """Enums, AcceleratorConfig and containers as YAML can hold them; entries named as a token are left out."""
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not str(key).endswith("token")}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
