"""A step with two live teachers of other tokenizers against the least it could cost.

python benchmarks/floor.py [--size medium] [--length 256] [--batch 4] [--repeats 7] [--steps 2] [--json FILE]

Floor: a plain Trainer step of the same student on the same rows + each teacher's whole backbone under inference_mode.
step_over_floor: cross-entropy, KV relation and attention weighting by the teachers. step_over_floor_all_losses: CODI
and CKA added. step_over_floor_confidence: as the first, fused by confidence, in its first epoch, where both teachers'
heads score every row. All run in turn, in one process, and are compared within a repeat.
Student of 8 layers and width 512, teachers of 12 layers and width 640, Qwen2's and Llama's, vocabulary 8,192;
--size small: student of 4 layers and width 256, teachers as the student above; --size tiny: smaller still. On a GPU
teachers are in bfloat16, and with --peak, in TFLOP/s, the share of it that the first step reaches is told.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import (
    LARGER,
    backbones,
    build,
    interleaved,
    make_trainer,
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

from kv_trainer.fusion import Confidence, Uniform
from kv_trainer.losses import CKALoss, CODILoss, CrossEntropy, KVRelationLoss
from kv_trainer.trainer import MultiTeacherKVTrainer

VOCABULARY = 8192


def main() -> None:
    options = sized(parser(__doc__, length=256, batch=4, steps=2, peak=0))
    precision = torch.float32 if options.device == "cpu" else torch.bfloat16
    torch.set_num_threads(options.threads)
    reads, others = tokenizer(600), {"qwen2": tokenizer(450), "llama": tokenizer(900)}
    rows = text_rows(4 * options.batch, options.length, reads)

    def trainer(more: dict, fusion: object):
        teachers = {
            family: (build(LARGER[options.size], VOCABULARY, family, seed, rope_theta=1e4 * 10**seed), reader)
            for seed, (family, reader) in enumerate(others.items())
        }
        for model, _ in teachers.values():
            model.to(precision)
        losses = {"cross_entropy": CrossEntropy(), **more}
        losses["kv_relation"] = KVRelationLoss(attention="teacher", attention_warmup_steps=0)
        student = build(options.size, VOCABULARY)
        return make_trainer(student, teachers, losses, rows, options.batch, reads, options.device, fusion=fusion)

    ours = trainer({}, Uniform())
    first = trainer({}, Confidence())
    known = first.panel._known
    steps = {
        "step_over_floor": stepper(ours),
        "step_over_floor_all_losses": stepper(trainer({"codi": CODILoss(), "cka": CKALoss()}, Uniform())),
        "step_over_floor_confidence": stepper(first),
    }
    plain = plain_trainer(ours, build(options.size, VOCABULARY).to(ours.args.device))
    forgetful = steps["step_over_floor_confidence"]

    def first_epoch() -> None:
        first.panel._known = torch.full_like(known, torch.nan)
        forgetful()

    parts = {**steps, "step_over_floor_confidence": first_epoch, "plain": stepper(plain), "backbones": backbones(ours)}
    taken = interleaved(parts, options.repeats, options.steps, options.device)
    floor = [p + b for p, b in zip(taken["plain"], taken["backbones"], strict=True)]
    about = f"{options.size} student, batch {options.batch} x {options.length}"
    found = [row(name, over(taken[name], floor), about) for name in steps]
    speed = throughput(ours, statistics.median(taken["step_over_floor"]), options)
    save(options.json, found, options.device, seconds=taken, throughput=speed)


def throughput(ours: MultiTeacherKVTrainer, seconds: float, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second, and FLOP/s by 6 a parameter and token of the student, 2 of a teacher's backbone; printed."""
    tokens = options.batch * options.length
    backbones = [t.model.get_decoder() for t in ours.teachers.values()]
    inner = [b.num_parameters() - b.get_input_embeddings().weight.numel() for b in backbones]
    bridge = sum(p.numel() for p in ours.bridge.parameters())
    flops = tokens * (6 * (ours.model.num_parameters() - bridge) + 2 * sum(inner)) / seconds
    found = {"tokens_per_second": tokens / seconds, "flops_per_second": flops}
    found |= {"share_of_peak": flops / options.peak / 1e12} if options.peak else {}
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()), flush=True)
    return found


if __name__ == "__main__":
    main()
