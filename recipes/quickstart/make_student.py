"""Write student/: the student's config, and its tokenizer, where a space joins what follows it. It has no weights.

students/small and students/large are configs alone, of students of other sizes with the same tokenizer.

python recipes/quickstart/make_student.py
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig
from vocabulary import LIMIT, byte_level_tokenizer

HERE = Path(__file__).parent
# folder -> hidden size, MLP, layers, heads of width 16
SIZES = {"student": (64, 176, 5, 4), "students/small": (32, 96, 3, 2), "students/large": (128, 352, 6, 8)}


def main() -> None:
    rows = [json.loads(line) for line in (HERE / "data" / "train.jsonl").open()]
    texts = [row["prompt"] + row["completion"] for row in rows]
    tokenizer = byte_level_tokenizer(texts, r" ?[A-Z]| ?\d| ?[a-z]+| ?#+|.", 120)
    for folder, (hidden, mlp, layers, heads) in SIZES.items():
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 2e4}, max_position_embeddings=LIMIT,
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        config.save_pretrained(HERE / folder)
    tokenizer.save_pretrained(HERE / "student")
    print(f"student: vocabulary {len(tokenizer)}")


if __name__ == "__main__":
    main()
