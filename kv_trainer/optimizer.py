"""The optimizer's groups: what is trained beside the student learns at a rate of its own."""

from __future__ import annotations

from collections.abc import Iterable

from torch.nn import Parameter
from torch.optim import Optimizer


def add_missing(optimizer: Optimizer, parameters: Iterable[Parameter], scheduled: bool) -> None:
    """Give a caller's optimizer, which was made before these parameters were, those of them that learn.

    scheduled: it has a scheduler already, which could not follow; then ValueError if any is missing.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in parameters if p.requires_grad and id(p) not in known]
    if missing and scheduled:
        raise ValueError(
            "optimizers holds a scheduler that was made before the losses' own trainable maps; give "
            "optimizers=(optimizer, None), and training.lr_scheduler_type decides."
        )
    if missing:
        optimizer.add_param_group({"params": missing})


def set_apart(optimizer: Optimizer, parameters: Iterable[Parameter], learning_rate: float) -> None:
    """Give these parameters a learning rate of their own; the other options of their group stay."""
    theirs = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in theirs]
        if moved and len(moved) == len(group["params"]):  # as under PEFT, whose adapters have no biases
            group["lr"] = learning_rate
        elif moved:
            group["params"] = [p for p in group["params"] if id(p) not in theirs]
            options = {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
            optimizer.add_param_group({**options, "params": moved, "lr": learning_rate})
