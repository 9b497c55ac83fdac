"""Our step against those of trl's distillation trainers, on the same models and rows.

pip install -e .[bench]
python benchmarks/peers.py [--length 256] [--batch 4] [--vocabulary 32768] [--repeats 7] [--json FILE]

step_over_gkd, memory_over_gkd: one teacher of the student's tokenizer, KV relation against trl's GKDTrainer on the
data set's own completions (lmbda 0). step_over_gold_uld: one teacher of another tokenizer, against trl's GOLDTrainer
with the universal logit loss (use_uld_loss, lmbda 0). step_over_trl_sft: ours over trl's SFTTrainer, which has no
teacher. Memory is all that is alive at the peak of a step, weights of student and teacher included.
Student of 4 layers and width 256, teacher of 8 layers and width 512. No trainer checkpoints activations.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from common import build, interleaved, make_trainer, over, parser, row, save, step_memory, stepper, text_rows, tokenizer
from datasets import Dataset
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from kv_trainer.losses import CrossEntropy, KVRelationLoss

READS, OTHER = 900, 600  # tokens of the tokenizers; the models' vocabularies are wider


def common_arguments(options: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "use_cpu": options.device == "cpu", "bf16": options.device != "cpu",
        "per_device_train_batch_size": options.batch, "gradient_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "max_length": 16384, "dataloader_pin_memory": False,
    }  # fmt: skip


def as_messages(rows: Dataset) -> Dataset:
    def turns(row: dict[str, str]) -> dict[str, Any]:
        said = (("user", row["prompt"]), ("assistant", row["completion"]))
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    return rows.map(turns, remove_columns=rows.column_names)


def weights(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    reads = tokenizer(READS)
    rows = text_rows(4 * options.batch, options.length, reads)
    messages, shared = as_messages(rows), common_arguments(options)

    def student() -> PreTrainedModel:
        return build(options.student, options.vocabulary)

    def teacher() -> PreTrainedModel:
        return build(options.teacher, options.vocabulary, seed=1)

    def ours(other: int) -> Trainer:
        losses = {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss()}
        given = {"teacher": (teacher(), tokenizer(other))}
        return make_trainer(student(), given, losses, rows, options.batch, reads, options.device)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer(OTHER).save_pretrained(folder)
        gold = GOLDConfig(
            use_uld_loss=True, lmbda=0.0, teacher_tokenizer_name_or_path=folder, max_completion_length=8, **shared
        )
        trainers: dict[str, Trainer] = {
            "ours": ours(READS),
            "gkd": GKDTrainer(student(), teacher(), GKDConfig(lmbda=0.0, **shared), train_dataset=messages,
                              processing_class=reads),
            "ours, other tokenizer": ours(OTHER),
            "gold": GOLDTrainer(student(), teacher(), gold, train_dataset=messages, processing_class=reads),
            "sft": SFTTrainer(student(), SFTConfig(**shared), train_dataset=messages, processing_class=reads),
        }  # fmt: skip
    taken = interleaved({n: stepper(t) for n, t in trainers.items()}, options.repeats, options.steps, options.device)
    sizes = f"{options.student} student, {options.teacher} teacher, V {options.vocabulary}"
    about = f"{sizes}, batch {options.batch} x {options.length}"
    memory: dict[str, list[float]] = {"ours": [], "gkd": []}
    for _ in range(options.repeats):
        for name in memory:
            memory[name].append(step_memory(trainers[name], options.device) + weights(teacher()))
    save(options.json, [
        row("step_over_gkd", over(taken["ours"], taken["gkd"]), about),
        row("memory_over_gkd", over(memory["ours"], memory["gkd"]), about),
        row("step_over_gold_uld", over(taken["ours, other tokenizer"], taken["gold"]), about),
        row("step_over_trl_sft", over(taken["ours"], taken["sft"]), about),
    ], options.device, seconds=taken, bytes=memory)  # fmt: skip


def parse() -> Any:
    found = parser(__doc__, length=256, batch=4, steps=1, vocabulary=32_768)
    found.add_argument("--student", default="small")
    found.add_argument("--teacher", default="medium")
    options = found.parse_args()
    if options.quick:
        options.student = options.teacher = "tiny"
        options.length, options.vocabulary, options.repeats = 64, 2000, 2
    return options


if __name__ == "__main__":
    main()
