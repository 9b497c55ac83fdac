"""Write student/: the student's config, and its tokenizer, where a space joins what follows it. It has no weights.

python recipes/quickstart/make_student.py
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig
from vocabulary import LIMIT, byte_level_tokenizer

HERE = Path(__file__).parent


def main() -> None:
    rows = [json.loads(line) for line in (HERE / "data" / "train.jsonl").open()]
    texts = [row["prompt"] + row["completion"] for row in rows]
    tokenizer = byte_level_tokenizer(texts, r" ?[A-Z]| ?\d| ?[a-z]+| ?#+|.", 120)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=176, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 2e4},
        max_position_embeddings=LIMIT, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"])
    config.save_pretrained(HERE / "student")
    tokenizer.save_pretrained(HERE / "student")
    print(f"student: vocabulary {len(tokenizer)}")


if __name__ == "__main__":
    main()
