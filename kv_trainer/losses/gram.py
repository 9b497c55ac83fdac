"""Gram matrices compared block by block: neither they nor anything of their size is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of a Gram matrix at a time: on a CPU what stays in its cache, on a GPU what keeps it busy.
BLOCK, BLOCK_ON_GPU = 64, 1024
FLOOR = 1e-6  # of the sum of squares of a target, below which there is no relation to learn


def directions(x: Tensor, length: Tensor, reuse: bool = False) -> Tensor:
    """Centred positions of each group at a given length; of unit length, their products are cosines.

    x [N, Q, P, C], length [Q, P], 0 = masked; returns [N, Q, P, C], zero also where a position differs from the mean
    by rounding alone: it has no direction. Few passes over x: with the products, this is all that the loss costs.
    reuse: write over x, which nothing else needs.
    """
    centred, factor = centred_with_factor(x, length, reuse)
    return centred.mul_(factor) if reuse else centred * factor


def centred_with_factor(x: Tensor, length: Tensor, reuse: bool = False) -> tuple[Tensor, Tensor]:
    """x less the mean of its unmasked positions, and what [N, Q, P, 1] brings each position to its length."""
    mean = torch.einsum("qp,nqpc->nqc", mean_weights(length).to(x.dtype), x).unsqueeze(2)
    centred = x.sub_(mean) if reuse else x - mean
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    floor = 1e-5 * torch.linalg.vector_norm(mean.detach(), dim=-1, keepdim=True)
    return centred, torch.where(norm > floor, length[None, :, :, None] / norm.clamp_min(1e-12), 0.0)


def mean_weights(length: Tensor) -> Tensor:
    """[Q, P]: each unmasked position's share of the mean."""
    mask = length > 0
    return mask / mask.sum(1, keepdim=True).clamp_min(1)


def relative_error(
    states: Tensor, trusted: Tensor, teachers: Sequence[Tensor], lengths: Tensor, block: int | None = None
) -> Tensor:
    """sum W (G - F)^2 / sum W F^2 over the pairs of unlike positions of each group: [N, Q].

    states: [N, Q, P, C], the student's. trusted: [Q, P], 1.0 where some teacher has a share. lengths: [M, Q, P], the
    square roots of the shares. teachers: M of [N, Q, P, C_m], `directions` of those lengths, no gradient.
    G holds the cosines of the student's centred positions; W = sum_m lengths_m lengths_m' and F is the sum over m of
    teachers_m teachers_m' / W. 0 where F is zero.

    The gradient is computed along with the value, each pair once for both of its orders, in blocks of `block` rows:
    memory is O(N Q (P C + block P)), and all that waits for the backward pass is one tensor as large as `states`.
    """
    block = block or (BLOCK if states.device.type == "cpu" else BLOCK_ON_GPU)
    return _RelativeError.apply(states, trusted, lengths, block, *teachers)


class _RelativeError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, trusted: Tensor, lengths: Tensor, block: int, *teachers: Tensor) -> Tensor:
        ours, factor = centred_with_factor(states, trusted)
        ours = ours.mul_(factor)
        error, energy = ours.new_zeros(2, *ours.shape[:2])
        slopes = torch.zeros_like(ours) if ctx.needs_input_grad[0] else None
        for start in range(0, ours.shape[2], block):
            rows, later = ours[:, :, start : start + block], ours[:, :, start:]
            count = rows.shape[2]
            weight = pair_weights(lengths[:, :, start : start + block], lengths[:, :, start:])
            target = sum(x[:, :, start : start + block] @ x[:, :, start:].mT for x in teachers)
            target = target * torch.where(weight > 0, 1 / weight.clamp_min(1e-12), 0)
            difference = (rows @ later.mT).mul_(weight).sub_(target)
            error += both_orders(difference, count)
            energy += both_orders(target, count)
            if slopes is not None:
                slope = difference.mul_(weight)
                slopes[:, :, start : start + count] += slope @ later
                slopes[:, :, start + count :] += slope[..., count:].mT @ rows
        scale = (energy > FLOOR) / energy.clamp_min(FLOOR)
        if slopes is not None:
            # d/dx_i of the sum over both orders of (w x_i'x_j - t)^2 is 4 sum_j (w x_i'x_j - t) w x_j.
            slopes.mul_(4 * scale[..., None, None])
            ctx.save_for_backward(through_directions(slopes, ours, factor, trusted))
        return error * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradient[..., None, None], *[None] * (len(ctx.needs_input_grad) - 1)


def through_directions(slopes: Tensor, units: Tensor, factor: Tensor, trusted: Tensor) -> Tensor:
    """The gradient on x, of one on its unit directions (changed in place): first the length goes, then the mean."""
    along = (slopes * units).sum(-1, keepdim=True)
    slopes.sub_(units * along).mul_(factor)
    return slopes.sub_(mean_weights(trusted).to(slopes.dtype)[None, :, :, None] * slopes.sum(2, keepdim=True))


def pair_weights(rows: Tensor, later: Tensor) -> Tensor:
    """sqrt(W) of some rows [M, Q, b] with all positions from the first of them on [M, Q, p]: [Q, b, p], diagonal 0."""
    weight = torch.einsum("mqi,mqj->qij", rows, later)
    weight.diagonal(dim1=1, dim2=2).zero_()
    return weight.sqrt_()


def both_orders(x: Tensor, count: int) -> Tensor:
    """Sum of squares of a strip of a symmetric matrix and of what it mirrors: the first `count` columns hold both."""
    whole, square = (torch.linalg.vector_norm(part, dim=(-2, -1)).square() for part in (x, x[..., :count]))
    return 2 * whole - square
