"""Loading students, teachers and tokenizers from their section of a recipe."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config

from .arguments import ModelConfig, StudentConfig, TeacherConfig
from .model_checks import check_words, tokenizer_place

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists in a config with one entry a layer


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer a section names, else its model's own; a missing pad token becomes the end token."""
    name, revision = tokenizer_place(config)
    assert name is not None, "recipes.py checks that a model without weights names its tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    check_words(tokenizer, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """Inside the block models are loaded whole, on every rank, also in a ZeRO-3 run.

    There `from_pretrained` would deal the weights of a teacher out to ranks that no engine of its own gathers again,
    and shapes of the student would read (0,). The student's engine partitions it later.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()


def load_pretrained(config: ModelConfig, device: torch.device | None = None) -> PreTrainedModel:
    """The model a section names. device: where quantised weights are made; others are moved later."""
    assert config.model is not None, "recipes.py checks that it is there"
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    if isinstance(config, TeacherConfig) and config.quantization:
        options["quantization_config"] = quantization(config.quantization, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    if isinstance(config, TeacherConfig) and config.device_map:
        check_devices(config.device_map)
        options["device_map"] = config.device_map
    try:
        return AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, use_safetensors=True, **options)
    except SafetensorError as error:
        raise ValueError(f"The weights of {config.model} cannot be read ({error}); fetch them again.") from error


def check_devices(device_map: str | dict[str, Any]) -> None:
    """ValueError for a GPU that is not there: torch would fail with an assertion of its own."""
    count = torch.cuda.device_count()
    for place in device_map.values() if isinstance(device_map, dict) else [device_map]:
        named = re.fullmatch(r"cuda(?::(\d+))?", str(place))
        if named and int(named[1] or 0) >= count:
            raise ValueError(
                f"device_map names {place}, and this process sees {count} GPUs; name one it sees, or auto."
            )


def load_random(config: ModelConfig, seed: int) -> PreTrainedModel:
    """A model of the same architecture whose weights are drawn from `seed`; the state of torch's own is kept."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return drawn(str(config.model), config)


def drawn(place: str, config: ModelConfig) -> PreTrainedModel:
    """A model of random weights and of the shape that is told at `place`, which `config.revision` is of."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    shape = AutoConfig.from_pretrained(place, revision=config.revision, **options)
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.revision and config.trust_remote_code and AutoModelForCausalLM.__name__ in getattr(shape, "auto_map", {}):
        options["code_revision"] = config.revision
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    return AutoModelForCausalLM.from_config(shape, dtype=dtype, **options)


def quantization(bits: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """Of weights "8bit" (LLM.int8) or "4bit" (NF4, computed in `dtype`). ValueError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization: {bits} needs bitsandbytes, which is not installed: pip install bitsandbytes.")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def load_student(config: StudentConfig) -> PreTrainedModel:
    """A pretrained, pruned or random student, with the layers and the freezing its section asks for."""
    if config.config is not None:
        model = drawn(config.config, config)
    else:
        model = load_pretrained(config)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"student.model, '{config.model}', is a folder of adapters, and nothing in it would learn; give the "
                "base as model and new adapters under peft, or merge the adapters into the base first."
            )
    if config.keep_layers is not None:
        keep_layers(model, config.keep_layers)
    freeze(model, config.freeze)
    return model


def keep_layers(model: PreTrainedModel, kept: list[int]) -> None:
    """Prune a decoder in place to some of its layers, in the given order; its config follows."""
    config = model.config.get_text_config()
    total = config.num_hidden_layers
    wrong = [i for i in kept if not 0 <= i < total]
    if wrong or not kept or len(set(kept)) < len(kept):
        raise ValueError(f"student.keep_layers is {kept}; give different layers from 0 to {total - 1}.")
    parent, name = layer_list(model)
    layers = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(layers[i] for i in kept))
    for new, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new
    each = {key: getattr(config, key, None) or () for key in PER_LAYER}
    config.num_hidden_layers = len(kept)
    try:
        for key, told in each.items():
            now = [told[i] for i in kept] if told else told
            if now != (getattr(config, key, None) or ()):  # some derive it, and it cannot be set
                setattr(config, key, now)
        with torch.device("meta"):
            again = type(model)(copy.deepcopy(model.config))
    except (AttributeError, IndexError, TypeError, ValueError):
        again = None
    if again is None or not is_as(model, again):  # it would be saved, and loaded as something else
        raise ValueError(
            f"student.keep_layers is {kept}, which {type(config).__name__} has no words for: it derives what a layer "
            "is from its place. Layers of the kinds that the new places have may do; else leave keep_layers out."
        )


def is_as(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have parameters of the same shapes, and the one each number that a module of the other has.

    Such as GPT-2's scaling by layer. What the other has not, it does not use: RoPE of a kind of layers that are gone.
    """

    def shapes(x: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in x.named_parameters()}

    def numbers(x: nn.Module) -> dict[str, Any]:
        return {
            f"{path}.{name}": value
            for path, module in x.named_modules()
            for name, value in vars(module).items()
            if type(value) in (int, float) and name != "num_hidden_layers"
        }

    ours, theirs = numbers(model), numbers(other)
    return shapes(model) == shapes(other) and all(name in ours and ours[name] == theirs[name] for name in theirs)


def layer_list(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module, and the name of its attribute, that holds all layers of a decoder."""
    total = model.config.get_text_config().num_hidden_layers
    children = [(m, name, child) for m in model.modules() for name, child in m.named_children()]
    lists = [(m, name) for m, name, child in children if isinstance(child, nn.ModuleList) and len(child) == total]
    if len(lists) != 1:
        raise ValueError(f"{type(model).__name__} has {len(lists)} lists of {total} layers, where one is needed.")
    return lists[0]


def end_tokens(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> list[int]:
    """At which tokens an answer ends: the tokenizer's, and those of a checkpoint that are special in this tokenizer.

    Others are of another vocabulary: a config that does not name its end has that of its family, LlamaConfig token 2.
    """
    own = getattr(config, "eos_token_id", None)
    own = list(own) if isinstance(own, (list, tuple)) else [own]
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    ends = [tokenizer.eos_token_id, *(i for i in own if i in special)]
    return [i for i in dict.fromkeys(ends) if i is not None]


def stop_where_taught(model: nn.Module, tokenizer: PreTrainedTokenizerBase, turn_end: int | None) -> None:
    """Let what a model generates end where its tokenizer's texts, and a chat's turns, do; its checkpoint keeps that."""
    config = getattr(model, "generation_config", None)
    ends = end_tokens(tokenizer, config)
    ends += [turn_end] if turn_end is not None and turn_end not in ends else []
    if config is not None and ends:
        config.eos_token_id = ends[0] if len(ends) == 1 else ends


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stop the gradient of every parameter whose name contains a pattern; one that matches nothing is an error."""
    for pattern in patterns:
        named = [p for n, p in model.named_parameters() if pattern in n]
        if not named:
            raise ValueError(f"student.freeze: no parameter's name contains '{pattern}'.")
        for parameter in named:
            parameter.requires_grad_(False)


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers cut every text alike: same vocabulary and same rules."""
    if first.get_vocab() != second.get_vocab():
        return False
    a, b = getattr(first, "backend_tokenizer", None), getattr(second, "backend_tokenizer", None)
    return first is second or a is None or b is None or a.to_str() == b.to_str()
