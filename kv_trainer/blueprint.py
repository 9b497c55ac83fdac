"""A recipe's models and bridge as they would be, on the meta device: what training would refuse, without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .adapters import add_adapters, students_peft
from .arguments import Recipe, StudentConfig
from .bridge import KVBridge
from .capture import kv_shape
from .models import freeze, keep_layers, whole_weights
from .types import KVShape


def check_build(recipe: Recipe, configs: Mapping[str, PreTrainedConfig]) -> None:
    """ValueError for a model, or a pair of models and losses, that a run would refuse once it has loaded them.

    configs: of the models that are known here, by their section, `student` or `teachers.NAME`; without all of them the
    bridge, which joins them, is left out.
    """
    shapes = {}
    with torch.device("meta"), whole_weights(recipe.args):
        for where, config in configs.items():
            with told(recipe, where):
                shapes[where] = shape_of(config, recipe.student if where == "student" else None, bool(recipe.teachers))
        if not recipe.teachers or set(shapes) != {"student", *(f"teachers.{name}" for name in recipe.teachers)}:
            return
        teachers = {name: shapes[f"teachers.{name}"] for name in recipe.teachers}
        with told(recipe, ""):
            KVBridge(shapes["student"], teachers, recipe.args, [*recipe.weights.values()])


@contextmanager
def told(recipe: Recipe, where: str) -> Iterator[None]:
    """Inside the block, what is refused says of which recipe it is, and of what in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}{' of ' if where else ''}{recipe.path}: {error}") from error


def shape_of(config: PreTrainedConfig, student: StudentConfig | None, taught: bool) -> Any:
    """The coordinates of what `config` would be; with its section, of the student it would be made into.

    Without teachers (not `taught`) any model can be a student, and its shape is None.
    """
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if student is None:
        return kv_shape(model)
    if student.keep_layers is not None:
        keep_layers(model, student.keep_layers)
    freeze(model, student.freeze)
    shape: KVShape | None = kv_shape(model) if taught else None
    adapters = students_peft(student, None)
    if adapters is not None:
        # Some look at weights, which the meta device has none of; what peft refuses is a ValueError.
        with suppress(NotImplementedError, RuntimeError):
            add_adapters(model, adapters)
    return shape
