"""A recipe's models and bridge as they would be, on the meta device: what training would refuse, without weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME

from .adapters import add_adapters, students_peft
from .arguments import FreezeConfig, ModelConfig, Recipe, StudentConfig
from .bridge import KVBridge
from .callbacks.freezing import attention_names, layer_groups
from .capture import kv_shape
from .model_checks import check_length, check_tokenizer, check_vocabulary, is_here, offline
from .models import freeze, keep_layers, whole_weights
from .store.teacher import check_stored, stored_shapes
from .types import KVShape

READ = ("model", "config", "tokenizer")  # of a model's section, what may be a folder


def check_models(recipe: Recipe) -> list[str]:
    """What the configs and tokenizers that are on this machine tell without weights. ValueError names what to change.

    No code of a model is run, whatever the recipe says, for it may be a stranger's, and the Hub is not asked. Returns
    what was left out for either, and what a run will need that is not here yet.
    """
    check_places(recipe)
    with told(recipe, ""):
        stored = stored_shapes(recipe.stored, recipe.args.store)
    skipped, configs = [], {}
    for where, model in recipe.models.items():
        if model.trust_remote_code:
            skipped.append(f"{where} is not checked: it has trust_remote_code, and no code of a model is run here.")
            continue
        place = f"{where} of {recipe.path}"
        tokenizer = check_tokenizer(model, place)
        shape = model.model or getattr(model, "config", None)
        if not shape or not is_here(shape, "config.json", model.revision):
            if where.removeprefix("teachers.") not in stored:
                skipped.append(f"{where} is not checked: {shape} is not on this machine yet.")
            continue
        if is_adapter(shape):
            skipped.append(f"{where} is not checked: {shape} holds adapters, whose base is known once they are loaded.")
            continue
        config = AutoConfig.from_pretrained(shape, trust_remote_code=False, **offline(shape, model.revision))
        text = config.get_text_config()
        if tokenizer is not None:
            check_vocabulary(f"{place}: ", text, tokenizer)
        check_length(place, text, recipe.args.data.max_length)
        configs[where] = config
        if getattr(model, "quantization", None) and find_spec("bitsandbytes") is None:
            skipped.append(f"{where}.quantization needs bitsandbytes, which is not here: pip install bitsandbytes.")
    return skipped + check_build(recipe, configs, stored)


def check_places(recipe: Recipe) -> None:
    """ValueError if what is trained would be written over a model, or rows, that the recipe reads."""
    read = {f"{where}.{key}": getattr(model, key, None) for where, model in recipe.models.items() for key in READ}
    folder = Path(str(recipe.args.output_dir)).resolve()
    for where, place in {**read, "data.path": recipe.args.data.path}.items():
        if place and Path(place).exists() and Path(place).resolve() == folder:
            raise ValueError(
                f"training.output_dir is {recipe.args.output_dir}, which {where} is read from and would be "
                "overwritten; give another folder."
            )


def is_adapter(folder: str) -> bool:
    """Whether a folder holds adapters without their base."""
    adapters, whole = (os.path.exists(os.path.join(folder, name)) for name in (ADAPTER_CONFIG_NAME, "config.json"))
    return adapters and not whole


def check_build(recipe: Recipe, configs: Mapping[str, PreTrainedConfig], stored: Mapping[str, KVShape]) -> list[str]:
    """ValueError for a model, or a pair of models and losses, that a run would refuse once it has loaded them.

    configs: of the models that are known here, by their section, `student` or `teachers.NAME`. stored: teachers that a
    store has, by name. Without a model of either the bridge, which joins them, is left out. Returns what a run will
    need that is not here.
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
        shapes |= {f"teachers.{name}": shape for name, shape in stored.items()}
        if not recipe.teachers or set(shapes) != {"student", *(f"teachers.{name}" for name in recipe.teachers)}:
            return missing
        teachers = {name: shapes[f"teachers.{name}"] for name in recipe.teachers}
        with told(recipe, ""):
            bridge = KVBridge(shapes["student"], teachers, args, [*recipe.weights.values()])
            return missing + check_stored(recipe.stored, args.store, bridge.teacher_needs())


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
