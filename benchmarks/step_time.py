"""A step with both quickstart teachers against the least it could cost.

python benchmarks/step_time.py [--repeats 7] [--steps 10] [--threads 2] [--json FILE]

Floor = a plain Trainer step of the same student on the same rows + each teacher's backbone forward under
inference_mode, on the same rows. Two kinds of step are timed: in the first epoch, where both teachers read every row,
and later, where each teacher reads only the rows in which it has a share; and the mean over the recipe's epochs.
All are timed in turn within one process, repeat by repeat, and compared within a repeat, so
that a change of the machine's speed falls on all of them. Prints medians and the spread of the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from kv_trainer.recipes import load_recipe
from kv_trainer.run import build_trainer

RECIPES = Path(__file__).parent.parent / "recipes" / "quickstart"


def endless(trainer: Trainer) -> Iterator[Any]:
    while True:
        yield from trainer.get_train_dataloader()


def stepper(trainer: Trainer) -> Callable[[], None]:
    """One whole optimizer step of a trainer, loading and collation included."""
    trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
    batches = endless(trainer)

    def step() -> None:
        samples, count = trainer.get_batch_samples(batches, 1, trainer.args.device)
        trainer.training_step(trainer.model, samples[0], count)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()

    return step


def plain_trainer(ours: Trainer) -> Trainer:
    """transformers' own Trainer with the same student, rows and collation of the student's text."""
    student = build_trainer(load_recipe(RECIPES / "ce_only.yaml")).model
    student._forward_hooks.clear(), student._forward_pre_hooks.clear()

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        batch = ours.data_collator.__class__(ours.data_collator.pad_token_id, {})(rows)
        return {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}

    return Trainer(model=student, args=ours.args, train_dataset=ours.train_dataset, data_collator=collate)


def backbones(ours: Any) -> Callable[[], None]:
    """Every teacher's backbone on the next batch; its collation is not timed."""
    prepared = [ours._prepare_inputs(batch)["teachers"] for _, batch in zip(range(64), endless(ours))]
    position = iter(range(10**9))

    def step() -> None:
        batch = prepared[next(position) % len(prepared)]
        with torch.inference_mode():
            for name, teacher in ours.teachers.items():
                text = {k: batch[name][k] for k in ("input_ids", "attention_mask")}
                teacher.model.base_model(**text, use_cache=False)

    return step


def forgetful(step: Callable[[], None], ours: Any) -> Callable[[], None]:
    """The step as it is in the first epoch: no row's likelihood is known yet."""

    def first() -> None:
        known = ours.panel._known.clone()
        ours.panel._known.fill_(torch.nan)
        step()
        ours.panel._known.copy_(known)

    return first


def seconds(step: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours = build_trainer(load_recipe(RECIPES / "two_teachers.yaml"))
    for batch in ours.get_train_dataloader():
        ours.panel.signals(ours._prepare_inputs(batch))
    step = stepper(ours)
    parts = {
        "first epoch": forgetful(step, ours),
        "later": step,
        "plain": stepper(plain_trainer(ours)),
        "backbones": backbones(ours),
    }
    for part in parts.values():
        seconds(part, 3)
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.repeats):
        for name, step in parts.items():
            taken[name].append(seconds(step, options.steps))
    floor = [p + b for p, b in zip(taken["plain"], taken["backbones"], strict=True)]
    ratios = {name: [x / f for x, f in zip(taken[name], floor, strict=True)] for name in ("first epoch", "later")}
    epochs = ours.args.max_steps * ours.args.train_batch_size / len(ours.train_dataset)
    ratios["whole run"] = [(a + (epochs - 1) * b) / epochs for a, b in zip(*ratios.values(), strict=True)]
    for name, values in taken.items():
        low, mid, high = (1000 * f(values) for f in (min, statistics.median, max))
        print(f"{name:11s} {mid:7.1f} ms a step  ({low:.1f} to {high:.1f})")
    for name, values in ratios.items():
        low, mid, high = (f(values) for f in (min, statistics.median, max))
        print(f"step over floor, {name:11s} {mid:.3f}  ({low:.3f} to {high:.3f}, {len(values)} repeats)")
    if options.json:
        options.json.write_text(json.dumps({"ratios": ratios, "seconds": taken}, indent=2) + "\n")


if __name__ == "__main__":
    main()
