"""Train the quickstart's two specialist teachers from scratch, each on its own task alone.

python recipes/quickstart/make_teachers.py chain      # Qwen2: GQA, 4 layers, characters, theta 1e4
python recipes/quickstart/make_teachers.py letters    # Llama: MQA, 6 layers, byte-level BPE, theta 5e4

Rows are generated without end and never repeat; the prompts of data/*.jsonl are kept out.
About 45 minutes on one core each. Writes teachers/<task>/ (float16) and prints exact-answer accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path

import torch
from tasks import unique_rows
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from vocabulary import LIMIT, byte_level_tokenizer

HERE = Path(__file__).parent


def build(task: str, texts: list[str]):
    if task == "chain":
        tokenizer = byte_level_tokenizer(texts, r".", 0)
        config = Qwen2Config(
            hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        kind = Qwen2ForCausalLM
    else:
        tokenizer = byte_level_tokenizer(texts, r" ?[A-Z]|[0-9]| ?[a-z]+| ?#+|.", 64)
        config = LlamaConfig(
            hidden_size=96, intermediate_size=288, num_hidden_layers=6, num_attention_heads=4, head_dim=48,
            num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 5e4})
        kind = LlamaForCausalLM
    config.update(dict(vocab_size=len(tokenizer), max_position_embeddings=LIMIT, tie_word_embeddings=True,
                       bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=tokenizer.pad_token_id))
    return kind(config), tokenizer


def batch_of(rows, tokenizer):
    """Right-padded `<s> prompt completion </s>`; labels on the completion only."""
    prompts = tokenizer([row["prompt"] for row in rows], add_special_tokens=False).input_ids
    completions = tokenizer([row["completion"] for row in rows], add_special_tokens=False).input_ids
    ids = [[tokenizer.bos_token_id, *p, *c, tokenizer.eos_token_id] for p, c in zip(prompts, completions)]
    width = max(map(len, ids))
    inputs = torch.full((len(ids), width), tokenizer.pad_token_id)
    labels = torch.full((len(ids), width), -100)
    for i, (row, prompt) in enumerate(zip(ids, prompts)):
        inputs[i, : len(row)] = torch.tensor(row)
        labels[i, len(prompt) + 1 : len(row)] = torch.tensor(row[len(prompt) + 1 :])
    return inputs, labels


@torch.no_grad()
def exact(model, tokenizer, rows) -> float:
    model.eval()
    right = 0
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        ids = [[tokenizer.bos_token_id, *tokenizer(r["prompt"], add_special_tokens=False).input_ids] for r in part]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=90, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        right += sum(t.split("####")[-1].strip() == r["answer"] for t, r in zip(texts, part))
    model.train()
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("chain", "letters"))
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    splits = {s: [json.loads(x) for x in (HERE / "data" / f"{s}.jsonl").open()] for s in ("train", "dev", "test")}
    held_out = {row["prompt"] for rows in splits.values() for row in rows}
    dev, test = ([r for r in splits[s] if r["task"] == options.task] for s in ("dev", "test"))
    stream = unique_rows(options.task, options.seed, held_out)
    model, tokenizer = build(options.task, [r["prompt"] + r["completion"] for r in islice(stream, 2000)])
    print(f"{options.task}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)

    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
                                  lr=options.learning_rate, betas=(0.9, 0.98))
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(
        (s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, s / options.steps))))
    began = time.time()
    model.train()
    for step in range(1, options.steps + 1):
        inputs, labels = batch_of(list(islice(stream, options.batch)), tokenizer)
        loss = model(input_ids=inputs, attention_mask=(inputs != tokenizer.pad_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            score = f"  dev {exact(model, tokenizer, dev):.2f}" if step % 500 == 0 else ""
            print(f"{step:5d}  loss {loss.item():.4f}{score}  {time.time() - began:.0f}s", flush=True)
    model.eval()
    print(f"test exact {exact(model, tokenizer, test):.3f}", flush=True)
    target = options.output or HERE / "teachers" / options.task
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main()
