"""Peak memory of a training step: against plain training beside the same teachers, and with five teachers against one.

python benchmarks/memory.py [--length 256] [--batch 8] [--json FILE]

Counted is all that is alive at once: weights, gradients and optimizer state of student and projectors, activations, and
whatever a step claims on the way; on a CPU every allocation, as torch.profiler sees it.
memory_over_sft_plus_teachers: two teachers, KV relation, attention weighting; with the teachers' weights on both sides.
five_teachers_memory_over_one: five unlike teachers against the one of them with the lowest peak, weights of teachers
left out on both sides; under KV relation, and under the projectors in either direction.
All of the models have 4 layers and width 256, or nearly, so that no teacher stands out, and a vocabulary of 8,192.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import build, make_trainer, parser, plain_trainer, row, save, step_memory, text_rows, tokenizer

from kv_trainer.arguments import ProjectorConfig
from kv_trainer.fusion import Uniform
from kv_trainer.losses import CrossEntropy, DistillationLoss, KVLoss, KVRelationLoss

VOCABULARY = 8192
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"head_dim": 64}),
    "deep": ("llama", {"num_hidden_layers": 6, "hidden_size": 208, "intermediate_size": 560}),
    "gemma2": ("gemma2", {"head_dim": 96, "num_key_value_heads": 1, "query_pre_attn_scalar": 96}),
    "neox": ("gpt_neox", {"intermediate_size": 1024}),  # as many KV heads as heads
    "cohere": ("cohere", {"num_hidden_layers": 3, "num_key_value_heads": 1}),
}
SETTINGS: dict[str, tuple[str, DistillationLoss, str]] = {
    "five_teachers_memory_over_one": ("kv_relation", KVRelationLoss(), "student_to_teacher"),
    "five_teachers_memory_over_one_kv_student_to_teacher": ("kv", KVLoss(), "student_to_teacher"),
    "five_teachers_memory_over_one_kv_teacher_to_student": ("kv", KVLoss(), "teacher_to_student"),
}


def trainer_of(names: Sequence[str], losses: dict[str, DistillationLoss], options: Any, direction: str) -> Any:
    reads = tokenizer(600)
    rows = text_rows(options.batch, options.length, reads)
    teachers = {name: (build("small", VOCABULARY, TEACHERS[name][0], 1, **TEACHERS[name][1]), reads) for name in names}
    return make_trainer(
        build("small", VOCABULARY), teachers, {"cross_entropy": CrossEntropy(), **losses}, rows, options.batch, reads,
        options.device, projector=ProjectorConfig(direction=direction), fusion=Uniform(),
    )  # fmt: skip


def over_plain(options: Any) -> float:
    losses = {"kv_relation": KVRelationLoss(attention="teacher", attention_warmup_steps=0)}
    ours = trainer_of(["qwen3", "neox"], losses, options, "student_to_teacher")
    teachers = sum(p.numel() * p.element_size() for t in ours.teachers.values() for p in t.model.parameters())
    plain = plain_trainer(ours, build("small", VOCABULARY).to(ours.args.device))
    return (step_memory(ours, options.device) + teachers) / (step_memory(plain, options.device) + teachers)


def five_over_one(setting: str, options: Any) -> float:
    name, loss, direction = SETTINGS[setting]
    alone = [step_memory(trainer_of([t], {name: loss}, options, direction), options.device) for t in TEACHERS]
    return step_memory(trainer_of(list(TEACHERS), {name: loss}, options, direction), options.device) / min(alone)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    about = f"batch {options.batch} x {options.length}"
    found = [row("memory_over_sft_plus_teachers", [over_plain(options) for _ in range(options.repeats)], about)]
    for setting in SETTINGS:
        found.append(row(setting, [five_over_one(setting, options) for _ in range(options.repeats)], about))
    save(options.json, found, options.device)


def parse() -> Any:
    found = parser(__doc__, length=256, batch=8)
    found.set_defaults(repeats=5)
    options = found.parse_args()
    if options.quick:
        options.batch, options.length, options.repeats = 2, 64, 1
    return options


if __name__ == "__main__":
    main()
