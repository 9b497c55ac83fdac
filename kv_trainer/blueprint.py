"""A recipe's models and bridge as they would be, on the meta device: what training would refuse, without weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .adapters import add_adapters, students_peft
from .arguments import FreezeConfig, ModelConfig, Recipe, StudentConfig
from .bridge import KVBridge
from .callbacks.freezing import attention_names, layer_groups
from .capture import kv_shape
from .models import freeze, keep_layers, whole_weights
from .store.teacher import check_stored
from .types import KVShape


def check_build(recipe: Recipe, configs: Mapping[str, PreTrainedConfig]) -> list[str]:
    """ValueError for a model, or a pair of models and losses, that a run would refuse once it has loaded them.

    configs: of the models that are known here, by their section, `student` or `teachers.NAME`; without all of them the
    bridge, which joins them, is left out. Returns what a run will need that is not here.
    """
    shapes, missing, args = {}, [], recipe.args
    with torch.device("meta"), whole_weights(args):
        for where, config in configs.items():
            section = recipe.models[where]
            with told(recipe, where):
                try:
                    model = build(config, section.attn_implementation)
                except ImportError as error:  # another machine may have it
                    missing.append(f"{where}.attn_implementation is {section.attn_implementation}: {error}")
                    model = build(config)
                shapes[where] = shape_of(model, section, bool(recipe.teachers), args.freeze)
        if not recipe.teachers or set(shapes) != {"student", *(f"teachers.{name}" for name in recipe.teachers)}:
            return missing
        teachers = {name: shapes[f"teachers.{name}"] for name in recipe.teachers}
        with told(recipe, ""):
            bridge = KVBridge(shapes["student"], teachers, args, [*recipe.weights.values()])
            stored = [name for name, teacher in recipe.teachers.items() if teacher.source == "store"]
            return missing + check_stored(stored, args.store, bridge.teacher_needs())


@contextmanager
def told(recipe: Recipe, where: str) -> Iterator[None]:
    """Inside the block, what is refused says of which recipe it is, and of what in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}{' of ' if where else ''}{recipe.path}: {error}") from error


def build(config: PreTrainedConfig, attention: str | None = None) -> Any:
    """The model of `config`. attention: its implementation; ImportError if that is not installed."""
    options = {"attn_implementation": attention} if attention else {}
    # A copy: the implementation would be left in it, also where it is refused.
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False, **options)


def shape_of(model: Any, section: ModelConfig, taught: bool, freezing: FreezeConfig | None = None) -> Any:
    """The coordinates of a model; a student is first made what its section says.

    Without teachers (not `taught`) any model can be a student, and its shape is None. freezing: what rests for a part
    of the student's run.
    """
    if not isinstance(section, StudentConfig):
        return kv_shape(model)
    if section.keep_layers is not None:
        keep_layers(model, section.keep_layers)
    freeze(model, section.freeze)
    shape: KVShape | None = kv_shape(model) if taught else None
    if freezing and freezing.layer_groups:
        layer_groups({}, [n for n, _ in model.named_parameters()], attention_names(model), freezing)
    adapters = students_peft(section, None)
    if adapters is not None:
        # Some look at weights, which the meta device has none of; what peft refuses is a ValueError.
        with suppress(NotImplementedError, RuntimeError):
            add_adapters(model, adapters)
    return shape
