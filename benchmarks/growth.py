"""How the time of all that distilling adds to the models' own work grows with the length and with the teachers.

python benchmarks/growth.py [--batch 1] [--length 512] [--repeats 7] [--json FILE]

Added: importance of positions, alignment, fusion, the KV relation loss and its gradient on what the student captured;
not the models' forward passes, and not the student's backward pass.
time_exponent_in_length: from 128 to 8,192 positions, two teachers of other tokenizers. time_exponent_in_teachers: from
one to five, at --length positions. Both are slopes of logarithms by least squares, one a repeat.
Student of 4 layers and width 256, teachers of 8 layers and width 512.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import build, exponent, interleaved, make_trainer, parser, row, save, text_rows, tokenizer

from kv_trainer.capture import capture_kv
from kv_trainer.fusion import Uniform
from kv_trainer.importance import importance
from kv_trainer.losses import KVRelationLoss
from kv_trainer.supervision import Supervision
from kv_trainer.types import TeacherSignal

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SIZES = (450, 900, 500, 800, 700)  # of the teachers' tokenizers


def added(length: int, teachers: int, options: Any) -> Callable[[], None]:
    """All that comes after the models' forward passes, and the gradient on what the student has captured."""
    reads = tokenizer(600)
    rows = text_rows(options.batch, length, reads)
    given = {f"teacher{i}": (build("medium", 2000, seed=i), tokenizer(SIZES[i])) for i in range(teachers)}
    losses = {"kv_relation": KVRelationLoss(attention="teacher", attention_warmup_steps=0)}
    trainer = make_trainer(
        build("small"), given, losses, rows, options.batch, reads, options.device, fusion=Uniform()
    )  # fmt: skip
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    captured = {n: t._run(batch["teachers"][n], whole=False)[0] for n, t in trainer.teachers.items()}
    with torch.no_grad(), capture_kv(trainer.model) as capture:
        text = {k: batch[k] for k in ("input_ids", "attention_mask")}
        trainer.model.base_model(**text, use_cache=False)
        student = capture.stop(batch["attention_mask"]).map(lambda x: x.detach().requires_grad_())
    bridge = trainer.bridge

    def work() -> None:
        signals = {}
        for name, states in captured.items():
            theirs = batch["teachers"][name]
            weighs = importance(states, theirs["labels"])
            plain = replace(states, queries=None, attention=None)
            signals[name] = TeacherSignal(plain, theirs["index"], importance=weighs)
        supervision = Supervision(signals, batch["labels"], batch["attention_mask"], 1.0, float(options.batch))
        bridge(supervision, None, student)["kv_relation"].backward()

    return work


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    lengths, most = (LENGTHS, 5) if not options.quick else (LENGTHS[:2], 2)
    seconds = {
        "length": interleaved({n: added(n, 2, options) for n in lengths}, options.repeats, 1, options.device),
        "teachers": interleaved(
            {m: added(options.length, m, options) for m in range(1, most + 1)}, options.repeats, 3, options.device
        ),
    }

    def exponents(by_size: dict[int, list[float]]) -> list[float]:
        return [exponent(dict(zip(by_size, each))) for each in zip(*by_size.values(), strict=True)]

    about = f"batch {options.batch} x {options.length}"
    save(options.json, [
        row("time_exponent_in_length", exponents(seconds["length"]), f"{min(lengths)} to {max(lengths)} positions"),
        row("time_exponent_in_teachers", exponents(seconds["teachers"]), f"1 to {most} teachers, {about}"),
    ], options.device, seconds=seconds)  # fmt: skip


def parse() -> Any:
    found = parser(__doc__, length=512, batch=1)
    options = found.parse_args()
    if options.quick:
        options.length, options.repeats = 128, 2
    return options


if __name__ == "__main__":
    main()
