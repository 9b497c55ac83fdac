"""A step with two stored teachers against a plain step of the same student, and against one with live teachers.

python benchmarks/stored.py [--size medium] [--length 256] [--batch 4] [--bits 8] [--repeats 7] [--json FILE]

stored_step_over_sft: KV relation from a store, loading included, over a step of transformers' own Trainer on the same
rows. stored_step_over_live: over the same with both teachers run. Models as in floor.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from common import (
    LARGER,
    build,
    interleaved,
    over,
    parser,
    plain_trainer,
    row,
    save,
    sized,
    stepper,
    text_rows,
    tokenizer,
)
from floor import VOCABULARY

from kv_trainer.recipes import load_recipe
from kv_trainer.run import build_trainer
from kv_trainer.store.precompute import precompute

TEACHERS = {"qwen2": 450, "llama": 900}


def write_recipe(folder: Path, options: Any) -> Path:
    """Models, rows and a recipe of them, all of which a store needs by name."""
    reads = tokenizer(600)
    build(options.size, VOCABULARY).save_pretrained(folder / "student")
    reads.save_pretrained(folder / "student")
    for seed, (family, tokens) in enumerate(TEACHERS.items()):
        teacher = build(LARGER[options.size], VOCABULARY, family, seed, rope_theta=1e4 * 10**seed)
        teacher.save_pretrained(folder / family)
        tokenizer(tokens).save_pretrained(folder / family)
    text_rows(4 * options.batch, options.length, reads).to_json(folder / "train.jsonl")
    recipe = {
        "student": {"model": "./student"}, "teachers": {name: {"model": f"./{name}"} for name in TEACHERS},
        "fusion": {"method": "uniform"}, "losses": {"cross_entropy": {}, "kv_relation": {}},
        "data": {"path": "./train.jsonl", "eval_split": None, "max_length": 16384},
        "store": {"path": str(folder / "store"), "bits": options.bits},
        "training": {"per_device_train_batch_size": options.batch, "output_dir": str(folder / "out"),
                     "disable_tqdm": True, "use_cpu": options.device == "cpu", "bf16": options.device != "cpu"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def main() -> None:
    options = sized(parser(__doc__, length=256, batch=4, bits=8, steps=2))
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = write_recipe(folder, options)
        precompute(load_recipe(recipe))
        from_store = [f"--teachers.{name}.source=store" for name in TEACHERS]
        ours, live = build_trainer(load_recipe(recipe, from_store)), build_trainer(load_recipe(recipe))
        plain = plain_trainer(ours, build(options.size, VOCABULARY).to(ours.args.device))
        parts = {"stored": stepper(ours), "live": stepper(live), "plain": stepper(plain)}
        taken = interleaved(parts, options.repeats, options.steps, options.device)
    about = f"{options.size} student, {options.bits} bits, batch {options.batch} x {options.length}"
    save(options.json, [
        row("stored_step_over_sft", over(taken["stored"], taken["plain"]), about),
        row("stored_step_over_live", over(taken["stored"], taken["live"]), about),
    ], options.device, seconds=taken)  # fmt: skip


if __name__ == "__main__":
    main()
