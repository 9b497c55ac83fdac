"""Stops a run at the first loss that is not finite, before it reaches the weights, and says where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..types import KVStates

ADVICE = "Nothing of this step was saved. Lower learning_rate, clip with max_grad_norm, or train in bfloat16 or float32"


class NonFiniteLoss(ValueError):
    """A loss term, what a teacher says, or a weight, is NaN or infinite."""


class Watched(NamedTuple):
    """What is kept of one micro-batch until the end of its step: [terms and teachers] and [tensors of the student]
    numbers."""

    names: list[str]
    teachers: list[str]
    values: Tensor
    places: list[str]
    sums: Tensor
    rows: Sequence[int] | Tensor


def watch(
    terms: dict[str, Tensor], rows: Sequence[int] | Tensor, student: KVStates | None,
    teachers: Mapping[str, Tensor] = MappingProxyType({}),
) -> Watched:  # fmt: skip
    """Note one micro-batch without waiting for the device. A sum is finite only where all that was summed is."""
    places: list[str] = []
    tensors: list[Tensor] = []
    if student is not None:
        hidden = student.hidden or ()
        if hidden:
            places, tensors = ["the embeddings"], [hidden[0]]
        for i, layer in enumerate(student.layers):
            states = {"keys": student.keys[i], "values": student.values[i]}
            states |= {"hidden states": hidden[i + 1]} if hidden else {}
            places += [f"layer {layer} ({name})" for name in states]
            tensors += states.values()
    home = next(iter(terms.values())).device
    values = torch.stack([value.detach().float().to(home) for value in (*terms.values(), *teachers.values())])
    # Wide enough that no sum of finite numbers overflows; on another device where a layer lives there.
    each = [t.detach().sum(dtype=torch.float32).to(home) for t in tensors]
    sums = torch.stack(each) if each else values.new_zeros(0)
    return Watched(list(terms), list(teachers), values, places, sums, rows)


def complain(seen: Watched, step: int) -> NonFiniteLoss:
    """The error for a micro-batch that is known to be broken."""
    values = seen.values.tolist()
    bad = [f"{name} = {v:g}" for name, v in zip(seen.names, values) if not math.isfinite(v)]
    rows = seen.rows.tolist() if isinstance(seen.rows, Tensor) else list(seen.rows)
    silent = [name for name, v in zip(seen.teachers, values[len(seen.names) :], strict=True) if not math.isfinite(v)]
    if silent:
        return NonFiniteLoss(
            f"Step {step}: the keys, values or likelihoods of teacher '{silent[0]}' are not finite. Rows of the batch: "
            f"{rows or 'unknown'}. Nothing of this step was saved. Load it in bfloat16 or float32 (teachers."
            f"{silent[0]}.dtype), and look whether its checkpoint is whole."
        )
    broken = (~seen.sums.isfinite()).nonzero()
    layer = seen.places[int(broken[0])] if len(broken) else "none"
    return NonFiniteLoss(
        f"Step {step}: the loss is not finite: {', '.join(bad)}. First layer of the student that is not finite: "
        f"{layer}. Rows of the batch: {rows or 'unknown'}. {ADVICE}, or look at these rows."
    )


def check_finite(
    terms: dict[str, Tensor], step: int, rows: Sequence[int] | Tensor, student_states: KVStates | None
) -> None:
    """Raise NonFiniteLoss if a term of one micro-batch is not finite; waits for the device once.

    terms: name -> scalar, the total among them. rows: the row numbers of the micro-batch.
    student_states: what was captured of the student; names the first layer that is broken.
    """
    seen = watch(terms, rows, student_states)
    if not bool(seen.values.isfinite().all()):
        raise complain(seen, step)


class FiniteGuard(TrainerCallback):
    """Always on: the trainer calls `watch` after every micro-batch's forward pass, and the check is here, once a step.

    The check is before the optimizer moves anything, waits for the device once, and stops all ranks together. Weights
    are looked at only where a save or an evaluation follows, and at the end: a gradient can be broken where the loss is
    not.
    """

    def __init__(self) -> None:
        self._seen: list[Watched] = []

    def watch(
        self, terms: dict[str, Tensor], rows: Sequence[int] | Tensor = (), student: KVStates | None = None,
        teachers: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Note a micro-batch of this step; see check_finite. teachers: name -> a sum of what it said."""
        self._seen.append(watch(terms, rows, student, teachers))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen = []  # an earlier run may have ended between a forward pass and its step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        seen, self._seen = self._seen, []
        if not seen or agree(torch.stack([s.values.isfinite().all() for s in seen]).all()):
            return
        step = state.global_step + 1
        for one in seen:
            if not bool(one.values.isfinite().all()):
                raise complain(one, step)
        raise NonFiniteLoss(f"Step {step}: the loss of another process is not finite; its own message names the rows.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if model is not None and (control.should_save or control.should_evaluate):
            check_weights(model, state.global_step)

    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if model is not None:  # whoever trained it will save it, or ask it something
            check_weights(model, state.global_step)


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Raise NonFiniteLoss if a trainable parameter is not finite."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    if not named:
        return
    sums = torch.stack([local(p).sum(dtype=torch.float32).to(named[0][1].device) for _, p in named])
    if agree(sums.isfinite().all()):
        return
    bad = [name for (name, _), total in zip(named, sums.tolist(), strict=True) if not math.isfinite(total)]
    where = f"{bad[0]} (and {len(bad) - 1} more)" if bad else "those of another process"
    raise NonFiniteLoss(f"Step {step}: weights are not finite, though the loss was: {where}. {ADVICE}.")


def local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that is spread over several."""
    parameter = parameter.detach()
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def agree(fine: Tensor) -> bool:
    """Whether a flag holds on every rank, so that none goes on, and waits, alone."""
    if dist.is_available() and dist.is_initialized():
        flag = fine.to(torch.float32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)
    return bool(fine)
