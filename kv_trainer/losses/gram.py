"""Gram matrices compared block by block: neither they nor anything of their size is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Rows of a Gram matrix at a time: on a CPU what stays in its cache, on a GPU what keeps it busy.
BLOCK, BLOCK_ON_GPU = 64, 1024
FLOOR = 1e-6  # of the sum of squares of a target, below which there is no relation to learn


def relative_error(ours: Tensor, teachers: Sequence[Tensor], lengths: Tensor, block: int | None = None) -> Tensor:
    """sum W (G - F)^2 / sum W F^2 over the pairs of unlike positions of each group: [N, Q].

    ours: [N, Q, P, C], unit directions of the student, zero where no teacher is heard. lengths: [M, Q, P], the square
    roots of the teachers' shares. teachers: M of [N, Q, P, C_m], unit directions times those lengths, no gradient.
    G = ours ours'; W = sum_m lengths_m lengths_m' and F = sum_m teachers_m teachers_m' / W. 0 where F is zero.

    The gradient is computed along with the value, each pair once for both of its orders, in blocks of `block` rows:
    memory is O(P C + block P), and what waits for the backward pass is as large as `ours`.
    """
    block = block or (BLOCK if ours.device.type == "cpu" else BLOCK_ON_GPU)
    return _RelativeError.apply(ours, lengths, block, *teachers)


class _RelativeError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ours: Tensor, lengths: Tensor, block: int, *teachers: Tensor) -> Tensor:
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
            ctx.save_for_backward(slopes, scale)
        return error * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes, scale = ctx.saved_tensors
        # d/dx_i of the sum over both orders of (w x_i'x_j - t)^2 is 4 sum_j (w x_i'x_j - t) w x_j.
        found = slopes * (4 * gradient * scale)[..., None, None]
        return found, *[None] * (len(ctx.needs_input_grad) - 1)


def pair_weights(rows: Tensor, later: Tensor) -> Tensor:
    """sqrt(W) of some rows [M, Q, b] with all positions from the first of them on [M, Q, p]: [Q, b, p], diagonal 0."""
    weight = torch.einsum("mqi,mqj->qij", rows, later)
    weight.diagonal(dim1=1, dim2=2).zero_()
    return weight.sqrt_()


def both_orders(x: Tensor, count: int) -> Tensor:
    """Sum of squares of a strip of a symmetric matrix and of what it mirrors: the first `count` columns hold both."""
    whole, square = (torch.linalg.vector_norm(part, dim=(-2, -1)).square() for part in (x, x[..., :count]))
    return 2 * whole - square
