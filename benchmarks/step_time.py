"""A step of the quickstart with both of its teachers against the least it could cost.

python benchmarks/step_time.py [--repeats 7] [--steps 10] [--json FILE]

Floor: a plain Trainer step of the same student on the same rows + each teacher's whole backbone under inference_mode.
quickstart_step_over_floor: the mean over the recipe's epochs. In the first, both teachers read every row and their
heads score it (quickstart_first_epoch); later each teacher reads the rows where it has a share (quickstart_later). All
take turns in one process and are compared within a repeat.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import backbones, interleaved, over, parser, plain_trainer, row, save, stepper

from kv_trainer.recipes import load_recipe
from kv_trainer.run import build_trainer

RECIPES = Path(__file__).parent.parent / "recipes" / "quickstart"


def recipe(name: str, device: str) -> Any:
    return load_recipe(RECIPES / f"{name}.yaml", [f"--training.use_cpu={str(device == 'cpu').lower()}"])


def main() -> None:
    found = parser(__doc__, steps=10)
    options = found.parse_args()
    if options.quick:
        options.repeats, options.steps = 2, 2
    torch.set_num_threads(options.threads)
    ours = build_trainer(recipe("two_teachers", options.device))
    ours.model.to(ours.args.device)
    for batch in ours.get_train_dataloader():  # from here on every row has been seen
        ours.panel.signals(ours._prepare_inputs(batch))
    step, student = stepper(ours), build_trainer(recipe("ce_only", options.device)).model
    student._forward_hooks.clear(), student._forward_pre_hooks.clear()

    def first() -> None:
        known = ours.panel._known.clone()
        ours.panel._known.fill_(torch.nan)
        step()
        ours.panel._known.copy_(known)

    plain = stepper(plain_trainer(ours, student.to(ours.args.device)))
    parts = {"first": first, "later": step, "plain": plain, "backbones": backbones(ours)}
    taken = interleaved(parts, options.repeats, options.steps, options.device)
    floor = [p + b for p, b in zip(taken["plain"], taken["backbones"], strict=True)]
    ratios = {name: over(taken[name], floor) for name in ("first", "later")}
    epochs = ours.args.max_steps * ours.args.train_batch_size / len(ours.train_dataset)
    whole = [(a + (epochs - 1) * b) / epochs for a, b in zip(*ratios.values(), strict=True)]
    save(options.json, [
        row("quickstart_step_over_floor", whole, f"quickstart, {epochs:.1f} epochs"),
        row("quickstart_first_epoch", ratios["first"], "quickstart, batch 32"),
        row("quickstart_later", ratios["later"], "quickstart, batch 32"),
    ], options.device, seconds=taken)  # fmt: skip


if __name__ == "__main__":
    main()
