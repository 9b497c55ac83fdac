"""What weighing positions by attention costs: time within a training step, and memory beside eager attention.

python benchmarks/attention_weighting.py [--length 1024] [--memory_length 4096] [--repeats 7] [--json FILE]

importance_step_share: seconds in `importance`, of one teacher or of the student, over those of all else in the same
step; all else that weighting adds is a few [B, T] products. The step as a whole moves more than what is measured.
importance_memory_over_eager: the most that `importance` claims at once beyond the captured states, over what eager
attention claims beyond what the model's own attention does, in a forward pass without gradients.
importance_memory_exponent: of its growth with the number of positions, from 512 to 8,192.
Student of 4 layers and width 256; the teacher has 8 and 512.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import build, exponent, make_trainer, now, parser, peak_memory, row, save, stepper, text_rows, tokenizer
from transformers import PreTrainedModel

from kv_trainer import supervision, teachers
from kv_trainer.capture import capture_kv
from kv_trainer.importance import importance
from kv_trainer.losses import CrossEntropy, KVRelationLoss

LENGTHS = (512, 1024, 2048, 4096, 8192)


def step_shares(attention: Any, options: Any) -> list[float]:
    """Repeat by repeat, seconds in `importance` over the rest of the step."""
    inside: list[float] = []

    def timed(*args: Any) -> torch.Tensor:
        began = now(options.device)
        found = importance(*args)
        inside.append(now(options.device) - began)
        return found

    supervision.importance = teachers.importance = timed
    reads = tokenizer(600)
    relation = KVRelationLoss(attention=attention, attention_warmup_steps=0)
    losses = {"cross_entropy": CrossEntropy(), "kv_relation": relation}
    rows = text_rows(options.batch, options.length, reads)
    given = {"teacher": (build("medium", 8192, "qwen2", 1), reads)}
    step = stepper(make_trainer(build("small", 8192), given, losses, rows, options.batch, reads, options.device))
    step()
    found = []
    for _ in range(options.repeats):
        inside.clear()
        began = now(options.device)
        step()
        found.append(sum(inside) / (now(options.device) - began - sum(inside)))
        assert len(inside) == 1, "importance is computed once a step"
    return found


def forward(model: PreTrainedModel, length: int) -> Callable[[], None]:
    ids = torch.randint(3, 2000, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)

    def run() -> None:
        with torch.no_grad():
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    return run


def importance_peak(length: int, device: str) -> int:
    """Bytes that `importance` allocates at its peak, one sample."""
    model = build("small").to(device)
    ids = torch.randint(3, 2000, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    with torch.no_grad(), capture_kv(model, queries=True) as capture:
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        states = capture.stop(torch.ones_like(ids))
    return peak_memory(lambda: importance(states, labels), device)


def eager_peak(length: int, device: str) -> int:
    """Bytes that eager attention takes beyond the model's own, at its peak."""
    usual, eager = build("small").to(device), build("small", attention="eager").to(device)
    return peak_memory(forward(eager, length), device) - peak_memory(forward(usual, length), device)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    about = f"batch {options.batch} x {options.length}"
    shares = {whose: step_shares(whose, options) for whose in ("student", "teacher")}
    larger = max(shares, key=lambda whose: statistics.median(shares[whose]))
    repeats, length = range(5 if not options.quick else 1), options.memory_length
    over = [importance_peak(length, options.device) / eager_peak(length, options.device) for _ in repeats]
    sizes = {n: importance_peak(n, options.device) for n in (LENGTHS[:2] if options.quick else LENGTHS)}
    save(options.json, [
        row("importance_step_share", shares[larger], f"attention of the {larger}, {about}"),
        row("importance_memory_over_eager", over, f"one row of {length} positions"),
        row("importance_memory_exponent", [exponent(sizes)], f"{min(sizes)} to {max(sizes)} positions"),
    ], options.device, shares=shares, bytes=sizes)  # fmt: skip


def parse() -> Any:
    found = parser(__doc__, length=1024, batch=1, memory_length=4096)
    options = found.parse_args()
    if options.quick:
        options.length, options.memory_length, options.repeats = 128, 512, 2
    return options


if __name__ == "__main__":
    main()
