"""Adapters: the section `student.peft` as a config of the peft library, what it must not be, and loading them."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.peft_utils import find_adapter_config_file

from .arguments import StudentConfig
from .recipe_tree import Node, RecipeError
from .recipe_values import build, mapping, plain, suggest, unknown

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# Fields of every PeftConfig that follow from the student, or that peft fills in itself.
SET_HERE = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
)  # fmt: skip
REFUSED = {
    "ADALORA": "its ranks move only where the training loop reallocates them, which Trainer does not do",
    "ADAPTION_PROMPT": "it adds virtual tokens to the attention that is captured",
    "POLY": "it needs task ids in every forward pass",
    "XLORA": "it mixes adapters that have been trained before",
}


def peft_classes() -> dict[str, type[PeftConfig]]:
    """`lora`, `ia3`, ... -> the class of peft that configures it."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def peft_config(section: Node | Mapping[str, Any]) -> PeftConfig:
    """`{type: lora, r: 16, ...}` as peft's own config, its fields by their own names.

    RecipeError for an unknown type or field, a wrong value, and a method that cannot be distilled into.
    """
    node = section if isinstance(section, Node) else as_node(dict(section))
    given, classes = dict(mapping(node, "student.peft")), peft_classes()
    kind = given.pop("type", Node(None, node.where, node.folder))
    name = str(kind.value).lower()
    if name not in classes:
        hint = suggest(name, list(classes)) if kind.value else ""
        usable = ", ".join(sorted(n for n in classes if n.upper() not in REFUSED))
        raise RecipeError(f"student.peft.type {kind.where} is {kind.value!r}; give one of {usable}.{hint}")
    known = [field.name for field in dataclasses.fields(classes[name]) if field.name not in SET_HERE]
    for key, child in given.items():
        if key in SET_HERE:
            raise RecipeError(f"student.peft.{key} {child.where} follows from the student; leave it out.")
        if key not in known:
            raise unknown(key, "student.peft", child, known, f"type; {name} takes {', '.join(known)}")
    config = _built(classes[name], Node(given, node.where, node.folder))
    config.task_type = "CAUSAL_LM"
    try:
        check_method(config)
    except ValueError as error:
        raise RecipeError(f"student.peft.type {kind.where}: {error}") from error
    return config


def _built(cls: type[PeftConfig], node: Node) -> PeftConfig:
    try:
        return build(cls, node, "student.peft")
    except (TypeError, ImportError) as error:
        raise RecipeError(f"student.peft {node.where}: {' '.join(str(error).split())}") from error


def as_node(value: Any) -> Node:
    """A plain value from Python as the tree that a recipe would be."""
    inner = {key: as_node(child) for key, child in value.items()} if isinstance(value, dict) else value
    inner = [as_node(child) for child in inner] if isinstance(inner, list) else inner
    return Node(inner, "in StudentConfig", Path("."))


def check_method(config: PeftConfig) -> None:
    """ValueError names a method of PEFT whose student could not be taught keys and values."""
    name = str(getattr(config.peft_type, "value", config.peft_type))
    why = REFUSED.get(name)
    if config.is_prompt_learning:
        why = "its virtual tokens come before the text, so that no position would be aligned with a teacher's"
    start = str(getattr(config, "init_lora_weights", ""))
    if start.startswith("pissa_niter"):
        raise ValueError(
            f"init_lora_weights is {start}, which splits the base by a random method, at each load in another way, so "
            "that what is loaded would be another student; take pissa."
        )
    if why:
        raise ValueError(f"{name.lower()} cannot be used here: {why}. Use lora, ia3 or another method of weights.")


def add_adapters(student: PreTrainedModel, config: PeftConfig) -> Any:
    """The student as a PeftModel: its own weights frozen, adapters in the modules that the config targets."""
    from peft import get_peft_model

    check_method(config)
    with quiet():
        return get_peft_model(student, config)


def load_trained(model: str, base: str | None = None, trust_remote_code: bool = False, **options: Any) -> Any:
    """A student as it was saved: an ordinary checkpoint, or adapters on the base that they name.

    base: where their base is, should its path, which may be relative to another folder, lead nowhere from here.
    trust_remote_code: whether code from the model's own repository or folder may run; only the caller can say so.
    options: for from_pretrained, such as another dtype than that of the weights.
    """
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code, **options}
    found = find_adapter_config_file(model)
    if found is None:
        with whole_file(model):
            return AutoModelForCausalLM.from_pretrained(model, **options)
    from peft import PeftModel

    said = json.loads(Path(found).read_text(encoding="utf-8"))
    name = said["base_model_name_or_path"]
    if base and not Path(name).exists() and Path(name).name == Path(base).name:
        name = base
    options["revision"] = said.get("revision")
    with quiet():
        try:
            student: Any = AutoModelForCausalLM.from_pretrained(name, **options)
        except OSError as error:
            raise ValueError(
                f"{model} holds adapters on the base '{name}', which could not be loaded from here; go where that "
                f"path leads to it, or write its place into {found}. {error}"
            ) from error
        with suppress(OSError):  # adapters that were trained elsewhere have none
            student.generation_config = GenerationConfig.from_pretrained(model)
        with whole_file(model):
            return PeftModel.from_pretrained(student, model)


@contextmanager
def whole_file(model: str) -> Iterator[None]:
    """Inside the block, tensors that were cut off are told by the folder they lie in."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"The weights in {model} cannot be read ({error}); fetch, or save, them again.") from error


def save_generation_config(adapted: Any, folder: Path) -> None:
    """That of the base, as it was trained, beside its adapters."""
    try:
        adapted.generation_config.save_pretrained(folder)
    except (AttributeError, ValueError) as error:  # none, or one with settings that contradict each other
        logger.warning("Where answers end is not saved with the adapters: %s", error)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that peft asks transformers for checkpointing by its older name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def students_peft(model: Any, given: Any) -> Any:
    """The PeftConfig to train with, or None: of the trainer's argument, or of a StudentConfig's own section."""
    section = model.peft if isinstance(model, StudentConfig) else None
    if section is None:
        return given
    if given is not None:
        raise ValueError("Both peft_config and StudentConfig.peft are given; keep one.")
    config = peft_config(section)
    config.revision = model.revision
    return config


def peft_section(config: Any) -> dict[str, Any]:
    """A peft config as `student.peft`: its type, and what differs from the defaults of its class."""
    usual, section = type(config)(), {"type": str(getattr(config.peft_type, "value", config.peft_type)).lower()}
    for name in {known.name for known in dataclasses.fields(config)} - set(SET_HERE):
        value = getattr(config, name)
        if value != getattr(usual, name):
            section[name] = plain(sorted(value) if isinstance(value, set) else value)
    return dict(sorted(section.items()))
