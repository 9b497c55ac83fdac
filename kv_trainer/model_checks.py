"""What can be told of a recipe's models without their weights: from configs and tokenizers in local folders."""

from __future__ import annotations

import os

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .arguments import ModelConfig, Recipe

# Families, of those that can be captured, with a table of positions.
LEARNED_POSITIONS = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "openai-gpt")


def check_models(recipe: Recipe) -> list[str]:
    """What configs and tokenizers in local folders tell without weights. ValueError names the setting to change.

    No code of a model is run, whatever the recipe says, for it may be a stranger's. Returns what was left out for that.
    """
    skipped = []
    for where, model in {"student": recipe.student, **{f"teachers.{n}": t for n, t in recipe.teachers.items()}}.items():
        if model.trust_remote_code:
            skipped.append(f"{where} is not checked: it has trust_remote_code, and no code of a model is run here.")
            continue
        place = f"{where} of {recipe.path}"
        tokenizer = check_tokenizer(model, place)
        shape = model.model or getattr(model, "config", None)
        if not shape or not os.path.exists(shape):
            continue
        config = AutoConfig.from_pretrained(shape, trust_remote_code=False).get_text_config()
        if tokenizer is not None and (count := tokens_of_text(tokenizer)) > config.vocab_size:
            raise ValueError(
                f"{place}: the tokenizer has {count} tokens, {shape} only {config.vocab_size}; give its own."
            )
        check_length(place, config, recipe.args.data.max_length)
        kept, layers = getattr(model, "keep_layers", None), config.num_hidden_layers
        if kept is not None and (not kept or len(set(kept)) < len(kept) or not set(kept) <= set(range(layers))):
            raise ValueError(f"{place}: keep_layers is {kept}; give different layers from 0 to {layers - 1}.")
    return skipped


def check_length(place: str, config: PreTrainedConfig, length: int) -> None:
    """ValueError where rows may be longer than a table of positions that a model has learned; RoPE has none."""
    most = getattr(config, "max_position_embeddings", None)
    if config.model_type in LEARNED_POSITIONS and most is not None and length > most:
        raise ValueError(
            f"{place}: data.max_length is {length}, but this {config.model_type} has {most} positions and fails beyond "
            f"them; set data.max_length to {most} at most."
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
    """The tokenizer of a local folder, or None where it is not local."""
    name = model.tokenizer or model.model
    if not name or not os.path.exists(name):
        return None
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    check_words(tokenizer, name)
    if not tokenizer.is_fast:
        raise ValueError(f"{place}: the tokenizer {name} is a slow one and gives no offsets; give a fast one.")
    if model.chat and not tokenizer.chat_template:
        raise ValueError(f"{place}: chat is true, but the tokenizer {name} has no chat template; set chat: false.")
    return tokenizer
