"""Models of real size with random weights: tokens a second and peak memory of a step, under whatever launches it.

python benchmarks/scale.py [--steps 12] [--length 1024] [--batch 4] [--placement replicated] [--tiny]
accelerate launch --use_deepspeed --deepspeed_config_file deepspeed_configs/zero3.json benchmarks/scale.py

Student of 0.5B parameters, teachers of 1.5B and 3B, of Qwen2's shapes, in bfloat16; KV relation of two teachers.
--tiny: the same on a CPU, with models of nothing, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from kv_trainer.arguments import EvaluationConfig, MultiTeacherKVConfig
from kv_trainer.callbacks import peak_memory_mb, read_metrics
from kv_trainer.data import Reader
from kv_trainer.losses import CrossEntropy, KVRelationLoss
from kv_trainer.teachers import Teacher
from kv_trainer.trainer import MultiTeacherKVTrainer

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
# hidden, MLP, layers, heads; two key/value heads each, a vocabulary of 151,936
SIZES = {"0.5B": (896, 4864, 24, 14), "1.5B": (1536, 8960, 28, 12), "3B": (2048, 11008, 36, 16), "tiny": (32, 64, 3, 4)}
WARM = 3


def model(size: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    hidden, mlp, layers, heads = SIZES[size]
    config = Qwen2Config(
        vocab_size=151_936 if size != "tiny" else 512, hidden_size=hidden, intermediate_size=mlp,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with device:
        return Qwen2ForCausalLM._from_config(config, dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--placement", choices=["replicated", "sharded", "offloaded"], default="replicated")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    words = "".join(random.Random(0).choices("0123456789+-= abc", k=options.length * 4))
    with tempfile.TemporaryDirectory() as folder:
        args = MultiTeacherKVConfig(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch, logging_steps=1,
            bf16=not options.tiny, use_cpu=options.tiny, report_to="none", disable_tqdm=True, save_strategy="no",
            gradient_checkpointing=True, evaluation=EvaluationConfig(generate=False),
            losses={"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss()},
        )  # fmt: skip
        args.data.max_length = options.length
        tokenizers = [AutoTokenizer.from_pretrained(QUICKSTART / name) for name in ("student", "teachers/chain")]
        half, sizes = (torch.float32, ["tiny"] * 3) if options.tiny else (torch.bfloat16, ["0.5B", "1.5B", "3B"])
        device = args.device if options.placement == "replicated" else torch.device("cpu")
        teachers = {
            name: Teacher(model(size, half, device), Reader(tokenizers[1]), placement=options.placement)
            for name, size in zip(("small", "large"), sizes[1:])
        }
        rows = Dataset.from_list([{"text": words[i : i + 3 * options.length]} for i in range(64)])
        trainer = MultiTeacherKVTrainer(
            model(sizes[0], torch.float32, args.device), teachers, args, rows, processing_class=tokenizers[0]
        )
        trainer.train()
        if trainer.is_world_process_zero():
            logs = {row["step"]: row["time"] for row in read_metrics(Path(folder) / "metrics.jsonl") if "loss" in row}
            seconds = (logs[options.steps] - logs[WARM]) / (options.steps - WARM)
            tokens = args.world_size * options.batch * options.length
            engine = type(trainer.model_wrapped).__name__
            found = {"engine": engine, "processes": args.world_size, "placement": options.placement,
                     "tokens_per_second": round(tokens / seconds), "peak_memory_mb": peak_memory_mb()}  # fmt: skip
            print(json.dumps(found))


if __name__ == "__main__":
    main()
