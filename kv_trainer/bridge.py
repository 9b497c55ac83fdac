"""The one module that knows both sides: teacher states in student coordinates, and the weighted sum of losses.

It is a submodule of the student and runs in the student's own forward hook, so every trainable map takes part in the
wrapped forward pass (DDP, ZeRO and FSDP skip gradients, or fail, for parameters used outside it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .alignment.layers import LayerMap, layer_map
from .alignment.mapping import AlignedTeacher, align, rotated_pairs
from .alignment.rope import rerotate
from .alignment.shuffle import other_positions, other_rows
from .arguments import FreezeConfig, MultiTeacherKVConfig
from .balance import Balance, check_reference
from .capture import KVCapture, require_gradient
from .fusion import FusionInputs, Router, check_given, teacher_shares, to_the_heard
from .importance import answer_labels, importance
from .losses import DistillationLoss, LayerwiseLoss, LossInputs, TeacherLogits, needs_teacher
from .losses.base import chosen_layers
from .losses.checks import check_gradient, check_layers, check_target_space, check_term
from .maps import head_projectors, hidden_projectors
from .profiling import part
from .teachers import TeacherNeeds
from .types import KVShape, KVStates, TeacherSignal
from .vocabulary import Head

NAME = "kv_bridge"
ROUTER_TERM = "router_entropy"


@dataclass
class Supervision:
    """What one micro-batch is taught: the teachers' signals, the labels, and the counts that normalise a step.

    signals: as the teachers give them, or already aligned by `KVBridge.align`, which lets go of what is not needed.
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


class KVBridge(nn.Module):
    """Maps every teacher to the student, and adds the losses.

    student, teachers: the models' shapes. args: losses, alignment, projector, fusion and control sections.
    given: each teacher's fixed fusion weight. After a supervised forward, `terms` holds the detached raw losses,
    `loss` their weighted sum, `weights` the teachers' shares, [M, B] or [M, L, B], and `heard` a sum of what each
    teacher said.
    """

    def __init__(
        self, student: KVShape, teachers: Mapping[str, KVShape], args: MultiTeacherKVConfig, given: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.losses: dict[str, DistillationLoss] = {n: loss for n, loss in args.losses.items() if loss.active}
        if not self.losses:
            raise ValueError("No loss has a weight, so nothing would be learned; give one of losses a weight above 0.")
        self.requires = frozenset().union(*(loss.needs for loss in self.losses.values()))
        self.fusion: Any = args.fusion
        self.control, self.seed = args.control, args.seed
        self.step = 0  # of the batch whose teachers are aligned; the trainer says
        self.some_rest = args.freeze != FreezeConfig()  # then a term may be without gradient for a while
        self.theta = student.rope_theta if student and args.alignment.rope.keys == "after" else None
        if self.theta is None and args.alignment.rope.keys == "after" and teachers:
            raise ValueError("alignment.rope.keys is 'after', but the student has no RoPE; set it to 'before'.")
        self.selects = args.alignment.time.method == "rkv"
        check_given(given)
        self.given = torch.tensor(list(given) or [1.0] * len(teachers))
        lonely = [name for name, loss in self.losses.items() if needs_teacher(loss.needs)]
        if lonely and not teachers:
            raise ValueError(f"losses.{lonely[0]} needs a teacher, but there is none; give teachers, or leave it out.")
        check_reference(args.losses, args.monitor.loss_scales_every)
        for name, loss in self.losses.items() if student else ():
            check_layers(name, loss, student.num_layers)
        if self.fusion.in_target_space:
            check_target_space(self.losses, args.projector.direction)
        explicit = args.alignment.layers.map or {}
        if explicit and set(explicit) != set(teachers):
            raise ValueError(
                f"alignment.layers.map is for {', '.join(explicit)}; the teachers are {', '.join(teachers) or 'none'}."
            )
        method = args.alignment.layers.method
        method = "relative_depth" if method == "cka" else method  # until calibration.py has matched them
        self.layer_maps: dict[str, LayerMap] = {
            name: layer_map("nearest", student.num_layers, shape.layer_numbers)
            if shape.aligned
            else layer_map(method, student.num_layers, shape.layer_numbers, explicit.get(name))
            for name, shape in teachers.items()
        }
        self.balance = Balance(self.losses)
        self.projectors: Any = nn.ModuleDict()
        self.hidden_projectors: Any = nn.ModuleDict()
        mapping: list[Any] = [getattr(x, "layers", "all") for x in self.losses.values() if "projectors" in x.needs]
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
        self.terms: dict[str, Tensor] = {}
        self.loss = torch.zeros(())
        self.weights: Tensor | None = None
        self.heard: dict[str, Tensor] = {}
        self._given: Supervision | None = None
        self._capture: KVCapture | None = None
        self._states: KVStates | None = None
        self._handles: list[Any] = []

    def teacher_needs(self) -> TeacherNeeds:
        return TeacherNeeds(
            scores=bool(self.fusion.needs & {"nll", "entropy"}) and len(self.layer_maps) > 1,
            final="teacher_logits" in self.requires,
            queries="teacher_attention" in self.requires,
            importance="teacher_importance" in self.requires,
            hidden="teacher_hidden" in self.requires,
            mass=self.selects and ("teacher_kv" in self.requires or "teachers" in self.fusion.needs),
            reduce=self.align,
        )

    def weighing(self, step: int) -> frozenset[str]:
        """Whose attention weighs positions in this step: "student_importance", "teacher_importance"."""
        found = (x for x in self.losses.values() if isinstance(x, LayerwiseLoss) and step >= x.attention_starts)
        return frozenset().union(*(loss.needs - loss.requires for loss in found))

    def attach(self, student: nn.Module) -> None:
        """Become `student.kv_bridge`, and hook into its forward pass."""
        queries = bool(self.requires & {"student_attention", "student_importance"})
        hidden = "student_hidden" in self.requires
        if "student_kv" in self.requires or queries or hidden or self.router is not None:
            self._capture = KVCapture(student, queries=queries, hidden=hidden)
        student.add_module(NAME, self)
        self._handles = [student.register_forward_pre_hook(self._before), student.register_forward_hook(self._after)]

    def detach(self, student: nn.Module) -> None:
        """Undo `attach`: what the losses and the teachers hold is let go of with the bridge."""
        if self._capture is not None:
            self._capture.close()
        for handle in self._handles:
            handle.remove()
        delattr(student, NAME)

    @contextmanager
    def supervise(self, supervision: Supervision) -> Iterator[None]:
        """Inside the block, the student's next forward pass returns the total loss as `output.loss`."""
        self._given = supervision
        try:
            yield
        finally:
            self._given = None
            if self._capture is not None:
                self._capture.forget()

    # Under torch_compile the student is one graph, from hook to hook; the losses, whose shapes depend on data, are not.
    @torch.compiler.disable
    def _before(self, module: nn.Module, args: Any) -> None:
        if self._given is not None and self._capture is not None:
            self._capture.start()

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Any, output: ModelOutput) -> ModelOutput | None:
        if self._given is None:
            return None
        states = None
        if self._capture is not None:
            with part("capture"):
                states = self._capture.stop(self._given.attention_mask)
            if "student_kv" in self.requires:
                require_gradient(states)
        terms = self(self._given, output.get("logits"), states)
        self._states = states
        if self._given.measure is not None:
            self._given.measure(terms)
        output["loss"] = self.total(terms, self._given.progress)
        self.loss = output["loss"].detach()
        return output

    def total(self, terms: Mapping[str, Tensor], progress: float) -> Tensor:
        """The weighted sum of all terms of one micro-batch."""
        parts = [self.balance.of(n) * loss.weight_at(progress) * terms[n] for n, loss in self.losses.items()]
        extra = [self.fusion.entropy * terms[ROUTER_TERM]] if ROUTER_TERM in terms else []
        return torch.stack([*parts, *extra]).sum()

    def take_states(self) -> KVStates | None:
        """The student's states of the last supervised forward, once: whoever takes them decides how long they live."""
        states, self._states = self._states, None
        return None if states is None else states.map(Tensor.detach)

    def weight_now(self, name: str, progress: float) -> float:
        """The factor of a term, as a number."""
        return float(self.balance.of(name)) * self.losses[name].weight_at(progress)

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

    def forward(self, given: Supervision, logits: Tensor | None, student: KVStates | None) -> dict[str, Tensor]:
        """Every raw term of one micro-batch."""
        with part("fusion"):
            inputs = self.inputs(given, logits, student)
        self.weights = None if inputs.weights is None else inputs.weights.detach()
        self.heard = heard_of(given, inputs)
        terms = {}
        for name, loss in self.losses.items():
            with part(f"losses.{name}"):
                terms[name] = check_term(name, loss(inputs))
            if needs_teacher(loss.needs) and not self.some_rest:
                check_gradient(name, terms[name])
        if self.router is not None and inputs.weights is not None:
            terms[ROUTER_TERM] = self.fusion.regulariser(inputs.weights).sum() / given.num_samples
        self.terms = {name: term.detach() for name, term in terms.items()}
        return terms

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
