"""What weighing positions by attention costs: time of a whole training step, and memory beside sequence length.

python benchmarks/attention_weighting.py [--quick] [--device cpu] [--repeats 15] [--json FILE]

Time: steps of MultiTeacherKVTrainer at 1,024 positions with attention none, student and teacher, in turn, compared
within a repeat; on a CPU it is processor time. A busy machine still moves it by more than what is measured, so the
share of `importance` itself, over the rest of the same step, stands beside it: all else that weighting adds is a few
[B, T] products. Student: Llama, 4 layers, width 256, 4 heads, 2 KV heads, vocabulary 2,000; the teacher is twice as
wide. Promised: at most 1.03.
Memory: the most that `importance` has allocated at once, beyond the captured states, and the exponent of its growth
in the number of positions; beside it the attention of one layer, and of all layers, as eager attention makes it.
Promised: linear, an exponent of at most 1.1.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from teachers_memory import SMALL, build, make_trainer, peak_memory, random_rows, stepper

from kv_trainer import bridge, teachers
from kv_trainer.capture import capture_kv
from kv_trainer.importance import importance
from kv_trainer.losses import CrossEntropy, KVLoss, KVRelationLoss

WIDE = {**SMALL, "hidden_size": 512, "intermediate_size": 1376}
LOSSES = {"kv_relation": KVRelationLoss, "kv": KVLoss}
ATTENTION = ("none", "student", "teacher")


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step_times(name: str, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds a step, repeat by repeat, by whose attention weighs the positions; and those spent in `importance`."""
    inside: list[float] = []

    def timed(*args: Any) -> torch.Tensor:
        began = now(options.device)
        found = importance(*args)
        inside.append(now(options.device) - began)
        return found

    bridge.importance = teachers.importance = timed
    steps = {}
    for attention in ATTENTION:
        knobs = {} if attention == "none" else {"attention": attention, "attention_warmup_steps": 0}
        trainer = make_trainer(
            build("llama", **SMALL), {"wide": build("llama", 1, **WIDE)},
            {"cross_entropy": CrossEntropy(), name: LOSSES[name](**knobs)},
            random_rows(1, options.length, ["wide"]), 1, options.device,
        )  # fmt: skip
        steps[attention] = stepper(trainer)
    taken: dict[str, list[float]] = {attention: [] for attention in ATTENTION}
    spent: dict[str, list[float]] = {attention: [] for attention in ATTENTION}
    for step in steps.values():
        step()
    for repeat in range(options.repeats):
        for attention in ATTENTION if repeat % 2 else reversed(ATTENTION):
            inside.clear()
            began = now(options.device)
            steps[attention]()
            taken[attention].append(now(options.device) - began)
            spent[attention].append(sum(inside))
            assert len(inside) == (attention != "none"), "importance is computed once a step, where it is asked for"
    return taken, spent


def importance_peak(length: int, device: str) -> int:
    """Bytes that `importance` allocates at its peak, one sample."""
    student = build("llama", **SMALL).to(device)
    row = random_rows(1, length, []).with_format("torch", device=device)[:1]
    mask = torch.ones_like(row["input_ids"])
    with torch.no_grad(), capture_kv(student, queries=True) as capture:
        student.base_model(input_ids=row["input_ids"], attention_mask=mask, use_cache=False)
        states = capture.stop(mask)
    return peak_memory(lambda: importance(states, row["labels"]), device)


def exponent(sizes: dict[int, int]) -> float:
    """The slope of the logarithm of memory over that of length, by least squares."""
    x, y = ([math.log(v) for v in values] for values in (sizes, sizes.values()))
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="short and few, to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.length = 2, 128
    torch.set_num_threads(options.threads)
    times, ratios, shares = {}, {}, {}
    for name in LOSSES:
        times[name], spent = step_times(name, options)
        print(f"{name}, {options.length} positions: {1000 * statistics.median(times[name]['none']):.0f} ms a step")
        for attention in ATTENTION[1:]:
            pairs = zip(times[name][attention], times[name]["none"], strict=True)
            found = ratios[f"{name}, {attention}"] = [weighed / plain for weighed, plain in pairs]
            low, mid, high = min(found), statistics.median(found), max(found)
            print(f"  attention {attention:8s} over none {mid:.3f}  ({low:.3f} to {high:.3f}, {len(found)} repeats)")
            pairs = zip(spent[attention], times[name][attention], strict=True)
            found = shares[f"{name}, {attention}"] = [1 + a / (b - a) for a, b in pairs]
            low, mid, high = min(found), statistics.median(found), max(found)
            print(f"    with over without importance() {mid:.3f}  ({low:.3f} to {high:.3f})")
    lengths = (512, 1024) if options.quick else (512, 1024, 2048, 4096, 8192)
    sizes = {length: importance_peak(length, options.device) for length in lengths}
    print("positions  importance MiB  eager, one layer MiB  eager, all layers MiB")
    for length, size in sizes.items():
        eager = 4 * SMALL["num_attention_heads"] * length**2
        print(f"{length:9d} {size / 2**20:15.2f} {eager / 2**20:21.1f} "
              f"{SMALL['num_hidden_layers'] * eager / 2**20:22.1f}")  # fmt: skip
    print(f"importance grows with positions to the power {exponent(sizes):.3f}; eager attention to the power 2")
    if options.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__}  # fmt: skip
        machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu"
        options.json.write_text(json.dumps({
            "length": options.length, "device": options.device, "machine": machine, "versions": versions,
            "seconds": times, "ratios": ratios, "with_over_without_importance": shares,
            "importance_bytes": sizes, "exponent": exponent(sizes),
        }, indent=2) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
