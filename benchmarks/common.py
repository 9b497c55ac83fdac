"""What the benchmarks share: models, rows and tokenizers made from a seed, whole steps, interleaved timing, JSON rows.

Models have random weights: neither time nor memory depends on their values. Texts are made of random words and read
through byte-level BPE tokenizers trained on such text, of as many tokens as are asked for: unlike tokenizers cut the
same text at other places. On a CPU, time is processor time, which other processes on the machine disturb less, and
memory counts every allocation; on a GPU it is time by the clock, after all kernels, and what torch allocated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Trainer

from kv_trainer.arguments import EvaluationConfig, MultiTeacherKVConfig
from kv_trainer.data import Reader
from kv_trainer.losses import DistillationLoss
from kv_trainer.teachers import Teacher
from kv_trainer.trainer import MultiTeacherKVTrainer

COMMON = {"max_position_embeddings": 16384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# hidden, MLP, layers, heads; two key/value heads each
SIZES = {
    "tiny": (64, 176, 2, 4), "small": (256, 688, 4, 4), "medium": (512, 1408, 8, 8), "large": (640, 1728, 12, 10),
    "0.5B": (896, 4864, 24, 14), "1.5B": (1536, 8960, 28, 12),
}  # fmt: skip
LARGER = {"tiny": "small", "small": "medium", "medium": "large", "0.5B": "1.5B"}


def build(
    size: str, vocabulary: int = 2000, family: str = "llama", seed: int = 0, attention: str | None = None,
    **changes: Any,
) -> PreTrainedModel:  # fmt: skip
    """A random model."""
    torch.manual_seed(seed)
    hidden, mlp, layers, heads = SIZES[size]
    shape = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocabulary,
             "num_attention_heads": heads, "num_key_value_heads": 2}  # fmt: skip
    config = AutoConfig.for_model(family, **{**COMMON, **shape, "tie_word_embeddings": True, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


# ---- rows


def some_text(words: int, seed: int) -> str:
    """Random words, some of them often, as in a language."""
    draw = random.Random(seed)
    known = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(400)]
    return " ".join(draw.choices(known, weights=[1 / (rank + 1) for rank in range(400)], k=words))


@cache
def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of that many tokens, with a chat template that only joins the turns."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(
        [some_text(20_000, seed=0)],
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def text_rows(count: int, length: int, reader: PreTrainedTokenizerFast) -> Dataset:
    """Rows of `prompt`, `completion` and its last word as `answer`: just over `length` of this tokenizer's tokens."""
    rows = []
    for seed in range(1, count + 1):
        words = some_text(length, seed).split()
        sizes = [len(ids) for ids in reader([f" {word}" for word in words])["input_ids"]]
        while sum(sizes) > length + 8:
            words.pop(), sizes.pop()
        cut = len(words) // 3
        rows.append({"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:]), "answer": words[-1]})
    return Dataset.from_list(rows)


# ---- trainers and their steps


def make_trainer(
    student: PreTrainedModel,
    teachers: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerFast]],
    losses: dict[str, DistillationLoss],
    rows: Dataset,
    batch: int,
    reads: PreTrainedTokenizerFast,
    device: str = "cpu",
    **changes: Any,
) -> MultiTeacherKVTrainer:
    """A trainer on rows of text. reads: the student's tokenizer. changes: of the arguments."""
    args = MultiTeacherKVConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=device == "cpu", report_to="none", disable_tqdm=True,
        bf16=device != "cpu", per_device_train_batch_size=batch, save_strategy="no",
        evaluation=EvaluationConfig(generate=False), losses=losses, **changes,
    )  # fmt: skip
    args.data.max_length = 16384
    given = {name: Teacher(model, Reader(reader)) for name, (model, reader) in teachers.items()}
    trainer = MultiTeacherKVTrainer(student, given, args, rows, processing_class=reads)
    trainer.model.to(args.device)
    return trainer


def plain_trainer(ours: MultiTeacherKVTrainer, student: PreTrainedModel) -> Trainer:
    """transformers' own Trainer of an equal student, on the same encoded rows."""

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        batch = type(ours.data_collator)(ours.data_collator.pad_token_id, {})(rows)
        return {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}

    return Trainer(model=student, args=ours.args, train_dataset=ours.train_dataset, data_collator=collate)


def stepper(trainer: Trainer) -> Callable[[], None]:
    """One whole optimizer step, loading and collation included; the batches come round again and again."""
    trainer.create_optimizer_and_scheduler(num_training_steps=1_000_000)
    batches = endless(trainer)

    def step() -> None:
        samples, count = trainer.get_batch_samples(batches, 1, trainer.args.device)
        trainer.training_step(trainer.model, samples[0], count)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()

    return step


def endless(trainer: Trainer) -> Iterator[Any]:
    while True:
        yield from trainer.get_train_dataloader()


def backbones(ours: MultiTeacherKVTrainer) -> Callable[[], None]:
    """Every teacher's backbone on the next batch; its loading is not counted."""
    prepared = [ours._prepare_inputs(batch)["teachers"] for batch in ours.get_train_dataloader()]
    turn = iter(range(10**9))
    precision = ours.compute_loss_context_manager

    def step() -> None:
        batch = prepared[next(turn) % len(prepared)]
        with torch.inference_mode(), precision():
            for name, teacher in ours.teachers.items():
                text = {k: batch[name][k] for k in ("input_ids", "attention_mask")}
                teacher.model.base_model(**text, use_cache=False)

    return step


# ---- measuring


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    parts: Mapping[str, Callable[[], Any]], repeats: int, steps: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds a step of every part, one value a repeat. The parts take turns, so that a slow moment falls on all."""
    for part in parts.values():
        part()
        part()
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats):
        for name in parts if repeat % 2 else reversed(parts):
            began = now(device)
            for _ in range(steps):
                parts[name]()
            taken[name].append((now(device) - began) / steps)
    return taken


def peak_memory(work: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that `work` has allocated at any one moment, beyond what there was before."""
    if device != "cpu":
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


def kept(trainer: Trainer) -> int:
    """Bytes of the weights of student and projectors, and of the optimizer's state."""
    state = [x for held in trainer.optimizer.state.values() for x in held.values() if isinstance(x, torch.Tensor)]
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *state]
    return sum(x.numel() * x.element_size() for x in tensors)


def step_memory(trainer: Trainer, device: str = "cpu") -> int:
    """Bytes alive at the peak of a step: weights, gradients, optimizer, activations; not the teachers' weights."""
    step = stepper(trainer)
    step()  # the optimizer's state comes with the first
    return kept(trainer) + peak_memory(step, device)


def over(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def exponent(sizes: Mapping[int, float]) -> float:
    """The slope of the logarithm of a cost over that of the size, by least squares."""
    x, y = ([math.log(v) for v in values] for values in (sizes, sizes.values()))
    return statistics.linear_regression(x, y).slope


def row(name: str, ratios: Sequence[float], about: str) -> dict[str, Any]:
    """A row of docs/results/benchmarks.json; printed too."""
    low, mid, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"{name:34s} {mid:.3f}  ({low:.3f} to {high:.3f}, {len(ratios)} repeats)  {about}", flush=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *without_file(sys.argv[1:])])
    return {"name": name, "ratio": mid, "low": low, "high": high, "repeats": len(ratios), "command": command,
            "about": about}  # fmt: skip


def without_file(arguments: Sequence[str]) -> list[str]:
    """The arguments that decide what is measured."""
    found = list(arguments)
    if "--json" in found:
        del found[found.index("--json") : found.index("--json") + 2]
    return found


def parser(about: str | None, **defaults: int) -> argparse.ArgumentParser:
    """--device, --threads, --repeats, --quick and --json, and a whole number for every default."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, value in {"threads": 1, "repeats": 7, **defaults}.items():
        found.add_argument(f"--{name}", type=int, default=value)
    found.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    found.add_argument("--json", type=Path)
    return found


def sized(found: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with --size of the student; its teachers are the next LARGER."""
    found.add_argument("--size", choices=LARGER, default="medium")
    options = found.parse_args()
    if options.quick:
        options.size, options.length, options.repeats, options.steps = "tiny", 64, 2, 1
    return options


def save(path: Path | None, rows: Sequence[Mapping[str, Any]], device: str = "cpu", **more: Any) -> None:
    """What was measured, with the machine and the versions."""
    if path is not None:
        about = {"machine": machine(device), "versions": versions()}
        path.write_text(json.dumps({**about, "rows": list(rows), **more}, indent=1) + "\n")


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "trl", "kv_trainer"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
