"""The one module that knows both sides: teacher states in student coordinates, and the weighted sum of losses.

It is a submodule of the student and runs in the student's own forward hook, so every trainable map takes part in the
wrapped forward pass (DDP, ZeRO and FSDP skip gradients, or fail, for parameters used outside it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .alignment.heads import TeacherProjectors, auto_mlp_ratio
from .alignment.layers import LayerMap, layer_map
from .alignment.tokens import take
from .arguments import MultiTeacherKVConfig
from .capture import KVCapture, require_gradient
from .fusion import check_fusion, teacher_weights
from .losses import DistillationLoss, LossInputs
from .types import KVShape, KVStates, TeacherSignal

NAME = "kv_bridge"


@dataclass
class Supervision:
    """What one micro-batch is taught: the teachers' signals, the labels, and the counts that normalise a step."""

    signals: Mapping[str, TeacherSignal]
    labels: Tensor
    attention_mask: Tensor
    num_tokens: Tensor | float
    num_samples: Tensor | float
    progress: float = 0.0


class KVBridge(nn.Module):
    """Maps every teacher to the student, and adds the losses.

    student, teachers: the models' shapes. args: losses, alignment, projector, fusion and control sections.
    given: each teacher's fixed fusion weight. After a supervised forward, `terms` holds the detached raw losses and
    `weights` the teachers' shares [M, B].
    """

    def __init__(
        self, student: KVShape, teachers: Mapping[str, KVShape], args: MultiTeacherKVConfig, given: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.losses: dict[str, DistillationLoss] = {n: loss for n, loss in args.losses.items() if loss.weight > 0}
        self.requires = frozenset().union(*(loss.requires for loss in self.losses.values()))
        self.fusion, self.control, self.given = args.fusion, args.control, list(given) or [1.0] * len(teachers)
        check_fusion(self.fusion, self.given)
        lonely = [name for name, loss in self.losses.items() if "teacher_kv" in loss.requires and not teachers]
        if lonely:
            raise ValueError(f"losses.{lonely[0]} needs a teacher, but there is none; give teachers, or leave it out.")
        explicit = args.alignment.layers.map or {}
        self.layer_maps: dict[str, LayerMap] = {
            name: layer_map(args.alignment.layers.method, student.num_layers, shape.num_layers, explicit.get(name))
            for name, shape in teachers.items()
        }
        self.projectors = nn.ModuleDict()
        if "projectors" in self.requires:
            knobs = args.projector
            for name, shape in teachers.items():
                ratio = auto_mlp_ratio(shape.num_parameters) if knobs.mlp_ratio == "auto" else knobs.mlp_ratio
                self.projectors[name] = TeacherProjectors(
                    student, shape, knobs.direction, method=knobs.method, init=knobs.init, mlp_ratio=ratio,
                    dropout=knobs.dropout,
                )
        self.terms: dict[str, Tensor] = {}
        self.weights: Tensor | None = None
        self._given: Supervision | None = None
        self._capture: KVCapture | None = None

    @property
    def needs_likelihood(self) -> bool:
        return self.fusion.method == "confidence" and len(self.layer_maps) > 1

    def attach(self, student: nn.Module) -> None:
        """Become `student.kv_bridge`, and hook into its forward pass."""
        if "student_kv" in self.requires:
            self._capture = KVCapture(student)
        student.add_module(NAME, self)
        student.register_forward_pre_hook(self._before)
        student.register_forward_hook(self._after)

    @contextmanager
    def supervise(self, supervision: Supervision) -> Iterator[None]:
        """Inside the block, the student's next forward pass returns the total loss as `output.loss`."""
        self._given = supervision
        try:
            yield
        finally:
            self._given = None

    def _before(self, module: nn.Module, args: Any) -> None:
        if self._given is not None and self._capture is not None:
            self._capture.start()

    def _after(self, module: nn.Module, args: Any, output: ModelOutput) -> ModelOutput | None:
        if self._given is None:
            return None
        states = None
        if self._capture is not None:
            states = self._capture.stop(self._given.attention_mask)
            require_gradient(states)
        output["loss"] = self(self._given, output.get("logits"), states)
        return output

    def align(self, name: str, signal: TeacherSignal, mask: Tensor) -> KVStates:
        """One teacher at the student's layers and positions: [B, Ht, T, Dt] a student layer. mask: [B, T]."""
        index = signal.index if signal.rows is None else signal.index[signal.rows]
        mapped = take(self.layer_maps[name].apply(signal.kv), index)
        if signal.rows is not None:
            mapped = spread_rows(mapped, signal.rows, len(mask))
        aligned = mapped.mask & mask.bool()
        if self.control.shuffle == "rows":
            return mapped.map(lambda x: x.roll(1, 0), mask=aligned.roll(1, 0) & mask.bool())
        return replace(mapped, mask=aligned)

    def forward(self, given: Supervision, logits: Tensor | None, student: KVStates | None) -> Tensor:
        """The weighted sum of all losses of one micro-batch."""
        inputs = LossInputs(given.labels, given.num_tokens, given.num_samples, logits=logits, student=student)
        if given.signals:
            with torch.no_grad():
                inputs.teachers = {n: self.align(n, s, given.attention_mask) for n, s in given.signals.items()}
                inputs.weights = self._teacher_weights(given)
            inputs.projectors = dict(self.projectors.items())
        self.weights = inputs.weights
        total = torch.zeros((), device=given.labels.device)
        self.terms = {}
        for name, loss in self.losses.items():
            term = loss(inputs)
            self.terms[name] = term.detach()
            total = total + loss.weight_at(given.progress) * term
        return total

    def _teacher_weights(self, given: Supervision) -> Tensor:
        nll = torch.stack([s.nll for s in given.signals.values()]) if self.needs_likelihood else None
        weights = teacher_weights(self.fusion, self.given, nll, given.labels)
        return weights.roll(1, 1) if self.control.shuffle == "rows" else weights


def spread_rows(states: KVStates, rows: Tensor, samples: int) -> KVStates:
    """States of some samples [b, ...] as those of a whole batch [B, ...]: zero and masked in the others."""

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(samples, *x.shape[1:]).index_copy_(0, rows, x)

    return states.map(spread, mask=spread(states.mask))
