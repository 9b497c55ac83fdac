"""The one module that knows both sides: it hooks into the student, and adds the losses against the mapped teachers.

It is a submodule of the student and runs in the student's own forward hook, so every trainable map takes part in the
wrapped forward pass (DDP, ZeRO and FSDP skip gradients, or fail, for parameters used outside it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .arguments import FreezeConfig, MultiTeacherKVConfig
from .balance import Balance, check_reference
from .capture import KVCapture, require_gradient
from .losses import DistillationLoss, needs_teacher
from .losses.checks import check_gradient, check_layers, check_target_space, check_term
from .profiling import part
from .supervision import Supervision, TeacherMaps, heard_of
from .teachers import TeacherNeeds
from .types import KVShape, KVStates

NAME = "kv_bridge"
ROUTER_TERM = "router_entropy"


class KVBridge(TeacherMaps):
    """Maps every teacher to the student, and adds the losses.

    student, teachers: the models' shapes. args: losses, alignment, projector, fusion and control sections.
    given: each teacher's fixed fusion weight. After a supervised forward, `terms` holds the detached raw losses,
    `loss` their weighted sum, `weights` the teachers' shares, [M, B] or [M, L, B], and `heard` a sum of what each
    teacher said.
    """

    def __init__(
        self, student: KVShape, teachers: Mapping[str, KVShape], args: MultiTeacherKVConfig, given: Sequence[float] = ()
    ) -> None:
        super().__init__(active_losses(student, teachers, args), student, teachers, args, given)
        self.some_rest = args.freeze != FreezeConfig()  # then a term may be without gradient for a while
        self.selects = args.alignment.time.method == "rkv"
        self.balance = Balance(self.losses)
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


def active_losses(
    student: KVShape, teachers: Mapping[str, KVShape], args: MultiTeacherKVConfig
) -> dict[str, DistillationLoss]:
    """The losses that have a weight. ValueError where there are none, or where one cannot be had of these models."""
    losses = {name: loss for name, loss in args.losses.items() if loss.active}
    if not losses:
        raise ValueError("No loss has a weight, so nothing would be learned; give one of losses a weight above 0.")
    lonely = [name for name, loss in losses.items() if needs_teacher(loss.needs)]
    if lonely and not teachers:
        raise ValueError(f"losses.{lonely[0]} needs a teacher, but there is none; give teachers, or leave it out.")
    check_reference(args.losses, args.monitor.loss_scales_every)
    for name, loss in losses.items() if student else ():
        check_layers(name, loss, student.num_layers)
    if args.fusion.in_target_space:
        check_target_space(losses, args.projector.direction)
    return losses
