"""Keys and values compared one by one, after a trainable map between the two models' heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..alignment.heads import TeacherProjectors
from ..types import KVStates
from .base import LayerwiseLoss, LossInputs, chosen_layers, heard, layer_weights

Pair = tuple[Tensor, Tensor]
Metric = Literal["mse", "smooth_l1", "l1", "cosine"]


def distance(x: Tensor, y: Tensor, scale: Tensor, metric: Metric) -> Tensor:
    """Elementwise distance of two [B, H, T, D] tensors in units of `scale`, averaged over H and D: [B, T].

    Angles have no unit: `scale` is not read for "cosine".
    """
    if metric == "cosine":
        return 1 - F.cosine_similarity(x.transpose(1, 2).flatten(2), y.transpose(1, 2).flatten(2), dim=-1)
    function = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}[metric]
    gap = (x - y) / scale  # all that is kept for the backward pass, where x and y would be two
    return function(gap, gap.new_zeros(()).expand_as(gap), reduction="none").mean((1, 3))


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation about the mean position of one sample: x [B, H, T, D], mask [B, T] -> [B, 1, 1, 1].

    One position, or equal ones, have no spread but rounding: there it is the root mean square.
    """
    where, count = mask[:, None, :, None], mask.sum(1).clamp_min(1)
    x = x * where
    centred = (x - x.sum(2, keepdim=True) / count[:, None, None, None]).mul_(where)
    size, variance = (
        torch.linalg.vector_norm(y, dim=(1, 2, 3)).square() / (count * x.shape[1] * x.shape[3]) for y in (x, centred)
    )
    return torch.where(variance > 1e-6 * size, variance, size).clamp_min(1e-12).sqrt()[:, None, None, None]


@dataclass
class KVLoss(LayerwiseLoss):
    """Distance between the student's keys and values and the teachers', head by head.

    The projectors decide the direction. `student_to_teacher`: the student's states are mapped to each teacher's
    shape and compared with its fixed states, both standardised by the teacher's calibrated channel statistics;
    teachers are averaged with their fusion weights.
    `teacher_to_student`: each teacher's states are mapped to the student's shape and fused into one target. That
    target is trainable, so the projector can solve the loss alone (target collapse); prefer the first.

    Shapes: keys, values [B, H, T, D] a layer; mask [B, T], True = counts. Both sides are divided by the detached
    spread of the target in each layer and sample. Returns a scalar: mean over positions, layers, K and V, samples.
    Needs: student_kv, teacher_kv, projectors.
    Source: KaVa, arXiv 2510.02312, eq. 6 (the term); projectors and normalisation are this package's.
    """

    metric: Metric = "mse"

    requires: ClassVar[frozenset[str]] = frozenset({"student_kv", "teacher_kv", "projectors"})
    source: ClassVar[str] = "KaVa, arXiv 2510.02312"

    def __call__(self, inputs: LossInputs) -> Tensor:
        assert inputs.student is not None and inputs.weights is not None
        directions = {p.direction for p in inputs.projectors.values()}
        assert len(directions) == 1, "all teachers share one direction"
        per_layer = self._to_teachers(inputs) if directions == {"student_to_teacher"} else self._to_student(inputs)
        factors = self.layer_factors(inputs, len(per_layer))
        return torch.einsum("lb,l->", per_layer, factors) / len(factors) / inputs.num_samples

    def _to_teachers(self, inputs: LossInputs) -> Tensor:
        """[L, B] of the chosen layers, teachers averaged by their shares."""
        assert inputs.student is not None and inputs.weights is not None
        total = torch.zeros((), device=inputs.labels.device)
        student = pairs(inputs.student)
        layers = chosen_layers(self.layers, len(student))
        shares = layer_weights(inputs.weights, layers)
        for weight, (name, teacher) in zip(shares, inputs.teachers.items(), strict=True):
            where, said, maps = self.position_weights(inputs, teacher.mask), pairs(teacher), inputs.projectors[name]
            each = []
            for i in layers:
                units = self._units(maps, i, said[i], teacher.mask)
                each.append(self._once(inputs, self._through, maps, i, student[i], said[i], units, where))
            total = total + weight * torch.stack(each)
        return total

    @torch.no_grad()
    def _units(self, projectors: TeacherProjectors, layer: int, theirs: Pair, mask: Tensor) -> Pair:
        """What one of keys, and of values, is measured in: the calibrated units of the teacher's channels, so that a
        few loud ones are not all, times the spread of its states in these."""
        deviations = [projectors.deviation(part, layer, x.shape[-1]) for part, x in enumerate(theirs)]
        keys, values = (unit * spread(x.float() / unit, mask) for unit, x in zip(deviations, theirs, strict=True))
        return keys, values

    def _through(
        self, projectors: TeacherProjectors, layer: int, ours: Pair, theirs: Pair, units: Pair, where: Tensor
    ) -> Tensor:
        """[B]: one student layer mapped to one teacher's shape, against that teacher."""
        maps = (projectors.keys[layer], projectors.values[layer])
        projected = [f(x) for f, x in zip(maps, ours, strict=True)]
        if self.metric == "cosine":  # in a difference the mean of a channel is gone, in an angle it is not
            projected, fixed = (
                [projectors.standard(x, part, layer) for part, x in enumerate(side)] for side in (projected, theirs)
            )
            return self._compare(projected, fixed, units, where)
        return self._compare(projected, theirs, units, where)

    def _to_student(self, inputs: LossInputs) -> Tensor:
        """[L, B] of the chosen layers, against one fused target."""
        assert inputs.student is not None
        student = pairs(inputs.student)
        layers = chosen_layers(self.layers, len(student))
        return torch.stack([self._once(inputs, self._fused, inputs, i, student[i]) for i in layers])

    def _once(self, inputs: LossInputs, function: Callable[..., Tensor], *given: Any) -> Tensor:
        """function(*given), of which nothing is kept for the backward pass where there are several teachers.

        It is computed again there: the memory does not grow with the teachers.
        """
        if len(inputs.teachers) == 1 or not torch.is_grad_enabled():
            return function(*given)
        return checkpoint(function, *given, use_reentrant=False)

    def _fused(self, inputs: LossInputs, layer: int, ours: Pair) -> Tensor:
        """[B]: one student layer against the mean of the teachers in the student's shape."""
        share = heard(inputs, layer)  # [M, B, T]
        mask = (share > 0).any(0)
        targets = (self._mapped(inputs, part, layer) for part in ("keys", "values"))
        fused = [self._fuse(x, part, share, inputs) for x, part in zip(ours, targets, strict=True)]
        units = [spread(y.detach().float(), mask) for y in fused]
        return self._compare(ours, fused, units, self.position_weights(inputs, mask))

    def _mapped(self, inputs: LossInputs, part: str, layer: int) -> Iterator[Tensor]:
        """Every teacher's keys, or values, of a student layer in the student's shape, one teacher at a time."""
        for name, teacher in inputs.teachers.items():
            yield getattr(inputs.projectors[name], part)[layer](getattr(teacher, part)[layer])

    def _fuse(self, ours: Tensor, targets: Iterator[Tensor], share: Tensor, inputs: LossInputs) -> Tensor:
        """The teachers' mean: ours and each target [B, H, T, D], share [M, B, T] -> [B, H, T, D]."""
        mixed = share[:, :, None, :, None]
        if inputs.fusion is not None and inputs.fusion.in_target_space:
            found = torch.stack(list(targets))
            mixed = inputs.fusion.mixing((found - ours).detach(), mixed, keep=1)
            targets = iter(found)
        total = torch.zeros((), device=share.device)
        for weight, target in zip(mixed, targets, strict=True):
            total = total + weight * target
        return total / mixed.sum(0).clamp_min(1e-12)

    def _compare(
        self, ours: Sequence[Tensor], target: Sequence[Tensor], units: Sequence[Tensor], where: Tensor
    ) -> Tensor:
        """Mean over positions (weighted by `where` [B, T]) of keys and values, in their units: [B]."""
        terms = []
        for x, y, unit in zip(ours, target, units, strict=True):
            distances = distance(x.float(), y.float(), unit, self.metric)
            terms.append((distances * where).sum(1) / where.sum(1).clamp_min(1))
        return torch.stack(terms).mean(0)


def pairs(states: KVStates) -> list[Pair]:
    """Keys and values, layer by layer."""
    return list(zip(states.keys, states.values, strict=True))
