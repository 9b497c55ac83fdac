"""What every loss is: a dataclass whose fields are its knobs, called on one micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..types import KVStates

if TYPE_CHECKING:
    from ..alignment.heads import TeacherProjectors
    from ..fusion import Fusion


# What a loss may require; everything else would never be there.
NEEDS = frozenset({
    "logits", "student_kv", "teacher_kv", "projectors", "student_hidden", "teacher_hidden", "hidden_projectors",
    "answer_positions", "student_attention", "teacher_attention", "student_importance", "teacher_importance",
    "teacher_logits",
})  # fmt: skip


@dataclass
class LossInputs:
    """All that a loss may look at. What no loss requires is None.

    logits: [B, T, vocabulary]; labels: [B, T], -100 where not supervised.
    student: its KVStates, keys [B, Hs, T, Ds] with gradient, one a student layer.
    teachers: name -> KVStates already at the student's layers and positions, [B, Ht, T, Dt], mask [B, T].
    weights: [M, B], share of each teacher in each sample, or [M, L, B], also by student layer; summing to one over M.
    fusion: how these shares were made; one that works on the targets themselves is asked again there.
    projectors: name -> the teacher's trainable maps; empty where no loss needs them.
    step, progress: optimizer steps done, and their share of the run (0 to 1).
    student_hidden: L + 1 tensors [B, T, C] with gradient: the embeddings, then the output of every student layer.
    teacher_hidden: name -> as many tensors [B, Ct], at the student's layers and where the teacher says its answer.
    answered: name -> [B] bool, where student and teacher both say one.
    hidden_projectors: name -> L + 1 trainable maps from the student's width to the teacher's (identity where equal).
    answer_positions: [B] long, the position whose logits predict the first token of the answer, -1 where unknown.
    teacher_logits: name -> what the teacher predicts after each student position.
    importance: "student" and/or "teacher" -> [B, T], attention mass that the answer pays to each position, no gradient.
    attention: "student" -> and each teacher's name -> per student layer (queries, keys), [B, Hq, T, D], [B, H, T, D],
    after RoPE, queries times the attention's scaling; a teacher's at the student's positions, without gradient.
    num_tokens, num_samples: supervised tokens and samples in the whole accumulated batch, over all ranks. Every
    loss divides by one of them, so a step is the same however it is cut into micro-batches.
    """

    labels: Tensor
    num_tokens: Tensor | float
    num_samples: Tensor | float
    logits: Tensor | None = None
    student: KVStates | None = None
    teachers: dict[str, KVStates] = field(default_factory=dict)
    weights: Tensor | None = None
    fusion: Fusion | None = None
    projectors: dict[str, TeacherProjectors] = field(default_factory=dict)
    step: int = 0
    progress: float = 0.0
    student_hidden: tuple[Tensor, ...] | None = None
    teacher_hidden: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    answered: dict[str, Tensor] = field(default_factory=dict)
    hidden_projectors: dict[str, nn.ModuleList] = field(default_factory=dict)
    answer_positions: Tensor | None = None
    teacher_logits: dict[str, TeacherLogits] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, tuple[tuple[Tensor, Tensor], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's next-token predictions, made a few positions at a time: never a full [B, T, V] tensor.

    hidden: [B, T, Ct], the teacher's last hidden states at the student's positions, no gradient.
    head: [n, Ct] -> [n, V_teacher], the teacher's own head with all that follows it (scaling, soft cap).
    student_ids, teacher_ids: [V_shared] long, the tokens that both vocabularies hold; None where they are the same.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    student_ids: Tensor | None = None
    teacher_ids: Tensor | None = None


@dataclass
class GradientShare:
    """A weight that follows a target: the weighted term's gradient norm over that of the weighted cross-entropy.

    Every `every` optimizer steps, from the first, both norms are measured on the student's trainable parameters in the
    first micro-batch of the step (one more backward pass a term), and the weight follows: the geometric mean of the old
    one, to the power `smoothing`, and the measured one. The schedule of the loss comes on top.
    """

    gradient_share: float = 0.3
    every: int = 20
    smoothing: float = 0.5

    def __post_init__(self) -> None:
        if self.gradient_share <= 0:
            raise ValueError(f"gradient_share is {self.gradient_share}; give a number above 0, or weight: 0.")
        if self.every < 1 or not 0 <= self.smoothing < 1:
            raise ValueError(f"every is {self.every}, smoothing {self.smoothing}; give at least 1, and 0 up to 1.")


@dataclass
class DistillationLoss:
    """Base of all losses.

    weight: factor of the term in the total; or a share of the gradient that it is to have, such as
    {gradient_share: 0.3}, and the factor follows.
    schedule: how the weight moves over the run: constant, or decaying to zero at its end (linear | cosine).
    warmup_ratio: share of the run over which the weight first rises from zero.
    """

    weight: float | GradientShare = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = 0.0

    requires: ClassVar[frozenset[str]] = frozenset()
    source: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not isinstance(self.weight, GradientShare) and self.weight < 0:
            raise ValueError(f"weight is {self.weight}; a loss weight must not be negative.")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; give a share of the run between 0 and 1.")

    @property
    def needs(self) -> frozenset[str]:
        """What this loss, with these knobs, looks at; what no loss needs is never computed."""
        return self.requires

    @property
    def active(self) -> bool:
        """Whether the term counts at all."""
        return isinstance(self.weight, GradientShare) or self.weight > 0

    @property
    def described_weight(self) -> str:
        """`0.5`, or `gradient share 0.3`."""
        if isinstance(self.weight, GradientShare):
            return f"gradient share {self.weight.gradient_share:g}"
        return f"{self.weight:g}"

    def weight_at(self, progress: float) -> float:
        """The weight when `progress` (0 to 1) of the optimizer steps are done; 1 in place of one that is measured."""
        rise = min(1.0, progress / self.warmup_ratio) if self.warmup_ratio else 1.0
        fall = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
        base = 1.0 if isinstance(self.weight, GradientShare) else self.weight
        return base * rise * fall[self.schedule]

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The raw, unweighted term, a scalar."""
        raise NotImplementedError


@dataclass
class LayerwiseLoss(DistillationLoss):
    """Base of losses on keys and values, layer by layer and position by position.

    layers: the student layers: "all", "middle" (the middle third), or a list. The term is a mean over them.
    attention: whose attention weighs the positions, by the mass that the answer's queries pay to each; mean 1 over the
    positions that count, and without gradient. attention_warmup_steps: for so many steps all count alike: an untrained
    student attends to nothing in particular (default 1000 for student, 500 for teacher).
    annealing_ratio: share of the run over which these layers come in one after the other, in their order; 0 = all at
    once.
    """

    layers: Literal["middle", "all"] | list[int] = "all"
    attention: Literal["none", "student", "teacher"] = "none"
    attention_warmup_steps: int | None = None
    annealing_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention == "none" and self.attention_warmup_steps is not None:
            raise ValueError("attention_warmup_steps would be ignored with attention: none; leave it out.")
        if not 0 <= self.annealing_ratio <= 1:
            raise ValueError(f"annealing_ratio is {self.annealing_ratio}; give a share of the run between 0 and 1.")

    @property
    def needs(self) -> frozenset[str]:
        return self.requires if self.attention == "none" else self.requires | {f"{self.attention}_importance"}

    @property
    def attention_starts(self) -> int:
        """The first step in which attention weighs the positions."""
        default = {"none": 0, "student": 1000, "teacher": 500}[self.attention]
        return default if self.attention_warmup_steps is None else self.attention_warmup_steps

    def layer_factors(self, inputs: LossInputs, layers: int) -> Tensor:
        """[L] factors from 0 to 1; the first of L layers is always in, the l-th is at annealing_ratio * l / (L - 1)."""
        index = torch.arange(layers, dtype=torch.float32, device=inputs.labels.device)
        if not self.annealing_ratio:
            return torch.ones_like(index)
        return (inputs.progress / self.annealing_ratio * (layers - 1) - index + 1).clamp(0, 1)

    def position_weights(self, inputs: LossInputs, mask: Tensor) -> Tensor:
        """[..., B, T] float: how much each True position of the mask [..., B, T] counts; mean 1 over them."""
        mask = mask.float()
        if self.attention == "none" or inputs.step < self.attention_starts:
            return mask
        mass = inputs.importance[self.attention].float() * mask
        total = mass.sum(-1, keepdim=True)
        return torch.where(total > 0, mass * mask.sum(-1, keepdim=True) / total.clamp_min(1e-20), mask)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Mean of `x` over `dim` where `mask` (broadcast to x) holds; 0 where it holds nowhere."""
    mask = mask.to(x.dtype).expand_as(x)
    return (x * mask).sum(dim) / mask.sum(dim).clamp_min(1)


def heard(inputs: LossInputs, layer: int = 0) -> Tensor:
    """[M, B, T], each teacher's share of each position in a student layer: 0 where its mask is False."""
    assert inputs.weights is not None
    weights = inputs.weights if inputs.weights.dim() == 2 else inputs.weights[:, layer]
    return torch.stack([t.mask for t in inputs.teachers.values()]) * weights[:, :, None]


def stacked(states: KVStates, parts: tuple[str, ...], layers: Sequence[int]) -> Tensor:
    """Keys and/or values of some layers as one [N, B, T, H * D] tensor, N = parts x layers."""
    tensors = [getattr(states, part)[i] for part in parts for i in layers]
    flat = [t.transpose(1, 2).flatten(2) for t in tensors]
    widest = max(t.shape[-1] for t in flat)  # latent attention has wider keys than values; zeros relate to nothing
    return torch.stack([t if t.shape[-1] == widest else F.pad(t, (0, widest - t.shape[-1])) for t in flat]).float()


def layer_weights(weights: Tensor, layers: Sequence[int]) -> Tensor:
    """[M, len(layers), B]: the teachers' shares in some student layers, of weights [M, B] or [M, L, B]."""
    return weights[:, None].expand(-1, len(layers), -1) if weights.dim() == 2 else weights[:, layers]


def predicting(labels: Tensor) -> Tensor:
    """[B, T] bool, the positions that predict a supervised label, each the one before it: labels [B, T]."""
    return torch.cat((labels[:, 1:] != -100, labels.new_zeros((len(labels), 1), dtype=torch.bool)), dim=1)


def chosen_layers(layers: Literal["middle", "all"] | list[int], count: int) -> list[int]:
    """The student layers, of `count`, that a `layers` knob names; "middle" is the middle third, never empty."""
    if layers == "middle":
        return list(range(count // 3, count - count // 3))
    if layers == "all":
        return list(range(count))
    wrong = isinstance(layers, str) or not layers or len(set(layers)) < len(layers)
    if wrong or any(not 0 <= layer < count for layer in layers):  # type: ignore[operator]
        raise ValueError(
            f"layers is {layers!r}; give 'middle', 'all', or a list of unlike student layers, from 0 to {count - 1}."
        )
    return list(layers)
