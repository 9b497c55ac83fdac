"""What a micro-batch is taught: every teacher in the student's coordinates, and what the losses may look at of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .alignment.layers import LayerMap, layer_map
from .alignment.mapping import AlignedTeacher, align, rotated_pairs
from .alignment.rope import rerotate
from .alignment.shuffle import other_positions, other_rows
from .arguments import MultiTeacherKVConfig
from .fusion import FusionInputs, Router, check_given, teacher_shares, to_the_heard
from .importance import answer_labels, importance
from .losses import DistillationLoss, LayerwiseLoss, LossInputs, TeacherLogits
from .losses.base import chosen_layers
from .maps import head_projectors, hidden_projectors
from .profiling import part
from .types import KVShape, KVStates, TeacherSignal
from .vocabulary import Head


@dataclass
class Supervision:
    """What one micro-batch is taught: the teachers' signals, the labels, and the counts that normalise a step.

    signals: as the teachers give them, or already aligned by `TeacherMaps.align`, which lets go of what is not needed.
    step, progress: optimizer steps done, and their share of the run. tasks, answer_positions, tokens (see FusionInputs)
    [B], segments [B, T]: where known.
    measure: called with the raw terms, their graph whole, before they are weighed; inside the wrapped forward pass.
    """

    signals: Mapping[str, TeacherSignal | AlignedTeacher]
    labels: Tensor
    attention_mask: Tensor
    num_tokens: Tensor | float
    num_samples: Tensor | float
    progress: float = 0.0
    step: int = 0
    tasks: Tensor | None = None
    answer_positions: Tensor | None = None
    segments: Tensor | None = None
    tokens: Tensor | None = None
    measure: Callable[[Mapping[str, Tensor]], None] | None = None


class TeacherMaps(nn.Module):
    """Every trainable map, and what takes the teachers' states through them; KVBridge adds the losses.

    losses: those with a weight. student, teachers: the models' shapes. given: each teacher's fixed fusion weight.
    """

    def __init__(
        self, losses: dict[str, DistillationLoss], student: KVShape, teachers: Mapping[str, KVShape],
        args: MultiTeacherKVConfig, given: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__()
        self.losses = losses
        self.requires = frozenset().union(*(loss.needs for loss in losses.values()))
        self.fusion: Any = args.fusion
        self.control, self.seed = args.control, args.seed
        self.step = 0  # of the batch whose teachers are aligned; the trainer says
        self.theta = student.rope_theta if student and args.alignment.rope.keys == "after" else None
        if self.theta is None and args.alignment.rope.keys == "after" and teachers:
            raise ValueError("alignment.rope.keys is 'after', but the student has no RoPE; set it to 'before'.")
        check_given(given)
        self.given = torch.tensor(list(given) or [1.0] * len(teachers))
        self.layer_maps = map_layers(student, teachers, args)
        self.projectors: Any = nn.ModuleDict()
        self.hidden_projectors: Any = nn.ModuleDict()
        mapping: list[Any] = [getattr(x, "layers", "all") for x in losses.values() if "projectors" in x.needs]
        compared = {layer for chosen in mapping for layer in chosen_layers(chosen, student.num_layers)}
        for name, shape in teachers.items():
            if "projectors" in self.requires:
                self.projectors[name] = head_projectors(student, shape, args, compared)
            if "hidden_projectors" in self.requires:
                self.hidden_projectors[name] = hidden_projectors(student, shape)
        gated = isinstance(self.fusion, Router) and len(teachers) > 1
        self.router = self.fusion.module(student, len(teachers)) if isinstance(self.fusion, Router) and gated else None
        # Filled by calibration.py and by the trainer.
        self.task_nll: Tensor | None = None
        self.prototypes: list[Tensor] = []
        self.heads: dict[str, tuple[Head, Tensor | None, Tensor | None]] = {}

    def weighing(self, step: int) -> frozenset[str]:
        """Whose attention weighs positions in this step: "student_importance", "teacher_importance"."""
        found = (x for x in self.losses.values() if isinstance(x, LayerwiseLoss) and step >= x.attention_starts)
        return frozenset().union(*(loss.needs - loss.requires for loss in found))

    @torch.no_grad()
    def align(
        self, name: str, signal: TeacherSignal, mask: Tensor, answers: Tensor | None = None, tasks: Tensor | None = None
    ) -> AlignedTeacher:
        """One teacher at the student's layers and positions. mask: [B, T] of the student; answers: see `align`.

        tasks: [B]; only `control.shuffle: rows_of_task` asks.
        """
        wanted = "teacher_kv" in self.requires or "teachers" in self.fusion.needs
        if self.control.shuffle in ("rows", "rows_of_task") and len(mask) == 1:  # no other row is there: no teacher
            signal = replace(signal, index=torch.full_like(signal.index, -1))
        moved = self.control.shuffle == "positions"
        positions = other_positions(mask, self.seed, self.step) if moved else None
        order = self.order(mask, tasks)
        with part("alignment"):
            found = align(
                signal, self.layer_maps[name], mask, wanted, order=order, positions=positions, answers=answers
            )
            return replace(found, kv=self.turn(found.kv, mask))

    def order(self, like: Tensor, tasks: Tensor | None) -> Tensor | None:
        """Whose teachers every sample [B] of `like` gets under the control of rows; None: its own."""
        how = self.control.shuffle
        if how not in ("rows", "rows_of_task"):
            return None
        if how == "rows_of_task" and tasks is None:
            raise ValueError(
                "control.shuffle is rows_of_task, but the rows have no task; give data.task, or take rows."
            )
        return other_rows(len(like), tasks if how == "rows_of_task" else None).to(like.device)

    def inputs(self, given: Supervision, logits: Tensor | None, student: KVStates | None) -> LossInputs:
        """All that the losses may look at."""
        inputs = LossInputs(
            given.labels, given.num_tokens, given.num_samples, logits=logits, student=student, fusion=self.fusion,
            step=given.step, progress=given.progress, answer_positions=given.answer_positions,
            student_hidden=None if student is None else student.hidden,
            projectors=dict(self.projectors.items()), hidden_projectors=dict(self.hidden_projectors.items()),
        )  # fmt: skip
        if given.signals:
            aligned = {
                n: s
                if isinstance(s, AlignedTeacher)
                else self.align(n, s, given.attention_mask, given.answer_positions, given.tasks)
                for n, s in given.signals.items()
            }
            inputs.teachers = {n: a.kv for n, a in aligned.items()}
            inputs.weights = self._shares(given, inputs)
            self._fill(inputs, given, aligned)
        if student is not None:
            inputs.student = self.turn(student, given.attention_mask)
        return inputs

    def turn(self, states: KVStates, mask: Tensor) -> KVStates:
        """States at the student's positions, keys after RoPE of the student's base where that is asked for."""
        if self.theta is None:
            return states
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        return replace(states, keys=tuple(rerotate(k, positions, self.theta) for k in states.keys))

    def _shares(self, given: Supervision, inputs: LossInputs) -> Tensor:
        signals: list[Any] = list(given.signals.values())
        order = self.order(given.labels, given.tasks)

        def of_rows(x: Any) -> Any:
            """Scores belong to the teacher's rows, as its states do."""
            return x if order is None or x is None else x[..., order]

        tokens = (given.labels != -100).sum(1) if given.tokens is None else given.tokens
        found = FusionInputs(
            given=self.given.to(given.labels.device), tokens=of_rows(tokens),
            nll=of_rows(torch.stack([s.nll for s in signals])) if signals[0].nll is not None else None,
            entropy=of_rows(torch.stack([s.entropy for s in signals])) if signals[0].entropy is not None else None,
            tasks=of_rows(given.tasks), task_nll=self.task_nll, teachers=list(inputs.teachers.values()),
            student=inputs.student, prototypes=self.prototypes, router=self.router,
        )  # fmt: skip
        heard = torch.stack([teacher.mask.any(1) for teacher in inputs.teachers.values()])
        return to_the_heard(teacher_shares(self.fusion, found), heard)

    def _fill(self, inputs: LossInputs, given: Supervision, aligned: Mapping[str, AlignedTeacher]) -> None:
        """What some loss needs beyond keys and values."""
        assert inputs.weights is not None
        student: Any = inputs.student
        inputs.teacher_hidden = {n: a.hidden for n, a in aligned.items() if a.hidden is not None}
        inputs.answered = {n: a.answered for n, a in aligned.items() if a.answered is not None}
        for name, teacher in aligned.items():
            if teacher.last is not None:
                inputs.teacher_logits[name] = TeacherLogits(teacher.last, *self.heads[name])
        weighing = self.weighing(given.step)
        if "teacher_importance" in weighing:
            share = inputs.weights.mean(1) if inputs.weights.dim() == 3 else inputs.weights
            each = torch.stack([a.importance for a in aligned.values() if a.importance is not None])  # [M, B, T]
            inputs.importance["teacher"] = (share.detach()[:, :, None] * each).sum(0)
        if "student_importance" in weighing:
            with part("student importance"):
                inputs.importance["student"] = importance(student, answer_labels(given.labels, given.segments))
        if "student_attention" in self.requires:
            inputs.attention = {n: a.attention for n, a in aligned.items() if a.attention is not None}
            inputs.attention["student"] = rotated_pairs(student)


def map_layers(student: KVShape, teachers: Mapping[str, KVShape], args: MultiTeacherKVConfig) -> dict[str, LayerMap]:
    """Each teacher's layers for those of the student. ValueError where a map by hand is for other teachers."""
    explicit = args.alignment.layers.map or {}
    if explicit and set(explicit) != set(teachers):
        raise ValueError(
            f"alignment.layers.map is for {', '.join(explicit)}; the teachers are {', '.join(teachers) or 'none'}."
        )
    method = args.alignment.layers.method
    method = "relative_depth" if method == "cka" else method  # until calibration.py has matched them
    return {
        name: layer_map("nearest", student.num_layers, shape.layer_numbers)
        if shape.aligned
        else layer_map(method, student.num_layers, shape.layer_numbers, explicit.get(name))
        for name, shape in teachers.items()
    }


@torch.no_grad()
def heard_of(given: Supervision, inputs: LossInputs) -> dict[str, Tensor]:
    """Per teacher a scalar that is finite only where its likelihoods and the states of its last mapped layer are.

    What is broken in a transformer breaks all layers above. A loss may not show it: shares that are NaN count for none.
    """
    found = {}
    for name, kv in inputs.teachers.items():
        last = [states[-1].float() for states in (kv.keys, kv.values) if states]
        parts = [x.masked_fill(~kv.mask[:, None, :, None], 0).sum() for x in last]
        nll = given.signals[name].nll
        parts += [] if nll is None else [nll.float().sum()]
        found[name] = torch.stack(parts).sum() if parts else inputs.labels.new_zeros((), dtype=torch.float32)
    return found
