"""Peak memory of a training step with one teacher and with five: the second must not be much more than the first.

python benchmarks/teachers_memory.py [--quick] [--device cpu] [--batch 8] [--length 256] [--json FILE]

Five unlike teachers, each about as large as the student (Llama, 4 layers, width 256, 4 heads, 2 KV heads, vocabulary
2,000), on one batch that all read whole, in the step of MultiTeacherKVTrainer: teachers, student, losses, backward,
AdamW. Counted is all that is alive at once, weights, gradients and optimizer state of student and projectors included,
weights of teachers left out. On a CPU every allocation counts, as torch.profiler sees it; on a GPU it is
torch.cuda.max_memory_allocated. The one teacher is the one of the five with the lowest peak, in each setting.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kv_trainer.arguments import EvaluationConfig, MultiTeacherKVConfig, ProjectorConfig
from kv_trainer.losses import CrossEntropy, DistillationLoss, KVLoss, KVRelationLoss
from kv_trainer.trainer import MultiTeacherKVTrainer

VOCABULARY = 2000
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 16384, "bos_token_id": 1, "eos_token_id": 2,
          "pad_token_id": 0}  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {**SMALL, "head_dim": 64}),
    "deep": ("llama", {**SMALL, "num_hidden_layers": 6, "hidden_size": 208, "intermediate_size": 560}),
    "gemma2": ("gemma2", {**SMALL, "head_dim": 96, "num_key_value_heads": 1, "query_pre_attn_scalar": 96}),
    "neox": ("gpt_neox", {**SMALL, "intermediate_size": 1024}),  # as many KV heads as heads
    "cohere": ("cohere", {**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 1}),
}
SETTINGS: dict[str, tuple[DistillationLoss, str]] = {
    "kv_relation": (KVRelationLoss(), "student_to_teacher"),
    "kv, student to teacher": (KVLoss(), "student_to_teacher"),
    "kv, teacher to student": (KVLoss(), "teacher_to_student"),
}


def build(family: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **config}))


def random_rows(count: int, length: int, teachers: Sequence[str], seed: int = 0) -> Dataset:
    """Encoded rows of random tokens that all models read alike; the second half of each is supervised."""
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [[-100] * (length // 2) + row[length // 2 :] for row in ids]
    columns: dict[str, Any] = {"input_ids": ids, "labels": labels}
    for name in teachers:
        columns |= {f"{name}/input_ids": ids, f"{name}/labels": labels, f"{name}/index": [list(range(length))] * count}
        columns[f"{name}/supervised"] = [length - length // 2] * count
    return Dataset.from_dict(columns)


def make_trainer(
    student: PreTrainedModel, teachers: dict[str, PreTrainedModel], losses: dict[str, DistillationLoss],
    rows: Dataset, batch: int, device: str = "cpu", **changes: Any,
) -> MultiTeacherKVTrainer:  # fmt: skip
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", bos_token="1", eos_token="2")
    args = MultiTeacherKVConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=device == "cpu", report_to="none", disable_tqdm=True,
        per_device_train_batch_size=batch, evaluation=EvaluationConfig(generate=False), save_strategy="no",
        losses=losses, **changes,
    )  # fmt: skip
    trainer = MultiTeacherKVTrainer(student, teachers, args, rows, processing_class=tokenizer)
    if args.device.type == "cuda":
        trainer.model.to(args.device)
    trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
    return trainer


def stepper(trainer: MultiTeacherKVTrainer) -> Callable[[], None]:
    """A whole optimizer step on the trainer's first rows."""
    rows = [trainer.train_dataset[i] for i in range(trainer.args.per_device_train_batch_size)]
    batches = [trainer.data_collator(rows)]

    def step() -> None:
        samples, count = trainer.get_batch_samples(iter(batches), 1, trainer.args.device)
        trainer.training_step(trainer.model, samples[0], count)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    return step


def peak_memory(work: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that `work` has allocated at any one moment, beyond what there was before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def kept(trainer: MultiTeacherKVTrainer) -> int:
    """Bytes of the weights of student and projectors, and of the optimizer's state."""
    state = [x for held in trainer.optimizer.state.values() for x in held.values() if isinstance(x, torch.Tensor)]
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *state]
    return sum(x.numel() * x.element_size() for x in tensors)


def step_peak(names: Sequence[str], setting: str, options: argparse.Namespace) -> float:
    """MiB at the peak of a step with these teachers."""
    loss, direction = SETTINGS[setting]
    teachers = {name: build(TEACHERS[name][0], 1, **TEACHERS[name][1]) for name in names}
    trainer = make_trainer(
        build("llama", **SMALL), teachers, {"cross_entropy": CrossEntropy(), setting.split(",")[0]: loss},
        random_rows(options.batch, options.length, names), options.batch, options.device,
        projector=ProjectorConfig(direction=direction),
    )  # fmt: skip
    step = stepper(trainer)
    step()  # the optimizer's state comes with the first
    return (kept(trainer) + peak_memory(step, options.device)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small batch, to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.batch, options.length = 2, 64
    torch.set_num_threads(options.threads)
    found = {}
    print(f"MiB at the peak of a step, batch {options.batch} x {options.length}, {options.device}")
    for setting in SETTINGS:
        alone = {name: step_peak([name], setting, options) for name in TEACHERS}
        least = min(alone, key=alone.get)
        five = step_peak(list(TEACHERS), setting, options)
        found[setting] = {"alone": alone, "five": five, "ratio": five / alone[least]}
        print(f"{setting:24s} one ({least}) {alone[least]:7.1f}  five {five:7.1f}  ratio {five / alone[least]:.3f}")
    if options.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__}  # fmt: skip
        machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu"
        about = {"batch": options.batch, "length": options.length, "device": options.device, "machine": machine}
        options.json.write_text(json.dumps({**about, "versions": versions, "settings": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
