"""Questions to one forward pass: what a term costs, whether it hears its teacher, whether its target collapses."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bridge import KVBridge
from ..losses import DistillationLoss, LossInputs
from ..losses.base import chosen_layers
from ..losses.kv import KVLoss, pairs, spread
from ..supervision import Supervision
from ..types import KVStates

COLLAPSE_STEPS = 40
COLLAPSE_RATE = 10.0  # so few steps at the rate of a run would hardly move a projector


@dataclass
class Pass:
    """One forward pass of the student: logits [B, T, V] and its states, with gradient; None where no teacher runs."""

    given: Supervision
    logits: Tensor
    states: KVStates | None


@contextmanager
def shuffling(bridge: KVBridge, how: Literal["rows"] | None) -> Iterator[None]:
    """Inside the block, whether every sample is taught by the teachers of another row."""
    before = bridge.control.shuffle
    bridge.control.shuffle = how
    try:
        yield
    finally:
        bridge.control.shuffle = before


def gradient_cosine(
    loss: DistillationLoss, one: LossInputs, other: LossInputs, parameters: Sequence[nn.Parameter]
) -> float | None:
    """Cosine between a term's gradients under two inputs; None where one of them is zero."""
    grads = []
    for inputs in (one, other):
        term = loss(inputs)
        if not term.requires_grad:
            return None
        grads.append(torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True))
    dots = [
        sum(float((a.float() * b.float()).sum()) for a, b in zip(x, y, strict=True) if a is not None and b is not None)
        for x, y in ((grads[0], grads[0]), (grads[1], grads[1]), (grads[0], grads[1]))
    ]
    size = math.sqrt(dots[0] * dots[1])
    return dots[2] / size if size > 0 else None


class Costs:
    """What one term adds to a step: what it keeps for the backward pass, and its time, up to the student's tensors.

    The student's own forward and backward pass, which all terms share, are not in it: the terms get leaves in place of
    its logits and states.
    """

    def __init__(self, bridge: KVBridge, passed: Pass) -> None:
        self.leaves: list[Tensor] = []
        states = passed.states
        if states is not None:
            states = replace(
                states, keys=self._cut(states.keys), values=self._cut(states.values),
                queries=states.queries and self._cut(states.queries),
                hidden=states.hidden and self._cut(states.hidden),
            )  # fmt: skip
        self.inputs = bridge.inputs(passed.given, self._cut((passed.logits,))[0], states)
        self.leaves += [p for p in bridge.parameters() if p.requires_grad]
        self._there = {x.untyped_storage().data_ptr() for x in self.leaves}

    def _cut(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = tuple(x.detach().requires_grad_() for x in tensors)
        self.leaves += found
        return found

    def of(self, loss: DistillationLoss) -> tuple[int, float]:
        """Bytes of all storages that the term keeps, once each and beside what is there anyway, and its seconds."""
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._there:
                kept[storage.data_ptr()] = storage.nbytes()
            return x.detach()  # an output that keeps itself would never be freed

        start = now(self.inputs.labels.device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            term = loss(self.inputs)
        if term.requires_grad:
            torch.autograd.grad(term, self.leaves, retain_graph=True, allow_unused=True)
        return sum(kept.values()), now(self.inputs.labels.device) - start


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def without_student(inputs: LossInputs) -> LossInputs:
    """What the kv term looks at, to be kept: the student's states detached, and nothing else of its graph."""
    assert inputs.student is not None and inputs.weights is not None
    return LossInputs(
        inputs.labels, inputs.num_tokens, inputs.num_samples, teachers=inputs.teachers, fusion=inputs.fusion,
        student=KVStates.map(replace(inputs.student, queries=None, attention=None, hidden=None), Tensor.detach),
        weights=inputs.weights.detach(), importance=inputs.importance, step=inputs.step, progress=inputs.progress,
    )  # fmt: skip


def collapse(bridge: KVBridge, batches: Sequence[LossInputs], learning_rate: float) -> float:
    """Relative change of the mapped target's variance when copies of its projectors alone minimise the kv term.

    -0.5: it halves; the geometric mean over teachers, the layers compared, keys and values. batches: from
    `without_student`.
    """
    projectors: Any = copy.deepcopy(bridge.projectors).requires_grad_(True).eval()
    optimizer = torch.optim.Adam(projectors.parameters(), lr=COLLAPSE_RATE * learning_rate)
    loss, first = bridge.losses["kv"], next(iter(projectors.values()))
    assert isinstance(loss, KVLoss)
    layers = chosen_layers(loss.layers, len(first.keys))
    before = target_variance(projectors, batches, layers)
    for step in range(COLLAPSE_STEPS):
        inputs = replace(batches[step % len(batches)], projectors=dict(projectors.items()))
        optimizer.zero_grad()
        bridge.losses["kv"](inputs).backward()
        optimizer.step()
    return math.expm1(float((target_variance(projectors, batches, layers) / before).log().mean()))


@torch.no_grad()
def target_variance(
    projectors: Mapping[str, nn.Module] | nn.ModuleDict, batches: Sequence[LossInputs], layers: Sequence[int]
) -> Tensor:
    """[teachers x layers x 2] of some student layers, about the mean position of each sample, averaged over samples."""
    found = []
    for inputs in batches:
        both = [(t.mask, pairs(projectors[n](t))) for n, t in inputs.teachers.items()]
        mapped = [(mask, each[layer]) for mask, each in both for layer in layers]
        found.append(torch.stack([spread(x.float(), mask).square().mean() for mask, pair in mapped for x in pair]))
    return torch.stack(found).mean(0)
