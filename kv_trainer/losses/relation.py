"""Keys and values compared through the geometry of their positions: no projector, no common shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..fusion import Fusion
from .base import LayerwiseLoss, LossInputs, chosen_layers, heard, stacked
from .gather import gather_inputs, ranks
from .gram import FLOOR, directions, relative_error


def pick_positions(mask: Tensor, count: int) -> Tensor:
    """Indices [B, count] of evenly spaced True positions of each sample; padding moves nothing.

    A sample with fewer True positions than `count` keeps them all; its spare indices point at False ones.
    """
    true = mask.sum(1, keepdim=True)
    rank = torch.arange(count, device=mask.device)[None]
    rank = torch.where(true > count, rank * true // count, rank)
    return (~mask).long().argsort(dim=1, stable=True).gather(1, rank)


@dataclass
class KVRelationLoss(LayerwiseLoss):
    """Relative squared error between the student's and the fused teachers' Gram matrices of positions.

    For every layer, for K and for V, and for every group of samples: the states of its positions are flattened over
    heads, centred, made unit length, and multiplied with each other. All teachers' matrices live in one space,
    positions x positions. Teacher m counts sqrt(w_i w_j) for a pair of positions, w its fusion weights in their two
    samples: a pair that no teacher is trusted with hardly counts. The term is
    sum W (G_student - G_fused)^2 / sum W G_fused^2 off the diagonal: 0 where the geometry agrees, 1 for a student
    whose positions are unrelated. (Where teachers cover unlike positions of a group, each side is centred over its own,
    and the best student keeps a small error.)

    parts: which states are compared.
    samples: so many consecutive samples of a micro-batch make a group. Relations across samples carry what one
    sample cannot show, such as how the numbers lie to each other. A step is independent of gradient accumulation as
    long as `samples` divides the micro-batch; a last, incomplete group is a smaller one.
    max_positions: at most so many positions of a group, evenly spaced.
    gather: groups are made of the samples of all ranks, in their order; without it each rank relates its own.
    Shapes: keys, values [B, H, T, D] a layer, any H and D on either side; mask [B, T]. Returns a scalar.
    Needs: student_kv, teacher_kv.
    Source: relations of MiniLMv2, arXiv 2012.15828, eq. 4-5, and RKD, arXiv 1904.05068, on pre-RoPE K and V.
    """

    parts: Literal["keys", "values", "both"] = "both"
    samples: int = 1
    max_positions: int = 512
    gather: bool = False

    requires: ClassVar[frozenset[str]] = frozenset({"student_kv", "teacher_kv"})
    source: ClassVar[str] = "MiniLMv2, arXiv 2012.15828"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_positions < 2:
            raise ValueError(f"max_positions is {self.max_positions}; a relation needs at least 2 positions.")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; a group needs at least 1 sample.")
        if self.gather and self.samples < 2:
            raise ValueError("gather would be ignored with samples: 1, where no sample meets another; leave it out.")

    def __call__(self, inputs: LossInputs) -> Tensor:
        if self.gather and ranks() > 1:
            return self._of(gather_inputs(inputs)) / ranks()
        return self._of(inputs)

    def _of(self, inputs: LossInputs) -> Tensor:
        assert inputs.student is not None and inputs.weights is not None
        layers = chosen_layers(self.layers, len(inputs.student.layers))
        by_layer = inputs.weights.dim() == 3
        # One layer at a time, for what lives only while it is compared; a fusion may decide on all targets together.
        together = inputs.fusion is not None and inputs.fusion.in_target_space and not by_layer
        compared: list[Tensor] = []
        for some in [layers] if together else [[layer] for layer in layers]:
            if by_layer or not compared:
                shares, chosen = self._shares(inputs, some[0])
            compared.append(self._relative(inputs, some, shares, chosen).unflatten(0, (-1, len(some))))
        relative = torch.cat(compared, dim=1)  # [parts, layers, groups]
        total = torch.einsum("nlq,q,l->", relative, self._sizes(inputs), self.layer_factors(inputs, len(layers)))
        return total / (len(relative) * len(layers)) / inputs.num_samples

    def _sizes(self, inputs: LossInputs) -> Tensor:
        """[groups]: a group counts as many times as it has samples; only the last one can be incomplete."""
        samples = len(inputs.labels)
        sizes = [min(self.samples, samples - start) for start in range(0, samples, self.samples)]
        return torch.tensor(sizes, dtype=torch.float32, device=inputs.labels.device)

    def _shares(self, inputs: LossInputs, layer: int) -> tuple[Tensor, Tensor | None]:
        """[M, groups, P] shares of the positions of each group, and which [groups, P] they are, None for all."""
        shares = heard(inputs, layer)
        shares = shares * self.position_weights(inputs, (shares > 0).any(0))
        shares = grouped(shares, -(-shares.shape[1] // self.samples), self.samples)
        if shares.shape[2] <= self.max_positions:
            return shares, None
        chosen = pick_positions((shares > 0).any(0), self.max_positions)
        return shares.gather(2, chosen.expand(len(shares), -1, -1)), chosen

    def _relative(self, inputs: LossInputs, layers: list[int], shares: Tensor, chosen: Tensor | None) -> Tensor:
        """The relative squared error of some layers, [parts x layers, groups]."""
        parts = ("keys", "values") if self.parts == "both" else (self.parts,)
        by_element = inputs.fusion is not None and inputs.fusion.in_target_space
        if by_element or torch.is_grad_enabled() and shares.requires_grad:
            return self._of_whole_matrices(inputs, parts, layers, shares, chosen)
        lengths, trusted, found = root(shares), (shares > 0).any(0).float(), []
        for part in parts:  # one after the other: half as much is alive at once
            ours, *theirs = self._positions(inputs, (part,), layers, shares.shape[1], chosen)
            with torch.no_grad():
                scaled = [directions(x, length, reuse=True) for x, length in zip(theirs, lengths, strict=True)]
            found.append(relative_error(ours, trusted, scaled, lengths))
        return torch.cat(found)

    def _of_whole_matrices(
        self, inputs: LossInputs, parts: tuple[str, ...], layers: list[int], shares: Tensor, chosen: Tensor | None
    ) -> Tensor:
        """As `_relative`, for a fusion that looks at the targets, or a router that learns through them."""
        ours, *theirs = self._positions(inputs, parts, layers, shares.shape[1], chosen)
        ours = directions(ours, (shares > 0).any(0).float())
        gram = ours @ ours.mT
        with torch.set_grad_enabled(torch.is_grad_enabled() and shares.requires_grad):
            if inputs.fusion is not None and inputs.fusion.in_target_space:
                target, weight = fuse_by_element(theirs, shares, gram.detach(), inputs.fusion)
            else:
                target, weight = fuse(theirs, shares)
        # With the router's gradient: of the numerator alone, its shares would move where the term rises.
        energy = target.square().sum((2, 3))
        # Without any relation in the target (one position, or equal ones) the group teaches nothing.
        return (gram * weight - target).square().sum((2, 3)) / energy.clamp_min(FLOOR) * (energy > FLOOR)

    def _positions(
        self, inputs: LossInputs, parts: tuple[str, ...], layers: list[int], groups: int, chosen: Tensor | None
    ) -> Iterator[Tensor]:
        """The student's states and then each teacher's, [parts x layers, groups, P, C], one at a time."""
        assert inputs.student is not None
        for states in (inputs.student, *inputs.teachers.values()):
            x = grouped(stacked(states, parts, layers), groups, self.samples)
            yield x if chosen is None else take_positions(x, chosen)


def root(x: Tensor) -> Tensor:
    """Square root whose slope at 0 is 0, not infinite."""
    return torch.where(x > 0, x.clamp_min(1e-12).sqrt(), 0.0)


def fuse(teachers: Iterable[Tensor], shares: Tensor) -> tuple[Tensor, Tensor]:
    """The mean Gram matrix, and the weight, of each pair, both with the square root of the weight as a factor.

    teachers: [N, Q, P, C_m] each; shares [M, Q, P]. A pair's weight is W = sum over m of sqrt(share_i share_j), its
    mean cosine sum of sqrt(share_i share_j) cos_m / W. Returns sqrt(W) mean [N, Q, P, P] and sqrt(W) [Q, P, P], zero
    on the diagonal. Scaling the directions by sqrt(share) makes a teacher's part of the sum one product.
    """
    lengths = root(shares)
    weight = root(off_diagonal(torch.einsum("mqi,mqj->qij", lengths, lengths)))
    total: Tensor | float = 0.0
    for x, length in zip(teachers, lengths, strict=True):
        scaled = directions(x, length)
        total += scaled @ scaled.mT
    return total * torch.where(weight > 0, 1 / weight.clamp_min(1e-12), 0), weight


def fuse_by_element(teachers: Iterable[Tensor], shares: Tensor, ours: Tensor, fusion: Fusion) -> tuple[Tensor, Tensor]:
    """As `fuse`, but the fusion decides how much each teacher counts in each pair, or group of samples.

    ours: [N, Q, P, P], the student's Gram matrix. Returns sqrt(W) mean and sqrt(W), both [N, Q, P, P].
    """
    lengths = root(shares)
    weight = torch.stack([off_diagonal(r.unsqueeze(2) * r.unsqueeze(1)) for r in lengths])[:, None]
    units = (directions(x, (r > 0).float()) for x, r in zip(teachers, lengths, strict=True))
    grams = torch.stack([u @ u.mT for u in units])
    mixed = fusion.mixing(grams - ours, weight, keep=2)
    total = mixed.sum(0)
    return (mixed * grams).sum(0) / root(total).clamp_min(1e-6), root(total)


def off_diagonal(x: Tensor) -> Tensor:
    """[..., P, P] with zeros on the diagonal."""
    return x * ~torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)


def grouped(x: Tensor, groups: int, size: int) -> Tensor:
    """[N, B, T, ...] -> [N, groups, size * T, ...]; the last group is filled up with zeros."""
    missing = groups * size - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (groups, size)).flatten(2, 3)


def take_positions(x: Tensor, index: Tensor) -> Tensor:
    """Select positions: x [N, Q, P, C], index [Q, K] -> [N, Q, K, C]."""
    return x.gather(2, index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))
