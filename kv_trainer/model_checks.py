"""What configs and tokenizers tell of models without their weights."""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .arguments import ModelConfig

# Families, of those that can be captured, with a table of positions.
LEARNED_POSITIONS = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "openai-gpt")


def check_name(name: Any, where: str = "") -> None:
    """ValueError for a teacher's name that cannot be part of a file's and a module's. where: its place in a recipe."""
    place = f"{name!r} {where}".rstrip()
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"The teacher {place} needs a name of letters, digits, _ and - only.")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"The teacher {place} needs another name: torch has a use of its own for this one.")


def tokenizer_place(model: ModelConfig) -> tuple[str | None, str | None]:
    """The name of a section's tokenizer, and its revision: that of the section where both are in one repository."""
    name = model.tokenizer or model.model
    return name, model.revision if name in (model.model, getattr(model, "config", None)) else None


def is_here(name: str, file: str, revision: str | None) -> bool:
    """Whether a model is a folder, or its `file` has been fetched from the Hub before."""
    return os.path.exists(name) or isinstance(try_to_load_from_cache(name, file, revision=revision), str)


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


def check_whole(place: str, model: PreTrainedModel) -> None:
    """ValueError for a model under tensor parallelism: each process sees the keys and values of some heads alone."""
    if (model.tp_size or 1) > 1:
        raise ValueError(
            f"{place} was loaded in {model.tp_size} parts (tensor parallelism), and has no whole keys and values; load "
            "it without tp_plan and distributed_config. ZeRO-3 and FSDP2 deal out weights, not states."
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
    name, revision = tokenizer_place(model)
    if not name or not is_here(name, "tokenizer_config.json", revision):
        return None
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **offline(name, revision))
    check_words(tokenizer, name)
    if not tokenizer.is_fast:
        raise ValueError(f"{place}: the tokenizer {name} is a slow one and gives no offsets; give a fast one.")
    if model.chat and not tokenizer.chat_template:
        raise ValueError(f"{place}: chat is true, but the tokenizer {name} has no chat template; set chat: false.")
    return tokenizer
