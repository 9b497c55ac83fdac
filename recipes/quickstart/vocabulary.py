"""The byte-level BPE tokenizers of the quickstart's models."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LIMIT = 128  # longest sequence of any quickstart model


def byte_level_tokenizer(texts: list[str], split: str, merges: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges stay inside the pieces of the regex `split`; `<s>` comes before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + merges, special_tokens=special,
        initial_alphabet=alphabet, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # Bytes are never unknown; the name keeps Qwen2's own class from adding an unknown token outside the model's rows.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<pad>", model_max_length=LIMIT, clean_up_tokenization_spaces=False)
