"""What can be told of a recipe's models without their weights: from configs and tokenizers."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME

from .arguments import ModelConfig, Recipe

# Families, of those that can be captured, with a table of positions.
LEARNED_POSITIONS = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "openai-gpt")


def check_models(recipe: Recipe) -> list[str]:
    """What the configs and tokenizers that are on this machine tell without weights. ValueError names what to change.

    No code of a model is run, whatever the recipe says, for it may be a stranger's, and the Hub is not asked. Returns
    what was left out for either, and what a run will need that is not here yet.
    """
    from .blueprint import check_build

    skipped, configs = [], {}
    for where, model in recipe.models.items():
        if model.trust_remote_code:
            skipped.append(f"{where} is not checked: it has trust_remote_code, and no code of a model is run here.")
            continue
        place = f"{where} of {recipe.path}"
        tokenizer = check_tokenizer(model, place)
        shape = model.model or getattr(model, "config", None)
        if not shape or not is_here(shape, "config.json", model.revision):
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
    return skipped + check_build(recipe, configs)


def is_here(name: str, file: str, revision: str | None) -> bool:
    """Whether a model is a folder, or its `file` has been fetched from the Hub before."""
    return os.path.exists(name) or isinstance(try_to_load_from_cache(name, file, revision=revision), str)


def is_adapter(folder: str) -> bool:
    """Whether a folder holds adapters without their base."""
    adapters, whole = (os.path.exists(os.path.join(folder, name)) for name in (ADAPTER_CONFIG_NAME, "config.json"))
    return adapters and not whole


def offline(name: str, revision: str | None) -> dict[str, Any]:
    return {} if os.path.exists(name) else {"revision": revision, "local_files_only": True}


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a model with a table of them has; None where any text can be read."""
    return getattr(config, "max_position_embeddings", None) if config.model_type in LEARNED_POSITIONS else None


def check_length(place: str, config: PreTrainedConfig, length: int) -> None:
    """ValueError where rows may be longer than a table of positions that a model has learned; RoPE has none."""
    most = positions_of(config)
    if most is not None and length > most:
        raise ValueError(
            f"{place}: data.max_length is {length}, but this {config.model_type} has {most} positions and fails beyond "
            f"them; set data.max_length to {most} at most."
        )


def check_vocabulary(place: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a tokenizer that has more tokens than its model."""
    if config.vocab_size < (count := tokens_of_text(tokenizer)):
        raise ValueError(
            f"{place}the tokenizer has {count} tokens, the model only {config.vocab_size}; give the model's own "
            "tokenizer, or call its resize_token_embeddings."
        )


def tokens_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model must know: all but special ones at the end that no text or chat of ours has.

    The tokenizer of the text-only Gemma 3 has one for images, which its embedding has not.
    """
    added, count = tokenizer.added_tokens_decoder, len(tokenizer)
    used = {getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "unk")}
    chat = str(tokenizer.chat_template or "")
    while count and (token := added.get(count - 1)) and token.special and count - 1 not in used:
        if token.content in chat:
            break
        count -= 1
    return count


def check_words(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """ValueError for a tokenizer that has no words: what transformers makes up for a folder that holds none."""
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ValueError(f"{name} has no tokenizer; save its own there, or name it: tokenizer.")


def check_tokenizer(model: ModelConfig, place: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer a section names, or None where it is not on this machine."""
    name, revision = model.tokenizer or model.model, None if model.tokenizer else model.revision
    if not name or not is_here(name, "tokenizer_config.json", revision):
        return None
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **offline(name, revision))
    check_words(tokenizer, name)
    if not tokenizer.is_fast:
        raise ValueError(f"{place}: the tokenizer {name} is a slow one and gives no offsets; give a fast one.")
    if model.chat and not tokenizer.chat_template:
        raise ValueError(f"{place}: chat is true, but the tokenizer {name} has no chat template; set chat: false.")
    return tokenizer
