"""A micro-batch of all ranks together, for losses that compare samples with each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..types import KVStates
from .base import LossInputs


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_inputs(inputs: LossInputs) -> LossInputs:
    """Student, teachers, shares, labels and importance of all ranks, rank after rank: B becomes ranks x B.

    The student keeps its gradient on the rank that it came from. Every rank then computes the same loss, so each must
    count 1 / ranks of it. ValueError if ranks have unlike numbers of samples.
    """
    assert inputs.student is not None and inputs.weights is not None
    ours = torch.tensor(inputs.labels.shape, device=inputs.labels.device)
    shapes = [torch.empty_like(ours) for _ in range(ranks())]
    dist.all_gather(shapes, ours)
    sizes = torch.stack(shapes).tolist()
    if len({size[0] for size in sizes}) > 1:
        found = ", ".join(str(size[0]) for size in sizes)
        raise ValueError(f"losses.kv_relation.gather: the ranks have {found} samples; set dataloader_drop_last: true.")
    longest = max(size[1] for size in sizes)

    def text(x: Tensor, fill: Any = 0) -> Tensor:
        """[B, T] -> [ranks x B, longest]."""
        return Gather.apply(F.pad(x, (0, longest - x.shape[1]), value=fill), 0)

    def states(x: KVStates) -> KVStates:
        """[B, H, T, D] -> [ranks x B, H, longest, D]."""
        return x.map(lambda t: Gather.apply(F.pad(t, (0, 0, 0, longest - t.shape[2])), 0), text(x.mask, False))

    return replace(
        inputs, labels=text(inputs.labels, -100), student=states(inputs.student),
        teachers={name: states(teacher) for name, teacher in inputs.teachers.items()},
        weights=Gather.apply(inputs.weights, inputs.weights.dim() - 1),
        importance={name: text(x) for name, x in inputs.importance.items()},
    )  # fmt: skip


class Gather(torch.autograd.Function):
    """x of every rank, joined along `dim`; backward, the sum of all ranks' gradients of what this rank gave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.size = dim, x.shape[dim]
        flags = x.to(torch.uint8) if x.dtype is torch.bool else x  # gloo has no bool
        parts = [torch.empty_like(flags, memory_format=torch.contiguous_format) for _ in range(ranks())]
        dist.all_gather(parts, flags.contiguous())
        return torch.cat(parts, dim).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.narrow(ctx.dim, dist.get_rank() * ctx.size, ctx.size), None
