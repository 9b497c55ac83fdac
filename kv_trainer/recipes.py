"""YAML recipes to the dataclasses of arguments/, and back: strict, with line numbers and suggested spellings.

Text becomes a tree in recipe_tree.py, and nodes become values in recipe_values.py; here are the sections, what must
hold across them, and the way in and out.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from .arguments import CHECKPOINTING, MultiTeacherKVConfig, Recipe, StudentConfig, TeacherConfig
from .files import write_text
from .fusion import FUSIONS, Confidence, Fusion, method_of
from .losses import LOSSES, CrossEntropy, DistillationLoss
from .model_checks import check_name
from .quick import quick_preset
from .recipe_checks import check
from .recipe_tree import NESTED, SECTIONS, Node, RecipeError, merge, read_file, read_overrides
from .recipe_values import blame, build, coerce, mapping, plain, suggest, unknown

__all__ = ["RecipeError", "dump_recipe", "load_recipe", "save_recipe"]

# What differs from TrainingArguments' own defaults: our columns are not the model's, nothing is reported to a service
# that nobody named, short runs show a line now and then, checkpoints do not fill the disk, and a loss that is not
# finite is shown (and stops the run) instead of being replaced by the last mean.
TRAINING_DEFAULTS = {
    "remove_unused_columns": False, "report_to": "none", "logging_steps": 10, "save_total_limit": 2,
    "logging_nan_inf_filter": False,
}  # fmt: skip

# --------------------------------------------------------------------------------------------- sections


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


def build_fusion(node: Node | None) -> Fusion:
    """The dataclass that `method` names, of the other keys: each method knows its own knobs only."""
    if node is None:
        return Confidence()
    given = dict(mapping(node, "fusion"))
    method = given.pop("method", Node("confidence", node.where, node.folder))
    if method.value not in FUSIONS:
        hint = suggest(str(method.value), list(FUSIONS))
        raise RecipeError(f"fusion.method {method.where} is '{method.value}'; give one of {', '.join(FUSIONS)}.{hint}")
    knobs = [field.name for field in fields(FUSIONS[method.value])]
    for key, child in given.items():
        if key not in knobs:
            takes = f"{method.value} takes {', '.join(knobs) or 'no settings'}"
            raise unknown(key, "fusion", child, knobs, f"method; {takes}")
    return build(FUSIONS[method.value], Node(given, node.where, node.folder), "fusion")


def build_teachers(node: Node | None) -> dict[str, TeacherConfig]:
    teachers: dict[str, TeacherConfig] = {}
    if node is None or node.value is None:
        return teachers
    for name, child in mapping(node, "teachers").items():
        try:
            check_name(name, child.where)
        except ValueError as error:
            raise RecipeError(str(error)) from error
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
    """MultiTeacherKVConfig of the `training` section and the built others.

    Names that TrainingArguments calls deprecated work as long as they work there, with its own warning.
    """
    hints, values = training_hints(), {}
    for key, child in mapping(node, "training").items():
        if key not in hints:
            hint = f" '{key}' is a section of its own: move it to the top level." if key in SECTIONS else ""
            raise unknown(key, "training", child, list(hints), "the fields of transformers.TrainingArguments", hint)
        values[key] = coerce(child, hints[key], f"training.{key}")
    values["output_dir"] = values.get("output_dir") or output_dir
    try:
        return MultiTeacherKVConfig(**{**TRAINING_DEFAULTS, **values, **sections})
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
        raise blame(error, node, "training") from error


# --------------------------------------------------------------------------------------------- the way in and out


def load_recipe(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), quick: bool = False, here: str = "on the command line"
) -> Recipe:
    """A recipe file as dataclasses.

    overrides: what a command line leaves over, such as ["--training.learning_rate", "1e-5", "--losses.kv=null"].
    Values may begin with `./` for a file beside the recipe. quick: cut down to a trial run, as quick.py says.
    here: where messages say that overrides were written. Raises RecipeError, one line that says where.
    """
    file = Path(path)
    whole = Node({}, f"in {path}", file.parent)  # where what is written nowhere is missing
    tree, given = merge(whole, read_file(file, str(path))), read_overrides(overrides, file.parent, here)
    default = os.path.join("outputs", file.resolve().parent.name, file.stem)
    if quick:
        tree = merge(tree, quick_preset(tree, given, default))
    tree = merge(tree, given)
    off = {key for key in NESTED if key in given.value and given.value[key].value is None}  # back to the defaults
    tree = Node({key: node for key, node in tree.value.items() if key not in off}, tree.where, tree.folder)
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
    own = ("losses", "fusion")
    sections = {key: build(hints[key], get(key), key) for key in NESTED if key not in own and key in tree.value}
    sections["fusion"] = build_fusion(get("fusion"))
    sections["losses"] = build_losses(get("losses"))
    args = build_training(get("training", Node({}, tree.where, file.parent)), sections, default)
    recipe = Recipe(student, teachers, args, str(path))
    check(recipe, tree)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that load_recipe, from the same folder, reads back as equal.

    `training` holds what differs from TrainingArguments' defaults, and never a token.
    """
    content: dict[str, Any] = {"student": dataclasses.asdict(recipe.student), "teachers": by_name(recipe.teachers)}
    for key in NESTED:
        section = getattr(recipe.args, key)
        content[key] = by_name(section) if key == "losses" else dataclasses.asdict(section)
        if key == "fusion":
            content[key] = {"method": method_of(section), **content[key]}
    content["training"] = changed_training(recipe.args)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write dump_recipe(recipe) to `path`. The file appears whole."""
    write_text(path, dump_recipe(recipe))


def saved_recipe(folder: Path) -> str:
    """The recipe of the run in `folder`, as dump_recipe gives it; settings it does not know yet have their defaults."""
    return dump_recipe(load_recipe(folder / "recipe.yaml"))


def settings_of(recipe: str) -> dict[str, Any]:
    """A dumped recipe as what two runs of the same settings share: not how many processes encoded its rows."""
    found: dict[str, Any] = yaml.safe_load(recipe)
    (found.get("data") or {}).pop("num_proc", None)
    return found


def by_name(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(value) for name, value in section.items()}


def changed_training(args: TrainingArguments) -> dict[str, Any]:
    """The fields of TrainingArguments that differ from its defaults, as plain YAML values."""
    names = {field.name for field in fields(TrainingArguments)}
    # What TrainingArguments fills in itself is put back as it was given: written out it would only be noise.
    filled: dict[str, Any] = {"debug": " ".join(plain(list(args.debug)))}
    if isinstance(args.accelerator_config, AcceleratorConfig) and args.accelerator_config == AcceleratorConfig():
        filled["accelerator_config"] = None
    changed = {}
    for field in fields(TrainingArguments):
        mirror = field.name.startswith("gradient_checkpointing") and "activation_checkpointing" in names
        if not field.init or field.name.endswith("token") or mirror:
            continue
        value = plain(filled.get(field.name, getattr(args, field.name)))
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = None if field.name in CHECKPOINTING else default  # unlike there, not the same as false
        if value != plain(default) or field.name in TRAINING_DEFAULTS or field.name == "output_dir":
            changed[field.name] = value
    return changed
